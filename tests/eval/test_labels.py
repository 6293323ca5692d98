"""Predicted labels: laws of the measures, and reports whose baselines are where they have to be."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from sct.errors import ConfigError, DataError
from sct.eval.labels import measures as lab
from sct.eval.labels.measures import LabelOptions, LabelPrediction

laws = settings(max_examples=60, deadline=None)
QUICK = LabelOptions(seeds=3, components=6)
combinations = st.lists(
    st.tuples(*[st.sampled_from(["x", "y", "z"])] * 2, *[st.sampled_from(["x", "y", None])] * 2),
    min_size=1,
    max_size=12,
)


def tables(rows) -> tuple[pd.DataFrame, pd.DataFrame]:
    """True and predicted labels of two keys."""
    table = pd.DataFrame(rows, dtype=object)
    return table[[0, 1]].set_axis(["type", "dose"], axis=1), table[[2, 3]].set_axis(["type", "dose"], axis=1)


def rows(report) -> dict[str, dict]:
    return {row[0]: dict(zip(report.titles, row, strict=True)) for row in report.rows}


# Accuracies


@laws
@given(combinations)
def test_exact_is_below_partial_and_both_are_means_of_rows(rows):
    true, predicted = tables(rows)
    exact, partial = lab.exact_accuracy(true, predicted), lab.partial_accuracy(true, predicted)
    right = [[a == c, b == d] for a, b, c, d in rows]
    assert exact == pytest.approx(np.mean([all(each) for each in right]))
    assert partial == pytest.approx(np.mean(right))
    assert exact <= partial + 1e-12
    assert lab.exact_accuracy(true, true) == lab.partial_accuracy(true, true) == 1
    order = np.random.default_rng(0).permutation(len(rows))
    assert lab.partial_accuracy(true.iloc[order], predicted.iloc[order]) == pytest.approx(partial)


def test_keys_are_found_by_name_and_cells_by_order():
    true = pd.DataFrame({"a": ["x", "y"], "b": ["u", "v"]})
    assert lab.exact_accuracy(true, true[["b", "a"]]) == 1
    assert lab.exact_accuracy(true, true.set_axis([7, 9])) == 1
    with pytest.raises(DataError, match="'b'"):
        lab.exact_accuracy(true, true[["a"]])
    with pytest.raises(DataError, match=r"\b1 prediction"):
        lab.partial_accuracy(true, true[:1])
    with pytest.raises(DataError, match="'a'"):
        lab.exact_accuracy(true.assign(a=[None, "y"]), true)


def test_f1_and_kappa_of_small_tables():
    true, predicted = pd.Series(list("xxyy")), pd.Series(["x", "y", "y", None], dtype=object)
    # x: 2/3, y: 1/2, the missing answer: 0.
    assert lab.macro_f1(true, predicted) == pytest.approx((2 / 3 + 1 / 2) / 3)
    assert lab.kappa(true, pd.Series(list("xyyy"))) == pytest.approx(0.5)
    assert lab.kappa(true, pd.Series(list("xxxx"))) == pytest.approx(0)
    assert lab.kappa(true, true) == lab.macro_f1(true, true) == 1
    assert np.isnan(lab.kappa(pd.Series(list("xx")), pd.Series(list("xx"))))


# Areas under curves


def one_hot(true: pd.Series, names) -> pd.DataFrame:
    return pd.DataFrame({name: (true == name).astype(float) for name in names})


def test_a_perfect_predictor_has_areas_of_one_and_a_constant_one_of_a_half():
    true = pd.Series(list("xxyz"))
    found = lab.areas(true, one_hot(true, "zyx"))
    assert found == (1, 1, 1, 1, (), ())
    constant = lab.areas(true, pd.DataFrame({name: [0.3] * 4 for name in "xyz"}))
    assert constant[:2] == (0.5, 0.5)
    assert constant[2:4] == pytest.approx((1 / 3, 1 / 3))
    reverse = lab.areas(true, 1 - one_hot(true, "xyz"))
    assert reverse[:2] == (0, 0)


def test_average_and_flatten_are_of_columns_and_of_pairs():
    true = pd.Series(list("xxyy"))
    scores = pd.DataFrame({"x": [0.9, 0.4, 0.5, 0.1], "y": [0.1, 0.6, 0.5, 0.9]})
    found = lab.areas(true, scores)
    # In each column 3 of 4 pairs are in order.
    assert found.auroc_average == pytest.approx(0.75)
    # Positive .9 .4 .5 .9 against .1 .6 .5 .1: 4, 2, 2.5, 4 of 4 in order.
    assert found.auroc_flatten == pytest.approx(12.5 / 16)


def test_candidates_that_no_cell_has_and_labels_that_are_no_candidate_are_told():
    true = pd.Series(list("xxyz"))
    scores = one_hot(true, "xy").assign(w=0.2)
    found = lab.areas(true, scores)
    assert found.absent == ("w",)
    assert found.unknown == ("z",)
    assert found.auroc_average == pytest.approx((1 + 1 + 0.5) / 3)
    # Three positive pairs are above all 12 others; that of z lies with 8 and below 4.
    assert found.auroc_flatten == pytest.approx((3 * 12 + 4) / 48)
    without = lab.areas(true[:3], scores[["x", "y"]][:3])
    assert lab.areas(true[:3], scores[:3]).auroc_average == without.auroc_average == 1
    assert np.isnan(lab.areas(pd.Series(["x", "x"]), pd.DataFrame({"x": [0.1, 0.4]}))[:4]).all()


@pytest.mark.slow
@laws
@given(st.integers(0, 10_000), st.integers(2, 4), st.integers(4, 25))
def test_areas_do_not_depend_on_order_or_names_nor_auroc_on_monotone_maps(seed, candidates, n):
    rng = np.random.default_rng(seed)
    names = list("wxyz")[:candidates]
    true = pd.Series(rng.choice(names, n))
    scores = pd.DataFrame(rng.dirichlet(np.ones(candidates), n), columns=names)
    found = lab.areas(true, scores)
    order, renamed = (
        rng.permutation(n),
        dict(zip(names, rng.permutation(list("abcd"))[:candidates], strict=True)),
    )
    again = lab.areas(true.iloc[order].map(renamed), scores.iloc[order].rename(columns=renamed)[::1])
    np.testing.assert_allclose(found[:4], again[:4])
    np.testing.assert_allclose(found[:4], lab.areas(true, scores[names[::-1]])[:4])
    np.testing.assert_allclose(found[:4], lab.areas(true, np.log(scores))[:4])
    assert set(found.absent) == set(names) - set(true)


def test_what_does_not_fit_is_an_error():
    true = pd.Series(list("xy"))
    good = one_hot(true, "xy")
    for scores, message in (
        (good[:1], "probabilities"),
        (good.set_axis(["x", "x"], axis=1), "'x' twice"),
        (good.replace(1.0, np.nan), "NaN"),
    ):
        with pytest.raises(DataError, match=message):
            lab.areas(true, scores)


def test_combinations_have_the_product_of_the_probabilities():
    true = pd.DataFrame({"a": ["x", "y"], "b": ["u", "w"]})
    tables = {
        "a": pd.DataFrame({"x": [0.75, 0.5], "y": [0.25, 0.5]}),
        "b": pd.DataFrame({"u": [0.5, 1], "v": [0.5, 0]}),
    }
    combined, product = lab.joint(true, tables)
    assert list(combined) == list(product.columns) == [("x", "u"), ("y", "w")]
    np.testing.assert_allclose(product, [[0.375, 0], [0.5, 0]])
    found = lab.areas(combined, product)
    assert found.auroc_average == pytest.approx((0 + 0.5) / 2)


# Reports


def data(n: int, seed: int) -> tuple[pd.DataFrame, sparse.csr_matrix]:
    """Labels of two keys, types a, b, c (half of the cells are a) and doses, and counts that tell both."""
    rng = np.random.default_rng(seed)
    types, doses = rng.choice(3, n, p=[0.5, 0.3, 0.2]), rng.choice(2, n)
    rates = np.full((n, 40), 1.0)
    for i in range(n):
        rates[i, 10 * types[i] : 10 * types[i] + 10] = 8
        rates[i, 30 + 5 * doses[i] : 35 + 5 * doses[i]] = 9
    table = pd.DataFrame(
        {"type": np.array(list("abc"))[types], "dose": np.array(["low", "high"])[doses]}, dtype=object
    )
    return table, sparse.csr_matrix(rng.poisson(rates).astype(np.float32))


def perfect(true: pd.DataFrame) -> LabelPrediction:
    return LabelPrediction(true, {key: one_hot(true[key], sorted(set(true[key]))) for key in true})


def test_perfect_predictions_have_one_and_what_looks_at_no_cell_is_at_chance():
    (true, counts), (training, before) = data(150, 0), data(200, 1)
    silent = LabelPrediction(true.assign(dose=None).astype(object))
    report, numbers = lab.compare(
        {"model": perfect(true), "half": silent}, true, training, counts, before, QUICK
    )
    table = rows(report)
    assert list(table) == [
        "model", "model, shuffled among cells", "half", "half, shuffled among cells", lab.LOGISTIC, "PCA + 5-NN",
        lab.MAJORITY, lab.COMBINATION, lab.CHANCE,
    ]  # fmt: skip
    numeric = report.titles[2:-1]
    assert all(table["model"][column] == [1.0] for column in numeric)
    assert table["half"]["exact accuracy"] == [0.0]
    assert table["half"]["partial accuracy"] == [0.5]
    assert table["half"]["remark"] == "150 of 300 labels are missing and count as wrong"
    assert table["half"]["AUROC (average)"] == "-"
    for name in (lab.LOGISTIC, "PCA + 5-NN"):
        assert table[name]["exact accuracy"][0] > 0.9
        assert table[name]["AUROC (average)"][0] > 0.95
    share = float((true["type"] == training["type"].mode()[0]).mean())
    assert table[lab.MAJORITY]["type accuracy"] == [pytest.approx(share)]
    assert table[lab.MAJORITY]["AUROC (average)"] == [0.5]
    assert table[lab.MAJORITY]["kappa"] == [pytest.approx(0)]
    best = training.value_counts().index[0]
    share = np.mean([each == best for each in true.itertuples(index=False, name=None)])
    assert table[lab.COMBINATION]["exact accuracy"] == [pytest.approx(share)]
    for name in ("model, shuffled among cells", lab.CHANCE):
        assert len(table[name]["kappa"]) == 3
        assert abs(np.mean(table[name]["kappa"])) < 0.15
        assert abs(np.mean(table[name]["AUROC (average)"]) - 0.5) < 0.1
    assert {name: set(values) for name, values in numbers.items()}["half"] < set(numeric)
    again, _ = lab.compare({"model": perfect(true), "half": silent}, true, training, counts, before, QUICK)
    assert again.as_dict() == report.as_dict()


def test_one_key_has_one_accuracy_and_seeds_of_a_model_are_measurements():
    (true, _), (training, _) = data(60, 0), data(50, 1)
    true, training = true[["type"]], training[["type"]]
    wrong = true.assign(type="c")
    report, numbers = lab.compare(
        {"model": [LabelPrediction(true), LabelPrediction(wrong)]}, true, training, options=QUICK
    )
    assert report.titles[2:5] == ("accuracy", "macro F1", "kappa")
    assert numbers["model"]["accuracy"] == [1, pytest.approx(float((true["type"] == "c").mean()))]
    assert list(numbers) == ["model", "model, shuffled among cells", lab.MAJORITY, lab.CHANCE]


def test_one_label_has_an_f1_of_its_own_and_rows_beside_are_not_shuffled():
    true = pd.DataFrame({"rare": ["Yes", "Yes", "No", "No", "No", "No"]})
    said = pd.DataFrame({"rare": ["Yes", "No", "Yes", "No", "No", None]})
    report, numbers = lab.compare(
        {"model": LabelPrediction(said)}, true, true, options=LabelOptions(seeds=2, positive="Yes"),
        beside={"other": ("a file", [LabelPrediction(true), LabelPrediction(said)])},
    )  # fmt: skip
    assert numbers["model"]['F1 of "Yes"'] == [pytest.approx(2 * 1 / (2 * 1 + 1 + 1))]
    assert numbers["other"]['F1 of "Yes"'] == [1.0, pytest.approx(0.5)]
    assert numbers[lab.MAJORITY]['F1 of "Yes"'] == [0.0]
    assert [row[:2] for row in report.rows][:3] == [
        ["model", ""], ["model, shuffled among cells", ""], ["other", "a file"],
    ]  # fmt: skip
    assert np.isnan(lab.f1_of("Yes", pd.Series(["No"]), pd.Series(["Yes"])))
    with pytest.raises(ConfigError, match="'model'"):
        lab.compare(
            {"model": LabelPrediction(said)}, true, true, beside={"model": ("", LabelPrediction(true))}
        )


def test_cells_without_a_label_and_labels_that_training_lacks():
    (true, counts), (training, before) = data(80, 0), data(80, 1)
    true.loc[3, "dose"], training.loc[5, "type"] = None, np.nan
    training = training[training["type"] != "c"]
    report, numbers = lab.compare(
        {"model": LabelPrediction(true)}, true, training, counts, before[training.index], QUICK
    )
    assert report.notes[0] == "1 cells that lack a true label are excluded."
    assert report.notes[1] == "1 training cells that lack a label are excluded."
    assert numbers["model"]["exact accuracy"] == [1.0]
    table = rows(report)
    assert "type: 1 true labels are not candidates" in table[lab.LOGISTIC]["remark"]
    share = float((true.drop(index=3)["type"] != "c").mean())
    assert numbers[lab.LOGISTIC]["type accuracy"][0] <= share


def test_a_key_that_is_constant_in_training_is_predicted_as_it_is():
    (_, counts), (training, before) = data(40, 0), data(40, 1)
    found = lab.classify(before, training.assign(dose="low").astype(object), counts, QUICK)
    for prediction in found.values():
        assert set(prediction.labels["dose"]) == {"low"}
        np.testing.assert_array_equal(prediction.probabilities["dose"], np.ones((40, 1)))


def test_tables_that_do_not_fit_are_errors():
    (true, counts), (training, before) = data(20, 0), data(20, 1)
    good = {"model": LabelPrediction(true)}
    with pytest.raises(DataError, match="'type'"):
        lab.compare(good, true, training[["dose"]])
    with pytest.raises(ConfigError, match="counts"):
        lab.compare(good, true, training, counts)
    with pytest.raises(DataError, match="19 rows"):
        lab.compare(good, true, training, counts[:19], before)
    with pytest.raises(DataError, match="19 predictions"):
        lab.compare({"model": LabelPrediction(true[:19])}, true, training)
    short = {key: table[:19] for key, table in perfect(true).probabilities.items()}
    with pytest.raises(DataError, match="19 predictions"):
        lab.compare({"model": LabelPrediction(true, short)}, true, training)
    with pytest.raises(ConfigError, match="'most common label'"):
        lab.compare({lab.MAJORITY: LabelPrediction(true)}, true, training)
    with pytest.raises(DataError, match="labels"):
        lab.compare(good, true.assign(type=None), training)
    with pytest.raises(DataError, match="'dose'"):
        lab.compare({"m": LabelPrediction(true, {"type": one_hot(true["type"], "abc")})}, true, training)
    with pytest.raises(ConfigError, match="seeds"):
        LabelOptions(seeds=0)


def test_real_cells_of_two_conditions(shared_data):
    import anndata

    adata = anndata.read_h5ad(shared_data / "single_cell" / "pbmc_kang_ifnb.h5ad")
    order = np.random.default_rng(0).permutation(adata.n_obs)[:900]
    adata = adata[order]
    raw = sparse.csr_matrix(adata.X)[:, :3000]
    table = adata.obs[["cell_type", "condition"]].astype(str).astype(object).reset_index(drop=True)
    true, training = table[600:].reset_index(drop=True), table[:600]
    options = LabelOptions(seeds=1, components=20)
    report, numbers = lab.compare({}, true, training, raw[600:], raw[:600], options)
    assert numbers[lab.LOGISTIC]["exact accuracy"][0] > 2 * numbers[lab.COMBINATION]["exact accuracy"][0]
    assert (
        numbers[lab.LOGISTIC]["AUROC (average)"][0] > 0.85 > 0.6 > numbers[lab.CHANCE]["AUROC (average)"][0]
    )
    assert "300 cells" in report.title
