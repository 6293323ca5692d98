"""Run language models that read cells as sentences of gene names."""

from __future__ import annotations

from typing import Any, Literal

import anndata as ad
import numpy as np

from sct.data.cells import CellCounts
from sct.data.text.cell_sentence import sentences
from sct.generation.cell_sentence_model import CellSentenceModel
from sct.inference import inputs
from sct.inference.readers import BLOCK, SingleCells
from sct.weights.pretrained import Pretrained

_STEP = 64  # pad texts to multiples of this number of tokens, so that JAX compiles few shapes


def cell_sentence_model_of(model: Pretrained) -> CellSentenceModel:
    """Return the `CellSentenceModel` of a loaded model; raise `ConfigError` if it was not trained on cell sentences."""
    return CellSentenceModel.of(model.config, model.variables, model.tokenizer, model.genes, model.data)


def written(
    table: CellCounts,
    sentence_model: CellSentenceModel,
    rows: np.ndarray,
    *,
    top_k: int | None = None,
    seed: int = 0,
) -> list[str]:
    """Convert the cells in the given rows to cell sentences, with the gene names that the model uses.

    A sentence has at most `top_k` genes, and never more than the sentences that the model was trained on.
    """
    longest = min(
        top_k or sentence_model.top_k or len(sentence_model.gene_names),
        sentence_model.top_k or len(sentence_model.gene_names),
    )
    made: list[str] = []
    for start in range(0, len(rows), BLOCK):
        part = rows[start : start + BLOCK]
        made += sentences(
            table.read(part), sentence_model.gene_names, top_k=longest, seed=seed, keys=table.keys[part]
        )
    return made


def questions(
    adata: ad.AnnData,
    model: Pretrained,
    sentence_model: CellSentenceModel,
    *,
    seed: int = 0,
    layer: str | None = None,
    gene_column: str | None = None,
    duplicates: Literal["error", "sum"] = "error",
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Return the field values for the prompt of each cell, and a key for each cell.

    The keys are uint64 (N,).

    Raises
    ------
    DataError
        The values are not raw counts, the genes are unknown, or a cell has no counts.
    """
    table = CellCounts(adata, model.vocabulary, layer=layer, gene_column=gene_column, duplicates=duplicates)
    inputs.check_counted(table)
    made = written(table, sentence_model, np.arange(adata.n_obs), seed=seed)
    fields = []
    for sentence in made:
        number = sentence.count(" ") + 1
        cut = {"num_genes": number} if number == sentence_model.top_k else {}
        fields.append({"cell": sentence, **cut})
    return fields, table.keys


class SentenceReader(SingleCells):
    """Reader that turns each cell into a sentence.

    The embedding of a cell is the mean of the last hidden states of all tokens of its sentence.

    Parameters
    ----------
    model
        Decoder that was trained on cell sentences.

    Raises
    ------
    ConfigError
        The model was not trained on cell sentences.
    """

    readout = "text_embedding"

    def __init__(self, model: Pretrained):
        super().__init__(model)
        self.sentence_model = cell_sentence_model_of(model)

    @property
    def tokens(self) -> int:
        """Return the largest number of tokens per cell."""
        return self.sentence_model.length

    def to_length(self, records: dict[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
        """Pad token ids and attention masks to the largest number of tokens."""
        missing = length - records["input_ids"].shape[1]
        return {name: np.pad(values, ((0, 0), (0, missing))) for name, values in records.items()}

    def records(self, cells: CellCounts, rows: np.ndarray, seed: int) -> dict[str, np.ndarray]:
        """Return the token ids and the attention mask, int32 (n, T) each; long sentences are truncated."""
        tokenizer, longest = self.sentence_model.tokenizer, self.sentence_model.length
        made = written(cells, self.sentence_model, rows, seed=seed)
        texts = [
            np.concatenate([tokenizer.begin, ids])[:longest].astype(np.int32)
            for ids in tokenizer.encode_batch(made)
        ]
        width = min(longest, -(-max(map(len, texts)) // _STEP) * _STEP)
        ids, attention_mask = np.zeros((2, len(rows), width), np.int32)
        for place, text in enumerate(texts):
            ids[place, : len(text)], attention_mask[place, : len(text)] = text, 1
        return {"input_ids": ids, "attention_mask": attention_mask}
