"""Configurations of text decoders: GPT-2, GPT-NeoX (Pythia) and LLaMA are one architecture with other options."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sct.checks import check_multiple, check_share
from sct.errors import ConfigError
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
        Tokens of the vocabulary (V).
    embed_dim, num_layers, num_heads, ffn_dim
        Width (D), blocks, heads of queries (H), and width of the feed-forward.
    num_kv_heads
        Heads of keys and values, a divisor of `num_heads` (grouped-query attention); 0: as many.
    head_dim
        Features of a head; 0: embed_dim / num_heads.
    max_length
        Positions: the size of the table of learned ones, and the longest text a rotary model was made for.
    positions
        "learned" table added to the tokens, or "rotary" embedding of queries and keys.
    rotary_fraction, rotary_base
        Share of a head's features that turn, and base of their frequencies.
    rotary_scaling, rotary_factor, rotary_low, rotary_high, rotary_length
        "linear" divides all frequencies by the factor; "llama3" (Llama 3.1) divides those whose wave is longer than
        rotary_length / rotary_low, keeps those whose wave is shorter than rotary_length / rotary_high, and goes from
        one to the other between; "" does neither.
    norm, norm_eps
        "layer" or "rms" norm before attention and feed-forward and behind the last block, and its epsilon.
    mlp
        "gelu_tanh", "gelu" (exact), or "swiglu": silu(x gate) * (x up).
    attention_bias, out_bias, mlp_bias
        Whether the projections have biases.
    parallel
        Whether attention and feed-forward see the same input and are added together (GPT-NeoX).
    tied
        Whether the head shares the table of token embeddings.
    dropout
        Share left out of the embeddings and of what each branch adds, in training only. Weights of attention are
        not left out, which flash attention could not do.
    init
        Random parameters: "normal" with standard deviation 0.02, smaller for what branches add (Radford et al.
        2019), or "xavier" (Glorot & Bengio 2010), the choice of Cell2Sentence (appendix C).
    remat
        What blocks keep for the backward pass: "level" their inputs, "products" the outputs of matrix products too,
        "none" everything.
    dtype
        Type of the computation; parameters, norms and logits stay float32.
    """

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
                advice="change one of them, or give head_dim",
            )
        if self.num_heads % self.kv_heads:
            raise ConfigError(
                f"num_kv_heads is {self.num_kv_heads}, but it must divide num_heads ({self.num_heads})."
            )
        if self.positions == "rotary" and (self.rotary_dim < 2 or self.rotary_dim % 2):
            raise ConfigError(
                f"{self.rotary_dim} of {self.head_size} features of a head would turn (rotary_fraction "
                f"{self.rotary_fraction}), but an even number of at least 2 must."
            )
        if self.rotary_scaling == "llama3" and self.rotary_low >= self.rotary_high:
            raise ConfigError(
                f"rotary_low is {self.rotary_low}, but it must be smaller than rotary_high ({self.rotary_high})."
            )
        check_share("dropout", self.dropout, one=False)

    @classmethod
    def fit(cls, values: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
        """Values of a configuration with `vocab_size` 0 replaced by a tokenizer's size."""
        return {**values, "vocab_size": values.get("vocab_size", cls.vocab_size) or vocab_size}

    @classmethod
    def with_length(cls, values: Mapping[str, Any], length: int) -> dict[str, Any]:
        """Values of a model that is trained on further rows of `length` tokens.

        Rotary positions have no limit, and `max_length` grows to that length. A table of learned ones keeps its size.
        """
        if values["positions"] != "rotary":
            return dict(values)
        return {**values, "max_length": max(values["max_length"], length)}

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        """Features of a head."""
        return self.head_dim or self.embed_dim // self.num_heads

    @property
    def rotary_dim(self) -> int:
        """Features of a head that turn."""
        return int(self.head_size * self.rotary_fraction)

    def frequencies(self) -> jax.Array:
        """Radians per position of each pair of features that turns, (rotary_dim / 2,)."""
        plain = rotary_frequencies(self.rotary_dim, self.rotary_base)
        if self.rotary_scaling == "linear":
            return plain / self.rotary_factor
        if self.rotary_scaling == "llama3":
            turns = self.rotary_length * plain / (2 * math.pi)  # within the length of the first training
            kept = jnp.clip((turns - self.rotary_low) / (self.rotary_high - self.rotary_low), 0.0, 1.0)
            return plain * (kept + (1.0 - kept) / self.rotary_factor)
        return plain


@dataclasses.dataclass(frozen=True)
class GPT2Config(DecoderConfig):
    """GPT-2 small; medium has 24 layers of width 1,024 and 16 heads, large 36 of 1,280 and 20."""


@dataclasses.dataclass(frozen=True)
class NeoXConfig(DecoderConfig):
    """GPT-NeoX; the defaults are Pythia-160m."""

    vocab_size: int = 50_304
    max_length: int = 2048
    positions: str = "rotary"
    rotary_fraction: float = 0.25
    mlp: str = "gelu"
    parallel: bool = True
    tied: bool = False


@dataclasses.dataclass(frozen=True)
class LlamaConfig(DecoderConfig):
    """LLaMA 1, 2 and 3; the defaults are LLaMA-2-7B."""

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
