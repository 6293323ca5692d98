"""Name the axes of parameters and activations, and place the arrays on a device mesh.

Layers name the axes of their arrays ("batch", "length", "channel"). Rules map these names to mesh axes ("data", "fsdp",
"tensor", "sequence"), and `sct.train.sharding` makes the mesh. The same layer code therefore runs on any mesh, and also
without a mesh.

A layer is distributed over devices in one of two ways:

- `constrain` states how an activation is sharded, and XLA adds the communication; layers with matrix products use it.
- `on_each_device` runs a function on the bags and cells that each device holds. Norms and convolutions along the
  sequence use it, because XLA would gather the whole sequence for them. `neighbor_positions` fetches the few positions
  that a convolution needs from the neighboring devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sct.errors import ConfigError

# Activations.
BATCH = "batch"
LENGTH = "length"  # positions of the flat cells-by-genes sequence, or tokens of a text
CELL = "cell"
GENE = "gene"
# Parameters and channels.
VOCAB = "vocab"
TEXT_VOCAB = "text_vocab"  # vocabulary of a text model: tens of thousands of tokens
LAYERS = "layers"  # layers of a stack (see `sct.nn.stack`)
CHANNEL_IN = "channel_in"
CHANNEL = "channel"
EMBED = "embed"
HEADS = "heads"
HEAD_DIM = "head_dim"
MLP = "mlp"
KERNEL = "kernel"  # positions of a convolution kernel
GENE_SCALE = "gene_scale"  # one entry per gene position (shared layer norm)

# Logical axis -> mesh axes. An axis that is not listed is not sharded.
RULES: dict[str, tuple[str, ...]] = {
    BATCH: ("data", "fsdp"),
    LENGTH: ("sequence",),
    CELL: ("sequence",),
    CHANNEL_IN: ("fsdp",),
    CHANNEL: ("tensor",),
    EMBED: ("fsdp",),
    HEADS: ("tensor",),
    MLP: ("tensor",),
    TEXT_VOCAB: ("tensor",),
}

Initializer = jax.nn.initializers.Initializer
# Truncated normal scaled by the fan-in: the usual choice for convolutions and dense layers followed by GELU.
kernel_init: Initializer = jax.nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
zeros: Initializer = jax.nn.initializers.zeros
ones: Initializer = jax.nn.initializers.ones


def param(
    module: nn.Module, name: str, init: Initializer, shape: tuple[int, ...], axes: tuple[str | None, ...]
) -> jax.Array:
    """Declare a float32 parameter of `module` with its shape, its initializer and one axis name per dimension.

    Sharding, abstract initialization and memory estimates all use this declaration.
    """
    if len(shape) != len(axes):
        raise ValueError(
            f"the parameter {name} has {len(shape)} dimensions, but {len(axes)} axis names: give one name per "
            "dimension."
        )
    # Inside a module, Flax returns the array itself and not the box with the axis names.
    value = module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)
    return cast(jax.Array, value)


AxisRules = Mapping[str, tuple[str, ...]]
_active: ContextVar[tuple[Mesh, AxisRules] | None] = ContextVar("sct_mesh", default=None)


@contextmanager
def on_mesh(mesh: Mesh, rules: AxisRules) -> Iterator[None]:
    """Shard activations over `mesh` by the names of their axes, in all code that is traced inside this context."""
    token = _active.set((mesh, rules))
    try:
        yield
    finally:
        _active.reset(token)


def spec(
    shape: tuple[int, ...], names: tuple[str | None, ...], mesh: Mesh, rules: AxisRules
) -> PartitionSpec:
    """Return the PartitionSpec of an array of the given shape and axis names.

    Each axis is sharded over the mesh axes that `rules` give for its name. An axis is not sharded if an earlier axis of
    the array already uses one of these mesh axes, or if the size of the axis is not a multiple of the number of devices
    along these mesh axes.
    """
    taken: set[str] = set()
    parts: list[tuple[str, ...] | None] = []
    for size, name in zip(shape, names, strict=True):
        wanted = tuple(rules.get(name, ())) if name is not None else ()
        devices = math.prod(mesh.shape[axis] for axis in wanted)
        fits = devices > 1 and size % devices == 0 and not taken & set(wanted)
        parts.append(wanted if fits else None)
        taken |= set(wanted) if fits else set()
    return PartitionSpec(*parts)


def placement(shape: tuple[int, ...], *names: str | None) -> tuple[Mesh, PartitionSpec] | None:
    """Return the mesh and the PartitionSpec of an activation with the given shape and axis names.

    Return None if activations are not sharded.
    """
    active = _active.get()
    if active is None or not is_sharded():
        return None
    mesh, rules = active
    return mesh, spec(shape, names, mesh, rules)


def is_sharded() -> bool:
    """Return whether activations are sharded over a mesh of several devices.

    Inside a function that `on_each_device` runs, the result is False.
    """
    active = _active.get()
    return active is not None and active[0].size > 1 and not _manual_axes()


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Shard the activation x over the mesh by the names of its axes.

    Without a mesh of several devices, return x unchanged.
    """
    placed = placement(x.shape, *names)
    return x if placed is None else jax.lax.with_sharding_constraint(x, NamedSharding(*placed))


