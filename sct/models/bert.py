"""Define BERT, a bidirectional transformer encoder for text (Devlin et al. 2019); see `BertConfig`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from sct.models.bert_config import BertConfig
from sct.models.checks import check_range, check_text
from sct.models.decoder import running_positions
from sct.nn import axes
from sct.nn.adapters import drop, prefix_of
from sct.nn.attention import attend
from sct.nn.chunked_attention import Mask
from sct.nn.linear import Embed, Linear
from sct.nn.norm import LayerNorm
from sct.nn.stack import stack

_init = jax.nn.initializers.normal(0.02)
_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def _linear(config: BertConfig, features: int, into: str, out: str, name: str) -> Linear:
    return Linear(features, (into, out), dtype=jnp.dtype(config.dtype), kernel_init=_init, name=name)


class BertAttention(nn.Module):
    """Compute multi-head attention, with dense layers for the queries, keys, values and outputs."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, source: jax.Array, mask: Mask) -> jax.Array:
        """Compute attention and return (B, T, D).

        Queries come from x (B, T, D), keys and values from `source` (B, M, E).
        """
        config = self.config

        def projection(name: str) -> Callable[[jax.Array], jax.Array]:
            layer = _linear(config, config.embed_dim, axes.EMBED, axes.HEADS, name)
            return lambda given: rearrange(layer(given), "b t (h d) -> b t h d", h=config.num_heads)

        query, key, value = (projection(name) for name in ("query", "key", "value"))
        mixed = attend(query(x), key(source), value(source), mask, prefix_of(self, key, value))
        return _linear(config, config.embed_dim, axes.HEADS, axes.EMBED, "out")(
            rearrange(mixed, "b t h d -> b t (h d)")
        )


class BertFeedForward(nn.Module):
    """Feed-forward layer: two dense layers with an activation between them."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the feed-forward layer to each vector of x (B, T, D) and return (B, T, D)."""
        config = self.config
        up = _linear(config, config.ffn_dim, axes.EMBED, axes.MLP, "up")(x)
        up = _ACTIVATIONS[config.activation](up)
        return _linear(config, config.embed_dim, axes.MLP, axes.EMBED, "down")(up)


