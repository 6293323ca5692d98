"""Convert training records of cells to inputs of the cell encoder: embedding rows of genes, values, and padding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sct.data.cell_options import FIXED, CellOptions
from sct.data.cell_records import ABSENT, CellSource
from sct.data.store import Study
from sct.errors import CheckpointError, DataError


def gene_tokens(
    records: Mapping[str, np.ndarray],
    rows_of_genes: np.ndarray,
    cls_id: int | None,
    pad_id: int,
    pad_value: float,
    length: int | None = None,
) -> dict[str, np.ndarray]:
    """Convert records of cells to token sequences: CLS first, then the genes of the cell, then padding.

    Each row of the result depends only on its own record. The order and the grouping of the cells have no effect on the
    tokens of a cell.

    Parameters
    ----------
    records
        Records of N cells, as `sct.data.cell_records.cell_records` returns them: `bins` or `values` (N, S), and
        optionally `genes` (N, S). Without `genes`, the S columns are all genes of the vocabulary.
    rows_of_genes
        Row of the gene embedding for each gene of the vocabulary, int (G,). Genes with row -1 are unknown to the model
        and are left out.
    cls_id, pad_id
        Rows of the gene embedding for CLS and padding. With `cls_id` None, there is no CLS token.
    pad_value
        Value of padding.
    length
        Length of the sequences (L), including CLS. None means S + 1 with CLS, and S without CLS.

    Returns
    -------
    Dict of arrays: `gene_ids` int32 (N, L), `values` float32 (N, L), and `padding_mask` bool (N, L), True at padding.
    CLS has value 0.

    Raises
    ------
    DataError
        A cell has more than L tokens.
    """
    values = np.asarray(records["values" if "values" in records else "bins"], np.float32)
    rows_of_genes = np.asarray(rows_of_genes, np.int32)
    genes = records.get("genes")
    if genes is None:
        rows = np.broadcast_to(rows_of_genes, values.shape)
    else:
        rows = np.where(genes == ABSENT, -1, rows_of_genes[np.maximum(genes, 0)])
    first, n_cells = int(cls_id is not None), len(values)
    length = values.shape[1] + first if length is None else length
    kept = rows >= 0
    longest = first + int(kept.sum(axis=1).max(initial=0))
    if longest > length:
        raise DataError(
            f"a cell has {longest:,} tokens, but sequences have at most {length:,}: read fewer genes per cell "
            "(`max_genes`), or increase the maximum length."
        )
    gene_ids = np.full((n_cells, length), pad_id, np.int32)
    made = np.full((n_cells, length), pad_value, np.float32)
    padding_mask = np.ones((n_cells, length), bool)
    if cls_id is not None:
        gene_ids[:, 0], made[:, 0], padding_mask[:, 0] = cls_id, 0, False
    cell, column = np.nonzero(kept)
    at = first + (np.cumsum(kept, axis=1) - 1)[kept]
    gene_ids[cell, at], made[cell, at], padding_mask[cell, at] = rows[kept], values[cell, column], False
    return {"gene_ids": gene_ids, "values": made, "padding_mask": padding_mask}


def rows_of_genes(data: Mapping[str, Any], num_genes: int, num_rows: int | None = None) -> np.ndarray:
    """Return the row of the gene embedding for each gene of a model's vocabulary, int32 (G,); -1 for unknown genes.

    Parameters
    ----------
    data
        Data options of a model folder. The entry `gene_rows` has the rows; without it, row i belongs to gene i.
    num_genes
        Number of genes of the vocabulary (G).
    num_rows
        Number of rows of the gene embedding; None if it is not yet known.

    Raises
    ------
    CheckpointError
        `gene_rows` does not have one row of the gene embedding per gene.
    """
    rows = data.get("gene_rows", range(num_genes))
    most = math.inf if num_rows is None else num_rows - 1
    # Other numbers, such as floats or large negative ones, would silently select wrong rows.
    fits = len(rows) == num_genes and all(type(row) is int and -1 <= row <= most for row in rows)
    if not fits:
        raise CheckpointError(
            f"the model has {num_genes:,} genes, but its data option gene_rows does not list one row of the gene "
            f"embedding (-1 to {most:,}) per gene: the model folder is damaged, so copy or convert it again."
        )
    return np.asarray(rows, np.int32)


def measured_rows(rows_of_genes: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Return the row of each gene, int (G,), but -1 for genes that were not measured: their values are not zeros."""
    return np.where(measured, rows_of_genes, -1)


class TokenSource(CellSource):
    """Make token sequences of single cells; see `sct.data.loader.RecordSource`.

    Genes that a study did not measure are left out. A record has the arrays of `gene_tokens` for one cell, and in
    addition `row`, int32 (), the row of the cell in its study; `library_size`, float32 (), its total count;
    `expressed_genes`, float32 (), its number of genes with counts; and with `labels` also `batch_labels`, int32 ().

    Parameters
    ----------
    studies, options, exhaustive, seed, listed
        See `sct.data.cell_records.CellSource`.
    rows_of_genes, cls_id, pad_id, pad_value
        See `gene_tokens`.
    labels
        Batch label of each cell, int (n_cells,), by the name of the study; None for cells without batch labels.
    """

    def __init__(
        self, studies: Sequence[Study], options: CellOptions, rows_of_genes: np.ndarray, cls_id: int | None,
        pad_id: int, pad_value: float, exhaustive: bool = False, seed: int = 0, listed: np.ndarray | None = None,
        labels: Mapping[str, np.ndarray] | None = None,
    ):  # fmt: skip
        super().__init__(studies, options, rows_of_genes >= 0, exhaustive, seed, listed)
        self.rows_of_genes, self.labels = rows_of_genes, labels
        self.cls_id, self.pad_id, self.pad_value = cls_id, pad_id, pad_value

    @property
    def length(self) -> int:
        """Return the length of the sequences (L)."""
        if self.options.choice in FIXED:
            size = 0 if self.listed is None else len(self.listed)
        elif self.options.choice == "all":
            size = int((self.rows_of_genes >= 0).sum())
        else:
            size = self.options.max_genes
        return size + (self.cls_id is not None)

    def record(self, number: int, epoch: int = 0) -> dict[str, np.ndarray]:
        """Return the record of one cell."""
        study, rows = self.cells.rows(number, epoch)
        counts = study.read_rows(rows)
        record = self.converted(counts, rows[0], epoch)
        row = record.pop("row")
        tokens = gene_tokens(
            {name: value[None] for name, value in record.items()}, measured_rows(self.rows_of_genes, study.measured),
            self.cls_id, self.pad_id, self.pad_value, self.length,
        )  # fmt: skip
        made = {name: value[0] for name, value in tokens.items()}
        made |= {"row": row, "library_size": np.asarray(counts.sum(), np.float32)}
        made["expressed_genes"] = np.asarray((counts.data > 0).sum(), np.float32)
        if self.labels is not None:
            made["batch_labels"] = np.asarray(self.labels[study.name][rows[0]], np.int32)
        return made
