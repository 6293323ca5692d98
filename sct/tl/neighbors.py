"""`sct.tl.spatial_neighbors`."""

from __future__ import annotations

import anndata as ad
import numpy as np

from sct.checks import check_at_least
from sct.data.bag_order import CELLS_PER_BAG, neighbors
from sct.inference import inputs
from sct.version import __version__


def spatial_neighbors(
    adata: ad.AnnData,
    *,
    cells_per_bag: int = CELLS_PER_BAG,
    spatial_key: str = "spatial",
    batch_key: str | None = None,
    key_added: str = "sct_neighbors",
    copy: bool = False,
) -> ad.AnnData | None:
    """Make the bag of each cell from positions: itself and its nearest neighbours (sCT paper, appendix A).

    These are the bags that spatial training draws and that `sct.tl.embed(..., context="neighbors")` uses.

    Parameters
    ----------
    adata
        Cells with positions `obsm[spatial_key]` (N, 2), in any unit.
    cells_per_bag
        K, the cell included.
    spatial_key
        Key of the positions.
    batch_key
        Column of `obs` that names the slide: neighbours are of the same slide.
    key_added
        `obsm[key_added]`, int64 (N, K): rows of `adata`, the cell first and then by distance, -1 where a slide
        has fewer than K cells; `obs[key_added + "_radius"]`, the distance to the farthest of them in the unit
        of the positions; `uns[key_added]`: the parameters.
    copy
        Return a changed copy, and leave `adata` as it is.

    Raises
    ------
    DataError
        No such key or column, a position that is missing.
    """
    inputs.check_table(adata, copy)
    check_at_least("cells_per_bag", cells_per_bag, 1)
    found = np.full((adata.n_obs, cells_per_bag), -1, np.int64)
    radius = np.zeros(adata.n_obs, np.float32)
    sections = inputs.sections(adata, batch_key, spatial_key)
    for section in sections:
        rows = section.rows
        assert section.places is not None
        near = neighbors(section.places, cells_per_bag)
        places = np.asarray(adata.obsm[spatial_key], np.float64)[rows]
        found[rows, : near.shape[1]] = rows[near]
        radius[rows] = np.linalg.norm(places[near[:, -1]] - places, axis=1)
    target = inputs.output_adata(adata, copy)
    inputs.keep_scales(target, sections, batch_key, spatial_key)
    target.obsm[key_added] = found
    target.obs[f"{key_added}_radius"] = radius
    target.uns[key_added] = {
        "sct_version": __version__,
        "cells_per_bag": cells_per_bag,
        "spatial_key": spatial_key,
        "batch_key": batch_key or "",
    }
    return target if copy else None
