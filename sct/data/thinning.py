"""Thin raw counts at random, as if the cells had been sequenced less deeply."""

from __future__ import annotations

import numpy as np
from scipy import sparse

from sct.errors import DataError


def thin(counts: sparse.csr_matrix, low: float, high: float, rng: np.random.Generator) -> sparse.csr_matrix:
    """Keep each molecule of a cell with a probability that is drawn for the cell from U(low, high).

    Each count becomes a draw from a binomial distribution.

    Parameters
    ----------
    counts
        Raw counts (K, G), CSR.
    low, high
        Range of the probability.
    rng
        Random generator.

    Returns
    -------
    Thinned counts, float32 CSR (K, G), without explicit zeros.

    Raises
    ------
    DataError
        A count is not a whole number.
    """
    whole = counts.data.astype(np.int64)
    if not np.array_equal(whole, counts.data):
        raise DataError(
            "the counts have fractions, but thinning draws whole molecules: set data.thinning to (), or use studies "
            "with whole counts."
        )
    share = np.repeat(rng.uniform(low, high, counts.shape[0]), np.diff(counts.indptr))
    kept = rng.binomial(whole, share).astype(np.float32)
    made = sparse.csr_matrix((kept, counts.indices.copy(), counts.indptr.copy()), counts.shape)
    made.eliminate_zeros()
    return made
