"""Which genes vary most between cells."""

from __future__ import annotations

from typing import Any

import numpy as np

from sct.extras import load_extra


def variable_genes(expression: Any, number: int, *, log_base: float | None = None) -> np.ndarray:
    """Columns of the most variable genes of cells, ascending, by scanpy's default way (`seurat`).

    Parameters
    ----------
    expression
        (N, G) logarithmic expression, floating-point, dense or sparse.
    number
        Genes to choose. Of all G, those without variation are left out.
    log_base
        Base of the logarithm; None for the natural one.

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
