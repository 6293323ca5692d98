"""Sample tokens from logits: repetition penalty, temperature, top-k and top-p, with one random seed per row."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sct.nn.chunked_attention import UNSEEN


class Sampling(NamedTuple):
    """Sampling parameters of each row, arrays (B,); see `sct.generation.decoding.DecodingOptions`.

    A `temperature` of 0 selects greedy decoding. A `top_k` of 0 and a `top_p` of 1 keep all tokens.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    penalty: jax.Array
    seed: jax.Array


class Uses(NamedTuple):
    """One flag per sampling step: whether at least one row needs the step. Other steps are not compiled."""

    sample: bool
    top_k: bool
    top_p: bool
    penalty: bool


def _as_ordered(values: jax.Array) -> jax.Array:
    """Convert non-negative float32 values to int32 values that sort in the same order."""
    return lax.bitcast_convert_type(values.astype(jnp.float32), jnp.int32)


# Number of best tokens that are sorted first; this is nearly always enough.
_SHORT = 256


def _largest(enough: jax.Array, values: jax.Array, weights: jax.Array) -> jax.Array:
    """Select the largest values of each row until their weights sum to `enough` (B,); return a mask (B, V).

    `weights` (B, V) holds the weight of each value.

    Values equal to the smallest selected value are also selected. If a row needs more than the few hundred largest
    values, the threshold is found by a binary search over its bits. Sorting tens of thousands of tokens would take
    longer than running the model.
    """
    best, where = lax.top_k(values, min(_SHORT, values.shape[1]))
    sums = jnp.cumsum(jnp.take_along_axis(weights, where, axis=1), axis=1)
    place = jnp.argmax(sums >= enough[:, None], axis=1)
    quick = jnp.take_along_axis(best, place[:, None], axis=1)[:, 0]

    def bit_by_bit() -> jax.Array:
        ordered = _as_ordered(values)

        def step(i: jax.Array, bound: jax.Array) -> jax.Array:
            higher = bound | (1 << (30 - i))
            reached = jnp.where(ordered >= higher[:, None], weights, 0.0).sum(axis=-1) >= enough
            return jnp.where(reached, higher, bound)

        bound = lax.fori_loop(0, 31, step, jnp.zeros(len(values), jnp.int32))
        return lax.bitcast_convert_type(bound, jnp.float32)

    found = sums[:, -1] >= enough
    # Both methods give the same threshold, so the result of a row does not depend on the other rows.
    bound = lax.cond(found.all(), lambda: quick, lambda: jnp.where(found, quick, bit_by_bit()))
    return values >= bound[:, None]


def adjusted(scores: jax.Array, sampling: Sampling, seen: jax.Array | None, uses: Uses) -> jax.Array:
    """Apply the sampling parameters to logits (B, V), in the order of the Hugging Face logits processors.

    The repetition penalty (Keskar et al. 2019) is applied first, to tokens that a row already contains (`seen`, bool
    (B, V)): positive logits are divided by the penalty, and negative logits are multiplied by it. Temperature, top-k
    and top-p (Holtzman et al. 2020) are applied next, in this order. Excluded tokens get a very low logit.
    """
    if uses.penalty and seen is not None:
        penalty = sampling.penalty[:, None]
        scores = jnp.where(seen, jnp.where(scores > 0, scores / penalty, scores * penalty), scores)
    if not uses.sample:
        return scores
    scores = scores / jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)[:, None]
    if uses.top_k:
        # Probabilities have the order of the logits and are not negative, as `_largest` requires.
        kept = jnp.where(sampling.top_k > 0, sampling.top_k, scores.shape[1]).astype(jnp.float32)
        chosen = _largest(kept, jax.nn.softmax(scores, axis=-1), jnp.ones_like(scores))
        scores = jnp.where(chosen, scores, UNSEEN)
    if uses.top_p:
        probabilities = jax.nn.softmax(scores, axis=-1)
        chosen = _largest(sampling.top_p, probabilities, probabilities)
        scores = jnp.where(chosen | (sampling.top_p >= 1.0)[:, None], scores, UNSEEN)
    return scores


def choose(scores: jax.Array, sampling: Sampling, step: jax.Array, uses: Uses) -> jax.Array:
    """Choose one token per row from adjusted logits (B, V), int32 (B,).

    In rows with greedy decoding, this is the most probable token. In all other rows, the token is sampled.

    A sampled token depends only on the step and on the seed and the logits of its row.
    """
    best = jnp.argmax(scores, axis=-1)
    if not uses.sample:
        return best.astype(jnp.int32)

    def draw(seed: jax.Array, row: jax.Array) -> jax.Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), step), row)

    drawn = jax.vmap(draw)(sampling.seed, scores)
    return jnp.where(sampling.temperature > 0, drawn, best).astype(jnp.int32)
