"""Imputation: masks hide what they say, an oracle is perfect, every method answers the same questions."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import matthews_corrcoef

from sct.data import masking
from sct.data.tokenize import bin_counts
from sct.errors import ConfigError, DataError, StoreError
from sct.eval.imputation import eval_cells as drawing
from sct.eval.imputation import protocols as imputation
from sct.eval.imputation import scoring
from sct.eval.imputation.baselines import OTHER_CELLS, Unavailable
from sct.eval.imputation.eval_cells import EvalCells
from sct.eval.imputation.protocols import GeneImputation, cells_to_mask, sparsity_groups
from sct.eval.imputation.scoring import COLUMNS, REFERENCE_NAME, ImputationModel, measure
from sct.eval.reports import folder as report_folder
from sct.eval.reports.report import MODEL, REFERENCE
from tests.data.fake_study import FakeStudy
from tests.eval.toy_cells import (
    GENES,
    NUM_BINS,
    POSITIONS,
    changed,
    hold_out,
    random_mask,
    scaled,
    source,
    study,
)

COMMON = "most common level per gene, training studies"
EXPRESSED = "most common expressed level per gene, training studies"
TRAIN, HELD_OUT = study(60, seed=1, name="train"), study(22, seed=2, name="held out")


def protocol(probabilities, cells: int = 8, eval_cells=HELD_OUT, **options) -> GeneImputation:
    return GeneImputation(
        probabilities,
        source(TRAIN, cells=cells),
        source(eval_cells, cells=cells),
        **{"seeds": 2, "ratio": 0.4, **options},
    )


def uniform(variables, shown, coordinates):
    return jnp.full((*shown.shape, NUM_BINS), 1 / NUM_BINS)


def oracle(variables, shown, coordinates):
    """Knows the tokens of the only bag."""
    return jax.nn.one_hot(variables["tokens"], NUM_BINS)


def contextual(variables, shown, coordinates):
    """Depends on all that a model may depend on: its bag, the place in it, coordinates."""
    place = jnp.arange(shown.size // shown.shape[0]).reshape(shown.shape[1:]) % 7
    mean = shown.astype(jnp.float32).mean(axis=(1, 2), keepdims=True)
    where = 0.0 if coordinates is None else jnp.nan_to_num(coordinates).sum(-1, keepdims=True)
    score = jnp.sin(place * 1.3 + shown * 0.7 + 5 * mean + where)
    return jax.nn.softmax(jnp.sin(score[..., None] * jnp.arange(1, NUM_BINS + 1) * 3.0))


def fully_masked(cells) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Cells, genes, levels and counts of all expressed genes."""
    counts, tokens = cells.counts.toarray(), bin_counts(cells.counts).tokens
    rows, genes = np.nonzero(tokens)
    return rows, genes, tokens[rows, genes], counts[rows, genes]


# Cells and draws


@pytest.mark.parametrize("cells", [1, 8, 50])
@pytest.mark.parametrize("per_batch", [0, 1, 2, 7])
def test_bags_are_rebuilt_exactly(cells, per_batch):
    bags = source(study(22, spatial=True, name="a"), study(9, 3, name="b"), cells=cells, spatial=True)
    eval_cells = EvalCells.read(bags)
    assert len(eval_cells) == 31
    assert eval_cells.num_bags == len(bags)
    rebuilt = {}
    for batch in eval_cells.batches(per_batch):
        tokens = eval_cells.padded(batch, eval_cells.tokens, NUM_BINS)
        places = eval_cells.padded(batch, eval_cells.coordinates, np.nan)
        counts = eval_cells.padded(batch, eval_cells.counts.toarray(), 0)
        assert len({len(b.numbers) for b in eval_cells.batches(per_batch)}) == 1, "one shape"
        for i in np.unique(batch.bag):
            rebuilt[batch.numbers[i]] = {"tokens": tokens[i], "coordinates": places[i], "counts": counts[i]}
    assert sorted(rebuilt) == list(range(len(bags)))
    for number, parts in rebuilt.items():
        for name, value in parts.items():
            np.testing.assert_array_equal(value, bags.record(number)[name], err_msg=name)


def test_bags_are_spread_and_positions_known_even_where_the_model_does_not_read_them():
    bags = source(study(80, spatial=True))
    eval_cells = EvalCells.read(bags, 3)
    np.testing.assert_array_equal(np.unique(eval_cells.bag), [0, 4, 9])
    np.testing.assert_array_equal(
        eval_cells.coordinates, bags.studies[0].rescaled_coordinates()[np.r_[0:8, 32:40, 72:80]]
    )
    assert not eval_cells.spatial
    assert hold_out(study(8)).coordinates is None


