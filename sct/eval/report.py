"""Tables of results: on the terminal, as Markdown and as JSON."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np


@dataclasses.dataclass
class Report:
    """A table whose numeric cells are lists of repeated measurements.

    Attributes
    ----------
    title
        What was measured, on what, how often.
    columns
        Names of the columns.
    notes
        Sentences under the table.
    rows
        One list per row; a cell is text or a list of numbers (shown as mean and standard deviation).
    """

    title: str
    columns: tuple[str, ...]
    rows: list[list[Any]] = dataclasses.field(default_factory=list)
    notes: tuple[str, ...] = ()

    def add(self, *cells: Any) -> None:
        """Append a row."""
        if len(cells) != len(self.columns):
            raise ValueError(f"{len(cells)} cells for {len(self.columns)} columns")
        self.rows.append(list(cells))

    @staticmethod
    def _text(cell: Any) -> str:
        if isinstance(cell, list):
            return f"{np.mean(cell):.3f} ± {np.std(cell):.3f}"
        return str(cell)

    def table(self) -> Any:
        """Rich table for the terminal."""
        from rich.table import Table

        table = Table(
            title=self.title,
            title_justify="left",
            caption="\n".join(self.notes) or None,
            caption_justify="left",
        )
        numeric = [any(isinstance(row[i], list) for row in self.rows) for i in range(len(self.columns))]
        for name, right in zip(self.columns, numeric, strict=True):
            table.add_column(name, justify="right" if right else "left")
        for row in self.rows:
            table.add_row(*map(self._text, row))
        return table

    def markdown(self) -> str:
        """The table as Markdown."""
        lines = [f"**{self.title}**", "", "| " + " | ".join(self.columns) + " |"]
        lines.append("|" + "---|" * len(self.columns))
        lines += ["| " + " | ".join(map(self._text, row)) + " |" for row in self.rows]
        lines += ["", *self.notes] if self.notes else []
        return "\n".join(lines) + "\n"

    def as_dict(self) -> dict[str, Any]:
        """The table with all its measurements, for JSON."""
        return dataclasses.asdict(self)


def write(reports: list[Report], folder: Path) -> None:
    """Write `report.md` and `report.json` into a folder, each whole or not at all."""
    texts = {
        "report.md": "\n".join(report.markdown() for report in reports),
        "report.json": json.dumps([report.as_dict() for report in reports], indent=1),
    }
    for name, text in texts.items():
        temporary = folder / f".{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, folder / name)
