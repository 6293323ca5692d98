"""Layer norms. Statistics are always float32, whatever the computation's type."""

from __future__ import annotations

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from sct.nn import axes
from sct.nn.reference import use_reference

EPSILON = 1e-5


def _statistics(x: jax.Array, axis: int, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """Mean, and one over the standard deviation, of float32 x; the axis stays with size one."""
    mean = jnp.mean(x, axis=axis, keepdims=True)
    variance = jnp.mean(jnp.square(x - mean), axis=axis, keepdims=True)
    return mean, jax.lax.rsqrt(variance + epsilon)


def _normalise(x: jax.Array, axis: int, epsilon: float) -> jax.Array:
    x = x.astype(jnp.float32)
    mean, rate = _statistics(x, axis, epsilon)
    return (x - mean) * rate


class LayerNorm(nn.Module):
    """Layer norm over the last axis."""

    epsilon: float = EPSILON

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise (..., D) over D; the result has the type of `x`."""
        scale = axes.param(self, "scale", axes.ones, (x.shape[-1],), (axes.CHANNEL,))
        bias = axes.param(self, "bias", axes.zeros, (x.shape[-1],), (axes.CHANNEL,))
        return (_normalise(x, -1, self.epsilon) * scale + bias).astype(x.dtype)


class RMSNorm(nn.Module):
    """Division by the root mean square over the last axis, times a scale (Zhang & Sennrich 2019)."""

    epsilon: float = EPSILON

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise (..., D) over D; the result has the type of `x`."""
        scale = axes.param(self, "scale", axes.ones, (x.shape[-1],), (axes.CHANNEL,))
        exact = x.astype(jnp.float32)
        rate = jax.lax.rsqrt(jnp.mean(jnp.square(exact), axis=-1, keepdims=True) + self.epsilon)
        return (exact * rate * scale).astype(x.dtype)


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
        chex.assert_rank(x, 3)
        cells = rearrange(x, "b (k g) d -> (b k) g d", g=self.num_positions)
        if self.learnable:
            shape, names = (self.num_positions,), (axes.GENE_SCALE,)
            scale = axes.param(self, "scale", axes.ones, shape, names)
            bias = axes.param(self, "bias", axes.zeros, shape, names)
        else:
            scale, bias = jnp.ones(self.num_positions), jnp.zeros(self.num_positions)
        norm = _plain_shared_norm if use_reference() else shared_norm
        return rearrange(norm(cells, scale, bias, self.epsilon), "(b k) g d -> b (k g) d", b=x.shape[0])


def _plain_shared_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    return (_normalise(x, 1, epsilon) * scale[:, None] + bias[:, None]).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def shared_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float = EPSILON) -> jax.Array:
    """Normalise cells x (N, G, D) over G, times `scale` (G,), plus `bias` (G,), in the type of `x`.

    Its gradient is written out, because it needs `x` and two numbers per cell and channel, where automatic
    differentiation keeps three arrays of the size of `x`.
    """
    return _plain_shared_norm(x, scale, bias, epsilon)


# Cells up to which sums over genes are products on CPU; the chunks of a level there are as small.
_FEW_CELLS = 8


def _sum_over_genes(x: jax.Array, weights: jax.Array) -> jax.Array:
    """Weighted sums of x (N, G, D) over G, (N, 1, D)."""
    if jax.default_backend() == "cpu" and x.shape[0] <= _FEW_CELLS:
        # A sum is fused with all that leads to it and back into all that follows, in a loop that runs at a third of
        # the memory's speed (jax 0.10); a product is not.
        return jnp.stack([weights @ cell for cell in x])[:, None]
    return jnp.sum(x * weights[:, None], axis=1, keepdims=True)


_SavedNorm = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def _shared_norm_forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, _SavedNorm]:
    mean, rate = _statistics(x.astype(jnp.float32), 1, epsilon)
    y = (x - mean) * rate * scale[:, None] + bias[:, None]
    return y.astype(x.dtype), (x, mean, rate, scale)


def _shared_norm_backward(
    epsilon: float, kept: _SavedNorm, gradient: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, mean, rate, scale = kept
    gradient = gradient.astype(jnp.float32)
    unit = (x.astype(jnp.float32) - mean) * rate
    product = gradient * unit
    by_scale, by_bias = product.sum((0, 2)), gradient.sum((0, 2))
    first = _sum_over_genes(gradient, scale / x.shape[1])
    second = _sum_over_genes(product, scale / x.shape[1])
    by_x = rate * (gradient * scale[:, None] - first - unit * second)
    return by_x.astype(x.dtype), by_scale, by_bias


shared_norm.defvjp(_shared_norm_forward, _shared_norm_backward)
