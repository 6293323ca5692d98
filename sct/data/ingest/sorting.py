"""Decide the order of the cells in a stored study, and sort the counts into this order with bounded memory.

The position ("place") of every cell in the store is known before the counts of the cell are read. The place comes from
a seeded permutation, or from the rank of the cell along a space-filling curve. Blocks of input rows are split by ranges
of places (buckets). Buckets are kept in memory as long as they fit, and are otherwise spilled to files. Then each
bucket is sorted separately.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from sct.errors import StoreError

_HEADER = np.dtype([("rows", "<i8"), ("values", "<i8"), ("small", "<i8")])
_SMALL, _LARGE = np.dtype("<u2"), np.dtype("<f4")


@dataclass(frozen=True)
class Sizes:
    """Set the memory limits of an ingest. They do not change the result.

    Attributes
    ----------
    block
        Number of values to read at a time.
    bucket
        Number of values to sort at a time.
    held
        Maximum number of values to keep in memory; further values are written to temporary files.
    """

    block: int = 1_000_000
    bucket: int = 4_000_000
    held: int = 64_000_000


def hilbert_rank(points: np.ndarray, bits: int = 16) -> np.ndarray:
    """Rank points along a Hilbert curve through their bounding square.

    Parameters
    ----------
    points
        Finite coordinates (N, 2).
    bits
        The curve visits the squares of a 2^bits x 2^bits grid. Points in the same square keep their order.

    Returns
    -------
    Ranks, int64 (N,): a permutation of 0..N-1.
    """
    points = np.asarray(points, dtype=np.float64)
    low = points.min(axis=0)
    span = float((points.max(axis=0) - low).max())
    cells = ((points - low) / (span or 1.0) * ((1 << bits) - 1)).astype(np.int64)
    x, y = cells[:, 0], cells[:, 1]
    distance = np.zeros(len(points), np.int64)
    for bit in reversed(range(bits)):
        right, up = (x >> bit) & 1, (y >> bit) & 1
        distance += ((3 * right) ^ up) << (2 * bit)
        # Rotate the quadrant, so that its part of the curve starts where the previous quadrant's part ends.
        mirror = (up == 0) & (right == 1)
        mask = (1 << bit) - 1
        x, y = np.where(mirror, mask - (x & mask), x & mask), np.where(mirror, mask - (y & mask), y & mask)
        x, y = np.where(up == 0, y, x), np.where(up == 0, x, y)
    rank = np.empty(len(points), np.int64)
    rank[np.argsort(distance, kind="stable")] = np.arange(len(points))
    return rank


def random_rank(n: int, name: str, seed: int) -> np.ndarray:
    """Return a seeded permutation of the `n` cells of the study `name`, int64 (n,)."""
    salt = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return np.random.default_rng([seed, salt]).permutation(n)


class BucketSort:
    """Sort CSR rows by their position in the store (their "place"). Rows that do not fit into memory are kept in files.

    Parameters
    ----------
    folder
        Folder for temporary files. It is created when needed and removed by `close`.
    edges
        First place of each bucket, followed by the end of the last bucket, (buckets + 1,).
    n_genes
        Number of columns (G).
    held
        Maximum number of values to keep in memory; further values are written to files.
    """

    def __init__(self, folder: Path, edges: np.ndarray, n_genes: int, held: int):
        self.folder, self.edges, self.n_genes, self.held = folder, edges, n_genes, held
        self._index_type = np.dtype("<u2" if n_genes <= 1 << 16 else "<i4")
        self._pieces: list[list[tuple[np.ndarray, ...]]] = [[] for _ in edges[1:]]
        self._n_held, self._spilled = 0, False

    def add(self, places: np.ndarray, counts: sp.csr_matrix) -> None:
        """Add the counts of n cells to the sort.

        Parameters
        ----------
        places
            Places of the rows, (n,).
        counts
            Positive values (n, G): whole numbers below 2^24, or fractions.
        """
        order = np.argsort(places, kind="stable")
        places = places[order]
        counts = counts[order]
        indices = counts.indices.astype(self._index_type)
        small = not counts.nnz or counts.data.max() <= np.iinfo(_SMALL).max
        data = counts.data.astype(_SMALL if small else _LARGE)
        if small and not np.array_equal(data, counts.data):  # activities may be fractions
            data = counts.data.astype(_LARGE)
        lengths = np.diff(counts.indptr).astype("<i4")
        cuts = np.searchsorted(places, self.edges)
        for bucket in np.flatnonzero(np.diff(cuts)):
            low, high = cuts[bucket], cuts[bucket + 1]
            values = slice(counts.indptr[low], counts.indptr[high])
            piece = (places[low:high].astype("<i8"), lengths[low:high], indices[values], data[values])
            self._pieces[bucket].append(piece)
        self._n_held += counts.nnz
        if self._n_held > self.held:
            self._spill()

    def _spill(self) -> None:
        if not self._spilled:  # fails if the folder exists, so that existing files are never overwritten
            self.folder.mkdir(parents=True)
            self._spilled = True
        for bucket, pieces in enumerate(self._pieces):
            if pieces:
                with (self.folder / str(bucket)).open("ab") as file:
                    for piece in pieces:
                        header = np.array((len(piece[0]), len(piece[2]), piece[3].dtype == _SMALL), _HEADER)
                        file.write(header.tobytes())
                        for array in piece:
                            file.write(np.ascontiguousarray(array).data)
                pieces.clear()
        self._n_held = 0

    def _load_pieces(self, bucket: int) -> list[tuple[np.ndarray, ...]]:
        pieces = []
        file = self.folder / str(bucket)
        if file.is_file():
            with file.open("rb") as handle:
                while len(header := np.fromfile(handle, _HEADER, 1)):
                    rows, values = int(header["rows"][0]), int(header["values"][0])
                    kind = _SMALL if header["small"][0] else _LARGE
                    types = (("<i8", rows), ("<i4", rows), (self._index_type, values), (kind, values))
                    piece = tuple(np.fromfile(handle, each, n) for each, n in types)
                    if any(len(array) != n for array, (_, n) in zip(piece, types, strict=True)):
                        raise StoreError(
                            f"the temporary file {file} is truncated: check the disk, then run the ingest again to "
                            "resume."
                        )
                    pieces.append(piece)
        return pieces + self._pieces[bucket]

    def load(self, bucket: int) -> tuple[sp.csr_matrix, bool]:
        """Return two values: the sorted rows of a bucket, as CSR (places, G), and whether repeated entries were summed.

        Values are uint16 if all of them fit, otherwise float32.
        """
        low, high = int(self.edges[bucket]), int(self.edges[bucket + 1])
        pieces = self._load_pieces(bucket)
        if not pieces:
            return sp.csr_matrix((high - low, self.n_genes), dtype=np.float32), False
        places, lengths, indices, data = (np.concatenate(each) for each in zip(*pieces, strict=True))
        rows = places - low
        del pieces, places
        counts = sp.csr_matrix(
            (data, indices.astype(np.int32), np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])),
            shape=(len(rows), self.n_genes),
        )
        order = np.argsort(rows, kind="stable")
        rows, counts = rows[order], counts[order]
        # The parts of a row (from an input that is read by columns) are now adjacent. A new indptr joins them.
        lengths = np.bincount(rows, weights=np.diff(counts.indptr), minlength=high - low).astype(np.int64)
        indptr = np.concatenate([[0], np.cumsum(lengths)])
        counts = sp.csr_matrix((counts.data, counts.indices, indptr), shape=(high - low, self.n_genes))
        if counts.has_canonical_format:
            return counts, False
        before = counts.nnz
        counts = counts.astype(_LARGE)
        counts.sum_duplicates()
        return counts, counts.nnz < before

    def close(self) -> None:
        """Free the memory and delete the temporary files."""
        self._pieces = []
        if self._spilled:
            shutil.rmtree(self.folder, ignore_errors=True)


def cut_places(sizes_of_studies: list[int], n_values: int, bucket: int) -> tuple[np.ndarray, list[range]]:
    """Split the cells of consecutive studies into buckets, which are sorted one by one.

    A bucket never spans two studies.

    Parameters
    ----------
    sizes_of_studies
        Number of cells of each study.
    n_values
        Total number of values in all studies.
    bucket
        Approximate number of values per bucket.

    Returns
    -------
    Two values: the first place of each bucket, followed by the end of the last bucket, (buckets + 1,); and the range of
    the buckets of each study.
    """
    n_cells = sum(sizes_of_studies)
    per_bucket = max(1, int(n_cells * bucket / max(n_values, 1)))
    edges: list[int] = [0]
    buckets: list[range] = []
    for size in sizes_of_studies:
        first, start = len(edges) - 1, edges[-1]
        edges += [start + min(each, size) for each in range(per_bucket, size + per_bucket, per_bucket)]
        buckets.append(range(first, len(edges) - 1))
    return np.asarray(edges, np.int64), buckets
