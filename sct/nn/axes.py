"""Logical axis names of parameters and activations, and how a parameter is declared.

A parameter's shape, dtype, initialiser and axis names are declared in one call; sharding, abstract
initialisation and memory sums derive from it. `sct.train.sharding` maps the names to mesh axes.
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
TAPS = "taps"  # kernel positions of a convolution
GENE_SCALE = "gene_scale"  # one entry per gene position (shared layer norm)

# Logical axis -> mesh axes (`sct.train.sharding` makes the mesh); names that are not here stay whole.
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
    """Declare a float32 parameter of `module` with one logical axis name per dimension."""
    if len(shape) != len(axes):
        raise ValueError(f"parameter {name}: {len(shape)} dimensions but {len(axes)} axis names")
    # Inside a module the box that carries the names is already opened.
    value = module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)
    return cast(jax.Array, value)


AxisRules = Mapping[str, tuple[str, ...]]
_active: ContextVar[tuple[Mesh, AxisRules] | None] = ContextVar("sct_mesh", default=None)


@contextmanager
def on_mesh(mesh: Mesh, rules: AxisRules) -> Iterator[None]:
    """Trace what is inside with activations placed on `mesh`, by logical axis name."""
    token = _active.set((mesh, rules))
    try:
        yield
    finally:
        _active.reset(token)


def spec(
    shape: tuple[int, ...], names: tuple[str | None, ...], mesh: Mesh, rules: AxisRules
) -> PartitionSpec:
    """Mesh axes of an array with named axes.

    An axis goes to the mesh axes that `rules` give its name, unless an earlier axis of the array has taken
    one of them or its size is no multiple of their devices; then it stays whole.
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
    """Mesh, and mesh axes of an activation with named axes; None where `is_split` is not."""
    active = _active.get()
    if active is None or not is_split():
        return None
    mesh, rules = active
    return mesh, spec(shape, names, mesh, rules)


def is_split() -> bool:
    """Whether activations are placed on a mesh of several devices; not where a device sees its part alone."""
    active = _active.get()
    return active is not None and active[0].size > 1 and not _own_axes()


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Name the axes of an activation; a no-op outside `on_mesh`."""
    placed = placement(x.shape, *names)
    return x if placed is None else jax.lax.with_sharding_constraint(x, NamedSharding(*placed))


def parts_of(name: str, size: int) -> int:
    """Number of equal parts, one after the other, in which `on_mesh` places an axis of that name and size."""
    placed = placement((size,), name)
    return 1 if placed is None else math.prod(placed[0].shape[axis] for axis in _mesh_axes(placed[1][0]))


def _mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Mesh axes of one entry of a PartitionSpec, which may be a name instead of a tuple."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def on_each_part(
    function: Callable[..., jax.Array], params: Any, *sequences: jax.Array | None, cells: int
) -> jax.Array:
    """Run a layer on each device's own bags and cells, as if there were nothing else.

    Outside `on_mesh`, or where a mesh divides neither, it is `function(params, *sequences)`. Otherwise `function`
    sees the device's part of each sequence and no mesh, but for `neighbours`; mesh axes that divide neither bags nor
    sequences are left to XLA.

    Parameters
    ----------
    function
        (params, *sequences) -> sequence (B, L', D), where every cell gives equally many positions.
    params
        Tree of parameters, which every device sees whole but for the axes left to XLA.
    sequences
        Arrays (B, L, C) of `cells` cells each, or None.
    cells
        Cells of a bag (K); a device holds whole ones.

    Raises
    ------
    ConfigError
        The cells cannot be divided evenly.
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


def _own_axes() -> frozenset[str]:
    """Mesh axes of which the code being traced sees one part: those of the `shard_map` around it.

    Asked of JAX, because gradients are traced when a function that set a context of ours has returned.
    """
    return frozenset(jax.sharding.get_abstract_mesh().manual_axes)


def has_neighbours() -> bool:
    """Whether a function under `on_each_part` sees a part of a sequence that goes on on other devices."""
    return bool(_own_axes().intersection(RULES[CELL]))


def neighbours(x: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Positions (B, size, C) before and behind this device's part (B, L, C) of a sequence.

    Zeros at the ends of the whole sequence, and where it is not divided.

    Raises
    ------
    ConfigError
        The part is shorter than what its neighbours see of it.
    """
    along = tuple(axis for axis in RULES[CELL] if axis in _own_axes())
    if not along:
        outside = jnp.zeros((x.shape[0], size, x.shape[2]), x.dtype)
        return outside, outside
    if x.shape[1] < size:
        raise ConfigError(
            f"a device of the mesh axis {along[0]!r} has {x.shape[1]} positions of a sequence, but its neighbours "
            f"see {size} of them: use fewer devices there, or more cells in a bag."
        )
    parts = jax.lax.axis_size(along)
    # Devices to which nothing is sent receive zeros.
    before = jax.lax.ppermute(x[:, x.shape[1] - size :], along, [(i, i + 1) for i in range(parts - 1)])
    behind = jax.lax.ppermute(x[:, :size], along, [(i + 1, i) for i in range(parts - 1)])
    return before, behind


def shardings(boxed: Any, mesh: Mesh, rules: AxisRules) -> Any:
    """Tree of the shardings of boxed variables (from `module.init`), by their logical axis names."""

    def place(leaf: Any) -> NamedSharding:
        if isinstance(leaf, nn.LogicallyPartitioned):
            return NamedSharding(mesh, spec(leaf.value.shape, leaf.names, mesh, rules))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map(place, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))
