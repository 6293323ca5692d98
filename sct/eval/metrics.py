"""Compute metrics of numpy arrays with scikit-learn, scanpy and scib-metrics.

Libraries of the `analysis` extra are imported on first use. If one is missing, MissingExtraError names the package to
install. The only other module of `sct` that this module imports is `sct.extras`.
"""

from __future__ import annotations

import logging
import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.metrics import (
    accuracy_score,
    adjusted_rand_score,
    average_precision_score,
    f1_score,
    matthews_corrcoef,
    mean_absolute_error,
    normalized_mutual_info_score,
    roc_auc_score,
    silhouette_score,
)
from sklearn.model_selection import StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from sct.extras import load_extra

# Method -> metric -> one number per draw.
MetricDraws = dict[str, dict[str, list[float]]]

__all__ = [
    "KnnAccuracy",
    "SCIB_BATCH",
    "SCIB_BIO",
    "SCIB_METRICS",
    "Reliability",
    "accuracy_and_f1",
    "ari",
    "average_precision",
    "cross_entropy",
    "codes",
    "cross_validated",
    "exact_neighbors",
    "grouped_pearson",
    "knn_accuracy",
    "leiden_clusters",
    "leiden_of_graph",
    "matthews",
    "matthews_from_confusion",
    "mean_absolute_error",
    "neighbor_graph",
    "nmi",
    "quiet",
    "reliability",
    "roc_auc",
    "scib",
    "silhouette",
    "stratified_folds",
]

# The two groups of scib-metrics. An aggregate is the mean of its group; the total is 0.6 bio + 0.4 batch.
SCIB_BIO = ("isolated labels", "k-means NMI", "k-means ARI", "label silhouette", "cLISI")
SCIB_BATCH = ("BRAS", "iLISI", "kBET", "graph connectivity", "PCR comparison")
SCIB_METRICS = (*SCIB_BIO, *SCIB_BATCH, "bio", "batch", "total")

# Above this number of cells the silhouette uses a random sample, because its cost grows with the square of the cells.
SILHOUETTE_CELLS = 10_000
EXACT_NEIGHBORS = 50_000  # above this number of cells, the neighbors in the Leiden graph are approximate


def matthews(true: np.ndarray, predicted: np.ndarray) -> float:
    """Return the multi-class Matthews correlation coefficient, in [-1, 1].

    The coefficient is 0 if the true or the predicted classes are constant, and NaN for empty arrays.
    """
    if len(true) == 0:
        return float("nan")
    return float(matthews_corrcoef(true, predicted))


def matthews_from_confusion(confusion: np.ndarray) -> float:
    """Return the Matthews correlation coefficient of a confusion matrix.

    Parameters
    ----------
    confusion
        (rows, classes) counts; rows are true classes and columns are predicted classes. If a matrix has fewer rows than
        columns, the rows are the last classes. For example, a matrix without a row for class 0 leaves out the samples
        whose true class is 0.

    Returns
    -------
    The coefficient; NaN for an empty matrix.
    """
    confusion = np.asarray(confusion)
    if confusion.sum() == 0:
        return float("nan")
    skipped = confusion.shape[1] - confusion.shape[0]
    true, predicted = np.nonzero(confusion)
    weight = confusion[true, predicted]
    return float(matthews_corrcoef(true + skipped, predicted, sample_weight=weight))


# Probabilities


def roc_auc(true: np.ndarray, score: np.ndarray) -> float:
    """Return the area under the ROC curve of scores (n,) for true labels, bool (n,); NaN if one class is absent."""
    true = np.asarray(true, bool)
    return float(roc_auc_score(true, score)) if true.any() and not true.all() else float("nan")


def average_precision(true: np.ndarray, score: np.ndarray) -> float:
    """Return the average precision of scores (n,) for true labels, bool (n,); NaN if one class is absent."""
    true = np.asarray(true, bool)
    return float(average_precision_score(true, score)) if true.any() and not true.all() else float("nan")


