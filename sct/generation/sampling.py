"""From scores to a token: penalty, temperature, top-k, top-p, and one draw per row that depends on its own seed."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sct.nn.chunked_attention import UNSEEN


class Sampling(NamedTuple):
    """How each row chooses, arrays (B,); see `sct.generation.decoding.DecodingOptions`.

    `temperature` 0 takes the best token; `top_k` 0 and `top_p` 1 leave all tokens in.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    penalty: jax.Array
    seed: jax.Array


class Uses(NamedTuple):
    """Which steps any row needs: what none needs is not compiled."""

    sample: bool
    top_k: bool
    top_p: bool
    penalty: bool


def _as_ordered(values: jax.Array) -> jax.Array:
    """Non-negative float32 as integers of the same order."""
    return lax.bitcast_convert_type(values.astype(jnp.float32), jnp.int32)


# Best tokens that are sorted at first: nearly always all that is drawn from.
_SHORT = 256


def _largest(enough: jax.Array, values: jax.Array, weights: jax.Array) -> jax.Array:
    """Mask of the largest values (B, V) of each row whose weights (B, V) together reach `enough` (B,).

    The smallest such set; values equal to its least one belong to it. Where a row needs more than the few hundred best,
    the threshold is found bit by bit: sorting tens of thousands of tokens takes longer than the model does.
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
    # Both ways give the same threshold, so that a row does not depend on the others.
    bound = lax.cond(found.all(), lambda: quick, lambda: jnp.where(found, quick, bit_by_bit()))
    return values >= bound[:, None]


def adjusted(scores: jax.Array, sampling: Sampling, seen: jax.Array | None, uses: Uses) -> jax.Array:
    """Scores (B, V) of what may be chosen, in the order of Hugging Face's processors.

    Tokens that a row holds already (`seen`, bool (B, V)) are made less likely by the penalty (Keskar et al. 2019):
    positive scores are divided by it, negative ones multiplied. Then temperature, the `top_k` best tokens, and of
    these the fewest that together have a probability of `top_p` (Holtzman et al. 2020).
    """
    if uses.penalty and seen is not None:
        penalty = sampling.penalty[:, None]
        scores = jnp.where(seen, jnp.where(scores > 0, scores / penalty, scores * penalty), scores)
    if not uses.sample:
        return scores
    scores = scores / jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)[:, None]
    if uses.top_k:
        # Probabilities are ordered as scores are, and not negative.
        kept = jnp.where(sampling.top_k > 0, sampling.top_k, scores.shape[1]).astype(jnp.float32)
        chosen = _largest(kept, jax.nn.softmax(scores, axis=-1), jnp.ones_like(scores))
        scores = jnp.where(chosen, scores, UNSEEN)
    if uses.top_p:
        probabilities = jax.nn.softmax(scores, axis=-1)
        chosen = _largest(sampling.top_p, probabilities, probabilities)
        scores = jnp.where(chosen | (sampling.top_p >= 1.0)[:, None], scores, UNSEEN)
    return scores


def choose(scores: jax.Array, sampling: Sampling, step: jax.Array, uses: Uses) -> jax.Array:
    """One token for each row of adjusted scores (B, V), int32 (B,): drawn, or the best one.

    The draw of a row depends on its seed, the step and its own scores alone.
    """
    best = jnp.argmax(scores, axis=-1)
    if not uses.sample:
        return best.astype(jnp.int32)

    def draw(seed: jax.Array, row: jax.Array) -> jax.Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), step), row)

    drawn = jax.vmap(draw)(sampling.seed, scores)
    return jnp.where(sampling.temperature > 0, drawn, best).astype(jnp.int32)
