"""What every way of decoding starts from: options, a model's parts, batches of prompts, and what is made of them."""

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
    """What generation needs of a model: `sct.weights.pretrained.Pretrained` has it."""

    @property
    def config(self) -> Any:
        """Architecture."""
        ...

    @property
    def variables(self) -> dict[str, Any]:
        """Nested arrays."""
        ...

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Of its texts, if it has one."""
        ...


# Numbers of prompts -> vectors (n, K, D) that their negative tokens stand for.
SoftPrompts = Callable[[Sequence[int]], jax.Array]

# Prompts are filled up to a multiple of this, so that few lengths are compiled.
PROMPT_STEP = 32


@dataclasses.dataclass(frozen=True)
class DecodingOptions:
    """How text is generated.

    Parameters
    ----------
    max_new_tokens
        Most tokens behind each prompt.
    temperature
        0 takes the best token each time; otherwise tokens are drawn from softmax(scores / temperature).
    top_k, top_p
        Draw from the so many best tokens alone (0: all), and of these from the fewest that together have this
        probability (1: all).
    repetition_penalty
        Above 1, tokens that prompt or answer hold already become less likely.
    beams, length_penalty
        Above 1: the answer of most probability by a search that follows so many at a time, its logarithm divided by
        length ** length_penalty; without drawing.
    batch_size
        Prompts decoded at once.
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
                "beams search for the most probable answer: leave temperature, top_k, top_p and repetition_penalty "
                "out, or take beams=1."
            )
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise ConfigError(
                "temperature 0 takes the best token each time, so top_k and top_p would do nothing: set a temperature."
            )


@dataclasses.dataclass(frozen=True)
class Generated:
    """What follows a prompt.

    Attributes
    ----------
    ids
        Tokens int32, without the one that ended it.
    log_probability
        Natural logarithm of the probability that the model itself gives to these tokens and the end.
    finished
        Whether a stop token ended it, and not the number of tokens.
    """

    ids: np.ndarray
    log_probability: float
    finished: bool

    @classmethod
    def of(cls, ids: np.ndarray, finished: np.ndarray, log_probability: np.ndarray) -> Generated:
        """Make it of a row of what a compiled loop gives."""
        ids = ids[ids >= 0]
        return cls(ids[:-1] if finished else ids, float(log_probability), bool(finished))


def ready(config: DecoderConfig, variables: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Parts of a model for decoding, matrices in the type of the computation."""
    kind = jnp.dtype(config.dtype)
    return jax.tree.map(
        lambda leaf: leaf.astype(kind) if leaf.ndim > 1 else leaf, layers_of(variables, config)
    )


DecoderParts = tuple[dict[str, Any], list[dict[str, Any]]]


@functools.lru_cache(maxsize=8)
def _prepared(config: DecoderConfig) -> Any:
    return jax.jit(functools.partial(ready, config))


def made_parts(config: DecoderConfig, variables: dict[str, Any]) -> DecoderParts:
    """Parts of a decoder for `decode`, in the type of the computation."""
    return cast(DecoderParts, _prepared(config)(variables))


def prepared(model: LanguageModel) -> DecoderParts:
    """Parts of a model, made once for all batches: a copy in the type of the computation.

    A model that is asked again and again keeps its own (`parts`).
    """
    if (own := getattr(model, "parts", None)) is not None:
        return cast(DecoderParts, own)
    return made_parts(model.config, model.variables)


def known_tokens(model: LanguageModel) -> int:
    """Tokens that its tokenizer can write; a table may have more rows, to be of a round size."""
    size = model.tokenizer.vocab_size if model.tokenizer is not None else model.config.vocab_size
    return min(size, model.config.vocab_size)


def only_known(scores: jax.Array, known: int) -> jax.Array:
    """Scores (..., V) of the first `known` tokens; the others are never chosen."""
    return (
        scores
        if known >= scores.shape[-1]
        else jnp.where(jnp.arange(scores.shape[-1]) < known, scores, UNSEEN)
    )


def check_model(model: LanguageModel) -> DecoderConfig:
    """Architecture of a model that generates text; `ConfigError` for any other, and for one that needs a GPU."""
    if not isinstance(model.config, DecoderConfig):
        raise ConfigError(
            f"a {type(model.config).__name__} describes no model that generates text: give one of the families gpt2, "
            "neox or llama."
        )
    registry.check_device(model.config)
    return model.config


def check_prompts(
    config: DecoderConfig, prompts: Sequence[np.ndarray], new: int, what: str = "prompt", soft: bool = False
) -> None:
    """Raise `DataError` unless prompts are tokens of the model, or `soft` ones, and leave room for `new` more."""
    for number, prompt in enumerate(prompts):
        check_shape(
            f"{what} {number}",
            prompt,
            ("tokens",),
            advice="give at least one, such as the token that begins texts",
        )
        low, high = int(prompt.min()), int(prompt.max())
        if (low < 0 and not soft) or high >= config.vocab_size:
            raise DataError(
                f"{what} {number} has the token {low if low < 0 else high}, but the model knows 0 to "
                f"{config.vocab_size - 1}: use its own tokenizer."
            )
        if config.positions == "learned" and len(prompt) + new > config.max_length:
            raise DataError(
                f"{what} {number} has {len(prompt)} tokens and {new} are to follow, but the model has "
                f"{config.max_length} positions: shorten it, or ask for fewer."
            )


def padded(prompts: Sequence[np.ndarray], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (rows, T) of prompts filled up on the left, and where they are; missing rows repeat the last prompt."""
    longest = max(map(len, prompts))
    length = -(-longest // PROMPT_STEP) * PROMPT_STEP
    ids, attention_mask = np.zeros((rows, length), np.int32), np.zeros((rows, length), bool)
    for row in range(rows):
        prompt = prompts[min(row, len(prompts) - 1)]
        ids[row, length - len(prompt) :], attention_mask[row, length - len(prompt) :] = prompt, True
    return ids, attention_mask


def soft_of(soft: SoftPrompts | None, chosen: Sequence[int], rows: int) -> jax.Array | None:
    """Vectors (rows, K, D) of some prompts; missing rows repeat the last one, as `padded` does."""
    if soft is None:
        return None
    return soft([chosen[min(row, len(chosen) - 1)] for row in range(rows)])


def batches(prompts: Sequence[np.ndarray], size: int, what: str, active: bool = True) -> Iterator[list[int]]:
    """Numbers of the prompts of each batch, those of like length together, with a progress bar."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    with progress(what, len(prompts), active=active) as bar:
        for first in range(0, len(order), size):
            chosen = order[first : first + size]
            yield chosen
            bar.update(len(chosen))
