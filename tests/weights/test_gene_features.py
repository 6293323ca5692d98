"""Features of genes: the state at the item token, the cache of tables, and tables from files."""

from __future__ import annotations

import dataclasses
import gzip
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from sct.data.genes.corpus import GeneCorpus
from sct.data.genes.vocabulary import GeneVocabulary
from sct.errors import ConfigError, DataError
from sct.gene_features.features import ITEM, GeneFeatures
from sct.models.decoder import Decoder
from sct.weights.pretrained import Pretrained
from sct.weights.vocabulary import resized
from tests.cached import cached
from tests.data.text.toy_texts import tokenizer, vocabulary
from tests.generation.conftest import CONFIGS, make

GENES = vocabulary()
LENGTHS = (3, 90, 1, 40, 25, 12, 60)  # words; in no order


def corpus(n: int = len(LENGTHS), longer: str = "") -> GeneCorpus:
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice([*GENES.symbols, "cell", "of"], length)) for length in LENGTHS[:n]]
    return GeneCorpus(GENES.keys[:n], (*texts[:-1], texts[-1] + longer), "toy")


@cached
def decoder(family: str = "gpt2", own_begin: bool = False) -> Pretrained:
    """A small decoder with a tokenizer."""
    words = tokenizer(own_begin)
    config = dataclasses.replace(CONFIGS[family], vocab_size=words.vocab_size, max_length=400)
    return dataclasses.replace(make(config, family), tokenizer=words)


def by_hand(model: Pretrained, text: str, most: int = 400) -> np.ndarray:
    """Item state of one text that is read alone and without padding."""
    words = model.tokenizer.add_special([ITEM])
    grown = resized(model, words.vocab_size)
    begin = [words.bos] if words.bos != words.eos else []
    ids = [*[*begin, *words.encode(text)][: most - 1], words.token_to_id(ITEM)]
    module = Decoder(grown.config)
    states = jax.jit(lambda *given: module.apply(*given, method="hidden_states"))(
        grown.variables, jnp.asarray([ids])
    )
    return np.asarray(states[0, -1])


def encode(texts: GeneCorpus, model: Pretrained, **options) -> GeneFeatures:
    return GeneFeatures.encode(texts, model, **{"cache": "", "progress_bar": False, **options})


@pytest.mark.slow
@pytest.mark.parametrize(("family", "own_begin"), [("gpt2", False), ("neox", False), ("llama", True)])
def test_a_feature_is_the_state_at_the_item_token(family, own_begin):
    model, texts = decoder(family, own_begin), corpus(4)
    found = encode(texts, model, batch_size=4)
    assert found.keys == texts.keys
    assert found.table.dtype == np.float32
    assert found.table.shape == (len(texts), model.config.embed_dim)
    for at in (1, 2):  # the longest, which is read whole, and one of a single word
        np.testing.assert_allclose(found.table[at], by_hand(model, texts.texts[at]), rtol=0, atol=2e-5)
    assert len({row.tobytes() for row in found.table}) == len(texts)
    assert (found.source["corpus"], found.source["cut"]) == (texts.hash, 0)


@pytest.mark.slow
def test_neither_order_nor_batches_nor_other_texts_matter():
    model, texts = decoder(), corpus()
    whole = encode(texts, model, batch_size=3)
    turned = encode(GeneCorpus(texts.keys[::-1], texts.texts[::-1], "turned"), model, batch_size=5)
    np.testing.assert_allclose(turned.table[::-1], whole.table, rtol=0, atol=2e-5)
    one = encode(corpus(1), model, batch_size=64)  # padded less, and its batch is no larger than it needs
    np.testing.assert_allclose(one.table[0], whole.table[0], rtol=0, atol=2e-5)


