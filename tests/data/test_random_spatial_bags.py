"""The ablation `spatial_bags=False`: bags of spatial studies that are random in the plane."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sct.data.bags import BagOptions, BagSource
from tests.data.fake_study import FakeStudy, toy_counts, toy_study

small = st.integers(0, 5)


def section(side: int, name: str = "section") -> FakeStudy:
    """Cells of a square in the order of a curve, here line by line."""
    places = np.stack(np.divmod(np.arange(side * side), side), axis=1).astype(np.float32)
    return FakeStudy(toy_counts(side * side, 6), name, places)


def source(studies, spatial_bags=False, exhaustive=False, cells=8, **options) -> BagSource:
    given = BagOptions(cells_per_bag=cells, num_positions=16, spatial_bags=spatial_bags, **options)
    return BagSource(studies, given, exhaustive)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 90), st.integers(1, 12), small, small)
def test_bags_of_an_epoch_are_disjoint_and_nearly_complete(n_cells, cells, epoch, seed):
    bags = source([toy_study(n_cells, spatial=True)], cells=cells, seed=seed)
    rows = np.concatenate([bags.rows(number, epoch)[1] for number in range(len(bags))])
    assert len(set(rows)) == len(rows) >= min(n_cells, n_cells // cells * cells)
    assert rows.min() >= 0
    assert rows.max() < n_cells


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 90), st.integers(1, 12), small)
def test_an_exhaustive_pass_reads_every_cell_once_in_every_epoch_alike(n_cells, cells, epoch):
    bags = source([toy_study(n_cells, spatial=True)], exhaustive=True, cells=cells)
    rows = [bags.rows(number, epoch)[1] for number in range(len(bags))]
    assert sorted(np.concatenate(rows)) == list(range(n_cells))
    assert all(np.array_equal(a, bags.rows(number)[1]) for number, a in enumerate(rows))


@pytest.mark.parametrize("exhaustive", [False, True])
def test_cells_come_from_the_whole_section(exhaustive):
    study = section(24)

    def extent(spatial_bags):
        bags = source([study], spatial_bags, exhaustive)
        places = [study.coordinates[bags.rows(number)[1]] for number in range(len(bags))]
        return np.mean([p.std(axis=0).mean() for p in places])

    whole = study.coordinates.std(axis=0).mean()
    assert extent(False) > 0.8 * whole
    assert extent(True) < 0.5 * whole


def test_epochs_and_seeds_deal_the_cells_anew():
    def first(epoch, seed):
        return tuple(source([section(12)], seed=seed).rows(0, epoch)[1])

    assert len({first(epoch, seed) for epoch in range(3) for seed in range(3)}) == 9


def test_studies_without_positions_are_dealt_as_before():
    studies = [toy_study(50, name="cells"), toy_study(40, spatial=True, name="spots")]
    for exhaustive in (False, True):
        on, off = (source(studies, flag, exhaustive, shuffle_cells=16) for flag in (True, False))
        assert len(on) == len(off)
        differ = [not np.array_equal(on.rows(n)[1], off.rows(n)[1]) for n in range(len(on))]
        of_cells = [on.locate(n)[0] == 0 for n in range(len(on))]
        assert not any(d for d, c in zip(differ, of_cells, strict=True) if c)
        assert any(differ)


@pytest.mark.parametrize("spatial_bags", [False, True])
def test_coordinates_travel_whatever_the_bags(spatial_bags):
    study = section(10)
    bags = source([study], spatial_bags, spatial=True)
    bag = bags.record(3)
    places = study.coordinates[bag["rows"]]
    distance = np.linalg.norm(places[:, None] - places, axis=2)
    seen = np.linalg.norm(bag["coordinates"][:, None] - bag["coordinates"], axis=2)
    np.testing.assert_allclose(seen, distance * (seen.max() / distance.max()), atol=1e-4)
