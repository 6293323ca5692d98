"""Select highly variable genes."""

from __future__ import annotations

from typing import Any

import numpy as np

from sct.extras import load_extra


def variable_genes(expression: Any, number: int, *, log_base: float | None = None) -> np.ndarray:
    """Return the columns of highly variable genes, ascending, by scanpy's default method (`seurat`).

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
