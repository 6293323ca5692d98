"""Describe the models in folders without loading their weights."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sct.data.genes.vocabulary import GeneVocabulary
from sct.errors import CheckpointError, SctError, first_line
from sct.weights import adapter_folder, model_folder, run_folder
from sct.weights.model_folder import FolderReader

_DEPTH = 2  # levels of folders that are searched below a given folder


@dataclasses.dataclass(frozen=True)
class FolderSummary:
    """Describe a folder that may hold a model.

    Attributes
    ----------
    path
        The folder.
    kind
        "run", "model", "adapters" or "Hugging Face"; "folder" if the folder cannot be read.
    architecture
        Name of the architecture, or the model type of a Hugging Face folder.
    parameters, genes, step
        Number of parameters, number of genes, and training step. A value is None if it is unknown or if the model has
        none.
    trouble
        Reason why the folder cannot be described, or "".
    """

    path: Path
    kind: str
    architecture: str = ""
    parameters: int | None = None
    genes: int | None = None
    step: int | None = None
    trouble: str = ""


def find_models(folder: Path) -> Iterator[FolderSummary]:
    """Yield a summary of each model in a folder.

    If the folder itself is a model, it is the only one. Otherwise, the function searches the sub-folders and their
    sub-folders.

    If a folder cannot be read, its summary says why.

    Raises
    ------
    CheckpointError
        The folder does not exist.
    """
    if not os.path.isdir(folder):
        raise CheckpointError(
            f"{folder} {'is a file' if os.path.exists(folder) else 'does not exist'}, but it must be a folder: "
            "give a model folder, a run folder, or a folder of such folders."
        )
    yield from _found(folder, _DEPTH)


def _found(folder: Path, depth: int) -> Iterator[FolderSummary]:
    inside = []
    try:
        kind = _kind(folder)
        if not kind and depth:
            inside = sorted(
                path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
            )
    except OSError as error:
        yield FolderSummary(folder, "folder", trouble=_unreadable(error))
        return
    if kind:
        yield _summary(folder, kind)
    for path in inside:
        yield from _found(path, depth - 1)


def _kind(folder: Path) -> str:
    """Return the kind of model in a folder, or "" if there is no model."""
    if run_folder.is_run(folder):
        return "run"
    if (folder / adapter_folder.CONFIG).is_file():
        return "adapters"
    if model_folder.find(folder) is None:
        return ""
    try:
        return "Hugging Face" if model_folder.is_foreign(folder) else "model"
    except CheckpointError:
        return "model"


def _summary(folder: Path, kind: str) -> FolderSummary:
    try:
        return _READERS[kind](folder)
    except SctError as error:
        return FolderSummary(folder, kind, trouble=str(error))
    except OSError as error:
        return FolderSummary(folder, kind, trouble=_unreadable(error))


def _unreadable(error: OSError) -> str:
    return f"cannot be read ({error.strerror or first_line(error)}): check the permissions of the folder."


def _run(folder: Path) -> FolderSummary:
    step = run_folder.best_step(folder)
    family = str(run_folder.read(folder / run_folder.CONFIG).get("family", ""))
    return FolderSummary(
        folder, "run", family, run_folder.parameters(folder, step), _genes(folder / run_folder.GENES), step
    )


def _model(folder: Path) -> FolderSummary:
    config = model_folder.read_config(folder)
    with FolderReader(folder) as reader:
        size = _size(reader.shapes)
    return FolderSummary(
        folder, "model", config["family"], size, _genes(folder / model_folder.GENES), config.get("step")
    )


def _foreign(folder: Path) -> FolderSummary:
    kind = str(model_folder.read_json(folder / model_folder.CONFIG).get("model_type", ""))
    stored = [folder / name for name in (model_folder.WEIGHTS, model_folder.INDEX)]
    if not any(
        file.is_file() for file in stored
    ):  # the older format of PyTorch, which must be read as a whole
        return FolderSummary(folder, "Hugging Face", kind)
    with FolderReader(folder) as reader:
        return FolderSummary(folder, "Hugging Face", kind, _size(reader.shapes))


def _adapters(folder: Path) -> FolderSummary:
    config = model_folder.read_json(folder / adapter_folder.CONFIG)
    with FolderReader(folder, adapter_folder.WEIGHTS) as reader:
        return FolderSummary(folder, "adapters", str(config.get("family", "")), _size(reader.shapes))


_READERS = {"run": _run, "model": _model, "Hugging Face": _foreign, "adapters": _adapters}


def _genes(file: Path) -> int | None:
    return len(GeneVocabulary.load(file)) if file.is_file() else None


def _size(shapes: Mapping[str, Any]) -> int:
    return sum(math.prod(each.shape) for each in shapes.values())
