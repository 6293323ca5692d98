"""Preprocess cells: each function returns a new AnnData and leaves its input unchanged."""

from __future__ import annotations

import importlib
from typing import Any

_FUNCTIONS = {"spatial_scale": "sct.pp.spatial", "to_orthologues": "sct.pp.orthologues"}

__all__ = ["spatial_scale", "to_orthologues"]


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    raise AttributeError(f"module 'sct.pp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
