"""Any task with trained adapters and a frozen model (the section `adapters` of a configuration)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from sct.checks import check_choice
from sct.errors import ConfigError
from sct.models import adapters
from sct.models.adapter_kinds import AdapterConfig, BottleneckConfig, LoraConfig, PrefixConfig
from sct.nn.adapters import COLLECTION
from sct.tasks.base import DeviceBatch, MetricSums, Task, Variables

# Name in a configuration -> type of the options.
KINDS: Mapping[str, type[AdapterConfig]] = {
    "low_rank": LoraConfig, "bottleneck": BottleneckConfig, "prefix": PrefixConfig,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class AdapterOptions:
    """Adapters to train in place of the model.

    Parameters
    ----------
    kind
        "low_rank" (LoRA), "bottleneck" or "prefix"; "" trains the model itself.
    targets, layers
        Layers with an adapter; by default the architecture's or the kind's targets, in all blocks.
    rank, alpha
        Of low-rank adapters, see `sct.models.adapter_kinds.LoraConfig`.
    width, scale, skip
        Of bottlenecks, see `BottleneckConfig`.
    length
        Of prefixes, see `PrefixConfig`.
    """

    kind: str = ""
    targets: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    rank: int = LoraConfig.rank
    alpha: float = LoraConfig.alpha
    width: int = BottleneckConfig.width
    scale: float = BottleneckConfig.scale
    skip: bool = BottleneckConfig.skip
    length: int = PrefixConfig.length

    def __post_init__(self) -> None:
        if self.kind:
            check_choice("adapters.kind", self.kind, KINDS)
        known = {field.name for field in dataclasses.fields(KINDS[self.kind])} if self.kind else set()  # type: ignore[arg-type]
        for field in dataclasses.fields(self):
            if field.name not in {"kind", *known} and getattr(self, field.name) != field.default:
                what = (
                    f"is no option of {self.kind} adapters" if self.kind else "is set without adapters.kind"
                )
                raise ConfigError(f"adapters.{field.name} {what}: leave it out, or change adapters.kind.")

    def config(self, architecture: str) -> AdapterConfig:
        """Options of the chosen kind, with the default targets of an architecture."""
        kind = KINDS[self.kind]
        names = {field.name for field in dataclasses.fields(kind)} - {"targets"}  # type: ignore[arg-type]
        given = {name: getattr(self, name) for name in names if hasattr(self, name)}
        if self.targets:
            given["targets"] = self.targets
        return LoraConfig.of(architecture, **given) if kind is LoraConfig else kind(**given)


class Adapted:
    """A task that trains adapters beside the frozen parameters of its model; all else is the task's own.

    Parameters
    ----------
    task
        Any task that trains no adapters of its own.
    config
        Which adapters.

    Raises
    ------
    ConfigError
        The task has adapters of its own.
    """

    trainable: Sequence[tuple[str, bool]] = adapters.TRAINABLE

    def __init__(self, task: Task, config: AdapterConfig):
        if task.lora is not None:
            raise ConfigError("the task trains adapters of its own: leave adapters.kind empty.")
        self.task, self.lora = task, config
        self.may_be_missing = (*task.may_be_missing, *adapters.NEW)

    def __getattr__(self, name: str) -> Any:
        if name == "task" or name.startswith("__"):  # asked for by copy and pickle, before there is a task
            raise AttributeError(name)
        return getattr(self.task, name)

    def init(self, rng: jax.Array) -> Variables:
        """Initial variables of the model, boxed, and adapters beside them."""
        variables = self.task.init(rng)
        made = adapters.init(jax.random.fold_in(rng, 1), variables["params"], self.lora)
        return {**variables, COLLECTION: made}

    def loss(
        self, variables: Variables, batch: DeviceBatch, rng: jax.Array, train: bool
    ) -> tuple[jax.Array, MetricSums]:
        """Loss of the task; modules find the adapters among the variables."""
        return self.task.loss(variables, batch, rng, train)
