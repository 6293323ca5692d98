"""Count how often each gene has each expression level in training cells."""

from __future__ import annotations

import numpy as np

from sct.data.bags import BagSource
from sct.data.loader import spread

CELLS = 10_000  # a frequency of 1% is then known to a tenth of its value
_PSEUDO_CELLS = 1.0  # cells with the frequencies of an average gene, which are added to each gene


def log_level_prior(source: BagSource, cells: int = CELLS) -> np.ndarray:
    """Return the logarithm of the frequency of each expression level, for each gene: float32 (P, num_bins).

    Only cells of studies that measured a gene count for this gene. A gene that no study measured has the frequencies of
    an average gene.

    Parameters
    ----------
    source
        Bags of the training studies, with every cell once (`exhaustive`).
    cells
        Approximate number of cells to read, evenly spaced over the source.
    """
    options = source.options
    counted = np.zeros((options.num_positions, options.num_bins))
    for number in spread(len(source), max(1, cells // options.cells_per_bag)):
        bag = source.record(number)
        for level in range(options.num_bins):
            counted[:, level] += (bag["tokens"] == level).sum(axis=0) * bag["measured"]
    average = (counted.sum(axis=0) + 1) / (counted.sum() + options.num_bins)
    smoothed = counted + _PSEUDO_CELLS * average
    return np.log(smoothed / smoothed.sum(axis=1, keepdims=True)).astype(np.float32)
