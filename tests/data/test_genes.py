"""The gene vocabulary and the alignment of an input's genes to it."""

from __future__ import annotations

import gzip
import hashlib
import re
import subprocess
import sys
import warnings
from importlib import resources
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from sct.data.genes.vocabulary import HUMAN_VERSION, GeneVocabulary
from sct.errors import DataError, StoreError

HUMAN = GeneVocabulary.human()
HUMAN_HASH = "f02566ce3cf7eee3ae5b0379f3324ba077beb7f31df5cec118a4684e6acd78b4"
UNIQUE = [i for i, symbol in enumerate(HUMAN.symbols) if len(HUMAN.owners_of_symbol[symbol]) == 1]

positions = st.lists(st.sampled_from(UNIQUE), min_size=5, max_size=60, unique=True)


def toy(**changes) -> GeneVocabulary:
    """Five genes with every kind of name conflict."""
    fields = {
        "ensembl_ids": ("ENSG00000000001", "ENSG00000000002", "ENSG00000000003", "ENSG00000000004", ""),
        "symbols": ("AAA", "BBB", "CCC", "DUP", "DUP2"),
        "aliases": (("A1", "SHARED"), ("B1", "SHARED"), ("AAA",), (), ()),
        "previous": (("OLDA",), ("A0", "B1"), ("C0",), (), ()),
        "names": ("",) * 5,
        "locus_groups": ("",) * 5,
        "locations": ("",) * 5,
        "name": "toy",
    }
    return GeneVocabulary(**{**fields, **changes})


# The shipped table ---------------------------------------------------------------------------------------


def test_human_table_is_the_one_that_models_were_trained_with():
    assert len(HUMAN) == 20_124
    assert HUMAN.name == HUMAN_VERSION
    assert HUMAN.hash == HUMAN_HASH
    assert all(re.fullmatch(r"ENSG\d{11}", gene) for gene in HUMAN.ensembl_ids)
    assert HUMAN is GeneVocabulary.human()


def test_human_table_knows_genes_by_all_their_names():
    at = HUMAN.symbols.index("SEPTIN2")
    assert HUMAN.ensembl_ids[at] == "ENSG00000168385"
    assert "SEPT2" in HUMAN.previous[at]
    assert HUMAN.names[at] == "septin 2"
    assert HUMAN.locations[at] == "2q37.3"
    assert sum(bool(name) for name in HUMAN.names) > 19_000
    assert HUMAN.locus_groups.count("protein-coding gene") > 19_000


def test_human_order_is_genomic():
    chromosomes = {str(n): n for n in range(1, 23)} | {"X": 23, "Y": 24, "mitochondria": 25}
    ranks = [
        chromosomes[match[0]] if (match := re.match(r"\d+(?=[pq])|[XY](?=[pq])|mitochondria", place)) else 26
        for place in HUMAN.locations
    ]
    assert ranks == sorted(ranks)
    assert HUMAN.locations[0] == "1p36.33"
    first = {}
    for at, place in enumerate(HUMAN.locations):
        first.setdefault(place, at)
    bands = [
        "1p36.33",
        "1p36.32",
        "1p36.31",
        "1p36.23",
        "1p36.21",
        "1p35.3",
        "1p22.1",
        "1p13.3",
        "1p12",
        "1p11.2",
    ]
    bands += [
        "1q21.1",
        "1q21.2",
        "1q22",
        "1q31.3",
        "1q32.1",
        "1q41",
        "1q42.11",
        "1q42.12",
        "1q44",
        "2p25.3",
        "2q11.2",
    ]
    assert [first[band] for band in bands] == sorted(first[band] for band in bands)
    same_place: dict[str, list[str]] = {}
    for gene, place in zip(HUMAN.ensembl_ids, HUMAN.locations, strict=True):
        same_place.setdefault(place, []).append(gene)
    assert all(genes == sorted(genes) for genes in same_place.values())
    unplaced = [gene for gene, rank in zip(HUMAN.ensembl_ids, ranks, strict=True) if rank == 26]
    assert len(unplaced) == 774
    assert unplaced == sorted(unplaced)


def test_making_the_table_twice_gives_the_shipped_bytes(shared_data, tmp_path):
    script = Path(__file__).resolve().parents[2] / "tools" / "make_gene_table.py"
    source = shared_data / "meta" / "gene_table.tsv.gz"
    subprocess.run([sys.executable, script, source, tmp_path / "made.gz"], check=True, capture_output=True)
    shipped = (resources.files("sct.data") / "assets" / "genes_human.tsv.gz").read_bytes()
    assert (tmp_path / "made.gz").read_bytes() == shipped
    assert len(shipped) < 2_000_000


