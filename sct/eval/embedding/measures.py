"""Compare cell embeddings with baselines by k-NN accuracy, Leiden clusters, silhouette width and scib-metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from sct.checks import check_at_least, check_choice, check_finite, check_one_each, check_shape
from sct.errors import ConfigError, DataError, SctError
from sct.eval import metrics
from sct.eval.embedding import baselines
from sct.eval.embedding.baselines import BaselineCells
from sct.eval.reports.report import FITTED_ON, METHOD, REMARK, Column, Report
from sct.extras import load_extra
from sct.progress import track

ZERO_SHOT = "nothing (zero-shot)"
THESE_CELLS = "these cells"
TRAINING_FOLDS = "counts and labels of training folds"
TRAINING_CELLS = "training studies"
UNDEFINED, UNMEASURED = "n/a", "-"

PCA, HVG_PCA, SCVI = "PCA", "HVG + PCA", "scVI"
PCA_KNN, PCA_LOGISTIC = "PCA + k-NN", "PCA + logistic regression"
# Principal components of the training cells of a model, applied unchanged; `baselines.fit_components` makes them.
ZERO_SHOT_PCA = "zero-shot PCA"
BASELINES = (PCA, HVG_PCA, SCVI, PCA_KNN, PCA_LOGISTIC)


@dataclasses.dataclass(frozen=True)
class EmbeddingMethod:
    """Describe an embedding to evaluate.

    Attributes
    ----------
    embedding
        Either an embedding (N, D), with the cells in their original order, or a function that takes a seed and returns
        such an embedding.
    fitted_on
        Data that the method was fitted on, as shown in the table.
    fits
        Number of embeddings to compute. If `embedding` is a function, it is called with the seeds 0 to `fits` - 1. The
        evaluation with seed s uses the embedding with seed s % `fits`.
    remark
        Remark for the reader of the table.
    """

    embedding: np.ndarray | Callable[[int], np.ndarray]
    fitted_on: str = ZERO_SHOT
    fits: int = 1
    remark: str = ""

    def fit(self, number: int) -> np.ndarray:
        """Return the embedding (N, D) of the method for one random seed."""
        return self.embedding(number) if callable(self.embedding) else self.embedding


@dataclasses.dataclass(frozen=True)
class EmbeddingMetricOptions:
    """Options for evaluating embeddings. The defaults follow the published protocols.

    Attributes
    ----------
    seeds
        Number of random seeds (0, 1, ...) for the folds, the Leiden clustering and the subsampling.
    folds, k
        Number of cross-validation folds, and number of nearest neighbors that vote in the k-NN classification.
    resolution, graph_neighbors
        Resolution of the Leiden clustering, and neighbors of each cell in its graph.
    components, genes
        Number of principal components, and number of highly variable genes. Only some baselines use these options.
    baselines
        Names of the baselines to include, from `BASELINES`.
    scvi_fits
        Number of scVI trainings, each with its own seed.
    scvi_epochs
        Epochs of each scVI training. None uses scVI's rule, which is 400 epochs for up to 20,000 cells. A training
        takes a few minutes on a GPU, and up to an hour for 2,600 cells on two CPU cores.
    scib
        Names of scib-metrics, from `metrics.SCIB_BIO` and `metrics.SCIB_BATCH`. These metrics are computed only if
        batches are given.
    """

    seeds: int = 5
    folds: int = 5
    k: int = 5
    resolution: float = 1.0
    graph_neighbors: int = 15
    components: int = 50
    genes: int = 2000
    baselines: tuple[str, ...] = BASELINES
    scvi_fits: int = 1
    scvi_epochs: int | None = None
    scib: tuple[str, ...] = (*metrics.SCIB_BIO, *metrics.SCIB_BATCH)

    def __post_init__(self) -> None:
        for name, least in (
            ("seeds", 1),
            ("folds", 2),
            ("k", 1),
            ("components", 1),
            ("genes", 2),
            ("scvi_fits", 1),
        ):
            check_at_least(name, getattr(self, name), least)
        for name, known in (("baselines", BASELINES), ("scib", (*metrics.SCIB_BIO, *metrics.SCIB_BATCH))):
            for each in getattr(self, name):
                check_choice(name, each, known)

    def name(self, baseline: str) -> str:
        """Return the name that a baseline has in the table."""
        return baseline.replace("k-NN", f"{self.k}-NN")


def measure(
    methods: Mapping[str, EmbeddingMethod | np.ndarray],
    counts: Any,
    labels: Any,
    batch: Any = None,
    options: EmbeddingMetricOptions | None = None,
) -> tuple[Report, metrics.MetricDraws]:
    """Compare embeddings of the same cells with baselines (sCT paper, section 4, Table 3).

    The metrics are cross-validated k-NN accuracy and macro-F1, NMI and ARI of Leiden clusters, and the silhouette width
    of the labels. If `batch` is given, the metrics of scib-metrics are added. Cells without a label (NaN, None or an
    empty string) are excluded. The label "unknown" counts as a label.

    The baselines are:

    - PCA: 50 principal components of log1p counts per 10,000.
    - HVG + PCA: scanpy's standard recipe, which selects 2,000 highly variable genes, scales, clips at 10 and runs PCA.
    - scVI, if scvi-tools is installed: trained on the same highly variable genes of these cells. With `batch`, scVI
      also reads the batches of the cells.
    - PCA + k-NN and PCA + logistic regression: PCA and classifier are fitted on the training folds only. Each fold has
      its own PCA, so there is no single embedding and these rows have no clustering metrics.

    Parameters
    ----------
    methods
        Dict from the name of each method to an `EmbeddingMethod` or to an embedding (N, D). In the table, a method
        given as a plain embedding is described as zero-shot.
    counts
        (N, G) raw counts of these cells.
    labels, batch
        (N,) cell types, and (N,) batches or None.
    options
        See `EmbeddingMetricOptions`.

    Returns
    -------
    The report, and a nested dict of all numbers: {method: {column: [one value per seed]}}. A number that does not
    depend on the seed has a single value. If a method or metric fails, or if its library is missing, the table shows
    "-" instead of a number, and the remark gives the reason.

    Raises
    ------
    DataError
        Lengths differ, or there are fewer than two labels or batches.
    ConfigError
        A method has the name of a baseline.
    """
    options = options or EmbeddingMetricOptions()
    cells, kept, notes = _labeled(counts, labels, batch, options.components)
    if taken := [name for name in map(options.name, options.baselines) if name in methods]:
        raise ConfigError(
            f"`methods` has an entry named {taken[0]!r}, but this is the name of a baseline: use another "
            "name."
        )
    rows: dict[str, EmbeddingMethod] = {}
    for name, method in methods.items():
        rows[name] = method if isinstance(method, EmbeddingMethod) else EmbeddingMethod(np.asarray(method))
    rows |= {name: method for name, method in _fitted(cells, options).items() if name in options.baselines}
    supervised = [name for name in (PCA_KNN, PCA_LOGISTIC) if name in options.baselines]

    report = Report(_title(cells), _columns(cells, options), notes=(*notes, *_notes(cells, options)))
    numbers: metrics.MetricDraws = {}
    # Both classifiers use the same principal components, so they are computed together.
    for name in track([*rows, *supervised[:1]], "measuring embeddings"):
        if name in rows:
            values, remarks = _measure(rows[name], cells, kept if name in methods else None, options)
            numbers[name] = values
            _add(report, name, rows[name].fitted_on, values, UNMEASURED, remarks)
            continue
        for each, (values, remarks) in _classified(supervised, cells, options).items():
            numbers[each] = values
            _add(report, each, TRAINING_FOLDS, values, UNDEFINED if values else UNMEASURED, remarks)
    return report, numbers


def _labeled(
    counts: Any, labels: Any, batch: Any, components: int
) -> tuple[BaselineCells, np.ndarray, list[str]]:
    """Select the cells that have a label.

    Return three values: the cells with a label, a mask (N,) that is True for these cells, and notes on the excluded
    cells.
    """
    names = pd.Series(np.asarray(labels, dtype=object))
    for what, given in (("labels", names), ("batches", names if batch is None else batch)):
        check_one_each(what, len(given), "cells", counts.shape[0])
    kept = ~(names.isna() | (names.astype(str).str.strip() == "")).to_numpy()
    if names[kept].nunique() < 2:
        found = (
            f"all {kept.sum():,} cells with a label have the same label"
            if kept.any()
            else "no cell has a label"
        )
        raise DataError(f"{found}, but at least two labels are needed: choose another label column.")
    batches = None
    if batch is not None:
        batches = metrics.codes(np.asarray(batch, dtype=object)[kept])
        if len(np.unique(batches)) < 2:
            raise DataError(
                "all cells have the same batch, but batch metrics need at least two batches: choose "
                "another batch column, or do not set a batch column, which skips these metrics."
            )
    cells = BaselineCells(
        sparse.csr_matrix(counts)[kept].astype(np.float32),
        metrics.codes(names.to_numpy()[kept]),
        batches,
        components,
    )
    notes = [] if kept.all() else [f"{(~kept).sum():,} cells without a label are excluded."]
    return cells, kept, notes


def _title(cells: BaselineCells) -> str:
    batches = "" if cells.batch is None else f", {cells.batch.max() + 1} batches"
    return f"Embedding of {len(cells.labels):,} cells, {cells.labels.max() + 1} labels{batches}"


def _columns(cells: BaselineCells, options: EmbeddingMetricOptions) -> tuple[Column | str, ...]:
    accuracy = (f"{options.k}-NN accuracy", "macro F1", "NMI", "ARI", "silhouette")
    return (
        METHOD,
        FITTED_ON,
        *accuracy,
        *(_scib_columns(options) if cells.batch is not None else ()),
        REMARK,
    )


def _scib_columns(options: EmbeddingMetricOptions) -> tuple[str, ...]:
    groups = (options.scib, "bio", "batch", "total")
    return (*[name for name in metrics.SCIB_METRICS if name in options.scib], *groups[1:])


def _notes(cells: BaselineCells, options: EmbeddingMetricOptions) -> Iterator[str]:
    sizes = np.bincount(cells.labels)
    if (small := sizes[sizes < options.folds]).size:
        yield (
            f"{small.sum():,} cells of {small.size} labels with fewer than {options.folds} cells are excluded from "
            "accuracy and F1."
        )
    yield (
        f"Accuracy and F1 are those of {options.k}-nearest-neighbor classification (of logistic regression in its row) "
        f"in {options.folds} cross-validation folds stratified by label."
    )
    if cells.batch is not None:
        yield (
            '"bio" and "batch" are the means of the bio conservation and the batch correction metrics of scib-metrics. '
            '"total" is 0.6 bio + 0.4 batch.'
        )


def _add(
    report: Report,
    name: str,
    fitted_on: str,
    values: Mapping[str, list[float]],
    empty: str,
    remarks: list[str],
) -> None:
    cells = [values.get(column, empty) for column in report.keys[2:-1]]
    report.add(name, fitted_on, *cells, "; ".join(filter(None, remarks)))


def _reason(error: Exception) -> str:
    """Return an error as one line of text, with the type of the error if another library raised it."""
    text = str(error).strip().split("\n")[0]
    return (
        text
        if isinstance(error, SctError)
        else f"{type(error).__name__}: {text}"
        if text
        else type(error).__name__
    )


def _measure(
    method: EmbeddingMethod, cells: BaselineCells, kept: np.ndarray | None, options: EmbeddingMetricOptions
) -> tuple[dict[str, list[float]], list[str]]:
    """Compute all metrics of one embedding.

    Return the metrics as {column: [one value per seed]}, and remarks for the table.
    """
    remarks = [method.remark]
    try:
        with metrics.quiet():
            fits = [_checked(method.fit(i), cells, kept) for i in range(min(method.fits, options.seeds))]
    except Exception as error:  # a method that fails, for whatever reason, keeps its row with the reason
        return {}, [_reason(error)]

    parts: list[tuple[str, Callable[[], dict[str, list[float]]]]] = [
        ("accuracy", lambda: _accuracy(fits, cells, options)),
        ("clusters", lambda: _clusters(fits, cells, options)),
        ("silhouette", lambda: _silhouette(fits, cells, options)),
    ]
    if cells.batch is not None:
        parts.append(("scib-metrics", lambda: _scib(fits, cells, options)))
    values: dict[str, list[float]] = {}
    for name, compute in parts:
        try:
            with metrics.quiet():
                values |= compute()
        except Exception as error:
            remarks.append(f"{name}: {_reason(error)}")
    return values, remarks


def _checked(embedding: Any, cells: BaselineCells, kept: np.ndarray | None) -> np.ndarray:
    """Check the shape and values of an embedding, and return the rows of the labeled cells as float32.

    The mask `kept` (N,) is True for the rows of labeled cells. None means that all rows belong to labeled cells. The
    result has the shape (labeled cells, D).
    """
    array = np.asarray(embedding, dtype=np.float32)
    expected = len(cells.labels) if kept is None else len(kept)
    check_shape("the embedding", array, ((expected, "cells"), "features"))
    array = array if kept is None else array[kept]
    check_finite("the embedding", array, "cells")
    return array


def _accuracy(
    fits: list[np.ndarray], cells: BaselineCells, options: EmbeddingMetricOptions
) -> dict[str, list[float]]:
    scores = [
        metrics.knn_accuracy(fits[seed % len(fits)], cells.labels, options.k, seed=seed, folds=options.folds)
        for seed in range(options.seeds)
    ]
    return {
        f"{options.k}-NN accuracy": [score.accuracy for score in scores],
        "macro F1": [score.macro_f1 for score in scores],
    }


def _clusters(
    fits: list[np.ndarray], cells: BaselineCells, options: EmbeddingMetricOptions
) -> dict[str, list[float]]:
    load_extra("igraph", "analysis")  # fail before the slow neighbor search
    graphs = [metrics.neighbor_graph(fit, options.graph_neighbors) for fit in fits]
    clusters = [
        metrics.leiden_of_graph(graphs[seed % len(graphs)], options.resolution, seed=seed)
        for seed in range(options.seeds)
    ]
    return {
        "NMI": [metrics.nmi(cells.labels, each) for each in clusters],
        "ARI": [metrics.ari(cells.labels, each) for each in clusters],
    }


def _silhouette(
    fits: list[np.ndarray], cells: BaselineCells, options: EmbeddingMetricOptions
) -> dict[str, list[float]]:
    # The width is random only if it is computed on a sample of the cells.
    times = options.seeds if len(cells.labels) > metrics.SILHOUETTE_CELLS else len(fits)
    widths = [metrics.silhouette(fits[s % len(fits)], cells.labels, seed=s) for s in range(times)]
    return {"silhouette": widths}


def _scib(
    fits: list[np.ndarray], cells: BaselineCells, options: EmbeddingMetricOptions
) -> dict[str, list[float]]:
    results = [
        metrics.scib(fit, cells.labels, cells.batch, before=cells.principal, metrics=options.scib)
        for fit in fits
    ]
    return {name: [result[name] for result in results] for name in _scib_columns(options)}


def _fitted(cells: BaselineCells, options: EmbeddingMetricOptions) -> dict[str, EmbeddingMethod]:
    """Return the baselines that give an embedding, as a dict by name.

    These baselines are fitted on the counts of `cells`.
    """
    batches = "" if cells.batch is None else " and their batches"
    once = "one training, seed 0" if options.scvi_fits == 1 else f"{options.scvi_fits} trainings"
    once += "" if options.scvi_epochs is None else f", {options.scvi_epochs} epochs"
    return {
        PCA: EmbeddingMethod(lambda seed: cells.principal, THESE_CELLS),
        HVG_PCA: EmbeddingMethod(lambda seed: baselines.hvg_pca(cells, options.genes, seed), THESE_CELLS),
        SCVI: EmbeddingMethod(
            lambda seed: baselines.scvi(cells, options.genes, seed, options.scvi_epochs),
            THESE_CELLS + batches,
            options.scvi_fits,
            once,
        ),
    }


def _classified(
    names: list[str], cells: BaselineCells, options: EmbeddingMetricOptions
) -> dict[str, tuple[dict[str, list[float]], list[str]]]:
    """Return the metrics and the remarks of each PCA classifier in `names`, as a dict by row name."""
    columns = (f"{options.k}-NN accuracy", "macro F1")
    kinds = {PCA_KNN: "knn", PCA_LOGISTIC: "logistic"}
    try:
        with metrics.quiet():
            seeds = [
                baselines.classify(cells, seed, options.folds, options.k) for seed in range(options.seeds)
            ]
    except Exception as error:
        return {options.name(name): ({}, [_reason(error)]) for name in names}
    return {
        options.name(name): (
            {column: [scores[kinds[name]][i] for scores in seeds] for i, column in enumerate(columns)},
            [],
        )
        for name in names
    }


def umap(embedding: np.ndarray, seed: int = 0, *, n_neighbors: int = 15, min_dist: float = 0.5) -> np.ndarray:
    """Return a two-dimensional UMAP of an embedding.

    Parameters
    ----------
    embedding
        (N, D) embedding.
    seed
        Random seed. The same seed gives the same result on the same machine.
    n_neighbors, min_dist
        UMAP parameters; the defaults are those of scanpy.

    Returns
    -------
    (N, 2) float32.

    Raises
    ------
    MissingExtraError
        umap-learn is not installed.
    DataError
        There are fewer than five cells.
    """
    if len(embedding) < 5:
        raise DataError(
            f"embedding has {len(embedding)} cells, but a UMAP needs at least 5: pass more cells."
        )
    with metrics.quiet():
        umap = load_extra("umap", "analysis", "umap-learn", what="a UMAP")
        model = umap.UMAP(
            n_neighbors=min(n_neighbors, len(embedding) - 1), min_dist=min_dist, random_state=seed, n_jobs=1
        )
        return np.asarray(model.fit_transform(np.asarray(embedding, dtype=np.float32)), dtype=np.float32)
