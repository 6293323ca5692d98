"""Read values for plots: genes of X or of a layer, and arrays of obsm."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sct.checks import check_choice, check_finite, nearest
from sct.errors import DataError

if TYPE_CHECKING:
    from anndata import AnnData


def near(name: str, known: Iterable[str | None]) -> str:
    """Return the last part of an error message about an unknown name: a suggestion of similar or existing names."""
    # Newer versions of anndata list X among the layers as None.
    names = [str(one) for one in known if one is not None]
    if close := nearest(name, names, n=3, cutoff=0.5):
        return f"did you mean {' or '.join(map(repr, close))}?"
    if not names:
        return "there are none."
    more = ", ..." if len(names) > 5 else ""
    return f"choose from {', '.join(map(repr, names[:5]))}{more}."


def check_real(name: str, values: Any) -> None:
    """Raise `DataError` if values are complex numbers."""
    if np.iscomplexobj(values):
        raise DataError(
            f"{name} has complex numbers, but a plot needs real numbers: plot their absolute values or real parts."
        )


def dense(column: Any) -> np.ndarray:
    """Return a column of a sparse or dense matrix as a dense array (N,)."""
    return np.asarray(column.toarray() if hasattr(column, "toarray") else column).ravel()


def gene_row(var: pd.DataFrame, gene: str) -> str | None:
    """Find a gene by its var_name or by a value in any column of var.

    Return the var_name of the gene; None if the gene is absent.

    Raises
    ------
    DataError
        Several rows of var have this name.
    """
    if gene in var.index:
        found = var.index[var.index == gene]
    else:
        named = np.zeros(len(var), bool)
        for column in var.columns:
            if not pd.api.types.is_numeric_dtype(var[column].dtype):
                named |= (var[column].astype(str) == gene).to_numpy()
        found = var.index[named]
    if len(found) > 1:
        raise DataError(
            f"`var` has the gene {gene!r} {len(found)} times, but a gene must be unique: keep one of these rows, or "
            "call adata.var_names_make_unique() and use the name in var_names."
        )
    return str(found[0]) if len(found) else None


def gene_values(adata: AnnData, gene: str, layer: str | None = None) -> np.ndarray:
    """Return the values (N,) of one gene in X or in a layer.

    The gene is given as a var_name or as a value in a column of var.

    Raises
    ------
    DataError
        The gene or the layer does not exist, or several rows of var have the name of the gene.
    """
    if layer is not None:
        # Newer versions of anndata list X among the layers, as None.
        check_choice("layer", layer, [each for each in adata.layers if each is not None], error=DataError)
    elif adata.X is None:
        raise DataError(
            "adata has no X, but layer is None, which means X: set layer to a key of adata.layers."
        )
    name = gene_row(adata.var, gene)
    if name is None:
        raise DataError(f"var_names has no gene {gene!r}: {near(gene, adata.var_names)}")
    # Subset first, so that only one column of a backed file is read.
    column = adata[:, adata.var_names.get_indexer_for([name])]
    return dense(column.X if layer is None else column.layers[layer])


def positions(adata: AnnData, key: str, width: int | None = None) -> np.ndarray:
    """Return an array (N, D) of obsm; with `width`, only its first `width` columns.

    Raises
    ------
    DataError
        The key does not exist, or the array has too few columns, NaN or infinity.
    """
    check_choice("the key of obsm", key, adata.obsm, error=DataError)
    array = np.asarray(adata.obsm[key])
    if array.ndim != 2 or array.shape[1] < (width or 1):
        raise DataError(
            f"obsm[{key!r}] has the shape {array.shape}, but must have at least {width or 1} columns: "
            "choose the key of another array in obsm."
        )
    check_real(f"obsm[{key!r}]", array)
    try:
        array = array[:, :width].astype(np.float64 if width else np.float32, copy=False)
    except ValueError as error:
        raise DataError(
            f"obsm[{key!r}] has values of type {array.dtype}, but must have numbers: choose the key of "
            "another array in obsm."
        ) from error
    check_finite(f"obsm[{key!r}]", array, "cells", advice="remove these cells first")
    return array
