"""Tokenizers: equal to the libraries and to transformers, the same after saving, deterministic training."""

from __future__ import annotations

import io
import json
import pickle
import random
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sct.data.text.prompts import JOIN, load_prompts
from sct.data.text.tokenizer import END, PAD, Tokenizer, train_bpe
from sct.errors import ConfigError, MissingExtraError

tokenizers = pytest.importorskip(
    "tokenizers", reason='tokenizer.json needs `tokenizers`: pip install "sct-jax[text]"'
)
sentencepiece = pytest.importorskip(
    "sentencepiece", reason='tokenizer.model needs `sentencepiece`: pip install "sct-jax[text]"'
)

GENES = [
    "MALAT1",
    "B2M",
    "MT-CO1",
    "HLA-DRA",
    "RPL13A",
    "CD3E",
    "NKG7",
    "IGKV3-20",
    "ENSG00000271254",
    "C1orf56",
]
STRANGE = [
    "", " ", "  two  spaces ", "line\nbreak\n\n", "\t", "CD4⁺ T-cells: α/β, Müller glia", "細胞 🧬", "É\u0301", "\x00",  # noqa: RUF001
]  # fmt: skip
laws = settings(max_examples=60, deadline=None)


def corpus() -> list[str]:
    """Prompts with answers, as a model is trained on them."""
    rng = random.Random(0)
    prompts = load_prompts()
    texts = []
    for i in range(400):
        cell = " ".join(rng.sample(GENES, 8))
        fields = {"cell": cell, "cell_type": rng.choice(["B cell", "CD4 T cell"]), "tissue": "lung"}
        texts.append(prompts.render(rng.choice(["cell_to_cell_type", "tissue_to_cell"]), fields, key=i).text)
    return texts


CORPUS = corpus()


def sentencepiece_model(**options) -> bytes:
    writer = io.BytesIO()
    settings = {
        "vocab_size": 420, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2, "num_threads": 1,
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False, **options,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_writer=writer, **settings)
    return writer.getvalue()


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe(CORPUS, vocab_size=500)


@pytest.fixture(scope="module")
def model() -> bytes:
    return sentencepiece_model()


@pytest.fixture(scope="module")
def pieces(model, tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("pieces") / "tokenizer.model"
    path.write_bytes(model)
    return Tokenizer.load(path)


@pytest.fixture(params=["bpe", "pieces"])
def either(request) -> Tokenizer:
    return request.getfixturevalue(request.param)


texts = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(GENES + STRANGE), max_size=9).map(" ".join))


@laws
@given(text=texts)
def test_a_byte_level_bpe_loses_nothing(bpe, text):
    ids = bpe.encode(text)
    assert ids.dtype == np.int32
    assert bpe.decode(ids) == text


@laws
@given(text=texts)
def test_a_sentencepiece_model_loses_nothing(pieces, text):
    text = text.replace("▁", "_").replace(
        "\x00", ""
    )  # what the model writes for a space, and its end of text
    assert pieces.decode(pieces.encode(text)) == text


words = st.lists(st.sampled_from([*GENES, "CD4⁺", "cell.", "Müller", "細胞"]), min_size=1, max_size=9).map(
    " ".join
)


@laws
@given(prompt=words, response=words)
def test_prompt_and_response_have_the_same_tokens_apart_and_together(bpe, pieces, prompt, response):
    for tokenizer in (bpe, pieces):
        (after,) = tokenizer.encode_response([response])
        together = tokenizer.encode(prompt + JOIN + response)
        np.testing.assert_array_equal(np.concatenate([tokenizer.encode(prompt), after]), together)


def test_a_tokenizer_that_joins_words_has_no_tokens_of_a_response(tmp_path):
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=100, show_progress=False)
    library.train_from_iterator([": B", ": T"] * 9, trainer)
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="space"):
        Tokenizer.load(tmp_path).encode_response(["B"])