def test_table_is_read_as_a_plain_table():
    asset = resources.files("sct.data") / "assets" / "genes_human.tsv.gz"
    lines = gzip.decompress(asset.read_bytes()).decode().splitlines()
    assert lines[0].split("\t")[:2] == ["ensembl_id", "symbol"]
    assert len(lines) == 20_125


# Identity ------------------------------------------------------------------------------------------------


@given(positions, st.randoms(use_true_random=False))
@settings(max_examples=25, deadline=None)
def test_hash_is_of_the_genes_and_their_order(chosen, random):
    ids = [HUMAN.ensembl_ids[i] for i in chosen]
    shuffled = random.sample(ids, len(ids))
    a, b = GeneVocabulary.from_ids(ids, name="a"), GeneVocabulary.from_ids(shuffled, name="b")
    assert (a.hash == b.hash) == (ids == shuffled)
    assert a.hash == hashlib.sha256("\n".join(ids).encode()).hexdigest()
    assert a.hash != GeneVocabulary.from_ids(ids[:-1]).hash


def test_hash_uses_the_symbol_where_there_is_no_id():
    assert toy().hash != toy(symbols=("AAA", "BBB", "CCC", "DUP", "OTHER")).hash
    assert toy().hash == toy(symbols=("XXX", "BBB", "CCC", "DUP", "DUP2"), name="other").hash


def test_species_is_that_of_the_ensembl_ids():
    human = GeneVocabulary.human()
    assert human.species == "human"
    assert GeneVocabulary.from_ids(["ENSMUSG00000051951", "ENSMUSG00000025902.14"]).species == "mouse"
    for ids in (["ENSMUSG00000051951", human.ensembl_ids[0]], ["ENSXYZG00000000001"], ["gene1", "MUS"]):
        assert GeneVocabulary.from_ids(ids).species == ""
    assert GeneVocabulary.from_ids([""], symbols=["CD3E"]).species == ""


def test_check_same_names_both_owners_and_hashes():
    a = GeneVocabulary.from_ids(HUMAN.ensembl_ids[:4], name="a")
    a.check_same(GeneVocabulary.from_ids(HUMAN.ensembl_ids[:4], name="b"), what="x", other_what="y")
    b = GeneVocabulary.from_ids(HUMAN.ensembl_ids[3::-1], name="b")
    with pytest.raises(StoreError, match="another order") as error:
        a.check_same(b, what="the store s", other_what="the model m")
    for part in ("the store s", "the model m", a.hash[:16], b.hash[:16]):
        assert part in str(error.value)


@given(positions)
@settings(max_examples=25, deadline=None)
def test_subset_keeps_order_and_facts(chosen):
    part = HUMAN.subset([f"{HUMAN.ensembl_ids[i]}.7" for i in chosen])
    assert part.ensembl_ids == tuple(HUMAN.ensembl_ids[i] for i in sorted(chosen))
    assert part.names == tuple(HUMAN.names[i] for i in sorted(chosen))
    assert GeneVocabulary.from_ids(part.ensembl_ids) == GeneVocabulary(**{**vars_of(part), "name": "custom"})


def vars_of(vocabulary: GeneVocabulary) -> dict:
    fields = GeneVocabulary.__dataclass_fields__
    return {name: getattr(vocabulary, name) for name in fields}


def test_subset_of_unknown_genes_is_refused():
    with pytest.raises(DataError, match="ENSG00000999999"):
        HUMAN.subset([HUMAN.ensembl_ids[0], "ENSG00000999999"])


def test_names_of_genes_left_out_are_not_taken_for_others():
    # CCC has the alias AAA, which is another gene's symbol; without that gene the name must stay unknown.
    part = toy().subset(["ENSG00000000003", "ENSG00000000001"])
    assert part.aliases == (("A1",), ("AAA",))
    only_c = toy().subset(["ENSG00000000003"])
    assert only_c.aliases == ((),)
    assert only_c.align(["CCC", "AAA"]).columns.tolist() == [0, -1]


