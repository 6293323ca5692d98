"""Choose the colors of the cells in a plot: by a column of obs, by a gene, or one color for all cells."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sct import messages
from sct.data.cell_labels import is_placeholder
from sct.errors import ConfigError, DataError
from sct.extras import load_extra
from sct.pl import style
from sct.pl.imputed import EXPECTED, UNITS, impute_record, imputed_values
from sct.pl.values import check_real, gene_row, gene_values, near

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

Limit = float | str | None
# A legend with more entries cannot be read, so the rarest categories share one gray entry.
MAX_NAMED = 100


@dataclasses.dataclass(frozen=True)
class Categories:
    """Hold the colors of cells by category.

    Attributes
    ----------
    title
        Title of the panel.
    codes
        (N,) index of each cell's category in `names`. Cells whose category is not in `names` have -1 and are gray.
    names, colors
        Name and color of each category that the legend names.
    legend
        (color, text) of each entry of the legend, with the gray entries at the end.
    """

    title: str
    codes: np.ndarray
    names: Sequence[str]
    colors: Sequence[str]
    legend: Sequence[tuple[str, str]]

    def of_cells(self) -> np.ndarray:
        """Return the color (N,) of each cell."""
        return np.array([*self.colors, style.GRAY], dtype=object)[self.codes]


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Hold values of cells for a continuous color scale.

    Attributes
    ----------
    title
        Title of the panel.
    values
        (N,) numbers; NaN for gray cells.
    unit
        Label of the color bar.
    from_zero
        Whether the color scale begins at 0 if no value is negative.
    """

    title: str
    values: np.ndarray
    unit: str
    from_zero: bool = True


def coloring(adata: AnnData, name: str, layer: str | None) -> Categories | Numbers:
    """Return the colors of the cells.

    `name` is a column of obs or a gene. If both exist, the column is used.

    Raises
    ------
    DataError
        The name is neither a column of obs nor a gene, the layer does not exist, the values are complex numbers, or no
        cell has a value.
    """
    if name in adata.obs.columns:
        values = adata.obs[name]
        if not _is_categorical(values):
            check_real(f"obs[{name!r}]", values)
            numbers = values.to_numpy(dtype=float, na_value=np.nan)
            if not np.isfinite(numbers).any():
                raise DataError(
                    f"obs[{name!r}] has no numeric value in any cell: choose another column or gene for `color`."
                )
            return Numbers(name, numbers, name, from_zero=False)
        return _categories(adata, name, values)
    return gene_coloring(adata, name, layer)


def gene_coloring(adata: AnnData, gene: str, layer: str | None) -> Numbers:
    """Return the values of a gene in X, in a layer, or in the results of `sct.tl.impute`; see `coloring`."""
    record = impute_record(adata, layer)
    table = adata.obsm.get(layer) if layer else None
    if record is not None or isinstance(table, pd.DataFrame):
        assert layer is not None
        values = imputed_values(adata, gene, layer)
        known = int(np.isfinite(values).sum())
        what, unit = layer, "expression"
        if record is not None:
            ending = next(end for end in UNITS if layer.endswith(end))
            what, unit = f"imputed{'' if ending == EXPECTED else ending.replace('_', ' ')}", UNITS[ending]
        title = f"{gene}, {what}" + (f" in {known:,} of {len(values):,} cells" if known < len(values) else "")
        return Numbers(title, values, unit)
    if gene_row(adata.var, gene) is None:
        known_names = [*adata.obs.columns, *adata.var_names]
        raise DataError(f"{gene!r} is neither a column of obs nor a gene: {near(gene, known_names)}")
    values = gene_values(adata, gene, layer)
    check_real("X" if layer is None else f"layers[{layer!r}]", values)
    values = values.astype(float)
    if not np.isfinite(values).any():
        raise DataError(f"the gene {gene!r} has no numeric value in any cell: choose another gene or layer.")
    return Numbers(gene if layer is None else f"{gene}, {layer}", values, _unit(adata, values, layer))


def _unit(adata: AnnData, values: np.ndarray, layer: str | None) -> str:
    """Return the label of the color bar of a gene."""
    known = values[np.isfinite(values)]
    if (known >= 0).all() and (known == np.rint(known)).all():
        return "raw counts"
    if (known < 0).any():
        return "scaled expression"
    # sc.pp.log1p writes this key.
    return "log1p expression" if layer is None and "log1p" in adata.uns else "expression"