def cross_entropy(true: np.ndarray, chance: np.ndarray, least: float = 1e-6) -> float:
    """Return the mean of -log(probability of the true class), in nats; NaN for empty arrays.

    Parameters
    ----------
    true
        (n,) true classes.
    chance
        (n, classes) predicted probabilities.
    least
        Lower limit of the probabilities. Smaller probabilities are replaced by this limit.
    """
    if len(true) == 0:
        return float("nan")
    given = chance[np.arange(len(true)), np.asarray(true, np.int64)]
    return float(-np.log(np.maximum(given, least), dtype=np.float64).mean())


class Reliability(NamedTuple):
    """Hold the data of a reliability diagram: the predicted probability and the observed frequency in each bin.

    Attributes
    ----------
    predicted, observed
        (bins,) mean predicted probability and fraction of positives in each bin; NaN for empty bins.
    number
        (bins,) number of predictions in each bin.
    """

    predicted: np.ndarray
    observed: np.ndarray
    number: np.ndarray

    @property
    def calibration_error(self) -> float:
        """Return the expected calibration error, the mean of |predicted - observed| (Guo et al., ICML 2017)."""
        filled = self.number > 0
        if not filled.any():
            return float("nan")
        distance = np.abs(self.predicted - self.observed)[filled]
        return float(np.average(distance, weights=self.number[filled]))


def reliability(true: np.ndarray, probability: np.ndarray, bins: int = 15) -> Reliability:
    """Compare predicted probabilities (n,) with true labels, bool (n,), in probability bins of equal width."""
    index = np.minimum((np.asarray(probability, np.float64) * bins).astype(int), bins - 1)
    count = np.bincount(index, minlength=bins)
    sums = [
        np.bincount(index, weights=np.asarray(x, np.float64), minlength=bins) for x in (probability, true)
    ]
    predicted, observed = (np.divide(s, count, out=np.full(bins, np.nan), where=count > 0) for s in sums)
    return Reliability(predicted, observed, count)


def grouped_pearson(
    first: np.ndarray, second: np.ndarray, group: np.ndarray, num_groups: int, least: int = 10
) -> np.ndarray:
    """Return the Pearson correlation of predicted and true values within each group.

    Parameters
    ----------
    first, second
        (n,) predicted and true values.
    group
        int (n,) group of each value, in [0, num_groups).
    num_groups
        Number of groups.
    least
        Minimum number of values in a group.

    Returns
    -------
    float64 (num_groups,). A group with fewer than `least` values or with constant true values gets NaN. If only the
    predicted values of a group are constant, the group gets 0.
    """
    x, y = np.asarray(first, np.float64), np.asarray(second, np.float64)

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(group, weights=values, minlength=num_groups) / np.maximum(size, 1)

    size = np.bincount(group, minlength=num_groups)
    x, y = x - mean(x)[group], y - mean(y)[group]
    covariance, x_variance, y_variance = mean(x * y), mean(x * x), mean(y * y)
    defined, varies = (size >= least) & (y_variance > 1e-12), x_variance > 1e-12
    scale = np.sqrt(np.where(defined & varies, x_variance * y_variance, 1))
    return np.where(defined, np.where(varies, covariance / scale, 0.0), np.nan)


