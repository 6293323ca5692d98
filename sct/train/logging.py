"""Metrics of a run: one JSON object per line, and TensorBoard."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType


class MetricLog:
    """Writes `metrics.jsonl` and `tensorboard/` of a run folder; only process 0 writes.

    Parameters
    ----------
    folder
        Run folder.
    step
        Step at which the run goes on: lines of later steps, left by a run that was killed after its last
        checkpoint, are removed, since they will be written again.
    active
        False writes nothing.
    """

    def __init__(self, folder: Path, step: int = 0, active: bool = True):
        self._active = active
        if not active:
            return
        from tensorboardX import SummaryWriter

        path = folder / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(line + "\n" for line in kept))
            os.replace(temporary, path)
        self._file = path.open("a", buffering=1)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float], prefix: str) -> None:
        """Record numbers of a step under names `prefix/name`."""
        if not self._active:
            return
        named = {f"{prefix}/{name}": value for name, value in values.items()}
        # JSON has no NaN: a metric that is not defined (the MCC of nothing) is null.
        known = {name: value if math.isfinite(value) else None for name, value in named.items()}
        self._file.write(json.dumps({"step": step, **known}) + "\n")
        for name, value in named.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the files."""
        if self._active:
            self._file.close()
            self._board.close()

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # the line on which a killed run stopped writing
