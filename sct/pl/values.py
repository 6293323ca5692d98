"""Values of cells that plots show: columns of obs, genes of X or of a layer, embeddings of obsm."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from sct.checks import check_choice, check_finite, nearest
from sct.errors import DataError

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData


def near(name: str, known: Iterable[str | None]) -> str:
    """What is there instead of a name: the nearest ones, or how to see them."""
    # Newer versions of anndata list X among the layers, as None.
    names = [str(one) for one in known if one is not None]
    if close := nearest(name, names, n=3, cutoff=0.5):
        return f"did you mean {' or '.join(map(repr, close))}?"
    if not names:
        return "there is none."
    more = ", ..." if len(names) > 5 else ""
    return f"there is {', '.join(map(repr, names[:5]))}{more}."


def dense(column: Any) -> np.ndarray:
    """A column of a matrix, sparse or not, (N,)."""
    return np.asarray(column.toarray() if hasattr(column, "toarray") else column).ravel()


def gene_values(adata: AnnData, gene: str, layer: str | None = None) -> np.ndarray:
    """Values (N,) of one gene of X, or of a layer.

    Raises
    ------
    DataError
        The gene or the layer is not there, or the gene is there more than once.
    """
    if layer is not None:
        # Newer versions of anndata list X among the layers, as None.
        check_choice("layer", layer, [each for each in adata.layers if each is not None], error=DataError)
    found = np.flatnonzero(adata.var_names == gene)
    if len(found) == 0:
        raise DataError(f"var_names has no gene {gene!r}: {near(gene, adata.var_names)}")
    if len(found) > 1:
        raise DataError(
            f"var_names has the gene {gene!r} {len(found)} times: make them unique with adata.var_names_make_unique()."
        )
    # One column of a file is read, never the matrix.
    column = adata[:, [int(found[0])]]
    return dense(column.X if layer is None else column.layers[layer])


def cell_values(adata: AnnData, name: str, layer: str | None = None) -> pd.Series | np.ndarray:
    """A column of obs, else a gene; a name that is both is the column.

    Raises
    ------
    DataError
        It is neither.
    """
    if name in adata.obs.columns:
        return adata.obs[name]
    if name in adata.var_names:
        return gene_values(adata, name, layer)
    known = [*adata.obs.columns, *adata.var_names]
    raise DataError(f"{name!r} is neither a column of obs nor a gene: {near(name, known)}")


def positions(adata: AnnData, key: str, width: int | None = None) -> np.ndarray:
    """Array (N, D) of obsm; with `width`, its first columns, of which there must be so many.

    Raises
    ------
    DataError
        The key is not there, or the array has fewer columns or holds NaN or infinity.
    """
    check_choice("the key of obsm", key, adata.obsm, error=DataError)
    array = np.asarray(adata.obsm[key])
    if array.ndim != 2 or array.shape[1] < (width or 1):
        raise DataError(
            f"obsm[{key!r}] has shape {array.shape}, and {width or 1} columns or more are needed."
        )
    try:
        array = array[:, :width].astype(np.float64 if width else np.float32, copy=False)
    except ValueError as error:
        raise DataError(f"obsm[{key!r}] holds {array.dtype}, and numbers are needed.") from error
    check_finite(f"obsm[{key!r}]", array, "cells", advice="leave these cells out first")
    return array
