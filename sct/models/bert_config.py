"""Configuration of the BERT encoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sct.checks import check_multiple, check_share
from sct.models.checks import check_fields

_CHOICES = {
    "activation": ("gelu", "gelu_tanh", "relu"),
    "remat": ("none", "products", "level"),
    "dtype": ("float32", "bfloat16", "float16"),
}
_LEAST = ("vocab_size", "embed_dim", "num_layers", "num_heads", "ffn_dim", "max_length", "num_types")


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Architecture of BERT (Devlin et al. 2019); the defaults are BERT-base, uncased.

    Parameters
    ----------
    vocab_size
        Tokens of the vocabulary (V).
    embed_dim, num_layers, num_heads, ffn_dim
        Width (D), layers, heads, a divisor of the width, and width of the feed-forward.
    max_length
        Positions of the learned table.
    num_types
        Token types: first text, second text, and so on.
    norm_eps
        Epsilon of the layer norms.
    activation
        Between the two dense layers, and in the head: "gelu" (exact), "gelu_tanh" or "relu".
    pooler
        Whether there is a dense layer over the first token.
    mlm_head
        Whether there is a head that scores the tokens of the vocabulary.
    tied
        Whether that head shares the table of token embeddings.
    dropout
        Share left out of the embeddings and of what each branch adds, in training only.
    remat
        What layers keep for the backward pass: "level" their inputs, "products" the outputs of matrix products too,
        "none" everything.
    dtype
        Type of the computation; parameters, norms and logits stay float32.
    """

    vocab_size: int = 30_522
    embed_dim: int = 768
    num_layers: int = 12
    num_heads: int = 12
    ffn_dim: int = 3072
    max_length: int = 512
    num_types: int = 2
    norm_eps: float = 1e-12
    activation: str = "gelu"
    pooler: bool = True
    mlm_head: bool = True
    tied: bool = True
    dropout: float = 0.0
    remat: str = "none"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_fields(self, _CHOICES, dict.fromkeys(_LEAST, 1))
        check_multiple("embed_dim", self.embed_dim, self.num_heads, "num_heads")
        check_share("dropout", self.dropout, one=False)

    @classmethod
    def fit(cls, values: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
        """Values of a configuration with `vocab_size` 0 replaced by a tokenizer's size."""
        return {**values, "vocab_size": values.get("vocab_size", cls.vocab_size) or vocab_size}
