"""Define the common result of all readers: tables of cells and genes, and blocks of counts in bounded memory."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from sct.errors import DataError, SctError

RowBlock = tuple[np.ndarray, sp.csr_matrix]
UNREADABLE = (OSError, EOFError, zlib.error, KeyError, IndexError, ValueError, TypeError, RuntimeError)
_SAMPLE = 100_000


@dataclass(frozen=True)
class Matrix:
    """Hold the arrays of a count matrix on disk or in memory. The arrays can be sliced.

    Attributes
    ----------
    layout
        "csr", "csc" or "dense".
    shape
        (N, n_var).
    data
        Stored values of a sparse matrix, or the whole dense matrix.
    indices, indptr
        Index arrays of a sparse matrix.
    """

    layout: str
    shape: tuple[int, int]
    data: Any
    indices: Any = None
    indptr: Any = None

    @property
    def n_values(self) -> int:
        """Return the number of stored values, which is an upper bound on the number of non-zero values."""
        return int(np.prod(self.data.shape))

    def sample(self) -> np.ndarray:
        """Return stored values from the beginning, the middle and the end of the matrix, for a quick check."""
        if self.layout == "dense":
            n, step = self.shape[0], max(1, _SAMPLE // max(1, self.shape[1]))
            starts = sorted({0, max(0, n // 2), max(0, n - step)})
            return np.concatenate([np.asarray(self.data[each : each + step]).ravel() for each in starts])
        n = self.n_values
        starts = sorted({0, n // 2, max(0, n - _SAMPLE)})
        return np.concatenate([np.asarray(self.data[each : each + _SAMPLE]) for each in starts])

    def blocks(self, entries: int) -> Iterator[RowBlock]:
        """Yield blocks of about `entries` stored values.

        Each row is in exactly one block, except with the layout "csc", where a row can be in several blocks.
        """
        n_rows, n_columns = self.shape
        if self.layout == "dense":
            step = max(1, entries // max(1, n_columns))
            for start in range(0, n_rows, step):
                block = np.asarray(self.data[start : start + step])
                yield np.arange(start, start + len(block)), sp.csr_matrix(block)
            return
        indptr = np.asarray(self.indptr[:]).astype(np.int64)
        n_major = n_rows if self.layout == "csr" else n_columns
        n_minor = n_columns if self.layout == "csr" else n_rows
        ends_well = len(indptr) == n_major + 1 and indptr[0] == 0 and indptr[-1] == self.n_values
        if not ends_well or (np.diff(indptr) < 0).any() or self.indices.shape != self.data.shape:
            raise ValueError(f"its {self.layout} arrays are inconsistent")
        start = 0
        while start < n_major:
            stop = int(np.searchsorted(indptr, indptr[start] + entries, side="right")) - 1
            stop = min(max(stop, start + 1), n_major)
            low, high = int(indptr[start]), int(indptr[stop])
            indices = np.asarray(self.indices[low:high])
            if indices.size and (indices.min() < 0 or indices.max() >= n_minor):
                raise ValueError(f"its {self.layout} indices are outside of the shape {self.shape}")
            part = (np.asarray(self.data[low:high]), indices, indptr[start : stop + 1] - low)
            if self.layout == "csr":
                yield np.arange(start, stop), sp.csr_matrix(part, shape=(stop - start, n_columns))
            else:
                block = sp.csc_matrix(part, shape=(n_rows, stop - start)).tocsr()
                rows = np.flatnonzero(np.diff(block.indptr))
                lengths = np.diff(block.indptr)[rows]
                whole = (block.data, block.indices + start, np.concatenate([[0], np.cumsum(lengths)]))
                yield rows, sp.csr_matrix(whole, shape=(len(rows), n_columns))
            start = stop


@dataclass(frozen=True)
class OpenInput:
    """Provide an input that is open for reading: tables of cells and genes, and blocks of counts.

    Attributes
    ----------
    label
        Path or description, for messages.
    obs, var
        Tables of cells (N rows) and genes (n_var rows).
    spatial
        Coordinates in the units of the input, float64 (N, 2), or None.
    taken
        Location of the counts: "X", "raw.X", 'layers["counts"]', ...
    n_values
        Upper bound on the number of non-zero counts.
    whole_rows
        Whether each row is in exactly one block.
    blocks
        Function that takes the number of values per block and yields the blocks.
    """

    label: str
    obs: pd.DataFrame
    var: pd.DataFrame
    spatial: np.ndarray | None
    taken: str
    n_values: int
    whole_rows: bool
    blocks: Callable[[int], Iterator[RowBlock]]


@contextmanager
def reading(label: str) -> Iterator[None]:
    """Convert any error while reading a damaged file to a `DataError` that names the file."""
    try:
        yield
    except SctError:
        raise
    except UNREADABLE as error:
        if isinstance(error, KeyError):
            cause = f"{error} is missing"
        else:
            cause = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise DataError(
            f"{label} cannot be read ({cause}): check that the file is complete and that its format matches its suffix."
        ) from error


def guarded(label: str, blocks: Callable[[int], Iterator[RowBlock]]) -> Callable[[int], Iterator[RowBlock]]:
    """Wrap a function that yields blocks, so that its errors name the input."""

    def run(entries: int) -> Iterator[RowBlock]:
        with reading(label):
            yield from blocks(entries)

    return run
