"""Scores of predicted cell types, calibration, and methods without a pretrained model."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse
from scipy.special import log_softmax, softmax
from sklearn.metrics import f1_score

from sct.data.labeled_cells import MISSING, TEST, TRAIN, VALIDATION, AnnotatedCells, SplitOptions
from sct.data.normalization import log_expression
from sct.eval.labels import annotation
from sct.eval.labels.annotation import (
    CellOutputs,
    by_correlation,
    calibration_error,
    class_weights,
    fit_temperature,
    score_annotation,
    scores,
)
from tests.train import tuned_models


def test_scores_by_hand():
    true = np.array(["a"] * 6 + ["b"] * 3 + ["c"], dtype=object)
    predicted = np.array(["a"] * 5 + ["b"] * 4 + ["d"], dtype=object)
    found = scores(true, predicted)
    assert found["accuracy"] == pytest.approx(0.8)
    assert found["weighted recall"] == pytest.approx(0.8)
    assert found["balanced accuracy"] == pytest.approx((5 / 6 + 1 + 0) / 3)
    assert found["macro recall"] == pytest.approx((5 / 6 + 1 + 0 + 0) / 4)
    assert found["weighted precision"] == pytest.approx((6 * 1 + 3 * 0.75) / 10)
    assert found["macro F1"] == pytest.approx(f1_score(true, predicted, average="macro", zero_division=0))
    assert all(value == 1 for value in scores(true, true).values())


def test_the_paper_calls_an_f_beta_accuracy():
    """Table 4 of the paper: native model, cortical layer 2-3 excitatory neuron A."""
    precision, recall = 0.1345, 0.6401
    beta = annotation.BETA**2
    assert (1 + beta) * precision * recall / (beta * precision + recall) == pytest.approx(0.3300, abs=1e-4)


def test_the_temperature_undoes_a_scale():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4000, 4)) * 2
    chance = np.exp(log_softmax(logits, axis=1))
    codes = np.array([rng.choice(4, p=row) for row in chance])
    assert fit_temperature(logits * 5, codes) == pytest.approx(5, rel=0.1)
    assert fit_temperature(logits, np.where(codes == 0, -1, codes)) > 0
    assert fit_temperature(logits, np.full(4000, -1)) == 1
    best = chance.argmax(axis=1)
    assert calibration_error(best == codes, chance.max(axis=1)) < 0.04
    sure = np.exp(log_softmax(logits * 5, axis=1)).max(axis=1)
    assert calibration_error(best == codes, sure) > 0.1
    assert calibration_error(np.ones(3, bool), np.ones(3)) == 0


def test_validation_cells_that_are_all_right_do_not_make_the_model_certain():
    sure = np.array([[3.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 3.0]] * 10)
    codes = sure.argmax(axis=1)
    found = [fit_temperature(np.tile(sure, (times, 1)), np.tile(codes, times)) for times in (1, 10)]
    probability = [float(softmax(sure[0] / each).max()) for each in found]
    # 30 right cells and one that has each label equally often: 30.33 of 31; then 300.33 of 301.
    np.testing.assert_allclose(probability, [30.33 / 31, 300.33 / 301], atol=1e-3)


def test_balanced_weights_are_those_of_rare_types():
    codes = np.array([0, 0, 0, 1, MISSING])
    weights = class_weights(codes, 2, "balanced")
    np.testing.assert_allclose(weights, [4 / 6, 4 / 2], rtol=1e-6)
    assert weights[codes[codes != MISSING]].mean() == pytest.approx(1)
    assert class_weights(codes, 2, "none").tolist() == [1, 1]


def test_cells_correlate_with_their_type():
    adata = tuned_models.cells(60)
    true = np.array(tuned_models.NAMES, dtype=object)[np.arange(60) % 3]
    expression = log_expression(sparse.csr_matrix(adata.X))
    assert np.mean(by_correlation(expression[:40], true[:40], expression[40:]) == true[40:]) > 0.9


def test_the_report_has_all_methods():
    cells = AnnotatedCells.of(tuned_models.cells(90), tuned_models.vocabulary(), "cell_type", SplitOptions())

    asked = []

    def run(variables, split):
        asked.append((variables, split))
        logits = np.eye(3)[np.maximum(cells.codes[cells.rows[split]], 0)] * 3
        noise = np.random.default_rng(len(split)).normal(0, 0.1, logits.shape)
        return CellOutputs(noise) if variables == "native" else CellOutputs(logits + noise, logits)

    found = score_annotation(cells, run, "tuned", "native", "lora", 123)
    assert found.numbers["accuracy"] == 1
    assert found.numbers["silhouette"] > 0.8
    assert set(asked) == {("tuned", VALIDATION), ("tuned", TEST), ("native", TRAIN), ("native", TEST)}
    trained = [row["trained parameters"] for _, row in found.table.records()]
    assert trained == ["123", "0", *["-"] * (len(trained) - 2)]
    native = next(row for _, row in found.table.records() if "native" in row["method"])
    assert native["accuracy"][0] < 0.8, "the native embeddings are noise"
    assert native["silhouette"][0] < 0.2
    methods = [row["method"] for _, row in found.table.records()]
    assert methods[0] == "fine-tuned (lora)"
    for word in ("native", "PCA + logistic", "PCA + 15-NN", "SingleR", "CellTypist", "most common"):
        assert any(word in method for method in methods), word
    good = [
        row["accuracy"][0]
        for _, row in found.table.records()
        if "PCA" in row["method"] or "Cell" in row["method"]
    ]
    assert min(good) > 0.8
    kinds = {row["cell type"]: row for _, row in found.classes.records()}
    assert set(kinds) == set(tuned_models.NAMES)
    assert sum(int(row["test cells"]) for row in kinds.values()) == len(cells.rows[TEST])
    assert kinds["T"]["F1"] == [1.0]
    assert cells.how in found.table.notes
