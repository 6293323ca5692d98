"""Run a speed measurement: prepare cells, check the results of a step, time steps, and describe the machine."""

from __future__ import annotations

import multiprocessing
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib import metadata
from pathlib import Path
from typing import Any

from sct.data.store import Store
from sct.errors import ConfigError
from sct.speed import compute, data, embedding, generation, reference, saving
from sct.speed.job import SpeedJob, SpeedOptions
from sct.version import __version__

Measure = Callable[[SpeedJob, Store], dict[str, Any]]
# Mode -> (comparison with the reference implementation, measurement).
_MODES: Mapping[str, tuple[Measure, Measure]] = {
    "forward": (reference.check_forward, compute.measure_forward),
    "train": (reference.check_train, compute.measure_train),
    "embed": (embedding.check_embed, embedding.measure_embed),
    "loader": (data.check_loader, data.measure_loader),
    "save": (saving.check_save, saving.measure_save),
}


def measure(config: Mapping[str, Any], options: SpeedOptions, apart: bool = True) -> dict[str, Any]:
    """Run the measurement `options.mode` for a configuration.

    A separate process prepares the cells and does the comparison with the reference implementation, so that their
    memory does not count in the measurement.

    Parameters
    ----------
    config
        Training configuration as nested dicts.
    options
        Options of the measurement.
    apart
        Whether a separate process prepares the cells and does the comparison. If False, this process does everything.

    Returns
    -------
    Results as a JSON-compatible dict by name. The units are bytes, seconds and operations (a multiply-add counts as
    two).

    Raises
    ------
    SctError
        A step differs from the reference implementation, or the configuration cannot be measured.
    """
    if options.mode == "generate":
        load, job = _load(), SpeedJob(config, options, Path())
        return _facts(job, generation.measure(job), load)
    with tempfile.TemporaryDirectory(prefix="sct-speed-") as folder:
        job = SpeedJob(config, options, Path(folder))
        check = _apart(prepare, job) if apart else prepare(job)
        load = _load()
        if options.mode == "ingest":
            # A separate process, as in a real ingest: this process has loaded JAX and may not return freed memory.
            found = _apart(data.measure_ingest, job) if apart else data.measure_ingest(job)
        else:
            found = {"check": check, **_MODES[options.mode][1](job, job.open_store())}
        made = {"cells": job.cells, "expressed_genes_of_a_cell": job.nonzeros} if job.synthetic else None
        return _facts(job, {**found, "synthetic": made}, load)


def _facts(job: SpeedJob, found: Mapping[str, Any], load: list[float] | None) -> dict[str, Any]:
    """Add the machine, the configuration and the command to the results."""
    return {
        "mode": job.options.mode,
        **found,
        "load_average": {"before": load, "after": _load()},
        **machine(),
        "config": dict(job.config),
        "command": shlex.join(_words()),
    }


def prepare(job: SpeedJob) -> dict[str, Any] | None:
    """Prepare the cells, and check that the timed step gives the same results as the reference."""
    try:
        if job.options.mode != "ingest":
            job.check_device()  # fail before minutes of work
        job.prepare_cells()
        if job.options.mode == "ingest":
            return None  # `measure_ingest` compares the store with its source file
        return _MODES[job.options.mode][0](job, job.open_store())
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):  # JAX errors cannot be pickled to the parent process
            raise MemoryError(str(error)) from None
        raise


def _quiet() -> None:
    from absl import logging

    logging.set_verbosity(logging.ERROR)


def _apart(function: Callable[[SpeedJob], Any], job: SpeedJob) -> Any:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_quiet) as pool:
        try:
            return pool.submit(function, job).result()
        except BrokenProcessPool as error:
            raise ConfigError(
                "the process that prepares the cells and compares results with the reference implementation was "
                "killed, probably because of a lack of memory: use fewer cells in the measurement (--cells) or in "
                "the comparison (--check_cells=1)."
            ) from error


def _load() -> list[float] | None:
    return list(os.getloadavg()) if hasattr(os, "getloadavg") else None


def _words() -> list[str]:
    """Return the command line of this process as a list of arguments."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    program = ["python", "-m", spec.name.removesuffix(".__main__")] if spec else [Path(sys.argv[0]).name]
    return [*program, *sys.argv[1:]]


def machine() -> dict[str, Any]:
    """Return the devices, processor, system and package versions of this machine."""
    import jax

    devices = jax.devices()
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "device": devices[0].device_kind,
        "platform": devices[0].platform,
        "device_count": len(devices),
        "cpu": _processor(),
        "cpu_count": available,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {
            "sct": __version__,
            **{name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
        },
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )
