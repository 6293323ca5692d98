"""Levels of expression: laws, exact arithmetic as the reference, and the counts that stand for levels."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from sct.data.datasets import simulate_atlas
from sct.data.tokenize import (
    _EXACT,
    _TABULATED,
    NOISE_FRACTION,
    bin_counts,
    digitize,
    expected_counts,
    level_average,
    level_borders,
    noisy_genes,
)
from sct.errors import DataError

cells = hnp.arrays(
    np.int64,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12),
    elements=st.one_of(st.just(0), st.integers(0, 6), st.integers(0, 80)),
)
bins = st.integers(2, 8)
laws = settings(max_examples=60, deadline=None)


def tokens_of(counts: np.ndarray, num_bins: int = 5, **options) -> np.ndarray:
    return bin_counts(sp.csr_matrix(np.asarray(counts, np.float32)), num_bins=num_bins, **options).tokens


def exact_level(count: int, low: int, high: int, num_bins: int) -> int:
    """Level of one integer count by integer arithmetic alone: log1p and its division are never rounded."""
    if count == 0:
        return 0
    if low == high:
        return 1
    levels = num_bins - 1
    passed = [(count + 1) ** levels >= (low + 1) ** (levels - k) * (high + 1) ** k for k in range(1, levels)]
    return 1 + sum(passed)


@laws
@given(cells, bins)
def test_levels_are_those_of_exact_arithmetic(counts, num_bins):
    expected = np.zeros_like(counts)
    for i, row in enumerate(counts):
        present = [int(c) for c in row if c > 0]
        expected[i] = [exact_level(int(c), min(present), max(present), num_bins) if c else 0 for c in row]
    np.testing.assert_array_equal(tokens_of(counts, num_bins), expected)


@pytest.mark.parametrize(
    ("low", "count", "high", "num_bins", "level"),
    [(1, 3, 31, 5, 2), (1, 7, 31, 5, 3), (1, 15, 31, 5, 4), (2, 11, 47, 5, 3), (6, 55, 223, 11, 7)],
)
def test_a_count_on_a_border_belongs_to_the_level_above(low, count, high, num_bins, level):
    assert exact_level(count, low, high, num_bins) == level
    assert tokens_of([[low, count, high, 0]], num_bins)[0, 1] == level
    assert tokens_of([[low, count - 1, high, 0]], num_bins)[0, 1] == level - 1


def test_levels_of_a_study_are_those_of_uniform_edges_on_the_log_scale():
    counts = simulate_atlas(1, 40, 300, seed=5)[0].X
    tokens = bin_counts(counts).tokens
    for row, token in zip(counts.toarray(), tokens, strict=True):
        logs = np.log1p(row[row > 0].astype(np.float64))
        edges = np.linspace(logs.min(), logs.max(), 5)
        expected = np.clip(np.digitize(logs + 1e-9, edges), 1, 4)
        np.testing.assert_array_equal(token[row > 0], expected)
    assert len(np.unique(tokens)) == 5


@laws
@given(cells, bins)
def test_levels_rise_with_counts_from_the_first_to_the_last(counts, num_bins):
    for row, token in zip(counts, tokens_of(counts, num_bins).astype(int), strict=True):
        order = np.argsort(row, kind="stable")
        assert (np.diff(token[order]) >= 0).all()
        assert (token[row == 0] == 0).all()
        present = row[row > 0]
        if present.size:
            assert (token[row == present.min()] == 1).all()
            top = num_bins - 1 if present.max() > present.min() else 1
            assert (token[row == present.max()] == top).all()


def test_one_distinct_value_has_level_one_and_an_empty_cell_none():
    bins_ = bin_counts(sp.csr_matrix([[0, 9, 9, 0], [0, 0, 0, 0], [0, 0, 4, 0]]), with_values=True)
    np.testing.assert_array_equal(bins_.tokens, [[0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 1, 0]])
    np.testing.assert_allclose(bins_.low, [np.log(10), 0, np.log(5)], rtol=1e-6)
    np.testing.assert_array_equal(bins_.low, bins_.high)
    np.testing.assert_array_equal(bins_.medians, bins_.means)
    np.testing.assert_allclose(bins_.medians[:, 1:], [[9] * 4, [0] * 4, [4] * 4], rtol=1e-6)


@laws
@given(cells, bins, st.integers(0, 9))
def test_added_positions_hold_pad_and_nothing_else_does(counts, num_bins, extra):
    tokens = tokens_of(counts, num_bins, num_positions=counts.shape[1] + extra)
    assert tokens.dtype == np.uint8
    assert tokens.shape == (counts.shape[0], counts.shape[1] + extra)
    assert (tokens[:, counts.shape[1] :] == num_bins).all()
    assert (tokens[:, : counts.shape[1]] < num_bins).all()


@laws
@given(cells, st.data())
def test_dropped_genes_are_as_if_never_counted(counts, data):
    drop = data.draw(hnp.arrays(bool, counts.shape[1]))
    tokens = tokens_of(counts, drop=drop)
    assert (tokens[:, drop] == 0).all()
    np.testing.assert_array_equal(tokens, tokens_of(np.where(drop, 0, counts)))


@laws
@given(cells, st.randoms(use_true_random=False))
def test_a_cell_does_not_depend_on_the_other_cells(counts, random):
    order = list(range(len(counts)))
    random.shuffle(order)
    together = bin_counts(sp.csr_matrix(counts.astype(np.float32)), with_values=True)
    permuted = bin_counts(sp.csr_matrix(counts[order].astype(np.float32)), with_values=True)
    for field in ("tokens", "low", "high", "medians", "means"):
        np.testing.assert_array_equal(getattr(together, field)[order], getattr(permuted, field))
    np.testing.assert_array_equal(tokens_of(counts[:1]), together.tokens[:1])


def test_zeros_and_duplicates_in_the_matrix_do_not_matter():
    plain = sp.csr_matrix([[0, 5, 2, 0], [1, 0, 0, 9]], dtype=np.float32)
    data = np.array([2, 0, 2, 3, 9, 1, 0], np.float32)
    columns = np.array([2, 0, 1, 1, 3, 0, 1])
    odd = sp.csr_matrix((data, columns, [0, 4, 7]), shape=(2, 4))
    before = odd.nnz
    np.testing.assert_array_equal(bin_counts(odd).tokens, bin_counts(plain).tokens)
    assert odd.nnz == before, "the input was changed"


def test_wrong_input_is_refused():
    for bad in (-1.0, np.nan, np.inf):
        with pytest.raises(DataError, match="NaN or infinity"):
            tokens_of([[1.0, bad]])
    with pytest.raises(DataError, match="2 genes"):
        tokens_of([[1.0, 2.0]], num_positions=1)


@laws
@given(cells, bins)
def test_levels_stand_for_their_median_and_mean_or_their_middle(counts, num_bins):
    got = bin_counts(sp.csr_matrix(counts.astype(np.float32)), num_bins=num_bins, with_values=True)
    for i, row in enumerate(counts):
        logs = np.log1p(row[row > 0])
        low, high = (logs.min(), logs.max()) if logs.size else (0.0, 0.0)
        step = (high - low) / (num_bins - 1)
        for level in range(num_bins):
            inside = row[got.tokens[i] == level]
            if level == 0:
                expected = [0.0, 0.0]
            elif inside.size:
                expected = [np.median(inside), np.mean(inside)]
            else:
                expected = [np.expm1(low + (level - 0.5) * step)] * 2
            found = [got.medians[i, level], got.means[i, level]]
            np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)
        for values in (got.medians, got.means):
            assert (np.diff(values[i].astype(np.float64)) >= -1e-4).all()


@laws
@given(cells, st.data())
def test_level_average_lie_between_the_values(counts, data):
    values = bin_counts(sp.csr_matrix(counts.astype(np.float32)), with_values=True).means
    weights = data.draw(hnp.arrays(np.float64, (len(counts), 5), elements=st.floats(0.01, 1)))
    expected = level_average(weights / weights.sum(axis=1, keepdims=True), values)
    assert expected.shape == (len(counts),)
    assert (expected >= values.min(axis=1) - 1e-4).all()
    assert (expected <= values.max(axis=1) + 1e-4).all()
    for level in range(5):
        np.testing.assert_array_equal(
            level_average(np.eye(5)[[level] * len(counts)], values), values[:, level]
        )


@pytest.mark.parametrize("dispersion", [0.02, 0.3, 1.5])
def test_expected_counts_of_a_negative_binomial_are_its_mean(dispersion):
    # Level 1 of a range of 1 to 625 has the counts 1 to 4 or 5, where cells have 2.2 of a gene on average.
    low, high = np.log1p([1.0, 625.0]).astype(np.float32)
    border = [1, *level_borders(np.array([low], float), np.array([high], float), 5)[0], 10**5]
    counts, size = np.arange(10**5), 1 / dispersion
    for mean in (0.01, 0.1, 0.5, 2.0, 6.0):
        chance = stats.nbinom.pmf(counts, size, size / (size + mean))
        level = np.searchsorted(border, counts, side="right")
        probabilities = np.bincount(level, weights=chance, minlength=5)[None, :5]
        within = np.bincount(level, weights=chance * counts, minlength=5)[None, :5]
        means = within / np.maximum(probabilities, 1e-300)
        means[:, 1] = 2.2
        found = expected_counts(probabilities, means, np.array([low]), np.array([high]))
        np.testing.assert_allclose(found, mean, rtol=0.02, err_msg=str(mean))


def test_where_level_one_is_certain_it_has_the_mean_of_the_cell():
    low, high = np.log1p([[1.0, 3.0], [625.0, 3.0]]).astype(np.float32)
    sure, means = (
        np.eye(5, dtype=np.float32)[[1, 1]],
        np.tile([0, 2.2, 10, 50, 300], (2, 1)).astype(np.float32),
    )
    np.testing.assert_allclose(expected_counts(sure, means, low, high), 2.2, rtol=0.02)


def test_a_gene_is_noise_below_exactly_three_counts_in_a_thousand_cells():
    assert NOISE_FRACTION == 0.003
    for thousands in range(1, 300):
        totals = np.array([0, 3 * thousands - 1, 3 * thousands, 3 * thousands + 1])
        np.testing.assert_array_equal(noisy_genes(totals, 1000 * thousands), [True, True, False, False])
    np.testing.assert_array_equal(noisy_genes(np.array([0, 1]), 10), [True, False])
    assert not noisy_genes(np.array([0.0]), 10, fraction=0).any()


@laws
@given(hnp.arrays(np.float64, 7, elements=st.floats(0, 12)), st.floats(0, 6), st.floats(0, 6), bins)
def test_digitize_clips_to_the_range_and_rises(logs, low, width, num_bins):
    logs = np.sort(logs)
    level = digitize(logs, np.float64(low), np.float64(low + width), num_bins).astype(int)
    assert level.min() >= 1
    assert level.max() <= num_bins - 1
    assert (np.diff(level) >= 0).all()
    assert (level[logs <= low] == 1).all()
    if low + width > low:
        assert (level[logs >= low + width] == num_bins - 1).all()
    else:
        assert (level == 1).all()


@laws
@given(
    hnp.arrays(
        np.int64,
        hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=8),
        elements=st.one_of(
            st.just(0),
            st.integers(0, 9),
            st.integers(_TABULATED - 2, _TABULATED + 2),
            st.integers(0, 70_000),
            st.integers(0, 1 << 26),
        ),
    ),
    st.sampled_from([2, 3, 5, 11, 51, 254]),
    st.floats(0, 0.5),
    st.data(),
)
def test_levels_are_those_of_each_logarithm(counts, num_bins, part, data):
    """Levels of small integers come from a table; every value by itself must give the same, and so must others."""
    drop = data.draw(hnp.arrays(bool, counts.shape[1]))
    for values in (counts.astype(np.float32), (counts + part * (counts > 0)).astype(np.float32)):
        found = bin_counts(sp.csr_matrix(values), num_bins=num_bins, drop=drop, with_values=True)
        for row, tokens, low, high in zip(values * ~drop, found.tokens, found.low, found.high, strict=True):
            logs = np.log1p(row[row > 0], dtype=np.float64)
            ends = (logs.min(), logs.max()) if logs.size else (0.0, 0.0)
            assert (low, high) == tuple(map(np.float32, ends))
            np.testing.assert_array_equal(tokens[row == 0], 0)
            np.testing.assert_array_equal(tokens[row > 0], digitize(logs, *ends, num_bins))


@pytest.mark.parametrize("num_bins", [5, 15, 50, 254])
@pytest.mark.parametrize("top", [59, 20_000, 1_000_000, _EXACT - 1, 1 << 26])
def test_large_counts_and_many_cells_give_the_levels_of_each_logarithm(num_bins, top):
    """One large count in each of thousands of cells, beside small ones and ones around the end of the table."""
    rng = np.random.default_rng(top + num_bins)
    counts = rng.integers(0, [60, 60, 2 * _TABULATED, top, top], (6000, 5), endpoint=True)
    counts[:, 1] *= rng.random(6000) < 0.5
    counts[::7, 2:4] = 0
    counts[::11] = 0
    counts[:, 4] = np.where(np.arange(6000) % 5, top, counts[:, 4])
    values = counts.astype(np.float32)
    found = bin_counts(sp.csr_matrix(values), num_bins=num_bins)
    logs = np.log1p(values, dtype=np.float64)
    low = np.where(values > 0, logs, np.inf).min(axis=1, keepdims=True)
    low, high = np.where(np.isinf(low), 0, low), logs.max(axis=1, keepdims=True)
    np.testing.assert_array_equal(found.low, low[:, 0].astype(np.float32))
    np.testing.assert_array_equal(found.high, high[:, 0].astype(np.float32))
    expected = np.where(values > 0, digitize(logs, low, high, num_bins), 0)
    np.testing.assert_array_equal(found.tokens, expected)


def test_the_table_of_a_block_does_not_grow_with_its_counts():
    """A table as wide as the last border would take 2.7 GB here, and its entries' numbers more than 31 bits."""
    counts = sp.csr_matrix(np.tile(np.float32([1, 1000, 1_000_000]), (3000, 1)))
    tracemalloc.start()
    tokens = bin_counts(counts, num_bins=50).tokens
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6
    expected = [exact_level(int(count), 1, 1_000_000, 50) for count in counts[0].data]
    np.testing.assert_array_equal(tokens, np.tile(expected, (3000, 1)))


def test_many_levels_fit_into_a_byte():
    counts = np.arange(2000)[None]
    tokens = tokens_of(counts, 254, num_positions=2001)
    assert tokens[0, -1] == 254
    assert tokens[0, -2] == 253
    assert (np.diff(tokens[0, :-1].astype(int)) >= 0).all()
