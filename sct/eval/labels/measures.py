"""Compare predicted labels with baselines by accuracy, macro-F1, Cohen's kappa, AUROC and AUPRC."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, cohen_kappa_score, f1_score, roc_auc_score
from sklearn.neighbors import KNeighborsClassifier

from sct.checks import check_at_least, check_distinct, check_finite, check_not_empty, check_one_each
from sct.data.normalization import log_expression
from sct.errors import ConfigError, DataError
from sct.eval import metrics
from sct.eval.reports.report import CONTROL, FITTED_ON, METHOD, MODEL, REMARK, Report
from sct.progress import track

SHUFFLED = "{}, shuffled among cells"
LOGISTIC, KNN, MAJORITY = "PCA + logistic regression", "PCA + {}-NN", "most common label"
COMBINATION, CHANCE = "most common combination", "guess by frequency"
TRAINING = "training cells"
UNDEFINED, UNMEASURED = "n/a", "-"
AREAS = ("AUROC (average)", "AUROC (flatten)", "AUPRC (average)", "AUPRC (flatten)")


@dataclasses.dataclass(frozen=True, eq=False)
class LabelPrediction:
    """Hold the predicted labels of N cells.

    Attributes
    ----------
    labels
        (N, keys) table of labels, one column per key (a key is a kind of label, such as "cell_type"). None or NaN means
        that the method gave no valid answer, which counts as wrong.
    probabilities
        Dict from each key to a table (N, candidates) of probabilities or other scores; None if there are no scores.
    """

    labels: pd.DataFrame
    probabilities: Mapping[str, pd.DataFrame] | None = None


@dataclasses.dataclass(frozen=True)
class LabelOptions:
    """Options of the evaluation of predicted labels.

    Attributes
    ----------
    seeds
        Number of random draws of the shuffled controls and the guessed labels, with the seeds 0, 1, ...
    components, k
        Number of principal components of the baselines, and number of nearest neighbors that vote in the k-NN baseline.
    positive
        Label whose F1 score gets its own column, such as "Yes". With "", no column is added.
    """

    seeds: int = 5
    components: int = 50
    k: int = 5
    positive: str = ""

    def __post_init__(self) -> None:
        for name in ("seeds", "components", "k"):
            check_at_least(name, getattr(self, name), 1)


def _right(true: pd.DataFrame, predicted: pd.DataFrame) -> np.ndarray:
    """For each cell and key, return whether the predicted label equals the true label, bool (N, keys)."""
    if missing := [key for key in true if key not in predicted]:
        raise DataError(
            f"the predictions have no column {missing[0]!r}, but the true labels have one: "
            "predict every column of the true labels."
        )
    check_not_empty("the table of true labels", true, error=DataError)
    check_one_each("predictions", len(predicted), "cells", len(true))
    if missing := [key for key in true if true[key].isna().any()]:
        raise DataError(
            f"the true labels have missing values in the column {missing[0]!r}: remove the "
            "cells without a label."
        )
    pairs = [(true[key].to_numpy(object), predicted[key].to_numpy(object)) for key in true]
    return np.stack([np.asarray(a == b, dtype=bool) for a, b in pairs], axis=1)


def exact_accuracy(true: pd.DataFrame, predicted: pd.DataFrame) -> float:
    """Return the fraction of cells whose labels are all right (Cell2Sentence, section 4.3, Table 3, "full label").

    Parameters
    ----------
    true, predicted
        (N, keys) tables with the same order of cells; a missing prediction counts as wrong.

    Returns
    -------
    Value in [0, 1], higher is better; never above `partial_accuracy`.

    Raises
    ------
    DataError
        The predictions lack a key of the true labels, lengths differ, or a true label is missing.
    """
    return float(_right(true, predicted).all(axis=1).mean())


def partial_accuracy(true: pd.DataFrame, predicted: pd.DataFrame) -> float:
    """Return the accuracy, in [0, 1], averaged over the kinds of labels (Cell2Sentence, Table 3, "partial label").

    For parameters and errors see `exact_accuracy`.
    """
    return float(_right(true, predicted).mean())


def _integers(true: pd.Series, predicted: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Return true and predicted labels (N,) as integers; a missing prediction counts as a separate label."""
    both = metrics.codes([*true, *(None if pd.isna(each) else each for each in predicted)])
    return both[: len(true)], both[len(true) :]


def macro_f1(true: pd.Series, predicted: pd.Series) -> float:
    """Return the macro-F1 of predicted labels (N,): the mean F1 over all labels, in [0, 1]; 1 is the best value.

    A label that is predicted, but is true for no cell, has an F1 of 0.
    """
    return metrics.accuracy_and_f1(*_integers(true, predicted))[1]


