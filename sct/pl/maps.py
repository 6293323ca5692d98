"""Maps of a gene's expression in the plane of a slide: imputed beside observed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.spatial import cKDTree

from sct.errors import DataError
from sct.pl import style
from sct.pl.values import dense, gene_values, near, positions

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes


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
    name in the table `obsm[layer]`; the observed ones are those of X. Spots are as wide as the median distance
    to the nearest neighbour. The scale ends at the 99.5th percentile of all values shown, with an arrow on the
    colour bar where values lie above. Cells without an imputed value are grey. Show one slide at a time.

    Parameters
    ----------
    adata
        Annotated cells or spots (N, G) of one slide.
    gene
        Name of the gene.
    layer
        Where the imputed values are, in the unit of X (expected raw counts).
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
        Coordinates, layer or gene are not there, the gene has no imputed value, or `ax` holds another number
        of axes.
    MissingExtraError
        Matplotlib is not installed.
    """
    places = positions(adata, spatial_key, width=2)
    if len(places) == 0:
        raise DataError("the data hold no cell: there is nothing to draw.")
    imputed = _imputed(adata, gene, layer)
    maps = [("imputed", imputed)]
    if compare:
        observed = gene_values(adata, gene) if gene in adata.var_names else np.full(len(places), np.nan)
        maps.append(("observed", observed.astype(float)))

    if ax is None:
        spread = np.ptp(places, axis=0)
        height = float(np.clip(4.2 * (spread[1] or 1) / (spread[0] or 1), 2.8, 7))
        axes = np.atleast_1d(style.new_axes(4.2 * len(maps) + 0.9, height + 0.5, columns=len(maps)))
    else:
        axes = np.atleast_1d(np.asarray(ax, dtype=object)).ravel()
        if len(axes) != len(maps):
            raise DataError(f"{len(axes)} axes were given and {len(maps)} are needed: compare={compare}.")

    pooled = np.concatenate([values[np.isfinite(values)] for _, values in maps])
    low, high = min(float(pooled.min()), 0.0), float(np.quantile(pooled, 0.995))
    high = high if high > low else float(pooled.max())
    high = high if high > low else low + 1
    width = _spot_width(places)
    for one, (name, values) in zip(axes, maps, strict=True):
        drawn = _spots(one, places, values, width, (low, high))
        title = f"{gene}, {name}" if np.isfinite(values).any() else f"{gene}, not in the panel"
        one.set_title(title, parse_math=False, fontsize=11)
        if name == "imputed":
            mappable = drawn
    style.colour_bar(list(axes), mappable, "expression", "max" if pooled.max() > high else "neither")
    return axes if compare else axes[0]


def _imputed(adata: AnnData, gene: str, layer: str) -> np.ndarray:
    """Imputed values (N,) of a gene: of the layer, else of the table in obsm."""
    table = adata.obsm.get(layer)
    if layer not in adata.layers and table is None:
        raise DataError(
            f"neither layers nor obsm has {layer!r}: impute first, with sct.tl.impute, or name another layer."
        )
    if layer in adata.layers and gene in adata.var_names:
        values = gene_values(adata, gene, layer)
    elif isinstance(table, pd.DataFrame) and gene in table.columns:
        values = dense(table[gene].to_numpy())
    else:
        known = [*(adata.var_names if layer in adata.layers else ())]
        known += [*(table.columns if isinstance(table, pd.DataFrame) else ())]
        raise DataError(f"{layer!r} has no imputed values of the gene {gene!r}: {near(gene, known)}")
    values = values.astype(float)
    if not np.isfinite(values).any():
        raise DataError(
            f"{layer!r} holds no number for the gene {gene!r}: impute it first, with sct.tl.impute(genes=...)."
        )
    return values


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
            facecolors=style.GREY,
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
