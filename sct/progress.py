"""Show the progress of all work that can take more than five seconds.

A terminal shows a live progress bar, and a notebook shows one line that is updated. If standard error is a file or a
pipe, a line is printed from time to time, so that logs stay readable. With `sct.settings.verbosity` below "info",
nothing is shown.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from sct import messages
from sct.global_settings import INFO, settings

T = TypeVar("T")

# Seconds: a notebook shows a task that takes longer, the longest time between two lines in a file, and the time from
# which the rate of a progress bar is computed.
_SHORT, _LONGEST, _MEMORY = 1.0, 300.0, 3600.0


def _clock(seconds: float) -> str:
    minutes, sec = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{sec:02d}" if hours else f"{minutes}:{sec:02d}"


class ProgressBar:
    """Display the progress of one task. `progress` creates this object. Call `update` when units of work are done.

    The speed is computed without the first unit, because JAX compiles the program during the first unit.
    """

    def __init__(self, description: str, total: int | None, done: int, interval: float, active: bool = True):
        self.description, self.total, self.done = description, total, done
        self._begun = time.monotonic()
        self._last, self._interval = self._begun, interval
        # Time and units at the start of the rate; None until the first unit is done.
        self._rate_from: tuple[float, int] | None = None
        self._note = ""
        self._active = active and settings.verbosity >= INFO
        self._rich: Any = None
        self._task: Any = None
        self._handle: Any = None
        if self._active and sys.stderr.isatty() and not messages.in_notebook():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._rich = Progress(
                TextColumn("{task.description}", style="bold", markup=False),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                TimeRemainingColumn(),
                console=messages.console(stderr=True),
                transient=False,
                speed_estimate_period=_MEMORY,  # a step may take minutes
            )
            self._task = self._rich.add_task(description, total=total, completed=done, note="")
            self._rich.start()

    def update(self, advance: int = 1, note: str = "") -> None:
        """Add `advance` finished units. The short text `note` is shown until the next note."""
        self.done += advance
        self._note = note or self._note
        now = time.monotonic()
        if advance and self._rate_from is None:
            self._rate_from = (now, self.done)
        if not self._active:
            return
        if self._rich is not None:
            self._rich.update(self._task, advance=advance)
            if note:
                self._rich.update(self._task, note=note)
        elif messages.is_kernel():
            if now - self._begun > _SHORT and now - self._last > _SHORT:
                self._last = now
                self._show(self._line(now))
        elif now - self._last >= max(self._interval, min((now - self._begun) / 20, _LONGEST)):
            self._last = now
            self.write(self._line(now))

    def restart_clock(self) -> None:
        """Compute the speed and the remaining time only from units after this call; use it after a compilation."""
        self._rate_from = None
        if self._rich is not None:
            self._rich.reset(self._task, completed=self.done, note=self._note)

    def _line(self, now: float) -> str:
        total = f"/{self.total}" if self.total is not None else ""
        seconds = self._left(now)
        left = f", {_clock(seconds)} left" if seconds is not None else ""
        return f"{self.description} {self.done}{total}{' ' + self._note if self._note else ''}{left}"

    def _left(self, now: float) -> float | None:
        """Return the remaining time of the task in seconds, or None if the time is unknown."""
        if self.total is None or self._rate_from is None:
            return None
        since, first = self._rate_from
        if self.done <= first or self.done >= self.total:
            return None
        return (self.total - self.done) * (now - since) / (self.done - first)

    def _show(self, line: str) -> None:
        """Show a line in a notebook, in place of the previous line of this task."""
        from IPython.display import display

        content = {"text/plain": line}
        if self._handle is None:
            self._handle = display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)

    def write(self, text: str) -> None:
        """Print a line: above the progress bar in a terminal, to stdout in a notebook, otherwise to stderr."""
        if not self._active:
            return
        if self._rich is not None:
            self._rich.console.print(text, highlight=False)
        else:
            # Notebooks mark standard error as if it were an error.
            print(text, file=sys.stdout if messages.in_notebook() else sys.stderr, flush=True)

    def close(self) -> None:
        """Close the display. Later updates have no effect on the terminal."""
        now = time.monotonic()
        if self._rich is not None:
            self._rich.stop()
        elif self._active and self._handle is not None:
            self._show(f"{self._line(now)} in {_clock(now - self._begun)}")
        elif self._active and self._last > self._begun:  # lines were printed, so print the last one too
            self.write(f"{self._line(now)} in {_clock(now - self._begun)}")
        self._active = False


# Number of open displays that hide the displays of their parts.
_alone = 0


@contextmanager
def progress(
    description: str,
    total: int | None = None,
    *,
    done: int = 0,
    interval: float = 15.0,
    active: bool = True,
    alone: bool = False,
) -> Iterator[ProgressBar]:
    """Show the progress of a task on standard error.

    Parameters
    ----------
    description
        Name of the task, in two or three words.
    total
        Number of units, or None if unknown.
    done
        Number of units already done, for a resumed run.
    interval
        Seconds between two lines if standard error is not a terminal. The time between later lines grows to 5 minutes.
    active
        If False, show nothing. Only the first process of a multi-process run shows progress.
    alone
        If True, tasks inside this task show nothing. This is useful if this task repeats other tasks many times.
    """
    global _alone
    bar = ProgressBar(description, total, done, interval, active and not _alone)
    _alone += alone
    try:
        yield bar
    finally:
        _alone -= alone
        bar.close()


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate over `items` and show the progress. Each item is one unit."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    with progress(description, total) as bar:
        for item in items:
            yield item
            bar.update()