def kappa(true: pd.Series, predicted: pd.Series) -> float:
    """Return Cohen's kappa of true and predicted labels (N,), in [-1, 1]: 1 is perfect, 0 is agreement by chance.

    Kappa is NaN if all cells have the same label and this label is predicted for all of them.
    """
    with metrics.quiet():
        return float(cohen_kappa_score(*_integers(true, predicted)))


class LabelAreas(NamedTuple):
    """Hold the AUROC and AUPRC of the predicted probabilities of one kind of label.

    Attributes
    ----------
    auroc_average, auprc_average
        Area under the curve of each candidate against all other candidates, averaged over the candidates that are the
        true label of some but not all cells.
    auroc_flatten, auprc_flatten
        Area under the curve over all pairs of a cell and a candidate.
    absent
        Candidates that are not the true label of any cell. The averaged areas leave these candidates out. In the
        flattened areas, all pairs with these candidates are negative.
    unknown
        True labels that are not candidates. In every cell, these labels get the lowest score.
    """

    auroc_average: float
    auroc_flatten: float
    auprc_average: float
    auprc_flatten: float
    absent: tuple[Any, ...] = ()
    unknown: tuple[Any, ...] = ()


def areas(true: pd.Series, probabilities: pd.DataFrame) -> LabelAreas:
    """Return one-vs-rest AUROC and AUPRC of the probabilities of candidates (Cell2Sentence, section 4.3, Table 3).

    Parameters
    ----------
    true
        (N,) true labels.
    probabilities
        (N, candidates) table with the same order of cells; the columns are the candidates. Other scores also work if a
        higher score means a more likely label and the scores of different candidates are comparable.

    Returns
    -------
    See `LabelAreas`. Values are in [0, 1], and 1 is the best value. Random scores give an AUROC of 0.5 and an AUPRC
    equal to the fraction of positive pairs. Values are NaN if all cells have the same true label.

    Raises
    ------
    DataError
        Lengths differ, a candidate occurs twice, or a probability is not finite.
    """
    scores, names = probabilities.to_numpy(float), list(probabilities.columns)
    check_not_empty("the table of true labels", true, error=DataError)
    check_one_each("rows of probabilities", len(scores), "cells", len(true))
    check_distinct("the table of probabilities", names, error=DataError)
    check_finite("the table of probabilities", scores, "cells")
    given = list(pd.unique(true))
    unknown = tuple(label for label in given if label not in set(names))
    lowest = min(0.0, scores.min()) if scores.size else 0.0
    scores = np.hstack([scores, np.full((len(true), len(unknown)), lowest)])
    names += unknown
    places = {name: i for i, name in enumerate(names)}
    positive = np.zeros(scores.shape, bool)
    positive[np.arange(len(true)), [places[label] for label in true]] = True
    share = positive.mean(axis=0)
    mixed = (share > 0) & (share < 1)
    absent = tuple(name for name, part in zip(names, share, strict=True) if part == 0)
    if not mixed.any():
        return LabelAreas(np.nan, np.nan, np.nan, np.nan, absent, unknown)
    within, flat = (positive[:, mixed], scores[:, mixed]), (positive.ravel(), scores.ravel())
    return LabelAreas(
        float(roc_auc_score(*within, average="macro")),
        float(roc_auc_score(*flat)),
        float(average_precision_score(*within, average="macro")),
        float(average_precision_score(*flat)),
        absent,
        unknown,
    )


def joint(true: pd.DataFrame, probabilities: Mapping[str, pd.DataFrame]) -> tuple[pd.Series, pd.DataFrame]:
    """Combine several kinds of labels into one, and multiply their probabilities as if they were independent.

    Parameters
    ----------
    true
        (N, keys) true labels.
    probabilities
        Dict from each key (kind of label) to the probabilities of its candidates (N, candidates).

    Returns
    -------
    Two values, which are the arguments of `areas`. The first holds the true combination of labels of each cell (N,), as
    tuples. The second holds the products of probabilities (N, combinations), for all combinations that are true for at
    least one cell. A label that is not a candidate has probability 0.
    """
    combined = pd.Series(list(true.itertuples(index=False, name=None)), index=true.index, dtype=object)
    names = list(dict.fromkeys(combined))
    product = np.ones((len(true), len(names)))
    for i, key in enumerate(true):
        product *= (
            probabilities[key].reindex(columns=[name[i] for name in names], fill_value=0.0).to_numpy(float)
        )
    columns = pd.Index(names, tupleize_cols=False)
    return combined, pd.DataFrame(product, index=true.index, columns=columns)


