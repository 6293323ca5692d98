"""Plot spatial maps of the imputed and the observed expression of a gene."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.spatial import cKDTree

from sct.checks import check_not_empty, check_one_each
from sct.data.counts import TOLERANCE
from sct.errors import DataError
from sct.pl import style
from sct.pl.values import dense, gene_values, near, positions

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

# sct.tl.impute appends these suffixes to key_added.
EXPECTED, LEVEL = "_expected", "_level"


def spatial(
    adata: AnnData,
    gene: str,
    *,
    layer: str = "sct_expected",
    spatial_key: str = "spatial",
    compare: bool = True,
    ax: Axes | Sequence[Axes] | None = None,
) -> Any:
    """Plot the imputed and the observed expression of a gene side by side, on the same color scale.

    Imputed values come from `layers[layer]`. For a gene that the panel lacks, they come from the column with the name
    of the gene in the table `obsm[layer]`. The parameters in `uns` that `sct.tl.impute` wrote show which genes and
    cells were imputed, and where the observed counts are. If another tool wrote the layer, all its values are shown,
    the title names the layer, and the observed values come from X.

    Cells without an imputed value are gray, and the title shows how many cells have one. The width of a spot is the
    median distance to the nearest neighbor. The color scale ends at the 99.5th percentile of all values; an arrow on
    the color bar marks higher values. Plot one slide at a time.

    Parameters
    ----------
    adata
        Cells or spots (N, G) of one slide.
    gene
        Name of the gene.
    layer
        Key of the imputed values: expected raw counts or, with `compare=False`, levels ("sct_level").
    spatial_key
        Key of the coordinates (N, 2) in `obsm`. The y axis points down, as in images.
    compare
        If True, also plot the observed values. For a gene that the panel lacks, the second map shows gray spots.
    ax
        Axes to draw in (two with `compare`); None for a new figure.

    Returns
    -------
    The axes. With `compare`, an array (2,) of axes: imputed and observed.

    Raises
    ------
    DataError
        The coordinates, layer or gene do not exist, the gene was not imputed, the observed counts have been moved or
        changed since the imputation, levels are compared with counts, or the number of axes is wrong.
    MissingExtraError
        Matplotlib is not installed.
    """
    places = positions(adata, spatial_key, width=2)
    check_not_empty("the list of cells in adata", places, error=DataError)
    record = _record(adata, layer)
    levels = record is not None and layer.endswith(LEVEL)
    maps = [("imputed", _imputed(adata, gene, layer, record))]
    if compare:
        if levels:
            raise DataError(
                f"{layer!r} has levels, but the observed values are raw counts, so they cannot share a color scale: "
                "set compare=False."
            )
        maps.append(("observed", _observed(adata, gene, record)))

    if ax is None:
        spread = np.ptp(places, axis=0)
        height = float(np.clip(4.2 * (spread[1] or 1) / (spread[0] or 1), 2.8, 7))
        axes = np.atleast_1d(style.new_axes(4.2 * len(maps) + 0.9, height + 0.5, columns=len(maps)))
    else:
        axes = np.atleast_1d(np.asarray(ax, dtype=object)).ravel()
        check_one_each("axes", len(axes), f"maps (compare={compare})", len(maps))

    pooled = np.concatenate([values[np.isfinite(values)] for _, values in maps])
    low, high = min(float(pooled.min()), 0.0), float(np.quantile(pooled, 0.995))
    high = high if high > low else float(pooled.max())
    high = high if high > low else low + 1
    width = _spot_width(places)
    for one, (name, values) in zip(axes, maps, strict=True):
        drawn = _spots(one, places, values, width, (low, high))
        known = int(np.isfinite(values).sum())
        if name == "imputed":
            mappable = drawn
            name = layer if record is None else "imputed level" if levels else name
            name += f" in {known:,} of {len(places):,} cells" if known < len(places) else ""
        title = f"{gene}, {name}" if known else f"{gene}, not in the panel"
        one.set_title(title, parse_math=False, fontsize=11)
    label = "expression" if record is None else "level" if levels else "raw counts"
    style.color_bar(list(axes), mappable, label, "max" if pooled.max() > high else "neither")
    return axes if compare else axes[0]


def _record(adata: AnnData, layer: str) -> Mapping[str, Any] | None:
    """Return the parameters that `sct.tl.impute` wrote for a layer or table; None if another tool wrote its values."""
    for ending in (EXPECTED, LEVEL):
        record = adata.uns.get(layer.removesuffix(ending)) if layer.endswith(ending) else None
        if isinstance(record, Mapping) and {"genes", "cells", "counts_from"} <= record.keys():
            return record
    return None


def _names(record: Mapping[str, Any], field: str) -> list[str]:
    """Return a list of names from the imputation parameters; empty if the field is missing."""
    return [str(name) for name in np.ravel(np.asarray(record.get(field, ()), dtype=object)) if str(name)]


def _imputed(adata: AnnData, gene: str, layer: str, record: Mapping[str, Any] | None) -> np.ndarray:
    """Return the imputed values (N,) of a gene from a layer or obsm table; NaN for cells without an imputed value."""
    table = adata.obsm.get(layer)
    if layer not in adata.layers and table is None:
        raise DataError(
            f"neither layers nor obsm has {layer!r}: run sct.tl.impute first, or set layer to an existing key."
        )
    columns = list(adata.var_names) if layer in adata.layers else []
    if record is not None:
        columns = _imputed_columns(adata, record, columns)
    aside = list(table.columns) if isinstance(table, pd.DataFrame) else []
    if gene in columns:
        values = gene_values(adata, gene, layer).astype(float)
    elif isinstance(table, pd.DataFrame) and gene in aside:
        values = dense(table[gene].to_numpy()).astype(float)
    elif layer in adata.layers and gene in adata.var_names:
        raise DataError(
            f"the gene {gene!r} was not imputed, so {layer!r} has only its observed values: impute it with "
            f"sct.tl.impute(genes=...), or plot an imputed gene; {near(gene, [*columns, *aside])}"
        )
    else:
        raise DataError(
            f"{layer!r} has no imputed values of the gene {gene!r}: {near(gene, [*columns, *aside])}"
        )
    # The table can come from an earlier call that imputed other cells and left NaN in the rest.
    if record is not None and (gene in columns or gene in _names(record, "genes")):
        cells = _names(record, "cells")
        if cells:
            values[~adata.obs_names.isin(cells)] = np.nan
    if not np.isfinite(values).any():
        raise DataError(
            f"{layer!r} has no imputed value of the gene {gene!r} in these {len(values):,} cells: impute "
            "the gene with sct.tl.impute(genes=...)."
        )
    return values


def _imputed_columns(adata: AnnData, record: Mapping[str, Any], columns: list[str]) -> list[str]:
    """Return the columns of a layer that were imputed; the other columns have observed values."""
    given = _names(record, "genes")
    inside = set(_names(record, "var_names"))
    if "var_names" in record and (inside or given):
        return [name for name in columns if name in inside]
    if not (given and columns):
        return columns  # whole cells were imputed, or there is no layer
    # Users name genes as in var_names or as in any column of var.
    named = adata.var_names.isin(given)
    for column in adata.var.columns:
        named |= adata.var[column].astype(str).isin(given).to_numpy()
    return [name for name, one in zip(columns, named, strict=True) if one]


def _observed(adata: AnnData, gene: str, record: Mapping[str, Any] | None) -> np.ndarray:
    """Return the observed values (N,) of a gene from the counts that the imputation read; NaN if unmeasured."""
    place = "X" if record is None else str(record["counts_from"])
    raw, layer = place == "raw.X", None
    if place.startswith('layers["'):
        layer = place.removeprefix('layers["').removesuffix('"]')
    gone = adata.raw is None if raw else adata.X is None if layer is None else layer not in adata.layers
    if gone:
        raise DataError(
            f"the imputation read the observed counts from {place}, but adata no longer has {place}: "
            "restore the counts there, or set compare=False."
        )
    var = adata.raw.var if raw else adata.var
    name = _row_name(var, gene)
    if name is None:
        return np.full(adata.n_obs, np.nan)
    values = dense(adata.raw[:, [name]].X) if raw else gene_values(adata, name, layer)
    values = values.astype(float)
    if record is not None and ((values < 0) | (np.abs(values - np.rint(values)) > TOLERANCE)).any():
        raise DataError(
            f"{place} had raw counts at the time of the imputation, but its values of {gene!r} are not raw counts now: "
            "restore the counts, or set compare=False."
        )
    return values


def _row_name(var: pd.DataFrame, gene: str) -> str | None:
    """Find a gene by its var_name or by a value in any column of var, and return its var_name; None if it is absent."""
    if gene in var.index:
        found = var.index[var.index == gene]
    else:
        named = np.zeros(len(var), bool)
        for column in var.columns:
            named |= (var[column].astype(str) == gene).to_numpy()
        found = var.index[named]
    if len(found) > 1:
        raise DataError(
            f"`var` has the gene {gene!r} {len(found)} times, so its observed values are ambiguous: keep "
            "one of these columns, or set compare=False."
        )
    return str(found[0]) if len(found) else None


def _spot_width(places: np.ndarray) -> float:
    """Return the median distance to the nearest other spot, or 1/50 of the slide if all spots coincide."""
    unique = np.unique(places, axis=0)
    if len(unique) < 2:
        return float(np.ptp(places, axis=0).max() / 50) or 1.0
    distance, _ = cKDTree(unique).query(unique, k=2)
    return float(np.median(distance[:, 1]))


def _spots(
    ax: Axes, places: np.ndarray, values: np.ndarray, width: float, limits: tuple[float, float]
) -> Any:
    """Draw spots whose width is in the unit of the coordinates. Spots without a value are gray and below the others."""
    from matplotlib.collections import EllipseCollection

    known = np.isfinite(values)
    drawn = None
    for chosen in (~known, known):
        n = int(chosen.sum())
        drawn = EllipseCollection(
            np.full(n, width),
            np.full(n, width),
            np.zeros(n),
            units="xy",
            offsets=places[chosen],
            offset_transform=ax.transData,
            linewidths=0,
            facecolors=style.GRAY,
            # In a vector file, each spot takes about half a kilobyte.
            rasterized=n > 500,
        )
        if chosen is known:
            drawn.set_array(values[known])
            drawn.set_cmap(style.CONTINUOUS)
            drawn.set_clim(*limits)
        if n:
            ax.add_collection(drawn)
    low, high = places.min(axis=0) - width, places.max(axis=0) + width
    ax.set(xlim=(low[0], high[0]), ylim=(high[1], low[1]), aspect="equal")
    style.bare(ax)
    return drawn
