"""A study in memory, with what bags and baselines ask of one."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from sct.data.coordinates import rescale_coordinates
from sct.data.tokenize import noisy_genes


class FakeStudy:
    """Stands in for `sct.data.store.Study`; picklable."""

    def __init__(self, counts: np.ndarray, name: str = "toy", coordinates: np.ndarray | None = None):
        self.counts = sp.csr_matrix(np.asarray(counts, np.float32))
        self.name, self.coordinates = name, coordinates
        self.n_cells, self.n_genes = self.counts.shape
        self.spatial = coordinates is not None
        self.measured = np.ones(self.n_genes, bool)

    @property
    def gene_totals(self) -> np.ndarray:
        return np.asarray(self.counts.sum(axis=0), np.float64).ravel()

    def check_counts(self) -> None:
        pass

    def noisy_genes(self, fraction: float) -> np.ndarray:
        return noisy_genes(self.gene_totals, self.n_cells, fraction)

    def rescaled_coordinates(self) -> np.ndarray:
        return rescale_coordinates(self.coordinates)

    def read(self, start: int, stop: int) -> sp.csr_matrix:
        return self.counts[start:stop]

    def read_rows(self, rows: np.ndarray) -> sp.csr_matrix:
        assert np.all((np.asarray(rows) >= 0) & (np.asarray(rows) < self.n_cells)), rows
        return self.counts[rows]


def toy_counts(n_cells: int, n_genes: int, seed: int = 0) -> np.ndarray:
    """Counts (N, G) with about half of the values zero; the first gene of a cell tells its row."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.gamma(0.6, 4.0, (n_cells, n_genes)))
    counts[:, 0] = 1 + np.arange(n_cells)
    return counts


def toy_study(n_cells: int, n_genes: int = 12, seed: int = 0, spatial: bool = False, name: str = "toy"):
    """Study of `toy_counts`, laid out at random in the plane where it is spatial."""
    coordinates = None
    if spatial:
        coordinates = (
            np.random.default_rng(seed + 1).random((n_cells, 2)).astype(np.float32) * [400, 900] + 70
        )
    return FakeStudy(toy_counts(n_cells, n_genes, seed), name, coordinates)
