"""Baselines of imputation, fitted on training cells and asked at the same masked positions as the model."""

from __future__ import annotations

import numpy as np
from scipy import sparse
from sklearn.neighbors import NearestNeighbors

from sct.data.bags import BagSource
from sct.progress import track


def level_frequencies(train: BagSource) -> np.ndarray:
    """Number of cells (P, num_bins) in which each gene takes each level."""
    num_bins, positions = train.options.num_bins, train.options.num_positions
    frequencies = np.zeros((positions, num_bins), np.int64)
    for number in track(range(len(train)), "counting levels"):
        tokens = train.bag(number)["tokens"]
        for level in range(num_bins):
            frequencies[:, level] += (tokens == level).sum(axis=0)
    return frequencies


def most_common_level(frequencies: np.ndarray) -> np.ndarray:
    """Most common level of each gene, (P,)."""
    return frequencies.argmax(axis=1)


def most_common_expressed_level(frequencies: np.ndarray) -> np.ndarray:
    """Most common level above zero of each gene, (P,); a gene that is never expressed has level 1.

    It is told that a gene is expressed. This is the strong baseline: the levels of most genes hardly vary.
    """
    return 1 + frequencies[:, 1:].argmax(axis=1)


class KnnSmoothing:
    """Mean raw counts of the nearest training cells, scaled to the cell's library size.

    Neighbours are found by cosine distance of log1p counts per 10,000, on the genes that are not masked in
    the cell (the masked ones are zero in the query).

    Parameters
    ----------
    train
        Training cells.
    neighbours
        k.
    max_cells
        Training cells searched at most, the same number of each study: the first ones (the order is random),
        or evenly spaced ones of a spatial study (whose order follows the plane).
    """

    def __init__(self, train: BagSource, neighbours: int = 5, max_cells: int = 5000):
        each = -(-max_cells // len(train.studies))
        blocks = [
            study.read_rows(np.linspace(0, study.n_cells - 1, min(study.n_cells, each)).astype(int))
            if study.spatial
            else study.read(0, min(study.n_cells, each))
            for study in train.studies
        ]
        self.counts = sparse.vstack(blocks).tocsr()
        self.neighbours = min(neighbours, self.counts.shape[0])
        self._index = NearestNeighbors(n_neighbors=self.neighbours, metric="cosine").fit(
            self._profile(self.counts)
        )

    @staticmethod
    def _profile(counts: sparse.csr_matrix) -> sparse.csr_matrix:
        total = np.asarray(counts.sum(axis=1)).ravel()
        scaled = sparse.diags(1e4 / np.maximum(total, 1)) @ counts
        return scaled.log1p().tocsr()

    def __call__(self, counts: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Expected raw counts (K, P) of cells with raw counts (K, P), of which `mask` (K, P) are hidden."""
        genes = self.counts.shape[1]
        visible = np.where(mask, 0, counts)[:, :genes]
        query = self._profile(sparse.csr_matrix(visible))
        rows = self._index.kneighbors(query, return_distance=False)
        starts = np.arange(len(rows) + 1) * self.neighbours
        share = np.full(rows.size, 1 / self.neighbours)
        means = (
            sparse.csr_matrix((share, rows.ravel(), starts), (len(rows), self.counts.shape[0])) @ self.counts
        ).toarray()
        seen = np.where(mask[:, :genes], 0, means).sum(axis=1)
        # Neighbours that show none of the visible genes tell nothing about the library size.
        factor = np.where(seen > 0, visible.sum(axis=1) / np.where(seen > 0, seen, 1), 1)
        out = np.zeros(counts.shape, np.float32)
        out[:, :genes] = means * factor[:, None]
        return out
