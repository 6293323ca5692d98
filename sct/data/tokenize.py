"""From raw counts to tokens, vectorised over the rows of a CSR matrix.

Tokens are computed online, so that changing a model never rewrites a store.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from scipy import sparse
from scipy.stats import nbinom

from sct.errors import DataError

NOISE_FRACTION = 0.003  # sCT paper, section 3: counts per cell below which a gene is noise in a study
# A count can lie exactly on a border of levels (7 in a cell of 1 to 31). Rounding must not decide its level.
_BORDER = 1e-9
_EXACT = 1 << 24  # float32 holds every integer below
_TABULATED = 1024  # counts up to here have their levels in a table of each cell (512 to 2048 are as fast)


# Tables of `_first_levels`; the dispersions reach from Poisson to bursts.
_LOGITS = np.linspace(-18.0, 12.0, 121)
_DISPERSIONS = np.geomspace(0.02, 4.0, 14)
_LOOKED_UP = 100_000  # values at once


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
    medians, means
        float32 (K, num_bins): median and mean of the raw counts of each level (see `level_values`), or None. A
        predicted level stands for the median, an expected count is a sum over the means.
    """

    tokens: np.ndarray
    low: np.ndarray
    high: np.ndarray
    medians: np.ndarray | None = None
    means: np.ndarray | None = None


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
        Compute `Bins.medians` and `Bins.means` as well.

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
    """Levels 1 .. `num_bins` - 1 of the counts of each cell, uint8 CSR (N, G); see `bin_counts`."""
    _, level = _levels(np.asarray(counts.data, np.float32), counts, None, num_bins)
    made = sparse.csr_matrix((level, counts.indices.copy(), counts.indptr.copy()), counts.shape)
    made.sort_indices()
    return made


def _levels(
    data: np.ndarray, counts: sparse.csr_matrix, drop: np.ndarray | None, num_bins: int
) -> tuple[np.ndarray, np.ndarray]:
    """Range of log1p counts of each cell, (2, K) float64, and level of each stored count, 0 where dropped."""
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
    # A zero, less one, is the largest number without a sign: it is no minimum unless there is nothing else.
    least = np.minimum.reduceat((whole - 1).view(np.uint32), starts).view(np.int32) + 1
    most = np.maximum.reduceat(whole, starts)
    low, high = log_range[:, filled] = np.log1p(np.stack([least, most]).astype(np.float64))
    border = level_borders(low, high, num_bins)
    # All counts from the last border on have the level of that border.
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
    """Smallest count of the levels 2 .. num_bins - 1 of cells with log1p counts in [low, high].

    Returns int64 (K, num_bins - 2), 0 where the range has width zero.
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
    """`_levels` of values that are no integers, or where float32 no longer holds every integer."""
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
    """Raw counts that stand for each level of each cell: the median and the mean of the counts in that level.

    A level that no gene of the cell takes is represented by its middle on the log scale. The sCT paper (section 4,
    "Metrics") takes the median for everything; a distribution over levels becomes an *expected* raw count with
    the means, since counts within a level are skewed.

    Parameters
    ----------
    rows, level, counts
        (nnz,) cell, level and raw count of the expressed genes.
    low, high
        (K,) ranges of the cells, see `Bins`.

    Returns
    -------
    Medians and means, each float32 (K, num_bins); column 0 is zero.
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
    """Average (...,) of what stands for levels, `values` (..., num_bins), by `probabilities` (..., num_bins)."""
    return np.einsum("...b,...b->...", probabilities, values)


def expected_counts(
    probabilities: np.ndarray, means: np.ndarray, low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """Expected raw counts of predicted distributions over levels.

    From level 2 on, the mean of the cell's counts in a level stands for it. That of level 1 would be far too much for a
    rare gene, which has one count where others of that level have several: there the mean is that of a negative
    binomial distribution with the predicted probabilities of no count and of the levels above.

    Parameters
    ----------
    probabilities
        (n, num_bins).
    means
        (n, num_bins), of the cell of each row, see `level_values`.
    low, high
        (n,) its range, see `Bins`.

    Returns
    -------
    float32 (n,).
    """
    num_bins = probabilities.shape[-1]
    counts = np.einsum("nb,nb->n", probabilities[:, 2:], means[:, 2:])
    if num_bins == 2:
        return probabilities[:, 1] * means[:, 1]
    ranges, cell = np.unique(np.stack([low, high], axis=1), axis=0, return_inverse=True)
    # The precision of float32 must not move a border.
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
    """Mean of the counts 1 .. border - 1 of negative binomial distributions.

    `none` (n,) are the probabilities of no count, `first` (n,) of these counts, whose mean over all genes of the cell
    is `level_mean` (n,).
    """
    beyond, mean = _first_levels(border)
    none = np.clip(none, 1e-8, 1 - 1e-6)
    place = (np.log(none / (1 - none)) - _LOGITS[0]) / (_LOGITS[1] - _LOGITS[0])
    place = np.clip(place, 0, len(_LOGITS) - 1.001)
    row, share = place.astype(int), (place % 1)[:, None]
    tail, means = (table[row] * (1 - share) + table[row + 1] * share for table in (beyond, mean))
    # The tail grows with the dispersion: which one has the tail that is asked for?
    asked = np.clip(1 - first / (1 - none), 0, 1)[:, None]
    column = np.clip((tail < asked).sum(axis=1), 1, tail.shape[1] - 1)[:, None]
    (a, b), (x, y) = (
        (np.take_along_axis(table, column - 1, 1), np.take_along_axis(table, column, 1))
        for table in (tail, means)
    )
    weight = np.clip((asked - a) / np.maximum(b - a, 1e-12), 0, 1)
    found = x + weight * (y - x)
    # Not even Poisson counts have so few zeros and so small a tail: the mean of all genes at this level is better then.
    lacking = np.clip(tail[:, :1] - asked, 0, 1)
    return (found + lacking * (level_mean[:, None] - found))[:, 0]


@functools.cache
def _first_levels(border: int) -> tuple[np.ndarray, np.ndarray]:
    """Of negative binomials by logit of P(0) and by dispersion: P(count >= border | expressed), and the mean below."""
    none = 1 / (1 + np.exp(-_LOGITS))[:, None]
    size = 1 / _DISPERSIONS[None, :]
    success = none ** (1 / size)  # P(0) = success^size
    counts = np.arange(border)
    chance = nbinom.pmf(counts, size[..., None], success[..., None])
    expressed = chance[..., 1:].sum(axis=-1)
    mean = (chance * counts).sum(axis=-1) / np.maximum(expressed, 1e-300)
    return np.clip(1 - expressed / (1 - none), 0, 1), np.maximum(mean, 1.0)
