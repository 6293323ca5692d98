"""Score candidate answers by their log-likelihood, to use a decoder as a classifier."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sct.checks import check_not_empty
from sct.generation.cache import empty, extend, scores_of
from sct.generation.decoding import (
    DecoderParts,
    LanguageModel,
    SoftPrompts,
    batches,
    check_model,
    check_prompts,
    padded,
    prepared,
    soft_of,
)
from sct.models.checks import check_outputs
from sct.models.decoder_config import DecoderConfig


@functools.partial(jax.jit, static_argnames=("config",))
def log_probabilities(
    config: DecoderConfig,
    parts: DecoderParts,
    ids: jax.Array,
    attention_mask: jax.Array,
    answers: jax.Array,
    lengths: jax.Array,
    soft: jax.Array | None = None,
) -> jax.Array:
    """Compute the log probability that each answer follows each prompt, in one compiled program.

    Each prompt is read once. Each answer then starts from the key-value cache of the prompts.

    Parameters
    ----------
    config, parts
        Configuration and parameters of the model; see `sct.generation.decoding.prepared`.
    ids, attention_mask
        Left-padded prompts (B, T), and a mask of their tokens, bool (B, T).
    answers, lengths
        Right-padded answers (C, A), and their numbers of tokens (C,).
    soft
        Soft prompts (B, K, D), which replace the negative tokens of the prompts.

    Returns
    -------
    float32 (B, C): log probabilities, summed over the tokens of an answer.
    """
    rows, (_, size) = len(ids), answers.shape
    cache = empty(config, rows, ids.shape[1] + size)
    hidden, cache = extend(config, parts, cache, ids, attention_mask, first=True, soft=soft)
    last = scores_of(config, parts, hidden[:, -1:])

    def of_answer(answer: tuple[jax.Array, jax.Array]) -> jax.Array:
        tokens, length = answer
        counts = jnp.arange(size) < length
        read = jnp.broadcast_to(tokens, (rows, size))
        hidden, _ = extend(config, parts, cache, read, jnp.broadcast_to(counts, (rows, size)))
        scores = jnp.concatenate([last, scores_of(config, parts, hidden[:, :-1])], axis=1)
        own = jnp.take_along_axis(jax.nn.log_softmax(scores, axis=-1), read[:, :, None], axis=2)[..., 0]
        return jnp.where(counts, own, 0.0).sum(axis=1)

    return lax.map(of_answer, (answers, lengths)).T


def score(
    model: LanguageModel,
    prompts: Sequence[Sequence[int] | np.ndarray],
    candidates: Sequence[Sequence[int] | np.ndarray],
    *,
    batch_size: int = 8,
    per_token: bool = False,
    soft: SoftPrompts | None = None,
) -> np.ndarray:
    """Compute the log-likelihood that each candidate answer follows each prompt.

    Parameters
    ----------
    model
        A text decoder.
    prompts, candidates
        Tokens of each prompt and each candidate. Candidates should end with the stop token. If they do not, a candidate
        that is a prefix of another candidate always has the higher likelihood of the two.
    batch_size
        Number of prompts processed at once.
    per_token
        If True, divide each log-likelihood by the number of tokens in the candidate, so that long answers are not at a
        disadvantage. The divided values are not log probabilities.
    soft
        See `sct.generation.generate.generate`.

    Returns
    -------
    float32 (prompts, candidates), natural logarithms.

    Raises
    ------
    ConfigError, DataError
        The model cannot generate text, there are no candidates, or a prompt or candidate does not fit the model.
    """
    config = check_model(model)
    check_not_empty("candidates", candidates)
    arrays, answers = ([np.asarray(each, np.int64) for each in given] for given in (prompts, candidates))
    longest = max(map(len, answers))
    check_prompts(config, answers, 0, "candidate")
    check_prompts(config, arrays, longest, soft=soft is not None)
    filled = np.zeros((len(answers), longest), np.int32)
    for row, answer in zip(filled, answers, strict=True):
        row[: len(answer)] = answer
    lengths = np.array([len(answer) for answer in answers], np.int32)
    out = np.zeros((len(arrays), len(answers)), np.float32)
    if not arrays:
        return out
    rows, parts = min(batch_size, len(arrays)), prepared(model)
    for chosen in batches(arrays, rows, "scoring answers"):
        ids, attention_mask = padded([arrays[i] for i in chosen], rows)
        found = log_probabilities(
            config, parts, ids, attention_mask, filled, lengths, soft_of(soft, chosen, rows)
        )
        out[chosen] = np.asarray(found)[: len(chosen)]
    check_outputs(out, "scores of answers", "prompts")
    return out / lengths if per_token else out