def test_bags_that_cannot_be_scored_are_refused():
    for bags in (
        source(study(9), with_counts=False),
        imputation.BagSource([study(9)], source(study(9)).options),
    ):
        with pytest.raises(ConfigError, match="exhaustive"):
            EvalCells.read(bags)


@pytest.mark.parametrize("ratio", [0.15, 0.5, 1.0])
def test_a_share_of_the_genes_of_each_cell_is_hidden_as_in_the_bag_itself(ratio):
    bags = source(study(22))
    eval_cells = EvalCells.read(bags)
    masked = drawing.mask_ratio(eval_cells, ratio, seed=3)
    assert (masked.mask.sum(axis=1) == round(ratio * GENES)).all()
    for number in range(len(bags)):
        tokens = bags.record(number)["tokens"][None]
        key = jax.random.fold_in(jax.random.key(3), number)
        mask = np.asarray(masking.exact_ratio(key, jnp.asarray(tokens), ratio, NUM_BINS))[0]
        here = eval_cells.bag == number
        np.testing.assert_array_equal(masked.mask[here], mask[eval_cells.slot[here]])
    if ratio < 1:
        assert (drawing.mask_ratio(eval_cells, ratio, seed=4).mask != masked.mask).any()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_what_is_scored_and_what_is_visible(share):
    cells = hold_out(study(22), study(5, 1, name="b"))
    masked = random_mask(cells, share)
    dense, tokens = cells.counts.toarray(), cells.tokens
    assert not masked.mask[:, GENES:].any(), "PAD is not hidden"
    np.testing.assert_array_equal(masked.visible.toarray(), np.where(masked.mask, 0, dense))
    scored = np.zeros(tokens.shape, bool)
    scored[masked.cells, masked.genes] = True
    np.testing.assert_array_equal(scored, masked.mask & (tokens > 0) & (tokens < NUM_BINS))
    np.testing.assert_array_equal(masked.levels, tokens[scored])
    np.testing.assert_array_equal(masked.counts, dense[scored])


def test_whole_cells_are_hidden_in_proportion_to_the_bag():
    eval_cells = hold_out(study(8 + 8 + 4), study(1, name="lone"))
    for number, expected in ((1, (1, 1, 1, 0)), (4, (4, 4, 2, 0)), (7, (7, 7, 3, 0))):
        masked = drawing.mask_cells(eval_cells, number, 0)
        hidden = masked.mask.any(axis=1)
        assert (masked.mask[hidden, :GENES]).all()
        assert tuple(np.bincount(eval_cells.bag, hidden).astype(int)) == expected
    assert (drawing.mask_cells(eval_cells, 4, 1).mask != drawing.mask_cells(eval_cells, 4, 2).mask).any()


def test_genes_that_were_not_measured_are_never_hidden():
    made = study(20)
    made.measured[[2, 6]] = False
    eval_cells = hold_out(made)
    for masked in (drawing.mask_ratio(eval_cells, 0.8, 0), drawing.mask_cells(eval_cells, 3, 0)):
        assert not masked.mask[:, [2, 6]].any()
        assert masked.mask[:, np.delete(np.arange(GENES), [2, 6])].any(axis=0).all()
    hidden = masked.mask.any(axis=1)
    assert (masked.means != eval_cells.means).any(axis=1)[hidden].all(), (
        "a hidden cell does not tell its range"
    )


def test_a_cell_hidden_as_a_whole_has_the_range_of_the_shown_cells_of_its_bag():
    eval_cells = hold_out(study(20, seed=3), cells=8)  # bags of 8, 8 and 4
    hidden = np.zeros(20, bool)
    hidden[[0, 3, 9, 16, 17, 18, 19]] = True  # the last bag shows no cell
    mask = np.repeat(hidden[:, None], POSITIONS, axis=1)
    mask[5, :7] = True  # a cell that shows some genes still shows its range
    masked = drawing.Masked.of(eval_cells, mask)
    for name in ("low", "high", "medians", "means"):
        own, seen = getattr(eval_cells, name), getattr(masked, name)
        np.testing.assert_array_equal(seen[~hidden], own[~hidden])
        np.testing.assert_allclose(seen[0], own[[1, 2, 4, 5, 6, 7]].mean(axis=0), rtol=1e-6)
        np.testing.assert_array_equal(seen[3], seen[0])
        np.testing.assert_allclose(seen[9], own[[8, 10, 11, 12, 13, 14, 15]].mean(axis=0), rtol=1e-6)
        np.testing.assert_allclose(seen[18], own[~hidden].mean(axis=0), rtol=1e-6)
        assert seen.dtype == own.dtype
    np.testing.assert_array_equal(masked.levels, eval_cells.tokens[masked.cells, masked.genes])


