"""Logical axis names of parameters and activations, and how a parameter is declared.

A parameter's shape, dtype, initialiser and axis names are declared in one call; sharding, abstract
initialisation and memory sums derive from it. `sct.train.sharding` maps the names to mesh axes.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

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
    return module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Name the axes of an activation; a no-op outside a mesh."""
    return nn.with_logical_constraint(x, axes)


def logical_axes(variables: Any) -> Any:
    """Tree of logical axis names (as `PartitionSpec`) of boxed variables, from `module.init`."""
    return nn.get_partition_spec(variables)
