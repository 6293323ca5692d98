"""The natural protocol: what is scored, what its numbers mean, and that no method looks at what is hidden."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from sct.eval import metrics, natural
from sct.eval.baselines import OTHER_CELLS, THESE_CELLS, TRAINING
from sct.eval.held_out import mask_measured
from sct.eval.natural import GeneMean, ModelEstimator, Row, natural_imputation
from sct.eval.scoring import Model
from tests.eval.toy_cells import GENES, NUM_BINS, hold_out, source, study

TRAIN, HELD_OUT = study(60, seed=1, name="train"), study(40, seed=2, name="held out")


def oracle(variables, shown, coordinates):
    """Knows the tokens of the only bag."""
    return jax.nn.one_hot(variables, NUM_BINS)


def contextual(variables, shown, coordinates):
    """Depends on all of the bag."""
    mean = shown.astype(jnp.float32).mean(axis=(1, 2), keepdims=True)
    score = jnp.sin(jnp.arange(shown.shape[-1]) * 1.3 + shown * 0.7 + 5 * mean)
    return jax.nn.softmax(score[..., None] * jnp.arange(1, NUM_BINS + 1))


def constant(chance):
    return Model(lambda variables, shown, coordinates: jnp.broadcast_to(chance, (*shown.shape, NUM_BINS)), {})


def test_measured_positions_are_hidden_whatever_their_level_and_all_are_scored():
    made = study(40, seed=2)
    made.measured[[3, 7]] = False
    held_out = hold_out(made)
    masked = mask_measured(held_out, 0.5, 0, most=10**6)
    assert masked.mask.sum(axis=1).tolist() == [5] * 40, "half of the ten measured genes"
    assert not masked.mask[:, [3, 7]].any()
    assert not masked.mask[:, GENES:].any()
    np.testing.assert_array_equal(np.nonzero(masked.mask), (masked.cells, masked.genes))
    truth = held_out.counts.toarray()[masked.cells, masked.genes]
    np.testing.assert_array_equal(masked.counts, truth)
    assert 0.2 < (truth == 0).mean() < 0.8
    few = mask_measured(held_out, 0.5, 0, most=37)
    assert len(few.cells) == 37
    np.testing.assert_array_equal(few.mask, masked.mask)
    assert few.mask[few.cells, few.genes].all()


def test_an_oracle_is_perfect_and_right_probabilities_have_no_calibration_error():
    bags = source(HELD_OUT, cells=40)
    held_out = hold_out(HELD_OUT, cells=40)
    outcome = natural_imputation(
        held_out, Model(oracle, jnp.asarray(bags.bag(0)["tokens"])[None]), ratio=0.4, seeds=2
    )
    numbers = outcome.rows[0].numbers
    assert outcome.rows[0].is_model
    assert numbers["auroc"] == numbers["average_precision"] == numbers["mcc"] == [1, 1]
    assert numbers["ece"] == [0, 0]
    np.testing.assert_allclose(numbers["cross_entropy"], 0, atol=1e-6)
    masked = [mask_measured(held_out, 0.4, seed, 10**6) for seed in range(2)]
    expected = [m.means[m.cells, m.levels] for m in masked]
    for number in range(2):
        error = np.abs(expected[number] - masked[number].counts)
        per_gene = [error[masked[number].genes == gene].mean() for gene in range(GENES)]
        np.testing.assert_allclose(numbers["mae_per_gene"][number], np.mean(per_gene), rtol=1e-5)

    frequency = np.bincount(np.concatenate([m.levels for m in masked]), minlength=NUM_BINS) / sum(
        outcome.positions
    )
    right = natural_imputation(held_out, constant(frequency), ratio=0.4, seeds=2).rows[0].numbers
    tilted = frequency * [1, 15, 15, 15, 15] / (frequency @ [1, 15, 15, 15, 15])
    wrong = natural_imputation(held_out, constant(tilted), ratio=0.4, seeds=2).rows[0].numbers
    assert max(right["ece"]) < 0.05
    np.testing.assert_allclose(np.mean(wrong["ece"]), (1 - tilted[0]) - (1 - frequency[0]), atol=1e-3)
    assert np.mean(wrong["cross_entropy"]) > np.mean(right["cross_entropy"])
    np.testing.assert_allclose(right["auroc"], 0.5)


def test_every_baseline_answers_with_probabilities_and_sees_nothing_that_is_hidden():
    held_out = hold_out(HELD_OUT)
    masked = mask_measured(held_out, 0.4, 0, 10**6)
    # Another truth in one cell, where expressed becomes unexpressed and the reverse: what is known of others stays.
    tokens, counts = held_out.tokens.copy(), held_out.counts.toarray()
    hidden = np.flatnonzero(masked.mask[7])
    tokens[7, hidden] = np.where(tokens[7, hidden] > 0, 0, 3)
    counts[7, hidden] = np.where(tokens[7, hidden] > 0, 25, 0)
    other = dataclasses.replace(held_out, tokens=tokens, counts=type(held_out.counts)(counts))
    again = mask_measured(other, 0.4, 0, 10**6)
    np.testing.assert_array_equal(again.mask, masked.mask)
    own, names = masked.cells == 7, []
    assert ((again.counts[own] > 0) != (masked.counts[own] > 0)).all()
    np.testing.assert_array_equal(again.means, masked.means)
    model = ModelEstimator(Model(contextual, {}))
    first, second = model.estimate(held_out, masked), model.estimate(other, again)
    np.testing.assert_array_equal(first.chance, second.chance)
    np.testing.assert_array_equal(first.counts, second.counts)
    assert first.chance.std(axis=0).min() > 0
    for method in natural.estimators(held_out, None, source(TRAIN), magic=True):
        first, second = method.estimate(held_out, masked), method.estimate(other, again)
        names.append((method.name, method.fitted_on))
        np.testing.assert_allclose(first.chance.sum(axis=1), 1, atol=1e-5)
        assert (first.chance >= 0).all()
        assert (first.counts >= 0).all()
        np.testing.assert_allclose(first.chance[own], second.chance[own], atol=1e-6, err_msg=str(names[-1]))
        np.testing.assert_allclose(first.counts[own], second.counts[own], rtol=1e-4, err_msg=str(names[-1]))
    assert len(set(names)) == len(names) == 9
    assert {fitted for _, fitted in names} == {TRAINING, OTHER_CELLS, THESE_CELLS}


@pytest.mark.parametrize("dispersion", [0.0, 0.7])
def test_levels_of_a_negative_binomial_are_those_of_its_counts(dispersion):
    held_out = hold_out(HELD_OUT)
    masked = mask_measured(held_out, 0.4, 0, 10**6)
    rate = np.random.default_rng(0).gamma(1.0, 3.0, len(masked.cells)).astype(np.float32)
    of_genes = dispersion * (1 + np.arange(masked.mask.shape[1]) / 10)
    chance = natural.negative_binomial(masked, rate, of_genes).chance
    counts = np.arange(0, 400)
    for place in range(0, len(rate), 17):
        cell = masked.cells[place]
        level = levels_of(counts, masked.low[cell], masked.high[cell])
        weight = stats.poisson.pmf(counts, rate[place])
        if dispersion:
            size = 1 / of_genes[masked.genes[place]]
            weight = stats.nbinom.pmf(counts, size, size / (size + rate[place]))
        expected = np.bincount(level, weights=weight, minlength=NUM_BINS)
        np.testing.assert_allclose(chance[place], expected, atol=1e-5)


def test_dispersions_are_found_again():
    rng = np.random.default_rng(0)
    made, true = study(4000, seed=0), np.zeros(GENES)
    true[GENES // 2 :] = np.linspace(0.2, 2, GENES - GENES // 2)
    # The first genes tell the library size.
    rate = np.where(true > 0, 6.0, 300.0) * rng.gamma(5.0, 1 / 5, (4000, 1))
    size = 1 / np.maximum(true, 1e-6)
    made.counts = type(made.counts)(
        rng.poisson(rate * rng.gamma(size, 1 / size, (4000, GENES))).astype(np.float32)
    )
    held_out = hold_out(made)
    found = natural.dispersions(held_out, mask_measured(held_out, 0.15, 0, 10**6))[:GENES]
    np.testing.assert_allclose(found, true, rtol=0.15, atol=0.02)


def levels_of(counts, low, high):
    from sct.data.tokenize import digitize

    return np.where(counts > 0, digitize(np.log1p(counts), low, high, NUM_BINS), 0)


def test_the_mean_of_a_gene_by_hand():
    held_out = hold_out(HELD_OUT)
    masked = mask_measured(held_out, 0.4, 0, 10**6)
    ours = GeneMean(OTHER_CELLS).counts(held_out, masked)
    counts = held_out.counts.toarray()
    for place in range(0, len(ours), 23):
        cell, gene = masked.cells[place], masked.genes[place]
        others = np.delete(counts, cell, axis=0).sum(axis=0).astype(float)
        others += others.sum() / len(others) / len(counts)  # one further, average cell
        visible = ~masked.mask[cell]
        factor = counts[cell, visible].sum() / others[visible].sum()
        np.testing.assert_allclose(ours[place], others[gene] * factor, rtol=1e-4)


def test_the_mean_by_library_size_is_unbiased_on_counts_of_that_kind():
    rng = np.random.default_rng(0)
    made = study(300, seed=0)
    rate = rng.gamma(2.0, 2.0, GENES) * rng.gamma(4.0, 0.25, (300, 1))
    made.counts = type(made.counts)(rng.poisson(rate).astype(np.float32))
    held_out = hold_out(made)
    row = Row("mean", OTHER_CELLS, "")
    for seed in range(3):
        masked = mask_measured(held_out, 0.15, seed, 10**6)
        row.score(held_out, masked, GeneMean(OTHER_CELLS).estimate(held_out, masked))
    assert 0.9 < np.mean(row.numbers["imputed_to_counted"]) < 1.1
    assert np.mean(row.numbers["ece"]) < 0.05


def test_a_method_that_cannot_run_is_a_row_with_the_reason():
    outcome = natural_imputation(hold_out(HELD_OUT), None, None, seeds=2, magic=False)
    remarks = {(row.method, row.fitted_on): row.remark for row in outcome.rows if not row.numbers}
    assert {fitted for _, fitted in remarks} == {TRAINING}
    assert set(remarks.values()) == {"no training studies were given"}
    for table in (*outcome.reports, outcome.summary):
        assert len(table.rows) == len(outcome.rows)
        assert "no training studies" in table.markdown()
    assert outcome.as_dict()["settings"][0]["positions"] == outcome.positions
    assert set(outcome.reliability) == {f"{r.method}, {r.fitted_on}" for r in outcome.rows if r.numbers}


def test_the_model_gives_natural_probabilities_here_and_tilted_ones_in_the_paper_s_protocol():
    held_out = hold_out(HELD_OUT)
    chance = np.asarray([0.7, 0.1, 0.1, 0.06, 0.04])
    model = Model(
        lambda variables, shown, coordinates: jnp.broadcast_to(chance, (*shown.shape, NUM_BINS)),
        {},
        odds=15.0,
    )
    masked = mask_measured(held_out, 0.4, 0, 10**6)
    np.testing.assert_allclose(ModelEstimator(model).estimate(held_out, masked).chance[0], chance, rtol=1e-5)
    answers = model.predict(held_out, masked)
    assert set(answers[False].levels) == {1}, "15 times 0.1 is more than 0.7"
    medians = masked.medians[masked.cells].astype(np.float64)
    tilted = chance * [1, 15, 15, 15, 15]
    np.testing.assert_allclose(answers[False].counts, medians @ tilted / tilted.sum(), rtol=1e-5)
    np.testing.assert_allclose(
        answers[True].counts, medians[:, 1:] @ chance[1:] / chance[1:].sum(), rtol=1e-5
    )


def test_metrics_of_probabilities_by_hand():
    rng = np.random.default_rng(0)
    probability = rng.random(500)
    true = rng.random(500) < probability**2
    table = metrics.reliability(true, probability, bins=10)
    error = 0.0
    for number in range(10):
        inside = (probability >= number / 10) & (probability < (number + 1) / 10)
        assert table.number[number] == inside.sum()
        np.testing.assert_allclose(table.observed[number], true[inside].mean())
        error += inside.sum() / 500 * abs(true[inside].mean() - probability[inside].mean())
    np.testing.assert_allclose(table.calibration_error, error)
    assert metrics.reliability(np.array([True]), np.array([1.0])).number[-1] == 1

    group = rng.integers(0, 4, 500)
    x, y = rng.random(500), rng.random(500)
    y[group == 3] = 1.0
    found = metrics.grouped_pearson(x, y, group, 6)
    for number in range(3):
        np.testing.assert_allclose(found[number], stats.pearsonr(x[group == number], y[group == number])[0])
    assert np.isnan(found[3:]).all(), "constant, and groups without a value"
    constant_guess = metrics.grouped_pearson(np.ones(500), x, group, 4)
    np.testing.assert_array_equal(constant_guess, 0)
    assert np.isnan(metrics.roc_auc(np.ones(3, bool), x[:3]))
    assert np.isnan(metrics.cross_entropy(np.zeros(0, int), np.zeros((0, 5))))
    np.testing.assert_allclose(
        metrics.cross_entropy(np.array([0, 1]), np.array([[0.5, 0.5], [1.0, 0.0]])),
        (np.log(2) + np.log(1e6)) / 2,
    )


@pytest.mark.parametrize("broken", [{}, {"model": ([1.5], [0.2], [3])}])
def test_a_reliability_plot_of_nothing_or_of_no_probabilities_is_refused(broken):
    from sct import pl
    from sct.errors import DataError

    with pytest.raises(DataError):
        pl.reliability(broken)


def test_the_reliability_plot_shows_every_method():
    from sct import pl

    outcome = natural_imputation(
        hold_out(HELD_OUT), constant(np.full(NUM_BINS, 0.2)), None, seeds=1, magic=False
    )
    ax = pl.reliability(outcome.reliability)
    assert [text.get_text().replace("\n", " ") for text in ax.get_legend().get_texts()] == list(
        outcome.reliability
    )
    assert ax.get_xlabel() == "predicted probability of expression"
