"""Accumulated gradients are those of the whole batch, and a batch ramp draws the same records."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sct.data.store import Store
from sct.errors import ConfigError
from sct.families.tasks import make_task
from sct.nn.paths import unflatten
from sct.train import loop, sharding
from sct.train.experiment import run
from sct.train.loop import TrainConfig, steps_for
from sct.train.sharding import MeshConfig
from sct.train.state import init_state, make_train_step

from .conftest import learn, read_log, without_times

ROOT = Path(__file__).resolve().parents[2]


class Line:
    """A task without randomness: a weighted mean of squares, records of any number of measurements."""

    trainable, may_be_missing, loss_normalizer = ((".*", True),), (), "count"

    def init(self, rng):
        return {"params": {"slope": jnp.asarray([0.5, -1.0, 2.0]), "offset": jnp.zeros(())}}

    def loss(self, variables, batch, rng, train):
        params = variables["params"]
        squares = (batch["x"] @ params["slope"] + params["offset"] - batch["y"]) ** 2
        total, count = (squares * batch["count"]).sum(), batch["count"].sum()
        return total / jnp.maximum(count, 1.0), {"loss": total, "count": count}


def stepped(task, batch, microbatch, steps=1):
    """State, scalars and sums after updates that move parameters by the gradient itself."""
    mesh = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
    optimizer = optax.sgd(1.0)
    abstract, make = init_state(task, lambda shapes: optimizer, mesh, seed=0)
    step, state = make_train_step(task, optimizer, mesh, abstract, microbatch), make()
    for _ in range(steps):
        state, scalars, sums = step(state, sharding.put_batch(batch, mesh))
    return state, scalars, sums


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(st.sampled_from([1, 2, 3, 4]), st.integers(0, 1000), st.integers(1, 3))
def test_microbatches_make_the_update_of_the_whole_batch(microbatch, seed, emptied):
    rng = np.random.default_rng(seed)
    batch = {
        "x": rng.normal(size=(12, 3)).astype(np.float32),
        "y": rng.normal(size=12).astype(np.float32),
        "count": rng.integers(0, 50, 12).astype(np.float32),
    }
    batch["count"][::emptied] = 0  # even a microbatch of nothing, and a batch of nothing
    whole, parts = stepped(Line(), batch, 0), stepped(Line(), batch, microbatch)
    chex.assert_trees_all_close(parts, whole, rtol=2e-5, atol=1e-5)


@pytest.fixture
def task(config):
    plain = config(model__num_downsamples=1)
    return make_task(plain, Store.open(plain["data"]["store"]))[0]


def batch_of(task, size):
    bags = [task.dataset("train").record(i % 8) for i in range(size)]
    stacked = {key: np.stack([bag[key] for bag in bags]) for key in bags[0]}
    return {**stacked, "example_mask": np.ones(size, np.float32)}


@pytest.mark.slow
def test_masks_of_a_microbatch_are_those_of_its_number(task):
    batch = batch_of(task, 8)
    batch["example_mask"][1] = 0  # microbatches of unlike numbers of masked genes
    state, scalars, sums = stepped(task, batch, microbatch=2)

    mesh = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
    initial = init_state(task, lambda shapes: optax.sgd(1.0), mesh, seed=0)[1]()
    key = jax.random.fold_in(jax.random.wrap_key_data(initial.key), 0)

    def by_hand(trained):
        total, count, means = 0.0, 0.0, []
        for number in range(4):
            part = {name: jnp.asarray(value[number::4]) for name, value in batch.items()}
            loss, sums = task.loss(unflatten(trained), part, jax.random.fold_in(key, number), True)
            total, count, means = total + sums["loss"], count + sums["masked"], [*means, loss]
        return total / count, (count, jnp.mean(jnp.stack(means)))

    (loss, (count, mean_of_means)), gradient = jax.jit(jax.value_and_grad(by_hand, has_aux=True))(
        initial.trained
    )
    np.testing.assert_allclose(scalars["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(scalars["gradient_norm"], optax.tree.norm(gradient), rtol=1e-4)
    assert sums["masked"] == count == sums["confusion"].sum()
    assert abs(mean_of_means - loss) > 1e-4 * loss, "here a mean of means would be something else"
    for path, before in initial.trained.items():
        moved = np.asarray(before) - np.asarray(state.trained[path])
        np.testing.assert_allclose(moved, gradient[path], rtol=1e-3, atol=1e-6, err_msg=path)


@pytest.mark.slow
def test_memory_is_that_of_a_microbatch(task):
    mesh = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
    optimizer = optax.sgd(1.0)
    abstract, _ = init_state(task, lambda shapes: optimizer, mesh, seed=0)
    batch = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch_of(task, 32).items()}

    def temporaries(microbatch):
        step = make_train_step(task, optimizer, mesh, abstract, microbatch)
        return step.lower(abstract, batch).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(4) < 0.3 * temporaries(0)


@pytest.mark.slowest
def test_microbatches_on_a_mesh(config):
    plain = config(train__batch_size=16, model__num_downsamples=1, objective__logit_adjustment=False)
    request = {"config": plain, "microbatch": 4, "meshes": [{"data": 1}, {"data": 2, "fsdp": 2}]}
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.accumulate_mesh", json.dumps(request)],
        cwd=ROOT, capture_output=True, text=True, timeout=900, check=False,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    single, split = json.loads(done.stdout.splitlines()[-1])
    assert single["losses"][2] < single["losses"][0]
    for what in ("losses", "norms", "size"):
        np.testing.assert_allclose(split[what], single[what], rtol=1e-5, err_msg=what)
    assert split["bytes"] < 0.75 * single["bytes"]


def test_a_microbatch_must_divide_over_the_mesh():
    mesh = jax.sharding.AbstractMesh((4, 2, 1, 1), sharding.MESH_AXES)
    loop._check_batches(TrainConfig(batch_size=32, grad_accum_steps=4, batch_ramp=((5, 8), (9, 16))), mesh)
    with pytest.raises(ConfigError, match=r"microbatch .*4 .*8 devices"):
        loop._check_batches(TrainConfig(batch_size=32, grad_accum_steps=8), mesh)
    with pytest.raises(ConfigError, match=r"batch_ramp .*4 .*8 devices"):
        loop._check_batches(TrainConfig(batch_size=32, grad_accum_steps=4, batch_ramp=((5, 4),)), mesh)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"grad_accum_steps": 3}, r"train\.grad_accum_steps"),
        ({"grad_accum_steps": 0}, "grad_accum_steps"),
        ({"batch_ramp": ((10, 2), (10, 4))}, r"\(10, 4\)"),
        ({"batch_ramp": ((10, 4), (20, 2))}, r"\(20, 2\)"),
        ({"batch_ramp": ((10, 8),)}, r"train\.batch_size"),
        ({"batch_ramp": ((0, 1),)}, r"must increase"),
        ({"batch_ramp": ((10, 0),)}, r"must increase"),
        ({"batch_ramp": (10, 2)}, r"\(step, records\)"),
        ({"batch_ramp": ((10, 2.0),)}, r"\(step, records\)"),
        ({"batch_ramp": ((10, 3),), "grad_accum_steps": 4}, "microbatch"),
    ],
)
def test_options_that_contradict_each_other(options, words):
    with pytest.raises(ConfigError, match=words) as error:
        TrainConfig(batch_size=8, **options)
    assert "\n" not in str(error.value)


@given(st.integers(0, 10_000), st.lists(st.integers(1, 50), max_size=4), st.integers(1, 7))
def test_steps_for_a_number_of_records(records, lengths, factor):
    ends, sizes = np.cumsum(lengths), factor * np.arange(1, len(lengths) + 2)
    ramp = [(int(end), int(size)) for end, size in zip(ends, sizes, strict=False)]
    steps = steps_for(records, int(sizes[-1]), ramp)
    all_sizes = np.concatenate([np.repeat(sizes[:-1], lengths), np.full(10_001, sizes[-1])])
    size = all_sizes[max(steps - 1, 0)]
    assert abs(all_sizes[:steps].sum() - records) <= max(size, all_sizes[steps]) / 2


RAMP = {
    "batch_size": 4,
    "grad_accum_steps": 2,
    "batch_ramp": [[5, 1], [9, 2]],
    "eval_every": 50,
    "checkpoint_every": 4,
}
RAMP = {f"train__{name}": value for name, value in RAMP.items()} | {"model__num_downsamples": 1}


@pytest.fixture
def seen(monkeypatch):
    """Of every batch that a run draws: its records' rows, and the compilations before it."""
    batches: list[np.ndarray] = []
    compiled: list[str] = []
    counts: list[int] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, duration, **_: compiled.append(name) if "backend_compile" in name else None
    )
    original = loop.sharding.put_batch

    def recording(batch, mesh):
        batches.append(batch["rows"].copy())
        counts.append(len(compiled))
        return original(batch, mesh)

    monkeypatch.setattr(loop.sharding, "put_batch", recording)
    return batches, counts


