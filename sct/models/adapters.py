"""Make, find, count and check the adapters of a model, and merge low-rank adapters into its parameters.

The collection "adapters" holds the adapter of each layer under the path of the layer. `sct.nn.adapters` defines the
arrays of an adapter and what it computes. `sct.models.adapter_kinds` defines the options of each kind. The function
`merge` changes the model's parameters; no other function here does.
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

# Path rules for tasks that train only the adapters, and patterns for parameters that a saved model may lack.
_TRAINED = frozenset(name for kind in KINDS for name in kind.trained)
TRAINABLE: tuple[tuple[str, bool], ...] = (
    (rf"^{COLLECTION}/(.*/)?({'|'.join(sorted(_TRAINED))})$", True), (".*", False)
)  # fmt: skip
NEW: tuple[str, ...] = (rf"^{COLLECTION}/",)
_SHOWN = 8
# A block outside a stack has its number in its path.
_NUMBER = re.compile(r"(?:^|/)[a-z][a-z_]*_(\d+)/")


def under(layer: str, array: str) -> str:
    """Return the path of an adapter array: the path of its layer, a slash and the name of the array."""
    return f"{layer}/{array}" if layer else array


def chosen(params: Any, config: AdapterConfig) -> dict[str, Box]:
    """Find the layers that get an adapter, and return their boxed matrices as a dict by layer path.

    Raises
    ------
    ConfigError
        A target matches no layer, or `layers` contains the number of a block that the model does not have.
    """
    places = config.places(params)
    for target in config.targets:
        if not any(re.search(target, place) for place in places):
            more = ", ..." if len(places) > _SHOWN else ""
            raise ConfigError(
                f"`targets` contains {target!r}, which matches no {config.place} of the model: write a pattern that "
                f"matches one of these layers: {', '.join(sorted(places)[:_SHOWN])}{more}."
            )
    found = {
        place: box
        for place, box in places.items()
        if any(re.search(target, place) for target in config.targets)
    }
    if not config.layers:
        return found
    numbers = {place: _numbers(place, box) for place, box in found.items()}
    # Every stack must have all the numbers, and so must the blocks outside stacks, taken together.
    sets = [own for place, own in numbers.items() if is_stacked(found[place])]
    single = {number for place, own in numbers.items() if not is_stacked(found[place]) for number in own}
    sets += [single] if single or not sets else []
    for own in sets:
        for number in config.layers:
            if number not in own:
                blocks = f"in the blocks 0 to {max(own)}" if max(own, default=0) else "in block 0"
                found_in = blocks if own else "outside the numbered blocks"
                choose = f"choose from 0 to {max(own)}, or " if max(own, default=0) else ""
                raise ConfigError(
                    f"`layers` lists block {number}, but the modules that match `targets` are {found_in}: {choose}set "
                    "`layers` to () to adapt all of these modules."
                )
    return {place: box for place, box in found.items() if numbers[place].intersection(config.layers)}


def _numbers(place: str, box: Box) -> set[int]:
    """Return the indices of the blocks that use a matrix.

    All blocks of a stack use the stack's matrices. Any other matrix belongs to one block or to no block.
    """
    if is_stacked(box):
        return set(range(box.value.shape[0]))
    match = _NUMBER.search(place)
    return {int(match[1])} if match else set()


def num_blocks(params: Any, config: AdapterConfig) -> int:
    """Return the number of blocks with layers that match the targets; 0 if these layers are outside of blocks."""
    numbers = [_numbers(place, box) for place, box in chosen(params, config).items()]
    return 1 + max((max(own) for own in numbers if own), default=-1)


def _boxes(
    config: type[AdapterConfig], box: Box, size: int, numbers: Any, layers: int | None
) -> dict[str, Box]:
    """Return the shapes of the arrays in the adapter of a matrix, as a dict by array name.

    Each shape is in a box together with the names of the axes.

    If only some layers of a stack have an adapter, `layers` is the number of these layers; otherwise `layers` is None.
    """
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

    New low-rank adapters, and new bottlenecks with a skip, do not change the outputs of the model.

    Parameters
    ----------
    rng
        PRNG key. The key for each adapter is derived only from `rng`, the path of the layer and the kind of adapter.
    params
        The collection "params", or its shapes. Each array or shape is in a box together with its axis names. Under
        `jax.eval_shape`, no arrays are allocated.
    configs
        Options of the adapters, one configuration per kind. A layer may have one adapter of each kind.

    Returns
    -------
    The collection "adapters" in float32, boxed with the axis names of the layers. The variables of the adapted model
    are `{**variables, "adapters": adapters.init(rng, variables["params"], config)}`.

    Raises
    ------
    ConfigError
        A target matches no layer, `layers` contains the number of a block that the model does not have, or one layer
        would get two adapters of the same kind.
    """
    made: dict[str, Any] = {}
    for config in configs:
        for place, box in chosen(params, config).items():
            some = len(config.layers) if config.layers and is_stacked(box) else None
            boxes = _boxes(type(config), box, config.size, config.numbers, some)
            # The key of a low-rank adapter depends only on the path, so that adapters made before the other kinds
            # existed can be reproduced.
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
                    f"two configurations give {place!r} a {config.arrays.name} adapter, but a layer can have only one "
                    "adapter of each kind: change `targets` in one of the two configurations."
                )
            made |= {under(place, array): b.replace_boxed(values[array]) for array, b in boxes.items()}
    return unflatten(made)


