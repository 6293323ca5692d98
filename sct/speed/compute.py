"""Measure the modes `forward` and `train`: time compiled steps, and compare their speed with the compute ceiling."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax

from sct.data.loader import Loader
from sct.data.store import Store
from sct.errors import SctError
from sct.speed import memory, reference
from sct.speed.ceiling import arithmetic, matmul_ceiling
from sct.speed.job import SpeedJob
from sct.speed.timing import timed
from sct.tasks.base import Task
from sct.train import sharding
from sct.train.optim import make_optimizer
from sct.train.state import init_state, make_train_step

T = TypeVar("T")
# A training step counts as this many forward passes: one forward pass, and for each matrix product two products in the
# backward pass, or one if its matrix is frozen. Recomputation (remat) does not count.
_PASSES, _FROZEN_PASSES = 3, 2


def run_steps(
    job: SpeedJob,
    draw: Callable[[], T],
    call: Callable[[T], Any],
    what: str,
    *,
    dtype: str,
    devices: Sequence[Any],
    active: bool = True,
) -> dict[str, Any]:
    """Time steps, and measure the compute ceiling before and after the steps.

    The reported memory is the memory that the steps use.

    Returns
    -------
    Report entries: times, memory and ceilings.
    """
    with memory.HostPeak() as warm:
        timed(draw, call, job.options.warmup, f"warm-up of {what}", active)
    # The peak of a device cannot be reset, so read it before the ceiling; the timed steps run the same program.
    device_peak = memory.device_peak()
    before, size = matmul_ceiling(dtype, job.options.ceiling_size, devices)
    with memory.HostPeak() as peak:
        times = timed(draw, call, job.options.steps, what, active)
    after, _ = matmul_ceiling(dtype, size, devices)
    return {
        **times.report(),
        "ceiling_flops": max(before, after),
        "ceiling_before_flops": before,
        "ceiling_after_flops": after,
        "ceiling_matrix_size": size,
        "peak_host_bytes": max(warm.bytes, peak.bytes),
        "peak_host_from": peak.how,
        "host_bytes_before_steps": warm.before,
        "peak_device_bytes": device_peak,
        "devices_used": len(devices),
        "dtype": dtype,
        "arithmetic": arithmetic(dtype),
    }


def _compiled(function: Any, *arguments: Any) -> tuple[Any, dict[str, Any]]:
    """Compile a jitted function.

    Return the program, and a dict with its compile times, its operations and its memory.
    """
    start = time.perf_counter()
    lowered = function.lower(*arguments)
    traced = time.perf_counter()
    program = lowered.compile()
    ended = time.perf_counter()
    return program, {
        "trace_seconds": traced - start,
        "compile_seconds": ended - traced,
        "compiled_flops": memory.flops_of(program),
        **memory.memory_of(program),
    }


def _rates(found: dict[str, Any], task: Task, cells: int, records: int, flops: float) -> dict[str, Any]:
    seconds, tokens = found["step_seconds"], records * task.tokens_per_record
    achieved = flops / seconds
    return {
        "batch_size": records,
        "cells_per_bag": cells,
        "gene_positions": task.tokens_per_record // cells,
        "tokens_per_step": tokens,
        "tokens_per_s": tokens / seconds,
        "cells_per_s": records * cells / seconds,
        "model_flops": flops,
        "achieved_flops": achieved,
        "utilisation": achieved / found["ceiling_flops"],
    }


def measure_train(job: SpeedJob, store: Store) -> dict[str, Any]:
    """Time the compiled training step with its optimizer. The loader provides the batches, as in training.

    A step consists of the transfer of the batch and the update. The time spent waiting for the loader is reported
    separately.
    """
    task, options = job.task(store), job.train
    mesh = sharding.make_mesh(options.mesh)
    sharding.check_batch_size(options.batch_size, mesh)
    source = task.dataset("train")
    assert source is not None
    loader = Loader(source, options.batch_size, seed=options.seed, num_threads=options.loader_threads)
    abstract, make_state = init_state(
        task, lambda shapes: make_optimizer(job.optimizer, options.steps, shapes)[0], mesh, options.seed
    )
    optimizer, _ = make_optimizer(job.optimizer, options.steps, abstract.trained)
    batches = loader.iterate()
    try:
        first = sharding.put_batch(next(batches), mesh)
        update = make_train_step(task, optimizer, mesh, abstract, options.microbatch)
        step, program = _compiled(update, abstract, first)
        now: dict[str, Any] = {"state": make_state()}

        def call(batch: dict[str, Any]) -> None:
            now["state"], now["scalars"], _ = step(now["state"], sharding.put_batch(batch, mesh))
            jax.block_until_ready((now["state"], now["scalars"]))

        dtype, devices = task.model_config.dtype, list(mesh.devices.flat)
        found = run_steps(job, lambda: next(batches), call, "training steps", dtype=dtype, devices=devices)
    finally:
        batches.close()
    loss = float(now["scalars"]["loss"])
    if not math.isfinite(loss):
        raise SctError(
            f"the loss is {loss} after a few training steps, but must be finite: lower the learning rate "
            "(--config.optimizer.peak_lr)."
        )
    passes = _PASSES if task.lora is None else _FROZEN_PASSES
    flops = passes * task.operations(options.batch_size)
    return {
        **found,
        **program,
        **_rates(found, task, job.cells_per_record, options.batch_size, flops),
        "head_positions": getattr(task, "head_positions", None) or task.tokens_per_record,
        "grad_accum_steps": options.grad_accum_steps,
        "remat": getattr(task.model_config, "remat", None),
    }


def measure_forward(job: SpeedJob, store: Store) -> dict[str, Any]:
    """Time the compiled forward pass of a batch, with logits at all positions."""
    task, options = job.task(store), job.train
    mesh = sharding.make_mesh(options.mesh)
    sharding.check_batch_size(options.batch_size, mesh)
    source = task.dataset("train")
    assert source is not None
    with_batch = Loader(source, options.batch_size, seed=options.seed, num_threads=0).iterate()
    inputs = reference.masked_inputs(task, sharding.put_batch(next(with_batch), mesh))
    with_batch.close()
    _, make_state = init_state(task, lambda _: reference.keep_gradient(), mesh, options.seed)
    variables = make_state().variables
    step, program = _compiled(reference.forward(task, mesh), variables, inputs)

    def call(_: None) -> None:
        jax.block_until_ready(step(variables, inputs))

    dtype, devices = task.model_config.dtype, list(mesh.devices.flat)
    found = run_steps(job, lambda: None, call, "forward passes", dtype=dtype, devices=devices)
    everywhere = job.task(store, objective=job.task_spec.everywhere)
    flops = everywhere.operations(options.batch_size)
    return {**found, **program, **_rates(found, task, job.cells_per_record, options.batch_size, flops)}
