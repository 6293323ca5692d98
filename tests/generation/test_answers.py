"""Beams, candidates and constraints, compared with looking at every possible answer."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from sct.errors import ConfigError
from sct.generation.decoding import DecodingOptions
from sct.generation.generate import generate
from sct.generation.scoring import score
from sct.generation.trie import make_trie
from tests.generation.conftest import log_softmax, logits

STOP = 0


def probability(model, prompt, answer):
    """Logarithm of the probability of an answer, by the forward pass."""
    scores = log_softmax(logits(model, [*prompt, *answer]))[len(prompt) - 1 : -1]
    return scores[np.arange(len(answer)), list(answer)].sum()


def every_answer(model, prompt, new):
    """Every answer of at most `new` tokens that ends, or is that long, with its probability."""
    tokens = range(1, model.config.vocab_size)
    for length in range(new + 1):
        for body in itertools.product(tokens, repeat=length):
            answer = body if length == new else (*body, STOP)
            yield answer, probability(model, prompt, answer)


@pytest.mark.slow
@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_enough_beams_find_the_best_of_all_answers(gpt2, length_penalty):
    prompt, new = [4, 7, 2], 2
    found = generate(
        gpt2,
        [prompt],
        DecodingOptions(max_new_tokens=new, beams=60, length_penalty=length_penalty),
        stop=[STOP],
    )[0]
    best, value = max(
        every_answer(gpt2, prompt, new), key=lambda each: each[1] / len(each[0]) ** length_penalty
    )
    assert (*found.ids.tolist(), *([STOP] if found.finished else [])) == best
    assert found.log_probability == pytest.approx(value, abs=1e-3)


@pytest.mark.slow
def test_beams_do_not_find_less_than_the_best_token_each_time(model):
    prompts = [[3, 1, 4], [1], [5, 9, 2, 6, 5]]
    simple = generate(model, prompts, DecodingOptions(max_new_tokens=7))
    beams = generate(model, prompts, DecodingOptions(max_new_tokens=7, beams=4, batch_size=2))
    for one, other in zip(simple, beams, strict=True):
        assert other.log_probability >= one.log_probability - 1e-4
    assert any(
        other.log_probability > one.log_probability + 1e-3 for one, other in zip(simple, beams, strict=True)
    )


@pytest.mark.slow
def test_beams_are_those_of_each_prompt_alone(model):
    prompts = [[3, 1, 4], [1], [5, 9, 2, 6, 5]]
    options = DecodingOptions(max_new_tokens=5, beams=3)
    together = generate(model, prompts, options, stop=[2])
    for prompt, expected in zip(prompts, together, strict=True):
        assert generate(model, [prompt], options, stop=[2])[0].ids.tolist() == expected.ids.tolist()


CANDIDATES = [[5, 6, STOP], [5, STOP], [7, 1, 2, 3, STOP], [9]]


@pytest.mark.slow
def test_candidates_have_the_probability_that_the_forward_pass_gives(model):
    prompts = [[3, 1, 4], [1], [5, 9, 2, 6, 5]]
    found = score(model, prompts, CANDIDATES, batch_size=2)
    expected = [[probability(model, prompt, answer) for answer in CANDIDATES] for prompt in prompts]
    np.testing.assert_allclose(found, expected, atol=1e-3)
    lengths = [len(answer) for answer in CANDIDATES]
    np.testing.assert_allclose(
        score(model, prompts, CANDIDATES, per_token=True), np.array(expected) / lengths, atol=1e-3
    )


@pytest.mark.slow
def test_answers_come_from_the_list_whatever_is_drawn(model):
    answers = [[5, 6], [5], [7, 1, 2, 3], [5, 6, 8]]
    trie = make_trie(answers, STOP)
    prompts = [[1, 2], [3], [4, 5, 6]] * 10
    options = DecodingOptions(max_new_tokens=8, temperature=2.0)
    found = generate(model, prompts, options, stop=[STOP], trie=trie)
    assert all(each.finished and each.ids.tolist() in answers for each in found)
    assert len({tuple(each.ids) for each in found}) > 1


@pytest.mark.slow
def test_beams_over_a_list_find_its_most_probable_answer(model):
    answers = [[5, 6], [5], [7, 1, 2, 3], [5, 6, 8], [4]]
    trie = make_trie(answers, STOP)
    prompts = [[1, 2], [3], [4, 5, 6]]
    options = DecodingOptions(max_new_tokens=6, beams=6, length_penalty=0.0)
    found = generate(model, prompts, options, stop=[STOP], trie=trie)
    best = score(model, prompts, [[*answer, STOP] for answer in answers])
    for each, row in zip(found, best, strict=True):
        assert each.ids.tolist() == answers[int(row.argmax())]
        assert each.log_probability == pytest.approx(row.max(), abs=1e-3)


def test_lists_that_allow_nothing_are_refused(model):
    for answers in ([], [[]], [[1, STOP]]):
        with pytest.raises(ConfigError, match="allowed answer"):
            make_trie(answers, STOP)
    with pytest.raises(ConfigError, match="candidate"):
        score(model, [[1]], [])
