"""Embeddings of cells beside honest baselines: k-NN accuracy, Leiden clusters, silhouette and scib-metrics."""

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
UNDEFINED, UNMEASURED = "n/a", "-"

PCA, HVG_PCA, SCVI = "PCA", "HVG + PCA", "scVI"
PCA_KNN, PCA_LOGISTIC = "PCA + k-NN", "PCA + logistic regression"
BASELINES = (PCA, HVG_PCA, SCVI, PCA_KNN, PCA_LOGISTIC)


@dataclasses.dataclass(frozen=True)
class EmbeddingMethod:
    """An embedding to measure.

    Attributes
    ----------
    embedding
        (N, D) for the N cells in their order, or a function of a seed that computes it.
    fitted_on
        What the method has seen of these cells.
    fits
        Number of seeds with which a function is called; seed s of the measurement takes embedding s % fits.
    remark
        What a reader should know.
    """

    embedding: np.ndarray | Callable[[int], np.ndarray]
    fitted_on: str = ZERO_SHOT
    fits: int = 1
    remark: str = ""

    def fit(self, number: int) -> np.ndarray:
        """The embedding of one fit."""
        return self.embedding(number) if callable(self.embedding) else self.embedding


@dataclasses.dataclass(frozen=True)
class EmbeddingMetricOptions:
    """How embeddings are measured; the defaults are the published recipe where there is one.

    Attributes
    ----------
    seeds
        Draws of the folds, of Leiden and of whatever else is random: 0, 1, ...
    folds, k
        Folds of the cross-validated classification, and neighbours that vote.
    resolution, graph_neighbors
        Of the Leiden clustering.
    components, genes
        Principal components of the baselines; highly variable genes of those that choose genes.
    baselines
        Which of `BASELINES` stand beside the methods.
    scvi_fits, scvi_epochs
        Trainings of scVI, each with its own seed, and their length (None: its own rule, 400 epochs up to 20,000
        cells: minutes on a GPU, up to an hour for 2,600 cells on two cores).
    scib
        Which of scib-metrics are taken where batches are given (`metrics.SCIB_BIO`, `metrics.SCIB_BATCH`).
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
        """Name of a baseline's row."""
        return baseline.replace("k-NN", f"{self.k}-NN")


def measure(
    methods: Mapping[str, EmbeddingMethod | np.ndarray],
    counts: Any,
    labels: Any,
    batch: Any = None,
    options: EmbeddingMetricOptions | None = None,
) -> tuple[Report, metrics.MetricDraws]:
    """Measure embeddings of the same cells beside baselines (sCT paper, section 4, Table 3).

    Cells are classified by the k nearest neighbours of the embedding that lie in the training folds, clustered by
    Leiden, and the silhouette width of the labels is taken; with batches the metrics of scib-metrics follow.
    Cells without a label (NaN, None or an empty text; "unknown" is a label) are left out throughout.
    Baselines:

    - PCA: 50 principal components of log1p counts per 10,000;
    - HVG + PCA: scanpy's standard recipe: 2,000 highly variable genes, scaled and clipped at 10, PCA;
    - scVI, where scvi-tools is installed: trained on these cells and their batches, on the same genes;
    - PCA + k-NN, PCA + logistic regression: the components are fitted on the cells of the training folds, as
      the classifier is, so that these rows have no clustering.

    Parameters
    ----------
    methods
        Name -> an embedding (N, D), which is taken for a zero-shot one, or a `EmbeddingMethod`.
    counts
        (N, G) raw counts of these cells.
    labels, batch
        (N,) cell types, and batches or None.
    options
        See `EmbeddingMetricOptions`.

    Returns
    -------
    The report, and name of the method -> column -> measurements over seeds (one where nothing is random).
    A method, or a metric, that fails or whose library is missing is shown as "-", with the reason as remark.

    Raises
    ------
    DataError
        Lengths differ, or there are fewer than two labels or batches.
    ConfigError
        A method is called like a baseline.
    """
    options = options or EmbeddingMetricOptions()
    cells, kept, notes = _labelled(counts, labels, batch, options.components)
    if taken := [name for name in map(options.name, options.baselines) if name in methods]:
        raise ConfigError(f"a method is called {taken[0]!r} like a baseline; give it another name.")
    rows: dict[str, EmbeddingMethod] = {}
    for name, method in methods.items():
        rows[name] = method if isinstance(method, EmbeddingMethod) else EmbeddingMethod(np.asarray(method))
    rows |= {name: method for name, method in _fitted(cells, options).items() if name in options.baselines}
    supervised = [name for name in (PCA_KNN, PCA_LOGISTIC) if name in options.baselines]

    report = Report(_title(cells), _columns(cells, options), notes=(*notes, *_notes(cells, options)))
    numbers: metrics.MetricDraws = {}
    # The classifiers share the components of their training folds, so that they are one piece of work.
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


