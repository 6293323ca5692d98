"""Metrics of arrays, from scikit-learn, scanpy and scib-metrics; of the project it imports `extras` only.

A library of the `analysis` extra is loaded where it is needed; where it is missing, a MissingExtraError says what
to install.
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

# Method -> metric -> one number of each draw.
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

# scib-metrics' own grouping. The aggregates are the means of a group, the total is 0.6 bio + 0.4 batch.
SCIB_BIO = ("isolated labels", "k-means NMI", "k-means ARI", "label silhouette", "cLISI")
SCIB_BATCH = ("BRAS", "iLISI", "kBET", "graph connectivity", "PCR comparison")
SCIB_METRICS = (*SCIB_BIO, *SCIB_BATCH, "bio", "batch", "total")

SILHOUETTE_CELLS = 10_000  # above, a seeded sample: all pairs of distances are taken
EXACT_NEIGHBORS = 50_000  # above, scanpy's neighbours of the Leiden graph are approximate


def matthews(true: np.ndarray, predicted: np.ndarray) -> float:
    """Matthews correlation coefficient of several classes, in [-1, 1]; 0 where either side is constant."""
    if len(true) == 0:
        return float("nan")
    return float(matthews_corrcoef(true, predicted))


def matthews_from_confusion(confusion: np.ndarray) -> float:
    """Matthews correlation coefficient of a matrix of counts whose last columns are the classes.

    Parameters
    ----------
    confusion
        (rows, classes): true class by predicted class. With fewer rows than classes the rows are the last
        classes (a matrix without the row of class 0 restricts the metric to the others).

    Returns
    -------
    The coefficient, NaN for an empty matrix.
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
    """Area under the ROC curve of a score for a bool array; NaN where one class is absent."""
    true = np.asarray(true, bool)
    return float(roc_auc_score(true, score)) if true.any() and not true.all() else float("nan")


def average_precision(true: np.ndarray, score: np.ndarray) -> float:
    """Average precision of a score for a bool array; NaN where one class is absent."""
    true = np.asarray(true, bool)
    return float(average_precision_score(true, score)) if true.any() and not true.all() else float("nan")


def cross_entropy(true: np.ndarray, chance: np.ndarray, least: float = 1e-6) -> float:
    """Mean of -log probability of the true class, in nats; a probability below `least` counts as `least`.

    Parameters
    ----------
    true
        (n,) classes.
    chance
        (n, classes) probabilities.
    """
    if len(true) == 0:
        return float("nan")
    given = chance[np.arange(len(true)), np.asarray(true, np.int64)]
    return float(-np.log(np.maximum(given, least), dtype=np.float64).mean())


class Reliability(NamedTuple):
    """Predicted probabilities beside observed frequencies, by bin of the predicted probability.

    Attributes
    ----------
    predicted, observed
        (bins,) mean probability and share of positives; NaN where a bin is empty.
    number
        (bins,) number of predictions.
    """

    predicted: np.ndarray
    observed: np.ndarray
    number: np.ndarray

    @property
    def calibration_error(self) -> float:
        """Expected calibration error (Guo et al., ICML 2017): mean distance between the two, weighted by number."""
        filled = self.number > 0
        if not filled.any():
            return float("nan")
        distance = np.abs(self.predicted - self.observed)[filled]
        return float(np.average(distance, weights=self.number[filled]))


def reliability(true: np.ndarray, probability: np.ndarray, bins: int = 15) -> Reliability:
    """Reliability of the predicted probability (n,) of a bool array (n,), in bins of equal width."""
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
    """Pearson correlation of predicted (`first`) and true (`second`) values (n,) within each group.

    Returns
    -------
    float64 (num_groups,); NaN for a group with fewer than `least` values or where `second` is constant, 0 where
        only `first` is: a constant prediction says nothing.
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
    """Keep what other libraries do to the process inside: warnings, logs, environment and global seeds.

    Importing scib-metrics switches off the preallocation of accelerator memory by an environment variable, and
    both it and scvi-tools add handlers to loggers; seeding scvi-tools seeds numpy and the XLA flags.
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
    """Labels (N,) as integers by first appearance: what a label is called changes no metric, not even a tie."""
    return pd.factorize(np.asarray(labels, dtype=object), use_na_sentinel=False)[0]


def stratified_folds(
    labels: Any, folds: int = 5, seed: int = 0
) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray]:
    """Seeded folds in which every label has its share.

    A label with fewer cells than folds is missing from some test fold and, with one cell, cannot be right;
    its cells are left out of training and scoring alike.

    Parameters
    ----------
    labels
        (N,) labels.
    folds, seed
        Number of folds, and the seed by which cells are drawn into them.

    Returns
    -------
    Pairs of row numbers (train, test), and (N,) whether a cell takes part.

    Raises
    ------
    ValueError
        Fewer than two labels have enough cells.
    """
    names = codes(labels)
    sizes = np.bincount(names)
    kept = sizes[names] >= folds
    if (sizes >= folds).sum() < 2:
        raise ValueError(
            f"{(sizes >= folds).sum()} labels have {folds} cells or more, at least 2 are needed: use fewer folds"
        )
    rows = np.flatnonzero(kept)
    splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
    return [(rows[train], rows[test]) for train, test in splitter.split(rows, names[rows])], kept


class KnnAccuracy(NamedTuple):
    """Cross-validated classification of cells.

    Attributes
    ----------
    accuracy, macro_f1
        Over all cells that took part, each predicted once.
    left_out_cells, left_out_labels
        Cells of labels with fewer cells than folds, and the number of these labels.
    """

    accuracy: float
    macro_f1: float
    left_out_cells: int
    left_out_labels: int


