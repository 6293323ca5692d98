"""Measure the modes `loader` and `ingest` in cells per second, and compare them with a sequential read of the disk."""

from __future__ import annotations

import importlib
import itertools
import shutil
import time
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import zarr

from sct.data.ingest.build import IngestOptions, ingest
from sct.data.loader import Loader
from sct.data.store import Store, Study
from sct.errors import SctError
from sct.speed import memory
from sct.speed.job import SpeedJob
from sct.speed.timing import timed

# Approximate number of cells per repetition, for the loader and for raw blocks, and rows per raw block.
_CELLS_PER_STEP = 10_000
_RAW_PER_STEP = 40_000
_BLOCK = 1_000
# Maximum number of bytes for the measurement of the disk.
_DISK_BYTES = 4 << 30
_CHECKED_CELLS = 50


def _read_plainly(study: Study, rows: np.ndarray) -> np.ndarray:
    """Read rows of a study with anndata, as a dense float64 array."""
    counts = ad.io.sparse_dataset(zarr.open_group(str(study.path), mode="r")["X"])
    return np.stack([counts[int(row) : int(row) + 1].toarray()[0] for row in rows]).astype(np.float64)


def _tokens_by_definition(counts: np.ndarray, num_bins: int, num_positions: int) -> np.ndarray:
    """Compute expression levels (K, G) by definition.

    The levels are bins of equal width on the scale log(1 + count), from the lowest to the highest non-zero value of a
    cell.
    """
    tokens = np.full((len(counts), num_positions), num_bins, np.uint8)
    for cell, row in enumerate(counts):
        levels, expressed = np.zeros(len(row), np.uint8), row > 0
        logs = np.log1p(row[expressed])
        if len(logs) and logs.max() > logs.min():
            edges = np.linspace(logs.min(), logs.max(), num_bins)[1:-1]
            # A count on a bin edge belongs to the higher level, independent of rounding.
            levels[expressed] = 1 + np.digitize(logs, edges - 1e-9 * (logs.max() - logs.min()))
        else:
            levels[expressed] = 1
        tokens[cell, : len(row)] = levels
    return tokens


def check_loader(job: SpeedJob, store: Store) -> dict[str, Any]:
    """Compare the expression levels of a bag from the loader with levels computed from counts that anndata reads.

    Raise `SctError` if the two differ.
    """
    task = job.task(store)
    source = task.dataset("train")
    assert source is not None
    study, rows = source.rows(0)
    bag = source.record(0)["tokens"][: min(len(rows), job.options.check_cells or _CHECKED_CELLS)]
    counts = _read_plainly(study, rows[: len(bag)])
    group = zarr.open_group(str(study.path), mode="r")
    totals = ad.io.read_elem(group["var"])["total_counts"].to_numpy()
    counts[:, totals < task.bags.noise_fraction * study.n_cells] = 0
    expected = _tokens_by_definition(counts, task.bags.num_bins, task.bags.num_positions)
    wrong = int((bag != expected).sum())
    if wrong:
        raise SctError(
            f"{wrong:,} of {expected.size:,} tokens of the first bag of study {study.name!r} differ from the tokens "
            "of the reference implementation, but must be equal, so the loader was not timed: report this as a bug "
            "in the loader."
        )
    return {"differences": {"tokens": 0.0}, "limits": {"tokens": 0.0}, "cells_per_bag": len(bag)}


def _some(files: list[Path]) -> list[Path]:
    """Return the first files whose total size is at most `_DISK_BYTES`, but at least one file."""
    sizes = itertools.accumulate(path.stat().st_size for path in files)
    return [path for path, total in zip(files, sizes, strict=True) if total <= _DISK_BYTES] or files[:1]


def _studies(task: Any) -> tuple[Study, ...]:
    return task.store.split("train")


