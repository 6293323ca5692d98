"""ZerOmics: a decoder that reads cells as soft tokens inside instructions (DESIGN 4.3).

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
from sct.models.checks import check_fields, check_range, check_text
from sct.models.decoder import Decoder
from sct.models.decoder_config import LlamaConfig
from sct.models.zeromics_cells import ZerOmicsCells, ZerOmicsCellsConfig
from sct.nn import axes
from sct.nn.linear import Linear

TOKENIZERS = ("linear", "pooled", "none")


@dataclasses.dataclass(frozen=True)
class ZerOmicsConfig:
    """Architecture of ZerOmics; the defaults are the paper's, but for the decoder, which is LLaMA-2-7B.

    Parameters
    ----------
    cells, llm
        Cell model, and decoder, whose width (E) soft tokens have.
    num_soft
        Soft tokens of a cell (K, 500 in the paper).
    tokenizer
        How a cell becomes soft tokens: "linear", a map over the gene axis (G -> K) and one of the width (D -> E);
        "pooled", one map of the mean over genes (D -> K x E), for small models; "none", an ablation ("w/o SCT"): the
        mean alone is one token, of the decoder's width or brought to it by a random map that is not trained.
    """

    cells: ZerOmicsCellsConfig = dataclasses.field(default_factory=ZerOmicsCellsConfig)
    llm: LlamaConfig = dataclasses.field(default_factory=LlamaConfig)
    num_soft: int = 500
    tokenizer: str = "linear"

    def __post_init__(self) -> None:
        check_fields(self, {"tokenizer": TOKENIZERS}, {"num_soft": 1})
        if self.tokenizer == "none" and self.num_soft != 1:
            raise ConfigError(
                f"num_soft is {self.num_soft}, but without a tokenizer a cell is one token: set it to 1."
            )

    @classmethod
    def fit(cls, values: Mapping[str, Any], num_genes: int) -> dict[str, Any]:
        """Values of a configuration whose sizes of 0 are replaced: genes by a vocabulary's, others by the default."""
        cells = ZerOmicsCellsConfig.fit(values.get("cells", {}), num_genes)
        return {
            **values,
            "cells": cells,
            "llm": LlamaConfig.fit(values.get("llm", {}), LlamaConfig.vocab_size),
        }

    @property
    def num_genes(self) -> int:
        """Genes of the vocabulary."""
        return self.cells.num_genes


class CellTokenizer(nn.Module):
    """Soft tokens of cells (equation 6); see `ZerOmicsConfig.tokenizer`."""

    config: ZerOmicsConfig

    @nn.compact
    def __call__(self, hidden: jax.Array, genes: jax.Array | None = None) -> jax.Array:
        """Map vectors (B, S, D) of genes, numbered (B, S) or all in order, to soft tokens (B, K, E)."""
        config, width = self.config, self.config.llm.embed_dim
        dtype = jnp.dtype(config.llm.dtype)
        x = hidden.astype(dtype)
        valid_mask = jnp.ones(hidden.shape[:2], dtype) if genes is None else (genes >= 0).astype(dtype)
        if config.tokenizer == "linear":
            # Of unit variance over the genes of a cell, of which there are thousands.
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
    """The whole model; see `ZerOmicsConfig`."""

    config: ZerOmicsConfig
    outputs: ClassVar[tuple[str, ...]] = ("logits", "soft", "cell_embedding")
    intermediates: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    def example(config: ZerOmicsConfig) -> dict[str, jax.Array]:
        """Smallest inputs of a call, by name."""
        return {**ZerOmicsCells.example(config.cells), **Decoder.example(config.llm)}

    @staticmethod
    def check_inputs(config: ZerOmicsConfig, inputs: Mapping[str, Any]) -> None:
        """Raise `DataError` unless the inputs fit; values are looked at where they are known (not traced)."""
        ZerOmicsCells.check_inputs(config.cells, inputs)
        if (ids := inputs.get("input_ids")) is None:
            return
        if len(ids) != len(inputs["bins"]):
            raise DataError(
                f"there are {len(inputs['bins'])} cells, but {len(ids)} instructions: give one for each."
            )
        check_range("input_ids", ids + config.num_soft, config.num_soft + config.llm.vocab_size - 1)
        most = config.llm.max_length if config.llm.positions == "learned" else None
        check_text({**inputs, "input_ids": jnp.maximum(ids, 0)}, config.llm.vocab_size, most)

    @staticmethod
    def flops(config: ZerOmicsConfig, batch: int, length: int, genes: int) -> float:
        """Operations of the matrix products of one forward pass over `genes` genes and `length` tokens."""
        tokenizer = genes * config.cells.embed_dim + config.cells.embed_dim * config.llm.embed_dim
        return (
            ZerOmicsCells.flops(config.cells, batch, genes)
            + Decoder.flops(config.llm, batch, length)
            + 2.0 * batch * config.num_soft * tokenizer
        )

    def setup(self) -> None:
        """Declare the parts."""
        config = self.config
        self.cells, self.llm = ZerOmicsCells(config.cells), Decoder(config.llm)
        self.tokenizer = CellTokenizer(config)

    def encode(self, bins: jax.Array, genes: jax.Array | None = None) -> jax.Array:
        """Vectors (B, S, D) of the genes of cells; see `ZerOmicsCells`."""
        return self.cells.hidden_states(bins, genes)

    def soft(self, hidden: jax.Array, genes: jax.Array | None = None) -> jax.Array:
        """Soft tokens (B, K, E) of what `encode` gives."""
        return self.tokenizer(hidden, genes)

    def hidden_states(
        self, input_ids: jax.Array, attention_mask: jax.Array | None, soft: jax.Array
    ) -> jax.Array:
        """Vectors (B, T, E) of instructions (B, T), in which -1 - k is the soft token k of the row."""
        return self.llm.hidden_states(input_ids, attention_mask, soft=soft)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Scores of all tokens, float32 (..., V), of vectors (..., E)."""
        return self.llm.logits(hidden)

    def __call__(
        self,
        bins: jax.Array,
        genes: jax.Array | None = None,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
    ) -> dict[str, jax.Array]:
        """Read cells, and instructions about them.

        Parameters
        ----------
        bins, genes
            Cells; see `ZerOmicsCells`.
        input_ids
            Instructions, integers (B, T), one for each cell; -1 - k stands for the soft token k of the cell.
        attention_mask
            (B, T), 1 for tokens and 0 for padding, on either side.

        Returns
        -------
        `soft` (B, K, E), and `cell_embedding` float32 (B, E), its mean over the tokens; with instructions `logits`
        float32 (B, T, V).
        """
        encoded = self.encode(bins, genes)
        if self.is_initializing():
            self.cells.bin_logits(encoded), self.cells.gene_logits(encoded)
        soft = self.soft(encoded, genes)
        found = {"soft": soft, "cell_embedding": soft.astype(jnp.float32).mean(axis=1)}
        if input_ids is not None:
            found["logits"] = self.logits(self.hidden_states(input_ids, attention_mask, soft))
        return found
