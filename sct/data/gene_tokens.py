"""Convert training records of cells to inputs of the cell encoder: embedding rows of genes, values, and padding."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sct.data.cell_records import ABSENT
from sct.errors import DataError


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
