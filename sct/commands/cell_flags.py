"""Define the flags that all commands for .h5ad files share: the cells, and how bags are formed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from absl import flags

from sct.commands import output_flags

# Modules with the flags of every command that applies a model to the cells of a file.
WITH_MODEL = (
    "sct.commands.cell_flags",
    "sct.commands.model_flags",
    "sct.commands.output_flags",
    "sct.commands.device_flag",
)

INPUT = flags.DEFINE_string(
    "input", None, "Cells to read: an .h5ad file or a .zarr folder with raw counts.", required=True
)
OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "File to write: .h5ad, or a table of the results alone (.csv, .tsv or .parquet).",
    required=True,
)
_LAYER = flags.DEFINE_string(
    "layer", None, "Where the raw counts are: X, raw or a layer. Default: the first that holds raw counts."
)
_BATCH = flags.DEFINE_string(
    "batch_key", None, "Column of obs, such as the sample; a bag holds only cells with the same value."
)
_SPATIAL = flags.DEFINE_string(
    "spatial_key",
    None,
    "Key of spatial coordinates in obsm; a bag then holds cells that are close to each other.",
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
    "If several columns belong to one gene: stop with an error, or sum them.",
)
_SEED = flags.DEFINE_integer("seed", 0, "Random seed: the same seed gives the same bags.")


def checked_output() -> Path:
    """Check the path in --output before the computation, and return the path; see `tables.check_output`."""
    from sct.commands import tables

    return tables.check_output(OUTPUT.value, INPUT.value, output_flags.OVERWRITE.value)


def options() -> dict[str, Any]:
    """Return the values of the flags for counts, genes and bags, as keyword arguments for functions of `sct.tl`."""
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
    """Return a list with the key of `uns` that holds the coordinate scale of each tissue section.

    If `uns` has no such key, the list is empty.
    """
    from sct.data.coordinates import SCALES

    return [SCALES] if SCALES in adata.uns else []


def given() -> dict[str, Any]:
    """Return only those entries of `options` whose flags were set on the command line."""
    flag = flags.FLAGS
    return {name: value for name, value in options().items() if flag[name].present}
