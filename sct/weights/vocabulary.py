"""Add tokens to the embedding table and the head of a text decoder."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from sct.models.decoder_config import DecoderConfig
from sct.nn.paths import flatten, unflatten
from sct.weights.pretrained import Pretrained

# The embedding table has one row per token, the head one column per token.
_ROWS, _COLUMNS = "params/token/embedding", "params/head/kernel"


def resized(model: Pretrained, vocab_size: int) -> Pretrained:
    """Return a text decoder with at least `vocab_size` tokens.

    The logits of the existing tokens do not change. A new token starts with the mean embedding of the existing tokens,
    so the initial probability of the new token is close to the average probability of the existing tokens (Hewitt 2021,
    "Initializing new word embeddings for pretrained language models"). A decoder that already has enough tokens, and a
    model of another kind, are returned unchanged.
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
