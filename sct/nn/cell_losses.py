"""Compute the losses of cell encoders: masked squared error, zero probabilities, and similarity of cells."""

from __future__ import annotations

import jax
import jax.numpy as jnp

_EPSILON = 1.2e-7  # keeps logarithms of saturated probabilities finite


def masked_squared_error(predicted: jax.Array, values: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the sum of the squared errors at masked positions, float32 (); all arguments are (B, L)."""
    return (jnp.square(predicted.astype(jnp.float32) - values) * mask).sum()


def zero_loss(probabilities: jax.Array, values: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the summed negative log-likelihood of zero and non-zero values at masked positions, float32 ().

    Parameters
    ----------
    probabilities
        Predicted probabilities that the values are *not* zero (B, L).
    values, mask
        True values, and which positions count (B, L).
    """
    p = jnp.clip(probabilities.astype(jnp.float32), _EPSILON, 1 - _EPSILON)
    return -(jnp.where(values > 0, jnp.log(p), jnp.log1p(-p)) * mask).sum()


def elastic_similarity(cells: jax.Array, threshold: float, example_mask: jax.Array) -> jax.Array:
    """Return the loss of elastic cell similarity (ECS), float32 (): the mean of 1 - (s - threshold)² over all pairs.

    s is the cosine similarity of two cells, 0 for a cell with itself and in place of negative values. The loss pulls
    similar cells together and pushes other cells apart.

    Parameters
    ----------
    cells
        Cell embeddings (B, D).
    threshold
        Similarity below which cells are pushed apart.
    example_mask
        Which cells count, (B,).
    """
    cells = cells.astype(jnp.float32)
    # The norm of a zero vector has no gradient, so its square is bounded before the root.
    unit = cells * jax.lax.rsqrt(jnp.maximum(jnp.square(cells).sum(axis=1, keepdims=True), 1e-24))
    similarity = jnp.maximum(unit @ unit.T, 0.0) * (1 - jnp.eye(len(cells)))
    weights = example_mask.astype(jnp.float32)
    pairs = weights[:, None] * weights[None]
    return ((1 - jnp.square(similarity - threshold)) * pairs).sum() / jnp.maximum(pairs.sum(), 1.0)
