"""Build a task from a configuration."""

from __future__ import annotations

import dataclasses
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
from sct.tasks.finetuning import PeftConfig
from sct.tasks.task_spec import TaskInputs, TaskSpec


def task_specs() -> dict[str, TaskSpec]:
    """Return the task specifications of all families, as a dict by task name."""
    return {spec.name: spec for model in families.models().values() for spec in model.trained_by}


def task_spec_of(config: Mapping[str, Any]) -> TaskSpec:
    """Return the specification of the task that a configuration names.

    Raises
    ------
    ConfigError
        `family` or `task` is unknown, or the task cannot train this architecture.
    """
    name, family = config.get("task"), config.get("family")
    models, known = families.models(), task_specs()
    for what, value, names in (("family", family, models), ("task", name, known)):
        check_choice(what, value, names)
    spec = known[str(name)]
    if spec not in models[str(family)].trained_by:
        raise ConfigError(
            f"the task {name!r} cannot train a model of the family {family!r}: set family to one of "
            f"{', '.join(trained_by(spec))}."
        )
    return spec


def trained_by(spec: TaskSpec) -> tuple[str, ...]:
    """Return the names of the architectures that a task can train."""
    return tuple(name for name, model in families.models().items() if spec in model.trained_by)


def data_of(config: Mapping[str, Any]) -> Any:
    """Return the `data` section of a configuration, as an instance of its task's data class."""
    return registry.build(task_spec_of(config).data, config.get("data", {}), "data")


def peft_of(config: Mapping[str, Any]) -> PeftConfig:
    """Return the section `peft` of a configuration: the method of fine-tuning.

    Raises
    ------
    ConfigError
        An option is invalid, or the task does not fine-tune.
    """
    given = config.get("peft", {})
    if given and not task_spec_of(config).finetunes:
        raise ConfigError(
            f"the configuration has the section peft, but the task {config.get('task')!r} has no methods of "
            "fine-tuning: remove the section, or use the section adapters."
        )
    return registry.build(PeftConfig, given, "peft")


def adapters_of(config: Mapping[str, Any]) -> AdapterConfig | None:
    """Return the options of the adapters that a configuration trains; None if the model itself is trained.

    Raises
    ------
    ConfigError
        The architecture does not accept this kind of adapter, the objective already trains LoRA adapters, or
        `init_from` is not set.
    """
    options = registry.build(AdapterOptions, config.get("adapters", {}), "adapters")
    if not options.kind:
        return None
    if task_spec_of(config).finetunes:
        raise ConfigError(
            f"adapters.kind is {options.kind!r}, but the task {config['task']!r} takes its adapters from peft.method: "
            "leave adapters.kind empty."
        )
    architecture = str(config["family"])
    made, fitting = options.config(architecture), families.model(architecture).adapters
    if type(made) not in fitting:
        names = [name for name, kind in KINDS.items() if kind in fitting]
        accepts = (
            f"accepts only {' or '.join(names)}: choose one of these"
            if names
            else "accepts only the adapters of its task: leave adapters.kind empty"
        )
        raise ConfigError(
            f"adapters.kind is {options.kind!r}, but the architecture {architecture!r} {accepts}."
        )
    objective = registry.build(task_spec_of(config).objective, config.get("objective", {}), "objective")
    if objective.has_adapters:
        raise ConfigError(
            f"adapters.kind is {options.kind!r} and objective.lora.rank is also set, but only one of the two can add "
            "adapters: leave adapters.kind empty, or set objective.lora.rank to 0."
        )
    if not config.get("init_from"):
        raise ConfigError(
            "adapters need a pretrained model, but --config.init_from is not set: set "
            "--config.init_from=MODEL, or leave adapters.kind empty."
        )
    return made


def make_task(
    config: Mapping[str, Any],
    store: Store,
    tokenizer: Tokenizer | None = None,
    parent_data_spec: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
) -> tuple[Any, Any]:
    """Build the task that a configuration names, and return the task and the configuration's data section.

    If a text task gets no tokenizer, a tokenizer is trained. See `TaskInputs` for `parent_data_spec` and `mesh`.

    Raises
    ------
    ConfigError
        Options contradict each other, or this machine's device cannot run the model.
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
        peft_of(config),
        config.get("init_from") or "",
    )
    return task_of(spec, inputs, adapters_of(config)), data


def task_of(task_spec: TaskSpec, inputs: TaskInputs, adapters: AdapterConfig | None) -> Any:
    """Build a task from its specification and inputs. With `adapters`, the task trains adapters and freezes the model.

    Raises
    ------
    ConfigError
        Model, data and options contradict each other, or this machine's device cannot run the model.
    """
    if task_spec.finetunes:
        model = families.model(inputs.architecture)
        inputs = dataclasses.replace(inputs, embed=model.embed, finetune=model.finetune)
    task = task_spec.make(inputs)
    registry.check_device(task.model_config)
    if adapters is None:
        return task
    adapted = Adapted(task, adapters)
    # Tracing raises the error for adapter targets or layers that the model does not have.
    jax.eval_shape(adapted.init, jax.random.key(0))
    return adapted
