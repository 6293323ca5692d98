"""Write the metrics of a run as JSON lines and as TensorBoard events."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from sct.atomic import write_text
from sct.errors import CheckpointError, space_hint

_FLUSH_SECONDS = 60.0


class MetricLog:
    """Writer of `metrics.jsonl` and `tensorboard/` in a run folder. Only process 0 writes.

    A resumed run writes the same lines as a run that never stopped, except for `train/tokens_per_second`, which depends
    on the clock. The files are written by the calling thread: a background writer would hang the run when the disk is
    full.

    Parameters
    ----------
    folder
        Run folder.
    step
        Step from which the run starts or resumes. The log may have lines of later steps if the run was killed after its
        last checkpoint. These lines are removed, because the resumed run writes them again.
    active
        Whether to write. If False, all methods do nothing.

    Raises
    ------
    CheckpointError
        A file cannot be written. All methods may also raise this error.
    """

    def __init__(self, folder: Path, step: int = 0, active: bool = True):
        self._active, self._folder = active, folder
        if not active:
            return
        with self._writing():
            path = folder / "metrics.jsonl"
            if path.exists():
                kept = [
                    line for line in path.read_text(errors="replace").splitlines() if _step_of(line) <= step
                ]
                write_text(path, "".join(line + "\n" for line in kept))
            self._file = path.open("ab", buffering=0)
            self._board = _Board(folder / "tensorboard", step)

    def write(self, step: int, values: Mapping[str, float], prefix: str) -> None:
        """Write the metrics of a step under the names `prefix/name`."""
        if not self._active:
            return
        named = {f"{prefix}/{name}": value for name, value in values.items()}
        # JSON has no NaN: an undefined metric, such as the MCC of no genes, is written as null.
        known = {name: value if math.isfinite(value) else None for name, value in named.items()}
        line = memoryview((json.dumps({"step": step, **known}) + "\n").encode())
        with self._writing():
            while line:
                line = line[self._file.write(line) :]
            self._board.write(step, named)

    def flush(self) -> None:
        """Write all lines to disk.

        Call this method before saving a checkpoint, because a run that resumes from the checkpoint expects all earlier
        lines in the files.
        """
        if self._active:
            with self._writing():
                os.fsync(self._file.fileno())
                self._board.flush()

    def close(self) -> None:
        """Flush and close the files."""
        if self._active:
            with self._writing():
                self._file.close()
                self._board.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            raise CheckpointError(
                f"the metrics cannot be written to the run folder {self._folder} ({reason}): check that the folder is "
                f"writable{space_hint(reason)}, then run the same command again to resume from the last checkpoint."
            ) from error

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:  # keep the original error if closing fails as well
            with suppress(CheckpointError):
                self.close()


class _Board:
    """Writer of one TensorBoard event file. Each start or resume of a run begins a new file."""

    def __init__(self, folder: Path, step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        self._pb = event_pb2
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of their names, so the name starts with the step.
        self._events = EventsWriter(str(folder / f"step{step:012d}"))
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        # This event hides later steps that a killed run wrote.
        self._events.write_event(
            event_pb2.Event(step=step + 1, wall_time=time.time(), file_version="brain.Event:2")
        )
        self._events.write_event(event_pb2.Event(step=step + 1, wall_time=time.time(), session_log=start))
        self._flushed = time.monotonic()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboardX.summary import scalar

        for name, value in values.items():
            self._events.write_event(
                self._pb.Event(step=step, wall_time=time.time(), summary=scalar(name, value))
            )
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        self._events.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._events.close()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # an incomplete line, which a killed run left
