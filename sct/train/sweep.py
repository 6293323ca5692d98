"""Train several variants of one configuration (a sweep, such as ablations), one after the other."""

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

from sct import messages
from sct.checks import check_choice
from sct.errors import CheckpointError, ConfigError, FolderInUseError, SctError
from sct.eval.imputation import scoring
from sct.eval.reports import folder as report_folder
from sct.eval.reports.report import FITTED_ON, METHOD, MODEL, REMARK, Report
from sct.families.tasks import task_spec_of
from sct.models import registry
from sct.train import experiment, resume
from sct.train.run_spec import section_types, with_current_names
from sct.weights import run_folder

BASE = "base"
RUN = "run"  # key of the table rows that belong to runs
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_NOTES = (
    "Each run changes one option of the base run, which its name gives. Only masked expressed genes are scored.",
    "The reference baseline is the most common expressed level of each gene, at the run's masked positions. ΔMCC is "
    "relative to it.",
)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Result of a sweep.

    Attributes
    ----------
    reason
        Why the sweep ended: "finished", "failed" (one or more runs failed), "signal" or "interrupt".
    states
        For each run, the reason why it is not finished, or "" if it is finished.
    """

    reason: str
    states: Mapping[str, str]


def configurations(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the configuration of each run of a sweep, by name. The base configuration without changes comes first.

    Parameters
    ----------
    config
        A configuration with a section `sweep`, which maps the name of each run to the fields that this run changes. The
        fields are nested as in the configuration.

    Raises
    ------
    ConfigError
        The section `sweep` does not have this form, or names a field that the base configuration does not have.
    """
    plain = json.loads(json.dumps(config))
    changes = plain.pop("sweep", None)
    types = section_types(plain["family"], task_spec_of(plain))
    plain = with_current_names(plain)
    if not isinstance(changes, dict) or not all(isinstance(change, dict) for change in changes.values()):
        raise ConfigError(
            f"sweep is {changes!r}, but it must map run names to the fields that each run changes: write it like "
            '{"small": {"model": {"num_layers": 2}}}.'
        )
    if BASE in changes:
        raise ConfigError(
            f"a run of the sweep is named {BASE!r}, but this name is reserved for the run without changes: rename it."
        )
    for name in changes:
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"a run of the sweep is named {name!r}, but the name must also be valid as a folder name: use at most "
                "200 letters, digits, '.', '-' and '_', and begin with a letter or digit."
            )
    renamed = {
        name: {
            section: registry.with_current_names(types[section], value, f"sweep.{name}.{section}")
            if section in types and isinstance(value, dict)
            else value
            for section, value in change.items()
        }
        for name, change in changes.items()
    }
    return {BASE: plain, **{name: _merged(plain, change, name) for name, change in renamed.items()}}


def _merged(base: Mapping[str, Any], change: Mapping[str, Any], where: str) -> dict[str, Any]:
    made = copy.deepcopy(dict(base))
    for name, value in change.items():
        field = f"sweep.{where}.{name}"
        if name not in base:
            raise ConfigError(
                f"{field} is {value!r}, but the configuration has no field {name!r}: choose from {', '.join(base)}."
            )
        if isinstance(base[name], dict) and not isinstance(value, dict):
            raise ConfigError(
                f"{field} is {value!r}, but {name!r} is a section of the configuration: change its fields instead, "
                f"such as {', '.join(base[name])}."
            )
        if isinstance(value, dict) and not isinstance(base[name], dict):
            raise ConfigError(
                f"{field} is {value!r}, but must be a single value, not a section with fields: give a value such as "
                f"{base[name]!r}."
            )
        made[name] = _merged(base[name], value, f"{where}.{name}") if isinstance(value, dict) else value
    return made


def chosen(names: Sequence[str], only: Sequence[str]) -> list[str]:
    """Return the names of the runs to train: those in `only`, or all if `only` is empty.

    Raise `ConfigError` for an unknown name.
    """
    for name in only:
        check_choice("--only", name, names)
    return [name for name in names if not only or name in only]