class BertLayer(nn.Module):
    """Post-norm transformer layer: attention, then feed-forward, each with a residual connection and a layer norm."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: Mask) -> jax.Array:
        """Apply the layer to x (B, T, D) and return (B, T, D). `mask` sets which tokens attend to each other."""
        x = self.add(x, BertAttention(self.config, name="attention")(x, x, mask), "attention_norm")
        x = self.add(x, BertFeedForward(self.config, name="mlp")(x), "mlp_norm")
        return axes.constrain(x, axes.BATCH, axes.LENGTH, None)

    def add(self, x: jax.Array, y: jax.Array, name: str) -> jax.Array:
        """Add y (B, T, D) to x (B, T, D), and apply the layer norm called `name`.

        The array y is the output of attention or of the feed-forward layer.
        """
        y = drop(self, y, self.config.dropout) if self.config.dropout else y
        return LayerNorm(self.config.norm_eps, name=name)(x + y)


class Bert(nn.Module):
    """BERT: embeddings, transformer layers, and optionally an MLM head and a pooler; see `BertConfig`."""

    config: BertConfig
    outputs: ClassVar[tuple[str, ...]] = ("hidden", "logits", "pooled")
    intermediates: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    def outputs_of(config: BertConfig) -> tuple[str, ...]:
        """Return the names of the outputs that a model with this configuration computes."""
        return ("hidden", *["logits"] * config.mlm_head, *["pooled"] * config.pooler)

    @staticmethod
    def example(config: BertConfig) -> dict[str, jax.Array]:
        """Return the smallest valid inputs of one call, as a dict by argument name."""
        return {"input_ids": jnp.zeros((1, 1), jnp.int32)}

    @staticmethod
    def check_inputs(config: BertConfig, inputs: Mapping[str, Any]) -> None:
        """Raise `DataError` unless the inputs fit the model. Values of traced arrays are not checked."""
        check_text(inputs, config.vocab_size, config.max_length)
        for name, most in (("positions", config.max_length - 1), ("token_type_ids", config.num_types - 1)):
            if inputs.get(name) is not None:
                check_range(name, inputs[name], most)

    @staticmethod
    def flops(config: BertConfig, batch: int, length: int) -> float:
        """Count the operations of all matrix products in one forward pass. A multiply-add counts as two."""
        width = config.embed_dim
        layer = 4 * width**2 + 2 * length * width + 2 * width * config.ffn_dim
        head = width**2 + width * config.vocab_size if config.mlm_head else 0
        return 2.0 * batch * (length * (config.num_layers * layer + head) + config.pooler * width**2)

    def setup(self) -> None:
        """Declare the layers of the model."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        embed = functools.partial(Embed, features=config.embed_dim, dtype=dtype, table_init=_init)
        self.token = embed(config.vocab_size, table_axes=(axes.TEXT_VOCAB, axes.EMBED))
        self.position = embed(config.max_length, table_axes=(None, axes.EMBED))
        self.type = embed(config.num_types, table_axes=(None, axes.EMBED))
        self.norm = LayerNorm(config.norm_eps)
        self.layers = stack(BertLayer, config, config.num_layers, config.remat, "layers", seen=1)
        square = functools.partial(Linear, config.embed_dim, dtype=dtype, kernel_init=_init)
        if config.pooler:
            self.pooler = square()
        if config.mlm_head:
            self.transform = square()
            self.transform_norm = LayerNorm(config.norm_eps)
            if config.tied:
                shape = (config.vocab_size,)
                self.head_bias = axes.param(self, "head_bias", axes.zeros, shape, (axes.TEXT_VOCAB,))
            else:
                names = (axes.EMBED, axes.TEXT_VOCAB)
                self.head = Linear(config.vocab_size, names, dtype=dtype, kernel_init=_init)

    def embed(self, input_ids: jax.Array, types: jax.Array | None, positions: jax.Array) -> jax.Array:
        """Embed tokens, token types and positions (three integer arrays (B, T)), and sum the three embeddings.

        The layer norm is applied to the sum. Returns (B, T, D).
        """
        types = jnp.zeros_like(input_ids) if types is None else types
        x = self.norm(self.token(input_ids) + self.position(positions) + self.type(types))
        x = drop(self, x, self.config.dropout) if self.config.dropout else x
        return axes.constrain(x, axes.BATCH, axes.LENGTH, None)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Compute the scores (logits) of all tokens, float32 (..., V), from hidden vectors (..., D)."""
        x = self.transform_norm(_ACTIVATIONS[self.config.activation](self.transform(hidden)))
        scores = self.token.scores(x) + self.head_bias if self.config.tied else self.head(x)
        return scores.astype(jnp.float32)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> dict[str, jax.Array]:
        """Compute a hidden vector for each token of a text, from all tokens of the text.

        Parameters
        ----------
        input_ids
            Tokens, integers (B, T).
        attention_mask
            Shape (B, T): 1 for tokens and 0 for padding, which may be on either side. Padding does not change the
            outputs of tokens.
        token_type_ids
            Token types, integers (B, T). The default is 0.
        segments
            Number of the text to which each token belongs, integers (B, T), for rows that hold several texts one after
            the other. 0 marks padding. A token attends only to its own text, and positions are counted from the
            beginning of the text. If `segments` is given, `attention_mask` is ignored.
        positions
            Positions of the tokens, integers (B, T). By default, they are counted from the beginning of each text.

        Returns
        -------
        A dict with `hidden` (B, T, D). With an MLM head it also has `logits`, float32 (B, T, V). With a pooler it also
        has `pooled` (B, D), which is computed from one token per row: the first that is not padding.
        """
        if segments is not None:
            places = running_positions(segments)
        elif attention_mask is not None:
            segments = attention_mask.astype(jnp.int32)
            places = jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)
        else:
            places = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
        x = self.embed(input_ids, token_type_ids, places if positions is None else positions)
        hidden, _ = self.layers(x, Mask(segments, segments))
        outputs = {"hidden": hidden}
        if self.config.mlm_head:
            outputs["logits"] = self.logits(hidden)
        if self.config.pooler:
            first = jnp.zeros(len(hidden), jnp.int32) if segments is None else (segments != 0).argmax(axis=1)
            outputs["pooled"] = jnp.tanh(self.pooler(hidden[jnp.arange(len(hidden)), first]))
        return outputs
