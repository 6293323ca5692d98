"""Compute the losses of cell encoders: masked squared error, zeros, and similarity of cells."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from sct.nn.norm import unit_vectors


def masked_squared_error(predicted: jax.Array, values: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the sum of the squared errors at masked positions, float32 (); all arguments are (B, L)."""
    return (jnp.square(predicted.astype(jnp.float32) - values) * mask).sum()


def zero_loss(logits: jax.Array, values: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the summed negative log-likelihood of zero and non-zero values at masked positions, float32 ().

    Parameters
    ----------
    logits
        Predicted logits that the values are *not* zero (B, L).
    values, mask
        True values, and which positions count (B, L).
    """
    # The loss uses logits, so a confident wrong prediction also has a gradient.
    losses = optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), values > 0)
    return (losses * mask).sum()


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
    unit = unit_vectors(cells)
    similarity = jnp.maximum(unit @ unit.T, 0.0) * (1 - jnp.eye(len(cells)))
    weights = example_mask.astype(jnp.float32)
    pairs = weights[:, None] * weights[None]
    return ((1 - jnp.square(similarity - threshold)) * pairs).sum() / jnp.maximum(pairs.sum(), 1.0)
