"""Imputation of masked genes: an oracle is perfect, every method answers the same questions."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import matthews_corrcoef

from sct.data import masking
from sct.data.bags import BagOptions, BagSource
from sct.data.tokenize import bin_counts
from sct.eval import baselines, report
from sct.eval.protocols import GeneImputation
from tests.data.fake_study import toy_study

GENES, POSITIONS, NUM_BINS = 12, 16, 5
COMMON = "most common level per gene"
EXPRESSED = "most common expressed level per gene"
KNN = "kNN smoothing, k = 5"
TRAIN, HELD_OUT = toy_study(60, GENES, seed=1, name="train"), toy_study(22, GENES, seed=2, name="held out")


def bags(study, cells: int, **options) -> BagSource:
    return BagSource(
        [study], BagOptions(cells, POSITIONS, NUM_BINS, with_counts=True, **options), exhaustive=True
    )


def protocol(probabilities, cells: int = 8, held_out=HELD_OUT, **options) -> GeneImputation:
    return GeneImputation(
        probabilities, bags(TRAIN, cells), bags(held_out, cells), **{"seeds": 2, "ratio": 0.4, **options}
    )


def uniform(variables, shown, coordinates):
    return jnp.full((*shown.shape, NUM_BINS), 1 / NUM_BINS)


def oracle(variables, shown, coordinates):
    """Knows the tokens of the only bag."""
    return jax.nn.one_hot(variables["tokens"], NUM_BINS)


def fully_masked(study) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Cells, genes, levels and counts of all expressed genes."""
    counts = study.counts.toarray()
    tokens = bin_counts(study.counts).tokens
    cells, genes = np.nonzero(tokens)
    return cells, genes, tokens[cells, genes], counts[cells, genes]


def test_an_oracle_of_levels_is_perfect_up_to_the_width_of_levels():
    held_out = bags(HELD_OUT, 22)
    bag = held_out.bag(0)
    numbers = dict(protocol(oracle, cells=22)({"tokens": jnp.asarray(bag["tokens"])[None]}))
    assert numbers["model/mcc"] == numbers["model, told/mcc"] == 1
    errors = []
    for seed in range(2):
        key = jax.random.fold_in(jax.random.key(seed), 0)
        hidden = np.asarray(masking.exact_ratio(key, jnp.asarray(bag["tokens"])[None], 0.4, NUM_BINS))[0]
        cells, genes = np.nonzero(hidden & (bag["tokens"] > 0) & (bag["tokens"] < NUM_BINS))
        values = bag["values"][cells, bag["tokens"][cells, genes]]
        errors.append(np.abs(values - bag["counts"][cells, genes]).mean())
    assert np.mean(errors) > 0
    np.testing.assert_allclose(numbers["model/mae"], np.mean(errors), rtol=1e-5)
    np.testing.assert_allclose(numbers["model, told/mae"], np.mean(errors), rtol=1e-5)
    others = {name: value for name, value in numbers.items() if not name.startswith("model")}
    assert others
    assert all(value < 0.9 for name, value in others.items() if name.endswith("mcc"))
    assert all(value > np.mean(errors) for name, value in others.items() if name.endswith("mae"))


def test_a_model_that_is_told_is_never_asked_whether_a_gene_is_expressed():
    def shy(variables, shown, coordinates):
        """Calls everything unexpressed, and the highest level the next best."""
        return jnp.broadcast_to(jnp.asarray([0.9, 0.01, 0.01, 0.01, 0.07]), (*shown.shape, NUM_BINS))

    imputation = protocol(shy, cells=22, ratio=1.0, seeds=1)
    numbers = dict(imputation({}))
    assert numbers["model/mcc"] == 0
    cells, _, _, counts = fully_masked(HELD_OUT)
    values = bin_counts(HELD_OUT.counts, with_values=True).values[cells]
    free = values @ [0.9, 0.01, 0.01, 0.01, 0.07]
    told = values @ [0, 0.1, 0.1, 0.1, 0.7]
    np.testing.assert_allclose(numbers["model/mae"], np.abs(free - counts).mean(), rtol=1e-5)
    np.testing.assert_allclose(numbers["model, told/mae"], np.abs(told - counts).mean(), rtol=1e-5)


