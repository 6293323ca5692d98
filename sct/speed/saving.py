"""What a checkpoint costs the training loop."""

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

# Share of a loop's time that its checkpoints may take.
SHARE = 0.02


def _state(job: SpeedJob, store: Store) -> tuple[State, State]:
    """State at the beginning of a run, with its optimiser, and its abstract form."""
    task, mesh = job.task(store), sharding.make_mesh(job.train.mesh)
    abstract, make = init_state(
        task, lambda shapes: make_optimizer(job.optimizer, job.train.steps, shapes)[0], mesh, job.train.seed
    )
    state = make()
    # Moments are zero at first, which is compressed to nothing: later ones are as random as the parameters.
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
    """Save the state of a run and read it again: it is the same bit for bit, or an `SctError` is raised."""
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
        raise SctError(f"{wrong} arrays of a checkpoint are not what was saved: no time is given for it.")
    return {"differences": {"restored state": 0.0}, "limits": {"restored state": 0.0}}


def measure_save(job: SpeedJob, store: Store) -> dict[str, Any]:
    """Save the state of a run some times, while nothing else runs.

    A step is a save until all is on disk; `save_blocked_seconds` of it is what the loop waits for, and
    `checkpoint_interval_seconds` the least time between two saves that cost the loop no more than 2%.
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
    """Least seconds between two saves that cost a loop no more than `SHARE` of its time on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    taken = processor / cores if jax.default_backend() == "cpu" else 0.0
    return max(written, (blocked + taken) / SHARE)
