"""Check that a run may resume: its options, cells and input files must be the same as when the run started."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from sct.data.genes.vocabulary import GeneVocabulary
from sct.data.store import Store
from sct.errors import CheckpointError, ConfigError, SctError, StoreError
from sct.models import registry
from sct.tasks.base import ObjectiveConfig
from sct.train.export import ExportConfig
from sct.train.loop import TrainConfig
from sct.train.optim import learning_rate
from sct.train.run_spec import SECTIONS, RunSpec, section_types
from sct.weights import run_folder

# Options that set the length of a run; see `check_length`.
_LENGTH = {"train": {"steps", "epochs"}, "data": {"tokens"}}
# Options that may change on resume. Except for the length, they do not change what a training step computes.
_MAY_CHANGE = {
    "train": {
        "stop_at", "log_every", "eval_every", "checkpoint_every", "keep_last", "patience", "loader_threads",
        "eval_records", "mesh", *_LENGTH["train"],
    },
    "data": {"store", *_LENGTH["data"]},
    "export": {field.name for field in dataclasses.fields(ExportConfig)},
}  # fmt: skip


# Sections in which a missing option is compared by its default value.
_WITH_DEFAULTS = ("data", "objective", "adapters", "peft", "export")


def read(path: Path) -> dict[str, Any]:
    """Read `config.json` or `data.json` of a run that resumes.

    Raises
    ------
    CheckpointError
        The file is missing or damaged.
    """
    try:
        return run_folder.read(path)
    except CheckpointError as error:
        raise CheckpointError(
            f"{str(error).removesuffix('.')} (the run in this folder cannot resume without the file; to start a new "
            "run, choose another --workdir)."
        ) from error


def check_options(recorded: Mapping[str, Any], spec: RunSpec, workdir: Path) -> None:
    """Raise `ConfigError` if options differ from those of the run folder.

    Parameters
    ----------
    recorded
        `config.json` of the run folder.
    spec
        Specification of the run that is to resume.
    workdir
        Run folder, for the message.
    """
    types = section_types(spec.family, spec.task_spec)
    for section in SECTIONS:
        before, after = recorded.get(section), spec.values.get(section)
        if section in types and isinstance(before, Mapping):
            before = registry.with_current_names(types[section], before, section, recorded=True)
        # An older version may have made the run, without this section or one of its options.
        if section in _WITH_DEFAULTS and section in types:
            before, after = before or {}, after or {}
        if not isinstance(before, Mapping) or not isinstance(after, Mapping):
            before, after = {section: before}, {section: after}
        if section in _WITH_DEFAULTS and section in types:
            before, after = (_all_options(types[section], each) for each in (before, after))
        # A task that inherits its architecture takes a missing option from the earlier model instead.
        if section == "model" and not (spec.task_spec.inherits_architecture or spec.task_spec.finetunes):
            before = {**_defaults(types[section]), **before}
            after = {**_defaults(types[section]), **after}
        free = _MAY_CHANGE.get(section, set())
        for name in sorted(set(before) | set(after)):
            if name not in free and before.get(name) != after.get(name):
                option = section if name == section else f"{section}.{name}"
                raise ConfigError(
                    f"the run in {workdir} has {option} = {before.get(name)!r}, but the configuration has "
                    f"{after.get(name)!r}: use the same value to resume, or choose another --workdir and set "
                    f"--config.init_from={workdir} to start from this run's model."
                )


def _defaults(kind: type[Any]) -> dict[str, Any]:
    """Return the defaults of the options of a dataclass that have a plain value."""
    return {
        field.name: field.default
        for field in dataclasses.fields(kind)
        if field.default is not dataclasses.MISSING
    }


def _all_options(kind: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return all options of a section of the configuration, as a dict by name.

    An option that a later version of sct added is not recorded in the run. The dict then has the value that the run
    used in effect.
    """
    if issubclass(kind, ObjectiveConfig):
        values = {**kind.BEFORE, **values}
    try:
        return cast(
            dict[str, Any], json.loads(json.dumps(dataclasses.asdict(registry.build(kind, values, ""))))
        )
    except SctError:  # another version recorded these options: compare them unchanged
        return dict(values)


def check_folder(described: Mapping[str, Any], store: Store, spec: RunSpec, workdir: Path) -> None:
    """Raise an error if a run cannot resume because its cells, its input files or its folder changed.

    Parameters
    ----------
    described
        `data.json` of the run folder.
    store, spec
        Store with the cells, and specification of the run that is to resume.
    workdir
        Run folder.

    Raises
    ------
    StoreError
        The genes or the studies of the store changed after the run started.
    ConfigError
        A file that the configuration names has changed.
    CheckpointError
        The genes or the tokenizer in the folder are damaged.
    """
    _check_data(described, store, workdir)
    for option, digest in hashes_of(spec.files).items():
        if described.get("files", {}).get(option) != digest:
            raise ConfigError(
                f"the file that {option} names has changed since the run in {workdir} started: restore the file, or "
                "choose another --workdir."
            )
    run_folder.verify_files(workdir, described)
    run_folder.check_genes(GeneVocabulary.load(workdir / run_folder.GENES), described, workdir)


