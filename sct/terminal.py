"""Lay out tables for the terminal with the library rich, which sets column widths and wraps text."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Collection, Sequence
from typing import Literal

from rich import box
from rich.console import Console, Group
from rich.table import Column, Table
from rich.text import Text

# In characters: minimum width of a text column, and line width in the title of a numeric column.
_TEXT, _TITLE = 20, 12
Layout = Literal["wide", "narrow", "list"]


@dataclasses.dataclass(frozen=True)
class Content:
    """Hold the text content of a table. The first column contains the names of the rows.

    Attributes
    ----------
    title, notes
        Text above and below the table.
    columns, rows
        Titles of the columns, and the table cells of each row as text.
    numeric
        Whether each column holds numbers.
    best
        Set of (row, column) index pairs of the table cells that are shown in bold.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: Sequence[bool]
    best: Collection[tuple[int, int]]
    notes: Sequence[str]


def table(content: Content, width: int | None = None) -> Table:
    """Return a rich table in the widest layout that fits `width` characters. The default is the terminal's width.

    The layouts are "wide" (all columns), "narrow" (the texts of a row are merged into its first column, and standard
    deviations are on a line below the means) and "list" (one column, with the numbers below the texts).
    """
    console = Console(width=width)
    endless = console.options.update(max_width=10_000)
    layouts: tuple[Layout, ...] = ("wide", "narrow")
    for layout in layouts:
        # Measure with the minimum text width. Rich shrinks the widest text columns first, so if this fits, no text
        # column gets narrower than `_TEXT`.
        if console.measure(_table(content, layout, _TEXT), options=endless).maximum <= console.width:
            return _table(content, layout)
    return _table(content, "list")


def _table(content: Content, layout: Layout, text_width: int | None = None) -> Table:
    """Return a rich table in the given layout. Text columns have at most `text_width` characters."""
    titles, numeric = content.columns, content.numeric
    texts = [i for i in range(1, len(titles)) if not numeric[i]]
    numbers = [i for i in range(1, len(titles)) if numeric[i]]
    shown = {"wide": list(range(len(titles))), "narrow": [0, *numbers], "list": [0]}[layout]

    def text(row: int, i: int) -> Text:
        cell = content.rows[row][i]
        cell = cell.replace(" ± ", "\n± ") if layout == "narrow" else cell
        return Text(cell, "bold" if (row, i) in content.best else "")

    def first(row: int) -> Group:
        others = [(titles[i], content.rows[row][i]) for i in texts]
        more = [Text(f"{title}: {cell}", "dim") for title, cell in others if cell not in ("", "-")]
        listed = Table.grid(
            Column(overflow="fold"), Column(overflow="fold", no_wrap=True), padding=(0, 0, 0, 2)
        )
        for i in numbers:
            listed.add_row(Text(titles[i]), text(row, i))
        return Group(text(row, 0), *more, *([listed] if layout == "list" else []))

    made = Table(
        box=box.HEAVY_HEAD if layout == "wide" else box.HORIZONTALS,
        show_lines=layout != "wide",
        title=Text(content.title),
        title_justify="left",
        caption=Text("\n".join(content.notes)),
        caption_justify="left",
    )
    for i in shown:
        if numeric[i]:
            title = textwrap.fill(titles[i], _TITLE, break_long_words=False)
            made.add_column(Text(title), justify="right", overflow="fold", no_wrap=True)
        else:
            made.add_column(Text(titles[i]), overflow="fold", max_width=text_width)
    for row in range(len(content.rows)):
        made.add_row(*(first(row) if i == 0 and layout != "wide" else text(row, i) for i in shown))
    return made
