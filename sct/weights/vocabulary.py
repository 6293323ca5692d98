"""More tokens for a text decoder."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from sct.models.decoder_config import DecoderConfig
from sct.nn.paths import flatten, unflatten
from sct.weights.pretrained import Pretrained

# Tables with a row, and heads with a column, for each token.
_ROWS, _COLUMNS = "params/token/embedding", "params/head/kernel"


def resized(model: Pretrained, vocab_size: int) -> Pretrained:
    """Model with at least so many tokens; what it computes of the old ones stays.

    New tokens begin as the mean of the old ones, so that they are neither likely nor unlikely (Hewitt 2021,
    "Initializing new word embeddings for pretrained language models").
    """
    config = model.config
    if not isinstance(config, DecoderConfig) or config.vocab_size >= vocab_size:
        return model
    more, flat = vocab_size - config.vocab_size, flatten(model.variables)
    for path, axis in ((_ROWS, 0), (_COLUMNS, 1)):
        if path in flat:
            mean = flat[path].mean(axis=axis, keepdims=True, dtype=jnp.float32).astype(flat[path].dtype)
            flat[path] = jnp.concatenate([flat[path], jnp.repeat(mean, more, axis=axis)], axis=axis)
    grown = dataclasses.replace(config, vocab_size=vocab_size)
    return dataclasses.replace(model, config=grown, variables=unflatten(flat))
