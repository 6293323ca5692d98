"""What is read of a gene in a cell: quantile bins, levels, or log-normalized expression, by one name each."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from scipy import sparse

from sct.data.normalization import log_expression
from sct.data.text.ranking import canonical
from sct.data.tokenize import levels_of


def quantile_bins(counts: sparse.csr_matrix, num_bins: int = 10) -> sparse.csr_matrix:
    """Bins 1 .. `num_bins` of the non-zero values of each cell.

    Bin = 1 + floor(num_bins x share); share is the fraction of the cell's non-zero values that are smaller. Equal
    values have one bin. A share of 5% is bin 1, of 18% bin 2 (the paper's examples, with 10 bins).

    Parameters
    ----------
    counts
        Raw or linearly scaled counts (N, G), CSR.

    Returns
    -------
    uint8 CSR (N, G), with the columns of each row ascending.

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
    # Smaller values of a cell: the place at which the run of values equal to this one begins.
    begins = (np.diff(values, prepend=-1) != 0) | (np.diff(rows, prepend=-1) != 0)
    place = np.arange(len(values))
    smaller = np.maximum.accumulate(np.where(begins, place, 0)) - starts
    bins = np.empty(len(values), np.uint8)
    bins[order] = 1 + num_bins * smaller // np.repeat(lengths, lengths)
    result = sparse.csr_matrix((bins, counts.indices.copy(), counts.indptr.copy()), counts.shape)
    result.sort_indices()
    return result


def log_values(counts: sparse.csr_matrix, num_bins: int = 0) -> sparse.csr_matrix:
    """log1p of counts per 10,000, float32 CSR (N, G), see `sct.data.normalization.log_expression`; no bins."""
    return log_expression(canonical(counts)).astype(np.float32)


# Name -> (counts, number of bins of expressed values) -> values, zero where there is no count.
VALUES: Mapping[str, Callable[[sparse.csr_matrix, int], sparse.csr_matrix]] = {
    "quantiles": quantile_bins,
    "levels": levels_of,
    "log1p": log_values,
}
