"""Log-normalized expression: logarithms of counts per 10,000."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import sparse

TARGET = 1e4  # counts of a cell after normalization


def per_count(counts: sparse.csr_matrix, target: float = TARGET, dtype: Any = None) -> np.ndarray:
    """What one count of each cell is worth where the cell has `target` counts, (N,); 0 in an empty cell.

    Parameters
    ----------
    counts
        Raw counts (N, G).
    target
        Counts of a cell after normalization.
    dtype
        Type of the result; by default that of the counts, float64 of integers.
    """
    totals = np.asarray(counts.sum(axis=1, dtype=dtype)).ravel()
    if not np.issubdtype(totals.dtype, np.floating):
        totals = totals.astype(np.float64)
    return np.divide(target, totals, out=np.zeros_like(totals), where=totals > 0)


def log_expression(counts: sparse.csr_matrix, dtype: Any = None) -> sparse.csr_matrix:
    """log1p of counts per 10,000, CSR (N, G); a cell without counts stays empty.

    Parameters
    ----------
    counts
        Raw counts (N, G).
    dtype
        Type of the factors of the cells, see `per_count`; the result has the wider type of theirs and the counts'.
    """
    return sparse.csr_matrix(sparse.diags(per_count(counts, dtype=dtype)) @ counts).log1p()
