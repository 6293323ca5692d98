"""Logical axis names of parameters and activations, and how a parameter is declared.

A parameter's shape, dtype, initialiser and axis names are declared in one call; sharding, abstract
initialisation and memory sums derive from it. `sct.train.sharding` maps the names to mesh axes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Activations.
BATCH = "batch"
LENGTH = "length"  # positions of the flat cells-by-genes sequence
CELL = "cell"
GENE = "gene"
# Parameters and channels.
VOCAB = "vocab"
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


Rules = Mapping[str, tuple[str, ...]]
_active: ContextVar[tuple[Mesh, Rules] | None] = ContextVar("sct_mesh", default=None)


@contextmanager
def on_mesh(mesh: Mesh, rules: Rules) -> Iterator[None]:
    """Trace what is inside with activations placed on `mesh`, by logical axis name."""
    token = _active.set((mesh, rules))
    try:
        yield
    finally:
        _active.reset(token)


def spec(shape: tuple[int, ...], names: tuple[str | None, ...], mesh: Mesh, rules: Rules) -> PartitionSpec:
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


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Name the axes of an activation; a no-op outside `on_mesh`."""
    active = _active.get()
    if active is None or active[0].size == 1:
        return x
    mesh, rules = active
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(x.shape, names, mesh, rules)))


def mesh_axes_of(name: str) -> tuple[Mesh, str, int] | None:
    """Mesh, mesh axis and its number of devices for a logical axis that `on_mesh` splits over several."""
    active = _active.get()
    if active is None:
        return None
    mesh, rules = active
    split = [axis for axis in rules.get(name, ()) if mesh.shape[axis] > 1]
    return (mesh, split[0], mesh.shape[split[0]]) if split else None


def shardings(boxed: Any, mesh: Mesh, rules: Rules) -> Any:
    """Tree of the shardings of boxed variables (from `module.init`), by their logical axis names."""

    def place(leaf: Any) -> NamedSharding:
        if isinstance(leaf, nn.LogicallyPartitioned):
            return NamedSharding(mesh, spec(leaf.value.shape, leaf.names, mesh, rules))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map(place, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))
