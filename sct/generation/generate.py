"""Text generation with a decoder: batches of prompts of unequal length through one compiled loop."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sct.errors import ConfigError
from sct.generation.beam import search
from sct.generation.cache import Cache, empty, extend, scores_of
from sct.generation.decoding import (
    DecoderParts,
    DecodingOptions,
    Generated,
    LanguageModel,
    SoftPrompts,
    batches,
    check_model,
    check_prompts,
    known_tokens,
    only_known,
    padded,
    prepared,
    soft_of,
)
from sct.generation.sampling import Sampling, Uses, adjusted, choose
from sct.generation.trie import Trie
from sct.models.checks import check_outputs
from sct.models.decoder_config import DecoderConfig
from sct.nn.chunked_attention import UNSEEN


class _State(NamedTuple):
    """State of the loop, for B rows and N new tokens.

    Attributes
    ----------
    cache
        Keys and values of the tokens so far.
    scores
        Of the next token, float32 (B, V).
    step
        Tokens generated so far, int32 ().
    ids
        They, int32 (B, N), -1 elsewhere.
    done
        Whether a row has ended, bool (B,).
    log_probability
        Of the tokens so far, float32 (B,).
    seen
        Tokens of the row, for the repetition penalty, bool (B, V); None without one.
    node
        Node of the row in the trie, int32 (B,).
    """

    cache: Cache
    scores: jax.Array
    step: jax.Array
    ids: jax.Array
    done: jax.Array
    log_probability: jax.Array
    seen: jax.Array | None
    node: jax.Array


@functools.partial(jax.jit, static_argnames=("config", "new", "uses", "known"))
def decode(
    config: DecoderConfig,
    new: int,
    uses: Uses,
    known: int,
    parts: DecoderParts,
    ids: jax.Array,
    attention_mask: jax.Array,
    sampling: Sampling,
    stop: jax.Array,
    trie: Trie | None = None,
    soft: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Continue prompts, in one compiled program.

    Parameters
    ----------
    config, new, uses, known
        Architecture, most tokens to generate (N), what any row uses, and the number of tokens that may be chosen.
    parts
        Variables of the model, from `prepared`.
    ids, attention_mask
        Prompts (B, T), filled up on the left, and where they hold tokens, bool.
    sampling, stop
        How rows choose; tokens that end a row, int32 (S,).
    trie
        The allowed answers; None allows all.
    soft
        Vectors (B, K, D) for the negative tokens of the prompts.

    Returns
    -------
    Tokens int32 (B, N), -1 after the end (the stop token is kept); whether a stop token came, bool (B,);
    the logarithm of the probability, float32 (B,).
    """
    rows, length = ids.shape
    hidden, cache = extend(
        config, parts, empty(config, rows, length + new), ids, attention_mask, first=True, soft=soft
    )
    seen = None
    if uses.penalty:
        where = jnp.where(attention_mask & (ids >= 0), ids, config.vocab_size)
        seen = (
            jnp.zeros((rows, config.vocab_size), bool)
            .at[jnp.arange(rows)[:, None], where]
            .set(True, mode="drop")
        )
    start = _State(
        cache,
        scores_of(config, parts, hidden[:, -1]),
        jnp.zeros((), jnp.int32),
        jnp.full((rows, new), -1, jnp.int32),
        jnp.zeros(rows, bool),
        jnp.zeros(rows),
        seen,
        jnp.zeros(rows, jnp.int32),
    )

    def unfinished(state: _State) -> jax.Array:
        return (state.step < new) & ~state.done.all()

    def generate_one(state: _State) -> _State:
        scores, node = only_known(state.scores, known), state.node
        if trie is not None:
            scores = jnp.where(trie.allowed(node, config.vocab_size), scores, UNSEEN)
        token = choose(adjusted(scores, sampling, state.seen, uses), sampling, state.step, uses)
        if trie is not None:
            node = trie.follow(node, token)
        own = jax.nn.log_softmax(state.scores, axis=-1)[jnp.arange(rows), token]
        ids = lax.dynamic_update_slice(state.ids, jnp.where(state.done, -1, token)[:, None], (0, state.step))
        seen = state.seen.at[jnp.arange(rows), token].set(True) if state.seen is not None else None
        hidden, cache = extend(config, parts, state.cache, token[:, None], ~state.done[:, None])
        return _State(
            cache,
            scores_of(config, parts, hidden[:, 0]),
            state.step + 1,
            ids,
            state.done | (token[:, None] == stop).any(axis=1),
            state.log_probability + jnp.where(state.done, 0.0, own),
            seen,
            node,
        )

    end = lax.while_loop(unfinished, generate_one, start)
    return end.ids, end.done, end.log_probability


