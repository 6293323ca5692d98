"""Tables of orthologs: which pairs are one-to-one, what becomes of an input's genes, and what is refused."""

from __future__ import annotations

import re
from collections import Counter

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sct.data.genes.orthologs import (
    AMBIGUOUS,
    MAPPED,
    SEVERAL,
    UNKNOWN,
    WITHOUT,
    map_orthologs,
    read_orthologs,
)
from sct.errors import DataError
from tests.data.ortholog_tables import HOMOLOGY, HUMAN, ONE_TO_ONE, biomart, human_id, mouse_id, write

EXPECTED = {mouse_id(i): human_id(symbol) for i, symbol in ((0, "CD3D"), (1, "MS4A1"), (3, "NKG7"))} | {
    mouse_id(i): human_id(symbol) for i, symbol in ((7, "FCER1A"), (8, "PPBP"), (9, "S100A8"))
}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return read_orthologs(write(biomart(), tmp_path_factory.mktemp("table") / "mart_export.txt"))


BIOMART_R = {
    "Gene stable ID": "ensembl_gene_id", "Gene name": "external_gene_name",
    "Human gene stable ID": "hsapiens_homolog_ensembl_gene",
    "Human gene name": "hsapiens_homolog_associated_gene_name", HOMOLOGY: "hsapiens_homolog_orthology_type",
}  # fmt: skip


def of_human_table(rows: pd.DataFrame) -> pd.DataFrame:
    """The same pairs as Ensembl gives them for human genes."""
    named = {
        "Human gene stable ID": "Gene stable ID", "Human gene name": "Gene name",
        "Gene stable ID": "Mouse gene stable ID", "Gene name": "Mouse gene name",
        "Human homology type": "Mouse homology type",
    }  # fmt: skip
    return rows.rename(columns=named)[[*named.values()]]


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows,
        of_human_table,
        lambda rows: rows.drop(columns="Human homology type"),
        lambda rows: rows.sample(frac=1, random_state=0),
        lambda rows: rows[["Gene stable ID", "Human gene name"]],
        lambda rows: rows[["Gene stable ID", "Human gene stable ID"]].set_axis(["from", "to"], axis=1),
        lambda rows: rows.assign(**{"Gene stable ID": rows["Gene stable ID"] + ".7"}),
        lambda rows: rows.rename(columns=str.lower).rename(columns=lambda name: name.replace(" ", "_")),
        lambda rows: rows.rename(columns=BIOMART_R)[sorted(BIOMART_R.values(), reverse=True)],
        lambda rows: rows.replace("", "NA"),
    ],
    ids=[
        "mouse",
        "human",
        "no kinds",
        "shuffled",
        "to symbols",
        "first two",
        "versions",
        "underscores",
        "biomaRt",
        "absent",
    ],
)
@pytest.mark.parametrize("name", ["table.tsv", "table.csv.gz", "mart_export.txt"])
def test_the_same_pairs_in_every_form(change, name, tmp_path):
    found = read_orthologs(write(change(biomart()), tmp_path / name))
    assert found.target_of == EXPECTED
    assert found.several == {mouse_id(i) for i in (2, 4, 6, 20)}
    assert found.without == {mouse_id(5)}
    assert "6 one-to-one pairs" in found.summary()
    assert "4 genes with several" in found.summary()


def test_named_columns(tmp_path):
    rows = biomart().assign(note="x")[["note", "Human gene name", "Gene name"]]
    path = write(rows, tmp_path / "odd.tsv")
    found = read_orthologs(path, source="Gene name", target="Human gene name")
    assert found.target_of == {symbol.capitalize(): human_id(symbol) for symbol in ONE_TO_ONE}
    both = read_orthologs(
        write(biomart(), tmp_path / "b.tsv"), source=["Gene stable ID", "Gene name"],
        target=["Human gene stable ID", "Human gene name"],
    )  # fmt: skip
    assert both.target_of == EXPECTED


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"source": "Gene name"}, "both"),
        ({"target": "Gene name"}, "both"),
        ({"source": "mouse", "target": "Gene name"}, r"'mouse'.*Gene stable ID"),
        ({"source": "Gene name", "target": "man"}, r"'man'.*Gene stable ID"),
    ],
)
def test_named_columns_that_are_not_there(wrong, words, tmp_path):
    with pytest.raises(DataError, match=words):
        read_orthologs(write(biomart(), tmp_path / "table.tsv"), **wrong)


