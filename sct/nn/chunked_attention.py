"""Attention whose matrix of scores never exists as a whole, forwards or backwards.

Queries and keys are cut into chunks; the softmax is kept as a running maximum and a running sum in float32 (Rabe &
Staats 2021, "Self-attention does not need O(n^2) memory"; Dao et al. 2022, "FlashAttention"). The backward pass
computes each chunk of the weights again from the logarithm of its sum. Beside inputs, outputs and gradients, memory
is one block of batch x heads x query chunk x key chunk.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sct.nn.plain import at_once

# Query and key positions of a block. On CPU a block of 16 heads then stays near the caches, which is 3 to 4 times
# faster than whole scores at 3,900 positions; accelerators need larger products.
CPU_CHUNKS = (256, 512)
CHUNKS = (1024, 1024)


def default_chunks() -> tuple[int, int]:
    """Query and key positions of a block on the default backend."""
    queries, keys = CPU_CHUNKS if jax.default_backend() == "cpu" else CHUNKS
    return at_once(queries), at_once(keys)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def chunked_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, chunks: tuple[int, int] | None = None
) -> jax.Array:
    """Softmax attention without a mask, equal to `jax.nn.dot_product_attention` within rounding.

    Parameters
    ----------
    query
        Shape (B, L, H, D), of any floating type; products are accumulated and the softmax is taken in float32.
    key, value
        Shape (B, M, H, D), M positive; lengths need not be multiples of the chunks.
    chunks
        Most query and key positions of a block; by default those of the backend.

    Returns
    -------
    (B, L, H, D) in the type of `value`.
    """
    return _forward(query, key, value, chunks)[0]


def _plan(length: int, most: int) -> tuple[int, int]:
    """Number and size of equal chunks of at most `most` positions, with as little padding as can be."""
    number = -(-length // most)
    return number, -(-length // number)


def _cut(x: jax.Array, plan: tuple[int, int]) -> jax.Array:
    """Chunks (n, B, H, c, D) of (B, L, H, D), the last one padded with zeros."""
    batch, length, heads, size = x.shape
    number, chunk = plan
    x = jnp.pad(x, ((0, 0), (0, number * chunk - length), (0, 0), (0, 0)))
    return x.reshape(batch, number, chunk, heads, size).transpose(1, 0, 3, 2, 4)


def _join(x: jax.Array, like: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
    """Undo `_cut`, in the shape and type of `like`."""
    number, batch, heads, chunk, size = x.shape
    whole = x.transpose(1, 0, 3, 2, 4).reshape(batch, number * chunk, heads, size)
    return whole[:, : like.shape[1]].astype(like.dtype)


def _bias(length: int, plan: tuple[int, int]) -> jax.Array | None:
    """Minus infinity (n, c) at the padding behind the last key; None where there is none."""
    number, chunk = plan
    if number * chunk == length:
        return None
    return jnp.where(jnp.arange(number * chunk) < length, 0.0, -jnp.inf).reshape(number, chunk)


def _dot(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _scores(query: jax.Array, key: jax.Array, bias: jax.Array | None) -> jax.Array:
    scores = _dot("bhqd,bhkd->bhqk", query, key) * query.shape[-1] ** -0.5
    return scores if bias is None else scores + bias


def _plans(query: jax.Array, key: jax.Array, chunks: tuple[int, int] | None) -> list[tuple[int, int]]:
    most = chunks or default_chunks()
    return [_plan(x.shape[1], size) for x, size in zip((query, key), most, strict=True)]


def _forward(
    query: jax.Array, key: jax.Array, value: jax.Array, chunks: tuple[int, int] | None
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    queries, keys = _plans(query, key, chunks)
    blocks = (_cut(key, keys), _cut(value, keys), _bias(key.shape[1], keys))

    def one(part: jax.Array) -> tuple[jax.Array, jax.Array]:
        def add(running: Any, block: Any) -> tuple[Any, None]:
            highest, total, mixed = running
            keys, values, bias = block
            scores = _scores(part, keys, bias)
            higher = jnp.maximum(highest, scores.max(axis=-1, keepdims=True))
            weights, shrink = jnp.exp(scores - higher), jnp.exp(highest - higher)
            total = total * shrink + weights.sum(axis=-1, keepdims=True)
            mixed = mixed * shrink + _dot("bhqk,bhkd->bhqd", weights.astype(values.dtype), values)
            return (higher, total, mixed), None

        none = jnp.zeros((*part.shape[:-1], 1), jnp.float32)
        start = (none - jnp.inf, none, jnp.zeros(part.shape, jnp.float32))
        (highest, total, mixed), _ = lax.scan(add, start, blocks)
        return (mixed / total).astype(value.dtype), highest + jnp.log(total)

    mixed, log_total = lax.map(one, _cut(query, queries))
    out = _join(mixed, jax.ShapeDtypeStruct(query.shape, value.dtype))
    return out, (query, key, value, out, log_total)


def _backward(
    chunks: tuple[int, int] | None, kept: tuple[jax.Array, ...], gradient: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    query, key, value, out, log_total = kept
    queries, keys = _plans(query, key, chunks)
    scale = query.shape[-1] ** -0.5
    # The part of the softmax's gradient that all keys of a query share.
    shared = (gradient.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    blocks = (_cut(key, keys), _cut(value, keys), _bias(key.shape[1], keys))

    parts = (_cut(query, queries), _cut(gradient, queries), _cut(shared, queries), log_total)

    def one(sums: Any, part: Any) -> tuple[Any, jax.Array]:
        query, gradient, shared, log_total = part

        def add(j: jax.Array, sums: Any) -> Any:
            d_query, d_key, d_value = sums
            key, value, bias = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, j, keepdims=False), blocks)
            weights = jnp.exp(_scores(query, key, bias) - log_total)
            d_value = d_value.at[j].add(_dot("bhqk,bhqd->bhkd", weights.astype(value.dtype), gradient))
            d_weights = _dot("bhqd,bhkd->bhqk", gradient, value)
            d_scores = (weights * (d_weights - shared) * scale).astype(query.dtype)
            d_key = d_key.at[j].add(_dot("bhqk,bhqd->bhkd", d_scores, query))
            return d_query + _dot("bhqk,bhkd->bhqd", d_scores, key), d_key, d_value

        d_query, *sums = lax.fori_loop(0, keys[0], add, (jnp.zeros(query.shape, jnp.float32), *sums))
        return tuple(sums), d_query

    # Sums of this form depend on the gradient: XLA for the CPU (jax 0.10) makes arrays of plain zeros at the beginning
    # of a program, where those of all layers take memory at once.
    none = jnp.broadcast_to(shared.ravel()[0] * 0.0, blocks[0].shape)
    (d_key, d_value), d_query = lax.scan(one, (none, none), parts)
    return _join(d_query, query), _join(d_key, key), _join(d_value, value)


chunked_attention.defvjp(_forward, _backward)
