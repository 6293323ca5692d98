"""Stack identical layers: each parameter is one array for all layers, and a loop (`jax.lax.scan`) runs the layers.

XLA compiles only one layer, however many layers the stack has.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax

from sct.nn import adapters, axes
from sct.nn.execution import rematerialized


class _Step(nn.Module):
    """Wrap a layer in the form that `scan` needs: (x, arguments that all layers share) -> (output, None)."""

    layer: type[nn.Module]
    config: Any

    @nn.compact
    def __call__(self, x: jax.Array, *seen: Any) -> tuple[jax.Array, None]:
        # The layer's parameters lie directly under the stack's name.
        made = self.layer(self.config)
        nn.share_scope(self, made)
        return made(x, *seen), None


def stack(layer: type[nn.Module], config: Any, number: int, remat: str, name: str, seen: int) -> nn.Module:
    """Make a module that applies `number` layers, `layer(config)(x, *arguments)`, one after the other.

    Parameters
    ----------
    layer
        Class of the layer. The constructor of this class takes only the configuration.
    config
        Configuration of every layer.
    number
        Number of layers.
    remat
        Which values each layer saves for the backward pass; see `rematerialized`.
    name
        Name of the stack in the parameter paths.
    seen
        Number of arguments after x. All layers get the same arguments.
    """
    scanned = nn.scan(
        rematerialized(_Step, remat, prevent_cse=False),
        variable_axes={"params": 0, adapters.COLLECTION: 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(nn.broadcast,) * seen,
        length=number,
        metadata_params={nn.PARTITION_NAME: axes.LAYERS},
    )
    # `scan` needs adapters of all layers. Where only some have one, give the others an adapter that changes nothing.
    adapted = nn.map_variables(
        scanned, adapters.COLLECTION, functools.partial(_for_all_layers, number=number)
    )
    return adapted(layer, config, name=name)


def _for_all_layers(variables: dict[str, Any], number: int) -> dict[str, Any]:
    return {name: adapters.for_all_layers(tree, number) for name, tree in variables.items()}


def unstack(params: Any, number: int) -> list[Any]:
    """Split the parameters of a stack of `number` layers into a list with one tree per layer."""
    return [jax.tree.map(lambda leaf, i=i: leaf[i], params) for i in range(number)]
