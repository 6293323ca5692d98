"""Tables of results: on the terminal, as Markdown and as JSON."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

# Narrowest column of text on a terminal that is read with ease: one of several, and one with all texts.
_TEXT, _MERGED = 20, 24
# Title of a column in version 0.1.0, which wrote no keys -> its key, of those that programs look for.
_KEYS = {
    "fitted on": "fitted_on",
    "told expressed": "given_expressed",
    "MCC": "mcc",
    "gain over the bar": "mcc_gain",
    "MAE (counts)": "mae",
}


@dataclasses.dataclass(frozen=True)
class Summary:
    """Mean and standard deviation of repeated measurements; those that are NaN are left out and told.

    Attributes
    ----------
    mean, std
        Of the measurements that are numbers; the standard deviation is that of these values (ddof = 0).
    count, asked
        Number of measurements that are numbers, and number of all.
    """

    mean: float
    std: float
    count: int
    asked: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """Summarise measurements."""
        array = np.asarray(values, dtype=float)
        kept = array[~np.isnan(array)]
        if kept.size == 0:
            return cls(math.nan, math.nan, 0, array.size)
        finite = bool(np.isfinite(kept).all())
        return cls(float(kept.mean()), float(kept.std()) if finite else math.nan, kept.size, array.size)

    @property
    def value(self) -> str:
        """The mean alone: "0.422", "n/a" where nothing is a number, "-" where nothing was measured."""
        if self.asked == 0:
            return "-"
        return "n/a" if self.count == 0 else self._digits(self.mean)

    @property
    def spread(self) -> str:
        """What stands beside the mean: "± 0.012 (5)", "(1)", "± 0.012 (4 of 5)" or nothing."""
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
class _Column:
    """Column of a table on the terminal: its cells (rich texts), and the most that it needs as its least."""

    name: str
    cells: list[Any]
    is_number: bool
    cap: int | None = None

    @property
    def natural(self) -> int:
        """Characters that nothing is wrapped in."""
        return max(
            len(line) for text in [self.name, *(c.plain for c in self.cells)] for line in text.split("\n")
        )

    @property
    def least(self) -> int:
        """Characters below which it cannot be read: numbers are never wrapped, names of columns are."""
        if self.cap is not None:
            return min(self.natural, self.cap)
        lines = [line for cell in self.cells for line in cell.plain.split("\n")]
        return max(map(len, [*lines, *self.name.split(), ""]))


def _taken(columns: Sequence[_Column]) -> int:
    """Width of a table whose columns have their least, with its lines and spaces."""
    return sum(column.least for column in columns) + 3 * len(columns) + 1


def _share(columns: Sequence[_Column], width: int) -> list[int]:
    """Widths of columns: what is left beyond the least goes to those that want little first."""
    widths = [column.least for column in columns]
    spare = width - _taken(columns)
    if spare < 0:
        widths[-1] = max(widths[-1] + spare, 8)
        return widths
    wanted = [column.natural - column.least for column in columns]
    for served, i in enumerate(sorted(range(len(columns)), key=wanted.__getitem__)):
        more = min(wanted[i], spare // (len(columns) - served))
        widths[i] += more
        spare -= more
    return widths


@dataclasses.dataclass(frozen=True)
class Column:
    """A column: programs find it by its `key`, which never changes; people read its `title`, which may."""

    key: str
    title: str


METHOD, FITTED_ON = Column("method", "method"), Column("fitted_on", "fitted on")
REMARK = Column("remark", "remark")
# Keys of rows.
MODEL, REFERENCE = "model", "reference"


class Report:
    """A table whose numeric cells are lists of repeated measurements.

    Attributes
    ----------
    title
        What was measured, on what, how often.
    columns
        The columns; a string is both key and title of one, as the name of a metric in `results.json`.
    rows
        One list per row; a cell is text, or a list of numbers over seeds, shown as mean, standard deviation
        and number of seeds. An empty list is "-" (not measured), NaN is "n/a" (undefined).
    row_keys
        One per row, by which programs find it: `MODEL`, `REFERENCE` (the baseline that others are compared with), or
        another word; "" for rows that nobody looks for.
    notes
        Sentences under the table.
    better
        Key of a numeric column -> "max" or "min": its best mean is bold.

    Raises
    ------
    ValueError
        `better` names no column, or no direction.
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
        self.rows: list[list[Any]] = []
        self.row_keys: list[str] = []
        for key, direction in self.better.items():
            if key not in self.keys:
                raise ValueError(f"better names {key!r}, which is none of the columns {', '.join(self.keys)}")
            if direction not in ("max", "min"):
                raise ValueError(f"better[{key!r}] is {direction!r}: it must be 'max' or 'min'")

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the columns."""
        return tuple(column.key for column in self.columns)

    @property
    def titles(self) -> tuple[str, ...]:
        """Titles of the columns."""
        return tuple(column.title for column in self.columns)

    def add(self, *cells: Any, key: str = "") -> None:
        """Append a row of texts and lists of numbers; `key` is that of the row."""
        if len(cells) != len(self.columns):
            raise ValueError(f"{len(cells)} cells for {len(self.columns)} columns")
        self.rows.append([_measurements(cell) for cell in cells])
        self.row_keys.append(key)

    def records(self) -> list[tuple[str, dict[str, Any]]]:
        """Key of each row, and its cells by the keys of the columns."""
        cells = [dict(zip(self.keys, row, strict=True)) for row in self.rows]
        return list(zip(self.row_keys, cells, strict=True))

    def numeric(self) -> list[bool]:
        """Whether each column holds measurements."""
        return [any(isinstance(row[i], list) for row in self.rows) for i in range(len(self.columns))]

    def best(self) -> set[tuple[int, int]]:
        """(row, column) of the cells that are best in their column, in the digits that are shown.

        Where all are equal, or only one row has a number, none is.
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

    def table(self, width: int | None = None) -> Any:
        """Rich table for the terminal, with one row per row of the report.

        Where the columns do not fit beside each other, the texts of a row move under its first one; where
        the numbers alone do not fit, they are listed under each other.

        Parameters
        ----------
        width
            Characters of a line; by default those of the terminal.
        """
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        width = width or Console().width
        best, numeric = self.best(), self.numeric()
        rows = range(len(self.rows))
        texts = [i for i, is_number in enumerate(numeric) if not is_number]
        numbers = [i for i, is_number in enumerate(numeric) if is_number]

        def cell(row: int, column: int, split: bool = False) -> Text:
            shown = cell_text(self.rows[row][column])
            if split and numeric[column]:
                shown = shown.replace(" ± ", "\n± ")
            return Text(shown, style="bold" if (row, column) in best else "")

        def texts_of(row: int) -> Text:
            told = ((i, cell_text(self.rows[row][i])) for i in texts[1:])
            more = [Text(f"{self.titles[i]}: {text}", "dim") for i, text in told if text not in ("", "-")]
            return Text("\n").join([cell(row, i) for i in texts[:1]] + more)

        def numbers_of(row: int, between: str) -> Text:
            lines = (Text(f"{self.titles[i]}:{between}").append_text(cell(row, i)) for i in numbers)
            return Text("\n").join(lines)

        first = self.titles[texts[0]] if texts else ""
        beside = [
            _Column(name, [cell(row, i) for row in rows], numeric[i], None if numeric[i] else _TEXT)
            for i, name in enumerate(self.titles)
        ]
        merged = [_Column(first, [texts_of(row) for row in rows], False, _MERGED)] + [
            _Column(self.titles[i], [cell(row, i, split=True) for row in rows], True) for i in numbers
        ]
        listed, stacked = (
            [
                _Column(first, [texts_of(row) for row in rows], False, _TEXT),
                _Column("", [numbers_of(row, between) for row in rows], False),
            ]
            for between in (" ", "\n  ")
        )
        chosen = (
            next((c for c in (beside, merged, listed) if _taken(c) <= width), stacked) if numbers else beside
        )
        table = Table(
            title=Text(self.title),
            title_justify="left",
            caption=Text("\n".join(self.notes)) if self.notes else None,
            caption_justify="left",
            box=box.HEAVY_HEAD if chosen is beside else box.HORIZONTALS,
            show_lines=chosen is not beside,
        )
        for column, given in zip(chosen, _share(chosen, width), strict=True):
            table.add_column(
                Text(column.name),
                justify="right" if column.is_number else "left",
                width=given,
                overflow="fold",
            )
        for row in rows:
            table.add_row(*(column.cells[row] for column in chosen))
        return table

    def markdown(self) -> str:
        """The table as Markdown."""
        best = self.best()
        lines = [f"**{escape(self.title)}**", "", _line(map(escape, self.titles))]
        lines.append(_line("---:" if is_number else "---" for is_number in self.numeric()))
        for number, row in enumerate(self.rows):
            shown = [escape(cell_text(cell)) for cell in row]
            lines.append(
                _line(f"**{text}**" if (number, i) in best else text for i, text in enumerate(shown))
            )
        if self.notes:
            # A line alone would flow into the one before it.
            lines += ["", "\n\n".join(map(escape, self.notes))]
        return "\n".join(lines) + "\n"

    def as_dict(self) -> dict[str, Any]:
        """The table with all its measurements, for JSON: NaN becomes None, infinity its name."""
        return {
            "title": self.title,
            "columns": list(self.titles),
            "keys": list(self.keys),
            "rows": plain(self.rows),
            "row_keys": list(self.row_keys),
            "notes": list(self.notes),
            "better": self.better,
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Report:
        """The table that `as_dict` gave, also in version 0.1.0, where columns had titles only.

        Raises
        ------
        KeyError, TypeError, ValueError
            It is not such a table.
        """
        titles, rows = saved["columns"], saved["rows"]
        names = {} if "keys" in saved else _KEYS
        keys = saved.get("keys") or [names.get(title, title) for title in titles]
        better = {names.get(name, name): direction for name, direction in saved.get("better", {}).items()}
        made = cls(
            saved["title"],
            itertools.starmap(Column, zip(keys, titles, strict=True)),
            notes=saved.get("notes", ()),
            better=better,
        )
        row_keys = saved.get("row_keys") or [MODEL if row[:1] == [MODEL] else "" for row in rows]
        for key, row in zip(row_keys, rows, strict=True):
            cells = (
                [math.nan if x is None else x for x in cell] if isinstance(cell, list) else cell
                for cell in row
            )
            made.add(*cells, key=key)
        return made


def _measurements(cell: Any) -> Any:
    """A cell as it is kept: a list of floats, or text."""
    if isinstance(cell, list | tuple | np.ndarray):
        return [float(value) for value in cell]
    return cell


def cell_text(cell: Any) -> str:
    """What is shown of a cell of a report."""
    if isinstance(cell, list):
        return str(Summary.of(cell))
    return "-" if cell is None else str(cell)


def plain(content: Any) -> Any:
    """Content for JSON, which knows neither NaN (None in its place) nor infinity (its name)."""
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
    """Text as Markdown that shows it as it is, on one line."""
    text = re.sub(r"([\\|*`])", r"\\\1", " ".join(text.split()))
    return re.sub(r"<(?=[A-Za-z/!?])", r"\\<", text)


def _line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"
