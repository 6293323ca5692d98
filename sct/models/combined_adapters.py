"""Combine the adapters of several fine-tuned models of one base into one collection "adapters".

Each adapter changes the output of its layer. The combination is the weighted sum of the changes of all adapters:

- **Low-rank** adapters of a layer become one adapter, whose rank is the sum of their ranks.
- **Bottlenecks** of a layer become one bottleneck, whose width is the sum of their widths. A bottleneck changes the
  output y by `scale * up(relu(down(y)))`; without a skip connection, by this term minus y.
- **Prefixes** cannot be added, because the softmax of attention normalizes over the keys of a prefix and all other keys
  together. The weight of a prefix is 0 or 1, and each attention layer can have only one active prefix.

The adapters are applied in the order of `sct.nn.adapters`, so a bottleneck reads the output of its layer with the
low-rank adapters. The shapes of the result do not depend on the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from sct.checks import check_number
from sct.errors import ConfigError
from sct.models.adapter_kinds import CONFIGS, is_stacked
from sct.models.adapters import adapters_of, under
from sct.nn.adapters import BOTTLENECK, COLLECTION, LOW_RANK, PREFIX, PREFIX_SEEN, Kind
from sct.nn.paths import unflatten

Arrays = dict[str, Any]


def combine(params: Any, members: Mapping[str, Any], weights: Mapping[str, float]) -> dict[str, Any]:
    """Combine adapters.

    Parameters
    ----------
    params
        Boxed shapes of the collection "params" of the base model.
    members
        Collections "adapters" by name.
    weights
        Weight of each collection by name. A weight of 0 or a missing name switches its adapters off.

    Returns
    -------
    The collection "adapters".

    Raises
    ------
    ConfigError
        A weight is not a finite number, or adapters cannot be combined with these weights.
    """
    for name, weight in weights.items():
        check_number(f"the weight of {name!r}", weight)
    found: dict[tuple[str, Kind], dict[str, Arrays]] = {}
    for name, tree in members.items():
        for place, kind, arrays in adapters_of({COLLECTION: tree}):
            found.setdefault((place, kind), {})[name] = arrays
    made: dict[str, Any] = {}
    for (place, kind), own in found.items():
        box = next(config for config in CONFIGS if config.arrays is kind).places(params)[place]
        number = box.value.shape[0] if is_stacked(box) else None
        parts = {name: _for_all_layers(arrays, kind, number) for name, arrays in own.items()}
        combined = _COMBINE[kind](place, parts, {name: float(weights.get(name, 0.0)) for name in parts})
        made |= {under(place, array): value for array, value in combined.items()}
    return unflatten(made)


def _for_all_layers(arrays: Arrays, kind: Kind, number: int | None) -> Arrays:
    """Return the arrays of an adapter with one entry for each layer of a stack, and the bool array "on" (layers,).

    Layers without an adapter have zeros. `number` is None outside stacks; "on" is then a scalar.
    """
    arrays = dict(arrays)
    layers = arrays.pop(kind.layers, None)
    if number is None or layers is None:
        return {**arrays, "on": np.ones(() if number is None else number, bool)}
    layers = np.asarray(layers)
    spread = {
        name: jnp.zeros((number, *np.shape(value)[1:]), jnp.result_type(value)).at[layers].set(value)
        for name, value in arrays.items()
    }
    return {**spread, "on": np.isin(np.arange(number), layers)}


def _low_rank(place: str, parts: Mapping[str, Arrays], weights: Mapping[str, float]) -> Arrays:
    ups = [each["lora_b"] * (weights[name] * each["scale"])[..., None, None] for name, each in parts.items()]
    first = next(iter(parts.values()))
    return {
        "lora_a": jnp.concatenate([each["lora_a"] for each in parts.values()], axis=-1),
        "lora_b": jnp.concatenate(ups, axis=-2),
        "scale": jnp.ones_like(first["scale"]),
    }


def _bottleneck(place: str, parts: Mapping[str, Arrays], weights: Mapping[str, float]) -> Arrays:
    names = [*BOTTLENECK.trained, *BOTTLENECK.numbers]
    all_of = {name: [each[name] for each in parts.values()] for name in names}
    # Factor of the output of `up`, and share of the layer's own output that the adapters without a skip remove.
    factors = [weights[name] * each["bottleneck_scale"] for name, each in parts.items()]
    removed = sum(
        weights[name] * each["on"] * (1.0 - each["bottleneck_skip"]) for name, each in parts.items()
    )
    if np.max(np.asarray(removed)) > 1 + 1e-6:
        raise ConfigError(
            f"the bottlenecks of {place!r} without a skip replace the output of the layer, but their weights sum to "
            f"{np.max(np.asarray(removed)):g}: choose weights with a sum of at most 1."
        )
    down, down_bias, up, up_bias, scale, _ = (all_of[name] for name in names)
    return {
        "bottleneck_down": jnp.concatenate(down, axis=-1),
        "bottleneck_down_bias": jnp.concatenate(down_bias, axis=-1),
        "bottleneck_up": jnp.concatenate(
            [value * factor[..., None, None] for value, factor in zip(up, factors, strict=True)], axis=-2
        ),
        "bottleneck_up_bias": sum(
            value * factor[..., None] for value, factor in zip(up_bias, factors, strict=True)
        ),
        "bottleneck_scale": jnp.ones_like(scale[0]),
        "bottleneck_skip": jnp.ones_like(scale[0]) - removed,
    }


def _prefix(place: str, parts: Mapping[str, Arrays], weights: Mapping[str, float]) -> Arrays:
    length = max(each["prefix"].shape[-2] for each in parts.values())
    first = next(iter(parts.values()))
    vectors = jnp.zeros((*first["prefix"].shape[:-2], length, first["prefix"].shape[-1]), jnp.float32)
    seen = np.zeros((*first["on"].shape, length), bool)
    active: dict[str, np.ndarray] = {}
    for name, each in parts.items():
        if weights[name] not in (0.0, 1.0):
            raise ConfigError(
                f"{name!r} has a prefix in {place!r} and the weight {weights[name]:g}, but the weight of a prefix must "
                "be 0 or 1, because attention normalizes over all keys together: set the weight to 0 or 1."
            )
        if not weights[name]:
            continue
        for other, layers in active.items():
            if np.any(layers & each["on"]):
                raise ConfigError(
                    f"{other!r} and {name!r} both have a prefix in {place!r}, but attention normalizes over the keys "
                    "of both together, so neither would act as trained: set one of the weights to 0."
                )
        active[name] = each["on"]
        own = each["prefix"].shape[-2]
        visible = np.broadcast_to(each["on"][..., None], (*each["on"].shape, own)).copy()
        if PREFIX_SEEN in each:  # a result of this function
            visible &= np.asarray(each[PREFIX_SEEN]) > 0
        seen[..., :own] |= visible
        vectors = vectors.at[..., :own, :].add(each["prefix"] * visible[..., None])
    return {"prefix": vectors, PREFIX_SEEN: jnp.asarray(seen, jnp.float32)}


_COMBINE = {LOW_RANK: _low_rank, BOTTLENECK: _bottleneck, PREFIX: _prefix}
