"""Score predicted cell types on held-out cells, beside methods that need no pretrained model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from scipy.stats import rankdata
from sklearn.linear_model import SGDClassifier
from sklearn.metrics import balanced_accuracy_score, fbeta_score, precision_recall_fscore_support
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from sct.data.labeled_cells import MISSING, TEST, TRAIN, VALIDATION, AnnotatedCells
from sct.data.normalization import log_expression
from sct.eval import metrics
from sct.eval.labels.measures import MAJORITY, LabelOptions, classify
from sct.eval.reports.report import METHOD, MODEL, Column, Report

NATIVE = "native model, {}-NN of embeddings"
CORRELATION = "correlation to type means (as SingleR)"
SGD = "logistic regression on scaled log1p counts, SGD (as CellTypist)"
NEIGHBORS = 15
# Metric -> how it is computed; "weighted" weights labels by their number of cells, "macro" weights them equally.
METRICS = (
    "accuracy", "balanced accuracy", "weighted precision", "weighted recall", "weighted F1", "macro precision",
    "macro recall", "macro F1",
)  # fmt: skip
SILHOUETTE, ECE, TRAINED = "silhouette", "calibration error", "trained parameters"
# The column "Accuracy" of Tables 4 to 6 of the scPEFT paper equals this F-beta of the printed precision and recall.
BETA = 3**0.5
_GENES = 2000  # number of variable genes for the correlation


def scores(true: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Compute all metrics in `METRICS` of predicted labels (N,); 1 is the best value of each.

    A label that is predicted for no cell has a precision of 0. Averages are over all labels that are true or predicted
    for some cell; balanced accuracy and macro recall differ only by predicted labels that no cell has. Weighted recall
    equals accuracy.
    """
    both = metrics.codes([*true, *predicted])
    true, predicted = both[: len(true)], both[len(true) :]
    with metrics.quiet():
        weighted, macro = (
            precision_recall_fscore_support(true, predicted, average=kind, zero_division=0.0)[:3]
            for kind in ("weighted", "macro")
        )
        balanced = balanced_accuracy_score(true, predicted)
    values = [float(np.mean(true == predicted)), balanced, *weighted, *macro]
    return dict(zip(METRICS, map(float, values), strict=True))


def fit_temperature(logits: np.ndarray, codes: np.ndarray) -> float:
    """Fit the temperature by which logits are divided, so that probabilities match observed frequencies.

    The temperature minimizes the cross-entropy on validation cells (Guo et al. 2017, "On calibration of modern neural
    networks") and one more cell, which has each label with the same probability. Without this cell, validation cells
    that are all right would give probabilities of 1. The temperature does not change which label is the most probable.

    Parameters
    ----------
    logits
        Logits of validation cells (n, C).
    codes
        Classes (n,); cells with a negative class are left out.

    Returns
    -------
    The temperature, between 0.05 and 20; 1 without cells.
    """
    kept = codes >= 0
    if not kept.any():
        return 1.0
    given, right = np.asarray(logits, np.float64)[kept], codes[kept]

    def loss(exponent: float) -> float:
        found = -log_softmax(given / np.exp(exponent), axis=1)
        return float(found[np.arange(len(right)), right].sum() + found.mean())

    return float(np.exp(minimize_scalar(loss, bounds=(np.log(0.05), np.log(20.0)), method="bounded").x))


def calibration_error(right: np.ndarray, probability: np.ndarray) -> float:
    """Return the expected calibration error: mean difference between the probability of the best label and accuracy.

    Parameters
    ----------
    right
        Whether the best label is the true one, bool (N,).
    probability
        Probability of the best label, (N,).
    """
    found = metrics.reliability(right, probability)
    gaps = np.abs(found.predicted - found.observed)[found.number > 0]
    return float(np.average(gaps, weights=found.number[found.number > 0]))


def baselines(cells: AnnotatedCells) -> dict[str, np.ndarray]:
    """Predict the labels of the test cells by methods that need no pretrained model, fitted on the training cells.

    Validation cells are not used. All methods read log1p of counts per 10,000.

    Returns
    -------
    Dict from the name of a method to its labels, (n,).
    """
    train, test = (sparse.csr_matrix(cells.counts(split), dtype=np.float32) for split in (TRAIN, TEST))
    labels = cells.labels(TRAIN)
    with metrics.quiet():
        fitted = classify(train, pd.DataFrame({"label": labels}), test, LabelOptions(k=NEIGHBORS))
    found = {name: each.labels["label"].to_numpy(object) for name, each in fitted.items()}
    before, after = log_expression(train), log_expression(test)
    found[CORRELATION] = by_correlation(before, labels, after)
    found[SGD] = _by_sgd(before, labels, after)
    names, counts = np.unique(labels.astype(str), return_counts=True)
    found[MAJORITY] = np.full(test.shape[0], names[counts.argmax()], dtype=object)
    return found


