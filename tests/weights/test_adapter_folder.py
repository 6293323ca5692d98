"""Folders of adapters alone: of any kind, for the model that they were trained on and for no other."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import sct
from sct.errors import CheckpointError, ConfigError
from sct.models import adapters
from sct.models.adapter_kinds import BottleneckConfig, LoraConfig, PrefixConfig
from sct.nn import axes
from sct.train.sharding import MeshConfig, make_mesh
from sct.weights import adapter_folder
from sct.weights.peft import folder as peft
from sct.weights.pretrained import Pretrained
from tests.models.lora_models import MODELS, boxed, config, inputs, trained_adapters
from tests.models.test_adapters import LAYER, kinds


def base(family: str) -> Pretrained:
    return Pretrained(family, config(family), nn.unbox(boxed(family)))


def adapted(family: str, *options: Any) -> Pretrained:
    own = base(family)
    variables = {**own.variables, "adapters": trained_adapters(family, options or kinds(LAYER))}
    return dataclasses.replace(own, variables=variables)


@pytest.mark.slow
def test_what_is_written_is_what_is_read(tmp_path):
    for family in MODELS:
        for layers in ((), LAYER):
            model = adapted(family, *kinds(layers))
            adapter_folder.save(model, tmp_path / family)  # the second one replaces the first
            found = adapter_folder.load(base(family), tmp_path / family)
            chex.assert_trees_all_equal(found.variables, model.variables, strict=True)
            tensors = load_file(tmp_path / family / "adapters.safetensors")
            assert all(name.startswith("adapters/") for name in tensors)
            trained = sum(value.size for path, value in tensors.items() if value.ndim > 1 or "bias" in path)
            assert trained >= adapters.count(model.variables["adapters"])
        assert {file.name for file in (tmp_path / family).iterdir()} == {
            "adapters.json",
            "adapters.safetensors",
        }


@pytest.mark.slow
def test_a_model_folder_keeps_adapters_of_all_kinds(tmp_path):
    model = adapted("llama")
    model.save_pretrained(tmp_path / "model")
    found = sct.load(tmp_path / "model")
    chex.assert_trees_all_equal(found.variables, model.variables, strict=True)
    given = inputs("llama")
    chex.assert_trees_all_equal(found.apply(**given), model.apply(**given), strict=True)


def test_another_model_is_refused_in_one_sentence(tmp_path):
    adapter_folder.save(adapted("llama"), tmp_path)
    own = base("llama")
    norm = jax.tree.map(lambda leaf: leaf * 1.001, own.variables["params"]["norm"])
    others = {
        "llama": dataclasses.replace(own, variables={"params": {**own.variables["params"], "norm": norm}}),
        "gpt2": base("gpt2"),
        "float32": dataclasses.replace(
            own, variables=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), own.variables)
        ),
    }  # fmt: skip
    for word, other in others.items():
        with pytest.raises(CheckpointError, match=rf"were trained on .*{word}") as raised:
            adapter_folder.load(other, tmp_path)
        assert str(raised.value).count("\n") == 0
    with pytest.raises(ConfigError, match="already has adapters"):
        adapter_folder.load(adapted("llama"), tmp_path)
    with pytest.raises(ConfigError, match="no adapters"):
        adapter_folder.save(own, tmp_path)


def test_damaged_folders_are_refused(tmp_path):
    adapter_folder.save(adapted("llama"), tmp_path)
    described, weights = tmp_path / "adapters.json", tmp_path / "adapters.safetensors"
    good, arrays = described.read_text(), weights.read_bytes()
    for change, word in (
        ({"format_version": 9}, "format"), ({"base": "0" * 16}, "damaged"), ({"files": {}}, "damaged"),
        ({"family": 3}, "damaged"),
    ):  # fmt: skip
        described.write_text(json.dumps({**json.loads(good), **change}))
        with pytest.raises(CheckpointError, match=word):
            adapter_folder.load(base("llama"), tmp_path)
    described.write_text(good)
    weights.write_bytes(arrays[:-1] + bytes([arrays[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="sha256"):
        adapter_folder.load(base("llama"), tmp_path)
    weights.unlink()
    with pytest.raises(CheckpointError, match="incomplete"):
        adapter_folder.load(base("llama"), tmp_path)
    (tmp_path / "other.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="do not belong"):
        adapter_folder.save(adapted("llama"), tmp_path)
    nan = jax.tree.map(lambda leaf: leaf * np.nan, adapted("llama", PrefixConfig()).variables["adapters"])
    broken = dataclasses.replace(base("llama"), variables={**base("llama").variables, "adapters": nan})
    with pytest.raises(CheckpointError, match="finite"):
        adapter_folder.save(broken, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_adapters_are_placed_as_the_model_is(tmp_path):
    model, mesh = adapted("llama"), make_mesh(MeshConfig(data=1, devices=1))
    adapter_folder.save(model, tmp_path)
    placed = jax.device_put(base("llama").variables, axes.shardings(boxed("llama"), mesh, axes.RULES))
    found = adapter_folder.load(dataclasses.replace(base("llama"), variables=placed), tmp_path)
    assert {type(leaf.sharding).__name__ for leaf in jax.tree.leaves(found.variables)} == {"NamedSharding"}
    chex.assert_trees_all_equal(found.variables["adapters"], model.variables["adapters"], strict=True)


@pytest.mark.slow
def test_low_rank_adapters_of_some_layers_go_to_the_peft_library_and_back(tmp_path):
    option = LoraConfig((r"attention/(query|value)$",), rank=3, alpha=6.0, dropout=0.1, layers=LAYER)
    model = adapted("llama", option)
    peft.export(model, tmp_path / "peft")
    names = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert names
    assert all(".layers.1." in name for name in names)
    found = peft.load(base("llama"), tmp_path / "peft")
    given = inputs("llama")
    np.testing.assert_allclose(
        found.apply(**given)["logits"], model.apply(**given)["logits"], rtol=1e-5, atol=1e-5
    )
    for other in (BottleneckConfig(width=4), PrefixConfig(length=2)):
        with pytest.raises(ConfigError, match=f"{other.arrays.name}.*adapter_folder"):
            peft.export(adapted("llama", other), tmp_path / "peft")