def shards_of(name: str, size: int) -> int:
    """Return the number of equal parts into which the mesh cuts an axis with the given name and size.

    Without a mesh, the result is 1.
    """
    placed = placement((size,), name)
    return 1 if placed is None else math.prod(placed[0].shape[axis] for axis in _mesh_axes(placed[1][0]))


def _mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Convert one entry of a PartitionSpec (a name, a tuple of names, or None) to a tuple of mesh axes."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def on_each_device(
    function: Callable[..., jax.Array], params: Any, *sequences: jax.Array | None, cells: int
) -> jax.Array:
    """Run a function on the bags and cells that each device holds.

    The function gets the device's part of each sequence. Inside the function, only `neighbor_positions` communicates
    with other devices. XLA manages the mesh axes that shard neither bags nor cells, such as the axes over which
    parameters are sharded. If no mesh shards bags or cells, the result is `function(params, *sequences)`.

    Parameters
    ----------
    function
        Function that maps (params, *sequences) to a sequence (B, L', D) with the same number of positions for every
        cell.
    params
        Tree of parameters. Each device gets complete parameters, except along the mesh axes that XLA manages.
    sequences
        Arrays (B, L, C), each with the positions of `cells` cells. A sequence may also be None.
    cells
        Number of cells in a bag (K). A cell is never split between devices.

    Raises
    ------
    ConfigError
        The number of cells is not a multiple of the number of devices along the "sequence" axis.
    """
    batch = next(x.shape[0] for x in sequences if x is not None)
    placed = placement((batch, cells), BATCH, CELL)
    if placed is None:
        return function(params, *sequences)
    mesh, where = placed
    devices = math.prod(mesh.shape[axis] for axis in RULES[CELL])
    if cells % devices:
        raise ConfigError(
            f"a bag has {cells} cells, but this number must be a multiple of {devices}, because the mesh splits each "
            f"bag among {devices} devices: set --config.data.cells_per_bag={-(-cells // devices) * devices}, or use "
            f"fewer devices along the mesh axis {RULES[CELL][0]!r}."
        )
    if not any(where):
        return function(params, *sequences)
    used = {*_mesh_axes(where[0]), *_mesh_axes(where[1])}
    specs = (PartitionSpec(), *(None if x is None else where for x in sequences))
    shard = jax.shard_map(
        function, mesh=mesh, in_specs=specs, out_specs=where, axis_names=used, check_vma=False
    )
    return shard(params, *sequences)


def _manual_axes() -> frozenset[str]:
    """Return the mesh axes of the `shard_map` inside which code is being traced.

    The function asks JAX for these axes. A context variable would fail for gradients, because JAX traces gradients
    after the `with` block has ended.
    """
    return frozenset(jax.sharding.get_abstract_mesh().manual_axes)


def is_sequence_cut() -> bool:
    """Return whether sequences are split among devices.

    If they are, a function that `on_each_device` runs gets only a part of each sequence.
    """
    return bool(_manual_axes().intersection(RULES[CELL]))


def neighbor_positions(x: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Return the `size` positions before this device's part of a sequence, and the `size` positions after the part.

    x (B, L, C) is the device's part. Both results have the shape (B, size, C). At the ends of the whole sequence, the
    missing positions are zeros. If the sequence is not split among devices, both results are zeros.

    Raises
    ------
    ConfigError
        The part has fewer than `size` positions.
    """
    along = tuple(axis for axis in RULES[CELL] if axis in _manual_axes())
    if not along:
        outside = jnp.zeros((x.shape[0], size, x.shape[2]), x.dtype)
        return outside, outside
    if x.shape[1] < size:
        raise ConfigError(
            f"each device along the mesh axis {along[0]!r} holds only {x.shape[1]} positions of a sequence, but a "
            f"convolution reads {size} positions from each neighboring device: use fewer devices along {along[0]!r}, "
            "or set a larger --config.data.cells_per_bag."
        )
    parts = jax.lax.axis_size(along)
    # A device that receives nothing gets zeros from `ppermute`.
    before = jax.lax.ppermute(x[:, x.shape[1] - size :], along, [(i, i + 1) for i in range(parts - 1)])
    after = jax.lax.ppermute(x[:, :size], along, [(i + 1, i) for i in range(parts - 1)])
    return before, after


def shardings(boxed: Any, mesh: Mesh, rules: AxisRules) -> Any:
    """Compute a tree with the sharding of each boxed variable, from the logical names of the variable's axes.

    The boxed variables come from `module.init`.

    Variables without axis names are replicated on all devices.
    """

    def place(leaf: Any) -> NamedSharding:
        if isinstance(leaf, nn.LogicallyPartitioned):
            return NamedSharding(mesh, spec(leaf.value.shape, leaf.names, mesh, rules))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map(place, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))
