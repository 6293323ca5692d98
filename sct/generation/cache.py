"""Decode with a key-value cache: each token is computed once, and later tokens attend to its keys and values.

Training runs the stacked layers in a loop (scan). Decoding unrolls them over separate parameters, because a loop would
copy the parameters and the cache of each layer for each token. Copying parameters and cache would take longer than the
matrix products of a few rows.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax

from sct.models.decoder import Block, Decoder
from sct.models.decoder_config import DecoderConfig
from sct.nn import axes
from sct.nn.adapters import COLLECTION, Prefix, for_all_layers
from sct.nn.attention import attend
from sct.nn.chunked_attention import UNSEEN, Mask
from sct.nn.stack import unstack


class Cache(NamedTuple):
    """Key-value cache of B texts. Each text has M slots. Each token takes one slot, and so does each padding token.

    Attributes
    ----------
    keys, values
        One array (B, H', M, D) per layer; H' is the number of key-value heads.
    filled
        Whether each slot holds a token (True) or padding (False), bool (B, M).
    used
        Number of used slots, int32 (). All texts have the same number of used slots.
    positions
        Number of tokens in each text, int32 (B,).
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    filled: jax.Array
    used: jax.Array
    positions: jax.Array


def layers_of(
    variables: dict[str, Any], config: DecoderConfig
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Split the variables of a decoder for `extend`: the variables outside the layers, and one dict per layer."""
    rest, layers = {}, [{} for _ in range(config.num_layers)]  # type: ignore[var-annotated]
    for name, tree in variables.items():
        rest[name] = {key: value for key, value in tree.items() if key != "layers"}
        if "layers" in tree:
            own = tree["layers"]
            if name == COLLECTION:
                own = for_all_layers(own, config.num_layers)
            for layer, part in zip(layers, unstack(own, config.num_layers), strict=True):
                layer[name] = part
    return rest, layers


def empty(config: DecoderConfig, rows: int, slots: int) -> Cache:
    """Return an empty cache for `rows` texts with `slots` slots each."""
    shape = (rows, config.kv_heads, slots, config.head_size)
    one = jnp.zeros(shape, jnp.dtype(config.dtype))
    many = (axes.constrain(one, axes.BATCH, axes.HEADS, None, None),) * config.num_layers
    nothing = jnp.zeros((), jnp.int32)
    return Cache(many, many, jnp.zeros((rows, slots), bool), nothing, jnp.zeros(rows, jnp.int32))


def extend(
    config: DecoderConfig,
    parts: tuple[dict[str, Any], list[dict[str, Any]]],
    cache: Cache,
    ids: jax.Array,
    attention_mask: jax.Array,
    first: bool = False,
    soft: jax.Array | None = None,
) -> tuple[jax.Array, Cache]:
    """Run the decoder on more tokens of each text, and add their keys and values to the cache.

    Parameters
    ----------
    config
        Configuration of the decoder's architecture.
    parts
        Parameters of the decoder, as `layers_of` returns them.
    cache
        Cache of the previous tokens.
    ids
        Tokens (B, T); they take the next T slots.
    attention_mask
        True for tokens and False for padding, bool (B, T).
    first
        True if the cache is empty, so that the tokens only attend to each other.
    soft
        Soft prompts (B, K, D), which replace negative tokens; see `sct.models.decoder.Decoder.embed`.

    Returns
    -------
    Hidden states (B, T, D) after the last norm, and the new cache.
    """
    rest, layers = parts
    length = ids.shape[1]
    module, start = Decoder(config), cache.used
    places = cache.positions[:, None] + jnp.maximum(jnp.cumsum(attention_mask, axis=1) - 1, 0)
    filled = lax.dynamic_update_slice(cache.filled, attention_mask, (0, start))
    x = module.apply(rest, ids, places, soft, method="embed")
    keys, values = [], []
    for layer, old_keys, old_values in zip(layers, cache.keys, cache.values, strict=True):
        kept: dict[str, jax.Array] = {}

        def mix(
            query: jax.Array,
            key: jax.Array,
            value: jax.Array,
            prefix: Prefix | None = None,
            old: tuple[jax.Array, jax.Array] = (old_keys, old_values),
            kept: dict[str, jax.Array] = kept,
        ) -> jax.Array:
            both = zip(old, (key, value), strict=True)
            all_keys, all_values = (
                lax.dynamic_update_slice(before, new.swapaxes(1, 2).astype(before.dtype), (0, 0, start, 0))
                for before, new in both
            )
            kept.update(keys=all_keys, values=all_values)
            if first:
                segments = attention_mask.astype(jnp.int32)
                return attend(query, key, value, Mask(segments, segments, 0), prefix)
            slots = jnp.arange(filled.shape[1])
            seen = filled[:, None] & (slots <= start + jnp.arange(length)[:, None])
            return _attend_slots(query, all_keys, all_values, seen, prefix)

        x = Block(config).apply(layer, x, places, mix, method="mix")
        keys.append(kept["keys"])
        values.append(kept["values"])
    hidden = cast(jax.Array, module.apply(rest, x, method="finish"))
    counts = attention_mask.sum(axis=1, dtype=jnp.int32)
    return hidden, Cache(tuple(keys), tuple(values), filled, start + length, cache.positions + counts)


def _attend_slots(
    query: jax.Array, keys: jax.Array, values: jax.Array, seen: jax.Array, prefix: Prefix | None
) -> jax.Array:
    """Compute attention from queries (B, T, H, D) to a prefix and to cached slots (B, H', M, D).

    Each query attends only to the slots for which `seen` (B, T, M) is True. `prefix` holds more keys and values, or is
    None.
    """
    rows, length, heads, size = query.shape
    if prefix is not None:
        front, more = prefix.keys.shape[1:3], (rows, length, prefix.keys.shape[1])
        shape = (rows, front[1], front[0], size)
        keys, values = (
            jnp.concatenate([jnp.broadcast_to(new.swapaxes(1, 2), shape).astype(x.dtype), x], axis=2)
            for new, x in zip(prefix[:2], (keys, values), strict=True)
        )
        on = jnp.asarray(True if prefix.on is None else prefix.on)
        seen = jnp.concatenate(
            [jnp.broadcast_to(on, more), jnp.broadcast_to(seen, (*more[:2], seen.shape[-1]))], axis=2
        )
    groups = keys.shape[1]
    # Grouped-query attention: all query heads of a key-value head share one matrix product.
    grouped = query.reshape(rows, length, groups, heads // groups, size).transpose(0, 2, 1, 3, 4)
    grouped = grouped.reshape(rows, groups, -1, size)
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores = dot("bgqd,bgmd->bgqm", grouped, keys) * size**-0.5
    scores = scores.reshape(rows, groups, length, heads // groups, -1)
    scores = jnp.where(seen[:, None, :, None], scores, UNSEEN)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype).reshape(rows, groups, -1, scores.shape[-1])
    mixed = dot("bgqm,bgmd->bgqd", weights, values).astype(query.dtype)
    mixed = mixed.reshape(rows, groups, length, heads // groups, size)
    return mixed.transpose(0, 2, 1, 3, 4).reshape(rows, length, heads, size)


def scores_of(config: DecoderConfig, parts: tuple[dict[str, Any], Any], hidden: jax.Array) -> jax.Array:
    """Compute the logits of the next token, float32 (..., V), from hidden states (..., D)."""
    return cast(jax.Array, Decoder(config).apply(parts[0], hidden, method="logits"))
