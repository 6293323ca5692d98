"""Convert raw counts to tokens, vectorized over the rows of a CSR matrix.

Tokens are computed when cells are loaded, so one store of raw counts serves models with different tokens.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from scipy import sparse
from scipy.stats import nbinom

from sct.errors import DataError

NOISE_FRACTION = 0.003  # sCT paper, section 3: a gene with fewer counts per cell in a study is noise
# A count can be exactly on the border between two levels (such as 7 in a cell with counts from 1 to 31). This margin
# keeps rounding errors from deciding its level.
_BORDER = 1e-9
_EXACT = 1 << 24  # float32 represents all integers below this exactly
_TABULATED = 1024  # levels of smaller counts are looked up in a table per cell (512 to 2048 are equally fast)


# Grid of `_first_levels`. The dispersions range from nearly Poisson to strongly bursty expression.
_LOGITS = np.linspace(-18.0, 12.0, 121)
_DISPERSIONS = np.geomspace(0.02, 4.0, 14)
_LOOKED_UP = 100_000  # values to look up at a time


def noisy_genes(gene_totals: np.ndarray, n_cells: int, fraction: float = NOISE_FRACTION) -> np.ndarray:
    """Return a mask (G,) of the genes whose mean raw count per cell in a study is below `fraction`.

    These genes are treated as noise and set to zero before binning (sCT paper, section 3, "Data processing").
    """
    return np.asarray(gene_totals) < fraction * n_cells


@dataclasses.dataclass(frozen=True)
class Bins:
    """Expression levels of K cells, which are the input tokens of sCT.

    Attributes
    ----------
    tokens
        uint8 (K, num_positions): 0 for unexpressed, 1 .. num_bins - 1 from low to high expression, and `num_bins` (PAD)
        at positions beyond the vocabulary.
    low, high
        Range of log1p of the non-zero counts of each cell, float32 (K,); 0 for an empty cell.
    medians, means
        Median and mean raw count of each expression level, float32 (K, num_bins), or None; see `level_values`. The
        medians convert a predicted level to a raw count. The means convert predicted probabilities of levels to an
        expected raw count.
    """

    tokens: np.ndarray
    low: np.ndarray
    high: np.ndarray
    medians: np.ndarray | None = None
    means: np.ndarray | None = None


def digitize(log_counts: np.ndarray, low: np.ndarray, high: np.ndarray, num_bins: int) -> np.ndarray:
    """Return the expression level, 1 .. num_bins - 1, of log1p counts in the range [low, high].

    All arguments can be arrays. A count on the border of two levels gets the higher level. A count outside the range
    gets the level of the nearer end. If the range has width zero, the level is 1.
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
    """Convert raw counts to expression levels, separately for each cell (sCT paper, section 3).

    Expression levels are uniform bins of log1p(count) between the lowest and the highest non-zero value of the cell. A
    count of zero has level 0. If all non-zero counts of a cell are equal, all of them have level 1.

    Parameters
    ----------
    counts
        Raw counts (K, G), CSR. Repeated entries are summed.
    num_bins
        Number of expression levels, including zero.
    num_positions
        Number of columns of the result (>= G). Columns after the last gene contain PAD.
    drop
        Mask of genes to treat as unexpressed, bool (G,); see `noisy_genes`.
    with_values
        Also compute `Bins.medians` and `Bins.means`.

    Raises
    ------
    DataError
        `num_positions` is smaller than G, or counts are negative or not finite.
    """
    n_cells, n_genes = counts.shape
    num_positions = n_genes if num_positions is None else num_positions
    if num_positions < n_genes:
        raise DataError(
            f"the cells have {n_genes} genes, but num_positions is {num_positions}: use at least one position per gene."
        )
    if not counts.has_canonical_format:
        counts = counts.copy()
        counts.sum_duplicates()
    data = np.asarray(counts.data, dtype=np.float32)
    if data.size and not (data.min() >= 0 and np.isfinite(data.max())):
        raise DataError(
            "the counts have negative values, NaN or infinity, but levels are computed from raw counts: give raw "
            "counts."
        )
    log_range, level = _levels(data, counts, drop, num_bins)
    low, high = log_range.astype(np.float32)
    padded = (n_cells, num_positions)
    tokens = sparse.csr_matrix((level, counts.indices, counts.indptr), shape=padded).toarray()
    tokens[:, n_genes:] = num_bins
    if not with_values:
        return Bins(tokens, low, high)
    keep = level > 0
    rows = np.repeat(np.arange(n_cells), np.diff(counts.indptr))[keep]
    return Bins(tokens, low, high, *level_values(rows, level[keep], data[keep], low, high, num_bins))


def levels_of(counts: sparse.csr_matrix, num_bins: int) -> sparse.csr_matrix:
    """Return the expression levels 1 .. `num_bins` - 1 of the non-zero counts, uint8 CSR (N, G); see `bin_counts`."""
    _, level = _levels(np.asarray(counts.data, np.float32), counts, None, num_bins)
    made = sparse.csr_matrix((level, counts.indices.copy(), counts.indptr.copy()), counts.shape)
    made.sort_indices()
    return made