# Embeddings


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings and logs in this context, and restore loggers, environment variables and global seeds after it.

    Importing scib-metrics sets an environment variable that turns off preallocation of accelerator memory. Importing
    scib-metrics or scvi-tools adds handlers to loggers. Setting the seed of scvi-tools also sets the seed of numpy and
    changes the XLA flags.
    """
    root, disabled = logging.getLogger(), logging.root.manager.disable
    handlers, level = root.handlers[:], root.level
    environment = {key: os.environ.get(key) for key in ("XLA_FLAGS", "XLA_PYTHON_CLIENT_PREALLOCATE")}
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers
        root.setLevel(level)
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        for key, value in environment.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def codes(labels: Any) -> np.ndarray:
    """Return labels (N,) as integers, numbered by first appearance.

    A metric computed from these integers does not depend on the names of the labels, which could otherwise decide ties.
    """
    return pd.factorize(np.asarray(labels, dtype=object), use_na_sentinel=False)[0]


def stratified_folds(
    labels: Any, folds: int = 5, seed: int = 0
) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray]:
    """Return stratified folds for cross-validation.

    Labels with fewer cells than folds are excluded from training and scoring, because they would be missing from some
    test folds.

    Parameters
    ----------
    labels
        (N,) labels.
    folds, seed
        Number of folds, and the random seed that assigns cells to folds.

    Returns
    -------
    Two values: a list with (train rows, test rows) for each fold, and a mask (N,) that is True for cells in the folds.

    Raises
    ------
    ValueError
        Fewer than two labels have at least `folds` cells.
    """
    names = codes(labels)
    sizes = np.bincount(names)
    kept = sizes[names] >= folds
    if (sizes >= folds).sum() < 2:
        raise ValueError(
            f"only {(sizes >= folds).sum()} of {len(sizes)} labels have at least {folds} cells, but cross-validation "
            f"with {folds} folds needs two such labels: use fewer folds."
        )
    rows = np.flatnonzero(kept)
    splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
    return [(rows[train], rows[test]) for train, test in splitter.split(rows, names[rows])], kept


class KnnAccuracy(NamedTuple):
    """Hold the result of cross-validated classification.

    Attributes
    ----------
    accuracy, macro_f1
        Accuracy and macro-F1 over all cells in the folds; each cell is predicted once, when its fold is the test fold.
    left_out_cells, left_out_labels
        `left_out_labels` is the number of labels that have fewer cells than the number of folds. `left_out_cells` is
        the number of cells with such a label.
    """

    accuracy: float
    macro_f1: float
    left_out_cells: int
    left_out_labels: int


def accuracy_and_f1(true: np.ndarray, predicted: np.ndarray) -> tuple[float, float]:
    """Return the accuracy and the macro-F1 score (mean F1 over labels)."""
    return float(accuracy_score(true, predicted)), float(
        f1_score(true, predicted, average="macro", zero_division=0)
    )


def cross_validated(predict: Any, labels: Any, *, seed: int = 0, folds: int = 5) -> KnnAccuracy:
    """Return the cross-validated accuracy and macro-F1 score of a classifier.

    Parameters
    ----------
    predict
        Function of (training rows, labels of the training rows as integers, test rows) that predicts the labels of the
        test rows.
    labels
        (N,) labels.
    seed, folds
        See `stratified_folds`.
    """
    names = codes(labels)
    pairs, kept = stratified_folds(names, folds, seed)
    predicted = np.full(len(names), -1)
    for train, test in pairs:
        predicted[test] = predict(train, names[train], test)
    scores = accuracy_and_f1(names[kept], predicted[kept])
    return KnnAccuracy(*scores, int((~kept).sum()), len(np.unique(names[~kept])))


def knn_accuracy(
    embedding: np.ndarray, labels: Any, k: int = 5, *, seed: int = 0, folds: int = 5
) -> KnnAccuracy:
    """Return the accuracy of k-nearest-neighbor classification in an embedding (sCT paper, section 4, Table 3).

    Parameters
    ----------
    embedding
        (N, D) embedding. Distances are Euclidean. Neighbors come from the training folds and have equal votes.
    labels
        (N,) labels.
    k
        Number of neighbors.
    seed, folds
        See `stratified_folds`.
    """

    def predict(train: np.ndarray, names: np.ndarray, test: np.ndarray) -> np.ndarray:
        model = KNeighborsClassifier(min(k, len(train))).fit(embedding[train], names)
        return model.predict(embedding[test])

    return cross_validated(predict, labels, seed=seed, folds=folds)


def neighbor_graph(embedding: np.ndarray, n_neighbors: int = 15, *, seed: int = 0) -> sparse.csr_matrix:
    """Return the weighted nearest-neighbor graph (N, N) of `scanpy.pp.neighbors` for an embedding (N, D).

    Up to 50,000 cells, the neighbors are exact and do not depend on `seed`. With more cells, they are approximate.
    """
    scanpy = load_extra("scanpy", "analysis")
    from anndata import AnnData

    few = len(embedding) <= EXACT_NEIGHBORS
    with quiet():
        cells = AnnData(np.asarray(embedding, dtype=np.float32))
        scanpy.pp.neighbors(
            cells,
            min(n_neighbors, len(embedding) - 1),
            use_rep="X",
            transformer="sklearn" if few else "pynndescent",
            random_state=seed,
        )
        return cells.obsp["connectivities"]


def leiden_of_graph(graph: sparse.csr_matrix, resolution: float = 1.0, *, seed: int = 0) -> np.ndarray:
    """Cluster a weighted graph (N, N) by the Leiden algorithm (igraph, modularity); return the clusters, int (N,)."""
    scanpy = load_extra("scanpy", "analysis")
    load_extra("igraph", "analysis")
    from anndata import AnnData

    with quiet():
        cells = AnnData(sparse.csr_matrix((graph.shape[0], 1), dtype=np.float32))
        scanpy.tl.leiden(
            cells,
            resolution,
            adjacency=graph,
            flavor="igraph",
            n_iterations=2,
            directed=False,
            random_state=seed,
        )
        return cells.obs["leiden"].to_numpy().astype(int)


def leiden_clusters(
    embedding: np.ndarray, resolution: float = 1.0, n_neighbors: int = 15, *, seed: int = 0
) -> np.ndarray:
    """Return Leiden clusters, int (N,), of an embedding.

    Parameters
    ----------
    embedding
        (N, D) embedding.
    resolution
        Higher values give more clusters.
    n_neighbors
        Number of neighbors of each cell in the graph.
    seed
        Random seed of the clustering.

    Raises
    ------
    MissingExtraError
        scanpy or igraph is not installed.
    """
    return leiden_of_graph(neighbor_graph(embedding, n_neighbors, seed=seed), resolution, seed=seed)


def nmi(labels: Any, clusters: Any) -> float:
    """Return the normalized mutual information (arithmetic mean) of labels and clusters (N,), in [0, 1]."""
    return float(normalized_mutual_info_score(codes(labels), codes(clusters)))


def ari(labels: Any, clusters: Any) -> float:
    """Return the adjusted Rand index of labels and clusters (N,): 1 if identical, 0 on average by chance."""
    return float(adjusted_rand_score(codes(labels), codes(clusters)))


def silhouette(
    embedding: np.ndarray, labels: Any, *, max_cells: int = SILHOUETTE_CELLS, seed: int = 0
) -> float:
    """Return the mean silhouette width of labels in an embedding, in [-1, 1].

    Parameters
    ----------
    embedding, labels
        (N, D) embedding and (N,) labels.
    max_cells, seed
        If there are more than `max_cells` cells, the width is computed for a random sample of `max_cells` cells, drawn
        with `seed`.

    Returns
    -------
    The mean width; NaN if all cells have the same label, or if every cell has a different label.
    """
    names = codes(labels)
    if len(names) > max_cells:
        rows = np.sort(np.random.default_rng(seed).choice(len(names), max_cells, replace=False))
        embedding, names = embedding[rows], names[rows]
    if not 1 < len(np.unique(names)) < len(names):
        return float("nan")
    return float(silhouette_score(embedding, names))


def exact_neighbors(embedding: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the k nearest cells of each cell in an embedding (N, D); return their indices and distances, (N, k) each.

    The distances are Euclidean.

    The first of the k cells is always the cell itself, even if another cell has the same coordinates.
    """
    # `kneighbors()` without arguments excludes the cell itself, so it is added in front.
    distances, indices = NearestNeighbors(n_neighbors=k - 1).fit(embedding).kneighbors()
    own = np.arange(len(embedding), dtype=indices.dtype)[:, None]
    return np.hstack([own, indices]), np.hstack([np.zeros_like(distances[:, :1]), distances])


