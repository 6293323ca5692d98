"""Define a causal transformer over text tokens, for GPT-2, GPT-NeoX and LLaMA; see `DecoderConfig`.

ZerOmics, Cell2Sentence and scMMGPT use these decoders.

Sources: Radford et al. 2019 (GPT-2), Black et al. 2022 (GPT-NeoX), Touvron et al. 2023 (LLaMA), Ainslie et al. 2023
(grouped-query attention).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from sct.models.checks import check_range, check_text
from sct.models.decoder_config import DecoderConfig
from sct.nn import axes
from sct.nn.adapters import drop, prefix_of
from sct.nn.attention import attend, rotary
from sct.nn.chunked_attention import Mask
from sct.nn.linear import Embed, Linear
from sct.nn.norm import LayerNorm, RMSNorm
from sct.nn.stack import stack

# Queries (B, T, H, D), keys and values (B, T, H', D), prefix or None -> output of attention (B, T, H, D).
Attention = Callable[..., jax.Array]
_DEVIATION = 0.02


def _initializer(config: DecoderConfig, adds: bool = False) -> axes.Initializer:
    """Return the initializer of weight matrices.

    `adds` is True for a matrix whose output is added to the residual connection.
    """
    if config.init == "xavier":
        return jax.nn.initializers.glorot_normal()
    return jax.nn.initializers.normal(_DEVIATION / (2 * config.num_layers) ** 0.5 if adds else _DEVIATION)


def _norm(config: DecoderConfig, name: str | None = None) -> nn.Module:
    made: type[nn.Module] = RMSNorm if config.norm == "rms" else LayerNorm
    return made(config.norm_eps, name=name)


class CausalAttention(nn.Module):
    """Compute causal multi-head attention, with dense layers for the queries, keys, values and outputs."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array, attention: Attention) -> jax.Array:
        """Apply attention to the vectors x (B, T, D) of tokens at positions (B, T), and return (B, T, D).

        `attention` is the function that computes attention from queries, keys and values.
        """
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        linear = functools.partial(Linear, dtype=dtype)

        def projection(name: str, heads: int) -> Callable[[jax.Array], jax.Array]:
            width, names = heads * config.head_size, (axes.EMBED, axes.HEADS)
            layer = linear(width, names, config.attention_bias, kernel_init=_initializer(config), name=name)
            return lambda x: rearrange(layer(x), "b t (h d) -> b t h d", h=heads)

        to_key, to_value = projection("key", config.kv_heads), projection("value", config.kv_heads)
        query, key = projection("query", config.num_heads)(x), to_key(x)
        if config.positions == "rotary":
            frequencies = config.frequencies()
            query, key = rotary(query, positions, frequencies), rotary(key, positions, frequencies)
        mixed = attention(query, key, to_value(x), prefix=prefix_of(self, to_key, to_value))
        mixed = rearrange(mixed, "b t h d -> b t (h d)")
        names, init = (axes.HEADS, axes.EMBED), _initializer(config, adds=True)
        return linear(config.embed_dim, names, config.out_bias, kernel_init=init, name="out")(mixed)


class FeedForward(nn.Module):
    """Feed-forward layer: two dense layers with GELU between them, or SwiGLU."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the feed-forward layer to each vector of x (B, T, D) and return (B, T, D)."""
        config = self.config
        linear = functools.partial(Linear, use_bias=config.mlp_bias, dtype=jnp.dtype(config.dtype))
        into, out, init = (axes.EMBED, axes.MLP), (axes.MLP, axes.EMBED), _initializer(config)
        up = linear(config.ffn_dim, into, kernel_init=init, name="up")(x)
        if config.mlp == "swiglu":
            up = jax.nn.silu(linear(config.ffn_dim, into, kernel_init=init, name="gate")(x)) * up
        else:
            up = jax.nn.gelu(up, approximate=config.mlp == "gelu_tanh")
        return linear(config.embed_dim, out, kernel_init=_initializer(config, adds=True), name="down")(up)


