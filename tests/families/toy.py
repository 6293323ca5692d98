"""A family of this folder alone: a gene MLP of two layers that fills in hidden bins of single cells."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sct.data.cell_options import CellOptions
from sct.data.cell_records import CellSource, cell_records
from sct.data.cells import CellCounts
from sct.errors import DataError
from sct.families import Family, FamilyModel
from sct.inference.readers import SingleCells
from sct.models import registry
from sct.models.adapter_kinds import BottleneckConfig, LoraConfig
from sct.models.registry import Architecture
from sct.nn import axes
from sct.nn.linear import Linear
from sct.tasks.base import ObjectiveConfig, StoreConfig
from sct.tasks.finetuning import FineTuning
from sct.tasks.task_spec import TaskInputs, TaskSpec

BINS, HIDDEN = 10, 0.2
OPTIONS = CellOptions(BINS)


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    num_genes: int = 0
    width: int = 32
    dtype: str = "float32"

    @classmethod
    def fit(cls, values: Mapping[str, Any], num_genes: int) -> dict[str, Any]:
        return {**values, "num_genes": values.get("num_genes") or num_genes}


class Toy(nn.Module):
    config: ToyConfig
    outputs: ClassVar[tuple[str, ...]] = ("bins", "cell_embedding")
    intermediates: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    def example(config: ToyConfig) -> dict[str, jax.Array]:
        return {"seen": jnp.zeros((1, config.num_genes))}

    @staticmethod
    def check_inputs(config: ToyConfig, inputs: Mapping[str, Any]) -> None:
        if inputs["seen"].shape[1:] != (config.num_genes,):
            raise DataError(f"cells have {inputs['seen'].shape[1]} genes, but the model {config.num_genes}.")

    @nn.compact
    def __call__(self, seen: jax.Array) -> dict[str, jax.Array]:
        genes, names = self.config.num_genes, (axes.CHANNEL_IN, axes.EMBED)
        hidden = jax.nn.gelu(Linear(self.config.width, names, name="down")(seen))
        return {"bins": Linear(genes, names[::-1], name="up")(hidden), "cell_embedding": hidden}


@dataclasses.dataclass(frozen=True)
class ToyObjective(ObjectiveConfig):
    hidden: float = HIDDEN


class ToyTask:
    trainable: Sequence[tuple[str, bool]] = ((".*", True),)
    may_be_missing: Sequence[str] = ()
    lora = None
    license = "unknown"
    loss_normalizer, monitor, monitor_mode = "hidden", "loss", "min"

    def __init__(self, parts: TaskInputs):
        self.objective, self.store, self.seed = parts.objective, parts.store, parts.seed
        self.vocabulary = parts.store.vocabulary
        self.model_config = registry.model_config(parts.architecture, parts.model, len(self.vocabulary))
        self.model, self.tokens_per_record = Toy(self.model_config), len(self.vocabulary)

    def take_pretrained_params(self) -> Mapping[str, Any]:
        return {}

    def init(self, rng: jax.Array) -> dict[str, Any]:
        return cast(dict[str, Any], self.model.init(rng, **Toy.example(self.model_config)))

    def loss(self, variables: Any, batch: Any, rng: jax.Array, train: bool) -> tuple[jax.Array, Any]:
        bins = batch["bins"] / BINS
        hidden = jax.random.bernoulli(rng, self.objective.hidden, bins.shape)
        hidden &= batch["example_mask"][:, None] > 0
        made: Any = self.model.apply(variables, jnp.where(hidden, 0, bins))
        error = (jnp.square(made["bins"] - bins) * hidden).sum()
        return error / jnp.maximum(hidden.sum(), 1), {
            "loss": error,
            "hidden": hidden.sum().astype(jnp.float32),
        }

    def compute_metrics(self, sums: Mapping[str, np.ndarray]) -> dict[str, float]:
        return {"loss": float(sums["loss"]) / max(float(sums["hidden"]), 1.0)}

    def dataset(self, split: str) -> CellSource | None:
        studies = self.store.split(split)
        exhaustive = split != "train"
        return CellSource(studies, OPTIONS, exhaustive=exhaustive, seed=self.seed) if studies else None

    def evaluators(self) -> Sequence[Any]:
        return ()

    def tokens(self, batch: Mapping[str, Any]) -> int:
        return int(np.prod(batch["bins"].shape))

    def operations(self, records: int) -> float:
        return 4.0 * records * self.model_config.num_genes * self.model_config.width

    def exports(self) -> dict[str, Any]:
        return {"genes": self.vocabulary, "data": {"task": SPEC.name}}

    def notes(self, fresh: bool) -> Sequence[str]:
        return ()


class ToyReader(SingleCells):
    @property
    def tokens(self) -> int:
        return int(self.model.config.num_genes)

    def records(self, cells: CellCounts, rows: np.ndarray, seed: int) -> dict[str, np.ndarray]:
        return {"seen": cell_records(cells.read(rows), OPTIONS)["bins"].astype(np.float32) / BINS}


SPEC = TaskSpec("toy_bins", ToyObjective, StoreConfig, ToyTask)
FAMILY = Family(
    name="toy_family",
    title="A gene MLP",
    paper="",
    models={
        "toy": FamilyModel(
            Architecture(ToyConfig, Toy, ("^down$",)),
            tasks=(SPEC,),
            config="tests/families/toy.py",
            adapters=(LoraConfig, BottleneckConfig),
            embed=ToyReader,
            finetune=FineTuning(projections=("^down$",), blocks=("^down$",), attention=()),
        )
    },
)
CONFIG: dict[str, Any] = {
    "family": "toy",
    "task": SPEC.name,
    "init_from": "",
    "model": {"width": 24},
    "data": {"dataset": "pbmc68k"},
    "objective": {},
    "optimizer": {"peak_lr": 3e-3, "warmup_steps": 5},
    "train": {"steps": 40, "batch_size": 32, "eval_every": 20, "log_every": 20, "checkpoint_every": 20},
}
