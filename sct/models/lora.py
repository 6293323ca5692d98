"""Low-rank adapters (LoRA; Hu et al. 2022), one or several of each layer.

What all kinds of adapters share is in `sct.models.adapters`, and is known here by the same names.
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
    """Each layer's path and low-rank adapter, of the collection "adapters" of a model."""
    for layer, kind, adapter in adapters_of(variables):
        if kind is LOW_RANK:
            yield layer, adapter


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Several adapters of every layer that are all summed, of which a sample trains its own (ZerOmics, section 3.2).

    The members lie side by side in one adapter of as many times the rank: whatever reads, merges or exports adapters
    has their sum, and a forward pass costs no more than that of one.

    Parameters
    ----------
    members
        Names, such as "universal" and those of tasks.
    each
        Options of one of them; `alpha / rank` is the factor of each.
    """

    members: tuple[str, ...]
    each: LoraConfig

    def __post_init__(self) -> None:
        if not self.members or len(set(self.members)) < len(self.members):
            raise ConfigError(f"members are {self.members!r}, but one or more different names are needed.")

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
        """Which columns each sample trains (B, members x rank), of which members it does, (B, members)."""
        return jnp.repeat(trains.astype(jnp.float32), self.each.rank, axis=1)


def gated(variables: Mapping[str, Any], trained: jax.Array) -> dict[str, Any]:
    """Variables for a call in which the gradient of each sample reaches a part of the adapters alone.

    Nothing else changes: the outputs, and the gradient that passes through the adapters to the layers below, are
    those without it.

    Parameters
    ----------
    variables
        Nested arrays with the collection "adapters".
    trained
        (B, r), see `Mixture.gate`.
    """
    adapters = flatten(variables[COLLECTION])
    gates = {
        under(layer, "trained"): jnp.broadcast_to(trained, (*jnp.shape(adapter["scale"]), *trained.shape))
        for layer, adapter in adapted(variables)
    }
    return {**variables, COLLECTION: unflatten({**adapters, **gates})}
