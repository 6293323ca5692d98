"""Hugging Face folders without torch: strict, streamed, both ways; beside `transformers` they are in tests/parity."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import sct
from sct.data.genes.vocabulary import GeneVocabulary
from sct.errors import CheckpointError, ConfigError, StoreError
from sct.models.decoder_config import GPT2Config, LlamaConfig, NeoXConfig
from sct.nn.paths import flatten, unflatten
from sct.train.sharding import MeshConfig, make_mesh
from sct.weights.hf import config as hf_config
from sct.weights.hf import folder as hf
from sct.weights.model_folder import INDEX, WEIGHTS
from sct.weights.pretrained import Pretrained, expected_shapes
from tests.parity.mesh_models import SMALL, random_model

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = list(SMALL)


def same(one, other):
    chex.assert_trees_all_equal(one.variables, other.variables, strict=True)
    assert dataclasses.replace(one.config, dropout=0.0) == dataclasses.replace(other.config, dropout=0.0)
    assert one.family == other.family


@pytest.fixture
def folder(tmp_path):
    """Function that writes a small model of a family as a Hugging Face folder."""

    def write(family="llama", **changes):
        model = random_model(family, **changes)
        hf.save(model, tmp_path / family)
        return tmp_path / family, model

    return write


def described(path, **changes):
    """Change `config.json`; None deletes an option."""
    config = {**json.loads((path / "config.json").read_text()), **changes}
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_the_round_trip_is_exact(family, tied, folder, tmp_path):
    path, model = folder(family, tied=tied)
    same(sct.load(path), model)
    hf.save(model, tmp_path / "parts", shard_bytes=20_000)
    assert (tmp_path / "parts" / INDEX).is_file()
    same(hf.load(tmp_path / "parts"), model)
    hf.convert(path, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["family"] == family
    same(sct.load(tmp_path / "ours"), model)
    half = hf.load(path, dtype="bfloat16")
    for name, value in flatten(half.variables).items():
        assert value.dtype == jnp.bfloat16
        np.testing.assert_array_equal(value, flatten(model.variables)[name].astype(jnp.bfloat16))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt2", {"mlp": "gelu", "norm_eps": 1e-3, "num_heads": 1}),
        ("neox", {"parallel": False, "attention_bias": False, "out_bias": False, "rotary_fraction": 1.0}),
        ("neox", {"rotary_scaling": "linear", "rotary_factor": 3.0, "rotary_base": 77.0, "mlp": "gelu_tanh"}),
        ("llama", {"num_kv_heads": 2, "rotary_scaling": "", "rotary_length": 8192}),
        (
            "llama",
            {"head_dim": 0, "num_kv_heads": 0, "attention_bias": True, "out_bias": True, "mlp_bias": True},
        ),
        ("bert", {"activation": "relu", "pooler": False, "num_types": 3}),
        ("bert", {"activation": "gelu_tanh", "mlm_head": False}),
    ],
)
def test_every_option_of_the_architecture_goes_there_and_back(family, changes, folder):
    path, model = folder(family, **changes)
    same(sct.load(path), model)


def test_fused_projections_are_split_where_they_should_be(folder):
    """GPT-2 keeps the queries of all heads together, GPT-NeoX the three of each head."""
    path, model = folder("gpt2")
    kernel = model.variables["params"]["layers"]["attention"]
    fused = load_file(path / WEIGHTS)["transformer.h.1.attn.c_attn.weight"]
    for i, name in enumerate(("query", "key", "value")):
        np.testing.assert_array_equal(fused[:, 32 * i : 32 * (i + 1)], kernel[name]["kernel"][1])
    path, model = folder("neox")
    kernel = model.variables["params"]["layers"]["attention"]
    fused = load_file(path / WEIGHTS)["gpt_neox.layers.1.attention.query_key_value.weight"].reshape(
        4, 3, 8, 32
    )
    for i, name in enumerate(("query", "key", "value")):
        np.testing.assert_array_equal(fused[:, i].reshape(32, 32).T, kernel[name]["kernel"][1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"model_type": "mistral"}, r"'mistral'.*gpt2"),
        ("llama", {"hidden_act": "relu"}, r"hidden_act.*'relu'"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, r"rope_type.*'yarn'"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "no option 'factor'"),
        ("llama", {"rope_parameters": {"mrope_section": [1]}, "rope_scaling": None}, "mrope_section"),
        ("llama", {"rope_scaling": 3}, "rope_parameters"),
        ("llama", {"partial_rotary_factor": 0.5}, "LLaMA"),
        ("llama", {"num_key_value_heads": 3}, "num_kv_heads"),
        ("llama", {"hidden_size": None}, "no option 'hidden_size'"),
        ("llama", {"hidden_size": "wide"}, r"hidden_size.*'wide'"),
        ("llama", {"attention_bias": 1}, "attention_bias"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"auto_map": {"AutoModel": "x--y.Z"}}, "auto_map"),
        ("llama", {"attention_bias": True}, r"- model\.layers\.0\.self_attn\.q_proj\.bias \(40,\)"),
        ("llama", {"num_hidden_layers": 1}, r"\+ model\.layers\.1\.input_layernorm\.weight"),
        ("llama", {"num_hidden_layers": 3}, r"- model\.layers\.2\.mlp\.up_proj\.weight"),
        ("llama", {"vocab_size": 64}, r"~ model\.embed_tokens\.weight \(61, 32\) instead of \(64, 32\)"),
        ("llama", {"tie_word_embeddings": True}, "differ"),
        ("gpt2", {"tie_word_embeddings": False}, "head"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("gpt2", {"activation_function": "quick_gelu"}, "quick_gelu"),
        ("neox", {"rotary_pct": 0.13}, "even"),
        ("neox", {"attention_bias": False}, r"\+ gpt_neox\.layers\.0\.attention\.dense\.bias"),
        ("bert", {"position_embedding_type": "relative_key"}, "only 'absolute' is supported"),
        ("bert", {"is_decoder": True}, "is_decoder"),
        ("bert", {"hidden_act": "mish"}, "mish"),
    ],
)  # fmt: skip
def test_what_would_give_other_numbers_is_refused(family, changes, message, folder):
    path, _ = folder(family)
    described(path, **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        sct.load(path)
    assert str(path) in str(caught.value)


def test_options_that_change_nothing_are_left_alone(folder):
    path, model = folder("gpt2")
    described(path, attn_pdrop=0.3, use_cache=False, task_specific_params={"x": 1}, n_ctx=40, pruned_heads={})
    same(sct.load(path), model)


def test_missing_extra_and_odd_arrays_are_listed(folder):
    path, _ = folder("llama")
    arrays = load_file(path / WEIGHTS)
    arrays["model.layers.0.self_attn.q_norm.weight"] = np.ones(10, np.float32)
    del arrays["model.norm.weight"]
    arrays["lm_head.weight"] = arrays["lm_head.weight"].T.copy()
    arrays["model.embed_tokens.weight"] = arrays["model.embed_tokens.weight"].astype(np.int32)
    save_file(arrays, path / WEIGHTS, {"format": "pt"})
    with pytest.raises(CheckpointError, match="4 parameters") as caught:
        sct.load(path)
    for line in (
        "- model.norm.weight (32,)", "+ model.layers.0.self_attn.q_norm.weight (10,)",
        "~ lm_head.weight (32, 61) instead of (61, 32)", "~ model.embed_tokens.weight int32 instead of float32",
    ):  # fmt: skip
        assert line in str(caught.value)


def test_damaged_folders_are_refused(folder, tmp_path):
    path, model = folder("neox")
    whole = (path / WEIGHTS).read_bytes()
    for content in (whole[: len(whole) // 2], whole[:3], b""):
        (path / WEIGHTS).write_bytes(content)
        with pytest.raises(CheckpointError, match="is damaged"):
            sct.load(path)
    (path / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*pytorch_model\.bin"):
        hf.load(path)
    hf.save(model, tmp_path / "parts", shard_bytes=20_000)
    (tmp_path / "parts" / "model-00002-of-00006.safetensors").unlink(missing_ok=True)
    next(iter(sorted((tmp_path / "parts").glob("model-0*.safetensors")))).unlink()
    with pytest.raises(CheckpointError, match="incomplete"):
        sct.load(tmp_path / "parts")
    for content, message in (("{", "JSON"), ("[]", "must be a JSON object")):
        (path / "config.json").write_text(content)
        with pytest.raises(CheckpointError, match=message):
            hf.load(path)
    with pytest.raises(CheckpointError, match="nowhere"):
        hf.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        hf.load(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text('{"format_version": 1, "family": "gpt2"}')
    with pytest.raises(CheckpointError, match="sct"):
        hf.load(tmp_path / "empty")


def test_other_names_of_files_are_read(folder):
    """As many as an index names, whatever they are called, but in the folder."""
    path, model = folder("gpt2")
    arrays = load_file(path / WEIGHTS)
    (path / WEIGHTS).unlink()
    names = sorted(arrays)
    held = {}
    for i, file in enumerate(("a-1-of-2.safetensors", "b.safetensors")):
        part = {name: arrays[name] for name in names[i::2]}
        save_file(part, path / file)
        held |= dict.fromkeys(part, file)
    (path / INDEX).write_text(json.dumps({"weight_map": held}))
    same(sct.load(path), model)
    (path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(held, "../b.safetensors")}))
    with pytest.raises(CheckpointError, match="index"):
        sct.load(path)


def test_the_licence_and_genes_go_along(folder, tmp_path):
    genes = GeneVocabulary.from_ids(GeneVocabulary.human().ensembl_ids[:20])
    model = dataclasses.replace(random_model("gpt2"), genes=genes, license="mit")
    hf.save(model, tmp_path / "there")
    back = sct.load(tmp_path / "there", genes=genes)
    assert (back.genes, back.license) == (genes, "mit")
    assert "license: mit" in back.card
    other = GeneVocabulary.from_ids(GeneVocabulary.human().ensembl_ids[1:21])
    with pytest.raises(StoreError):
        sct.load(tmp_path / "there", genes=other)
    path, _ = folder("gpt2")
    (path / "README.md").unlink()
    assert sct.load(path).license == "unknown"


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("gpt2", GPT2Config(norm="rms"), "'rms'"),
        ("gpt2", GPT2Config(positions="rotary"), "'rotary'"),
        ("llama", LlamaConfig(mlp="gelu"), "'gelu'"),
        ("llama", LlamaConfig(rotary_fraction=0.5), "LLaMA"),
        ("llama", LlamaConfig(out_bias=True), "out_bias"),
        ("neox", NeoXConfig(num_kv_heads=4), "num_kv_heads"),
        ("neox", NeoXConfig(mlp_bias=False), "mlp_bias"),
        ("sct", None, "'sct'"),
    ],
)
def test_what_the_format_cannot_say_is_refused(family, config, message):
    with pytest.raises(ConfigError, match=message):
        hf_config.write(family, config, "float32")


def test_models_that_are_more_than_the_format(tmp_path):
    model = random_model("gpt2")
    extra = dataclasses.replace(
        model, variables={**model.variables, "adapters": {"head": {"lora_a": np.ones(2)}}}
    )
    with pytest.raises(CheckpointError, match="adapters/head/lora_a"):
        hf.save(extra, tmp_path / "x")
    lacking = flatten(model.variables)
    del lacking["params/norm/scale"]
    with pytest.raises(CheckpointError, match="- params/norm/scale"):
        hf.save(dataclasses.replace(model, variables=unflatten(lacking)), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_only_what_this_project_wrote_is_replaced(folder):
    path, model = folder("gpt2")
    hf.save(random_model("llama"), path)
    assert sct.load(path).family == "llama"
    described(path, sct_version=None)  # as if somebody else had written it
    with pytest.raises(CheckpointError, match="choose a new or an empty folder"):
        hf.save(model, path)
    with pytest.raises(CheckpointError, match="choose a new or an empty folder"):
        model.save_pretrained(path)


LLAMA_13B = {
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 5120, "initializer_range": 0.02, "intermediate_size": 13824, "max_position_embeddings": 4096,
    "model_type": "llama", "num_attention_heads": 40, "num_hidden_layers": 40, "num_key_value_heads": 40,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False,
    "torch_dtype": "float16", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip


class Counted:
    """Weights of a model too large to be here, zeros; notes what is read."""

    def __init__(self, shapes):
        self.shapes, self.read = shapes, []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def part(self, name, index):
        found = np.broadcast_to(np.zeros((), np.float16), self.shapes[name].shape)[index]
        self.read.append(found.size)
        return found


def test_thirteen_billion_parameters_fit_their_map_and_go_in_parts(tmp_path, monkeypatch):
    """LLaMA-2-13B: every array is known, and of one that is placed in part, that part alone is read."""
    names = {
        "model.embed_tokens.weight": (32000, 5120),
        "model.norm.weight": (5120,),
        "lm_head.weight": (32000, 5120),
    }
    for layer in range(40):
        for part in ("q", "k", "v", "o"):
            names[f"model.layers.{layer}.self_attn.{part}_proj.weight"] = (5120, 5120)
        for part, shape in (("gate", (13824, 5120)), ("up", (13824, 5120)), ("down", (5120, 13824))):
            names[f"model.layers.{layer}.mlp.{part}_proj.weight"] = shape
        for part in ("input", "post_attention"):
            names[f"model.layers.{layer}.{part}_layernorm.weight"] = (5120,)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_13B))
    reader = Counted({name: jax.ShapeDtypeStruct(shape, jnp.float16) for name, shape in names.items()})
    monkeypatch.setattr(hf, "open_weights", lambda folder: reader)
    with hf._opened(tmp_path) as opened:
        assert sum(int(np.prod(leaf.shape)) for leaf in opened.shapes.values()) == 13_015_864_320
        assert {name for entry in opened.entries.values() for name in entry.names} == set(names)
        path = "params/layers/mlp/up/kernel"
        made = opened.read(path, (slice(2, 4), slice(0, 640), slice(1728, 3456)), opened.dtype(path))
        assert (made.shape, made.dtype, reader.read) == ((2, 640, 1728), np.float16, [640 * 1728] * 2)


@pytest.mark.parametrize("family", ["gpt2", "neox"])
def test_parts_of_fused_projections_are_those_of_the_whole(family, folder):
    """Any part of the outputs, within a head or across heads."""
    path, model = folder(family)
    with hf._opened(path) as opened:
        for name, value in flatten(model.variables).items():
            if "attention" in name and len(value.shape) == 3:
                for out in (slice(0, 8), slice(3, 5), slice(7, 30), slice(16, 32)):
                    index = (slice(1, 2), slice(4, 9), out)
                    np.testing.assert_array_equal(
                        opened.read(name, index, np.float32), value[index], err_msg=name
                    )


def eight_devices(*words):
    environment = {
        **os.environ,
        "JAX_NUM_CPU_DEVICES": "8",
        "JAX_PLATFORMS": "cpu",
    }
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, check=False, env=environment
    )


@pytest.mark.slow
def test_a_mesh_of_several_devices_in_parts(folder):
    paths = [str(folder(family)[0]) for family in FAMILIES]
    done = eight_devices("tests.weights.mesh_load", *paths)
    assert done.returncode == 0, done.stderr
    for what in json.loads(done.stdout.splitlines()[-1]):
        assert (what["devices"], what["equal"]) == (8, True)
        assert what["bytes_per_device"] < 0.3 * what["bytes"]
        assert what["largest_read"] <= what["largest_part"]


def test_a_mesh_of_one_device(folder):
    path, model = folder("llama")
    mesh = make_mesh(MeshConfig(data=1), devices=jax.devices()[:1])
    placed = sct.load(path, mesh=mesh)
    same(placed, model)
    assert all(leaf.sharding.mesh.shape == mesh.shape for leaf in jax.tree.leaves(placed.variables))
    with pytest.raises(ConfigError, match="'rows'"):
        sct.load(path, mesh=mesh, rules={"embed": ("rows",)})
    with pytest.raises(CheckpointError, match="'int8'"):
        sct.load(path, dtype="int8")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are asked of Linux")
def test_a_model_never_is_in_memory_twice(tmp_path, folder):
    """About 400 MB are loaded within 1.5 times that, on one device and on a mesh; less than once is not enough."""
    shutil.move(folder("llama", vocab_size=62)[0], tmp_path / "small")
    config = LlamaConfig(vocab_size=8000, embed_dim=1024, num_layers=7, num_heads=8, ffn_dim=2816)
    shapes = expected_shapes("llama", config)
    arrays = {path: np.full(leaf.shape, 0.5, np.float32) for path, leaf in shapes.items()}
    model = Pretrained("llama", config, unflatten(arrays))
    hf.save(model, tmp_path / "large")
    size = 4 * model.size
    assert 380e6 < size < 450e6
    del model, arrays
    for where in ("single", "mesh"):
        done = eight_devices("tests.weights.hf_memory", str(tmp_path / "large"), where, str(int(1.5 * size)))
        assert done.returncode == 0, done.stderr
        assert eight_devices(
            "tests.weights.hf_memory", str(tmp_path / "large"), where, str(int(0.9 * size))
        ).returncode


def command(*words):
    return subprocess.run(
        [sys.executable, "-m", "launch.convert", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_the_command(folder, tmp_path):
    path, model = folder("bert", mlm_head=False)
    there, back = tmp_path / "ours", tmp_path / "theirs"
    done = command("--from=hf", f"--input={path}", f"--output={there}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"model folder: {there}"
    assert "license" in done.stdout
    same(sct.load(there), model)
    done = command("--from=sct", "--to=hf", f"--input={there}", f"--output={back}", "--dtype=bfloat16")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"Hugging Face folder: {back}"
    assert {str(value.dtype) for value in flatten(sct.load(back).variables).values()} == {"bfloat16"}
    assert json.loads((back / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--from=hf", "--to=hf"], "--from=hf cannot be combined with --to=hf"),
        (["--from=sct"], "--from=sct cannot be combined with --to=sct"),
        (["--from=hf", "--genes=none"], "--genes only works with --from=haiku-sct"),
        (["--from=hf"], "has no config.json"),
    ],
)
def test_the_command_refuses_in_a_sentence(words, message, tmp_path):
    (tmp_path / "empty").mkdir()
    done = command(*words, f"--input={tmp_path / 'empty'}", f"--output={tmp_path / 'out'}")
    assert done.returncode == (1 if "config.json" in message else 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
