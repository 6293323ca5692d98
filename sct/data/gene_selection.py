"""Select highly variable genes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from sct.data.normalization import log_expression
from sct.data.store import Study
from sct.extras import load_extra

_CELLS = 20_000  # a choice of genes hardly changes with more cells, and fits into memory
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
    total = sum(study.n_cells for study in studies)
    share = min(1.0, _CELLS / max(total, 1))
    rows = [
        np.linspace(0, study.n_cells - 1, max(1, round(share * study.n_cells))).astype(int)
        for study in studies
    ]
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


def _expression(counts: sparse.csr_matrix, genes: np.ndarray) -> sparse.csr_matrix:
    """Return the log expression (N, n), float32, of n of the genes of `counts` (N, G)."""
    return log_expression(counts.astype(np.float32))[:, genes].astype(np.float32)
