"""Draw the architecture of sCT as an SVG file for the README. Shapes and widths come from `SCTConfig`.

python tools/draw_architecture.py docs/images/sct.svg
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from sct.atomic import atomic_write
from sct.models.sct_config import SCTConfig
from sct.pl.style import COLORS, GRAY

CELLS = 50
BLUE, ORANGE, GREEN = COLORS[0], COLORS[1], COLORS[2]


def box(ax: Any, x: float, y: float, width: float, height: float, color: str, text: str = "") -> None:
    """Draw a rounded box with a text, centered at (x, y), on the Matplotlib axes `ax`."""
    style = "round,pad=0,rounding_size=0.06"
    corner = (x - width / 2, y - height / 2)
    ax.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, facecolor=color, edgecolor="none"))
    ax.text(x, y, text, ha="center", va="center", color="white", fontsize=8.5, linespacing=1.35)


def arrow(ax: Any, start: tuple[float, float], end: tuple[float, float], **style: Any) -> None:
    """Draw an arrow from one point (x, y) to another on the Matplotlib axes `ax`."""
    ax.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, shrinkA=0, shrinkB=0, **style)
    )


def draw(config: SCTConfig, shown: Sequence[int]) -> Any:
    """Draw the U-Net and return the Matplotlib figure.

    `shown` lists the levels to draw, counted from the outermost level, which is 0.
    """
    figure, ax = plt.subplots(figsize=(10, 4.55), layout="constrained")
    ax.set_axis_off()
    ax.set_xlim(0, 10)
    ax.set_ylim(0.35, 4.9)
    ax.set_aspect("equal")
    # The input: a table of cells by genes. The shade of a position stands for its expression level.
    rows, columns = 6, 9
    for row in range(rows):
        for column in range(columns):
            level = (row * 7 + column * 5 + row * column) % config.num_bins
            shade = (0.12, 0.3, 0.5, 0.7, 0.95)[level % 5]
            masked = (row, column) in {(1, 3), (3, 6), (4, 1)}
            face = ORANGE if masked else BLUE
            ax.add_patch(
                plt.Rectangle(
                    (0.15 + column * 0.14, 3.5 + row * 0.14),
                    0.12,
                    0.12,
                    facecolor=face,
                    alpha=1 if masked else shade,
                )
            )
    genes = f"{config.num_genes:,}"
    million = CELLS * config.num_genes / 1e6
    ax.text(0.77, 4.72, "gene expression levels", ha="center", va="center", fontsize=9, fontweight="bold")
    ax.text(0.77, 4.50, "orange: masked", ha="center", va="center", fontsize=8, color="#555555")
    ax.text(0.77, 3.32, f"{CELLS} cells x {genes} genes", ha="center", va="center", fontsize=8.5)
    ax.text(0.77, 3.12, f"{million:.2f} million tokens", ha="center", va="center", fontsize=8.5)
    # The two towers, with one box per level. Boxes become narrower towards the bottom.
    top, step = 4.0, 0.62
    widths = {level: 1.62 - 0.17 * place for place, level in enumerate(shown)}
    left, right = 3.0, 7.0
    arrow(ax, (1.5, top), (left - 0.95, top), color="#555555", linewidth=1.2)
    y = top
    for place, level in enumerate(shown):
        length = CELLS * config.num_genes >> level
        label = f"{length:,} x {config.filters[level]}"
        name = "after stem" if level == 0 else f"after level {level}"
        box(ax, left, y, widths[level], 0.46, BLUE, f"{name}\n{label}")
        box(ax, right, y, widths[level], 0.46, GREEN, label)
        if level != shown[-1]:
            # A skip connection leads from the input of a level to the matching level of the other tower.
            arrow(
                ax,
                (left + widths[level] / 2 + 0.05, y),
                (right - widths[level] / 2 - 0.05, y),
                color=GRAY,
                linewidth=1.1,
                linestyle=(0, (4, 2)),
            )
            gap = 0.0 if level + 1 == shown[place + 1] else 0.26  # levels that are not shown
            below = y - step - gap
            for x, color, ends in (
                (left, BLUE, (y - 0.24, below + 0.25)),
                (right, GREEN, (below + 0.25, y - 0.24)),
            ):
                arrow(ax, (x, ends[0]), (x, ends[1]), color=color, linewidth=1.2)
                if gap:
                    ax.text(
                        x + 0.12,
                        (y + below) / 2,
                        f"levels {level + 1} to {shown[place + 1] - 1}",
                        fontsize=8,
                        va="center",
                        color="#555555",
                    )
            y = below
    ax.text(left, top + 0.5, "convolution tower", ha="center", fontsize=9, fontweight="bold")
    ax.text(right, top + 0.5, "deconvolution tower", ha="center", fontsize=9, fontweight="bold")
    ax.text(5, top + 0.1, "skip connections", ha="center", fontsize=8, color="#555555")
    bottom = y
    inner = CELLS * config.num_genes >> config.num_downsamples
    y = bottom - 0.75
    inside = (
        f"transformer: {config.num_layers} layers, {config.num_heads} heads\n"
        f"{inner:,} positions x {config.embed_dim}, all cells together"
    )
    box(
        ax,
        5,
        y,
        2.9,
        0.62,
        ORANGE,
        inside,
    )
    arrow(
        ax,
        (left, bottom - 0.24),
        (3.5, y + 0.05),
        color="#555555",
        linewidth=1.2,
        connectionstyle="arc3,rad=0.3",
    )
    arrow(
        ax,
        (6.5, y + 0.05),
        (right, bottom - 0.24),
        color="#555555",
        linewidth=1.2,
        connectionstyle="arc3,rad=0.3",
    )
    ax.text(
        5,
        y - 0.55,
        "mean over a cell's positions: cell embedding",
        ha="center",
        fontsize=8.5,
        color="#555555",
    )
    # The outputs.
    arrow(ax, (right + 0.95, top), (8.5, top), color="#555555", linewidth=1.2)
    ax.text(9.2, 4.72, "prediction", ha="center", va="center", fontsize=9, fontweight="bold")
    for number in range(config.num_bins):
        height = (0.1, 0.22, 0.5, 0.28, 0.14)[number % 5]
        ax.add_patch(plt.Rectangle((8.72 + number * 0.2, 3.62), 0.16, height, facecolor=GREEN))
    ax.text(9.2, 4.36, "for every cell and gene", ha="center", va="center", fontsize=8, color="#555555")
    ax.text(9.2, 3.42, f"probabilities of {config.num_bins} levels", ha="center", va="center", fontsize=8.5)
    return figure


def main() -> None:
    """Draw the published architecture and write the SVG file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, help="SVG file to write")
    path = parser.parse_args().path
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "sct", "font.family": "sans-serif"})
    config = SCTConfig()
    levels = config.num_downsamples
    figure = draw(config, (0, 1, 2, levels))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        figure.savefig(file, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
