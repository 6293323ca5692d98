"""Compute one vector per gene of a model: from the input layer, or as a mean over cells that the model reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from sct.data.bag_order import BagOrder
from sct.data.cell_records import known_genes
from sct.data.cells import CellCounts
from sct.inference.bags import BagReader
from sct.inference.sentences import cell_sentence_model_of
from sct.nn.paths import flatten
from sct.weights.pretrained import Pretrained


class GeneVectors(Protocol):
    """Object that computes one vector for each gene of a model.

    Attributes
    ----------
    needs_cells
        Whether the vectors depend on cells. If False, `cells` and `orders` are None.
    """

    needs_cells: bool

    def vectors(
        self, cells: CellCounts | None, orders: Sequence[BagOrder] | None, batch_size: int | None = None
    ) -> np.ndarray:
        """Return the vectors, float32 (G, D), in the order of the vocabulary; NaN for genes without a vector."""
        ...


class ContextualVectors:
    """Vectors of a model that reads bags: the last activation at the position of each gene, averaged over cells.

    sCT embeds only the expression level of a gene, with the same table for all genes, so it has no vector of a gene
    alone. What sCT knows about a gene is in the activations from which the output head predicts the level of the gene.
    """

    needs_cells = True

    def __init__(self, model: Pretrained):
        self.reader = BagReader(model)

    def vectors(
        self, cells: CellCounts | None, orders: Sequence[BagOrder] | None, batch_size: int | None = None
    ) -> np.ndarray:
        """Return the mean vectors over all cells; NaN for genes that were not measured. See `GeneVectors.vectors`."""
        assert cells is not None
        positions, genes = self.reader.model.config.num_genes, len(cells.vocabulary)
        total: Any = 0.0
        for one in self.reader.results(cells, orders, ("deconv_out",), "embedding genes", batch_size):
            hidden = np.asarray(one.outputs["deconv_out"])
            of_cells = hidden.reshape(len(one.rows), positions, hidden.shape[-1])[one.is_target, :genes]
            total = total + of_cells.sum(axis=0, dtype=np.float64)
        found = (total / cells.n_cells).astype(np.float32)
        found[~cells.measured] = np.nan
        return found


class TextFeatureVectors:
    """Vectors of the ZerOmics cell model: the projected text features that the model adds to the bins of genes."""

    needs_cells = False

    def __init__(self, model: Pretrained, part: str = ""):
        self.model, self.part = model, part

    def vectors(
        self,
        cells: CellCounts | None = None,
        orders: Sequence[BagOrder] | None = None,
        batch_size: int | None = None,
    ) -> np.ndarray:
        """Return the vectors of all genes that have a text feature; see `GeneVectors.vectors`."""
        params = flatten(self.model.variables["params"])
        prefix = f"{self.part}/" if self.part else ""
        features, kernel, bias = (
            np.asarray(params[f"{prefix}{name}"], np.float32)
            for name in ("features", "project/kernel", "project/bias")
        )
        found = features @ kernel + bias
        found[~known_genes(len(found), self.model.data["dropped"])] = np.nan
        return found


class TokenVectors:
    """Vectors of a cell-sentence model: the mean input embedding of the tokens of the gene name."""

    needs_cells = False

    def __init__(self, model: Pretrained):
        self.model, self.sentence_model = model, cell_sentence_model_of(model)

    def vectors(
        self,
        cells: CellCounts | None = None,
        orders: Sequence[BagOrder] | None = None,
        batch_size: int | None = None,
    ) -> np.ndarray:
        """Return the vectors of all genes; see `GeneVectors.vectors`."""
        table = np.asarray(flatten(self.model.variables["params"])["token/embedding"], np.float32)
        # The tokens of a name inside a sentence, which follow a space.
        written = self.sentence_model.tokenizer.encode_response(self.sentence_model.gene_names)
        return np.stack([table[ids].mean(axis=0) for ids in written])
