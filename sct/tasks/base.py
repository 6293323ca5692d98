"""The contract between a task and the training loop."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import jax
import numpy as np

from sct.checks import check_choice
from sct.data.genes.vocabulary import GeneVocabulary
from sct.data.loader import RecordSource
from sct.data.store import SPLITS, Store
from sct.eval.reports.report import Report
from sct.models.adapter_kinds import AdapterConfig

Variables = dict[str, Any]
DeviceBatch = Mapping[str, jax.Array]
MetricSums = dict[str, jax.Array]
_DECIDES = (
    "decides"  # in the metadata of an option: the content of the file that it names decides what is computed
)


def file_option() -> Any:
    """Option that names a file, or "" for none, whose content decides what a run computes."""
    return dataclasses.field(default="", metadata={_DECIDES: True})


def files_of(options: Any) -> dict[str, str]:
    """Files that the options of a section name, by the names of those made by `file_option`."""
    named = [field.name for field in dataclasses.fields(options) if field.metadata.get(_DECIDES)]
    return {name: path for name in named if (path := getattr(options, name))}


@dataclasses.dataclass(frozen=True)
class StoreConfig:
    """Where cells come from; the options of the data of every task.

    Parameters
    ----------
    store
        Folder that `launch.ingest` made.
    dataset
        Instead of a store: "pbmc68k", real cells that come with scanpy; a store is made in the run folder.
    tokens
        Tokens to train on; with `train.steps` 0 the number of steps follows from it.
    """

    store: str = ""
    dataset: str = ""
    tokens: float = 0.0

    @property
    def text_length(self) -> int:
        """Tokens in a row of text; 0 for data without texts."""
        return 0


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """Base of the options of every objective.

    Attributes
    ----------
    BEFORE
        Options that earlier versions did not have, with the value that they stand for in a run that does not record
        them.
    """

    BEFORE: ClassVar[Mapping[str, Any]] = types.MappingProxyType({})

    @property
    def has_adapters(self) -> bool:
        """Whether the objective trains adapters of its own."""
        return False

    def check_start(self, init_from: str) -> None:
        """Raise `ConfigError` where training cannot start from the model `init_from` ("": random parameters)."""


def check_study_names(study_metadata: Mapping[str, Any], store: Store, file: str) -> None:
    """Raise `ConfigError` where a file speaks of studies that a store does not have."""
    known = [study.name for split in SPLITS for study in store.split(split)]
    for name in study_metadata:
        check_choice(f"a study in {file}", name, known, advice="write the name as the store has it")


def held_out_split(store: Store) -> tuple[str | None, str]:
    """Split that a finished model is measured on, the test studies if there are some, and what to say of it."""
    if store.split("test"):
        return "test", ""
    if store.split("validation"):
        note = "The held-out cells are the validation studies, by which the best step was chosen, too."
        return "validation", note
    return None, ""


class Evaluator(Protocol):
    """A measurement at the end of training; `report` is the table of the last one, baselines included."""

    name: str
    report: Report | None

    def __call__(self, variables: Variables) -> Iterator[tuple[str, float]]:
        """Measure: yield (name, value) pairs and set `report`."""
        ...


class Objective(Protocol):
    """What is learned: all that the compiled steps know.

    Attributes
    ----------
    trainable
        Table of (regular expression over parameter paths, trained or not), see `sct.nn.paths`.
    loss_normalizer
        The sum whose value the loss is a mean over (masked positions, say): by it the losses of microbatches add up
        to that of their batch.
    monitor, monitor_mode
        The summary that early stopping and keep-best watch, and whether "min" or "max" is best.
    """

    trainable: Sequence[tuple[str, bool]]
    loss_normalizer: str
    monitor: str
    monitor_mode: str

    def init(self, rng: jax.Array) -> Variables:
        """Initial variables, boxed with their logical axis names; traced, so it may be abstract."""
        ...

    def loss(
        self, variables: Variables, batch: DeviceBatch, rng: jax.Array, train: bool
    ) -> tuple[jax.Array, MetricSums]:
        """Scalar loss, and sums that add up over batches and that `compute_metrics` turns into numbers."""
        ...

    def compute_metrics(self, sums: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Numbers to log from sums over one or many batches."""
        ...

    def operations(self, records: int) -> float:
        """Operations of the matrix products of a forward pass of the loss; a multiply-add counts as two."""
        ...


class TaskData(Protocol):
    """What is learned from.

    Attributes
    ----------
    store
        Cells.
    vocabulary
        Genes of the model.
    tokens_per_record
        Tokens per record; converts `data.tokens` to steps.
    """

    store: Store
    vocabulary: GeneVocabulary
    tokens_per_record: int

    def dataset(self, split: str) -> RecordSource | None:
        """Records of "train" or "validation"; None where the store has no such study."""
        ...

    def tokens(self, batch: Mapping[str, Any]) -> int:
        """Number of tokens in a batch, for the rate shown to people."""
        ...


class Origin(Protocol):
    """What training starts from, beside random parameters.

    Attributes
    ----------
    license
        Of the arrays that `take_pretrained_params` hands over.
    new
        Patterns of parameters that may be absent from a model that training starts from.
    lora
        Options of the adapters that are trained, or None.
    """

    license: str
    may_be_missing: Sequence[str]
    lora: AdapterConfig | None

    def take_pretrained_params(self) -> Mapping[str, Any]:
        """Hand over the arrays by path that a new training takes in place of random ones, and keep none of them.

        Features of genes are such, or a frozen decoder. What a model that training starts from has goes first.
        """
        ...


class Export(Protocol):
    """What is told and measured of a trained model.

    Attributes
    ----------
    model_config
        Architecture.
    """

    model_config: Any

    def evaluators(self) -> Sequence[Evaluator]:
        """Measurements after training."""
        ...

    def exports(self) -> dict[str, Any]:
        """What a model folder says beside the model: fields of `sct.weights.pretrained.Pretrained`."""
        ...

    def notes(self, fresh: bool) -> Sequence[str]:
        """Sentences for a person before training; `fresh` tells that it starts from random parameters."""
        ...


class Task(Objective, TaskData, Origin, Export, Protocol):
    """Everything that training needs: objective, data, origin and export."""
