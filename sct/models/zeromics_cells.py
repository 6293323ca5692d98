"""Cell model of ZerOmics: a transformer over the genes of a cell, each with its bin and its text (DESIGN 4.3).

Source: ZerOmics paper, section 3.1, equations 2 to 5, and appendix C.3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from sct.checks import check_shape
from sct.errors import DataError
from sct.models.bert import BertLayer
from sct.models.bert_config import BertConfig
from sct.models.checks import check_fields, check_range
from sct.nn import axes
from sct.nn.chunked_attention import Mask
from sct.nn.linear import Embed, Linear
from sct.nn.stack import stack

ENCODERS = ("transformer", "weighted")
# Where the features of genes lie, which no training changes.
FEATURES = "params/features"


@dataclasses.dataclass(frozen=True)
class ZerOmicsCellsConfig:
    """Architecture of the cell model; the defaults are the paper's, with features of LLaMA-2-13B.

    Parameters
    ----------
    num_genes
        Genes of the vocabulary (G).
    feature_dim
        Width of a gene's feature (F), the hidden size of the text model that made it.
    num_bins
        Bins of non-zero values; zero and the mask are two tokens more.
    embed_dim, num_layers, num_heads, ffn_dim
        Width (D), to which features are projected; layers, heads, and width of the feed-forward.
    norm_eps, activation, dropout, remat, dtype
        See `sct.models.bert_config.BertConfig`.
    encoder
        "transformer", or "weighted", an ablation of the second stage without layers (Table 5, "GenePT"): the feature of
        each gene, projected, weighted by its bin, so that the mean over genes is the weighted mean of their texts.
    """

    num_genes: int = 20_124
    feature_dim: int = 5120
    num_bins: int = 10
    embed_dim: int = 768
    num_layers: int = 12
    num_heads: int = 12
    ffn_dim: int = 3072
    norm_eps: float = 1e-5
    activation: str = "gelu"
    dropout: float = 0.0
    remat: str = "level"
    dtype: str = "float32"
    encoder: str = "transformer"

    def __post_init__(self) -> None:
        check_fields(self, {"encoder": ENCODERS}, dict.fromkeys(("num_genes", "feature_dim", "num_bins"), 1))
        _ = self.layer

    @classmethod
    def fit(cls, values: Mapping[str, Any], num_genes: int) -> dict[str, Any]:
        """Values of a configuration with 0 replaced by the genes of a vocabulary, and the default width of features."""
        width = values.get("feature_dim") or cls.feature_dim
        return {**values, "num_genes": values.get("num_genes") or num_genes, "feature_dim": width}

    @property
    def mask(self) -> int:
        """Token of a masked bin."""
        return self.num_bins + 1

    @property
    def layer(self) -> BertConfig:
        """Options of a layer."""
        return BertConfig(
            vocab_size=self.num_bins + 2, embed_dim=self.embed_dim, num_layers=self.num_layers,
            num_heads=self.num_heads, ffn_dim=self.ffn_dim, norm_eps=self.norm_eps, activation=self.activation,
            pooler=False, mlm_head=False, dropout=self.dropout, remat=self.remat, dtype=self.dtype,
        )  # fmt: skip


class ZerOmicsCells(nn.Module):
    """The whole model; see `ZerOmicsCellsConfig`."""

    config: ZerOmicsCellsConfig
    outputs: ClassVar[tuple[str, ...]] = ("hidden", "cell_embedding")
    intermediates: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    def example(config: ZerOmicsCellsConfig) -> dict[str, jax.Array]:
        """Smallest inputs of a call, by name."""
        return {"bins": jnp.zeros((1, 1), jnp.uint8), "genes": jnp.zeros((1, 1), jnp.int32)}

    @staticmethod
    def check_inputs(config: ZerOmicsCellsConfig, inputs: Mapping[str, Any]) -> None:
        """Raise `DataError` unless the inputs fit; values are looked at where they are known (not traced)."""
        bins, genes = inputs["bins"], inputs.get("genes")
        check_shape("bins", bins, ("cells", "genes"))
        check_range("bins", bins, config.mask)
        if genes is None and bins.shape[1] != config.num_genes:
            raise DataError(f"bins have {bins.shape[1]} genes, but the model has {config.num_genes}.")
        if genes is not None:
            check_shape("genes", genes, bins.shape, advice="give the shape of bins")
            check_range("genes", genes + 1, config.num_genes)

    @staticmethod
    def flops(config: ZerOmicsCellsConfig, batch: int, length: int) -> float:
        """Operations of the matrix products of one forward pass without heads; a multiply-add counts as two."""
        width = config.embed_dim
        layer = 4 * width**2 + 2 * length * width + 2 * width * config.ffn_dim
        if config.encoder == "weighted":
            layer = 0
        features = min(config.num_genes, batch * length) * config.feature_dim * width
        return 2.0 * (batch * length * config.num_layers * layer + features)

    def setup(self) -> None:
        """Declare the parts."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        init = jax.nn.initializers.normal(0.02)
        if config.encoder == "transformer":
            self.bin = Embed(config.num_bins + 2, config.embed_dim, dtype, init, (None, axes.EMBED))
            self.layers = stack(BertLayer, config.layer, config.num_layers, config.remat, "layers", seen=1)
        shape = (config.num_genes, config.feature_dim)
        self.features = axes.param(self, "features", axes.zeros, shape, (None, axes.CHANNEL_IN))
        self.project = Linear(config.embed_dim, (axes.CHANNEL_IN, axes.EMBED), dtype=dtype)
        self.bin_head = Linear(config.num_bins + 1, (axes.EMBED, axes.CHANNEL), dtype=dtype, kernel_init=init)
        self.gene_head = Linear(
            config.num_genes, (axes.EMBED, axes.TEXT_VOCAB), dtype=dtype, kernel_init=init
        )

    def hidden_states(self, bins: jax.Array, genes: jax.Array | None = None) -> jax.Array:
        """Vectors (B, S, D) of genes; arguments as in a call."""
        segments = None
        if genes is None:
            text = self.project(self.features)
        elif genes.size < self.config.num_genes:
            text = self.project(jnp.take(self.features, jnp.maximum(genes, 0), axis=0))
        else:
            text = jnp.take(self.project(self.features), jnp.maximum(genes, 0), axis=0)
        if genes is not None:
            segments = (genes >= 0).astype(jnp.int32)
        if self.config.encoder == "weighted":
            return self._weighted(bins, text, segments)
        x = axes.constrain(self.bin(bins) + text, axes.BATCH, axes.LENGTH, None)
        x, _ = self.layers(x, Mask(segments, segments))
        return x

    def _weighted(self, bins: jax.Array, text: jax.Array, valid_mask: jax.Array | None) -> jax.Array:
        """Texts (B, S, D) times the bins, whose mean over a cell's genes is made one; a masked bin is 0."""
        weights = jnp.where(bins == self.config.mask, 0, bins).astype(jnp.float32)
        genes = bins.shape[1] if valid_mask is None else valid_mask.sum(axis=1, keepdims=True)
        weights = weights * genes / jnp.maximum(weights.sum(axis=1, keepdims=True), 1.0)
        return weights[..., None].astype(text.dtype) * text

    def bin_logits(self, hidden: jax.Array) -> jax.Array:
        """Scores float32 (..., num_bins + 1) of bins, zero included, of vectors (..., D)."""
        return self.bin_head(hidden).astype(jnp.float32)

    def gene_logits(self, hidden: jax.Array) -> jax.Array:
        """Scores float32 (..., G) of the items of the gene corpus, of vectors (..., D)."""
        return self.gene_head(hidden).astype(jnp.float32)

    def __call__(self, bins: jax.Array, genes: jax.Array | None = None) -> dict[str, jax.Array]:
        """Compute a vector for each gene of each cell, which depends on the whole cell.

        Parameters
        ----------
        bins
            Tokens, integers (B, S): 0 unexpressed, 1 .. num_bins, num_bins + 1 masked.
        genes
            Numbers (B, S) of the genes in the vocabulary, -1 where there is none; without them the S = G genes of the
            vocabulary, in its order.

        Returns
        -------
        `hidden` (B, S, D), and `cell_embedding` float32 (B, D), its mean over the genes without padding.
        """
        hidden = self.hidden_states(bins, genes)
        if self.is_initializing():
            self.bin_logits(hidden), self.gene_logits(hidden)
        valid_mask = jnp.ones(bins.shape) if genes is None else (genes >= 0).astype(jnp.float32)
        total = jnp.einsum("bsd,bs->bd", hidden.astype(jnp.float32), valid_mask)
        return {
            "hidden": hidden,
            "cell_embedding": total / jnp.maximum(valid_mask.sum(axis=1, keepdims=True), 1.0),
        }
