"""Make result tables that can be printed or written as Markdown or JSON."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Summary:
    """Hold the mean and standard deviation of repeated measurements, ignoring NaN.

    Attributes
    ----------
    mean, std
        Mean and standard deviation (ddof = 0) of the measurements that are not NaN.
    count, asked
        Number of measurements that are not NaN, and number of all measurements.
    """

    mean: float
    std: float
    count: int
    asked: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """Compute mean, standard deviation and count of repeated measurements."""
        array = np.asarray(values, dtype=float)
        kept = array[~np.isnan(array)]
        if kept.size == 0:
            return cls(math.nan, math.nan, 0, array.size)
        finite = bool(np.isfinite(kept).all())
        return cls(float(kept.mean()), float(kept.std()) if finite else math.nan, kept.size, array.size)

    @property
    def value(self) -> str:
        """Return the mean as text, such as "0.422"; "n/a" if all measurements are NaN, "-" if nothing was measured."""
        if self.asked == 0:
            return "-"
        return "n/a" if self.count == 0 else self._digits(self.mean)

    @property
    def spread(self) -> str:
        """Return standard deviation and number of measurements as text: "± 0.012 (5)", "± 0.012 (4 of 5)" or "(1)"."""
        if self.count == 0:
            return ""
        seeds = f"({self.count})" if self.count == self.asked else f"({self.count} of {self.asked})"
        if self.count == 1 or math.isnan(self.std):
            return seeds
        return f"± {self._digits(self.std)} {seeds}"

    def _digits(self, value: float) -> str:
        return f"{value:z,.1f}" if abs(self.mean) >= 1000 else f"{value:z.3f}"

    def __str__(self) -> str:
        return " ".join(filter(None, (self.value, self.spread)))


@dataclasses.dataclass(frozen=True)
class Column:
    """Describe a column of a report by its key and its title.

    Programs find the column by `key`, which never changes. People see `title`, which may change.
    """

    key: str
    title: str


METHOD, FITTED_ON = Column("method", "method"), Column("fitted_on", "fitted on")
REMARK = Column("remark", "remark")
# Keys of rows.
MODEL, REFERENCE, CONTROL = "model", "reference", "control"


class Report:
    """Hold a table whose numeric cells are lists of repeated measurements.

    Attributes
    ----------
    title
        Heading: what was measured, on which data, with how many repeats.
    columns, keys, titles
        The columns, and their keys and titles. If a column is given as a string, this string is both its key and its
        title.
    rows
        One list per row. A cell is text or a list of numbers, one per seed. Numbers are shown as mean, standard
        deviation and number of seeds. An empty list (not measured) is shown as "-". A list that contains only NaN
        (undefined) is shown as "n/a".
    row_keys
        One key per row, by which programs find the row: `MODEL`, `REFERENCE` (the reference baseline), `CONTROL` (a
        control of the model, or real data as an upper bound; neither is a baseline) or another word; "" for rows
        without a key.
    notes
        Sentences under the table.
    better
        Dict from the key of a numeric column to "max" or "min". The best mean of the column is shown in bold.

    Raises
    ------
    ValueError
        `better` names an unknown column or an unknown direction, or two columns have the same key.
    """

    def __init__(
        self,
        title: str,
        columns: Iterable[Column | str],
        *,
        notes: Iterable[str] = (),
        better: Mapping[str, str] | None = None,
    ):
        self.title, self.notes, self.better = title, tuple(notes), dict(better or {})
        self.columns = tuple(Column(each, each) if isinstance(each, str) else each for each in columns)
        self.keys = tuple(column.key for column in self.columns)
        self.titles = tuple(column.title for column in self.columns)
        if len(set(self.keys)) < len(self.keys):
            raise ValueError(
                f"column keys must be unique, but they are {', '.join(self.keys)}: give each "
                "column its own key."
            )
        self.rows: list[list[Any]] = []
        self.row_keys: list[str] = []
        for key, direction in self.better.items():
            if key not in self.keys:
                raise ValueError(
                    f"`better` has the key {key!r}, but no column has this key: use one of {', '.join(self.keys)}."
                )
            if direction not in ("max", "min"):
                raise ValueError(f"`better[{key!r}]` is {direction!r}: set it to 'max' or 'min'.")

    def add(self, *cells: Any, key: str = "") -> None:
        """Append a row, given as texts and lists of numbers. Programs can find the row by `key`."""
        if len(cells) != len(self.columns):
            raise ValueError(
                f"the row has {len(cells)} cells, but the table has {len(self.columns)} "
                "columns: pass one cell per column."
            )
        measured = (list, tuple, np.ndarray)
        self.rows.append([[float(x) for x in each] if isinstance(each, measured) else each for each in cells])
        self.row_keys.append(key)

    def records(self) -> list[tuple[str, dict[str, Any]]]:
        """Return each row as a pair of its key and a dict of its cells by column key."""
        cells = [dict(zip(self.keys, row, strict=True)) for row in self.rows]
        return list(zip(self.row_keys, cells, strict=True))

    def numeric(self) -> list[bool]:
        """Return one bool per column: whether the column holds measurements."""
        return [any(isinstance(row[i], list) for row in self.rows) for i in range(len(self.columns))]

    def best(self) -> set[tuple[int, int]]:
        """Return (row, column) of each table cell whose mean, rounded as displayed, is the best of its column.

        If all shown means of a column are equal, or if only one row has a number, the column has no best cell.
        """
        found: set[tuple[int, int]] = set()
        for name, direction in self.better.items():
            column = self.keys.index(name)
            means = {
                number: summary
                for number, row in enumerate(self.rows)
                if isinstance(row[column], list) and (summary := Summary.of(row[column])).count
            }
            if len({summary.value for summary in means.values()}) < 2:
                continue
            choose = max if direction == "max" else min
            top = choose(means.values(), key=lambda summary: summary.mean).value
            found |= {(number, column) for number, summary in means.items() if summary.value == top}
        return found

    def table(self, width: int | None = None) -> Table:
        """Return a `rich.table.Table` that fits `width` characters, by default the width of the terminal."""
        from sct import terminal

        rows = [[cell_text(cell) for cell in row] for row in self.rows]
        content = terminal.Content(self.title, self.titles, rows, self.numeric(), self.best(), self.notes)
        return terminal.table(content, width)

    def markdown(self) -> str:
        """Return the table as Markdown."""
        best = self.best()

        def line(cells: Iterable[str]) -> str:
            return f"| {' | '.join(cells)} |\n"

        def cell(row: int, i: int) -> str:
            text = escape(cell_text(self.rows[row][i]))
            return f"**{text}**" if (row, i) in best else text

        rule = line("---:" if is_number else "---" for is_number in self.numeric())
        columns = range(len(self.columns))
        body = "".join(line(cell(row, i) for i in columns) for row in range(len(self.rows)))
        # The empty line before each note makes it a paragraph of its own.
        notes = "".join(f"\n{escape(note)}\n" for note in self.notes)
        return f"**{escape(self.title)}**\n\n{line(map(escape, self.titles))}{rule}{body}{notes}"

    def as_dict(self) -> dict[str, Any]:
        """Return the table with all measurements as a dict for JSON; NaN becomes None, infinity becomes "inf"."""
        return {
            "title": self.title,
            "columns": list(self.titles),
            "keys": list(self.keys),
            "rows": plain(self.rows),
            "row_keys": list(self.row_keys),
            "notes": list(self.notes),
            "better": self.better,
        }


def cell_text(cell: Any) -> str:
    """Return the text that is shown for a cell of a report."""
    if isinstance(cell, list):
        return str(Summary.of(cell))
    return "-" if cell is None else str(cell)


def plain(content: Any) -> Any:
    """Convert values to content that JSON can store: NaN becomes None, and infinity becomes "inf" or "-inf"."""
    if isinstance(content, Mapping):
        return {str(key): plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [plain(value) for value in content]
    if isinstance(content, np.ndarray | np.generic):
        return plain(content.tolist())
    if isinstance(content, float) and not math.isfinite(content):
        return None if math.isnan(content) else str(content)
    return content


def escape(text: str) -> str:
    """Escape a text for Markdown and put it on one line."""
    text = re.sub(r"([\\|*`])", r"\\\1", " ".join(text.split()))
    return re.sub(r"<(?=[A-Za-z/!?])", r"\\<", text)
