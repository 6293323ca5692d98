"""Define the configurations of text decoders: GPT-2, GPT-NeoX (Pythia) and LLaMA.

All three share one architecture with different options.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from sct.checks import check_multiple, check_share
from sct.errors import ConfigError
from sct.models.card_text import CardText
from sct.models.checks import check_fields
from sct.nn.attention import rotary_frequencies

_CHOICES = {
    "positions": ("learned", "rotary"),
    "rotary_scaling": ("", "linear", "llama3"),
    "norm": ("layer", "rms"),
    "mlp": ("gelu_tanh", "gelu", "swiglu"),
    "init": ("normal", "xavier"),
    "remat": ("none", "products", "level"),
    "dtype": ("float32", "bfloat16", "float16"),
}
_LEAST = {
    "vocab_size": 1, "embed_dim": 1, "num_layers": 1, "num_heads": 1, "num_kv_heads": 0, "head_dim": 0, "ffn_dim": 1,
    "max_length": 1, "rotary_length": 1,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Architecture of a causal transformer over text tokens.

    Parameters
    ----------
    vocab_size
        Number of tokens in the vocabulary (V).
    embed_dim, num_layers, num_heads, ffn_dim
        Width (D), number of blocks, number of query heads (H), and width of the feed-forward layers.
    num_kv_heads
        Number of key and value heads, which must divide `num_heads` (grouped-query attention). 0 means `num_heads`.
    head_dim
        Number of features of an attention head. 0 means embed_dim / num_heads.
    max_length
        With learned positions, the number of rows in the table of position embeddings, which limits the length of
        texts. With rotary positions, the number of tokens in the longest texts that the model was trained for.
    positions
        "learned" adds a learned vector per position to the tokens. "rotary" applies rotary position embedding to
        queries and keys.
    rotary_fraction, rotary_base
        Fraction of a head's features that is rotated, and base of the frequencies.
    rotary_scaling, rotary_factor, rotary_low, rotary_high, rotary_length
        How the rotary frequencies are changed so that the model can read longer texts. "" keeps all frequencies.
        "linear" divides them by `rotary_factor`. "llama3" (Llama 3.1) divides the frequencies with a wavelength above
        rotary_length / rotary_low, keeps those with a wavelength below rotary_length / rotary_high, and interpolates
        between the two.
    norm, norm_eps
        Norm before attention, before feed-forward and after the last block ("layer" or "rms"), and its epsilon.
    mlp
        Feed-forward layer: "gelu_tanh", "gelu" (exact), or "swiglu", which is silu(x gate) * (x up).
    attention_bias, out_bias, mlp_bias
        Whether there are biases in the projections to queries, keys and values, in the output projection of attention,
        and in the feed-forward layer.
    parallel
        Whether attention and feed-forward both get the input of the block, and both outputs are added to this input
        (GPT-NeoX). Otherwise, feed-forward gets the sum of the input and the output of attention.
    tied
        Whether the output head uses the token embeddings as its weights.
    dropout
        Dropout rate of the embeddings and of the outputs of attention and feed-forward, in training only. Attention
        weights have no dropout, because flash attention does not support it.
    init
        Initialization of the parameters: "normal" with standard deviation 0.02, or smaller for matrices whose outputs
        are added to a residual connection (Radford et al. 2019); or "xavier" (Glorot & Bengio 2010), which
        Cell2Sentence uses (appendix C).
    remat
        What each block saves for the backward pass: "level" saves only the block's inputs, "products" also the outputs
        of matrix products, "none" everything.
    dtype
        Data type in which the layers compute. Parameters, norms and logits are always float32.
    """

    CARD: ClassVar[CardText] = CardText(
        title="Language model for cell sentences",
        summary="A causal language model reads and writes cells as sentences: lists of gene names, from the highest to "
        'the lowest count. Paper: "Cell2Sentence: Teaching Large Language Models the Language of Biology".',
        use="Generation of cells with given labels, annotation of cells with labels, and embedding of cells, if the "
        "model was trained on cell sentences. The model is meant for research.",
        limits=(
            "A cell sentence holds ranks of genes, so counts are only estimated from the ranks.",
            "Generated cells repeat the composition and the errors of the training studies.",
            "Only labels that occur in the training studies can be generated or predicted.",
            "The model is not validated for diagnosis or treatment.",
        ),
        example='sct.tl.annotate(adata, model)  # adata.obs["sct_label"]',
        tags=("transcriptomics", "cell-sentences", "text-generation"),
    )

    vocab_size: int = 50_257
    embed_dim: int = 768
    num_layers: int = 12
    num_heads: int = 12
    num_kv_heads: int = 0
    head_dim: int = 0
    ffn_dim: int = 3072
    max_length: int = 1024
    positions: str = "learned"
    rotary_fraction: float = 1.0
    rotary_base: float = 10_000.0
    rotary_scaling: str = ""
    rotary_factor: float = 1.0
    rotary_low: float = 1.0
    rotary_high: float = 4.0
    rotary_length: int = 8192
    norm: str = "layer"
    norm_eps: float = 1e-5
    mlp: str = "gelu_tanh"
    attention_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    parallel: bool = False
    tied: bool = True
    dropout: float = 0.0
    init: str = "normal"
    remat: str = "none"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_fields(self, _CHOICES, _LEAST)
        if not self.head_dim:
            check_multiple(
                "embed_dim",
                self.embed_dim,
                self.num_heads,
                "num_heads",
                advice="change one of them, or set head_dim",
            )
        if self.num_heads % self.kv_heads:
            raise ConfigError(
                f"num_kv_heads is {self.num_kv_heads}, but must be a divisor of num_heads ({self.num_heads}): change "
                "one of the two."
            )
        if self.positions == "rotary" and (self.rotary_dim < 2 or self.rotary_dim % 2):
            raise ConfigError(
                f"rotary_fraction is {self.rotary_fraction}, which rotates {self.rotary_dim} of the {self.head_size} "
                "features of a head, but the number of rotated features must be even and at least 2: change "
                "rotary_fraction."
            )
        if self.rotary_scaling == "llama3" and self.rotary_low >= self.rotary_high:
            raise ConfigError(
                f"rotary_low is {self.rotary_low}, but must be smaller than rotary_high ({self.rotary_high}): change "
                "one of them."
            )
        check_share("dropout", self.dropout, one=False)

    @classmethod
    def fit(cls, values: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
        """Return configuration values in which a `vocab_size` of 0 is replaced by the tokenizer's number of tokens."""
        return {**values, "vocab_size": values.get("vocab_size", cls.vocab_size) or vocab_size}

    @classmethod
    def with_length(cls, values: Mapping[str, Any], length: int) -> dict[str, Any]:
        """Return the configuration values with which an existing model is trained further on rows of `length` tokens.

        With rotary positions, `max_length` is raised to `length` if `max_length` is smaller. With learned positions,
        `max_length` does not change, because it is the number of rows in the table of position embeddings.
        """
        if values["positions"] != "rotary":
            return dict(values)
        return {**values, "max_length": max(values["max_length"], length)}

    @property
    def kv_heads(self) -> int:
        """Return the number of key and value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        """Return the number of features of a head."""
        return self.head_dim or self.embed_dim // self.num_heads

    @property
    def rotary_dim(self) -> int:
        """Return the number of features of a head that rotary position embedding rotates."""
        return int(self.head_size * self.rotary_fraction)

    def frequencies(self) -> jax.Array:
        """Return the rotation angle of each pair of features, in radians per position.

        The result has the shape (rotary_dim / 2,), float32.
        """
        plain = rotary_frequencies(self.rotary_dim, self.rotary_base)
        if self.rotary_scaling == "linear":
            return plain / self.rotary_factor
        if self.rotary_scaling == "llama3":
            turns = (
                self.rotary_length * plain / (2 * math.pi)
            )  # full rotations within the original training length
            kept = jnp.clip((turns - self.rotary_low) / (self.rotary_high - self.rotary_low), 0.0, 1.0)
            return plain * (kept + (1.0 - kept) / self.rotary_factor)
        return plain


@dataclasses.dataclass(frozen=True)
class GPT2Config(DecoderConfig):
    """Architecture of GPT-2. The default sizes are those of GPT-2 small.

    GPT-2 medium has 24 layers, width 1,024 and 16 heads. GPT-2 large has 36 layers, width 1,280 and 20 heads.
    """


@dataclasses.dataclass(frozen=True)
class NeoXConfig(DecoderConfig):
    """Architecture of GPT-NeoX. The default sizes are those of Pythia-160m."""

    vocab_size: int = 50_304
    max_length: int = 2048
    positions: str = "rotary"
    rotary_fraction: float = 0.25
    mlp: str = "gelu"
    parallel: bool = True
    tied: bool = False


@dataclasses.dataclass(frozen=True)
class LlamaConfig(DecoderConfig):
    """Architecture of LLaMA 1, 2 and 3. The default sizes are those of LLaMA-2-7B."""

    vocab_size: int = 32_000
    embed_dim: int = 4096
    num_layers: int = 32
    num_heads: int = 32
    ffn_dim: int = 11_008
    max_length: int = 4096
    positions: str = "rotary"
    norm: str = "rms"
    mlp: str = "swiglu"
    attention_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False