def test_the_table_of_common_levels_by_hand():
    numbers = dict(protocol(uniform, ratio=1.0, seeds=1)({}))
    cells, genes, level, counts = fully_masked(HELD_OUT)
    train = bin_counts(TRAIN.counts).tokens
    held_out = bin_counts(HELD_OUT.counts, with_values=True)
    for name, first in ((COMMON, 0), (f"{EXPRESSED}, told", 1)):
        frequency = np.stack([(train == i).sum(axis=0) for i in range(first, NUM_BINS)])
        predicted = first + frequency.argmax(axis=0)[genes]
        np.testing.assert_allclose(numbers[f"{name}/mcc"], matthews_corrcoef(level, predicted), rtol=1e-9)
        error = np.abs(held_out.values[cells, predicted] - counts).mean()
        np.testing.assert_allclose(numbers[f"{name}/mae"], error, rtol=1e-5)


def test_numbers_do_not_depend_on_how_cells_are_put_into_bags():
    """With all genes masked nothing depends on the draw; cells of PAD in the last bag do not count."""
    few, many = (dict(protocol(uniform, cells, ratio=1.0, seeds=1)({})) for cells in (4, 9))
    assert few.keys() == many.keys()
    for name, value in few.items():
        np.testing.assert_allclose(value, many[name], rtol=1e-6, err_msg=name)


def test_all_methods_are_asked_at_the_same_positions(monkeypatch):
    shown, masks = [], []

    def spy(variables, tokens, coordinates):
        jax.debug.callback(lambda t: shown.append(np.asarray(t)[0]), tokens, ordered=True)
        return uniform(variables, tokens, coordinates)

    smooth = baselines.KnnSmoothing.__call__

    def seen(self, counts, mask):
        masks.append(mask.copy())
        return smooth(self, counts, mask)

    monkeypatch.setattr(baselines.KnnSmoothing, "__call__", seen)
    dict(protocol(spy)({}))
    jax.effects_barrier()
    assert len(shown) == len(masks) == 3 * 2
    for tokens, mask in zip(shown, masks, strict=True):
        np.testing.assert_array_equal(tokens == NUM_BINS + 1, mask)
        assert (mask.sum(axis=1) == np.where((tokens != NUM_BINS).any(axis=1), round(0.4 * GENES), 0)).all()
    assert (masks[0] != masks[1]).any(), "two draws"
    assert (masks[0] != masks[2]).any(), "two bags"


def test_the_model_sees_no_level_of_a_masked_gene_and_the_numbers_repeat():
    def copying(variables, shown, coordinates):
        return jax.nn.one_hot(shown, NUM_BINS) + 0.1

    imputation = protocol(copying)
    first, second = dict(imputation({})), dict(imputation({}))
    assert first == second
    assert first["model/mcc"] == 0


def test_coordinates_reach_the_model_where_bags_have_them():
    slide = toy_study(10, GENES, seed=3, spatial=True)
    seen = []

    def spy(variables, shown, coordinates):
        seen.append(coordinates.shape)
        return uniform(variables, shown, coordinates)

    dict(GeneImputation(spy, bags(TRAIN, 5), bags(slide, 5, spatial=True), seeds=1)({}))
    assert seen == [(1, 5, 2)]


@pytest.fixture(scope="module")
def measured() -> GeneImputation:
    imputation = protocol(uniform, split="validation")
    assert imputation.report is None
    imputation.numbers = dict(imputation({}))
    return imputation


def test_the_report_has_every_method_and_draw(measured):
    rows = measured.report.rows
    assert [(row[0], row[1]) for row in rows] == [
        ("model", "no"),
        (KNN, "no"),
        (COMMON, "no"),
        ("model", "yes"),
        (KNN, "yes"),
        (EXPRESSED, "yes"),
    ]
    for name, told, mcc, mae in rows:
        assert len(mcc) == len(mae) == 2
        prefix = f"{name}, told" if told == "yes" else name
        assert measured.numbers[f"{prefix}/mcc"] == np.mean(mcc)
        assert measured.numbers[f"{prefix}/mae"] == np.mean(mae)
    assert "40%" in measured.report.title
    assert "validation" in measured.report.title
    assert measured.report.table().row_count == len(rows)


def test_the_report_is_written_as_markdown_and_json(measured, tmp_path):
    report.write([measured.report], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]
    (saved,) = json.loads((tmp_path / "report.json").read_text())
    assert saved["rows"] == measured.report.rows
    lines = (tmp_path / "report.md").read_text().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == len(measured.report.rows) + 2
    assert {line.count("|") for line in table} == {5}
    mcc = measured.report.rows[0][2]
    assert f"{np.mean(mcc):.3f} ± {np.std(mcc):.3f}" in table[2]


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="2 cells for 3 columns"):
        report.Report("t", ("a", "b", "c")).add("x", [1.0])
