"""Logical axis names of parameters and activations, and what a mesh makes of them.

Layers name the axes of their arrays ("batch", "length", "channel"). Rules map the names to mesh axes ("data", "fsdp",
"tensor", "sequence"); `sct.train.sharding` makes the mesh. So a layer runs on any mesh, and without one.

There are two ways to place the work of a layer, and a layer chooses one:

- `constrain` says where an activation lies, and XLA finds the communication. Right for matrix products.
- `on_each_device` runs a function on each device's own bags and cells, as if there were nothing else. Right for norms
  and convolutions along the sequence, for which XLA gathers the whole sequence. `neighbor_positions` fetches the few
  positions that a convolution needs from the devices next to it.
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
LENGTH = "length"  # positions of the flat cells-by-genes sequence
CELL = "cell"
GENE = "gene"
# Parameters and channels.
VOCAB = "vocab"
TEXT_VOCAB = "text_vocab"  # tokens of a text model, tens of thousands
LAYERS = "layers"  # layers of one kind, stacked
CHANNEL_IN = "channel_in"
CHANNEL = "channel"
EMBED = "embed"
HEADS = "heads"
HEAD_DIM = "head_dim"
MLP = "mlp"
KERNEL = "kernel"  # positions of a convolution's kernel
GENE_SCALE = "gene_scale"  # one entry per gene position (shared layer norm)

# Logical axis -> mesh axes. An axis whose name is not here stays whole on every device.
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
# Fan-in scaled truncated normal, the usual choice for convolutions and matrices followed by GELU.
kernel_init: Initializer = jax.nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
zeros: Initializer = jax.nn.initializers.zeros
ones: Initializer = jax.nn.initializers.ones


def param(
    module: nn.Module, name: str, init: Initializer, shape: tuple[int, ...], axes: tuple[str | None, ...]
) -> jax.Array:
    """Declare a float32 parameter of `module`: shape, initializer, and one logical axis name per dimension.

    Sharding, abstract initialization and sums of memory derive from this one declaration.
    """
    if len(shape) != len(axes):
        raise ValueError(f"parameter {name}: {len(shape)} dimensions but {len(axes)} axis names")
    # Inside a module the box that carries the names is already opened.
    value = module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)
    return cast(jax.Array, value)


AxisRules = Mapping[str, tuple[str, ...]]
_active: ContextVar[tuple[Mesh, AxisRules] | None] = ContextVar("sct_mesh", default=None)


@contextmanager
def on_mesh(mesh: Mesh, rules: AxisRules) -> Iterator[None]:
    """Trace with activations placed on `mesh`, by the names of their axes."""
    token = _active.set((mesh, rules))
    try:
        yield
    finally:
        _active.reset(token)


def spec(
    shape: tuple[int, ...], names: tuple[str | None, ...], mesh: Mesh, rules: AxisRules
) -> PartitionSpec:
    """Mesh axes of an array with named axes.

    An axis gets the mesh axes that `rules` give to its name. It stays whole where an earlier axis of the array has
    taken one of them, or where the number of their devices does not divide its size.
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
    """Mesh, and mesh axes of an activation with named axes; None unless `is_sharded`."""
    active = _active.get()
    if active is None or not is_sharded():
        return None
    mesh, rules = active
    return mesh, spec(shape, names, mesh, rules)


def is_sharded() -> bool:
    """Whether activations are placed on a mesh of several devices; not inside of `on_each_device`."""
    active = _active.get()
    return active is not None and active[0].size > 1 and not _manual_axes()


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Name the axes of an activation; nothing happens unless `is_sharded`."""
    placed = placement(x.shape, *names)
    return x if placed is None else jax.lax.with_sharding_constraint(x, NamedSharding(*placed))


def shards_of(name: str, size: int) -> int:
    """Number of equal parts in which an axis of that name and size is placed on the mesh; 1 without a mesh."""
    placed = placement((size,), name)
    return 1 if placed is None else math.prod(placed[0].shape[axis] for axis in _mesh_axes(placed[1][0]))


def _mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Mesh axes of one entry of a PartitionSpec, which may be a name instead of a tuple."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def on_each_device(
    function: Callable[..., jax.Array], params: Any, *sequences: jax.Array | None, cells: int
) -> jax.Array:
    """Run a function on each device's own bags and cells.

    It sees its part of each sequence, and no mesh except through `neighbor_positions`. Mesh axes that divide neither
    bags nor cells (those of parameters) are left to XLA. Without a mesh, or where it divides neither, this is
    `function(params, *sequences)`.

    Parameters
    ----------
    function
        (params, *sequences) -> sequence (B, L', D) with equally many positions for every cell.
    params
        Tree of parameters; each device sees them whole, except for the axes left to XLA.
    sequences
        Arrays (B, L, C) of `cells` cells each, or None.
    cells
        Cells of a bag (K); a device holds whole ones.

    Raises
    ------
    ConfigError
        The devices do not divide the cells.
    """
    batch = next(x.shape[0] for x in sequences if x is not None)
    placed = placement((batch, cells), BATCH, CELL)
    if placed is None:
        return function(params, *sequences)
    mesh, where = placed
    devices = math.prod(mesh.shape[axis] for axis in RULES[CELL])
    if cells % devices:
        raise ConfigError(
            f"a bag has {cells} cells, but the mesh divides them among {devices} devices: use a multiple, such as "
            f"--config.data.cells_per_bag={-(-cells // devices) * devices}, or fewer devices along the mesh axis "
            f"{RULES[CELL][0]!r}."
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
    """Mesh axes of which the code being traced sees one part: those of the `shard_map` around it.

    Asked of JAX: a gradient is traced after a function that set a context variable of ours would have returned.
    """
    return frozenset(jax.sharding.get_abstract_mesh().manual_axes)


def is_sequence_cut() -> bool:
    """Whether a function under `on_each_device` sees a part of a sequence, whose rest lies on other devices."""
    return bool(_manual_axes().intersection(RULES[CELL]))


def neighbor_positions(x: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Positions (B, size, C) before and after this device's part x (B, L, C) of a sequence.

    They are zeros at the ends of the whole sequence, and where it is not cut.

    Raises
    ------
    ConfigError
        The part is shorter than what its neighbors need of it.
    """
    along = tuple(axis for axis in RULES[CELL] if axis in _manual_axes())
    if not along:
        outside = jnp.zeros((x.shape[0], size, x.shape[2]), x.dtype)
        return outside, outside
    if x.shape[1] < size:
        raise ConfigError(
            f"a device along the mesh axis {along[0]!r} has {x.shape[1]} positions of a sequence, but its neighbors "
            f"need {size} of them: use fewer devices there, or more cells in a bag."
        )
    parts = jax.lax.axis_size(along)
    # `ppermute` gives zeros to a device to which nothing is sent.
    before = jax.lax.ppermute(x[:, x.shape[1] - size :], along, [(i, i + 1) for i in range(parts - 1)])
    after = jax.lax.ppermute(x[:, :size], along, [(i + 1, i) for i in range(parts - 1)])
    return before, after


def shardings(boxed: Any, mesh: Mesh, rules: AxisRules) -> Any:
    """Tree of the shardings of boxed variables (from `module.init`), by their logical axis names."""

    def place(leaf: Any) -> NamedSharding:
        if isinstance(leaf, nn.LogicallyPartitioned):
            return NamedSharding(mesh, spec(leaf.value.shape, leaf.names, mesh, rules))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map(place, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))
