"""The cells of an AnnData over a model's genes, read in blocks, so that a file need not fit into memory."""

from __future__ import annotations

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
    """Cells that may share a bag: a batch, a slide, or all of them.

    Attributes
    ----------
    name
        For messages; "" where there is one section.
    rows
        int64 (n,) rows of the table, ascending.
    places
        float32 (n, 2) rescaled positions of these cells, or None.
    scale
        How they were rescaled.
    """

    name: str
    rows: np.ndarray
    places: np.ndarray | None = None
    scale: Scale | None = None


class CellCounts:
    """Raw counts of an AnnData (N cells) in the order of a vocabulary's genes (G).

    Parameters
    ----------
    adata
        In memory or backed. Nothing in it is changed.
    vocabulary
        Genes of the model.
    sections
        What bags are made of; by default all cells are one section.
    layer
        Where the raw counts are; by default the first of X, raw and layers["counts"] that holds them.
    gene_column
        Column of `var` with Ensembl ids or symbols; by default it is found.
    duplicates
        "error", or "sum" several columns of one gene.
    values
        "activity" for a matrix that is no counts, see `sct.data.counts.validate`: what is read is then not counts.

    Attributes
    ----------
    counts_from, notes
        Place of the counts, and sentences for a person.
    alignment
        Report about the genes.
    measured
        Whether a gene was measured, (G,) bool: it has a column, or, of a study of a store, had one.
    cell_totals
        Sum of each cell's counts over the vocabulary's genes, (N,).
    gene_totals
        Sum of each gene's counts over the cells of each section, (sections, G).

    Raises
    ------
    DataError
        No raw counts, unknown genes, a matrix on disk that is stored by column.
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
                f"{found.source} is stored by column, so single cells of the file on disk cannot be read: write it as "
                "CSR (adata.X = adata.X.tocsr()), or load it into memory"
            )
        self.alignment = vocabulary.align(found.var, column=gene_column, duplicates=duplicates)
        self.vocabulary = vocabulary
        self.n_cells: int = found.matrix.shape[0]
        self.names = adata.obs_names
        self.on_disk = not sparse.issparse(self.matrix)
        self.sections = tuple(sections) if sections is not None else (Section("", np.arange(self.n_cells)),)
        self.measured = self._measured(found.var)
        self._window: tuple[Any, int, sparse.csr_matrix] | None = None
        self.gene_totals = np.zeros((len(self.sections), len(vocabulary)))
        self.cell_totals = np.zeros(self.n_cells)
        self._count()

    @functools.cached_property
    def keys(self) -> np.ndarray:
        """Keys of the cells, uint64 (N,), from their names; see `sct.data.text.ranking.cell_keys`."""
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
        """Sum over cells and over genes, block by block."""
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
        """Raw counts of rows (any order, repeats allowed), float32 CSR (len(rows), G)."""
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
        projected.eliminate_zeros()
        return projected

    def _from_disk(self, rows: np.ndarray) -> sparse.csr_matrix:
        """Ascending rows of a matrix on disk, as CSR."""
        # A file is read faster in one piece than cell by cell, unless most of it would be thrown away.
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
        """Raw counts of window `number` of a reader, kept until another one is asked for."""
        if self._window is None or self._window[0] is not reader or self._window[1] != number:
            self._window = None  # two windows are never held at once
            self._window = (reader, number, self.read(rows))
        return self._window[2]


class CellStudy:
    """The cells of a section in the order of their bags, with what `sct.data.bags.BagSource` asks of a study.

    Parameters
    ----------
    cells
        The table they are from.
    number
        Number of the section in `cells.sections`.
    order
        Rows of the table, bag after bag.
    masked_cells, masked_genes
        Cells of the table (N,) bool and genes (G,) bool whose counts are not to be shown: where both hold (one
        that is None holds everywhere) nothing is read. With both None nothing is hidden.
    name
        Instead of the section's.
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
        """Whether a gene was measured, (G,) bool."""
        return self.cells.measured

    def noisy_genes(self, fraction: float) -> np.ndarray:
        """Genes (G,) whose counts in the section, as far as they are shown, are noise.

        See `sct.data.tokenize.noisy_genes`.
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
        """Positions (len(order), 2) in the units of models."""
        if self.section.places is None:
            raise DataError(f"the cells {self.name} have no positions")
        return self.section.places[np.searchsorted(self.section.rows, self.order.rows)]

    def read_rows(self, rows: np.ndarray) -> sparse.csr_matrix:
        """Raw counts (len(rows), G) of places in the order; the window around them is kept for the next."""
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
        """Raw counts of a range of places in the order."""
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