def measure_loader(job: SpeedJob, store: Store) -> dict[str, Any]:
    """Time the loader, reads of raw blocks, and the first batch after opening a store.

    Before each repetition, the files of the store are dropped from the page cache, if the system supports it.
    """
    options = job.train
    files = memory.files_below(study.path / "X" for study in store.split("train"))
    disk, source = memory.sequential_read(_some(files))
    importlib.import_module("tensorstore")  # the import must not count as part of opening the store
    path = store.path
    memory.forget(files)

    with memory.HostPeak() as peak:
        start = time.perf_counter()
        task = job.task(Store.open(path))
        bags = task.dataset("train")
        assert bags is not None
        loader = Loader(bags, options.batch_size, seed=options.seed, num_threads=options.loader_threads)
        batches = loader.iterate()
        next(batches)
        first = time.perf_counter() - start

        cells = options.batch_size * task.bags.cells_per_bag
        each = max(1, min(_CELLS_PER_STEP // cells, len(loader)))
        resident: list[int] = []

        def read_batches(_: None) -> None:
            for _batch in itertools.islice(batches, each):
                pass
            resident.append(memory.host_bytes())

        timed(lambda: memory.forget(files), read_batches, job.options.warmup, "warm-up of the loader")
        times = timed(lambda: memory.forget(files), read_batches, job.options.steps, "loader")
        batches.close()
        blocks, raw_cells = _blocks(_studies(task), options.seed)

        def read_blocks(_: None) -> None:
            for study, begin in blocks:
                study.read(begin, min(begin + _BLOCK, study.n_cells))

        raw = timed(lambda: memory.forget(files), read_blocks, job.options.steps, "raw blocks")
    bytes_per_cell = sum(path.stat().st_size for path in files) / sum(s.n_cells for s in _studies(task))
    report = {name: value for name, value in times.report().items() if name != "input_wait_seconds"}
    return {
        **report,
        "step_seconds": times.median / each,
        "step_seconds_spread": {name: v / each for name, v in report["step_seconds_spread"].items()},
        "step_seconds_all": [v / each for v in report["step_seconds_all"]],
        "step_cpu_seconds": report["step_cpu_seconds"] / each,
        "batches_per_repetition": each,
        "batch_size": options.batch_size,
        "cells_per_bag": task.bags.cells_per_bag,
        "loader_threads": options.loader_threads,
        "cells_per_s": each * cells / times.median,
        "cells_per_cpu_s": each * cells / max(float(np.median(times.cpu)), 1e-9),
        "tokens_per_s": each * cells * task.bags.num_positions / times.median,
        "raw_cells_per_s": raw_cells / raw.median,
        "raw_cells_per_cpu_s": raw_cells / max(float(np.median(raw.cpu)), 1e-9),
        "raw_seconds_spread": {"min": min(raw.wall), "max": max(raw.wall)},
        "raw_block_cells": _BLOCK,
        "first_batch_seconds": first,
        "disk_read_bytes_per_s": disk,
        "disk_read_from": source,
        "store_bytes_per_s": bytes_per_cell * raw_cells / raw.median,
        "store_bytes_per_cell": bytes_per_cell,
        "store_cells": sum(study.n_cells for study in _studies(task)),
        "store_values_per_cell": sum(s.nnz for s in _studies(task)) / sum(s.n_cells for s in _studies(task)),
        "peak_host_bytes": peak.bytes,
        "peak_host_from": peak.how,
        "host_bytes_first_repetition": resident[0],
        "host_bytes_last_repetition": resident[-1],
    }


def _blocks(studies: tuple[Study, ...], seed: int) -> tuple[list[tuple[Study, int]], int]:
    """Return random blocks of rows as (study, first row), and their total number of cells."""
    whole = [(study, begin) for study in studies for begin in range(0, study.n_cells, _BLOCK)]
    order = np.random.default_rng(seed).permutation(len(whole))
    chosen = [whole[i] for i in order[: max(1, _RAW_PER_STEP // _BLOCK)]]
    return chosen, sum(min(_BLOCK, study.n_cells - begin) for study, begin in chosen)


def measure_ingest(job: SpeedJob, store: Store | None = None) -> dict[str, Any]:
    """Time the ingest of an .h5ad file into a store, in a single process."""
    number = itertools.count()
    genes, file = job.genes, job.source
    disk, source = memory.sequential_read(_some([file]))

    def draw() -> Path:
        memory.forget([file])
        folder = job.folder / "ingested"
        shutil.rmtree(folder, ignore_errors=True)
        return folder

    def call(folder: Path) -> None:
        ingest([file], folder, vocabulary=genes, options=IngestOptions(processes=1, seed=next(number)))

    with memory.HostPeak() as peak:
        times = timed(draw, call, job.options.steps, "ingests", active=False)
    made = Store.open(job.folder / "ingested")
    found = check_ingest(file, made)
    size = sum(path.stat().st_size for path in memory.files_below([made.path]))
    report = {name: value for name, value in times.report().items() if name != "input_wait_seconds"}
    return {
        **report,
        "check": found,
        "cells": job.cells,
        "cells_per_s": job.cells / times.median,
        "cells_per_cpu_s": job.cells / max(float(np.median(times.cpu)), 1e-9),
        "values_per_cell": made.studies[0].nnz / made.studies[0].n_cells,
        "input_bytes": file.stat().st_size,
        "input_bytes_per_s": file.stat().st_size / times.median,
        "store_bytes": size,
        "disk_read_bytes_per_s": disk,
        "disk_read_from": source,
        "processes": 1,
        "peak_host_bytes": peak.bytes,
        "peak_host_from": peak.how,
        "host_bytes_before_steps": peak.before,
    }


def check_ingest(file: Path, store: Store) -> dict[str, Any]:
    """Compare random cells of a store with the same cells in the source file. Both are read with anndata.

    Raise `SctError` if a cell differs.
    """
    study = store.studies[0]
    rows = np.unique(np.random.default_rng(0).integers(study.n_cells, size=_CHECKED_CELLS))
    names = study.obs().index.to_numpy()[rows]
    made = _read_plainly(study, rows)
    backed = ad.read_h5ad(file, backed="r")
    try:
        places = backed.obs_names.get_indexer(names)
        given = np.stack([backed.X[int(place) : int(place) + 1].toarray()[0] for place in places])
        same_cells = backed.n_obs == study.n_cells
    finally:
        backed.file.close()
    wrong = int((made != given).any(axis=1).sum())
    if not same_cells:
        raise SctError(
            f"the store has {study.n_cells:,} cells, but the source file has {len(backed.obs_names):,}, so ingest was "
            "not timed: report this as a bug in ingest."
        )
    if wrong:
        raise SctError(
            f"{wrong} of {len(rows)} checked cells of the store differ from the same cells in the source file, but "
            "must be equal, so ingest was not timed: report this as a bug in ingest."
        )
    return {"differences": {"counts": 0.0}, "limits": {"counts": 0.0}, "cells": len(rows)}