def scib(
    embedding: np.ndarray,
    labels: Any,
    batch: Any,
    *,
    before: np.ndarray | None = None,
    metrics: tuple[str, ...] = (*SCIB_BIO, *SCIB_BATCH),
) -> dict[str, float]:
    """Return the metrics of bio conservation and batch correction from scib-metrics, with the library's defaults.

    Neighbors are exact. The number of neighbors is 15, 50 or 90, depending on the metric, or lower if there are too few
    cells. Because neighbors are exact, only k-means depends on a random seed, which is 0 as in scib-metrics.

    Parameters
    ----------
    embedding
        (N, D) embedding; converted to float32.
    labels, batch
        (N,) labels and batches.
    before
        (N, P) representation of the cells before integration, such as principal components. The metric "PCR comparison"
        compares the embedding with this representation. If None, this metric is NaN.
    metrics
        Names of the metrics to compute, from `SCIB_BIO` and `SCIB_BATCH`.

    Returns
    -------
    Dict from each metric to its value in [0, 1], rounded to five decimals; 1 is the best value. The last entries are
    aggregates: "bio" and "batch" are the means of the metrics of each kind, ignoring NaN, and "total" is 0.6 bio + 0.4
    batch. A metric that is undefined for these cells is NaN. For example, kBET is undefined if every label has fewer
    than ten cells or a single batch.

    Raises
    ------
    MissingExtraError
        scib-metrics is not installed.
    """
    with quiet():
        library = load_extra("scib_metrics", "analysis", "scib-metrics")
        X = np.ascontiguousarray(embedding, dtype=np.float32)
        names, batches = codes(labels), codes(batch)
        # Rounding hides the last digits of float32 sums, which differ from run to run.
        values = _scib(library, X, names, batches, before, metrics)
        results = {name: round(float(value), 5) for name, value in values}
        for aggregate, group in (("bio", SCIB_BIO), ("batch", SCIB_BATCH)):
            results[aggregate] = float(np.nanmean([results.get(name, np.nan) for name in group]))
    results["total"] = 0.6 * results["bio"] + 0.4 * results["batch"]
    return results


