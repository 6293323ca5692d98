"""Define normalization layers. Means and variances are always computed in float32, whatever the compute dtype."""

from __future__ import annotations

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from sct.nn import axes, target
from sct.nn.chunked_map import inside_chunk, saveable
from sct.nn.reference import use_reference

EPSILON = 1e-5


def _statistics(x: jax.Array, axis: int, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """Return the mean and 1 / standard deviation of x (float32) along an axis.

    Both results keep this axis, with size 1.
    """
    mean = jnp.mean(x, axis=axis, keepdims=True)
    variance = jnp.mean(jnp.square(x - mean), axis=axis, keepdims=True)
    return mean, jax.lax.rsqrt(variance + epsilon)


# Positions whose mean shifts the sums of `_statistics_over_genes`.
_SAMPLED = 32


def _statistics_over_genes(x: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """Return the mean and 1 / standard deviation of x (N, G, D), float32, over G, both (N, 1, D).

    On accelerators, x is read only once: both sums are over x minus the mean of a few positions. Without
    this shift, the difference of two large sums would lose digits if a mean is large compared with its standard
    deviation. The positions lie at equal distances, so that no single gene decides the shift.
    """
    if target.platform() == "cpu":
        return _statistics(x, 1, epsilon)
    near = jnp.mean(x[:, :: -(-x.shape[1] // _SAMPLED)], axis=1, keepdims=True)
    shifted = x - near
    mean, square = (jnp.mean(each, axis=1, keepdims=True) for each in (shifted, jnp.square(shifted)))
    variance = jnp.maximum(square - jnp.square(mean), 0.0)
    return near + mean, jax.lax.rsqrt(variance + epsilon)


def _normalize(x: jax.Array, axis: int, epsilon: float) -> jax.Array:
    x = x.astype(jnp.float32)
    mean, rate = _statistics(x, axis, epsilon)
    return (x - mean) * rate


def standardized(x: jax.Array, epsilon: float = EPSILON) -> jax.Array:
    """Return vectors x (..., D) in float32, each shifted and scaled to mean 0 and variance 1 over D.

    This is a layer norm without scale and bias.
    """
    return _normalize(x, -1, epsilon)


def unit_vectors(x: jax.Array) -> jax.Array:
    """Return vectors (..., D) scaled to length 1. A zero vector stays zero, and its gradient is finite."""
    # The norm of a zero vector has no gradient, so its square is bounded from below before the root.
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(axis=-1, keepdims=True), 1e-24))


class LayerNorm(nn.Module):
    """Layer norm over the last axis."""

    epsilon: float = EPSILON

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalize x (..., D) over D and return (..., D) in the type of `x`."""
        scale = axes.param(self, "scale", axes.ones, (x.shape[-1],), (axes.CHANNEL,))
        bias = axes.param(self, "bias", axes.zeros, (x.shape[-1],), (axes.CHANNEL,))
        return (_normalize(x, -1, self.epsilon) * scale + bias).astype(x.dtype)


class RMSNorm(nn.Module):
    """RMS norm: divide by the root mean square over the last axis, then multiply by a scale (Zhang & Sennrich 2019)."""

    epsilon: float = EPSILON

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalize x (..., D) over D and return (..., D) in the type of `x`."""
        scale = axes.param(self, "scale", axes.ones, (x.shape[-1],), (axes.CHANNEL,))
        exact = x.astype(jnp.float32)
        rate = jax.lax.rsqrt(jnp.mean(jnp.square(exact), axis=-1, keepdims=True) + self.epsilon)
        return (exact * rate * scale).astype(x.dtype)


class SharedLayerNorm(nn.Module):
    """Layer norm over the gene axis, separately for each cell and channel (sCT paper, section 3).

    Scale and bias have one entry per gene position, and all cells and channels share them. The layer therefore learns
    statistics of each gene. With `learnable=False`, the layer has no scale and no bias (an ablation in Fig. 8 of the
    sCT paper).
    """

    num_positions: int
    learnable: bool = True
    epsilon: float = EPSILON

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalize x (B, K * G, D) over the G = `num_positions` positions of each cell; return the same shape."""
        chex.assert_rank(x, 3)
        cells = rearrange(x, "b (k g) d -> (b k) g d", g=self.num_positions)
        if self.learnable:
            shape, names = (self.num_positions,), (axes.GENE_SCALE,)
            scale = axes.param(self, "scale", axes.ones, shape, names)
            bias = axes.param(self, "bias", axes.zeros, shape, names)
        else:
            scale, bias = jnp.ones(self.num_positions), jnp.zeros(self.num_positions)
        norm = _reference_shared_norm if use_reference() else shared_norm
        return rearrange(norm(cells, scale, bias, self.epsilon), "(b k) g d -> b (k g) d", b=x.shape[0])


def _reference_shared_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    return (_normalize(x, 1, epsilon) * scale[:, None] + bias[:, None]).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def shared_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float = EPSILON) -> jax.Array:
    """Normalize cells x (N, G, D) over G, multiply by `scale` (G,) and add `bias` (G,).

    Returns (N, G, D) in the type of `x`. The custom gradient saves only `x` and two numbers per cell and channel.
    Automatic differentiation would save three arrays of the size of `x`.
    """
    return _reference_shared_norm(x, scale, bias, epsilon)


# Most cells for which `_sum_over_genes` uses matrix products on CPU. Chunks of the outer tower levels are this small.
_FEW_CELLS = 8


def _sum_over_genes(x: jax.Array, weights: jax.Array) -> jax.Array:
    """Multiply x (N, G, D) by `weights` (G,) along G and sum over G. Returns (N, 1, D)."""
    if target.platform() == "cpu" and x.shape[0] <= _FEW_CELLS:
        # XLA for CPU (jax 0.10) fuses a sum with the operations before and after it into one loop, which runs at a
        # third of the memory bandwidth. It does not fuse a matrix product.
        return jnp.stack([weights @ cell for cell in x])[:, None]
    return jnp.sum(x * weights[:, None], axis=1, keepdims=True)


_SavedNorm = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def _shared_norm_forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, _SavedNorm]:
    mean, rate = _statistics_over_genes(x.astype(jnp.float32), epsilon)
    if not inside_chunk():
        # Two numbers per cell and channel: with remat="products", the backward pass does not compute them again.
        mean, rate = saveable(mean), saveable(rate)
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
