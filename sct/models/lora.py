"""Low-rank adapters (LoRA; Hu et al. 2022), one or several for each layer.

`sct.models.adapters` has what all kinds of adapters share; its names can be imported from here too.
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
    """Path and low-rank adapter of each layer that has one, from the collection "adapters"."""
    for layer, kind, adapter in adapters_of(variables):
        if kind is LOW_RANK:
            yield layer, adapter


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Several adapters for every layer. All are summed; each sample trains its own ones (ZerOmics, section 3.2).

    The members lie side by side in one adapter of rank `members * rank`. Its output is their sum, so a forward pass
    runs one adapter, and merging and exporting need to know nothing of members.

    Parameters
    ----------
    members
        Names, such as "universal" and those of tasks.
    each
        Options of one member; each has the factor `alpha / rank`.
    """

    members: tuple[str, ...]
    each: LoraConfig

    def __post_init__(self) -> None:
        if not self.members or len(set(self.members)) < len(self.members):
            raise ConfigError(f"members are {self.members!r}, but they must be one or more different names.")

    @property
    def config(self) -> LoraConfig:
        """Options of the one adapter that holds all members."""
        number = len(self.members)
        return dataclasses.replace(self.each, rank=self.each.rank * number, alpha=self.each.alpha * number)

    def place(self, member: str) -> slice:
        """Columns of `lora_a`, and rows of `lora_b`, of a member."""
        first = self.members.index(member) * self.each.rank
        return slice(first, first + self.each.rank)

    def gate(self, trains: jax.Array) -> jax.Array:
        """Columns that each sample trains (B, members * rank), from the members that it trains (B, members)."""
        return jnp.repeat(trains.astype(jnp.float32), self.each.rank, axis=1)


def gated(variables: Mapping[str, Any], trained: jax.Array) -> dict[str, Any]:
    """Variables for a call in which each sample's gradient reaches only a part of the adapters.

    Outputs do not change, nor does the gradient that passes through the adapters to the layers below.

    Parameters
    ----------
    variables
        Nested arrays with the collection "adapters".
    trained
        1 for the columns that a sample trains, 0 for others (B, r); see `Mixture.gate`.
    """
    adapters = flatten(variables[COLLECTION])
    gates = {
        under(layer, "trained"): jnp.broadcast_to(trained, (*jnp.shape(adapter["scale"]), *trained.shape))
        for layer, adapter in adapted(variables)
    }
    return {**variables, COLLECTION: unflatten({**adapters, **gates})}