@pytest.mark.parametrize("absent", ["", " ", "NA", "N/A", "NaN", "nan", "NULL", "None", "-"])
def test_cells_without_a_gene(absent, tmp_path):
    """Some of these are aliases of human genes, and one name would make one gene of all of them."""
    rows = pd.DataFrame(
        [("Cd3d", "CD3D"), ("Gm1", absent), (absent, "MS4A1"), ("Ms4a1", "MS4A1")], columns=["mouse", "human"]
    )
    found = read_orthologs(write(rows, tmp_path / "table.tsv"))
    assert found.target_of == {"Cd3d": human_id("CD3D"), "Ms4a1": human_id("MS4A1")}
    assert found.without == {"Gm1"}
    assert found.fate(absent) == (UNKNOWN, "")


def of_kinds(*rows: tuple[str, str, str], **more: str) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=["Gene name", "Human gene name", HOMOLOGY])
    return table.assign(**more)


def test_kinds_of_pairs(tmp_path):
    rows = of_kinds(
        ("M1", "CD3D", "ortholog_one2one"),  # the kinds contradict the pairs
        ("M1", "CD3E", "ortholog_one2many"),
        ("M2", "CD3D", "ortholog_one2many"),
        ("M3", "LYZ", "ortholog_one2many"),  # the other ones of this pair were left out of the table
        ("M4", "MS4A1", "ortholog_one2one"),
    )
    found = read_orthologs(write(rows, tmp_path / "table.tsv"))
    assert found.target_of == {"M4": human_id("MS4A1")}
    assert found.several == {"M1", "M2", "M3"}


def test_kinds_are_those_of_the_species(tmp_path):
    one, many = "ortholog_one2one", "ortholog_one2many"
    rows = pd.DataFrame(
        [("CD3D", "Cd3d", one, "Cd3r", many), ("LYZ", "Lyz1", many, "Lyzr", one)],
        columns=["Gene name", "Mouse gene name", "Mouse homology type", "Rat gene name", "Rat homology type"],
    )
    path = write(rows, tmp_path / "table.tsv")
    for species, expected in (("Mouse", {"Cd3d": human_id("CD3D")}), ("Rat", {"Lyzr": human_id("LYZ")})):
        assert read_orthologs(path, source=f"{species} gene name", target="Gene name").target_of == expected
    # Of another species alone they say nothing.
    path = write(rows.drop(columns="Mouse homology type"), tmp_path / "rat.tsv")
    assert len(read_orthologs(path, source="Mouse gene name", target="Gene name")) == 2
    path = write(
        rows.rename(columns={"Gene name": "human", "Mouse gene name": "mouse"}), tmp_path / "odd.tsv"
    )
    with pytest.raises(DataError, match="Mouse homology type, Rat homology type"):
        read_orthologs(path, source="mouse", target="human")


def test_aliases_of_human_genes_are_one_gene(tmp_path):
    """Two mouse genes with one human ortholog under two names are no one-to-one pairs."""
    at = next(i for i, old in enumerate(HUMAN.previous) if old and HUMAN.owners_of_alias[old[0]] == (i,))
    rows = pd.DataFrame(
        {"mouse": ["Aa", "Bb", "Cc"], "human": [HUMAN.symbols[at], HUMAN.previous[at][0], "CD3D"]}
    )
    found = read_orthologs(write(rows, tmp_path / "table.tsv"))
    assert found.target_of == {"Cc": human_id("CD3D")}