def test_genes_hidden_in_all_cells_leave_each_cell_its_own_range():
    eval_cells = hold_out(study(20))
    for masked in (
        drawing.mask_ratio(eval_cells, 0.8, 0),
        drawing.mask_ratio(eval_cells, 1.0, 0),
        drawing.mask_genes(eval_cells, np.array([1, 4])),
    ):
        for name in ("low", "high", "medians", "means"):
            np.testing.assert_array_equal(getattr(masked, name), getattr(eval_cells, name))


@pytest.mark.parametrize("spatial", [False, True])
def test_the_size_of_a_cell_that_is_hidden_as_a_whole_reaches_no_method(spatial):
    made = study(22, seed=6, spatial=spatial)
    eval_cells = hold_out(made, spatial=spatial)
    masked = drawing.mask_cells(eval_cells, 3, 0)
    (hidden,) = np.nonzero(masked.mask.any(axis=1))
    methods = [
        ImputationModel(contextual, {}),
        *imputation.standard_methods(eval_cells, source(TRAIN), whole_cells=True),
    ]
    before, asked = {}, set()
    for cell in (None, hidden[0], hidden[-1]):
        other = hold_out(made if cell is None else scaled(made, np.array([cell]), 7), spatial=spatial)
        again = drawing.mask_cells(other, 3, 0)
        np.testing.assert_array_equal(again.mask, masked.mask)
        if cell is not None:
            assert (other.medians[cell] != eval_cells.medians[cell]).any()
            np.testing.assert_array_equal(
                again.counts[again.cells == cell], 7 * masked.counts[masked.cells == cell]
            )
        for number, method in enumerate(methods):
            try:
                answer = method.predict(other, again)
            except Unavailable:
                continue
            asked.add(method.name)
            # Methods that know the other cells of the study know this one where they answer for another.
            part = (
                again.cells == cell if cell is not None and method.fitted_on == OTHER_CELLS else slice(None)
            )
            for given_expressed, got in answer.items():
                first = before.setdefault((number, given_expressed), got)
                np.testing.assert_array_equal(got.levels[part], first.levels[part], err_msg=method.name)
                np.testing.assert_array_equal(got.counts[part], first.counts[part], err_msg=method.name)
    assert len(asked) == 5 + spatial


def test_the_papers_numbers_of_masked_cells():
    assert cells_to_mask(50) == (1, 10, 20, 40)
    assert cells_to_mask(8) == (1, 2, 3, 6)
    assert cells_to_mask(2) == (1,)
    with pytest.raises(DataError, match="cells_per_bag"):
        cells_to_mask(1)
    eval_cells = hold_out(study(8))
    with pytest.raises(DataError, match="1 to 7"):
        imputation.whole_cell_imputation(eval_cells, None, numbers=[8])


# The model and the scores


def test_an_oracle_of_levels_is_perfect_up_to_the_width_of_levels():
    bags = source(HELD_OUT, cells=22)
    bag = bags.record(0)
    numbers = dict(protocol(oracle, cells=22)({"tokens": jnp.asarray(bag["tokens"])[None]}))
    assert numbers["model/mcc"] == numbers["model, given expressed/mcc"] == 1
    errors = []
    for seed in range(2):
        masked = drawing.mask_ratio(EvalCells.read(bags), 0.4, seed)
        values = bag["medians"][masked.cells, masked.levels]
        errors.append(np.abs(values - masked.counts).mean())
    assert np.mean(errors) > 0
    np.testing.assert_allclose(numbers["model/mae"], np.mean(errors), rtol=1e-5)
    np.testing.assert_allclose(numbers["model, given expressed/mae"], np.mean(errors), rtol=1e-5)
    others = {name: value for name, value in numbers.items() if not name.startswith("model")}
    assert others
    assert all(value < 0.9 for name, value in others.items() if name.endswith("mcc"))
    assert all(value > np.mean(errors) for name, value in others.items() if name.endswith("mae"))


