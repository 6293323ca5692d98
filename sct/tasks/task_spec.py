"""Specification of a task: the types of a configuration's sections, and the function that makes the task."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import Mesh

from sct.data.store import Store
from sct.data.text.tokenizer import Tokenizer
from sct.tasks.base import ObjectiveConfig, StoreConfig, Task

# Modes of `launch.speed` for tasks on cells, and for tasks with bags of cells.
ANY_SPEED = ("train", "save")
BAG_SPEED = (*ANY_SPEED, "forward", "loader", "ingest", "embed")


@dataclasses.dataclass(frozen=True)
class TaskInputs:
    """Everything that a task is made from.

    Attributes
    ----------
    architecture, model
        Name in `sct.models.registry`, and plain values of the architecture.
    objective, data
        Options, of the types that the task's `TaskSpec` names.
    store, seed
        Cells, and the run's seed.
    tokenizer
        For tasks on text.
    parent_data_spec
        Data record of the resumed run, or of the model that training starts from; None for a new model.
    mesh
        Devices that share the arrays of the models that the task loads; None for one device.
    """

    architecture: str
    model: Mapping[str, Any]
    objective: Any
    data: Any
    store: Store
    seed: int
    tokenizer: Tokenizer | None = None
    parent_data_spec: Mapping[str, Any] | None = None
    mesh: Mesh | None = None


@dataclasses.dataclass(frozen=True)
class TaskSpec:
    """Specification of a task. The manifests in `sct.families` say which architectures it trains.

    Attributes
    ----------
    name
        As configurations name it.
    objective, data
        Types of the configuration's sections.
    make
        Makes the task.
    tokenizer
        For tasks on text: trains a tokenizer, from (store, objective, data, seed).
    inherits_architecture
        Whether the model's sizes depend on files. A resumed run, or one that starts from a model, then keeps the sizes
        of that model.
    speed
        Modes of `launch.speed` that measure it.
    everywhere
        Options of the objective that evaluate the head at all positions; `launch.speed` compares with these.
    """

    name: str
    objective: type[ObjectiveConfig]
    data: type[StoreConfig]
    make: Callable[[TaskInputs], Task]
    tokenizer: Callable[[Store, Any, Any, int], Tokenizer] | None = None
    inherits_architecture: bool = False
    speed: tuple[str, ...] = ANY_SPEED
    everywhere: Mapping[str, Any] = dataclasses.field(default_factory=dict)
