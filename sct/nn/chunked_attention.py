"""Compute attention such that neither the forward nor the backward pass stores the whole score matrix.

Queries and keys are cut into chunks. A block is a pair of one chunk of queries and one chunk of keys. A softmax over
all keys needs only a running maximum and a running sum, in float32 (Rabe & Staats 2021, "Self-attention does not need
O(n^2) memory"; Dao et al. 2022, "FlashAttention"). The backward pass recomputes the attention weights of each block
from its scores and the saved log-sum-exp of each query. In addition to inputs, outputs and gradients, memory holds one
block: batch x heads x query chunk x key chunk.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax

from sct.nn import target
from sct.nn.reference import chunk_limit

# Query and key positions of a block. On CPU, blocks of these sizes stay close to the caches. Attention over 128 to
# 1,024 tokens then takes a third to two thirds of the CPU time of the whole score matrix, also because the backward
# pass does not read saved scores but computes them again. Longer sequences need fewer, larger blocks, and accelerators
# need larger matrix products. In causal attention, smaller blocks skip more of the keys that no query attends to.
CPU_CHUNKS, CPU_SMALL_CHUNKS = (256, 512), (128, 128)
CHUNKS, ORDERED_CHUNKS = (1024, 1024), (512, 512)
CPU_SHORT = 1024  # number of keys up to which small chunks are faster on CPU
CPU_FEW = 64  # number of queries from which chunks are faster than the whole score matrix on CPU


def default_chunks(keys: int, ordered: bool = False) -> tuple[int, int]:
    """Return the number of query positions and the number of key positions in a block, for the platform of `target`.

    `keys` is the number of all keys. `ordered` is True for causal attention, in which queries do not attend to later
    keys.
    """
    if target.platform() == "cpu":
        chunks = CPU_SMALL_CHUNKS if ordered or keys <= chunk_limit(CPU_SHORT) else CPU_CHUNKS
    else:
        chunks = ORDERED_CHUNKS if ordered else CHUNKS
    return chunk_limit(chunks[0]), chunk_limit(chunks[1])


def use_chunks(queries: int, keys: int, ordered: bool = False) -> bool:
    """Return whether `chunked_attention` needs less memory or time than the whole score matrix on the traced device.

    Parameters
    ----------
    queries, keys
        Number of all queries and of all keys.
    ordered
        Whether attention is causal.
    """
    if keys > default_chunks(keys, ordered)[1]:
        return True
    return target.platform() == "cpu" and queries >= chunk_limit(CPU_FEW)


# Score of a key that a query may not attend to. It is finite, so that a query without any key gets the mean of all
# values instead of NaN.
UNSEEN = -1e30
# Segment of keys that every query attends to, and segment of keys that no query attends to.
EVERYONE, NO_ONE = -(2**31), -(2**31) + 1


class Mask(NamedTuple):
    """Attention mask: a query attends to the keys of its own segment; causal attention also excludes later keys.

    Attributes
    ----------
    query, key
        Segment numbers of queries, int32 (B, L), and of keys, int32 (B, M). None means that there is one segment. By
        convention, padding has the segment number 0. Every query attends to the keys in the segment `EVERYONE`, and no
        query attends to the keys in the segment `NO_ONE`.
    order
        For causal attention, the index of the first query among the keys, int32 (). Query i then attends only to the
        keys 0 to `order + i`. None means that attention is not causal.
    """

    query: jax.Array | None = None
    key: jax.Array | None = None
    order: jax.Array | int | None = None

    def visible(self, queries: jax.Array, keys: jax.Array) -> jax.Array | None:
        """Return a bool mask (B or 1, L', M') that is True where a query attends to a key.

        Return None if every query attends to all keys.

        Parameters
        ----------
        queries, keys
            Positions of the queries (L',) and the keys (M',). The segments of this mask must belong to exactly these
            positions.
        """
        seen = None if self.order is None else (keys <= self.order + queries[:, None])[None]
        if self.query is not None and self.key is not None:
            same = (self.query[:, :, None] == self.key[:, None, :]) | (self.key == EVERYONE)[:, None, :]
            seen = same if seen is None else seen & same
        return seen


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def chunked_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: Mask | None = None,
    chunks: tuple[int, int] | None = None,
) -> jax.Array:
    """Compute softmax attention chunk by chunk. The result equals `jax.nn.dot_product_attention` up to rounding.

    Parameters
    ----------
    query
        Shape (B, L, H, D), of any floating type. Sums and the softmax are computed in float32.
    key, value
        Shape (B, M, H, D), with at least one key. L and M need not be multiples of the chunk sizes.
    mask
        Mask of the keys to which each query attends. By default, a query attends to all keys. Blocks in which the
        causal order masks every key are skipped.
    chunks
        Two numbers: the largest number of query positions in a block, and the largest number of key positions. The
        default depends on the backend; see `default_chunks`.

    Returns
    -------
    (B, L, H, D), in the type of `value`.
    """
    return _forward(query, key, value, mask, chunks)[0]


def _plan(length: int, most: int) -> tuple[int, int]:
    """Choose chunks of equal size for `length` positions: as few chunks as possible, and as little padding as possible.

    A chunk has at most `most` positions. Return the number of chunks and the number of positions in each.
    """
    number = -(-length // most)
    return number, -(-length // number)


def _cut(x: jax.Array, plan: tuple[int, int]) -> jax.Array:
    """Cut an array (B, L, H, D) into chunks (n, B, H, c, D). The last chunk is padded with zeros."""
    number, chunk = plan
    x = jnp.pad(x, ((0, 0), (0, number * chunk - x.shape[1]), (0, 0), (0, 0)))
    return rearrange(x, "b (n c) h d -> n b h c d", n=number)


def _join(x: jax.Array, like: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
    """Join chunks (n, B, H, c, D) into one array (B, L, H, D), without the padding and in the type of `like`."""
    whole = rearrange(x, "n b h c d -> b (n c) h d")
    return whole[:, : like.shape[1]].astype(like.dtype)


class _Blocks(NamedTuple):
    """A mask whose segment ids are split into the same chunks as the queries and the keys."""

    mask: Mask
    queries: tuple[int, int]
    keys: tuple[int, int]
    length: int  # number of keys without padding

    @classmethod
    def of(cls, mask: Mask | None, plans: list[tuple[int, int]], length: int) -> _Blocks:
        mask = mask or Mask()
        segments = [
            None if x is None else _cut(x[:, :, None, None], plan)[:, :, 0, :, 0]
            for x, plan in zip((mask.query, mask.key), plans, strict=True)
        ]
        return cls(Mask(segments[0], segments[1], mask.order), plans[0], plans[1], length)

    def bias(self, i: Any, j: Any) -> jax.Array | None:
        """Return the bias that is added to the scores of query chunk i and key chunk j.

        The bias has the shape (B or 1, 1, c, c') and is 0 for keys to which a query attends, `UNSEEN` for other keys,
        and -inf for padding. The result is None if the bias is 0 for all keys.
        """
        take = functools.partial(lax.dynamic_index_in_dim, keepdims=False)
        query, key = (
            None if x is None else take(x, at)
            for x, at in zip((self.mask.query, self.mask.key), (i, j), strict=True)
        )
        keys = j * self.keys[1] + jnp.arange(self.keys[1])
        seen = Mask(query, key, self.mask.order).visible(
            i * self.queries[1] + jnp.arange(self.queries[1]), keys
        )
        if seen is not None:
            bias = jnp.where(seen, 0.0, UNSEEN)[:, None]
        elif self.keys[0] * self.keys[1] != self.length:
            bias = jnp.zeros((1, 1, 1, self.keys[1]))
        else:
            return None
        # Padding after the last key gets -inf, so that it has no weight even for a query without any key.
        return jnp.where(keys < self.length, bias, -jnp.inf)

    def stop(self, i: Any) -> Any:
        """Return the number n such that the queries of chunk i may attend only to the first n key chunks."""
        if self.mask.order is None:
            return self.keys[0]
        last = self.mask.order + (i + 1) * self.queries[1]
        return jnp.clip(-(-last // self.keys[1]), 1, self.keys[0])


def _dot(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _scores(query: jax.Array, key: jax.Array, bias: jax.Array | None) -> jax.Array:
    scores = _dot("bhqd,bhkd->bhqk", query, key) * query.shape[-1] ** -0.5
    return scores if bias is None else scores + bias


def _plans(
    query: jax.Array, key: jax.Array, mask: Mask | None, chunks: tuple[int, int] | None
) -> list[tuple[int, int]]:
    most = chunks or default_chunks(key.shape[1], mask is not None and mask.order is not None)
    return [_plan(x.shape[1], size) for x, size in zip((query, key), most, strict=True)]


def _block(arrays: Any, j: Any) -> Any:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, j, keepdims=False), arrays)


_SavedAttention = tuple[jax.Array, jax.Array, jax.Array, Mask | None, jax.Array, jax.Array]


def _forward(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask | None, chunks: tuple[int, int] | None
) -> tuple[jax.Array, _SavedAttention]:
    plans = _plans(query, key, mask, chunks)
    blocks, which = (_cut(key, plans[1]), _cut(value, plans[1])), _Blocks.of(mask, plans, key.shape[1])

    def one(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        i, queries = part

        def add(j: jax.Array, running: Any) -> Any:
            """Update the running softmax with the keys of chunk j."""
            highest, total, mixed = running
            keys, values = _block(blocks, j)
            scores = _scores(queries, keys, which.bias(i, j))
            higher = jnp.maximum(highest, scores.max(axis=-1, keepdims=True))
            # The sums so far are relative to the old maximum: rescale them to the new one.
            weights, shrink = jnp.exp(scores - higher), jnp.exp(highest - higher)
            total = total * shrink + weights.sum(axis=-1, keepdims=True)
            mixed = mixed * shrink + _dot("bhqk,bhkd->bhqd", weights.astype(values.dtype), values)
            return higher, total, mixed

        none = jnp.zeros((*queries.shape[:-1], 1), jnp.float32)
        start = (none - jnp.inf, none, jnp.zeros(queries.shape, jnp.float32))
        highest, total, mixed = lax.fori_loop(0, which.stop(i), add, start)
        return (mixed / total).astype(value.dtype), highest + jnp.log(total)

    mixed, log_total = lax.map(one, (jnp.arange(plans[0][0]), _cut(query, plans[0])))
    out = _join(mixed, jax.ShapeDtypeStruct(query.shape, value.dtype))
    return out, (query, key, value, mask, out, log_total)


def _backward(
    chunks: tuple[int, int] | None, kept: _SavedAttention, gradient: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    query, key, value, mask, out, log_total = kept
    plans = _plans(query, key, mask, chunks)
    queries, keys = plans
    scale = query.shape[-1] ** -0.5
    # The gradient of the softmax is weights * (d_weights - shared), where `shared` is the sum of weights * d_weights
    # over all keys. That sum equals sum(gradient * output), so it can be computed before the loop.
    shared = (gradient.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    blocks, which = (_cut(key, keys), _cut(value, keys)), _Blocks.of(mask, plans, key.shape[1])

    number = jnp.arange(queries[0])
    parts = (number, _cut(query, queries), _cut(gradient, queries), _cut(shared, queries), log_total)

    def one(sums: Any, part: Any) -> tuple[Any, jax.Array]:
        i, query, gradient, shared, log_total = part

        def add(j: jax.Array, sums: Any) -> Any:
            d_query, d_key, d_value = sums
            key, value = _block(blocks, j)
            bias = which.bias(i, j)
            weights = jnp.exp(_scores(query, key, bias) - log_total)
            if bias is not None:
                # For a query without any key, `log_total` is UNSEEN + log(number of keys), which float32 rounds to
                # UNSEEN. Divide by the number of keys here instead.
                weights = jnp.where(log_total > UNSEEN / 2, weights, weights / which.length)
            d_value = d_value.at[j].add(_dot("bhqk,bhqd->bhkd", weights.astype(value.dtype), gradient))
            d_weights = _dot("bhqd,bhkd->bhqk", gradient, value)
            d_scores = weights * (d_weights - shared) * scale
            if bias is not None:  # masked scores are constants, without a gradient
                d_scores = jnp.where(bias > UNSEEN / 2, d_scores, 0.0)
            d_scores = d_scores.astype(query.dtype)
            d_key = d_key.at[j].add(_dot("bhqk,bhqd->bhkd", d_scores, query))
            return d_query + _dot("bhqk,bhkd->bhqd", d_scores, key), d_key, d_value

        start = (jnp.zeros(query.shape, jnp.float32), *sums)
        d_query, *sums = lax.fori_loop(0, which.stop(i), add, start)
        return tuple(sums), d_query

    # These zeros are computed from the gradient on purpose. XLA for CPU (jax 0.10) allocates constant zeros when a
    # program starts, so that the zeros of all layers would take memory at the same time.
    none = jnp.broadcast_to(shared.ravel()[0] * 0.0, blocks[0].shape)
    (d_key, d_value), d_query = lax.scan(one, (none, none), parts)
    return _join(d_query, query), _join(d_key, key), _join(d_value, value), None


chunked_attention.defvjp(_forward, _backward)
