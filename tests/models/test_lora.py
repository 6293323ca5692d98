"""Adapters: without effect before training, alone in being trained, and the same when merged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sct.errors import CheckpointError, ConfigError
from sct.models import lora
from sct.models.lora import LoraConfig
from sct.models.sct import SCT
from sct.nn import execution
from sct.nn.linear import Linear
from sct.nn.paths import flatten, unflatten
from sct.train import sharding
from sct.train.optim import OptimizerConfig, make_optimizer
from sct.train.state import init_state, load_into, make_train_step
from sct.weights.pretrained import boxed_shapes, match
from tests.models.lora_models import SIZES, adapted, boxed, call, config, fresh, inputs

ROOT = Path(__file__).resolve().parents[2]


def everything(family: str, **options: Any) -> LoraConfig:
    """Adapters of all dense layers that can have one."""
    return LoraConfig(**{"targets": (".",), "rank": 3, "alpha": 6.0, **options})


def same(a: Any, b: Any) -> bool:
    """Whether two trees of arrays are equal to the last bit."""
    return jax.tree.all(jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), a, b))


@pytest.mark.slow
@pytest.mark.parametrize("family", SIZES)
def test_an_untrained_adapter_changes_nothing(family):
    plain = nn.unbox(boxed(family))
    variables = adapted(family, everything(family), trained=False)
    before = call(family, plain)
    chex.assert_trees_all_equal(before, call(family, variables), strict=True)
    chex.assert_trees_all_equal(before, call(family, variables, jax.random.key(3)), strict=True)
    chex.assert_trees_all_equal(before, call(family, lora.merge(variables)), strict=True)
    # The same matrices with another second factor do change it.
    assert not same(before, call(family, adapted(family, everything(family))))


@pytest.mark.slow
@pytest.mark.parametrize("family", SIZES)
def test_every_adapter_of_every_layer_has_an_effect(family):
    variables = adapted(family, everything(family))

    def loss(adapters):
        outputs = call(family, {**variables, "adapters": adapters})
        return sum(jnp.square(x - 1.0).mean() for x in jax.tree.leaves(outputs))

    gradient = flatten(jax.jit(jax.grad(loss))(variables["adapters"]))
    for path, value in gradient.items():
        if path.endswith(("lora_a", "lora_b")):
            layers = value if path.startswith("layers/") else value[None]
            assert (jnp.abs(layers).max(axis=(1, 2)) > 0).all(), path


@pytest.mark.slow
@pytest.mark.parametrize("family", SIZES)
def test_a_merged_model_is_the_adapted_one(family):
    variables = adapted(family, everything(family))
    merged = lora.merge(variables)
    assert set(merged) == {"params"}
    assert set(flatten(merged)) == set(flatten({"params": variables["params"]}))
    ours, theirs = call(family, variables), call(family, merged)
    for name, value in ours.items():
        size = max(1.0, float(jnp.abs(value).max()))
        np.testing.assert_allclose(value, theirs[name], rtol=0, atol=1e-5 * size, err_msg=name)
    chex.assert_trees_all_equal(call(family, merged), call(family, merged, jax.random.key(0)), strict=True)
    assert not same(merged, {"params": variables["params"]})


@pytest.mark.slow
def test_a_head_that_takes_a_sequence_in_chunks(monkeypatch):
    variables = adapted("sct", LoraConfig(("head",), rank=3, alpha=6.0))
    module = SCT(config("sct"))

    def loss(adapters):
        logits = module.apply({**variables, "adapters": adapters}, **inputs("sct"))["logits"]
        return jnp.square(logits).mean(), logits

    def computed():
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["adapters"])

    whole = computed()
    monkeypatch.setattr(execution, "POINTWISE_CHUNK_CPU", 7)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(computed()), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_merging_keeps_types_and_needs_the_layer():
    variables = adapted("llama")
    half = {**variables, "params": jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables["params"])}
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(lora.merge(half)))
    with pytest.raises(CheckpointError, match="'nowhere'"):
        lora.merge({**variables, "adapters": {"nowhere": variables["adapters"]["head"]}})
    plain = {"params": variables["params"]}
    chex.assert_trees_all_equal(lora.merge(plain), plain, strict=True)


def test_a_single_layer():
    layer, x = Linear(5), jax.random.normal(jax.random.key(0), (4, 7))
    variables = layer.init(jax.random.key(1), x)
    made = nn.unbox(lora.init(jax.random.key(2), variables["params"], LoraConfig(("^$",), 2, 8.0)))
    variables = nn.unbox(variables)
    made["lora_b"] = jax.random.normal(jax.random.key(3), (2, 5))
    expected = x @ variables["params"]["kernel"] + 4.0 * (x @ made["lora_a"]) @ made["lora_b"]
    y = layer.apply({**variables, "adapters": made}, x)
    np.testing.assert_allclose(y, expected + variables["params"]["bias"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(y, layer.apply(lora.merge({**variables, "adapters": made}), x), atol=1e-5)


@pytest.mark.slow
def test_the_gradient_is_that_of_finite_differences():
    variables = adapted("gpt2")
    flat = flatten(variables["adapters"])
    trained = {path: value for path, value in flat.items() if "lora_" in path}

    @jax.jit
    def loss(trained):
        outputs = call("gpt2", {**variables, "adapters": unflatten({**flat, **trained})})
        return jnp.square(outputs["logits"]).mean()

    gradient = jax.jit(jax.grad(loss))(trained)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        ways = {path: rng.normal(size=x.shape).astype(np.float32) for path, x in trained.items()}
        step = float(1e-2 / optax.tree.norm(ways))

        def moved(by, ways=ways):
            return loss({path: x + np.float32(by) * ways[path] for path, x in trained.items()})

        slope = float((moved(step) - moved(-step)) / (2 * step))
        expected = float(optax.tree.vdot(gradient, ways))
        assert slope == pytest.approx(expected, rel=2e-2, abs=1e-3 * float(optax.tree.norm(gradient)))


class Task:
    """Next tokens of random texts, by the adapters alone."""

    trainable, may_be_missing, weight = lora.TRAINABLE, lora.NEW, "tokens"

    def __init__(self, family: str, options: LoraConfig, **architecture: Any):
        self.family, self.options, self.architecture = family, options, architecture

    def init(self, rng: jax.Array) -> dict[str, Any]:
        made = boxed(self.family)
        return {**made, "adapters": lora.init(rng, made["params"], self.options)}

    def loss(self, variables: Any, batch: Any, rng: jax.Array, train: bool) -> Any:
        from sct.models import registry

        module = registry.family(self.family).module(config(self.family, **self.architecture))
        logits = module.apply(variables, batch["ids"], rngs={"dropout": rng} if train else None)["logits"]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], batch["ids"][:, 1:])
        return loss.mean(), {"tokens": jnp.asarray(float(loss.size))}


def trained_by(task: Task, steps: int) -> tuple[Any, dict[str, Any], dict[str, Any], list[float]]:
    """State, variables before and after some steps, and losses."""
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1, devices=1))

    def optimizer(trained: Any) -> optax.GradientTransformation:
        options = OptimizerConfig(peak_lr=1e-2, init_lr=1e-2, schedule="constant", weight_decay=0.1,
                                  decay_rules=((".*", True),))  # fmt: skip
        return make_optimizer(options, steps, trained)[0]

    abstract, make = init_state(task, optimizer, mesh, seed=0)
    step = make_train_step(task, optimizer(abstract.trained), mesh, abstract)
    state = make()
    before = jax.device_get({**state.frozen, **state.trained})
    batch = sharding.put_batch({"ids": np.asarray(inputs("gpt2")["input_ids"])}, mesh)
    losses = []
    for _ in range(steps):
        state, scalars, _ = step(state, batch)
        losses.append(float(scalars["loss"]))
    return state, before, jax.device_get({**state.frozen, **state.trained}), losses


@cache
def trained_with(remat: str) -> Any:
    options = LoraConfig.of("gpt2", rank=4, dropout=0.1)
    return trained_by(Task("gpt2", options, remat=remat), 6)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "products", "level"])
def test_training_changes_the_adapters_alone(remat):
    state, before, after, losses = trained_with(remat)
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert changed == {path for path in before if path.startswith("adapters/") and "/lora_" in path}
    assert changed == set(state.trained)
    assert losses[-1] < losses[0]
    count = 2 * 3 * 4 * (24 + 24)
    assert lora.count(unflatten(after)["adapters"]) == count
    assert sum(value.size for value in state.trained.values()) == count


@pytest.mark.slow
def test_what_is_kept_for_the_backward_pass_changes_no_result():
    first, *others = (trained_with(remat)[2] for remat in ("none", "products", "level"))
    for other in others:
        for path, value in first.items():
            np.testing.assert_allclose(value, other[path], rtol=1e-4, atol=1e-4, err_msg=path)


def test_training_starts_from_a_model_without_adapters():
    state = trained_with("none")[0]
    arrays = {path: np.asarray(value) + 1.0 for path, value in state.frozen.items() if "params/" in path}
    loaded = load_into(state, arrays, Task.may_be_missing)
    chex.assert_trees_all_equal(loaded.trained, state.trained, strict=True)
    assert all(np.array_equal(loaded.frozen[path], value) for path, value in arrays.items())


def test_dropout_needs_a_key_and_keeps_the_mean():
    layer, x = Linear(6, use_bias=False), jnp.ones((4000, 8))
    variables = layer.init(jax.random.key(0), x)
    made = nn.unbox(lora.init(jax.random.key(1), variables["params"], LoraConfig(("^$",), 2, 2.0, 0.4)))
    made["lora_b"] = jnp.ones((2, 6))
    variables = {**nn.unbox(variables), "adapters": made}
    plain = layer.apply(variables, x)

    def dropped(seed):
        return layer.apply(variables, x, rngs={"dropout": jax.random.key(seed)})

    chex.assert_trees_all_equal(dropped(0), dropped(0), strict=True)
    assert not same(dropped(0), dropped(1))
    assert not same(dropped(0), plain)
    scatter = np.asarray(dropped(0) - plain)
    assert np.abs(scatter.mean(axis=0)).max() < 5 * scatter.std(axis=0).max() / np.sqrt(len(x))
    # A share of 0.4 of the inputs is missing, not of the outputs of the layer itself.
    values = x[0, 0] * made["lora_a"].sum(axis=1)
    expected = np.sqrt(0.4 / 0.6 * np.square(values).sum())
    assert scatter[:, 0].std() == pytest.approx(float(expected), rel=0.1)


def test_dropout_differs_between_layers():
    options = LoraConfig(("attention/query",), 3, 6.0, 0.5)
    variables = adapted("gpt2", options)
    first, other = (call("gpt2", variables, jax.random.key(seed))["logits"] for seed in (0, 1))
    assert not same(first, other)
    chex.assert_trees_all_equal(first, call("gpt2", variables, jax.random.key(0))["logits"], strict=True)
    chex.assert_trees_all_equal(call("gpt2", variables), call("gpt2", variables), strict=True)
    none = adapted("gpt2", LoraConfig(("attention/query",), 3, 6.0))
    # Where nothing is dropped the tree holds no share, so that no random numbers are drawn.
    assert not any(path.endswith("dropout") for path in flatten(none["adapters"]))
    chex.assert_trees_all_equal(call("gpt2", none), call("gpt2", none, jax.random.key(0)), strict=True)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_float32_adapters_of_a_bfloat16_computation(family):
    variables = adapted(family)
    exact, rough = call(family, variables), call(family, variables, dtype="bfloat16")
    plain = call(family, {"params": variables["params"]})
    name = "logits"
    effect = float(jnp.abs(exact[name] - plain[name]).max())
    assert float(jnp.abs(exact[name] - rough[name]).max()) < 0.1 * effect
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(variables["adapters"]))


def test_random_matrices():
    one = flatten(nn.unbox(fresh("gpt2", LoraConfig(("mlp/down",), 200, 10.0))))
    all_of_them = flatten(nn.unbox(fresh("gpt2", LoraConfig((".",), 200))))
    # A layer's own matrix does not depend on which other layers have one.
    path = "layers/mlp/down/lora_a"
    np.testing.assert_array_equal(one[path], all_of_them[path])
    assert not np.array_equal(all_of_them["layers/attention/query/lora_a"][0],
                              all_of_them["layers/attention/key/lora_a"][0])  # fmt: skip
    assert not np.array_equal(one[path][0], one[path][1])
    bound = 1 / np.sqrt(40)
    assert np.abs(one[path]).max() <= bound
    assert one[path].std() == pytest.approx(bound / np.sqrt(3), rel=0.05)
    np.testing.assert_allclose(one["layers/mlp/down/scale"], np.full(2, 0.05), rtol=1e-6)
    assert not one["layers/mlp/down/lora_b"].any()


@pytest.mark.parametrize("family", SIZES)
def test_shapes_are_made_without_values(family):
    options = LoraConfig.of(family, dropout=0.1)
    shapes = boxed_shapes(family, config(family))
    abstract = jax.eval_shape(lambda key: lora.init(key, shapes["params"], options), jax.random.key(0))
    real = fresh(family, options)

    def described(tree):
        return {path: (box.names, box.value.shape, box.value.dtype) for path, box in flatten(tree).items()}

    assert described(abstract) == described(real)
    # The same boxes are found from what a file holds, and a file that does not fit is told.
    found = flatten(nn.unbox({**shapes, "adapters": abstract}))
    expected = lora.beside(shapes, found)
    assert described(expected["adapters"]) == described(real)
    match(found, flatten(nn.unbox(expected)), "the file")
    broken = {**found, next(p for p in found if p.endswith("lora_b")): jax.ShapeDtypeStruct((1, 1), float)}
    with pytest.raises(CheckpointError, match=r"~ adapters/.*lora_b"):
        match(broken, flatten(nn.unbox(lora.beside(shapes, broken))), "the file")
    strange = {**found, "adapters/nowhere/lora_a": jax.ShapeDtypeStruct((4, 2), jnp.float32)}
    with pytest.raises(CheckpointError, match=r"\+ adapters/nowhere/lora_a"):
        match(strange, flatten(nn.unbox(lora.beside(shapes, strange))), "the file")
    assert lora.beside(shapes, flatten(nn.unbox(shapes))) is shapes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "query"}, "targets"),
        ({"targets": ()}, "tuple"),
        ({"targets": ("(",)}, "regular expression"),
        ({"rank": 0}, "rank"),
        ({"alpha": 0.0}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_configurations_that_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**options)


def test_targets_that_are_refused():
    params = boxed("llama")["params"]
    with pytest.raises(ConfigError, match=r"'q_proj'.*layers/attention/query"):
        lora.init(jax.random.key(0), params, LoraConfig(("value", "q_proj")))
    with pytest.raises(ConfigError, match="'head'"):
        lora.init(jax.random.key(0), nn.unbox(params), LoraConfig())
    with pytest.raises(ConfigError, match="'other'"):
        LoraConfig.of("other")


@pytest.mark.slow
def test_a_mesh_of_eight_devices():
    done = subprocess.run(
        [sys.executable, "-m", "tests.models.lora_mesh"], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["devices"] == 8
    assert found["difference"] < 1e-5
    assert found["merged"] < 1e-5
    # (layers, in, r) over fsdp = 4 and (layers, r, out) over tensor = 2, as the kernels are.
    assert found["specs"]["layers/attention/query/lora_a"] == [2, 6, 3]
    assert found["specs"]["layers/attention/query/lora_b"] == [2, 3, 12]
    assert found["specs"]["layers/attention/out/lora_a"] == [2, 12, 3]
    assert found["specs"]["layers/mlp/up/lora_b"] == [2, 3, 20]
    assert found["specs"]["head/lora_b"] == [3, 20]
    assert found["kernel"] == found["merged_kernel"] == [2, 6, 12]
