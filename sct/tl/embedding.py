"""`sct.tl.embed`."""

from __future__ import annotations

from typing import Literal

import anndata as ad
import numpy as np

from sct.data.cells import Cells
from sct.tl import running


def embed(
    adata: ad.AnnData,
    model: running.Model,
    *,
    layer: str | None = None,
    key_added: str = "X_sct",
    batch_key: str | None = None,
    spatial_key: str | None = None,
    context: str = "tiles",
    cells_per_bag: int | None = None,
    batch_size: int | None = None,
    gene_column: str | None = None,
    duplicates: Literal["error", "sum"] = "error",
    seed: int = 0,
    copy: bool = False,
) -> ad.AnnData | None:
    """Embed cells without training: the mean of a cell's transformer positions (sCT paper, section 4).

    sCT reads a cell among others, so an embedding is a function of the cell's bag. Bags are made by a rule:
    the cells of a batch (all cells, without `batch_key`), in their order in windows of 10,000, are dealt at
    random by `seed` to bags of `cells_per_bag`; with `spatial_key` a section is cut into compact tiles of that
    many cells instead. The last bag is filled up with the first cells. So the result depends on the cells
    that are given, their order and the seed, and not on `batch_size`, the devices, or whether `adata` is
    backed (up to rounding); the same call gives the same bytes.

    Parameters
    ----------
    adata
        Raw counts (N, n_var), in memory or backed. X is never changed.
    model
        Of `sct.load`, or its path.
    layer
        Where the raw counts are; by default the first of X, raw and layers["counts"] that holds them.
    key_added
        The embedding is written to `obsm[key_added]`, float32 (N, D), and the parameters to `uns[key_added]`.
    batch_key
        Column of `obs`: cells share a bag only within a batch (a donor, a slide).
    spatial_key
        Key of positions in `obsm`. A model trained on coordinates reads them; any model is given neighbours.
    context
        With `spatial_key`: "tiles", or "neighbors" for a bag of its own for each cell, which is first in it and
        has its nearest cells beside it, as in training; `cells_per_bag` times the work.
    cells_per_bag
        K; by default that of training.
    batch_size
        Bags at once; by default about a million gene tokens per device.
    gene_column, duplicates
        See `sct.GeneVocabulary.align`.
    seed
        Of the bags.
    copy
        Return a changed copy, and leave `adata` as it is.

    Raises
    ------
    DataError
        No raw counts, unknown genes, cells without a count, a missing column or key.
    CheckpointError
        What the model computes is not finite; nothing is written then.
    """
    running.check_table(adata, copy)
    handle = running.opened(model)
    size = running.bag_size(handle, cells_per_bag)
    running.check_seed(seed)
    parts = running.sections(adata, batch_key, spatial_key)
    orders = [running.order_of(part, size, seed, context) for part in parts]
    cells = Cells(
        adata, handle.vocabulary, parts, layer=layer, gene_column=gene_column, duplicates=duplicates
    )
    running.check_not_empty(cells)
    runner = running.Runner(handle, batch_size)
    embedding = np.zeros((adata.n_obs, handle.config.embed_dim), np.float32)
    for one in runner(cells, orders, ("cell_embedding",), "embedding cells"):
        embedding[one.rows[one.counted]] = one.outputs["cell_embedding"][one.counted]
    target = running.to_write(adata, copy)
    target.obsm[key_added] = embedding
    running.keep_scales(target, parts, batch_key, spatial_key)
    target.uns[key_added] = running.record(
        handle, cells, cells_per_bag=size, batch_key=batch_key, spatial_key=spatial_key,
        context=context if spatial_key is not None else "random", seed=seed,
    )  # fmt: skip
    return target if copy else None
