"""Flags that the commands for an .h5ad file share: which cells, which model, how bags are made."""

from __future__ import annotations

from typing import Any

from absl import flags

INPUT = flags.DEFINE_string("input", None, ".h5ad file or .zarr folder with raw counts.", required=True)
OUTPUT = flags.DEFINE_string("output", None, ".h5ad file to write.", required=True)
MODEL: flags.FlagHolder[Any] = flags.DEFINE_string("model", None, "Model folder, run folder or hub id.")
_LAYER = flags.DEFINE_string("layer", None, "Layer with the raw counts; found by default.")
_BATCH = flags.DEFINE_string("batch_key", None, "Column of obs within which cells share a bag.")
_SPATIAL = flags.DEFINE_string("spatial_key", None, "Key of positions in obsm: neighbours share a bag.")
_CELLS = flags.DEFINE_integer("cells_per_bag", None, "Cells read together; as in training by default.")
_SIZE = flags.DEFINE_integer("batch_size", None, "Bags computed at once; by default what fits well.")
_COLUMN = flags.DEFINE_string(
    "gene_column", None, "Column of var with gene ids or symbols; found by default."
)
_DUPLICATES = flags.DEFINE_enum("duplicates", "error", ["error", "sum"], "Several columns of one gene.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the bags.")


def options() -> dict[str, Any]:
    """What the flags say of counts, genes and bags, as the functions of `sct.tl` take it."""
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
