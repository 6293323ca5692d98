"""The cells of an AnnData over a model's genes, read in blocks, so that a file need not fit into memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import anndata as ad
import numpy as np
from anndata.abc import CSCDataset
from scipy import sparse

from sct.data import counts
from sct.data.bag_order import WINDOW, BagOrder
from sct.data.genes import GeneVocabulary
from sct.data.tokenize import noisy_genes
from sct.errors import DataError
from sct.progress import progress


class Cells:
    """Raw counts of an AnnData (N cells) in the order of a vocabulary's genes (G).

    Parameters
    ----------
    adata
        In memory or backed. Nothing in it is changed.
    vocabulary
        Genes of the model.
    layer
        Where the raw counts are; by default the first of X, raw and layers["counts"] that holds them.
    gene_column
        Column of `var` with Ensembl ids or symbols; by default it is found.
    duplicates
        "error", or "sum" several columns of one gene.

    Attributes
    ----------
    counts_from, notes
        Place of the counts, and sentences for a person.
    alignment
        Report about the genes.
    gene_totals, cell_totals
        Sums of counts over cells (G,), and over the vocabulary's genes (N,).

    Raises
    ------
    DataError
        No raw counts, unknown genes, a matrix on disk that is stored by column.
    """

    def __init__(
        self,
        adata: ad.AnnData,
        vocabulary: GeneVocabulary,
        *,
        layer: str | None = None,
        gene_column: str | None = None,
        duplicates: Literal["error", "sum"] = "error",
    ):
        found = counts.validate(adata, layer=layer)
        self.counts_from, self.notes = found.source, found.messages
        self._matrix = found.matrix
        if isinstance(self._matrix, CSCDataset):
            raise DataError(
                f"{found.source} is stored by column on disk, where single cells cannot be read: load the file "
                "without backed, or write it with adata.X as CSR"
            )
        self.alignment = vocabulary.align(found.var, column=gene_column, duplicates=duplicates)
        self.vocabulary = vocabulary
        self.n_cells: int = found.matrix.shape[0]
        self.on_disk = not sparse.issparse(self._matrix)
        self.gene_totals = np.zeros(len(vocabulary))
        self.cell_totals = np.zeros(self.n_cells)
        with progress("counting genes", self.n_cells, active=self.on_disk) as bar:
            for start, block in self._blocks():
                self.gene_totals += np.asarray(block.sum(axis=0)).ravel()
                self.cell_totals[start : start + block.shape[0]] = np.asarray(block.sum(axis=1)).ravel()
                bar.update(block.shape[0])

    @property
    def matrix(self) -> Any:
        """The counts as they are given, (N, n_var), in the order of the input's genes."""
        return self._matrix

    @property
    def measured(self) -> np.ndarray:
        """Whether a gene of the vocabulary has a column, (G,) bool."""
        present = np.zeros(len(self.vocabulary), bool)
        present[self.alignment.columns[self.alignment.columns >= 0]] = True
        return present

    def _blocks(self) -> Iterator[tuple[int, sparse.csr_matrix]]:
        for start in range(0, self.n_cells, WINDOW):
            yield start, self.read(np.arange(start, min(start + WINDOW, self.n_cells)))

    def read(self, rows: np.ndarray) -> sparse.csr_matrix:
        """Raw counts of rows (any order, repeats allowed), float32 CSR (len(rows), G)."""
        rows = np.asarray(rows, np.int64)
        if not len(rows):
            return sparse.csr_matrix((0, len(self.vocabulary)), dtype=np.float32)
        if not self.on_disk:
            block = self._matrix[rows]
        else:
            unique, inverse = np.unique(rows, return_inverse=True)
            first, last = int(unique[0]), int(unique[-1]) + 1
            # A file is read faster in one piece than cell by cell, unless most of it would be thrown away.
            if last - first <= 4 * len(unique):
                block = self._matrix[first:last][unique - first]
            else:
                block = self._matrix[unique]
            block = counts.exact_integers(sparse.csr_matrix(block))[inverse.ravel()]
        projected = self.alignment.project(block).astype(np.float32)
        projected.sum_duplicates()
        projected.eliminate_zeros()
        return projected


