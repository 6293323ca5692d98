"""Layer norms. Statistics are always float32, whatever the computation's type."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from sct.nn import axes

EPSILON = 1e-5


def _normalise(x: jax.Array, axis: int, epsilon: float) -> jax.Array:
    x = x.astype(jnp.float32)
    mean = jnp.mean(x, axis=axis, keepdims=True)
    centred = x - mean
    variance = jnp.mean(jnp.square(centred), axis=axis, keepdims=True)
    return centred * jax.lax.rsqrt(variance + epsilon)


class LayerNorm(nn.Module):
    """Layer norm over the last axis."""

    epsilon: float = EPSILON

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise (..., D) over D; the result has the type of `x`."""
        scale = axes.param(self, "scale", axes.ones, (x.shape[-1],), (axes.CHANNEL,))
        bias = axes.param(self, "bias", axes.zeros, (x.shape[-1],), (axes.CHANNEL,))
        return (_normalise(x, -1, self.epsilon) * scale + bias).astype(x.dtype)


class SharedLayerNorm(nn.Module):
    """Layer norm over the gene axis of each cell and channel (sCT paper, section 3).

    Scale and bias have one entry per gene position and are shared by all cells and channels, so the layer
    learns statistics of each gene. With `learnable=False` there are none (ablation of the paper's Fig. 8).
    """

    num_positions: int
    learnable: bool = True
    epsilon: float = EPSILON

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise (B, K * G, D) over each cell's G = `num_positions` positions."""
        batch, length, width = x.shape
        y = x.reshape(batch, length // self.num_positions, self.num_positions, width)
        y = _normalise(y, 2, self.epsilon)
        if self.learnable:
            shape, names = (self.num_positions,), (axes.GENE_SCALE,)
            y = y * axes.param(self, "scale", axes.ones, shape, names)[:, None]
            y = y + axes.param(self, "bias", axes.zeros, shape, names)[:, None]
        return y.reshape(batch, length, width).astype(x.dtype)
