"""Define `RunSpec`: the configuration of a run after all its options were checked and resolved."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, cast

from jax.sharding import Mesh

from sct.checks import check_choice, check_type
from sct.data.store import Store
from sct.data.text.tokenizer import Tokenizer
from sct.data.text.tokenizer_libraries import import_tokenizers
from sct.errors import ConfigError
from sct.families.tasks import adapters_of, peft_of, task_of, task_spec_of
from sct.models import registry
from sct.models.adapter_kinds import AdapterConfig
from sct.tasks.adapted import AdapterOptions
from sct.tasks.base import ObjectiveConfig, StoreConfig, Task, files_of
from sct.tasks.finetuning import PeftConfig
from sct.tasks.task_spec import TaskInputs, TaskSpec
from sct.train.export import ExportConfig
from sct.train.loop import TrainConfig
from sct.train.optim import OptimizerConfig

NESTED = ("model", "data", "objective", "adapters", "peft", "optimizer", "train", "export")
SECTIONS = ("family", "task", "init_from", *NESTED)


def section_types(family: str, task_spec: TaskSpec) -> dict[str, type[Any]]:
    """Return the option class of each section of a configuration, by section name."""
    own = {"peft": PeftConfig} if task_spec.finetunes else {}
    return {
        "model": registry.family(family).config, "data": task_spec.data, "objective": task_spec.objective,
        "adapters": AdapterOptions, "optimizer": OptimizerConfig, "train": TrainConfig,
        "export": ExportConfig, **own,
    }  # fmt: skip


def with_current_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration in which renamed options have their current names (see `registry.with_current_names`)."""
    types = section_types(config["family"], task_spec_of(config))
    return {
        name: registry.with_current_names(types[name], value, name)
        if name in types and isinstance(value, Mapping)
        else value
        for name, value in config.items()
    }


