"""Shared parts of all plots: axes, a color palette for color-blind readers, and legends that are never cut off."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sct.extras import load_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.legend import Legend

# Palette of Okabe & Ito (2008), without black and with the light yellow last.
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#7f5fc7", "#d6c516")
# No palette has 40 colors that all readers can distinguish, so the colors repeat with another marker.
MARKERS = ("o", "^", "s", "D", "v")
GRAY = "#b9bec6"
# Maximum number of characters in a line of a legend.
_LABEL = 34
CONTINUOUS = "viridis"


def new_axes(width: float, height: float, columns: int = 1) -> Any:
    """Create a pyplot figure with one row of axes; return the axes, or an array (columns,) if there are several.

    Raises
    ------
    MissingExtraError
        Matplotlib is not installed.
    """
    plt = load_extra("matplotlib.pyplot", "analysis", "matplotlib", what="a plot")
    _, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained")
    return axes


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
