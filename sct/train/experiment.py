"""Run a configuration from start to end: open the data, train a model, evaluate the best checkpoint and export it."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from sct import messages
from sct.atomic import write_json
from sct.data.store import SPLITS
from sct.errors import AGAIN, ConfigError, SctError
from sct.eval.reports.report import Report
from sct.eval.reports.summary import compares, summary
from sct.families.tasks import data_of
from sct.global_settings import HINTS, settings
from sct.hashes import sealed
from sct.tasks.base import Export, Variables
from sct.train import parents, processes, resume
from sct.train.checkpoint import Checkpoints
from sct.train.export import completed
from sct.train.loop import TrainConfig, TrainResult, train
from sct.train.run_spec import RunSpec
from sct.train.start import Start, begin, open_data, records_of
from sct.version import __version__
from sct.weights import model_folder, pretrained, run_folder

# Reasons why training ended before its last step.
STOPPED = ("signal", "interrupt", "stop_at")


def check_data(config: Mapping[str, Any], workdir: Path) -> None:
    """Raise the errors that `run` raises for missing or damaged data, but write no files."""
    data = data_of(config)
    if data.store or not data.dataset:
        open_data(data, workdir)


def is_same_length(config: Mapping[str, Any], workdir: Path) -> bool:
    """Return whether a configuration has the same number of training steps as the run in a folder.

    Raises
    ------
    ConfigError
        Other options that affect the results differ from those of the run.
    """
    spec, recorded = RunSpec.of(parents.split(config)[0]), resume.read(workdir / run_folder.CONFIG)
    resume.check_options(recorded, spec, workdir)
    return not resume.is_length_changed(recorded, spec)


def run(config: Mapping[str, Any], workdir: str | os.PathLike[str]) -> TrainResult:
    """Train the model of a configuration in a run folder. A second call with the same folder resumes the run.

    If the configuration of the second call has more steps, training continues beyond the end of the first run. The
    second call starts from the latest checkpoint and reads the records that follow. The learning-rate schedule is
    computed for the new number of steps. The model and the reports of the shorter run stay in the folder until the new
    ones replace them.

    The section `builds_on` of a configuration names other runs whose models this configuration uses
    (`sct.train.parents.split`). These other runs are trained first, each in its own run folder, unless they are
    finished.

    The finished folder contains `config.json`, `data.json`, `genes.tsv`, `metrics.jsonl`, `tensorboard/`,
    `checkpoints/`, `model/` (the best checkpoint as a model folder), `report.md` and `report.json`.

    Parameters
    ----------
    config
        Configuration as a nested dict, such as a file in `configs/` returns.
    workdir
        Run folder.

    Returns
    -------
    The result of the training. If the training of a run in `builds_on` was stopped, this is the result of that run.

    Raises
    ------
    FolderInUseError
        Another process is training in the folder. If that process was asked to stop, this function raises no error, but
        waits until the process has ended.
    SctError
        Any error that the user can fix.
    """
    with _locked(config, workdir, "--workdir") as run_in_folder:
        return run_in_folder()


@contextmanager
def _locked(
    config: Mapping[str, Any], workdir: str | os.PathLike[str], option: str
) -> Iterator[Callable[[], TrainResult]]:
    """Lock the run folder, and yield a function that trains in it as `run` does.

    Error messages name `option`, the command-line option that gives the folder, such as `--workdir`.
    """
    workdir = Path(workdir).expanduser().absolute()
    config, builds_on = parents.split(config)
    spec = RunSpec.of(config)
    if workdir.exists() and not workdir.is_dir():
        raise ConfigError(
            f"{option} is {workdir}, which is a file, but it must be a folder: choose another path."
        )

    def run_in_folder() -> TrainResult:
        # A run that resumes has the models in its checkpoints.
        if builds_on and not run_folder.steps(workdir):
            check_data(config, workdir)
            stopped = train_parents(builds_on)
            if stopped is not None:
                return stopped
        return _run(spec, workdir)

    with processes.held_by_first(workdir, "training", option):
        yield run_in_folder


def train_parents(builds_on: Sequence[parents.ParentRun]) -> TrainResult | None:
    """Train or resume the runs that a configuration builds on, unless they are finished.

    Returns
    -------
    None, or the result of a run whose training was stopped before its end.

    Raises
    ------
    ConfigError
        A folder holds neither a run nor a model, or an unfinished run with other options.
    SctError
        Any error of `run`.
    """
    console = messages.console(quiet=jax.process_index() != 0)
    for parent in builds_on:
        result = _train_parent(parent, console)
        if result is not None and result.reason in STOPPED:
            return result
        del result  # free the memory of this model before the next one is trained
    return None


def _train_parent(parent: parents.ParentRun, console: Any) -> TrainResult | None:
    """Train or resume a run that a configuration builds on; return None if it is already finished."""
    if processes.decided_by_first(parent.is_ready):
        return None
    resumes = run_folder.is_run(parent.folder)
    try:
        with _locked(parent.config, parent.folder, f"--config.{parent.option}") as run_in_folder:
            # Another process may have finished the run before this process got the lock.
            if processes.decided_by_first(parent.is_ready):
                return None
            resumes = run_folder.is_run(parent.folder)
            state, what = ("is not finished", "resuming") if resumes else ("does not exist yet", "training")
            console.print(
                f"{parent.option} is {parent.workdir}, which {state}: {what} it first.", soft_wrap=True
            )
            result = run_in_folder()
    except ConfigError as error:
        if not resumes:
            raise
        raise ConfigError(
            f"{parent.option} is {parent.workdir}, an unfinished run that cannot be resumed here ({error}): "
            f"finish this run with the command that started it, or set --config.{parent.option} to a trained model."
        ) from error
    if result.reason not in STOPPED:
        processes.check_shared(parent.folder / "model" / "config.json")
    return result


def _run(spec: RunSpec, workdir: Path) -> TrainResult:
    """Train, evaluate and export in a folder that this process has locked."""
    console = messages.console(quiet=jax.process_index() != 0)
    start = begin(spec, workdir)
    task = start.task
    options = spec.train_options(task.tokens_per_record, records_of(spec, task))
    if jax.process_index() == 0:
        _write_settings(spec, start, options.steps, workdir)
    processes.check_shared(workdir / run_folder.CONFIG)
    _announce(console, start, options, workdir)
    result = train(task, options, spec.optimizer, workdir, start.variables)
    if result.reason in STOPPED:
        console.print(
            f"stopped at step {result.progress.step:,} of {options.steps:,}; run folder: {workdir}",
            soft_wrap=True,
        )
        return result
    with _exit_on_sigterm():
        _finish(spec, start, options, result, workdir, console)
    return result


def _write_settings(spec: RunSpec, start: Start, steps: int, workdir: Path) -> None:
    """Write the configuration to the run folder and, for a new run, its genes and the record of its data."""
    architecture = dataclasses.asdict(start.task.model_config)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        resolved = {run_folder.MODEL: architecture, run_folder.STEPS: steps}
        write_json(workdir / run_folder.CONFIG, sealed({**spec.values, **resolved}))
    except OSError as error:
        raise ConfigError(
            f"the run folder {workdir} is not writable ({error.strerror}): choose another --workdir."
        ) from error
    if start.step is not None:
        return
    start.store.vocabulary.save(workdir / run_folder.GENES)
    described = {
        **resume.describe(start.store), "license": start.license, "files": resume.hashes_of(spec.files),
        "model": start.task.exports()["data"], run_folder.HASHES: run_folder.hashed_files(workdir),
    }  # fmt: skip
    write_json(workdir / run_folder.DATA, sealed(described))


def _finish(
    spec: RunSpec, start: Start, options: TrainConfig, result: TrainResult, workdir: Path, console: Any
) -> None:
    """Evaluate the best model, and write the reports and the model folder."""
    from sct.eval.reports import folder as report_folder

    variables = best_variables(result, workdir, options)
    if jax.process_count() > 1:
        variables = multihost_utils.process_allgather(variables, tiled=True)
    reports, failed = _evaluate(start.task, variables, workdir, console)
    if jax.process_index() == 0:
        report_folder.write(reports, workdir)
        model = pretrained.Pretrained(
            spec.family,
            start.task.model_config,
            variables,
            license=start.license,
            step=result.progress.best_step or result.progress.step,
            **start.task.exports(),
        )
        section = _training_section(spec, start, result, reports)
        made, exported = model, _is_exported(workdir, model)
        if not exported:
            _save(model, section, workdir)  # first, so that no error below loses the trained model
        # Fine-tuning splits the cells of a store itself, so that the training studies also have held-out cells.
        if not spec.task_spec.finetunes:
            made, notes = completed(model, start.store, spec.export, spec.init_from)
            for note in notes:
                console.print(note, soft_wrap=True)
        if made is not model or exported:
            _save(made, section, workdir)
    _print_results(console, reports, workdir)
    if failed is not None:
        raise failed
    console.print(f"run folder: {workdir}", soft_wrap=True)


def _is_exported(workdir: Path, model: pretrained.Pretrained) -> bool:
    """Return whether an earlier end of this run has written its model folder, which is then complete."""
    folder = workdir / "model"
    if not (folder / model_folder.CONFIG).is_file():
        return False
    try:
        return bool(model_folder.read_config(folder).get("step") == model.step)
    except SctError:
        return False


def _save(model: pretrained.Pretrained, section: str, workdir: Path) -> None:
    """Write the model folder with a model card, which contains the section on the training."""
    card = pretrained.default_card(model, section)
    dataclasses.replace(model, card=card).save_pretrained(workdir / "model")


def _print_results(console: Any, reports: list[Report], workdir: Path) -> None:
    """Print a table that compares the model with the best baselines, and the reports that this table does not cover."""
    compared = summary(reports)
    if compared is not None:
        console.print(compared)
    for report in reports:
        if settings.verbosity >= HINTS or not compares(report):
            console.print(report.table())
    if reports:
        console.print(f"report: {workdir / 'report.md'}", soft_wrap=True, highlight=False)


def _evaluate(
    task: Export, variables: Variables, workdir: Path, console: Any
) -> tuple[list[Report], Exception | None]:
    """Evaluate a trained model. Return two values: the reports, and an error or None.

    If an unexpected error ended the evaluation, this error is the second value. The caller saves the model before it
    raises the error.
    """
    reports: list[Report] = []
    try:
        evaluators = task.evaluators()
    except SctError as error:
        console.print(f"skipped the evaluation: {error}", soft_wrap=True)
        return reports, None
    except Exception as error:
        return reports, error
    for evaluator in evaluators:
        try:
            with processes.only_first_speaks():
                numbers = dict(evaluator(variables))
        except SctError as error:
            console.print(f"skipped the evaluation {evaluator.name}: {error}", soft_wrap=True)
            continue
        except Exception as error:
            return reports, error
        if evaluator.report is not None:
            reports.append(evaluator.report)
        if jax.process_index() == 0:
            write_json(workdir / f"{evaluator.name}.json", numbers)
    return reports, None


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Exit with status `AGAIN` on SIGTERM.

    The trained model is already saved, so running the same command again only repeats the evaluation.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        messages.notice(
            "stop requested: training is saved; run the same command again to evaluate the model."
        )
        raise SystemExit(AGAIN)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def best_variables(result: TrainResult, workdir: Path, options: TrainConfig) -> dict[str, Any]:
    """Return the variables of the best checkpoint. If there was no validation, return those of the last step."""
    best = result.progress.best_step
    if best is None or best == result.progress.step:
        return result.state.variables
    checkpoints = Checkpoints(workdir / "checkpoints", options.keep_last)
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), result.state
    )
    state, _ = checkpoints.restore(abstract, best)
    checkpoints.close()
    return state.variables


def _announce(console: Any, start: Start, options: TrainConfig, workdir: Path) -> None:
    """Print a summary of the run that starts or resumes."""
    store, task = start.store, start.task
    shapes = jax.tree.leaves(jax.eval_shape(task.init, jax.random.key(0)))
    parameters = sum(int(np.prod(leaf.shape)) for leaf in shapes)
    cells = {split: sum(study.n_cells for study in store.split(split)) for split in SPLITS}
    lines = [
        *start.remarks,
        f"sct {__version__}: {parameters:,} parameters, {len(task.vocabulary):,} genes, "
        + ", ".join(f"{count:,} {split} cells" for split, count in cells.items() if count)
        + f", {options.steps:,} steps on {jax.device_count()} {jax.default_backend()} device(s); {workdir}",
    ]
    if start.step is not None:
        lines.append(f"resuming from step {start.step:,}")
    if task.dataset("validation") is None:
        lines.append(
            "the store has no validation study, so there is no early stopping"
            + ("" if store.split("test") else " and no report")
            + ": to hold out a study, use `launch.ingest --validation=NAME`."
        )
    for line in (*lines, *task.notes(fresh=start.variables is None and start.step is None)):
        console.print(line, soft_wrap=True)


def _training_section(spec: RunSpec, start: Start, result: TrainResult, reports: list[Report]) -> str:
    """Return the training section of the model card, in Markdown."""
    train = start.store.split("train")
    studies = [f"{study.name} ({study.n_cells:,} cells)" for study in train]
    labels = getattr(spec.data, "label_key", "")
    listed = ", ".join(studies[:20]) + (f" and {len(studies) - 20:,} more" if len(studies) > 20 else "")
    return "\n".join(
        [
            "## Training", "",
            f"Trained on {sum(study.n_cells for study in train):,} cells for {result.progress.step:,} steps "
            f"({result.reason}); best validation at step {result.progress.best_step}. Studies: {listed}.", "",
            *([f"This training started from the model {spec.init_from}.", ""] if spec.init_from else []),
            *([f"Training read labels of cells: the column {labels!r} of obs.", ""] if labels else []),
            *(["## Results", "", *[report.markdown() for report in reports], ""] if reports else []),
            "## Configuration", "", "```json", json.dumps(spec.values, indent=1), "```",
        ]
    )  # fmt: skip
