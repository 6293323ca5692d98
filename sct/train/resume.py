"""Whether a run folder holds the run that a configuration asks for: same options, cells and files of text."""

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
from sct.train.run_spec import SECTIONS, RunSpec, section_types
from sct.weights import run_folder

# Options that may change on resume. They do not change what a training step computes.
_FREE = {
    "train": {
        "stop_at", "log_every", "eval_every", "checkpoint_every", "keep_last", "patience", "loader_threads",
        "eval_records", "mesh",
    },
    "data": {"store"},
}  # fmt: skip


# Sections that are compared with their defaults.
_WITH_DEFAULTS = ("data", "objective", "adapters")


def read(path: Path) -> dict[str, Any]:
    """Read `config.json` or `data.json` of a run that goes on; `CheckpointError` says how to do without."""
    try:
        return run_folder.read(path)
    except CheckpointError as error:
        raise CheckpointError(
            f"{str(error).removesuffix('.')} (the folder holds checkpoints; another --workdir starts a new run)."
        ) from error


def check_options(recorded: Mapping[str, Any], spec: RunSpec, workdir: Path) -> None:
    """Raise `ConfigError` if options differ from those of the run folder.

    Parameters
    ----------
    recorded
        `config.json` of the run folder.
    spec
        What is asked now.
    workdir
        Run folder, for the message.
    """
    types = section_types(spec.family, spec.task_spec)
    for section in SECTIONS:
        before, after = recorded.get(section), spec.values.get(section)
        if section in types and isinstance(before, Mapping):
            before = registry.with_current_names(types[section], before, section)
        # A run may have been made before there was the section, or one of its options.
        if section in _WITH_DEFAULTS:
            before, after = before or {}, after or {}
        if not isinstance(before, Mapping) or not isinstance(after, Mapping):
            before, after = {section: before}, {section: after}
        if section in _WITH_DEFAULTS:
            before, after = (_all_options(types[section], each) for each in (before, after))
        free = _FREE.get(section, set())
        for name in sorted(set(before) | set(after)):
            if name not in free and before.get(name) != after.get(name):
                option = section if name == section else f"{section}.{name}"
                raise ConfigError(
                    f"{workdir} holds a run with {option} = {before.get(name)!r}, but now it is "
                    f"{after.get(name)!r}: use the same options to resume, or another --workdir, which "
                    f"--config.init_from={workdir} starts from this run's model."
                )


def _all_options(kind: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a section, so that one which a run does not record has the value that it stood for."""
    if issubclass(kind, ObjectiveConfig):
        values = {**kind.BEFORE, **values}
    try:
        return cast(
            dict[str, Any], json.loads(json.dumps(dataclasses.asdict(registry.build(kind, values, ""))))
        )
    except SctError:  # of another version: as it stands
        return dict(values)


def check_folder(described: Mapping[str, Any], store: Store, spec: RunSpec, workdir: Path) -> None:
    """Raise if a run cannot resume: other cells, other files, or a damaged folder.

    Parameters
    ----------
    described
        `data.json` of the run folder.
    store, spec
        Cells, and what is asked now.
    workdir
        Run folder.

    Raises
    ------
    StoreError
        The store has other genes or studies than the run began with.
    ConfigError
        A file that the configuration names has changed.
    CheckpointError
        Genes or tokenizer of the folder are damaged.
    """
    _check_data(described, store, workdir)
    for option, digest in hashes_of(spec.files).items():
        if described.get("files", {}).get(option) != digest:
            raise ConfigError(
                f"the file of {option} has changed since {workdir} began: restore it, or choose another --workdir."
            )
    run_folder.verify_files(workdir, described)
    run_folder.check_genes(GeneVocabulary.load(workdir / run_folder.GENES), described, workdir)


def describe(store: Store) -> dict[str, Any]:
    """What of a store decides which bags a run draws."""
    studies = [[study.name, study.split, study.n_cells, study.nnz] for study in store.studies]
    return {"vocabulary_hash": store.vocabulary.hash, "studies": studies}


def _check_data(before: Mapping[str, Any], store: Store, workdir: Path) -> None:
    after = describe(store)
    if before.get("vocabulary_hash") != after["vocabulary_hash"]:
        raise StoreError(
            f"{workdir} holds a run on the vocabulary with hash {str(before.get('vocabulary_hash'))[:16]}, but the "
            f"store {store.path} has {after['vocabulary_hash'][:16]}: choose another --workdir or the same store."
        )
    if before.get("studies") != after["studies"]:
        changed = [s[0] for s in before.get("studies", []) if s not in after["studies"]]
        changed += [s[0] for s in after["studies"] if s not in before.get("studies", [])]
        raise StoreError(
            f"{workdir} holds a run on other data than the store {store.path} has now (different: "
            f"{', '.join(dict.fromkeys(changed)) or 'the order of studies'}): choose another --workdir, with "
            "--config.init_from to start from this run's model."
        )


def hashes_of(files: Mapping[str, str]) -> dict[str, str]:
    """Hashes (SHA-256) of files by option; `ConfigError` where one cannot be read."""
    found = {}
    for option, path in files.items():
        try:
            found[option] = hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()
        except OSError as error:
            raise ConfigError(f"the file of {option}, {path}, cannot be read ({error.strerror}).") from error
    return found