def test_genes_that_the_vocabulary_lacks_keep_the_name_of_the_table(tmp_path):
    rows = pd.DataFrame({"mouse": ["Cd3d", "Gm1"], "human": ["CD3D", "ENSG00000999999.3"]})
    found = read_orthologs(write(rows, tmp_path / "table.tsv"))
    assert found.target_of == {"Cd3d": human_id("CD3D"), "Gm1": "ENSG00000999999"}


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=14))
def test_a_pair_is_kept_where_neither_gene_has_another(tmp_path_factory, edges):
    path = tmp_path_factory.getbasetemp() / "edges.tsv"
    rows = [(mouse_id(a), HUMAN.ensembl_ids[b]) for a, b in edges]
    write(pd.DataFrame(rows, columns=["mouse", "human"]), path)
    left, right = Counter(a for a, _ in set(edges)), Counter(b for _, b in set(edges))
    expected = {mouse_id(a): HUMAN.ensembl_ids[b] for a, b in set(edges) if left[a] == right[b] == 1}
    if not expected:
        with pytest.raises(DataError, match="one-to-one"):
            read_orthologs(path)
        return
    found = read_orthologs(path)
    assert found.target_of == expected
    assert found.several == {mouse_id(a) for a in left} - set(expected)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("mouse\thuman\n", "header"),
        ("mouse\nCd3d\n", "'mouse'"),
        ("mouse\thuman\nCd3d\nMs4a1\tMS4A1\n", r"line 2: .*1 field"),
        ("mouse\thuman\nCd3d\tCD3D\tx\n", r"line 2: .*3 fields"),
        ("mouse\thuman\nCd3d\tCD3D\nMs4a1\tMS4A1\tx\ty\n", r"line 3: .*4 fields"),
        (f"{mouse_id(1)}\t{human_id('CD3D')}\n{mouse_id(2)}\t{human_id('LYZ')}\n", "header"),
        ("Cd3d\tCD3D\nMs4a1\tMS4A1\n", "header"),
        (f"human\tmacaque\n{human_id('CD3D')}\tCD3D\n", r"'human'.*'macaque'"),
        ("human\tmouse\nCD3D\tCd3d\nLYZ\tLyz2\n", r"'human'.*'mouse'"),
        ("mouse\trat\nCd3d\tCd3e\n", "'rat'"),
        ("key\thuman\n\tCD3D\n", "'key'"),
        ("mouse\thuman\ttype\nCd3d\tCD3D\tx\n", ""),
        ("mouse\thuman\thomology_type\nCd3d\tCD3D\tx\n", r"'homology_type'.*x"),
        ("gene\tgene\nCd3d\tCD3D\n", "'gene'"),
        ('mouse\thuman\n"Cd3d\tCD3D\n', "unexpected end of data"),
        ("Gene name\tHuman gene name\tRat gene name\nCd3d\tCD3D\tCd3d\n", "several species"),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_used(text, words, tmp_path):
    path = tmp_path / "table.tsv"
    path.write_text(text)
    if not words:
        assert len(read_orthologs(path)) == 1
        return
    with pytest.raises(DataError, match=words) as error:
        read_orthologs(path)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"no\.tsv"):
        read_orthologs(tmp_path / "no.tsv")
    (tmp_path / "bad.tsv.gz").write_bytes(b"mouse\thuman\n")
    with pytest.raises(DataError, match="cannot be read"):
        read_orthologs(tmp_path / "bad.tsv.gz")


def test_what_becomes_of_each_gene(table):
    names = [mouse_id(1), "Cd3d", mouse_id(3) + ".12", "Lyz", "Cd79a", "Gnly", "Nowhere", ""]
    found = [table.fate(name) for name in names]
    assert found == [
        (MAPPED, human_id("MS4A1")), (MAPPED, human_id("CD3D")), (MAPPED, human_id("NKG7")), (SEVERAL, ""),
        (SEVERAL, ""), (WITHOUT, ""), (UNKNOWN, ""), (UNKNOWN, ""),
    ]  # fmt: skip
    mapped = map_orthologs(names, table, report_name="mouse.h5ad")
    assert mapped.targets == tuple(target for _, target in found)
    assert mapped.dropped == {SEVERAL: 2, WITHOUT: 1, UNKNOWN: 2}
    assert mapped.matched == 3
    assert mapped.summary() == (
        "mouse.h5ad: 3 of 8 genes have a one-to-one ortholog in mart_export.txt, by names (Ensembl ids); dropped: "
        "2 with several orthologs, 1 without an ortholog, 2 not in the table"
    )


def test_a_symbol_of_two_genes_is_not_guessed(tmp_path):
    rows = biomart()
    rows.loc[3, "Gene name"] = "Cd3d"
    found = read_orthologs(write(rows, tmp_path / "table.tsv"))
    assert found.fate("Cd3d") == (AMBIGUOUS, "")
    assert found.fate(mouse_id(0)) == (MAPPED, human_id("CD3D"))


