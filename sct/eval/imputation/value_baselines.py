"""Predict values of masked genes from training cells: means, and a regression on the known genes of the cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import svds

from sct.data.gene_tokens import TokenSource
from sct.data.loader import spread
from sct.progress import track

TRAINING_CELLS = 5000  # training cells from which the baselines are computed
_ENTRIES = 20_000_000  # values of training cells that are read at most
GROUPS = 10  # groups of training cells of equal size, by library size or number of expressed genes
PSEUDOCOUNTS = 10.0
GENE, ALL = "mean of the gene in training", "mean of all genes in training"
SIZE, EXPRESSED = "mean by gene and library size", "mean by gene and expressed genes"
COMPONENTS = "components of the known genes"
_GROUPED = {SIZE: "library_size", EXPRESSED: "expressed_genes"}
# The regression is chosen on training cells that it has not seen.
_RANKS, _RIDGES = (4, 16, 64), (0.1, 1.0, 10.0, 100.0)
_CHOOSING_CELLS, _CHOOSING_SHARE, _MASKED_SHARE = 200, 0.2, 0.4
Cell = Mapping[str, np.ndarray]


class TrainingValues:
    """Predictions of masked values from training cells alone.

    Parameters
    ----------
    cells
        Training cells.
    num_rows
        Number of rows of the gene table (V).
    zeros
        Whether values of zero count.
    """

    def __init__(self, cells: TokenSource, num_rows: int, zeros: bool):
        self.cls_id, self.zeros = cells.cls_id, zeros
        most = min(TRAINING_CELLS, max(500, _ENTRIES // cells.length))
        records = [cells.record(n) for n in track(spread(len(cells), most), "reading training cells")]
        self.means = {
            name: _GroupMeans(records, key, num_rows, self.counts) for name, key in _GROUPED.items()
        }
        errors = dict.fromkeys(self.means, 0.0)
        for record in records:
            kept = self.counts(record)
            for name, means in self.means.items():
                errors[name] += float(np.square(record["values"] - means.predictions(record))[kept].sum())
        self.base = min(errors, key=errors.__getitem__)  # the means to which the regression adds
        self.components = _Components.choose(records, self.deviations, self.counts, num_rows)

    def counts(self, cell: Cell) -> np.ndarray:
        """Return which genes of a cell count, bool (L,)."""
        kept = ~cell["padding_mask"] & (cell["gene_ids"] != self.cls_id)
        return kept if self.zeros else kept & (cell["values"] > 0)

    def deviations(self, cell: Cell) -> np.ndarray:
        """Return how much the values of a cell differ from the means of genes in similar cells, (L,)."""
        return np.asarray(cell["values"] - self.means[self.base].predictions(cell))

    def predictions(self, batch: Cell, masked: np.ndarray) -> dict[str, np.ndarray]:
        """Return the predicted values of the masked genes of a batch, by name of the baseline, (n,) each.

        Parameters
        ----------
        batch
            Records of cells, stacked, (B, ...).
        masked
            Which genes are masked, bool (B, L).
        """
        made: dict[str, list[np.ndarray]] = {name: [] for name in (COMPONENTS, *_GROUPED, GENE, ALL)}
        for number, mask in enumerate(masked):
            if not mask.any():
                continue
            cell = {name: value[number] for name, value in batch.items()}
            rows = cell["gene_ids"]
            grouped = {name: means.predictions(cell) for name, means in self.means.items()}
            gene = self.means[SIZE].gene[rows]
            known = self.counts(cell) & ~mask
            shift = self.components.predict(rows[known], self.deviations(cell)[known], rows)
            every = {
                COMPONENTS: grouped[self.base] + shift, **grouped, GENE: gene,
                ALL: np.full(len(rows), self.means[SIZE].overall),
            }  # fmt: skip
            for name, values in every.items():
                made[name].append(values[mask])
        return {name: np.concatenate(parts) if parts else np.zeros(0) for name, parts in made.items()}


class _GroupMeans:
    """Means of the values of each gene in groups of training cells, smoothed by the mean of the gene.

    `key` names the number of a cell by which cells are grouped.
    """

    def __init__(self, records: Sequence[Cell], key: str, num_rows: int, counts: Any):
        self.key = key
        sizes = np.array([record[key] for record in records])
        self.borders = np.quantile(sizes, np.linspace(0, 1, GROUPS + 1)[1:-1])
        total, count = np.zeros((2, GROUPS, num_rows))
        for record, group in zip(records, self.groups(sizes), strict=True):
            kept = counts(record)
            np.add.at(total[group], record["gene_ids"][kept], record["values"][kept])
            np.add.at(count[group], record["gene_ids"][kept], 1)
        self.overall = float(total.sum() / max(count.sum(), 1))
        self.gene = _smoothed(total.sum(axis=0), count.sum(axis=0), self.overall)
        self.by_group = _smoothed(total, count, self.gene)

    def groups(self, sizes: np.ndarray) -> np.ndarray:
        """Return the group of each size."""
        return np.searchsorted(self.borders, sizes, side="right")

    def predictions(self, cell: Cell) -> np.ndarray:
        """Return the mean of every gene of a cell (L,) in training cells of its group."""
        group = self.groups(np.asarray(cell[self.key]))
        return np.asarray(self.by_group[group, cell["gene_ids"]])


def _smoothed(total: np.ndarray, count: np.ndarray, prior: Any) -> np.ndarray:
    return (total + PSEUDOCOUNTS * prior) / (count + PSEUDOCOUNTS)


class _Components:
    """Ridge regression of the deviations of masked genes on those of known genes, through principal components.

    The loadings (R, V) of R components come from the deviations in training cells, which are zero for genes that a cell
    does not read. The scores of a cell fit its known genes, with a ridge penalty; they predict its other genes.
    """

    def __init__(self, loadings: np.ndarray, ridge: float):
        self.loadings, self.ridge = loadings, ridge

    def predict(self, known: np.ndarray, deviations: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """Return the deviations of the genes in rows `wanted` (n,) from those of the genes in rows `known` (m,)."""
        seen = self.loadings[:, known]
        square = seen @ seen.T + self.ridge * np.eye(len(seen))
        return np.asarray(np.linalg.solve(square, seen @ deviations) @ self.loadings[:, wanted])

    @classmethod
    def choose(cls, records: Sequence[Cell], deviations: Any, counts: Any, num_rows: int) -> _Components:
        """Choose the number of components and the penalty on some training cells, and then use all of them."""
        rng = np.random.default_rng(0)
        cells: list[tuple[np.ndarray, np.ndarray]] = []
        for record in records:
            kept = counts(record)
            cells.append((record["gene_ids"][kept], deviations(record)[kept]))
        # The penalty is relative to the variance of a value.
        variance = float(np.concatenate([values for _, values in cells]).var()) or 1.0
        order = rng.permutation(len(cells)).tolist()
        number = min(_CHOOSING_CELLS, int(_CHOOSING_SHARE * len(cells)))
        loadings = _loadings([cells[at] for at in order[number:]], num_rows)
        errors = {(rank, ridge): 0.0 for rank in _RANKS if rank <= len(loadings) for ridge in _RIDGES}
        for rows, values in (cells[at] for at in order[:number]):
            masked = rng.random(len(rows)) < _MASKED_SHARE
            for rank, ridge in errors:
                tried = cls(loadings[:rank], ridge * variance)
                made = tried.predict(rows[~masked], values[~masked], rows[masked])
                errors[rank, ridge] += float(np.square(made - values[masked]).sum())
        rank, ridge = min(errors, key=errors.__getitem__) if errors else (0, 1.0)
        return cls(_loadings(cells, num_rows)[:rank], ridge * variance)


def _loadings(cells: Sequence[tuple[np.ndarray, np.ndarray]], num_rows: int) -> np.ndarray:
    """Return the loadings (R, V) of scores with variance 1, from rows of genes and their deviations in each cell."""
    starts = np.cumsum([0, *(len(rows) for rows, _ in cells)])
    rows, values = (np.concatenate([cell[part] for cell in cells]) for part in (0, 1))
    matrix = sparse.csr_matrix((values.astype(np.float64), rows, starts), (len(cells), num_rows))
    number = min(max(_RANKS), min(matrix.shape) - 1)
    if number < 1:
        return np.zeros((0, num_rows))
    if min(matrix.shape) <= 2 * number:  # the sparse method is for few components
        _, scales, loadings = np.linalg.svd(matrix.toarray(), full_matrices=False)
        scales, loadings = scales[:number], loadings[:number]
    else:
        _, scales, loadings = svds(matrix, number, v0=np.ones(min(matrix.shape)), solver="arpack")
        scales, loadings = scales[::-1], loadings[::-1]  # ascending in scipy
    return np.asarray(loadings * (scales / np.sqrt(len(cells)))[:, None])
