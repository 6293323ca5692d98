"""Run cell encoders that read the genes of a cell as tokens with expression values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from sct.data.cell_options import EXPRESSED, CellOptions
from sct.data.cells import CellCounts
from sct.data.gene_tokens import gene_tokens, measured_rows, rows_of_genes
from sct.errors import DataError
from sct.inference.binned_cells import binned, check_known
from sct.inference.readers import BLOCK, SingleCells
from sct.inference.readouts import Readout
from sct.models.cell_encoder import CellEncoder
from sct.weights.pretrained import Pretrained

_STEP = 32  # sequences in training have a multiple of this number of tokens
_SHORTEST = 128  # tokens of the shortest sequence; longer ones have twice, four times, ... as many


class TokenReader(SingleCells):
    """Reader that turns each cell into a sequence of CLS and genes with values. It reads every cell by itself.

    The number of tokens of a sequence depends only on the cell, so the embedding of a cell depends neither on the
    other cells nor on their order.

    Parameters
    ----------
    model
        Cell encoder. Its stored data options name the genes that it reads, and the kind of their values.
    """

    readout = "cell_emb"
    readouts: Mapping[str, Readout] = MappingProxyType(
        {"cls": Readout("cls"), "mean": Readout("avg-pool"), "weighted": Readout("w-pool")}
    )

    def __init__(self, model: Pretrained):
        super().__init__(model)
        config = model.config
        self.rows = rows_of_genes(model.data, len(model.vocabulary), config.vocab_size)
        self.options = CellOptions.of_tokens(config.num_bins, config.values == "category", model.data)
        self.samples = self.options.choice == "sampled"
        listed = model.data.get("listed")
        self.listed = None if listed is None else np.asarray(listed, np.int64)

    @property
    def tokens(self) -> int:
        """Return the largest number of tokens of a cell, CLS included."""
        if self.listed is not None:
            return len(self.listed) + 1
        return (self.options.max_genes or int((self.rows >= 0).sum())) + 1

    def records(self, cells: CellCounts, rows: np.ndarray, seed: int) -> dict[str, np.ndarray]:
        """Return the arrays of `sct.data.gene_tokens.gene_tokens`, and `batch_labels` if the model reads them.

        Raises
        ------
        DataError
            The model reads batch labels, and a cell has a batch that the model does not know; or the outputs are
            weighted by expression values, and a cell has only zeros.
        """
        config, known = self.model.config, self.rows >= 0
        if rows[0] == 0:
            check_known(cells, known, "left out")
        found = binned(cells, rows, self.options, known, seed, self.listed)
        measured = measured_rows(self.rows, cells.measured)
        made = gene_tokens(found, measured, config.cls_id, config.pad_id, config.pad_value, self.tokens)
        kind = config.cell_embedding if self.readout == "cell_emb" else self.readout
        empty = ~((made["values"] > 0) & ~made["padding_mask"]).any(axis=1)
        if kind == "w-pool" and empty.any():
            raise DataError(
                f"{int(empty.sum()):,} of {len(rows):,} cells express none of the genes that the model reads (first: "
                f"row {int(rows[np.argmax(empty)])}), so that the weighted embedding has no weights: remove these "
                "cells, or choose another `readout`."
            )
        if config.values == "category":
            made["values"] = made["values"].astype(np.int32)
        if config.num_batches:
            made["batch_labels"] = self._labels(cells)[rows]
        return made

    def training_length(self, cells: CellCounts, rows: np.ndarray) -> int:
        """Return the number of tokens of the longest of some cells, rounded up to a multiple of 32."""
        if self.options.choice in EXPRESSED:
            known, longest = self.rows >= 0, 0
            for start in range(0, len(rows), BLOCK):
                counts = cells.read(rows[start : start + BLOCK])[:, known]
                longest = max(longest, int((counts > 0).sum(axis=1).max()))
        else:
            longest = int((measured_rows(self.rows, cells.measured) >= 0).sum())
        return min(self.tokens, -(-(longest + 1) // _STEP) * _STEP)

    def to_length(self, records: dict[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
        """Cut the padding that no cell needs."""
        return {name: value[:, :length] if value.ndim > 1 else value for name, value in records.items()}

    def _labels(self, cells: CellCounts) -> np.ndarray:
        """Return the batch label of each cell, int32 (N,). The batches of cells are their sections."""
        labels = np.zeros(cells.n_cells, np.int32)
        config, data = self.model.config, self.model.data
        if not config.domain_norm:  # only the heads read the labels, not the embeddings
            return labels
        names = [str(name) for name in data.get("batches", range(config.num_batches))]
        for section in cells.sections:
            if section.name not in names:
                found = f"the batch {section.name!r}" if section.name else "cells without a batch"
                raise DataError(
                    f"adata has {found}, but the model normalizes the cells of each batch separately and knows only "
                    f"the batches {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}: pass the column of the "
                    "batches as `batch_key`."
                )
            labels[section.rows] = names.index(section.name)
        return labels

    def inputs_of_cells(self, made: Mapping[str, np.ndarray]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the inputs of each cell, cells with few tokens first, without padding that the cell does not need."""
        used = (~made["padding_mask"]).sum(axis=1)
        doublings = np.ceil(np.log2(np.maximum(used, 1) / _SHORTEST)).clip(0)
        lengths = np.minimum(_SHORTEST * 2 ** doublings.astype(np.int64), self.tokens)
        for place in np.argsort(lengths, kind="stable").tolist():
            inputs = {name: value[place] for name, value in made.items()}
            yield (
                place,
                {
                    name: value[: lengths[place]] if np.ndim(value) else value
                    for name, value in inputs.items()
                },
            )


class GeneTableVectors:
    """Vectors of genes in the input layer of the cell encoder: the gene embeddings, after their layer norm."""

    needs_cells = False

    def __init__(self, model: Pretrained):
        self.model = model

    def vectors(self, cells: Any = None, orders: Any = None, batch_size: int | None = None) -> np.ndarray:
        """Return the vectors of all genes with a row; see `sct.inference.gene_vectors.GeneVectors.vectors`."""
        rows = rows_of_genes(self.model.data, len(self.model.vocabulary), self.model.config.vocab_size)
        module = CellEncoder(self.model.config)
        made = module.apply(self.model.variables, np.maximum(rows, 0), method="gene_embeddings")
        found = np.array(made, np.float32)
        found[rows < 0] = np.nan
        return found