def _is_categorical(values: pd.Series) -> bool:
    dtype = values.dtype
    return (
        isinstance(dtype, pd.CategoricalDtype)
        or not pd.api.types.is_numeric_dtype(dtype)
        or pd.api.types.is_bool_dtype(dtype)
    )


def _categories(adata: AnnData, name: str, values: pd.Series) -> Categories:
    """Return the colors of a categorical column of obs."""
    if isinstance(values.dtype, pd.CategoricalDtype):
        codes = values.cat.codes.to_numpy().astype(np.int64)
        names = [str(each) for each in values.cat.categories]
    else:
        missing = values.isna().to_numpy()
        texts = values.astype(object).where(~missing, "")  # a nullable column cannot hold ""
        codes, found = pd.factorize(texts.astype(str), sort=True)
        if missing.any():
            # Re-number without the placeholder of missing values.
            present = np.unique(codes[~missing])
            codes = np.where(missing, -1, np.searchsorted(present, codes))
            found = found[present]
        names = [str(each) for each in found]
    if not (codes >= 0).any():
        raise DataError(f"obs[{name!r}] has no value in any cell: choose another column or gene for `color`.")
    counts = np.bincount(codes[codes >= 0], minlength=len(names))
    given = _given_colors(adata, name, len(names))
    unlabeled = [is_placeholder(each) for each in names]
    own = iter(style.distinct_colors(len(names) - sum(unlabeled)))
    colors = given or [style.GRAY if gray else next(own) for gray in unlabeled]

    order = [i for i in range(len(names)) if counts[i]]
    named = [i for i in order if given or not unlabeled[i]]
    if len(named) > MAX_NAMED:
        commonest = sorted(named, key=lambda i: -counts[i])[:MAX_NAMED]
        named = [i for i in named if i in set(commonest)]
    legend = [(colors[i], names[i]) for i in named]
    legend += [(style.GRAY, names[i]) for i in order if unlabeled[i] and not given]
    rest = [i for i in order if i not in set(named) and (given or not unlabeled[i])]
    if rest:
        legend.append((style.GRAY, f"{len(rest)} rarer categories ({int(counts[rest].sum()):,} cells)"))
    if (codes < 0).any():
        legend.append((style.GRAY, f"no value ({int((codes < 0).sum()):,} cells)"))
    place = np.full(len(names) + 1, -1)
    place[named] = np.arange(len(named))
    return Categories(name, place[codes], [names[i] for i in named], [colors[i] for i in named], legend)


def _given_colors(adata: AnnData, name: str, categories: int) -> list[str]:
    """Return the colors that scanpy stored in `uns[name + "_colors"]`; an empty list if this key does not exist."""
    key = f"{name}_colors"
    if key not in adata.uns:
        return []
    colors = load_extra("matplotlib.colors", "analysis", "matplotlib", what="a plot")
    value = adata.uns[key]
    single = isinstance(value, str) or not isinstance(value, Iterable) or getattr(value, "ndim", 1) == 0
    given = [_color(each) for each in ([value] if single else value)]
    wrong = [each for each in given if not colors.is_color_like(each)]
    if wrong or len(given) < categories:
        found = f"the value {wrong[0]!r}, which is not a color" if wrong else f"{len(given)} colors"
        messages.warn(
            f"uns[{key!r}] has {found}, but it must have a color for each of the {categories} categories of "
            f"obs[{name!r}]: correct or delete it; the plot uses other colors.",
        )
        return []
    return [colors.to_hex(each, keep_alpha=colors.to_rgba(each)[3] < 1) for each in given[:categories]]


def _color(value: Any) -> Any:
    """Convert a color to a string or to a tuple of red, green, blue and optionally alpha.

    A value that cannot be converted is returned unchanged.
    """
    if isinstance(value, str):
        return str(value)
    try:
        numbers = tuple(np.asarray(value, dtype=float).tolist())
    except (TypeError, ValueError):
        return value
    return numbers if np.isfinite(numbers).all() else str(numbers)


