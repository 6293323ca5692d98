"""Generation of text by a decoder: batches of prompts of unequal length through one compiled loop."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sct.data.text.tokenizer import Tokenizer
from sct.errors import ConfigError, DataError
from sct.generation.cache import Cache, empty, extend, layers_of, scores_of
from sct.generation.sampling import Sampling, Uses, adjusted, choose
from sct.generation.trie import Trie
from sct.models import registry
from sct.models.checks import check_outputs
from sct.models.decoder_config import DecoderConfig
from sct.nn.chunked_attention import UNSEEN
from sct.progress import progress


class Model(Protocol):
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
Soft = Callable[[Sequence[int]], jax.Array]

# Prompts are filled up to a multiple of this, so that few lengths are compiled.
PROMPT_STEP = 32


@dataclasses.dataclass(frozen=True)
class Options:
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
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}, but it must be at least {least}.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}, but it must lie in (0, 1].")
        if self.repetition_penalty <= 0:
            raise ConfigError(f"repetition_penalty is {self.repetition_penalty}, but it must be positive.")
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


class _Now(NamedTuple):
    """State of the loop."""

    cache: Cache
    scores: jax.Array
    step: jax.Array
    ids: jax.Array
    done: jax.Array
    log_probability: jax.Array
    seen: jax.Array | None
    node: jax.Array


def ready(config: DecoderConfig, variables: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Parts of a model for decoding, matrices in the type of the computation."""
    kind = jnp.dtype(config.dtype)
    return jax.tree.map(
        lambda leaf: leaf.astype(kind) if leaf.ndim > 1 else leaf, layers_of(variables, config)
    )


Parts = tuple[dict[str, Any], list[dict[str, Any]]]


@functools.lru_cache(maxsize=8)
def _prepared(config: DecoderConfig) -> Any:
    return jax.jit(functools.partial(ready, config))


def made_parts(config: DecoderConfig, variables: dict[str, Any]) -> Parts:
    """Parts of a decoder for `decode`, in the type of the computation."""
    return cast(Parts, _prepared(config)(variables))


def prepared(model: Model) -> Parts:
    """Parts of a model, made once for all batches: a copy in the type of the computation.

    A model that is asked again and again keeps its own (`parts`).
    """
    if (own := getattr(model, "parts", None)) is not None:
        return cast(Parts, own)
    return made_parts(model.config, model.variables)


def known_tokens(model: Model) -> int:
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


