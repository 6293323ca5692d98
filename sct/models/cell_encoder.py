"""Define the scGPT-compatible cell encoder: a transformer over genes and their expression values."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from sct.checks import check_shape
from sct.errors import DataError
from sct.models.bert import BertAttention, BertFeedForward, BertLayer
from sct.models.bert_config import BertConfig
from sct.models.cell_encoder_config import CELL_EMBEDDINGS, CellEncoderConfig
from sct.models.checks import check_range
from sct.nn import axes
from sct.nn.adapters import drop
from sct.nn.chunked_attention import EVERYONE, NO_ONE, Mask
from sct.nn.linear import Embed, Linear
from sct.nn.norm import LayerNorm, unit_vectors
from sct.nn.stack import stack

STATISTICS = "batch_stats"  # collection of the running statistics of the domain norm
_init = jax.nn.initializers.normal(0.02)
_leaky_relu = functools.partial(jax.nn.leaky_relu, negative_slope=0.01)
_DISCRIMINATOR_LAYERS = 3
_QUERY = 64  # width of the queries in the MVC forms "concat query" and "sum query"


class PreNormLayer(nn.Module):
    """Pre-norm transformer layer: attention, then feed-forward, each on normalized inputs with a residual connection.

    The parameters have the names of `BertLayer`.
    """

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: Mask) -> jax.Array:
        """Apply the layer to x (B, T, D) and return (B, T, D). `mask` sets which tokens attend to each other."""
        config = self.config
        y = LayerNorm(config.norm_eps, name="attention_norm")(x)
        y = BertAttention(config, name="attention")(y, y, mask)
        x = x + (drop(self, y, config.dropout) if config.dropout else y)
        y = LayerNorm(config.norm_eps, name="mlp_norm")(x)
        y = BertFeedForward(config, name="mlp")(y)
        x = x + (drop(self, y, config.dropout) if config.dropout else y)
        return axes.constrain(x, axes.BATCH, axes.LENGTH, None)


class ValueHead(nn.Module):
    """Predict one number from each vector: three dense layers with LeakyReLU between them."""

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map vectors (..., D) to numbers, float32 (...)."""
        linear = functools.partial(Linear, dtype=self.dtype)
        x = _leaky_relu(linear(self.width, (axes.EMBED, axes.MLP), name="hidden_0")(x))
        x = _leaky_relu(linear(self.width, (axes.MLP, axes.EMBED), name="hidden_1")(x))
        return linear(1, (axes.EMBED, axes.CHANNEL), name="out")(x)[..., 0].astype(jnp.float32)


