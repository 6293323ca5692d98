"""Plot an AnnData or the results of a benchmark, with the conventions of scanpy.

Each function draws, returns the Matplotlib axes and changes no data. `save="figure.png"` also writes a file. To compute
what is drawn, use `sct.tl` and scanpy: `sct.tl.embed`, `sc.pp.neighbors(adata, use_rep="X_sct")`, `sc.tl.umap`.
"""

from __future__ import annotations

import importlib
from typing import Any

_FUNCTIONS = {
    "umap": "sct.pl.embedding",
    "imputation_confusion": "sct.pl.imputation",
    "mcc_by_ratio": "sct.pl.imputation",
    "reliability": "sct.pl.imputation",
    "spatial": "sct.pl.maps",
}

__all__ = [*_FUNCTIONS]


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    raise AttributeError(f"module 'sct.pl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
