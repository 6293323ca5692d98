"""Generate text with a decoder. One compiled loop continues a batch of prompts of different lengths."""

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
    """State of the generation loop, for B rows and at most N new tokens per row.

    Attributes
    ----------
    cache
        Cached keys and values of the tokens so far.
    scores
        Scores (logits) of the next token, float32 (B, V).
    step
        Number of tokens generated so far, int32 ().
    ids
        Generated tokens, int32 (B, N); -1 where there is no token yet.
    done
        Whether a row has ended, bool (B,).
    log_probability
        Log probability of the generated tokens of each row, float32 (B,).
    seen
        Whether each token already occurs in each row, bool (B, V). The repetition penalty needs this array; None if no
        row has a repetition penalty.
    node
        Current node of each row in the trie, int32 (B,).
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
    """Generate the next tokens of each prompt in a batch, in one compiled program.

    Parameters
    ----------
    config
        Configuration of the decoder.
    new
        Largest number of tokens to generate per row (N).
    uses
        The sampling options that at least one row uses.
    known
        Number of tokens that the tokenizer knows. Only these tokens may be generated.
    parts
        Variables of the model, from `prepared`.
    ids
        Prompts, integers (B, T), padded on the left.
    attention_mask
        Whether each position holds a token (True) or padding (False), bool (B, T).
    sampling
        Sampling options of each row.
    stop
        Tokens that end a row, int32 (S,).
    trie
        Trie of the allowed answers. None allows every answer.
    soft
        Soft tokens (B, K, D), which replace the negative tokens of the prompts.

    Returns
    -------
    Three arrays: the generated tokens, int32 (B, N), with -1 after the stop token; whether a stop token was generated,
    bool (B,); and the log probability of the generated tokens, float32 (B,).
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
    """Raise `ConfigError` if an allowed answer has a token that the model lacks, or cannot be completed."""
    highest, depth = int(trie.tokens.max()), trie.longest
    if highest >= config.vocab_size:
        raise ConfigError(
            f"an allowed answer contains the token id {highest}, but the model has only the token ids 0 to "
            f"{config.vocab_size - 1}: encode the allowed answers with the model's tokenizer."
        )
    if trie.stop not in stop:
        raise ConfigError(
            f"the allowed answers end with the token id {trie.stop}, but `stop` does not contain this "
            f"token: add {trie.stop} to `stop`."
        )
    if options.max_new_tokens < depth:
        raise ConfigError(
            f"max_new_tokens is {options.max_new_tokens}, but the longest allowed answer has {depth} tokens, including "
            f"its stop token: set max_new_tokens to {depth} or more."
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
    """Generate an answer to each prompt with a decoder.

    Parameters
    ----------
    model
        Text decoder.
    prompts
        Tokens of each prompt. Prompts may have different lengths.
    options
        Options of decoding; see `DecodingOptions`.
    stop
        Tokens that end an answer. The default is the end-of-text token of the model's tokenizer.
    seeds
        One seed per prompt, or a single number. With a single number, prompt i has the seed `seeds + i`. An answer
        depends only on the model, its prompt and its seed, not on the other prompts.
    trie
        Trie of the allowed answers, from `sct.generation.trie.make_trie`. None allows every answer.
    soft
        Function that takes the indices of n prompts and returns their soft tokens (n, K, D). The function is called
        once for each batch of prompts. The token -1 - k of a prompt stands for its soft token k.
    progress_bar
        Whether to show a progress bar.

    Returns
    -------
    One answer per prompt, in the order of the prompts.

    Raises
    ------
    ConfigError, DataError
        The model does not generate text, the options contradict each other, or a prompt does not fit the model.
    CheckpointError
        The model computes NaN or infinity.
    """
    options, config = options or DecodingOptions(), check_model(model)
    if not len(prompts):
        return []
    arrays = [np.asarray(prompt, np.int64) for prompt in prompts]
    check_prompts(config, arrays, options.max_new_tokens, soft=soft is not None)
    numbers = [int(seeds) + i for i in range(len(arrays))] if np.ndim(seeds) == 0 else [int(i) for i in seeds]  # type: ignore[union-attr,arg-type]
    if len(numbers) != len(arrays):
        raise ConfigError(
            f"{len(numbers)} seeds were given for {len(arrays)} prompts: give one seed for each prompt."
        )
    if stop is None:
        end = model.tokenizer.eos if model.tokenizer is not None else None
        stop = [] if end is None else [end]
    if strange := [token for token in stop if not 0 <= token < config.vocab_size]:
        raise ConfigError(
            f"`stop` contains the token id {strange[0]}, but the model has only the token ids 0 to "
            f"{config.vocab_size - 1}: use token ids of the model's tokenizer."
        )
    if min(numbers) < 0 or max(numbers) >= 1 << 32:
        raise ConfigError(
            f"seeds range from {min(numbers)} to {max(numbers)}, but must be between 0 and 2 ** 32 - 1: "
            "choose seeds in this range."
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
    for chosen in batches(arrays, rows, "generating texts", progress_bar):
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
    """Return the answers; raise `CheckpointError` if the log probability of an answer is NaN or infinite."""
    check_outputs(np.array([each.log_probability for each in made]), "probabilities of texts", "prompts")
    return made
