"""Define how the embedding of a cell is read from the outputs of a model."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sct.errors import ConfigError
from sct.models import registry
from sct.weights.fitted_readout import FittedReadout
from sct.weights.pretrained import Pretrained

FITTED = "fitted"  # name of the readout that a model folder stores
_MOST = 0.8  # share of the machine's memory that the embeddings of a call may take


@dataclasses.dataclass(frozen=True, eq=False)
class Readout:
    """How the embedding of a cell is read from an output of the model.

    Attributes
    ----------
    output
        Name of the output or intermediate activation of the model.
    flat
        Whether the output holds the positions of all cells of a bag in one sequence, (B, K * L, D). The embedding of a
        cell is then its L positions side by side, (B, K, L * D). Otherwise, the output holds one vector per cell.
    linear
        Linear map that is applied to this embedding, or None.
    """

    output: str
    flat: bool = False
    linear: FittedReadout | None = None

    @property
    def is_large(self) -> bool:
        """Return whether the embedding has all positions of the cell, without a linear map."""
        return self.flat and self.linear is None

    def on_devices(self, sharding: Any) -> tuple[Any, Any]:
        """Return the arrays of the linear map on the devices, or (None, None)."""
        linear = self.linear
        return (None, None) if linear is None else jax.device_put((linear.mean, linear.matrix), sharding)

    def read(self, output: jax.Array, cells: int, arrays: tuple[Any, Any]) -> jax.Array:
        """Return the embeddings, given the output, the number of cells per bag (K), and the result of `on_devices`."""
        if not self.flat and self.linear is None:
            return output
        return _read(output, *arrays, cells=cells if self.flat else 0)

    def width(self, model: Pretrained) -> int:
        """Return the number of dimensions of the embedding, from the shapes of the model alone."""
        if self.linear is not None:
            return self.linear.dim
        module = registry.family(model.family).module
        example = module.example(model.config)
        own = jax.eval_shape(
            lambda key: module(model.config).init_with_output(key, **example)[0], jax.random.key(0)
        )
        shape = nn.unbox(own)[self.output].shape  # the example has one bag of one cell
        return int(np.prod(shape)) if self.flat else int(shape[-1])


@functools.partial(jax.jit, static_argnames=("cells",))
def _read(output: jax.Array, mean: Any, matrix: Any, cells: int) -> jax.Array:
    """Put the positions of each cell side by side if `cells` is not 0, and apply the linear map if there is one."""
    x = output.astype(jnp.float32)
    x = x.reshape(x.shape[0], cells, -1) if cells else x
    return x if mean is None else jnp.matmul(x - mean, matrix, precision=jax.lax.Precision.HIGHEST)


def of_outputs(names: Any) -> Mapping[str, Readout]:
    """Return readouts by name: `names` itself if it is a dict of them, otherwise the named outputs, unchanged."""
    return names if isinstance(names, Mapping) else {name: Readout(name) for name in names}


def check_memory(readouts: Mapping[str, Readout], model: Pretrained, cells: int, copies: int = 1) -> None:
    """Raise `ConfigError` if the embeddings of all cells do not fit into the memory of this machine.

    `copies` is the number of float32 arrays of all cells that are held at once for each readout.
    """
    widths = {name: readout.width(model) for name, readout in readouts.items() if readout.is_large}
    needed = 4 * cells * copies * sum(widths.values())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > _MOST * memory:
        name = max(widths, key=lambda each: widths[each])
        raise ConfigError(
            f"the readout {name!r} has {widths[name]:,} numbers per cell, so that {cells:,} cells need "
            f"{needed / 1e9:,.0f} GB of memory, but this machine has {memory / 1e9:,.0f} GB: choose another `readout`, "
            f"such as {FITTED!r}, or embed fewer cells at a time."
        )
