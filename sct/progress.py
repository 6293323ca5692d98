"""Progress display for all work that can take more than five seconds.

On a terminal it is a live progress bar. If standard error is a file or a pipe, it prints one line per interval, so that
logs stay readable.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


def _clock(seconds: float) -> str:
    minutes, sec = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{sec:02d}" if hours else f"{minutes}:{sec:02d}"


class ProgressBar:
    """Progress display of one task, created by `progress`; call `update` when units are done."""

    def __init__(self, description: str, total: int | None, done: int, interval: float, active: bool = True):
        self.description, self.total, self.done = description, total, done
        self._first, self._start, self._interval = done, time.monotonic(), interval
        self._last = self._start
        self._note = ""
        self._active = active
        self._rich = None
        self._task = None
        if active and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._rich = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=False,
            )
            self._task = self._rich.add_task(description, total=total, completed=done, note="")
            self._rich.start()

    def update(self, advance: int = 1, note: str = "") -> None:
        """Advance by `advance` units; the short text `note` is shown until the next note."""
        self.done += advance
        self._note = note or self._note
        if not self._active:
            return
        if self._rich is not None and self._task is not None:
            self._rich.update(self._task, advance=advance)
            if note:
                self._rich.update(self._task, note=note)
            return
        now = time.monotonic()
        if now - self._last >= self._interval or (self.done == self.total and now - self._start > 5):
            self._last = now
            self.write(self._line(now))

    def _line(self, now: float) -> str:
        total = f"/{self.total}" if self.total is not None else ""
        rate = (self.done - self._first) / max(now - self._start, 1e-9)
        left = f", {_clock((self.total - self.done) / rate)} left" if self.total and rate > 0 else ""
        return f"{self.description} {self.done}{total}{' ' + self._note if self._note else ''}{left}"

    def write(self, text: str) -> None:
        """Print a line above the progress bar (terminal) or to standard error (file)."""
        if not self._active:
            return
        if self._rich is not None:
            self._rich.console.print(text, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Close the display; later updates have no effect on the terminal."""
        if self._rich is not None:
            self._rich.stop()


@contextmanager
def progress(
    description: str,
    total: int | None = None,
    *,
    done: int = 0,
    interval: float = 15.0,
    active: bool = True,
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
        Seconds between two lines if standard error is not a terminal.
    active
        If False, show nothing. Only the first process of a multi-process run shows progress.
    """
    bar = ProgressBar(description, total, done, interval, active)
    try:
        yield bar
    finally:
        bar.close()


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate over `items` and show the progress, one unit per item."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    with progress(description, total) as bar:
        for item in items:
            yield item
            bar.update()