def by_correlation(before: sparse.csr_matrix, labels: np.ndarray, after: sparse.csr_matrix) -> np.ndarray:
    """Label each cell by the label whose mean expression has the largest Spearman correlation with the cell.

    This is the first step of SingleR (Aran et al. 2019), on the genes that vary most between the means of labels.

    Parameters
    ----------
    before, labels
        Log expression (T, G) and labels (T,) of reference cells.
    after
        Log expression (N, G) of the cells to label.
    """
    names = np.unique(labels.astype(str))
    means = np.stack([np.asarray(before[labels == name].mean(axis=0)).ravel() for name in names])
    genes = np.argsort(-means.var(axis=0), kind="stable")[:_GENES]
    reference = _standardized(rankdata(means[:, genes], axis=1))
    found = []
    for start in range(0, after.shape[0], 4096):
        ranks = rankdata(after[start : start + 4096][:, genes].toarray(), axis=1)
        found.append((_standardized(ranks) @ reference.T).argmax(axis=1))
    return names[np.concatenate(found)].astype(object)


def _standardized(values: np.ndarray) -> np.ndarray:
    centered = values - values.mean(axis=1, keepdims=True)
    return centered / np.maximum(np.linalg.norm(centered, axis=1, keepdims=True), 1e-12)


def _by_sgd(before: sparse.csr_matrix, labels: np.ndarray, after: sparse.csr_matrix) -> np.ndarray:
    # Genes are scaled, but not centered, so that the matrix stays sparse.
    scaler = StandardScaler(with_mean=False).fit(before)
    scaled = [scaler.transform(each) for each in (before, after)]
    for each in scaled:
        each.data = np.minimum(
            each.data, 10.0
        )  # rare genes get large values; CellTypist also cuts them at 10
    with metrics.quiet():
        model = SGDClassifier(loss="log_loss", alpha=1e-4, max_iter=1000, random_state=0).fit(
            scaled[0], labels
        )
    return model.predict(scaled[1]).astype(object)


@dataclasses.dataclass(frozen=True, eq=False)
class CellOutputs:
    """Embeddings (n, D) of cells, and logits (n, C) of their classes; None for a model without a classifier."""

    embeddings: np.ndarray
    logits: np.ndarray | None = None


# Function of (variables, split) that runs the model over the cells of a split, in the order of `AnnotatedCells.rows`.
Run = Callable[[Any, str], CellOutputs]


@dataclasses.dataclass(frozen=True, eq=False)
class AnnotationResult:
    """Results of a fine-tuned model and of other methods on the test cells.

    Attributes
    ----------
    table, classes
        Report of all methods, and report of the fine-tuned model by label.
    numbers
        Metrics of the fine-tuned model by name.
    temperature
        See `fit_temperature`.
    embeddings
        Embeddings of the test cells, (n, D), of the native model and of the fine-tuned model. The first is None if the
        native model was not run.
    """

    table: Report
    classes: Report
    numbers: dict[str, float]
    temperature: float
    embeddings: tuple[np.ndarray | None, np.ndarray]


def score_annotation(
    cells: AnnotatedCells,
    run: Run,
    variables: Any,
    base: Any | None,
    name: str,
    trained: int,
    with_baselines: bool = True,
    temperature: float | None = None,
) -> AnnotationResult:
    """Evaluate a fine-tuned model on the test cells.

    Parameters
    ----------
    cells
        Labeled cells; they must have test cells.
    run
        See `Run`.
    variables
        Variables of the fine-tuned model.
    base
        Variables of the native model. With them, the report also has the label transfer by nearest neighbors in the
        space of the native embeddings (the reference mapping of the scPEFT paper).
    name
        Name of the method of fine-tuning.
    trained
        Number of trained parameters.
    with_baselines
        Whether to fit the methods of `baselines`.
    temperature
        See `fit_temperature`; None to fit it.
    """
    if temperature is None:
        codes = cells.codes[cells.rows[VALIDATION]]
        temperature = fit_temperature(_logits(run(variables, VALIDATION)), codes)
    outputs, true = run(variables, TEST), cells.labels(TEST)
    probabilities = np.exp(log_softmax(_logits(outputs) / temperature, axis=1))
    best = probabilities.argmax(axis=1)
    predicted = np.asarray(cells.names, dtype=object)[best]
    numbers = {
        **scores(true, predicted),
        SILHOUETTE: metrics.silhouette(outputs.embeddings, metrics.codes(true)),
        ECE: calibration_error(true == predicted, probabilities[np.arange(len(best)), best]),
    }
    columns: list[Column | str] = [METHOD, *METRICS, SILHOUETTE, ECE, TRAINED]
    report = Report(
        f"Cell types of {len(true):,} test cells ({len(cells.names)} types)", columns, notes=_notes(cells, temperature),
        better=dict.fromkeys(METRICS, "max"),
    )  # fmt: skip
    report.add(
        f"fine-tuned ({name})",
        *([numbers[each]] for each in (*METRICS, SILHOUETTE, ECE)),
        f"{trained:,}",
        key=MODEL,
    )
    native: np.ndarray | None = None
    if base is not None:
        reference, native = run(base, TRAIN).embeddings, run(base, TEST).embeddings
        nearest = KNeighborsClassifier(min(NEIGHBORS, len(reference)), metric="cosine")
        found = nearest.fit(reference, cells.labels(TRAIN)).predict(native)
        spread = metrics.silhouette(native, metrics.codes(true))
        _add(report, NATIVE.format(NEIGHBORS), true, found, "0", spread)
    for method, found in (baselines(cells) if with_baselines else {}).items():
        _add(report, method, true, found, "-")
    return AnnotationResult(
        report, _classes(cells, true, predicted), numbers, temperature, (native, outputs.embeddings)
    )