def is_length_changed(recorded: Mapping[str, Any], spec: RunSpec) -> bool:
    """Return whether an option that sets the length of the run differs from that of the run folder."""
    types = section_types(spec.family, spec.task_spec)
    for section, names in _LENGTH.items():
        before, after = (
            _all_options(types[section], values.get(section) or {}) for values in (recorded, spec.values)
        )
        if any(before.get(name) != after.get(name) for name in names):
            return True
    return False


def check_length(
    recorded: Mapping[str, Any], spec: RunSpec, tokens_per_record: int, folder: Path, records: int = 0
) -> str:
    """Check that a run may resume with another number of steps, and return a message about the change.

    Parameters
    ----------
    recorded
        `config.json` of the run folder.
    spec
        Specification of the run that is to resume.
    tokens_per_record
        Number of tokens in one training record of the task.
    folder
        Run folder.
    records
        Number of training records in an epoch.

    Returns
    -------
    The message: the old and the new number of steps, and what happens to the learning rate. "" if nothing changes. If
    the new number of steps equals the step of the newest checkpoint, the run ends without further training.

    Raises
    ------
    ConfigError
        The run has already been trained for more steps, or it has stopped early and would stop again at once.
    CheckpointError
        The newest checkpoint is damaged.
    """
    old = dataclasses.replace(
        spec,
        steps=recorded.get(run_folder.STEPS) or (recorded.get("train") or {}).get("steps") or 0,
        data=dataclasses.replace(spec.data, tokens=(recorded.get("data") or {}).get("tokens") or 0.0),
    )
    before, after = (each.train_options(tokens_per_record, records).steps for each in (old, spec))
    if before == after:
        return ""
    trained, now = run_folder.steps(folder)[-1], run_folder.progress(folder)
    if after == trained:
        return f"the run had {before:,} steps and now has {after:,}, which it has reached: no step is left to train."
    if after < trained:
        raise ConfigError(
            f"the run in {folder} is trained to step {trained:,} of {before:,}, but the configuration asks for "
            f"{after:,} steps: set --config.train.steps to {trained} to end the run there, or to a larger number to "
            "train on."
        )
    if spec.loop.patience and now["stale"] >= spec.loop.patience:
        raise ConfigError(
            f"the run in {folder} stopped early at step {trained:,}, after {now['stale']} validations without "
            f"improvement, but the configuration asks for {after:,} steps: to train on, also set "
            "--config.train.patience to a larger number, or to 0 to never stop early."
        )
    was, becomes = (float(learning_rate(spec.optimizer, steps)(trained)) for steps in (before, after))
    schedule = (
        f"the learning rate stays {was:.3g}"
        if was == becomes
        else f"the {spec.optimizer.schedule} schedule is computed anew for {after:,} steps, which changes the learning "
        f"rate from {was:.3g} to {becomes:.3g}"
    )
    return f"the run had {before:,} steps and now has {after:,}: at step {trained:,}, {schedule}."


def is_finished(folder: Path) -> bool:
    """Return whether a run has reached its end, was evaluated and exported, and has not been trained further since.

    Raises
    ------
    CheckpointError
        The run is damaged.
    """
    exported = folder / "model"
    if not (exported / "config.json").is_file() or not (folder / "report.json").is_file():
        return False
    if not (run_folder.is_run(folder) and run_folder.is_current(folder, exported)):
        return False
    # A lengthened run keeps the model and the report of its shorter training until its new end.
    settings = read(folder / run_folder.CONFIG)
    options, trained = settings.get("train") or {}, run_folder.steps(folder)[-1]
    patience = options.get("patience", TrainConfig.patience)
    stopped_early = bool(patience) and run_folder.progress(folder)["stale"] >= patience
    return stopped_early or trained >= (settings.get(run_folder.STEPS) or options.get("steps") or 0)


def describe(store: Store) -> dict[str, Any]:
    """Return the properties of a store that determine the training data: its genes and its studies."""
    studies = [[study.name, study.split, study.n_cells, study.nnz] for study in store.studies]
    return {"vocabulary_hash": store.vocabulary.hash, "studies": studies}


def _check_data(before: Mapping[str, Any], store: Store, workdir: Path) -> None:
    after = describe(store)
    if before.get("vocabulary_hash") != after["vocabulary_hash"]:
        raise StoreError(
            f"the run in {workdir} uses the vocabulary with hash {str(before.get('vocabulary_hash'))[:16]}, but the "
            f"store {store.path} has the hash {after['vocabulary_hash'][:16]}: use the store of the run, or choose "
            "another --workdir."
        )
    if before.get("studies") != after["studies"]:
        changed = [s[0] for s in before.get("studies", []) if s not in after["studies"]]
        changed += [s[0] for s in after["studies"] if s not in before.get("studies", [])]
        raise StoreError(
            f"the data in the store {store.path} differs from the data of the run in {workdir} (changed: "
            f"{', '.join(dict.fromkeys(changed)) or 'the order of studies'}): choose another --workdir, and set "
            f"--config.init_from={workdir} to start from this run's model."
        )


def hashes_of(files: Mapping[str, str]) -> dict[str, str]:
    """Return the SHA-256 hashes of files, by option name. Raise `ConfigError` if a file cannot be read."""
    found = {}
    for option, path in files.items():
        try:
            found[option] = hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()
        except OSError as error:
            raise ConfigError(
                f"{option} is {path}, which cannot be read ({error.strerror}): set {option} to a readable file."
            ) from error
    return found