def test_names_are_found_where_most_of_them_are(table):
    symbols = ["Cd3d", "Ms4a1", "Nkg7", "x"]
    var = pd.DataFrame({"ids": [mouse_id(0), mouse_id(1), "", mouse_id(9)]}, index=symbols)
    assert map_orthologs(var, table).source == 'column "ids" (Ensembl ids)'  # ids where as many
    assert map_orthologs(var, table, column="index").source == "index (symbols)"
    var["ids"] = [mouse_id(0), "", "", ""]  # too few
    assert map_orthologs(var, table).source == "index (symbols)"
    with pytest.raises(DataError, match="'none'"):
        map_orthologs(var, table, column="none")


def test_ids_are_taken_where_they_find_nearly_as_many(tmp_path):
    rows = pd.DataFrame({"id": map(mouse_id, range(100)), "name": [f"Gm{i}" for i in range(100)]})
    rows["human"] = HUMAN.ensembl_ids[:100]
    found = read_orthologs(write(rows, tmp_path / "t.tsv"), source=["id", "name"], target="human")
    var = pd.DataFrame({"ids": rows["id"].tolist()}, index=rows["name"].tolist())
    for lost, source in ((2, 'column "ids" (Ensembl ids)'), (3, "index (symbols)")):
        var.iloc[:lost, 0] = ""
        assert map_orthologs(var, found).source == source


def test_species_with_symbols_like_the_human_ones(tmp_path):
    """Macaque, pig, cow and others."""
    symbols = ["CD3D", "CD3E", "MS4A1", "LYZ", "NKG7", "GNLY"]
    ids = [f"ENSMMUG{i:011d}" for i in range(len(symbols))]
    # One ortholog is outside of the human genes, so more names of macaque are known than of man.
    targets = [*symbols[:5], "LINC99999"]
    rows = pd.DataFrame({"Gene stable ID": ids, "Gene name": symbols, "Human gene name": targets})
    both = read_orthologs(write(rows, tmp_path / "both.tsv"))
    named = read_orthologs(write(rows.iloc[:, 1:], tmp_path / "symbols.tsv"))
    expected = [*map(human_id, targets[:5]), "LINC99999"]
    for table, names in ((both, ids), (both, symbols), (named, symbols)):
        assert list(map_orthologs(names, table).targets) == expected
    # The pairs of a symbol that has several are not taken, but the table knows it.
    several = rows.iloc[[0, 1, 2, 3, 4, 5, 0, 1, 2, 3]].copy()
    several.iloc[6:, 2] = ["A1", "A2", "A3", "A4"]
    found = read_orthologs(write(several, tmp_path / "several.tsv"))
    assert map_orthologs(symbols, found).matched == 2


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (
            ["CD3D", "MS4A1", "NKG7"],
            r"in\.h5ad: .*\(CD3D, .*--orthologs",
        ),
        ([human_id("CD3D"), human_id("LYZ")], "already"),
        (["CD3D", "MS4A1", "Nkg7"], "already"),
        (
            [f"ENSDARG{i:011d}" for i in range(5)],
            r"0 of 5 .*ENSMUSG",
        ),
        (["Lyz", "Gnly"], "0 of 2"),
        ([], "no genes"),
    ],
)
def test_genes_that_the_table_does_not_map(table, names, words):
    with pytest.raises(DataError, match=words):
        map_orthologs(names, table, report_name="in.h5ad")
    if names:
        var = pd.DataFrame({"other": ["?"] * len(names)}, index=names)
        with pytest.raises(DataError, match=words):
            map_orthologs(var, table, report_name="in.h5ad")


def test_mouse_and_regions_of_chromatin_are_told_what_to_do():
    for names in (["Cd3d", "Ms4a1", "Lyz2"], [mouse_id(i) for i in range(9)]):
        with pytest.raises(DataError, match=re.escape("sct.pp.to_orthologs(adata, TABLE)")) as error:
            HUMAN.align(names)
        assert "--orthologs=TABLE" in str(error.value)
    for region in ("chr{}:100-2000", "chr{}-100-2000", "{}_100_2000", "GL000{}.1:100-2000"):
        with pytest.raises(DataError, match="gene activity"):
            HUMAN.align([region.format(i) for i in range(1, 9)])
