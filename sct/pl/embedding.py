"""Plot a UMAP of an embedding, colored by a column of obs or by the expression of a gene."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sct.errors import DataError
from sct.pl import style
from sct.pl.values import cell_values, positions

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

# Number of categories with a distinct combination of color and marker.
_NAMED = len(style.COLORS) * len(style.MARKERS)


def umap(
    adata: AnnData,
    *,
    basis: str = "X_sct",
    color: str | None = None,
    layer: str | None = None,
    seed: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """Plot a UMAP of an embedding, and compute the UMAP if needed.

    The UMAP coordinates are stored in `obsm["X_umap_" + basis]`, and their settings in `uns["X_umap_" + basis]`. Later
    calls reuse them if the seed and the embeddings of all cells are unchanged; this also works for a subset of the
    cells. No other field is written, not even scanpy's `X_umap`. If `adata` is a view, nothing is written. If
    `obsm["X_umap_" + basis]` was written by another function, it is used unchanged.

    Parameters
    ----------
    adata
        Cells (N, G).
    basis
        Key of the embedding (N, D) in `obsm`.
    color
        Column of `obs` (categories or numbers) or name of a gene; None for one color. If there are more than 40
        categories, the 40 most frequent ones have colors and the others are gray. Cells without a value are gray.
    layer
        Layer with the values of the gene; None for X.
    seed
        Random seed of the UMAP and of the drawing order of the cells.
    ax
        Axes to draw in; None for a new figure.

    Returns
    -------
    The axes.

    Raises
    ------
    DataError
        The embedding, column, gene or layer does not exist, or the embedding has NaN.
    MissingExtraError
        Matplotlib or umap-learn is not installed.
    """
    values = None if color is None else cell_values(adata, color, layer)
    points = _coordinates(adata, basis, seed)
    size = float(np.clip(60_000 / max(len(points), 1), 1.5, 28))
    order = np.random.default_rng(seed).permutation(len(points))
    if values is None:
        ax = style.new_axes(5, 4.6) if ax is None else ax
        ax.scatter(points[:, 0], points[:, 1], s=size, color=style.COLORS[0], linewidths=0)
    elif _is_categorical(values):
        ax = _categories(ax, points, pd.Series(np.asarray(values, dtype=object)), values, order, size)
    else:
        ax = style.new_axes(5.6, 4.6) if ax is None else ax
        _numbers(ax, points, np.asarray(values, dtype=float), str(color), size)
    style.bare(ax)
    ax.set_xlabel("UMAP 1", loc="left", fontsize=8)
    ax.set_ylabel("UMAP 2", loc="bottom", fontsize=8)
    ax.set_title(basis if color is None else color, parse_math=False, fontsize=11)
    return ax


def _coordinates(adata: AnnData, basis: str, seed: int) -> np.ndarray:
    """Return UMAP coordinates (N, 2): the stored ones in obsm if they are still valid, otherwise new ones."""
    embedding = positions(adata, basis)
    key = f"X_umap_{basis}"
    made = adata.uns.get(key)
    if key in adata.obsm:
        picture = positions(adata, key, width=2)
        if not isinstance(made, Mapping) or "basis" not in made:
            return picture  # written by another tool
        known = np.asarray(made.get("row_hashes", ()), np.uint64)
        if int(made["seed"]) == seed and np.isin(_row_hashes(embedding, picture), known).all():
            return picture
    from sct.eval.embedding.measures import umap as layout

    points = layout(embedding, seed)
    if not adata.is_view:
        adata.obsm[key] = points
        adata.uns[key] = {"basis": basis, "seed": seed, "row_hashes": np.sort(_row_hashes(embedding, points))}
    return points.astype(np.float64)


def _row_hashes(embedding: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return a hash (N,) uint64 of the embedding (N, D) and the UMAP coordinates (N, 2) of each cell.

    Subsetting and reordering change obsm but not uns, so the hashes identify cells by content.
    """
    rows = np.concatenate([embedding.astype(np.float32), points.astype(np.float32)], axis=1)
    return pd.util.hash_pandas_object(pd.DataFrame(rows), index=False).to_numpy()


def _is_categorical(values: Any) -> bool:
    dtype = values.dtype
    return (
        isinstance(dtype, pd.CategoricalDtype)
        or not pd.api.types.is_numeric_dtype(dtype)
        or pd.api.types.is_bool_dtype(dtype)
    )


def _categories(
    ax: Axes | None,
    points: np.ndarray,
    names: pd.Series,
    values: Any,
    order: np.ndarray,
    size: float,
) -> Axes:
    """Draw points in random order, with a color and a marker for each category, and add a legend."""
    from matplotlib.lines import Line2D

    missing = pd.isna(names).to_numpy()
    labels = names.astype(str).to_numpy()
    counts = pd.Series(labels[~missing]).value_counts(sort=False)
    known = [str(c) for c in values.cat.categories] if isinstance(values.dtype, pd.CategoricalDtype) else []
    present = [c for c in known if c in counts.index] or sorted(counts.index)
    named = present
    if len(present) > _NAMED:
        commonest = set(counts.sort_values(ascending=False, kind="stable").index[:_NAMED])
        named = [name for name in present if name in commonest]
    kinds = pd.Index(named).get_indexer(labels)
    kinds[missing] = -1
    legend = [(style.COLORS[i % 8], style.MARKERS[i // 8], name) for i, name in enumerate(named)]
    rest = len(present) - len(named)
    if rest:
        cells = int(((kinds < 0) & ~missing).sum())
        legend.append((style.GRAY, "o", f"{rest} rarer categories ({cells:,} cells)"))
    if missing.any():
        legend.append((style.GRAY, "o", f"no value ({int(missing.sum()):,} cells)"))

    texts = [text for *_, text in legend]
    height = max(4.6, 0.19 * min(len(texts), 21) + 0.6)
    ax = style.new_axes(4.6 + style.legend_width(texts), height) if ax is None else ax
    if (kinds < 0).any():
        ax.scatter(points[kinds < 0, 0], points[kinds < 0, 1], s=size, color=style.GRAY, linewidths=0)
    palette = np.array(style.COLORS)
    for i, marker in enumerate(style.MARKERS):
        drawn = order[(kinds[order] >= 8 * i) & (kinds[order] < 8 * (i + 1))]
        if len(drawn):
            colors = palette[kinds[drawn] % 8].tolist()
            ax.scatter(points[drawn, 0], points[drawn, 1], s=size, c=colors, marker=marker, linewidths=0)
    handles = [
        Line2D([], [], linestyle="", marker=marker, color=color, markersize=6) for color, marker, _ in legend
    ]
    style.legend_outside(ax, handles, texts, points=True)
    return ax


def _numbers(ax: Axes, points: np.ndarray, values: np.ndarray, name: str, size: float) -> None:
    """Draw points colored by a number, with the highest values on top, and add a color bar."""
    known = np.isfinite(values)
    if not known.any():
        raise DataError(
            f"{name!r} has no numeric value in any cell: choose another column or gene for `color`."
        )
    ax.scatter(points[~known, 0], points[~known, 1], s=size, color=style.GRAY, linewidths=0)
    order = np.flatnonzero(known)[np.argsort(values[known], kind="stable")]
    drawn = ax.scatter(
        points[order, 0], points[order, 1], s=size, c=values[order], cmap=style.CONTINUOUS, linewidths=0
    )
    style.color_bar([ax], drawn, name)
