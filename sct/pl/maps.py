"""Plot spatial maps of labels, of numbers, and of measured and imputed genes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy.spatial import cKDTree

from sct.checks import check_at_least, check_choice, check_not_empty, check_positive
from sct.errors import DataError
from sct.pl import style
from sct.pl.coloring import (
    Categories,
    Limit,
    Numbers,
    add_legend,
    check_limits,
    coloring,
    gene_coloring,
    legend_size,
    limits,
)
from sct.pl.imputed import EXPECTED, impute_record, observed_values
from sct.pl.values import positions

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

# Panels of one color scale: a single one, or the imputed and the observed values of a gene.
Group = list[Categories | Numbers | None]


def spatial(
    adata: AnnData,
    color: str | Sequence[str] | None = None,
    *,
    layer: str | None = None,
    compare: bool = False,
    spatial_key: str = "spatial",
    vmin: Limit = None,
    vmax: Limit = "p99",
    legend_loc: Literal["right margin", "on data"] | None = "right margin",
    spot_size: float | None = None,
    ncols: int = 3,
    ax: Axes | Sequence[Axes] | None = None,
    save: str | os.PathLike[str] | None = None,
) -> Axes | list[Axes]:
    """Plot cells or spots at their positions in a slide, colored by labels, numbers or genes.

    With `layer="sct_expected"` and `compare=True`, the imputed and the observed counts of a gene stand side by side, on
    the same color scale. `adata` is never changed. Plot one slide at a time.

    Parameters
    ----------
    adata
        Cells or spots (N, G) of one slide.
    color
        Name of a column of `obs` or of a gene, or a list of such names; see `sct.pl.umap`. None draws all spots in one
        color.
    layer
        Layer with the values of genes; None for X, which shows measured genes.

        A key that `sct.tl.impute` wrote shows imputed genes: "sct_expected" (expected raw counts), "sct_level"
        (expression levels) or "sct_probability" (probability that the gene is expressed). The values of a gene that the
        panel lacks come from the table `obsm[layer]`. Cells without an imputed value are gray, and the title shows how
        many cells have one.
    compare
        If True, plot the observed values of each gene beside the values of `layer`. The observed values are the raw
        counts that `sct.tl.impute` read. If another tool wrote the layer, the observed values come from X. For a gene
        that the panel lacks, the second map shows gray spots.
    spatial_key
        Key of the coordinates (N, 2) in `obsm`. The y axis points down, as in images.
    vmin, vmax, legend_loc
        See `sct.pl.umap`. With `compare`, the limits are computed from the imputed and the observed values together.
    spot_size
        Diameter of a spot, in the unit of the coordinates. Default: the spot diameter that Space Ranger wrote to
        `uns["spatial"]`, otherwise the median distance to the nearest neighbor.
    ncols
        Maximum number of panels in a row. With `compare`, a gene has two panels.
    ax
        Axes to draw in, one per panel; None for a new figure.
    save
        Path of an image file to write, such as "map.png" or "map.pdf". The suffix sets the format. An existing file is
        replaced.

    Returns
    -------
    The axes; a list of axes if `color` is a list or `compare` is True. With `compare`, each gene has two axes: first
    the imputed and then the observed values.

    Raises
    ------
    DataError
        The coordinates, a column, a layer or a gene do not exist, a gene was not imputed, the observed counts have been
        moved or changed since the imputation, `compare` does not apply, or the number of axes is wrong.
    ConfigError
        An option is out of range, or `save` has an unknown suffix or a folder that does not exist.
    MissingExtraError
        Matplotlib is not installed.
    """
    path = style.check_save(save)
    check_choice("legend_loc", legend_loc, style.LEGENDS)
    check_at_least("ncols", ncols, 1)
    check_limits(vmin, vmax)
    if spot_size is not None:
        check_positive("spot_size", spot_size)
    names = style.names_of(color)
    places = positions(adata, spatial_key, width=2)
    check_not_empty("the list of cells in adata", places, error=DataError)
    _check_compare(layer, compare, adata)
    groups = [_group(adata, name, layer, compare) for name in names]
    panels = [panel for group in groups for panel in group]
    if ax is None:
        spread = np.ptp(places, axis=0)
        height = float(np.clip(4.2 * (spread[1] or 1) / (spread[0] or 1), 2.8, 7)) + 0.5
        sizes = np.array([legend_size(each, legend_loc) for each in panels])
        axes = _grid(groups, 4.2 + sizes[:, 0].max(), max(height, sizes[:, 1].max()), ncols)
    else:
        axes = style.given_axes(ax, len(panels))
    width = _spot_width(adata, places, spatial_key) if spot_size is None else float(spot_size)
    start = 0
    for group in groups:
        _draw_group(axes[start : start + len(group)], places, group, width, (vmin, vmax), legend_loc)
        start += len(group)
    style.write_figure(axes[0].figure, path)
    return axes[0] if len(axes) == 1 and (color is None or isinstance(color, str)) else axes


def _check_compare(layer: str | None, compare: bool, adata: AnnData) -> None:
    """Raise `DataError` if the values of the layer cannot be compared with observed counts."""
    if not compare:
        return
    if layer is None:
        raise DataError(
            'compare is True, but layer is None, so there are no imputed values: set layer="sct_expected", or leave '
            "compare out."
        )
    if impute_record(adata, layer) is not None and not layer.endswith(EXPECTED):
        raise DataError(
            f"compare is True, but {layer!r} does not have counts, so it cannot share a color scale with the observed "
            "counts: set compare=False."
        )


def _group(adata: AnnData, name: str | None, layer: str | None, compare: bool) -> Group:
    """Return the panels for one entry of the argument `color`. With `compare`, a gene has two panels."""
    if name is None:
        return [None]
    if name in adata.obs.columns or not compare:
        return [coloring(adata, name, layer)]
    assert layer is not None
    imputed = gene_coloring(adata, name, layer)
    observed = observed_values(adata, name, layer)
    title = f"{name}, observed" if np.isfinite(observed).any() else f"{name}, not in the panel"
    return [imputed, Numbers(title, observed, imputed.unit)]


def _grid(groups: Sequence[Group], width: float, height: float, ncols: int) -> list[Axes]:
    """Return new axes for all panels; the panels of a group are in the same row."""
    ncols = max(ncols, *map(len, groups), 1)
    places: list[int] = []
    for group in groups:
        start = places[-1] + 1 if places else 0
        start += (ncols - start % ncols) * (start % ncols + len(group) > ncols)
        places += range(start, start + len(group))
    slots = style.new_grid(places[-1] + 1, width, height, ncols)
    for place, unused in enumerate(slots):
        if place not in places:
            unused.remove()
    return [slots[place] for place in places]


def _draw_group(
    axes: Sequence[Axes],
    places: np.ndarray,
    group: Group,
    width: float,
    ends: tuple[Limit, Limit],
    legend_loc: str | None,
) -> None:
    """Draw panels with the same color scale, and their legend or color bar."""
    numbers = [panel for panel in group if isinstance(panel, Numbers)]
    low, high, extend = 0.0, 1.0, "neither"
    if numbers:
        pooled = np.concatenate([panel.values for panel in numbers])
        low, high, extend = limits(pooled, *ends, numbers[0].from_zero, numbers[0].title)
    mappable = None
    for ax, panel in zip(axes, group, strict=True):
        if isinstance(panel, Numbers):
            drawn = _spots(ax, places, np.isfinite(panel.values), width)
            drawn.set_array(panel.values[np.isfinite(panel.values)])
            drawn.set_cmap(style.CONTINUOUS)
            drawn.set_clim(low, high)
            mappable = mappable or drawn
        elif isinstance(panel, Categories):
            known = panel.codes >= 0
            _spots(ax, places, known, width).set_facecolors(panel.of_cells()[known].tolist())
            add_legend(ax, panel, places, legend_loc)
        else:
            _spots(ax, places, np.ones(len(places), bool), width).set_facecolors(style.COLORS[0])
        ax.set_title(panel.title if panel is not None else "", parse_math=False, fontsize=11)
    if numbers:
        style.color_bar(list(axes), mappable, numbers[0].unit, extend)


def _spot_width(adata: AnnData, places: np.ndarray, spatial_key: str) -> float:
    """Return the diameter of a spot in the unit of the coordinates."""
    libraries = adata.uns.get("spatial") if spatial_key == "spatial" else None
    if isinstance(libraries, Mapping) and len(libraries) == 1:
        (library,) = libraries.values()
        factors = library.get("scalefactors") if isinstance(library, Mapping) else None
        diameter = factors.get("spot_diameter_fullres") if isinstance(factors, Mapping) else None
        if diameter is not None and float(diameter) > 0:
            return float(diameter)
    unique = np.unique(places, axis=0)
    if len(unique) < 2:
        return float(np.ptp(places, axis=0).max() / 50) or 1.0
    distance, _ = cKDTree(unique).query(unique, k=2)
    return float(np.median(distance[:, 1]))


def _spots(ax: Axes, places: np.ndarray, known: np.ndarray, width: float) -> Any:
    """Draw spots. Spots that are not in `known` are gray, and lie below the other spots.

    The width of the spots is in the unit of the coordinates. Return the Matplotlib collection of the spots in `known`,
    so that the caller can set their colors.
    """
    from matplotlib.collections import EllipseCollection

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
            rasterized=n > style.MAX_VECTOR_SPOTS,
        )
        if n:
            ax.add_collection(drawn)
    low, high = places.min(axis=0) - width, places.max(axis=0) + width
    ax.set(xlim=(low[0], high[0]), ylim=(high[1], low[1]), aspect="equal")
    style.bare(ax)
    return drawn
