"""Maps of a gene's expression in the plane of a slide: imputed beside observed."""

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

# Endings of the layers and tables that sct.tl.impute writes, after the name of its record in uns.
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
    """Map of a gene's imputed expression, beside the observed one, on the same colour scale.

    The imputed values are those of `layers[layer]`, or, for a gene that the panel lacks, of the column of that
    name in the table `obsm[layer]`. What `sct.tl.impute` wrote into `uns` says which genes and cells of the
    layer were imputed, since it holds raw counts elsewhere, and where the observed counts are. Of a layer of
    another origin, named in the title, every value is shown, and the observed values are those of X.

    Cells without an imputed value are grey, and the title then says how many have one. Spots are as wide as
    the median distance to the nearest neighbour. The scale ends at the 99.5th percentile of all values shown,
    with an arrow on the colour bar where values lie above. Show one slide at a time.

    Parameters
    ----------
    adata
        Annotated cells or spots (N, G) of one slide.
    gene
        Name of the gene.
    layer
        Where the imputed values are: expected raw counts, or with `compare=False` levels ("sct_level").
    spatial_key
        Name of the coordinates (N, 2) in `obsm`; y grows downwards, as in images.
    compare
        Draw the observed values, too. For a gene that the panel lacks the second map shows the empty spots.
    ax
        Axes to draw in, two of them with `compare`; None for a new figure.

    Returns
    -------
    The axes; with `compare` an array (2,) of them, imputed and observed.

    Raises
    ------
    DataError
        Coordinates, layer or gene are not there, the gene was not imputed, the observed raw counts are not where
        they were when it was, levels are compared with counts, or `ax` holds another number of axes.
    MissingExtraError
        Matplotlib is not installed.
    """
    places = positions(adata, spatial_key, width=2)
    check_not_empty("the list of cells to draw", places, error=DataError)
    record = _record(adata, layer)
    levels = record is not None and layer.endswith(LEVEL)
    maps = [("imputed", _imputed(adata, gene, layer, record))]
    if compare:
        if levels:
            raise DataError(
                f"{layer!r} holds levels and the observed values are raw counts, which no one scale shows: draw it "
                "with compare=False."
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
    """What `sct.tl.impute` wrote about a layer or table, None where it is of another origin."""
    for ending in (EXPECTED, LEVEL):
        record = adata.uns.get(layer.removesuffix(ending)) if layer.endswith(ending) else None
        if isinstance(record, Mapping) and {"genes", "cells", "counts_from"} <= record.keys():
            return record
    return None


def _names(record: Mapping[str, Any], field: str) -> list[str]:
    """A list of names of a record, empty where it is not there."""
    return [str(name) for name in np.ravel(np.asarray(record.get(field, ()), dtype=object)) if str(name)]


def _imputed(adata: AnnData, gene: str, layer: str, record: Mapping[str, Any] | None) -> np.ndarray:
    """Imputed values (N,) of a gene, of the layer, else of the table in obsm; NaN where not imputed."""
    table = adata.obsm.get(layer)
    if layer not in adata.layers and table is None:
        raise DataError(
            f"neither layers nor obsm has {layer!r}: impute first, with sct.tl.impute, or name another layer."
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
            f"the gene {gene!r} was not imputed, and {layer!r} holds only its observed values: impute it with "
            f"sct.tl.impute(genes=...), or draw one that was; {near(gene, [*columns, *aside])}"
        )
    else:
        raise DataError(
            f"{layer!r} has no imputed values of the gene {gene!r}: {near(gene, [*columns, *aside])}"
        )
    # A table may stay from an earlier call, which imputed other cells and left NaN in the rest.
    if record is not None and (gene in columns or gene in _names(record, "genes")):
        cells = _names(record, "cells")
        if cells:
            values[~adata.obs_names.isin(cells)] = np.nan
    if not np.isfinite(values).any():
        raise DataError(
            f"{layer!r} holds no number for the gene {gene!r} that was imputed in one of these {len(values):,} cells: "
            "impute it first, with sct.tl.impute(genes=...)."
        )
    return values


def _imputed_columns(adata: AnnData, record: Mapping[str, Any], columns: list[str]) -> list[str]:
    """Those of the columns of a layer that were imputed; the others hold what was observed."""
    given = _names(record, "genes")
    inside = set(_names(record, "var_names"))
    if "var_names" in record and (inside or given):
        return [name for name in columns if name in inside]
    if not (given and columns):
        return columns  # whole cells, or no layer
    # People name genes by what is in var_names or in any column of var.
    named = adata.var_names.isin(given)
    for column in adata.var.columns:
        named |= adata.var[column].astype(str).isin(given).to_numpy()
    return [name for name, one in zip(columns, named, strict=True) if one]


def _observed(adata: AnnData, gene: str, record: Mapping[str, Any] | None) -> np.ndarray:
    """Observed values (N,) of a gene, from where the imputation read its counts; NaN where not measured."""
    place = "X" if record is None else str(record["counts_from"])
    raw, layer = place == "raw.X", None
    if place.startswith('layers["'):
        layer = place.removeprefix('layers["').removesuffix('"]')
    gone = adata.raw is None if raw else adata.X is None if layer is None else layer not in adata.layers
    if gone:
        raise DataError(
            f"the observed values were in {place}, which is not there: put it back, or draw with compare=False."
        )
    var = adata.raw.var if raw else adata.var
    name = _row_name(var, gene)
    if name is None:
        return np.full(adata.n_obs, np.nan)
    values = dense(adata.raw[:, [name]].X) if raw else gene_values(adata, name, layer)
    values = values.astype(float)
    if record is not None and ((values < 0) | (np.abs(values - np.rint(values)) > TOLERANCE)).any():
        raise DataError(
            f"{place} held raw counts when genes were imputed and holds other values of {gene!r} now: put the counts "
            "back, or draw with compare=False."
        )
    return values


def _row_name(var: pd.DataFrame, gene: str) -> str | None:
    """The row of var that is a gene, by its name or by what another column calls it."""
    if gene in var.index:
        found = var.index[var.index == gene]
    else:
        named = np.zeros(len(var), bool)
        for column in var.columns:
            named |= (var[column].astype(str) == gene).to_numpy()
        found = var.index[named]
    if len(found) > 1:
        raise DataError(
            f"var has the gene {gene!r} {len(found)} times: leave one of them, or draw with compare=False."
        )
    return str(found[0]) if len(found) else None


def _spot_width(places: np.ndarray) -> float:
    """Median distance to the nearest other spot; a fiftieth of the slide where there is none."""
    unique = np.unique(places, axis=0)
    if len(unique) < 2:
        return float(np.ptp(places, axis=0).max() / 50) or 1.0
    distance, _ = cKDTree(unique).query(unique, k=2)
    return float(np.median(distance[:, 1]))


def _spots(
    ax: Axes, places: np.ndarray, values: np.ndarray, width: float, limits: tuple[float, float]
) -> Any:
    """Draw spots of a given width in the unit of the coordinates, the ones without a value grey and below."""
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
            # Each spot of a vector file has its own outline, of about half a kilobyte.
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
