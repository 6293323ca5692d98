"""Read the cells of an AnnData in the gene order of a model. Cells are read block by block to limit memory use."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import anndata as ad
import numpy as np
import pandas as pd
from anndata.abc import CSCDataset, CSRDataset
from scipy import sparse

from sct.data import counts
from sct.data.bag_order import WINDOW, BagOrder
from sct.data.coordinates import Scale
from sct.data.genes.vocabulary import GeneVocabulary
from sct.data.text.ranking import cell_keys
from sct.data.tokenize import noisy_genes
from sct.errors import DataError
from sct.progress import progress


@dataclasses.dataclass(frozen=True)
class Section:
    """Describe a group of cells that may share a bag: a batch, a slide, or all cells.

    Attributes
    ----------
    name
        Name of the group for messages; "" if there is only one group.
    rows
        Row numbers of the cells in the AnnData, in ascending order, int64 (n,).
    places
        Rescaled coordinates of the cells, float32 (n, 2), or None.
    scale
        Scale of the coordinates, or None.
    """

    name: str
    rows: np.ndarray
    places: np.ndarray | None = None
    scale: Scale | None = None


class CellCounts:
    """Read raw counts of the N cells of an AnnData, in the order of the G genes of a vocabulary.

    Parameters
    ----------
    adata
        Cells in memory or backed. The AnnData is not changed.
    vocabulary
        Gene vocabulary of the model.
    sections
        Groups of cells, such as slides, that never share a bag. Default: all cells are one group.
    layer
        Matrix with the raw counts: a layer, "X" or "raw.X". Default: the first of X, raw and layers["counts"] that has
        raw counts.
    gene_column
        Column of `var` with Ensembl ids or symbols. Default: the column that matches most genes.
    duplicates
        What to do if several columns hold the same gene: "error", or "sum" them.
    values
        "counts", or "activity" for other non-negative values; see `sct.data.counts.validate`.

    Attributes
    ----------
    counts_from, notes
        Name of the matrix in which the counts were found, and messages for the user.
    alignment
        Mapping from columns to genes, with a report.
    measured
        Mask of the measured genes, bool (G,). A gene is measured if the input has a column for this gene. If the input
        is a study of a store, a gene is measured if the original input file of the study had the gene.
    cell_totals
        Sum of each cell's counts over the genes of the vocabulary, (N,).
    gene_totals
        Sum of each gene's counts over the cells of each section (group of cells), (sections, G).

    Raises
    ------
    DataError
        There are no raw counts, too few genes match, or the matrix is on disk and stored by column (CSC).
    """

    def __init__(
        self,
        adata: ad.AnnData,
        vocabulary: GeneVocabulary,
        sections: Sequence[Section] | None = None,
        *,
        layer: str | None = None,
        gene_column: str | None = None,
        duplicates: Literal["error", "sum"] = "error",
        values: counts.Values = counts.COUNTS,
    ):
        found = counts.validate(adata, layer=layer, values=values)
        self.values = values
        self.counts_from, self.notes = found.source, found.messages
        self.matrix = found.matrix
        if isinstance(self.matrix, CSCDataset):
            raise DataError(
                f"{found.source} is stored on disk by column (CSC), so one cell cannot be read without all others: "
                f"load the data with adata.to_memory(), or save {found.source} in CSR format, which stores the values "
                "by row."
            )
        self.alignment = vocabulary.align(found.var, column=gene_column, duplicates=duplicates)
        self.vocabulary = vocabulary
        self.n_cells: int = found.matrix.shape[0]
        self.names = adata.obs_names
        self.on_disk = not sparse.issparse(self.matrix)
        self.sections = tuple(sections) if sections is not None else (Section("", np.arange(self.n_cells)),)
        self.measured = self._measured(found.var)
        self._window: tuple[Any, int, sparse.csr_matrix] | None = None
        self._zeroed: np.ndarray | None = None
        self.gene_totals = np.zeros((len(self.sections), len(vocabulary)))
        self.cell_totals = np.zeros(self.n_cells)
        self._count()

    @functools.cached_property
    def keys(self) -> np.ndarray:
        """Return a hash of each cell's name, uint64 (N,), which seeds random choices; see `ranking.cell_keys`."""
        return cell_keys(self.names)

    def _measured(self, var: pd.DataFrame) -> np.ndarray:
        columns = self.alignment.columns
        used = columns >= 0
        if "measured" in var and "total_counts" in var and var["measured"].dtype == bool:
            used &= var["measured"].to_numpy()  # a study of a store has a column for every gene
        present = np.zeros(len(self.vocabulary), bool)
        present[columns[used]] = True
        return present

    def _count(self) -> None:
        """Compute the total count of each cell and of each gene, block by block."""
        section = np.zeros(self.n_cells, np.int64)
        for number, each in enumerate(self.sections):
            section[each.rows] = number
        with progress("counting genes", self.n_cells, active=self.on_disk) as bar:
            for start in range(0, self.n_cells, WINDOW):
                rows = np.arange(start, min(start + WINDOW, self.n_cells))
                block = self.read(rows)
                self.cell_totals[rows] = np.asarray(block.sum(axis=1)).ravel()
                here, position = np.unique(section[rows], return_inverse=True)
                member = sparse.csr_matrix(
                    (np.ones(len(rows)), (position.ravel(), np.arange(len(rows)))), (len(here), len(rows))
                )
                self.gene_totals[here] += (member @ block).toarray()
                bar.update(len(rows))

    def read(self, rows: np.ndarray) -> sparse.csr_matrix:
        """Return the raw counts of the given rows, float32 CSR (len(rows), G).

        The rows can be in any order and can be repeated.
        """
        rows = np.asarray(rows, np.int64)
        if not len(rows):
            return sparse.csr_matrix((0, len(self.vocabulary)), dtype=np.float32)
        if not self.on_disk:
            block = self.matrix[rows]
        else:
            unique, inverse = np.unique(rows, return_inverse=True)
            block = self._from_disk(unique)
            block = (counts.exact_integers(block) if self.values == counts.COUNTS else block)[inverse.ravel()]
        projected = self.alignment.project(block).astype(np.float32)
        projected.sum_duplicates()
        if self._zeroed is not None:
            projected.data[self._zeroed[projected.indices]] = 0
        projected.eliminate_zeros()
        return projected

    def without(self, genes: np.ndarray) -> CellCounts:
        """Return a reader of the same cells that reads the counts of some genes as zero.

        The matrix is neither copied nor changed.

        Parameters
        ----------
        genes
            Mask of the genes of the vocabulary, bool (G,).
        """
        changed = copy.copy(self)
        changed._zeroed = genes if self._zeroed is None else genes | self._zeroed
        changed._window = None
        changed.gene_totals = np.where(genes, 0.0, self.gene_totals)
        changed.cell_totals = np.zeros(self.n_cells)
        for start in range(0, self.n_cells, WINDOW):
            rows = np.arange(start, min(start + WINDOW, self.n_cells))
            changed.cell_totals[rows] = np.asarray(changed.read(rows).sum(axis=1)).ravel()
        return changed

    def _from_disk(self, rows: np.ndarray) -> sparse.csr_matrix:
        """Read rows of a matrix on disk, as CSR. The row numbers must be in ascending order."""
        # One contiguous read is faster than reading single cells, unless most of it would be discarded.
        if isinstance(self.matrix, CSRDataset):
            first, last = int(rows[0]), int(rows[-1]) + 1
            if last - first <= 2 * len(rows):
                return sparse.csr_matrix(self.matrix[first:last])[rows - first]
            return sparse.csr_matrix(self.matrix[rows])
        step = max(1, counts.BLOCK_VALUES // self.matrix.shape[1])
        parts, start = [], 0
        while start < len(rows):
            stop = int(np.searchsorted(rows, rows[start] + step))
            first = int(rows[start])
            dense = np.asarray(self.matrix[first : int(rows[stop - 1]) + 1])
            parts.append(sparse.csr_matrix(dense[rows[start:stop] - first]))
            start = stop
        return sparse.vstack(parts, format="csr")

    def window(self, reader: Any, number: int, rows: np.ndarray) -> sparse.csr_matrix:
        """Return the raw counts of `rows`. The next call with the same reader and number returns the cached counts."""
        if self._window is None or self._window[0] is not reader or self._window[1] != number:
            self._window = None  # free the memory of the old window first
            self._window = (reader, number, self.read(rows))
        return self._window[2]


class CellStudy:
    """Provide the cells of one section bag by bag, with the interface that `sct.data.bags.BagSource` needs.

    Parameters
    ----------
    cells
        Counts of all cells.
    number
        Index of the section (batch or slide) in `cells.sections`.
    order
        Order of the cells, bag after bag.
    masked_cells, masked_genes
        Masks of cells, bool (N,), and genes, bool (G,). Counts of masked genes in masked cells are read as zero. If
        only `masked_cells` is given, all genes of these cells are masked. If only `masked_genes` is given, these genes
        are masked in all cells. If both are None, nothing is masked.
    name
        Name of the study. Default: the name of the section.
    """

    split = "test"

    def __init__(
        self,
        cells: CellCounts,
        number: int,
        order: BagOrder,
        masked_cells: np.ndarray | None = None,
        masked_genes: np.ndarray | None = None,
        name: str = "",
    ):
        self.cells, self.number, self.order = cells, number, order
        self.section = cells.sections[number]
        self.name = name or self.section.name
        self.n_cells, self.n_genes = len(order.rows), len(cells.vocabulary)
        self.spatial = self.section.places is not None
        self._hidden = (masked_cells, masked_genes)
        self._size = max(WINDOW // order.cells_per_bag, 1) * order.cells_per_bag

    @property
    def measured(self) -> np.ndarray:
        """Return a mask of the measured genes, bool (G,)."""
        return self.cells.measured

    def noisy_genes(self, fraction: float) -> np.ndarray:
        """Return a mask of the genes that are treated as unexpressed because they are noise, bool (G,).

        Masked counts are not used. See `sct.data.tokenize.noisy_genes`.
        """
        totals, n_cells = self.cells.gene_totals[self.number], len(self.section.rows)
        cells, genes = self._hidden
        if cells is not None:
            rows = self.section.rows[cells[self.section.rows]]
            everything = np.ones(len(totals), bool)
            for start in range(0, len(rows), WINDOW):
                part = np.asarray(self.cells.read(rows[start : start + WINDOW]).sum(axis=0)).ravel()
                totals = totals - np.where(everything if genes is None else genes, part, 0)
            n_cells -= len(rows) if genes is None else 0
        return noisy_genes(totals, n_cells, fraction)

    def rescaled_coordinates(self) -> np.ndarray:
        """Return the rescaled coordinates (len(order), 2) of the cells, bag by bag."""
        if self.section.places is None:
            raise DataError(
                f"the cells of {self.name!r} have no coordinates: set spatial_key to the key of the coordinates in "
                "obsm, or use a model that needs no coordinates."
            )
        return self.section.places[np.searchsorted(self.section.rows, self.order.rows)]

    def read_rows(self, rows: np.ndarray) -> sparse.csr_matrix:
        """Return the raw counts, (len(rows), G), of the cells at the positions `rows` of the bag order.

        The counts of nearby cells are cached.
        """
        rows = np.asarray(rows, np.int64)
        number = int(rows[0]) // self._size
        if int(rows[-1]) // self._size != number:
            block = self.cells.read(self.order.rows[rows])
        else:
            start = number * self._size
            window = self.order.rows[start : start + self._size]
            block = self.cells.window(self, number, window)[rows - start]
        return self._without_hidden(block, self.order.rows[rows])

    def read(self, start: int, stop: int) -> sparse.csr_matrix:
        """Return the raw counts of the cells at the positions `start` to `stop` - 1 of the bag order."""
        return self.read_rows(np.arange(start, stop))

    def _without_hidden(self, block: sparse.csr_matrix, rows: np.ndarray) -> sparse.csr_matrix:
        cells, genes = self._hidden
        if cells is None and genes is None:
            return block
        masked = np.ones(block.nnz, bool)
        if cells is not None:
            masked &= np.repeat(cells[rows], np.diff(block.indptr))
        if genes is not None:
            masked &= genes[block.indices]
        block.data[masked] = 0
        block.eliminate_zeros()
        return block
