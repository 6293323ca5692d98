"""Compute log-normalized expression: log1p of counts per 10,000."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import sparse

TARGET = 1e4  # total count of a cell after normalization


def per_count(counts: sparse.csr_matrix, target: float = TARGET, dtype: Any = None) -> np.ndarray:
    """Return the normalization factor of each cell, (N,): target / total count, or 0 for an empty cell.

    Parameters
    ----------
    counts
        Raw counts (N, G).
    target
        Total count of a cell after normalization.
    dtype
        dtype of the result. Default: the dtype of the counts, or float64 if the counts are integers.
    """
    totals = np.asarray(counts.sum(axis=1, dtype=dtype)).ravel()
    if not np.issubdtype(totals.dtype, np.floating):
        totals = totals.astype(np.float64)
    return np.divide(target, totals, out=np.zeros_like(totals), where=totals > 0)


def log_expression(counts: sparse.csr_matrix, dtype: Any = None) -> sparse.csr_matrix:
    """Return log1p of counts per 10,000, CSR (N, G). Cells without counts stay empty.

    Parameters
    ----------
    counts
        Raw counts (N, G).
    dtype
        dtype of the normalization factors; see `per_count`. The dtype of the result is this dtype or the dtype of the
        counts, whichever is wider.
    """
    return sparse.csr_matrix(sparse.diags(per_count(counts, dtype=dtype)) @ counts).log1p()
