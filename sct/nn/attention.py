"""Define multi-head attention, rotary position embedding and the gated feed-forward layer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from sct.nn import axes, target
from sct.nn.adapters import Prefix, prefix_of
from sct.nn.chunked_attention import EVERYONE, NO_ONE, Mask, chunked_attention, use_chunks
from sct.nn.linear import Linear
from sct.nn.norm import EPSILON, LayerNorm
from sct.nn.reference import use_reference

Attend = Callable[[jax.Array, jax.Array, jax.Array, Mask | None], jax.Array]


def rotary_frequencies(features: int, base: float = 10_000.0) -> jax.Array:
    """Return the rotation angle of each feature pair i, in radians per position: `base ** (-2 i / features)`.

    Shape (features / 2,), float32.
    """
    half = features // 2
    return base ** (-jnp.arange(half, dtype=jnp.float32) / half)


def rotary(x: jax.Array, positions: jax.Array, frequencies: jax.Array | None = None) -> jax.Array:
    """Apply rotary position embedding to x (B, L, H, D), in the half-split form.

    Feature i of the first half and feature i of the second half form a pair. Pair i is rotated by
    `position * frequencies[i]` radians. If there are fewer than D / 2 frequencies, only the first
    `2 * len(frequencies)` features are rotated.

    Parameters
    ----------
    x
        Queries or keys, shape (B, L, H, D).
    positions
        Position of each token, shape (L,) or (B, L).
    frequencies
        Rotation angle of each feature pair, in radians per position. The default is `rotary_frequencies(D)`.

    Returns
    -------
    Shape (B, L, H, D), in the type of `x`. The angles are computed in float32.
    """
    chex.assert_rank([x, positions], [4, {1, 2}])
    frequencies = rotary_frequencies(x.shape[-1]) if frequencies is None else frequencies
    half = frequencies.shape[0]
    angle = positions.astype(jnp.float32)[..., None, None] * frequencies
    angle = angle if positions.ndim > 1 else angle[None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*(part.astype(x.dtype) for part in turned), x[..., 2 * half :]], axis=-1)


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask | None = None, prefix: Prefix | None = None
) -> jax.Array:
    """Compute softmax attention. Scores are scaled by 1 / sqrt(D).

    The implementation depends on the backend, the data type and the length of the sequence:

    - cuDNN's flash kernel, through `jax.nn.dot_product_attention`, on GPU with 16-bit types. This kernel does not
      support segments, nor a causal order together with a prefix.
    - `chunked_attention`, if it needs less memory or time; see `sct.nn.chunked_attention.use_chunks`.
    - XLA's `jax.nn.dot_product_attention` otherwise, and always inside `reference_kernels`.

    The memory use of the first and the second implementation grows linearly with L.

    On a mesh, each device computes attention for its own queries, heads and bags. If the sequence is split among
    devices, each device first gathers all keys and values. The gathered keys and the gathered values have B x L x H x D
    numbers each. They take little memory compared with the scores of the device's queries.

    Parameters
    ----------
    query
        Shape (B, L, H, D).
    key, value
        Shape (B, M, H', D). H' divides H, and H / H' query heads share each key head (grouped-query attention;
        Ainslie et al. 2023).
    mask
        Mask of the keys to which each query attends. By default, a query attends to all keys.
    prefix
        Further keys and values, to which every query attends, whatever the mask. The prefix has no position in the
        sequence, so the causal order of the mask does not apply to the prefix.

    Returns
    -------
    (B, L, H, D).
    """
    chex.assert_rank([query, key, value], 4)
    chex.assert_equal_shape([key, value])
    chex.assert_equal_shape([query, key], dims=(0, 3))
    chex.assert_is_divisible(query.shape[2], key.shape[2])
    placed = axes.placement(query.shape, axes.BATCH, axes.LENGTH, axes.HEADS, None)
    along = None if placed is None else placed[1][1]
    if prefix is not None:
        shape = (query.shape[0], *prefix.keys.shape[1:])
        prefix = prefix.map(lambda x: jnp.broadcast_to(x, shape).astype(key.dtype))
    attend = _implementation(query, key, mask, along is not None, prefix)
    if placed is None or not any(placed[1]):
        return attend(query, *_with_prefix(prefix, query, key, value, mask))
    mesh, spec = placed
    if key.shape[2] != query.shape[2]:
        # Each device needs the key head of every query head that it holds, so repeat the key heads before the split.
        key, value = (_repeat_heads(x, query) for x in (key, value))
        if prefix is not None:
            prefix = prefix.map(lambda x: _repeat_heads(x, query))
    segments = None if mask is None or mask.query is None else (mask.query, mask.key)
    causal = mask is not None and mask.order is not None
    order = jnp.asarray(mask.order if causal and mask is not None else 0)

    def local(query: Any, key: Any, value: Any, segments: Any, order: jax.Array, prefix: Any) -> jax.Array:
        if along is not None:
            key, value = _gathered(key, along), _gathered(value, along)
            order = order + lax.axis_index(along) * query.shape[1]
            if segments is not None:
                segments = (segments[0], lax.all_gather(segments[1], along, axis=1, tiled=True))
        own, others = segments or (None, None)
        seen = None if mask is None else Mask(own, others, order if causal else None)
        return attend(query, *_with_prefix(prefix, query, key, value, seen))

    rows, whole = PartitionSpec(spec[0], spec[1]), PartitionSpec()
    front: Any = None
    if prefix is not None:
        vectors: Any = PartitionSpec(spec[0], None, spec[2])
        front = Prefix(vectors, vectors, None if prefix.on is None else cast(Any, whole))
    shard = jax.shard_map(
        local, mesh=mesh, in_specs=(spec, spec, spec, rows, whole, front), out_specs=spec, check_vma=False
    )
    return shard(query, key, value, segments, order, prefix)


def _with_prefix(
    prefix: Prefix | None, query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask | None
) -> tuple[jax.Array, jax.Array, Mask | None]:
    """Put the keys and values (B, n, H', D) of a prefix before the keys and values of the sequence.

    Return three values: all keys, all values and the new mask.
    """
    if prefix is None:
        return key, value, mask
    batch, length = prefix.keys.shape[:2]
    if mask is not None or prefix.on is not None:
        own, others, order = mask or Mask()
        if own is None and prefix.on is not None:
            own, others = (jnp.zeros((batch, x.shape[1]), jnp.int32) for x in (query, key))
        if others is not None:
            seen = jnp.asarray(
                EVERYONE if prefix.on is None else jnp.where(prefix.on, EVERYONE, NO_ONE), jnp.int32
            )
            others = jnp.concatenate(
                [jnp.broadcast_to(seen, (batch, length)), others.astype(jnp.int32)], axis=1
            )
        mask = Mask(own, others, None if order is None else order + length)
    return jnp.concatenate([prefix.keys, key], axis=1), jnp.concatenate([prefix.values, value], axis=1), mask


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(x: jax.Array, along: str) -> jax.Array:
    """Gather the whole sequence (B, L, H, D) from all devices. Gradients are summed over the devices in float32."""
    return lax.all_gather(x, along, axis=1, tiled=True)


def _gathered_backward(along: str, kept: None, gradient: jax.Array) -> tuple[jax.Array]:
    parts = gradient.astype(jnp.float32)
    return (lax.psum_scatter(parts, along, scatter_dimension=1, tiled=True).astype(gradient.dtype),)


_gathered.defvjp(lambda x, along: (_gathered(x, along), None), _gathered_backward)


def _implementation(
    query: jax.Array, key: jax.Array, mask: Mask | None, parted: bool, prefix: Prefix | None = None
) -> Attend:
    """Choose the attention function for the backend, the dtype and the length of the whole sequence.

    `parted` is True if the queries of a sequence are split among devices.
    """
    order = None if mask is None else mask.order
    more = 0 if prefix is None else prefix.keys.shape[1]
    if not use_reference():
        # cuDNN's causal mask counts queries and keys from zero, and `_cudnn` cannot pass segments.
        counted = order is None or (isinstance(order, int) and order == 0 and not parted and not more)
        segments = (mask is not None and mask.query is not None) or (
            prefix is not None and prefix.on is not None
        )
        if counted and not segments and _fits_cudnn(query):
            return _cudnn
        if use_chunks(query.shape[1], key.shape[1] + more, order is not None):
            return _chunked
    return _xla


def _xla(query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask | None) -> jax.Array:
    seen = None if mask is None else mask.visible(jnp.arange(query.shape[1]), jnp.arange(key.shape[1]))
    return jax.nn.dot_product_attention(query, key, value, mask=None if seen is None else seen[:, None])


def _cudnn(query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask | None) -> jax.Array:
    causal = mask is not None and mask.order is not None
    return jax.nn.dot_product_attention(query, key, value, is_causal=causal, implementation="cudnn")


def _chunked(query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask | None) -> jax.Array:
    if key.shape[2] != query.shape[2]:
        key, value = (_repeat_heads(x, query) for x in (key, value))
    return chunked_attention(query, key, value, mask)


def _repeat_heads(shared: jax.Array, query: jax.Array) -> jax.Array:
    """Repeat the heads of keys or values (B, M, H', D), so that each query head has its own copy: (B, M, H, D)."""
    return repeat(shared, "b m h d -> b m (h shares) d", shares=query.shape[2] // shared.shape[2])


def _fits_cudnn(query: jax.Array) -> bool:
    """Return whether cuDNN's flash attention supports queries (B, L, H, D).

    cuDNN needs 16-bit numbers, an Ampere or newer GPU, and a head width D that is a multiple of 8 and at most 128.
    """
    if target.platform() != "gpu" or query.dtype.itemsize != 2:
        return False
    return query.shape[-1] % 8 == 0 and query.shape[-1] <= 128 and target.compute_capability() >= 8.0


class SelfAttention(nn.Module):
    """Multi-head self-attention over the whole sequence, with biases and without a mask; see `attend`."""

    num_heads: int
    use_rotary: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply self-attention to x (B, L, D) and return (B, L, D). D must be a multiple of `num_heads`."""
        chex.assert_rank(x, 3)
        width = x.shape[-1]

        def projection(name: str) -> Callable[[jax.Array], jax.Array]:
            layer = Linear(width, (axes.EMBED, axes.HEADS), dtype=self.dtype, name=name)
            return lambda x: rearrange(layer(x), "b l (h d) -> b l h d", h=self.num_heads)

        to_query, to_key, to_value = (projection(name) for name in ("query", "key", "value"))
        query, key, value = to_query(x), to_key(x), to_value(x)
        if self.use_rotary:
            positions = jnp.arange(x.shape[1])
            query, key = rotary(query, positions), rotary(key, positions)
        prefix = prefix_of(self, to_key, to_value)
        mixed = rearrange(attend(query, key, value, prefix=prefix), "b l h d -> b l (h d)")
        return Linear(width, (axes.HEADS, axes.EMBED), dtype=self.dtype, name="out")(mixed)


class GatedMlp(nn.Module):
    """SwiGLU feed-forward layer without biases: `(swish(x @ gate) * (x @ up)) @ down`."""

    hidden: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the feed-forward layer to each vector of x (..., D) and return (..., D)."""

        def linear(name: str, width: int, into: str, out: str) -> Linear:
            return Linear(width, (into, out), use_bias=False, dtype=self.dtype, name=name)

        gate = linear("gate", self.hidden, axes.EMBED, axes.MLP)(x)
        up = linear("up", self.hidden, axes.EMBED, axes.MLP)(x)
        return linear("down", x.shape[-1], axes.MLP, axes.EMBED)(jax.nn.silu(gate) * up)


class TransformerBlock(nn.Module):
    """Pre-norm transformer block: self-attention, then a gated feed-forward layer, each with a residual connection."""

    num_heads: int
    hidden: int
    use_rotary: bool = True
    epsilon: float = EPSILON
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the block to x (B, L, D) and return (B, L, D)."""
        attention = SelfAttention(self.num_heads, self.use_rotary, self.dtype, name="attention")
        x = x + attention(LayerNorm(self.epsilon, name="attention_norm")(x))
        mlp = GatedMlp(self.hidden, self.dtype, name="mlp")
        return x + mlp(LayerNorm(self.epsilon, name="mlp_norm")(x))
