"""Provide shared parts of all plots: axes, colors, legends that are never cut off, and image files."""

from __future__ import annotations

import functools
import os
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sct.atomic import atomic_write
from sct.checks import check_choice, check_one_each, check_type
from sct.errors import ConfigError, DataError
from sct.extras import load_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.legend import Legend

# Palette of Okabe & Ito (2008) for color-blind readers, without black and with the light yellow last.
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#7f5fc7", "#d6c516")
# Curves repeat the eight colors with another marker and another line style.
MARKERS = ("o", "^", "s", "D", "v")
GRAY = "#b9bec6"
# Maximum number of characters in a line of a legend.
_LABEL = 34
CONTINUOUS = "viridis"
LEGENDS = ("right margin", "on data", None)
FORMATS = ("png", "pdf", "svg", "jpg", "jpeg", "tif", "tiff", "webp", "eps")
_DPI = 200
# In a vector file, each point takes about 100 bytes and each spot of a map half a kilobyte.
MAX_VECTOR_POINTS, MAX_VECTOR_SPOTS = 2_000, 500


def new_axes(width: float, height: float) -> Axes:
    """Create a pyplot figure with the given size in inches, and return the axes of the figure.

    Raises
    ------
    MissingExtraError
        Matplotlib is not installed.
    """
    return new_grid(1, width, height, 1)[0]


def new_grid(panels: int, width: float, height: float, ncols: int) -> list[Axes]:
    """Create a pyplot figure with several panels; return the axes of the panels, row by row.

    Parameters
    ----------
    panels
        Number of panels.
    width, height
        Size of one panel in inches.
    ncols
        Maximum number of panels in a row.

    Raises
    ------
    MissingExtraError
        Matplotlib is not installed.
    """
    plt = load_extra("matplotlib.pyplot", "analysis", "matplotlib", what="a plot")
    columns = min(panels, ncols)
    rows = -(-panels // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), layout="constrained", squeeze=False
    )
    for unused in axes.ravel()[panels:]:
        figure.delaxes(unused)
    return list(axes.ravel()[:panels])


def given_axes(ax: Any, panels: int) -> list[Axes]:
    """Return the argument `ax` as a list with one axes per panel.

    Raises
    ------
    DataError
        `ax` contains an object that is not Matplotlib axes, or the number of axes differs from the number of panels.
    """
    kind = load_extra("matplotlib.axes", "analysis", "matplotlib", what="a plot").Axes
    axes = list(np.atleast_1d(np.asarray(ax, dtype=object)).ravel())
    for each in axes:
        check_type("ax", each, kind, "Matplotlib axes, or a list of these", error=DataError)
    check_one_each("axes in ax", len(axes), "panels", panels)
    return axes


def names_of(color: str | Sequence[str] | None) -> list[str | None]:
    """Return the argument `color` of a plot as a list with one entry per panel.

    Raises
    ------
    DataError
        `color` is not a name or a list of names, the list is empty, or an entry is neither a string nor None.
    """
    expected = "a column of obs or a gene, or a list of these"
    check_type("color", color, (str, type(None), Iterable), expected, error=DataError)
    names: list[str | None] = [color] if color is None or isinstance(color, str) else list(color)
    if not names:
        raise DataError(
            "color is an empty list, but it must name at least one panel: add a column or a gene."
        )
    for name in names:
        check_type("color", name, (str, type(None)), expected, error=DataError)
    return names


@functools.cache
def distinct_colors(n: int) -> tuple[str, ...]:
    """Return `n` colors that differ from each other, from gray and from white.

    The first eight are `COLORS`. Each further color is the one that is farthest from all earlier colors in the OKLab
    color space, so `distinct_colors(n)` always begins with `distinct_colors(n - 1)`.
    """
    if n <= len(COLORS):
        return COLORS[:n]
    levels = np.linspace(0, 255, 18).round()
    candidates = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, 3)
    lab = _oklab(candidates)
    # Neither pale on white paper, nor almost black, nor gray.
    clear = (lab[:, 0] > 0.36) & (lab[:, 0] < 0.86) & (np.hypot(lab[:, 1], lab[:, 2]) > 0.07)
    candidates, lab = candidates[clear], lab[clear]
    fixed = [_rgb(color) for color in (*COLORS, GRAY, "#ffffff")]
    distance = np.min([np.linalg.norm(lab - _oklab(color), axis=1) for color in fixed], axis=0)
    chosen = list(COLORS)
    while len(chosen) < n:
        farthest = int(distance.argmax())
        chosen.append("#{:02x}{:02x}{:02x}".format(*candidates[farthest].astype(int)))
        distance = np.minimum(distance, np.linalg.norm(lab - lab[farthest], axis=1))
    return tuple(chosen)


