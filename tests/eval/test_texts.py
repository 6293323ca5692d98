"""Generated texts: laws of the measures, and reports that tell texts about a study from texts about any."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sct.errors import ConfigError, DataError, MissingExtraError
from sct.eval.generation import texts as txt


def needs(module: str, extra: str):
    return pytest.mark.skipif(
        find_spec(module) is None, reason=f'needs {module}: pip install "sct-jax[{extra}]"'
    )


needs_pot, needs_sacrebleu, needs_rouge = (
    needs("ot", "analysis"),
    needs("sacrebleu", "text"),
    needs("rouge_score", "text"),
)
laws = settings(max_examples=30, deadline=None)

TRUE = [
    "Single-cell profiles of the human retina reveal rods, cones and Mueller glia of the eye.",
    "A map of the liver describes hepatocytes, cholangiocytes and stellate cells of human donors.",
    "Fallopian tubes have ciliated and secretory epithelium that changes in hydrosalpinx.",
    "Thymus seeding progenitors give rise to lymphocytes of the early T lineage.",
    "The colon hosts microbiota and immune niches with regulatory lymphocytes and plasma cells.",
    "Severe influenza and coronavirus infections raise interferon in monocytes of blood.",
]
ABOUT = [
    "Rods and cones of the retina were profiled together with glia of the eye.",
    "Hepatocytes and stellate cells of the liver were described in donors.",
    "Secretory and ciliated epithelium of the tubes changes in hydrosalpinx.",
    "Progenitors of the thymus give rise to the T lineage.",
    "Microbiota and plasma cells have niches in the colon.",
    "Interferon of monocytes is raised in severe influenza.",
]
TRAINING = [
    "Neurons of the cortex and glia were profiled.",
    "Cells of the heart and its vessels were described.",
    "Kidney tubules of human donors were profiled.",
    "Profiles of cells of human skin were described.",
]
PAIRS = np.repeat(np.arange(6), 3)
GENERATED = [ABOUT[i] for i in PAIRS]


def rows(report) -> dict[str, dict]:
    return {row[0]: dict(zip(report.titles, row, strict=True)) for row in report.rows}


def blobs(n: int = 5, each: int = 4, noise: float = 0.2, seed: int = 0):
    """Embeddings of n true texts and of `each` texts around every one."""
    rng = np.random.default_rng(seed)
    true = rng.normal(size=(n, 8))
    pairs = np.repeat(np.arange(n), each)
    return true[pairs] + rng.normal(0, noise, (n * each, 8)), true, pairs


# Similarity


def test_texts_near_their_own_are_told_from_texts_that_are_not():
    made, true, pairs = blobs()
    found = txt.similarity(made, true, pairs)
    assert found.own > 0.9 > 0.5 > found.others
    assert found.t > 3
    assert found.t_p < 0.01 > found.ks_p
    assert found.ks > 0.9
    assert found.pearson > 0.9 > 0.5
    wrong = txt.similarity(made, true, (pairs + 1) % 5)
    assert wrong.own < found.own
    assert wrong.t < 2
    same = txt.similarity(true, true, np.arange(5))
    assert same.own == same.pearson == same.spearman == pytest.approx(1)


def test_the_tests_are_those_of_the_mean_similarities():
    made, true, pairs = blobs(n=4, noise=1)
    unit = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in (made, true)]
    means = np.stack([(unit[0] @ unit[1].T)[pairs == i].mean(axis=0) for i in range(4)])
    own, others = np.diag(means), means[~np.eye(4, dtype=bool)]
    found = txt.similarity(made, true, pairs)
    assert (found.own, found.others) == pytest.approx((own.mean(), others.mean()))
    assert (found.t, found.t_p) == pytest.approx(tuple(stats.ttest_ind(own, others)))
    assert (found.ks, found.ks_p) == pytest.approx(tuple(stats.ks_2samp(own, others)[:2]))


@laws
@given(st.integers(0, 10_000))
def test_similarity_does_not_depend_on_order_or_length(seed):
    made, true, pairs = blobs(seed=seed, noise=0.7)
    rng = np.random.default_rng(seed)
    found = txt.similarity(made, true, pairs)
    order, studies = rng.permutation(len(made)), rng.permutation(len(true))
    again = txt.similarity(made[order], true[studies], np.argsort(studies)[pairs[order]])
    np.testing.assert_allclose(found, again)
    scaled = txt.similarity(made * 3, true * rng.uniform(0.5, 2, (5, 1)), pairs)
    np.testing.assert_allclose(found, scaled)


def test_studies_of_which_nothing_was_generated_are_others_and_one_text_has_no_others():
    made, true, pairs = blobs()
    part = txt.similarity(made[pairs < 2], true, pairs[pairs < 2])
    assert np.isfinite(part).all()
    alone = txt.similarity(made[:4], true[:1], pairs[:4])
    assert np.isnan([alone.others, alone.t, alone.ks]).all()
    assert np.isfinite(alone.own)
    nothing = txt.similarity(np.zeros((4, 8)), true[:2], [0, 0, 1, 1])
    assert nothing.own == 0
    assert np.isnan(nothing.pearson)


def test_what_does_not_fit_is_an_error():
    made, true, pairs = blobs()
    for arguments, message in (
        ((made, true, pairs[:3]), "row number"),
        ((made, true, pairs.astype(float)), "row number"),
        ((made, true, pairs + 1), "true texts"),
        ((made[:, :3], true, pairs), "columns"),
        ((made * np.nan, true, pairs), "NaN"),
    ):
        with pytest.raises(DataError, match=message):
            txt.similarity(*arguments)


# Distributions


@laws
@given(st.integers(0, 10_000), st.integers(1, 12))
def test_equal_sets_have_no_discrepancy_and_order_does_not_matter(seed, n):
    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=(n, 3)), rng.normal(1, 1, size=(7, 3))
    assert txt.mmd(first, rng.permutation(first)) == pytest.approx(0, abs=1e-7)
    found = txt.mmd(first, second)
    assert found == pytest.approx(txt.mmd(second, rng.permutation(first)))
    assert found == pytest.approx(txt.mmd(first * 5 + 1, second * 5 + 1))  # the scale is that of the points
    assert 0 < found <= np.sqrt(2)


def test_the_discrepancy_of_two_points_is_done_by_hand():
    # One distance, which is the scale: kernel exp(-1/2).
    assert txt.mmd(np.array([[0.0]]), np.array([[3.0]])) == pytest.approx(np.sqrt(2 - 2 * np.exp(-0.5)))
    assert txt.mmd(np.ones((3, 2)), np.ones((2, 2))) == 0
    rng = np.random.default_rng(0)
    near, far = (txt.mmd(rng.normal(size=(50, 2)), rng.normal(shift, 1, (50, 2))) for shift in (0, 3))
    assert near < 0.4 * far


@needs_pot
def test_the_wasserstein_distance_is_that_of_a_shift():
    points = np.random.default_rng(0).normal(size=(12, 3))
    assert txt.wasserstein(points, points[::-1]) == 0
    assert txt.wasserstein(points, points + np.array([3, 4, 0])) == pytest.approx(5)
    assert txt.wasserstein(np.array([[0.0], [1.0]]), np.array([[0.0]])) == pytest.approx(0.5)


# Words


@needs_sacrebleu
@needs_rouge
def test_equal_texts_are_the_best_and_texts_without_a_common_word_the_worst():
    assert txt.bleu(TRUE, TRUE) == pytest.approx(100)
    assert txt.rouge(TRUE, TRUE) == pytest.approx(dict.fromkeys(txt.ROUGE, 1))
    assert txt.bleu(["alpha beta gamma delta"], ["one two three four"]) < 15
    assert txt.rouge(["alpha beta"], ["one two"]) == dict.fromkeys(txt.ROUGE, 0)
    # Two of two words, two of four: F is 2/3; one of one pair, one of three: F is 1/2.
    found = txt.rouge(["one two"], ["one two three four"])
    assert found == pytest.approx({"rouge1": 2 / 3, "rouge2": 1 / 2, "rougeL": 2 / 3})
    with pytest.raises(DataError, match=r"\b1 generated"):
        txt.bleu(["a"], TRUE)


@pytest.mark.parametrize(
    ("module", "call", "extra"),
    [
        ("sacrebleu", lambda: txt.bleu(["a"], ["a"]), "text"),
        ("rouge_score.rouge_scorer", lambda: txt.rouge(["a"], ["a"]), "text"),
        ("ot", lambda: txt.wasserstein(np.ones((1, 1)), np.ones((1, 1))), "analysis"),
    ],
)
def test_without_a_library_an_error_says_what_to_install(monkeypatch, module, call, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf'pip install "sct-jax\[{extra}\]"'):
        call()


# Embedding by words


def test_texts_that_share_words_are_near_and_unknown_words_do_not_count():
    embed = txt.tfidf_embedding(TRUE)
    points = embed([*TRUE, TRUE[0] + " zebra", ABOUT[0], "zebra"])
    assert points.shape == (9, 5)
    np.testing.assert_allclose(points[6], points[0])
    np.testing.assert_allclose(points[8], 0, atol=1e-12)
    near = points[:6] @ points[7]
    assert near.argmax() == 0
    np.testing.assert_allclose(points, txt.tfidf_embedding(TRUE)([*TRUE, TRUE[0], ABOUT[0], "zebra"]))
    assert txt.tfidf_embedding(TRUE, 2)(TRUE).shape == (6, 2)
    for bad in (TRUE[:1], ["", ""], []):
        with pytest.raises(DataError, match=r"fitted_on"):
            txt.tfidf_embedding(bad)


# Reports


@needs_pot
@needs_sacrebleu
@needs_rouge
def test_texts_about_their_study_are_above_shuffled_ones_and_one_text_for_all():
    report, numbers = txt.compare(
        {"model": GENERATED, "copy": [TRUE[i] for i in PAIRS]}, TRUE, PAIRS, TRAINING, seeds=3
    )
    table = rows(report)
    assert list(table) == [
        "model", "model, pairs shuffled", "copy", "copy, pairs shuffled", txt.DRAWN, txt.TYPICAL,
    ]  # fmt: skip
    model, shuffled = numbers["model"], numbers["model, pairs shuffled"]
    assert model["t"][0] > 5 > 3 > max(map(abs, shuffled["t"]))
    assert model["p (t)"][0] < 0.001
    assert model["cosine (own)"][0] > 0.5 > 0.3 > max(shuffled["cosine (own)"])
    assert model["rouge1"][0] > max(shuffled["rouge1"])
    assert len(shuffled["BLEU"]) == 3
    assert table["model, pairs shuffled"]["MMD"] == "n/a"
    copy = numbers["copy"]
    assert [copy[column][0] for column in ("cosine (own)", "BLEU", "rougeL")] == pytest.approx([1, 100, 1])
    assert (copy["MMD"][0], copy["Wasserstein"][0]) == pytest.approx((0, 0), abs=1e-6)
    assert abs(numbers[txt.TYPICAL]["t"][0]) < 2
    for column in ("MMD", "Wasserstein"):
        assert 0 < model[column][0] < numbers[txt.TYPICAL][column][0]
    assert "TF-IDF" in report.notes[0]
    again, _ = txt.compare(
        {"model": GENERATED, "copy": [TRUE[i] for i in PAIRS]}, TRUE, PAIRS, TRAINING, seeds=3
    )
    assert again.as_dict() == report.as_dict()


def test_an_embedding_of_the_users_is_taken_and_named(monkeypatch):
    for name in ("ot", "sacrebleu", "rouge_score.rouge_scorer"):
        monkeypatch.setitem(sys.modules, name, None)
    calls = []

    def embed(texts):
        calls.append(len(texts))
        return np.array([[len(text), text.count("e"), 1.0] for text in texts])

    report, _ = txt.compare({"model": GENERATED}, TRUE, PAIRS, embed=embed, embedding="lengths", seeds=1)
    table = rows(report)
    assert calls
    assert list(table) == ["model", "model, pairs shuffled"]
    assert "Embedding: lengths." in report.notes
    assert {table["model"][column] for column in ("BLEU", "rouge1", "Wasserstein")} == {"-"}
    assert isinstance(table["model"]["MMD"], list)
    assert [note for note in report.notes if "pip install" in note] == [
        'sacrebleu is not installed: pip install "sct-jax[text]".',
        'rouge-score is not installed: pip install "sct-jax[text]".',
        'POT is not installed: pip install "sct-jax[analysis]".',
    ]


def test_the_most_typical_training_text_is_the_one_nearest_to_all():
    asked = []

    def embed(texts):
        asked.append(set(texts))
        return np.array([[text.count("a"), text.count("z"), 1.0] for text in texts])

    txt.compare({"model": GENERATED}, TRUE, PAIRS, ["zzzz", "a", "aa", "aaa"], embed=embed, seeds=1)
    assert {"aa"} in asked


def test_reports_that_cannot_be_made_are_errors():
    with pytest.raises(DataError, match=r"\b1 true"):
        txt.compare({"m": GENERATED[:3]}, TRUE[:1], PAIRS[:3])
    with pytest.raises(DataError, match=r"3 texts of 'm'"):
        txt.compare({"m": GENERATED[:3]}, TRUE, PAIRS)
    with pytest.raises(ConfigError, match="seeds"):
        txt.compare({"m": GENERATED}, TRUE, PAIRS, seeds=0)
    with pytest.raises(ConfigError, match="another name"):
        txt.compare({txt.DRAWN: GENERATED}, TRUE, PAIRS, TRAINING)
