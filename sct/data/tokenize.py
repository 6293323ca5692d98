"""From raw counts to tokens, vectorised over the rows of a CSR matrix.

Tokens are computed online, so that changing a model never rewrites a store.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import sparse

from sct.errors import DataError

NOISE_FRACTION = 0.003  # sCT paper, section 3: counts per cell below which a gene is noise in a study
# A count can lie exactly on a border of levels (7 in a cell of 1 to 31). Rounding must not decide its level.
_BORDER = 1e-9


def noisy_genes(gene_totals: np.ndarray, n_cells: int, fraction: float = NOISE_FRACTION) -> np.ndarray:
    """Genes (G,) whose total raw count in a study is below `fraction` x its number of cells.

    They are zeroed before binning, as noise (sCT paper, section 3, "Data processing").
    """
    return np.asarray(gene_totals) < fraction * n_cells


@dataclasses.dataclass(frozen=True)
class Bins:
    """Expression levels of K cells.

    Attributes
    ----------
    tokens
        uint8 (K, num_positions): 0 unexpressed, 1 .. num_bins - 1 from low to high, `num_bins` (PAD) at
        positions beyond the vocabulary.
    low, high
        float32 (K,): range of log1p of the non-zero counts of each cell; 0 for an empty cell.
    values
        float32 (K, num_bins): raw counts that stand for the levels (see `level_values`), or None.
    """

    tokens: np.ndarray
    low: np.ndarray
    high: np.ndarray
    values: np.ndarray | None = None


def digitize(log_counts: np.ndarray, low: np.ndarray, high: np.ndarray, num_bins: int) -> np.ndarray:
    """Level 1 .. num_bins - 1 of log1p counts within [low, high]; arguments broadcast.

    A value on a border belongs to the level above. Values outside the range take the level of the nearer end;
    a range of width zero has level 1 only.
    """
    levels = num_bins - 1
    low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
    width = np.where(high > low, high - low, 1.0)
    level = np.floor((log_counts - low) / width * levels + _BORDER)
    return (1 + np.where(high > low, np.clip(level, 0, levels - 1), 0)).astype(np.uint8)


def bin_counts(
    counts: sparse.csr_matrix,
    *,
    num_bins: int = 5,
    num_positions: int | None = None,
    drop: np.ndarray | None = None,
    with_values: bool = False,
) -> Bins:
    """Turn raw counts into expression levels, cell by cell (sCT paper, section 3).

    log1p of the raw counts, then uniform bins between the lowest and the highest non-zero value of the cell;
    zero stays level 0. A cell whose non-zero counts are all equal has level 1 for them.

    Parameters
    ----------
    counts
        Raw counts (K, G), CSR; several entries of one position count as their sum.
    num_bins
        Levels, zero included.
    num_positions
        Gene positions of the result (>= G); the added ones hold PAD.
    drop
        bool (G,): genes to treat as unexpressed (see `noisy_genes`).
    with_values
        Compute `Bins.values` as well.

    Raises
    ------
    DataError
        If `num_positions` is smaller than G, or counts are negative or not finite.
    """
    n_cells, n_genes = counts.shape
    num_positions = n_genes if num_positions is None else num_positions
    if num_positions < n_genes:
        raise DataError(f"the cells have {n_genes} genes, but the model has only {num_positions} positions.")
    if not counts.has_canonical_format:
        counts = counts.copy()
        counts.sum_duplicates()
    data = np.asarray(counts.data, dtype=np.float32)
    if data.size and not (data.min() >= 0 and np.isfinite(data.max())):
        raise DataError(
            "counts are negative or not finite, but levels are defined for raw counts: give the raw counts."
        )
    keep = data != 0
    if drop is not None:
        keep &= ~np.asarray(drop)[counts.indices]
    rows = np.repeat(np.arange(n_cells), np.diff(counts.indptr))[keep]
    columns, logs = counts.indices[keep], np.log1p(data[keep], dtype=np.float64)

    low, high = np.zeros(n_cells), np.zeros(n_cells)
    starts = np.flatnonzero(np.diff(rows, prepend=-1))
    if starts.size:
        low[rows[starts]] = np.minimum.reduceat(logs, starts)
        high[rows[starts]] = np.maximum.reduceat(logs, starts)
    level = digitize(logs, low[rows], high[rows], num_bins)

    low, high = low.astype(np.float32), high.astype(np.float32)
    tokens = np.zeros((n_cells, num_positions), np.uint8)
    tokens[:, n_genes:] = num_bins
    tokens[rows, columns] = level
    values = level_values(rows, level, data[keep], low, high, num_bins) if with_values else None
    return Bins(tokens, low, high, values)


def level_values(
    rows: np.ndarray, level: np.ndarray, counts: np.ndarray, low: np.ndarray, high: np.ndarray, num_bins: int
) -> np.ndarray:
    """Raw count that stands for each level of each cell: the median of the counts in that level.

    A level that no gene of the cell takes is represented by its middle on the log scale. With these values a
    predicted distribution over levels becomes an expected raw count (sCT paper, section 4, "Metrics").

    Parameters
    ----------
    rows, level, counts
        (nnz,) cell, level and raw count of the expressed genes.
    low, high
        (K,) ranges of the cells, see `Bins`.

    Returns
    -------
    float32 (K, num_bins); column 0 is zero.
    """
    n_cells, levels = low.shape[0], num_bins - 1
    middle = low[:, None] + (high - low)[:, None] * (np.arange(levels) + 0.5) / levels
    values = np.concatenate([np.zeros((n_cells, 1)), np.expm1(middle)], axis=1).astype(np.float32)
    if rows.size:
        group = rows.astype(np.int64) * num_bins + level
        order = np.lexsort((counts, group))
        group, counts = group[order], counts[order]
        starts = np.flatnonzero(np.diff(group, prepend=-1))
        sizes = np.diff(starts, append=group.size)
        median = (counts[starts + (sizes - 1) // 2] + counts[starts + sizes // 2]) / 2
        values.reshape(-1)[group[starts]] = median
    return values


def expected_counts(probabilities: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Expected raw counts (...,) of predicted distributions over levels (..., num_bins).

    `values` (..., num_bins) are the counts that stand for the levels of the cells concerned.
    """
    return np.einsum("...b,...b->...", probabilities, values)
