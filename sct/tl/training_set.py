"""`sct.tl.in_training_set`: find out which cells a model was trained on."""

from __future__ import annotations

from typing import Literal

import anndata as ad
import numpy as np
import pandas as pd

from sct import messages
from sct.data.cells import CellCounts
from sct.errors import ConfigError
from sct.inference import inputs

_BLOCK = 4096  # cells that are read at once


def in_training_set(
    adata: ad.AnnData,
    model: inputs.ModelLike,
    *,
    layer: str | None = None,
    gene_column: str | None = None,
    duplicates: Literal["error", "sum"] = "error",
) -> pd.Series:
    """Return which cells of an AnnData were in the training set of a model.

    Cells are recognized by hashes of their raw counts, which the model folder holds. A hash covers the counts of up to
    64 genes that most training cells express. There are up to four such groups of genes, and a cell is recognized if
    its counts in one group are those of a training cell. The names of cells, the order of genes, further genes, and
    missing genes that are in none of the groups make no difference.

    The result is NA if it cannot be decided: the file lacks genes of all groups (for example because it was reduced to
    highly variable genes), or the cell expresses fewer than 20 genes of each complete group.

    A training cell is not recognized, so that the result is False, if its counts were changed: by a correction
    of ambient RNA, by downsampling, or by another alignment or gene annotation. Two different cells with the same
    counts of a group cannot be told apart; this is rare, because a group has about 40 expressed genes in a cell of
    usual depth. Cells of validation and test studies are not part of the training set. Cells that only a parent model
    was trained on (`init_from`), cells of a later fine-tuning, and cells of training studies without raw counts are not
    known; each of these gives a warning.

    Parameters
    ----------
    adata
        Raw counts (N, n_var), in memory or backed.
    model
        Result of `sct.load`, a path or a Hub id.
    layer, gene_column, duplicates
        See `sct.tl.embed`.

    Returns
    -------
    Column with the index `adata.obs_names` and the dtype "boolean": True, False or NA for each cell.

    Raises
    ------
    ConfigError
        The model folder has no hashes of the training cells.
    DataError
        The data has no raw counts or too few genes of the model.

    Warns
    -----
    UserWarning
        No cell can be decided, or the model was also trained on cells that are not known.
    """
    inputs.check_table(adata, False)
    handle = inputs.load_model(model)
    known = handle.training_cells
    if known is None:
        raise ConfigError(
            f"{handle!r} has no hashes of its training cells, so it is not known which cells it was trained on: "
            "compare your study with the training data on the model card (in your own training, set "
            "export.training_cells to at least the number of training cells)."
        )
    cells = CellCounts(adata, handle.vocabulary, layer=layer, gene_column=gene_column, duplicates=duplicates)
    parts = []
    for start in range(0, cells.n_cells, _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, cells.n_cells))
        parts.append(pd.Series(known.contains(cells.read(rows), cells.measured, handle.vocabulary)))
    found = pd.concat(parts, ignore_index=True)
    found.index, found.name = adata.obs_names, "in_training_set"
    if found.isna().all():
        messages.warn(
            "the file lacks genes (or counts) by which training cells are recognized, so that no cell can be decided: "
            "use the file with all genes."
        )
    if without := known.info.get("without_counts"):
        messages.warn(
            f"training studies without raw counts have no hashes ({', '.join(without[:5])}"
            f"{', ...' * (len(without) > 5)}), so False does not mean unseen for their cells: check whether "
            "your cells are of one of these studies."
        )
    if known.info.get("tuned"):
        messages.warn(
            "the model was fine-tuned later on cells that are not known here: compare with the data of the "
            "fine-tuning, which its report names."
        )
    if known.info.get("init_from"):
        messages.warn(
            f"the training started from the model {known.info['init_from']}, whose own training cells are not known "
            "here: check them with that model, too."
        )
    return found