def test_batches_are_single_texts(either):
    batch = either.encode_batch(CORPUS[:9])
    for text, ids in zip(CORPUS, batch, strict=False):
        np.testing.assert_array_equal(either.encode(text), ids)
    assert either.encode_batch([]) == []
    assert either.encode_response([]) == []


def test_training_is_deterministic_whatever_the_order(bpe):
    again = train_bpe(reversed(CORPUS), vocab_size=500)
    assert again.fingerprint == bpe.fingerprint
    assert bpe.vocab_size == 500
    assert (bpe.bos, bpe.eos, bpe.pad, bpe.unk) == (0, 0, 1, None)
    assert train_bpe(CORPUS, vocab_size=499).fingerprint != bpe.fingerprint
    assert train_bpe(CORPUS, vocab_size=500, min_frequency=10**6).vocab_size == 258
    one = train_bpe(CORPUS[:20], vocab_size=300, special=["<end>"])
    assert (one.eos_token, one.pad) == ("<end>", None)
    with pytest.raises(ConfigError, match=r"\b258\b"):
        train_bpe(CORPUS, vocab_size=257)


def test_a_frequent_gene_is_one_token():
    whole = train_bpe(CORPUS, vocab_size=2000)
    for gene in GENES:
        assert len(whole.encode(f" {gene}")) == 1
    # Marks around a word stay outside of it.
    assert whole.encode(f" {GENES[0]}.")[0] == whole.encode(f" {GENES[0]}")[0]


def test_special_tokens_in_text_are_one_id_and_vanish_from_text(bpe):
    ids = bpe.encode(f"B2M{END}MALAT1{PAD}")
    assert ids.tolist().count(bpe.eos) == ids.tolist().count(bpe.pad) == 1
    assert bpe.decode(ids) == "B2MMALAT1"
    assert bpe.decode(ids, skip_special=False) == f"B2M{END}MALAT1{PAD}"


def test_added_tokens_follow_the_last_id(either):
    more = either.add_special(["<cell>", "<cell type>", "<cell>"], unk="<cell>")
    n = either.vocab_size
    assert more.vocab_size == n + 2
    assert [more.token_to_id(token) for token in ("<cell>", "<cell type>")] == [n, n + 1]
    assert (more.unk, more.eos, more.pad) == (n, either.eos, either.pad)
    assert either.token_to_id("<cell>") is None
    text = "MALAT1<cell type>B2M<cell>"
    ids = more.encode(text)
    assert ids.tolist().count(n) == ids.tolist().count(n + 1) == 1
    assert more.decode(ids, skip_special=False) == text
    assert more.decode(ids) == "MALAT1B2M" or either.backend.file == "tokenizer.model"
    np.testing.assert_array_equal(more.encode(CORPUS[0]), either.encode(CORPUS[0]))
    assert more.add_special(["<cell>"]).vocab_size == n + 2
    assert more.fingerprint != either.fingerprint
    for tokens, roles, said in (
        ("<x>", {}, "list"),
        ([""], {}, "list"),
        (["<x>"], {"end": "<x>"}, "'end'"),
        ([], {"pad": "<x>"}, "'<x>'"),
    ):
        with pytest.raises(ConfigError, match=said):
            either.add_special(tokens, **roles)


def test_saved_is_loaded_byte_for_byte(either, tmp_path):
    for tokenizer in (either, either.add_special(["<cell>", "<pad>"], pad="<pad>")):
        tokenizer.save(tmp_path / "a")
        loaded = Tokenizer.load(tmp_path / "a")
        loaded.save(tmp_path / "b")
        for path in (tmp_path / "a").iterdir():
            assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
        assert loaded.fingerprint == tokenizer.fingerprint
        assert (loaded.bos, loaded.eos, loaded.pad, loaded.unk) == (
            tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.unk
        )  # fmt: skip
        for text in [*CORPUS[:5], "a<cell>b"]:
            np.testing.assert_array_equal(loaded.encode(text, True), tokenizer.encode(text, True))