def _labelled(
    counts: Any, labels: Any, batch: Any, components: int
) -> tuple[BaselineCells, np.ndarray, list[str]]:
    """Cells that have a label, which of the given ones these are, and what to say of the others."""
    names = pd.Series(np.asarray(labels, dtype=object))
    for what, given in (("labels", names), ("batches", names if batch is None else batch)):
        check_one_each(what, len(given), "cells", counts.shape[0])
    kept = ~(names.isna() | (names.astype(str).str.strip() == "")).to_numpy()
    if (number := names[kept].nunique()) < 2:
        raise DataError(
            f"the {kept.sum():,} cells with a label have {number} different labels and at least two are needed; "
            "name another column of labels."
        )
    batches = None
    if batch is not None:
        batches = metrics.codes(np.asarray(batch, dtype=object)[kept])
        if (number := len(np.unique(batches))) < 2:
            raise DataError(
                f"the labelled cells have {number} batch and at least two are needed; "
                "leave the batch out or name another column."
            )
    cells = BaselineCells(
        sparse.csr_matrix(counts)[kept].astype(np.float32),
        metrics.codes(names.to_numpy()[kept]),
        batches,
        components,
    )
    notes = [] if kept.all() else [f"{(~kept).sum():,} cells without a label are left out."]
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
            f"{small.sum():,} cells of {small.size} labels with fewer than {options.folds} cells are left out of "
            "accuracy and F1."
        )
    yield (
        f"Accuracy is that of {options.k} nearest neighbours (logistic regression in its row), in {options.folds} "
        "folds stratified by label."
    )
    if cells.batch is not None:
        yield (
            '"bio" and "batch" are the means of scib-metrics\' metrics of biology kept and of batches mixed, '
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
    """What went wrong, in one line: messages that are meant for people as they are."""
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
    """Every metric of one embedding: its values by column, and remarks."""
    remarks = [method.remark]
    try:
        with metrics.quiet():
            fits = [_checked(method.fit(i), cells, kept) for i in range(min(method.fits, options.seeds))]
    except Exception as error:  # any failure of a method is a row of the table
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
    """An embedding (labelled cells, D) of finite float32; `kept` tells which of its rows are labelled."""
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
    load_extra("igraph", "analysis")  # told before the neighbours are searched
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
    # Random only where the cells are a sample.
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
    """Baselines that are embeddings, fitted on the counts of these cells."""
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
    """Values and remarks of the classifiers of components, by the name of their row."""
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
    """Two-dimensional picture of an embedding.

    Parameters
    ----------
    embedding
        (N, D) embedding.
    seed
        The same seed gives the same picture on one machine.
    n_neighbors, min_dist
        UMAP's; the defaults are scanpy's.

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
        raise DataError(f"a UMAP of {len(embedding)} cells was asked for, and at least 5 are needed.")
    with metrics.quiet():
        umap = load_extra("umap", "analysis", "umap-learn", what="a UMAP")
        model = umap.UMAP(
            n_neighbors=min(n_neighbors, len(embedding) - 1), min_dist=min_dist, random_state=seed, n_jobs=1
        )
        return np.asarray(model.fit_transform(np.asarray(embedding, dtype=np.float32)), dtype=np.float32)
