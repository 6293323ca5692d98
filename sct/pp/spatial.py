"""`sct.pp.spatial_scale`: store how the spatial positions of each tissue section are rescaled."""

from __future__ import annotations

import anndata as ad

from sct.data.coordinates import SPATIAL_KEY
from sct.inference import inputs


def spatial_scale(
    adata: ad.AnnData, *, spatial_key: str = SPATIAL_KEY, batch_key: str | None = None
) -> ad.AnnData:
    """Store how the positions of each tissue section are rescaled, so that subsets of a section keep this scale.

    Models read positions that are rescaled separately for each section. Call this function before you remove cells or
    split a section into query and reference. Otherwise the positions of a subset are stretched until they cover the
    range of the whole section. `sct.tl.embed`, `impute` and `spatial_neighbors` also store the scale of their input.

    Parameters
    ----------
    adata
        All cells of the sections, with positions `obsm[spatial_key]` (N, 2) in any unit.
    spatial_key
        Key of the spatial positions in `obsm`.
    batch_key
        Column of `obs` with the tissue section of each cell. Use the same column in later calls.

    Returns
    -------
    A copy with `uns["sct_sections"][spatial_key]`: `batch_key`, and for each section its name, number of cells,
    bounding box (`low`, `high`), `origin` and `factor`. Models read (position - origin) * factor. The stored scale is
    used for cells inside the bounding box; for other cells a new scale is computed.

    Raises
    ------
    DataError
        A key or column does not exist, or a position is missing.
    """
    inputs.check_table(adata, True)
    sections = inputs.sections(adata, batch_key, spatial_key)
    result = adata.copy()
    inputs.keep_scales(result, sections, batch_key, spatial_key)
    return result
