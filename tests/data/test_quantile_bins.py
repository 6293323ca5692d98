"""Quantile bins: their definition, what they do not depend on, and records of cells."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

from sct.data.quantile_bins import ABSENT, CellOptions, CellSource, binned_cells, quantile_bins
from sct.errors import ConfigError, DataError
from tests.data.text.toy_texts import GENES, ToyStudy


def by_hand(values: np.ndarray, num_bins: int) -> np.ndarray:
    """Bins of one cell, straight from the definition."""
    bins = np.zeros(len(values), int)
    there = values[values > 0]
    for i in np.flatnonzero(values):
        bins[i] = 1 + (there < values[i]).sum() * num_bins // len(there)
    return bins


@given(
    counts=st.lists(st.lists(st.integers(0, 6), min_size=7, max_size=7), min_size=1, max_size=6),
    num_bins=st.integers(1, 12),
)
def test_bins_are_those_of_the_definition(counts, num_bins):
    table = np.array(counts, np.float32)
    found = quantile_bins(sp.csr_matrix(table), num_bins)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found.toarray(), [by_hand(row, num_bins) for row in table])


def test_the_examples_of_the_paper():
    """The lowest 5% of the values of a cell are in bin 1, what lies at 18% in bin 2, the highest in the last."""
    cell = np.arange(1, 101, dtype=np.float32)[np.random.default_rng(0).permutation(100)]
    bins = quantile_bins(sp.csr_matrix(cell)).toarray()[0]
    assert set(bins[cell <= 5]) == {1}
    assert bins[cell == 18] == 2
    assert bins[cell == 100] == 10
    np.testing.assert_array_equal(np.bincount(bins)[1:], 10)


def test_library_size_and_other_cells_do_not_matter():
    rng = np.random.default_rng(1)
    counts = rng.poisson(0.7, (20, 50)).astype(np.float32)
    counts[3] = 0
    bins = quantile_bins(sp.csr_matrix(counts)).toarray()
    scaled = counts * (1e4 / np.maximum(counts.sum(axis=1, keepdims=True), 1))
    np.testing.assert_array_equal(quantile_bins(sp.csr_matrix(scaled)).toarray(), bins)
    np.testing.assert_array_equal(quantile_bins(sp.csr_matrix(counts[[5]])).toarray()[0], bins[5])
    assert not bins[3].any()
    with pytest.raises(DataError, match="negative"):
        quantile_bins(sp.csr_matrix(-counts))


def test_expressed_genes_alone():
    rng = np.random.default_rng(2)
    counts = sp.csr_matrix(rng.poisson(0.6, (9, 40)).astype(np.float32))
    whole = binned_cells(counts, CellOptions())["bins"]
    record = binned_cells(counts, CellOptions(max_genes=30))
    for cell in range(9):
        expressed = np.flatnonzero(whole[cell])
        filled = len(expressed)
        assert record["genes"][cell, :filled].tolist() == expressed.tolist()
        assert record["bins"][cell, :filled].tolist() == whole[cell, expressed].tolist()
        assert set(record["genes"][cell, filled:]) <= {ABSENT}
        assert not record["bins"][cell, filled:].any()


def test_the_highest_where_there_are_more():
    rng = np.random.default_rng(3)
    counts = sp.csr_matrix(rng.poisson(2.0, (9, 40)).astype(np.float32))
    whole = binned_cells(counts, CellOptions())["bins"]
    record = binned_cells(counts, CellOptions(max_genes=8))
    values = counts.toarray()
    for cell in range(9):
        genes = record["genes"][cell]
        assert (np.diff(genes) > 0).all()
        left = np.setdiff1d(np.arange(40), genes)
        assert values[cell, genes].min() >= values[cell, left].max()
        # Quantiles are those of the whole cell.
        assert record["bins"][cell].tolist() == whole[cell, genes].tolist()
    np.testing.assert_array_equal(
        binned_cells(counts[4:5], CellOptions(max_genes=8))["genes"][0], record["genes"][4]
    )


def test_genes_outside_of_the_corpus_are_left_out_before_quantiles_are_taken():
    counts = sp.csr_matrix(np.array([[1, 9, 2, 9, 3, 4]], np.float32))
    known = np.array([True, False, True, False, True, True])
    bins = binned_cells(counts, CellOptions(num_bins=4), known)["bins"]
    assert bins.tolist() == [[1, 0, 2, 0, 3, 4]]
    none = binned_cells(counts, CellOptions(num_bins=4, max_genes=3), np.zeros(6, bool))
    assert none["genes"].tolist() == [[ABSENT] * 3]


@pytest.mark.parametrize("options", [{"num_bins": 0}, {"num_bins": 254}, {"max_genes": -1}])
def test_options_that_cannot_be(options):
    with pytest.raises(ConfigError, match="are needed"):
        CellOptions(**options)


class Study(ToyStudy):
    """A study that is read by rows."""

    spatial = False

    def read_rows(self, rows):
        return self.counts[rows]


def test_every_cell_is_a_record_once():
    rng = np.random.default_rng(4)
    studies = [Study(rng.poisson(1.0, (n, GENES)), name) for n, name in ((7, "one"), (5, "two"))]
    for exhaustive in (False, True):
        source = CellSource(studies, CellOptions(max_genes=GENES), exhaustive=exhaustive)
        assert len(source) == 12
        for epoch in (0, 1):
            seen = [source.describe(number, epoch) for number in range(12)]
            assert len(set(seen)) == 12
            for number in (0, 6, 9):
                record = source.bag(number, epoch)
                study = studies[number >= 7]
                assert source.describe(number, epoch) == f"study {study.name!r}, row {record['row']}"
                expected = binned_cells(study.counts[record["row"]], source.options)
                np.testing.assert_array_equal(record["bins"], expected["bins"][0])
                np.testing.assert_array_equal(record["genes"], expected["genes"][0])
