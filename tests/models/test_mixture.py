"""A mixture of adapters: all are summed, each sample trains the universal one and its own, and nothing else changes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sct.errors import ConfigError
from sct.models import lora
from sct.models.lora import LoraConfig, Mixture
from sct.nn.paths import flatten, unflatten
from tests.models.lora_models import adapted, forward

MEMBERS = ("universal", "annotation", "rare", "tumor")
MIXTURE = Mixture(MEMBERS, LoraConfig((r"attention/(query|value)$", r"mlp/down$"), rank=2, alpha=3.0))
TASKS = np.array([1, 3, 1, 2, 3])  # of each sample
TRAINS = jnp.asarray(np.eye(len(MEMBERS))[TASKS] + np.eye(len(MEMBERS))[0])
FAMILY = "llama"


@pytest.fixture(scope="module")
def ids() -> jax.Array:
    return jnp.asarray(np.random.default_rng(3).integers(0, 40, (len(TASKS), 9)), jnp.int32)


@pytest.fixture(scope="module")
def variables() -> dict[str, Any]:
    return adapted(FAMILY, MIXTURE.config)


def loss(variables: Any, ids: jax.Array, **options: Any) -> jax.Array:
    """Sum over samples, so that those of parts of a batch add up."""
    logits = forward(FAMILY, **options)(variables, {"input_ids": ids}, {})["logits"]
    scores = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.take_along_axis(scores, ids[:, 1:, None], axis=-1).sum()


def gradients(
    variables: Any, ids: jax.Array, trains: jax.Array | None, **options: Any
) -> dict[str, jax.Array]:
    """Gradients of parameters and of the matrices of adapters, by path."""

    def of(learned: Any) -> jax.Array:
        called = learned if trains is None else lora.gated(learned, MIXTURE.gate(trains))
        return loss(called, ids, **options)

    return flatten(jax.grad(of)(variables))


def matrices(tree: dict[str, Any]) -> list[str]:
    return [path for path in tree if path.endswith(("lora_a", "lora_b"))]


def member(path: str, value: Any, name: str) -> Any:
    """The part of a matrix that belongs to a member."""
    at = MIXTURE.place(name)
    return value[..., at] if path.endswith("lora_a") else value[..., at, :]


def test_all_members_are_summed(variables, ids):
    """The output is that of each member's own adapter, one after the other added to the frozen layers."""
    merged = {"params": variables["params"]}
    for name in MEMBERS:
        flat = flatten(variables["adapters"])
        own = {
            path: member(path, flat[path], name) if path in matrices(flat) else flat[path] for path in flat
        }
        assert {value.shape[-1] for path, value in own.items() if path.endswith("lora_a")} == {2}
        merged = lora.merge({**merged, "adapters": unflatten(own)})
    scales = [value for path, value in flatten(variables["adapters"]).items() if path.endswith("scale")]
    assert all(np.allclose(value, 3.0 / 2) for value in scales)
    call = forward(FAMILY)
    together, apart = (call(v, {"input_ids": ids}, {})["logits"] for v in (variables, merged))
    np.testing.assert_allclose(together, apart, rtol=1e-4, atol=1e-5)
    gated = lora.gated(variables, MIXTURE.gate(TRAINS))
    assert np.array_equal(call(gated, {"input_ids": ids}, {})["logits"], together)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "level"])
def test_a_sample_trains_the_universal_adapter_and_its_own(variables, ids, remat):
    found = gradients(variables, ids, TRAINS, remat=remat)
    paths = matrices(found)
    assert len(paths) == 6
    for name in MEMBERS:
        # What per-task batches give: all samples of a task together, with nothing held back.
        rows = np.flatnonzero([name in ("universal", MEMBERS[task]) for task in TASKS])
        alone = gradients(variables, ids[rows], None, remat=remat)
        for path in paths:
            expected = member(path, alone[path], name)
            assert np.abs(expected).max() > 1e-4
            np.testing.assert_allclose(
                member(path, found[path], name), expected, rtol=2e-3, atol=1e-5, err_msg=path
            )


def test_the_gradient_still_flows_through_every_adapter(variables, ids):
    """Parameters below the adapters have the same gradient, whoever trains them."""
    free, nobody = (gradients(variables, ids, trains) for trains in (None, jnp.zeros_like(TRAINS)))
    mixed = gradients(variables, ids, TRAINS)
    silent = flatten(variables["adapters"])
    silent = {
        path: jnp.zeros_like(value) if path.endswith("lora_b") else value for path, value in silent.items()
    }
    without = gradients({**variables, "adapters": unflatten(silent)}, ids, None)
    for path, value in free.items():
        if path in matrices(free):
            assert not np.asarray(nobody[path]).any(), path
        elif path.startswith("params/"):
            scale = np.abs(value).max()
            np.testing.assert_allclose(mixed[path], value, rtol=1e-4, atol=1e-5 * scale, err_msg=path)
            np.testing.assert_allclose(nobody[path], value, rtol=1e-4, atol=1e-5 * scale, err_msg=path)
    # It would be another one if it went around the adapters.
    embedding = "params/token/embedding"
    assert np.abs(without[embedding] - free[embedding]).max() > 0.05 * np.abs(free[embedding]).max()


def test_the_gradients_are_those_of_finite_differences(variables, ids):
    """Of the loss of the samples that train a member, and of all samples for what lies below."""
    found = gradients(variables, ids, TRAINS)
    rng = np.random.default_rng(0)
    for name in ("universal", "tumor"):
        rows = np.flatnonzero([name in ("universal", MEMBERS[task]) for task in TASKS])
        direction = {}
        for path in matrices(found):
            move = np.zeros(found[path].shape, np.float32)
            member(path, move, name)[...] = rng.normal(size=member(path, move, name).shape)
            direction[path] = move
        size = np.sqrt(sum(np.square(move).sum() for move in direction.values()))

        def moved(step: float, direction=direction, size=size, rows=rows) -> float:
            flat = flatten(variables)
            flat = {path: value + step * direction[path] / size if path in direction else value
                    for path, value in flat.items()}  # fmt: skip
            return float(loss(unflatten(flat), ids[rows]))

        slope = (moved(0.05) - moved(-0.05)) / 0.1
        own = sum(float((np.asarray(found[path]) * move).sum()) for path, move in direction.items()) / size
        assert own == pytest.approx(slope, rel=2e-2, abs=2e-3)


def test_members_that_cannot_be():
    for members in ((), ("universal", "universal")):
        with pytest.raises(ConfigError, match="members"):
            Mixture(members, MIXTURE.each)