class LabelHead(nn.Module):
    """Classify cells: dense layers, each with an activation and a layer norm, then a dense layer to the classes."""

    width: int
    num_classes: int
    num_layers: int
    activation: Callable[[jax.Array], jax.Array]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map cell embeddings (B, D) to logits, float32 (B, C)."""
        linear = functools.partial(Linear, dtype=self.dtype)
        for number in range(self.num_layers - 1):
            x = self.activation(linear(self.width, (axes.EMBED, axes.MLP), name=f"hidden_{number}")(x))
            x = LayerNorm(name=f"norm_{number}")(x)
        return linear(self.num_classes, (axes.EMBED, axes.CHANNEL), name="out")(x).astype(jnp.float32)


class MvcHead(nn.Module):
    """Predict the values of genes from the cell embedding c and the embedding g of each gene.

    With the inner product, the prediction is `W sigmoid(linear(g)) . c`. With "concat query" and "sum query", a
    PReLU layer of width 64 reads [c, q] or c + q, where q is `sigmoid(linear(g))`.
    """

    config: CellEncoderConfig

    @nn.compact
    def __call__(
        self, cell: jax.Array, genes: jax.Array, batch: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Predict values (B, L) and, with `explicit_zero`, the logits (B, L) that a value is not zero.

        Parameters
        ----------
        cell
            Cell embeddings (B, D).
        genes
            Gene embeddings (B, L, D).
        batch
            Embeddings of the batch labels (B, D), which only the inner products read.
        """
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        inner = config.mvc.startswith("inner product")
        if config.mvc.endswith("detach"):
            genes = jax.lax.stop_gradient(genes)
        width = _QUERY if config.mvc == "concat query" else config.embed_dim
        query = Linear(width, (axes.EMBED, axes.MLP), dtype=dtype, name="query")(genes)
        query = jax.nn.sigmoid(query)
        if inner:
            cell = cell if batch is None else jnp.concatenate([cell, batch], axis=-1)

            def product(name: str) -> jax.Array:
                names = (axes.MLP, axes.EMBED)
                layer = Linear(cell.shape[-1], names, use_bias=False, dtype=dtype, name=name)
                return jnp.einsum("bld,bd->bl", layer(query), cell.astype(dtype)).astype(jnp.float32)

            values = product("weights")
            return values, product("zero_weights") if config.explicit_zero else None
        if config.mvc == "concat query":
            shape = (*query.shape[:-1], cell.shape[-1])
            x = jnp.concatenate([jnp.broadcast_to(cell[:, None], shape), query], axis=-1)
        else:
            x = cell[:, None] + query
        x = Linear(_QUERY, (axes.EMBED, axes.MLP), dtype=dtype, name="hidden")(x)
        slope = axes.param(self, "slope", jax.nn.initializers.constant(0.25), (1,), (None,))
        x = jnp.where(x >= 0, x, slope.astype(x.dtype) * x)
        out = Linear(1, (axes.MLP, axes.CHANNEL), dtype=dtype, name="out")(x)
        return out[..., 0].astype(jnp.float32), None


class DomainNorm(nn.Module):
    """Batch norm with separate statistics, and optionally separate scales and biases, for each batch label.

    Where the collection `STATISTICS` is mutable, the layer uses the statistics of the batch of cells and updates the
    running statistics. Otherwise it uses the running statistics. Padding does not count.
    """

    num_domains: int
    affine: bool
    epsilon: float = 6.1e-5
    momentum: float = 0.1

    @nn.compact
    def __call__(self, x: jax.Array, labels: jax.Array, valid_mask: jax.Array) -> jax.Array:
        """Normalize x (B, L, D) with the statistics of the batch label of each cell, integers (B,).

        `valid_mask`, bool (B, L), is False at padding.
        """
        shape, names = (self.num_domains, x.shape[-1]), (None, axes.CHANNEL)

        def running(name: str, init: axes.Initializer) -> nn.Variable[Any]:
            make = nn.with_logical_partitioning(lambda: init(jax.random.key(0), shape, jnp.float32), names)
            return self.variable(STATISTICS, name, make)

        means, variances = running("mean", axes.zeros), running("variance", axes.ones)
        mean, variance = means.value, variances.value
        exact = x.astype(jnp.float32)
        if self.is_mutable_collection(STATISTICS) and not self.is_initializing():
            of_domain = jax.nn.one_hot(labels, self.num_domains, dtype=jnp.float32)
            seen = of_domain[:, None] * valid_mask[..., None].astype(jnp.float32)
            count = jnp.einsum("blk->k", seen)[:, None]
            mean = jnp.einsum("blk,bld->kd", seen, exact) / jnp.maximum(count, 1.0)
            square = jnp.square(exact - mean[labels][:, None])
            variance = jnp.einsum("blk,bld->kd", seen, square) / jnp.maximum(count, 1.0)
            unbiased = variance * count / jnp.maximum(count - 1.0, 1.0)
            rate = jnp.where(count > 0, self.momentum, 0.0)
            means.value = jax.lax.stop_gradient(means.value + rate * (mean - means.value))
            variances.value = jax.lax.stop_gradient(variances.value + rate * (unbiased - variances.value))
        y = (exact - mean[labels][:, None]) * jax.lax.rsqrt(variance[labels][:, None] + self.epsilon)
        if self.affine:
            scale = axes.param(self, "scale", axes.ones, shape, names)
            bias = axes.param(self, "bias", axes.zeros, shape, names)
            y = y * scale[labels][:, None] + bias[labels][:, None]
        return y.astype(x.dtype)


