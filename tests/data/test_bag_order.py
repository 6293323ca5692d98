"""Laws of the order in which the cells of an AnnData are put into bags."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sct.data.bag_order import centered_order, masked_cell_order, neighbors, random_order, tile_order

laws = settings(max_examples=60, deadline=None)
sizes, bags, seeds = st.integers(1, 150), st.integers(1, 20), st.integers(0, 5)


def places(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((n, 2)) * [30, 12]


def check_partition(order, rows, cells_per_bag):
    assert order.cells_per_bag == min(cells_per_bag, len(rows))
    assert len(order.rows) % order.cells_per_bag == 0
    assert len(order.rows) < len(rows) + order.cells_per_bag, "no bag is all context"
    np.testing.assert_array_equal(np.sort(order.rows[order.is_target]), np.sort(rows))
    for bag in order.rows.reshape(-1, order.cells_per_bag):
        assert len(set(bag.tolist())) == len(bag), "a cell stands in a bag once"


@laws
@given(sizes, bags, seeds)
def test_random_bags_hold_each_cell_once(n, k, seed):
    rows = np.arange(n) * 3 + 7
    check_partition(random_order(rows, k, seed), rows, k)


@laws
@given(sizes, bags, seeds)
def test_tiles_hold_each_cell_once(n, k, seed):
    rows = np.random.default_rng(seed).permutation(n)
    check_partition(tile_order(rows, places(n, seed), k), rows, k)


def test_a_window_is_shuffled_within_itself_only():
    rows = np.arange(1000)
    order = random_order(rows, 10, seed=3, window=200)
    windows = order.rows.reshape(5, 200)
    np.testing.assert_array_equal(np.sort(windows, axis=1), rows.reshape(5, 200))
    assert not np.array_equal(order.rows, rows)
    again, other = random_order(rows, 10, 3, 200), random_order(rows, 10, 4, 200)
    np.testing.assert_array_equal(order.rows, again.rows)
    assert (order.rows != other.rows).mean() > 0.5


def test_cells_appended_to_a_file_leave_the_bags_of_full_windows_alone():
    before, after = random_order(np.arange(400), 10, window=200), random_order(np.arange(777), 10, window=200)
    np.testing.assert_array_equal(before.rows, after.rows[:400])


def test_tiles_are_compact():
    n, k = 900, 25
    where = places(n)

    def spread(order):
        return np.mean([where[bag].std(axis=0).sum() for bag in order.rows.reshape(-1, k)])

    rows = np.arange(n)
    assert spread(tile_order(rows, where, k)) < 0.3 * spread(random_order(rows, k))
    tile = tile_order(rows, where, k).rows[:k]
    distance = np.linalg.norm(where[tile] - where[tile[0]], axis=1)
    assert (np.diff(distance) >= 0).all(), "nearest to the middle first"


def test_context_of_the_last_tile_is_near_it():
    where = np.stack([np.arange(11.0), np.zeros(11)], axis=1)
    order = tile_order(np.arange(11), where, 4)
    context = order.rows[~order.is_target]
    last = order.rows[-4:][order.is_target[-4:]]
    assert len(context) == 1
    assert np.abs(where[context[0], 0] - where[last, 0]).min() == 1


@laws
@given(st.integers(1, 60), bags, seeds)
def test_neighbours_against_brute_force(n, k, seed):
    where = places(n, seed)
    found = neighbors(where, k)
    distance = np.linalg.norm(where[:, None] - where[None], axis=2)
    np.testing.assert_array_equal(found[:, 0], np.arange(n))
    expected = np.sort(distance, axis=1)[:, : min(k, n)]
    np.testing.assert_allclose(np.take_along_axis(distance, found, axis=1), expected, atol=1e-4)


def test_each_cell_leads_its_own_neighbourhood_where_cells_share_a_place():
    where = np.repeat(places(5), 4, axis=0)
    found = neighbors(where, 3)
    np.testing.assert_array_equal(found[:, 0], np.arange(20))
    assert all(len(set(row)) == 3 for row in found.tolist())


def test_centred_bags_count_their_first_cell():
    rows = np.arange(30) + 100
    order = centered_order(rows, places(30), 6)
    assert order.is_target.reshape(30, 6)[:, 0].all()
    assert order.is_target.sum() == 30
    np.testing.assert_array_equal(order.rows.reshape(30, 6)[:, 0], rows)


@laws
@given(st.integers(2, 120), st.integers(2, 20), st.integers(1, 5), seeds, st.booleans())
def test_hidden_cells_are_counted_once_and_always_see_others(n, k, most, seed, spatial):
    rng = np.random.default_rng(seed)
    rows, hidden = rng.permutation(n) + 5, rng.random(n) < 0.4
    hidden[rng.integers(n)] = True
    hidden[rng.permutation(np.flatnonzero(hidden))[: int(hidden.all())]] = False
    if not hidden.any():
        return
    most = min(most, k - 1)
    order = masked_cell_order(rows, hidden, k, most, seed, places(n, seed) if spatial else None)
    np.testing.assert_array_equal(np.sort(order.rows[order.is_target]), np.sort(rows[hidden]))
    is_hidden = np.isin(order.rows, rows[hidden]).reshape(-1, order.cells_per_bag)
    assert (is_hidden.sum(axis=1) <= most).all()
    assert (~is_hidden).any(axis=1).all()


def test_visible_cells_around_hidden_ones_are_the_nearest():
    where = places(200)
    hidden = np.zeros(200, bool)
    hidden[[3, 50, 120]] = True
    order = masked_cell_order(np.arange(200), hidden, 9, 1, 0, where)
    for bag in order.rows.reshape(-1, 9):
        distance = np.linalg.norm(where - where[bag[0]], axis=1)
        distance[hidden] = np.inf
        assert set(bag[1:]) == set(np.argsort(distance)[:8])


@pytest.mark.parametrize("spatial", [False, True])
def test_the_same_call_gives_the_same_bags(spatial):
    rows, hidden = np.arange(80), np.arange(80) % 7 == 0
    where = places(80) if spatial else None
    one, two = (masked_cell_order(rows, hidden, 10, 2, 5, where) for _ in range(2))
    np.testing.assert_array_equal(one.rows, two.rows)
