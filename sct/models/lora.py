"""Define low-rank adapters (LoRA; Hu et al. 2022), one or several for each layer.

`sct.models.adapters` holds the functions for all kinds of adapters. Code may also import these functions from this
module.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sct.errors import ConfigError
from sct.models.adapter_kinds import LoraConfig, kernels
from sct.models.adapters import (
    NEW,
    TRAINABLE,
    adapters_of,
    beside,
    check_same,
    chosen,
    count,
    init,
    merge,
    under,
)
from sct.nn.adapters import COLLECTION, LOW_RANK
from sct.nn.paths import flatten, unflatten

__all__ = [
    "NEW", "TRAINABLE", "LoraConfig", "Mixture", "adapted", "beside", "check_same", "chosen", "count",
    "gated", "init", "kernels", "merge",
]  # fmt: skip


def adapted(variables: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the layer path and the arrays of each low-rank adapter in the collection "adapters"."""
    for layer, kind, adapter in adapters_of(variables):
        if kind is LOW_RANK:
            yield layer, adapter


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Several low-rank adapters, called members, for every layer (ZerOmics paper, section 3.2).

    The output of the mixture is the sum of the outputs of its members. Each sample of a batch trains only some of the
    members. The matrices of all members are concatenated to a single adapter of rank `len(members) * rank`, which
    computes this sum. A forward pass therefore computes only one adapter, which can be merged and exported like any
    other adapter.

    Parameters
    ----------
    members
        Names of the adapters in the mixture: "universal" for an adapter that all tasks share, and the names of tasks.
    each
        Options of each adapter in the mixture. The output of each adapter is multiplied by `alpha / rank`.
    """

    members: tuple[str, ...]
    each: LoraConfig

    def __post_init__(self) -> None:
        if not self.members or len(set(self.members)) < len(self.members):
            raise ConfigError(
                f"`members` is {self.members!r}, but must be a tuple of one or more distinct names: give at least one "
                "name, and each name only once."
            )

    @property
    def config(self) -> LoraConfig:
        """Return the options of the single adapter into which all adapters of the mixture are concatenated."""
        number = len(self.members)
        return dataclasses.replace(self.each, rank=self.each.rank * number, alpha=self.each.alpha * number)

    def place(self, member: str) -> slice:
        """Return the slice that selects one adapter of the mixture: columns of `lora_a` and rows of `lora_b`."""
        first = self.members.index(member) * self.each.rank
        return slice(first, first + self.each.rank)

    def gate(self, trains: jax.Array) -> jax.Array:
        """Expand a 0-1 mask of adapters (B, members) to a mask of adapter columns (B, members * rank), float32."""
        return jnp.repeat(trains.astype(jnp.float32), self.each.rank, axis=1)


def gated(variables: Mapping[str, Any], trained: jax.Array) -> dict[str, Any]:
    """Return variables in which each sample of a batch trains only some columns of the low-rank adapters.

    The outputs of the model do not change. The gradient that passes through the adapters to the layers below does not
    change either.

    Parameters
    ----------
    variables
        Variables of a model with the collection "adapters".
    trained
        Shape (B, r): 1 for the adapter columns that are trained on a sample of the batch, 0 for the others; see
        `Mixture.gate`.
    """
    adapters = flatten(variables[COLLECTION])
    gates = {
        under(layer, "trained"): jnp.broadcast_to(trained, (*jnp.shape(adapter["scale"]), *trained.shape))
        for layer, adapter in adapted(variables)
    }
    return {**variables, COLLECTION: unflatten({**adapters, **gates})}