def test_saving_leaves_one_tokenizer_in_a_folder(bpe, pieces, tmp_path):
    for tokenizer in (bpe, pieces, bpe):
        tokenizer.save(tmp_path)
        assert Tokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint


def test_workers_get_the_same_tokenizer(either):
    more = either.add_special(["<cell>"])
    copy = pickle.loads(pickle.dumps(more))
    assert copy.fingerprint == more.fingerprint
    np.testing.assert_array_equal(copy.encode("B2M<cell>"), more.encode("B2M<cell>"))


def test_lengths_in_a_file_are_not_kept(bpe, tmp_path):
    library = tokenizers.Tokenizer.from_str(bpe.backend.content().decode())
    library.enable_truncation(3)
    library.enable_padding(length=3)
    library.save(str(tmp_path / "tokenizer.json"))
    np.testing.assert_array_equal(Tokenizer.load(tmp_path).encode(CORPUS[0]), bpe.encode(CORPUS[0]))


@pytest.mark.parametrize("text", GENES + STRANGE + CORPUS[:3])
def test_ids_are_those_of_sentencepiece(model, pieces, text):
    library = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert pieces.encode(text).tolist() == library.encode(text)
    assert pieces.encode(text, add_special=True).tolist() == [library.bos_id(), *library.encode(text)]
    assert pieces.decode(library.encode(text)) == library.decode(library.encode(text))


def test_special_tokens_of_a_sentencepiece_model(pieces):
    assert (pieces.unk, pieces.bos, pieces.eos, pieces.pad) == (0, 1, 2, None)
    ids = [pieces.bos, *pieces.encode("B2M CD3E").tolist(), pieces.eos]
    assert pieces.decode(ids) == "B2M CD3E"
    assert pieces.decode(ids, skip_special=False) == "<s>B2M CD3E</s>"


def test_a_model_without_a_space_before_every_text(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(add_dummy_prefix=False))
    tokenizer = Tokenizer.load(tmp_path)
    prompt, response = "Cell type:", "B cell"
    apart = np.concatenate([tokenizer.encode(prompt), *tokenizer.encode_response([response])])
    np.testing.assert_array_equal(apart, tokenizer.encode(prompt + JOIN + response))
    assert tokenizer.decode(apart) == prompt + JOIN + response


def folder(tmp_path, bpe, **files):
    (tmp_path / "tokenizer.json").write_bytes(bpe.add_special(["<a>", "<b>", "<c>"]).backend.content())
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def test_names_of_special_tokens_come_from_the_first_file_that_knows(bpe, tmp_path):
    n = bpe.vocab_size
    assert Tokenizer.load(folder(tmp_path, bpe)).eos is None
    loaded = Tokenizer.load(
        folder(
            tmp_path, bpe,
            tokenizer_config={"eos_token": {"content": "<a>", "special": True}, "unk_token": None},
            special_tokens_map={"eos_token": "<b>", "bos_token": {"content": "<b>"}, "unk_token": "<b>"},
            generation_config={"eos_token_id": n + 2, "pad_token_id": [n + 2, 0]},
            config={"pad_token_id": 0},
        )
    )  # fmt: skip
    assert (loaded.eos, loaded.bos, loaded.pad, loaded.unk) == (n, n + 1, n + 2, None)
    named = Tokenizer.load(tmp_path / "tokenizer.json", eos="<c>", pad=None)
    assert (named.eos, named.bos, named.pad) == (n + 2, n + 1, None)


def test_tokens_added_to_a_sentencepiece_folder(pieces, tmp_path):
    n = pieces.vocab_size
    pieces.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<y>": n + 1, "<x>": n, "<s>": 1}))
    assert Tokenizer.load(tmp_path).encode("<y><x>").tolist() == [n + 1, n]
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<y>": n + 1}))
    with pytest.raises(ConfigError, match=f"consecutive and start at {n}"):
        Tokenizer.load(tmp_path)


