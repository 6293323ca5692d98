"""Time repeated steps."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from sct.progress import progress

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of each repetition: wall time, CPU time (all threads), and time spent waiting for the input."""

    wall: tuple[float, ...]
    cpu: tuple[float, ...]
    wait: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median wall time of a step, in seconds."""
        return float(np.median(self.wall))

    def report(self) -> dict[str, Any]:
        """Return the times as entries of the speed report."""
        return {
            "step_seconds": self.median,
            "step_seconds_spread": {"min": min(self.wall), "max": max(self.wall)},
            "step_seconds_all": list(self.wall),
            "step_cpu_seconds": float(np.median(self.cpu)),
            "input_wait_seconds": float(np.median(self.wait)),
        }


def timed(
    draw: Callable[[], T], call: Callable[[T], Any], repeats: int, what: str, active: bool = True
) -> Times:
    """Time `draw()` and `call(input)` separately. `call` must return only when its work is done.

    Parameters
    ----------
    draw
        Function that returns the input of a step.
    call
        Function that runs a step.
    repeats
        Number of steps.
    what
        Description in the progress bar.
    active
        Whether to show a progress bar. Use False if the step shows a progress bar of its own.
    """
    wall, cpu, wait = [], [], []
    with progress(what, repeats, active=active) as bar:
        for _ in range(repeats):
            begun = time.perf_counter()
            given = draw()
            started, busy = time.perf_counter(), time.process_time()
            call(given)
            ended = time.perf_counter()
            wall.append(ended - started)
            cpu.append(time.process_time() - busy)
            wait.append(started - begun)
            bar.update(1, note=f"{wall[-1]:.3g} s")
    return Times(tuple(wall), tuple(cpu), tuple(wait))
