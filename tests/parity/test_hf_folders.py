"""Folders as `transformers` and torch of several years write them."""

from __future__ import annotations

import json
import shutil

import chex
import pytest

import sct
from sct.errors import CheckpointError, MissingExtraError
from sct.nn.paths import flatten
from sct.weights.hf import folder as hf
from sct.weights.model_folder import INDEX, TORCH, WEIGHTS

from . import foreign

torch = pytest.importorskip("torch", reason=foreign.REASON.format("torch"))
transformers = pytest.importorskip("transformers", reason=foreign.REASON.format("transformers"))


def same(one, other):
    chex.assert_trees_all_equal_dtypes(one.variables, other.variables)
    chex.assert_trees_all_equal(one.variables, other.variables, strict=True)
    assert one.config == other.config


@pytest.fixture
def folder(tmp_path):
    """Function that writes a model of a kind to a folder."""

    def write(kind, name="plain", model=None, **changes):
        made = foreign.make(kind, name, model, **changes)
        made.save_pretrained(tmp_path / kind)
        return tmp_path / kind, made

    return write


def as_bin(path, state, parts=1, **options):
    """The same weights in torch's format."""
    names = list(state)
    files = (
        [TORCH] if parts == 1 else [f"pytorch_model-{i:05d}-of-{parts:05d}.bin" for i in range(1, parts + 1)]
    )
    held = {name: files[i % parts] for i, name in enumerate(names)}
    for file in files:
        torch.save({name: state[name] for name in names if held[name] == file}, path / file, **options)
    if parts > 1:
        (path / f"{TORCH}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": held}))
    (path / WEIGHTS).unlink()


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weights_in_torchs_own_format(folder, parts, dtype):
    path, theirs = folder("neox")
    expected = sct.load(path, dtype=dtype)
    as_bin(path, {k: v.to(getattr(torch, dtype)) for k, v in theirs.state_dict().items()}, parts)
    same(sct.load(path), expected)


def test_files_of_torch_before_they_could_be_mapped(folder):
    path, theirs = folder("gpt2")
    expected = sct.load(path)
    as_bin(path, theirs.state_dict(), _use_new_zipfile_serialization=False)
    same(sct.load(path), expected)


def test_torch_is_asked_for_where_it_is_needed(folder, monkeypatch):
    path, theirs = folder("gpt2")
    as_bin(path, theirs.state_dict())
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(MissingExtraError, match=r'pip install "sct-jax\[torch\]"'):
        sct.load(path)


