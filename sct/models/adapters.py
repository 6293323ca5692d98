"""Adapters: made beside a model's parameters, found in it, counted, and, where that can be, merged into them.

An adapter lies in the collection "adapters" under the path of its layer; `sct.nn.adapters` says what it holds and what
it computes, `sct.models.adapter_kinds` which kinds there are. Parameters are never touched before `merge`.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sct.errors import CheckpointError, ConfigError
from sct.models.adapter_kinds import CONFIGS, AdapterConfig, Box, is_stacked
from sct.nn import axes
from sct.nn.adapters import COLLECTION, KINDS, LOW_RANK, Kind, for_all_layers, kind_of
from sct.nn.paths import flatten, unflatten

# For a task that trains the adapters alone (`trainable`), on a model that has none yet (`new`).
_TRAINED = frozenset(name for kind in KINDS for name in kind.trained)
TRAINABLE: tuple[tuple[str, bool], ...] = (
    (rf"^{COLLECTION}/(.*/)?({'|'.join(sorted(_TRAINED))})$", True), (".*", False)
)  # fmt: skip
NEW: tuple[str, ...] = (rf"^{COLLECTION}/",)
_SHOWN = 8
# A block that is not stacked has its number in its path.
_NUMBER = re.compile(r"(?:^|/)[a-z][a-z_]*_(\d+)/")


def under(layer: str, array: str) -> str:
    """Path of an array of a layer."""
    return f"{layer}/{array}" if layer else array


def chosen(params: Any, config: AdapterConfig) -> dict[str, Box]:
    """Boxed matrices of the layers that a configuration's targets and layers find, by the path of the layer.

    Raises
    ------
    ConfigError
        A target or a number of a layer that finds none.
    """
    places = config.places(params)
    for target in config.targets:
        if not any(re.search(target, place) for place in places):
            more = ", ..." if len(places) > _SHOWN else ""
            raise ConfigError(
                f"the target {target!r} matches no {config.place} of the model: choose from "
                f"{', '.join(sorted(places)[:_SHOWN])}{more}."
            )
    found = {
        place: box
        for place, box in places.items()
        if any(re.search(target, place) for target in config.targets)
    }
    if not config.layers:
        return found
    numbers = {place: _numbers(place, box) for place, box in found.items()}
    # A number must be one of every stack, and of the blocks that are not stacked together.
    sets = [own for place, own in numbers.items() if is_stacked(found[place])]
    single = {number for place, own in numbers.items() if not is_stacked(found[place]) for number in own}
    sets += [single] if single or not sets else []
    for own in sets:
        for number in config.layers:
            if number not in own:
                most = f"0 to {max(own)}" if own else "none in a block"
                raise ConfigError(
                    f"layers have {number}, but the {config.place}s that the targets match are in the blocks {most}: "
                    "choose from these, or leave layers empty for all."
                )
    return {place: box for place, box in found.items() if numbers[place].intersection(config.layers)}


def _numbers(place: str, box: Box) -> set[int]:
    """Numbers of the blocks that a layer belongs to."""
    if is_stacked(box):
        return set(range(box.value.shape[0]))
    match = _NUMBER.search(place)
    return {int(match[1])} if match else set()


def _boxes(
    config: type[AdapterConfig], box: Box, size: int, numbers: Any, layers: int | None
) -> dict[str, Box]:
    """Shapes and axis names of the adapter beside a matrix; `layers` tells how many of a stack have one, if not all."""
    lead: tuple[int, ...] = ()
    names: tuple[str | None, ...] = ()
    if is_stacked(box):
        lead, names = (box.value.shape[0] if layers is None else layers,), box.names[:1]
    made = {
        array: Box(jax.ShapeDtypeStruct((*lead, *shape), jnp.float32), (*names, *own))
        for array, (shape, own) in config.shapes(box, size, numbers).items()
    }
    if lead and layers is not None:
        made[config.arrays.layers] = Box(jax.ShapeDtypeStruct(lead, jnp.int32), (axes.LAYERS,))
    return made


def init(rng: jax.Array, params: Any, *configs: AdapterConfig) -> dict[str, Any]:
    """Make the adapters of a model.

    Low-rank adapters and bottlenecks with a skip change nothing before they are trained.

    Parameters
    ----------
    rng
        PRNG key; an adapter's own key depends on the path of its layer and on its kind alone.
    params
        The collection "params", or its shapes, boxed with axis names; under `jax.eval_shape` nothing is allocated.
    configs
        Options of one or several kinds. A layer may have one adapter of each kind.

    Returns
    -------
    The collection "adapters", float32, boxed with the axis names of the layers:
    `{**variables, "adapters": adapters.init(rng, variables["params"], config)}` are the variables of an adapted model.

    Raises
    ------
    ConfigError
        A target that matches no layer, a number of a layer that is not there, or two of a kind in one place.
    """
    made: dict[str, Any] = {}
    for config in configs:
        for place, box in chosen(params, config).items():
            some = len(config.layers) if config.layers and is_stacked(box) else None
            boxes = _boxes(type(config), box, config.size, config.numbers, some)
            # The keys of low-rank adapters are those of the path alone, as before there were other kinds.
            name = place if config.arrays is LOW_RANK else f"{config.arrays.name} {place}"
            values: dict[str, Any] = dict(
                config.draw(
                    jax.random.fold_in(rng, zlib.crc32(name.encode())),
                    {array: b.value.shape for array, b in boxes.items()},
                )
            )
            for array, number in config.numbers.items():
                values[array] = jnp.full(boxes[array].value.shape, number, jnp.float32)
            if config.arrays.layers in boxes:
                values[config.arrays.layers] = jnp.asarray(sorted(config.layers), jnp.int32)
            if under(place, config.arrays.trained[0]) in made:
                raise ConfigError(
                    f"there are two {config.arrays.name} adapters of {place!r}: let the targets of one leave it out."
                )
            made |= {under(place, array): b.replace_boxed(values[array]) for array, b in boxes.items()}
    return unflatten(made)


def beside(variables: Any, found: Mapping[str, Any]) -> Any:
    """Boxed shapes of a model, with those of the adapters that a file has for it.

    Parameters
    ----------
    variables
        Boxed shapes of the model without adapters.
    found
        What the file holds: shapes by path. Of adapters the size is taken, which of their numbers are there, and in how
        many layers of a stack they are; the other sizes are those of the layers, so that a comparison with `found`
        tells what does not fit.
    """
    made: dict[str, Any] = {}
    kept = {path.removeprefix(f"{COLLECTION}/"): value for path, value in found.items()
            if path.startswith(f"{COLLECTION}/")}  # fmt: skip
    if not kept:
        return variables
    for config in CONFIGS:
        places, kind = config.places(variables["params"]), config.arrays
        for path, value in kept.items():
            place, _, array = path.rpartition("/")
            if array != kind.trained[0] or place not in places or len(value.shape) < 2:
                continue
            numbers = [name for name in kind.numbers if under(place, name) in kept]
            index = kept.get(under(place, kind.layers))
            some = None if index is None or not index.shape else index.shape[0]
            boxes = _boxes(config, places[place], config.size_of(value.shape), numbers, some)
            made |= {under(place, name): box for name, box in boxes.items()}
    return {**variables, COLLECTION: unflatten(made)} if made else variables


def adapters_of(variables: Mapping[str, Any]) -> Iterator[tuple[str, Kind, dict[str, Any]]]:
    """Each layer's path, and kind and arrays of its adapter, of the collection "adapters" of a model.

    Raises
    ------
    CheckpointError
        An array of no kind.
    """
    adapters: dict[tuple[str, Kind], dict[str, Any]] = {}
    for path, value in flatten(variables.get(COLLECTION, {})).items():
        layer, _, array = path.rpartition("/")
        kind = kind_of(array)
        if kind is None:
            raise CheckpointError(
                f"the collection {COLLECTION!r} has {path}, which belongs to no kind of adapter: make adapters by "
                "sct.models.adapters.init."
            )
        adapters.setdefault((layer, kind), {})[array] = value
    for (layer, kind), arrays in adapters.items():
        yield layer, kind, arrays


def _config_of(kind: Kind) -> type[AdapterConfig]:
    return next(config for config in CONFIGS if config.arrays is kind)


def check_same(variables: Mapping[str, Any], config: AdapterConfig, what: str) -> None:
    """Raise `ConfigError` where the adapters of a model are of another kind, or have other options, than asked for.

    These are kept with the adapters, so what the configuration says would have no effect. `what` names the model.
    """
    advice = "ask for its own, or merge the adapters first (sct.models.lora.merge)."
    for layer, kind, adapter in adapters_of(variables):
        if kind is not config.arrays:
            raise ConfigError(
                f"the adapter of {layer!r} in {what} is a {kind.name} one, but a {config.arrays.name} one is asked "
                "for: ask for its own kind, or start from a model without adapters."
            )
        for name, value in _config_of(kind).options(adapter).items():
            if not math.isclose(value, wanted := getattr(config, name), rel_tol=1e-5, abs_tol=1e-7):
                raise ConfigError(
                    f"the adapter of {layer!r} in {what} has {name} {value:g}, but {wanted:g} is asked for: {advice}"
                )
        if kind.layers in adapter:
            own = tuple(int(number) for number in np.ravel(adapter[kind.layers]))
            if own != tuple(sorted(config.layers)):
                raise ConfigError(
                    f"the adapter of {layer!r} in {what} is in the layers {own}, but {config.layers} are asked for: "
                    f"{advice}"
                )


def merge(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Variables without adapters that compute the same: what a low-rank adapter gives is added to its kernel.

    Kernels keep their types; the sums are made in float32. A key for dropout changes nothing any more.

    Raises
    ------
    CheckpointError
        An adapter of a layer that the model does not have.
    ConfigError
        An adapter that no kernel can hold.
    """
    params = flatten(variables["params"])
    for layer, kind, adapter in adapters_of(variables):
        if kind is not LOW_RANK:
            raise ConfigError(
                f"the adapter of {layer!r} is a {kind.name} one, which cannot be merged into the layer: keep it beside "
                "the model, or train low-rank adapters."
            )
        path = under(layer, "kernel")
        if path not in params:
            raise CheckpointError(
                f"there is an adapter of {layer!r}, but the model has no such layer: give the model that the "
                "adapter was trained on."
            )
        kernel = jnp.asarray(params[path])
        adapter = for_all_layers(adapter, kernel.shape[0])
        change = jnp.matmul(adapter["lora_a"], adapter["lora_b"], precision=jax.lax.Precision.HIGHEST)
        change = change * jnp.asarray(adapter["scale"])[..., None, None]
        params[path] = (kernel.astype(jnp.float32) + change).astype(kernel.dtype)
    rest = {name: tree for name, tree in variables.items() if name != COLLECTION}
    return {**rest, "params": unflatten(params)}


def count(adapters: Mapping[str, Any]) -> int:
    """Number of trained parameters of the collection "adapters"."""
    sizes = (
        np.prod(value.shape, dtype=np.int64)
        for path, value in flatten(nn.unbox(adapters)).items()
        if path.rpartition("/")[2] in _TRAINED
    )
    return int(sum(sizes))