def test_from_ids_takes_any_order_and_any_names():
    made = GeneVocabulary.from_ids(["ENSG00000141510.18", "geneX", ""], symbols=["TP53", "x", "onlySymbol"])
    assert made.ensembl_ids == ("ENSG00000141510", "geneX", "")
    assert made.names == ("tumor protein p53", "", "")
    assert made.align(["onlySymbol", "geneX", "ENSG00000141510"]).columns.tolist() == [2, 1, 0]
    assert GeneVocabulary.from_ids(["ENSG00000141510", "geneX"]).symbols == ("TP53", "geneX")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["ENSG00000141510", "ENSG00000141510.2"],), "more than once"),
        (([],), "vocabulary is empty"),
        (([""],), "neither"),
        ((["a", float("nan")],), "missing name"),
        ((["a", 3],), "int"),
        ((["a", "b"], ["a"]), "2 ids"),
        ((["a\tb"],), "tab"),
        (("ENSG00000141510",), "single string"),
        ((3,), "int"),
    ],
)
def test_from_ids_refuses(arguments, message):
    with pytest.raises(DataError, match=message):
        GeneVocabulary.from_ids(*arguments)


# Files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [HUMAN, toy(), HUMAN.subset(HUMAN.ensembl_ids[5:9])], ids=len)
def test_saved_and_loaded_is_the_same(vocabulary, tmp_path):
    path = tmp_path / "new" / "genes.tsv"
    vocabulary.save(path)
    loaded = GeneVocabulary.load(path)
    assert loaded == vocabulary
    assert loaded.hash == vocabulary.hash
    assert [p.name for p in path.parent.iterdir()] == ["genes.tsv"]
    table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
    assert table["ensembl_id"].tolist() == list(vocabulary.ensembl_ids)


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "genes.tsv"
    toy().save(path)
    before = path.read_bytes()

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", broken)
    with pytest.raises(OSError, match="disk full"):
        HUMAN.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["genes.tsv"]


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda lines: [*lines[:3], lines[2], *lines[3:-1], ""], 4),  # a repeated line
        (lambda lines: ["id\tname", *lines[1:]], 1),
        (lambda lines: [*lines[:2], lines[2].rsplit("\t", 1)[0], *lines[3:]], 3),
        (lambda lines: [*lines[:4], ""], 2),  # fewer genes than the file says
        (lambda lines: [*lines[:4], lines[4][:9]], 5),  # ends in the middle of a line
        (lambda lines: [*lines[:2], "\t\t" + lines[2].split("\t", 2)[2], *lines[3:]], 3),
        (lambda lines: [lines[0], ""], 2),
        (lambda lines: [""], 1),
    ],
)
def test_damaged_file_is_an_error_with_file_and_line(damage, line, tmp_path):
    path = tmp_path / "genes.tsv"
    toy().save(path)
    path.write_text("\n".join(damage(path.read_text().split("\n"))))
    with pytest.raises(DataError, match=rf"genes\.tsv line {line}: "):
        GeneVocabulary.load(path)


def test_absent_or_binary_file_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"no\.tsv"):
        GeneVocabulary.load(tmp_path / "no.tsv")
    (tmp_path / "binary.tsv").write_bytes(b"ensembl\n\xff\xfe")
    with pytest.raises(DataError, match=r"binary\.tsv line 2"):
        GeneVocabulary.load(tmp_path / "binary.tsv")


# Alignment: laws -----------------------------------------------------------------------------------------


@given(positions, st.data())
@settings(max_examples=40, deadline=None)
def test_permuting_the_input_permutes_the_columns(chosen, data):
    names = [HUMAN.symbols[i] for i in chosen] + ["not_a_gene"]
    order = data.draw(st.permutations(range(len(names))))
    straight = HUMAN.align(names)
    permuted = HUMAN.align([names[i] for i in order])
    assert permuted.columns.tolist() == straight.columns[list(order)].tolist()
    assert permuted.matched == straight.matched == len(chosen)
    assert set(permuted.missing) == set(straight.missing)


@given(positions, st.data())
@settings(max_examples=40, deadline=None)
def test_ids_versions_and_symbols_mean_the_same(chosen, data):
    ids = [HUMAN.ensembl_ids[i] for i in chosen]
    versions = [f"{gene}.{data.draw(st.integers(1, 30))}" for gene in ids]
    expected = HUMAN.align(ids)
    assert expected.columns.tolist() == chosen
    assert HUMAN.align(versions).columns.tolist() == chosen
    assert HUMAN.align([HUMAN.symbols[i] for i in chosen]).columns.tolist() == chosen
    assert not expected.by_alias
    assert not expected.unknown
    assert expected.matched + len(expected.missing) == len(HUMAN)