class Block(nn.Module):
    """Pre-norm transformer block: attention, then feed-forward, each after a norm and with a residual connection."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array, mask: Mask) -> jax.Array:
        """Apply the block to the vectors x (B, T, D) of tokens at positions (B, T), and return (B, T, D).

        Attention is always causal, even if `mask.order` is None.
        """
        # Set the order to the number 0 here. Rematerialization traces the arguments, so an order from outside would be
        # a traced array, and the kernels that support only this order could not be chosen.
        return self.mix(x, positions, functools.partial(attend, mask=mask._replace(order=0)))

    @nn.compact
    def mix(self, x: jax.Array, positions: jax.Array, attention: Attention) -> jax.Array:
        """Apply the block to x (B, T, D) as `__call__` does, but with the given attention function."""
        config = self.config

        def attended(x: jax.Array) -> jax.Array:
            y = CausalAttention(config, name="attention")(
                _norm(config, "attention_norm")(x), positions, attention
            )
            return drop(self, y, config.dropout) if config.dropout else y

        def fed(x: jax.Array) -> jax.Array:
            y = FeedForward(config, name="mlp")(_norm(config, "mlp_norm")(x))
            return drop(self, y, config.dropout) if config.dropout else y

        if config.parallel:
            x = x + attended(x) + fed(x)
        else:
            x = x + attended(x)
            x = x + fed(x)
        return axes.constrain(x, axes.BATCH, axes.LENGTH, None)


def running_positions(segments: jax.Array) -> jax.Array:
    """Compute the position of each token in its text, (B, T), counted from 0.

    `segments` (B, T) holds the segment number of each token. Consecutive tokens with the same number form a text.
    """
    index = jnp.arange(segments.shape[1])
    starts = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


class Decoder(nn.Module):
    """Text decoder: token embeddings, causal transformer blocks and output head; see `DecoderConfig`."""

    config: DecoderConfig
    outputs: ClassVar[tuple[str, ...]] = ("logits",)
    intermediates: ClassVar[tuple[str, ...]] = ("hidden", "text_embedding")

    @staticmethod
    def example(config: DecoderConfig) -> dict[str, jax.Array]:
        """Return the smallest valid inputs of one call, as a dict by argument name."""
        return {"input_ids": jnp.zeros((1, 1), jnp.int32)}

    @staticmethod
    def check_inputs(config: DecoderConfig, inputs: Mapping[str, Any]) -> None:
        """Raise `DataError` unless the inputs fit the model. Values of traced arrays are not checked."""
        most = config.max_length if config.positions == "learned" else None
        check_text(inputs, config.vocab_size, most)
        if inputs.get("positions") is not None and most is not None:
            check_range("positions", inputs["positions"], most - 1)

    @staticmethod
    def flops(config: DecoderConfig, batch: int, length: int) -> float:
        """Count the operations of all matrix products in one forward pass. A multiply-add counts as two.

        Attention is causal, so only half of the attention scores are counted.
        """
        width, size = config.embed_dim, config.head_size
        attention = width * size * (2 * config.num_heads + 2 * config.kv_heads)
        scores = length * config.num_heads * size
        block = attention + scores + (3 if config.mlp == "swiglu" else 2) * width * config.ffn_dim
        return 2.0 * batch * length * (config.num_layers * block + width * config.vocab_size)

    def setup(self) -> None:
        """Declare the layers of the model."""
        config = self.config
        normal, names = jax.nn.initializers.normal(_DEVIATION), (axes.TEXT_VOCAB, axes.EMBED)
        embed = functools.partial(
            Embed, features=config.embed_dim, dtype=jnp.dtype(config.dtype), table_init=normal
        )
        self.token = embed(config.vocab_size, table_axes=names)
        if config.positions == "learned":
            self.position = embed(config.max_length, table_axes=(None, axes.EMBED))
        self.layers = stack(Block, config, config.num_layers, config.remat, "layers", seen=2)
        self.norm = _norm(config)
        if not config.tied:
            self.head = Linear(
                config.vocab_size, (axes.EMBED, axes.TEXT_VOCAB), use_bias=False, dtype=jnp.dtype(config.dtype),
                kernel_init=_initializer(config),
            )  # fmt: skip

    def embed(self, input_ids: jax.Array, positions: jax.Array, soft: jax.Array | None = None) -> jax.Array:
        """Embed tokens (B, T) at positions (B, T), both integers, and return vectors (B, T, D).

        A negative token id -1 - k is replaced by the vector `soft[row, k]` (a soft token), where `soft` has the shape
        (B, K, D).
        """
        if soft is None:
            x = self.token(input_ids)
        else:
            place = jnp.clip(-1 - input_ids, 0, soft.shape[1] - 1)
            given = jnp.take_along_axis(soft, place[..., None], axis=1)
            x = self.token(jnp.maximum(input_ids, 0))
            x = jnp.where(input_ids[..., None] < 0, given.astype(x.dtype), x)
        if self.config.positions == "learned":
            x = x + self.position(positions)
        x = drop(self, x, self.config.dropout) if self.config.dropout else x
        return axes.constrain(x, axes.BATCH, axes.LENGTH, None)

    def hidden_states(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
        soft: jax.Array | None = None,
    ) -> jax.Array:
        """Compute the hidden vectors (B, T, D) after the last norm.

        See `__call__` for the arguments, and `embed` for `soft`.
        """
        if segments is not None:
            places = running_positions(segments)
        elif attention_mask is not None:
            segments = attention_mask.astype(jnp.int32)
            places = jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)
        else:
            places = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
        positions = places if positions is None else positions
        x = self.embed(input_ids, positions, soft)
        x, _ = self.layers(x, positions, Mask(segments, segments))
        return self.finish(x)

    def finish(self, x: jax.Array) -> jax.Array:
        """Apply the final norm of the decoder to x (B, T, D), the output of the last block."""
        return self.norm(x)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Compute the scores (logits) of all tokens, float32 (..., V), from hidden vectors (..., D)."""
        scores = self.token.scores(hidden) if self.config.tied else self.head(hidden)
        return scores.astype(jnp.float32)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> dict[str, jax.Array]:
        """Compute the scores (logits) of the next token at each position.

        Parameters
        ----------
        input_ids
            Tokens, integers (B, T).
        attention_mask
            Shape (B, T): 1 for tokens and 0 for padding, which may be on either side. Padding does not change the
            outputs of tokens.
        segments
            Number of the text to which each token belongs, integers (B, T), for rows that hold several texts one after
            the other. 0 marks padding. A token attends only to its own text, and positions are counted from the
            beginning of the text. If `segments` is given, `attention_mask` is ignored.
        positions
            Positions of the tokens, integers (B, T). By default, they are counted from the beginning of each text.

        Returns
        -------
        A dict with `logits`, float32 (B, T, V); `hidden` (B, T, D), the vectors after the last norm; and
        `text_embedding`, float32 (B, D), the mean of `hidden` over the tokens that are not padding.
        """
        hidden = self.hidden_states(input_ids, attention_mask, segments, positions)
        tokens = attention_mask if segments is None else segments
        valid_mask = jnp.ones(input_ids.shape) if tokens is None else (tokens > 0).astype(jnp.float32)
        total = jnp.einsum("btd,bt->bd", hidden.astype(jnp.float32), valid_mask)
        mean = total / jnp.maximum(valid_mask.sum(axis=1, keepdims=True), 1.0)
        return {"logits": self.logits(hidden), "hidden": hidden, "text_embedding": mean}
