"""Select highly variable genes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import sparse

from sct.data.normalization import log_expression
from sct.data.store import Study
from sct.extras import load_extra

_CELLS = 20_000  # a choice of genes hardly changes with more cells, and fits into memory


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
    scanpy = load_extra("scanpy", "analysis")
    from anndata import AnnData

    adata = AnnData(expression, uns={"log1p": {"base": log_base}})
    scanpy.pp.highly_variable_genes(adata, n_top_genes=min(number, adata.n_vars))
    return np.flatnonzero(adata.var["highly_variable"])


def hvg_of(studies: Sequence[Study], number: int, known: np.ndarray) -> np.ndarray:
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
        Mask of the genes to choose from, bool (G,). A gene is chosen only if all studies measured it.

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
    eligible = known & np.all([study.measured for study in studies], axis=0)
    genes = np.flatnonzero(eligible)
    expression = log_expression(counts.astype(np.float32))[:, genes].astype(np.float32)
    return genes[variable_genes(expression, number)]