@given(positions, st.integers(0, 2**32 - 1), st.sampled_from(["csr", "csc", "dense"]))
@settings(max_examples=25, deadline=None)
def test_project_moves_each_column_and_keeps_totals(chosen, seed, kind):
    names = [HUMAN.symbols[i] for i in chosen] + ["not_a_gene"]
    counts = np.random.default_rng(seed).poisson(0.5, (7, len(names))).astype(np.float32)
    matrix = {"csr": sparse.csr_matrix, "csc": sparse.csc_array, "dense": np.asarray}[kind](counts)
    projected = HUMAN.align(names).project(matrix)
    assert projected.shape == (7, len(HUMAN))
    assert projected.dtype == np.float32
    assert projected.has_sorted_indices
    np.testing.assert_array_equal(projected[:, chosen].toarray(), counts[:, :-1])
    np.testing.assert_array_equal(projected.sum(axis=1).A1, counts[:, :-1].sum(axis=1))


def test_every_gene_of_the_table_finds_itself():
    aligned = HUMAN.align(HUMAN.ensembl_ids)
    np.testing.assert_array_equal(aligned.columns, np.arange(len(HUMAN)))
    by_symbol = HUMAN.align([HUMAN.symbols[i] for i in UNIQUE])
    np.testing.assert_array_equal(by_symbol.columns, UNIQUE)
    assert len(HUMAN) == len(UNIQUE)


def test_a_pseudoautosomal_symbol_is_the_gene_that_hgnc_lists():
    aligned = HUMAN.align(["CD99", "ENSG00000292348", *HUMAN.symbols[:100]])
    assert [HUMAN.ensembl_ids[i] for i in aligned.columns[:2]] == ["ENSG00000002586", "ENSG00000292348"]


def test_shared_symbols_are_not_guessed():
    ids = [f"ENSG{i:011d}" for i in range(12)]
    vocabulary = GeneVocabulary.from_ids(ids, symbols=["TWIN", "TWIN", *(f"G{i}" for i in range(10))])
    aligned = vocabulary.align(["TWIN", *(f"G{i}" for i in range(10))])
    assert aligned.ambiguous == {"TWIN": (ids[0], ids[1])}
    assert aligned.columns.tolist() == [-1, *range(2, 12)]


# Alignment: conflicts ------------------------------------------------------------------------------------


def test_aliases_resolve_only_where_they_mean_one_gene():
    aligned = toy().align(["A1", "C0", "SHARED", "BBB", "B1", "nothing"])
    assert aligned.columns.tolist() == [0, 2, -1, 1, -1, -1]
    assert aligned.by_alias == {"A1": "ENSG00000000001", "C0": "ENSG00000000003"}
    assert aligned.ambiguous == {
        "SHARED": ("ENSG00000000001", "ENSG00000000002"),
        "B1": ("ENSG00000000002",),  # an alias of BBB, which has a column of its own
    }
    assert aligned.unknown == ("nothing",)
    assert aligned.missing == ("ENSG00000000004", "DUP2")


def test_an_approved_symbol_wins_over_an_alias():
    aligned = toy().align(["AAA", "BBB"])
    assert aligned.columns.tolist() == [0, 1]
    assert not aligned.by_alias


def test_two_aliases_of_one_gene_are_both_left_unused():
    aligned = toy().align(["A1", "OLDA", "BBB", "CCC"], duplicates="sum")
    assert aligned.columns.tolist() == [-1, -1, 1, 2]
    assert set(aligned.ambiguous) == {"A1", "OLDA"}


def test_an_alias_of_a_gene_that_another_column_names_by_id_is_left_unused():
    aligned = toy().align(["ENSG00000000001", "A1", "BBB"])
    assert aligned.columns.tolist() == [0, -1, 1]
    assert aligned.ambiguous == {"A1": ("ENSG00000000001",)}


@pytest.mark.parametrize(
    "names",
    [
        ["AAA", "BBB", "AAA"],
        ["ENSG00000000001.1", "BBB", "ENSG00000000001.2"],
        ["ENSG00000000001", "BBB", "AAA"],
    ],
)
def test_real_duplicates_are_refused_unless_they_are_summed(names):
    with pytest.raises(DataError, match=r'ENSG00000000001.*duplicates="sum"'):
        toy().align(names)
    aligned = toy().align(names, duplicates="sum")
    assert aligned.columns.tolist() == [0, 1, 0]
    assert aligned.duplicates == {"ENSG00000000001": (names[0], names[2])}
    counts = np.array([[200, 1, 100], [0, 0, 3]], np.uint8)
    projected = aligned.project(sparse.csr_matrix(counts))
    assert projected.toarray()[:, :2].tolist() == [[300, 1], [3, 0]]


