"""Train adapters on a frozen model, in any task. The section `adapters` of a configuration holds the options."""

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
from sct.tasks.base import MOVING_STATISTICS, DeviceBatch, MetricSums, Task, Variables

# Value of adapters.kind -> class of its options.
KINDS: Mapping[str, type[AdapterConfig]] = {
    "low_rank": LoraConfig, "bottleneck": BottleneckConfig, "prefix": PrefixConfig,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class AdapterOptions:
    """Options of adapters, which are trained while the model stays frozen.

    Parameters
    ----------
    kind
        "low_rank" (LoRA), "bottleneck" or "prefix"; "" trains the model itself.
    targets, layers
        `targets` selects the modules that get an adapter, and `layers` selects the blocks by index. By default, the
        standard targets of the architecture or of the adapter kind are used, in all blocks.
    rank, alpha
        Options of low-rank adapters, see `sct.models.adapter_kinds.LoraConfig`.
    width, scale, skip
        Options of bottleneck adapters, see `BottleneckConfig`.
    length
        Option of prefix adapters, see `PrefixConfig`.
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
                problem = (
                    f"is not an option of {self.kind} adapters"
                    if self.kind
                    else "is set, but adapters.kind is empty"
                )
                raise ConfigError(
                    f"adapters.{field.name} {problem}: remove adapters.{field.name}, or change adapters.kind."
                )

    def config(self, architecture: str) -> AdapterConfig:
        """Return the options of the chosen adapter kind. Default targets depend on the architecture or the kind."""
        kind = KINDS[self.kind]
        names = {field.name for field in dataclasses.fields(kind)} - {"targets"}  # type: ignore[arg-type]
        given = {name: getattr(self, name) for name in names if hasattr(self, name)}
        if self.targets:
            given["targets"] = self.targets
        return LoraConfig.of(architecture, **given) if kind is LoraConfig else kind(**given)


class Adapted:
    """Wrap a task so that it trains adapters while the model stays frozen.

    Attributes that the wrapper does not define are those of the wrapped task.

    Parameters
    ----------
    task
        Any task that does not train adapters itself.
    config
        Options of the adapters.

    Raises
    ------
    ConfigError
        The task already trains adapters.
    """

    trainable: Sequence[tuple[str, bool]] = adapters.TRAINABLE

    def __init__(self, task: Task, config: AdapterConfig):
        if task.lora is not None:
            raise ConfigError(
                "the objective of the task already trains adapters, but adapters.kind asks for further adapters: "
                "leave adapters.kind empty."
            )
        self.task, self.lora = task, config
        self.may_be_missing = (*task.may_be_missing, *adapters.NEW)

    def __getattr__(self, name: str) -> Any:
        if name == "task" or name.startswith("__"):  # copy and pickle look these up before `task` is set
            raise AttributeError(name)
        return getattr(self.task, name)

    def init(self, rng: jax.Array) -> Variables:
        """Return the initial variables of the model and its adapters, boxed with their logical axis names."""
        variables = self.task.init(rng)
        made = adapters.init(jax.random.fold_in(rng, 1), variables["params"], self.lora)
        return {**variables, COLLECTION: made}

    def loss(
        self, variables: Variables, batch: DeviceBatch, rng: jax.Array, train: bool
    ) -> tuple[jax.Array, MetricSums]:
        """Return the loss of the wrapped task. Modules read their adapters from the variables."""
        loss, sums = self.task.loss(variables, batch, rng, train)
        return loss, {name: value for name, value in sums.items() if name != MOVING_STATISTICS}
