"""Ingest many inputs, in this process or in several worker processes, with one progress bar."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sct.data.genes.orthologs import Orthologs
from sct.data.genes.vocabulary import GeneVocabulary
from sct.data.ingest.input_files import Input
from sct.data.ingest.inputs import IngestOptions, ingest_input
from sct.data.ingest.readers import count_cells
from sct.errors import SctError, StoreError
from sct.progress import ProgressBar, progress


@dataclass(frozen=True)
class IngestJob:
    """Describe the ingest of one input. This object is sent to a worker process.

    Attributes
    ----------
    item, fingerprint
        The input and its fingerprint.
    stale
        Studies from an earlier version of the input.
    table
        Ortholog table. It is read once and passed to all processes, so later changes of the file have no effect.
    """

    item: Input
    fingerprint: str
    stale: tuple[str, ...]
    table: Orthologs | None


def run_jobs(
    root: Path, jobs: list[IngestJob], vocabulary: GeneVocabulary, options: IngestOptions
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Run the jobs. A refused input does not stop the others.

    Returns
    -------
    Two values: the metadata of the new studies, and a dict from the location of each refused input to the reason.
    """
    if not jobs:
        return [], {}
    counts = [count_cells(job.item) for job in jobs]
    total = None if any(each is None for each in counts) else sum(each or 0 for each in counts)
    in_memory = [job for job in jobs if job.item.adata is not None]
    others = [job for job in jobs if job.item.adata is None]
    processes = min(options.processes, len(others))
    fresh: list[dict[str, Any]] = []
    refused: dict[str, str] = {}

    def take(job: IngestJob, outcome: list[dict[str, Any]] | str) -> None:
        if isinstance(outcome, str):
            refused[job.item.location] = outcome
            bar.write(f"{job.item.location} was refused; the ingest continues with the other inputs")
        else:
            fresh.extend(outcome)

    with progress("ingesting cells", total) as bar:
        for job in in_memory if processes > 1 else jobs:
            take(job, _attempt(root, job, vocabulary, options, _Meter(bar, job.item.name)))
        if processes > 1:
            for job, outcome in _in_pool(root, others, vocabulary, options, processes, bar):
                take(job, outcome)
    return fresh, refused


class _Meter:
    """Add up finished fractions of cells, and report the finished cells to a progress bar in whole numbers."""

    def __init__(self, bar: ProgressBar, name: str):
        self._bar, self._name, self._rest = bar, name, 0.0

    def __call__(self, cells: float) -> None:
        self._rest += cells
        whole = round(self._rest)
        self._rest -= whole
        self._bar.update(whole, note=self._name)


_done: Any = None


def _start_worker(done: Any) -> None:
    global _done
    _done = done


def _count_done(cells: float) -> None:
    with _done.get_lock():
        _done.value += cells


def _worker(
    root: Path, job: IngestJob, vocabulary: GeneVocabulary, options: IngestOptions
) -> list[dict[str, Any]] | str:
    return _attempt(root, job, vocabulary, options, _count_done)


def _in_pool(
    root: Path,
    jobs: list[IngestJob],
    vocabulary: GeneVocabulary,
    options: IngestOptions,
    processes: int,
    bar: ProgressBar,
) -> Iterator[tuple[IngestJob, list[dict[str, Any]] | str]]:
    """Run the jobs in worker processes.

    Yield each job with the metadata of its studies, or with the reason why its input was refused.
    """
    context = multiprocessing.get_context("spawn")
    done = context.Value("d", 0.0)
    meter = _Meter(bar, "")
    seen = 0.0
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_start_worker, initargs=(done,))
    try:
        # Start with the largest inputs, so that all processes finish at about the same time.
        order = sorted(jobs, key=lambda job: -_size(job.item))
        waiting: dict[Future[Any], IngestJob] = {
            pool.submit(_worker, root, job, vocabulary, options): job for job in order
        }
        while waiting:
            finished, _ = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            now = float(done.value)
            meter(now - seen)
            seen = now
            for future in finished:
                yield waiting.pop(future), future.result()
    except (SystemExit, GeneratorExit):  # after SIGTERM, which the worker processes did not receive
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    except BrokenProcessPool as error:
        raise StoreError(
            f"a worker process of the ingest to {root} was killed, probably because memory ran out: to resume, run "
            "the ingest again with fewer processes."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _size(item: Input) -> int:
    with contextlib.suppress(OSError):
        return Path(item.location).stat().st_size
    return 0


def _attempt(
    root: Path,
    job: IngestJob,
    vocabulary: GeneVocabulary,
    options: IngestOptions,
    advance: Callable[[float], None],
) -> list[dict[str, Any]] | str:
    """Ingest one input; return the metadata of its studies, or the reason why the input is refused."""
    try:
        return ingest_input(
            root,
            job.item,
            job.fingerprint,
            vocabulary,
            options,
            table=job.table,
            stale=job.stale,
            advance=advance,
        )
    except StoreError as error:
        raise StoreError(str(error)) from error
    except SctError as error:
        return str(error)
