"""Select highly variable genes, and put genes that are expressed together next to each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.sparse.linalg import ArpackError, eigsh

from sct.checks import check_at_least
from sct.data.genes.vocabulary import GeneVocabulary
from sct.data.normalization import log_expression
from sct.data.store import Store, Study
from sct.errors import DataError
from sct.extras import load_extra

_CELLS = 20_000  # a choice of genes hardly changes with more cells, and fits into memory
_LOADINGS = 50  # eigenvectors of the correlations; later ones are mostly noise
_MOST_ORDERED = 10_000
_ENOUGH = 50  # cells of a study whose dispersions are not mostly noise


def variable_genes(expression: Any, number: int, *, log_base: float | None = None) -> np.ndarray:
    """Select highly variable genes by scanpy's default method (`seurat`), and return their columns in ascending order.

    Parameters
    ----------
    expression
        Log expression (N, G), floating-point, dense or sparse.
    number
        Number of genes to select. Genes without variation are never selected.
    log_base
        Base of the logarithm; None for the natural logarithm.

    Raises
    ------
    MissingExtraError
        scanpy is not installed.
    """
    return np.flatnonzero(_dispersions(expression, number, log_base)["highly_variable"])


def _dispersions(expression: Any, number: int, log_base: float | None = None) -> pd.DataFrame:
    """Return scanpy's table of G genes, with the columns `highly_variable` and `dispersions_norm`."""
    scanpy = load_extra("scanpy", "analysis")
    from anndata import AnnData

    adata = AnnData(expression, uns={"log1p": {"base": log_base}})
    scanpy.pp.highly_variable_genes(adata, n_top_genes=min(number, adata.n_vars))
    return adata.var


def hvg_of(
    studies: Sequence[Study], number: int, known: np.ndarray, *, everywhere: bool = True
) -> np.ndarray:
    """Select highly variable genes from the cells of studies, and return their vocabulary positions in ascending order.

    The expression is log1p of counts per 10,000. If the studies have more than 20,000 cells in total, about 20,000 of
    them are read. Each study then contributes cells in proportion to its size. The cells that are read are evenly
    spaced in the stored order of the study, which is random or follows a space-filling curve.

    Parameters
    ----------
    studies
        Studies of one store.
    number
        Number of genes to select. Genes without variation are never selected.
    known
        Mask of the genes to choose from, bool (G,).
    everywhere
        Whether to choose only genes that all studies measured. Many files lack the genes that few of their cells
        express, so this rule can leave out important markers. If False, a gene's score is the mean over the cells of
        its normalized dispersion within their study, which is 0 (average) for genes that the study did not measure.
        Studies with fewer than 50 cells do not count, unless all are that small. Differences between studies do not
        make a gene variable.

    Raises
    ------
    MissingExtraError
        scanpy is not installed.
    """
    rows = _sampled(studies)
    counts = sparse.vstack(
        [study.read_rows(each) for study, each in zip(studies, rows, strict=True)], format="csr"
    )
    measured = [study.measured for study in studies]
    if everywhere:
        genes = np.flatnonzero(known & np.all(measured, axis=0))
        return genes[variable_genes(_expression(counts, genes), number)]
    score, varies, first = np.zeros(len(known)), np.zeros(len(known), bool), 0
    least = min(_ENOUGH, max(len(each) for each in rows))
    for own, each in zip(measured, rows, strict=True):
        block, first = counts[first : first + len(each)], first + len(each)
        genes = np.flatnonzero(known & own)
        if len(each) >= least:
            found = _dispersions(_expression(block, genes), number)["dispersions_norm"].to_numpy(np.float64)
            score[genes] += len(each) * np.nan_to_num(found)
            varies[genes] |= np.isfinite(found)
    order = np.argsort(np.where(varies, -score, np.inf), kind="stable")
    return np.sort(order[: min(number, int(varies.sum()))])


