"""Summarize reports for the terminal: one line per measurement, with the model and the best baseline."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from sct.eval.reports.report import CONTROL, METHOD, MODEL, REMARK, Report, Summary

if TYPE_CHECKING:
    from rich.table import Table

_GIVEN = "given_expressed"  # column of imputation tables: methods with different values have different tasks


@dataclasses.dataclass(frozen=True)
class _Comparison:
    """Hold the values of the model and of the best baseline for one metric. A value that was not measured is NaN."""

    measured: str
    metric: str
    lower_is_better: bool
    model: float
    baseline: float

    @property
    def gain(self) -> float:
        """Return how much better the model is than the baseline, rounded to three decimals."""
        difference = round(self.model - self.baseline, 3)
        return -difference if self.lower_is_better else difference


def summary(reports: Sequence[Report]) -> Table | None:
    """Return a table that compares the model with the best baseline in each report, or None if no report has both.

    The metric is the first column of `Report.better`, or else the first numeric column. The table has no row for a
    report that does not compare methods; see `compares`. The table fits 80 columns.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rows = [row for report in reports for row in _rows(report)]
    if not rows:
        return None
    with_model = [row for row in rows if not math.isnan(row.model)]
    wins = sum(row.gain > 0 for row in with_model)
    title = f"The model is better than the best baseline in {wins} of {len(with_model)} measurements"
    lower = " Lower is better for metrics marked with ↓." * any(row.lower_is_better for row in rows)
    notes = [f"Baseline: the best one of each measurement.{lower}"]
    notes += [f"Not measured: {report.title}: {report.rows[0][-1]}" for report in reports if _failed(report)]
    table = Table(
        title=Text(title if with_model else "The best baseline of each measurement"), title_justify="left",
        caption=Text("\n".join(notes)), caption_justify="left", box=box.HORIZONTALS, padding=(0, 1, 0, 0),
    )  # fmt: skip
    table.add_column("measurement", overflow="fold")
    table.add_column("metric", overflow="fold")
    for name in ("model", "baseline", "difference"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            Text(row.measured),
            Text(f"{row.metric}{' ↓' * row.lower_is_better}"),
            Text(_number(row.model), "bold" if row.gain > 0 else ""),
            Text(_number(row.baseline), "bold" if row.gain < 0 else ""),
            "-" if math.isnan(row.gain) else f"{row.model - row.baseline:+z.3f}",
        )
    return table


def compares(report: Report) -> bool:
    """Return whether a report compares methods, so that `summary` covers it."""
    return _failed(report) or any(True for _ in _rows(report))


def _failed(report: Report) -> bool:
    return report.keys == (METHOD.key, REMARK.key)


def _rows(report: Report) -> Iterator[_Comparison]:
    """Yield the rows of the summary for one report: one row for each value of "given expressed"."""
    numeric = [key for key, is_number in zip(report.keys, report.numeric(), strict=True) if is_number]
    if not numeric or not (report.better or METHOD.key in report.keys):
        return
    key, direction = next(iter(report.better.items()), (numeric[0], "max"))
    lower = direction == "min"
    metric = report.titles[report.keys.index(key)]
    records = [
        (row_key, row)
        for row_key, row in report.records()
        if isinstance(row[key], list) and row_key != CONTROL
    ]
    is_model = [
        row_key == MODEL or re.match(r"model\b", str(row[report.keys[0]])) is not None
        for row_key, row in records
    ]
    title = re.sub(r" \([^()]*\)$", "", report.title)
    for given in sorted({str(row.get(_GIVEN, "")) for _, row in records}):
        means: dict[bool, list[float]] = {True: [], False: []}
        for (_, row), own in zip(records, is_model, strict=True):
            if str(row.get(_GIVEN, "")) == given:
                means[own].append(Summary.of(row[key]).mean)
        model, baseline = (_best(means[own], lower) for own in (True, False))
        if math.isnan(baseline) or (math.isnan(model) and any(is_model)):
            continue
        yield _Comparison(
            "  the same, expressed genes given" if given == "yes" else title, metric, lower, model, baseline
        )


def _best(means: Iterable[float], lower_is_better: bool) -> float:
    known = [mean for mean in means if not math.isnan(mean)]
    return (min if lower_is_better else max)(known, default=math.nan)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:z.3f}"
