"""How decoders read cells: as sentences of gene names."""

from __future__ import annotations

from typing import Any, Literal

import anndata as ad
import numpy as np

from sct.data.cells import Cells
from sct.data.text.cell_sentence import sentences
from sct.generation.cells import CellWriter
from sct.inference import inputs
from sct.inference.readers import BLOCK, SingleCells
from sct.weights.pretrained import Pretrained

_STEP = 64  # texts are padded to multiples of so many tokens, so that few shapes are compiled


def writer_of(model: Pretrained) -> CellWriter:
    """Writer of cell sentences of a model; `ConfigError` for any other model."""
    return CellWriter.of(model.config, model.variables, model.tokenizer, model.genes, model.data)


def written(
    table: Cells,
    writer: CellWriter,
    rows: np.ndarray,
    *,
    top_k: int | None = None,
    seed: int = 0,
) -> list[str]:
    """Cell sentences of rows, with the model's gene names and at most its length."""
    longest = min(top_k or writer.top_k or len(writer.words), writer.top_k or len(writer.words))
    made: list[str] = []
    for start in range(0, len(rows), BLOCK):
        part = rows[start : start + BLOCK]
        made += sentences(table.read(part), writer.words, top_k=longest, seed=seed, keys=table.keys[part])
    return made


def questions(
    adata: ad.AnnData,
    model: Pretrained,
    writer: CellWriter,
    *,
    seed: int = 0,
    layer: str | None = None,
    gene_column: str | None = None,
    duplicates: Literal["error", "sum"] = "error",
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Prompt fields of each cell, and the cells' keys.

    Raises
    ------
    DataError
        No raw counts, unknown genes, cells without a count.
    """
    table = Cells(adata, model.vocabulary, layer=layer, gene_column=gene_column, duplicates=duplicates)
    inputs.check_not_empty(table)
    made = written(table, writer, np.arange(adata.n_obs), seed=seed)
    fields = []
    for sentence in made:
        number = sentence.count(" ") + 1
        cut = {"num_genes": number} if number == writer.top_k else {}
        fields.append({"cell": sentence, **cut})
    return fields, table.keys


class SentenceReader(SingleCells):
    """Reads each cell as its sentence; the embedding is the mean of the last hidden states over its tokens.

    Parameters
    ----------
    model
        A decoder that was trained on cell sentences.

    Raises
    ------
    ConfigError
        The model was not trained on cell sentences.
    """

    readout = "text_embedding"

    def __init__(self, model: Pretrained):
        super().__init__(model)
        self.writer = writer_of(model)

    @property
    def tokens(self) -> int:
        """Tokens of a cell at most."""
        return self.writer.length

    def records(self, cells: Cells, rows: np.ndarray, seed: int) -> dict[str, np.ndarray]:
        """Tokens (n, T) and attention mask (n, T); longer sentences are truncated."""
        tokenizer, longest = self.writer.tokenizer, self.writer.length
        made = written(cells, self.writer, rows, seed=seed)
        texts = [
            np.concatenate([tokenizer.begin, ids])[:longest].astype(np.int32)
            for ids in tokenizer.encode_batch(made)
        ]
        width = min(longest, -(-max(map(len, texts)) // _STEP) * _STEP)
        ids, there = np.zeros((2, len(rows), width), np.int32)
        for place, text in enumerate(texts):
            ids[place, : len(text)], there[place, : len(text)] = text, 1
        return {"input_ids": ids, "attention_mask": there}