def _levels(
    data: np.ndarray, counts: sparse.csr_matrix, drop: np.ndarray | None, num_bins: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return two arrays: the range of log1p counts of each cell, float64 (2, K), and the level of each stored count.

    Counts of genes in `drop` have level 0.
    """
    filled = np.flatnonzero(np.diff(counts.indptr))
    log_range = np.zeros((2, counts.shape[0]))
    if not filled.size:
        return log_range, np.zeros(0, np.uint8)
    starts = counts.indptr[filled]
    if drop is not None:
        data = data * np.take(~np.asarray(drop), counts.indices)
    whole = data.astype(np.int32) if data.max() < _EXACT else None
    if whole is None or not np.array_equal(whole, data):
        return _levels_of_logs(data, filled, starts, log_range, num_bins)
    # As uint32, 0 - 1 is the largest number. A zero is therefore the minimum only if all counts of a cell are zero.
    least = np.minimum.reduceat((whole - 1).view(np.uint32), starts).view(np.int32) + 1
    most = np.maximum.reduceat(whole, starts)
    low, high = log_range[:, filled] = np.log1p(np.stack([least, most]).astype(np.float64))
    border = level_borders(low, high, num_bins)
    # All counts from the last border upward have the same level, so the table can end there.
    width = 1 + min(max(int(border.max(initial=0)), 1), _TABULATED)
    table = np.zeros((len(filled), width), np.uint8)
    table[:, 1] = 1
    inside = (border > 0) & (border < width)
    np.add.at(table, (np.nonzero(inside)[0], border[inside]), 1)
    table = np.cumsum(table, axis=1, dtype=np.uint8)
    lengths = np.diff(np.append(starts, len(whole)))
    at = np.repeat(np.arange(len(filled), dtype=np.int64) * width, lengths)
    at += np.minimum(whole, width - 1)
    level = np.take(table.reshape(-1), at)
    if width > _TABULATED:
        beyond = np.flatnonzero(whole >= width)
        cell = at[beyond] // width
        level[beyond] = digitize(np.log1p(whole[beyond], dtype=np.float64), low[cell], high[cell], num_bins)
    return log_range, level


def level_borders(low: np.ndarray, high: np.ndarray, num_bins: int) -> np.ndarray:
    """Return the smallest count of each expression level 2 .. num_bins - 1, for log1p counts in [low, high].

    Returns
    -------
    int64 (K, num_bins - 2); 0 for cells whose range has width zero.
    """
    levels = np.arange(2, num_bins)
    border = low[:, None] + (high - low)[:, None] * (levels - 1) / (num_bins - 1)
    near = np.maximum(np.rint(np.expm1(border))[..., None] + np.arange(-1, 2), 0)
    reached = digitize(np.log1p(near), low[:, None, None], high[:, None, None], num_bins) >= levels[:, None]
    smallest = np.where(reached, near, np.inf).min(axis=-1, initial=np.inf)
    return np.where((high > low)[:, None], smallest, 0).astype(np.int64)


def _levels_of_logs(
    data: np.ndarray, filled: np.ndarray, starts: np.ndarray, log_range: np.ndarray, num_bins: int
) -> tuple[np.ndarray, np.ndarray]:
    """Compute `_levels` for fractional values, or for values too large to be exact integers in float32."""
    keep = data != 0
    logs = np.log1p(data, dtype=np.float64)
    low = np.minimum.reduceat(np.where(keep, logs, np.inf), starts)
    high = np.maximum.reduceat(logs, starts)
    log_range[:, filled] = low, high = np.where(np.isinf(low), 0, low), high
    lengths = np.diff(np.append(starts, len(data)))
    level = digitize(logs, np.repeat(low, lengths), np.repeat(high, lengths), num_bins)
    return log_range, np.where(keep, level, 0).astype(np.uint8)


def level_values(
    rows: np.ndarray, level: np.ndarray, counts: np.ndarray, low: np.ndarray, high: np.ndarray, num_bins: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the median and the mean of the raw counts at each expression level of each cell.

    The median and the mean represent the level. For a level without any gene, both are the middle of the level's bin on
    the log scale. The sCT paper (section 4, "Metrics") always uses the median. Means are needed to convert a
    distribution over levels to an *expected* raw count, because counts within a level are skewed.

    Parameters
    ----------
    rows, level, counts
        Cell, level and raw count of the expressed genes, (nnz,) each.
    low, high
        Ranges of the cells (K,); see `Bins`.
    num_bins
        Number of expression levels, including zero.

    Returns
    -------
    Medians and means, each float32 (K, num_bins). Column 0 is zero.
    """
    n_cells, levels = low.shape[0], num_bins - 1
    middle = low[:, None] + (high - low)[:, None] * (np.arange(levels) + 0.5) / levels
    medians = np.concatenate([np.zeros((n_cells, 1)), np.expm1(middle)], axis=1).astype(np.float32)
    means = medians.copy()
    if rows.size:
        group = rows.astype(np.int64) * num_bins + level
        order = np.lexsort((counts, group))
        group, counts = group[order], counts[order]
        starts = np.flatnonzero(np.diff(group, prepend=-1))
        sizes = np.diff(starts, append=group.size)
        medians.reshape(-1)[group[starts]] = (
            counts[starts + (sizes - 1) // 2] + counts[starts + sizes // 2]
        ) / 2
        means.reshape(-1)[group[starts]] = np.add.reduceat(counts.astype(np.float64), starts) / sizes
    return medians, means


def level_average(probabilities: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the average (...,) of `values` (..., num_bins), weighted by `probabilities` (..., num_bins)."""
    return np.einsum("...b,...b->...", probabilities, values)


def expected_counts(
    probabilities: np.ndarray, means: np.ndarray, low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """Return the expected raw counts for predicted probabilities of expression levels.

    Level 2 and higher levels are represented by the mean count of the level in the cell. For level 1, the mean would be
    far too large for rare genes: their count is mostly 1, while other genes of level 1 have larger counts. Level 1 is
    therefore represented by the mean of a negative binomial distribution over the counts of level 1. This distribution
    has the predicted probabilities of level 0 and of the levels above 1.

    Parameters
    ----------
    probabilities
        Predicted probabilities of the expression levels, (n, num_bins).
    means
        Mean raw counts of the expression levels in the cell of each row, (n, num_bins); see `level_values`.
    low, high
        Range of the cell of each row, (n,); see `Bins`.

    Returns
    -------
    float32 (n,).
    """
    num_bins = probabilities.shape[-1]
    counts = np.einsum("nb,nb->n", probabilities[:, 2:], means[:, 2:])
    if num_bins == 2:
        return probabilities[:, 1] * means[:, 1]
    ranges, cell = np.unique(np.stack([low, high], axis=1), axis=0, return_inverse=True)
    # Remove the rounding errors of float32, so that they do not move a border.
    whole = np.log1p(np.rint(np.expm1(ranges.astype(np.float64))))
    border = level_borders(whole[:, 0], whole[:, 1], num_bins)[:, 0][cell.ravel()]
    first = means[:, 1].astype(np.float32)
    for number in np.unique(border[border > 1]):
        rows = np.flatnonzero(border == number)
        for part in np.array_split(rows, 1 + len(rows) // _LOOKED_UP):
            first[part] = _first_level(
                probabilities[part, 0], probabilities[part, 1], means[part, 1], int(number)
            )
    return (counts + probabilities[:, 1] * first).astype(np.float32)


def _first_level(none: np.ndarray, first: np.ndarray, level_mean: np.ndarray, border: int) -> np.ndarray:
    """Return the mean of each of n negative binomial distributions, (n,), given that the count is 1 .. border - 1.

    Parameters
    ----------
    none
        Probabilities of a zero count, (n,).
    first
        Probabilities of the counts 1 .. border - 1, (n,).
    level_mean
        Mean of the counts 1 .. border - 1 over all genes of the cell, (n,). Used if no negative binomial distribution
        fits.
    border
        Smallest count of level 2.
    """
    beyond, mean = _first_levels(border)
    none = np.clip(none, 1e-8, 1 - 1e-6)
    place = (np.log(none / (1 - none)) - _LOGITS[0]) / (_LOGITS[1] - _LOGITS[0])
    place = np.clip(place, 0, len(_LOGITS) - 1.001)
    row, share = place.astype(int), (place % 1)[:, None]
    tail, means = (table[row] * (1 - share) + table[row + 1] * share for table in (beyond, mean))
    # The tail probability increases with the dispersion. Find the dispersion with the required tail probability.
    asked = np.clip(1 - first / (1 - none), 0, 1)[:, None]
    column = np.clip((tail < asked).sum(axis=1), 1, tail.shape[1] - 1)[:, None]
    (a, b), (x, y) = (
        (np.take_along_axis(table, column - 1, 1), np.take_along_axis(table, column, 1))
        for table in (tail, means)
    )
    weight = np.clip((asked - a) / np.maximum(b - a, 1e-12), 0, 1)
    found = x + weight * (y - x)
    # If even the smallest dispersion has a larger tail, no negative binomial fits: move toward the mean of the level.
    lacking = np.clip(tail[:, :1] - asked, 0, 1)
    return (found + lacking * (level_mean[:, None] - found))[:, 0]


@functools.cache
def _first_levels(border: int) -> tuple[np.ndarray, np.ndarray]:
    """Tabulate negative binomial distributions for a grid of logits of P(0) and dispersions.

    Returns
    -------
    Two tables, each (logits, dispersions): P(count >= border | count > 0), and the mean of the counts 1 .. border - 1.
    """
    none = 1 / (1 + np.exp(-_LOGITS))[:, None]
    size = 1 / _DISPERSIONS[None, :]
    success = none ** (1 / size)  # P(0) = success^size
    counts = np.arange(border)
    chance = nbinom.pmf(counts, size[..., None], success[..., None])
    expressed = chance[..., 1:].sum(axis=-1)
    mean = (chance * counts).sum(axis=-1) / np.maximum(expressed, 1e-300)
    return np.clip(1 - expressed / (1 - none), 0, 1), np.maximum(mean, 1.0)
