"""The gene corpus: what is read from each form of file, what is refused, and what it says of a vocabulary."""

from __future__ import annotations

import csv
import gzip
import json
import random
import warnings

import pytest

from sct.data.genes.corpus import GeneCorpus
from sct.data.genes.vocabulary import GeneVocabulary
from sct.errors import DataError

TEXTS = {
    "TNF": "A cytokine, secreted by macrophages.",
    "CD3E": 'Part of the "T cell receptor";\tand more.',
    "TP53": "A tumour suppressor.\nMutated in cancer.",
}
HUMAN = GeneVocabulary.human()
KEYS = {symbol: HUMAN.keys[HUMAN.symbols.index(symbol)] for symbol in TEXTS}


def table(path, rows, header, delimiter="\t"):
    packed = path.name.endswith(".gz")
    with gzip.open(path, "wt", newline="") if packed else path.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    return path


def symbols_tsv(folder):
    return table(folder / "a.tsv", TEXTS.items(), ["symbol", "summary"])


def gene_csv(folder):
    rows = [[text, i, symbol] for i, (symbol, text) in enumerate(TEXTS.items())]
    return table(folder / "b.csv", rows, ["Text", "number", " Gene "], ",")


def ids_tsv_gz(folder):
    rows = [[f"{KEYS[symbol]}.17", "", text] for symbol, text in TEXTS.items()]
    return table(folder / "c.tsv.gz", rows, ["ensembl_id", "symbol", "text"])


def mixed_tsv(folder):
    # The id where there is one, and the symbol where there is none.
    ids = [KEYS["TNF"], "", KEYS["TP53"]]
    rows = zip(["unknown", "CD3E", ""], ids, TEXTS.values(), strict=True)
    return table(folder / "d.tsv", rows, ["symbol", "ensembl_id", "summary"])


def object_json(folder):
    (folder / "e.json").write_text(json.dumps(TEXTS))
    return folder / "e.json"


def list_json_gz(folder):
    items = [{"gene": symbol, "text": f" {text}\n"} for symbol, text in TEXTS.items()]
    (folder / "f.json.gz").write_bytes(gzip.compress(json.dumps(items).encode("utf-8-sig")))
    return folder / "f.json.gz"


def expected() -> dict[str, str]:
    return {KEYS[symbol]: text for symbol, text in TEXTS.items()}


@pytest.mark.parametrize("write", [symbols_tsv, gene_csv, ids_tsv_gz, mixed_tsv, object_json, list_json_gz])
def test_every_form_of_file_gives_the_same_corpus(write, tmp_path):
    corpus = GeneCorpus.load(write(tmp_path))
    assert corpus.text_of == expected()
    assert list(corpus.keys) == sorted(corpus.keys, key=HUMAN.keys.index), "in the order of the table"
    assert corpus.left_out == ()
    reference = GeneCorpus.load(symbols_tsv(tmp_path))
    assert corpus.hash == reference.hash


def test_the_order_of_the_file_does_not_matter_and_every_text_does(tmp_path):
    rows = list(TEXTS.items())
    random.Random(0).shuffle(rows)
    shuffled = GeneCorpus.load(table(tmp_path / "a.tsv", rows[::-1], ["symbol", "text"]))
    first = GeneCorpus.load(symbols_tsv(tmp_path))
    assert shuffled.hash == first.hash
    hashes = {first.hash}
    for at in range(len(rows)):
        changed = [(name, text + "!" * (i == at)) for i, (name, text) in enumerate(TEXTS.items())]
        hashes.add(GeneCorpus.load(table(tmp_path / "b.tsv", changed, ["symbol", "text"])).hash)
    hashes.add(GeneCorpus(first.keys[1:], first.texts[1:], first.name).hash)
    hashes.add(GeneCorpus(first.keys[1:] + first.keys[:1], first.texts, first.name).hash)
    assert len(hashes) == len(rows) + 3
    assert GeneCorpus(first.keys, first.texts, "another name").hash == first.hash


