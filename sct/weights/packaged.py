"""Find the models that come with the package by their names.

Each sub-folder of `FOLDER` is a model folder. Its name is the name of the model. This module imports neither JAX nor
the reader of model folders, because commands use it to define their flags.
"""

from __future__ import annotations

import os
from pathlib import Path

from sct.checks import nearest
from sct.version import DISTRIBUTION

FOLDER = Path(__file__).resolve().parents[1] / "packaged_models"
DEFAULT = "sct-mini"  # the model that `sct embed` uses without --model


def names() -> list[str]:
    """Return the names of the packaged models, sorted. The list is empty if this installation has none."""
    if not FOLDER.is_dir():
        return []
    return sorted(path.name for path in FOLDER.iterdir() if path.is_dir() and path.name[0] not in "._")


def find(name: str | os.PathLike[str]) -> Path | None:
    """Return the folder of a packaged model, or None. Only a string can be a name; a path object is a path."""
    return FOLDER / name if isinstance(name, str) and name in names() else None


def has_default() -> bool:
    """Return whether the default model is among the packaged models."""
    return DEFAULT in names()


def not_found(name: str | os.PathLike[str]) -> str:
    """Return the part of an error message that says that no packaged model has a name; "" for what can be no name."""
    if not isinstance(name, str) or os.path.basename(name) != name:
        return ""
    known = names()
    if not known:
        return f", and this installation of {DISTRIBUTION} has no packaged models"
    near = nearest(name, known)
    meant = f"; did you mean {near[0]!r}?" if near else ""
    return f", and no packaged model has this name (there are: {', '.join(known)}{meant})"
