"""Configuration of sCT."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from sct.checks import check_at_least, check_multiple
from sct.errors import ConfigError
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
}


@dataclasses.dataclass(frozen=True)
class SCTConfig:
    """Architecture of sCT; the defaults are the published model at 19,968 gene positions.

    Parameters
    ----------
    num_genes
        Gene positions of a cell, a multiple of 2 ** num_downsamples (pad the vocabulary up to it).
    num_bins
        Expression levels, zero included (5: unexpressed and four levels). PAD is `num_bins`, MASK is
        `num_bins + 1`, the alphabet has `num_bins + 2` tokens.
    token_embed_dim, embed_dim
        Width before the tower and in the transformer; widths between them grow linearly.
    num_downsamples
        Levels of the tower; each halves the number of positions.
    num_layers, num_heads, ffn_dim
        Transformer blocks, heads, and width of the gated feed-forward.
    num_hidden_layers_head
        Hidden layers of the head, each `embed_dim` wide.
    stem_kernel_size, conv_kernel_size
        Kernel lengths of the stem and of the towers.
    use_skip_connection
        Whether a level's input is added to the matching level of the deconvolution tower.
    norm
        "shared" (the paper), "shared_fixed" (no learnable scale and bias), "layer" or "none".
    pool
        "avg" as in the published checkpoint, "max" as in the paper's text.
    conv_boundary
        "flat": convolutions run over the flat cells-by-genes sequence and see across cell borders, as in the
        paper; "cell": they stay inside a cell.
    rotary
        Rotary position embedding over the whole flat sequence; False makes the transformer blind to order.
    use_spatial, spatial_encoding, num_scales, sigma_min, sigma_max
        Encoding of coordinates, see `sct.nn.spatial.spatial_features`.
    layer_norm_eps
        Epsilon of every norm.
    remat
        What levels and blocks save for the backward pass, beside their inputs: "level" nothing, for the least memory;
        "products" the outputs of convolutions and matrix products (not the scores of attention), so that only cheap
        operations are computed again; "none" everything. For levels in chunks (on CPU) see `sct.nn.execution`.
    dtype
        Type of the computation; parameters, norms and logits stay float32.
    """

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

    def __post_init__(self) -> None:
        check_fields(self, _CHOICES, _LEAST)
        if self.sigma_min > self.sigma_max:
            raise ConfigError(
                f"sigma_min is {self.sigma_min} and sigma_max is {self.sigma_max}, but 0 < sigma_min <= "
                "sigma_max is needed."
            )
        check_multiple(
            "num_genes",
            self.num_genes,
            2**self.num_downsamples,
            f"2 to the power of num_downsamples, {self.num_downsamples}",
            advice=f"use {pad_to_multiple(self.num_genes, self.num_downsamples)}",
        )
        if self.use_skip_connection:
            advice = "use such a number, or set use_skip_connection=False"
            check_multiple("token_embed_dim", self.token_embed_dim, 32, advice=advice)
        advice = f"use a multiple of {math.lcm(32, 2 * self.num_heads)}"
        check_multiple("embed_dim", self.embed_dim, 32, advice=advice)
        check_multiple("embed_dim", self.embed_dim, 2 * self.num_heads, "twice num_heads", advice=advice)

    @classmethod
    def fit(cls, values: Mapping[str, Any], num_genes: int) -> dict[str, Any]:
        """Values of a configuration with `num_genes` 0 or absent replaced by a vocabulary's size, padded."""
        levels = values.get("num_downsamples", cls.num_downsamples)
        check_at_least("num_downsamples", levels, 1, most=MOST["num_downsamples"])
        return {**values, "num_genes": values.get("num_genes") or pad_to_multiple(num_genes, levels)}

    @property
    def pad(self) -> int:
        """Token of a gene position or cell that is not there."""
        return self.num_bins

    @property
    def mask(self) -> int:
        """Token of a masked position."""
        return self.num_bins + 1

    @property
    def filters(self) -> tuple[int, ...]:
        """Widths at the borders of the levels: `num_downsamples + 1` numbers, multiples of 32."""
        widths = np.linspace(self.token_embed_dim, self.embed_dim, self.num_downsamples + 1)
        return tuple(int(32 * np.ceil(width / 32)) for width in widths)


def pad_to_multiple(num_genes: int, num_downsamples: int) -> int:
    """Smallest number of gene positions >= `num_genes` that `num_downsamples` halvings divide."""
    step = 2**num_downsamples
    return -(-num_genes // step) * step
