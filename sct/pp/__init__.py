"""Preprocess cells: each function returns a new AnnData and leaves its input unchanged."""

from __future__ import annotations

import importlib
from typing import Any

_FUNCTIONS = {"spatial_scale": "sct.pp.spatial", "to_orthologs": "sct.pp.orthologs"}

__all__ = ["spatial_scale", "to_orthologs"]


# Former name -> current name, until release 0.2.0.
_FORMER = {"to_orthologues": "to_orthologs"}


def __getattr__(name: str) -> Any:
    if name in _FORMER:
        from sct import messages

        new = _FORMER[name]
        messages.warn(f"sct.pp.{name} was renamed to sct.pp.{new}: use the new name.", FutureWarning)
        name = new
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    raise AttributeError(f"module 'sct.pp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
