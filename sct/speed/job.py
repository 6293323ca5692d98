"""Define the options of a speed measurement, and prepare the cells that it uses."""

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
# Default number of synthetic cells. For the loader, the store must be much larger than the TensorStore cache.
_CELLS = {"loader": 40_000, "ingest": 20_000}
_LEAST_CELLS = 1_000


@dataclasses.dataclass(frozen=True)
class SpeedOptions:
    """Options of a speed measurement.

    Parameters
    ----------
    mode
        Part to measure, one of `MODES`.
    steps, warmup
        Number of timed repetitions, and number of untimed repetitions before them.
    check_cells
        Number of cells per bag in the comparison with the reference implementation; 0 uses 2 cells, but no more than a
        bag has.
    cells
        Number of synthetic cells; 0 uses the default of the mode. The option has no effect if the configuration sets a
        store or a data set.
    nonzeros
        Mean number of expressed genes per synthetic cell; 0 uses a tenth of the genes.
    ceiling_size
        Number of rows and columns of the matrices for the compute ceiling; 0 uses the default sizes for the device.
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
        # An ingest takes long and varies little, so one step is enough. Other modes need a median.
        least = {"steps": 1 if self.mode == "ingest" else 3, "warmup": 1}
        for name in ("steps", "warmup", "check_cells", "cells", "nonzeros", "ceiling_size"):
            check_at_least(f"--{name}", getattr(self, name), least.get(name, 0))


@dataclasses.dataclass(frozen=True)
class SpeedJob:
    """A speed measurement. The measurement can be pickled, so that another process can prepare the cells.

    Attributes
    ----------
    config
        Training configuration as nested dicts.
    options
        See `SpeedOptions`.
    folder
        Folder for synthetic cells and stores.
    """

    config: Mapping[str, Any]
    options: SpeedOptions
    folder: Path

    def __post_init__(self) -> None:
        if "sweep" in self.config or "train" not in self.config:
            found = (
                "is a sweep of several training runs" if "sweep" in self.config else "has no section `train`"
            )
            raise ConfigError(
                f"--config {found}, but this command measures a single training run: use another configuration, such "
                "as configs/sct_sc.py."
            )
        mode = self.options.mode
        if mode != "generate" and mode not in self.task_spec.speed:
            able = [name for name, kind in task_specs().items() if mode in kind.speed]
            writes = families.model(str(self.config["family"])).generate is not None
            modes = [*self.task_spec.speed, *(["generate"] if writes else [])]
            instead = f", or --mode={'|'.join(modes)}" if modes else ""
            raise ConfigError(
                f"--mode={mode} cannot measure the task {self.config['task']!r}: use a configuration with the task "
                f"{' or '.join(able)}{instead}."
            )
        if mode != "generate":  # generate needs no training task
            object.__setattr__(self, "config", with_current_names(self.config))
        if self.options.mode not in ("ingest", "generate") and self.options.cells and self.synthetic:
            smallest = self.cells_per_record
            check_at_least(
                "--cells",
                self.options.cells,
                smallest,
                advice=f"use at least {smallest} cells, the size of one bag",
            )

    @property
    def task_spec(self) -> TaskSpec:
        """Specification of the task in the configuration."""
        return task_spec_of(self.config)

    @property
    def data(self) -> Any:
        """Section `data` of the configuration."""
        return data_of(self.config)

    @property
    def cells_per_record(self) -> int:
        """Number of cells in a bag. If the task reads single cells instead of bags, the number is 1."""
        return int(getattr(self.data, "cells_per_bag", 1))

    def of_cells(self, cells: int) -> dict[str, int]:
        """Return the data option that sets `cells` cells per bag, as a dict.

        The dict is empty if the task reads single cells instead of bags.
        """
        return {"cells_per_bag": cells} if hasattr(self.data, "cells_per_bag") else {}

    @property
    def train(self) -> TrainConfig:
        """Section `train` of the configuration, with at least one step."""
        given = self.config["train"]
        return registry.build(TrainConfig, {**given, "steps": max(int(given.get("steps") or 0), 1)}, "train")

    @property
    def optimizer(self) -> OptimizerConfig:
        """Section `optimizer` of the configuration."""
        return registry.build(OptimizerConfig, self.config.get("optimizer", {}), "optimizer")

    @property
    def synthetic(self) -> bool:
        """Whether the measurement uses synthetic cells.

        The mode `ingest` always uses synthetic cells. The other modes use them if the configuration sets neither a
        store nor a data set.
        """
        return self.options.mode == "ingest" or not (self.data.store or self.data.dataset)

    @property
    def genes(self) -> Any:
        """Vocabulary of the synthetic cells: human genes, but no more genes than the model has positions."""
        return synthetic.vocabulary(int(self.config.get("model", {}).get("num_genes") or 0))

    @property
    def cells(self) -> int:
        """Number of synthetic cells in the measurement."""
        bag = self.cells_per_record
        fewest = {"embed": 2 * bag}.get(self.options.mode, max(_LEAST_CELLS, 2 * bag * self.train.batch_size))
        return self.options.cells or _CELLS.get(self.options.mode, fewest)

    @property
    def nonzeros(self) -> int:
        """Mean number of expressed genes per synthetic cell."""
        return self.options.nonzeros or max(1, round(len(self.genes) / 10))

    @property
    def source(self) -> Path:
        """The .h5ad file with synthetic cells, which the mode `ingest` reads."""
        return self.folder / f"{synthetic.NAME}.h5ad"

    def check_device(self) -> None:
        """Raise `ConfigError` if this machine cannot run the model."""
        family, values = str(self.config.get("family")), self.config.get("model", {})
        registry.check_device(registry.model_config(family, values, len(self.genes)))

    def prepare_cells(self) -> None:
        """Create inputs that do not exist yet: a file or store of synthetic cells, or the store of a data set."""
        if self.options.mode == "ingest":
            synthetic.write_h5ad(self.source, self.genes, self.cells, self.nonzeros)
        elif self.synthetic:
            synthetic.make_store(self.folder / "store", self.genes, self.cells, self.nonzeros)
        elif self.data.dataset and not self.data.store:
            prepare(self.data.dataset, self.folder / "store")

    def open_store(self) -> Store:
        """Open the store that the configuration names, or the store that `prepare_cells` has created."""
        if self.data.store and self.data.dataset:
            raise ConfigError(
                "data.store and data.dataset are both set, but only one is allowed: set one of the two to an empty "
                "text."
            )
        return Store.open(Path(self.data.store).expanduser() if self.data.store else self.folder / "store")

    def task(self, store: Store, **sections: Mapping[str, Any]) -> Any:
        """Build the task of the configuration with changes in some sections.

        A change of a field that the section does not have is ignored.
        """
        types = {
            "model": registry.family(str(self.config["family"])).config,
            "objective": self.task_spec.objective,
        }
        changed = {}
        for name, fields in sections.items():
            existing = (
                {each.name for each in dataclasses.fields(types[name])} if name in types else set(fields)
            )
            known = {field: value for field, value in fields.items() if field in existing}
            changed[name] = {**self.config.get(name, {}), **known}
        task, _ = make_task({**self.config, **changed}, store)
        if not store.split("train"):
            raise ConfigError(
                f"the store {store.path} has no study in the split 'train', but the measurement needs one: ingest "
                "another study, or ingest again with fewer studies in --validation and --test."
            )
        return task
