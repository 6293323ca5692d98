"""Define the model architectures as Flax modules. `sct.models.registry` lists them by name.

`sct.models()` lists the models that are ready to load, see `sct.weights.catalog.models`.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    import pandas as pd


class _Models(ModuleType):
    """Package that can be called, because importing a submodule replaces any function with the name `sct.models`."""

    def __call__(self) -> pd.DataFrame:
        """List the models that are ready to load; see `sct.weights.catalog.models`."""
        # By name: architectures import no weights, and only this call needs them.
        return cast("pd.DataFrame", importlib.import_module("sct.weights.catalog").models())


sys.modules[__name__].__class__ = _Models
