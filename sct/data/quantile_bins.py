"""Quantile bins of a cell's expression, and records of binned cells (ZerOmics, appendix A.3).

Zero is bin 0; non-zero values have bins 1 to N by their quantile among the non-zero values of their cell. Quantiles do
not change when all values of a cell are multiplied by one number, so the bins of raw counts are those of counts that
were normalised to a library size of 10,000.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import sparse

from sct.data.bags import BagOptions, BagSource
from sct.data.store import Study
from sct.data.text.ranking import canonical, rank
from sct.errors import ConfigError

ABSENT = -1  # gene number at a place that a cell does not fill


def quantile_bins(counts: sparse.csr_matrix, num_bins: int = 10) -> sparse.csr_matrix:
    """Bins 1 .. `num_bins` of the non-zero values of each cell.

    A value is in bin 1 + floor(num_bins x share), where the share is that of the cell's non-zero values that are
    smaller: equal values have one bin, and what lies in the lowest 5% of a cell is in bin 1, in the lowest 18% in bin 2
    (the paper's examples, with 10 bins).

    Parameters
    ----------
    counts
        Raw or linearly scaled counts (N, G), CSR.

    Returns
    -------
    uint8 CSR (N, G), with the columns of each row ascending.

    Raises
    ------
    DataError
        Counts are negative or not finite.
    """
    counts = canonical(counts)
    lengths = np.diff(counts.indptr)
    starts = np.repeat(counts.indptr[:-1], lengths)
    rows = np.repeat(np.arange(counts.shape[0]), lengths)
    order = np.lexsort((counts.data, rows))
    values = counts.data[order]
    # Smaller values of a cell: the place at which the run of values equal to this one begins.
    begins = (np.diff(values, prepend=-1) != 0) | (np.diff(rows, prepend=-1) != 0)
    place = np.arange(len(values))
    smaller = np.maximum.accumulate(np.where(begins, place, 0)) - starts
    bins = np.empty(len(values), np.uint8)
    bins[order] = 1 + num_bins * smaller // np.repeat(lengths, lengths)
    result = sparse.csr_matrix((bins, counts.indices.copy(), counts.indptr.copy()), counts.shape)
    result.sort_indices()
    return result


def known_genes(number: int, dropped: Sequence[int]) -> np.ndarray:
    """Which of so many genes a model knows, bool (G,), of the numbers of those that it does not."""
    known = np.ones(number, bool)
    known[list(dropped)] = False
    return known


@dataclasses.dataclass(frozen=True)
class CellOptions:
    """How cells become records.

    Parameters
    ----------
    num_bins
        Bins of non-zero values (10 in the paper); zero is another one.
    max_genes
        0: all genes of the vocabulary, in its order. Otherwise the expressed genes of a cell alone, the so many highest
        where there are more (of equal ones a random choice that depends on the cell and the gene alone).
    """

    num_bins: int = 10
    max_genes: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.num_bins <= 253 or self.max_genes < 0:  # bins are bytes, zero and mask included
            raise ConfigError(
                f"num_bins is {self.num_bins} and max_genes {self.max_genes}, but 1 to 253, and 0 or more, are needed."
            )


def binned_cells(
    counts: sparse.csr_matrix, options: CellOptions, known: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Records of cells.

    Parameters
    ----------
    counts
        Raw counts (N, G), CSR.
    options
        See `CellOptions`.
    known
        bool (G,): genes of the corpus; the others are left out before quantiles are taken.

    Returns
    -------
    `bins` uint8 (N, S). With `max_genes` S is that number, and `genes` int32 (N, S) are the numbers of the genes,
    ascending, `ABSENT` behind the last; otherwise S = G.
    """
    counts = canonical(counts)
    if known is not None and not known.all():
        kept = np.concatenate([[0], np.cumsum(known[counts.indices])])
        keep = known[counts.indices]
        counts = sparse.csr_matrix(
            (counts.data[keep], counts.indices[keep], kept[counts.indptr]), counts.shape
        )
    bins = quantile_bins(counts, options.num_bins)
    if not options.max_genes:
        return {"bins": bins.toarray()}
    n_cells, most = len(bins.indptr) - 1, options.max_genes
    if np.diff(bins.indptr).max(initial=0) > most:
        ranked = rank(counts, top_k=most)
        chosen = sparse.csr_matrix(
            (np.ones(len(ranked.genes), np.uint8), ranked.genes, ranked.indptr), counts.shape
        )
        bins = bins.multiply(chosen).tocsr().astype(np.uint8)
        bins.sort_indices()
    lengths = np.diff(bins.indptr)
    place = np.arange(most) < lengths[:, None]
    levels, genes = np.zeros((n_cells, most), np.uint8), np.full((n_cells, most), ABSENT, np.int32)
    levels[place], genes[place] = bins.data, bins.indices
    return {"bins": levels, "genes": genes}


class CellSource:
    """Single cells of studies as records; see `sct.data.loader.Source`.

    A record has `bins` and, with `options.max_genes`, `genes` of a cell (`binned_cells`), and its `row` int32 ().

    Parameters
    ----------
    studies
        Studies of one store.
    options
        See `CellOptions`.
    known
        Genes of the corpus, bool (G,).
    exhaustive
        In file order rather than in random order.
    """

    def __init__(
        self,
        studies: Sequence[Study],
        options: CellOptions,
        known: np.ndarray | None = None,
        exhaustive: bool = False,
        seed: int = 0,
    ):
        self.options, self.known = options, known
        self.cells = BagSource(
            studies, BagOptions(cells_per_bag=1, spatial_bags=False, seed=seed), exhaustive
        )

    def __len__(self) -> int:
        return len(self.cells)

    def describe(self, number: int, epoch: int = 0) -> str:
        """Name a cell for a person: study and row."""
        study, rows = self.cells.rows(number, epoch)
        return f"study {study.name!r}, row {rows[0]}"

    def bag(self, number: int, epoch: int = 0) -> dict[str, np.ndarray]:
        """Read and bin one cell."""
        study, rows = self.cells.rows(number, epoch)
        record = binned_cells(study.read_rows(rows), self.options, self.known)
        return {**{name: value[0] for name, value in record.items()}, "row": np.asarray(rows[0], np.int32)}
