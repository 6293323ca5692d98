"""From a configuration to a task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from sct import families
from sct.checks import check_choice
from sct.data.store import Store
from sct.data.text.tokenizer import Tokenizer
from sct.errors import ConfigError
from sct.models import registry
from sct.models.adapter_kinds import AdapterConfig
from sct.tasks.adapted import KINDS, Adapted, AdapterOptions
from sct.tasks.task_spec import TaskInputs, TaskSpec


def task_specs() -> dict[str, TaskSpec]:
    """Specifications of the tasks of all families by name."""
    return {spec.name: spec for model in families.models().values() for spec in model.tasks}


def task_spec_of(config: Mapping[str, Any]) -> TaskSpec:
    """Specification of a configuration's task; `ConfigError` where there is none, or it does not train the family."""
    name, family = config.get("task"), config.get("family")
    models, known = families.models(), task_specs()
    for what, value, names in (("family", family, models), ("task", name, known)):
        check_choice(what, value, names)
    spec = known[str(name)]
    if spec not in models[str(family)].tasks:
        raise ConfigError(
            f"the task {name!r} does not train {family!r}: set family to one of {', '.join(trained_by(spec))}."
        )
    return spec


def trained_by(spec: TaskSpec) -> tuple[str, ...]:
    """Architectures that a task trains."""
    return tuple(name for name, model in families.models().items() if spec in model.tasks)


def data_of(config: Mapping[str, Any]) -> Any:
    """A configuration's data section, of the type of its task."""
    return registry.build(task_spec_of(config).data, config.get("data", {}), "data")


def adapters_of(config: Mapping[str, Any]) -> AdapterConfig | None:
    """Adapters that a configuration trains with the model frozen; None if it trains the model.

    Raises
    ------
    ConfigError
        A kind that does not fit the architecture, or there is no model to start from.
    """
    options = registry.build(AdapterOptions, config.get("adapters", {}), "adapters")
    if not options.kind:
        return None
    architecture = str(config["family"])
    made, fitting = options.config(architecture), families.model(architecture).adapters
    if type(made) not in fitting:
        names = [name for name, kind in KINDS.items() if kind in fitting]
        takes = (
            f"takes {' or '.join(names)}"
            if names
            else "takes no adapters but those of its task: leave it empty"
        )
        raise ConfigError(f"adapters.kind is {options.kind!r}, but {architecture!r} {takes}.")
    objective = registry.build(task_spec_of(config).objective, config.get("objective", {}), "objective")
    if objective.has_adapters:
        raise ConfigError(
            f"adapters.kind is {options.kind!r} and objective.lora is also set: use one of them."
        )
    if not config.get("init_from"):
        raise ConfigError(
            "adapters need a pretrained model: set --config.init_from=MODEL, or leave adapters.kind empty."
        )
    return made


def make_task(
    config: Mapping[str, Any],
    store: Store,
    tokenizer: Tokenizer | None = None,
    parent_data_spec: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
) -> tuple[Any, Any]:
    """Task of a configuration over a store, and its data section.

    A task on text trains a tokenizer if none is given. See `TaskInputs` for `parent_data_spec` and `mesh`.
    `ConfigError` for a model that this machine does not compute.
    """
    spec, data = task_spec_of(config), data_of(config)
    objective = registry.build(spec.objective, config.get("objective", {}), "objective")
    seed = int(config.get("train", {}).get("seed", 0))
    if spec.tokenizer is not None and tokenizer is None:
        tokenizer = spec.tokenizer(store, objective, data, seed)
    inputs = TaskInputs(
        config["family"],
        config.get("model", {}),
        objective,
        data,
        store,
        seed,
        tokenizer,
        parent_data_spec,
        mesh,
    )
    return task_of(spec, inputs, adapters_of(config)), data


def task_of(task_spec: TaskSpec, inputs: TaskInputs, adapters: AdapterConfig | None) -> Any:
    """Make a task; with `adapters`, train them and freeze the model.

    Raises
    ------
    ConfigError
        Model, data and options do not fit each other, or this machine does not compute the model.
    """
    task = task_spec.make(inputs)
    registry.check_device(task.model_config)
    if adapters is None:
        return task
    adapted = Adapted(task, adapters)
    jax.eval_shape(
        adapted.init, jax.random.key(0)
    )  # targets and layers that the model lacks are refused here
    return adapted
