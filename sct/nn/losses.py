"""Compute cross-entropy losses over large vocabularies."""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jax import lax

from sct.nn import axes
from sct.nn.reference import chunk_limit, use_reference

# Number of scores that a device computes at once: 64 MB in float32.
_SCORES = 1 << 24


def token_losses(
    scores: Callable[[jax.Array], jax.Array], hidden: jax.Array, targets: jax.Array, vocab_size: int
) -> tuple[jax.Array, jax.Array]:
    """Compute the cross-entropy of each token, one chunk of positions at a time.

    Neither the forward nor the backward pass stores the scores (logits) of all positions.

    Parameters
    ----------
    scores
        Function that maps hidden vectors (B, t, D) to scores (logits) float32 (B, t, V).
    hidden
        Hidden vectors (B, T, D).
    targets
        Token that each vector should predict, integers (B, T).
    vocab_size
        Number of tokens in the vocabulary (V).

    Returns
    -------
    Two arrays of shape (B, T): the losses in nats, float32; and whether the token with the highest score is the target,
    bool.
    """

    def of_chunk(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, wanted = inputs
        logits = scores(x)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, wanted)
        return losses, jnp.argmax(logits, axis=-1) == wanted

    chex.assert_rank(targets, 2)
    chex.assert_type(targets, int)
    chex.assert_equal_shape_prefix([hidden, targets], 2)
    batch, length = targets.shape
    parts = axes.shards_of(axes.BATCH, batch) * axes.shards_of(axes.TEXT_VOCAB, vocab_size)
    most = chunk_limit(max(1, _SCORES * parts // (vocab_size * batch)))
    if use_reference() or length <= most:
        return of_chunk((hidden, targets))
    chunks = -(-length // most)
    size = -(-length // chunks)
    filled = ((0, 0), (0, chunks * size - length))

    def cut(x: jax.Array) -> jax.Array:
        return rearrange(x, "b (n t) ... -> n b t ...", n=chunks)

    inputs = cut(jnp.pad(hidden, (*filled, (0, 0)))), cut(jnp.pad(targets, filled))
    losses, right = lax.map(jax.checkpoint(of_chunk), inputs)
    losses, right = (rearrange(x, "n b t -> b (n t)")[:, :length] for x in (losses, right))
    return losses, right


def next_token_losses(
    scores: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    ids: jax.Array,
    predicted: jax.Array,
    weight: jax.Array,
    vocab_size: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compute the cross-entropy of the next token at each position of a row.

    Parameters
    ----------
    scores, hidden, vocab_size
        See `token_losses`.
    ids
        Tokens, integers (B, T). Negative ids stand for soft tokens, which are never predicted.
    predicted
        Which tokens count as targets, bool (B, T).
    weight
        Shape (B,): 0 for rows that the loss ignores, and above 0 for all other rows.

    Returns
    -------
    Three arrays of shape (B, T): the losses in nats, float32; whether the token with the highest score is the right
    one, bool; and 1.0 at positions that count for the loss and 0.0 at other positions, float32.
    """
    losses, right = token_losses(scores, hidden, jnp.maximum(jnp.roll(ids, -1, axis=1), 0), vocab_size)
    counts = jnp.roll(predicted, -1, axis=1).at[:, -1].set(False)
    return losses, right, counts * (weight > 0)[:, None].astype(jnp.float32)
