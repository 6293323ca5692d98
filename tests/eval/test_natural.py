"""The natural protocol: what is scored, what its numbers mean, and that no method looks at what is hidden."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import sparse, stats

from sct.data.tokenize import bin_counts
from sct.eval import metrics
from sct.eval.imputation import natural
from sct.eval.imputation.baselines import OTHER_CELLS, THESE_CELLS, TRAINING
from sct.eval.imputation.eval_cells import mask_measured, mask_measured_genes
from sct.eval.imputation.natural import GeneMean, ModelEstimator, natural_imputation
from sct.eval.imputation.scoring import ImputationModel
from sct.eval.reports.report import MODEL
from tests.data.fake_study import FakeStudy
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
    return ImputationModel(
        lambda variables, shown, coordinates: jnp.broadcast_to(chance, (*shown.shape, NUM_BINS)), {}
    )


def test_measured_positions_are_hidden_whatever_their_level_and_all_are_scored():
    made = study(40, seed=2)
    made.measured[[3, 7]] = False
    eval_cells = hold_out(made)
    masked = mask_measured(eval_cells, 0.5, 0, most=10**6)
    assert masked.mask.sum(axis=1).tolist() == [5] * 40, "half of the ten measured genes"
    assert not masked.mask[:, [3, 7]].any()
    assert not masked.mask[:, GENES:].any()
    np.testing.assert_array_equal(np.nonzero(masked.mask), (masked.cells, masked.genes))
    truth = eval_cells.counts.toarray()[masked.cells, masked.genes]
    np.testing.assert_array_equal(masked.counts, truth)
    assert 0.2 < (truth == 0).mean() < 0.8
    few = mask_measured(eval_cells, 0.5, 0, most=37)
    assert len(few.cells) == 37
    np.testing.assert_array_equal(few.mask, masked.mask)
    assert few.mask[few.cells, few.genes].all()


def test_whole_genes_are_hidden_in_all_cells_that_measured_them():
    made, other = study(20, seed=2), study(20, seed=3, name="other")
    made.measured[[3, 7]] = False
    eval_cells = hold_out(made, other)
    masked = mask_measured_genes(eval_cells, 0.5, 1, most=10**6)
    hidden = masked.mask.any(axis=0)
    assert hidden.sum() == GENES // 2
    np.testing.assert_array_equal(masked.mask, hidden & eval_cells.eligible)
    np.testing.assert_array_equal(np.nonzero(masked.mask), (masked.cells, masked.genes))
    assert (mask_measured_genes(eval_cells, 0.5, 2, most=10**6).mask != masked.mask).any()


def test_only_methods_that_know_other_cells_impute_whole_genes():
    outcome = natural_imputation(
        hold_out(HELD_OUT),
        constant(np.full(NUM_BINS, 0.2)),
        source(TRAIN),
        seeds=2,
        magic=False,
        whole_genes=True,
    )
    assert "masked in all held-out cells" in outcome.title
    answered = {row.fitted_on: bool(row.numbers) for row in outcome.rows if row.key != MODEL}
    assert answered == {TRAINING: True, OTHER_CELLS: True, THESE_CELLS: False}
    assert all("masked in all cells" in row.remark for row in outcome.rows if row.fitted_on == THESE_CELLS)
    assert outcome.as_dict()["protocol"] == "natural imputation of whole genes"


def test_an_oracle_is_perfect_and_right_probabilities_have_no_calibration_error():
    bags = source(HELD_OUT, cells=40)
    eval_cells = hold_out(HELD_OUT, cells=40)
    outcome = natural_imputation(
        eval_cells, ImputationModel(oracle, jnp.asarray(bags.record(0)["tokens"])[None]), ratio=0.4, seeds=2
    )
    numbers = outcome.rows[0].numbers
    assert outcome.rows[0].key == MODEL
    assert numbers["auroc"] == numbers["average_precision"] == numbers["mcc"] == [1, 1]
    assert numbers["ece"] == [0, 0]
    np.testing.assert_allclose(numbers["cross_entropy"], 0, atol=1e-6)
    masked = [mask_measured(eval_cells, 0.4, seed, 10**6) for seed in range(2)]
    expected = [m.means[m.cells, m.levels] for m in masked]
    for number in range(2):
        error = np.abs(expected[number] - masked[number].counts)
        per_gene = [error[masked[number].genes == gene].mean() for gene in range(GENES)]
        np.testing.assert_allclose(numbers["mae_per_gene"][number], np.mean(per_gene), rtol=1e-3)

    frequency = np.bincount(np.concatenate([m.levels for m in masked]), minlength=NUM_BINS) / sum(
        outcome.positions
    )
    right = natural_imputation(eval_cells, constant(frequency), ratio=0.4, seeds=2).rows[0].numbers
    tilted = frequency * [1, 15, 15, 15, 15] / (frequency @ [1, 15, 15, 15, 15])
    wrong = natural_imputation(eval_cells, constant(tilted), ratio=0.4, seeds=2).rows[0].numbers
    assert max(right["ece"]) < 0.05
    np.testing.assert_allclose(np.mean(wrong["ece"]), (1 - tilted[0]) - (1 - frequency[0]), atol=1e-3)
    assert np.mean(wrong["cross_entropy"]) > np.mean(right["cross_entropy"])
    np.testing.assert_allclose(right["auroc"], 0.5)


def test_every_baseline_answers_with_probabilities_and_sees_nothing_that_is_hidden():
    eval_cells = hold_out(HELD_OUT)
    masked = mask_measured(eval_cells, 0.4, 0, 10**6)
    # Another truth in one cell, where expressed becomes unexpressed and the reverse: what is known of others stays.
    tokens, counts = eval_cells.tokens.copy(), eval_cells.counts.toarray()
    hidden = np.flatnonzero(masked.mask[7])
    tokens[7, hidden] = np.where(tokens[7, hidden] > 0, 0, 3)
    counts[7, hidden] = np.where(tokens[7, hidden] > 0, 25, 0)
    other = dataclasses.replace(eval_cells, tokens=tokens, counts=type(eval_cells.counts)(counts))
    again = mask_measured(other, 0.4, 0, 10**6)
    np.testing.assert_array_equal(again.mask, masked.mask)
    own, names = masked.cells == 7, []
    assert ((again.counts[own] > 0) != (masked.counts[own] > 0)).all()
    np.testing.assert_array_equal(again.means, masked.means)
    model = ModelEstimator(ImputationModel(contextual, {}))
    first, second = model.estimate(eval_cells, masked), model.estimate(other, again)
    np.testing.assert_array_equal(first.chance, second.chance)
    np.testing.assert_array_equal(first.counts, second.counts)
    assert first.chance.std(axis=0).min() > 0
    for method in natural.estimators(eval_cells, None, source(TRAIN), magic=True):
        first, second = method.estimate(eval_cells, masked), method.estimate(other, again)
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
    # Ranges whose borders are whole counts, where the precision of the logarithms decides.
    counts = np.zeros((6, GENES))
    counts[:, :4] = [[1, m, 3, 5] for m in (7, 17, 31, 49, 71, 97)]
    made = study(6)
    made.counts = type(made.counts)(counts.astype(np.float32))
    eval_cells = hold_out(made)
    masked = mask_measured(eval_cells, 0.5, 0, 10**6)
    rate = np.random.default_rng(0).gamma(1.0, 6.0, len(masked.cells)).astype(np.float32)
    of_genes = dispersion * (1 + np.arange(masked.mask.shape[1]) / 10)
    chance = natural.negative_binomial(masked, rate, of_genes).chance
    every = np.arange(4000)
    for place, (cell, gene) in enumerate(zip(masked.cells, masked.genes, strict=True)):
        most = int(counts[cell].max())
        inside = np.arange(1, most + 1)
        row = np.column_stack([np.ones(most), np.full(most, most), inside])
        level = np.full(len(every), NUM_BINS - 1)
        level[0], level[1 : most + 1] = 0, bin_counts(sparse.csr_matrix(row), num_bins=NUM_BINS).tokens[:, 2]
        weight = stats.poisson.pmf(every, rate[place])
        if dispersion:
            size = 1 / of_genes[gene]
            weight = stats.nbinom.pmf(every, size, size / (size + rate[place]))
        expected = np.bincount(level, weights=weight, minlength=NUM_BINS)
        np.testing.assert_allclose(chance[place], expected, atol=1e-5)


def test_dispersions_are_found_again():
    rng = np.random.default_rng(0)
    true = np.linspace(0, 2, 8)
    genes, mean = np.repeat(np.arange(8), 20_000), rng.gamma(4.0, 1.5, 160_000)
    size = 1 / np.maximum(true, 1e-9)[genes]
    counts = rng.poisson(mean * rng.gamma(size, 1 / size))
    found = natural.dispersions(genes, mean, counts, 10)
    np.testing.assert_allclose(found[:8], true, rtol=0.1, atol=0.02)
    assert true.min() < found[8] == found[9] < true.max(), "of a gene without counts: the mean of the others"
    few = np.flatnonzero(np.arange(160_000) % 20_000 < 4)
    drawn = natural.dispersions(genes[few], mean[few], counts[few], 10)
    assert drawn[:8].std() < found[:8].std(), "four counts of a gene say little"


def test_the_mean_of_a_gene_by_hand():
    eval_cells = hold_out(HELD_OUT)
    masked = mask_measured(eval_cells, 0.4, 0, 10**6)
    counts = eval_cells.counts.toarray().astype(float)
    for fitted_on in (OTHER_CELLS, THESE_CELLS):
        ours = GeneMean(fitted_on).counts(eval_cells, masked)
        known = np.ones(counts.shape, bool) if fitted_on == OTHER_CELLS else ~masked.mask
        known[:, GENES:] = False
        seen = np.where(known, counts, 0)
        for place in range(0, len(ours), 23):
            cell, gene = masked.cells[place], masked.genes[place]
            total, number = seen.sum(axis=0) - seen[cell], known.sum(axis=0) - known[cell]
            average = (total[:GENES] / number[:GENES]).mean()
            others = (total + average) / (number + 1)  # one further, average cell
            visible = ~masked.mask[cell] & (np.arange(len(others)) < GENES)
            factor = counts[cell, visible].sum() / others[visible].sum()
            np.testing.assert_allclose(ours[place], others[gene] * factor, rtol=1e-4)


MANY = 60


def drawn_study(name, rate, depth, lacking=()):
    counts = np.random.default_rng(len(name)).poisson(rate * depth[:, None]).astype(np.float32)
    counts[:, list(lacking)] = 0
    made = FakeStudy(counts, name)
    made.measured = ~np.isin(np.arange(MANY), list(lacking))
    return made


@pytest.mark.parametrize("lacking", [range(0), range(20, 45)], ids=["all genes", "panel"])
@pytest.mark.parametrize("panels", [range(0), range(15)], ids=["whole training", "training panel"])
def test_every_baseline_is_unbiased_whatever_was_measured(lacking, panels):
    rng = np.random.default_rng(5)
    rate = rng.gamma(1.0, 2.0, MANY) + 0.1
    train = [
        drawn_study(name, rate, rng.gamma(8.0, size / 8, 300), without)
        for name, size, without in (("whole", 1.0, ()), ("a panel", 3.0, panels))
    ]
    options = {"num_positions": MANY + 4}
    made = drawn_study("held-out cells", rate, rng.gamma(8.0, 1 / 8, 200), lacking)
    outcome = natural_imputation(
        hold_out(made, **options), None, source(*train, **options), seeds=2, magic=False
    )
    wrong = {
        (row.method, row.fitted_on): {
            name: np.mean(row.numbers[name]).round(3) for name in ("imputed_to_counted", "ece")
        }
        for row in outcome.rows
        if row.method != "frequency of levels per gene"  # does not know how deep a cell is
        if not 0.93 < np.mean(row.numbers["imputed_to_counted"]) < 1.07 or np.mean(row.numbers["ece"]) > 0.06
    }
    assert not wrong
    assert len(outcome.rows) == 8


def test_neighbours_of_a_type_leave_its_markers_no_dispersion():
    rng = np.random.default_rng(6)
    rate = rng.gamma(1.0, 2.0, (2, MANY)) + 0.1
    rate[0, :20], rate[1, :20] = 6.0, 0.05

    def typed(name, n):
        return drawn_study(name, rate[np.arange(n) % 2], np.ones(n))

    options = {"num_positions": MANY}
    eval_cells = hold_out(typed("held-out cells", 200), **options)
    rows = natural_imputation(
        eval_cells, None, source(typed("training", 600), **options), seeds=2, magic=False
    ).rows
    ece = {(row.method, row.fitted_on): np.mean(row.numbers["ece"]) for row in rows}
    # What is left is the gene's mean, one cell of 31.
    assert ece["kNN smoothing, k = 30", TRAINING] < 0.03
    assert ece["mean per gene, by library size", TRAINING] > 0.06


def test_a_method_that_cannot_run_is_a_row_with_the_reason():
    outcome = natural_imputation(hold_out(HELD_OUT), None, None, seeds=2, magic=False)
    remarks = {(row.method, row.fitted_on): row.remark for row in outcome.rows if not row.numbers}
    assert {fitted for _, fitted in remarks} == {TRAINING}
    assert set(remarks.values()) == {
        "this method needs training studies, but none were given: give a store with training studies"
    }
    for table in (*outcome.reports, outcome.summary):
        assert len(table.rows) == len(outcome.rows)
        assert "needs training studies" in table.markdown()
    assert outcome.as_dict()["settings"][0]["positions"] == outcome.positions
    assert set(outcome.reliability) == {f"{r.method}, {r.fitted_on}" for r in outcome.rows if r.numbers}


def test_the_model_gives_natural_probabilities_here_and_tilted_ones_in_the_paper_s_protocol():
    eval_cells = hold_out(HELD_OUT)
    chance = np.asarray([0.7, 0.1, 0.1, 0.06, 0.04])
    model = ImputationModel(
        lambda variables, shown, coordinates: jnp.broadcast_to(chance, (*shown.shape, NUM_BINS)),
        {},
        odds=15.0,
    )
    masked = mask_measured(eval_cells, 0.4, 0, 10**6)
    np.testing.assert_allclose(
        ModelEstimator(model).estimate(eval_cells, masked).chance[0], chance, rtol=1e-5
    )
    answers = model.predict(eval_cells, masked)
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
    assert outcome.labels(MODEL) == ["model"]
    ax = pl.reliability(outcome.reliability, models=outcome.labels(MODEL))
    assert [line.get_linewidth() > 2 for line in ax.lines[1:]] == [
        name == "model" for name in outcome.reliability
    ]
    assert [text.get_text().replace("\n", " ") for text in ax.get_legend().get_texts()] == list(
        outcome.reliability
    )
    assert ax.get_xlabel() == "predicted probability of expression"
