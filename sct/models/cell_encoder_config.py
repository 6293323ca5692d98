"""Define the configuration of the scGPT-compatible cell encoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from sct.checks import check_at_least, check_multiple, check_share
from sct.errors import ConfigError
from sct.models.bert_config import BertConfig
from sct.models.card_text import CardText
from sct.models.checks import check_fields

VALUES = ("continuous", "category", "scaling")
CELL_EMBEDDINGS = ("cls", "avg-pool", "w-pool")
MVC = ("", "inner product", "inner product, detach", "concat query", "sum query")
_CHOICES = {
    "values": VALUES,
    "norm": ("post", "pre"),
    "cell_embedding": CELL_EMBEDDINGS,
    "domain_norm": ("", "affine", "plain"),
    "mvc": MVC,
}
_LEAST = {
    **dict.fromkeys(("vocab_size", "embed_dim", "num_layers", "num_heads", "ffn_dim", "num_bins"), 1),
    **dict.fromkeys(("pad_id", "cls_id", "num_classes", "num_batches"), 0),
    "classifier_layers": 1,
}
_MOST = {"num_bins": 65_534}  # zero, and as many quantile bins as `sct.data.cell_options.CellOptions` accepts


@dataclasses.dataclass(frozen=True)
class CellEncoderConfig:
    """Architecture of the scGPT-compatible cell encoder. The defaults are those of the whole-human model.

    Parameters
    ----------
    vocab_size
        Number of rows in the table of gene embeddings (V), special tokens included.
    pad_id, cls_id
        Rows of the padding token and of the CLS token, which is the first token of every cell.
    embed_dim, num_layers, num_heads, ffn_dim
        Width (D), number of layers, number of attention heads (which must divide D), and width of the feed-forward
        layers.
    dropout
        Dropout rate of the embeddings and of the outputs of attention and feed-forward, in training only.
    values
        How the model reads expression values. "continuous": two dense layers map a value to a vector. "category": each
        bin has an embedding. "scaling": the gene embedding is multiplied by the value.
    num_bins
        Number of values of a gene, zero included: the data has `num_bins` - 1 bins for non-zero counts.
    pad_value, mask_value
        Value of padding, and value of a masked gene. With `values="category"`, these are the bins `num_bins` and
        `num_bins` + 1.
    max_value
        With `values="continuous"`, larger values are set to this one.
    norm
        "post" (as published): layer norm after each residual connection. "pre": layer norm before attention and before
        the feed-forward layer, and no norm after the last layer.
    cell_embedding
        Which vector is the cell embedding. "cls": the output at the CLS token. "avg-pool": the mean output over all
        tokens, CLS included. "w-pool": the sum of the outputs, weighted by the expression values, scaled to length 1.
        Padding, masked genes and generated genes never count. A gene is masked if its value is `mask_value`.
    num_classes
        Number of classes of the classifier; 0 for no classifier.
    classifier_layers
        Number of dense layers of the classifier.
    num_batches
        Number of batch labels that the model knows; 0 for a model without batch labels.
    use_batch_labels
        Whether the prediction heads read an embedding of the batch label.
    domain_norm
        Batch norm of the input vectors, with separate statistics for each batch label: "" for no batch norm, "plain"
        without scale and bias, "affine" with a scale and a bias per batch label.
    mvc
        Form of the head that predicts expression values from the cell embedding ("masked value prediction for cell
        modeling"): "" for no such head, "inner product", "inner product, detach", "concat query" or "sum query".
    explicit_zero
        Whether the prediction heads also predict the probability that a value is not zero.
    dab
        Whether the model has a batch discriminator behind a gradient reversal ("domain adaptation by reverse
        backpropagation").
    value_head
        Whether the model has the head that predicts masked expression values.
    flags
        Whether the model has the learned flags that replace the values of genes to be generated.
    remat
        See `sct.models.bert_config.BertConfig`.
    dtype
        Data type in which the layers compute. Parameters, norms and predicted values are always float32.
    """

    CARD: ClassVar[CardText] = CardText(
        title="scGPT-compatible cell encoder",
        summary="A transformer reads the genes of a cell as tokens, each with its expression value. It predicts masked "
        "values, and its output at the CLS token is the cell embedding. "
        'Papers: "scGPT: toward building a foundation model for single-cell multi-omics using generative AI", and for '
        'adapters "Parameter-efficient fine-tuning enhances adaptation of scLLMs for cell type identification".',
        use="Embedding of single cells and of genes, and fine-tuning for the annotation of cell types. The model is "
        "meant for research.",
        limits=(
            "The model reads values relative to the other genes of a cell, not absolute counts.",
            "The model reads a limited number of genes of a cell. Genes beyond this number do not count.",
            "Genes without a row in the embedding table are left out.",
            "Results on tissues, species or technologies that are not among the training studies may be worse.",
            "The model is not validated for diagnosis or treatment.",
        ),
        example='sct.tl.embed(adata, model)  # adata.obsm["X_sct"]',
        tags=("transcriptomics", "cell-embedding"),
    )

    vocab_size: int = 60_697
    pad_id: int = 60_694
    cls_id: int = 60_695
    embed_dim: int = 512
    num_layers: int = 12
    num_heads: int = 8
    ffn_dim: int = 512
    dropout: float = 0.2
    values: str = "continuous"
    num_bins: int = 51
    pad_value: float = -2.0
    mask_value: float = -1.0
    max_value: float = 512.0
    norm: str = "post"
    cell_embedding: str = "cls"
    num_classes: int = 0
    classifier_layers: int = 3
    num_batches: int = 0
    use_batch_labels: bool = True
    domain_norm: str = ""
    mvc: str = ""
    explicit_zero: bool = False
    dab: bool = False
    value_head: bool = True
    flags: bool = False
    remat: str = "none"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_fields(self, _CHOICES, _LEAST, _MOST)
        check_share("dropout", self.dropout, one=False)
        check_multiple("embed_dim", self.embed_dim, self.num_heads, "num_heads")
        for name in ("pad_id", "cls_id"):
            check_at_least(name, getattr(self, name), 0, most=self.vocab_size - 1)
        if self.pad_id == self.cls_id:
            raise ConfigError(
                f"pad_id and cls_id are both {self.pad_id}, but each needs its own row: change one of them."
            )
        if not self.num_batches and (self.domain_norm or self.dab):
            option = "domain_norm" if self.domain_norm else "dab"
            raise ConfigError(
                f"{option} is set, but num_batches is 0: set num_batches to the number of batch labels."
            )
        bins = (self.num_bins, self.num_bins + 1)
        if self.values == "category" and (self.pad_value, self.mask_value) != bins:
            raise ConfigError(
                f"pad_value and mask_value are {self.pad_value:g} and {self.mask_value:g}, but with values='category' "
                f"they must be the bins {bins[0]} and {bins[1]}: change these two options."
            )
        if self.explicit_zero and self.mvc in ("concat query", "sum query"):
            raise ConfigError(
                f"explicit_zero is set and mvc is {self.mvc!r}, but only the forms with an inner product predict "
                "zeros: set mvc='inner product', or explicit_zero=False."
            )
        _ = self.layer

    @classmethod
    def fit(cls, values: Mapping[str, Any], num_genes: int) -> dict[str, Any]:
        """Return configuration values in which every size of 0 is replaced by the actual size.

        A new model gets one row per gene of the vocabulary, then one for padding and one for CLS. With
        `values="category"`, the values of padding and of masked genes are the two bins after the last one.
        """
        made = dict(values)
        if not made.get("vocab_size"):
            rows = {"pad_id": num_genes, "cls_id": num_genes + 1}
            made = {**rows, **made, "vocab_size": num_genes + 2}
        if made.get("values") == "category":
            bins = int(made.get("num_bins", cls.num_bins))
            made = {"pad_value": float(bins), "mask_value": float(bins + 1), **made}
        return made

    @property
    def layer(self) -> BertConfig:
        """Return the configuration of the transformer layers."""
        return BertConfig(
            vocab_size=self.vocab_size, embed_dim=self.embed_dim, num_layers=self.num_layers,
            num_heads=self.num_heads, ffn_dim=self.ffn_dim, norm_eps=1e-5, activation="relu", pooler=False,
            mlm_head=False, dropout=self.dropout, remat=self.remat, dtype=self.dtype,
        )  # fmt: skip

    @property
    def reads_batches(self) -> bool:
        """Return whether the prediction heads read the batch label."""
        return self.use_batch_labels and self.num_batches > 0