@functools.partial(jax.jit, static_argnames=("config", "new", "uses", "known"))
def decode(
    config: DecoderConfig,
    new: int,
    uses: Uses,
    known: int,
    parts: Parts,
    ids: jax.Array,
    there: jax.Array,
    sampling: Sampling,
    stop: jax.Array,
    trie: Trie | None = None,
    soft: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Generate behind prompts, in one compiled program.

    Parameters
    ----------
    config, new, uses, known
        Architecture, most tokens to generate (N), what any row needs, and the number of tokens that may be chosen.
    parts
        Of `prepared`.
    ids, there
        Prompts (B, T), filled up on the left, and where they hold tokens, bool.
    sampling, stop
        How rows choose; tokens that end a row, int32 (S,).
    trie
        What may be answered, if not everything.
    soft
        Vectors (B, K, D) that negative tokens of the prompts stand for.

    Returns
    -------
    Tokens int32 (B, N), -1 behind the end (the stop token itself is kept); whether a stop token came, bool (B,);
    the logarithm of the probability, float32 (B,).
    """
    rows, length = ids.shape
    hidden, cache = extend(
        config, parts, empty(config, rows, length + new), ids, there, first=True, soft=soft
    )
    seen = None
    if uses.penalty:
        where = jnp.where(there & (ids >= 0), ids, config.vocab_size)
        seen = (
            jnp.zeros((rows, config.vocab_size), bool)
            .at[jnp.arange(rows)[:, None], where]
            .set(True, mode="drop")
        )
    start = _Now(
        cache,
        scores_of(config, parts, hidden[:, -1]),
        jnp.zeros((), jnp.int32),
        jnp.full((rows, new), -1, jnp.int32),
        jnp.zeros(rows, bool),
        jnp.zeros(rows),
        seen,
        jnp.zeros(rows, jnp.int32),
    )

    def goes_on(now: _Now) -> jax.Array:
        return (now.step < new) & ~now.done.all()

    def body(now: _Now) -> _Now:
        scores, node = only_known(now.scores, known), now.node
        if trie is not None:
            scores = jnp.where(trie.allowed(node, config.vocab_size), scores, UNSEEN)
        token = choose(adjusted(scores, sampling, now.seen, uses), sampling, now.step, uses)
        if trie is not None:
            node = trie.follow(node, token)
        own = jax.nn.log_softmax(now.scores, axis=-1)[jnp.arange(rows), token]
        ids = lax.dynamic_update_slice(now.ids, jnp.where(now.done, -1, token)[:, None], (0, now.step))
        seen = now.seen.at[jnp.arange(rows), token].set(True) if now.seen is not None else None
        hidden, cache = extend(config, parts, now.cache, token[:, None], ~now.done[:, None])
        return _Now(
            cache,
            scores_of(config, parts, hidden[:, 0]),
            now.step + 1,
            ids,
            now.done | (token[:, None] == stop).any(axis=1),
            now.log_probability + jnp.where(now.done, 0.0, own),
            seen,
            node,
        )

    last = lax.while_loop(goes_on, body, start)
    return last.ids, last.done, last.log_probability


def check_model(model: Model) -> DecoderConfig:
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
        if prompt.ndim != 1 or not len(prompt):
            raise DataError(
                f"{what} {number} has no tokens: give at least one, such as the token that begins texts."
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


def _check_trie(trie: Trie, config: DecoderConfig, options: Options, stop: Sequence[int]) -> None:
    """Refuse a list of answers that generation could leave, or not come to the end of."""
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


def padded(prompts: Sequence[np.ndarray], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (rows, T) of prompts filled up on the left, and where they are; missing rows repeat the last prompt."""
    longest = max(map(len, prompts))
    length = -(-longest // PROMPT_STEP) * PROMPT_STEP
    ids, there = np.zeros((rows, length), np.int32), np.zeros((rows, length), bool)
    for row in range(rows):
        prompt = prompts[min(row, len(prompts) - 1)]
        ids[row, length - len(prompt) :], there[row, length - len(prompt) :] = prompt, True
    return ids, there


def soft_of(soft: Soft | None, chosen: Sequence[int], rows: int) -> jax.Array | None:
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


def generate(
    model: Model,
    prompts: Sequence[Sequence[int] | np.ndarray],
    options: Options | None = None,
    *,
    stop: Sequence[int] | None = None,
    seeds: Sequence[int] | int = 0,
    trie: Trie | None = None,
    soft: Soft | None = None,
    progress_bar: bool = True,
) -> list[Generated]:
    """Generate text behind prompts of tokens.

    Parameters
    ----------
    model
        A decoder.
    prompts
        Tokens of each prompt, of any length.
    options
        See `Options`.
    stop
        Tokens that end an answer; by default the end of text of the model's tokenizer.
    seeds
        One for each prompt, or one number: prompt i then has the seed `seeds + i`. An answer depends on the model, its
        prompt and its seed, and not on the other prompts.
    trie
        Only answers of a list; of `sct.generation.trie.make_trie`.
    soft
        Gives the vectors (n, K, D) of n prompts by their numbers, made when these prompts are read: the token -1 - k of
        a prompt stands for its vector k.
    progress_bar
        Whether to show one.

    Raises
    ------
    ConfigError, DataError
        The model generates no text, options contradict each other, or a prompt does not fit the model.
    """
    options, config = options or Options(), check_model(model)
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
        from sct.generation.beam import search

        return _finite(search(model, arrays, options, stop, trie, soft, progress_bar))
    parts = prepared(model)
    uses = Uses(
        options.temperature > 0, options.top_k > 0, options.top_p < 1, options.repetition_penalty != 1
    )
    made: list[Generated | None] = [None] * len(arrays)
    rows = min(options.batch_size, len(arrays))
    ends = jnp.asarray(list(stop), jnp.int32)
    for chosen in batches(arrays, rows, "generating", progress_bar):
        ids, there = padded([arrays[i] for i in chosen], rows)
        own = [numbers[i] for i in chosen]
        sampling = Sampling(
            jnp.full(rows, options.temperature),
            jnp.full(rows, options.top_k),
            jnp.full(rows, options.top_p),
            jnp.full(rows, options.repetition_penalty),
            jnp.asarray([*own, *own[-1:] * (rows - len(own))], jnp.uint32),
        )
        found = decode(
            config, options.max_new_tokens, uses, known_tokens(model), parts, ids, there, sampling, ends, trie,
            soft_of(soft, chosen, rows),
        )  # fmt: skip
        for i, *of_row in zip(chosen, *map(np.asarray, found), strict=False):
            made[i] = Generated.of(*of_row)
    return _finite([each for each in made if each is not None])


def _finite(made: list[Generated]) -> list[Generated]:
    """Texts whose probabilities are numbers; others were chosen among scores that are none."""
    check_outputs(np.array([each.log_probability for each in made]), "probabilities of texts", "prompts")
    return made
