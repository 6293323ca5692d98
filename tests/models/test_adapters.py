"""Adapters of every kind in every family: beside a model that stays as it is, in the layers that were chosen."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sct.errors import CheckpointError, ConfigError
from sct.generation import cache
from sct.models import adapters, lora, registry
from sct.models.adapter_kinds import CONFIGS, AdapterConfig, BottleneckConfig, LoraConfig, PrefixConfig
from sct.models.bert import BertLayer
from sct.models.decoder import Block
from sct.nn import attention
from sct.nn.adapters import KINDS, Prefix
from sct.nn.attention import SelfAttention, attend, rotary
from sct.nn.chunked_attention import Mask, chunked_attention
from sct.nn.linear import Embed, Linear
from sct.nn.paths import flatten, resolve, unflatten
from sct.train.optim import OptimizerConfig
from sct.weights.pretrained import boxed_shapes, match
from tests.models.lora_models import MODELS, boxed, call, config, trained_adapters
from tests.models.test_lora import Task, trained_by

ROOT = Path(__file__).resolve().parents[2]
# Blocks, width, inputs of the feed-forward's last map, and outputs of the map to keys, of the small models.
SHAPES = {
    "gpt2": (2, 24, 40, 24), "neox": (2, 24, 40, 24), "llama": (2, 24, 40, 12), "bert": (2, 24, 40, 24),
    "sct": (2, 32, 24, 32), "zeromics_cells": (2, 24, 40, 24), "scgpt": (2, 24, 40, 24),
}  # fmt: skip
LAYER = (1,)


def kinds(layers: tuple[int, ...] = (), skip: bool = True) -> tuple[AdapterConfig, ...]:
    """Options of one adapter of each kind."""
    return (
        LoraConfig((r"attention/(query|key)$",), rank=3, alpha=6.0, layers=layers),
        BottleneckConfig(width=5, scale=0.7, skip=skip, layers=layers),
        PrefixConfig(length=3, layers=layers),
    )


def plain(family: str) -> dict[str, Any]:
    return nn.unbox(boxed(family))


def adapted(family: str, *options: AdapterConfig) -> dict[str, Any]:
    return {**plain(family), "adapters": trained_adapters(family, options)}


def fresh(family: str, *options: AdapterConfig) -> dict[str, Any]:
    made = adapters.init(jax.random.key(1), boxed(family)["params"], *options)
    return {**plain(family), "adapters": nn.unbox(made)}


def distance(one: dict[str, jax.Array], other: dict[str, jax.Array]) -> float:
    return max(float(jnp.abs(one[name] - other[name]).max()) for name in one)


def near(
    one: dict[str, jax.Array], other: dict[str, jax.Array], what: str, tolerance: float = 1e-5
) -> list[str]:
    """Outputs that differ by more than rounding, and by how much of their size."""
    found = {
        name: float(jnp.abs(value - other[name]).max()) / max(1.0, float(jnp.abs(value).max()))
        for name, value in one.items()
    }
    return [f"{what}: {name} {size:.1e}" for name, size in found.items() if size > tolerance]


def gradients(family: str, variables: dict[str, Any]) -> dict[str, np.ndarray]:
    """Gradient of all outputs by the arrays that are trained."""
    flat = flatten(variables)
    trains = resolve(adapters.TRAINABLE, flat, "trainable")

    def loss(trained: dict[str, jax.Array]) -> jax.Array:
        outputs = call(family, unflatten({**flat, **trained}))
        return sum(jnp.square(x - 1.0).mean() for x in jax.tree.leaves(outputs))

    return jax.device_get(jax.jit(jax.grad(loss))({path: flat[path] for path in flat if trains[path]}))


@pytest.mark.slow
def test_fresh_adapters_change_nothing():
    wrong = []
    for family in MODELS:
        before = call(family, plain(family))
        for layers in ((), LAYER):
            low_rank, bottleneck, _ = kinds(layers)
            # Equal but for another order of sums in what is compiled; a single layer is equal to the last bit (below).
            wrong += near(
                before, call(family, fresh(family, low_rank, bottleneck)), f"{family} {layers}", 2e-6
            )
    assert not wrong
    # The two that are exempt begin with a change.
    for option in kinds()[2], kinds(skip=False)[1]:
        assert distance(call("bert", plain("bert")), call("bert", fresh("bert", option))) > 1e-3


@pytest.mark.slow
def test_every_array_of_every_chosen_layer_has_an_effect():
    wrong = []
    for family in MODELS:
        for layers in ((), LAYER):
            for path, value in gradients(family, adapted(family, *kinds(layers))).items():
                rows = value if "layers/" in path else value[None]
                if rows.shape[0] != (len(layers) or (2 if "layers/" in path else 1)):
                    wrong.append(f"{family}: {path} has {rows.shape[0]} layers")
                if not all(np.abs(row).max() > 0 for row in rows):
                    wrong.append(f"{family}: {path} {layers}")
    assert not wrong


@pytest.mark.slow
def test_a_stack_is_its_layers_one_after_the_other():
    """Each with the adapters of its own alone, kept for the backward pass or not."""
    wrong = []
    for family, block, seen in (
        ("bert", BertLayer, ()),
        ("llama", Block, (jnp.arange(7)[None].repeat(2, 0),)),
    ):
        options, x = config(family), jax.random.normal(jax.random.key(0), (2, 7, 24))
        segments = jnp.asarray([[1] * 7, [0, 0, 1, 1, 2, 2, 2]])
        for layers, skip in (
            ((), True),
            ((), False),
            (LAYER, True),
            (LAYER, False),
            ((0,), False),
            ((0, 1), True),
        ):
            variables = adapted(family, *kinds(layers, skip))
            params, own = flatten(variables["params"]["layers"]), flatten(variables["adapters"]["layers"])
            expected = x
            for number in range(2):
                row = (layers or (0, 1)).index(number) if number in (layers or (0, 1)) else None
                single = {
                    path: value[row]
                    for path, value in own.items()
                    if row is not None and "_layers" not in path
                }
                parts = {"params": unflatten({path: value[number] for path, value in params.items()})}
                expected = block(options).apply(
                    {**parts, "adapters": unflatten(single)}, expected, *seen, Mask(segments, segments)
                )
            inside = {name: {"layers": tree["layers"]} for name, tree in variables.items()}
            for remat in ("none", "level"):
                module = registry.family(family).module(config(family, remat=remat))
                found = module.apply(
                    inside, x, *seen, Mask(segments, segments), method=lambda m, *given: m.layers(*given)[0]
                )
                wrong += near({"x": expected}, {"x": found}, f"{family} {layers} {skip} {remat}")
    assert not wrong


@pytest.mark.slow
def test_training_changes_the_chosen_adapters_alone():
    class Every(Task):
        """Adapters of all kinds at once."""

        trainable, may_be_missing = adapters.TRAINABLE, adapters.NEW

        def init(self, rng: jax.Array) -> dict[str, Any]:
            made = boxed(self.family)
            return {**made, "adapters": adapters.init(rng, made["params"], *self.options)}

    results = []
    for remat in ("none", "level"):
        state, before, after, losses = trained_by(Every("gpt2", kinds(LAYER), remat=remat), 6)
        changed = {path for path in before if not np.array_equal(before[path], after[path])}
        names = {name for kind in KINDS for name in kind.trained}
        assert changed == {path for path in before if path.rpartition("/")[2] in names} == set(state.trained)
        assert losses[-1] < losses[0]
        results.append(after)
    for path, value in results[0].items():
        np.testing.assert_allclose(value, results[1][path], rtol=1e-4, atol=1e-4, err_msg=path)


def test_counts_are_those_of_the_formulas():
    wrong = []
    for family, (number, width, inner, keys) in SHAPES.items():
        params = boxed_shapes(family, config(family))["params"]
        formulas = {
            LoraConfig((r"attention/key$",), rank=3): 3 * (width + keys),
            LoraConfig((r"mlp/down$",), rank=3): 3 * (inner + width),
            BottleneckConfig(width=5): 2 * (2 * width * 5 + 5 + width),
            PrefixConfig(length=7): 7 * width,
        }
        for option, each in formulas.items():
            for layers in ((), LAYER, (0, 1)):
                chosen = dataclasses.replace(option, layers=layers)
                made = jax.eval_shape(
                    lambda key, c=chosen, p=params: adapters.init(key, p, c), jax.random.key(0)
                )
                if adapters.count(made) != (len(layers) or number) * each:
                    wrong.append(f"{family}: {chosen} has {adapters.count(made)}")
    assert set(SHAPES) == set(MODELS)
    assert not wrong
    # Those of the paper's whole-human model: 131,712 a bottleneck of 128, and 32,768 a layer of 64 vectors.
    paper = boxed_shapes("bert", config("bert", embed_dim=512, ffn_dim=512, num_heads=8, num_layers=12))[
        "params"
    ]
    for option, number in (
        (BottleneckConfig((r"^token$",)), 131_712),
        (BottleneckConfig(layers=tuple(range(6, 12))), 12 * 131_712),
        (PrefixConfig(), 393_216),
        (LoraConfig((r"attention/(query|value)$",), rank=30), 12 * 61_440),
    ):
        made = jax.eval_shape(lambda key, c=option: adapters.init(key, paper, c), jax.random.key(0))
        assert adapters.count(made) == number


def test_the_same_boxes_are_found_from_a_file():
    wrong = []
    for family in MODELS:
        shapes = boxed_shapes(family, config(family))
        for layers in ((), LAYER):
            options = kinds(layers)
            made = jax.eval_shape(
                lambda key, p=shapes["params"], c=options: adapters.init(key, p, *c), jax.random.key(0)
            )
            found = flatten(nn.unbox({**shapes, "adapters": made}))
            expected = adapters.beside(shapes, found)
            match(found, flatten(nn.unbox(expected)), "the file")
            described = [
                {path: (box.names, box.value.shape, box.value.dtype) for path, box in flatten(tree).items()}
                for tree in (made, expected["adapters"])
            ]
            if described[0] != described[1]:
                wrong.append(f"{family} {layers}")
            path = next(path for path in found if path.endswith("bottleneck_up"))
            broken = {**found, path: jax.ShapeDtypeStruct((1, 1), jnp.float32)}
            expected = flatten(nn.unbox(adapters.beside(shapes, broken)))
            with pytest.raises(CheckpointError, match=r"~ adapters/.*bottleneck_up"):
                match(broken, expected, "the file")
    assert not wrong


def test_a_bottleneck_is_its_formula():
    rng = np.random.default_rng(0)
    x, ids = jnp.asarray(rng.normal(size=(4, 7)), jnp.float32), jnp.asarray([[0, 2], [1, 1]])
    for layer, given in ((Linear(5), x), (Embed(3, 5), ids)):
        variables = layer.init(jax.random.key(1), given)
        for skip in (True, False):
            option = BottleneckConfig(("^$",), width=3, scale=0.5, skip=skip)
            made = nn.unbox(adapters.init(jax.random.key(2), variables["params"], option))
            assert bool(made["bottleneck_up"].any()) != skip
            y = layer.apply(nn.unbox(variables), given)
            assert np.array_equal(layer.apply({**nn.unbox(variables), "adapters": made}, given), y) == skip
            for name in ("bottleneck_down_bias", "bottleneck_up", "bottleneck_up_bias"):
                made[name] = jnp.asarray(rng.normal(size=made[name].shape), jnp.float32)
            inner = np.maximum(y @ made["bottleneck_down"] + made["bottleneck_down_bias"], 0)
            expected = 0.5 * (inner @ made["bottleneck_up"] + made["bottleneck_up_bias"]) + (y if skip else 0)
            found = layer.apply({**nn.unbox(variables), "adapters": made}, given)
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def attended(query: Any, key: Any, value: Any, seen: np.ndarray) -> jax.Array:
    """Softmax attention (B, L, H, D) where `seen` (B, L, M), written out."""
    scores = jnp.einsum("blhd,bmhd->bhlm", query, key) / np.sqrt(query.shape[-1])
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhlm,bmhd->blhd", weights, value)


@pytest.mark.slow
def test_every_query_sees_a_prefix_whatever_the_mask_says(monkeypatch):
    """In the plain form and in chunks, forwards and backwards."""
    rng, wrong = np.random.default_rng(0), []
    query = jnp.asarray(rng.normal(size=(2, 9, 4, 3)), jnp.float32)
    key, value = (jnp.asarray(rng.normal(size=(2, 9, 2, 3)), jnp.float32) for _ in range(2))
    front = tuple(jnp.asarray(rng.normal(size=(1, 4, 2, 3)), jnp.float32) for _ in range(2))
    segments = jnp.asarray([[0, 0, 1, 1, 1, 2, 2, 2, 2], [3] * 9], jnp.int32)
    weight = jnp.asarray(rng.normal(size=query.shape), jnp.float32)
    masks = (None, Mask(segments, segments), Mask(order=0), Mask(segments, segments, 0))

    def in_chunks(query: Any, key: Any, value: Any, mask: Any) -> jax.Array:
        key, value = (jnp.repeat(x, 2, axis=2) for x in (key, value))
        return chunked_attention(query, key, value, mask, (4, 3))

    for name, form in (("plain", attention._xla), ("chunks", in_chunks)):
        monkeypatch.setattr(attention, "_implementation", lambda *given, form=form: form)
        for mask in masks:
            own = np.ones((2, 9, 9), bool)
            if mask is not None and mask.query is not None:
                own &= np.asarray(segments)[:, :, None] == np.asarray(segments)[:, None]
            if mask is not None and mask.order is not None:
                own &= np.tril(np.ones((9, 9), bool))
            for on in (None, True, False):
                seen = np.concatenate([np.full((2, 9, 4), on is not False), own], axis=2)

                def ours(
                    query: Any, key: Any, value: Any, front: Any, mask: Any = mask, on: Any = on
                ) -> jax.Array:
                    flag = None if on is None else jnp.asarray(on)
                    return (weight * attend(query, key, value, mask, Prefix(*front, flag))).sum()

                def theirs(query: Any, key: Any, value: Any, front: Any, seen: Any = seen) -> jax.Array:
                    keys, values = (
                        jnp.repeat(
                            jnp.concatenate([jnp.broadcast_to(f, (2, *f.shape[1:])), x], axis=1), 2, axis=2
                        )
                        for f, x in zip(front, (key, value), strict=True)
                    )
                    return (weight * attended(query, keys, values, seen)).sum()

                given = (query, key, value, front)
                results = [jax.value_and_grad(f, argnums=(0, 1, 2, 3))(*given) for f in (ours, theirs)]
                for one, other in zip(*(jax.tree.leaves(result) for result in results), strict=True):
                    if not np.allclose(one, other, rtol=1e-4, atol=1e-5):
                        wrong.append(f"{name} {mask} {on}")
    assert not wrong


def test_the_keys_of_a_prefix_are_not_rotated():
    layer, x = SelfAttention(2), jax.random.normal(jax.random.key(0), (2, 5, 8))
    boxes = layer.init(jax.random.key(1), x)
    option = PrefixConfig(("^$",), length=3)
    made, params = (
        nn.unbox(adapters.init(jax.random.key(2), boxes["params"], option)),
        nn.unbox(boxes)["params"],
    )
    made["prefix"] = jax.random.normal(jax.random.key(3), (3, 8))

    def mapped(name: str, given: jax.Array) -> jax.Array:
        return (given @ params[name]["kernel"] + params[name]["bias"]).reshape(2, -1, 2, 4)

    front = jnp.broadcast_to(made["prefix"], (2, 3, 8))
    query, key = (rotary(mapped(name, x), jnp.arange(5)) for name in ("query", "key"))
    key, value = (
        jnp.concatenate(pair, axis=1)
        for pair in ((mapped("key", front), key), (mapped("value", front), mapped("value", x)))
    )
    mixed = attended(query, key, value, np.ones((2, 5, 8), bool)).reshape(2, 5, 8)
    expected = mixed @ params["out"]["kernel"] + params["out"]["bias"]
    np.testing.assert_allclose(
        layer.apply({"params": params, "adapters": made}, x), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.slow
def test_reading_with_a_cache_is_reading_the_whole_text():
    ids = np.random.default_rng(0).integers(0, 40, (3, 10))
    there, wrong = np.arange(10) >= np.array([0, 4, 2])[:, None], []
    for layers, skip in (((), True), (LAYER, False)):
        variables, options = adapted("llama", *kinds(layers, skip)), config("llama")
        whole = registry.family("llama").module(options).apply(variables, ids, there.astype(int))["logits"]
        parts, kept, found = cache.layers_of(variables, options), cache.empty(options, 3, 14), []
        for first, last in ((0, 5), (5, 6), (6, 10)):
            hidden, kept = cache.extend(
                options, parts, kept, ids[:, first:last], there[:, first:last], first == 0
            )
            found.append(cache.scores_of(options, parts, hidden))
        wrong += near(
            {"logits": whole[there]}, {"logits": jnp.concatenate(found, axis=1)[there]}, f"{layers} {skip}"
        )
    assert not wrong


@pytest.mark.slow
def test_a_sample_trains_its_own_part_through_a_prefix_and_in_some_layers():
    low_rank, bottleneck, prefix = kinds(LAYER)
    members = lora.Mixture(("universal", "own"), dataclasses.replace(low_rank, rank=2))
    variables = adapted("gpt2", members.config, bottleneck, prefix)
    module, ids = (
        registry.family("gpt2").module(config("gpt2")),
        np.random.default_rng(0).integers(0, 40, (3, 6)),
    )
    paths = [path for path in flatten(variables) if path.endswith(("lora_a", "lora_b"))]

    @jax.jit
    def loss(trained: dict[str, jax.Array], ids: jax.Array, gate: jax.Array | None) -> jax.Array:
        made = unflatten({**flatten(variables), **trained})
        made = made if gate is None else lora.gated(made, gate)
        return jnp.square(module.apply(made, ids)["logits"]).sum()

    trained = {path: flatten(variables)[path] for path in paths}
    gate = members.gate(jnp.asarray([[1, 0], [1, 1], [1, 1]]))
    found, every, some = (
        jax.grad(loss)(trained, rows, own) for rows, own in ((ids, gate), (ids, None), (ids[1:], None))
    )
    for path in paths:
        for member, whole in (("universal", every), ("own", some)):
            at = members.place(member)
            take = (..., at) if path.endswith("lora_a") else (..., at, slice(None))
            assert np.abs(whole[path][take]).max() > 1e-3
            np.testing.assert_allclose(
                found[path][take], whole[path][take], rtol=2e-3, atol=1e-4, err_msg=path
            )


@pytest.mark.slow
def test_merging_some_layers():
    variables = adapted("bert", kinds(LAYER)[0])
    merged = lora.merge(variables)
    assert not near(call("bert", variables), call("bert", merged), "merged")
    before, after = flatten(variables["params"]), flatten(merged["params"])
    assert not np.array_equal(
        before["layers/attention/key/kernel"][1], after["layers/attention/key/kernel"][1]
    )
    assert np.array_equal(before["layers/attention/key/kernel"][0], after["layers/attention/key/kernel"][0])
    for option in kinds()[1:]:
        with pytest.raises(ConfigError, match=option.arrays.name):
            lora.merge(fresh("bert", option))


def test_weight_decay_leaves_out_biases_and_prefixes():
    paths = [f"adapters/{path}" for path in flatten(fresh("bert", *kinds())["adapters"])]
    decayed = resolve(OptimizerConfig.decay_rules, [*paths, "params/x/bias"], "weight-decay")
    names = {path.rpartition("/")[2] for path, value in decayed.items() if value}
    assert names >= {"lora_a", "lora_b", "bottleneck_down", "bottleneck_up"}
    assert not names & {"prefix", "bottleneck_down_bias", "bottleneck_up_bias"}


@pytest.mark.slow
def test_float32_adapters_of_a_bfloat16_computation():
    variables = adapted("bert", *kinds())
    exact, rough = call("bert", variables), call("bert", variables, dtype="bfloat16")
    effect = distance(exact, call("bert", plain("bert")))
    assert distance(exact, rough) < 0.1 * effect


def test_options_that_are_refused():
    cases: list[tuple[type[AdapterConfig], dict[str, Any], str]] = [
        (BottleneckConfig, {"width": 0}, "width"),
        (BottleneckConfig, {"scale": 0.0}, "scale"),
        (PrefixConfig, {"length": 0}, "length"),
    ]
    for each in CONFIGS:
        cases += [(each, {"layers": value}, "layers") for value in ((-1,), (1, 1), [1], ("a",), (True,))]
        cases += [(each, {"targets": value}, "target") for value in ((), "x", ("(",))]
    for each, options, word in cases:
        with pytest.raises(ConfigError, match=word):
            each(**options)
    for family in ("llama", "sct"):
        params = boxed_shapes(family, config(family))["params"]
        for option in kinds((2,)):
            with pytest.raises(ConfigError, match=r"layers.* lists .*2.*0 to 1"):
                adapters.chosen(params, option)
    # Layers outside of blocks are no part of a choice of blocks.
    made = adapters.chosen(params, LoraConfig((".",), layers=LAYER))
    assert made
    assert all(path.startswith("transformer_1/") for path in made)
    params = boxed_shapes("llama", config("llama"))["params"]
    with pytest.raises(ConfigError, match=r"layers.* lists .*0"):
        adapters.chosen(params, LoraConfig(("head",), layers=(0,)))
    with pytest.raises(ConfigError, match=r"'nothing'.*attention .*layers/attention"):
        adapters.chosen(params, PrefixConfig(("nothing",)))
    with pytest.raises(ConfigError, match=r"two .* prefix"):
        fresh("llama", PrefixConfig(), PrefixConfig(length=2))


def test_other_options_than_those_of_the_model_are_refused():
    low_rank, bottleneck, prefix = kinds(LAYER)
    for option in (low_rank, bottleneck, prefix):
        adapters.check_same(fresh("llama", option), option, "x")
    for option, asked, word in (
        (low_rank, dataclasses.replace(low_rank, alpha=1.0), "alpha"),
        (bottleneck, dataclasses.replace(bottleneck, skip=False), "skip"),
        (bottleneck, dataclasses.replace(bottleneck, scale=2.0), "scale"),
        (prefix, dataclasses.replace(prefix, layers=(0,)), "layers"),
        (prefix, bottleneck, "prefix.*bottleneck"),
    ):
        with pytest.raises(ConfigError, match=word):
            adapters.check_same(fresh("llama", option), asked, "x")
    with pytest.raises(CheckpointError, match="strange"):
        list(adapters.adapters_of({"adapters": {"layers": {"strange": jnp.zeros(2)}}}))


@pytest.mark.slow
def test_a_mesh_of_eight_devices():
    done = subprocess.run(
        [sys.executable, "-m", "tests.models.adapters_mesh"], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["devices"] == 8
    assert all(value < 1e-5 for name, value in found["differences"].items()), found
    assert found["specs"]["layers/mlp/down/bottleneck_down"] == [1, 12, 5]
    assert found["specs"]["layers/attention/prefix"] == [1, 3, 12]
    chex.assert_equal(len(found["differences"]), 9)
