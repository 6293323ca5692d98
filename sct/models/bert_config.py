"""Define the configuration of the BERT encoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from sct.checks import check_multiple, check_share
from sct.models.card_text import CardText
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
        Number of tokens in the vocabulary (V).
    embed_dim, num_layers, num_heads, ffn_dim
        Width (D), number of layers, number of attention heads (which must divide D), and width of the feed-forward
        layers.
    max_length
        Largest number of tokens in a text, which is the number of rows in the table of position embeddings.
    num_types
        Number of token types. The type of a token says whether it belongs to the first text, the second text, and so
        on.
    norm_eps
        Epsilon of the layer norms.
    activation
        Activation in the feed-forward layers and in the MLM head: "gelu" (exact), "gelu_tanh" or "relu".
    pooler
        Whether the model has a pooler: a dense layer with tanh on the first token.
    mlm_head
        Whether the model has a masked-language-model (MLM) head, which scores the tokens of the vocabulary.
    tied
        Whether the MLM head uses the token embeddings as its weights.
    dropout
        Dropout rate of the embeddings and of the outputs of attention and feed-forward, in training only.
    remat
        What each layer saves for the backward pass: "level" saves only the layer's inputs, "products" also the outputs
        of matrix products, "none" everything.
    dtype
        Data type in which the layers compute. Parameters, norms and logits are always float32.
    """

    CARD: ClassVar[CardText] = CardText(
        title="BERT text model",
        summary="A text model that computes feature vectors of texts about genes, for the ZerOmics cell model.",
        use="Features of gene texts (`sct.gene_features`). The model is meant for research.",
        limits=("The model reads text only, no cells.",),
        tags=("feature-extraction",),
    )

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
        """Return configuration values in which a `vocab_size` of 0 is replaced by the tokenizer's number of tokens."""
        return {**values, "vocab_size": values.get("vocab_size", cls.vocab_size) or vocab_size}