def f1_of(label: Any, true: pd.Series, predicted: pd.Series) -> float:
    """Return the F1 score of one label, in [0, 1]; 1 is the best value.

    The F1 is 0 if the label is never predicted, and NaN if no cell has the label.
    """
    has, says = (np.asarray(each.to_numpy(object) == label, dtype=bool) for each in (true, predicted))
    return float(f1_score(has, says, zero_division=0.0)) if has.any() else float("nan")


def _f1_column(positive: str) -> list[str]:
    return [f'F1 of "{positive}"'] if positive else []


def _values(
    true: pd.DataFrame, prediction: LabelPrediction, positive: str = ""
) -> tuple[dict[str, float], list[str]]:
    """Return two values: all metrics of one prediction as a dict by column, and remarks for the table."""
    several, remarks = true.shape[1] > 1, []
    right = _right(true, prediction.labels)
    f1s = [macro_f1(true[key], prediction.labels[key]) for key in true]
    kappas = [kappa(true[key], prediction.labels[key]) for key in true]
    values = {_first(true): exact_accuracy(true, prediction.labels)}
    if several:
        values["partial accuracy"] = partial_accuracy(true, prediction.labels)
    with metrics.quiet():
        values |= {"macro F1": float(np.mean(f1s)), "kappa": float(np.nanmean(kappas))}
        for column in _f1_column(positive):
            own = [f1_of(positive, true[key], prediction.labels[key]) for key in true]
            values[column] = float(np.nanmean(own))
    if several:
        values |= {f"{key} accuracy": float(right[:, i].mean()) for i, key in enumerate(true)}
    if empty := int(prediction.labels[list(true)].isna().to_numpy().sum()):
        remarks.append(f"{empty:,} of {right.size:,} labels are missing and count as wrong")
    if prediction.probabilities is None:
        return values, remarks
    if missing := [key for key in true if key not in prediction.probabilities]:
        raise DataError(
            f"`probabilities` has no entry for the key {missing[0]!r}: give probabilities for all keys or "
            "for none."
        )
    found = [areas(true[key], prediction.probabilities[key]) for key in true]
    with metrics.quiet():
        values |= dict(zip(AREAS, map(float, np.nanmean([each[:4] for each in found], axis=0)), strict=True))
    if several:
        values["exact AUROC (average)"] = areas(*joint(true, prediction.probabilities)).auroc_average
    for key, each in zip(true, found, strict=True):
        found_names = {
            "candidates occur in no cell": each.absent,
            "true labels are not candidates": each.unknown,
        }
        remarks += [f"{key}: {len(names)} {what}" for what, names in found_names.items() if names]
    return values, remarks


def _first(true: pd.DataFrame) -> str:
    return "exact accuracy" if true.shape[1] > 1 else "accuracy"


def _columns(true: pd.DataFrame, positive: str) -> list[str]:
    common = ["macro F1", "kappa", *_f1_column(positive), *AREAS]
    if true.shape[1] == 1:
        return ["accuracy", *common]
    keys = [f"{key} accuracy" for key in true]
    return ["exact accuracy", "partial accuracy", *common, "exact AUROC (average)", *keys]