def test_bad_files_are_named(bpe, tmp_path):
    with pytest.raises(ConfigError, match=r"tokenizer\.json .*tokenizer\.model"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ConfigError, match="'end'"):
        Tokenizer.load(tmp_path, end="x")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match=r"tokenizer\.model .*sentencepiece"):
        Tokenizer.load(tmp_path / "tokenizer.model")
    bpe.save(tmp_path)
    with pytest.raises(ConfigError, match="'<none>'"):
        Tokenizer.load(tmp_path, eos="<none>")
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json"):
        Tokenizer.load(tmp_path)


def test_an_id_outside_the_vocabulary_is_refused(either):
    for number in (-1, either.vocab_size):
        with pytest.raises(ConfigError, match=f"token id {number} is not in the vocabulary"):
            either.decode([5, number])


@pytest.mark.parametrize("library", ["tokenizers", "sentencepiece"])
def test_an_absent_library_is_named(library, bpe, pieces, tmp_path, monkeypatch):
    (bpe if library == "tokenizers" else pieces).save(tmp_path)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError, match=rf'{library}: pip install "sct-jax\[text\]"'):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("added", [(), ("<cell>", "<|pad|>")])
def test_transformers_reads_a_saved_bpe_with_equal_ids(bpe, tmp_path, added):
    transformers = pytest.importorskip(
        "transformers", reason="compared with transformers where it is installed"
    )
    tokenizer = bpe.add_special(added)
    tokenizer.save(tmp_path)
    for other in (
        transformers.AutoTokenizer.from_pretrained(tmp_path),
        transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path),
    ):
        assert (other.eos_token_id, other.bos_token_id, other.pad_token_id) == (0, 0, 1)
        assert len(other) == tokenizer.vocab_size
        for text in [*CORPUS[:20], *GENES, *STRANGE, f"a{END} b<cell> c"]:
            ids = tokenizer.encode(text)
            assert other(text, add_special_tokens=False)["input_ids"] == ids.tolist()
            assert other(text)["input_ids"] == tokenizer.encode(text, add_special=True).tolist()
            assert other.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)
            assert other.decode(ids) == tokenizer.decode(ids, skip_special=False)


def test_a_folder_of_transformers_is_read_with_equal_ids(bpe, tmp_path):
    transformers = pytest.importorskip(
        "transformers", reason="compared with transformers where it is installed"
    )
    library = tokenizers.Tokenizer.from_str(bpe.backend.content().decode())
    other = transformers.PreTrainedTokenizerFast(tokenizer_object=library, eos_token=END, pad_token="[PAD]")
    other.save_pretrained(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.eos, tokenizer.bos, tokenizer.pad) == (0, None, bpe.vocab_size)
    for text in [*CORPUS[:20], *STRANGE, "a[PAD]"]:
        assert other(text)["input_ids"] == tokenizer.encode(text, add_special=True).tolist()


@pytest.mark.parametrize("added", [(), ("<cell>", "<pad>")])
def test_transformers_reads_a_saved_sentencepiece_model_with_equal_ids(pieces, tmp_path, added):
    transformers = pytest.importorskip(
        "transformers", reason="compared with transformers where it is installed"
    )
    pytest.importorskip("google.protobuf", reason="transformers reads tokenizer.model through protobuf")
    tokenizer = pieces.add_special(added)
    tokenizer.save(tmp_path)
    other = transformers.LlamaTokenizer.from_pretrained(tmp_path)
    assert (other.bos_token_id, other.eos_token_id, len(other)) == (1, 2, tokenizer.vocab_size)
    between = ["B2M<cell>CD3E <pad>", "<cell>"] if added else []
    # sentencepiece puts a space before every text, transformers only before one that does not begin with it.
    plain = [text for text in STRANGE if text and not text.startswith((" ", "\x00"))]
    for text in [*CORPUS[:20], *GENES, *plain, *between]:
        ids = tokenizer.encode(text, add_special=True)
        assert other(text)["input_ids"] == ids.tolist(), text
        assert other.decode(ids, skip_special_tokens=True).strip() == tokenizer.decode(ids).strip()
