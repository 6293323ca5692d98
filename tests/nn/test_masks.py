"""Attention that sees a part of the keys: chunks are plain attention, whatever segments, order and heads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from sct.nn import attention, chunked_attention
from sct.nn.chunked_attention import Mask
from sct.nn.reference import reference_kernels, smaller_chunks


@pytest.fixture(autouse=True, scope="module")
def _exact():
    with jax.default_matmul_precision("highest"):
        yield


def normal(*shape: int, seed: int = 0, size: float = 1.0) -> np.ndarray:
    return (size * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def inputs(length: int, keys: int, heads: int = 4, groups: int = 2, seed: int = 0) -> list[np.ndarray]:
    """Queries (2, L, H, 4), keys and values (2, M, H', 4)."""
    return [
        normal(2, length, heads, 4, seed=seed), normal(2, keys, groups, 4, seed=seed + 1),
        normal(2, keys, groups, 4, seed=seed + 2),
    ]  # fmt: skip


def by_hand(query, key, value, seen):
    """Attention in float64, one query at a time; NaN where nothing is seen."""
    out = np.full(query.shape, np.nan)
    for batch, length, head in np.ndindex(*query.shape[:3]):
        other = head // (query.shape[2] // key.shape[2])
        places = np.flatnonzero(seen[batch, length])
        if not len(places):
            continue
        scores = key[batch, places, other].astype(float) @ query[batch, length, head] / query.shape[3] ** 0.5
        weights = np.exp(scores - scores.max())
        out[batch, length, head] = weights @ value[batch, places, other] / weights.sum()
    return out


def visible(length, keys, query_segments=None, key_segments=None, order=None):
    seen = np.ones((2, length, keys), bool)
    if order is not None:
        seen &= np.arange(keys) <= order + np.arange(length)[:, None]
    if query_segments is not None:
        seen &= query_segments[:, :, None] == key_segments[:, None, :]
    return seen


def both(attend, arrays, mask, is_target):
    """Value and gradients by all inputs, for a random cotangent of the queries that are `is_target`."""
    gradient = normal(*arrays[0].shape, seed=9) * is_target[:, :, None, None]

    def run(arrays, mask):
        value, pull = jax.vjp(lambda *x: attend(*x, mask), *arrays)
        return value, *pull(gradient)

    return [np.asarray(part, np.float64) for part in jax.jit(run)(arrays, mask)]


def chunked(sizes):
    def attend(query, key, value, mask):
        times = query.shape[2] // key.shape[2]
        key, value = (jnp.repeat(x, times, axis=2) for x in (key, value))
        return chunked_attention.chunked_attention(query, key, value, mask, sizes)

    return attend


def agree(arrays, mask, seen, sizes):
    is_target = seen.any(axis=2)
    with reference_kernels():
        expected = both(attention.attend, arrays, mask, is_target)
    found = both(chunked(sizes), arrays, mask, is_target)
    value = by_hand(*arrays, seen)
    for part in (expected, found):
        np.testing.assert_allclose(part[0][is_target], value[is_target], atol=5e-6)
        assert all(np.isfinite(each).all() for each in part)
    for name, a, b in zip(("query", "key", "value"), found[1:], expected[1:], strict=True):
        assert np.abs(a - b).max() <= 5e-6 * max(np.abs(b).max(), 1.0), name


def runs(rng, length: int, most: int) -> np.ndarray:
    """Segments (2, L) of texts that follow each other, with padding 0 behind."""
    return np.stack(
        [
            np.where(
                np.arange(length) < rng.integers(1, length + 1), np.sort(rng.integers(1, most + 1, length)), 0
            )
            for _ in range(2)
        ]
    ).astype(np.int32)


@pytest.mark.slow
@settings(max_examples=4, deadline=None)
@given(
    length=st.integers(1, 33), most=st.integers(1, 5), sizes=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    groups=st.sampled_from([1, 2, 4]), causal=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@example(length=24, most=3, sizes=(8, 6), groups=4, causal=True, seed=0)  # nothing to pad
@example(length=1, most=1, sizes=(4, 4), groups=1, causal=True, seed=0)
def test_texts_in_a_row(length, most, sizes, groups, causal, seed):
    segments = runs(np.random.default_rng(seed), length, most)
    order = 0 if causal else None
    mask = Mask(jnp.asarray(segments), jnp.asarray(segments), order)
    arrays = inputs(length, length, groups=groups, seed=seed)
    agree(arrays, mask, visible(length, length, segments, segments, order), sizes)


@pytest.mark.slow
@settings(max_examples=4, deadline=None)
@given(
    length=st.integers(1, 20), before=st.integers(-3, 25), behind=st.integers(0, 6),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)), traced=st.booleans(), segments=st.booleans(),
)  # fmt: skip
@example(length=8, before=8, behind=0, sizes=(4, 4), traced=True, segments=False)
@example(length=9, before=-3, behind=0, sizes=(2, 3), traced=False, segments=False)
def test_queries_behind_other_keys(length, before, behind, sizes, traced, segments):
    """Queries that stand at some place among the keys, as those that are read with a cache or on another device."""
    keys = length + before + behind
    assume(keys > 0)
    own = other = None
    if segments:  # of any numbers in any order
        rng = np.random.default_rng(length)
        own, other = (rng.integers(0, 3, (2, size)).astype(np.int32) for size in (length, keys))
    mask = Mask(own, other, np.int32(before) if traced else before)
    agree(inputs(length, keys), mask, visible(length, keys, own, other, before), sizes)