def test_a_perfect_prediction_has_no_error_at_all():
    class Perfect:
        name, fitted_on, remark = "perfect", "nothing", ""

        def predict(self, eval_cells, masked):
            return {False: scoring.LevelPrediction(masked.levels, masked.counts)}

    cells = hold_out(HELD_OUT)
    outcome = imputation.gene_imputation(cells, Perfect(), ratios=(0.3,), seeds=2, magic=False)
    row = next(row for row in outcome.settings[0].rows if row.method == "perfect")
    assert row.mcc == [1, 1]
    assert row.mae == row.msle == [0, 0]
    assert np.trace(row.confusion) == row.confusion.sum() == sum(outcome.settings[0].positions)


def test_a_model_that_is_told_is_never_asked_whether_a_gene_is_expressed():
    def shy(variables, shown, coordinates):
        """Calls everything unexpressed, and the highest level the next best."""
        return jnp.broadcast_to(jnp.asarray([0.9, 0.01, 0.01, 0.01, 0.07]), (*shown.shape, NUM_BINS))

    numbers = dict(protocol(shy, cells=22, ratio=1.0, seeds=1)({}))
    assert numbers["model/mcc"] == 0
    cells, _, _, counts = fully_masked(HELD_OUT)
    values = bin_counts(HELD_OUT.counts, with_values=True).medians[cells]
    for name, weights in (
        ("model", [0.9, 0.01, 0.01, 0.01, 0.07]),
        ("model, given expressed", [0, 0.1, 0.1, 0.1, 0.7]),
    ):
        expected = values @ weights
        np.testing.assert_allclose(numbers[f"{name}/mae"], np.abs(expected - counts).mean(), rtol=1e-5)
        squares = (np.log1p(expected) - np.log1p(counts)) ** 2
        np.testing.assert_allclose(numbers[f"{name}/msle"], squares.mean(), rtol=1e-5)


def test_the_table_of_common_levels_by_hand():
    numbers = dict(protocol(uniform, ratio=1.0, seeds=1)({}))
    cells, genes, level, counts = fully_masked(HELD_OUT)
    train = bin_counts(TRAIN.counts).tokens
    eval_cells = bin_counts(HELD_OUT.counts, with_values=True)
    for name, first in ((COMMON, 0), (EXPRESSED, 1)):
        frequency = np.stack([(train == i).sum(axis=0) for i in range(first, NUM_BINS)])
        predicted = first + frequency.argmax(axis=0)[genes]
        np.testing.assert_allclose(numbers[f"{name}/mcc"], matthews_corrcoef(level, predicted), rtol=1e-9)
        error = np.abs(eval_cells.medians[cells, predicted] - counts).mean()
        np.testing.assert_allclose(numbers[f"{name}/mae"], error, rtol=1e-5)