def accuracy_and_f1(true: np.ndarray, predicted: np.ndarray) -> tuple[float, float]:
    """Accuracy, and F1 averaged over labels with equal weight."""
    return float(accuracy_score(true, predicted)), float(
        f1_score(true, predicted, average="macro", zero_division=0)
    )


def cross_validated(predict: Any, labels: Any, *, seed: int = 0, folds: int = 5) -> KnnAccuracy:
    """Accuracy and macro-F1 of predictions made fold by fold.

    Parameters
    ----------
    predict
        (train rows, their labels as integers, test rows) -> labels of the test rows.
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
    """k-nearest-neighbour classification of cells by an embedding (sCT paper, section 4, Table 3).

    Parameters
    ----------
    embedding
        (N, D) embedding; distances are Euclidean, neighbours come from the training folds and vote equally.
    labels
        (N,) labels.
    k
        Number of neighbours.
    seed, folds
        See `stratified_folds`.
    """

    def predict(train: np.ndarray, names: np.ndarray, test: np.ndarray) -> np.ndarray:
        model = KNeighborsClassifier(min(k, len(train))).fit(embedding[train], names)
        return model.predict(embedding[test])

    return cross_validated(predict, labels, seed=seed, folds=folds)


def neighbor_graph(embedding: np.ndarray, n_neighbors: int = 15, *, seed: int = 0) -> sparse.csr_matrix:
    """Weighted graph (N, N) of nearest neighbours, as scanpy makes it.

    Neighbours are exact up to 50,000 cells, so that `seed` has no part in it, and approximate above.
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
    """Leiden clusters (N,) of a weighted graph (N, N), as integers; modularity, igraph's implementation."""
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
    """Leiden clusters (N,) of an embedding (N, D), as integers.

    Parameters
    ----------
    embedding
        (N, D) embedding.
    resolution
        Higher values give more clusters.
    n_neighbors
        Neighbours of a cell in the graph.
    seed
        Seed of the clustering.

    Raises
    ------
    MissingExtraError
        scanpy or igraph is not installed.
    """
    return leiden_of_graph(neighbor_graph(embedding, n_neighbors, seed=seed), resolution, seed=seed)


def nmi(labels: Any, clusters: Any) -> float:
    """Normalised mutual information of two partitions of cells (arithmetic mean), in [0, 1]."""
    return float(normalized_mutual_info_score(codes(labels), codes(clusters)))


def ari(labels: Any, clusters: Any) -> float:
    """Adjusted Rand index of two partitions of cells: 1 where equal, 0 expected by chance."""
    return float(adjusted_rand_score(codes(labels), codes(clusters)))


def silhouette(
    embedding: np.ndarray, labels: Any, *, max_cells: int = SILHOUETTE_CELLS, seed: int = 0
) -> float:
    """Mean silhouette width of labels in an embedding, in [-1, 1].

    Parameters
    ----------
    embedding, labels
        (N, D) and (N,).
    max_cells, seed
        Above this number of cells, that many drawn by the seed stand for all.

    Returns
    -------
    The width, NaN where the cells have one label or each its own.
    """
    names = codes(labels)
    if len(names) > max_cells:
        rows = np.sort(np.random.default_rng(seed).choice(len(names), max_cells, replace=False))
        embedding, names = embedding[rows], names[rows]
    if not 1 < len(np.unique(names)) < len(names):
        return float("nan")
    return float(silhouette_score(embedding, names))


def exact_neighbors(embedding: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices and Euclidean distances (N, k) of each cell's nearest cells, itself first.

    A cell is its own first neighbour even where others lie on the same point.
    """
    # The search is asked for the others, and the cell itself is put before them.
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
    """Metrics of conserved biology and removed batch effects, from scib-metrics, with its defaults.

    Neighbours are exact (15, 50 and 90 of them, fewer where there are fewer cells), so that no metric depends on
    a seed but k-means, whose seed is 0, as it is in scib-metrics.

    Parameters
    ----------
    embedding
        (N, D) embedding; computed in float32.
    labels, batch
        (N,) labels and batches.
    before
        (N, P) the cells before integration, such as principal components: what "PCR comparison" compares
        with. Without it that metric is NaN.
    metrics
        Which of `SCIB_BIO` and `SCIB_BATCH` to take.

    Returns
    -------
    Each metric to five decimals, in [0, 1] with 1 the best, then the aggregates "bio" and "batch" (means of
    their metrics that are numbers) and "total" (0.6 bio + 0.4 batch). A metric that is not defined on these
    cells is NaN, such as kBET where every label has fewer than ten cells or one batch.

    Raises
    ------
    MissingExtraError
        scib-metrics is not installed.
    """
    with quiet():
        library = load_extra("scib_metrics", "analysis", "scib-metrics")
        X = np.ascontiguousarray(embedding, dtype=np.float32)
        names, batches = codes(labels), codes(batch)
        # Sums in float32 are not the same twice in their last digits.
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
    """Names and values of the metrics asked for, in the order of `SCIB_METRICS`."""
    from scib_metrics.nearest_neighbors import NeighborsResults

    near = NeighborsResults(*exact_neighbors(X, min(90, len(X))))
    few, some = (near.subset_neighbors(min(n, near.n_neighbors)) for n in (15, 50))
    # Mixing within a label needs one that lies in several batches, with more cells than batches.
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
