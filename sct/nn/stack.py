"""Equal layers, stacked along one axis of their parameters and run by one loop (`jax.lax.scan`).

A stack is compiled once whatever its number of layers, and its parameters are few large arrays.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax

from sct.nn import adapters, axes
from sct.nn.execution import rematerialized


class _Step(nn.Module):
    """A layer in the form that the loop takes: (carried, what all layers see) -> (carried, nothing)."""

    layer: type[nn.Module]
    config: Any

    @nn.compact
    def __call__(self, x: jax.Array, *seen: Any) -> tuple[jax.Array, None]:
        # The layer's parameters lie directly under the stack's name.
        made = self.layer(self.config)
        nn.share_scope(self, made)
        return made(x, *seen), None


def stack(layer: type[nn.Module], config: Any, number: int, remat: str, name: str, seen: int) -> nn.Module:
    """Module that runs `number` layers, `layer(config)(x, *seen)`, one after the other.

    Parameters
    ----------
    layer
        Class of the layer, made of its configuration alone.
    remat
        What each layer saves for the backward pass, see `rematerialized`.
    name
        Name of the stack's parameters.
    seen
        Number of further arguments of the layer, the same for all layers.
    """
    scanned = nn.scan(
        rematerialized(_Step, remat, prevent_cse=False),
        variable_axes={"params": 0, adapters.COLLECTION: 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(nn.broadcast,) * seen,
        length=number,
        metadata_params={nn.PARTITION_NAME: axes.LAYERS},
    )
    # Adapters of some layers alone become those of all layers; the other layers add nothing.
    adapted = nn.map_variables(
        scanned, adapters.COLLECTION, functools.partial(_for_all_layers, number=number)
    )
    return adapted(layer, config, name=name)


def _for_all_layers(variables: dict[str, Any], number: int) -> dict[str, Any]:
    return {name: adapters.for_all_layers(tree, number) for name, tree in variables.items()}


def unstack(params: Any, number: int) -> list[Any]:
    """Trees of the single layers of a stack."""
    return [jax.tree.map(lambda leaf, i=i: leaf[i], params) for i in range(number)]
