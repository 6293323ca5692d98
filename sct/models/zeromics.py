"""Define ZerOmics, a text decoder whose instructions contain cells as soft tokens (vectors computed from a cell).

Source: ZerOmics paper, section 3.2, equation 6, and appendix C.3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from sct.errors import ConfigError, DataError
from sct.models.card_text import CardText
from sct.models.checks import check_fields, check_range, check_text
from sct.models.decoder import Decoder
from sct.models.decoder_config import LlamaConfig
from sct.models.zeromics_cells import ZerOmicsCells, ZerOmicsCellsConfig
from sct.nn import axes
from sct.nn.linear import Linear

TOKENIZERS = ("linear", "pooled", "none")


@dataclasses.dataclass(frozen=True)
class ZerOmicsConfig:
    """Architecture of ZerOmics. The defaults are those of the paper, except that the decoder is LLaMA-2-7B.

    Parameters
    ----------
    cells, llm
        Configurations of the cell model (width D) and of the text decoder (width E).
    num_soft
        Number of soft tokens per cell (K; 500 in the paper). A soft token is a vector of width E.
    tokenizer
        How a cell becomes soft tokens. "linear" applies one dense layer over the gene axis (G -> K) and one over the
        width (D -> E). "pooled", for small models, applies one dense layer (D -> K * E) to the mean over genes. "none"
        is an ablation (the paper's "w/o SCT"): the mean over genes is the only soft token. If D differs from E, a
        random matrix that is not trained maps the mean to the decoder's width.
    """

    CARD: ClassVar[CardText] = CardText(
        title="ZerOmics: answers to questions about cells",
        summary="A LLaMA with low-rank adapters reads soft tokens computed from a cell, and answers questions. "
        'Paper: "ZerOmics: toward general models for single-cell analysis with instruction tuning".',
        use="Questions about the types, rare types, diseases and pathways of cells of a study, given its abstract. The "
        "model is meant for research.",
        limits=(
            "The model chooses from given candidates, and its probabilities are not calibrated.",
            "Questions and studies unlike those of the training may get wrong answers.",
            "The model is not validated for diagnosis or treatment.",
        ),
        example='sct.tl.annotate(adata, model)  # adata.obs["sct_label"]',
        tags=("transcriptomics", "instruction-tuning", "question-answering"),
    )

    cells: ZerOmicsCellsConfig = dataclasses.field(default_factory=ZerOmicsCellsConfig)
    llm: LlamaConfig = dataclasses.field(default_factory=LlamaConfig)
    num_soft: int = 500
    tokenizer: str = "linear"

    def __post_init__(self) -> None:
        check_fields(self, {"tokenizer": TOKENIZERS}, {"num_soft": 1})
        if self.tokenizer == "none" and self.num_soft != 1:
            raise ConfigError(
                f"num_soft is {self.num_soft}, but with tokenizer='none' each cell becomes exactly one soft token "
                "(one input vector of the language model): set num_soft=1."
            )

    @classmethod
    def fit(cls, values: Mapping[str, Any], num_genes: int) -> dict[str, Any]:
        """Return configuration values in which every size of 0 is replaced by the actual size.

        The number of genes is set to the size of the vocabulary, and other sizes are set to their defaults.
        """
        cells = ZerOmicsCellsConfig.fit(values.get("cells", {}), num_genes)
        return {
            **values,
            "cells": cells,
            "llm": LlamaConfig.fit(values.get("llm", {}), LlamaConfig.vocab_size),
        }

    @property
    def num_genes(self) -> int:
        """Return the number of genes in the vocabulary."""
        return self.cells.num_genes


class CellTokenizer(nn.Module):
    """Layers that turn a cell into soft tokens (ZerOmics paper, equation 6); see `ZerOmicsConfig.tokenizer`."""

    config: ZerOmicsConfig

    @nn.compact
    def __call__(self, hidden: jax.Array, genes: jax.Array | None = None) -> jax.Array:
        """Compute the soft tokens (B, K, E) of cells from the hidden vectors (B, S, D) of their genes.

        `genes` (B, S) holds the index of each gene in the vocabulary, or -1 for padding. None means that the S = G
        genes are all genes of the vocabulary, in order.
        """
        config, width = self.config, self.config.llm.embed_dim
        dtype = jnp.dtype(config.llm.dtype)
        x = hidden.astype(dtype)
        valid_mask = jnp.ones(hidden.shape[:2], dtype) if genes is None else (genes >= 0).astype(dtype)
        if config.tokenizer == "linear":
            # The sum over the genes, of which there are thousands, then has unit variance.
            init = jax.nn.initializers.normal(config.num_genes**-0.5)
            shape = (config.num_genes, config.num_soft)
            table = axes.param(self, "genes", init, shape, (None, axes.CHANNEL_IN)).astype(dtype)
            if genes is None:
                pooled = jnp.einsum("bgd,gk->bkd", x, table)
            else:
                own = jnp.take(table, jnp.maximum(genes, 0), axis=0) * valid_mask[..., None]
                pooled = jnp.einsum("bsd,bsk->bkd", x, own)
            return Linear(width, (axes.CHANNEL_IN, axes.EMBED), dtype=dtype, name="out")(pooled)
        mean = jnp.einsum("bsd,bs->bd", x, valid_mask) / jnp.maximum(valid_mask.sum(axis=1, keepdims=True), 1)
        if config.tokenizer == "pooled":
            made = Linear(config.num_soft * width, (axes.CHANNEL_IN, axes.EMBED), dtype=dtype, name="out")(
                mean
            )
            return rearrange(made, "b (k d) -> b k d", k=config.num_soft)
        if config.cells.embed_dim != width:
            kernel = axes.param(
                self,
                "fixed",
                axes.kernel_init,
                (config.cells.embed_dim, width),
                (axes.CHANNEL_IN, axes.EMBED),
            )
            mean = mean @ kernel.astype(dtype)
        return mean[:, None]


class ZerOmics(nn.Module):
    """ZerOmics: cell model, cell tokenizer and text decoder; see `ZerOmicsConfig`."""

    config: ZerOmicsConfig
    outputs: ClassVar[tuple[str, ...]] = ("logits", "soft", "cell_embedding")
    intermediates: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    def example(config: ZerOmicsConfig) -> dict[str, jax.Array]:
        """Return the smallest valid inputs of one call, as a dict by argument name."""
        return {**ZerOmicsCells.example(config.cells), **Decoder.example(config.llm)}

    @staticmethod
    def check_inputs(config: ZerOmicsConfig, inputs: Mapping[str, Any]) -> None:
        """Raise `DataError` unless the inputs fit the model. Values of traced arrays are not checked."""
        ZerOmicsCells.check_inputs(config.cells, inputs)
        if (ids := inputs.get("input_ids")) is None:
            return
        if len(ids) != len(inputs["bins"]):
            raise DataError(
                f"`bins` has {len(inputs['bins'])} cells, but `input_ids` has {len(ids)} instructions: give one "
                "instruction per cell."
            )
        check_range("input_ids", ids, config.llm.vocab_size - 1, least=-config.num_soft)
        most = config.llm.max_length if config.llm.positions == "learned" else None
        check_text({**inputs, "input_ids": jnp.maximum(ids, 0)}, config.llm.vocab_size, most)

    @staticmethod
    def flops(config: ZerOmicsConfig, batch: int, length: int, genes: int) -> float:
        """Count the operations of all matrix products in one forward pass. A multiply-add counts as two.

        Parameters
        ----------
        config
            Configuration of the model.
        batch
            Number of cells (B).
        length
            Number of tokens in an instruction.
        genes
            Number of genes in a cell.
        """
        tokenizer = genes * config.cells.embed_dim + config.cells.embed_dim * config.llm.embed_dim
        return (
            ZerOmicsCells.flops(config.cells, batch, genes)
            + Decoder.flops(config.llm, batch, length)
            + 2.0 * batch * config.num_soft * tokenizer
        )

    def setup(self) -> None:
        """Declare the layers of the model."""
        config = self.config
        self.cells, self.llm = ZerOmicsCells(config.cells), Decoder(config.llm)
        self.tokenizer = CellTokenizer(config)

    def encode(self, bins: jax.Array, genes: jax.Array | None = None) -> jax.Array:
        """Compute the hidden vectors (B, S, D) of the genes of cells; see `ZerOmicsCells` for the arguments."""
        return self.cells.hidden_states(bins, genes)

    def soft(self, hidden: jax.Array, genes: jax.Array | None = None) -> jax.Array:
        """Compute the soft tokens (B, K, E) of cells from `hidden` (B, S, D), the output of `encode`."""
        return self.tokenizer(hidden, genes)

    def hidden_states(
        self, input_ids: jax.Array, attention_mask: jax.Array | None, soft: jax.Array
    ) -> jax.Array:
        """Compute the hidden vectors (B, T, E) of instructions (B, T).

        A negative token id -1 - k is replaced by the vector `soft[row, k]` (a soft token), where `soft` has the shape
        (B, K, E).
        """
        return self.llm.hidden_states(input_ids, attention_mask, soft=soft)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Compute the scores (logits) of all tokens, float32 (..., V), from hidden vectors (..., E)."""
        return self.llm.logits(hidden)

    def __call__(
        self,
        bins: jax.Array,
        genes: jax.Array | None = None,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
    ) -> dict[str, jax.Array]:
        """Compute the soft tokens of cells. If instructions are given, also compute the scores of the next tokens.

        Parameters
        ----------
        bins, genes
            Genes of the cells; see `ZerOmicsCells`.
        input_ids
            Instructions, integers (B, T), one per cell. The token id -1 - k stands for the soft token k of the cell.
        attention_mask
            Shape (B, T): 1 for tokens and 0 for padding, which may be on either side.

        Returns
        -------
        A dict with `soft` (B, K, E), and `cell_embedding`, float32 (B, E), the mean over the soft tokens. With
        instructions it also has `logits`, float32 (B, T, V).
        """
        encoded = self.encode(bins, genes)
        if self.is_initializing():
            self.cells.bin_logits(encoded), self.cells.gene_logits(encoded)
        soft = self.soft(encoded, genes)
        found = {"soft": soft, "cell_embedding": soft.astype(jnp.float32).mean(axis=1)}
        if input_ids is not None:
            found["logits"] = self.logits(self.hidden_states(input_ids, attention_mask, soft))
        return found