def run(config: Mapping[str, Any], workdir: str | os.PathLike[str], only: Sequence[str] = ()) -> Sweep:
    """Train the runs of a sweep one after the other, each in `WORKDIR/NAME`, and compare them in one table.

    Finished runs are skipped, and unfinished runs resume. If a run fails with an `SctError`, the table shows the reason
    and the sweep continues. SIGTERM and Ctrl-C save the current run and end the sweep. Several processes may train
    different runs at the same time (`only`). The table of all runs is written to `report.md` and `report.json`.

    Parameters
    ----------
    config
        Configuration as a nested dict, with a section `sweep`, see `configurations`.
    workdir
        Folder of the sweep.
    only
        Names of the runs to train; empty for all.

    Raises
    ------
    ConfigError, StoreError
        The section `sweep` is invalid, or the data of the base run cannot be opened.
    FolderInUseError
        Another process is training one of the runs.
    """
    console = messages.console(quiet=jax.process_index() != 0)
    workdir = Path(workdir).expanduser().absolute()
    runs = configurations(config)
    wanted = chosen(list(runs), only)
    if run_folder.is_run(workdir):
        raise ConfigError(
            f"--workdir is {workdir}, which is the folder of a single run, but a sweep needs a separate folder: choose "
            "another --workdir."
        )
    experiment.check_data(runs[BASE], workdir)
    states = {name: _status(workdir / name) for name in runs}
    reason = "finished"
    for number, name in enumerate(wanted, 1):
        console.rule(f"{name} ({number} of {len(wanted)})", align="left")
        started = time.monotonic()
        try:
            states[name], ended = _train_one(runs[name], workdir / name)
        except FolderInUseError:
            raise  # another sweep is training this run, and will train the next ones
        except SctError as error:
            states[name], ended = str(error), "failed"
            console.print(f"{name} failed: {error}", soft_wrap=True)
        else:
            took = time.monotonic() - started
            console.print(f"{name}: {states[name] or 'finished'} ({took / 60:.1f} min)", soft_wrap=True)
        if ended in ("signal", "interrupt"):
            reason = ended
            break
        if ended == "failed":
            reason = "failed"
    if jax.process_index() == 0:
        # Other processes (with another --only) may have trained the remaining runs in the meantime.
        for name in set(runs) - set(wanted):
            states[name] = _status(workdir / name)
        made = tables(workdir, runs, states)
        report_folder.write(made, workdir)
        for each in made:
            console.print(each.table())
        console.print(f"sweep folder: {workdir}", soft_wrap=True)
    return Sweep(reason, states)


def _status(folder: Path) -> str:
    """Return why a run is not finished, or "" if the run is finished. For a damaged run, return the error message."""
    try:
        return "" if resume.is_finished(folder) else _unfinished(folder)
    except SctError as error:
        return str(error)


def _unfinished(folder: Path) -> str:
    steps = run_folder.steps(folder) if folder.is_dir() else []
    return f"stopped at step {steps[-1]:,}" if steps else "not trained yet"


def _train_one(config: Mapping[str, Any], folder: Path) -> tuple[str, str]:
    """Train one run unless it is finished. Return two texts.

    The first text is the reason why the run is not finished, or "" if the run is finished. The second text is the
    reason why training ended.
    """
    if resume.is_finished(folder) and experiment.is_same_length(config, folder):
        return "", "finished"
    result = experiment.run(config, folder)
    if result.reason in experiment.STOPPED:
        return f"stopped at step {result.progress.step:,}", result.reason
    return "", result.reason


def tables(workdir: Path, runs: Mapping[str, Mapping[str, Any]], states: Mapping[str, str]) -> list[Report]:
    """Return two tables of all runs and of the baselines of the base run.

    The methods in the second table know that the masked genes are expressed; those in the first table do not.

    Parameters
    ----------
    workdir
        Folder of the sweep.
    runs
        Configuration of each run, see `configurations`.
    states
        For each run, the reason why it is not finished, or "" if it is finished. The tables show the reason as a
        remark.
    """
    measured: dict[str, Report | None] = {}
    states = dict(states)
    for name, state in states.items():
        try:
            measured[name] = None if state else _imputation_table(workdir / name)
        except CheckpointError as error:  # the other runs keep their rows
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
                one.add(name, [], [], [], states[name] or "the store has no held-out study", key=RUN)
            for row in rows:
                one.add(name, *_numbers(row), remark, key=RUN)
        for key, row in found[BASE]:
            if key != MODEL and row[scoring.GIVEN.key] == given:
                fitted = f", fitted on {row[FITTED_ON.key]}" if row.get(FITTED_ON.key) else ""
                one.add(f"({row[METHOD.key]}{fitted})", *_numbers(row), row.get(REMARK.key, ""), key=key)
        made.append(one)
    return made


def _imputation_table(folder: Path) -> Report | None:
    """Return the imputation table of a finished run, or None if the report of the run has no imputation table."""
    path = folder / "report.json"
    wanted = {METHOD.key, scoring.GIVEN.key, scoring.NUMBERS[0].key}
    try:
        return next((table for table in report_folder.read(path) if wanted <= set(table.keys)), None)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}): delete this file and start the sweep again, so that this run is evaluated "
            "again."
        ) from error


def _numbers(row: Mapping[str, Any]) -> list[list[float]]:
    cells = [row.get(column.key) for column in scoring.NUMBERS]
    return [cell if isinstance(cell, list) else [] for cell in cells]


def _remark(config: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """Return the reasons why a run's results cannot be compared with those of the base run, or "" if they can."""
    found = []
    levels = [each["model"].get("num_bins") for each in (config, base)]
    if levels[0] != levels[1]:
        found.append(f"{levels[0]} levels instead of {levels[1]}: MCC values are not comparable, use the MAE")
    if config["data"].get("cells_per_bag") != base["data"].get("cells_per_bag"):
        found.append("cells_per_bag differs: other positions are masked")
    return "; ".join(found)
