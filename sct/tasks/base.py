"""Define the interface between a training task and the training loop."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import jax
import numpy as np

from sct.checks import check_choice
from sct.models.adapter_kinds import AdapterConfig

if TYPE_CHECKING:  # the training step needs none of the libraries that read cells
    from sct.data.genes.vocabulary import GeneVocabulary
    from sct.data.loader import RecordSource
    from sct.data.store import Store
    from sct.eval.reports.report import Report

Variables = dict[str, Any]
DeviceBatch = Mapping[str, jax.Array]
MetricSums = dict[str, Any]
# Entry of the sums of a loss: changes of variables that are not trained, such as running statistics, by path. The
# training step applies their mean over the microbatches.
MOVING_STATISTICS = "moving_statistics"
_IS_FILE = "is_file"  # metadata key of the options that `file_option` makes


def file_option() -> Any:
    """Return a dataclass field for the path of an input file whose content affects the results. "" means no file."""
    return dataclasses.field(default="", metadata={_IS_FILE: True})


def files_of(options: Any) -> dict[str, str]:
    """Return the paths of the input files that a section of options names, as a dict by option name.

    An option names an input file if its field was made by `file_option`.
    """
    named = [field.name for field in dataclasses.fields(options) if field.metadata.get(_IS_FILE)]
    return {name: path for name in named if (path := getattr(options, name))}


@dataclasses.dataclass(frozen=True)
class StoreConfig:
    """Data options that all tasks share: where the cells come from.

    Parameters
    ----------
    store
        Store folder that `launch.ingest` wrote.
    dataset
        Data set to use instead of a store: "pbmc68k", the blood cells that come with scanpy. Training writes these
        cells to a store in the run folder.
    tokens
        Number of tokens to train on. If `train.steps` is 0, the number of training steps is computed from `tokens`.
    """

    store: str = ""
    dataset: str = ""
    tokens: float = 0.0

    @property
    def text_length(self) -> int:
        """Number of tokens in each row of training text; 0 for tasks without text."""
        return 0


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """Base class of the options of an objective.

    Attributes
    ----------
    BEFORE
        Options that were added in later versions, as a dict by option name. Runs of earlier versions did not record
        these options. The dict gives the values that these runs are assumed to have used.
    """

    BEFORE: ClassVar[Mapping[str, Any]] = types.MappingProxyType({})

    @property
    def has_adapters(self) -> bool:
        """Whether the objective itself trains adapters."""
        return False

    def check_start(self, init_from: str) -> None:
        """Raise `ConfigError` if training cannot start from the model `init_from` ("" means random parameters)."""


def check_study_names(study_metadata: Mapping[str, Any], store: Store, file: str) -> None:
    """Raise `ConfigError` if a file names a study that is not in the store."""
    from sct.data.store import SPLITS

    known = [study.name for split in SPLITS for study in store.split(split)]
    for name in study_metadata:
        check_choice(f"a study in {file}", name, known, advice=f"correct the name in {file}")


def held_out_split(store: Store) -> tuple[str | None, str]:
    """Return the name of the split on which a finished model is evaluated, and a note for the report.

    The split is "test" if the store has test studies. Otherwise the split is "validation" if the store has validation
    studies, and None if the store has neither.
    """
    if store.split("test"):
        return "test", ""
    if store.split("validation"):
        note = "The held-out cells are the validation studies, which also selected the best step."
        return "validation", note
    return None, ""


class Evaluator(Protocol):
    """Interface of an evaluation that runs at the end of training.

    Attributes
    ----------
    name
        Name of the evaluation.
    report
        Table of the last evaluation, with its baselines; None before the first evaluation.
    """

    name: str
    report: Report | None

    def __call__(self, variables: Variables) -> Iterator[tuple[str, float]]:
        """Evaluate the model, yield all metrics as (name, value) pairs, and store the table in `report`."""
        ...


class Objective(Protocol):
    """The part of a task that the compiled training and evaluation steps use.

    Attributes
    ----------
    trainable
        Table of (regular expression over parameter paths, whether to train them), see `sct.nn.paths`.
    loss_normalizer
        Name of the sum over a batch by which the total loss of the batch is divided, for example the number of masked
        positions. Gradient accumulation weights each microbatch by its own value of this sum.
    monitor, monitor_mode
        Metric that decides about early stopping and the best checkpoint, and whether "min" or "max" is best.
    """

    trainable: Sequence[tuple[str, bool]]
    loss_normalizer: str
    monitor: str
    monitor_mode: str

    def init(self, rng: jax.Array) -> Variables:
        """Return the initial variables, boxed with their logical axis names.

        The method can be traced by `jax.eval_shape`, which computes only shapes.
        """
        ...

    def loss(
        self, variables: Variables, batch: DeviceBatch, rng: jax.Array, train: bool
    ) -> tuple[jax.Array, MetricSums]:
        """Return the scalar loss, and sums over the batch from which metrics are computed.

        To compute metrics over several batches, add up their sums and pass the totals to `compute_metrics`. The entry
        `MOVING_STATISTICS` is an exception: in training, it may hold changes of variables that are not trained.
        """
        ...

    def compute_metrics(self, sums: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Compute the metrics to log from the sums over one or more batches."""
        ...

    def operations(self, records: int) -> float:
        """Count the FLOPs of all matrix products in one forward pass of the loss. A multiply-add counts as 2 FLOPs."""
        ...


class TaskData(Protocol):
    """The part of a task that provides the training data.

    Attributes
    ----------
    store
        Store with the cells.
    vocabulary
        Genes of the model.
    tokens_per_record
        Tokens per training record. The number of steps is computed from `data.tokens` with this number.
    """

    store: Store
    vocabulary: GeneVocabulary
    tokens_per_record: int

    def dataset(self, split: str) -> RecordSource | None:
        """Return the records of the split "train" or "validation"; None if the split has no study."""
        ...

    def tokens(self, batch: Mapping[str, Any]) -> int:
        """Return the number of tokens in a batch, for the logged tokens per second."""
        ...


class Origin(Protocol):
    """The part of a task that provides pretrained parameters, from which training starts.

    Attributes
    ----------
    license
        License text of the arrays that `take_pretrained_params` returns.
    may_be_missing
        Regular expressions for the paths of parameters that may be missing from the model named in `init_from`.
    lora
        Options of the adapters that the task trains, or None.
    """

    license: str
    may_be_missing: Sequence[str]
    lora: AdapterConfig | None

    def take_pretrained_params(self) -> Mapping[str, Any]:
        """Return pretrained arrays by parameter path, for example gene features or a frozen decoder.

        A new training run uses these arrays instead of random initial values. Parameters from `init_from` take
        precedence. The task then drops its reference to the arrays, so that their memory can be freed.
        """
        ...


class Export(Protocol):
    """The part of a task that evaluates and exports the trained model.

    Attributes
    ----------
    model_config
        Configuration of the architecture.
    """

    model_config: Any

    def evaluators(self) -> Sequence[Evaluator]:
        """Return the evaluations to run after training."""
        ...

    def exports(self) -> dict[str, Any]:
        """Return fields of `sct.weights.pretrained.Pretrained`, such as the genes, to save in the model folder."""
        ...

    def notes(self, fresh: bool) -> Sequence[str]:
        """Return notices to print before training. `fresh` means that training starts from random parameters."""
        ...


class Task(Objective, TaskData, Origin, Export, Protocol):
    """Everything that training needs from a task: objective, data, pretrained parameters and export."""
