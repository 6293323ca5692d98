"""Define the configuration of the sCT model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from sct.checks import check_at_least, check_multiple
from sct.errors import ConfigError
from sct.models.card_text import CardText
from sct.models.checks import MOST, check_fields
from sct.nn.norm import EPSILON

_CHOICES = {
    "norm": ("shared", "shared_fixed", "layer", "none"),
    "pool": ("avg", "max"),
    "conv_boundary": ("flat", "cell"),
    "spatial_encoding": ("paper", "reference"),
    "remat": ("none", "products", "level"),
    "dtype": ("float32", "bfloat16", "float16"),
}
_LEAST = {
    "num_genes": 1,
    "num_bins": 2,
    "token_embed_dim": 1,
    "embed_dim": 1,
    "num_downsamples": 1,
    "num_layers": 0,
    "num_heads": 1,
    "ffn_dim": 1,
    "num_hidden_layers_head": 0,
    "stem_kernel_size": 1,
    "conv_kernel_size": 1,
    "num_scales": 1,
    "code_dim": 0,
}


@dataclasses.dataclass(frozen=True)
class SCTConfig:
    """Architecture of sCT. The defaults are the published model with 19,968 gene positions.

    Parameters
    ----------
    num_genes
        Number of gene positions per cell, a multiple of 2 ** num_downsamples. Smaller vocabularies are padded to this
        number.
    num_bins
        Number of expression levels, including zero; 5 means unexpressed and four expressed levels. The PAD token is
        `num_bins` and the MASK token is `num_bins + 1`, so there are `num_bins + 2` tokens.
    token_embed_dim, embed_dim
        Width of the token embeddings, and width of the transformer. The widths of the tower levels grow linearly from
        `token_embed_dim` to `embed_dim`.
    num_downsamples
        Number of levels in each tower. Each level of the convolution tower halves the number of positions.
    num_layers, num_heads, ffn_dim
        Number of transformer blocks, number of attention heads, and width of the gated feed-forward layers.
    num_hidden_layers_head
        Number of hidden layers in the head, each of width `embed_dim`.
    stem_kernel_size, conv_kernel_size
        Kernel sizes of the convolutions in the stem and in the towers.
    use_skip_connection
        Whether the input of each level of the convolution tower is added to the output of the matching level of the
        deconvolution tower.
    norm
        Norm in the towers: "shared" (as in the paper), "shared_fixed" (without learnable scale and bias), "layer" or
        "none".
    pool
        Pooling in the convolution tower: "avg" (as in the published checkpoint) or "max" (as in the paper's text).
    conv_boundary
        With "flat", convolutions run over the flat cells-by-genes sequence and cross the borders between cells, as in
        the paper. With "cell", they do not cross these borders.
    rotary
        Whether the transformer uses rotary position embedding, over the whole flat sequence. Without rotary position
        embedding, the order of the positions does not affect the transformer.
    use_spatial
        Whether the model reads cell coordinates.
    spatial_encoding, num_scales, sigma_min, sigma_max
        Encoding of the cell coordinates ("paper", or "reference" as in the published checkpoint), number of scales, and
        the two constants of the scales, in units of the rescaled coordinates; see `sct.nn.spatial.spatial_features`.
    layer_norm_eps
        Epsilon of every norm.
    remat
        What tower levels and transformer blocks save for the backward pass in addition to their inputs. "level" saves
        nothing and needs the least memory. "products" saves the outputs of convolutions and matrix products (but not
        attention scores), so that only cheap operations are recomputed. "none" saves everything. On CPU, tower levels
        run in chunks and save other values; see `sct.nn.execution`.
    dtype
        Data type in which the layers compute. Parameters, norms and logits are always float32.
    code_dim
        Width of the code of a cell: a linear map of the cell's transformer output, from which a decoder predicts the
        expression levels of all genes (`sct.models.cell_code`). 0, as in the paper: no code and no decoder. The
        objective option `cell_decoding` trains the code.
    """

    CARD: ClassVar[CardText] = CardText(
        title="sCT: levels of masked genes in groups of cells",
        summary="sCT reads up to 20,000 genes of a group of cells (a bag) at once, with a convolution tower, a "
        'transformer and a deconvolution tower. It predicts the expression levels of masked genes. Paper: "A long '
        'range foundation model for zero-shot predictions in single-cell and spatial transcriptomics data".',
        use="Embedding, annotation by label transfer, and imputation of genes and cells, in single-cell and spatial "
        "transcriptomics of human or mouse. The model is meant for research.",
        limits=(
            "The embedding and the imputation of a cell depend on the other cells of its bag.",
            "The model predicts levels of counts, not exact counts.",
            "Results on tissues, species or technologies that are not among the training studies may be worse.",
            "The model is not validated for diagnosis or treatment.",
        ),
        example='sct.tl.embed(adata, model)  # adata.obsm["X_sct"]',
        tags=("transcriptomics", "gene-imputation", "cell-embedding"),
    )

    num_genes: int = 19_968
    num_bins: int = 5
    token_embed_dim: int = 64
    embed_dim: int = 1024
    num_downsamples: int = 8
    num_layers: int = 4
    num_heads: int = 16
    ffn_dim: int = 2048
    num_hidden_layers_head: int = 1
    stem_kernel_size: int = dataclasses.field(default=15, metadata={"formerly": "stem_taps"})
    conv_kernel_size: int = dataclasses.field(default=5, metadata={"formerly": "conv_taps"})
    use_skip_connection: bool = True
    norm: str = "shared"
    pool: str = "avg"
    conv_boundary: str = "flat"
    rotary: bool = True
    use_spatial: bool = False
    spatial_encoding: str = "paper"
    num_scales: int = 10
    sigma_min: float = 1.0
    sigma_max: float = 10.0
    layer_norm_eps: float = EPSILON
    remat: str = "none"
    dtype: str = "float32"
    code_dim: int = 0

    def __post_init__(self) -> None:
        check_fields(self, _CHOICES, _LEAST)
        if self.sigma_min > self.sigma_max:
            raise ConfigError(
                f"sigma_min is {self.sigma_min} and sigma_max is {self.sigma_max}, but sigma_min must not exceed "
                "sigma_max: change one of them."
            )
        check_multiple(
            "num_genes",
            self.num_genes,
            2**self.num_downsamples,
            f"2 to the power of num_downsamples, {self.num_downsamples}",
            advice=f"use {pad_to_multiple(self.num_genes, self.num_downsamples)}",
        )
        if self.use_skip_connection:
            advice = "use a multiple of 32, or set use_skip_connection=False"
            check_multiple("token_embed_dim", self.token_embed_dim, 32, advice=advice)
        advice = f"use a multiple of {math.lcm(32, 2 * self.num_heads)}"
        check_multiple("embed_dim", self.embed_dim, 32, advice=advice)
        check_multiple("embed_dim", self.embed_dim, 2 * self.num_heads, "twice num_heads", advice=advice)

    @classmethod
    def fit(cls, values: Mapping[str, Any], num_genes: int) -> dict[str, Any]:
        """Return configuration values in which `num_genes`, if missing or 0, is set to the size of the vocabulary.

        The size of the vocabulary is rounded up to a multiple of 2 ** num_downsamples.
        """
        levels = values.get("num_downsamples", cls.num_downsamples)
        check_at_least("num_downsamples", levels, 1, most=MOST["num_downsamples"])
        return {**values, "num_genes": values.get("num_genes") or pad_to_multiple(num_genes, levels)}

    @property
    def pad(self) -> int:
        """Return the id of the PAD token, which marks gene positions and cells that are padding."""
        return self.num_bins

    @property
    def mask(self) -> int:
        """Return the id of the MASK token, which replaces the expression level at masked positions."""
        return self.num_bins + 1

    @property
    def filters(self) -> tuple[int, ...]:
        """Return the width before the first tower level and the width after each level.

        There are `num_downsamples + 1` widths, all multiples of 32.
        """
        widths = np.linspace(self.token_embed_dim, self.embed_dim, self.num_downsamples + 1)
        return tuple(int(32 * np.ceil(width / 32)) for width in widths)


def pad_to_multiple(num_genes: int, num_downsamples: int) -> int:
    """Return the smallest multiple of 2 ** num_downsamples that is at least `num_genes`."""
    step = 2**num_downsamples
    return -(-num_genes // step) * step