def _check_trie(trie: Trie, config: DecoderConfig, options: DecodingOptions, stop: Sequence[int]) -> None:
    """Refuse a trie with a token that the model lacks, or an answer that would not end."""
    highest, depth = int(trie.tokens.max()), trie.longest
    if highest >= config.vocab_size:
        raise ConfigError(
            f"an allowed answer has the token {highest}, but the model knows 0 to {config.vocab_size - 1}."
        )
    if trie.stop not in stop:
        raise ConfigError(
            f"the token {trie.stop} ends the allowed answers, so it must be among the stop tokens."
        )
    if options.max_new_tokens < depth:
        raise ConfigError(
            f"an allowed answer has {depth} tokens with its end, but max_new_tokens is {options.max_new_tokens}."
        )


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int] | np.ndarray],
    options: DecodingOptions | None = None,
    *,
    stop: Sequence[int] | None = None,
    seeds: Sequence[int] | int = 0,
    trie: Trie | None = None,
    soft: SoftPrompts | None = None,
    progress_bar: bool = True,
) -> list[Generated]:
    """Continue prompts of tokens.

    Parameters
    ----------
    model
        A decoder.
    prompts
        Tokens of each prompt, of any length.
    options
        See `DecodingOptions`.
    stop
        Tokens that end an answer; by default the end of text of the model's tokenizer.
    seeds
        One for each prompt, or one number: prompt i then has the seed `seeds + i`. An answer depends on the model, its
        prompt and its seed, and not on the other prompts.
    trie
        The allowed answers, from `sct.generation.trie.make_trie`; None allows all.
    soft
        Function from the numbers of n prompts to their vectors (n, K, D), called when these prompts are read. The token
        -1 - k of a prompt stands for its vector k.
    progress_bar
        Whether to show one.

    Raises
    ------
    ConfigError, DataError
        The model generates no text, options contradict each other, or a prompt does not fit the model.
    """
    options, config = options or DecodingOptions(), check_model(model)
    if not len(prompts):
        return []
    arrays = [np.asarray(prompt, np.int64) for prompt in prompts]
    check_prompts(config, arrays, options.max_new_tokens, soft=soft is not None)
    numbers = [int(seeds) + i for i in range(len(arrays))] if np.ndim(seeds) == 0 else [int(i) for i in seeds]  # type: ignore[union-attr,arg-type]
    if len(numbers) != len(arrays):
        raise ConfigError(f"{len(numbers)} seeds were given for {len(arrays)} prompts: give one for each.")
    if stop is None:
        end = model.tokenizer.eos if model.tokenizer is not None else None
        stop = [] if end is None else [end]
    if strange := [token for token in stop if not 0 <= token < config.vocab_size]:
        raise ConfigError(
            f"the stop token {strange[0]} is none of the model's {config.vocab_size}: use its tokenizer."
        )
    if min(numbers) < 0 or max(numbers) >= 1 << 32:
        raise ConfigError(
            f"seeds reach from {min(numbers)} to {max(numbers)}, but they must lie in 0 to 2 ** 32 - 1."
        )
    if trie is not None:
        _check_trie(trie, config, options, stop)
    if options.beams > 1:
        return _checked(search(model, arrays, options, stop, trie, soft, progress_bar))
    parts = prepared(model)
    uses = Uses(
        options.temperature > 0, options.top_k > 0, options.top_p < 1, options.repetition_penalty != 1
    )
    made: list[Generated | None] = [None] * len(arrays)
    rows = min(options.batch_size, len(arrays))
    ends = jnp.asarray(list(stop), jnp.int32)
    for chosen in batches(arrays, rows, "generating", progress_bar):
        ids, attention_mask = padded([arrays[i] for i in chosen], rows)
        own = [numbers[i] for i in chosen]
        sampling = Sampling(
            jnp.full(rows, options.temperature),
            jnp.full(rows, options.top_k),
            jnp.full(rows, options.top_p),
            jnp.full(rows, options.repetition_penalty),
            jnp.asarray([*own, *own[-1:] * (rows - len(own))], jnp.uint32),
        )
        found = decode(
            config, options.max_new_tokens, uses, known_tokens(model), parts, ids, attention_mask, sampling, ends, trie,
            soft_of(soft, chosen, rows),
        )  # fmt: skip
        for i, *of_row in zip(chosen, *map(np.asarray, found), strict=False):
            made[i] = Generated.of(*of_row)
    return _checked([each for each in made if each is not None])


def _checked(made: list[Generated]) -> list[Generated]:
    """Raise `CheckpointError` for a text without a finite probability: the model's scores were not finite."""
    check_outputs(np.array([each.log_probability for each in made]), "probabilities of texts", "prompts")
    return made