def limits(
    values: np.ndarray, vmin: Limit, vmax: Limit, from_zero: bool = True, title: str = ""
) -> tuple[float, float, str]:
    """Return the limits of a color scale, and which ends of the color bar have an arrow.

    Parameters
    ----------
    values
        Numbers; NaN is ignored.
    vmin, vmax
        A number, a percentile such as "p99", or None for the smallest or largest value. If a percentile would make the
        range empty, the smallest or largest value is used instead. If all values are equal, the range has the width 1.
    from_zero
        Whether `vmin=None` means 0 if no value is negative.
    title
        Title of the panel for error messages.

    Raises
    ------
    ConfigError
        A limit is neither a number nor a percentile, `vmin` is not below `vmax`, or all values are outside one of the
        limits.
    """
    check_limits(vmin, vmax)
    known = values[np.isfinite(values)]
    lowest, highest = float(known.min()), float(known.max())
    start = min(lowest, 0.0) if from_zero else lowest
    low, high = _limit("vmin", vmin, known, start), _limit("vmax", vmax, known, highest)
    if high <= low and isinstance(vmax, str):
        high = highest
    if high <= low and isinstance(vmin, str):
        low = start
    if high <= low:
        of = f" of {title!r}" * bool(title)
        if low > highest or (low == high == highest > lowest):
            raise ConfigError(
                f"vmin is {vmin}, but the largest value{of} is {highest:g}, so no value is above vmin: lower vmin, or "
                "set vmax to a number above vmin."
            )
        if high < low or lowest < highest:
            raise ConfigError(
                f"vmax is {vmax}, but the color scale{of} begins at {low:g}: increase vmax, or set vmin to a number "
                "below vmax."
            )
        low, high = (high - 1, high) if _is_number(vmax) else (low, low + 1)
    ends = {(True, True): "both", (True, False): "min", (False, True): "max", (False, False): "neither"}
    return low, high, ends[lowest < low, highest > high]


def check_limits(vmin: Limit, vmax: Limit) -> None:
    """Raise `ConfigError` if a limit is not a number, a percentile or None, or if `vmin` is not below `vmax`."""
    # Percentiles of 0 to 100 are the percents themselves.
    low, high = (
        _limit(name, value, np.arange(101.0), 0.0) for name, value in (("vmin", vmin), ("vmax", vmax))
    )
    alike = (_is_number(vmin) and _is_number(vmax)) or (isinstance(vmin, str) and isinstance(vmax, str))
    if alike and high <= low:
        raise ConfigError(
            f"vmin is {vmin} and vmax is {vmax}, but vmin must be below vmax: lower vmin, or increase vmax."
        )


def _is_number(value: Any) -> bool:
    """Return whether a limit is a finite number; a bool is not a number."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()  # a scalar of NumPy or JAX
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _limit(name: str, value: Limit, known: np.ndarray, default: float) -> float:
    if value is None:
        return default
    if isinstance(value, str):
        try:
            percent = float(value.removeprefix("p"))
        except ValueError:
            percent = -1.0
        if value.startswith("p") and 0 <= percent <= 100:
            return float(np.percentile(known, percent))
    elif _is_number(value):
        return float(value)
    raise ConfigError(
        f'{name} is {value!r}, but must be a number, a percentile from "p0" to "p100", or None: set for example '
        f'{name}="p99".'
    )


def add_legend(ax: Axes, chosen: Categories, points: np.ndarray, legend_loc: str | None) -> None:
    """Add the legend of categories, to the right of the axes or on the cells.

    `points` (N, 2) are the coordinates of the cells.
    """
    if legend_loc == "right margin":
        from matplotlib.lines import Line2D

        handles = [
            Line2D([], [], linestyle="", marker="o", color=color, markersize=6) for color, _ in chosen.legend
        ]
        style.legend_outside(ax, handles, [text for _, text in chosen.legend], points=True)
    elif legend_loc == "on data":
        from matplotlib.patheffects import withStroke

        for code, name in enumerate(chosen.names):
            x, y = np.median(points[chosen.codes == code], axis=0)
            text = ax.text(x, y, "", ha="center", va="center", fontsize=8, fontweight="bold")
            text.set_parse_math(False)
            text.set_text(style.wrapped(name))
            text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])


def legend_size(chosen: Any, legend_loc: str | None) -> tuple[float, float]:
    """Return the approximate width and height in inches of the legend or color bar to the right of a panel."""
    if isinstance(chosen, Categories) and legend_loc == "right margin":
        texts = [text for _, text in chosen.legend]
        return style.legend_width(texts), style.legend_height(texts)
    return (1.0, 0.0) if isinstance(chosen, Numbers) else (0.3, 0.0)
