"""`sct.tl.spatial_neighbors`: find the nearest cells of each cell."""

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
    """Find the spatial bag of each cell: the cell and its nearest neighbors (sCT paper, appendix A).

    Spatial training and `sct.tl.embed(..., context="neighbors")` use the same bags.

    Parameters
    ----------
    adata
        Cells with positions `obsm[spatial_key]` (N, 2), in any unit.
    cells_per_bag
        Number of cells in a bag (K), including the cell itself.
    spatial_key
        Key of the spatial positions in `obsm`.
    batch_key
        Column of `obs` with the slide of each cell. Neighbors always come from the same slide.
    key_added
        Prefix of the results. `obsm[key_added]`, int64 (N, K): row numbers of `adata`, first the cell itself and then
        its neighbors by increasing distance. If a slide has fewer than K cells, the remaining entries are -1.
        `obs[key_added + "_radius"]`: distance to the farthest neighbor, in the unit of the positions. `uns[key_added]`:
        the parameters.
    copy
        If True, return a modified copy and leave `adata` unchanged.

    Raises
    ------
    DataError
        A key or column does not exist, or a position is missing.
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
