"""Train a classifier of cell types on a pretrained model, with one of the methods of the scPEFT paper.

The classifier reads the cell embedding of the model. `sct.tasks.finetuning` defines the methods: all but "full" leave
the parameters of the model as they are.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sct.checks import check_at_least, check_choice, check_not_empty
from sct.data.labeled_cells import MISSING, TEST, TRAIN, VALIDATION, AnnotatedCells, SplitOptions
from sct.data.loader import Loader, RecordSource
from sct.data.store import SPLITS, Store
from sct.errors import ConfigError
from sct.eval.labels.annotation import (
    AnnotationReport,
    AnnotationResult,
    CellOutputs,
    ClassesReport,
    class_weights,
    fit_temperature,
    score_annotation,
)
from sct.models import classifier, registry
from sct.models.adapter_kinds import AdapterConfig
from sct.nn.adapters import COLLECTION
from sct.nn.paths import flatten
from sct.tasks import finetuning
from sct.tasks.base import DeviceBatch, Evaluator, MetricSums, ObjectiveConfig, StoreConfig, Variables
from sct.tasks.finetuning import FineTuning, PeftConfig
from sct.tasks.task_spec import TaskInputs, TaskSpec
from sct.weights.load import load
from sct.weights.pretrained import ANNOTATION, FULL, Pretrained

NAME = "annotation"
CLASS_WEIGHTS = ("none", "balanced")
_SEPARATE = (
    "rows",
    "is_target",
    "example_mask",
    "label",
)  # arrays of a batch that are no inputs of the model


@dataclasses.dataclass(frozen=True)
class AnnotationConfig(ObjectiveConfig):
    """Options of the objective, and of the report after training.

    Parameters
    ----------
    class_weights
        "none", or "balanced": the loss weights each cell type inversely to its number of training cells.
    report_native
        Whether the report also shows the native model: nearest neighbors of its embeddings.
    report_baselines
        Whether the report also shows methods that need no pretrained model.
    """

    class_weights: str = CLASS_WEIGHTS[0]
    report_native: bool = True
    report_baselines: bool = True

    def __post_init__(self) -> None:
        check_choice("class_weights", self.class_weights, CLASS_WEIGHTS)

    def check_start(self, init_from: str) -> None:
        """Raise `ConfigError` if there is no model to fine-tune."""
        if not init_from:
            raise ConfigError(
                "fine-tuning needs a pretrained model, but --config.init_from is not set: set --config.init_from=MODEL."
            )


@dataclasses.dataclass(frozen=True)
class AnnotationData(StoreConfig):
    """Data options: where the labels are, and how the cells are divided.

    Parameters
    ----------
    label_key
        Column of `obs` with the labels.
    split_key, donor_key, test_fraction, split_seed
        See `sct.data.labeled_cells.SplitOptions`. If the store has test studies and `split_key` is empty, the studies
        decide which cells are test cells. If the store has no column "donor", which is the default of `donor_key`,
        cells are divided at random.
    cells_per_bag
        Number of cells that the model reads together; 0: as in the training of the model.
    """

    label_key: str = "cell_type"
    split_key: str = ""
    donor_key: str = "donor"
    test_fraction: float = 0.2
    split_seed: int = 0
    cells_per_bag: int = 0

    def __post_init__(self) -> None:
        check_not_empty("data.label_key", self.label_key)
        check_at_least("data.cells_per_bag", self.cells_per_bag, 0)
        _ = self.split

    @property
    def split(self) -> SplitOptions:
        """Options of the split."""
        return SplitOptions(self.split_key, self.donor_key, self.test_fraction, self.split_seed)


class LabeledRecords:
    """Records of cells, with the class of each cell: `label` int32 (K,), `MISSING` for cells that do not count."""

    def __init__(self, source: RecordSource, codes: np.ndarray):
        self.source, self.codes = source, codes

    def __len__(self) -> int:
        return len(self.source)

    def describe(self, number: int, epoch: int = 0) -> str:
        """Return the text that identifies a record in messages."""
        return self.source.describe(number, epoch)

    def record(self, number: int, epoch: int = 0) -> dict[str, np.ndarray]:
        """Return a record."""
        record = self.source.record(number, epoch)
        label = np.where(record["is_target"], self.codes[record["rows"]], MISSING)
        return {**record, "label": label.astype(np.int32)}


class Annotation:
    """Task that fine-tunes a model for cell types; see `sct.tasks.base.Task`.

    Parameters
    ----------
    config, peft
        Options of the objective and of the method.
    how
        Entry of the architecture in the manifest of its family.
    reader
        Reader with which the model embeds cells. Its model needs no weights.
    cells
        Labeled cells.
    cells_per_bag
        Number of cells that the model reads together; None: as in the training of the model.
    seed
        Seed of the order of the cells and of the bags.
    store
        Store with the cells, if they come from one.
    init_from
        Model that is fine-tuned. The report of the method "full" loads it again, because its parameters have changed.

    Raises
    ------
    ConfigError
        The architecture does not support the method, or the model reads the batch of each cell.
    """

    lora: AdapterConfig | None = None
    license = "unknown"
    loss_normalizer = "weight"
    monitor, monitor_mode = "loss", "min"
    may_be_missing: Sequence[str] = (rf"^{COLLECTION}/", *classifier.NEW)

    def __init__(
        self,
        config: AnnotationConfig,
        peft: PeftConfig,
        how: FineTuning,
        reader: Any,
        cells: AnnotatedCells,
        cells_per_bag: int | None = None,
        seed: int = 0,
        store: Store | None = None,
        init_from: str = "",
    ):
        model = reader.model
        if getattr(model.config, "domain_norm", ""):
            raise ConfigError(
                f"{model!r} normalizes the cells of each batch separately (domain_norm), but fine-tuning does not read "
                "the batches of cells: use a model without domain_norm."
            )
        self.config, self.peft, self.how, self.reader, self.cells = config, peft, how, reader, cells
        self.model_config, self.vocabulary, self.parent = model.config, model.vocabulary, model
        self.cells_per_bag, self.seed, self.init_from = cells_per_bag, seed, init_from
        self.store = cast(Store, store)
        self.module = registry.family(model.family).module
        self.model = self.module(model.config)
        self.tokens_per_record = reader.tokens_per_record(cells_per_bag)
        self.weights = class_weights(cells.codes[cells.rows[TRAIN]], len(cells.names), config.class_weights)
        self.temperature = 1.0
        boxed = jax.eval_shape(self._init_model, jax.random.key(0))
        self.adapters = peft.adapters(how, boxed["params"], model.family)
        self.trainable: Sequence[tuple[str, bool]] = peft.trainable(how, flatten(boxed))
        self.width = self._width(boxed)
        self._run = jax.jit(self._outputs)

    def _init_model(self, rng: jax.Array) -> Variables:
        return cast(Variables, self.model.init(rng, **self.module.example(self.model_config)))

    def _width(self, boxed: Any) -> int:
        """Return the width of the cell embedding."""
        record = self._source(TRAIN, shuffle=True).record(0)
        batch = {name: jnp.asarray(value)[None] for name, value in record.items()}
        return int(jax.eval_shape(self._embed, boxed, batch).shape[-1])

    @property
    def trained_parameters(self) -> int:
        """Number of parameters that are trained."""
        return finetuning.count_trained(jax.eval_shape(self.init, jax.random.key(0)), self.peft, self.how)

    def take_pretrained_params(self) -> Mapping[str, Any]:
        """Return no arrays: all pretrained parameters come from `init_from`."""
        return {}

    def init(self, rng: jax.Array) -> Variables:
        """Return the initial variables of the model, its adapters and the classifier, boxed with axis names."""
        variables = self._init_model(rng)
        rng = jax.random.fold_in(rng, 1)
        return finetuning.init(rng, variables, self.adapters, self.width, len(self.cells.names))

    def _embed(self, variables: Variables, batch: DeviceBatch, rng: jax.Array | None = None) -> jax.Array:
        """Return the cell embeddings, float32 (B, K, D)."""
        inputs = {name: value for name, value in batch.items() if name not in _SEPARATE}
        own = {name: tree for name, tree in variables.items() if name != classifier.COLLECTION}
        rngs = {} if rng is None else {"dropout": rng}
        made = cast(dict[str, jax.Array], self.model.apply(own, **inputs, rngs=rngs))[self.reader.readout]
        return (made if self.reader.in_bags else made[:, None]).astype(jnp.float32)

    def loss(
        self, variables: Variables, batch: DeviceBatch, rng: jax.Array, train: bool
    ) -> tuple[jax.Array, MetricSums]:
        """Return the weighted mean cross-entropy of the cell types.

        Also returns sums over cells with labels: `loss`, `weight`, and `confusion` (C, C) with the true type in rows
        and the predicted type in columns.
        """
        labels, number = batch["label"], len(self.cells.names)
        # Adapters may have dropout where the model has none.
        embeddings = self._embed(variables, batch, rng if train else None)
        logits = classifier.logits(variables[classifier.COLLECTION], embeddings)
        counts = (labels != MISSING) & (batch["example_mask"] > 0)[:, None]
        places = jnp.maximum(labels, 0)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, places)
        weights = jnp.where(counts, jnp.asarray(self.weights)[places], 0.0)
        cell = jnp.where(counts, places * number + logits.argmax(axis=-1), number**2)
        confusion = jnp.bincount(cell.reshape(-1), length=number**2 + 1)[:-1].reshape(number, number)
        total, weight = (losses * weights).sum(), weights.sum()
        sums = {"loss": total, "weight": weight, "confusion": confusion.astype(jnp.float32)}
        return total / jnp.maximum(weight, 1e-6), sums

    def compute_metrics(self, sums: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Return the mean loss, the accuracy, and the balanced accuracy over the types that occur."""
        confusion = np.asarray(sums["confusion"], np.float64)
        cells = confusion.sum(axis=1)
        occurs = cells > 0
        recall = np.diagonal(confusion)[occurs] / cells[occurs]
        weight = float(sums["weight"])
        return {
            "loss": float(sums["loss"]) / weight if weight else float("nan"),
            "accuracy": float(np.trace(confusion)) / max(float(cells.sum()), 1.0),
            "balanced_accuracy": float(recall.mean()) if occurs.any() else 0.0,
        }

    def _source(self, split: str, shuffle: bool) -> LabeledRecords:
        made = self.reader.source(
            self.cells.cells,
            self.cells.rows[split],
            shuffle=shuffle,
            seed=self.seed,
            cells_per_bag=self.cells_per_bag,
        )
        return LabeledRecords(made, self.cells.codes)

    @functools.cache  # noqa: B019 (a run has one task)
    def dataset(self, split: str) -> LabeledRecords | None:
        """Return the labeled cells of a split as records: shuffled bags for "train"."""
        if not len(self.cells.rows[split]):
            return None
        return self._source(split, shuffle=split == TRAIN)

    def _outputs(self, variables: Variables, batch: DeviceBatch) -> tuple[jax.Array, jax.Array | None]:
        embeddings = self._embed(variables, batch)
        tree = variables.get(classifier.COLLECTION)
        return embeddings, None if tree is None else classifier.logits(tree, embeddings)

    def run(self, variables: Variables, split: str, batch_size: int = 0) -> CellOutputs:
        """Run the model over the labeled cells of a split, without training; see `sct.eval.labels.annotation.Run`.

        Parameters
        ----------
        variables
            Variables of the native model or of the fine-tuned model.
        split
            "train", "validation" or "test".
        batch_size
            Number of records per batch; 0: about 65,536 tokens, or one bag.
        """
        source, rows = self._source(split, shuffle=False), self.cells.rows[split]
        size = batch_size or max(1, min((1 << 16) // max(self.tokens_per_record, 1), len(source), 256))
        parts: list[tuple[np.ndarray, ...]] = []
        batches = iter(Loader(source, size, shuffle=False))
        for batch in batches:
            made = jax.device_get(self._run(variables, batch))
            counts = batch["is_target"] & (batch["example_mask"] > 0)[:, None]
            parts.append((batch["rows"][counts], *(each[counts] for each in made if each is not None)))
        found = [np.concatenate(each) for each in zip(*parts, strict=True)]
        order = np.argsort(found[0], kind="stable")
        assert np.array_equal(found[0][order], rows)
        return CellOutputs(*(each[order] for each in found[1:]))

    def evaluate(
        self, variables: Variables, base: Any = None, temperature: float | None = None
    ) -> AnnotationResult:
        """Evaluate fine-tuned variables on the test cells.

        Parameters
        ----------
        variables, base
            Variables of the fine-tuned model and of the native model.
        temperature
            Result of `calibrate`; None to fit the temperature here.
        """
        result = score_annotation(
            self.cells, self.run, variables, base if self.config.report_native else None, self.peft.method,
            self.trained_parameters, self.config.report_baselines, temperature,
        )  # fmt: skip
        self.temperature = result.temperature
        return result

    def calibrate(self, variables: Variables) -> float:
        """Fit the temperature of the probabilities on the validation cells, and return it."""
        logits = self.run(variables, VALIDATION).logits
        assert logits is not None
        self.temperature = fit_temperature(logits, self.cells.codes[self.cells.rows[VALIDATION]])
        return self.temperature

    def _base(self, variables: Variables) -> Any:
        """Return the variables of the native model."""
        if self.peft.method != FULL:
            own = (COLLECTION, classifier.COLLECTION)
            return {name: tree for name, tree in variables.items() if name not in own}
        return load(self.init_from).variables if self.init_from and self.config.report_native else None

    def evaluators(self) -> Sequence[Evaluator]:
        """Return the evaluation on the test cells, with its table by cell type."""
        if not len(self.cells.rows[TEST]):
            return ()
        first = AnnotationReport(lambda variables: self.evaluate(variables, self._base(variables)))
        return (first, ClassesReport(first))

    def tokens(self, batch: Mapping[str, Any]) -> int:
        """Return the approximate number of tokens in a batch."""
        return len(batch["example_mask"]) * self.tokens_per_record

    def operations(self, records: int) -> float:
        """Raise `ConfigError`: the operations are not counted for all architectures."""
        raise ConfigError(
            f"the operations of the task {NAME!r} are not counted: measure the task that pretrains the model."
        )

    def record(self) -> dict[str, Any]:
        """Return what a model folder records about the classifier."""
        return {
            "labels": list(self.cells.names), "label_key": self.cells.label_key, "method": self.peft.method,
            "temperature": self.temperature, "split": self.cells.how,
        }  # fmt: skip

    def exports(self) -> dict[str, Any]:
        """Return the genes, and how cells become model inputs and logits become labels."""
        data = {**self.parent.data, ANNOTATION: self.record()}
        if self.reader.in_bags:
            data["cells_per_bag"] = self.reader.cells_per_bag(self.cells_per_bag)
        made: dict[str, Any] = {"genes": self.vocabulary, "data": data}
        return made if self.parent.tokenizer is None else {**made, "tokenizer": self.parent.tokenizer}

    def notes(self, fresh: bool) -> Sequence[str]:
        """Return how the cells were divided, and how many parameters are trained."""
        numbers = ", ".join(f"{len(rows):,} {split}" for split, rows in self.cells.rows.items() if len(rows))
        return (
            self.cells.how,
            f"{len(self.cells.names)} cell types; labeled cells: {numbers}; the method {self.peft.method!r} trains "
            f"{self.trained_parameters:,} parameters.",
        )


def make(inputs: TaskInputs) -> Annotation:
    """Build the task from `TaskInputs`, which hold the sections of a configuration."""
    assert inputs.embed is not None
    data, config = (
        inputs.data,
        registry.model_config(inputs.architecture, inputs.model, len(inputs.store.vocabulary)),
    )
    split = data.split
    studies = [study for kind in SPLITS for study in inputs.store.split(kind)]
    columns = {name for study in studies if data.label_key in study.obs_columns for name in study.obs_columns}
    if split.donor_key == AnnotationData.donor_key and split.donor_key not in columns:
        split = dataclasses.replace(split, donor_key="")
    if split.donor_key and columns:
        check_choice(
            "data.donor_key",
            split.donor_key,
            sorted(columns),
            advice="set it to a column of obs with donors, or to ''",
        )
    cells = AnnotatedCells.of_store(inputs.store, data.label_key, split)
    known = {name: value for name, value in (inputs.parent_data_spec or {}).items() if name != ANNOTATION}
    parent = Pretrained(
        inputs.architecture, config, {}, inputs.store.vocabulary, data=known, tokenizer=inputs.tokenizer
    )
    return Annotation(
        inputs.objective, inputs.peft, inputs.finetune or FineTuning(), inputs.embed(parent), cells,
        data.cells_per_bag or None, inputs.seed, inputs.store, inputs.init_from,
    )  # fmt: skip


SPEC = TaskSpec(
    NAME, AnnotationConfig, AnnotationData, make, inherits_architecture=True, speed=(), finetunes=True
)
