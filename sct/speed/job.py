"""What is to be measured, on which cells."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sct import families
from sct.checks import check_at_least, check_choice
from sct.data.bundled import prepare
from sct.data.store import Store
from sct.errors import ConfigError
from sct.families.tasks import data_of, make_task, task_spec_of, task_specs
from sct.models import registry
from sct.speed import synthetic
from sct.tasks.task_spec import TaskSpec
from sct.train.loop import TrainConfig
from sct.train.optim import OptimizerConfig
from sct.train.run_spec import with_current_names

MODES = ("forward", "train", "loader", "ingest", "embed", "save", "generate")
# Synthetic cells where none are asked for. A store of the loader must be large beside what TensorStore caches.
_CELLS = {"loader": 40_000, "ingest": 20_000}
_LEAST_CELLS = 1_000


@dataclasses.dataclass(frozen=True)
class SpeedOptions:
    """What of a configuration is measured, and how.

    Parameters
    ----------
    mode
        One of `MODES`.
    steps, warmup
        Repetitions that are timed, and those before them that are not.
    check_cells
        Cells of a bag in the comparison with the reference path; 0 takes 2, or what a bag has.
    cells, nonzeros
        Number of synthetic cells, and the expressed genes of one on average; 0 chooses by the mode, and a tenth of
        the genes. Not used where the configuration names a store or a data set.
    ceiling_size
        Side of the matrices of the ceiling; 0 chooses by the device.
    """

    mode: str = "train"
    steps: int = 5
    warmup: int = 1
    check_cells: int = 0
    cells: int = 0
    nonzeros: int = 0
    ceiling_size: int = 0

    def __post_init__(self) -> None:
        check_choice("--mode", self.mode, MODES)
        # An ingest is long and varies little; the others need a median.
        least = {"steps": 1 if self.mode == "ingest" else 3, "warmup": 1}
        for name in ("steps", "warmup", "check_cells", "cells", "nonzeros", "ceiling_size"):
            check_at_least(f"--{name}", getattr(self, name), least.get(name, 0))


@dataclasses.dataclass(frozen=True)
class SpeedJob:
    """A measurement: picklable, so that another process can prepare it.

    Attributes
    ----------
    config
        Plain nested values of a configuration of training.
    options
        See `SpeedOptions`.
    folder
        Where synthetic cells and stores are written.
    """

    config: Mapping[str, Any]
    options: SpeedOptions
    folder: Path

    def __post_init__(self) -> None:
        if "sweep" in self.config or "train" not in self.config:
            raise ConfigError(
                "this configuration is not one run of training: give one that is, such as --config=configs/sct_sc.py."
            )
        mode = self.options.mode
        if mode != "generate" and mode not in self.task_spec.speed:
            able = [name for name, kind in task_specs().items() if mode in kind.speed]
            writes = families.model(str(self.config["family"])).generate is not None
            modes = [*self.task_spec.speed, *(["generate"] if writes else [])]
            instead = f", or --mode={'|'.join(modes)}" if modes else ""
            raise ConfigError(
                f"--mode={mode} does not measure the task {self.config['task']!r}: take a configuration of the task "
                f"{' or '.join(able)}{instead}."
            )
        if mode != "generate":  # which needs no task that trains the family
            object.__setattr__(self, "config", with_current_names(self.config))
        if self.options.mode not in ("ingest", "generate") and self.options.cells and self.synthetic:
            smallest = self.cells_per_record
            check_at_least(
                "--cells",
                self.options.cells,
                smallest,
                advice=f"make at least the {smallest} cells of one bag",
            )

    @property
    def task_spec(self) -> TaskSpec:
        """Specification of the configuration's task."""
        return task_spec_of(self.config)

    @property
    def data(self) -> Any:
        """The configuration's data section."""
        return data_of(self.config)

    @property
    def cells_per_record(self) -> int:
        """Cells of a bag, or 1 where records are single cells."""
        return int(getattr(self.data, "cells_per_bag", 1))

    def of_cells(self, cells: int) -> dict[str, int]:
        """Values of the data section with bags of so many cells; none where records are single cells."""
        return {"cells_per_bag": cells} if hasattr(self.data, "cells_per_bag") else {}

    @property
    def train(self) -> TrainConfig:
        """The configuration's train section; the schedule has at least one step."""
        given = self.config["train"]
        return registry.build(TrainConfig, {**given, "steps": max(int(given.get("steps") or 0), 1)}, "train")

    @property
    def optimizer(self) -> OptimizerConfig:
        """The configuration's optimizer section."""
        return registry.build(OptimizerConfig, self.config.get("optimizer", {}), "optimizer")

    @property
    def synthetic(self) -> bool:
        """Whether cells are made: the configuration names neither a store nor a data set, or an ingest is measured."""
        return self.options.mode == "ingest" or not (self.data.store or self.data.dataset)

    @property
    def genes(self) -> Any:
        """Vocabulary of synthetic cells: the human genes, as many as the model has positions for."""
        return synthetic.vocabulary(int(self.config.get("model", {}).get("num_genes") or 0))

    @property
    def cells(self) -> int:
        """Number of synthetic cells."""
        bag = self.cells_per_record
        fewest = {"embed": 2 * bag}.get(self.options.mode, max(_LEAST_CELLS, 2 * bag * self.train.batch_size))
        return self.options.cells or _CELLS.get(self.options.mode, fewest)

    @property
    def nonzeros(self) -> int:
        """Expressed genes of a synthetic cell, on average."""
        return self.options.nonzeros or max(1, round(len(self.genes) / 10))

    @property
    def source(self) -> Path:
        """File of synthetic cells that an ingest reads."""
        return self.folder / f"{synthetic.NAME}.h5ad"

    def check_device(self) -> None:
        """Raise `ConfigError` for a model that this machine does not compute."""
        family, values = str(self.config.get("family")), self.config.get("model", {})
        registry.check_device(registry.model_config(family, values, len(self.genes)))

    def prepare_cells(self) -> None:
        """Make what is not there: synthetic cells, as a file or as a store, or the store of a data set."""
        if self.options.mode == "ingest":
            synthetic.write_h5ad(self.source, self.genes, self.cells, self.nonzeros)
        elif self.synthetic:
            synthetic.make_store(self.folder / "store", self.genes, self.cells, self.nonzeros)
        elif self.data.dataset and not self.data.store:
            prepare(self.data.dataset, self.folder / "store")

    def open_store(self) -> Store:
        """Open the configuration's store, or the one that was made."""
        if self.data.store and self.data.dataset:
            raise ConfigError("the configuration names data.store and data.dataset: leave one of them empty.")
        return Store.open(Path(self.data.store).expanduser() if self.data.store else self.folder / "store")

    def task(self, store: Store, **sections: Mapping[str, Any]) -> Any:
        """Make the configuration's task, with some fields of some sections changed, of those that there are."""
        types = {
            "model": registry.family(str(self.config["family"])).config,
            "objective": self.task_spec.objective,
        }
        changed = {}
        for name, fields in sections.items():
            there = {each.name for each in dataclasses.fields(types[name])} if name in types else set(fields)
            known = {field: value for field, value in fields.items() if field in there}
            changed[name] = {**self.config.get(name, {}), **known}
        task, _ = make_task({**self.config, **changed}, store)
        if not store.split("train"):
            raise ConfigError(
                f"the store {store.path} has no study in the split 'train': ingest one, or change the splits."
            )
        return task
