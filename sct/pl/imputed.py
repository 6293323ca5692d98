"""Read the imputed and the observed values of a gene from the results of `sct.tl.impute`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sct.data.counts import TOLERANCE
from sct.errors import DataError
from sct.pl.values import dense, gene_row, gene_values, near

if TYPE_CHECKING:
    from anndata import AnnData

# sct.tl.impute appends these suffixes to key_added.
EXPECTED = "_expected"
UNITS = {
    EXPECTED: "expected raw counts",
    "_level": "expression level",
    "_probability": "probability of expression",
}


def impute_record(adata: AnnData, layer: str | None) -> Mapping[str, Any] | None:
    """Return the parameters that `sct.tl.impute` wrote for a layer or table; None if another tool wrote its values."""
    for ending in UNITS:
        record = adata.uns.get(layer.removesuffix(ending)) if layer and layer.endswith(ending) else None
        if isinstance(record, Mapping) and {"genes", "cells", "counts_from"} <= record.keys():
            return record
    return None


def _names(record: Mapping[str, Any], field: str) -> list[str]:
    """Return a list of names that the imputation parameters hold; empty if they have no such list."""
    return [str(name) for name in np.ravel(np.asarray(record.get(field, ()), dtype=object)) if str(name)]


def imputed_values(adata: AnnData, gene: str, layer: str) -> np.ndarray:
    """Return the imputed values (N,) of a gene from a layer or obsm table; NaN for cells without an imputed value.

    Raises
    ------
    DataError
        The layer does not exist, the gene is unknown, or it was not imputed.
    """
    record, table = impute_record(adata, layer), adata.obsm.get(layer)
    if layer not in adata.layers and table is None:
        raise DataError(
            f"neither layers nor obsm has {layer!r}: run sct.tl.impute first, or set layer to an existing key."
        )
    columns = list(adata.var_names) if layer in adata.layers else []
    if record is not None:
        columns = _imputed_columns(adata, record, columns)
    aside = list(table.columns) if isinstance(table, pd.DataFrame) else []
    if gene in columns:
        values = gene_values(adata, gene, layer).astype(float)
    elif isinstance(table, pd.DataFrame) and gene in aside:
        values = dense(table[gene].to_numpy()).astype(float)
    elif layer in adata.layers and gene in adata.var_names:
        raise DataError(
            f"the gene {gene!r} was not imputed, so {layer!r} has only its observed values: impute it with "
            f"sct.tl.impute(genes=...), or plot an imputed gene; {near(gene, [*columns, *aside])}"
        )
    else:
        raise DataError(
            f"{layer!r} has no imputed values of the gene {gene!r}: {near(gene, [*columns, *aside])}"
        )
    # The table can come from an earlier call that imputed other cells and left NaN in the rest.
    if record is not None and (gene in columns or gene in _names(record, "genes")):
        cells = _names(record, "cells")
        if cells:
            values[~adata.obs_names.isin(cells)] = np.nan
    if not np.isfinite(values).any():
        raise DataError(
            f"{layer!r} has no imputed value of the gene {gene!r} in these {len(values):,} cells: impute "
            "the gene with sct.tl.impute(genes=...)."
        )
    return values


def _imputed_columns(adata: AnnData, record: Mapping[str, Any], columns: list[str]) -> list[str]:
    """Return the columns of a layer that were imputed; the other columns have observed values."""
    given = _names(record, "genes")
    inside = set(_names(record, "var_names"))
    if "var_names" in record and (inside or given):
        return [name for name in columns if name in inside]
    if not (given and columns):
        return columns  # whole cells were imputed, or there is no layer
    # Users name genes as in var_names or as in any column of var.
    named = adata.var_names.isin(given)
    for column in adata.var.columns:
        named |= adata.var[column].astype(str).isin(given).to_numpy()
    return [name for name, one in zip(columns, named, strict=True) if one]


def observed_values(adata: AnnData, gene: str, layer: str) -> np.ndarray:
    """Return the observed values (N,) of a gene from the counts that the imputation read; NaN if unmeasured.

    Raises
    ------
    DataError
        The counts have been moved or changed since the imputation, or several columns have the name of the gene.
    """
    record = impute_record(adata, layer)
    place = "X" if record is None else str(record["counts_from"])
    raw, counts = place == "raw.X", None
    if place.startswith('layers["'):
        counts = place.removeprefix('layers["').removesuffix('"]')
    gone = adata.raw is None if raw else adata.X is None if counts is None else counts not in adata.layers
    if gone:
        raise DataError(
            f"the imputation read the observed counts from {place}, but adata no longer has {place}: "
            "restore the counts there, or set compare=False."
        )
    var = adata.raw.var if raw else adata.var
    name = gene_row(var, gene)
    if name is None:
        return np.full(adata.n_obs, np.nan)
    values = dense(adata.raw[:, [name]].X) if raw else gene_values(adata, name, counts)
    values = values.astype(float)
    if record is not None and ((values < 0) | (np.abs(values - np.rint(values)) > TOLERANCE)).any():
        raise DataError(
            f"{place} had raw counts at the time of the imputation, but its values of {gene!r} are not raw counts now: "
            "restore the counts, or set compare=False."
        )
    return values