def test_numbers_do_not_depend_on_how_cells_are_put_into_bags():
    """With all genes masked nothing depends on the draw; cells of PAD in the last bag do not count."""
    few, many = (dict(protocol(uniform, cells, ratio=1.0, seeds=1)({})) for cells in (4, 9))
    assert few.keys() == many.keys()
    for name, value in few.items():
        np.testing.assert_allclose(value, many[name], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("spatial", [False, True])
def test_a_model_answers_the_same_however_many_bags_it_is_given_at_once(spatial):
    eval_cells = hold_out(study(45, spatial=True), study(5, 3, name="b"), spatial=spatial)
    masked = drawing.mask_ratio(eval_cells, 0.4, 0)
    one, *more = (
        ImputationModel(contextual, {}, bags_per_batch=bags).predict(eval_cells, masked)
        for bags in (1, 2, 5, 0)
    )
    assert len(np.unique(one[False].levels)) == NUM_BINS
    for other in more:
        for given_expressed in (False, True):
            np.testing.assert_array_equal(one[given_expressed].levels, other[given_expressed].levels)
            np.testing.assert_allclose(one[given_expressed].counts, other[given_expressed].counts, rtol=1e-4)


def test_the_model_is_given_each_bag_with_the_masked_positions_hidden():
    shown = []

    def spy(variables, tokens, coordinates):
        jax.debug.callback(lambda t: shown.append(np.asarray(t)[0]), tokens, ordered=True)
        return uniform(variables, tokens, coordinates)

    bags = source(HELD_OUT)
    eval_cells = EvalCells.read(bags)
    masked = drawing.mask_ratio(eval_cells, 0.4, 0)
    ImputationModel(spy, {}, bags_per_batch=1).predict(eval_cells, masked)
    jax.effects_barrier()
    assert len(shown) == len(bags)
    for number, tokens in enumerate(shown):
        hidden = eval_cells.padded(list(eval_cells.batches(1))[number], masked.mask, False)[0]
        np.testing.assert_array_equal(tokens, np.where(hidden, NUM_BINS + 1, bags.record(number)["tokens"]))


def test_the_model_sees_no_level_of_a_masked_gene_and_the_numbers_repeat():
    eval_cells = hold_out(study(40, 4))
    masked = drawing.mask_ratio(eval_cells, 0.4, 0)
    other = changed(eval_cells, masked.mask)
    model = ImputationModel(contextual, {})
    before, after = (model.predict(c, drawing.Masked.of(c, masked.mask)) for c in (eval_cells, other))
    for given_expressed in (False, True):
        np.testing.assert_array_equal(before[given_expressed].levels, after[given_expressed].levels)
        np.testing.assert_array_equal(before[given_expressed].counts, after[given_expressed].counts)
    evaluator = protocol(contextual)
    assert dict(evaluator({})) == dict(evaluator({}))


def test_coordinates_reach_the_model_where_bags_have_them():
    seen = []

    def spy(variables, shown, coordinates):
        seen.append(None if coordinates is None else coordinates.shape)
        return uniform(variables, shown, coordinates)

    for spatial in (True, False):
        eval_cells = hold_out(study(10, 3, spatial=True), cells=5, spatial=spatial)
        ImputationModel(spy, {}, bags_per_batch=1).predict(eval_cells, drawing.mask_ratio(eval_cells, 0.4, 0))
    assert seen == [(1, 5, 2), None]


# Tables


class Broken:
    """A baseline that cannot answer."""

    name, fitted_on, remark = "broken", "these cells", ""

    def __init__(self, error):
        self.error = error

    def predict(self, eval_cells, masked):
        raise self.error


def test_a_method_that_fails_is_a_row_with_its_reason(monkeypatch):
    cells = hold_out(HELD_OUT)
    failures = {
        "it is not here": Unavailable("it is not here"),
        "ValueError: first": ValueError("first\nmore"),
    }
    standard = imputation.standard_methods
    for reason, error in failures.items():
        monkeypatch.setattr(
            imputation, "standard_methods", lambda *a, e=error, **o: [*standard(*a, **o), Broken(e)]
        )
        outcome = imputation.gene_imputation(cells, None, ratios=(0.3, 0.6), seeds=2, magic=False)
        for table in outcome.reports:
            assert table.rows[-1] == ["broken", "these cells", "-", "-", "-", "-", reason]
        assert not [label for label in outcome.curves if "broken" in label]
    draws = [lambda: (random_mask(cells, 0.3), {})]
    for method, error in (
        (Broken(StoreError("damaged")), StoreError),
        (ImputationModel(failing, {}), ZeroDivisionError),
    ):
        with pytest.raises(error):
            measure(cells, [method], draws)


def failing(variables, shown, coordinates):
    raise ZeroDivisionError("a defect of a model has to be seen")


@pytest.fixture(scope="module")
def outcomes() -> dict[str, scoring.ProtocolResult]:
    cells, train, model = hold_out(HELD_OUT), source(TRAIN), ImputationModel(contextual, {})
    return {
        "ratio": imputation.gene_imputation(cells, model, train, ratios=(0.15, 0.8), seeds=3, magic=False),
        "cells": imputation.whole_cell_imputation(cells, model, train, seeds=3, magic=False),
        "sparsity": imputation.fixed_gene_imputation(cells, model, None, seeds=3, magic=False, per_group=3),
    }


def test_in_every_table_the_bar_is_first_and_gains_are_over_it(outcomes):
    assert [s.value for s in outcomes["ratio"].settings] == [0.15, 0.8]
    assert [s.value for s in outcomes["cells"].settings] == [1, 2, 3, 6]
    assert [s.value for s in outcomes["sparsity"].settings] == ["low", "medium", "high", "very high"]
    for outcome in outcomes.values():
        for setting, table in zip(outcome.settings, outcome.reports, strict=True):
            assert table.columns == COLUMNS
            assert all(len(row) == len(COLUMNS) for row in table.rows)
            assert setting.rows[0].label == REFERENCE_NAME
            assert table.row_keys[0] == REFERENCE
            assert outcome.labels(REFERENCE) == [REFERENCE_NAME]
            models = [key == MODEL for key in table.row_keys]
            assert models == [row[0] == "model" for row in table.rows]
            assert any(models)
            assert table.rows[0][:2] == ["most common expressed level per gene", "other cells of the study"]
            assert len({(row[0], row[1], row[2]) for row in table.rows}) == len(table.rows)
            assert f"{sum(setting.positions):,} masked expressed genes in 3 draws" in table.title
            if not setting.rows[0].mcc:
                continue
            assert table.rows[0][4] == [0, 0, 0]
            assert [row[:3] for row in table.rows[1:3]] == [
                ["model", "training studies", "no"],
                ["model", "training studies", "yes"],
            ]
            for row in setting.rows:
                assert (
                    len(row.mcc)
                    == len(row.delta_mcc)
                    == len(row.mae)
                    == (0 if row.given_expressed is None else 3)
                )
                assert row.mcc or row.remark
                np.testing.assert_allclose(
                    row.delta_mcc, np.subtract(row.mcc, setting.rows[0].mcc[: len(row.mcc)])
                )


def test_numbers_for_plots_and_json(outcomes):
    for outcome in outcomes.values():
        saved = json.loads(json.dumps(outcome.as_dict()))
        assert saved["axis"] in saved["settings"][0]
        for setting, written in zip(outcome.settings, saved["settings"], strict=True):
            assert [row["label"] for row in written["rows"]] == [row.label for row in setting.rows]
            assert all(len(row["msle"]) == len(row["mcc"]) for row in written["rows"])
        assert set(outcome.curves) >= {REFERENCE_NAME, "model", "model, given expressed"}
        for label, points in outcome.curves.items():
            for value, mcc in points:
                setting = next(s for s in outcome.settings if s.value == value)
                (row,) = [row for row in setting.rows if row.label == label]
                assert row.mcc == mcc
        for value, matrices in outcome.confusion.items():
            setting = next(s for s in outcome.settings if s.value == value)
            for matrix in matrices.values():
                assert matrix.sum() == sum(setting.positions)
                assert not matrix[0].any(), "only expressed genes are scored"
            if matrices:
                assert not matrices["model, given expressed"][:, 0].any()


def test_whole_cells_have_their_own_baseline(outcomes):
    rows = {row.method: row for row in outcomes["cells"].settings[0].rows}
    assert rows["mean of the visible cells of the bag"].mcc
    assert rows["mean of the visible cells of the bag that express the gene"].given_expressed
    assert (
        rows["kNN smoothing, k = 5"].remark
        == "all genes of the masked cells are masked, but this method needs visible genes: use another method"
    )
    assert "MAGIC" not in rows
    other = imputation.whole_cell_imputation(hold_out(HELD_OUT), None, numbers=(2,), seeds=1)
    assert "MAGIC" in {row.method for row in other.settings[0].rows}


def test_each_table_says_what_methods_know_of_the_size_of_cells(outcomes):
    for axis, outcome in outcomes.items():
        for setting, table in zip(outcome.as_dict()["settings"], outcome.reports, strict=True):
            for notes in (setting["notes"], table.notes):
                assert (scoring.BAG_RANGES in notes) == (axis == "cells")
                assert (scoring.OWN_RANGES in notes) == (axis != "cells")


# Fixed genes


def test_groups_of_sparsity_by_hand():
    counts = np.zeros((20, 8), int)
    filled = [20, 6, 5, 3, 2, 1, 0, 1]  # sparsity 0, .7, .75, .85, .9, .95, 1, .95
    for gene, cells in enumerate(filled):
        counts[:cells, gene] = gene + 1
    one = FakeStudy(counts, "a")
    one.measured = np.ones(8, bool)
    groups = sparsity_groups(hold_out(one))
    expected = {"low": [0, 1], "medium": [2, 3], "high": [4], "very high": [5, 7]}
    assert {name: list(genes) for name, genes in groups.items()} == expected
    # A study that did not measure the last genes does not make them sparse.
    panel = FakeStudy(counts[:, :8] * (np.arange(8) < 4), "b")
    panel.measured = np.arange(8) < 4
    groups = sparsity_groups(hold_out(one, panel))
    assert {name: list(genes) for name, genes in groups.items()} == expected


def test_fixed_genes_are_masked_in_all_cells_and_scored_by_group():
    rng = np.random.default_rng(0)
    counts = rng.poisson(3, (40, 20)) * (rng.random((40, 20)) < np.repeat([0.9, 0.2, 0.07, 0.04], 5))
    made = FakeStudy(counts + (np.arange(20) == 0), "a")
    made.measured = np.ones(20, bool)
    eval_cells = hold_out(made, num_positions=24)
    groups, seen = sparsity_groups(eval_cells), []

    class Spy:
        name, fitted_on, remark = "spy", "nothing", ""

        def predict(self, eval_cells, masked):
            seen.append(masked)
            return {False: scoring.LevelPrediction(masked.levels, masked.counts)}

    outcome = imputation.fixed_gene_imputation(eval_cells, Spy(), per_group=3, seeds=2, magic=False)
    assert len(seen) == 2
    for seed, masked in enumerate(seen):
        hidden = masked.mask.any(axis=0)
        assert (masked.mask.all(axis=0) == hidden).all()
        for setting in outcome.settings:
            genes = groups[setting.value]
            assert hidden[genes].sum() == min(3, len(genes))
            assert setting.positions[seed] == np.isin(masked.genes, genes).sum()
            assert bool(setting.notes) == (len(genes) < 3)
    assert (seen[0].mask != seen[1].mask).any()
    rows = {row.method: row for row in outcome.settings[0].rows}
    assert "masked in all cells" in rows["kNN smoothing, k = 5"].remark
    assert (
        rows[REFERENCE_NAME.split(",")[0]].remark
        == "this method needs training studies, but none were given: give a store with training studies"
    )


def test_a_group_without_genes_says_so():
    made = FakeStudy(np.full((10, 12), 3), "full")
    made.measured = np.ones(12, bool)
    outcome = imputation.fixed_gene_imputation(hold_out(made), None, seeds=2, magic=False)
    empty = outcome.settings[1]
    assert empty.positions == [0, 0]
    assert {row.remark for row in empty.rows} == {"no gene of this sparsity"}
    assert empty.rows[0].method == "most common expressed level per gene"
    assert outcome.settings[0].notes == ("The cells have 12 genes of this sparsity, fewer than 25.",)


# The table after training


@pytest.fixture(scope="module")
def measured() -> GeneImputation:
    evaluator = protocol(uniform, split="validation")
    assert evaluator.report is None
    evaluator.numbers = dict(evaluator({}))
    return evaluator


def test_the_table_after_training_has_every_method_and_draw(measured):
    names = [tuple(row[:3]) for row in measured.report.rows]
    knn, other, these = "kNN smoothing, k = 5", "other cells of the study", "these cells"
    assert names == [
        ("most common expressed level per gene", other, "yes"),
        ("model", "training studies", "no"),
        ("model", "training studies", "yes"),
        ("most common expressed level per gene", "training studies", "yes"),
        ("most common level per gene", other, "no"),
        ("most common level per gene", "training studies", "no"),
        (knn, "training studies", "no"),
        (knn, "training studies", "yes"),
        (knn, these, "no"),
        (knn, these, "yes"),
    ]
    for name, fitted, given_expressed, mcc, gain, mae, _ in measured.report.rows:
        label = name if name == "model" else f"{name}, {fitted}"
        label += ", given expressed" * (given_expressed == "yes" and "common" not in name)
        assert len(mcc) == 2
        for key, values in (("mcc", mcc), ("delta_mcc", gain), ("mae", mae)):
            assert measured.numbers[f"{label}/{key}"] == np.mean(values)
    assert "40%" in measured.report.title
    assert "validation" in measured.report.title


def test_the_table_is_written_as_markdown_and_json(measured, tmp_path):
    report_folder.write([measured.report], tmp_path)
    lines = (tmp_path / "report.md").read_text().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == len(measured.report.rows) + 2
    assert len({line.count("|") for line in table}) == 1
    assert (tmp_path / "report.json").stat().st_size > 0


def test_positions_beyond_the_vocabulary_play_no_part():
    def numbers(positions: int) -> dict:
        cells, train = (source(each, num_positions=positions) for each in (HELD_OUT, TRAIN))
        outcome = imputation.fixed_gene_imputation(EvalCells.read(cells), None, train, seeds=1, magic=False)
        return outcome.as_dict()

    assert json.dumps(numbers(POSITIONS)) == json.dumps(numbers(GENES))
