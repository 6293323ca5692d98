"""Define the specification of a task: its configuration classes, and the function that builds the task."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import Mesh

from sct.data.store import Store
from sct.data.text.tokenizer import Tokenizer
from sct.tasks.base import ObjectiveConfig, StoreConfig, Task
from sct.tasks.finetuning import FineTuning, PeftConfig

# Modes of `launch.speed` for all tasks, and for tasks on bags of cells.
ANY_SPEED = ("train", "save")
BAG_SPEED = (*ANY_SPEED, "forward", "loader", "ingest", "embed")


@dataclasses.dataclass(frozen=True)
class TaskInputs:
    """Inputs from which a task is built.

    Attributes
    ----------
    architecture, model
        Name of the architecture in `sct.models.registry`, and its options (the `model` section).
    objective, data
        Options, as instances of the classes in the task's `TaskSpec`.
    store, seed
        Store with the cells, and the seed of the run.
    tokenizer
        Tokenizer of tasks on text; None for other tasks.
    parent_data_spec
        Data options that the resumed run, or the model named in `init_from`, was trained with; None for a new model.
    mesh
        Device mesh for the pretrained models that the task loads; None for one device.
    peft
        Method of fine-tuning, for tasks with `TaskSpec.finetunes`.
    init_from
        Model from which training starts; "" for none.
    embed, finetune
        Entries `embed` and `finetune` of the architecture in its manifest.
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
    peft: PeftConfig = dataclasses.field(default_factory=PeftConfig)
    init_from: str = ""
    embed: Callable[..., Any] | None = None
    finetune: FineTuning | None = None


@dataclasses.dataclass(frozen=True)
class TaskSpec:
    """Specification of a task. The manifests in `sct.families` say which architectures it trains.

    Attributes
    ----------
    name
        Name of the task in configurations.
    objective, data
        Classes of the configuration sections `objective` and `data`.
    make
        Function that builds the task from `TaskInputs`.
    tokenizer
        Function (store, objective, data, seed) that trains a tokenizer; None for tasks without text.
    inherits_architecture
        Whether the model's sizes depend on input files. If True, a run that resumes, or that starts from the model in
        `init_from`, keeps the sizes of the earlier model.
    speed
        Modes of `launch.speed` that support this task.
    everywhere
        Values of objective options with which the output head is evaluated at every position. `launch.speed` uses these
        values for the reference implementation.
    finetunes
        Whether the task fine-tunes a pretrained model by a method of the section `peft`. Such a task trains every
        architecture whose manifest has an entry `finetune`.
    """

    name: str
    objective: type[ObjectiveConfig]
    data: type[StoreConfig]
    make: Callable[[TaskInputs], Task]
    tokenizer: Callable[[Store, Any, Any, int], Tokenizer] | None = None
    inherits_architecture: bool = False
    speed: tuple[str, ...] = ANY_SPEED
    everywhere: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    finetunes: bool = False
