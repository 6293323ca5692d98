"""Train and use long-context single-cell foundation models in JAX.

`import sct` is fast, because this statement does not import JAX or scanpy. Submodules and classes (`sct.datasets`,
`sct.GeneVocabulary`, `sct.Store`, ...) are imported at their first use.
"""

from __future__ import annotations

import importlib
from typing import Any

from sct.version import __version__

# `sct.models` is the package of architectures and, when it is called, the list of models (sct/models/__init__.py).
_MODULES = {
    "datasets": "sct.data.datasets", "models": "sct.models", "pp": "sct.pp", "tl": "sct.tl", "pl": "sct.pl",
}  # fmt: skip
_NAMES = {
    "GeneVocabulary": "sct.data.genes.vocabulary",
    "Store": "sct.data.store",
    "load": "sct.weights.load",
    "export": "sct.result_tables",
    "SctError": "sct.errors",
    "settings": "sct.global_settings",
}

__all__ = ["__version__", *_MODULES, *_NAMES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'sct' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
