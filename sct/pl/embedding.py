"""Plot a UMAP of an embedding, colored by columns of obs or by genes."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sct.checks import check_at_least, check_choice, check_not_empty, check_positive
from sct.errors import DataError
from sct.extras import missing_extra
from sct.pl import style
from sct.pl.coloring import (
    Categories,
    Limit,
    Numbers,
    add_legend,
    check_limits,
    coloring,
    legend_size,
    limits,
)
from sct.pl.values import positions

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

UMAP = "X_umap"


def umap(
    adata: AnnData,
    color: str | Sequence[str] | None = None,
    *,
    layer: str | None = None,
    basis: str = UMAP,
    vmin: Limit = None,
    vmax: Limit = "p99",
    legend_loc: Literal["right margin", "on data"] | None = "right margin",
    size: float | None = None,
    ncols: int = 3,
    seed: int = 0,
    ax: Axes | Sequence[Axes] | None = None,
    save: str | os.PathLike[str] | None = None,
) -> Axes | list[Axes]:
    """Plot a UMAP of the cells, colored by labels, numbers or genes.

    This function only draws. Compute the UMAP with scanpy first::

        sct.tl.embed(adata, model)
        sc.pp.neighbors(adata, use_rep="X_sct")
        sc.tl.umap(adata)
        sct.pl.umap(adata, color=["cell_type", "CD3E"])

    `adata` is never changed. If `obsm["X_umap"]` already exists, it is drawn as it is, even if it was computed from
    another embedding; `uns["neighbors"]["params"]["use_rep"]` names the embedding that scanpy used.

    Parameters
    ----------
    adata
        Cells (N, G) with coordinates `obsm[basis]`.
    color
        Name of a column of `obs` (categories or numbers) or of a gene, or a list of such names with one panel each.
        None draws all cells in one color. A gene is a name in `var_names` or in any column of `var`.

        Categories have the colors in `uns[color + "_colors"]`, where scanpy stores them. Without this key, each
        category has its own color, and labels such as "unknown" and missing values are gray. If there are more than 100
        categories, the legend names the 100 most frequent ones, and the cells of all other categories are gray.
    layer
        Layer with the values of genes; None for X. A key that `sct.tl.impute` wrote, such as "sct_expected", shows
        imputed genes, even genes that are not in `var`. Cells without an imputed value are gray.
    basis
        Key of the coordinates (N, 2) in `obsm`.
    vmin, vmax
        Limits of the color scale of numbers and genes: a number, a percentile such as "p99", or None for the smallest
        or largest value. For a gene without negative values, `vmin=None` means 0. Values beyond a limit have the color
        of the limit, and the color bar has an arrow at this end. By default, the scale ends at the 99th percentile, so
        that a few outliers do not darken all other cells. If this percentile is 0, the scale ends at the largest value.
    legend_loc
        "right margin", "on data" (names at the median position of each category), or None for no legend.
    size
        Area of a point in square points (1/72 inch). Default: smaller for more cells.
    ncols
        Maximum number of panels in a row.
    seed
        Random seed of the drawing order of categories. Numbers are drawn in ascending order.
    ax
        Axes to draw in, one per panel; None for a new figure.
    save
        Path of an image file to write, such as "umap.png" or "umap.pdf". The suffix sets the format. An existing file
        is replaced.

    Returns
    -------
    The axes; a list of axes if `color` is a list.

    Raises
    ------
    DataError
        There is no UMAP yet, or a column, gene, layer or array does not exist or has no values.
    ConfigError
        An option is out of range, or `save` has an unknown suffix or a folder that does not exist.
    MissingExtraError
        Matplotlib is not installed, or there is no UMAP yet and scanpy is not installed.
    """
    path = style.check_save(save)
    check_choice("legend_loc", legend_loc, style.LEGENDS)
    check_at_least("ncols", ncols, 1)
    check_at_least("seed", seed, 0)
    check_limits(vmin, vmax)
    if size is not None:
        check_positive("size", size)
    names = style.names_of(color)
    points = _coordinates(adata, basis)
    panels = [None if name is None else coloring(adata, name, layer) for name in names]
    area = float(np.clip(60_000 / len(points), 1.5, 28)) if size is None else float(size)
    order = np.random.default_rng(seed).permutation(len(points))
    if ax is None:
        sizes = np.array([legend_size(each, legend_loc) for each in panels])
        width, height = 4.6 + sizes[:, 0].max(), max(4.6, sizes[:, 1].max())
        axes = style.new_grid(len(panels), width, height, ncols)
    else:
        axes = style.given_axes(ax, len(panels))
    label = basis.removeprefix("X_")
    label = "UMAP" if label.startswith("umap") else label
    for one, panel in zip(axes, panels, strict=True):
        _draw(one, points, panel, order, area, (vmin, vmax))
        if isinstance(panel, Categories):
            add_legend(one, panel, points, legend_loc)
        style.bare(one)
        one.set_xlabel(f"{label} 1", loc="left", fontsize=8)
        one.set_ylabel(f"{label} 2", loc="bottom", fontsize=8)
        one.set_title(panel.title if panel is not None else "", parse_math=False, fontsize=11)
    style.write_figure(axes[0].figure, path)
    return axes[0] if color is None or isinstance(color, str) else axes


def _draw(
    ax: Axes,
    points: np.ndarray,
    panel: Categories | Numbers | None,
    order: np.ndarray,
    area: float,
    ends: tuple[Limit, Limit],
) -> None:
    """Draw the points of one panel, and the color bar of numbers."""
    look: dict[str, Any] = {"s": area, "linewidths": 0, "rasterized": len(points) > style.MAX_VECTOR_POINTS}
    if panel is None:
        ax.scatter(points[:, 0], points[:, 1], color=style.COLORS[0], **look)
        return
    gray = panel.codes < 0 if isinstance(panel, Categories) else ~np.isfinite(panel.values)
    if gray.any():
        ax.scatter(points[gray, 0], points[gray, 1], color=style.GRAY, **look)
    if isinstance(panel, Categories):
        drawn = order[~gray[order]]
        ax.scatter(points[drawn, 0], points[drawn, 1], c=panel.of_cells()[drawn].tolist(), **look)
        return
    low, high, extend = limits(panel.values, *ends, panel.from_zero, panel.title)
    known = np.flatnonzero(~gray)
    drawn = known[np.argsort(panel.values[known], kind="stable")]
    mappable = ax.scatter(
        points[drawn, 0],
        points[drawn, 1],
        c=panel.values[drawn],
        cmap=style.CONTINUOUS,
        vmin=low,
        vmax=high,
        **look,
    )
    style.color_bar([ax], mappable, panel.unit, extend)


def _coordinates(adata: AnnData, basis: str) -> np.ndarray:
    """Return the coordinates (N, 2); if the UMAP is missing, raise an error that says how to compute it."""
    if basis not in adata.obsm and basis == UMAP:
        if importlib.util.find_spec("scanpy") is None:
            raise missing_extra("scanpy", "analysis", "a UMAP")
        embeddings = _embeddings(adata)
        first = "" if embeddings else "sct.tl.embed(adata, model), "
        raise DataError(
            f"obsm has no {UMAP!r}, but this plot needs UMAP coordinates: call {first}"
            f"{_calls(embeddings[0] if embeddings else 'X_sct')} before this plot."
        )
    check_choice("basis", basis, adata.obsm, error=DataError)
    width = np.shape(adata.obsm[basis])[-1]
    if width > 3:
        raise DataError(
            f"obsm[{basis!r}] has {width} columns, but a plot needs 2: call {_calls(basis)} first, and then "
            "plot without `basis`."
        )
    points = positions(adata, basis, width=2)
    check_not_empty("the list of cells in adata", points, error=DataError)
    return points


def _calls(use_rep: str) -> str:
    return f'sc.pp.neighbors(adata, use_rep="{use_rep}") and sc.tl.umap(adata)'


def _embeddings(adata: AnnData) -> list[str]:
    """Return the `obsm` keys from which a UMAP can be computed: those that `sct.tl.embed` wrote, if there are any.

    Otherwise return "X_sct" and "X_pca" if they exist. If neither exists, return all arrays with more than three
    columns.
    """
    records = {key: adata.uns.get(key) for key in adata.obsm}
    made = [key for key, record in records.items() if isinstance(record, Mapping) and "weights" in record]
    arrays = [key for key in adata.obsm if np.ndim(adata.obsm[key]) == 2 and np.shape(adata.obsm[key])[1] > 3]
    return made or [key for key in ("X_sct", "X_pca") if key in adata.obsm] or arrays
