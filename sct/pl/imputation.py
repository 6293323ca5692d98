"""Plot results of the imputation benchmark: confusion matrix, MCC by masked fraction, and reliability diagram."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sct.checks import check_not_empty, check_share
from sct.errors import DataError
from sct.pl import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Appendix D.3 of the sCT paper.
LEVELS = ("unexpressed", "low", "moderate", "high-moderate", "high")
# After all colors are used, the next curves get another line style.
_LINES = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)))


def imputation_confusion(
    confusion: np.ndarray,
    *,
    normalize: bool = True,
    ax: Axes | None = None,
    save: str | os.PathLike[str] | None = None,
) -> Axes:
    """Plot the confusion matrix of true and imputed expression levels.

    Parameters
    ----------
    confusion
        Number of (cell, gene) pairs for each true level (rows) and each predicted level (columns). Five levels get the
        names of the sCT paper (appendix D.3); otherwise levels are numbered from 0. If there are fewer rows than
        columns, the rows are the highest levels, for example when only expressed genes are scored.
    normalize
        If True, the color and the first text line of each matrix cell show the count as a fraction of the row sum. If
        False, the color shows the count.
    ax
        Axes to draw in; None for a new figure.
    save
        Path of an image file to write; see `sct.pl.umap`.

    Returns
    -------
    The axes.

    Raises
    ------
    DataError
        `confusion` is not a matrix of counts.
    ConfigError
        `save` has an unknown suffix or a folder that does not exist.
    MissingExtraError
        Matplotlib is not installed.
    """
    path = style.check_save(save)
    counts = np.asarray(confusion)
    if counts.ndim != 2 or not 0 < counts.shape[0] <= counts.shape[1]:
        raise DataError(
            f"`confusion` has the shape {counts.shape}, but must be a matrix with one row per true level, one column "
            "per predicted level, and at least as many columns as rows: pass a confusion matrix of this form."
        )
    if counts.dtype.kind not in "iuf" or not (np.isfinite(counts).all() and (counts >= 0).all()):
        raise DataError(
            "`confusion` has values that are not counts: pass the number of positions for each pair of a "
            "true and a predicted level."
        )
    if counts.sum() == 0:
        raise DataError(
            "`confusion` contains only zeros, so there is nothing to plot: pass the confusion "
            "matrix of at least one scored position."
        )
    rows, columns = counts.shape
    totals = counts.sum(axis=1, keepdims=True)
    share = np.divide(counts, totals, out=np.full(counts.shape, np.nan), where=totals > 0)
    shown = share if normalize else counts.astype(float)
    names = LEVELS if columns == len(LEVELS) else tuple(map(str, range(columns)))
    side = min(1.6 + 0.85 * columns, 9)
    ax = style.new_axes(side + 1.0, min(1.5 + 0.75 * rows, 8)) if ax is None else style.given_axes(ax, 1)[0]
    top = 1.0 if normalize else float(counts.max())
    image = ax.imshow(shown, cmap="Blues", vmin=0, vmax=top, aspect="auto")
    if columns <= 10:
        for i, j in np.ndindex(rows, columns):
            first = f"{share[i, j]:.0%}\n" if normalize and totals[i, 0] else ""
            light = np.dot(image.to_rgba(shown[i, j])[:3], (0.2126, 0.7152, 0.0722))
            # Not pure white or black: the HTML report replaces these two by the colors of its theme.
            color = "#777777" if normalize and not totals[i, 0] else "#fefefe" if light < 0.5 else "#1a1a1a"
            text = f"{first}{counts[i, j]:,.0f}"
            ax.text(j, i, text, ha="center", va="center", fontsize=8, color=color, linespacing=1.25)
    ax.set_xticks(
        range(columns),
        names,
        rotation=30 if columns == len(LEVELS) else 0,
        ha="right" if columns == len(LEVELS) else "center",
    )
    ax.set_yticks(range(rows), names[columns - rows :])
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.set(xlabel="imputed level", ylabel="true level")
    style.color_bar([ax], image, "fraction of the true level" if normalize else "positions")
    style.write_figure(ax.figure, path)
    return ax


def mcc_by_ratio(
    curves: Mapping[str, Sequence[tuple[float, Sequence[float]]]],
    *,
    models: Collection[str] = (),
    reference: Collection[str] = (),
    masked: str = "masked genes",
    ax: Axes | None = None,
    save: str | os.PathLike[str] | None = None,
) -> Axes:
    """Plot the Matthews correlation (MCC) of imputed expression levels by the fraction of masked genes or cells.

    Lines are means over seeds; bands are one standard deviation. The legend is sorted by the last value of each line.

    Parameters
    ----------
    curves
        For each method, a list of pairs: a masked fraction in (0, 1], and a list with the MCC of each seed. Leave out
        fractions for which there is no MCC. The legend marks a method without any value as "not run".
    models
        Names of the methods that are models. These methods have thicker lines. See
        `sct.eval.imputation.scoring.ProtocolResult.labels`.
    reference
        Names of the methods that are reference baselines. These methods have thick, black and dashed lines.
    masked
        Label of the horizontal axis.
    ax
        Axes to draw in; None for a new figure.
    save
        Path of an image file to write; see `sct.pl.umap`.

    Returns
    -------
    The axes.

    Raises
    ------
    DataError
        No method has a value, a masked fraction is outside (0, 1] or occurs twice, or an MCC is outside [-1, 1].
    ConfigError
        `save` has an unknown suffix or a folder that does not exist.
    MissingExtraError
        Matplotlib is not installed.
    """
    path = style.check_save(save)
    points = {str(name): _curve(str(name), curve) for name, curve in curves.items()}
    ratios = sorted({ratio for curve in points.values() for ratio in curve[:, 0].tolist()})
    check_not_empty("the list of values in curves", ratios, error=DataError, advice="pass at least one MCC")

    def last(name: str) -> tuple[float, float]:
        return tuple(points[name][-1, :2]) if len(points[name]) else (-1.0, -1.0)

    drawn = sorted(points, key=last, reverse=True)
    others = [name for name in points if name not in reference]
    labels = [name if len(points[name]) else f"{name} (not run)" for name in drawn]
    ax = style.new_axes(5.2 + style.legend_width(labels), 4.2) if ax is None else style.given_axes(ax, 1)[0]
    handles = {}
    for name in [*others, *(name for name in points if name in reference)]:
        curve = points[name]
        number = others.index(name) if name in others else -1
        look: dict[str, Any] = {
            "color": style.COLORS[number % 8],
            "linestyle": _LINES[number // 8 % len(_LINES)],
            "marker": style.MARKERS[number // 8 % len(style.MARKERS)],
            "linewidth": 2.4 if name in models else 1.6,
            "markersize": 4.5,
        }
        if name in reference:
            look = {"color": "#000000", "linestyle": (0, (4, 2)), "linewidth": 3.2, "marker": "", "zorder": 3}
        ratio, mean, std = curve.T
        if name in reference and len(ratio) == 1:
            look["marker"], look["markersize"] = "_", 24
        (handles[name],) = ax.plot(ratio, mean, **look)
        if len(ratio) > 1:
            ax.fill_between(ratio, mean - std, mean + std, color=look["color"], alpha=0.18, linewidth=0)
        elif len(ratio):
            ax.errorbar(ratio, mean, std, color=look["color"], capsize=3, linestyle="")
    ax.set_xticks(ratios, [f"{ratio:.0%}" for ratio in ratios])
    pad = 0.05 * (ratios[-1] - ratios[0]) or 0.1
    ax.set_xlim(ratios[0] - pad, ratios[-1] + pad)
    ax.set(xlabel=masked, ylabel="MCC of the level, masked expressed genes")
    ax.grid(axis="y", color=style.GRAY, alpha=0.4, linewidth=0.7)
    style.open_frame(ax)
    style.legend_outside(ax, [handles[name] for name in drawn], labels, points=False)
    style.write_figure(ax.figure, path)
    return ax


def reliability(
    curves: Mapping[str, Any],
    *,
    models: Collection[str] = (),
    ax: Axes | None = None,
    save: str | os.PathLike[str] | None = None,
) -> Axes:
    """Plot a reliability diagram: the observed fraction of expressed genes against the predicted probability.

    The curve of a well-calibrated method is on the diagonal. A curve below the diagonal means that the method predicts
    "expressed" too often. The size of a point shows the fraction of all predictions that are in its bin.

    Parameters
    ----------
    curves
        For each method, the result of `sct.eval.metrics.reliability`: predicted probability, observed fraction and
        number of predictions, each (bins,).
    models
        Names of the methods that are models. These methods have thicker lines. See
        `sct.eval.imputation.natural.NaturalResult.labels`.
    ax
        Axes to draw in; None for a new figure.
    save
        Path of an image file to write; see `sct.pl.umap`.

    Returns
    -------
    The axes.

    Raises
    ------
    DataError
        No method has a value, or a value is outside [0, 1].
    ConfigError
        `save` has an unknown suffix or a folder that does not exist.
    MissingExtraError
        Matplotlib is not installed.
    """
    path = style.check_save(save)
    points = {}
    for name, curve in curves.items():
        predicted, observed, count = (np.asarray(values, dtype=float) for values in curve)
        filled = count > 0
        kept = np.stack([predicted[filled], observed[filled]])
        if not ((kept >= 0) & (kept <= 1)).all():
            raise DataError(
                f"the curve {str(name)!r} has values outside [0, 1]: pass probabilities and fractions "
                "between 0 and 1."
            )
        if filled.any():
            points[str(name)] = (*kept, count[filled] / count.sum())
    check_not_empty(
        "the list of curves with predictions",
        points,
        error=DataError,
        advice="pass at least one curve with a count above 0",
    )
    ax = (
        style.new_axes(4.6 + style.legend_width(list(points)), 4.4)
        if ax is None
        else style.given_axes(ax, 1)[0]
    )
    ax.plot([0, 1], [0, 1], color=style.GRAY, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    handles = []
    for number, (name, (predicted, observed, share)) in enumerate(points.items()):
        color = style.COLORS[number % 8]
        line = _LINES[number // 8 % len(_LINES)]
        thick = name in models
        (handle,) = ax.plot(
            predicted,
            observed,
            color=color,
            linestyle=line,
            linewidth=2.6 if thick else 1.4,
            zorder=3 if thick else 2,
        )
        ax.scatter(predicted, observed, s=6 + 240 * share, color=color, linewidths=0, alpha=0.85, zorder=3)
        handles.append(handle)
    ax.set(
        xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal",
        xlabel="predicted probability of expression", ylabel="observed fraction expressed",
    )  # fmt: skip
    style.open_frame(ax)
    style.legend_outside(ax, handles, list(points), points=False)
    style.write_figure(ax.figure, path)
    return ax


def _curve(name: str, curve: Sequence[tuple[float, Sequence[float]]]) -> np.ndarray:
    """Return an array (R, 3) with the columns fraction, mean MCC and standard deviation of the MCC.

    There is one row for each masked fraction that has a value.
    """
    rows = []
    for ratio, values in curve:
        measured = np.asarray(values, dtype=float)
        measured = measured[~np.isnan(measured)]
        check_share(f"a masked fraction of the curve {name!r}", ratio, zero=False, error=DataError)
        if (np.abs(measured) > 1 + 1e-9).any():
            raise DataError(
                f"the curve {name!r} has an MCC outside [-1, 1] at the masked fraction {ratio}: pass MCC "
                "values between -1 and 1."
            )
        if measured.size:
            rows.append((float(ratio), measured.mean(), measured.std()))
    if len({row[0] for row in rows}) < len(rows):
        raise DataError(
            f"the curve {name!r} has the same masked fraction twice: put the values of all seeds for this "
            "fraction into one list."
        )
    return np.array(sorted(rows)).reshape(-1, 3)