def test_files_of_torch_that_are_damaged_or_ask_for_code(folder):
    path, theirs = folder("gpt2")
    as_bin(path, theirs.state_dict())
    whole = (path / TORCH).read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"nothing"):
        (path / TORCH).write_bytes(content)
        with pytest.raises(CheckpointError, match="torch"):
            sct.load(path)
    for odd, message in (
        ({"x": print}, "cannot be read"),
        ({"x": 3}, "not an array"),
        ([torch.ones(1)], "a list"),
    ):
        torch.save(odd, path / TORCH)
        with pytest.raises(CheckpointError, match=message):
            sct.load(path)
    for index in ({"weight_map": {"x": "../x.bin"}}, {"weight_map": {}}, {}):
        (path / f"{TORCH}.index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match="index"):
            sct.load(path)
    (path / f"{TORCH}.index.json").write_text(json.dumps({"weight_map": {"x": "part-1.bin"}}))
    with pytest.raises(CheckpointError, match=r"part-1\.bin"):
        sct.load(path)


@pytest.mark.parametrize("kind", ["gpt2", "neox", "llama", "bert"])
def test_several_files_with_an_index_and_a_model_in_16_bits(kind, tmp_path):
    theirs = foreign.make(kind)
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert (tmp_path / "many" / INDEX).is_file()
    same(sct.load(tmp_path / "many"), sct.load(tmp_path / "one"))
    theirs.to(torch.float16).save_pretrained(tmp_path / "half")
    assert {str(x.dtype) for x in flatten(sct.load(tmp_path / "half").variables).values()} == {"float16"}
    same(sct.load(tmp_path / "half", dtype="float32"), sct.load(tmp_path / "half", dtype="float32"))


@pytest.mark.parametrize("kind", ["gpt2", "neox", "llama"])
def test_a_model_without_its_head(kind, tmp_path):
    """Tied it is complete, otherwise it is refused in one sentence."""
    names = {"gpt2": "GPT2Model", "neox": "GPTNeoXModel", "llama": "LlamaModel"}
    whole = foreign.make(kind, tie_word_embeddings=True)
    whole.save_pretrained(tmp_path / "whole")
    base = foreign.make(kind, model=names[kind], tie_word_embeddings=True)
    base.load_state_dict(getattr(whole, whole.base_model_prefix).state_dict())
    base.save_pretrained(tmp_path / "base")
    same(sct.load(tmp_path / "base"), sct.load(tmp_path / "whole"))
    foreign.make(kind, model=names[kind], tie_word_embeddings=False).save_pretrained(tmp_path / "untied")
    with pytest.raises(CheckpointError, match="head"):
        sct.load(tmp_path / "untied")


def test_buffers_of_older_releases_are_left_out(folder):
    for kind, extra in {
        "gpt2": {"transformer.h.0.attn.bias": (1, 1, 40, 40), "transformer.h.1.attn.masked_bias": ()},
        "neox": {"gpt_neox.layers.0.attention.bias": (1, 1, 40, 40), "gpt_neox.layers.1.attention.masked_bias": (),
                 "gpt_neox.layers.1.attention.rotary_emb.inv_freq": (2,)},
        "llama": {"model.layers.0.self_attn.rotary_emb.inv_freq": (4,), "model.rotary_emb.inv_freq": (4,)},
        "bert": {"bert.embeddings.position_ids": (1, 40)},
    }.items():  # fmt: skip
        path, theirs = folder(kind)
        expected = sct.load(path)
        as_bin(path, {**theirs.state_dict(), **{name: torch.ones(shape) for name, shape in extra.items()}})
        same(sct.load(path), expected)
        # An array of another name is not.
        as_bin_again = {**theirs.state_dict(), "transformer.h.0.attn.scale": torch.ones(2)}
        torch.save(as_bin_again, path / TORCH)
        with pytest.raises(CheckpointError, match=r"\+ transformer\.h\.0\.attn\.scale \(2,\)"):
            sct.load(path)


def test_first_names_of_bert_norms(folder):
    path, theirs = folder("bert")
    expected = sct.load(path)
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    state = {}
    for key, value in theirs.state_dict().items():
        end = next((e for e in names if key.endswith(e)), None)
        state[key if end is None else key.replace(end, names[end])] = value
    as_bin(path, state)
    same(sct.load(path), expected)


def test_a_tied_head_that_is_there_twice_must_be_the_same(folder):
    for kind, head in {"gpt2": "lm_head.weight", "bert": "cls.predictions.decoder.bias"}.items():
        path, theirs = folder(kind)
        expected = sct.load(path)
        state = theirs.state_dict()
        as_bin(path, state)
        same(sct.load(path), expected)
        state[head] = state[head] + 1
        torch.save(state, path / TORCH)
        with pytest.raises(CheckpointError, match="differ"):
            sct.load(path)
    # Tied, and kept under the head's name alone.
    path, theirs = folder("gpt2")
    expected = sct.load(path)
    as_bin(path, {k: v for k, v in theirs.state_dict().items() if k != "transformer.wte.weight"})
    same(sct.load(path), expected)
    as_bin_twice = {**theirs.state_dict(), "wte.weight": theirs.transformer.wte.weight}
    torch.save(as_bin_twice, path / TORCH)
    with pytest.raises(CheckpointError, match=r"transformer\.wte\.weight twice"):
        sct.load(path)


def test_older_spellings_of_configurations(folder):
    """The same models, described as `transformers` did before its fifth release."""
    changes = {
        ("neox", "no biases"): {"rotary_pct": 0.5, "rotary_emb_base": 10000,
                                "rope_scaling": {"type": "linear", "factor": 4.0}},
        ("llama", "llama3"): {"rope_theta": 100.0, "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32}},
        ("llama", "grouped"): {"rope_theta": 500000.0, "rope_scaling": None},
    }  # fmt: skip
    for (kind, name), older in changes.items():
        path, _ = folder(kind, name)
        expected = sct.load(path)
        config = json.loads((path / "config.json").read_text())
        del config["rope_parameters"]
        (path / "config.json").write_text(json.dumps({**config, **older}))
        same(sct.load(path), expected)


@pytest.mark.parametrize(("kind", "name"), [*foreign.CASES, ("bert", "odd")])
def test_there_and_back_again(kind, name, folder, tmp_path):
    """Ours to theirs to ours: every bit, and the architecture."""
    path, theirs = folder(kind, name)
    model = sct.load(path)
    model.save_pretrained(tmp_path / "ours")
    same(sct.load(tmp_path / "ours"), model)
    hf.save(sct.load(tmp_path / "ours"), tmp_path / "again")
    same(sct.load(tmp_path / "again"), model)
    assert {p.name for p in (tmp_path / "again").iterdir()} == {"config.json", WEIGHTS, "README.md"}
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["model_type"] == theirs.config.model_type
    again = type(theirs.config).from_pretrained(tmp_path / "again")
    for field in (
        "vocab_size",
        "num_hidden_layers",
        "hidden_act",
        "tie_word_embeddings",
        "max_position_embeddings",
    ):
        if hasattr(theirs.config, field) and field != "hidden_act":
            assert getattr(again, field) == getattr(theirs.config, field), field


def test_a_tokenizer_is_taken_along(folder, tmp_path):
    tokenizers = pytest.importorskip(
        "tokenizers", reason='tokenizers is not installed: pip install "sct-jax[text]"'
    )
    path, _ = folder("gpt2")
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<pad>": 0, "CD3D": 1, "MS4A1": 2, "<unk>": 3}, "<unk>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<pad>", "unk_token": "<unk>"}))
    model = sct.load(path)
    assert model.tokenizer is not None
    assert model.tokenizer.encode("MS4A1 CD3D").tolist() == [2, 1]
    model.save_pretrained(tmp_path / "ours")
    hf.save(sct.load(tmp_path / "ours"), tmp_path / "again")
    assert sct.load(tmp_path / "again").tokenizer.fingerprint == model.tokenizer.fingerprint
    assert json.loads((tmp_path / "again" / "config.json").read_text())["pad_token_id"] == 0
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert theirs("MS4A1 CD3D")["input_ids"] == [2, 1]
    shutil.rmtree(tmp_path / "again")