def _sampled(studies: Sequence[Study]) -> list[np.ndarray]:
    """Return evenly spaced rows of each study, about 20,000 in all, in proportion to the sizes of the studies."""
    share = min(1.0, _CELLS / max(sum(study.n_cells for study in studies), 1))
    return [
        np.linspace(0, study.n_cells - 1, max(1, round(share * study.n_cells))).astype(int)
        for study in studies
    ]


def coexpression_order(studies: Sequence[Study], genes: np.ndarray) -> np.ndarray:
    """Order genes so that genes with similar expression are near each other: convolutions see the order.

    The similarity of two genes is the cosine of their vectors of loadings: the leading 50 eigenvectors of the
    correlation matrix, scaled by the square roots of their eigenvalues. The order is that of the leaves of a
    hierarchical clustering with average linkage. The expression is log1p of counts per 10,000, standardized within each
    study, so that differences between studies make no genes similar. The same cells are read as in `hvg_of`.

    Parameters
    ----------
    studies
        Studies of one store.
    genes
        Positions of n genes in the vocabulary, int (n,).

    Returns
    -------
    The same positions in the new order, int (n,).

    Raises
    ------
    DataError
        There are more than 10,000 genes, for which the correlations would need too much memory.
    """
    number = len(genes)
    if number > _MOST_ORDERED:
        raise DataError(
            f"{number:,} genes cannot be ordered by co-expression: choose at most {_MOST_ORDERED:,} genes, or keep the "
            "order of the store (--order=store)."
        )
    if number < 3:
        return genes
    products, cells = np.zeros((2, number, number), np.float32)
    for study, rows in zip(studies, _sampled(studies), strict=True):
        block = _expression(study.read_rows(rows), genes).toarray()
        block -= block.mean(axis=0)
        deviation = block.std(axis=0)
        block /= np.where(deviation > 0, deviation, 1.0)
        known = study.measured[genes].astype(np.float32)
        products += block.T @ block
        cells += len(rows) * np.outer(known, known)
    correlation = products / np.maximum(cells, 1.0)
    if not correlation.any():  # no gene varies
        return genes
    found = min(_LOADINGS, number - 1)
    try:
        values, vectors = eigsh(correlation, found, v0=np.ones(number, np.float32))
    except ArpackError as error:
        raise DataError(
            f"the genes cannot be ordered by co-expression ({error}): keep the order of the store (--order=store)."
        ) from error
    loadings = vectors.astype(np.float64) * np.sqrt(np.maximum(values, 0.0))
    length = np.linalg.norm(loadings, axis=1, keepdims=True)
    # Genes without variation have no direction: they form one group.
    loadings = np.where(length > 0, loadings / np.where(length > 0, length, 1.0), 0.0)
    return genes[leaves_list(linkage(loadings, "average", "sqeuclidean"))]


def chosen_vocabulary(store: Store, number: int = 0, by_coexpression: bool = False) -> GeneVocabulary:
    """Choose genes of a store by its training cells, and return them as a vocabulary, for `launch.ingest --genes`.

    Parameters
    ----------
    store
        Store with training studies.
    number
        Number of highly variable genes; 0 for all genes that a training cell expresses.
    by_coexpression
        Whether to order the genes by co-expression (`coexpression_order`). Otherwise they keep the order of the store.

    Raises
    ------
    DataError
        The store has no training study, or there are too many genes to be ordered.
    ConfigError
        `number` is negative.
    """
    check_at_least("number", number, 0)
    studies, vocabulary = store.split("train"), store.vocabulary
    if not studies:
        raise DataError(f"the store {store.path} has no training study: give another store.")
    for study in studies:
        study.check_counts()
    if number:
        genes = hvg_of(studies, number, np.ones(len(vocabulary), bool), everywhere=False)
    else:
        genes = np.flatnonzero(np.sum([study.gene_totals for study in studies], axis=0))
    return vocabulary.select(coexpression_order(studies, genes) if by_coexpression else genes)


def _expression(counts: sparse.csr_matrix, genes: np.ndarray) -> sparse.csr_matrix:
    """Return the log expression (N, n), float32, of n of the genes of `counts` (N, G)."""
    return log_expression(counts.astype(np.float32))[:, genes].astype(np.float32)
