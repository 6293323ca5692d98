"""Find raw counts in an AnnData, and distinguish them from normalized or transformed data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import zarr
from anndata.abc import CSCDataset, CSRDataset
from scipy import sparse

from sct.checks import check_choice
from sct.errors import DataError

# "counts": counts of molecules. "activity": other values, of which only the order within a cell is used.
Values = Literal["counts", "activity"]
COUNTS: Values = "counts"
# Tolerance for counts after float32 arithmetic. A non-zero value that rounds to 0 is never accepted as a count;
# otherwise proportions would be read as empty cells.
TOLERANCE = 1e-3
_PART = 65_536  # values per step, which stay in the CPU cache for several passes
_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
BLOCK_VALUES = 4_000_000  # stored values to check at a time: about 100 MB with temporaries

ADVICE = 'raw counts are needed: put them in X, adata.raw or layers["counts"], or set layer= to their layer.'
ACTIVITY_ADVICE = (
    "activities must be non-negative numbers: put them in X, or set layer= to the layer that has them."
)


def check_values(values: str) -> None:
    """Raise `ConfigError` if `values` is not "counts" or "activity"."""
    check_choice("values", values, get_args(Values))


class _NotCountsError(DataError):
    """Signal that a matrix does not hold raw counts.

    `finding` says why. `validate` lists the findings of all matrices.
    """

    def __init__(self, what: str, reason: str, advice: str = ADVICE):
        super().__init__(f"{what} {reason}; {advice}")
        self.finding = f"{what} {reason}"


@dataclass(frozen=True)
class ValidatedCounts:
    """Hold valid raw counts, and the location where the counts were found.

    Attributes
    ----------
    matrix
        Raw counts (N, n_var). In memory: CSR of exact integers in the dtype of the input. The matrix may share memory
        with the input, so do not modify it. Backed: the matrix on disk. Use `exact_integers` to round each block that
        you read from this matrix.
    source
        'X', 'raw.X' or 'layers["..."]'.
    var
        Table of the genes of `matrix` (n_var rows).
    n_empty_cells
        Number of cells without counts.
    messages
        Remarks for the user, one sentence each.
    """

    matrix: Any
    source: str
    var: pd.DataFrame
    n_empty_cells: int
    messages: tuple[str, ...]


class CountsChecker:
    """Check block by block that values are raw counts.

    Parameters
    ----------
    what
        Name of the matrix in messages, e.g. 'X of pbmc.h5ad'.
    values
        "counts", or "activity" to accept any finite values of at least 0.

    Attributes
    ----------
    n_values, n_nonzero, maximum
        Number of values, number of non-zero values, and largest value, over all blocks so far.
    inexact
        Whether any value differed from an integer (by at most 0.001); always False for "activity".
    """

    def __init__(self, what: str, values: Values = COUNTS):
        check_values(values)
        self.what = what
        self.values = values
        self._advice = ADVICE if values == COUNTS else ACTIVITY_ADVICE
        self.n_values = 0
        self.n_nonzero = 0
        self.maximum = 0.0
        self.inexact = False

    def update(self, block: Any) -> None:
        """Check one block.

        Parameters
        ----------
        block
            Stored values (1-D), or a sparse or dense part of the matrix (2-D). If the rows of a 2-D block are complete
            cells, the error message can distinguish normalized from corrected values. This does not change which values
            are accepted.

        Raises
        ------
        DataError
            A value is NaN, infinite, negative, or not within 0.001 of an integer. The message states what kind of data
            the values look like.
        """
        values = np.asarray(block.data if sparse.issparse(block) else block)
        if values.dtype.kind not in "biuf":
            raise self._refused(f"has {values.dtype} values instead of numbers")
        values = values.reshape(-1)
        self.n_values += values.size
        if not values.size:
            return
        if values.dtype.kind == "f":
            self._check_floats(block, values)
        elif values.dtype.kind == "i" and values.min() < 0:
            raise self._refused(f"has negative values (e.g. {values.min()}), but counts are at least 0")
        self.n_nonzero += int(np.count_nonzero(values))
        self.maximum = max(self.maximum, float(values.max()))

    def _check_floats(self, block: Any, values: np.ndarray) -> None:
        if self.values == COUNTS and all(
            _are_counts(values[at : at + _PART]) for at in range(0, values.size, _PART)
        ):
            return
        finite = np.isfinite(values)
        if not finite.all():
            bad = values[~finite]
            name = "NaN" if np.isnan(bad).any() else "infinite"
            raise self._refused(
                f"has {bad.size:,} {name} values among {values.size:,} values, so the matrix is damaged or imputed"
            )
        if (low := values.min()) < 0:
            raise self._refused(
                f"has negative values (e.g. {low:.4g}), so they look like scaled (z-scored) or corrected data"
            )
        if self.values != COUNTS:
            positive = values[values > 0]
            if positive.size and not (positive.min() >= _SMALLEST and positive.max() <= _LARGEST):
                raise self._refused(
                    "has values that are too small or too large for float32, so multiply all values by a constant"
                )
            return
        nearest = np.rint(values)
        distance = np.abs(values - nearest)
        off = distance > TOLERANCE
        off |= (nearest == 0) & (values != 0)
        if off.any():
            raise self._refused(
                f"has values that are not integers (e.g. {values[np.argmax(off)]:.5g}), so they look like "
                f"{_kind(block, values)}"
            )
        self.inexact |= bool(distance.any())

    def finish(self) -> None:
        """Check the matrix as a whole, after the last block.

        Raises
        ------
        DataError
            All values are zero.
        """
        if not self.n_nonzero:
            raise self._refused("has only zeros, so every cell is empty")

    def _refused(self, reason: str) -> _NotCountsError:
        return _NotCountsError(self.what, reason, self._advice)


def _are_counts(values: np.ndarray) -> bool:
    """Return whether all values are finite integers of at least 0: a fast check that most inputs pass."""
    return bool(values.min() >= 0 and values.max() < np.inf and np.array_equal(np.rint(values), values))


def validate(adata: ad.AnnData, *, layer: str | None = None, values: Values = COUNTS) -> ValidatedCounts:
    """Find and check the raw counts of an AnnData. The AnnData is not changed.

    Raw counts are non-negative integers in any dtype. Floats within 0.001 of an integer are accepted and rounded in the
    result. Repeated gene names are not checked here; see `GeneVocabulary.align`.

    Parameters
    ----------
    adata
        AnnData (N, n_var) in memory or backed; dense, CSR or CSC. A backed matrix is read in blocks.
    layer
        Name of the layer, or "X" or "raw.X". Default: the first of `X`, `raw.X` and `layers["counts"]` that has raw
        counts.
    values
        "counts", or "activity" to accept any finite values of at least 0, by default from X. Use "activity" only for
        models that use the order of the genes in a cell, not the values.

    Returns
    -------
    The counts and their location.

    Raises
    ------
    DataError
        There are no cells or genes, cell names are repeated, the layer does not exist, or there are no raw counts. The
        message states what each matrix contains instead.
    ConfigError
        `values` is not "counts" or "activity".
    """
    check_values(values)
    _check_axes(adata)
    if values != COUNTS and layer is None:
        layer = "X"  # activities cannot be recognized by their values, so there is no search
    findings = []
    for source, matrix, var in _candidates(adata, layer):
        try:
            checked, n_empty, messages = _check(matrix, source, values)
        except _NotCountsError as error:
            findings.append(error.finding)
            continue
        if findings:
            messages = [f"counts are taken from {source}, because {' and '.join(findings)}", *messages]
        elif source != "X" and layer is None:
            messages = [f"counts are taken from {source}, because there is no X", *messages]
        n_repeated = int(var.index.duplicated().sum())
        if n_repeated:
            messages.append(
                f"{n_repeated:,} gene names occur more than once; see the duplicates option for how they are handled"
            )
        return ValidatedCounts(checked, source, var, n_empty, tuple(messages))
    if not findings:
        where = 'X, adata.raw or layers["counts"]' if values == COUNTS else "X"
        raise DataError(f"there is no {where}; {ADVICE if values == COUNTS else ACTIVITY_ADVICE}")
    advice = ADVICE if values == COUNTS else ACTIVITY_ADVICE
    raise DataError(f"{', and '.join(findings)}; {advice}")


def exact_integers(matrix: Any) -> Any:
    """Round values to whole numbers. The array type (dense or sparse) and the dtype do not change.

    Use this function only for values that `validate` or `CountsChecker` accepted.
    """
    values = matrix.data if sparse.issparse(matrix) else matrix
    if values.dtype.kind != "f":
        return matrix
    nearest = np.rint(values)
    if np.array_equal(nearest, values):
        return matrix
    if not sparse.issparse(matrix):
        return nearest
    rounded = matrix.copy()
    rounded.data = nearest
    return rounded


def _check_axes(adata: ad.AnnData) -> None:
    if adata.n_obs == 0 or adata.n_vars == 0:
        empty = "cells" if adata.n_obs == 0 else "genes"
        raise DataError(
            f"the data has {adata.n_obs} cells and {adata.n_vars} genes, but at least one of each is needed: check "
            f"the filters that removed all {empty}."
        )
    repeated = adata.obs_names[adata.obs_names.duplicated()].unique()
    if len(repeated):
        shown = ", ".join(map(str, repeated[:3])) + (", ..." if len(repeated) > 3 else "")
        raise DataError(
            f"{len(repeated)} cell names occur more than once ({shown}), but they must be unique: call "
            "adata.obs_names_make_unique() if they are different cells."
        )


def _candidates(adata: ad.AnnData, layer: str | None) -> Iterator[tuple[str, Any, pd.DataFrame]]:
    """Yield each matrix that may hold the raw counts, as (location, matrix, table of genes)."""
    if layer is not None and layer in adata.layers:
        yield f'layers["{layer}"]', adata.layers[layer], adata.var
        return
    if layer not in (None, "X", "raw.X") or (layer == "raw.X" and adata.raw is None):
        # anndata 0.13 lists X as the layer None.
        have = ", ".join(repr(name) for name in adata.layers if name is not None) or "no layers"
        raise DataError(
            f"there is no layer {layer!r}, but {have}: set layer= to one of these, to 'X' or to 'raw.X'."
        )
    if layer != "raw.X" and adata.X is not None:
        yield "X", adata.X, adata.var
    if layer != "X" and adata.raw is not None:
        yield "raw.X", adata.raw.X, adata.raw.var
    if layer is None and "counts" in adata.layers:
        yield 'layers["counts"]', adata.layers["counts"], adata.var


def _check(matrix: Any, source: str, values: Values = COUNTS) -> tuple[Any, int, list[str]]:
    """Check one matrix; return the matrix (CSR if in memory), the number of empty cells, and the warnings to show."""
    on_disk = isinstance(matrix, CSRDataset | CSCDataset | h5py.Dataset | zarr.Array)
    if not on_disk:
        matrix = _in_memory(matrix, source)
    if len(matrix.shape) != 2 or 0 in matrix.shape:
        raise _NotCountsError(source, f"has shape {tuple(matrix.shape)}")
    checker = CountsChecker(source, values)
    filled = np.zeros(matrix.shape[0], bool)
    parts = []
    for start, block in _blocks(matrix):
        checker.update(block)
        if sparse.issparse(block):
            rows = block.tocoo().row[block.data != 0]
        else:
            rows = np.flatnonzero(block.any(axis=1))
            if not on_disk:
                parts.append(sparse.csr_matrix(block))
        filled[start + rows] = True
    checker.finish()
    if parts:
        matrix = sparse.vstack(parts, format="csr")
    if not on_disk and checker.inexact:
        matrix = exact_integers(matrix)
    messages = []
    n_empty = int(matrix.shape[0] - filled.sum())
    if n_empty:
        messages.append(f"{n_empty:,} of {matrix.shape[0]:,} cells are empty (no counts)")
    if values == COUNTS and checker.maximum <= 1:
        messages.append(f"{source} has only the values 0 and 1, so it may be binarized")
    if checker.inexact:
        messages.append(f"{source} has floats within {TOLERANCE} of integers, which were rounded")
    return matrix, n_empty, messages


def _in_memory(matrix: Any, source: str) -> Any:
    """Return a matrix as canonical CSR or as a NumPy array."""
    if sparse.issparse(matrix):
        rows = sparse.csr_matrix(matrix)
        if rows.dtype == bool:
            rows = rows.astype(np.uint8)
        if not rows.has_canonical_format:
            rows = rows.copy()
            rows.sum_duplicates()
        return rows
    if isinstance(matrix, np.ndarray):
        return np.asarray(matrix, np.uint8) if matrix.dtype == bool else np.asarray(matrix)
    raise DataError(
        f"{source} is a {type(matrix).__module__}.{type(matrix).__name__}, but must be a NumPy array, a SciPy sparse "
        "matrix or a backed matrix: call adata.to_memory() first."
    )


def _blocks(matrix: Any) -> Iterator[tuple[int, Any]]:
    """Cut a matrix into blocks of rows, and yield pairs (first row, block).

    A CSC matrix on disk is cut into blocks of columns instead. The first row of each of these blocks is 0.
    """
    if isinstance(matrix, CSRDataset | CSCDataset):
        indptr = matrix.group["indptr"][:]
    elif sparse.issparse(matrix):
        indptr = matrix.indptr
    else:
        indptr = np.arange(matrix.shape[0] + 1, dtype=np.int64) * matrix.shape[1]
    by_column = isinstance(matrix, CSCDataset)
    start = 0
    while start < len(indptr) - 1:
        stop = int(np.searchsorted(indptr, int(indptr[start]) + BLOCK_VALUES, side="right")) - 1
        stop = max(stop, start + 1)
        yield (0, matrix[:, start:stop]) if by_column else (start, matrix[start:stop])
        start = stop


def _kind(block: Any, values: np.ndarray) -> str:
    """Guess the kind of data, such as log-transformed counts, from values that are non-negative and not integers."""
    positive = values[values > 0]
    if positive.max() < 25:  # an upper bound for natural and base-2 logarithms of counts
        for name, counts in (("log1p", np.expm1(positive)), ("log2(x + 1)", np.exp2(positive) - 1)):
            if np.mean(np.abs(counts - np.rint(counts)) < 1e-2) > 0.99:
                return f"{name} of counts"
        total = _constant_total(block, log=True)
        if total is not None:
            return f"log1p of counts normalized to {total:,.0f} per cell"
    total = _constant_total(block, log=False)
    if total is not None:
        return f"counts normalized to {total:,.5g} per cell"
    if positive.max() < 15:
        return "log-transformed data"
    return "TPM, normalized or corrected counts"


def _constant_total(block: Any, *, log: bool) -> float | None:
    """Return the total per cell if all cells of a block have nearly the same total (within 2%), otherwise None."""
    if block.ndim != 2:
        return None
    rows = sparse.csr_matrix(block).astype(np.float64)
    if log:
        rows.data = np.expm1(rows.data)
    totals = np.asarray(rows.sum(axis=1)).ravel()
    totals = totals[totals > 0]
    if len(totals) < 2 or np.ptp(totals) > 0.02 * totals.mean():
        return None
    return float(np.median(totals))
