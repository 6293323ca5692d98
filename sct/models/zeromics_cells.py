"""Define the cell model of ZerOmics: a transformer over the genes of a cell.

The input for each gene is the sum of an embedding of its expression bin and a projection of its text feature.

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
from sct.models.card_text import CardText
from sct.models.checks import check_fields, check_range
from sct.nn import axes
from sct.nn.chunked_attention import Mask
from sct.nn.linear import Embed, Linear
from sct.nn.stack import stack

ENCODERS = ("transformer", "weighted")
# Path of the text features of genes, which are never trained.
FEATURES = "params/features"


@dataclasses.dataclass(frozen=True)
class ZerOmicsCellsConfig:
    """Architecture of the cell model. The defaults are those of the paper, with text features from LLaMA-2-13B.

    Parameters
    ----------
    num_genes
        Number of genes in the vocabulary (G).
    feature_dim
        Width of a gene's text feature (F): the hidden size of the text model that computed it.
    num_bins
        Number of expression bins for non-zero values. Two more tokens stand for zero and for masked genes.
    embed_dim, num_layers, num_heads, ffn_dim
        Width (D), number of layers, number of attention heads, and width of the feed-forward layers.
    norm_eps, activation, dropout, remat, dtype
        See `sct.models.bert_config.BertConfig`.
    encoder
        "transformer" or "weighted". "weighted" has no transformer layers; it is an ablation of the second training
        stage (paper, Table 5, "GenePT"). The weighted model projects the text feature of each gene and multiplies the
        result by the gene's bin. The cell embedding is a weighted mean of the genes' text features.
    """

    CARD: ClassVar[CardText] = CardText(
        title="ZerOmics cell model",
        summary="A transformer over the genes of a cell reads bins of expression, and features of gene texts. "
        'Paper: "ZerOmics: toward general models for single-cell analysis with instruction tuning".',
        use="Embedding of single cells, and the cell model of a ZerOmics model that answers questions. The model is "
        "meant for research.",
        limits=(
            "The model reads bins of expression, not counts.",
            "Features of genes carry over what their texts say, including errors of the texts.",
            "Results on tissues, species or technologies that are not among the training studies may be worse.",
            "The model is not validated for diagnosis or treatment.",
        ),
        example='sct.tl.embed(adata, model)  # adata.obsm["X_sct"]',
        tags=("transcriptomics", "cell-embedding"),
    )

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
        """Return configuration values in which every size of 0 is replaced by the actual size.

        `num_genes` is set to the size of the vocabulary, and `feature_dim` is set to its default.
        """
        width = values.get("feature_dim") or cls.feature_dim
        return {**values, "num_genes": values.get("num_genes") or num_genes, "feature_dim": width}

    @property
    def mask(self) -> int:
        """Return the mask token, which replaces the bin of a masked gene."""
        return self.num_bins + 1

    @property
    def layer(self) -> BertConfig:
        """Return the configuration of the transformer layers."""
        return BertConfig(
            vocab_size=self.num_bins + 2, embed_dim=self.embed_dim, num_layers=self.num_layers,
            num_heads=self.num_heads, ffn_dim=self.ffn_dim, norm_eps=self.norm_eps, activation=self.activation,
            pooler=False, mlm_head=False, dropout=self.dropout, remat=self.remat, dtype=self.dtype,
        )  # fmt: skip


class ZerOmicsCells(nn.Module):
    """Cell model of ZerOmics, with heads for bins and for genes; see `ZerOmicsCellsConfig`."""

    config: ZerOmicsCellsConfig
    outputs: ClassVar[tuple[str, ...]] = ("hidden", "cell_embedding")
    intermediates: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    def example(config: ZerOmicsCellsConfig) -> dict[str, jax.Array]:
        """Return the smallest valid inputs of one call, as a dict by argument name."""
        return {"bins": jnp.zeros((1, 1), jnp.uint8), "genes": jnp.zeros((1, 1), jnp.int32)}

    @staticmethod
    def check_inputs(config: ZerOmicsCellsConfig, inputs: Mapping[str, Any]) -> None:
        """Raise `DataError` unless the inputs fit the model. Values of traced arrays are not checked."""
        bins, genes = inputs["bins"], inputs.get("genes")
        check_shape("bins", bins, ("cells", "genes"))
        check_range("bins", bins, config.mask)
        if genes is None and bins.shape[1] != config.num_genes:
            raise DataError(
                f"`bins` has {bins.shape[1]} genes per cell, but the model has {config.num_genes} genes: pass "
                "`genes`, an array that gives, for each gene in `bins`, its index in the model's vocabulary."
            )
        if genes is not None:
            check_shape("genes", genes, bins.shape, advice="give genes the same shape as bins")
            check_range("genes", genes, config.num_genes - 1, least=-1)

    @staticmethod
    def flops(config: ZerOmicsCellsConfig, batch: int, length: int) -> float:
        """Count the operations of all matrix products in one forward pass without the heads.

        A multiply-add counts as two. `batch` is the number of cells, and `length` the number of genes in each.
        """
        width = config.embed_dim
        layer = 4 * width**2 + 2 * length * width + 2 * width * config.ffn_dim
        if config.encoder == "weighted":
            layer = 0
        features = min(config.num_genes, batch * length) * config.feature_dim * width
        return 2.0 * (batch * length * config.num_layers * layer + features)

    def setup(self) -> None:
        """Declare the layers of the model."""
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
        """Compute the hidden vectors (B, S, D) of genes. See `__call__` for the arguments."""
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
        """Multiply each gene's projected text feature (B, S, D) by the gene's bin (B, S) and return (B, S, D).

        The bins are first scaled so that their mean over the genes of a cell is 1. A masked bin counts as 0.
        """
        weights = jnp.where(bins == self.config.mask, 0, bins).astype(jnp.float32)
        genes = bins.shape[1] if valid_mask is None else valid_mask.sum(axis=1, keepdims=True)
        weights = weights * genes / jnp.maximum(weights.sum(axis=1, keepdims=True), 1.0)
        return weights[..., None].astype(text.dtype) * text

    def bin_logits(self, hidden: jax.Array) -> jax.Array:
        """Compute logits of the bins (zero included), float32 (..., num_bins + 1), from hidden vectors (..., D)."""
        return self.bin_head(hidden).astype(jnp.float32)

    def gene_logits(self, hidden: jax.Array) -> jax.Array:
        """Compute the logits of the genes of the vocabulary, float32 (..., G), from hidden vectors (..., D)."""
        return self.gene_head(hidden).astype(jnp.float32)

    def __call__(self, bins: jax.Array, genes: jax.Array | None = None) -> dict[str, jax.Array]:
        """Compute a hidden vector for each gene of a cell, from all genes of the cell.

        Parameters
        ----------
        bins
            Expression bins, integers (B, S): 0 is unexpressed, 1 to num_bins are bins, and num_bins + 1 is the mask.
        genes
            Index of each gene in the vocabulary, integers (B, S); -1 marks padding. None means that the S = G genes are
            all genes of the vocabulary, in order.

        Returns
        -------
        A dict with `hidden` (B, S, D), and `cell_embedding`, float32 (B, D), the mean of `hidden` over the genes that
        are not padding.
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