def components(training_counts: Any, counts: Any, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Fit a PCA on the log expression of training cells, and return the principal components of both sets of cells.

    Parameters
    ----------
    training_counts, counts
        (T, G) and (N, G) raw counts.
    number
        Number of components n; lower if there are few training cells. With fewer than three training cells or genes,
        the log expression itself is returned.

    Returns
    -------
    Components (T, n) and (N, n).
    """
    before, after = (
        log_expression(sparse.csr_matrix(each, dtype=np.float32)) for each in (training_counts, counts)
    )
    least = min(before.shape)
    if least < 3:  # arpack cannot compute a useful PCA of such a small matrix
        return before.toarray(), after.toarray()
    model = PCA(min(number, least - 1), svd_solver="arpack", random_state=0).fit(before)
    return model.transform(before), model.transform(after)


def classify(
    training_counts: Any, training: pd.DataFrame, counts: Any, options: LabelOptions | None = None
) -> dict[str, LabelPrediction]:
    """Predict labels by logistic regression and k-NN on principal components of log1p counts per 10,000.

    PCA and classifiers are fitted on the training cells, with one classifier per key.

    Parameters
    ----------
    training_counts, training
        (T, G) raw counts and (T, keys) labels of the training cells.
    counts
        (N, G) raw counts of the cells to predict.
    options
        See `LabelOptions`.

    Returns
    -------
    Dict that maps the name of each baseline to its predicted labels and probabilities.
    """
    options = options or LabelOptions()
    before, after = components(training_counts, counts, options.components)
    kinds = {
        LOGISTIC: lambda: LogisticRegression(max_iter=1000),
        KNN.format(options.k): lambda: KNeighborsClassifier(min(options.k, len(before))),
    }
    return {name: _predicted(kind, before, training, after) for name, kind in kinds.items()}


def _predicted(kind: Any, before: np.ndarray, training: pd.DataFrame, after: np.ndarray) -> LabelPrediction:
    """Fit one classifier per key on training features (T, D), and predict labels from features (N, D).

    `kind()` returns an unfitted classifier.
    """
    labels, probabilities = {}, {}
    for key in training:
        names = training[key].to_numpy(object)
        # Classifiers need at least two labels; if a key has one label, predict it for all cells.
        constant = len(pd.unique(names)) < 2
        model = (DummyClassifier(strategy="most_frequent") if constant else kind()).fit(before, names)
        labels[key] = model.predict(after)
        probabilities[key] = pd.DataFrame(
            model.predict_proba(after), columns=pd.Index(model.classes_, dtype=object)
        )
    return LabelPrediction(pd.DataFrame(labels, dtype=object), probabilities)


def _guesses(training: pd.DataFrame, n: int, seed: int) -> dict[str, LabelPrediction]:
    """Predict the labels of `n` cells by baselines that only know how frequent each label is in the training cells."""
    nothing = np.zeros((len(training), 1)), training, np.zeros((n, 1))
    common = training.value_counts(sort=False)
    best = dict(zip(training.columns, common[common == common.max()].index[0], strict=True))
    guesses = {MAJORITY: _predicted(lambda: DummyClassifier(strategy="most_frequent"), *nothing)}
    if training.shape[1] > 1:
        guesses[COMBINATION] = LabelPrediction(pd.DataFrame(best, index=range(n), dtype=object))
    guesses[CHANCE] = _predicted(lambda: DummyClassifier(strategy="stratified", random_state=seed), *nothing)
    return guesses


def _rows(prediction: LabelPrediction, rows: np.ndarray) -> LabelPrediction:
    """Return the predictions at the given row numbers, in this order."""
    tables = prediction.probabilities
    picked = None if tables is None else {k: v.iloc[rows].reset_index(drop=True) for k, v in tables.items()}
    return LabelPrediction(prediction.labels.iloc[rows].reset_index(drop=True), picked)


def compare(
    predictions: Mapping[str, LabelPrediction | Sequence[LabelPrediction]],
    true: pd.DataFrame,
    training: pd.DataFrame,
    counts: Any = None,
    training_counts: Any = None,
    options: LabelOptions | None = None,
    beside: Mapping[str, tuple[str, LabelPrediction | Sequence[LabelPrediction]]] | None = None,
) -> tuple[Report, metrics.MetricDraws]:
    """Compare predicted labels with baselines fitted on training cells (Cell2Sentence, section 4.3, Tables 3 and 9).

    All rows are scored on the same cells: those for which all true labels are known. The rows are:

    - each prediction, and the same prediction shuffled among the cells (control);
    - PCA + logistic regression and PCA + k-NN;
    - the most common label of each key, and, with several keys, the most common combination of labels;
    - labels guessed at random with their frequencies in the training cells.

    Parameters
    ----------
    predictions
        Dict from the name of each method to its `LabelPrediction` of the N cells, or to a list of predictions, one per
        seed of the model.
    true
        (N, keys) true labels.
    training
        (T, keys) labels of the training cells.
    counts, training_counts
        (N, G) and (T, G) raw counts. If both are None, the PCA baselines are left out.
    options
        See `LabelOptions`.
    beside
        Further methods, whose rows are placed before the baselines and have no shuffled control. Dict from the name of
        each method to a pair: the data that the method was fitted on, and its prediction (see `predictions`).

    Returns
    -------
    The report, and a nested dict of all numbers: {row name: {column: [one value per seed]}}. With one key, the columns
    are accuracy, macro F1, kappa and `AREAS`. With several keys, they are exact and partial accuracy, the other metrics
    averaged over the keys, the AUROC of the combinations of labels (`joint`), and the accuracy of each key. Rows
    without probabilities have no `AREAS`.

    Raises
    ------
    DataError
        Lengths differ, a key is missing, or no cell has a label for every key.
    ConfigError
        Two rows have the same name, or counts are given for only one of the two sets of cells.
    """
    options, beside = options or LabelOptions(), beside or {}
    missing = [key for key in true if key not in training]
    if missing or not len(true.columns):
        what = f"the column {missing[0]!r}" if missing else "any column"
        raise DataError(
            "the table of true labels and the table of training labels must have the same columns, but do not share "
            f"{what}: pass two tables with the same columns."
        )
    if (counts is None) != (training_counts is None):
        raise ConfigError("only one of `counts` and `training_counts` is given: pass both or neither.")
    for name, table, matrix in (("cells", true, counts), ("training cells", training, training_counts)):
        if matrix is not None:
            check_one_each("rows of counts", matrix.shape[0], name, len(table))
    kept, fits = (~table[list(true)].isna().any(axis=1).to_numpy() for table in (true, training))
    if not kept.any() or not fits.any():
        table_name = "training" if kept.any() else "true"
        raise DataError(
            f"no cell in the table of {table_name} labels has a label in every column: choose columns in which more "
            "cells have a label."
        )
    notes = []
    if left := int((~kept).sum()):
        notes.append(f"{left:,} cells that lack a true label are excluded.")
    if left := int((~fits).sum()):
        notes.append(f"{left:,} training cells that lack a label are excluded.")
    asked = [*predictions.values(), *(given for _, given in beside.values())]
    for one in (one for given in asked for one in _listed(given)):
        for each in (one.labels, *(one.probabilities or {}).values()):
            check_one_each("predictions", len(each), "cells", len(true))
    rows = np.flatnonzero(kept)
    true, training = (
        table.loc[which, list(true)].astype(object).reset_index(drop=True)
        for table, which in ((true, kept), (training, fits))
    )
    guesses = [_guesses(training, len(true), seed) for seed in range(options.seeds)]
    baselines: dict[str, list[LabelPrediction]] = {}
    if counts is not None:
        matrices = sparse.csr_matrix(training_counts)[fits], sparse.csr_matrix(counts)[kept]
        with metrics.quiet():
            fitted = classify(matrices[0], training, matrices[1], options)
        baselines |= {name: [each] for name, each in fitted.items()}
    for name in guesses[0]:
        baselines[name] = [each[name] for each in (guesses if name == CHANCE else guesses[:1])]
    names = [*predictions, *(SHUFFLED.format(name) for name in predictions), *beside, *baselines]
    check_distinct(
        "the list of rows", names, advice="give each prediction a unique name that no baseline has"
    )

    measured_rows: dict[str, tuple[str, list[LabelPrediction]]] = {}
    for name, given in predictions.items():
        chosen = [_rows(one, rows) for one in _listed(given)]
        measured_rows[name] = "", chosen
        orders = (np.random.default_rng(seed).permutation(len(rows)) for seed in range(options.seeds))
        shuffled = [_rows(chosen[i % len(chosen)], order) for i, order in enumerate(orders)]
        measured_rows[SHUFFLED.format(name)] = "", shuffled
    for name, (fitted_on, given) in beside.items():
        measured_rows[name] = fitted_on, [_rows(one, rows) for one in _listed(given)]
    measured_rows |= {name: (TRAINING, each) for name, each in baselines.items()}

    columns = _columns(true, options.positive)
    report = Report(
        f"Labels of {len(true):,} cells: {', '.join(f'{key} ({true[key].nunique()})' for key in true)}",
        (METHOD, FITTED_ON, *columns, REMARK),
        notes=(*notes, *_notes(true)),
    )
    numbers: metrics.MetricDraws = {}
    for name in track(list(measured_rows), "measuring labels"):
        fitted_on, given = measured_rows[name]
        measured = [_values(true, each, options.positive) for each in given]
        numbers[name] = {c: [values[c] for values, _ in measured] for c in columns if c in measured[0][0]}
        cells = [numbers[name].get(column, UNMEASURED) for column in columns]
        remark = "; ".join(dict.fromkeys(r for _, remarks in measured for r in remarks))
        row_key = MODEL if name in predictions else "" if fitted_on else CONTROL
        report.add(name, fitted_on, *cells, remark, key=row_key)
    return report, numbers


def _listed(given: LabelPrediction | Sequence[LabelPrediction]) -> list[LabelPrediction]:
    return [given] if isinstance(given, LabelPrediction) else list(given)


def _notes(true: pd.DataFrame) -> list[str]:
    notes = [
        "AUROC and AUPRC: mean over labels of one label against the rest (average), or over all pairs of cell and "
        "label (flatten)."
    ]
    if true.shape[1] > 1:
        notes.append(
            "Macro F1, kappa, AUROC and AUPRC are means over keys. The exact AUROC scores combinations of labels by "
            "the product of the probabilities of their labels."
        )
    return notes
