"""What text models promise of themselves, whatever their weights: padding, packing, order, forms, meshes."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sct.errors import CheckpointError, ConfigError, DataError
from sct.models import registry
from sct.models.bert_config import BertConfig
from sct.models.decoder_config import GPT2Config, LlamaConfig, NeoXConfig
from sct.nn import attention
from sct.nn.reference import reference_kernels, smaller_chunks
from sct.weights.pretrained import Pretrained, boxed_shapes

from .mesh_models import SMALL, random_model

FAMILIES = list(SMALL)
ROOT = Path(__file__).resolve().parents[2]


def texts(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 61, length) for length in lengths]


def near(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_packing_change_nothing(family):
    model = random_model(family)
    parts = texts([7, 5, 9])
    alone = [model.apply(input_ids=part[None])["logits"][0] for part in parts]
    for left in (True, False):
        ids, mask = np.full((3, 11), 60), np.zeros((3, 11), np.int32)
        for row, part in enumerate(parts):
            where = slice(11 - len(part), 11) if left else slice(len(part))
            ids[row, where], mask[row, where] = part, 1
        logits = model.apply(input_ids=ids, attention_mask=mask)["logits"]
        for row, expected in enumerate(alone):
            near(logits[row, mask[row] == 1], expected)
    packed = np.concatenate([*parts, [60, 60]])[None]
    segments = np.repeat([1, 2, 3, 0], [7, 5, 9, 2])[None]
    logits = model.apply(input_ids=packed, segments=segments)["logits"][0]
    near(logits[:21], np.concatenate(alone))
    # The same texts without segments are one text.
    assert np.abs(model.apply(input_ids=packed)["logits"][0, 7:21] - logits[7:21]).max() > 1e-2


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "bert"])
def test_a_decoder_does_not_look_ahead(family):
    model = random_model(family)
    ids = texts([12])[0][None]
    other = ids.copy()
    other[0, 8:] = (other[0, 8:] + 1) % 61
    one, two = (model.apply(input_ids=x)["logits"][0] for x in (ids, other))
    np.testing.assert_array_equal(one[:8], two[:8])
    assert (np.abs(one[8:] - two[8:]).max(axis=-1) > 1e-3).all()


def test_an_encoder_looks_both_ways():
    model = random_model("bert")
    ids = texts([12])[0][None]
    other = ids.copy()
    other[0, 11] = (other[0, 11] + 1) % 61
    assert (
        np.abs(model.apply(input_ids=ids)["hidden"] - model.apply(input_ids=other)["hidden"])[0, 0] > 0
    ).any()


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    ["llama", "bert", "gpt2", "neox"],
)
def test_remat_and_chunks_change_nothing(family):
    """Loss and gradients of a text longer than a chunk of the attention, beside those of the plainest forms."""
    model = random_model(family)
    ids = texts([29])[0][None]
    segments = np.repeat([1, 2, 0], [17, 9, 3])[None]

    def gradients(remat):
        module = registry.family(family).module(dataclasses.replace(model.config, remat=remat))

        def loss(variables):
            logits = module.apply(variables, input_ids=ids, segments=segments)["logits"]
            return (jax.nn.log_softmax(logits)[..., 3] * (segments > 0)).sum()

        return jax.jit(jax.value_and_grad(loss))(model.variables)

    with reference_kernels():
        expected = gradients("none")
    most = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected[1]))
    for remat in ("products", "level"):
        with smaller_chunks(0.02):  # ten keys and five queries at a time
            found = gradients(remat)
        chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-6 * most)


@pytest.mark.parametrize("remat", ["none", "products", "level"])
def test_the_order_of_a_decoder_is_known_when_attention_is_chosen(remat, monkeypatch):
    """Flash kernels take causal order as an option, not as an array."""
    orders = []
    choose = attention._implementation
    monkeypatch.setattr(
        attention, "_implementation", lambda *given: orders.append(given[2].order) or choose(*given)
    )
    model = random_model("llama", remat=remat)
    module = registry.family("llama").module(model.config)
    jax.eval_shape(lambda v: module.apply(v, input_ids=np.zeros((1, 4), np.int32)), model.variables)
    assert orders
    assert all(isinstance(order, int) and order == 0 for order in orders)


def test_outputs_of_bert_are_those_of_its_configuration():
    for pooler, head in ((True, False), (False, True), (False, False)):
        model = random_model("bert", pooler=pooler, mlm_head=head)
        names = {"hidden", *["pooled"] * pooler, *["logits"] * head}
        assert model.apply(input_ids=np.zeros((1, 2), np.int32)).keys() == names
        assert names == set(registry.family("bert").module.outputs_of(model.config))
    with pytest.raises(CheckpointError, match=r"'logits'.*hidden"):
        model.apply(input_ids=np.zeros((1, 2), np.int32), outputs=["logits"])


def test_types_and_positions_of_bert_count_and_are_checked():
    model = random_model("bert")
    ids = texts([6])[0][None]
    plain = model.apply(input_ids=ids)["hidden"]
    near(plain, model.apply(input_ids=ids, token_type_ids=np.zeros_like(ids))["hidden"])
    near(plain, model.apply(input_ids=ids, positions=np.arange(6)[None])["hidden"])
    for changed in ({"token_type_ids": np.ones_like(ids)}, {"positions": np.arange(6)[None] + 1}):
        assert np.abs(model.apply(input_ids=ids, **changed)["hidden"] - plain).max() > 1e-2
    with pytest.raises(DataError, match="token_type_ids"):
        model.apply(input_ids=ids, token_type_ids=2 * np.ones_like(ids))
    with pytest.raises(DataError, match="41 tokens"):
        model.apply(input_ids=np.zeros((1, 41), np.int32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "num_heads"),
        ({"activation": "silu"}, "activation"),
        ({"num_types": 0}, "num_types"),
        ({"dropout": 1.0}, "dropout"),
        ({"norm_eps": 0.0}, "norm_eps"),
    ],
)
def test_configurations_of_bert_that_cannot_be(changes, message):
    with pytest.raises(ConfigError, match=message):
        BertConfig(**changes)


@pytest.mark.parametrize(
    ("family", "config", "size"),
    [
        ("gpt2", GPT2Config(), 124_439_808),
        ("neox", NeoXConfig(), 162_322_944),
        ("llama", LlamaConfig(), 6_738_415_616),
        ("llama", LlamaConfig(embed_dim=5120, num_layers=40, num_heads=40, ffn_dim=13_824), 13_015_864_320),
        ("bert", BertConfig(mlm_head=False), 109_482_240),
    ],
)
def test_published_sizes(family, config, size):
    assert sum(leaf.size for leaf in jax.tree.leaves(boxed_shapes(family, config))) == size


@pytest.mark.slow
def test_dropout_needs_a_key_and_leaves_the_mean():
    model = random_model("bert", dropout=0.2)
    ids = texts([6])[0][None]
    module = registry.family("bert").module(model.config)
    plain = module.apply(model.variables, input_ids=ids)["hidden"]
    near(plain, random_model("bert").apply(input_ids=ids)["hidden"])
    keys = jax.random.split(jax.random.key(0), 2)
    one, two = (module.apply(model.variables, input_ids=ids, rngs={"dropout": k})["hidden"] for k in keys)
    assert np.abs(one - plain).max() > 1e-2
    assert np.abs(one - two).max() > 1e-2


@pytest.mark.slow
def test_meshes_give_what_one_device_gives():
    """Eight simulated devices, in a process of their own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.parity.mesh_models"], cwd=ROOT, capture_output=True, text=True, check=False,
        timeout=1800, env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    assert {(a["family"], a["mesh"]) for a in answers} == {
        (family, mesh) for family in FAMILIES for mesh in ("fsdp=4,tensor=2", "fsdp=2,sequence=2,tensor=2")
    }
    for answer in answers:
        assert answer["error"] < 1e-5, answer
        assert answer["ahead"] == 0.0, answer
        assert answer["share"] < 0.3, answer


def test_handles_say_what_they_are():
    assert repr(random_model("llama")).startswith("Pretrained('llama', ")
    assert isinstance(random_model("gpt2"), Pretrained)