def test_what_is_not_known_and_what_is_empty_is_left_out_and_counted(tmp_path):
    rows = [
        *TEXTS.items(),
        ("NOSUCHGENE", "A text."),
        ("", "Of no gene."),
        ("ENSG99999999999", "x"),
        ("CD4", " "),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        corpus = GeneCorpus.load(table(tmp_path / "corpus.tsv", rows, ["symbol", "text"]))
    assert corpus.text_of == expected()
    assert (corpus.left_out, corpus.empty) == (("NOSUCHGENE", "ENSG99999999999", ""), 1)
    told = corpus.summary()
    assert "3 genes of corpus.tsv" in told
    assert "3 unknown or ambiguous gene names" in told
    assert "NOSUCHGENE" in told
    assert "1 genes without text" in told


def test_a_previous_symbol_means_its_gene_unless_the_file_names_that_gene(tmp_path):
    old = table(tmp_path / "old.tsv", [("TNFA", "old"), ("CD3E", "x")], ["symbol", "text"])
    assert GeneCorpus.load(old).text_of == {KEYS["TNF"]: "old", KEYS["CD3E"]: "x"}
    both = table(tmp_path / "both.tsv", [("TNFA", "old"), ("TNF", "new")], ["symbol", "text"])
    corpus = GeneCorpus.load(both)
    assert corpus.text_of == {KEYS["TNF"]: "new"}
    assert corpus.left_out == ("TNFA",)


def test_genes_can_be_looked_up_in_another_table(tmp_path):
    mouse = GeneVocabulary.from_ids(
        ["ENSMUSG00000024401", "ENSMUSG00000032093"], ["Tnf", "Cd3e"], name="mouse"
    )
    file = table(tmp_path / "a.tsv", [("Cd3e", "one"), ("Tnf", "two")], ["symbol", "text"])
    assert GeneCorpus.load(file, mouse).text_of == {mouse.keys[0]: "two", mouse.keys[1]: "one"}


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


BAD = {
    "absent": (None, r"cannot be read .*No such file"),
    "no name": ("a\ttext\nTNF\tx\n", "columns a, text, .*ensembl_id or symbol or gene"),
    "no text": ("symbol\tx\nTNF\tx\n", "columns symbol, x, .*text or summary"),
    "twice a column": ("symbol\ttext\tText\nTNF\tx\ty\n", "column text more than once"),
    "two texts": ("symbol\ttext\nTNF\tx\nCD4\ty\nTNF\tz\n", "1 genes have more than one text.*TNF and TNF"),
    "two names": (f"gene\ttext\nTNF\tx\n{KEYS['TNF']}\tz\n", f"TNF and {KEYS['TNF']}"),
    "mouse": ("symbol\ttext\nTnf\tx\nCd3e\tz\n", r"almost none of the 2 names .*organism"),
    "ragged": ("symbol\ttext\nTNF\tx\nCD4\tx\ty\n", "line 3: the line has 3 fields, but the header has 2"),
    "open quote": ('symbol\ttext\nTNF\t"x\nCD4\ty\n', "line 3.*not valid"),
    "only a header": ("symbol\ttext\n", "has no genes"),
    "empty": ("", "is empty"),
    "no texts": ("symbol\ttext\nTNF\t \n", "has both a name and a text"),
    "not UTF-8": (b"symbol\ttext\nTNF\t\xff\n", "line 2: the text is not UTF-8"),
}  # fmt: skip
BAD_JSON = {
    "two texts": ('{"TNF": "x", "TNF": "y"}', "TNF and TNF"),
    "broken": ('{"TNF": "x"', "is not valid JSON"),
    "a number": ('{"TNF": 3}', "3 for the gene 'TNF'"),
    "no objects": ('["TNF"]', "a JSON object"),
    "no column": (
        '[{"symbol": "TNF", "text": "x"}, {"symbol": "CD4"}]',
        "entry 2 has the columns symbol, .*text",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_tables_are_refused(name, tmp_path):
    content, message = BAD[name]
    path = tmp_path / "a.tsv" if content is None else write(tmp_path / "a.tsv", content)
    with pytest.raises(DataError, match=f"a.tsv(.|\n)*{message}|{message}"):
        GeneCorpus.load(path)


@pytest.mark.parametrize("name", BAD_JSON)
def test_bad_json_is_refused(name, tmp_path):
    content, message = BAD_JSON[name]
    with pytest.raises(DataError, match=message):
        GeneCorpus.load(write(tmp_path / "a.json", content))


def test_a_json_null_is_no_text(tmp_path):
    corpus = GeneCorpus.load(write(tmp_path / "a.json", '{"TNF": "x", "CD4": null}'))
    assert (corpus.text_of, corpus.empty) == ({KEYS["TNF"]: "x"}, 1)


@pytest.mark.parametrize("name", ["a.tsv.gz", "a.json.gz"])
def test_a_cut_archive_is_refused(name, tmp_path):
    path = (ids_tsv_gz if "tsv" in name else list_json_gz)(tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        GeneCorpus.load(write(tmp_path / name, path.read_bytes()[:-20]))


def test_another_form_of_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"a\.xlsx"):
        GeneCorpus.load(write(tmp_path / "a.xlsx", b"x"))


@pytest.mark.parametrize(
    ("keys", "texts"), [((), ()), (("a", "b"), ("x",)), (("a", "a"), ("x", "y")), (("a", "b"), ("x", " "))]
)
def test_a_corpus_has_one_text_for_each_gene(keys, texts):
    with pytest.raises(DataError):
        GeneCorpus(keys, texts, "bad")


def test_built_in_says_what_the_table_says():
    corpus = GeneCorpus.built_in()
    assert len(corpus) == sum(group != "" for group in HUMAN.locus_groups) == 19_353
    assert corpus.text_of[KEYS["TNF"]] == (
        "TNF (tumor necrosis factor) is a protein-coding gene. It lies on 6p21.33. It is also called TNFSF2, DIF and "
        "TNF-alpha. It was formerly called TNFA."
    )
    by_symbol = dict(zip(HUMAN.symbols, HUMAN.keys, strict=True))
    text = corpus.text_of[by_symbol["MT-ND1"]]
    assert text.endswith(
        "It lies in the mitochondrial genome. It is also called ND1 and NAD1. It was formerly called MTND1."
    )
    assert "a gene of non-coding RNA" in corpus.text_of[by_symbol["TUNAR"]]
    assert "is a pseudogene" in corpus.text_of[by_symbol["NOTCH2NLR"]]
    place = {key: at for at, key in enumerate(HUMAN.keys)}
    for key, text in corpus.text_of.items():
        at = place[key]
        assert text.startswith(f"{HUMAN.symbols[at]} ({HUMAN.names[at]}) is a")
        assert "group" not in text.removeprefix(f"{HUMAN.symbols[at]} ({HUMAN.names[at]})"), (
            "a kind without words"
        )
        assert (
            HUMAN.locations[at] in ("", "mitochondria", "14 unplaced") or f"on {HUMAN.locations[at]}." in text
        )
    assert by_symbol["ENSG00000100101"] not in corpus.text_of, "HGNC does not know it"


def test_texts_are_aligned_to_a_vocabulary_and_genes_without_one_are_dropped(tmp_path):
    corpus = GeneCorpus.load(symbols_tsv(tmp_path))
    cd4 = HUMAN.keys[HUMAN.symbols.index("CD4")]
    measured = GeneVocabulary.from_ids([KEYS["TP53"], cd4, KEYS["TNF"]], name="measured")
    assert corpus.texts_of(measured) == [TEXTS["TP53"], None, TEXTS["TNF"]]
    assert corpus.restricted(measured).keys == (KEYS["TP53"], KEYS["TNF"])
    whole = GeneVocabulary.from_ids(corpus.keys, name="whole")
    assert corpus.restricted(whole) is whole
    with pytest.raises(DataError, match=r"a\.tsv"):
        corpus.restricted(GeneVocabulary.from_ids([cd4], name="other"))


def test_real_summaries(shared_data):
    file = shared_data / "meta" / "gene_summaries.tsv.gz"
    if not file.is_file():
        pytest.skip("the optional file of RefSeq summaries, meta/gene_summaries.tsv.gz, is not here")
    corpus = GeneCorpus.load(file)
    assert len(corpus) > 19_000
    assert "cytokine" in corpus.text_of[KEYS["TNF"]]
    with gzip.open(file, "rt", newline="") as opened:
        rows = list(csv.DictReader(opened, delimiter="\t"))
    text_of_id = {row["ensembl_id"]: row["summary"] for row in rows}
    assert all(text_of_id.get(key, text) == text for key, text in corpus.text_of.items())
    assert len(corpus) + len(corpus.left_out) + corpus.empty == len(rows)
    assert set(corpus.restricted(HUMAN).keys) == set(corpus.keys)
