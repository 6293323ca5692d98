"""Compute losses of cells: masked squared error, zeros, similarity and contrast of cells."""

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


# Logit of a pair that takes no part in a softmax. It is finite, so that a row without any pair has no NaN gradient.
_NEVER = -1e9


def info_nce(
    first: jax.Array, second: jax.Array, temperature: float, valid: jax.Array, same: jax.Array
) -> jax.Array:
    """Return the InfoNCE loss of each cell between two views of the same cells, float32 (N,) (SimCLR, CLIP).

    Row i of both views is cell i. The loss is the cross-entropy of finding a cell's other view among the other views of
    all cells, by cosine similarity, averaged over both directions.

    Parameters
    ----------
    first, second
        Vectors of the cells in the two views, (N, D).
    temperature
        Divisor of the cosine similarities.
    valid
        Which cells count, bool (N,). The loss of other cells is 0.
    same
        Pairs of rows that are the same cell, or cells that must not be pushed apart, bool (N, N). They are not used as
        negatives.
    """
    similarity = unit_vectors(first) @ unit_vectors(second).T / temperature
    own = jnp.eye(len(first), dtype=bool)
    usable = own | (valid[:, None] & valid[None] & ~same)
    logits = jnp.where(usable, similarity, _NEVER)
    losses = -(jax.nn.log_softmax(logits, axis=0) + jax.nn.log_softmax(logits, axis=1)) / 2
    return jnp.where(valid, jnp.diagonal(losses), 0.0)


def supervised_contrast(
    cells: jax.Array, labels: jax.Array, temperature: float, valid: jax.Array, same: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the supervised contrastive loss (Khosla et al., NeurIPS 2020, equation 2) of each cell, float32 (N,).

    The loss of a cell is the mean, over all other cells with its label, of the cross-entropy of finding that cell among
    all labeled cells by cosine similarity.

    Parameters
    ----------
    cells
        Vectors of the cells (N, D).
    labels
        Number of the label of each cell, integers (N,). Cells with a negative number take no part.
    temperature, valid, same
        See `info_nce`. Pairs of rows that are the same cell take no part.

    Returns
    -------
    Two arrays (N,): the losses, and whether the cell has a loss, bool. A cell that shares its label with no other cell
    has none.
    """
    unit = unit_vectors(cells)
    similarity = unit @ unit.T / temperature
    valid = valid & (labels >= 0)
    usable = valid[:, None] & valid[None] & ~same & ~jnp.eye(len(cells), dtype=bool)
    log_share = jax.nn.log_softmax(jnp.where(usable, similarity, _NEVER), axis=1)
    positive = usable & (labels[:, None] == labels[None])
    number = positive.sum(axis=1)
    losses = -jnp.where(positive, log_share, 0.0).sum(axis=1) / jnp.maximum(number, 1)
    return losses, number > 0
