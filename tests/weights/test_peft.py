"""Adapters to and from folders of the PEFT library: the same outputs there and here."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from safetensors.numpy import load_file, save_file

import sct
from sct.errors import CheckpointError, ConfigError
from sct.models import lora
from sct.models.lora import LoraConfig
from sct.nn import axes
from sct.nn.paths import flatten, unflatten
from sct.train.sharding import MeshConfig, make_mesh
from sct.weights.hf import folder as hf
from sct.weights.peft import folder as peft
from sct.weights.pretrained import Pretrained, boxed_shapes
from tests.models.lora_models import SIZES, adapted, boxed, config
from tests.weights.conftest import unsealed

FAMILIES = tuple(sorted(set(SIZES) - {"sct"}))
# All layers that the PEFT library can reach by the same names.
EVERYTHING = LoraConfig((".",), rank=3, alpha=7.0)


def model(family: str, options: LoraConfig | None = None, **architecture: Any) -> Pretrained:
    """Small model with random parameters, with trained adapters where there are options for them."""
    variables = adapted(family, options or EVERYTHING)
    if options is None:
        del variables["adapters"]
    return Pretrained(family, config(family, **architecture), variables)


def ids() -> np.ndarray:
    return np.random.default_rng(2).integers(0, 40, (2, 9)).astype(np.int32)


def outputs(of: Pretrained) -> np.ndarray:
    return np.asarray(of.apply(input_ids=ids(), outputs=["logits"])["logits"])


def edited(folder, **options: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))


def rewritten(folder, change) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(change(tensors), folder / "adapter_model.safetensors")


class Foreign:
    """The same models in torch."""

    def __init__(self, peft_library: Any, torch: Any, transformers: Any):
        self.peft, self.torch, self.transformers = peft_library, torch, transformers

    def base(self, of: Pretrained, folder) -> Any:
        """Model of `transformers` with the parameters of ours."""
        plain = dataclasses.replace(of, variables={"params": of.variables["params"]})
        hf.save(plain, folder)
        kind = "AutoModelForPreTraining" if of.family == "bert" else "AutoModelForCausalLM"
        return getattr(self.transformers, kind).from_pretrained(folder).eval()

    def outputs(self, of: Any) -> np.ndarray:
        with self.torch.no_grad():
            made = of(input_ids=self.torch.as_tensor(ids(), dtype=self.torch.long))
        return (made.logits if hasattr(made, "logits") else made.prediction_logits).numpy()

    def adapted(self, base: Any, folder) -> Any:
        """Model with the adapters of a folder, none of them left out and none made up."""
        made = self.peft.PeftModel.from_pretrained(base, folder).eval()
        saved = load_file(folder / "adapter_model.safetensors")
        held = {name.replace(".default.", "."): p for name, p in made.named_parameters() if "lora_" in name}
        assert held.keys() == saved.keys()
        return made


@pytest.fixture(scope="module")
def foreign():
    reason = "{0} is not installed: it takes torch, transformers and peft to compare with"
    torch, transformers, library = (
        pytest.importorskip(name, reason=reason.format(name)) for name in ("torch", "transformers", "peft")
    )
    return Foreign(library, torch, transformers)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", [(".",), ("attention/(query|value)$", "down")])
def test_the_library_computes_what_is_exported(family, targets, foreign, tmp_path):
    ours = model(family, LoraConfig(targets, rank=3, alpha=7.0, dropout=0.1))
    base = foreign.base(ours, tmp_path / "base")
    before = foreign.outputs(base)
    peft.export(ours, tmp_path / "adapter")
    expected = outputs(ours)
    found = foreign.outputs(foreign.adapted(base, tmp_path / "adapter"))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert np.abs(before - expected).max() > 0.01
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["lora_dropout"] == 0.1


LIBRARY: dict[str, dict[str, Any]] = {
    "gpt2": {"target_modules": ["c_attn", "mlp.c_proj"], "r": 4},
    "neox": {"target_modules": ["query_key_value", "lm_head"], "r": 4, "use_rslora": True},
    "llama": {
        "target_modules": "all-linear", "r": 2, "rank_pattern": {"q_proj": 5, "layers.1.mlp.up_proj": 3},
        "alpha_pattern": {"self_attn.v_proj": 11, r"layers\.0\.mlp\.down_proj": 2},
    },
    "bert": {"target_modules": ["query", "output.dense", "pooler.dense"], "r": 3, "layers_to_transform": None},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_library_saved_is_computed_here(family, foreign, tmp_path):
    plain = model(family)
    options = foreign.peft.LoraConfig(lora_alpha=6, lora_dropout=0.2, **LIBRARY[family])
    made = foreign.peft.get_peft_model(foreign.base(plain, tmp_path / "base"), options)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * foreign.torch.randn_like(parameter)
    made.eval().save_pretrained(tmp_path / "adapter")
    loaded = peft.load(plain, tmp_path / "adapter")
    expected = foreign.outputs(made)
    np.testing.assert_allclose(outputs(loaded), expected, rtol=0, atol=1e-4)
    assert np.abs(outputs(plain) - expected).max() > 0.01
    chex.assert_trees_all_equal({"params": loaded.variables["params"]}, plain.variables, strict=True)
    rates = [value for path, value in flatten(loaded.variables["adapters"]).items() if "dropout" in path]
    assert all(np.allclose(rate, 0.2) for rate in rates) == bool(rates) is True
    # And back: the library finds what it wrote.
    peft.export(loaded, tmp_path / "back")
    again = foreign.adapted(foreign.base(plain, tmp_path / "base"), tmp_path / "back")
    np.testing.assert_allclose(foreign.outputs(again), expected, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_a_model_without_its_head(foreign, tmp_path):
    whole, head = model("bert", EVERYTHING), ("transform", "transform_norm", "head")
    variables = {
        kind: {name: tree for name, tree in trees.items() if name not in head}
        for kind, trees in whole.variables.items()
    }
    ours = Pretrained("bert", config("bert", mlm_head=False), variables)
    hf.save(dataclasses.replace(ours, variables={"params": variables["params"]}), tmp_path / "base")
    peft.export(ours, tmp_path / "adapter")
    base = foreign.transformers.AutoModel.from_pretrained(tmp_path / "base").eval()
    theirs = foreign.adapted(base, tmp_path / "adapter")
    with foreign.torch.no_grad():
        found = theirs(input_ids=foreign.torch.as_tensor(ids(), dtype=foreign.torch.long))
    expected = ours.apply(input_ids=ids())
    np.testing.assert_allclose(found.last_hidden_state.numpy(), expected["hidden"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(found.pooler_output.numpy(), expected["pooled"], rtol=0, atol=1e-4)
    plain = dataclasses.replace(ours, variables={"params": variables["params"]})
    chex.assert_trees_all_equal(peft.load(plain, tmp_path / "adapter").variables, ours.variables, strict=True)


@pytest.mark.filterwarnings("ignore")
def test_layers_without_an_adapter_get_one_of_zeros(foreign, tmp_path):
    plain = model("gpt2")
    options = foreign.peft.LoraConfig(target_modules=["c_attn"], layers_to_transform=[1], r=2)
    made = foreign.peft.get_peft_model(foreign.base(plain, tmp_path / "base"), options)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            parameter.data = foreign.torch.randn_like(parameter)
    made.eval().save_pretrained(tmp_path / "adapter")
    loaded = peft.load(plain, tmp_path / "adapter")
    np.testing.assert_allclose(outputs(loaded), foreign.outputs(made), rtol=0, atol=1e-4)
    query = loaded.variables["adapters"]["layers"]["attention"]["query"]
    assert not query["lora_a"][0].any()
    assert not query["scale"][0]
    assert query["lora_a"][1].any()
    peft.export(loaded, tmp_path / "back")
    written = load_file(tmp_path / "back" / "adapter_model.safetensors")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert written.keys() == saved.keys()
    assert all(np.array_equal(written[name], saved[name]) for name in saved)
    again = foreign.adapted(foreign.base(plain, tmp_path / "base"), tmp_path / "back")
    np.testing.assert_allclose(foreign.outputs(again), foreign.outputs(made), rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [
        EVERYTHING,
        LoraConfig(("attention/(query|value)$",), rank=2, alpha=5.0, dropout=0.1),
        LoraConfig(("attention/key", "mlp"), rank=3, alpha=0.7),
    ],
    ids=("everything", "some", "odd"),
)
def test_written_and_read_back_they_are_the_same(family, options, tmp_path):
    ours = model(family, options)
    peft.export(ours, tmp_path / "adapter")
    plain = dataclasses.replace(ours, variables={"params": ours.variables["params"]})
    back = peft.load(plain, tmp_path / "adapter")
    chex.assert_trees_all_equal(back.variables, ours.variables, strict=True)
    assert all(value.dtype == jnp.float32 for value in jax.tree.leaves(back.variables["adapters"]))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "neox"])
def test_parts_of_one_module_with_the_same_first_matrix(family, tmp_path):
    ours = model(family, LoraConfig(("attention/(query|key|value)$",), rank=3, alpha=7.0))
    attention = ours.variables["adapters"]["layers"]["attention"]
    for name in ("key", "value"):
        attention[name]["lora_a"] = attention["query"]["lora_a"]
    peft.export(ours, tmp_path / "adapter")
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {value.shape for value in written.values()} == {(3, 24), (72, 3)}
    plain = dataclasses.replace(ours, variables={"params": ours.variables["params"]})
    chex.assert_trees_all_equal(peft.load(plain, tmp_path / "adapter").variables, ours.variables, strict=True)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "neox"])
def test_parts_with_other_ranks_and_scales(family, tmp_path):
    one, other = (
        adapted(family, LoraConfig((name,), rank=rank, alpha=alpha))["adapters"]["layers"]["attention"]
        for name, rank, alpha in (("query", 2, 3.0), ("value", 5, 1.0))
    )
    ours = model(family)
    variables = {**ours.variables, "adapters": {"layers": {"attention": {**one, **other}}}}
    ours = dataclasses.replace(ours, variables=variables)
    peft.export(ours, tmp_path / "adapter")
    back = peft.load(model(family), tmp_path / "adapter")
    np.testing.assert_allclose(outputs(back), outputs(ours), rtol=0, atol=1e-5)


def test_an_untrained_adapter_is_written_and_read(tmp_path):
    ours = model("gpt2", LoraConfig.of("gpt2"))
    untrained = {**ours.variables, "adapters": adapted("gpt2", LoraConfig.of("gpt2"), False)["adapters"]}
    peft.export(dataclasses.replace(ours, variables=untrained), tmp_path / "adapter")
    back = peft.load(model("gpt2"), tmp_path / "adapter")
    assert np.array_equal(outputs(back), outputs(model("gpt2")))
    assert lora.count(back.variables["adapters"]) > 0


def test_files(tmp_path):
    ours = model("gpt2", EVERYTHING)
    peft.export(ours, tmp_path / "adapter", base="gpt2")
    options = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert options["base_model_name_or_path"] == "gpt2"
    assert options["fan_in_fan_out"] is True
    assert options["target_modules"] == ["c_attn", "c_fc", "c_proj", "lm_head"]
    peft.export(model("llama", LoraConfig()), tmp_path / "llama")
    options = json.loads((tmp_path / "llama" / "adapter_config.json").read_text())
    assert (options["target_modules"], options["r"], options["lora_alpha"]) == (["q_proj", "v_proj"], 8, 16)
    assert options["rank_pattern"] == options["alpha_pattern"] == {}
    # BERT's names end alike: those of the feed-forward alone are told apart.
    peft.export(model("bert", LoraConfig(("mlp/down",))), tmp_path / "bert")
    options = json.loads((tmp_path / "bert" / "adapter_config.json").read_text())
    assert options["target_modules"] == ["0.output.dense", "1.output.dense"]


def test_names_without_the_prefix_and_bfloat16(tmp_path):
    ours = model("gpt2", LoraConfig.of("gpt2"))
    peft.export(ours, tmp_path / "adapter")
    expected = peft.load(model("gpt2"), tmp_path / "adapter")
    rewritten(tmp_path / "adapter", lambda t: {n.replace("transformer.", ""): v for n, v in t.items()})
    chex.assert_trees_all_equal(
        peft.load(model("gpt2"), tmp_path / "adapter").variables, expected.variables, strict=True
    )
    rewritten(tmp_path / "adapter", lambda t: {n: v.astype(jnp.bfloat16) for n, v in t.items()})
    found = peft.load(model("gpt2"), tmp_path / "adapter").variables["adapters"]
    assert all(value.dtype == jnp.float32 for value in jax.tree.leaves(found))
    for path, value in flatten(found).items():
        np.testing.assert_allclose(value, flatten(expected.variables["adapters"])[path], rtol=1e-2)


def test_adapters_lie_where_the_kernels_do(tmp_path):
    ours = model("llama", EVERYTHING)
    peft.export(ours, tmp_path / "adapter")
    mesh = Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tensor"))
    rules = {name: tuple(a for a in wanted if a in mesh.axis_names) for name, wanted in axes.RULES.items()}
    boxes = boxed("llama")
    placed = jax.device_put({"params": ours.variables["params"]}, axes.shardings(boxes, mesh, rules))
    found = peft.load(dataclasses.replace(ours, variables=placed), tmp_path / "adapter").variables["adapters"]
    chex.assert_trees_all_equal(found, ours.variables["adapters"], strict=True)
    assert all(value.sharding.mesh == mesh for value in jax.tree.leaves(found))
    assert boxed_shapes("llama", ours.config).keys() == {"params"}


@pytest.mark.slow
@pytest.mark.parametrize("family", SIZES)
@pytest.mark.filterwarnings("ignore:.*no hashes")
def test_a_model_folder_keeps_the_adapters(family, tmp_path):
    ours = model(family, LoraConfig((".",), rank=3, dropout=0.1))
    ours.save_pretrained(tmp_path / "model")
    chex.assert_trees_all_equal(sct.load(tmp_path / "model").variables, ours.variables, strict=True)
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    chex.assert_trees_all_equal(
        sct.load(tmp_path / "model", mesh=mesh).variables, ours.variables, strict=True
    )
    half = flatten(sct.load(tmp_path / "model", dtype="bfloat16").variables)
    assert all(value.dtype == jnp.bfloat16 for value in half.values())
    layer = next(path for path in flatten(ours.variables) if path.endswith("query/lora_a"))
    for lost, message in (
        (layer, r"\+ .*query/lora_b"),
        (layer.replace("lora_a", "lora_b"), "- .*query/lora_b"),
    ):
        tensors = {path: np.asarray(value) for path, value in flatten(ours.variables).items() if path != lost}
        ours.save_pretrained(tmp_path / "model")
        save_file(tensors, unsealed(tmp_path / "model") / "model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            sct.load(tmp_path / "model")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"peft_type": "IA3"}, "peft_type = 'IA3', but only LORA"),
    "biases": ({"bias": "all"}, "bias = 'all', but adapters with trained biases"),
    "DoRA": ({"use_dora": True}, "use_dora = True, which is not supported"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save = "),
    "tokens": ({"trainable_token_indices": [3]}, "trainable_token_indices = "),
    "an option of the future": ({"use_other": True}, "use_other = True"),
    "a changed base": ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
    "a rank that the file does not have": ({"r": 5}, r"lora_A \(8, 24\) .* adapter_config\.json require"),
    "a text as a rank": ({"r": "8"}, "invalid value r = '8'"),
    "no pattern": ({"rank_pattern": [3]}, r"rank_pattern = \[3\]"),
    "no regular expression": ({"alpha_pattern": {"(": 3}}, "regular expression"),
    "all left out": ({"lora_dropout": 1.0}, "lora_dropout .* is 1.0"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", REFUSED)
def test_options_that_are_refused(what, tmp_path):
    options, message = REFUSED[what]
    peft.export(model("llama", LoraConfig()), tmp_path / "adapter")
    edited(tmp_path / "adapter", **options)
    with pytest.raises(CheckpointError, match=message):
        peft.load(model("llama"), tmp_path / "adapter")


def without(key: str) -> Any:
    return lambda tensors: {name: value for name, value in tensors.items() if key not in name}


def renamed(old: str, new: str) -> Any:
    return lambda tensors: {name.replace(old, new): value for name, value in tensors.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("layers.1.self_attn.q_proj.lora_B"), "model.layers.1.self_attn.q_proj"),
        (without(""), "adapter"),
        (renamed("q_proj", "qq_proj"), "qq_proj"),
        (renamed("lora_A", "lora_embedding_A"), "no such dense layer"),
        (lambda tensors: {name: value[0] for name, value in tensors.items()}, "the file is damaged"),
        (lambda tensors: {n: v[:, :4] if "_A" in n else v for n, v in tensors.items()}, r"lora_A \(8, 4\)"),
    ],
)
def test_weights_that_are_refused(change, message, tmp_path):
    peft.export(model("llama", LoraConfig()), tmp_path / "adapter")
    rewritten(tmp_path / "adapter", change)
    with pytest.raises(CheckpointError, match=message):
        peft.load(model("llama"), tmp_path / "adapter")


@pytest.mark.parametrize("family", ["llama", "neox"])
def test_the_head_of_the_model_in_the_file(family, tmp_path):
    ours = model(family, EVERYTHING)
    head = np.asarray(ours.variables["params"]["head"]["kernel"]).T
    key = "base_model.model.lm_head.base_layer.weight"
    peft.export(ours, tmp_path / "adapter")
    for kept in (head, head.astype(jnp.bfloat16)):
        rewritten(tmp_path / "adapter", lambda t, kept=kept: {**t, key: np.ascontiguousarray(kept)})
        chex.assert_trees_all_equal(
            peft.load(model(family), tmp_path / "adapter").variables, ours.variables, strict=True
        )
    for other in (head + 0.1, head[1:]):
        rewritten(tmp_path / "adapter", lambda t, other=other: {**t, key: np.ascontiguousarray(other)})
        with pytest.raises(CheckpointError, match="lm_head"):
            peft.load(model(family), tmp_path / "adapter")
    strange = {"base_model.model.other.weight": np.zeros((2, 2), np.float32)}
    rewritten(tmp_path / "adapter", lambda t: {**{n: v for n, v in t.items() if n != key}, **strange})
    with pytest.raises(CheckpointError, match=r"other\.weight"):
        peft.load(model(family), tmp_path / "adapter")


def test_folders_that_are_refused(tmp_path):
    ours, plain = model("llama", LoraConfig()), model("llama")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        peft.load(plain, tmp_path)
    peft.export(ours, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="is damaged"):
        peft.load(plain, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin"):
        peft.load(plain, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
        peft.load(plain, tmp_path / "adapter")
    with pytest.raises(ConfigError, match="already has adapters"):
        peft.load(ours, tmp_path / "adapter")
    with pytest.raises(ConfigError, match="no adapters"):
        peft.export(plain, tmp_path / "other")
    with pytest.raises(ConfigError, match="'sct'"):
        peft.export(model("sct", LoraConfig()), tmp_path / "other")
    strange = {
        **plain.variables,
        "adapters": {"nowhere": ours.variables["adapters"]["layers"]["attention"]["query"]},
    }
    with pytest.raises(CheckpointError, match="'nowhere'"):
        peft.export(dataclasses.replace(plain, variables=strange), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_writing_replaces_an_adapter_and_nothing_else(tmp_path, monkeypatch):
    one, two = model("llama", LoraConfig()), model("llama", LoraConfig(rank=2))
    target = tmp_path / "adapter"
    peft.export(one, target)
    peft.export(two, target)
    expected = peft.load(model("llama"), target).variables
    chex.assert_trees_all_equal(expected, two.variables, strict=True)

    def fails(*_: Any, **__: Any) -> None:
        raise OSError(28, "no space left")

    with monkeypatch.context() as patched:
        patched.setattr("safetensors.numpy.save_file", fails)
        with pytest.raises(CheckpointError, match=r"could not be written to .*(?i:no space left)"):
            peft.export(one, target)
    chex.assert_trees_all_equal(peft.load(model("llama"), target).variables, expected, strict=True)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    (target / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="do not belong"):
        peft.export(one, target)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        peft.export(one, tmp_path / "file")


def test_shares_that_differ(tmp_path):
    ours = model("llama", LoraConfig(dropout=0.1))
    flat = flatten(ours.variables)
    flat["adapters/layers/attention/query/dropout"] = jnp.full(2, 0.3)
    with pytest.raises(CheckpointError, match=r"0\.1, 0\.3"):
        peft.export(dataclasses.replace(ours, variables=unflatten(flat)), tmp_path / "adapter")
