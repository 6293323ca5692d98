"""Bags: which cells make one, and what is read of them."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import KDTree

from sct.data.bags import (
    BagOptions,
    BagSource,
    random_bag_rows,
    spatial_bag_rows,
)
from sct.data.coordinates import SPATIAL_RANGE, rescale_coordinates
from sct.data.datasets import simulate_atlas
from sct.data.genes.vocabulary import GeneVocabulary
from sct.data.ingest.build import IngestOptions, ingest
from sct.data.store import Store
from sct.data.tokenize import bin_counts
from sct.errors import ConfigError, DataError
from tests.data.fake_study import FakeStudy, toy_counts, toy_study

laws = settings(max_examples=150, deadline=None)
sizes = st.integers(1, 200)
bag_sizes = st.integers(1, 60)
shuffles = st.integers(0, 250)
small = st.integers(0, 5)


def epoch_of(n_cells: int, cells_per_bag: int, epoch: int = 0, seed: int = 0, shuffle: int = 0):
    number = max(1, n_cells // cells_per_bag)
    return [random_bag_rows(n_cells, cells_per_bag, i, epoch, seed, shuffle) for i in range(number)]


def same_bag(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        np.testing.assert_array_equal(value, other[key], err_msg=key)


# Random bags


@laws
@given(sizes, bag_sizes, small, small, shuffles)
def test_bags_of_an_epoch_are_disjoint_and_complete(n_cells, cells_per_bag, epoch, seed, shuffle):
    bags = epoch_of(n_cells, cells_per_bag, epoch, seed, shuffle)
    for rows in bags:
        assert len(rows) == min(n_cells, cells_per_bag)
        assert (np.diff(rows) > 0).all()
    together = np.concatenate(bags)
    assert together.min() >= 0
    assert together.max() < n_cells
    assert len(np.unique(together)) == len(together)
    assert len(together) == (n_cells - n_cells % cells_per_bag if n_cells > cells_per_bag else n_cells)
    for rows, again in zip(bags, epoch_of(n_cells, cells_per_bag, epoch, seed, shuffle), strict=True):
        np.testing.assert_array_equal(rows, again)


@laws
@given(sizes, bag_sizes, small)
def test_without_shuffling_a_bag_is_a_contiguous_read(n_cells, cells_per_bag, epoch):
    bags = epoch_of(n_cells, cells_per_bag, epoch)
    runs = [1 + int((np.diff(rows) > 1).sum()) for rows in bags]
    assert max(runs) <= 2
    assert sum(run > 1 for run in runs) <= 1, "only the bag that closes the ring is read in two pieces"


@laws
@given(st.integers(20, 200), st.integers(2, 10), st.integers(2, 60), small)
def test_a_bag_stays_in_its_block(n_cells, cells_per_bag, shuffle, epoch):
    for rows in epoch_of(n_cells, cells_per_bag, epoch, shuffle=shuffle):
        ring = np.concatenate([rows, rows[:1] + n_cells])
        extent = n_cells - np.diff(ring).max() + 1
        assert extent <= max(min(shuffle, n_cells), cells_per_bag)


@pytest.mark.parametrize(("n_cells", "shuffle"), [(64, 0), (70, 0), (64, 64), (70, 1000), (64, 32)])
def test_epochs_and_seeds_deal_the_cells_anew(n_cells, shuffle):
    dealt = {
        frozenset(map(bytes, epoch_of(n_cells, 16, epoch, seed, shuffle)))
        for epoch in range(5)
        for seed in range(5)
    }
    # Without shuffling there are as many ways as offsets within a bag (a few of 25 draws agree).
    assert len(dealt) >= (25 if shuffle else 8)


def test_a_block_as_large_as_the_study_mixes_distant_cells():
    partners = {i: set() for i in range(40)}
    for epoch in range(200):
        for rows in epoch_of(40, 4, epoch, shuffle=40):
            for row in rows:
                partners[row].update(rows)
    assert all(len(found) == 40 for found in partners.values())


def test_no_cell_is_left_out_for_good():
    for n_cells, cells_per_bag in ((10, 6), (23, 8), (100, 51)):
        read = [np.concatenate(epoch_of(n_cells, cells_per_bag, epoch)) for epoch in range(300)]
        share = np.bincount(np.concatenate(read), minlength=n_cells) / 300
        expected = cells_per_bag * (n_cells // cells_per_bag) / n_cells
        np.testing.assert_allclose(share, expected, atol=5 * 0.5 / np.sqrt(300))


def test_a_bag_that_does_not_exist_is_an_error():
    for number in (-1, 4):
        with pytest.raises(IndexError):
            random_bag_rows(40, 10, number, 0, 0)
        with pytest.raises(IndexError):
            BagSource([toy_study(40)], BagOptions(10, 16)).record(number)
        with pytest.raises(IndexError):
            BagSource([toy_study(40, spatial=True)], BagOptions(10, 16)).rows(number)


# Spatial bags


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 80), st.integers(1, 20), small, small)
def test_a_spatial_bag_is_a_cell_and_its_nearest_neighbours(n_cells, cells_per_bag, epoch, seed):
    study = toy_study(n_cells, seed=seed, spatial=True)
    source = BagSource([study], BagOptions(cells_per_bag, 16, spatial=True))
    assert len(source) == max(1, n_cells // cells_per_bag)
    centers = []
    for number in range(len(source)):
        _, rows = source.rows(number, epoch)
        distance = np.linalg.norm(study.coordinates - study.coordinates[rows[0]], axis=1)
        centers.append(int(rows[0]))
        assert len(set(rows.tolist())) == len(rows) == min(cells_per_bag, n_cells)
        outside = np.setdiff1d(np.arange(n_cells), rows)
        assert (np.diff(distance[rows]) >= -1e-3).all(), "nearest first"
        if outside.size:
            assert distance[rows].max() <= distance[outside].min() + 1e-3
    assert len(set(centers)) == len(centers)


def test_centres_differ_between_epochs_and_reach_all_cells():
    tree = KDTree(toy_study(30, spatial=True).coordinates)
    seen = [{int(spatial_bag_rows(tree, 5, i, epoch, 0)[0]) for i in range(6)} for epoch in range(100)]
    assert len(set(map(frozenset, seen))) > 90
    assert set.union(*seen) == set(range(30))


def test_bags_never_mix_studies():
    studies = [toy_study(20, seed=1, name="a"), toy_study(23, seed=2, name="b", spatial=True)]
    source = BagSource(studies, BagOptions(6, 12, with_counts=True))
    names = []
    for number in range(len(source)):
        study, rows = source.rows(number, 1)
        names.append(study.name)
        assert source.locate(number) == ((0, number) if number < 3 else (1, number - 3))
        np.testing.assert_array_equal(source.record(number, 1)["counts"], study.counts[rows].toarray())
    assert names == ["a"] * 3 + ["b"] * 3


@pytest.mark.parametrize(
    "options", [BagOptions(4, 16), BagOptions(4, 16, shuffle_cells=40), BagOptions(4, 16, spatial_bags=False)]
)
def test_bags_do_not_depend_on_those_drawn_before(options):
    """Orders are kept from bag to bag: epochs and studies in turn must not mix them up."""
    studies = [toy_study(50, seed=1, name="a"), toy_study(30, seed=2, name="b", spatial=True)]
    source = BagSource(studies, options)
    for number, epoch in np.random.default_rng(0).integers(0, [len(source), 3], (60, 2)).tolist():
        _, rows = source.rows(number, epoch)
        np.testing.assert_array_equal(rows, BagSource(studies, options).rows(number, epoch)[1])


# Coordinates


def points(seed: int, n: int = 50) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 2)) * [3.0, 8.0] + [1e3, -40]


@settings(max_examples=50, deadline=None)
@given(small, st.floats(1e-3, 1e5), st.floats(-1e4, 1e4), st.floats(-1e4, 1e4))
def test_rescaled_coordinates_do_not_depend_on_unit_or_origin(seed, unit, x, y):
    original = points(seed) - [1e3, -40]
    scaled = rescale_coordinates(original)
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled.min(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(scaled.max(), SPATIAL_RANGE, rtol=1e-6)
    np.testing.assert_allclose(rescale_coordinates((original + np.array([x, y])) * unit), scaled, atol=1e-3)


def test_rescaling_keeps_the_aspect():
    original, scaled = points(0), rescale_coordinates(points(0)).astype(float)
    before = np.linalg.norm(original[:, None] - original, axis=-1)
    after = np.linalg.norm(scaled[:, None] - scaled, axis=-1)
    ratio = SPATIAL_RANGE / np.ptp(original, axis=0).max()
    np.testing.assert_allclose(after, before * ratio, atol=1e-4)
    assert scaled[:, 0].max() < SPATIAL_RANGE * 0.9, "the shorter side stays shorter"


def test_coordinates_of_one_place_are_zero_and_wrong_ones_refused():
    np.testing.assert_array_equal(rescale_coordinates(np.full((3, 2), 7.0)), np.zeros((3, 2)))
    for bad in (np.zeros((3, 3)), np.zeros(3), np.array([[0.0, np.nan]]), np.array([[np.inf, 0.0]])):
        with pytest.raises(DataError, match=r"shape|row 0"):
            rescale_coordinates(bad)


# What a bag holds


def test_a_bag_is_the_tokens_of_its_cells():
    study = toy_study(30)
    bag = BagSource([study], BagOptions(7, 16, num_bins=6, with_counts=True, noise_fraction=0)).record(2)
    counts = study.read_rows(bag["rows"])
    bins = bin_counts(counts, num_bins=6, num_positions=16, with_values=True)
    np.testing.assert_array_equal(bag["tokens"], bins.tokens)
    for key in ("low", "high", "medians", "means"):
        np.testing.assert_array_equal(bag[key], getattr(bins, key))
    np.testing.assert_array_equal(bag["counts"][:, :12], counts.toarray())
    assert not bag["counts"][:, 12:].any()
    np.testing.assert_array_equal(bag["counts"][:, 0], bag["rows"] + 1)
    dtypes = {key: value.dtype for key, value in bag.items()}
    assert dtypes["tokens"] == np.uint8
    assert dtypes["rows"] == np.int32
    assert {dtypes[key] for key in ("counts", "low", "high", "medians", "means")} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(bag["measured"], np.arange(16) < 12)


def test_noise_is_judged_by_the_study_not_by_the_bag():
    counts = toy_counts(1000, 5)
    counts[:, 3:] = 0
    counts[:2, 3] = 1  # two counts in a thousand cells: noise
    counts[:3, 4] = 1  # three: not
    source = BagSource([FakeStudy(counts)], BagOptions(10, 5), exhaustive=True)
    tokens = source.record(0)["tokens"]
    assert not tokens[:, 3].any()
    np.testing.assert_array_equal(tokens[:, 4] > 0, np.arange(10) < 3)


@pytest.mark.parametrize("exhaustive", [False, True])
def test_a_small_study_is_filled_up_with_absent_cells(exhaustive):
    options = BagOptions(6, 12, spatial=True, with_counts=True)
    for spatial in (False, True):
        bag = BagSource([toy_study(4, spatial=spatial)], options, exhaustive).record(0)
        assert {len(value) for key, value in bag.items() if key != "measured"} == {6}
        np.testing.assert_array_equal(bag["measured"], np.arange(12) < 12)
        assert (bag["tokens"][4:] == 5).all()
        assert (bag["tokens"][:4] < 5).all()
        assert (bag["rows"][4:] == -1).all()
        assert np.isnan(bag["coordinates"][4:]).all()
        assert np.isfinite(bag["coordinates"][:4]).all() == spatial
        for key in ("counts", "low", "high", "medians", "means"):
            assert not bag[key][4:].any()


def test_coordinates_are_those_of_the_cells_on_the_slide():
    study = toy_study(40, spatial=True)
    source = BagSource([study], BagOptions(8, 12, spatial=True))
    bag = source.record(3)
    np.testing.assert_array_equal(bag["coordinates"], rescale_coordinates(study.coordinates)[bag["rows"]])
    assert "coordinates" not in BagSource([study], BagOptions(8, 12)).record(3)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.booleans()), min_size=1, max_size=4), st.integers(1, 12))
def test_an_exhaustive_pass_reads_every_cell_once(studies, cells_per_bag):
    made = [toy_study(n, 3, seed=i, spatial=s, name=str(i)) for i, (n, s) in enumerate(studies)]
    source = BagSource(made, BagOptions(cells_per_bag, 4), exhaustive=True)
    read = {study.name: [] for study in made}
    for number in range(len(source)):
        rows = source.record(number)["rows"]
        read[source.rows(number)[0].name] += rows[rows >= 0].tolist()
    assert read == {study.name: list(range(study.n_cells)) for study in made}


def test_a_pickled_source_gives_the_same_bags():
    studies = [toy_study(20), toy_study(15, spatial=True, name="slide")]
    source = BagSource(studies, BagOptions(6, 12, spatial=True, shuffle_cells=20))
    before = pickle.loads(pickle.dumps(source))
    bags = [source.record(number, 3) for number in range(len(source))]
    after = pickle.loads(pickle.dumps(source))
    for copy in (before, after):
        for number, bag in enumerate(bags):
            same_bag(copy.record(number, 3), bag)


def test_describe_names_study_and_rows():
    source = BagSource([toy_study(20), toy_study(15, name="slide", spatial=True)], BagOptions(6, 12))
    for number, name in ((0, "toy"), (4, "slide")):
        rows = source.rows(number, 2)[1]
        text = source.describe(number, 2)
        assert f"study {name!r}" in text
        assert f"rows {rows.min()} to {rows.max()}" in text
        assert f"bag {number} of epoch 2" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cells_per_bag": 0}, "cells_per_bag"),
        ({"num_bins": 1}, "num_bins"),
        ({"num_bins": 255}, "num_bins"),
        ({"seed": -1}, "seed"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        BagOptions(**options)


def test_no_studies_and_too_few_positions_are_refused():
    with pytest.raises(ConfigError, match="list of studies"):
        BagSource([], BagOptions())
    with pytest.raises(DataError, match="12 genes"):
        BagSource([toy_study(9)], BagOptions(3, 8)).record(0)


# A real store


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    folder = tmp_path_factory.mktemp("bags") / "store"
    cells, slide = simulate_atlas(1, 50, 80, seed=1)[0], simulate_atlas(1, 49, 80, spatial=True, seed=1)[0]
    genes = GeneVocabulary.human().subset(list(cells.var_names))
    ingest([("cells", cells), ("slide", slide)], folder, vocabulary=genes, options=IngestOptions())
    return Store.open(folder)


@pytest.mark.parametrize("exhaustive", [False, True])
def test_bags_of_a_store_hold_its_counts(store, exhaustive):
    options = BagOptions(8, 96, spatial=True, with_counts=True, shuffle_cells=32)
    source = BagSource(store.studies, options, exhaustive)
    whole = {study.name: study.to_anndata() for study in store.studies}
    assert len(source) == (14 if exhaustive else 12)
    for number in range(len(source)):
        bag, (study, rows) = source.record(number, 1), source.rows(number, 1)
        expected = sp.csr_matrix(whole[study.name].X)[rows].toarray()
        np.testing.assert_array_equal(bag["counts"][: len(rows), :80], expected)
        assert np.isfinite(bag["coordinates"][: len(rows)]).all() == (study.name == "slide")
        assert (bag["tokens"][:, 80:] == 5).all()
    copy = pickle.loads(pickle.dumps(source))
    for number in (0, len(source) - 1):
        same_bag(copy.record(number, 2), source.record(number, 2))
