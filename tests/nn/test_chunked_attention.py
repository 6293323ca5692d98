"""Attention in chunks is attention: values, gradients, types, memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sct.nn import attention, chunked_attention
from sct.nn.reference import reference_kernels


@pytest.fixture(autouse=True)
def _exact():
    with jax.default_matmul_precision("highest"):
        yield


def normal(*shape: int, seed: int, dtype: str = "float32", size: float = 1.0) -> jax.Array:
    values = size * np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(values.astype(np.float32)).astype(dtype)


def both(function, *inputs):
    """Value, and gradients by all inputs for a random cotangent, in float64."""
    gradient = normal(*inputs[0].shape, seed=9).astype(inputs[0].dtype)

    @jax.jit
    def run(*inputs):
        value, pull = jax.vjp(function, *inputs)
        return value, *pull(gradient)

    return [np.asarray(part, np.float64) for part in run(*inputs)]


def chunked(*chunks: int):
    return lambda *inputs: chunked_attention.chunked_attention(*inputs, None, chunks)


def agree(got, expected, tolerance):
    for name, a, b in zip(("value", "query", "key", "value's"), got, expected, strict=True):
        assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1.0), name


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 16), st.integers(1, 16))
@example(length=24, keys=24, first=8, second=6)  # nothing to pad
def test_chunks_of_any_size_give_plain_attention_and_its_gradients(length, keys, first, second):
    query = normal(2, length, 3, 4, seed=0)
    key, value = (normal(2, keys, 3, 4, seed=seed) for seed in (1, 2))
    expected = both(jax.nn.dot_product_attention, query, key, value)
    agree(both(chunked(first, second), query, key, value), expected, 5e-6)


def test_very_large_scores_stay_finite():
    query, key = (normal(1, 9, 1, 4, seed=seed, size=300.0) for seed in (0, 1))
    inputs = query, key, normal(1, 9, 1, 4, seed=2)
    found, expected = both(chunked(2, 2), *inputs), both(jax.nn.dot_product_attention, *inputs)
    assert all(np.isfinite(part).all() for part in found)
    np.testing.assert_allclose(found[0], expected[0], atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_are_accumulated_in_float32(dtype):
    inputs = [normal(1, 100, 2, 8, seed=seed, dtype=dtype) for seed in range(3)]
    exact = both(jax.nn.dot_product_attention, *(x.astype(jnp.float32) for x in inputs))
    out = jax.eval_shape(chunked(16, 8), *inputs)
    assert out.dtype == inputs[0].dtype
    rounding = float(jnp.finfo(dtype).eps)
    agree(both(chunked(16, 8), *inputs), exact, 4 * rounding)


def test_no_matrix_of_all_scores_is_made_in_either_direction():
    length, heads, size = 4096, 4, 8
    shapes = [jax.ShapeDtypeStruct((1, length, heads, size), jnp.float32)] * 3
    whole = length * length * heads * 4

    def needs(attend):
        step = jax.jit(jax.value_and_grad(lambda *qkv: attend(*qkv).sum(), argnums=(0, 1, 2)))
        return step.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    with reference_kernels():
        assert needs(lambda *qkv: attention.attend(*qkv)) > whole
    assert needs(attention.attend) < whole / 10


def test_short_sequences_and_the_reference_path_are_plain(monkeypatch):
    def refused(*inputs):
        raise AssertionError("chunked")

    monkeypatch.setattr(attention, "chunked_attention", refused)
    few = chunked_attention.CPU_FEW
    short, long = (normal(1, length, 1, 2, seed=0) for length in (few - 1, few))
    many = normal(1, chunked_attention.CPU_SMALL_CHUNKS[1] + 1, 1, 2, seed=0)
    attention.attend(short, long, long)
    with reference_kernels():
        attention.attend(long, long, long)
    for query, key in ((long, long), (short, many)):
        with pytest.raises(AssertionError, match="chunked"):
            attention.attend(query, key, key)
