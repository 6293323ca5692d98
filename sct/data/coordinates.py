"""Positions of cells in the plane, in units that a model can read."""

from __future__ import annotations

import numpy as np

from sct.errors import DataError

# The longer side of a slide after rescaling. With the default wavelengths (2 pi to 20 pi) a slide then spans
# about half of the longest one, so that no two places on it look alike, and neighbouring spots of a
# 60 x 60 array stand half a unit apart, far above the shortest wavelength's resolution.
SPATIAL_RANGE = 30.0


def rescale_coordinates(coordinates: np.ndarray) -> np.ndarray:
    """Move a slide's coordinates (N, 2) to the origin and scale its longer side to `SPATIAL_RANGE`.

    The aspect is kept, so distances stay proportional; pixels, micrometres and array units give the same
    result. Raises `DataError` where coordinates are not finite numbers in two columns.
    """
    coordinates = np.asarray(coordinates, np.float64)
    if coordinates.ndim != 2 or coordinates.shape[1] != 2:
        raise DataError(
            f"coordinates have the shape {coordinates.shape}, but (cells, 2) is needed: give x and y only."
        )
    lost = ~np.isfinite(coordinates).all(axis=1)
    if lost.any():
        raise DataError(
            f"{int(lost.sum()):,} of {len(coordinates):,} cells have missing coordinates (the first is row "
            f"{int(np.argmax(lost))}): drop cells without a position."
        )
    shifted = coordinates - coordinates.min(axis=0)
    side = shifted.max() if shifted.size else 0.0
    return (shifted * (SPATIAL_RANGE / side if side > 0 else 0.0)).astype(np.float32)
