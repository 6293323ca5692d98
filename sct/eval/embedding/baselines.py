"""Baseline embeddings and classifiers, fitted on the evaluated cells: PCA, scVI, k-NN, logistic regression."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse
from sklearn import decomposition

from sct.data.gene_selection import variable_genes
from sct.data.normalization import TARGET, log_expression
from sct.errors import MissingExtraError
from sct.eval import metrics
from sct.extras import load_extra


@dataclasses.dataclass(frozen=True, eq=False)
class BaselineCells:
    """Hold the raw counts and labels of the cells that the baselines are fitted on.

    Attributes
    ----------
    counts
        (N, G) raw counts.
    labels, batch
        (N,) label and batch of each cell as integers; `batch` may be None.
    components
        Number of principal components of the baselines.
    """

    counts: sparse.csr_matrix
    labels: np.ndarray
    batch: np.ndarray | None
    components: int = 50

    @functools.cached_property
    def log(self) -> sparse.csr_matrix:
        """Return log1p counts per 10,000, float32 (N, G). The row of a cell without counts contains only zeros."""
        return log_expression(self.counts).astype(np.float32)

    @functools.cached_property
    def principal(self) -> np.ndarray:
        """Return the first P principal components of the log counts of all cells, (N, P); P is at most `components`."""
        return _fit(self.log, self.components).transform(self.log)


def _fit(values: sparse.csr_matrix, components: int) -> Any:
    """Fit a PCA to a sparse matrix. The solver arpack centers the matrix without making it dense."""
    components = min(components, min(values.shape) - 1)
    # Only the start vector of arpack is random, so a fixed seed is enough.
    return decomposition.PCA(components, svd_solver="arpack", random_state=0).fit(values)


def fit_components(
    counts: sparse.csr_matrix, components: int = 50
) -> Callable[[sparse.csr_matrix], np.ndarray]:
    """Fit a PCA to log1p counts per 10,000 of some cells, and return a function that applies it unchanged.

    The function takes the raw counts (N, G) of any cells, and returns their principal components (N, P), with P at most
    `components`.
    """
    fitted = _fit(log_expression(counts).astype(np.float32), components)
    return lambda given: fitted.transform(log_expression(given).astype(np.float32)).astype(np.float32)


def _by_scanpy(cells: BaselineCells) -> Any:
    """Return an AnnData with log1p counts per 10,000.

    The values are computed by scanpy, so that their rounding errors are also those of scanpy.
    """
    scanpy = load_extra("scanpy", "analysis")
    from anndata import AnnData

    adata = AnnData(cells.counts.copy())
    scanpy.pp.normalize_total(adata, target_sum=TARGET)
    scanpy.pp.log1p(adata)
    return adata


def hvg_pca(cells: BaselineCells, genes: int, seed: int) -> np.ndarray:
    """Return principal components (N, P), computed by scanpy from the highly variable genes.

    `genes` is the number of highly variable genes. Before the PCA, scanpy scales each gene and clips the scaled values
    at 10.
    """
    scanpy = load_extra("scanpy", "analysis")
    adata = _by_scanpy(cells)
    adata = adata[:, variable_genes(adata.X, genes)].copy()
    scanpy.pp.scale(adata, max_value=10)
    scanpy.pp.pca(adata, min(cells.components, min(adata.shape) - 1), svd_solver="arpack", random_state=seed)
    return adata.obsm["X_pca"]


def scvi(cells: BaselineCells, genes: int, seed: int, epochs: int | None = None) -> np.ndarray:
    """Train scVI with its default settings on raw counts of highly variable genes, and return its latent space (N, 10).

    Parameters
    ----------
    cells
        Cells to train on.
    genes
        Number of highly variable genes.
    seed
        Random seed of the training.
    epochs
        Number of epochs; None for scVI's default.

    Raises
    ------
    MissingExtraError
        scvi-tools is not installed.
    """
    try:
        import scvi as library
        import torch
    except ImportError as error:
        if (error.name or "").split(".")[0] not in ("scvi", "torch"):
            raise
        raise MissingExtraError(
            "the scVI baseline needs scvi-tools, which is not installed: pip install scvi-tools"
        ) from None
    from anndata import AnnData

    chosen = variable_genes(_by_scanpy(cells).X, genes)
    adata = AnnData(cells.counts[:, chosen].copy())
    key = None if cells.batch is None else "batch"
    if cells.batch is not None:
        adata.obs[key] = pd.Categorical(cells.batch.astype(str))
    with torch.random.fork_rng():
        library.settings.seed = seed
        library.model.SCVI.setup_anndata(adata, batch_key=key)
        model = library.model.SCVI(adata)
        model.train(
            max_epochs=epochs,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        return model.get_latent_representation()


def classify(cells: BaselineCells, seed: int, folds: int = 5, k: int = 5) -> dict[str, tuple[float, float]]:
    """Return the cross-validated accuracy and macro-F1 of k-NN and logistic regression on principal components.

    The PCA and the classifier are fitted only on the cells of the training folds.

    Returns
    -------
    Dict `{"knn": (accuracy, macro-F1), "logistic": (accuracy, macro-F1)}`. The folds are those of
    `metrics.knn_accuracy`.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    pairs, kept = metrics.stratified_folds(cells.labels, folds, seed)
    predicted = {name: np.full(len(cells.labels), -1) for name in ("knn", "logistic")}
    for train, test in pairs:
        model = _fit(cells.log[train], cells.components)
        before, after = model.transform(cells.log[train]), model.transform(cells.log[test])
        classifiers = {
            "knn": KNeighborsClassifier(min(k, len(train))),
            "logistic": LogisticRegression(max_iter=1000),
        }
        for name, classifier in classifiers.items():
            predicted[name][test] = classifier.fit(before, cells.labels[train]).predict(after)
    return {name: metrics.accuracy_and_f1(cells.labels[kept], each[kept]) for name, each in predicted.items()}
