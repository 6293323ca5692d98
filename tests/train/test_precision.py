"""Computing in bfloat16 keeps parameters, gradients and moments in float32."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sct.data.store import Store
from sct.errors import ConfigError
from sct.families.tasks import make_task
from sct.train import sharding
from sct.train.optim import OptimizerConfig, make_optimizer
from sct.train.sharding import MeshConfig
from sct.train.state import init_state, make_train_step

from .conftest import learn

RATE = 1e-4


def built(config, **options):
    """State and step of a model that computes in bfloat16, with a constant learning rate."""
    plain = config(model__dtype="bfloat16", model__num_downsamples=1)
    task, _ = make_task(plain, Store.open(plain["data"]["store"]))
    mesh = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
    settings = OptimizerConfig(peak_lr=RATE, warmup_steps=0, schedule="constant", **options)
    abstract, make = init_state(task, lambda p: make_optimizer(settings, 10, p)[0], mesh, seed=0)
    bags = [task.dataset("train").record(i) for i in range(4)]
    batch = {key: np.stack([bag[key] for bag in bags]) for key in bags[0]} | {
        "example_mask": np.ones(4, np.float32)
    }
    optimizer = make_optimizer(settings, 10, abstract.trained)[0]
    return (
        make(),
        sharding.put_batch(batch, mesh),
        lambda n: make_train_step(task, optimizer, mesh, abstract, n),
    )


def types(tree) -> set[str]:
    return {str(leaf.dtype) for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)}


@pytest.mark.slow
@pytest.mark.parametrize("microbatch", [0, 2])
def test_small_updates_are_not_lost(config, microbatch):
    state, batch, make_step = built(config)
    step = make_step(microbatch)
    program = step.lower(state, batch).as_text()
    assert "xbf16>" in program, "the model computes in bfloat16"
    before = {path: np.array(value) for path, value in state.trained.items()}
    for _ in range(3):
        state, _, _ = step(state, batch)
    assert types(state) == {"float32"}
    # Scales of norms begin at 1, where neighbouring numbers of bfloat16 are 4e-3 or 8e-3 apart.
    assert jnp.bfloat16(1 - 3 * RATE) == 1 == jnp.bfloat16(1 + 3 * RATE)
    at_one = [path for path, value in before.items() if (value == 1).all()]
    moved = np.concatenate([(np.asarray(state.trained[path]) - 1).ravel() for path in at_one])
    assert moved.size > 100
    # Adam's first updates are each about as large as the learning rate, where there is a gradient at all.
    assert np.mean(np.abs(moved) > RATE) > 0.5
    assert np.abs(moved).max() <= 3 * RATE * 1.01


@pytest.mark.slow
def test_a_first_moment_of_half_the_size(config):
    state, batch, make_step = built(config, moment_dtype="bfloat16")
    full, _, make_full = built(config)
    held = {str(leaf.dtype): 0 for leaf in jax.tree.leaves(state.optimizer)}
    for leaf in jax.tree.leaves(state.optimizer):
        held[str(leaf.dtype)] += leaf.nbytes
    assert 2 * held["bfloat16"] == held["float32"]
    assert types(state.trained) == {"float32"}
    before = jax.tree.map(lambda leaf: leaf.dtype, state.optimizer)
    step, full_step = make_step(0), make_full(0)
    for _ in range(3):
        (state, scalars, _), (full, expected, _) = step(state, batch), full_step(full, batch)
    assert jax.tree.map(lambda leaf: leaf.dtype, state.optimizer) == before
    np.testing.assert_allclose(scalars["loss"], expected["loss"], rtol=1e-2)


@pytest.mark.slow
def test_a_run_with_small_moments_resumes_bit_for_bit(config, tmp_path):
    changes = {"optimizer__moment_dtype": "bfloat16", "model__dtype": "bfloat16"}
    plain = config(**changes, model__num_downsamples=1, train__steps=6)
    whole = learn(plain, tmp_path / "whole")
    learn({**plain, "train": {**plain["train"], "stop_at": 3}}, tmp_path / "parts")
    parts = learn(plain, tmp_path / "parts")
    chex.assert_trees_all_equal_dtypes(parts.state, whole.state)
    chex.assert_trees_all_equal(parts.state, whole.state, strict=True)


def test_an_unknown_type_is_refused():
    with pytest.raises(ConfigError, match=r"moment_dtype.*float8"):
        OptimizerConfig(moment_dtype="float8")
