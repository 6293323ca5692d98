"""Read and write the folder of a report: its tables as Markdown, JSON and one HTML page with figures."""

from __future__ import annotations

import datetime
import itertools
import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any

from sct.atomic import atomic_write, write_text
from sct.eval.reports.page import Figure, page
from sct.eval.reports.report import MODEL, Column, Report, escape, plain
from sct.version import __version__

FILES = ("results.json", "report.json", "report.md", "report.html")  # files that `write` writes
UNFINISHED = "unfinished.json"  # file that `keep` writes
# Column title -> column key. Version 0.1.0 saved titles without keys; programs look these keys up.
_KEYS = {
    "fitted on": "fitted_on",
    "told expressed": "given_expressed",
    "MCC": "mcc",
    "gain over the bar": "delta_mcc",
    "MAE (counts)": "mae",
}
# Former key of a column -> its key now.
_FORMER_KEYS = {"mcc_gain": "delta_mcc"}
_LIBRARIES = ("jax", "flax", "numpy", "scipy", "scikit-learn", "anndata", "scanpy")


def environment() -> dict[str, str]:
    """Return facts about the running process: command, date, versions of packages, machine and devices.

    The function imports no library. JAX devices are listed only if JAX is already imported, because listing them starts
    the JAX backend.
    """
    command = [Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]
    facts = {
        "command": shlex.join(command),
        "date": datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
        "sct": __version__,
        "python": platform.python_version(),
    }
    for name in _LIBRARIES:
        try:
            facts[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    facts["machine"] = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores"
    if "jax" in sys.modules:
        kinds = [device.device_kind for device in sys.modules["jax"].devices()]
        facts["devices"] = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
    return facts


def _json(content: Any) -> str:
    return json.dumps(plain(content), indent=1, allow_nan=False) + "\n"


def keep(
    reports: Sequence[Report], folder: Path, facts: Mapping[str, str], numbers: Mapping[str, Any]
) -> None:
    """Save the results so far as `unfinished.json`, so that an interrupted run loses at most one evaluation.

    The file holds the tables of `report.json` and the numbers of `results.json`. An earlier report in the folder stays
    unchanged. `write` deletes the file.

    Parameters
    ----------
    reports, folder, facts, numbers
        See `write`.
    """
    content = {"facts": dict(facts), "reports": [report.as_dict() for report in reports], **numbers}
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / UNFINISHED, _json(content))


def read(path: Path) -> list[Report]:
    """Read a `report.json` and return its tables. Files written by version 0.1.0 also work.

    Raises
    ------
    KeyError, TypeError, ValueError
        The file is not a `report.json`.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    return [_report(saved) for saved in (content["reports"] if isinstance(content, dict) else content)]


def _report(saved: Mapping[str, Any]) -> Report:
    titles, rows = saved["columns"], saved["rows"]
    names = _FORMER_KEYS if "keys" in saved else _KEYS
    keys = [names.get(key, key) for key in saved.get("keys") or titles]
    better = {names.get(name, name): direction for name, direction in saved.get("better", {}).items()}
    columns = itertools.starmap(Column, zip(keys, titles, strict=True))
    report = Report(saved["title"], columns, notes=saved.get("notes", ()), better=better)
    row_keys = saved.get("row_keys") or [MODEL if row[:1] == ["model"] else "" for row in rows]
    for key, row in zip(row_keys, rows, strict=True):
        cells = ([math.nan if x is None else x for x in c] if isinstance(c, list) else c for c in row)
        report.add(*cells, key=key)
    return report


def write(
    reports: Sequence[Report],
    folder: Path,
    facts: Mapping[str, str] | None = None,
    figures: Sequence[Figure] = (),
    title: str = "Results",
    numbers: Mapping[str, Any] | None = None,
) -> None:
    """Write `report.md`, `report.json` and, with `facts` or `figures`, `report.html` into a folder.

    The JSON files are written first, then the Markdown, then the HTML page. If drawing the page fails, the numbers are
    already saved. Each file is written atomically. Files of an earlier report in the folder are deleted.

    Parameters
    ----------
    reports
        Tables.
    folder
        Output folder; created if it does not exist.
    facts
        Dict of everything that the numbers depend on, by name; start from the result of `environment()`. With facts,
        `report.json` is `{"facts": ..., "reports": [...]}`. Without facts, `report.json` is the list of tables.
    figures
        Figures of the HTML page.
    title
        Heading of the page.
    numbers
        Dict of numbers that are in no table, by name. If given, they are written to `results.json` as `{"facts": ...,
        **numbers}`. NaN and infinity are written as in `Report.as_dict`.
    """
    tables = [report.as_dict() for report in reports]
    head = "".join(f"- {escape(name)}: {escape(str(value))}\n" for name, value in (facts or {}).items())
    known = {"facts": {name: str(value) for name, value in (facts or {}).items()}}
    texts = {"report.json": _json({**known, "reports": tables} if facts else tables)}
    if numbers is not None:
        texts["results.json"] = _json({**known, **numbers})
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        for name, text in texts.items():
            stack.enter_context(atomic_write(folder / name)).write_text(text, encoding="utf-8")
        for name in {*FILES, UNFINISHED} - set(texts):
            (folder / name).unlink(missing_ok=True)
    blocks = [*([head] if head else []), *(report.markdown() for report in reports)]
    write_text(folder / "report.md", "\n".join(blocks))
    if facts or figures:
        write_text(folder / "report.html", page(title, reports, figures, facts or {}))