def _rgb(color: str) -> np.ndarray:
    return np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)], dtype=float)


def _oklab(rgb: np.ndarray) -> np.ndarray:
    """Convert sRGB colors (..., 3), with values from 0 to 255, to OKLab (Ottosson, 2020).

    OKLab has one axis for lightness and two axes for color.
    """
    share = rgb / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    cones = linear @ np.array(
        [
            [0.4122214708, 0.2119034982, 0.0883024619],
            [0.5363325363, 0.6806995451, 0.2817188376],
            [0.0514459929, 0.1073969566, 0.6299787005],
        ]
    )
    return np.cbrt(cones) @ np.array(
        [
            [0.2104542553, 1.9779984951, 0.0259040371],
            [0.7936177850, -2.4285922050, 0.7827717662],
            [-0.0040720468, 0.4505937099, -0.8086757660],
        ]
    )


def check_save(save: str | os.PathLike[str] | None) -> Path | None:
    """Check that a figure can be written to the path `save`, and return this path.

    Raises
    ------
    ConfigError
        The suffix is not one of `FORMATS`, the folder does not exist, or the path is a folder.
    """
    if save is None:
        return None
    check_type("save", save, (str, os.PathLike), "the path of an image file", advice='set it to "figure.png"')
    path = Path(save).expanduser()
    if path.is_dir():
        raise ConfigError(f"save={str(save)!r} is a folder, but it must be a file: add a file name.")
    suffix = path.suffix.lower().removeprefix(".")
    check_choice(
        "the suffix of save", suffix, FORMATS, advice='end the file name in ".png", ".pdf" or ".svg"'
    )
    if not path.parent.is_dir():
        raise ConfigError(
            f"the folder of save={str(save)!r} does not exist: create the folder {str(path.parent)!r}, or choose "
            "another path."
        )
    return path


def write_figure(figure: Any, path: Path | None) -> None:
    """Write a figure to an image file; the suffix sets the format. Do nothing if the path is None.

    The same figure always gives the same file.

    Raises
    ------
    OutputError
        The file cannot be written. An existing file is unchanged.
    """
    if path is None:
        return
    import matplotlib

    kind = path.suffix.lower().removeprefix(".")
    dated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    dpi = matplotlib.rcParams["savefig.dpi"]
    with atomic_write(path) as temporary, matplotlib.rc_context({"svg.hashsalt": "sct"}):
        figure.savefig(
            temporary,
            format=kind,
            dpi=_DPI if dpi == "figure" else dpi,
            bbox_inches="tight",
            metadata=dated.get(kind),
        )


def legend_outside(ax: Axes, handles: Sequence[Any], labels: Sequence[str], *, points: bool) -> Legend:
    """Add a legend to the right of the axes. Labels are shown as they are, even if they contain "_" or "$"."""
    # Matplotlib drops labels that begin with "_" and reads "$" as mathematics, so the text is set afterwards.
    labels = [wrapped(label) for label in labels]
    legend = ax.legend(
        list(handles),
        [str(i) for i in range(len(handles))],
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        ncols=legend_columns(len(handles)),
        frameon=False,
        fontsize=8,
        alignment="left",
        borderaxespad=0.4,
        handletextpad=0.4,
        # Long enough to show a dashed line; points need less.
        handlelength=1.0 if points else 3.0,
    )
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_parse_math(False)
        text.set_text(label)
    return legend


def wrapped(label: str) -> str:
    """Break a label into lines that fit the width of the legend."""
    return textwrap.fill(label, _LABEL, break_long_words=True)


def legend_columns(entries: int) -> int:
    """Return the number of columns of a legend, with at most 21 entries per column."""
    return max(1, -(-entries // 21))


def legend_width(labels: Sequence[str]) -> float:
    """Return the approximate width of a legend in inches."""
    longest = max((len(line) for label in labels for line in wrapped(label).split("\n")), default=0)
    return legend_columns(len(labels)) * (0.068 * longest + 0.4)


def legend_height(labels: Sequence[str]) -> float:
    """Return the approximate height of a legend in inches."""
    return 0.19 * min(len(labels), 21) + 0.6


def color_bar(axes: Sequence[Axes], mappable: Any, label: str, extend: str = "neither") -> None:
    """Add a color bar to the right of the axes."""
    bar = axes[0].figure.colorbar(mappable, ax=list(axes), extend=extend, shrink=0.75, aspect=24, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label(label, parse_math=False)


def bare(ax: Axes) -> None:
    """Remove the ticks and the frame of axes without meaningful units."""
    ax.set(xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set_visible(False)


def open_frame(ax: Axes) -> None:
    """Remove the top and right lines of the frame."""
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
