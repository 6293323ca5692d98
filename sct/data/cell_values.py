"""Convert raw counts to model inputs: quantile bins, expression levels, or log-normalized expression."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from scipy import sparse

from sct.data.normalization import log_expression
from sct.data.text.ranking import canonical
from sct.data.tokenize import levels_of


def quantile_bins(counts: sparse.csr_matrix, num_bins: int = 10) -> sparse.csr_matrix:
    """Assign the non-zero values of each cell to quantile bins 1 .. `num_bins`.

    The bin of a value is 1 + floor(num_bins x share). Here, share is the fraction of the cell's non-zero values that
    are smaller than this value. Equal values have the same bin. For example, with 10 bins, a value that is larger than
    5% of the values is in bin 1, and a value that is larger than 18% of the values is in bin 2 (ZerOmics paper).

    Parameters
    ----------
    counts
        Raw or linearly scaled counts (N, G), CSR.
    num_bins
        Number of bins.

    Returns
    -------
    Bin numbers as CSR (N, G). The dtype is uint8, or uint16 for more than 253 bins. In each row, the column indices are
    in ascending order.

    Raises
    ------
    DataError
        Counts are negative or not finite.
    """
    counts = canonical(counts)
    lengths = np.diff(counts.indptr)
    starts = np.repeat(counts.indptr[:-1], lengths)
    rows = np.repeat(np.arange(counts.shape[0]), lengths)
    order = np.lexsort((counts.data, rows))
    values = counts.data[order]
    # The number of smaller values of a cell is the position at which the run of equal values begins.
    begins = (np.diff(values, prepend=-1) != 0) | (np.diff(rows, prepend=-1) != 0)
    place = np.arange(len(values))
    smaller = np.maximum.accumulate(np.where(begins, place, 0)) - starts
    bins = np.empty(len(values), np.uint8 if num_bins <= 253 else np.uint16)
    bins[order] = 1 + num_bins * smaller // np.repeat(lengths, lengths)
    result = sparse.csr_matrix((bins, counts.indices.copy(), counts.indptr.copy()), counts.shape)
    result.sort_indices()
    return result


def log_values(counts: sparse.csr_matrix, num_bins: int = 0) -> sparse.csr_matrix:
    """Return log1p of counts per 10,000, float32 CSR (N, G). The argument `num_bins` is ignored."""
    return log_expression(canonical(counts)).astype(np.float32)


# Name -> function of (counts, number of bins for non-zero values) that returns the values, with zero for zero counts.
VALUES: Mapping[str, Callable[[sparse.csr_matrix, int], sparse.csr_matrix]] = {
    "quantiles": quantile_bins,
    "levels": levels_of,
    "log1p": log_values,
}