@dataclasses.dataclass(frozen=True)
class RunSpec:
    """A checked configuration of a run; make it with `RunSpec.of`.

    Attributes
    ----------
    values
        The configuration as a plain dict, as recorded in `config.json` of the run folder. Renamed options have their
        current names.
    family, task
        Names of the model family and of the task.
    task_spec
        Specification of the task.
    model
        Options of the architecture. Sizes of 0 are taken from the data, or from the model named in `init_from`.
    data, objective
        Options, as instances of the classes in `task_spec`.
    adapters
        Adapters that are trained while the model stays frozen, or None. Adapters that belong to the objective
        (`objective.lora`) are not included.
    peft
        Method of fine-tuning, for tasks that fine-tune.
    optimizer
        Options of the optimizer.
    export
        Options of the model folder that the run writes.
    loop
        Options of the training loop. If the configuration does not set the number of steps, `loop.steps` is 1; see
        `train_options`.
    steps
        Number of steps in the configuration; 0 if it is computed from `data.tokens`.
    init_from
        Run folder or model to start from; "" for random parameters.
    tokenizer
        Tokenizer file or folder. "" means that the configuration names no tokenizer.
    """

    values: Mapping[str, Any]
    family: str
    task: str
    task_spec: TaskSpec
    model: Mapping[str, Any]
    data: StoreConfig
    objective: ObjectiveConfig
    adapters: AdapterConfig | None
    peft: PeftConfig
    optimizer: OptimizerConfig
    export: ExportConfig
    loop: TrainConfig
    steps: int
    init_from: str
    tokenizer: str

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> RunSpec:
        """Check and resolve a configuration. This method neither reads nor writes files.

        Raises
        ------
        ConfigError
            An option is unknown or invalid, options contradict each other, or this machine's device cannot run the
            model.
        MissingExtraError
            A package that the run needs is not installed.
        """
        values = json.loads(json.dumps(config))
        _check_sections(values)
        task_spec = task_spec_of(values)
        values = with_current_names(values)
        model, data, objective, _, _, optimizer, loop, export = (
            dict(values.get(name, {})) for name in NESTED
        )
        steps = loop.get("steps") or 0
        train = registry.build(TrainConfig, {**loop, "steps": steps or 1}, "train")
        made_optimizer = registry.build(OptimizerConfig, optimizer, "optimizer")
        made_objective = registry.build(task_spec.objective, objective, "objective")
        # Record these options even if they have their default: a missing one means the value of older versions.
        for name in task_spec.objective.BEFORE:
            values.setdefault("objective", {})[name] = getattr(made_objective, name)
        init_from = values.get("init_from") or ""
        tokenizer = data.get("tokenizer") or ""
        if task_spec.tokenizer is not None and not tokenizer and not init_from:
            import_tokenizers()  # fail now if the package is missing, not after minutes of work
        made_objective.check_start(init_from)
        adapters = adapters_of(values)
        made_data = registry.build(task_spec.data, data, "data")
        registry.check_device(registry.model_config(values["family"], model, 1))
        return cls(
            values, values["family"], values["task"], task_spec, model, made_data, made_objective, adapters,
            peft_of(values), made_optimizer, registry.build(ExportConfig, export, "export"), train, steps, init_from,
            tokenizer,
        )  # fmt: skip

    @property
    def files(self) -> dict[str, str]:
        """Input files whose content affects the results, by option name, such as "data.studies"."""
        sections = {"data": self.data, "objective": self.objective}
        return {
            f"{section}.{name}": path
            for section, options in sections.items()
            for name, path in files_of(options).items()
        }

    def train_options(self, tokens_per_record: int, records: int = 0) -> TrainConfig:
        """Return the options of the training loop, with all numbers of steps.

        If the number of steps is 0, it is computed from `train.epochs` or `data.tokens`.

        Parameters
        ----------
        tokens_per_record
            Number of tokens in one training record of the task.
        records
            Number of training records in an epoch; needed only for `train.epochs`.

        Raises
        ------
        ConfigError
            Neither `train.steps` nor `data.tokens` is set, or `data.tokens` is smaller than the number of tokens of one
            step.
        """
        steps = self.steps
        if self.loop.epochs:
            return self.loop.for_records(records, steps)
        if not steps:
            if self.data.tokens <= 0:
                raise ConfigError(
                    "train.steps, train.epochs and data.tokens are all 0, but one of them must give the length of the "
                    "run: set train.steps to a number of training steps, train.epochs to a number of passes over the "
                    "data, or data.tokens to a number of tokens."
                )
            steps = round(self.data.tokens / (self.loop.batch_size * tokens_per_record))
        return dataclasses.replace(self.loop, steps=steps)

    def make_tokenizer(self, store: Store) -> Tokenizer:
        """Train a tokenizer on the texts of a store. Only tasks that use text have a tokenizer."""
        assert self.task_spec.tokenizer is not None
        return self.task_spec.tokenizer(store, self.objective, self.data, self.loop.seed)

    def make_task(
        self,
        store: Store,
        model: Mapping[str, Any],
        tokenizer: Tokenizer | None,
        parent_data_spec: Mapping[str, Any] | None,
        mesh: Mesh | None,
    ) -> Task:
        """Build the task over a store; see `TaskInputs` for the arguments.

        Raises
        ------
        ConfigError
            Model, data and options contradict each other, or this machine's device cannot run the model.
        """
        seed = self.loop.seed
        inputs = TaskInputs(
            self.family, model, self.objective, self.data, store, seed, tokenizer, parent_data_spec, mesh,
            self.peft, self.init_from,
        )  # fmt: skip
        return cast(Task, task_of(self.task_spec, inputs, self.adapters))


def _check_sections(values: Mapping[str, Any]) -> None:
    for name in sorted(values):
        check_choice("a section of the configuration", name, SECTIONS)
    for section in NESTED:
        check_type(section, values.get(section, {}), dict, "a section of named options")
