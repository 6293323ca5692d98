"""`sct.pp.spatial_scale`."""

from __future__ import annotations

import anndata as ad

from sct.data.coordinates import SPATIAL_KEY
from sct.inference import inputs


def spatial_scale(
    adata: ad.AnnData, *, spatial_key: str = SPATIAL_KEY, batch_key: str | None = None
) -> ad.AnnData:
    """Keep the scale of each section, so that parts of it lie as they do in the whole.

    A model reads positions that are rescaled by section. Call this before cells are left out or a section is divided
    into query and reference: the positions of a part alone would be spread over the range of the whole.
    `sct.tl.embed`, `impute` and `spatial_neighbors` keep the scale of what they are given as well.

    Parameters
    ----------
    adata
        All cells of the sections, with positions `obsm[spatial_key]` (N, 2) in any unit.
    spatial_key
        Key of the positions.
    batch_key
        Column of `obs` that names the section; the same as in later calls.

    Returns
    -------
    A copy with `uns["sct_sections"][spatial_key]`: `batch_key`, and for each section its name, the number of its
    cells, the box around them (`low`, `high`), and `origin` and `factor`; a model reads (position - origin) * factor.
    It is used for cells that lie in the box, and computed anew for others.

    Raises
    ------
    DataError
        No such key or column, a position that is missing.
    """
    inputs.check_table(adata, True)
    sections = inputs.sections(adata, batch_key, spatial_key)
    result = adata.copy()
    inputs.keep_scales(result, sections, batch_key, spatial_key)
    return result
