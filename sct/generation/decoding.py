"""Define what all decoding methods share: options, prepared parameters, batches of prompts, and results."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np

from sct.checks import check_at_least, check_positive, check_shape, check_share
from sct.data.text.tokenizer import Tokenizer
from sct.errors import ConfigError, DataError
from sct.generation.cache import layers_of
from sct.models import registry
from sct.models.decoder_config import DecoderConfig
from sct.nn.chunked_attention import UNSEEN
from sct.progress import progress


class LanguageModel(Protocol):
    """Interface of a model that can generate text; `sct.weights.pretrained.Pretrained` implements it."""

    @property
    def config(self) -> Any:
        """Configuration of the model's architecture."""
        ...

    @property
    def variables(self) -> dict[str, Any]:
        """Variables of the module, nested dicts of arrays."""
        ...

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Tokenizer, or None if the model has none."""
        ...


# Maps prompt numbers to soft prompts (n, K, D): the vectors that replace the negative tokens of these prompts.
SoftPrompts = Callable[[Sequence[int]], jax.Array]

# Prompts are padded to a multiple of this number, so that XLA compiles few lengths.
PROMPT_STEP = 32


@dataclasses.dataclass(frozen=True)
class DecodingOptions:
    """Options of text generation.

    Parameters
    ----------
    max_new_tokens
        Maximum number of generated tokens per prompt.
    temperature
        0 selects greedy decoding, which takes the most probable token at each step. Otherwise tokens are sampled from
        softmax(logits / temperature).
    top_k
        Sample only from the `top_k` most probable tokens; 0 for all.
    top_p
        Sample only from the smallest set of most probable tokens whose probabilities sum to at least `top_p`; 1 for
        all.
    repetition_penalty
        Values above 1 lower the probability of tokens that the prompt or the answer already contains; 1 has no effect.
    beams
        Number of beams. Values above 1 use beam search without sampling.
    length_penalty
        Beam search ranks answers by log probability / length ** length_penalty.
    batch_size
        Number of prompts decoded at once.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    beams: int = 1
    length_penalty: float = 1.0
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name, least in (
            ("max_new_tokens", 1),
            ("beams", 1),
            ("batch_size", 1),
            ("top_k", 0),
            ("temperature", 0),
        ):
            check_at_least(name, getattr(self, name), least, whole=name != "temperature")
        check_share("top_p", self.top_p, zero=False)
        check_positive("repetition_penalty", self.repetition_penalty)
        draws = self.temperature or self.top_k or self.top_p < 1 or self.repetition_penalty != 1
        if self.beams > 1 and draws:
            raise ConfigError(
                f"beams is {self.beams}, but beam search does not use temperature, top_k, top_p or "
                "repetition_penalty: do not set these four options, or set beams=1."
            )
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise ConfigError(
                "temperature is 0 (greedy decoding), but `top_k` and `top_p` need sampling: set "
                "`temperature` above 0, or do not set `top_k` and `top_p`."
            )


@dataclasses.dataclass(frozen=True)
class Generated:
    """Generated tokens for one prompt.

    Attributes
    ----------
    ids
        Generated tokens, int32, without the stop token.
    log_probability
        Natural logarithm of the probability that the model assigns to these tokens, including the stop token. The
        sampling parameters do not enter this probability.
    finished
        True if generation ended with a stop token, False if it reached the maximum number of tokens.
    """

    ids: np.ndarray
    log_probability: float
    finished: bool

    @classmethod
    def of(cls, ids: np.ndarray, finished: np.ndarray, log_probability: np.ndarray) -> Generated:
        """Build the result from one output row of the decoding loop; unused positions of `ids` are negative."""
        ids = ids[ids >= 0]
        return cls(ids[:-1] if finished else ids, float(log_probability), bool(finished))


