"""Multi-head attention, rotary position embedding, gated feed-forward."""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sct.nn import axes
from sct.nn.linear import Linear
from sct.nn.norm import EPSILON, LayerNorm


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


class SelfAttention(nn.Module):
    """Multi-head self-attention over the whole sequence, with biases, no mask.

    Scores are scaled by 1 / sqrt(head size); the softmax is float32. On GPU in bf16 the attention is cuDNN's
    flash kernel through `jax.nn.dot_product_attention`.
    """

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
        mixed = jax.nn.dot_product_attention(query, key, value, implementation=self._kernel())
        mixed = mixed.reshape(batch, length, width)
        return Linear(width, (axes.HEADS, axes.EMBED), dtype=self.dtype, name="out")(mixed)

    def _kernel(self) -> Literal["cudnn"] | None:
        # cuDNN's flash attention takes 16-bit inputs only; elsewhere XLA's own form is used.
        flash = jax.default_backend() == "gpu" and jnp.dtype(self.dtype).itemsize == 2
        return "cudnn" if flash else None


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