class CellStudy:
    """Some cells in the order of their bags, with what `sct.data.bags.BagSource` wants to know of a study.

    Parameters
    ----------
    cells
        The table they are from.
    order
        Rows of the table, bag after bag.
    coordinates
        Rescaled positions (N, 2) of the table's cells, or None.
    name
        For messages.
    hidden_cells, hidden_genes
        Cells of the table (N,) bool and genes (G,) bool whose counts are not to be shown: where both hold (one
        that is None holds everywhere) nothing is read.
    """

    split = "test"

    def __init__(
        self,
        cells: Cells,
        order: BagOrder,
        coordinates: np.ndarray | None = None,
        name: str = "",
        hidden_cells: np.ndarray | None = None,
        hidden_genes: np.ndarray | None = None,
    ):
        self.cells, self.order, self.name = cells, order, name
        self.n_cells, self.n_genes = len(order.rows), len(cells.vocabulary)
        self.spatial = coordinates is not None
        self._hidden = (hidden_cells, hidden_genes)
        self._places = coordinates
        self._window: tuple[int, sparse.csr_matrix] | None = None
        self._size = max(WINDOW // order.cells_per_bag, 1) * order.cells_per_bag

    @property
    def measured(self) -> np.ndarray:
        """Whether a gene has a column, (G,) bool."""
        return self.cells.measured

    def noisy_genes(self, fraction: float) -> np.ndarray:
        """Genes (G,) whose counts in the whole table, as far as they are shown, are noise.

        See `sct.data.tokenize.noisy_genes`.
        """
        totals, n_cells = self.cells.gene_totals, self.cells.n_cells
        hidden_cells, hidden_genes = self._hidden
        if hidden_cells is not None:
            everything = np.ones(len(totals), bool)
            rows = np.flatnonzero(hidden_cells)
            for start in range(0, len(rows), WINDOW):
                part = np.asarray(self.cells.read(rows[start : start + WINDOW]).sum(axis=0)).ravel()
                totals = totals - np.where(everything if hidden_genes is None else hidden_genes, part, 0)
            n_cells -= len(rows) if hidden_genes is None else 0
        return noisy_genes(totals, n_cells, fraction)

    def rescaled_coordinates(self) -> np.ndarray:
        """Positions (len(order), 2) in the units of models."""
        if self._places is None:
            raise DataError(f"the cells {self.name} have no positions")
        return self._places[self.order.rows]

    def read_rows(self, rows: np.ndarray) -> sparse.csr_matrix:
        """Raw counts (len(rows), G) of places in the order; the window around them is kept for the next."""
        rows = np.asarray(rows, np.int64)
        number = int(rows[0]) // self._size
        if int(rows[-1]) // self._size != number:
            return self._read(self.order.rows[rows])
        if self._window is None or self._window[0] != number:
            window = self.order.rows[number * self._size : (number + 1) * self._size]
            self._window = (number, self._read(window))
        return self._window[1][rows - number * self._size]

    def read(self, start: int, stop: int) -> sparse.csr_matrix:
        """Raw counts of a range of places in the order."""
        return self.read_rows(np.arange(start, stop))

    def _read(self, rows: np.ndarray) -> sparse.csr_matrix:
        block = self.cells.read(rows)
        cells, genes = self._hidden
        if cells is None and genes is None:
            return block
        hide = np.ones(block.nnz, bool)
        if cells is not None:
            hide &= np.repeat(cells[rows], np.diff(block.indptr))
        if genes is not None:
            hide &= genes[block.indices]
        block.data[hide] = 0
        block.eliminate_zeros()
        return block