def ready(config: DecoderConfig, variables: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Split the parameters for decoding (see `layers_of`), and convert matrices to the compute dtype."""
    kind = jnp.dtype(config.dtype)
    return jax.tree.map(
        lambda leaf: leaf.astype(kind) if leaf.ndim > 1 else leaf, layers_of(variables, config)
    )


DecoderParts = tuple[dict[str, Any], list[dict[str, Any]]]


@functools.lru_cache(maxsize=8)
def _prepared(config: DecoderConfig) -> Any:
    return jax.jit(functools.partial(ready, config))


def made_parts(config: DecoderConfig, variables: dict[str, Any]) -> DecoderParts:
    """Prepare the parameters for decoding (see `ready`) in one compiled call."""
    return cast(DecoderParts, _prepared(config)(variables))


def prepared(model: LanguageModel) -> DecoderParts:
    """Return the parameters of a model for decoding, prepared once for all batches.

    If the model has an attribute `parts`, its parameters are already prepared, and this attribute is returned.
    """
    if (own := getattr(model, "parts", None)) is not None:
        return cast(DecoderParts, own)
    return made_parts(model.config, model.variables)


def known_tokens(model: LanguageModel) -> int:
    """Return the number of tokens that the tokenizer knows. The embedding table can have extra rows, as padding."""
    size = model.tokenizer.vocab_size if model.tokenizer is not None else model.config.vocab_size
    return min(size, model.config.vocab_size)


def only_known(scores: jax.Array, known: int) -> jax.Array:
    """Mask the logits (..., V) of all tokens except the first `known`, so that the other tokens are never chosen."""
    return (
        scores
        if known >= scores.shape[-1]
        else jnp.where(jnp.arange(scores.shape[-1]) < known, scores, UNSEEN)
    )


def check_model(model: LanguageModel) -> DecoderConfig:
    """Return the configuration of a text decoder.

    Raise `ConfigError` for other models, or if a required GPU is missing.
    """
    if not isinstance(model.config, DecoderConfig):
        raise ConfigError(
            f"this model cannot generate text, because its configuration is of type {type(model.config).__name__}: "
            "use a model of the family gpt2, neox or llama."
        )
    registry.check_device(model.config)
    return model.config


def check_prompts(
    config: DecoderConfig, prompts: Sequence[np.ndarray], new: int, what: str = "prompt", soft: bool = False
) -> None:
    """Raise `DataError` if a prompt has unknown tokens, or leaves no room for `new` more tokens.

    If `soft` is True, negative tokens are allowed.
    """
    for number, prompt in enumerate(prompts):
        check_shape(
            f"{what} {number}",
            prompt,
            ("tokens",),
            advice="give at least one token, such as the begin token",
        )
        low, high = int(prompt.min()), int(prompt.max())
        if (low < 0 and not soft) or high >= config.vocab_size:
            raise DataError(
                f"{what} {number} contains the token id {low if low < 0 else high}, but the model has only the token "
                f"ids 0 to {config.vocab_size - 1}: encode the text with the tokenizer of this model."
            )
        if config.positions == "learned" and len(prompt) + new > config.max_length:
            raise DataError(
                f"{what} {number} has {len(prompt)} tokens and max_new_tokens is {new}, but the model has only "
                f"{config.max_length} positions: shorten the {what}, or lower `max_new_tokens`."
            )


def padded(prompts: Sequence[np.ndarray], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Pad prompts on the left; return the tokens and the attention mask, (rows, T) each.

    If there are fewer than `rows` prompts, the last prompt is repeated.
    """
    longest = max(map(len, prompts))
    length = -(-longest // PROMPT_STEP) * PROMPT_STEP
    ids, attention_mask = np.zeros((rows, length), np.int32), np.zeros((rows, length), bool)
    for row in range(rows):
        prompt = prompts[min(row, len(prompts) - 1)]
        ids[row, length - len(prompt) :], attention_mask[row, length - len(prompt) :] = prompt, True
    return ids, attention_mask


def soft_of(soft: SoftPrompts | None, chosen: Sequence[int], rows: int) -> jax.Array | None:
    """Return the soft prompts (rows, K, D) of the chosen prompts.

    If there are fewer than `rows` prompts, the last one is repeated, as in `padded`.
    """
    if soft is None:
        return None
    return soft([chosen[min(row, len(chosen) - 1)] for row in range(rows)])


def batches(prompts: Sequence[np.ndarray], size: int, what: str, active: bool = True) -> Iterator[list[int]]:
    """Sort prompts by length, yield one batch of prompt numbers at a time, and show a progress bar."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    with progress(what, len(prompts), active=active) as bar:
        for first in range(0, len(order), size):
            chosen = order[first : first + size]
            yield chosen
            bar.update(len(chosen))