@pytest.mark.slow
def test_a_ramp_draws_the_same_records_and_compiles_once_a_stage(config, tmp_path, seen):
    plain = config(**RAMP, train__steps=14)
    result = learn(plain, tmp_path)
    batches, counts = seen
    drawn = batches[:14]  # later ones are of the validation at the end
    assert [len(rows) for rows in drawn] == [1] * 5 + [2] * 4 + [4] * 5
    assert result.progress.records_drawn == 5 + 8 + 20
    source = make_task(plain, Store.open(plain["data"]["store"]))[0].dataset("train")
    one_by_one = loop.Loader(source, 1, seed=0).iterate()
    np.testing.assert_array_equal(
        np.concatenate(drawn), np.concatenate([next(one_by_one)["rows"] for _ in range(33)])
    )
    one_by_one.close()
    # Counted before the steps: 0 to 4, 5 to 8, 9 to 13 are stages, and a stage compiles in its first step. Beside
    # the step, the very first one compiles what logs and checkpoints need.
    assert counts[2] == counts[5]
    assert counts[6] - counts[5] == 1 == counts[10] - counts[9]
    assert counts[6] == counts[9]
    assert counts[10] == counts[13]


# Within a stage; within others, and where one ends.
@pytest.mark.parametrize(
    "stops",
    [pytest.param((7,), marks=pytest.mark.slow), pytest.param((3, 5, 8), marks=pytest.mark.slowest)],
    ids=["once", "often"],
)
def test_stopping_within_a_ramp_changes_nothing(config, tmp_path, stops):
    whole = learn(config(**RAMP), tmp_path / "whole")
    for stop in stops:
        assert learn(config(**RAMP, train__stop_at=stop), tmp_path / "parts").progress.step == stop
    parts = learn(config(**RAMP), tmp_path / "parts")
    assert parts.progress == whole.progress
    chex.assert_trees_all_equal(whole.state, parts.state, strict=True)
    assert without_times(read_log(tmp_path / "whole")) == without_times(read_log(tmp_path / "parts"))


@pytest.mark.slow
def test_what_is_computed_cannot_change_within_a_run(config, tmp_path):
    run(config(train__accumulate=1, train__stop_at=1, train__batch_ramp=[]), tmp_path)
    with pytest.raises(ConfigError, match=r"train\.grad_accum_steps"):
        run(config(train__accumulate=2, train__batch_ramp=[]), tmp_path)
    with pytest.raises(ConfigError, match=r"train\.batch_ramp"):
        run(config(train__accumulate=1, train__batch_ramp=[[5, 1]]), tmp_path)