@jax.custom_vjp
def reverse_gradient(x: jax.Array) -> jax.Array:
    """Return x. In the backward pass, the gradient is multiplied by -1."""
    return x


reverse_gradient.defvjp(lambda x: (x, None), lambda _, gradient: (-gradient,))


class CellEncoder(nn.Module):
    """scGPT-compatible cell encoder, with the heads that its configuration names; see `CellEncoderConfig`."""

    config: CellEncoderConfig
    outputs: ClassVar[tuple[str, ...]] = ("encoder_output", "cell_emb", "mlm_output")
    # Cell embeddings of the three kinds in `CELL_EMBEDDINGS`, whichever of them the heads read.
    intermediates: ClassVar[tuple[str, ...]] = CELL_EMBEDDINGS

    @staticmethod
    def outputs_of(config: CellEncoderConfig) -> tuple[str, ...]:
        """Return the names of the outputs that a model with this configuration computes."""
        zero = config.explicit_zero
        return (
            "encoder_output", "cell_emb", *["mlm_output"] * config.value_head,
            *["mlm_zero_probs"] * (config.value_head and zero), *["cls_output"] * (config.num_classes > 0),
            *["mvc_output"] * bool(config.mvc), *["mvc_zero_probs"] * (bool(config.mvc) and zero),
            *["dab_output"] * config.dab,
        )  # fmt: skip

    @staticmethod
    def example(config: CellEncoderConfig) -> dict[str, jax.Array]:
        """Return the smallest valid inputs of one call, as a dict by argument name."""
        number = jnp.int32 if config.values == "category" else jnp.float32
        inputs = {"gene_ids": jnp.full((1, 1), config.cls_id, jnp.int32), "values": jnp.zeros((1, 1), number)}
        return {**inputs, "batch_labels": jnp.zeros(1, jnp.int32)} if config.num_batches else inputs

    @staticmethod
    def check_inputs(config: CellEncoderConfig, inputs: Mapping[str, Any]) -> None:
        """Raise `DataError` unless the inputs fit the model. Values of traced arrays are not checked."""
        genes = inputs["gene_ids"]
        check_shape("gene_ids", genes, ("cells", "genes"))
        check_range("gene_ids", genes, config.vocab_size - 1)
        for name in ("values", "padding_mask", "generated"):
            if inputs.get(name) is not None:
                check_shape(name, inputs[name], genes.shape, advice=f"give {name} the same shape as gene_ids")
        if config.values == "category":
            check_range("values", inputs["values"], config.num_bins + 1)
        for name in ("padding_mask", "generated"):
            if inputs.get(name) is not None and inputs[name].dtype != bool:
                raise DataError(
                    f"{name} has the type {inputs[name].dtype}, but must be bool: convert it to bool."
                )
        if inputs.get("generated") is not None and not config.flags:
            raise DataError(
                "`generated` needs a model with `flags=True`, but this model has no learned flags: leave it out."
            )
        if inputs.get("cell") is not None:
            check_shape("cell", inputs["cell"], (len(genes), config.embed_dim))
        labels = inputs.get("batch_labels")
        if labels is None and config.num_batches:
            raise DataError(
                f"`batch_labels` is missing, but the model reads one of {config.num_batches} batch labels for each "
                "cell: pass integers of the shape (cells,)."
            )
        if labels is not None:
            check_shape("batch_labels", labels, (len(genes),))
            check_range("batch_labels", labels, max(config.num_batches, 1) - 1)

    @staticmethod
    def flops(config: CellEncoderConfig, batch: int, length: int) -> float:
        """Count the operations of all matrix products in one forward pass, with the heads that read every gene.

        A multiply-add counts as two. `batch` is the number of cells, and `length` the number of tokens in each.
        """
        width = config.embed_dim
        layer = 4 * width**2 + 2 * length * width + 2 * width * config.ffn_dim
        values = width + width**2 if config.values == "continuous" else 0
        into = width * (1 + config.reads_batches)
        head = (into * width + width**2 + width) * (1 + config.explicit_zero) if config.value_head else 0
        if config.mvc.startswith("inner product"):
            mvc = width**2 + (width * into + into) * (1 + config.explicit_zero)
        elif config.mvc == "concat query":
            mvc = width * _QUERY + (width + _QUERY) * _QUERY + _QUERY
        else:
            mvc = width**2 + width * _QUERY + _QUERY if config.mvc else 0
        heads = [(config.classifier_layers, config.num_classes)] * (config.num_classes > 0)
        heads += [(_DISCRIMINATOR_LAYERS, config.num_batches)] * config.dab
        cell = sum((layers - 1) * width**2 + width * classes for layers, classes in heads)
        return 2.0 * batch * (length * (values + config.num_layers * layer + head + mvc) + cell)

    def setup(self) -> None:
        """Declare the layers of the model."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        width = config.embed_dim
        table = functools.partial(Embed, features=width, dtype=dtype, table_init=_init)
        linear = functools.partial(Linear, dtype=dtype)
        self.gene = table(config.vocab_size, table_axes=(axes.TEXT_VOCAB, axes.EMBED))
        self.gene_norm = LayerNorm()
        if config.values == "continuous":
            self.value_in = linear(width, (axes.CHANNEL_IN, axes.MLP))
            self.value_out = linear(width, (axes.MLP, axes.EMBED))
            self.value_norm = LayerNorm()
        elif config.values == "category":
            self.bin = table(config.num_bins + 2, table_axes=(None, axes.EMBED))
            self.value_norm = LayerNorm()
        if config.flags:
            self.flag = table(2, table_axes=(None, axes.EMBED))
        if config.domain_norm:
            self.domain_norm = DomainNorm(config.num_batches, config.domain_norm == "affine")
        if config.reads_batches:
            self.batch = table(config.num_batches, table_axes=(None, axes.EMBED))
            self.batch_norm = LayerNorm()
        layer = BertLayer if config.norm == "post" else PreNormLayer
        self.layers = stack(layer, config.layer, config.num_layers, config.remat, "layers", seen=1)
        if config.value_head:
            self.value_head = ValueHead(width, dtype)
            if config.explicit_zero:
                self.zero_head = ValueHead(width, dtype)
        if config.num_classes:
            self.classifier = LabelHead(
                width, config.num_classes, config.classifier_layers, jax.nn.relu, dtype
            )
        if config.mvc:
            self.mvc_head = MvcHead(config)
        if config.dab:
            self.discriminator = LabelHead(
                width, config.num_batches, _DISCRIMINATOR_LAYERS, _leaky_relu, dtype
            )

    def gene_embeddings(self, gene_ids: jax.Array) -> jax.Array:
        """Return the normalized embeddings (..., D) of rows (...) of the gene table."""
        return self.gene_norm(self.gene(gene_ids))

    def batch_embeddings(self, batch_labels: jax.Array | None) -> jax.Array | None:
        """Return the embeddings (B, D) of batch labels (B,); None if the heads of the model do not read them."""
        if not self.config.reads_batches or batch_labels is None:
            return None
        return self.batch_norm(self.batch(batch_labels))

    def value_embeddings(self, values: jax.Array) -> jax.Array:
        """Return the embeddings (B, L, D) of expression values or bins (B, L)."""
        if self.config.values == "category":
            return self.value_norm(self.bin(values))
        exact = jnp.minimum(values.astype(jnp.float32), self.config.max_value)[..., None]
        return self.value_norm(self.value_out(jax.nn.relu(self.value_in(exact))))

    def hidden_states(
        self,
        gene_ids: jax.Array,
        values: jax.Array,
        padding_mask: jax.Array | None = None,
        batch_labels: jax.Array | None = None,
        generated: jax.Array | None = None,
        cell: jax.Array | None = None,
    ) -> jax.Array:
        """Compute the output vectors (B, L, D) of all tokens. See `__call__` for the arguments."""
        config = self.config
        valid_mask = jnp.ones(gene_ids.shape, bool) if padding_mask is None else ~padding_mask
        genes = self.gene_embeddings(gene_ids)
        if config.values == "scaling":
            x = genes * values[..., None].astype(genes.dtype)
            if generated is not None:
                x = jnp.where(generated[..., None], genes + self.flag(jnp.ones_like(gene_ids)), x)
        else:
            added = self.value_embeddings(values)
            if generated is not None:
                added = jnp.where(generated[..., None], self.flag(jnp.ones_like(gene_ids)), added)
            x = genes + added
        if self.is_initializing() and config.flags:
            self.flag(gene_ids * 0)
        if config.domain_norm:
            assert batch_labels is not None
            x = self.domain_norm(x, batch_labels, valid_mask)
        if cell is not None:
            x = x.at[:, 0].set(cell.astype(x.dtype))
        x = drop(self, x, config.dropout) if config.dropout else x
        x = axes.constrain(x, axes.BATCH, axes.LENGTH, None)
        hidden, _ = self.layers(x, attention_mask(valid_mask, generated))
        return cast(jax.Array, hidden)

    def cell_embedding(
        self,
        hidden: jax.Array,
        values: jax.Array,
        padding_mask: jax.Array | None = None,
        generated: jax.Array | None = None,
        kind: str = "",
    ) -> jax.Array:
        """Compute cell embeddings, float32 (B, D), from output vectors (B, L, D) and values (B, L).

        Padding, generated genes, and masked genes, whose value is `mask_value`, have the weight 0. `kind` is one of
        `CELL_EMBEDDINGS`; the default is that of the configuration.
        """
        kind, hidden = kind or self.config.cell_embedding, hidden.astype(jnp.float32)
        if kind == "cls":
            return hidden[:, 0]
        known = jnp.asarray(values) != self.config.mask_value
        for absent in (padding_mask, generated):
            known = known if absent is None else known & ~absent
        if kind == "avg-pool":
            weights = known.at[:, 0].set(True).astype(jnp.float32)  # CLS always counts
            return jnp.einsum("bld,bl->bd", hidden, weights) / weights.sum(axis=1, keepdims=True)
        weights = jnp.where(known, values.astype(jnp.float32), 0.0)
        return unit_vectors(jnp.einsum("bld,bl->bd", hidden, weights))

    def value_predictions(
        self, hidden: jax.Array, batch_labels: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Predict values, float32 (B, L), from output vectors (B, L, D).

        With `explicit_zero`, the second result holds the logits that the values are not zero, float32 (B, L).
        """
        batch = self.batch_embeddings(batch_labels)
        if batch is not None:
            shape = (*hidden.shape[:-1], batch.shape[-1])
            hidden = jnp.concatenate([hidden, jnp.broadcast_to(batch[:, None], shape)], axis=-1)
        zero = self.zero_head(hidden) if self.config.explicit_zero else None
        return self.value_head(hidden), zero

    def mvc_predictions(
        self, cell: jax.Array, gene_ids: jax.Array, batch_labels: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Predict values, float32 (B, L), from cell embeddings (B, D) and rows of genes (B, L).

        With `explicit_zero`, the second result holds the logits that the values are not zero, float32 (B, L).
        """
        return cast(
            tuple[jax.Array, jax.Array | None],
            self.mvc_head(cell, self.gene_embeddings(gene_ids), self.batch_embeddings(batch_labels)),
        )

    def classify(self, cell: jax.Array) -> jax.Array:
        """Compute logits of the classes, float32 (B, C), from cell embeddings (B, D)."""
        return cast(jax.Array, self.classifier(cell))

    def discriminate(self, cell: jax.Array) -> jax.Array:
        """Compute logits of the batch labels, float32 (B, num_batches), from cell embeddings (B, D).

        The gradient with respect to the cell embeddings is reversed.
        """
        return cast(jax.Array, self.discriminator(reverse_gradient(cell)))

    def __call__(
        self,
        gene_ids: jax.Array,
        values: jax.Array,
        padding_mask: jax.Array | None = None,
        batch_labels: jax.Array | None = None,
        generated: jax.Array | None = None,
        cell: jax.Array | None = None,
    ) -> dict[str, jax.Array]:
        """Compute the outputs of the encoder and of all heads.

        Parameters
        ----------
        gene_ids
            Rows of the gene table, integers (B, L). The first token of a cell is CLS.
        values
            Expression values of the genes (B, L): binned values, as floats, or with `values="category"` bins, as
            integers. CLS has the value 0, padding `pad_value` and masked genes `mask_value`.
        padding_mask
            True at padding, bool (B, L). Padding does not change the outputs of other tokens.
        batch_labels
            Batch label of each cell, integers (B,). Needed if the model has batch labels.
        generated
            True at genes to be generated, bool (B, L). A learned flag replaces their value embeddings; with
            `values="scaling"`, which has none, the flag is added to the gene embedding. They attend to the known genes
            and to themselves, and known genes attend only to known genes.
        cell
            Vectors (B, D) that replace the input vectors of CLS, such as cell embeddings.

        Returns
        -------
        A dict with `encoder_output` (B, L, D) and `cell_emb`, float32 (B, D), and the outputs of the heads, all
        float32: `mlm_output` (B, L), `mlm_zero_probs` (B, L), `cls_output` (B, C), `mvc_output` (B, L),
        `mvc_zero_probs` (B, L) and `dab_output` (B, num_batches). `mlm_zero_probs` and `mvc_zero_probs` are the
        probabilities that the value is not zero. The cell embeddings of all kinds have the names of `CELL_EMBEDDINGS`.
        """
        config = self.config
        hidden = self.hidden_states(gene_ids, values, padding_mask, batch_labels, generated, cell)
        cells = {
            kind: self.cell_embedding(hidden, values, padding_mask, generated, kind)
            for kind in CELL_EMBEDDINGS
        }
        embedding = cells[config.cell_embedding]
        outputs = {"encoder_output": hidden, "cell_emb": embedding, **cells}

        def add(head: Literal["mlm", "mvc"], predicted: tuple[jax.Array, jax.Array | None]) -> None:
            outputs[f"{head}_output"] = predicted[0]
            if predicted[1] is not None:
                outputs[f"{head}_zero_probs"] = jax.nn.sigmoid(predicted[1])

        if config.value_head:
            add("mlm", self.value_predictions(hidden, batch_labels))
        if config.mvc:
            add("mvc", self.mvc_predictions(embedding, gene_ids, batch_labels))
        if config.num_classes:
            outputs["cls_output"] = self.classify(embedding)
        if config.dab:
            outputs["dab_output"] = self.discriminate(embedding)
        return outputs


def attention_mask(valid_mask: jax.Array, generated: jax.Array | None) -> Mask:
    """Return the mask of self-attention in which no token attends to padding.

    With `generated`, bool (B, L), a token attends to all known tokens, and a generated token also to itself. The mask
    `valid_mask`, bool (B, L), is False at padding.
    """
    if generated is None:
        segments = valid_mask.astype(jnp.int32)
        return Mask(segments, segments)
    # Each generated token is a segment of its own, and every query attends to the segment of the known tokens.
    own = jnp.broadcast_to(jnp.arange(valid_mask.shape[1], dtype=jnp.int32) + 2, valid_mask.shape)
    keys = jnp.where(generated, own, EVERYONE)
    return Mask(jnp.where(generated, own, 1), jnp.where(valid_mask, keys, NO_ONE))
