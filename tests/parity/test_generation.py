"""Generated tokens, beams, drawn distributions and scores of answers beside `transformers`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sct
from sct.generation.decoding import DecodingOptions
from sct.generation.generate import generate
from sct.generation.sampling import Sampling, Uses, adjusted
from sct.generation.scoring import score

from . import foreign

torch = pytest.importorskip("torch", reason=foreign.REASON.format("torch"))
transformers = pytest.importorskip("transformers", reason=foreign.REASON.format("transformers"))

PAD, NEW = 0, 16
CASES = {"gpt2": "plain", "neox": "plain", "llama": "grouped"}


@pytest.fixture(scope="module", params=CASES)
def models(request, tmp_path_factory):
    """A model of `transformers`, and the same of ours."""
    theirs = foreign.make(request.param, CASES[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return theirs, sct.load(folder)


@pytest.fixture(scope="module")
def prompts() -> list[np.ndarray]:
    """Of unequal length; the first token of each is the one that `transformers` fills up with.

    It counts what stands in the padding as repeated, and so would be of another mind about that token.
    """
    rng = np.random.default_rng(0)
    return [np.append(PAD, rng.integers(1, 61, length)) for length in (3, 9, 0, 14, 6, 5)]


def padded(prompts) -> dict[str, Any]:
    """Inputs of `transformers`, filled up on the left."""
    longest = max(map(len, prompts))
    ids, mask = np.full((2, len(prompts), longest), PAD)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = prompt, 1
    return {"input_ids": torch.as_tensor(ids), "attention_mask": torch.as_tensor(mask)}


def their_output(theirs, prompts, new=NEW, **options):
    """What `transformers` generates, without drawing."""
    with torch.no_grad():
        return theirs.generate(
            **padded(prompts), max_new_tokens=new, do_sample=False, pad_token_id=PAD,
            return_dict_in_generate=True, output_logits=True, **options,
        )  # fmt: skip


def answers(found, prompts, stop) -> list[tuple[list[int], bool]]:
    """Tokens behind each prompt up to the first stop token, and whether there is one."""
    rows = found.sequences[:, max(map(len, prompts)) :].tolist()
    ends = [next((place for place, token in enumerate(row) if token in stop), None) for row in rows]
    return [(row[:end], end is not None) for row, end in zip(rows, ends, strict=True)]


def ours(model, prompts, stop, **options):
    found = generate(
        model, prompts, DecodingOptions(**{"max_new_tokens": NEW, "batch_size": 4, **options}), stop=stop,
        progress_bar=False,
    )  # fmt: skip
    return found, [(each.ids.tolist(), each.finished) for each in found]


def ends_of(theirs, prompts) -> list[int]:
    """Two tokens that end some answers of the model, not all, and some of them later than others."""
    free = their_output(theirs, prompts, eos_token_id=None)
    rows = free.sequences[:, max(map(len, prompts)) :].numpy()
    best = torch.stack(free.logits).topk(2, dim=-1).values
    assert float((best[..., 0] - best[..., 1]).min()) > 1e-4, "equal scores, which rounding would decide"
    places = {
        token: [int((row == token).argmax()) for row in rows if (row == token).any()] for token in range(61)
    }
    able = [token for token, where in places.items() if 0 < len(where) < len(rows) and max(where) > 1]
    return sorted(able, key=lambda token: (-len(set(places[token])), token))[:2]


def test_the_best_token_each_time_until_one_that_ends(models, prompts):
    theirs, model = models
    stop = ends_of(theirs, prompts)
    found, made = ours(model, prompts, stop)
    assert made == answers(their_output(theirs, prompts, eos_token_id=stop), prompts, stop)
    assert 0 < sum(each.finished for each in found) < len(prompts)
    assert len({len(each.ids) for each in found}) > 2


def test_repetitions_are_penalised_alike(models, prompts):
    theirs, model = models
    plain = answers(their_output(theirs, prompts, eos_token_id=None), prompts, [])
    for penalty in (1.3, 0.8):
        given = {"repetition_penalty": penalty}
        free = answers(their_output(theirs, prompts, eos_token_id=None, **given), prompts, [])
        assert free != plain
        stop = free[0][0][3:4]
        expected = answers(their_output(theirs, prompts, eos_token_id=stop, **given), prompts, stop)
        assert ours(model, prompts, stop, **given)[1] == expected
        assert expected[0][1]


@pytest.mark.parametrize("beams", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_beams_find_the_same_answers_with_the_same_scores(models, prompts, beams):
    """`early_stopping="never"` is our rule."""
    theirs, model = models
    stop = ends_of(theirs, prompts)[:1]
    finished = []
    for length_penalty in (0.5, 1.0, 2.0, 0.0):
        given = {"length_penalty": length_penalty}
        found, made = ours(model, prompts, stop, beams=beams, **given)
        expected = their_output(
            theirs, prompts, eos_token_id=stop, num_beams=beams, early_stopping="never", output_scores=True,
            num_return_sequences=2, **given,
        )  # fmt: skip
        scores = expected.sequences_scores.numpy().reshape(len(prompts), 2)
        assert (scores[:, 0] - scores[:, 1] > 1e-5).all(), "a tie, which rounding would decide"
        assert made == answers(expected, prompts, stop)[::2]
        lengths = np.array([len(each.ids) + each.finished for each in found])
        own = np.array([each.log_probability for each in found]) / lengths**length_penalty
        np.testing.assert_allclose(own, scores[:, 0], rtol=1e-5, atol=1e-5)
        finished += [each.finished for each in found]
    assert 0 < sum(finished) < len(finished)


def test_a_search_ends_when_no_beam_can_become_the_best(prompts, tmp_path):
    """One prompt at a time, because a search that has ended goes on beside others; a rule that looks at the present
    length ends some of these too early.
    """
    theirs = foreign.make("llama", "grouped")
    theirs.save_pretrained(tmp_path)
    model = sct.load(tmp_path)
    stop = ends_of(theirs, prompts)[1:]
    for length_penalty in (1.0, 2.0):
        given = {"length_penalty": length_penalty}
        _, made = ours(model, prompts, stop, beams=2, batch_size=1, **given)
        full, early = (
            answers(
                their_output(theirs, prompts, eos_token_id=stop, num_beams=2, early_stopping=rule, **given),
                prompts,
                stop,
            )
            for rule in ("never", False)
        )
        assert made == full != early


def test_rotary_models_go_on_behind_the_length_they_were_made_for(tmp_path):
    """The angle of a position follows from its number; there is no table that ends."""
    theirs = foreign.make("llama", "llama3")
    theirs.save_pretrained(tmp_path)
    model, rng = sct.load(tmp_path), np.random.default_rng(1)
    prompts = [rng.integers(0, 61, length) for length in (35, 44)]
    assert model.config.max_length == 40
    expected = answers(their_output(theirs, prompts, eos_token_id=None), prompts, [])
    assert ours(model, prompts, [])[1] == expected


def test_scores_of_answers_are_sums_over_their_tokens(models, prompts):
    theirs, model = models
    rng = np.random.default_rng(2)
    candidates = [rng.integers(0, 61, length) for length in (1, 4, 2, 7)]
    expected = np.zeros((len(prompts), len(candidates)))
    for row, prompt in enumerate(prompts):
        for column, candidate in enumerate(candidates):
            whole = torch.as_tensor(np.concatenate([prompt, candidate])[None])
            with torch.no_grad():
                logs = torch.log_softmax(theirs(whole).logits[0, len(prompt) - 1 : -1].double(), dim=-1)
            expected[row, column] = logs[torch.arange(len(candidate)), torch.as_tensor(candidate)].sum()
    assert np.ptp(expected) > 5
    np.testing.assert_allclose(
        score(model, prompts, candidates, batch_size=4), expected, rtol=1e-4, atol=1e-4
    )


# Distributions that are drawn from.

ROWS = 24


def their_distribution(scores, temperature, top_k, top_p) -> np.ndarray:
    """Scores (V,) behind the warpers of `transformers`, in the order of its `generate`."""
    warpers = [transformers.TemperatureLogitsWarper(temperature)]
    warpers += [transformers.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [transformers.TopPLogitsWarper(top_p)] if top_p < 1 else []
    rows = torch.as_tensor(scores[None])
    return transformers.LogitsProcessorList(warpers)(None, rows)[0].numpy()


def drawn_from(temperature, top_k, top_p, penalty=1.0) -> Sampling:
    """Options of each row, of arrays or of a number for all."""
    values = (np.broadcast_to(each, ROWS) for each in (temperature, top_k, top_p, penalty, 0))
    return Sampling(*map(jnp.asarray, values))


def distribution(scores) -> np.ndarray:
    return np.asarray(jax.nn.softmax(jnp.asarray(scores), axis=-1), np.float64)


@pytest.mark.parametrize("size", [7, 300, 50_257])
@pytest.mark.parametrize("spread", [0.01, 2.0, 30.0])
def test_tokens_are_drawn_from_the_distribution_of_the_warpers(size, spread):
    """Rows with options of their own, in one call; few tokens are sorted at first, and all where that is too few."""
    rng = np.random.default_rng(size)
    scores = (spread * rng.normal(size=(ROWS, size))).astype(np.float32)
    temperature = rng.choice([0.1, 0.7, 1.0, 1.5], ROWS).astype(np.float32)
    top_k = rng.choice([0, 1, 3, 50, 300], ROWS)
    top_p = np.where(rng.random(ROWS) < 0.2, 1.0, rng.uniform(0.02, 0.999, ROWS)).astype(np.float32)
    sampling = drawn_from(temperature, top_k, top_p)
    found = distribution(adjusted(jnp.asarray(scores), sampling, None, Uses(True, True, True, False)))
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)
    kept = []
    for row in range(ROWS):
        options = float(temperature[row]), int(top_k[row]), float(top_p[row])
        expected = distribution(their_distribution(scores[row], *options))
        before = distribution(their_distribution(scores[row], *options[:2], 1.0))
        differ = (found[row] > 0) != (expected > 0)
        # Sums over many tokens meet the share within rounding: one more or less for each of them that does.
        near = np.abs(np.cumsum(np.sort(before)[::-1]) - options[2]) < 1e-5
        assert differ.sum() <= near.sum(), options
        np.testing.assert_allclose(found[row], expected, rtol=1e-4, atol=1e-6 + 2e-5 * differ.any())
        kept.append((found[row] > 0).sum())
    assert len(set(kept)) > 2


def test_of_equal_scores_all_are_kept():
    """`transformers` keeps those of equal scores that its sorting puts last."""
    rng = np.random.default_rng(0)
    scores = np.round(rng.normal(size=(ROWS, 400)) * 2).astype(np.float32)
    top_p = rng.uniform(0.05, 0.95, ROWS).astype(np.float32)
    sampling = drawn_from(1.0, 60, top_p)
    found = distribution(adjusted(jnp.asarray(scores), sampling, None, Uses(True, True, True, False)))
    more = 0
    for row in range(ROWS):
        expected = np.isfinite(their_distribution(scores[row], 1.0, 60, float(top_p[row])))
        np.testing.assert_array_equal(found[row] > 0, scores[row] >= scores[row][expected].min())
        more += int((found[row] > 0).sum() > expected.sum())
    assert more > ROWS / 2


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.7])
def test_what_was_there_is_penalised_as_by_the_processor(penalty):
    rng = np.random.default_rng(3)
    scores = (3 * rng.normal(size=(ROWS, 90))).astype(np.float32)
    ids = rng.integers(0, 90, (ROWS, 12))
    seen = np.zeros((ROWS, 90), bool)
    seen[np.arange(ROWS)[:, None], ids] = True
    uses = Uses(False, False, False, True)
    found = adjusted(jnp.asarray(scores), drawn_from(0.0, 0, 1.0, penalty), jnp.asarray(seen), uses)
    processor = transformers.RepetitionPenaltyLogitsProcessor(penalty)
    expected = processor(torch.as_tensor(ids), torch.as_tensor(scores)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-6)
