"""Vectors in the place of tokens: where they are the vectors of tokens, everything is as with these tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from sct.errors import DataError
from sct.generation.decoding import DecodingOptions
from sct.generation.generate import generate
from sct.generation.scoring import score
from tests.generation.conftest import CONFIGS, logits, make

FAMILIES = ("gpt2", "llama")
WAYS = {
    "greedy": DecodingOptions(max_new_tokens=9, batch_size=2),
    "drawn": DecodingOptions(max_new_tokens=9, batch_size=2, temperature=0.8, top_p=0.9),
    "beams": DecodingOptions(max_new_tokens=9, batch_size=2, beams=3),
}


def softened(
    model: Any,
) -> tuple[list[np.ndarray], list[np.ndarray], Callable[[Sequence[int]], Any], list[list[int]]]:
    """Prompts; the same with vectors for some tokens; their vectors; and what was asked for them."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, model.config.vocab_size, size) for size in (5, 11, 3, 8, 40)]
    table = np.asarray(model.variables["params"]["token"]["embedding"])
    vectors, replaced, asked = np.zeros((len(prompts), 3, table.shape[1]), np.float32), [], []
    for number, prompt in enumerate(prompts):
        # In another order than they stand in, and one of them twice.
        places = rng.choice(len(prompt), 3, replace=False)
        prompt[places[2]] = prompt[places[1]]
        vectors[number] = table[prompt[places]]
        changed = prompt.copy()
        changed[places] = [-1, -2, -2]
        replaced.append(changed)

    def soft(numbers: Sequence[int]) -> Any:
        asked.append(list(numbers))
        return jnp.asarray(vectors[list(numbers)])

    return prompts, replaced, soft, asked


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
def test_vectors_of_tokens_are_as_good_as_tokens(family, way):
    model = make(CONFIGS[family], family)
    prompts, replaced, soft, asked = softened(model)
    expected = generate(model, prompts, WAYS[way], stop=[2], seeds=7, progress_bar=False)
    found = generate(model, replaced, WAYS[way], stop=[2], seeds=7, soft=soft, progress_bar=False)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)
        assert one.log_probability == pytest.approx(other.log_probability, abs=1e-4)
    # Made batch by batch, when they are read; rows that are missing repeat the last one.
    assert asked == [[2, 0], [3, 1], [4, 4]]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_of_answers(family):
    model = make(CONFIGS[family], family)
    prompts, replaced, soft, asked = softened(model)
    answers = [[5, 6, 2], [7, 2], [9, 9, 9, 2]]
    expected = score(model, prompts, answers, batch_size=2)
    np.testing.assert_allclose(score(model, replaced, answers, batch_size=2, soft=soft), expected, atol=1e-4)
    assert len(asked) == 3
    other = score(model, replaced, answers, batch_size=2, soft=lambda numbers: -soft(numbers))
    assert np.abs(other - expected).max() > 1e-2


@pytest.mark.slow
def test_a_penalty_is_for_tokens_alone():
    """A vector is no token that an answer could repeat."""
    model, penalty = make(CONFIGS["gpt2"], "gpt2"), 1.7
    table = model.variables["params"]["token"]["embedding"]
    options = DecodingOptions(max_new_tokens=5, repetition_penalty=penalty)
    tokens = range(8)
    found = generate(
        model, [[-1]] * len(tokens), options, stop=[], soft=lambda numbers: table[jnp.asarray(numbers)][:, None],
        progress_bar=False,
    )  # fmt: skip
    of_tokens = generate(model, [[token] for token in tokens], options, stop=[], progress_bar=False)
    for token in tokens:
        answer: list[int] = []
        for _ in range(5):
            scores = logits(model, [token, *answer])[-1]
            seen = list(set(answer))
            scores[seen] = np.where(scores[seen] > 0, scores[seen] / penalty, scores[seen] * penalty)
            answer.append(int(scores.argmax()))
        assert found[token].ids.tolist() == answer
    assert any(not np.array_equal(one.ids, other.ids) for one, other in zip(found, of_tokens, strict=True))


@pytest.mark.slow
def test_negative_tokens_need_vectors():
    model = make(CONFIGS["gpt2"], "gpt2")
    with pytest.raises(DataError, match="token id -1"):
        generate(model, [[-1, 4]], DecodingOptions(max_new_tokens=2))
    with pytest.raises(DataError, match="token id -1"):
        score(model, [[-1, 4]], [[5]])
