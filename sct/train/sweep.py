"""Several runs of one configuration, each with some fields changed: ablations, trained one after the other."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from sct.checks import check_choice
from sct.errors import CheckpointError, ConfigError, FolderInUseError, SctError
from sct.eval.imputation import scoring
from sct.eval.reports import folder as report_folder
from sct.eval.reports.report import FITTED_ON, METHOD, MODEL, REMARK, Report
from sct.train import experiment
from sct.weights import run_folder

BASE = "base"
RUN = "run"  # key of the rows of runs
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_NOTES = (
    "Each run changes one option of the base run, which its name gives. Only masked expressed genes are scored.",
    "The reference baseline is the most common expressed level of each gene, at the run's masked positions. ΔMCC is "
    "relative to it.",
)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """How a sweep ended.

    Attributes
    ----------
    reason
        "finished", "failed" (some runs did), "signal" or "interrupt".
    states
        Run -> "" where it is finished, otherwise why it is not.
    """

    reason: str
    states: Mapping[str, str]


def configurations(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Configuration of each run of a sweep, the base first.

    Parameters
    ----------
    config
        A configuration with a section `sweep`: name of a run -> the fields that it changes, nested as in the
        configuration.

    Raises
    ------
    ConfigError
        The section is not of that form, or names a field that the base does not have.
    """
    plain = json.loads(json.dumps(config))
    changes = plain.pop("sweep", None)
    if not isinstance(changes, dict) or not all(isinstance(change, dict) for change in changes.values()):
        raise ConfigError(
            f"sweep is {changes!r}, but it must hold named runs with the fields that each changes."
        )
    if BASE in changes:
        raise ConfigError(f"a run of the sweep is called {BASE!r}, the name of the unchanged one: rename it.")
    for name in changes:
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"a run of the sweep is called {name!r}, but its folder needs a name of letters, digits, '.', '-' and "
                "'_' that begins with a letter or digit."
            )
    return {BASE: plain, **{name: _merged(plain, change, name) for name, change in changes.items()}}


def _merged(base: Mapping[str, Any], change: Mapping[str, Any], where: str) -> dict[str, Any]:
    made = copy.deepcopy(dict(base))
    for name, value in change.items():
        if name not in base or isinstance(value, dict) != isinstance(base[name], dict):
            raise ConfigError(
                f"sweep.{where}.{name} = {value!r} does not fit the configuration: choose from {', '.join(base)}."
            )
        made[name] = _merged(base[name], value, f"{where}.{name}") if isinstance(value, dict) else value
    return made


def chosen(names: Sequence[str], only: Sequence[str]) -> list[str]:
    """Runs to train: all of them, or those of `only`; `ConfigError` for a name that there is not."""
    for name in only:
        check_choice("--only", name, names)
    return [name for name in names if not only or name in only]


def run(config: Mapping[str, Any], workdir: str | os.PathLike[str], only: Sequence[str] = ()) -> Sweep:
    """Train the runs of a sweep one after the other, each in `WORKDIR/NAME`, and put them into one table.

    Finished runs are left alone, begun ones go on. A run that fails for a reason that a user can mend is a row
    with the reason, and the sweep goes on. SIGTERM and Ctrl-C end the sweep as they end a run, which is saved.
    Several processes may train different runs (`only`) at once. The table of all runs is `report.md` and `report.json`.

    Parameters
    ----------
    config
        Plain nested values with a section `sweep`, see `configurations`.
    workdir
        Folder of the sweep.
    only
        Names of the runs to train; none for all.

    Raises
    ------
    ConfigError, StoreError
        The sweep or its data cannot be read at all.
    FolderInUseError
        Another process trains one of the runs.
    """
    from rich.console import Console

    console = Console(quiet=jax.process_index() != 0)
    workdir = Path(workdir).expanduser().absolute()
    runs = configurations(config)
    wanted = chosen(list(runs), only)
    if run_folder.is_run(workdir):
        raise ConfigError(
            f"{workdir} is a run, but a sweep needs a folder of its own: choose another --workdir."
        )
    experiment.check_data(runs[BASE], workdir)
    states = {name: _state(workdir / name) for name in runs}
    reason = "finished"
    for number, name in enumerate(wanted, 1):
        console.rule(f"{name} ({number} of {len(wanted)})", align="left")
        started = time.monotonic()
        try:
            states[name], ended = _one(runs[name], workdir / name)
        except FolderInUseError:
            raise  # another sweep trains this run, and is about to train the next ones
        except SctError as error:
            states[name], ended = str(error), "failed"
            console.print(f"{name} failed: {error}", soft_wrap=True, markup=False)
        else:
            took = time.monotonic() - started
            console.print(
                f"{name}: {states[name] or 'finished'} ({took / 60:.1f} min)", soft_wrap=True, markup=False
            )
        if ended in ("signal", "interrupt"):
            reason = ended
            break
        if ended == "failed":
            reason = "failed"
    if jax.process_index() == 0:
        # Others may have trained the rest meanwhile, with another --only.
        for name in set(runs) - set(wanted):
            states[name] = _state(workdir / name)
        made = tables(workdir, runs, states)
        report_folder.write(made, workdir)
        for each in made:
            console.print(each.table())
        console.print(f"sweep folder: {workdir}", soft_wrap=True)
    return Sweep(reason, states)