def beside(variables: Any, found: Mapping[str, Any]) -> Any:
    """Extend the boxed shapes of a model by the boxed shapes of the adapters in a weights file.

    Parameters
    ----------
    variables
        Boxed shapes of the model without adapters.
    found
        Shapes of the arrays in the file, as a dict by path. These arrays determine which adapters the model has, the
        sizes and the constants of the adapters, and how many layers of a stack have an adapter. All other dimensions
        come from the model's layers, so that a comparison of the result with `found` shows what does not fit.

    Returns
    -------
    Boxed shapes of the model. If the file has adapters for the model, the shapes contain the collection "adapters".
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
    """Yield the path of the layer, the kind, and the arrays of each adapter in a model's collection "adapters".

    Raises
    ------
    CheckpointError
        An array in the collection belongs to no kind of adapter.
    """
    adapters: dict[tuple[str, Kind], dict[str, Any]] = {}
    for path, value in flatten(variables.get(COLLECTION, {})).items():
        layer, _, array = path.rpartition("/")
        kind = kind_of(array)
        if kind is None:
            raise CheckpointError(
                f"the collection {COLLECTION!r} has the array {path}, but no kind of adapter has an array of this "
                "name: remove the array, or make the adapters with `sct.models.adapters.init`."
            )
        adapters.setdefault((layer, kind), {})[array] = value
    for (layer, kind), arrays in adapters.items():
        yield layer, kind, arrays


def _config_of(kind: Kind) -> type[AdapterConfig]:
    return next(config for config in CONFIGS if config.arrays is kind)


def check_same(variables: Mapping[str, Any], config: AdapterConfig, what: str) -> None:
    """Raise `ConfigError` if a model's adapters differ from a configuration in their kind or their options.

    The kind and the options of existing adapters cannot change, so a different configuration would have no effect.
    `what` names the model in the message.
    """
    advice = "set the same value, or merge the adapters first (`sct.models.lora.merge`)."
    for layer, kind, adapter in adapters_of(variables):
        if kind is not config.arrays:
            raise ConfigError(
                f"{what} has a {kind.name} adapter in {layer!r}, but the configuration asks for a "
                f"{config.arrays.name} adapter: use the same kind, or start from a model without adapters."
            )
        for name, value in _config_of(kind).options(adapter).items():
            if not math.isclose(value, wanted := getattr(config, name), rel_tol=1e-5, abs_tol=1e-7):
                raise ConfigError(
                    f"the adapter of {layer!r} in {what} has {name} = {value:g}, but the configuration has {wanted:g}: "
                    f"{advice}"
                )
        if kind.layers in adapter:
            own = tuple(int(number) for number in np.ravel(adapter[kind.layers]))
            if own != tuple(sorted(config.layers)):
                raise ConfigError(
                    f"the adapter of {layer!r} in {what} has layers = {own}, but the configuration has "
                    f"{config.layers}: {advice}"
                )


def merge(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Merge low-rank adapters into the kernels of their layers and return variables without adapters.

    The merged model computes the same outputs. The sums are computed in float32, and each kernel keeps its dtype. The
    merged model has no adapter dropout, so a PRNG key named "dropout" no longer changes the outputs.

    Raises
    ------
    CheckpointError
        An adapter belongs to a layer that the model does not have.
    ConfigError
        An adapter is not low-rank, so it cannot be merged into a kernel.
    """
    params = flatten(variables["params"])
    for layer, kind, adapter in adapters_of(variables):
        if kind is not LOW_RANK:
            raise ConfigError(
                f"{layer!r} has a {kind.name} adapter, but only low-rank (LoRA) adapters can be merged into a layer: "
                "use the model without merging, or train LoRA adapters."
            )
        path = under(layer, "kernel")
        if path not in params:
            raise CheckpointError(
                f"the adapters contain {layer!r}, but the model has no such layer: use the model that the adapters "
                "were trained on."
            )
        kernel = jnp.asarray(params[path])
        adapter = for_all_layers(adapter, kernel.shape[0])
        change = jnp.matmul(adapter["lora_a"], adapter["lora_b"], precision=jax.lax.Precision.HIGHEST)
        change = change * jnp.asarray(adapter["scale"])[..., None, None]
        params[path] = (kernel.astype(jnp.float32) + change).astype(kernel.dtype)
    rest = {name: tree for name, tree in variables.items() if name != COLLECTION}
    return {**rest, "params": unflatten(params)}


def count(adapters: Mapping[str, Any]) -> int:
    """Return the number of trained parameters in the collection "adapters"."""
    sizes = (
        np.prod(value.shape, dtype=np.int64)
        for path, value in flatten(nn.unbox(adapters)).items()
        if path.rpartition("/")[2] in _TRAINED
    )
    return int(sum(sizes))
