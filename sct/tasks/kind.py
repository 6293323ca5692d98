"""Kinds of tasks: the types of a configuration's sections, and what makes a task of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import Mesh

from sct.data.store import Store
from sct.data.text.tokenizer import Tokenizer
from sct.tasks.base import ObjectiveConfig, StoreConfig, Task

# What `launch.speed` can measure of any task of cells, and of one whose records are bags of cells.
ANY_SPEED = ("train", "save")
BAG_SPEED = (*ANY_SPEED, "forward", "loader", "ingest", "embed")


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a task is made of.

    Attributes
    ----------
    architecture, model
        Name in `sct.models.registry`, and plain values of the architecture.
    objective, data
        Options, of the types that the task's `Kind` names.
    store, seed
        Cells, and the run's seed.
    tokenizer
        Of a task of texts.
    kept
        What the resumed run, or the model that training starts from, says of its data.
    mesh
        Devices that share the arrays of models which the task loads, each reading its own part; None for one.
    """

    architecture: str
    model: Mapping[str, Any]
    objective: Any
    data: Any
    store: Store
    seed: int
    tokenizer: Tokenizer | None = None
    kept: Mapping[str, Any] | None = None
    mesh: Mesh | None = None


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of task; which architectures it trains stands in the manifests of `sct.families`.

    Attributes
    ----------
    name
        As configurations name it.
    objective, data
        Types of the configuration's sections.
    make
        Makes the task.
    tokenizer
        Of a task of texts: trains one, from (store, objective, data, seed).
    resolves
        Whether sizes of the model follow from files: a resumed run, or one that starts from a model, then has the
        sizes that were kept.
    speed
        Modes of `launch.speed` that measure it.
    everywhere
        Options of the objective with which the head is evaluated at all positions, for the comparison with the
        reference path.
    """

    name: str
    objective: type[ObjectiveConfig]
    data: type[StoreConfig]
    make: Callable[[Parts], Task]
    tokenizer: Callable[[Store, Any, Any, int], Tokenizer] | None = None
    resolves: bool = False
    speed: tuple[str, ...] = ANY_SPEED
    everywhere: Mapping[str, Any] = dataclasses.field(default_factory=dict)
