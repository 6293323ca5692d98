"""Measure the mode `save`: the time to save a checkpoint, and the time that the training loop waits for a save."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sct.data.store import Store
from sct.errors import SctError
from sct.speed.compare import Check
from sct.speed.compute import run_steps
from sct.speed.job import SpeedJob
from sct.speed.memory import files_below
from sct.train import sharding
from sct.train.checkpoint import Checkpoints, RunProgress
from sct.train.optim import make_optimizer
from sct.train.state import State, init_state

# Maximum fraction of the training time for checkpoints.
SHARE = 0.02


def _state(job: SpeedJob, store: Store) -> tuple[State, State]:
    """Return the initial training state with its optimizer, and the shapes and dtypes of its arrays."""
    task, mesh = job.task(store), sharding.make_mesh(job.train.mesh)
    abstract, make = init_state(
        task, lambda shapes: make_optimizer(job.optimizer, job.train.steps, shapes)[0], mesh, job.train.seed
    )
    state = make()
    # Optimizer moments start at zero, which would compress too well. Later moments are as random as the parameters.
    leaves, tree = jax.tree.flatten(state.optimizer)
    keys = jax.random.split(jax.random.key(job.train.seed), max(len(leaves), 1))
    noise = [
        leaf + jax.random.normal(key, leaf.shape, leaf.dtype)
        if jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating)
        else leaf
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    state = state.replace(optimizer=jax.tree.unflatten(tree, noise))
    return jax.block_until_ready(state), abstract


def check_save(job: SpeedJob, store: Store) -> Check:
    """Save a training state and restore it. Raise `SctError` unless the restored state is identical bit by bit."""
    state, abstract = _state(job, store)
    with tempfile.TemporaryDirectory(dir=job.folder) as folder:
        checkpoints = Checkpoints(Path(folder))
        checkpoints.save(state, RunProgress(step=1))
        checkpoints.wait()
        again, _ = checkpoints.restore(abstract)
        checkpoints.close()
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(again), strict=True)
    wrong = sum(not np.array_equal(a, b) for a, b in pairs)
    if wrong:
        raise SctError(
            f"{wrong} arrays of the restored checkpoint differ from the saved ones, but must be identical, so saving "
            "was not timed: report this as a bug in saving."
        )
    return {"differences": {"restored state": 0.0}, "limits": {"restored state": 0.0}}


def measure_save(job: SpeedJob, store: Store) -> dict[str, Any]:
    """Time several saves of a training state, without training in between.

    A step is one save. It ends when all data are on disk. `save_blocked_seconds` is the time that the training loop
    waits for a save. `checkpoint_interval_seconds` is the shortest interval between saves at which saving takes at most
    2% of the training time.
    """
    state, _ = _state(job, store)
    blocked: list[float] = []
    with tempfile.TemporaryDirectory(dir=job.folder) as folder:
        checkpoints = Checkpoints(Path(folder))

        def call(_: None) -> None:
            started = time.perf_counter()
            checkpoints.save(state, RunProgress(step=len(blocked) + 1))
            blocked.append(time.perf_counter() - started)
            checkpoints.wait()

        dtype, devices = job.task(store).model_config.dtype, jax.local_devices()
        found = run_steps(job, lambda: None, call, "saves", dtype=dtype, devices=devices)
        size = sum(path.stat().st_size for path in files_below([Path(folder, str(checkpoints.latest))]))
        checkpoints.close()
    waits = statistics.median(blocked[-job.options.steps :])
    return {
        **found,
        "save_blocked_seconds": waits,
        "saved_bytes": size,
        "checkpoint_interval_seconds": interval(waits, found["step_seconds"], found["step_cpu_seconds"]),
    }


def interval(blocked: float, written: float, processor: float) -> float:
    """Return the shortest interval in seconds at which saves take at most `SHARE` of the training time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    taken = processor / cores if jax.default_backend() == "cpu" else 0.0
    return max(written, (blocked + taken) / SHARE)
