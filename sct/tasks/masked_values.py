"""Train a cell encoder to predict the expression values of masked or generated genes, and related objectives."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from sct.checks import check_at_least, check_choice, check_share
from sct.data.batch_labels import UNKNOWN, batch_labels, batches_of, check_distinct
from sct.data.cell_options import CellOptions
from sct.data.gene_selection import hvg_of
from sct.data.gene_tokens import TokenSource, rows_of_genes
from sct.data.store import SPLITS, Store, Study
from sct.errors import ConfigError
from sct.models import registry
from sct.models.adapter_kinds import AdapterConfig
from sct.models.cell_encoder import STATISTICS, CellEncoder
from sct.models.cell_encoder_config import CellEncoderConfig
from sct.nn.adapters import COLLECTION
from sct.nn.cell_losses import elastic_similarity, masked_squared_error, zero_loss
from sct.nn.paths import flatten
from sct.tasks.base import (
    MOVING_STATISTICS,
    DeviceBatch,
    Evaluator,
    MetricSums,
    ObjectiveConfig,
    StoreConfig,
    Variables,
    held_out_split,
)
from sct.tasks.task_spec import TaskInputs, TaskSpec

NAME = "masked_values"
MODES = ("masked", "generative")
# Terms of the loss: option -> what the model needs for it, as (option of the model, text for messages).
_HEADS = {
    "value_weight": ("value_head", "True"),
    "mvc_weight": ("mvc", "'inner product'"),
    "zero_weight": ("explicit_zero", "True"),
    "dab_weight": ("dab", "True"),
}


@dataclasses.dataclass(frozen=True)
class TokenData(StoreConfig):
    """Data options: which cells to train on, and which genes of a cell the model reads.

    Parameters
    ----------
    max_genes, genes, values
        Which genes of a cell are read, and the kind of their values; see `sct.data.cell_options.CellOptions`. CLS is
        added to them. Genes that a study did not measure are left out. The number of bins follows from
        `model.num_bins`.
    variable_genes
        Number of highly variable genes of the training cells that the model knows. The model knows no other genes, so
        its sequences and its gene table are shorter. 0: the model knows all genes of the vocabulary. The genes that
        are highly variable in most training studies are selected; see `sct.data.gene_selection.hvg_of`.
    batch_key
        Column of the store with batch labels, such as donors or sequencing runs; "" for none. The model knows the
        batches of the training cells.
    shared_batches
        Whether a label in this column means the same batch in all studies. If False, a label that occurs in several
        studies is an error.
    """

    max_genes: int = 1199
    genes: str = "sampled"
    values: str = "quantiles"
    variable_genes: int = 0
    batch_key: str = ""
    shared_batches: bool = False

    def __post_init__(self) -> None:
        _ = CellOptions.of(2, self)
        check_at_least("data.variable_genes", self.variable_genes, 0)
        if self.genes == "listed":
            raise ConfigError(
                "data.genes is 'listed', but training selects its own genes: set data.genes to hvg, all, expressed, "
                "top or sampled."
            )

    @property
    def has_zeros(self) -> bool:
        """Whether the model reads unexpressed genes."""
        return CellOptions.of(2, self).choice in ("all", "hvg")


@dataclasses.dataclass(frozen=True)
class MaskedValuesConfig(ObjectiveConfig):
    """Options of the objective: masking, weights of the terms of the loss, and the report after training.

    The loss is a weighted sum of terms. A term with weight 0 is not computed.

    Parameters
    ----------
    mode
        "masked": the values of masked genes are replaced by `model.mask_value`, and all genes attend to each other.
        "generative": a learned flag replaces these values, and the genes to be generated attend only to the known genes
        and to themselves (`model.flags`).
    mask_ratio
        Probability that a gene is masked. Of several ratios, each cell draws one.
    mask_zeros
        Also mask genes whose value is zero. If False, only non-zero values are masked.
    value_weight
        Weight of the squared error of the values that the output vectors of masked genes predict.
    mvc_weight
        Weight of the squared error of the values that the cell embedding predicts for masked genes (MVC), in the form
        `model.mvc`.
    second_pass_weight
        With `mode="generative"`: weight of the squared error of a second pass, in which the cell embedding of the first
        pass, without gradient, is put in place of CLS.
    zero_weight
        Weight of the negative log-likelihood of zero and non-zero values, for all heads with `model.explicit_zero`.
    ecs_weight, ecs_threshold
        Weight of the elastic cell similarity, and its threshold; see `sct.nn.cell_losses.elastic_similarity`.
    dab_weight
        Weight of the cross-entropy of the batch discriminator, whose gradient is reversed (`model.dab`). The best model
        is then chosen by the loss without this term.
    report_cells, report_seeds
        Number of held-out cells in the report after training (0: no report), and number of random masks per cell.

    Notes
    -----
    The terms of values and zeros are means over masked genes. ECS and DAB are means over cells. With gradient
    accumulation, ECS compares only the cells of a microbatch, and the ECS and DAB of a microbatch are weighted by its
    number of masked genes.
    """

    mode: str = "masked"
    mask_ratio: tuple[float, ...] = (0.4,)
    mask_zeros: bool = False
    value_weight: float = 1.0
    mvc_weight: float = 1.0
    second_pass_weight: float = 0.0
    zero_weight: float = 0.0
    ecs_weight: float = 0.0
    ecs_threshold: float = 0.3
    dab_weight: float = 0.0
    report_cells: int = 500
    report_seeds: int = 3

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, MODES)
        if not self.mask_ratio:
            raise ConfigError("mask_ratio is empty, but must have at least one ratio: write (0.4,).")
        for ratio in self.mask_ratio:
            check_share("mask_ratio", ratio, zero=False)
        for field in dataclasses.fields(self):
            if field.name.endswith("_weight"):
                check_at_least(field.name, getattr(self, field.name), 0, whole=False)
        if not (self.value_weight or self.mvc_weight):
            raise ConfigError(
                "value_weight and mvc_weight are both 0, but one of them must predict values: set one of them to 1."
            )
        check_share("ecs_threshold", self.ecs_threshold)
        if self.second_pass_weight and self.mode != "generative":
            raise ConfigError(
                f"second_pass_weight is {self.second_pass_weight:g}, but mode is {self.mode!r}: set mode to "
                "generative, or second_pass_weight to 0."
            )
        check_at_least("report_cells", self.report_cells, 0)
        check_at_least("report_seeds", self.report_seeds, 1)


class MaskedValues:
    """Task that pretrains a cell encoder; see `sct.tasks.base.Task`.

    Parameters
    ----------
    config, data
        Options of the objective and of the data.
    model
        Configuration of the architecture.
    store
        Store with the cells.
    rows_of_genes
        Row of the gene embedding for each gene of the vocabulary, int (G,); -1 for genes that the model does not know.
    listed
        Vocabulary positions of the highly variable genes, ascending; None if the model reads other genes.
    batches
        Batches of the training cells.
    seed
        Seed of the order of the cells and of sampled genes.
    """

    may_be_missing: Sequence[str] = ()
    lora: AdapterConfig | None = None
    license = "unknown"
    loss_normalizer = "masked"
    monitor, monitor_mode = "loss", "min"  # without the adversarial term, which no model can minimize

    def __init__(
        self, config: MaskedValuesConfig, data: TokenData, model: CellEncoderConfig, store: Store,
        rows_of_genes: np.ndarray, listed: np.ndarray | None, batches: Sequence[str], seed: int,
    ):  # fmt: skip
        self.config, self.data, self.model_config, self.store, self.seed = config, data, model, store, seed
        self.model, self.vocabulary = CellEncoder(model), store.vocabulary
        self.rows_of_genes, self.listed, self.batches = rows_of_genes, listed, tuple(batches)
        self.options = CellOptions.of_tokens(model.num_bins, model.values == "category", data)
        self.trainable: Sequence[tuple[str, bool]] = (
            *([(f"^{STATISTICS}/", False)] if model.domain_norm else []),
            (".*", True),
        )
        if config.dab_weight:
            self.monitor = "loss_without_dab"
        self.unknown: dict[str, int] = {}  # split -> number of cells of batches that no training cell has
        # This checks the batch labels of all splits before training.
        sources = [self.dataset(split) for split in SPLITS]
        self.tokens_per_record = next((source.length for source in sources if source), 1)
        # Values are centered before their squares are summed, so that float32 is exact enough.
        self.center = 0.0 if self.options.name == "values" else model.num_bins / 2

    def take_pretrained_params(self) -> Mapping[str, Any]:
        """Return no arrays, because all parameters start from random values."""
        return {}

    def init(self, rng: jax.Array) -> Variables:
        """Return the initial variables, boxed with their logical axis names."""
        example: dict[str, Any] = {**CellEncoder.example(self.model_config)}
        return cast(Variables, self.model.init(rng, **example))

    def mask_genes(self, rng: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Draw the genes of each cell to mask, bool (B, L).

        CLS, padding, and cells that only fill up the batch are never masked.
        """
        first, second = jax.random.split(rng)
        eligible = ~batch["padding_mask"] & (batch["gene_ids"] != self.model_config.cls_id)
        if not self.config.mask_zeros:
            eligible &= batch["values"] > 0
        if "example_mask" in batch:
            eligible &= (batch["example_mask"] > 0)[:, None]
        ratios = jnp.asarray(self.config.mask_ratio, jnp.float32)
        drawn = jax.random.randint(first, (len(eligible), 1), 0, len(ratios))
        return eligible & (jax.random.uniform(second, eligible.shape) < ratios[drawn])

    def _hidden(
        self,
        variables: Variables,
        batch: Mapping[str, jax.Array],
        masked: jax.Array,
        rng: jax.Array | None,
        cell: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, Variables]:
        """Compute output vectors (B, L, D), cell embeddings (B, D), and the new statistics of the domain norm.

        `rng` is the key of dropout in training; None otherwise.
        """
        generative, model = self.config.mode == "generative", self.model_config
        seen = jnp.where(masked, 0.0 if generative else model.mask_value, batch["values"])
        if model.values == "category":
            seen = seen.astype(jnp.int32)
        padding = batch["padding_mask"]
        given: dict[str, Any] = {
            "gene_ids": batch["gene_ids"], "values": seen, "padding_mask": padding,
            "batch_labels": batch.get("batch_labels"), "generated": masked if generative else None, "cell": cell,
        }  # fmt: skip
        # Adapters may have dropout, so its key is always given. With adapters, the running statistics do not change.
        moves = rng is not None and model.domain_norm and COLLECTION not in variables
        hidden, changed = self.model.apply(
            variables,
            **given,
            method="hidden_states",
            rngs=_dropping(rng),
            mutable=[STATISTICS] if moves else [],
        )
        # The model must not see the genes that it predicts, so pooling leaves them out in both modes.
        cells = self.model.apply(variables, hidden, seen, padding, masked, method="cell_embedding")
        return cast(jax.Array, hidden), cast(jax.Array, cells), cast(Variables, changed)

    def _predicted(
        self,
        variables: Variables,
        batch: Mapping[str, jax.Array],
        hidden: jax.Array,
        cells: jax.Array,
        rng: jax.Array | None,
    ) -> dict[str, tuple[jax.Array, jax.Array | None]]:
        """Predict values and logits of non-zero values with each head that the loss uses, (B, L) each."""
        inputs = {
            "value": ("value_predictions", (hidden,)),
            "mvc": ("mvc_predictions", (cells, batch["gene_ids"])),
        }
        made: dict[str, Any] = {}
        for place, (name, (method, given)) in enumerate(inputs.items(), 1):
            if getattr(self.config, f"{name}_weight"):
                labels, rngs = batch.get("batch_labels"), _dropping(rng, place)
                made[name] = self.model.apply(variables, *given, labels, method=method, rngs=rngs)
        return made

    def loss(
        self, variables: Variables, batch: DeviceBatch, rng: jax.Array, train: bool
    ) -> tuple[jax.Array, MetricSums]:
        """Return the weighted sum of the terms of the loss; see `MaskedValuesConfig`.

        Also returns sums: `masked` and `cells` (counts), `loss` and `loss_without_dab` times `masked`, the squared
        errors `value_error`, `mvc_error` and `second_pass_error`, `zero_loss`, `ecs` and `dab` times `cells`,
        `dab_right` and `dab_cells` (counts), and the moments of true and predicted values, from which the correlation
        is computed.
        """
        config = self.config
        masking, *keys = jax.random.split(rng, 3)
        first, second = keys if train else (None, None)  # keys of dropout in the two passes
        masked = self.mask_genes(masking, batch)
        hidden, cells, changed = self._hidden(variables, batch, masked, first)
        values, weights = batch["values"], masked.astype(jnp.float32)
        example = (batch["example_mask"] > 0).astype(jnp.float32)
        count, number = weights.sum(), example.sum()
        sums: MetricSums = {"masked": count, "cells": number}
        total = jnp.zeros(())

        def add(name: str, weight: float, value: jax.Array, items: jax.Array) -> None:
            nonlocal total
            sums[name] = sums.get(name, jnp.zeros(())) + value
            total = total + weight * value / jnp.maximum(items, 1.0)

        def add_values(name: str, weight: float, made: tuple[jax.Array, jax.Array | None]) -> None:
            add(f"{name}_error", weight, masked_squared_error(made[0], values, weights), count)
            if config.zero_weight:
                assert made[1] is not None
                add("zero_loss", config.zero_weight, zero_loss(made[1], values, weights), count)

        predictions = self._predicted(variables, batch, hidden, cells, first)
        for name, made in predictions.items():
            add_values(name, getattr(config, f"{name}_weight"), made)
        if config.second_pass_weight:
            again, _, _ = self._hidden(variables, batch, masked, second, jax.lax.stop_gradient(cells))
            labels = batch.get("batch_labels")
            values_again = self.model.apply(
                variables, again, labels, method="value_predictions", rngs=_dropping(second, 1)
            )
            add_values("second_pass", config.second_pass_weight, cast(Any, values_again))
        if config.ecs_weight:
            similarity = elastic_similarity(cells, config.ecs_threshold, example)
            add("ecs", config.ecs_weight, similarity * number, number)
        if config.dab_weight:
            sums["loss_without_dab"] = total * count
            labels = batch["batch_labels"]
            known = example * (labels != UNKNOWN)
            rngs = _dropping(first, 3)
            logits = cast(jax.Array, self.model.apply(variables, cells, method="discriminate", rngs=rngs))
            safe = jnp.maximum(labels, 0)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, safe)
            add("dab", config.dab_weight, (losses * known).sum(), known.sum())
            sums["dab_cells"] = known.sum()
            sums["dab_right"] = ((logits.argmax(axis=-1) == safe) * known).sum()
        true = values - self.center
        for name, x in {
            "true": true,
            **{n: made[0] - self.center for n, made in predictions.items()},
        }.items():
            sums |= {f"{name}_sum": (x * weights).sum(), f"{name}_squared": (x * x * weights).sum()}
            sums[f"{name}_product"] = (x * true * weights).sum()
        sums["loss"] = total * count
        if changed:
            sums[MOVING_STATISTICS] = changes(variables, changed)
        return total, jax.lax.stop_gradient(sums)

    def compute_metrics(self, sums: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Return the mean loss, its terms, and the correlation of true and predicted values for each head.

        The correlation is NaN if the true or the predicted values do not vary.
        """
        of = {name: float(value) for name, value in sums.items()}
        count, cells = max(of["masked"], 1.0), max(of["cells"], 1.0)
        made = {"loss": of["loss"] / count}
        named = {
            "loss_without_dab": "loss_without_dab",
            "value_error": "mse", "mvc_error": "mvc_mse", "second_pass_error": "second_pass_mse",
            "zero_loss": "zero_loss",
        }  # fmt: skip
        made |= {shown: of[name] / count for name, shown in named.items() if name in of}
        for name, shown in (("value", "correlation"), ("mvc", "mvc_correlation")):
            if f"{name}_sum" in of:
                spread = [
                    max(of[f"{each}_squared"] / count - (of[f"{each}_sum"] / count) ** 2, 0.0)
                    for each in ("true", name)
                ]
                shared = of[f"{name}_product"] / count - of["true_sum"] * of[f"{name}_sum"] / count**2
                scale = (spread[0] * spread[1]) ** 0.5
                made[shown] = shared / scale if scale > 0 else float("nan")
        if "ecs" in of:
            made["ecs"] = of["ecs"] / cells
        if "dab" in of:
            known = max(of["dab_cells"], 1.0)
            made |= {"dab_loss": of["dab"] / known, "dab_accuracy": of["dab_right"] / known}
        return made

    @functools.cache  # noqa: B019 (a run has one task)
    def dataset(self, split: str) -> TokenSource | None:
        """Return the cells of a split, or None if the split is empty."""
        studies, model = self.store.split(split), self.model_config
        if not studies:
            return None
        labels = None
        if self.batches:
            labels = {s.name: batch_labels(s, self.data.batch_key, self.batches) for s in studies}
            unknown = self.unknown[split] = sum(int((each == UNKNOWN).sum()) for each in labels.values())
            found = f"{unknown:,} {split} cells have values in {self.data.batch_key!r} that"
            if unknown and split == "train":
                raise ConfigError(
                    f"{found} the model to start from does not know: set data.batch_key to another column, or train "
                    "from random values (init_from='')."
                )
            if unknown and (model.reads_batches or model.domain_norm):
                raise ConfigError(
                    f"{found} no training cell has, but the model reads batch labels: set data.batch_key to a column "
                    "whose values all occur in training, or set model.use_batch_labels to False and model.domain_norm "
                    "to ''."
                )
        return TokenSource(
            studies, self.options, self.rows_of_genes, model.cls_id, model.pad_id, model.pad_value,
            exhaustive=split != "train", seed=self.seed, listed=self.listed, labels=labels,
        )  # fmt: skip

    def evaluators(self) -> Sequence[Evaluator]:
        """Return the evaluation of predicted values against baselines.

        The evaluation uses the test studies, or the validation studies if there are no test studies.
        """
        held_out, note = held_out_split(self.store)
        if held_out is None or not self.config.report_cells:
            return ()
        from sct.eval.imputation.masked_values import PredictedValues

        source, cells = self.dataset(held_out), self.dataset("train")
        assert source is not None
        assert cells is not None
        config = self.config
        return (
            PredictedValues(
                self.predict, cells, source, self.model_config.vocab_size, config.mask_zeros, config.report_cells,
                config.report_seeds, held_out, note,
            ),
        )  # fmt: skip

    def predict(
        self, variables: Variables, batch: Mapping[str, jax.Array], rng: jax.Array
    ) -> tuple[dict[str, jax.Array], jax.Array]:
        """Mask genes at random and predict their values.

        Return the predictions of each head, float32 (B, L), and the mask, bool (B, L).
        """
        masked = self.mask_genes(rng, batch)
        hidden, cells, _ = self._hidden(variables, batch, masked, None)
        made = self._predicted(variables, batch, hidden, cells, None)
        return {name: predicted[0] for name, predicted in made.items()}, masked

    def tokens(self, batch: Mapping[str, Any]) -> int:
        """Return the number of tokens in a batch, padding included."""
        return int(np.prod(batch["gene_ids"].shape))

    def operations(self, records: int) -> float:
        """Return the FLOPs of the matrix products in one forward pass. A multiply-add counts as 2 FLOPs."""
        config = self.config
        used = dataclasses.replace(
            self.model_config, value_head=bool(config.value_weight), explicit_zero=bool(config.zero_weight),
            mvc=self.model_config.mvc if config.mvc_weight else "", dab=bool(config.dab_weight), num_classes=0,
        )  # fmt: skip
        again = dataclasses.replace(used, value_head=True, mvc="", dab=False)
        passes = [used, *([again] if config.second_pass_weight else [])]
        return sum(CellEncoder.flops(each, records, self.tokens_per_record) for each in passes)

    def exports(self) -> dict[str, Any]:
        """Return the genes, and the options that turned counts into training inputs."""
        data = {
            "task": NAME,
            **self.options.record(),
            **({"variable_genes": self.data.variable_genes} if self.data.variable_genes else {}),
            "gene_rows": self.rows_of_genes.tolist(),
            "dropped": np.flatnonzero(self.rows_of_genes < 0).tolist(),
            **({} if self.listed is None else {"listed": self.listed.tolist()}),
            **({"batch_key": self.data.batch_key, "batches": list(self.batches)} if self.batches else {}),
        }
        return {"genes": self.vocabulary, "data": data}

    def notes(self, fresh: bool) -> Sequence[str]:
        """Return notices on the genes and the batches that the model reads."""
        known = int((self.rows_of_genes >= 0).sum())
        made = [
            f"the model knows {known:,} genes and reads sequences of {self.tokens_per_record:,} tokens per cell "
            f"(genes={self.options.choice!r}, values={self.options.values!r})."
        ]
        if self.batches:
            made.append(f"the column {self.data.batch_key!r} has {len(self.batches):,} batches.")
        made += [
            f"{number:,} {split} cells are of batches without training cells. The DAB loss leaves them out."
            for split, number in self.unknown.items()
            if number
        ]
        return made


def _dropping(rng: jax.Array | None, place: int = 0) -> dict[str, jax.Array]:
    """Return the keys of one call of the model; none without training. `place` is the number of the call in a pass."""
    return {} if rng is None else {"dropout": jax.random.fold_in(rng, place) if place else rng}


def changes(variables: Variables, changed: Variables) -> dict[str, jax.Array]:
    """Return how running statistics change in a step, by path."""
    old = {path: value for path, value in _flat(variables).items() if path.startswith(f"{STATISTICS}/")}
    new = _flat(changed)
    return {path: new[path] - old[path] for path in old}


def _flat(tree: Any) -> dict[str, jax.Array]:
    return flatten(nn.unbox(tree))


def _check_heads(
    config: MaskedValuesConfig, data: TokenData, model: CellEncoderConfig, inherited: bool
) -> None:
    """Raise `ConfigError` if the model lacks what the objective needs, or the options contradict each other.

    `inherited`: the architecture is that of the model to start from, so the options of the model cannot be changed.
    """
    needs = [
        *((f"objective.{option}", getattr(config, option), f"set objective.{option} to 0", *_HEADS[option])
          for option in _HEADS),
        ("objective.second_pass_weight", config.second_pass_weight, "set objective.second_pass_weight to 0",
         "value_head", "True"),
        ("objective.mode", config.mode if config.mode == "generative" else "", "set objective.mode to masked",
         "flags", "True"),
    ]  # fmt: skip
    for option, value, without, needed, advised in needs:
        if value and not getattr(model, needed):
            other = (
                "train from random values (init_from='')" if inherited else f"set model.{needed} to {advised}"
            )
            raise ConfigError(
                f"{option} is {value!r}, but model.{needed} is {getattr(model, needed)!r}"
                f"{' in the model to start from' * inherited}: {without}, or {other}."
            )
    for option in ("mask_zeros", "zero_weight"):
        if getattr(config, option) and not data.has_zeros:
            raise ConfigError(
                f"objective.{option} is set, but data.genes is {data.genes!r}, so that the model reads no unexpressed "
                f"genes: set data.genes to hvg or all, or unset objective.{option}."
            )
    if config.zero_weight and not config.mask_zeros:
        raise ConfigError(
            f"objective.zero_weight is {config.zero_weight:g}, but objective.mask_zeros is False, so that no masked "
            "value is zero: set objective.mask_zeros to True, or objective.zero_weight to 0."
        )
    if model.num_batches and not data.batch_key:
        other = "train from random values (init_from='')" if inherited else "set model.num_batches to 0"
        raise ConfigError(
            f"the model has {model.num_batches} batch labels, but data.batch_key is empty: set data.batch_key to a "
            f"column of the store, or {other}."
        )


def _gene_rows(
    parent: Mapping[str, Any], data: TokenData, training: Sequence[Study], number: int
) -> np.ndarray:
    """Return the row of the gene table for each of `number` genes of the vocabulary, int32 (number,); -1 for no row.

    Raises
    ------
    ConfigError
        The model to start from, whose data options are `parent`, has other genes.
    """
    recorded = len(parent.get("gene_rows", range(number)))
    if recorded != number:
        raise ConfigError(
            f"the model to start from has {recorded:,} genes, but the store's vocabulary has {number:,}: "
            "ingest the cells with the genes of the model (launch.ingest --genes)."
        )
    rows = rows_of_genes(parent, number)
    if data.variable_genes and parent:
        if parent.get("variable_genes", 0) != data.variable_genes:
            raise ConfigError(
                f"data.variable_genes is {data.variable_genes}, but the genes of the model to start from are fixed: "
                "set data.variable_genes to 0."
            )
        return rows
    if data.variable_genes:
        variable = hvg_of(training, data.variable_genes, np.ones(number, bool), everywhere=False)
        rows = np.full(number, -1, np.int32)
        rows[variable] = np.arange(len(variable))
    return rows


def make(inputs: TaskInputs) -> MaskedValues:
    """Build the task from `TaskInputs`, which hold the sections of a configuration."""
    store, data = inputs.store, inputs.data
    for split in SPLITS:
        for study in store.split(split):
            study.check_counts()
    vocabulary, parent = store.vocabulary, inputs.parent_data_spec or {}
    inherited = inputs.parent_data_spec is not None
    training, options = store.split("train"), CellOptions.of(2, data)
    rows = _gene_rows(parent, data, training, len(vocabulary))
    listed = None
    if options.choice == "hvg":
        if all(parent.get(name) == value for name, value in options.record().items()) and "listed" in parent:
            listed = np.asarray(parent["listed"], np.int64)
        else:
            listed = hvg_of(training, data.max_genes, rows >= 0)
    batches: tuple[str, ...] = ()
    known, same = parent.get("batch_key", ""), parent.get("batch_key") == data.batch_key
    if data.batch_key:
        if not data.shared_batches:
            check_distinct([study for split in SPLITS for study in store.split(split)], data.batch_key)
        batches = tuple(parent.get("batches", ()) if same else ()) or batches_of(training, data.batch_key)
    values = {**inputs.model, "num_batches": inputs.model.get("num_batches") or len(batches)}
    model = registry.model_config(inputs.architecture, values, int((rows >= 0).sum()))
    if known and data.batch_key and not same and (model.reads_batches or model.domain_norm):
        raise ConfigError(
            f"the model to start from reads the batches of the column {known!r}, but data.batch_key is "
            f"{data.batch_key!r}: set data.batch_key to {known!r}, or train from random values (init_from='')."
        )
    if batches and len(batches) != model.num_batches:
        advice = (
            "choose a column with as many batches, or train from random values (init_from='')"
            if inherited
            else "set model.num_batches to 0 to use the number of batches of the store"
        )
        raise ConfigError(
            f"the column {data.batch_key!r} has {len(batches)} batches, but model.num_batches is {model.num_batches}: "
            f"{advice}."
        )
    if rows.max(initial=-1) >= model.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {model.vocab_size}, but the store's vocabulary has {len(vocabulary):,} genes, and "
            "padding and CLS need a row each: set model.vocab_size to 0 to compute it from the vocabulary."
        )
    taken = {model.pad_id, model.cls_id} & set(rows.tolist())
    if taken:
        raise ConfigError(
            f"row {min(taken)} of the gene table belongs to a gene, but model.pad_id or model.cls_id is the same row: "
            "set model.vocab_size to 0 to give both a row of their own."
        )
    _check_heads(inputs.objective, data, model, inherited)
    return MaskedValues(inputs.objective, data, model, store, rows, listed, batches, inputs.seed)


SPEC = TaskSpec(NAME, MaskedValuesConfig, TokenData, make, inherits_architecture=True)