def test_a_query_that_sees_nothing_has_the_mean_of_all_values():
    arrays = inputs(7, 10, groups=4)
    own, other = np.zeros((2, 7), np.int32), np.ones((2, 10), np.int32)
    own[:, 2:] = 1
    mask, everything = Mask(own, other), np.ones((2, 7), bool)
    with reference_kernels():
        expected = both(attention.attend, arrays, mask, everything)
    found = both(chunked((3, 4)), arrays, mask, everything)
    np.testing.assert_allclose(
        found[0][:, :2], np.broadcast_to(arrays[2].mean(axis=1)[:, None], (2, 2, 4, 4)), atol=1e-6
    )
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)


def test_what_is_not_seen_does_not_count_however_large_it_is():
    arrays = inputs(30, 30, groups=1)
    segments = np.repeat([[1, 2, 3]], 10, axis=1).repeat(2, axis=0).astype(np.int32)
    mask = Mask(segments, segments, 0)
    one = both(chunked((7, 4)), arrays, mask, np.ones((2, 30), bool))
    for array in arrays[1:]:
        array[:, 10:] *= 1e4
    two = both(chunked((7, 4)), arrays, mask, np.ones((2, 30), bool))
    np.testing.assert_array_equal(one[0][:, :10], two[0][:, :10])
    np.testing.assert_array_equal(one[1][:, :10], two[1][:, :10])
    assert np.abs(one[0][:, 10:] - two[0][:, 10:]).max() > 1


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "groups"), [(4, 1), (4, 2), (6, 3), (3, 3)])
def test_heads_that_share_keys_are_neighbours(heads, groups):
    arrays = inputs(5, 5, heads, groups)
    seen = visible(5, 5, order=0)
    for place in (lambda: reference_kernels(), lambda: smaller_chunks(0.02)):
        with place():
            found = both(attention.attend, arrays, Mask(order=0), np.ones((2, 5), bool))
        np.testing.assert_allclose(found[0], by_hand(*arrays, seen), atol=5e-6)


def test_blocks_that_nothing_sees_are_left_out():
    """With an order, half of the work: a loop's bound, which is not in the value."""
    blocks = chunked_attention._Blocks.of(Mask(order=0), [(4, 8), (8, 4)], 32)
    assert [int(blocks.stop(i)) for i in range(4)] == [2, 4, 6, 8]
    blocks = chunked_attention._Blocks.of(Mask(order=jnp.int32(-20)), [(4, 8), (8, 4)], 32)
    assert [int(blocks.stop(i)) for i in range(4)] == [1, 1, 1, 3]
    blocks = chunked_attention._Blocks.of(None, [(4, 8), (8, 4)], 32)
    assert blocks.stop(0) == 8


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_with_texts_in_a_row(dtype):
    segments = runs(np.random.default_rng(0), 60, 4)
    mask, is_target = Mask(segments, segments, 0), np.ones((2, 60), bool)
    arrays = [jnp.asarray(x, dtype) for x in inputs(60, 60, groups=4)]
    with reference_kernels():
        exact = both(attention.attend, [x.astype(jnp.float32) for x in arrays], mask, is_target)

    def typed(query, key, value, mask):
        out = chunked((16, 8))(query, key, value, mask)
        assert out.dtype == value.dtype
        return out.astype(jnp.float32)

    rounding = float(jnp.finfo(dtype).eps)
    for a, b in zip(both(typed, arrays, mask, is_target), exact, strict=True):
        assert np.abs(a - b).max() <= 4 * rounding * max(np.abs(b).max(), 1.0)


def test_causal_attention_has_smaller_chunks():
    """On CPU, only for many keys; on accelerators, always."""
    many = chunked_attention.CPU_SHORT + 1
    assert chunked_attention.default_chunks(many, ordered=True) == chunked_attention.CPU_SMALL_CHUNKS
    assert chunked_attention.default_chunks(many) == chunked_attention.CPU_CHUNKS
    assert chunked_attention.default_chunks(many - 1) == chunked_attention.CPU_SMALL_CHUNKS
    for small, large in (
        (chunked_attention.CPU_SMALL_CHUNKS, chunked_attention.CPU_CHUNKS),
        (chunked_attention.ORDERED_CHUNKS, chunked_attention.CHUNKS),
    ):
        assert small < large
