"""Quantile bins: their definition and what they do not depend on; records of any genes with any values."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

from sct.data.cell_options import CellOptions
from sct.data.cell_records import ABSENT, CellSource, cell_records
from sct.data.cell_values import VALUES, quantile_bins
from sct.data.tokenize import bin_counts
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
    whole = cell_records(counts, CellOptions())["bins"]
    record = cell_records(counts, CellOptions(max_genes=30))
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
    whole = cell_records(counts, CellOptions())["bins"]
    record = cell_records(counts, CellOptions(max_genes=8))
    values = counts.toarray()
    for cell in range(9):
        genes = record["genes"][cell]
        assert (np.diff(genes) > 0).all()
        left = np.setdiff1d(np.arange(40), genes)
        assert values[cell, genes].min() >= values[cell, left].max()
        # Quantiles are those of the whole cell.
        assert record["bins"][cell].tolist() == whole[cell, genes].tolist()
    np.testing.assert_array_equal(
        cell_records(counts[4:5], CellOptions(max_genes=8))["genes"][0], record["genes"][4]
    )


def test_genes_outside_of_the_corpus_are_left_out_before_quantiles_are_taken():
    counts = sp.csr_matrix(np.array([[1, 9, 2, 9, 3, 4]], np.float32))
    known = np.array([True, False, True, False, True, True])
    bins = cell_records(counts, CellOptions(num_bins=4), known)["bins"]
    assert bins.tolist() == [[1, 0, 2, 0, 3, 4]]
    none = cell_records(counts, CellOptions(num_bins=4, max_genes=3), np.zeros(6, bool))
    assert none["genes"].tolist() == [[ABSENT] * 3]


CHOICES = {
    "all": {}, "listed": {}, "hvg": {"max_genes": 3}, "expressed": {"max_genes": 40}, "top": {"max_genes": 8},
    "sampled": {"max_genes": 8},
}  # fmt: skip


@pytest.mark.parametrize("values", VALUES)
def test_any_genes_with_any_values(values):
    """Values are those of the whole cell, whichever genes are read."""
    counts = sp.csr_matrix(np.random.default_rng(4).poisson(1.5, (9, 40)).astype(np.float32))
    whole = VALUES[values](counts, 6).toarray()
    assert ((whole > 0) == (counts.toarray() > 0)).all()
    if values == "levels":
        np.testing.assert_array_equal(whole, bin_counts(counts, num_bins=6).tokens)
    if values == "log1p":
        np.testing.assert_allclose(np.expm1(whole).sum(axis=1), 1e4, rtol=1e-4)
    listed = np.array([3, 5, 11])
    for genes, options in CHOICES.items():
        made = CellOptions(6, genes=genes, values=values, **options)
        record = cell_records(counts, made, listed=listed)
        read = record[made.name]
        assert made.name == ("values" if values == "log1p" else "bins")
        if genes == "all":
            np.testing.assert_array_equal(read, whole)
            continue
        for cell, numbers in enumerate(record["genes"]):
            there = numbers[numbers != ABSENT]
            np.testing.assert_array_equal(read[cell, : len(there)], whole[cell, there])
            assert not read[cell, len(there) :].any()
            if genes in ("listed", "hvg"):
                assert there.tolist() == listed.tolist()
            else:
                assert len(there) == min((whole[cell] > 0).sum(), made.max_genes)
                assert (whole[cell, there] > 0).all()


def test_sampled_genes_are_drawn_anew_by_the_seed_and_evenly():
    counts = sp.csr_matrix(np.random.default_rng(5).integers(1, 50, (400, 12)).astype(np.float32))
    options = CellOptions(genes="sampled", max_genes=3)
    first, again, other = (cell_records(counts, options, seed=seed)["genes"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any(axis=1).mean() > 0.9
    # Of 400 draws of 3 among 12 each gene has 100 on average, with a standard deviation of about 9.
    assert np.abs(np.bincount(first.ravel(), minlength=12) - 100).max() < 45
    alone = cell_records(counts[7:8], options)["genes"]
    np.testing.assert_array_equal(alone[0], first[7])


def test_genes_that_cannot_be_chosen():
    counts = sp.csr_matrix(np.ones((1, 6), np.float32))
    with pytest.raises(DataError, match="max_genes is 5"):
        cell_records(counts, CellOptions(genes="expressed", max_genes=5))
    known = np.arange(6) != 3
    for listed, words in (
        (None, "listed"),
        (np.array([3, 1]), "ascending"),
        (np.array([1, 3]), "1 of the 2 .*listed"),
    ):
        with pytest.raises(ConfigError, match=words):
            cell_records(counts, CellOptions(genes="listed"), known, listed)
    for options, words in (
        ({"genes": "rings"}, "genes"),
        ({"values": "rings"}, "values"),
        ({"genes": "top"}, "max_genes"),
        ({"genes": "hvg"}, "max_genes"),
        ({"genes": "all", "max_genes": 3}, "max_genes"),
        ({"values": "levels", "num_bins": 1}, "num_bins"),
    ):
        with pytest.raises(ConfigError, match=words):
            CellOptions(**options)


@pytest.mark.parametrize(
    "options",
    [{"num_bins": 0}, {"num_bins": 65_534}, {"num_bins": 254, "values": "levels"}, {"max_genes": -1}],
)
def test_options_that_cannot_be(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        CellOptions(**options)


def test_any_number_of_bins():
    """The numbers of the bins fit into the type, and with as many bins as genes each value has its own."""
    rng = np.random.default_rng(6)
    values = np.stack([rng.permutation(3000) + 1.0 for _ in range(2)]).astype(np.float32)
    for number, kind in ((50, np.uint8), (253, np.uint8), (254, np.uint16), (3000, np.uint16)):
        bins = cell_records(sp.csr_matrix(values), CellOptions(number))["bins"]
        assert bins.dtype == kind
        expected = 1 + number * (values.astype(int) - 1) // 3000
        np.testing.assert_array_equal(bins, expected)


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
                record = source.record(number, epoch)
                study = studies[number >= 7]
                assert source.describe(number, epoch) == f"study {study.name!r}, row {record['row']}"
                expected = cell_records(study.counts[record["row"]], source.options)
                np.testing.assert_array_equal(record["bins"], expected["bins"][0])
                np.testing.assert_array_equal(record["genes"], expected["genes"][0])
