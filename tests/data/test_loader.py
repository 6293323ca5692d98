"""The loader: an order that depends on the seed alone, exact resume, and shares that add up."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sct.data.bags import BagOptions, BagSource
from sct.data.loader import Loader
from sct.errors import ConfigError, StoreError
from tests.data.fake_study import toy_study


class Numbers:
    """Records that hold their number and epoch; reading some of them takes longer."""

    def __init__(self, length: int, slow: bool = False):
        self.length, self.slow = length, slow

    def __len__(self) -> int:
        return self.length

    def record(self, number: int, epoch: int = 0) -> dict[str, np.ndarray]:
        if self.slow:
            time.sleep(0.002 * ((number * 7) % 5))
        return {"number": np.int64(number), "epoch": np.int64(epoch), "row": np.full(3, number, np.uint8)}

    def describe(self, number: int, epoch: int = 0) -> str:
        return f"{number} of {epoch}"


def drawn(loader: Loader, batches: int, start: int = 0) -> list[dict[str, np.ndarray]]:
    iterator = loader.iterate(start)
    taken = list(itertools.islice(iterator, batches))
    iterator.close()
    return taken


def entries(batches: list[dict[str, np.ndarray]]) -> list[tuple[int, int]]:
    """(epoch, number) of all records in order."""
    return [
        (int(e), int(n)) for batch in batches for e, n in zip(batch["epoch"], batch["number"], strict=True)
    ]


def same(one: list[dict], other: list[dict]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            np.testing.assert_array_equal(value, b[key], err_msg=key)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 17), st.integers(1, 6), st.integers(0, 3))
def test_every_epoch_is_a_permutation_of_all_records(length, batch_size, seed):
    records = entries(drawn(Loader(Numbers(length), batch_size, seed=seed), -(-3 * length // batch_size)))
    for epoch in range(3):
        part = records[epoch * length : (epoch + 1) * length]
        assert {e for e, _ in part} == {epoch}
        assert sorted(n for _, n in part) == list(range(length))


def test_epochs_and_seeds_differ_and_a_seed_repeats_itself():
    orders = [
        tuple(n for _, n in entries(drawn(Loader(Numbers(20), 5, seed=seed), 4, epoch * 20)))
        for seed in range(4)
        for epoch in range(4)
    ]
    assert len(set(orders)) == 16
    assert tuple(range(20)) not in orders
    same(drawn(Loader(Numbers(20), 5, seed=2), 9), drawn(Loader(Numbers(20), 5, seed=2), 9))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("processes", [2, 4])
def test_the_shares_of_all_processes_make_the_batches_of_one(processes, shuffle):
    source, batches = Numbers(14), 4
    single = drawn(Loader(source, 4, seed=3, shuffle=shuffle), batches, 4)
    shares = [
        drawn(
            Loader(source, 4, seed=3, shuffle=shuffle, process_index=i, process_count=processes), batches, 4
        )
        for i in range(processes)
    ]
    assert len(single) == (batches if shuffle else 3)
    for number, batch in enumerate(single):
        for key, value in batch.items():
            pieces = [share[number][key] for share in shares]
            assert all(len(piece) == 4 // processes for piece in pieces)
            np.testing.assert_array_equal(np.concatenate(pieces), value)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 12))
def test_a_resumed_loader_goes_on_as_if_never_stopped(batches):
    loader = Loader(Numbers(7), 3, seed=1)
    straight = drawn(loader, 16)
    iterator = loader.iterate()
    for _ in range(batches):
        next(iterator)
    assert iterator.records_drawn == 3 * batches
    iterator.close()
    again = Loader(Numbers(7), 3, seed=1).iterate(iterator.records_drawn)
    same(list(itertools.islice(again, 4)), straight[batches : batches + 4])
    assert again.records_drawn == 3 * (batches + 4)
    again.close()


def test_state_is_the_same_number_in_every_process():
    iterator = Loader(Numbers(8), 4, process_index=1, process_count=2).iterate(12)
    next(iterator)
    assert iterator.records_drawn == 16
    iterator.close()


@pytest.mark.parametrize(("length", "batch_size"), [(10, 4), (8, 4), (3, 5), (1, 1)])
def test_one_pass_is_in_order_and_marks_what_was_filled_up(length, batch_size):
    loader = Loader(Numbers(length), batch_size, shuffle=False)
    batches = list(loader)
    assert len(batches) == len(loader) == -(-length // batch_size)
    numbers, weights = (
        np.concatenate([batch[key] for batch in batches]) for key in ("number", "example_mask")
    )
    assert weights.dtype == np.float32
    np.testing.assert_array_equal(numbers[weights == 1], np.arange(length))
    np.testing.assert_array_equal(weights, np.arange(len(weights)) < length)
    assert (numbers[weights == 0] == length - 1).all()
    assert all(batch["row"].shape == (batch_size, 3) for batch in batches)


def test_a_shuffled_batch_has_no_filling():
    for batch in drawn(Loader(Numbers(5), 3), 7):
        np.testing.assert_array_equal(batch["example_mask"], np.ones(3, np.float32))


@pytest.mark.parametrize("shuffle", [True, False])
def test_describe_names_what_was_read(shuffle):
    loader = Loader(Numbers(10), 4, seed=5, shuffle=shuffle)
    for number, batch in enumerate(drawn(loader, 3 if not shuffle else 6)):
        expected = [f"{n} of {e}" for e, n in entries([batch])]
        assert loader.describe(4 * number) == expected


def test_threads_do_not_change_the_order():
    source = Numbers(15, slow=True)
    expected = drawn(Loader(Numbers(15), 4, seed=2, num_threads=1, prefetch=1), 8)
    for threads, prefetch in ((1, 8), (4, 8), (8, 3)):
        same(drawn(Loader(source, 4, seed=2, num_threads=threads, prefetch=prefetch), 8), expected)


def test_bags_arrive_whole_and_alike_from_many_threads():
    studies = [toy_study(40, seed=1), toy_study(30, seed=2, spatial=True, name="slide")]
    source = BagSource(studies, BagOptions(6, 12, spatial=True, shuffle_cells=40, with_counts=True))
    single = BagSource(studies, source.options)
    loader = Loader(source, 2, seed=4, num_threads=8, prefetch=16)
    for i, batch in enumerate(drawn(loader, 15)):
        for j, (number, epoch, _) in enumerate(loader._sequence()[i * 2 + k] for k in range(2)):
            for key, value in single.record(number, epoch).items():
                np.testing.assert_array_equal(batch[key][j], value)


@pytest.mark.parametrize(("batch_size", "processes"), [(0, 1), (-4, 2), (3, 2), (2, 4)])
def test_a_batch_that_processes_cannot_share_is_refused(batch_size, processes):
    limit = rf"number of processes \({processes}\)" if batch_size > 0 else "at least 1"
    with pytest.raises(ConfigError, match=rf"batch_size is {batch_size}, .*{limit}"):
        Loader(Numbers(4), batch_size, process_count=processes)


def test_an_error_of_the_source_arrives_as_it_is():
    class Damaged(Numbers):
        def record(self, number: int, epoch: int = 0) -> dict[str, np.ndarray]:
            if number == 3:
                raise StoreError("study 'x': a file cannot be read")
            return super().record(number, epoch)

    with pytest.raises(StoreError, match="study 'x'"):
        list(Loader(Damaged(6), 2, shuffle=False))