def test_the_y_copy_of_a_pseudoautosomal_gene_is_no_duplicate():
    names = ["ENSG00000000001.5", "ENSG00000000001.5_PAR_Y", "ENSG00000000002.1_PAR_Y"]
    aligned = toy().align(names)
    assert aligned.columns.tolist() == [0, -1, 1]
    assert aligned.duplicates == {"ENSG00000000001": tuple(names[:2])}
    assert toy().align(names, duplicates="sum").columns.tolist() == [0, 0, 1]


def test_report_in_words():
    text = toy().align(["A1", "BBB", "SHARED", "nothing"]).summary()
    assert "2 of 5 vocabulary genes found among 4 input genes, by names (symbols)" in text
    assert "A1 = ENSG00000000001" in text
    assert "SHARED" in text
    assert "nothing" in text


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.sampled_from([np.float32, np.int32, np.uint16, np.float64]), st.booleans()
)
def test_project_is_a_product_with_the_map_of_columns(seed, dtype, doubled):
    """Rows in any state: columns in no order, entries twice, zeros that are stored."""
    rng = np.random.default_rng(seed)
    names = [HUMAN.keys[i] for i in rng.permutation(len(HUMAN))[:20]] + ["nothing"]
    names = list(rng.permutation(names + names[:3] * doubled))
    aligned = HUMAN.align(names, duplicates="sum")
    n_cells, size = int(rng.integers(0, 6)), int(rng.integers(0, 60)) if len(names) else 0
    size = size if n_cells else 0
    cells, columns = np.sort(rng.integers(0, max(n_cells, 1), size)), rng.integers(0, len(names), size)
    indptr = np.searchsorted(cells, np.arange(n_cells + 1))
    matrix = sparse.csr_matrix(
        (rng.integers(0, 4, size).astype(dtype), columns, indptr), shape=(n_cells, len(names))
    )
    expected = np.zeros((n_cells, len(HUMAN)))
    np.add.at(expected.T, aligned.columns[aligned.columns >= 0], matrix.toarray().T[aligned.columns >= 0])
    projected = aligned.project(matrix)
    np.testing.assert_array_equal(projected.toarray(), expected)
    assert projected.has_canonical_format
    assert (projected.data != 0).all()
    assert projected.dtype == (np.int64 if doubled and np.issubdtype(dtype, np.integer) else dtype)


def test_project_refuses_another_matrix():
    with pytest.raises(DataError, match=r"\(2, 3\).*4 genes"):
        toy().align(["AAA", "BBB", "CCC", "DUP"]).project(np.ones((2, 3)))


# Alignment: where the names stand ------------------------------------------------------------------------


def table() -> pd.DataFrame:
    some = UNIQUE[:50]
    return pd.DataFrame(
        {
            "n_cells": np.arange(50),
            "chromosome": pd.Categorical(["1"] * 50),
            "gene_ids": [f"{HUMAN.ensembl_ids[i]}.3" for i in some],
            "feature_name": pd.Categorical([HUMAN.symbols[i] for i in some]),
        },
        index=[f"gene{i}" for i in range(50)],
    )


def test_names_are_found_in_any_column_or_the_index():
    var = table()
    assert HUMAN.align(var).source == 'column "gene_ids" (Ensembl ids)'
    assert HUMAN.align(var.drop(columns="gene_ids")).source == 'column "feature_name" (symbols)'
    indexed = var.set_index("feature_name").drop(columns="gene_ids")
    assert HUMAN.align(indexed).source == "index (symbols)"
    for source in (var, var.drop(columns="gene_ids"), indexed, indexed.index):
        assert HUMAN.align(source).columns.tolist() == UNIQUE[:50]


def test_column_forces_the_source():
    var = table()
    assert HUMAN.align(var, column="feature_name").source == 'column "feature_name" (symbols)'
    with pytest.raises(DataError, match="0 of 50"):
        HUMAN.align(var, column="index")
    with pytest.raises(DataError, match=r"'genes'.*'n_cells', 'chromosome'"):
        HUMAN.align(var, column="genes")
    with pytest.raises(DataError, match="column='feature_name'"):
        HUMAN.align(list(var.index), column="feature_name")


