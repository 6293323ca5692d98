"""Generation is what step-by-step use of the forward pass gives, whatever else is in the batch."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sct.errors import ConfigError, DataError
from sct.generation import cache
from sct.generation.decoding import DecodingOptions
from sct.generation.generate import generate
from sct.generation.sampling import Sampling, Uses, adjusted, choose
from sct.generation.scoring import score
from sct.models import lora
from sct.nn.paths import flatten, unflatten
from sct.weights.pretrained import boxed_shapes
from tests.generation.conftest import log_softmax, logits

PROMPTS = ([3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9, 3], [2])


@pytest.mark.slow
def test_reading_with_a_cache_is_reading_the_whole_text(model):
    rng, config = np.random.default_rng(0), model.config
    ids = rng.integers(0, config.vocab_size, (3, 14))
    attention_mask = np.arange(14) >= np.array([0, 4, 2])[:, None]
    whole = model.apply(input_ids=ids, attention_mask=attention_mask.astype(int))["logits"]
    parts, kept, found = cache.layers_of(model.variables, config), cache.empty(config, 3, 20), []
    for first, last in ((0, 6), (6, 9), (9, 10), (10, 11), (11, 14)):
        hidden, kept = cache.extend(
            config, parts, kept, ids[:, first:last], attention_mask[:, first:last], first == 0
        )
        found.append(cache.scores_of(config, parts, hidden))
    np.testing.assert_allclose(
        np.concatenate(found, axis=1)[attention_mask], np.asarray(whole)[attention_mask], atol=2e-5
    )


def greedy(model, prompt, new, stop=()):
    ids = list(prompt)
    for _ in range(new):
        ids.append(int(logits(model, ids)[-1].argmax()))
        if ids[-1] in stop:
            break
    return ids[len(prompt) :]


@pytest.mark.slow
def test_without_temperature_the_best_token_is_taken_each_time(model):
    found = generate(model, PROMPTS, DecodingOptions(max_new_tokens=6, batch_size=3))
    for prompt, answer in zip(PROMPTS, found, strict=True):
        expected = greedy(model, prompt, 6)
        assert answer.ids.tolist() == expected
        assert not answer.finished
        scores = log_softmax(logits(model, [*prompt, *expected]))[len(prompt) - 1 : -1]
        assert answer.log_probability == pytest.approx(scores[np.arange(6), expected].sum(), abs=1e-3)


def test_a_stop_token_ends_its_own_answer_alone(gpt2):
    free = generate(gpt2, PROMPTS[1:], DecodingOptions(max_new_tokens=12))
    stop = int(free[0].ids[3])
    found = generate(gpt2, PROMPTS[1:], DecodingOptions(max_new_tokens=12), stop=[stop])
    for before, after in zip(free, found, strict=True):
        ends = np.flatnonzero(before.ids == stop)
        assert after.finished == bool(len(ends))
        assert after.ids.tolist() == before.ids[: ends[0] if len(ends) else None].tolist()
    assert found[0].finished


@pytest.mark.slow
def test_an_answer_depends_on_its_seed_and_not_on_the_batch(model):
    options = DecodingOptions(max_new_tokens=8, temperature=1.0, top_p=0.95)
    together = generate(model, PROMPTS, options, seeds=[5, 6, 7, 8])
    for number, prompt in enumerate(PROMPTS):
        alone = generate(model, [prompt], options, seeds=[5 + number])[0]
        assert alone.ids.tolist() == together[number].ids.tolist()
    other = generate(model, PROMPTS, options, seeds=[1, 2, 3, 4])
    assert any(a.ids.tolist() != b.ids.tolist() for a, b in zip(together, other, strict=True))


def draws(scores, number, **changes):
    """Relative frequencies of tokens drawn from one row of scores."""
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "penalty": 1.0, **changes}
    sampling = Sampling(
        *(jnp.full(number, value) for value in values.values()), jnp.arange(number, dtype=jnp.uint32)
    )
    uses = Uses(True, values["top_k"] > 0, values["top_p"] < 1, False)
    rows = jnp.broadcast_to(jnp.asarray(scores, jnp.float32), (number, len(scores)))
    chosen = choose(adjusted(rows, sampling, None, uses), sampling, jnp.asarray(2), uses)
    return np.bincount(np.asarray(chosen), minlength=len(scores)) / number


def test_tokens_are_drawn_as_often_as_they_should():
    scores = np.random.default_rng(1).normal(size=12) * 1.5
    for changes, expected in (
        ({}, np.exp(log_softmax(scores))),
        ({"temperature": 0.5}, np.exp(log_softmax(scores / 0.5))),
        ({"top_k": 3}, np.where(scores >= np.sort(scores)[-3], np.exp(scores), 0)),
        ({"top_p": 0.6}, nucleus(np.exp(log_softmax(scores)), 0.6)),
    ):
        expected = expected / expected.sum()
        found = draws(scores, 20_000, **changes)
        assert (found[expected == 0] == 0).all()
        # Five standard deviations of a binomial share.
        assert (np.abs(found - expected) < 5 * np.sqrt(expected * (1 - expected) / 20_000) + 1e-9).all(), (
            changes
        )


def nucleus(probabilities, share):
    order = np.argsort(-probabilities)
    kept = order[: np.searchsorted(np.cumsum(probabilities[order]), share) + 1]
    return np.where(np.isin(np.arange(len(probabilities)), kept), probabilities, 0)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([2, 7, 700]), st.integers(1, 20), st.floats(0.05, 0.99))
def test_what_is_kept_is_what_sorting_would_keep(seed, size, k, p):
    scores = np.random.default_rng(seed).normal(size=(2, size)).astype(np.float32) * 3
    fields = (1.0, k, 1.0, 1.0, 0), (1.0, 0, p, 1.0, 0)
    for by_k, by_p in ((True, False), (False, True)):
        sampling = Sampling(*(jnp.asarray(pair) for pair in zip(*fields, strict=True)))
        kept = (
            np.asarray(adjusted(jnp.asarray(scores), sampling, None, Uses(True, by_k, by_p, False))) > -1e20
        )
        if by_k:
            assert kept[0].sum() == min(k, size)
            assert scores[0][kept[0]].min() >= scores[0][~kept[0]].max(initial=-np.inf)
            assert kept[1].all()
        else:
            probabilities = np.exp(log_softmax(scores[1].astype(np.float64)))
            total = np.sort(probabilities)[::-1].cumsum()
            # One more or less where a sum meets the share within rounding.
            assert (
                abs(int(kept[1].sum()) - int(np.searchsorted(total, p) + 1))
                <= (np.abs(total - p) < 1e-5).any()
            )
            assert kept[0].all()


def test_a_penalty_lowers_what_is_there_already():
    scores = jnp.asarray([[2.0, -1.0, 1.5, 0.5]])
    seen = jnp.asarray([[True, True, False, False]])
    sampling = Sampling(*(jnp.asarray([value]) for value in (0.0, 0, 1.0, 2.0, 0)))
    found = adjusted(scores, sampling, seen, Uses(False, False, False, True))
    np.testing.assert_allclose(found, [[1.0, -2.0, 1.5, 0.5]])


@pytest.mark.slow
def test_repetition_is_penalised_in_prompt_and_answer(gpt2):
    strict = DecodingOptions(max_new_tokens=6, repetition_penalty=1e6)
    prompt = [1, 2, 3]
    found = generate(gpt2, [prompt], strict)[0].ids.tolist()
    assert len({*prompt, *found}) == 9  # nothing comes twice while there is something new


def test_what_fills_up_a_prompt_is_no_repetition(gpt2):
    """Rows are filled up with zeros; here 0 is the only token that the prompt does not hold."""
    prompt = list(range(1, 11))
    assert generate(gpt2, [prompt], DecodingOptions(max_new_tokens=6))[0].ids[0] != 0
    assert generate(gpt2, [prompt], DecodingOptions(max_new_tokens=6, repetition_penalty=1e6))[0].ids[0] == 0


def test_generation_compiles_once_for_prompts_of_like_length(gpt2):
    from sct.generation import generate as module

    options = DecodingOptions(max_new_tokens=3, batch_size=2)
    generate(gpt2, [[1], [2, 3]], options)
    size = module.decode._cache_size()
    generate(gpt2, [[4, 5, 6], [7], [8, 9]], options)
    assert module.decode._cache_size() == size


@pytest.mark.parametrize(
    ("prompts", "changes", "error", "words"),
    [
        ([[]], {"max_new_tokens": 4}, DataError, "prompt 0.*tokens"),
        ([[1], [99]], {"max_new_tokens": 4}, DataError, "token id 99"),
        ([[-1]], {"max_new_tokens": 4}, DataError, "token id -1"),
        ([[1] * 120], {"max_new_tokens": 50}, DataError, "160 positions"),
        ([[1]], {"top_p": 0.9}, ConfigError, "temperature"),
        ([[1]], {"top_p": 1.5, "temperature": 1.0}, ConfigError, "top_p"),
        ([[1]], {"beams": 2, "temperature": 1.0}, ConfigError, "beams"),
        ([[1]], {"max_new_tokens": 0}, ConfigError, "max_new_tokens"),
    ],
)
def test_what_cannot_be_done_is_refused(gpt2, prompts, changes, error, words):
    with pytest.raises(error, match=words):
        generate(gpt2, prompts, DecodingOptions(**changes))


def test_seeds_must_be_as_many_as_prompts(gpt2):
    with pytest.raises(ConfigError, match="2 seeds"):
        generate(gpt2, [[1], [2], [3]], DecodingOptions(max_new_tokens=2), seeds=[1, 2])


def test_sixteen_bits_generate_too(gpt2):
    half = dataclasses.replace(gpt2, config=dataclasses.replace(gpt2.config, dtype="bfloat16"))
    kept = jax.eval_shape(lambda: cache.empty(half.config, 1, 4))
    assert kept.keys[0].dtype == jnp.bfloat16
    assert len(generate(half, [[1, 2]], DecodingOptions(max_new_tokens=4))[0].ids) == 4


def test_rotary_models_go_on_behind_the_length_they_were_made_for(model):
    """Positions that are learned end with their table; angles follow from the number of a position."""
    short = dataclasses.replace(model, config=dataclasses.replace(model.config, max_length=8))
    prompts, options = [PROMPTS[1], PROMPTS[2]], DecodingOptions(max_new_tokens=6)
    if model.family == "gpt2":
        with pytest.raises(DataError, match=r"prompt 1 .*9 tokens .*8 positions"):
            generate(short, prompts, options)
        with pytest.raises(DataError, match=r"prompt 0 .*7 tokens"):
            score(short, [[1] * 7], [[1, 2]])
        return
    found = generate(short, prompts, options)
    assert [each.ids.tolist() for each in found] == [greedy(model, prompt, 6) for prompt in prompts]
    np.testing.assert_allclose(
        score(short, prompts, [each.ids for each in found]).diagonal(),
        [each.log_probability for each in found], atol=1e-4,
    )  # fmt: skip


@pytest.mark.slow
def test_rows_of_the_table_that_no_token_has_are_never_chosen_and_count(gpt2):
    """A table may be larger than the vocabulary; probabilities are those of the model, wherever they are asked for."""
    wide = dataclasses.replace(gpt2, tokenizer=SimpleNamespace(vocab_size=6, eos=None))
    free = generate(gpt2, PROMPTS, DecodingOptions(max_new_tokens=6))
    assert max(each.ids.max() for each in free) >= 6
    for beams in (1, 2):
        found = generate(wide, PROMPTS, DecodingOptions(max_new_tokens=6, beams=beams))
        assert max(each.ids.max() for each in found) < 6
        expected = score(wide, PROMPTS, [each.ids for each in found]).diagonal()
        np.testing.assert_allclose([each.log_probability for each in found], expected, atol=1e-3)


@pytest.mark.slow
def test_adapters_generate_as_the_model_they_are_merged_into(gpt2):
    boxed = boxed_shapes("gpt2", gpt2.config)["params"]
    adapters = nn.unbox(lora.init(jax.random.key(0), boxed, lora.LoraConfig((".",), rank=3, alpha=6.0)))
    rng = np.random.default_rng(0)
    trained = {
        path: jnp.asarray(0.5 * rng.normal(size=value.shape), value.dtype)
        if path.endswith("lora_b")
        else value
        for path, value in flatten(adapters).items()
    }
    adapted = dataclasses.replace(gpt2, variables={**gpt2.variables, "adapters": unflatten(trained)})
    merged = dataclasses.replace(gpt2, variables=lora.merge(adapted.variables))
    prompts, options = PROMPTS[:2], DecodingOptions(max_new_tokens=6)
    base, one, other = (generate(each, prompts, options) for each in (gpt2, adapted, merged))
    for plain, beside, within in zip(base, one, other, strict=True):
        assert beside.ids.tolist() == within.ids.tolist() != plain.ids.tolist()
        assert beside.log_probability == pytest.approx(within.log_probability, abs=1e-3)


@pytest.mark.parametrize("beams", [1, 2])
def test_the_bar_is_shown_where_it_is_wanted(gpt2, monkeypatch, beams):
    from sct.generation import decoding as module

    shown, original = [], module.progress

    def recording(*given, active):
        shown.append(active)
        return original(*given, active=active)

    monkeypatch.setattr(module, "progress", recording)
    for active in (True, False):
        generate(gpt2, [[1], [2]], DecodingOptions(max_new_tokens=2, beams=beams), progress_bar=active)
    assert shown == [True, False]