def _logits(outputs: CellOutputs) -> np.ndarray:
    assert outputs.logits is not None
    return outputs.logits


def _add(
    report: Report,
    method: str,
    true: np.ndarray,
    predicted: np.ndarray,
    trained: str,
    silhouette: float | None = None,
) -> None:
    """Add the row of a method; `trained` is the number of trained parameters of a neural network, "-" for others."""
    values = scores(true, predicted)
    spread: Any = "-" if silhouette is None else [silhouette]
    report.add(method, *([values[each]] for each in METRICS), spread, "-", trained)


def _classes(cells: AnnotatedCells, true: np.ndarray, predicted: np.ndarray) -> Report:
    """Return the report by label, the rarest label first."""
    names = sorted(set(true) | set(cells.names), key=lambda name: (int((true == name).sum()), name))
    beta, train = Column("f_beta", "F-beta (beta² = 3)"), cells.labels(TRAIN)
    report = Report(
        "Test cells by type", ["cell type", "training cells", "test cells", "precision", "recall", "F1", beta],
        notes=["The scPEFT paper prints this F-beta as the accuracy of a cell type (its Tables 4 to 6)."],
    )  # fmt: skip
    for name in names:
        has, says = true == name, predicted == name
        measured: Sequence[Any] = ["n/a"] * 4
        if has.any():
            precision, recall, f1, _ = precision_recall_fscore_support(
                has, says, average="binary", zero_division=0.0
            )
            f_beta = fbeta_score(has, says, beta=BETA, zero_division=0.0)
            measured = [[float(value)] for value in (precision, recall, f1, f_beta)]
        report.add(str(name), f"{int((train == name).sum()):,}", f"{int(has.sum()):,}", *measured)
    return report


def _notes(cells: AnnotatedCells, temperature: float) -> list[str]:
    return [
        cells.how,
        "Weighted averages weight the cell types by their number of cells, so the weighted recall is the accuracy. "
        "Macro averages weight all types equally; balanced accuracy is the mean recall of the types of the test cells. "
        "The scPEFT paper does not say which averages it reports, and its accuracy is not the fraction of right cells.",
        "Silhouette: of the embeddings of the test cells, between -1 and 1. Calibration error: mean difference between "
        f"the probability of the predicted type and the accuracy, at temperature {temperature:.2f}, which was fitted "
        "on the validation cells. The validation cells also chose the best epoch, so the probabilities of new cells "
        "can be too high.",
        "Baselines are fitted on the training cells.",
    ]


class AnnotationReport:
    """Evaluation of a fine-tuned model at the end of training; see `sct.tasks.base.Evaluator`.

    Parameters
    ----------
    evaluate
        Function from variables to the results.
    """

    name = "annotation"

    def __init__(self, evaluate: Callable[[Any], AnnotationResult]):
        self.evaluate = evaluate
        self.report: Report | None = None
        self.result: AnnotationResult | None = None

    def __call__(self, variables: Any) -> Iterator[tuple[str, float]]:
        """Evaluate the model; yield the metrics of the test cells."""
        self.result = self.evaluate(variables)
        self.report = self.result.table
        yield from {**self.result.numbers, "temperature": self.result.temperature}.items()


class ClassesReport:
    """Table by cell type of an evaluation that has run before."""

    name = "annotation_types"

    def __init__(self, before: AnnotationReport):
        self.before = before
        self.report: Report | None = None

    def __call__(self, variables: Any) -> Iterator[tuple[str, float]]:
        """Set the report; yield the number of cell types."""
        assert self.before.result is not None
        self.report = self.before.result.classes
        yield "cell types", float(len(self.report.rows))


def class_weights(codes: np.ndarray, number: int, kind: str) -> np.ndarray:
    """Return the weight of each class in the loss, float32 (C,).

    Parameters
    ----------
    codes
        Classes of the training cells.
    number
        Number of classes.
    kind
        "none": all weights are 1. "balanced": weights are inversely proportional to the numbers of training cells, and
        their mean over the training cells is 1.
    """
    if kind == "none":
        return np.ones(number, np.float32)
    counts = np.bincount(codes[codes != MISSING], minlength=number)
    return (counts.sum() / (number * np.maximum(counts, 1))).astype(np.float32)
