"""Baselines of embeddings, fitted on the cells that are measured: components, scVI, classifiers."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse
from sklearn import decomposition

from sct.errors import MissingExtraError
from sct.eval import metrics
from sct.extras import load_extra


@dataclasses.dataclass(frozen=True, eq=False)
class Cells:
    """Labelled cells.

    Attributes
    ----------
    counts
        (N, G) raw counts.
    labels, batch
        (N,) integers; batches or None.
    components
        Principal components that baselines have.
    """

    counts: sparse.csr_matrix
    labels: np.ndarray
    batch: np.ndarray | None
    components: int = 50

    @functools.cached_property
    def log(self) -> sparse.csr_matrix:
        """log1p of counts per 10,000 (N, G); a cell without counts stays empty."""
        totals = np.asarray(self.counts.sum(axis=1)).ravel()
        factors = np.divide(1e4, totals, out=np.zeros_like(totals), where=totals > 0)
        return sparse.csr_matrix(sparse.diags(factors) @ self.counts).log1p().astype(np.float32)

    @functools.cached_property
    def principal(self) -> np.ndarray:
        """Principal components of all cells (N, P)."""
        return _fit(self.log, self.components).transform(self.log)


def _fit(values: sparse.csr_matrix, components: int) -> Any:
    """Principal components of sparse values, which are centred but never made dense."""
    components = min(components, min(values.shape) - 1)
    # The start vector is the only random part.
    return decomposition.PCA(components, svd_solver="arpack", random_state=0).fit(values)


def _variable_genes(cells: Cells, genes: int) -> Any:
    """AnnData of log counts, of highly variable genes alone (scanpy's default way to find them)."""
    scanpy = load_extra("scanpy", "analysis")
    from anndata import AnnData

    adata = AnnData(cells.counts.copy())
    scanpy.pp.normalize_total(adata, target_sum=1e4)
    scanpy.pp.log1p(adata)
    scanpy.pp.highly_variable_genes(adata, n_top_genes=min(genes, adata.n_vars))
    return adata[:, adata.var["highly_variable"].to_numpy()].copy()


def hvg_pca(cells: Cells, genes: int, seed: int) -> np.ndarray:
    """Principal components (N, P) by scanpy's standard recipe: variable genes, scaled and clipped at 10."""
    scanpy = load_extra("scanpy", "analysis")
    adata = _variable_genes(cells, genes)
    scanpy.pp.scale(adata, max_value=10)
    scanpy.pp.pca(adata, min(cells.components, min(adata.shape) - 1), svd_solver="arpack", random_state=seed)
    return adata.obsm["X_pca"]


def scvi(cells: Cells, genes: int, seed: int, epochs: int | None = None) -> np.ndarray:
    """Latent space (N, 10) of scVI with its defaults, trained on the counts of variable genes and the batches.

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
        raise MissingExtraError("scvi-tools is not installed: pip install scvi-tools") from None
    from anndata import AnnData

    chosen = _variable_genes(cells, genes).var_names.astype(int)
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


def classify(cells: Cells, seed: int, folds: int = 5, k: int = 5) -> dict[str, tuple[float, float]]:
    """Labels predicted from principal components, both fitted on the cells of the training folds.

    Returns
    -------
    "knn" and "logistic" -> accuracy and macro-F1, on the same folds as `metrics.knn_accuracy`.
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
