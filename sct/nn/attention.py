"""Multi-head attention, rotary position embedding, gated feed-forward."""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from sct.nn import axes
from sct.nn.chunked_attention import chunked_attention, default_chunks
from sct.nn.linear import Linear
from sct.nn.norm import EPSILON, LayerNorm
from sct.nn.plain import wants_plain

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def rotary(x: jax.Array, positions: jax.Array, base: float = 10_000.0) -> jax.Array:
    """Rotate x (B, L, H, D) by its positions (L,), in the half-split form.

    Feature i of the first half is paired with feature i of the second; pair i turns by
    `position * base ** (-2 i / D)`. Angles are float32, the result has the type of `x`.
    """
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions.astype(jnp.float32)[:, None] * frequency
    cos, sin = jnp.cos(angle)[None, :, None, :], jnp.sin(angle)[None, :, None, :]
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Softmax attention (B, L, H, D) over the whole sequence; scores are scaled by 1 / sqrt(D), without a mask.

    The form is chosen by backend, type and length; all but the plain one need memory linear in L:

    - on GPU in 16 bits, cuDNN's flash kernel through `jax.nn.dot_product_attention`;
    - up to one chunk of keys, and inside `plain_forms`, `jax.nn.dot_product_attention` as XLA writes it;
    - otherwise `chunked_attention`.

    On a mesh each device attends from its own queries, heads and bags. Where it holds a part of the sequence it
    gathers keys and values first: two arrays of B x L x H x D, small beside the scores of its queries.
    """
    placed = axes.placement(query.shape, axes.BATCH, axes.LENGTH, axes.HEADS, None)
    attend = _form(query)
    if placed is None or not any(placed[1]):
        return attend(query, key, value)
    mesh, spec = placed
    along = spec[1]

    def local(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        if along is not None:
            key, value = _gathered(key, along), _gathered(value, along)
        return attend(query, key, value)

    shard = jax.shard_map(local, mesh=mesh, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False)
    return shard(query, key, value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(x: jax.Array, along: str) -> jax.Array:
    """The whole sequence (B, L, H, D) of the parts of the devices; gradients are summed over them in float32."""
    return lax.all_gather(x, along, axis=1, tiled=True)


def _gathered_backward(along: str, kept: None, gradient: jax.Array) -> tuple[jax.Array]:
    parts = gradient.astype(jnp.float32)
    return (lax.psum_scatter(parts, along, scatter_dimension=1, tiled=True).astype(gradient.dtype),)


_gathered.defvjp(lambda x, along: (_gathered(x, along), None), _gathered_backward)


def _form(query: jax.Array) -> Attend:
    """Function of queries, keys and values for this backend, type and length of the whole sequence."""
    if not wants_plain():
        if _fits_cudnn(query):
            return functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
        if query.shape[1] > default_chunks()[1]:
            return chunked_attention
    return jax.nn.dot_product_attention


def _fits_cudnn(query: jax.Array) -> bool:
    """Whether cuDNN's flash attention takes (B, L, H, D): 16 bits, D up to 128 by eights, Ampere or newer."""
    if jax.default_backend() != "gpu" or query.dtype.itemsize != 2:
        return False
    capability = str(getattr(jax.devices()[0], "compute_capability", "0"))
    return query.shape[-1] % 8 == 0 and query.shape[-1] <= 128 and float(capability) >= 8.0


class SelfAttention(nn.Module):
    """Multi-head self-attention over the whole sequence, with biases, no mask; see `attend`."""

    num_heads: int
    use_rotary: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, L, D) to (B, L, D); D must be a multiple of `num_heads`."""
        batch, length, width = x.shape
        head = width // self.num_heads

        def project(name: str) -> jax.Array:
            y = Linear(width, (axes.EMBED, axes.HEADS), dtype=self.dtype, name=name)(x)
            return y.reshape(batch, length, self.num_heads, head)

        query, key, value = project("query"), project("key"), project("value")
        if self.use_rotary:
            positions = jnp.arange(length)
            query, key = rotary(query, positions), rotary(key, positions)
        mixed = attend(query, key, value).reshape(batch, length, width)
        return Linear(width, (axes.HEADS, axes.EMBED), dtype=self.dtype, name="out")(mixed)


class GatedMlp(nn.Module):
    """SwiGLU feed-forward without biases: `(swish(x @ gate) * (x @ up)) @ down`."""

    hidden: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (..., D) to (..., D)."""

        def linear(name: str, width: int, into: str, out: str) -> Linear:
            return Linear(width, (into, out), use_bias=False, dtype=self.dtype, name=name)

        gate = linear("gate", self.hidden, axes.EMBED, axes.MLP)(x)
        up = linear("up", self.hidden, axes.EMBED, axes.MLP)(x)
        return linear("down", x.shape[-1], axes.MLP, axes.EMBED)(jax.nn.silu(gate) * up)


class TransformerBlock(nn.Module):
    """Pre-norm block: attention, then gated feed-forward, each added to its input."""

    num_heads: int
    hidden: int
    use_rotary: bool = True
    epsilon: float = EPSILON
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, L, D) to (B, L, D)."""
        attention = SelfAttention(self.num_heads, self.use_rotary, self.dtype, name="attention")
        x = x + attention(LayerNorm(self.epsilon, name="attention_norm")(x))
        mlp = GatedMlp(self.hidden, self.dtype, name="mlp")
        return x + mlp(LayerNorm(self.epsilon, name="mlp_norm")(x))
