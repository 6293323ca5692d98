"""Positions of cells in the plane, in units that a model can read."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pandas as pd
from scipy.ndimage import uniform_filter
from scipy.spatial import KDTree

from sct.checks import check_finite, check_shape
from sct.errors import DataError

# The longer side of a slide after rescaling. With the default wavelengths (2 pi to 20 pi) a slide then spans
# about half of the longest one, so that no two places on it look alike, and neighbouring spots of a
# 60 x 60 array stand half a unit apart, far above the shortest wavelength's resolution.
SPATIAL_RANGE = 30.0
# Where scverse tools keep positions in `obsm`, and the store does.
SPATIAL_KEY = "spatial"
# `uns` of an AnnData: the scales of its sections, which parts of it keep.
SCALES = "sct_sections"
# Columns of obs that often name sections.
SECTION_COLUMNS = ("library_id", "section", "slide", "sample", "batch", "donor")

_FEWEST = 20  # cells below which nothing is said about how they lie
_BULK = 0.01  # share of the cells that may lie far off at each end of an axis
_DRAWN = 2000  # cells whose surroundings are looked at
# Measured shares of cells beside a cell of another section: 0.5 and more of overlaid sections, below 0.1 of sections
# that stand side by side.
_MIXED = 0.2
_SHARED_PLACE = 0.1
_APART = 0.9  # of the cells at a place that is taken, those whose section has no other there
_NEAR = 24  # cells around each in which a grid is looked for
_GRID_CELLS = 100  # fewer cells show no grid
_BINS = 50  # bins from such a cell to the farthest of them
# Share of cells that have a neighbour at the same step: measured 0.8 and more on grids, below 0.2 where there is none.
_GRID = 0.4


@dataclasses.dataclass(frozen=True)
class Scale:
    """How positions of one section become those of a model: (position - origin) * factor.

    It is the section's own, computed once from all of its cells, so that a part of them lies as it did in the whole.

    Attributes
    ----------
    cells
        Number of the section's cells.
    low, high
        float64 (2,) corners of the box around all of them.
    origin, factor
        float64 (2,), and the factor; 0 where all cells lie at one place.
    """

    cells: int
    low: np.ndarray
    high: np.ndarray
    origin: np.ndarray
    factor: float

    @classmethod
    def of(cls, coordinates: np.ndarray, stray: np.ndarray | None = None) -> Scale:
        """The scale of a section from the positions of all its cells, (N, 2).

        The corner of the box around the cells is the origin, its longer side becomes `SPATIAL_RANGE`. Cells that
        `stray` (N,) marks, by default those of `stray_cells`, do not stretch the box; they lie outside of the range.

        Raises `DataError` where coordinates are not finite numbers in two columns.
        """
        coordinates = _checked(coordinates)
        if not len(coordinates):
            return cls(0, np.zeros(2), np.zeros(2), np.zeros(2), 0.0)
        stray = stray_cells(coordinates) if stray is None else stray
        bulk = coordinates[~stray]
        origin = bulk.min(axis=0)
        side = float((bulk - origin).max())
        factor = SPATIAL_RANGE / side if side > 0 else 0.0
        return cls(len(coordinates), coordinates.min(axis=0), coordinates.max(axis=0), origin, factor)

    def apply(self, coordinates: np.ndarray) -> np.ndarray:
        """Positions (n, 2) of cells of the section in the units of models, float32; the aspect is kept."""
        return ((_checked(coordinates) - self.origin) * self.factor).astype(np.float32)

    def holds(self, coordinates: np.ndarray) -> bool:
        """Whether positions (n, 2) can be those of the section's cells, or of a part of them.

        Raises `DataError` where they are not finite numbers in two columns.
        """
        coordinates = _checked(coordinates)
        if not len(coordinates) or len(coordinates) > self.cells:
            return False
        slack = 1e-6 * float((self.high - self.low).max())
        low, high = coordinates.min(axis=0), coordinates.max(axis=0)
        if len(coordinates) == self.cells:
            return bool(np.abs(np.concatenate([low - self.low, high - self.high])).max() <= slack)
        return bool((low >= self.low - slack).all() and (high <= self.high + slack).all())


def _checked(coordinates: np.ndarray) -> np.ndarray:
    """Coordinates as float64 (N, 2); `DataError` where they are anything else."""
    coordinates = np.asarray(coordinates, np.float64)
    check_shape(
        "the table of coordinates",
        coordinates,
        ("cells", (2, "coordinates")),
        empty=True,
        advice="give x and y only",
    )
    check_finite("the table of coordinates", coordinates, "cells", advice="drop cells without a position")
    return coordinates


def rescale_coordinates(coordinates: np.ndarray) -> np.ndarray:
    """Positions (N, 2) of a whole section in the units of models, float32; see `Scale.of`.

    Pixels, micrometres and array units give the same result.
    """
    return Scale.of(coordinates).apply(coordinates)


def write_scales(scales: dict[str, Scale], batch_key: str | None) -> dict[str, Any]:
    """What `uns[SCALES]` keeps of one key of positions; h5ad and zarr can store it."""
    return {
        "batch_key": batch_key or "",
        "section": np.array(list(scales), dtype=str),
        "cells": np.array([scale.cells for scale in scales.values()], np.int64),
        "low": np.array([scale.low for scale in scales.values()]),
        "high": np.array([scale.high for scale in scales.values()]),
        "origin": np.array([scale.origin for scale in scales.values()]),
        "factor": np.array([scale.factor for scale in scales.values()]),
    }


def read_scales(uns: Any, spatial_key: str, batch_key: str | None) -> dict[str, Scale]:
    """The scales that `uns` holds of sections by a column of obs; none where it knows none of them.

    Raises `DataError` where the entry does not have the form that `write_scales` gives it.
    """
    found = uns.get(SCALES, {})
    found = found.get(spatial_key) if hasattr(found, "get") else None
    if found is None:
        return {}
    try:
        if str(found["batch_key"]) != (batch_key or ""):
            return {}
        # zarr gives texts of a type that numpy does not cast to its own.
        names, cells = np.asarray(found["section"]).ravel().tolist(), np.asarray(found["cells"], np.int64)
        low, high, origin = (_checked(found[name]) for name in ("low", "high", "origin"))
        factor = np.asarray(found["factor"], np.float64)
        if not np.isfinite(factor).all():
            raise ValueError("a factor is not finite")
        return {
            str(name): Scale(int(n), least, most, start, float(each))
            for name, n, least, most, start, each in zip(names, cells, low, high, origin, factor, strict=True)
        }
    except (KeyError, IndexError, TypeError, ValueError, DataError) as error:
        raise DataError(
            f"uns[{SCALES!r}][{spatial_key!r}] does not describe scales of sections "
            f"({type(error).__name__}: {error}): delete it (del adata.uns[{SCALES!r}]), and compute it again from "
            "whole sections with sct.pp.spatial_scale."
        ) from error


def stray_cells(coordinates: np.ndarray) -> np.ndarray:
    """Mark cells (N,) far away from all others: farther than the section is long from where 98% of each axis lie."""
    if len(coordinates) < _FEWEST:
        return np.zeros(len(coordinates), bool)
    skip = max(1, int(_BULK * len(coordinates)))
    ordered = np.sort(coordinates, axis=0)
    low, high = ordered[skip], ordered[-1 - skip]
    reach = float((high - low).max())
    if reach <= 0:  # nearly all at one place: there is no length to compare with
        return np.zeros(len(coordinates), bool)
    return ((coordinates < low - reach) | (coordinates > high + reach)).any(axis=1)


def doubts(coordinates: np.ndarray, obs: pd.DataFrame, divide_by: str) -> list[str]:
    """Say what is strange about the positions of one section: stray cells, or several sections in one plane.

    Parameters
    ----------
    coordinates
        (N, 2), finite, in the source's unit.
    obs
        The cells' table, for columns that name sections.
    divide_by
        How the option that divides cells into sections is given, such as "batch_key={!r}".
    """
    coordinates = np.asarray(coordinates, np.float64)
    said = []
    stray = stray_cells(coordinates)
    if stray.any():
        rows = np.flatnonzero(stray)
        box, outside = coordinates[~stray], coordinates[rows]
        low, high = box.min(axis=0), box.max(axis=0)
        far = np.linalg.norm(outside - np.clip(outside, low, high), axis=1).max()
        shown = ", ".join(map(str, obs.index[rows[:3]])) + (", ..." if len(rows) > 3 else "")
        said.append(
            f"{len(rows):,} of {len(stray):,} cells lie far outside the section, up to {far:,.6g} away where it is "
            f"{(high - low).max():,.6g} long ({shown}): the scale ignores them; drop them if their positions are wrong"
        )
    name, finding = _overlaid(coordinates[~stray], obs.loc[~stray])
    if finding:
        said.append(
            f"{finding}, so several sections seem to lie over each other: divide them by a column of obs "
            f"({divide_by.format(name) if name else divide_by.partition('{')[0] + '...'})"
        )
    return said


def _overlaid(coordinates: np.ndarray, obs: pd.DataFrame) -> tuple[str, str]:
    """A column that seems to name sections, and what shows that cells of several share a plane ("" for nothing)."""
    n = len(coordinates)
    if n < _FEWEST:
        return "", ""
    drawn = np.random.default_rng(0).permutation(n)[:_DRAWN]
    _, near = KDTree(coordinates).query(coordinates[drawn], k=min(_NEAR, n - 1) + 1)
    columns = [name for name in SECTION_COLUMNS if name in obs and obs[name].nunique() > 1]
    for name in columns:
        codes = pd.factorize(obs[name])[0]
        # Of cells at one place any may come first, and not only the cell itself.
        beside = np.where(near[:, 0] == drawn, near[:, 1], near[:, 0])
        share = float((codes[beside] != codes[drawn]).mean())
        if share > _MIXED:
            return name, f"{share:.0%} of the cells are next to one of another {name}"
    # Cells at one place may also be single cells assigned to a spot: sections have one cell each at a place.
    places, at = np.unique(coordinates, axis=0, return_inverse=True)
    taken = n - len(places)
    if taken > _SHARED_PLACE * n:
        for name in columns:
            pairs = np.stack([at.ravel(), pd.factorize(obs[name])[0]])
            apart = np.unique(pairs, axis=1).shape[1] - len(places)
            if apart > _APART * taken:
                return name, f"{taken:,} of {n:,} cells are at the place of one of another {name}"
    if taken:
        coordinates = places
        drawn = np.random.default_rng(0).permutation(len(places))[:_DRAWN]
    if len(coordinates) < _GRID_CELLS:
        return "", ""
    if taken:
        _, near = KDTree(coordinates).query(coordinates[drawn], k=_NEAR + 1)
    column = columns[0] if columns else ""
    crowded = _crowded(coordinates[near[:, 1:]] - coordinates[drawn][:, None])
    return column, f"{crowded:.0%} of the spots lie between those of a regular grid" if crowded else ""


def _crowded(steps: np.ndarray) -> float:
    """Share of the cells that have others closer than the grid allows on which they lie; 0 without a grid.

    `steps` (n, K, 2) leads from each cell to its nearest. On a grid nearly all cells have a neighbour at the same
    step, the pitch; nothing else lies closer, unless several grids lie over each other.
    """
    length = np.linalg.norm(steps, axis=2)
    reach = float(np.median(length[:, -1]))
    if reach <= 0:
        return 0.0
    bins = 2 * _BINS + 1
    place = np.round(steps / reach * _BINS).astype(np.int64) + _BINS
    inside = ((place >= 0) & (place < bins)).all(axis=2)
    flat = (place[..., 0] * bins + place[..., 1])[inside]
    counts = np.bincount(flat, minlength=bins * bins).reshape(bins, bins).astype(float)
    share = 9 * uniform_filter(counts, 3, mode="constant") / len(steps)
    if share.max() < _GRID:
        return 0.0
    common = (np.argwhere(share > 0.75 * share.max()) - _BINS) * (reach / _BINS)
    pitch = float(np.linalg.norm(common, axis=1).min())
    crowded = float((length[:, 0] < 0.75 * pitch).mean())
    return crowded if crowded > 0.5 else 0.0
