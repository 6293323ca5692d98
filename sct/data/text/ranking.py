"""Rank the genes of each cell by expression, with ties in a seeded random order.

The order depends only on the seed, the key of the cell, the counts of the cell and the genes. It does not depend on
other cells or on the order of cells and genes in the table.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse

from sct.checks import check_at_least
from sct.errors import DataError

# Each entry of a cell is packed into one sortable uint64: the count (larger positive float32 values have larger bit
# patterns), then random bits, then the gene, which decides the few ties that remain.
_GENE_BITS = 17
_TIE_BITS = 32 - _GENE_BITS
_BLOCK = 1 << 20  # entries at a time, so that their keys fit into the CPU cache


class Ranked(NamedTuple):
    """List the expressed genes of N cells, in descending order of expression within each cell.

    Attributes
    ----------
    indptr
        int64 (N + 1,): in `genes` and `counts`, the entries of cell i have the indices indptr[i] to indptr[i + 1] - 1.
    genes
        int32: columns of the genes.
    counts
        float32: raw counts of these genes.
    """

    indptr: np.ndarray
    genes: np.ndarray
    counts: np.ndarray


def canonical(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    """Return counts as float32 CSR with one positive entry per expressed gene. The argument is not changed.

    Raises
    ------
    DataError
        The counts are not CSR, negative or not finite.
    """
    if not sparse.issparse(counts) or counts.format != "csr":
        raise DataError(
            f"the counts are a {type(counts).__name__}, but must be a SciPy CSR matrix: convert them with "
            "scipy.sparse.csr_matrix."
        )
    if not counts.has_canonical_format:
        counts = counts.copy()
        counts.sum_duplicates()
    if counts.nnz and not (counts.data.min() >= 0 and np.isfinite(counts.data.max())):
        raise DataError(
            "the counts have negative values, NaN or infinity, but ranking needs raw counts: give raw counts."
        )
    counts = counts.astype(np.float32, copy=False)
    if counts.nnz and counts.data.min() == 0:
        counts = counts.copy()
        counts.eliminate_zeros()
    return counts


def cell_keys(index: Iterable[str]) -> np.ndarray:
    """Return a key for each cell, uint64 (N,), computed from the cell's name.

    Keys are the same in all processes and on all machines.

    Raises
    ------
    DataError
        A name is not a string.
    """
    return hash_names(list(index), "the name of cell")


def rank(
    counts: sparse.csr_matrix,
    *,
    top_k: int | None = None,
    seed: int = 0,
    keys: np.ndarray | None = None,
    gene_keys: np.ndarray | None = None,
) -> Ranked:
    """Sort the expressed genes of each cell by descending expression, with ties in a seeded random order.

    The ranking uses raw counts, not normalized counts. Raw and normalized counts give the same ranks, but rounding
    errors of normalized counts can break ties.

    Parameters
    ----------
    counts
        Raw counts (N, G).
    top_k
        Number of genes to keep per cell. Default: all expressed genes.
    seed
        Seed of the order of ties, at least 0.
    keys
        Keys of the cells, uint64 (N,); see `cell_keys`. Default: computed from the counts of each cell.
    gene_keys
        Unique keys of the genes, uint64 (G,). Default: computed from the column numbers.

    Returns
    -------
    The ranked genes and their counts.

    Raises
    ------
    DataError
        Counts are negative or not finite, there are more than 131,072 genes, or the keys have a wrong dtype or shape.
    """
    counts = canonical(counts)
    n_cells, n_genes = counts.shape
    if n_genes > 1 << _GENE_BITS:
        raise DataError(
            f"the cells have {n_genes:,} genes, but at most {1 << _GENE_BITS:,} can be ranked: select fewer genes "
            "first."
        )
    if top_k is not None:
        check_at_least("top_k", top_k, 1, error=DataError, advice="give a number of genes, or None for all")
    if gene_keys is None:
        gene_keys = mix(np.arange(1, n_genes + 1, dtype=np.uint64))
    gene_keys = _checked_keys(gene_keys, n_genes, "gene")
    keys = _content_keys(counts, gene_keys) if keys is None else _checked_keys(keys, n_cells, "cell")
    keys = mix(keys ^ _seed_key(seed))
    by_key = np.argsort(gene_keys, kind="stable").astype(np.int32)
    place = np.empty(n_genes, np.uint64)
    place[by_key] = np.arange(n_genes, dtype=np.uint64)

    indptr = counts.indptr.astype(np.int64)
    lengths = np.diff(indptr)
    kept = lengths if top_k is None else np.minimum(lengths, top_k)
    ends = np.concatenate([[0], np.cumsum(kept)])
    result = Ranked(ends, np.empty(ends[-1], np.int32), np.empty(ends[-1], np.float32))
    start = 0
    while start < n_cells:
        stop = max(int(np.searchsorted(indptr, indptr[start] + _BLOCK, side="right")) - 1, start + 1)
        a, b = indptr[start], indptr[stop]
        columns = counts.indices[a:b]
        entry = gene_keys[columns] ^ np.repeat(keys[start:stop], lengths[start:stop])
        entry = mix(entry) >> np.uint64(64 - _TIE_BITS) << np.uint64(_GENE_BITS)
        entry |= place[columns]
        entry |= (~counts.data[a:b].view(np.uint32)).astype(np.uint64) << np.uint64(32)
        sort_rows(entry, indptr[start : stop + 1] - a, top_k)
        if top_k is not None:
            offset = np.arange(b - a) - np.repeat(indptr[start:stop] - a, lengths[start:stop])
            entry = entry[offset < top_k]
        part = slice(ends[start], ends[stop])
        result.genes[part] = by_key[entry & np.uint64((1 << _GENE_BITS) - 1)]
        result.counts[part] = (~(entry >> np.uint64(32)).astype(np.uint32)).view(np.float32)
        start = stop
    return result


def choose(counts: sparse.csr_matrix, n: int, *, seed: int, keys: np.ndarray | None) -> np.ndarray:
    """Choose `n` cells by their keys, and return their row numbers in ascending order.

    `counts` must come from `canonical`.
    """
    if keys is None:
        keys = content_keys(counts)
    keys = _checked_keys(keys, counts.shape[0], "cell")
    return np.sort(np.argsort(mix(keys ^ _seed_key(seed)), kind="stable")[:n])


def sort_rows(entry: np.ndarray, indptr: np.ndarray, top_k: int | None = None) -> None:
    """Sort each row in place. With `top_k`, only the first `top_k` places of a row are sorted.

    This loop takes half the time of sorting one padded matrix, because it does not copy the rows.
    """
    for a, b in itertools.pairwise(indptr.tolist()):
        if top_k is not None and top_k < b - a:
            entry[a:b].partition(top_k - 1)
            entry[a : a + top_k].sort()
        else:
            entry[a:b].sort()


def content_keys(counts: sparse.csr_matrix) -> np.ndarray:
    """Return a key for each cell, uint64 (N,), computed from its counts. `counts` must come from `canonical`."""
    return _content_keys(counts, mix(np.arange(1, counts.shape[1] + 1, dtype=np.uint64)))


def _content_keys(counts: sparse.csr_matrix, gene_keys: np.ndarray) -> np.ndarray:
    """Return a key for each cell, uint64 (N,), computed from its counts and the keys of its genes."""
    filled = np.flatnonzero(np.diff(counts.indptr))
    keys = np.zeros(counts.shape[0], np.uint64)
    if filled.size:
        terms = gene_keys[counts.indices] * counts.data.view(np.uint32)
        keys[filled] = np.add.reduceat(terms, counts.indptr[filled])
    return mix(keys)


def mix(values: np.ndarray) -> np.ndarray:
    """Scramble uint64 values over all 64 bits with an invertible hash."""
    values = values * np.uint64(0x9E3779B97F4A7C15)
    values ^= values >> np.uint64(32)
    values *= np.uint64(0xD6E8FEB86659FD93)
    values ^= values >> np.uint64(32)
    return values


def _seed_key(seed: int) -> np.ndarray:
    check_at_least("seed", seed, 0, most=(1 << 64) - 1, error=DataError)
    return mix(np.array([seed], np.uint64))


def hash_names(names: list[str], what: str) -> np.ndarray:
    """Hash strings to uint64. Hashes are the same in all processes.

    `what` describes the strings in the error message.
    """
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong:
        raise DataError(f"{what} {wrong[0]!r} is not a string: give all names as strings.")
    values = np.empty(len(names), object)
    values[:] = names
    return pd.util.hash_array(values, categorize=False)


def _checked_keys(keys: np.ndarray, n: int, what: str) -> np.ndarray:
    keys = np.asarray(keys)
    if keys.dtype != np.uint64 or keys.shape != (n,):
        raise DataError(
            f"the {what} keys have the type {keys.dtype} and the shape {keys.shape}, but must have the type uint64 "
            f"and the shape ({n},): give one key per {what}."
        )
    return keys
