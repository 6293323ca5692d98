"""Rescale the spatial coordinates of cells to the units of models, and check them for suspicious values."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pandas as pd
from scipy.ndimage import uniform_filter
from scipy.spatial import KDTree

from sct.checks import check_finite, check_shape
from sct.errors import DataError

# Length of the longer side of a slide after rescaling. With the default wavelengths (2 pi to 20 pi), a slide spans
# about half of the longest wavelength, so all places on it are distinguishable. Neighboring spots of a 60 x 60 array
# are half a unit apart, far above the resolution of the shortest wavelength.
SPATIAL_RANGE = 30.0
# Key of the coordinates in `obsm`, as in other scverse tools.
SPATIAL_KEY = "spatial"
# Key in `uns` for the scales of the sections. Subsets of the AnnData keep it.
SCALES = "sct_sections"
# Columns of obs that often contain the section.
SECTION_COLUMNS = ("library_id", "section", "slide", "sample", "batch", "donor")

_FEWEST = 20  # minimal number of cells for these checks
_BULK = 0.01  # fraction of the cells to ignore at each end of an axis
_DRAWN = 2000  # number of cells whose neighbors are checked
# Fraction of cells whose nearest neighbor is in another section. Measured: at least 0.5 for overlaid sections, below
# 0.1 for sections side by side.
_MIXED = 0.2
_SHARED_PLACE = 0.1  # fraction of cells at a place that another cell also has
_APART = 0.9  # among these cells, the fraction whose section has no other cell at that place
_NEAR = 24  # number of neighbors for finding a grid
_GRID_CELLS = 100  # minimal number of cells for finding a grid
_BINS = 50  # histogram bins from a cell to its farthest neighbor
# Fraction of cells with a neighbor at the same offset. Measured: at least 0.8 on grids, below 0.2 otherwise.
_GRID = 0.4


@dataclasses.dataclass(frozen=True)
class Scale:
    """Rescale the coordinates of a tissue section: (position - origin) * factor.

    The scale is computed once from all cells of the tissue section. If cells are removed later, the rescaled
    coordinates of the other cells do not change.

    Attributes
    ----------
    cells
        Number of cells of the section.
    low, high
        Corners of the bounding box of all cells, float64 (2,).
    origin
        Position that becomes (0, 0), float64 (2,).
    factor
        Scaling factor; 0 if all cells are at the same place.
    """

    cells: int
    low: np.ndarray
    high: np.ndarray
    origin: np.ndarray
    factor: float

    @classmethod
    def of(cls, coordinates: np.ndarray, stray: np.ndarray | None = None) -> Scale:
        """Compute the scale of a section from the coordinates of all its cells.

        The lower corner of the bounding box becomes the origin, and the longer side of the box gets the length
        `SPATIAL_RANGE`.

        Parameters
        ----------
        coordinates
            Coordinates (N, 2) in any unit.
        stray
            Mask of outlying cells, bool (N,). The bounding box ignores these cells. Default: the mask that
            `stray_cells` returns.

        Raises
        ------
        DataError
            The coordinates are not finite or do not have two columns.
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
        """Rescale the coordinates (n, 2) of cells of the section to float32. The aspect ratio is preserved."""
        return ((_checked(coordinates) - self.origin) * self.factor).astype(np.float32)

    def holds(self, coordinates: np.ndarray) -> bool:
        """Return whether coordinates (n, 2) can belong to the cells of this section or to a subset of them.

        Raises
        ------
        DataError
            The coordinates are not finite or do not have two columns.
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
    """Return coordinates as float64 (N, 2); raise `DataError` if they are not finite or have another shape."""
    coordinates = np.asarray(coordinates, np.float64)
    check_shape(
        "the table of coordinates",
        coordinates,
        ("cells", (2, "coordinates")),
        empty=True,
        advice="give only x and y",
    )
    check_finite("the table of coordinates", coordinates, "cells", advice="remove cells without coordinates")
    return coordinates


def rescale_coordinates(coordinates: np.ndarray) -> np.ndarray:
    """Rescale the coordinates (N, 2) of a complete section to the units of models, float32; see `Scale.of`.

    The result does not depend on the unit: pixels, micrometers and array coordinates give the same result.
    """
    return Scale.of(coordinates).apply(coordinates)


def write_scales(scales: dict[str, Scale], batch_key: str | None) -> dict[str, Any]:
    """Return the entry of `uns[SCALES]` for the coordinates under one key of `obsm`.

    The entry has a form that h5ad and zarr can store.
    """
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
    """Read from `uns` how the coordinates of each tissue section are rescaled.

    Parameters
    ----------
    uns
        `adata.uns`.
    spatial_key
        Key of the coordinates in `obsm`.
    batch_key
        Column of `obs` with the tissue section of each cell, or None for a single section.

    Returns
    -------
    Dict from the name of each section to its `Scale`; empty if `uns` has no scales for this key and column.

    Raises
    ------
    DataError
        The entry does not have the form of `write_scales`.
    """
    found = uns.get(SCALES, {})
    found = found.get(spatial_key) if hasattr(found, "get") else None
    if found is None:
        return {}
    try:
        if str(found["batch_key"]) != (batch_key or ""):
            return {}
        # zarr returns a string type that NumPy cannot cast.
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
            f"uns[{SCALES!r}][{spatial_key!r}] must contain the coordinate scale of each section, but cannot be read "
            f"({type(error).__name__}: {error}): delete the entry (del adata.uns[{SCALES!r}]), and compute the scales "
            "again from complete sections with sct.pp.spatial_scale."
        ) from error


def stray_cells(coordinates: np.ndarray) -> np.ndarray:
    """Return a mask of the cells that lie far away from all others, bool (N,).

    The central range holds 98% of the cells on each axis. A cell is outlying if its distance from this range exceeds
    the length of the range.
    """
    if len(coordinates) < _FEWEST:
        return np.zeros(len(coordinates), bool)
    skip = max(1, int(_BULK * len(coordinates)))
    ordered = np.sort(coordinates, axis=0)
    low, high = ordered[skip], ordered[-1 - skip]
    reach = float((high - low).max())
    if reach <= 0:  # nearly all cells are at the same place, so there is no length to compare with
        return np.zeros(len(coordinates), bool)
    return ((coordinates < low - reach) | (coordinates > high + reach)).any(axis=1)


def doubts(coordinates: np.ndarray, obs: pd.DataFrame, divide_by: str) -> list[str]:
    """Return one sentence for each problem with the spatial coordinates of a tissue section.

    Two problems are detected: outlying cells, and cells of several tissue sections that overlap in the same plane.

    Parameters
    ----------
    coordinates
        Finite coordinates (N, 2) in the unit of the input.
    obs
        Table of the cells. The function looks for a column that contains the sections.
    divide_by
        Template of the option to recommend, such as "batch_key={!r}". The placeholder is replaced by the name of the
        column that contains the sections.
    """
    coordinates = np.asarray(coordinates, np.float64)
    found = []
    stray = stray_cells(coordinates)
    if stray.any():
        rows = np.flatnonzero(stray)
        box, outside = coordinates[~stray], coordinates[rows]
        low, high = box.min(axis=0), box.max(axis=0)
        far = np.linalg.norm(outside - np.clip(outside, low, high), axis=1).max()
        shown = ", ".join(map(str, obs.index[rows[:3]])) + (", ..." if len(rows) > 3 else "")
        found.append(
            f"{len(rows):,} of {len(stray):,} cells are far outside the section, up to {far:,.6g} away, while it is "
            f"{(high - low).max():,.6g} long ({shown}): the scale ignores them; remove them if their coordinates are "
            "wrong"
        )
    name, finding = _overlaid(coordinates[~stray], obs.loc[~stray])
    if finding:
        found.append(
            f"{finding}, so several sections seem to overlap in one plane: separate them by a column of obs "
            f"({divide_by.format(name) if name else divide_by.partition('{')[0] + '...'})"
        )
    return found


def _overlaid(coordinates: np.ndarray, obs: pd.DataFrame) -> tuple[str, str]:
    """Detect whether the coordinates mix several tissue sections that overlap in the same plane.

    Returns
    -------
    Two strings. The first is the name of the column of `obs` that probably contains the sections, or "" without such a
    column. The second is the evidence that several sections overlap, or "" without evidence.
    """
    n = len(coordinates)
    if n < _FEWEST:
        return "", ""
    drawn = np.random.default_rng(0).permutation(n)[:_DRAWN]
    _, near = KDTree(coordinates).query(coordinates[drawn], k=min(_NEAR, n - 1) + 1)
    columns = [name for name in SECTION_COLUMNS if name in obs and obs[name].nunique() > 1]
    for name in columns:
        codes = pd.factorize(obs[name])[0]
        # If several cells are at the same place, the tree may return another one of them first.
        beside = np.where(near[:, 0] == drawn, near[:, 1], near[:, 0])
        share = float((codes[beside] != codes[drawn]).mean())
        if share > _MIXED:
            return name, f"{share:.0%} of the cells are next to a cell of another {name}"
    # Several cells at the same place may also be single cells assigned to a spot. Overlaid sections are different: each
    # section has one cell per place.
    places, at = np.unique(coordinates, axis=0, return_inverse=True)
    taken = n - len(places)
    if taken > _SHARED_PLACE * n:
        for name in columns:
            pairs = np.stack([at.ravel(), pd.factorize(obs[name])[0]])
            apart = np.unique(pairs, axis=1).shape[1] - len(places)
            if apart > _APART * taken:
                return name, f"{taken:,} of {n:,} cells are at the same place as a cell of another {name}"
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
    """Return the fraction of cells with a neighbor closer than the spacing of their grid; 0 if there is no grid.

    On a single grid, nearly all cells have a neighbor at the same offset (the pitch), and no cell has a closer
    neighbor. Several overlaid grids have closer neighbors.

    Parameters
    ----------
    steps
        Offsets from each cell to its nearest neighbors, (n, K, 2).
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