def _scib(
    library: Any,
    X: np.ndarray,
    names: np.ndarray,
    batches: np.ndarray,
    before: np.ndarray | None,
    metrics: tuple[str, ...],
) -> Iterator[tuple[str, float]]:
    """Yield the name and value of each requested metric, in the order of `SCIB_METRICS`."""
    from scib_metrics.nearest_neighbors import NeighborsResults

    near = NeighborsResults(*exact_neighbors(X, min(90, len(X))))
    few, some = (near.subset_neighbors(min(n, near.n_neighbors)) for n in (15, 50))
    # BRAS and kBET need a label that occurs in several batches and has more cells than batches.
    pairs = (
        pd.DataFrame({"label": names, "batch": batches}).groupby("label")["batch"].agg(["nunique", "size"])
    )
    mixed = ((pairs["nunique"] > 1) & (pairs["nunique"] < pairs["size"])).any()
    kmeans: dict[str, float] = {}
    if {"k-means NMI", "k-means ARI"} & set(metrics):
        kmeans = library.nmi_ari_cluster_labels_kmeans(X, names)
    undefined = float("nan")
    table = {
        "isolated labels": lambda: library.isolated_labels(X, names, batches),
        "k-means NMI": lambda: kmeans["nmi"],
        "k-means ARI": lambda: kmeans["ari"],
        "label silhouette": lambda: library.silhouette_label(X, names),
        "cLISI": lambda: library.clisi_knn(near, names),
        "BRAS": lambda: library.bras(X, names, batches) if mixed else undefined,
        "iLISI": lambda: library.ilisi_knn(near, batches),
        "kBET": lambda: library.kbet_per_label(some, batches, names) if mixed else undefined,
        "graph connectivity": lambda: library.graph_connectivity(few, names),
        "PCR comparison": lambda: (
            undefined
            if before is None
            else library.pcr_comparison(np.asarray(before, np.float32), X, batches, categorical=True)
        ),
    }
    yield from ((name, compute()) for name, compute in table.items() if name in metrics)