def is_finished(folder: Path) -> bool:
    """Whether a run was measured and exported, and has not gone on since."""
    exported = folder / "model"
    if not (exported / "config.json").is_file() or not (folder / "report.json").is_file():
        return False
    return run_folder.is_run(folder) and run_folder.is_current(folder, exported)


def _state(folder: Path) -> str:
    """Why a run is not finished, "" where it is; a damaged run says so and does not end the others."""
    try:
        return "" if is_finished(folder) else _unfinished(folder)
    except SctError as error:
        return str(error)


def _unfinished(folder: Path) -> str:
    steps = run_folder.steps(folder) if folder.is_dir() else []
    return f"stopped at step {steps[-1]:,}" if steps else "not trained yet"


def _one(config: Mapping[str, Any], folder: Path) -> tuple[str, str]:
    """Train one run unless it is finished; its state and why it ended."""
    if is_finished(folder):
        experiment.check_same_run(config, folder)
        return "", "finished"
    result = experiment.run(config, folder)
    if result.reason in ("signal", "interrupt", "stop_at"):
        return f"stopped at step {result.progress.step:,}", result.reason
    return "", result.reason


def tables(workdir: Path, runs: Mapping[str, Mapping[str, Any]], states: Mapping[str, str]) -> list[Report]:
    """Tables of all runs of a sweep and the baselines of its base, without and with expressed genes given.

    Parameters
    ----------
    workdir
        Folder of the sweep.
    runs
        Configuration of each run, see `configurations`.
    states
        Run -> "" where it is finished, otherwise why it is not: its remark.
    """
    measured: dict[str, Report | None] = {}
    states = dict(states)
    for name, state in states.items():
        try:
            measured[name] = None if state else _measured(workdir / name)
        except CheckpointError as error:  # does not cost the others their rows
            measured[name], states[name] = None, str(error)
    found = {name: table.records() if table else [] for name, table in measured.items()}
    title = next((table.title for table in measured.values() if table), "Runs")
    made = []
    for given in ("no", "yes"):
        words = "not given" if given == "no" else "given"
        one = Report(
            f"{title}; expressed genes {words}",
            ("run", *scoring.NUMBERS, REMARK),
            notes=_NOTES,
        )
        for name in runs:
            rows = [row for key, row in found[name] if key == MODEL and row[scoring.GIVEN.key] == given]
            remark = states[name] or _remark(runs[name], runs[BASE])
            if not rows:
                one.add(name, [], [], [], states[name] or "no study is held out to measure it on", key=RUN)
            for row in rows:
                one.add(name, *_numbers(row), remark, key=RUN)
        for key, row in found[BASE]:
            if key != MODEL and row[scoring.GIVEN.key] == given:
                fitted = f", fitted on {row[FITTED_ON.key]}" if row.get(FITTED_ON.key) else ""
                one.add(f"({row[METHOD.key]}{fitted})", *_numbers(row), row.get(REMARK.key, ""), key=key)
        made.append(one)
    return made


def _measured(folder: Path) -> Report | None:
    """The table of imputation of a finished run."""
    path = folder / "report.json"
    wanted = {METHOD.key, scoring.GIVEN.key, scoring.NUMBERS[0].key}
    try:
        return next((table for table in report_folder.read(path) if wanted <= set(table.keys)), None)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}): delete it and start the sweep again, which measures this run anew."
        ) from error


def _numbers(row: Mapping[str, Any]) -> list[list[float]]:
    cells = [row.get(column.key) for column in scoring.NUMBERS]
    return [cell if isinstance(cell, list) else [] for cell in cells]


def _remark(config: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """What keeps the numbers of a run from being those of the base's question."""
    found = []
    levels = [each["model"].get("num_bins") for each in (config, base)]
    if levels[0] != levels[1]:
        found.append(
            f"{levels[0]} levels instead of {levels[1]}: the MCC is another measure, compare the MAE"
        )
    if config["data"].get("cells_per_bag") != base["data"].get("cells_per_bag"):
        found.append("other bags: other masked positions in the cells")
    return "; ".join(found)