def test_texts_of_like_length_are_read_together_in_few_shapes(monkeypatch):
    shapes, usual = [], Pretrained.apply

    def apply(self, **inputs):
        shapes.append(inputs["input_ids"].shape)
        return usual(self, **inputs)

    monkeypatch.setattr(Pretrained, "apply", apply)
    model, texts = decoder(), corpus()
    encode(texts, model, batch_size=2, max_tokens=400)
    lengths = sorted((len(model.tokenizer.encode(text)) + 1 for text in texts.texts), reverse=True)
    assert shapes == [(2, min(-(-longest // 64) * 64, 400)) for longest in lengths[::2]]
    assert len(set(shapes)) < len(shapes)


@pytest.mark.slow
def test_long_texts_are_cut_before_the_item_token_and_counted_once():
    model, texts = decoder("llama", own_begin=True), corpus()
    longer = sum(len(model.tokenizer.encode(text)) > 18 for text in texts.texts)
    assert 0 < longer < len(texts)
    with pytest.warns(UserWarning, match=f"{longer} of 7 texts of toy were truncated to 20 tokens") as told:
        found = encode(texts, model, max_tokens=20, batch_size=2)
    assert len(told) == 1
    assert told[0].filename == __file__
    assert found.source["cut"] == longer
    for at in (1, 2):
        np.testing.assert_allclose(found.table[at], by_hand(model, texts.texts[at], 20), rtol=0, atol=2e-5)


def test_a_models_own_item_token_is_used():
    plain = decoder()
    words = plain.tokenizer.add_special([ITEM])
    own = dataclasses.replace(resized(plain, words.vocab_size), tokenizer=words)
    np.testing.assert_array_equal(encode(corpus(3), own).table, encode(corpus(3), plain).table)
    changed = jax.tree.map(lambda x: x, own.variables)
    table = changed["params"]["token"]["embedding"]
    noise = np.random.default_rng(0).normal(size=table.shape[1])
    changed["params"]["token"]["embedding"] = table.at[words.token_to_id(ITEM)].add(noise)
    other = encode(corpus(3), dataclasses.replace(own, variables=changed)).table
    assert np.abs(other - encode(corpus(3), own).table).max(axis=1).min() > 1e-3


@pytest.mark.slow
def test_matrices_are_of_the_type_of_the_computation(monkeypatch):
    seen, usual = [], Pretrained.apply

    def apply(self, **inputs):
        seen.append(self.variables["params"])
        return usual(self, **inputs)

    monkeypatch.setattr(Pretrained, "apply", apply)
    model = decoder("llama", own_begin=True)
    exact = encode(corpus(3), model).table
    config = dataclasses.replace(model.config, dtype="bfloat16")
    found = encode(corpus(3), dataclasses.replace(model, config=config))
    half = seen[-1]
    assert half["token"]["embedding"].dtype == half["layers"]["mlp"]["up"]["kernel"].dtype == jnp.bfloat16
    assert half["norm"]["scale"].dtype == jnp.float32
    assert found.table.dtype == np.float32
    assert 0 < np.abs(found.table - exact).max() < 0.25
    seen.clear()
    small = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.variables)
    encode(corpus(3), dataclasses.replace(model, variables=small))
    assert seen[0]["head"]["kernel"].dtype == jnp.bfloat16, "what is small on purpose is not made large"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 401}, r"max_tokens .*401"),
        ({"max_tokens": 1}, "max_tokens"),
        ({"batch_size": 0}, "batch_size"),
        ({"item": " "}, "special tokens"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        encode(corpus(2), decoder(), **options)


def test_what_reads_no_text_is_refused():
    with pytest.raises(ConfigError, match="decoder"):
        encode(corpus(2), dataclasses.replace(decoder(), tokenizer=None))
    with pytest.raises(ConfigError, match="decoder"):
        encode(corpus(2), dataclasses.replace(decoder(), config=None))


def test_a_text_with_the_item_token_is_refused():
    with pytest.raises(DataError, match=rf"text of {GENES.keys[1]}.* the item token"):
        encode(corpus(2, longer=f" {ITEM} "), decoder())
    assert encode(corpus(2, longer=f" {ITEM} "), decoder(), item="<|gene|>").source["item"] == "<|gene|>"


class Cached:
    """A folder of tables, and how often a model was asked."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.asked, usual = folder, 0, Pretrained.apply

        def apply(model, **inputs):
            self.asked += 1
            return usual(model, **inputs)

        monkeypatch.setattr(Pretrained, "apply", apply)

    def __call__(self, texts=None, model=None, **options) -> tuple[GeneFeatures, bool]:
        """Features, and whether the model was asked."""
        before = self.asked
        found = encode(texts or corpus(3), model or decoder(), cache=self.folder, **options)
        return found, self.asked > before

    @property
    def files(self):
        return sorted(self.folder.iterdir())


@pytest.fixture
def cached(tmp_path, monkeypatch) -> Cached:
    return Cached(tmp_path / "not" / "there", monkeypatch)


def test_the_same_inputs_are_read_once(cached):
    first, asked = cached()
    assert asked
    again, asked = cached(batch_size=1)
    assert not asked
    np.testing.assert_array_equal(again.table, first.table)
    assert (again.keys, dict(again.source), again.hash) == (first.keys, dict(first.source), first.hash)
    (file,) = cached.files
    assert first.source["corpus"][:12] in file.name
    assert first.source["model"][:12] in file.name
    assert GeneFeatures.load(file).hash == first.hash


def test_other_inputs_are_not_taken_for_the_same(cached):
    model = decoder()
    cached(model=model)
    weights = jax.tree.map(lambda x: x, model.variables)
    weights["params"]["norm"]["bias"] = weights["params"]["norm"]["bias"].at[0].add(1e-3)
    others = [
        {"texts": corpus(3, longer="!")},
        {"texts": GeneCorpus(corpus(3).keys[::-1], corpus(3).texts, "toy")},
        {"model": dataclasses.replace(model, variables=weights)},
        # The same weights, and another computation.
        {"model": dataclasses.replace(model, config=dataclasses.replace(model.config, norm_eps=1e-3))},
        {"model": dataclasses.replace(model, tokenizer=model.tokenizer.add_special([" of"]))},
        {"item": "<|gene|>"},
        {"max_tokens": 300},
    ]
    for number, other in enumerate(others, start=2):
        found, asked = cached(**other)
        assert asked, other
        assert len(cached.files) == number
        again, asked = cached(**other)
        assert not asked
        assert again.hash == found.hash


def test_a_table_that_is_damaged_or_of_other_inputs_is_made_again(cached):
    good, _ = cached()
    (file,) = cached.files
    content = file.read_bytes()
    cached(texts=corpus(3, longer="!"))
    (other,) = set(cached.files) - {file}
    changed = GeneFeatures(good.keys, good.table + 1, good.source)
    changed.save(cached.folder / "changed.npz")
    with np.load(cached.folder / "changed.npz") as arrays:
        forged = {**arrays, "table": good.table}
    np.savez(cached.folder / "forged.npz", **forged)
    for bad, message in [
        (content[: len(content) // 2], "npz cannot be read"),
        (b"", "npz cannot be read"),
        (b"not a table", "npz cannot be read"),
        (other.read_bytes(), "made from other inputs"),
        ((cached.folder / "forged.npz").read_bytes(), "changed after it was written"),
    ]:
        file.write_bytes(bad)
        with pytest.warns(UserWarning, match=f"computed again.*{message}"):
            found, asked = cached()
        assert asked
        assert found.hash == good.hash
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not cached()[1], "it was mended"


def test_no_damage_passes_for_the_table(tmp_path):
    good = GeneFeatures.random(GENES, 5)
    good.save(tmp_path / "good.npz")
    content = (tmp_path / "good.npz").read_bytes()
    rng, seen = np.random.default_rng(0), 0
    for at in rng.choice(len(content), 150, replace=False).tolist():
        damaged = bytearray(content)
        damaged[at] ^= 1 << int(rng.integers(8))
        (tmp_path / "bad.npz").write_bytes(damaged)
        try:
            found = GeneFeatures.load(tmp_path / "bad.npz", GENES)
        except DataError:
            seen += 1
            continue
        np.testing.assert_array_equal(found.table, good.table)
        assert found.keys == good.keys
    assert seen > 75


def test_a_folder_that_cannot_be_written_is_told_before_the_work(tmp_path, cached):
    cached.folder = tmp_path / "file" / "below"
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cache folder"):
        cached()
    assert cached.asked == 0


def test_a_full_disk_does_not_lose_the_work(cached, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as changed:
        changed.setattr(np, "savez", full)
        with pytest.warns(UserWarning, match="No space left"):
            found, _ = cached()
    assert cached.files == []
    assert cached()[0].hash == found.hash


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    encode(corpus(2), decoder(), cache="")
    assert list(tmp_path.iterdir()) == []
    encode(corpus(2), decoder(), cache=None)
    assert len(list((tmp_path / ".cache" / "sct" / "gene_features").glob("*.npz"))) == 1


def test_a_file_is_replaced_when_it_is_complete(tmp_path, monkeypatch):
    target, good = tmp_path / "a.npz", GeneFeatures.random(GENES, 5)
    good.save(target)
    usual = np.savez

    def stops(file, **arrays):
        usual(file, **arrays)
        file.truncate(100)
        raise KeyboardInterrupt

    with monkeypatch.context() as changed:
        changed.setattr(np, "savez", stops)
        with pytest.raises(KeyboardInterrupt):
            GeneFeatures.random(GENES, 5, seed=1).save(target)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    assert GeneFeatures.load(target).hash == good.hash
    with pytest.raises(DataError, match=r"\.npz"):
        good.save(tmp_path / "a.npy")


# Files. TNFA is a previous symbol of TNF; the genes stand in another order in the human table.
HUMAN = GeneVocabulary.human()
NAMES = ["TP53", "TNFA", "NOSUCHGENE", "CD3E"]
ROWS = np.array([[0.5, -1, 2], [1e-3, 3, 0], [9, 9, 9], [4, 5, 6.25]])


def key(symbol: str) -> str:
    return HUMAN.keys[HUMAN.symbols.index(symbol)]


def lines(separator: str = " ", end: str = "\n") -> str:
    rows = zip(NAMES, ROWS.tolist(), strict=True)
    return "".join(separator.join([name, *map(str, row)]) + end for name, row in rows)


FORMS = {
    "gene2vec.txt": lines(),
    "mixed.txt": lines().replace(" ", "\t", 1),
    "word2vec.txt": f"4 3\n{lines(end=chr(10))}",
    "trailing.vec": f"4 3 \n{lines(end=' ' + chr(10))}",
    "bare.tsv": lines("\t"),
    "bare.csv": lines(",", "\r\n"),
    "pandas.csv": pd.DataFrame(ROWS, NAMES).to_csv(),
    "named.tsv": pd.DataFrame(ROWS, pd.Index(NAMES, name="gene_name"), list("abc")).to_csv(sep="\t"),
    "quoted.csv": pd.DataFrame(ROWS, pd.Index(NAMES, name="symbol"), list("abc")).to_csv(quoting=1),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("packed", [False, True])
def test_texts_of_a_row_per_gene_are_read(name, packed, tmp_path):
    path = tmp_path / (f"{name}.gz" if packed else name)
    path.write_bytes(gzip.compress(FORMS[name].encode()) if packed else FORMS[name].encode())
    check_read(GeneFeatures.load(path), path)


@pytest.mark.parametrize("names", ["keys", "genes", "symbols"])
@pytest.mark.parametrize("table", ["table", "embeddings"])
def test_arrays_of_a_row_per_gene_are_read(names, table, tmp_path):
    ids = [f"{key('TP53')}.4", *NAMES[1:]] if names == "keys" else NAMES
    np.savez(tmp_path / "a.npz", **{names: np.array(ids), table: ROWS.astype(np.float16)})
    check_read(GeneFeatures.load(tmp_path / "a.npz"), tmp_path / "a.npz", 1e-3)


def check_read(found: GeneFeatures, path, within: float = 1e-7) -> None:
    rows = {key("TP53"): ROWS[0], key("TNF"): ROWS[1], key("CD3E"): ROWS[3]}
    assert list(found.keys) == sorted(rows, key=HUMAN.keys.index)
    np.testing.assert_allclose(found.table, [rows[gene] for gene in found.keys], rtol=within)
    assert found.table.dtype == np.float32
    assert (found.source["file"], found.source["left_out"]) == (path.name, 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "TNF 1 2\nTNF 3 4\n", "TNF and TNF"),
        ("a.txt", f"TNF 1 2\n{key('TNF')}.3 3 4\n", "more than one row"),
        ("a.txt", "TNF 1 2\nCD4 inf 4\n", f"a.txt: .*NaN or infinity.*{key('CD4')}"),
        ("a.txt", "TNF 1 2\nCD4 1e39 4\n", "float32"),
        ("a.txt", "TNF 1 2\nCD4 1\n", "feature 2 of 'CD4'"),
        ("a.txt", "TNF 1 2\nCD4 nan 4\n", r"'nan' .*'CD4'"),
        ("a.tsv", "TNF\t1\t2\nCD4\t\t4\n", "feature 1 of 'CD4'"),
        ("a.csv", "TNF,x,2\nCD4,3,4\n", r"'x' .*'TNF'"),
        ("a.txt", "TNF 1 2\nCD4 1 2 3\n", "table"),
        ("a.txt", "3 2\nTNF 1 2\nCD4 1 2\n", r"2 rows of 2 .*3 rows of 2"),
        ("a.txt", "2 3\nTNF 1 2\nCD4 1 2\n", r"2 rows of 2 .*2 rows of 3"),
        ("a.txt", "", "not a table"),
        ("a.txt", "TNF\nCD4\n", "numbers of shape"),
        ("a.csv", "TNF,1,2\n,3,4\n", "row 2"),
        ("a.txt", "Tnf 1 2\nCd4 1 2\n", "organism"),
        ("a.pkl", "TNF 1 2\n", r"\.npz, \.csv"),
        ("a.npz", "TNF 1 2\n", r"a\.npz cannot be read"),
    ],
)
def test_bad_texts_are_refused(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        GeneFeatures.load(tmp_path / name)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"names": np.array(NAMES), "table": ROWS}, r"names, table.*keys"),
        ({"keys": np.array(NAMES), "x": ROWS}, r"keys, x.*embeddings"),
        ({"keys": np.array(NAMES, object), "table": ROWS}, "string array"),
        ({"keys": np.array(NAMES[:3]), "table": ROWS}, r"\(3,\)"),
        ({"keys": np.arange(4), "table": ROWS}, "strings"),
        ({"keys": np.array(NAMES), "table": ROWS.astype(str)}, "numbers of shape"),
        ({"keys": np.array(NAMES), "table": np.where(ROWS == 5, np.nan, ROWS)}, "NaN or infinity"),
        ({"keys": np.array(NAMES), "table": ROWS, "about": np.array("{}")}, r"GeneFeatures\.save"),
    ],
)
def test_bad_arrays_are_refused(arrays, message, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message):
        GeneFeatures.load(tmp_path / "a.npz")


def test_an_absent_file_is_refused(tmp_path):
    for name in ("a.npz", "a.txt"):
        with pytest.raises(DataError, match=r"does not exist|No such file"):
            GeneFeatures.load(tmp_path / name)


def test_saved_features_are_read_as_they_were(tmp_path):
    # Genes that the human table does not know, and that are therefore not to be looked up in it.
    made = GeneFeatures.random(GENES, 6, seed=2)
    made.save(tmp_path / "new" / "a.npz")
    read = GeneFeatures.load(tmp_path / "new" / "a.npz")
    np.testing.assert_array_equal(read.table, made.table)
    assert (read.keys, read.source, read.hash) == (made.keys, made.source, made.hash)


def test_random_features():
    wide = GeneFeatures.random(GENES, 4000, seed=3)
    np.testing.assert_array_equal(wide.table, GeneFeatures.random(GENES, 4000, seed=3).table)
    assert wide.hash != GeneFeatures.random(GENES, 4000, seed=4).hash
    assert wide.keys == GENES.keys
    assert abs(wide.table.mean()) < 0.02
    assert abs(wide.table.std() - 1) < 0.02
    with pytest.raises(ConfigError, match="size"):
        GeneFeatures.random(GENES, 0)


def test_rows_are_aligned_to_a_vocabulary():
    made = GeneFeatures.random(GENES, 6)
    chosen = ["ENSG00000000001", GENES.keys[7], GENES.keys[2]]
    rows, there = made.of(GeneVocabulary.from_ids(chosen, name="chosen"))
    assert there.tolist() == [False, True, True]
    np.testing.assert_array_equal(rows, [np.zeros(6), made.table[7], made.table[2]])
    with pytest.raises(DataError, match="other"):
        made.of(GeneVocabulary.from_ids(chosen[:1], name="other"))


def test_cells_are_sums_weighted_by_expression():
    part = GeneVocabulary.from_ids(GENES.keys[:10], GENES.symbols[:10], name="part")
    made = GeneFeatures.random(part, 6)
    counts = np.random.default_rng(0).poisson(1.0, (5, len(GENES)))
    counts[3, :10] = 0  # nothing but genes without features
    counts[4] = 0
    found = made.weighted_cells(sparse.csr_matrix(counts), GENES)
    assert found.dtype == np.float32
    for cell in range(3):
        # The sum of a cell counts all genes, those without features too.
        weights = np.log1p(1e4 * counts[cell] / counts[cell].sum())[:10]
        expected = weights @ made.table.astype(np.float64)
        np.testing.assert_allclose(found[cell], expected / np.linalg.norm(expected), atol=1e-6)
    np.testing.assert_array_equal(found[3:], 0)
    with pytest.raises(DataError, match="10 genes"):
        made.weighted_cells(sparse.csr_matrix(counts[:, :10]), GENES)
    with pytest.raises(DataError, match="negative"):
        made.weighted_cells(sparse.csr_matrix(-counts), GENES)


@pytest.mark.parametrize(
    ("keys", "table"),
    [(("a",), np.ones(3)), (("a",), np.ones((2, 3))), ((), np.ones((0, 3))), (("a", "a"), np.ones((2, 3)))],
)
def test_features_are_one_row_for_each_gene(keys, table):
    with pytest.raises(DataError, match=r"features of|'a' twice"):
        GeneFeatures(keys, table, {})
