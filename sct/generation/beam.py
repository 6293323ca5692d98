"""Find the most probable answer by beam search."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sct.generation.cache import Cache, empty, extend, scores_of
from sct.generation.decoding import (
    DecoderParts,
    DecodingOptions,
    Generated,
    LanguageModel,
    SoftPrompts,
    batches,
    known_tokens,
    only_known,
    padded,
    prepared,
    soft_of,
)
from sct.generation.trie import Trie
from sct.models.decoder_config import DecoderConfig
from sct.nn.chunked_attention import UNSEEN


class _BeamState(NamedTuple):
    """State of the search: for each of B prompts, K active beams and the best finished answer."""

    cache: Cache  # one row per beam; the beams of a prompt are adjacent
    scores: jax.Array  # (B, K, V) logits of the next token
    step: jax.Array
    ids: jax.Array  # (B, K, N)
    sums: jax.Array  # (B, K) log probabilities
    node: jax.Array  # (B, K) trie nodes
    ended_ids: jax.Array  # (B, 1, N)
    ended: jax.Array  # (B, 1) log probability / length ** length_penalty; UNSEEN if no answer has finished
    ended_sums: jax.Array  # (B, 1) log probabilities


def _take(tree: Any, chosen: jax.Array) -> Any:
    """From each row of the arrays (B, K, ...), select the entries with the indices (B, K'); return (B, K', ...)."""
    return jax.tree.map(lambda x: jax.vmap(lambda row, i: row[i])(x, chosen), tree)


@functools.partial(jax.jit, static_argnames=("config", "new", "beams", "known"))
def decode(
    config: DecoderConfig,
    new: int,
    beams: int,
    known: int,
    parts: DecoderParts,
    ids: jax.Array,
    attention_mask: jax.Array,
    length_penalty: jax.Array,
    stop: jax.Array,
    trie: Trie | None = None,
    soft: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Find the best answer to each prompt. Arguments and results are those of `sct.generation.generate.decode`.

    The search for a prompt ends when none of its beams can become better than its best finished answer. The result
    equals the best of the K answers that Hugging Face transformers finds with `early_stopping="never"`.
    """
    rows, length = ids.shape
    vocab = config.vocab_size

    def each_beam(x: jax.Array) -> jax.Array:
        return jnp.repeat(x, beams, axis=0)

    hidden, cache = extend(
        config, parts, empty(config, rows, length + new), ids, attention_mask, first=True, soft=soft
    )
    cache = cache._replace(
        keys=tuple(map(each_beam, cache.keys)), values=tuple(map(each_beam, cache.values)),
        filled=each_beam(cache.filled), positions=each_beam(cache.positions),
    )  # fmt: skip
    first = each_beam(scores_of(config, parts, hidden[:, -1])).reshape(rows, beams, vocab)
    # All beams of a prompt are equal at first, so only one of them starts with a finite score.
    alone = jnp.where(jnp.arange(beams) == 0, 0.0, UNSEEN)
    nothing = jnp.full((rows, beams, new), -1, jnp.int32)
    none = jnp.full((rows, 1), UNSEEN)
    node = jnp.zeros((rows, beams), jnp.int32)
    start = _BeamState(
        cache, first, jnp.zeros((), jnp.int32), nothing, jnp.broadcast_to(alone, (rows, beams)), node, nothing[:, :1],
        none, none,
    )  # fmt: skip

    def power(step: jax.Array) -> jax.Array:
        return step.astype(jnp.float32) ** length_penalty

    def goes_on(now: _BeamState) -> jax.Array:
        # The log probability of a beam only decreases. So its best possible score is at the present length or, if
        # length_penalty rewards length, at the maximum length.
        best = now.sums.max(axis=1) / jnp.where(length_penalty > 0, power(jnp.asarray(new)), power(now.step))
        open_ = best > now.ended[:, 0]
        return (now.step < new) & ((now.step == 0) | open_.any())

    def body(now: _BeamState) -> _BeamState:
        scores = only_known(jax.nn.log_softmax(now.scores, axis=-1), known)
        if trie is not None:
            allowed = trie.allowed(now.node.reshape(-1), vocab).reshape(scores.shape)
            scores = jnp.where(allowed, scores, UNSEEN)
        sums = (now.sums[:, :, None] + scores).reshape(rows, -1)
        # Each beam can end with each stop token, so this many candidates always include K beams that continue.
        candidates = min(beams * (1 + len(stop)), sums.shape[1])
        sums, chosen = lax.top_k(sums, candidates)
        beam, token = chosen // vocab, (chosen % vocab).astype(jnp.int32)
        made = lax.dynamic_update_slice(_take(now.ids, beam), token[:, :, None], (0, 0, now.step))
        ends = (token[:, :, None] == stop).any(axis=-1)

        # As in transformers, an answer only counts as finished if it is among the best K candidates.
        counts = ends & (jnp.arange(candidates) < beams) & (sums > UNSEEN / 2)
        worth = jnp.where(counts, sums / power(now.step + 1), UNSEEN)
        all_worth = jnp.concatenate([now.ended, worth], axis=1)
        ended, kept = lax.top_k(all_worth, 1)
        ended_ids = _take(jnp.concatenate([now.ended_ids, made], axis=1), kept)
        ended_sums = _take(jnp.concatenate([now.ended_sums, sums], axis=1), kept)

        going = jnp.where(ends, 2 * UNSEEN, sums)
        going, kept = lax.top_k(going, beams)
        beam, token, made = _take((beam, token, made), kept)
        node = _take(now.node, beam)
        if trie is not None:
            node = trie.follow(node.reshape(-1), token.reshape(-1)).reshape(node.shape)
        flat = (jnp.arange(rows)[:, None] * beams + beam).reshape(-1)
        cache = now.cache._replace(
            keys=tuple(x[flat] for x in now.cache.keys), values=tuple(x[flat] for x in now.cache.values),
            filled=now.cache.filled[flat],
        )  # fmt: skip
        every = jnp.ones((rows * beams, 1), bool)
        hidden, cache = extend(config, parts, cache, token.reshape(-1, 1), every)
        scores = scores_of(config, parts, hidden[:, 0]).reshape(rows, beams, vocab)
        return _BeamState(
            cache, scores, now.step + 1, made, jnp.maximum(going, UNSEEN), node, ended_ids, ended, ended_sums
        )

    last = lax.while_loop(goes_on, body, start)
    # Unfinished beams compete with finished answers at their present length.
    worth = jnp.concatenate([last.ended, last.sums / power(last.step)], axis=1)
    ids_of = jnp.concatenate([last.ended_ids, last.ids], axis=1)
    sums_of = jnp.concatenate([last.ended_sums, last.sums], axis=1)
    best = jnp.argmax(worth, axis=1)[:, None]
    found = _take((ids_of, sums_of), best)
    return found[0][:, 0], best[:, 0] == 0, found[1][:, 0]


def search(
    model: LanguageModel,
    prompts: Sequence[np.ndarray],
    options: DecodingOptions,
    stop: Sequence[int],
    trie: Trie | None,
    soft: SoftPrompts | None = None,
    progress_bar: bool = True,
) -> list[Generated]:
    """Return the best answer to each prompt. `sct.generation.generate.generate` calls this function."""
    made: list[Generated | None] = [None] * len(prompts)
    rows = min(options.batch_size, len(prompts))
    ends, parts = jnp.asarray(list(stop), jnp.int32), prepared(model)
    for chosen in batches(prompts, rows, "generating texts", progress_bar):
        ids, attention_mask = padded([prompts[i] for i in chosen], rows)
        found = decode(
            model.config, options.max_new_tokens, options.beams, known_tokens(model), parts, ids, attention_mask,
            jnp.asarray(options.length_penalty), ends, trie, soft_of(soft, chosen, rows),
        )  # fmt: skip
        for i, *of_row in zip(chosen, *map(np.asarray, found), strict=False):
            made[i] = Generated.of(*of_row)
    return [each for each in made if each is not None]
