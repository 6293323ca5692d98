"""More tokens for a model: what it says of the old ones stays, the new ones are as likely as the mean."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sct.models.decoder_config import GPT2Config, LlamaConfig, NeoXConfig
from sct.nn.paths import flatten
from sct.weights.load import load
from sct.weights.pretrained import Pretrained, expected_shapes
from sct.weights.vocabulary import resized
from tests.random_models import random_model

SIZES = {"vocab_size": 17, "embed_dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 24, "max_length": 16}
CONFIGS = {
    "gpt2": GPT2Config(**SIZES), "untied": GPT2Config(**SIZES, tied=False),
    "neox": NeoXConfig(**SIZES, rotary_fraction=0.5), "llama": LlamaConfig(**SIZES),
    "tied": LlamaConfig(**SIZES, tied=True),
}  # fmt: skip


def made(name: str) -> Pretrained:
    family = "llama" if name == "tied" else name.replace("untied", "gpt2")
    return random_model(family, CONFIGS[name], seed=0, step=7)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_old_tokens_stay_and_new_ones_are_the_mean(name, tmp_path):
    model = made(name)
    grown = resized(model, 22)
    assert grown.config == dataclasses.replace(model.config, vocab_size=22)
    assert {path: leaf.shape for path, leaf in flatten(grown.variables).items()} == {
        path: leaf.shape for path, leaf in expected_shapes(model.family, grown.config).items()
    }
    ids = np.random.default_rng(1).integers(0, 17, (2, 9))
    before, after = (np.asarray(each.apply(input_ids=ids)["logits"], np.float64) for each in (model, grown))
    np.testing.assert_array_equal(after[..., :17], before)
    np.testing.assert_allclose(
        after[..., 17:], np.repeat(before.mean(axis=-1, keepdims=True), 5, axis=-1), atol=1e-4
    )
    # A new token is read as the mean of the old ones, too.
    table = flatten(grown.variables)["params/token/embedding"]
    np.testing.assert_allclose(table[17:], np.repeat(table[:17].mean(axis=0)[None], 5, axis=0), atol=1e-6)
    changed = {path for path, leaf in flatten(model.variables).items()
               if leaf.shape != flatten(grown.variables)[path].shape}  # fmt: skip
    assert changed == {"params/token/embedding"} | (
        {"params/head/kernel"} if not model.config.tied else set()
    )
    assert flatten(model.variables)["params/token/embedding"].shape[0] == 17, "the model itself is as it was"
    assert (grown.step, grown.family) == (7, model.family)
    grown.save_pretrained(tmp_path / "model")
    np.testing.assert_array_equal(load(tmp_path / "model").apply(input_ids=ids)["logits"], after)


@pytest.mark.parametrize("size", [1, 16, 17])
def test_a_model_with_enough_tokens_stays_as_it_is(size):
    model = made("gpt2")
    assert resized(model, size) is model


def test_sixteen_bits_stay_sixteen_bits():
    model = made("llama")
    model = dataclasses.replace(
        model, variables=jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.variables)
    )
    grown = flatten(resized(model, 30).variables)
    assert {leaf.dtype for leaf in grown.values()} == {jnp.dtype(jnp.bfloat16)}
    exact = flatten(model.variables)["params/token/embedding"].astype(jnp.float32).mean(axis=0)
    np.testing.assert_array_equal(grown["params/token/embedding"][-1], exact.astype(jnp.bfloat16))
