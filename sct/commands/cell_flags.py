"""Flags that the commands for an .h5ad file share: which cells, which model, how bags are made."""

from __future__ import annotations

from typing import Any

from absl import flags

INPUT = flags.DEFINE_string(
    "input", None, "Cells to read: an .h5ad file or a .zarr folder with raw counts.", required=True
)
OUTPUT = flags.DEFINE_string("output", None, ".h5ad file to write.", required=True)
MODEL: flags.FlagHolder[Any] = flags.DEFINE_string(
    "model", None, "Model: a model folder, a run folder or a Hub id."
)
_LAYER = flags.DEFINE_string(
    "layer", None, "Where the raw counts are: X, raw or a layer. Default: the first that holds raw counts."
)
_BATCH = flags.DEFINE_string(
    "batch_key", None, "Column of obs, such as the sample; only cells of the same batch share a bag."
)
_SPATIAL = flags.DEFINE_string(
    "spatial_key", None, "Key of spatial coordinates in obsm; cells that are near each other share a bag."
)
_CELLS = flags.DEFINE_integer(
    "cells_per_bag", None, "Number of cells that the model reads together. Default: as in training.",
    lower_bound=1,
)  # fmt: skip
_SIZE = flags.DEFINE_integer(
    "batch_size", None, "Number of bags computed at once. Default: chosen for the model and device.",
    lower_bound=1,
)  # fmt: skip
_COLUMN = flags.DEFINE_string(
    "gene_column", None, "Column of var with Ensembl ids or gene symbols. Default: found automatically."
)
_DUPLICATES = flags.DEFINE_enum(
    "duplicates",
    "error",
    ["error", "sum"],
    "What to do with several columns of one gene: stop, or add them up.",
)
_SEED = flags.DEFINE_integer("seed", 0, "Random seed: the same seed gives the same bags.")


def options() -> dict[str, Any]:
    """Values of the flags for counts, genes and bags, as keyword arguments of the functions in `sct.tl`."""
    return {
        "layer": _LAYER.value,
        "batch_key": _BATCH.value,
        "spatial_key": _SPATIAL.value,
        "cells_per_bag": _CELLS.value,
        "batch_size": _SIZE.value,
        "gene_column": _COLUMN.value,
        "duplicates": _DUPLICATES.value,
        "seed": _SEED.value,
    }


def scales(adata: Any) -> list[str]:
    """Keys of `uns` under which sections keep the scale of their positions."""
    from sct.data.coordinates import SCALES

    return [SCALES] if SCALES in adata.uns else []


def given() -> dict[str, Any]:
    """Those of `options` that were set on the command line."""
    flag = flags.FLAGS
    return {name: value for name, value in options().items() if flag[name].present}