def test_a_column_with_gaps_is_used_for_the_genes_it_names():
    var = table()[["gene_ids"]].astype(object)
    var.iloc[[3, 7]] = np.nan
    var.iloc[9] = ""
    aligned = HUMAN.align(var)
    assert aligned.matched == 47
    assert aligned.unknown == ("", "", "")
    assert (aligned.columns[[3, 7, 9]] == -1).all()


@pytest.mark.parametrize(
    ("var", "message"),
    [
        (["TP53", None], "missing name"),
        (["TP53", float("nan")], "missing name"),
        (["TP53", 7], r"7 .int. .*1"),
        (["TP53", b"MYC"], "bytes"),
        (pd.Index([0, 1]), "int"),
        (pd.DataFrame({"n": [1.0, 2.0]}), "int"),
        (pd.DataFrame({"n": ["TP53", 2]}, index=["a", "b"]), "0 of 2"),
        ([], "no genes"),
        (pd.DataFrame(index=pd.Index([], dtype=str)), "no genes"),
        ("TP53", "single string"),
        (5, "int"),
    ],
)
def test_what_is_no_list_of_genes_is_refused(var, message):
    with pytest.raises(DataError, match=message):
        HUMAN.align(var)


def test_unknown_way_with_duplicates_is_refused():
    with pytest.raises(DataError, match="duplicates"):
        HUMAN.align(["TP53"], duplicates="first")


# Alignment: too few genes --------------------------------------------------------------------------------


def of_fraction(fraction: float, n: int = 200) -> list[str]:
    found = round(fraction * n)
    return [HUMAN.symbols[i] for i in UNIQUE[:found]] + [f"no_gene_{i}" for i in range(n - found)]


@pytest.mark.parametrize("fraction", [0.5, 0.9])
def test_half_of_the_genes_is_enough(fraction):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert HUMAN.align(of_fraction(fraction)).warning == ""


@pytest.mark.parametrize("fraction", [0.05, 0.49])
def test_fewer_than_half_warns(fraction):
    with pytest.warns(UserWarning, match=r"liver: .* of 200") as caught:
        aligned = HUMAN.align(of_fraction(fraction), report_name="liver")
    assert caught[0].filename == __file__
    assert aligned.warning in aligned.summary()
    assert "another species" in aligned.warning


def test_hardly_any_is_refused():
    with pytest.raises(DataError, match="9 of 200"):
        HUMAN.align(of_fraction(0.045))


def test_genes_that_code_for_no_protein_do_not_count():
    names = [*HUMAN.ensembl_ids[:19_000], *(f"ENSG000009{i:05d}" for i in range(60_000))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert HUMAN.align(names).matched == 19_000


def test_mouse_genes_are_recognised():
    symbols = [HUMAN.symbols[i].capitalize() for i in UNIQUE[:300]]
    with pytest.raises(DataError, match="mouse"):
        HUMAN.align(symbols)
    with pytest.raises(DataError, match="mouse"):
        HUMAN.align([f"ENSMUSG{i:011d}" for i in range(50)])
    with pytest.raises(DataError, match="another species"):
        HUMAN.align([f"ENSDARG{i:011d}" for i in range(50)])
    with pytest.raises(DataError, match="are numbers"):
        HUMAN.align([str(i) for i in range(50)])


# Real files ----------------------------------------------------------------------------------------------


def test_real_files_align_and_their_symbols_agree_with_their_ids(shared_data):
    files = sorted(shared_data.glob("*/*.h5ad"))
    assert files
    for file in files:
        var = ad.read_h5ad(file, backed="r").var
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            by_id = HUMAN.align(var, column="ensembl_id", report_name=file.name)
            by_symbol = HUMAN.align(var.index, report_name=file.name)
        # The files' ids were looked up by symbol, for a symbol of two ids not always the one HGNC lists.
        named = np.array([HUMAN.symbols[i] != HUMAN.ensembl_ids[i] for i in by_id.columns])
        both = (by_id.columns >= 0) & (by_symbol.columns >= 0) & named
        assert both.sum() > 0.9 * by_id.matched
        np.testing.assert_array_equal(by_id.columns[both], by_symbol.columns[both], err_msg=file.name)
        assert by_symbol.matched > 0.97 * by_id.matched, file.name


def test_a_full_annotation_of_real_cells_gives_nearly_the_whole_vocabulary(shared_data):
    file = shared_data / "unlabelled" / "breast_tnbc_copykat_unlabelled.h5ad"
    assert HUMAN.align(ad.read_h5ad(file, backed="r").var).matched == 19_476
