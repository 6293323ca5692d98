"""Define the objective of sCT: predict the expression levels of masked genes (sCT paper, section 3).

This module needs JAX, Flax and optax only, so that a machine without the libraries that read cells can train too.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sct.checks import check_at_least, check_positive, check_share
from sct.data import masking
from sct.data.masking import Masking
from sct.errors import ConfigError
from sct.models.sct import SCT
from sct.models.sct_config import SCTConfig
from sct.nn import axes
from sct.tasks.base import DeviceBatch, MetricSums, ObjectiveConfig, Variables


@dataclasses.dataclass(frozen=True)
class MaskedExpressionConfig(ObjectiveConfig):
    """Options of the objective: masking, loss, and the report after training.

    Parameters
    ----------
    masking
        Masking rule of training and of the validation loss.
    logit_adjustment
        Whether to correct the loss for the masking rates. If expressed genes are masked more often than unexpressed
        ones, the model would otherwise overestimate expression. Inside the loss, log(masking rate of expressed genes /
        masking rate of unexpressed genes) is subtracted from the logit of level 0. The model's probabilities then hold
        for any gene, not only for masked ones. With False, training uses the paper's loss, and inference adds the same
        logarithm to the logit of level 0 (`sct.data.class_prior`).
    max_masked_fraction
        Maximum fraction of a bag's positions at which training evaluates the output head. Masked positions beyond this
        fraction are left out of the loss and counted in `dropped_targets`. 0 evaluates the head at every position. If
        several devices share the cells of a bag, each device gets an equal part of these positions. The loss depends on
        the number of devices only if positions are dropped.
    report_ratio, report_seeds
        Fraction of genes to mask, and number of random masks, in the report after training.
    report_bags
        Number of held-out bags in the report after training, spaced evenly over the split; 0 for all bags.
    """

    BEFORE: ClassVar[Mapping[str, Any]] = types.MappingProxyType({"logit_adjustment": False})

    masking: Masking = dataclasses.field(default_factory=Masking)
    logit_adjustment: bool = True
    max_masked_fraction: float = dataclasses.field(default=0.0, metadata={"formerly": "head_budget"})
    report_ratio: float = 0.15
    report_seeds: int = 5
    report_bags: int = 0

    def __post_init__(self) -> None:
        for name in ("max_masked_fraction", "report_ratio"):
            check_share(name, getattr(self, name))
        check_positive("report_ratio", self.report_ratio)
        check_at_least("report_seeds", self.report_seeds, 1)
        check_at_least("report_bags", self.report_bags, 0)
        rule = self.masking
        if self.logit_adjustment:
            _ = rule.log_ratio  # raises ConfigError if the ratio is undefined
        if (
            self.max_masked_fraction
            and rule.kind in ("uniform", "ratio")
            and rule.expressed > self.max_masked_fraction
        ):
            raise ConfigError(
                f"the masking rule {rule.kind!r} masks the fraction {rule.expressed} of the gene positions, but "
                f"objective.max_masked_fraction allows only {self.max_masked_fraction}: set "
                f"objective.max_masked_fraction above {rule.expressed}, or to 0 for no limit."
            )


class MaskedObjective:
    """Loss of masked expression levels, and the parameters that it trains; see `sct.tasks.base.Objective`.

    Parameters
    ----------
    config
        Options of the objective.
    model
        Configuration of the architecture.
    cells_per_bag
        Number of cells of each bag.
    """

    trainable: Sequence[tuple[str, bool]] = ((".*", True),)
    loss_normalizer = "masked"
    monitor, monitor_mode = "loss", "min"

    def __init__(self, config: MaskedExpressionConfig, model: SCTConfig, cells_per_bag: int):
        self.config, self.model_config, self.cells_per_bag = config, model, cells_per_bag
        self.model = SCT(model)
        self.tokens_per_record = cells_per_bag * model.num_genes

    def init(self, rng: jax.Array) -> Variables:
        """Return the initial variables, boxed with their logical axis names."""
        return cast(Variables, self.model.init(rng, *SCT.example(self.model_config).values()))

    def loss(
        self, variables: Variables, batch: DeviceBatch, rng: jax.Array, train: bool
    ) -> tuple[jax.Array, MetricSums]:
        """Return the mean cross-entropy of the expression levels at masked positions of measured genes.

        With `logit_adjustment`, the log of each class's masking rate (up to a constant) is added to the logits before
        the cross-entropy. Genes that a study did not measure are treated as zero counts and are never targets.

        Also returns sums: `loss`, `masked` (count), `confusion` (num_bins, num_bins) with the true level in rows and
        the predicted level in columns, and `dropped_targets`.
        """
        tokens = batch["tokens"]
        num_bins = self.model_config.num_bins
        # Genes that were not measured get the padding value here: padding is never masked.
        eligible = jnp.where(batch["measured"][:, None, :], tokens, jnp.asarray(num_bins, tokens.dtype))
        if self.config.logit_adjustment:
            mask, log_ratio = self.config.masking.draw(rng, eligible, num_bins)
        else:
            mask, log_ratio = self.config.masking(rng, eligible, num_bins), jnp.zeros(tokens.shape[0])
        mask &= (batch["example_mask"] > 0)[:, None, None]
        inputs = masking.apply(tokens, mask, num_bins)
        coordinates = batch.get("coordinates")
        length = tokens.shape[1] * tokens.shape[2]
        masked, targets = mask.reshape(-1, length), tokens.reshape(-1, length).astype(jnp.int32)
        dropped_targets = jnp.zeros((), jnp.float32)
        if self.config.max_masked_fraction and train:
            # If devices share the cells of a bag, each device gets a part of the positions, for its own cells.
            parts = axes.shards_of(axes.CELL, tokens.shape[1])
            masked, targets = (x.reshape(x.shape[0], parts, -1) for x in (masked, targets))
            length //= parts
            budget = min(length, max(1, round(self.config.max_masked_fraction * length)))
            positions, taken = masking.within_budget(jax.random.fold_in(rng, 1), masked, budget)
            dropped_targets = masked.sum() - taken.sum().astype(jnp.float32)
            positions = axes.constrain(positions, axes.BATCH, axes.CELL, None)
            targets = jnp.take_along_axis(targets, positions, axis=2)
            logits = self._logits(variables, inputs, coordinates, positions)
            masked = taken
        else:
            logits = self._logits(variables, inputs, coordinates).reshape(*targets.shape, -1)
        weights = masked.astype(jnp.float32)
        # The shift turns the logits of any gene into those of a masked gene, for the loss and the training metrics.
        shift = log_ratio.reshape(-1, *(1,) * (logits.ndim - 1)) * (jnp.arange(logits.shape[-1]) == 0)
        logits = logits - shift
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        total, count = (losses * weights).sum(), weights.sum()
        predicted = jnp.argmax(logits[..., :num_bins], axis=-1)
        cell = jnp.where(masked, targets * num_bins + predicted, num_bins**2)
        confusion = jnp.bincount(cell.reshape(-1), length=num_bins**2 + 1)[:-1].reshape(num_bins, num_bins)
        sums = {
            "loss": total,
            "masked": count,
            "confusion": confusion.astype(jnp.float32),
            "dropped_targets": dropped_targets,
        }
        return total / jnp.maximum(count, 1.0), sums

    def compute_metrics(self, sums: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Return the mean loss, and the accuracy over all masked genes."""
        count = max(float(sums["masked"]), 1.0)
        found = {"loss": float(sums["loss"]) / count, "accuracy": float(np.trace(sums["confusion"])) / count}
        if self.config.max_masked_fraction:
            found["dropped_targets"] = float(sums["dropped_targets"])
        return found

    @property
    def head_positions(self) -> int | None:
        """Number of positions per bag at which training evaluates the head; None for all."""
        if not self.config.max_masked_fraction:
            return None
        return max(1, round(self.config.max_masked_fraction * self.tokens_per_record))

    def operations(self, records: int) -> float:
        """Return the FLOPs of the matrix products in one forward pass. A multiply-add counts as 2 FLOPs."""
        return SCT.flops(self.model_config, records, self.cells_per_bag, self.head_positions)

    def data_record(self, noise_fraction: float) -> dict[str, Any]:
        """Return the options with which counts become training inputs, for the model folder."""
        return {
            "cells_per_bag": self.cells_per_bag,
            "noise_fraction": noise_fraction,
            "masking": dataclasses.asdict(self.config.masking),
            "logit_adjustment": self.config.logit_adjustment,
        }

    def _logits(self, variables: Variables, *inputs: Any) -> jax.Array:
        return cast(dict[str, jax.Array], self.model.apply(variables, *inputs))["logits"]
