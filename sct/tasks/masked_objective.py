"""Define the objective of sCT: predict the expression levels of masked genes (sCT paper, section 3).

Further terms, which are off by default, train the embedding of a cell: `cell_decoding`, `contrast` and
`label_contrast`. `skip_dropout` makes the masked genes depend on the embedding.

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

from sct.checks import check_at_least, check_choice, check_positive, check_share
from sct.data import masking
from sct.data.masking import Masking
from sct.errors import ConfigError
from sct.models.cell_code import CellCode, flat_cells
from sct.models.sct import SCT
from sct.models.sct_config import SCTConfig
from sct.nn import axes
from sct.nn.cell_losses import info_nce, supervised_contrast
from sct.tasks.base import DeviceBatch, MetricSums, ObjectiveConfig, Variables

MONITORS = ("loss", "cell_decoding")
# Numbers from which the PRNG keys of the further terms are derived. Masking and the budget use smaller numbers.
_SKIPS, _GENES, _OTHER_VIEW, _OTHER_BAGS = 101, 102, 103, 104


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
    cell_decoding
        Weight of the loss of cell decoding: predict the levels of all measured genes of a cell, masked or not, from the
        code of the cell alone (`model.code_dim`). The loss is the mean cross-entropy over the genes of a cell, averaged
        over cells. Cells whose genes are all masked take no part. No logit adjustment is needed, because the targets do
        not depend on the mask. Validation also computes this loss, and its gain over the frequencies of the levels of
        each gene in the training studies. 0: off.
    cell_decoding_genes
        Number of measured genes per bag, drawn at random in each step, at which training evaluates this loss; 0 for
        all. Validation uses all genes.
    skip_dropout
        Probability that a training step leaves out all skip connections of a bag. The levels of its masked genes are
        then predicted from the transformer output alone.
    contrast
        Weight of a contrastive loss (InfoNCE): a second masking of the same cells must give a vector that is more
        similar to the cell's own vector than to those of other cells of the batch. The vector is the code, or the
        standardized transformer output for models without a code. In the second view, random cells also lie in other
        bags of the batch, if it has several bags of their study; counts are not thinned (`data.thinning`); and no cell
        has coordinates, because views of a cell could otherwise be matched by its coordinates alone. The second view
        takes another forward pass without the deconvolution tower. 0: off.
    label_contrast
        Weight of a supervised contrastive loss: cells with the same label in the column `data.label_key`, such as a
        Cell Ontology id, must have similar vectors. Cells without a label take no part. With this loss, `contrast` does
        not push cells with the same label apart. Only the first views of the cells are compared. 0: off.
    contrast_temperature
        Divisor of the cosine similarities in both contrastive losses.
    monitor
        Validation metric that chooses the best checkpoint and decides about early stopping: "loss" (of masked genes) or
        "cell_decoding".

    Notes
    -----
    The loss of masked genes is a mean over masked genes. The further terms are means over cells. With gradient
    accumulation, `contrast` and `label_contrast` compare only the cells of a microbatch, and the further terms of a
    microbatch are weighted by its number of masked genes.
    """

    BEFORE: ClassVar[Mapping[str, Any]] = types.MappingProxyType({"logit_adjustment": False})

    masking: Masking = dataclasses.field(default_factory=Masking)
    logit_adjustment: bool = True
    max_masked_fraction: float = dataclasses.field(default=0.0, metadata={"formerly": "head_budget"})
    report_ratio: float = 0.15
    report_seeds: int = 5
    report_bags: int = 0
    cell_decoding: float = 0.0
    cell_decoding_genes: int = 0
    skip_dropout: float = 0.0
    contrast: float = 0.0
    label_contrast: float = 0.0
    contrast_temperature: float = 0.1
    monitor: str = "loss"

    def __post_init__(self) -> None:
        for name in ("max_masked_fraction", "report_ratio", "skip_dropout"):
            check_share(name, getattr(self, name))
        for name in ("cell_decoding", "contrast", "label_contrast"):
            check_at_least(f"objective.{name}", getattr(self, name), 0, whole=False)
        check_at_least("objective.cell_decoding_genes", self.cell_decoding_genes, 0)
        check_positive("objective.contrast_temperature", self.contrast_temperature)
        check_choice("objective.monitor", self.monitor, MONITORS)
        if self.monitor == "cell_decoding" and not self.cell_decoding:
            raise ConfigError(
                "objective.monitor is 'cell_decoding', but objective.cell_decoding is 0: set objective.cell_decoding "
                "above 0, or objective.monitor to 'loss'."
            )
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

    Raises
    ------
    ConfigError
        Options of the objective contradict those of the model.
    """

    trainable: Sequence[tuple[str, bool]] = ((".*", True),)
    loss_normalizer = "masked"
    monitor, monitor_mode = "loss", "min"

    def __init__(self, config: MaskedExpressionConfig, model: SCTConfig, cells_per_bag: int):
        _check_model(config, model)
        self.monitor = config.monitor
        self.config, self.model_config, self.cells_per_bag = config, model, cells_per_bag
        self.model = SCT(model)
        self.tokens_per_record = cells_per_bag * model.num_genes

    def init(self, rng: jax.Array) -> Variables:
        """Return the initial variables, boxed with their logical axis names."""
        return cast(Variables, self.model.init(rng, *SCT.example(self.model_config).values()))

    def level_prior(self) -> np.ndarray | None:
        """Return the log frequency of each level of each gene in training cells, (G, num_bins); None if unknown."""
        return None

    def loss(
        self, variables: Variables, batch: DeviceBatch, rng: jax.Array, train: bool
    ) -> tuple[jax.Array, MetricSums]:
        """Return the mean cross-entropy of the expression levels at masked positions of measured genes.

        With `logit_adjustment`, the log of each class's masking rate (up to a constant) is added to the logits before
        the cross-entropy. Genes that a study did not measure are treated as zero counts and are never targets. The
        further terms of `MaskedExpressionConfig` are added with their weights.

        Also returns sums: `loss` (of masked genes), `masked` (count), `confusion` (num_bins, num_bins) with the true
        level in rows and the predicted level in columns, and `dropped_targets`; and the sums of the further terms over
        the cells that they count.
        """
        config, tokens = self.config, batch["tokens"]
        num_bins = self.model_config.num_bins
        eligible = self._eligible(batch, tokens)
        if config.logit_adjustment:
            mask, log_ratio = config.masking.draw(rng, eligible, num_bins)
        else:
            mask, log_ratio = config.masking(rng, eligible, num_bins), jnp.zeros(tokens.shape[0])
        mask &= (batch["example_mask"] > 0)[:, None, None]
        inputs = masking.apply(tokens, mask, num_bins)
        coordinates = batch.get("coordinates")
        keep_skips = None
        if config.skip_dropout and train:
            key = jax.random.fold_in(rng, _SKIPS)
            keep_skips = jax.random.bernoulli(key, 1 - config.skip_dropout, tokens.shape[:1])
        length = tokens.shape[1] * tokens.shape[2]
        masked, targets = mask.reshape(-1, length), tokens.reshape(-1, length).astype(jnp.int32)
        dropped_targets = jnp.zeros((), jnp.float32)
        if config.max_masked_fraction and train:
            # If devices share the cells of a bag, each device gets a part of the positions, for its own cells.
            parts = axes.shards_of(axes.CELL, tokens.shape[1])
            masked, targets = (x.reshape(x.shape[0], parts, -1) for x in (masked, targets))
            length //= parts
            budget = min(length, max(1, round(config.max_masked_fraction * length)))
            positions, taken = masking.within_budget(jax.random.fold_in(rng, 1), masked, budget)
            dropped_targets = masked.sum() - taken.sum().astype(jnp.float32)
            positions = axes.constrain(positions, axes.BATCH, axes.CELL, None)
            targets = jnp.take_along_axis(targets, positions, axis=2)
            outputs = self._outputs(variables, inputs, coordinates, positions, keep_skips)
            logits, masked = outputs["logits"], taken
        else:
            outputs = self._outputs(variables, inputs, coordinates, None, keep_skips)
            logits = outputs["logits"].reshape(*targets.shape, -1)
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
        loss = total / jnp.maximum(count, 1.0)
        if config.cell_decoding:
            found = self._cell_decoding(variables, batch, outputs["code"], mask, rng, train)
            loss += config.cell_decoding * found["cell_decoding"] / jnp.maximum(found["decoded_cells"], 1.0)
            sums |= found
        if config.contrast or config.label_contrast:
            found = self._contrasts(variables, batch, outputs, mask, rng) if train else _NO_CONTRASTS
            for name in ("contrast", "label_contrast"):
                mean = found[name] / jnp.maximum(found[f"{name}_cells"], 1.0)
                loss += getattr(config, name) * mean
            sums |= {name: jnp.asarray(value, jnp.float32) for name, value in found.items()}
        return loss, sums

    def _eligible(self, batch: DeviceBatch, tokens: jax.Array) -> jax.Array:
        """Return tokens (B, K, G) in which genes that were not measured are PAD, which is never masked."""
        pad = jnp.asarray(self.model_config.pad, tokens.dtype)
        return jnp.where(batch["measured"][:, None, :], tokens, pad)

    def _visible_cells(self, batch: DeviceBatch, eligible: jax.Array, mask: jax.Array) -> jax.Array:
        """Return which cells of the batch have a measured gene that is not masked, bool (B, K)."""
        visible = ((eligible < self.model_config.num_bins) & ~mask).any(axis=-1)
        return visible & (batch["example_mask"] > 0)[:, None]

    def _cell_decoding(
        self,
        variables: Variables,
        batch: DeviceBatch,
        code: jax.Array,
        mask: jax.Array,
        rng: jax.Array,
        train: bool,
    ) -> MetricSums:
        """Return sums over the visible cells: their number, and the losses of cell decoding and of the prior."""
        num_bins, asked = self.model_config.num_bins, self.config.cell_decoding_genes
        cells = self._visible_cells(batch, self._eligible(batch, batch["tokens"]), mask)
        targets = self._eligible(batch, batch.get("full_tokens", batch["tokens"]))
        prior, genes = self.level_prior(), None
        if train and 0 < asked < targets.shape[2]:
            # Genes that were not measured have the lowest ranks, and do not count if they are drawn.
            rank = (
                jax.random.uniform(jax.random.fold_in(rng, _GENES), batch["measured"].shape)
                + batch["measured"]
            )
            genes = jax.lax.top_k(rank, asked)[1]
            targets = jnp.take_along_axis(targets, genes[:, None], axis=2)
        weights = ((targets < num_bins) & cells[..., None]).astype(jnp.float32)
        levels = jnp.minimum(targets, num_bins - 1).astype(jnp.int32)
        logits = self.model.apply(variables, code, genes, method="decode_code")

        def mean_loss(logits: Any) -> jax.Array:
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, levels)
            return ((losses * weights).sum(axis=-1) / jnp.maximum(weights.sum(axis=-1), 1.0)).sum()

        sums = {"cell_decoding": mean_loss(logits), "decoded_cells": cells.sum().astype(jnp.float32)}
        if prior is not None:
            of_genes = jnp.asarray(prior) if genes is None else jnp.asarray(prior)[genes][:, None]
            sums["cell_decoding_prior"] = mean_loss(jnp.broadcast_to(of_genes, cast(Any, logits).shape))
        return sums

    def _contrasts(
        self,
        variables: Variables,
        batch: DeviceBatch,
        outputs: Mapping[str, jax.Array],
        mask: jax.Array,
        rng: jax.Array,
    ) -> MetricSums:
        """Return the sums of the contrastive losses, and the numbers of cells that have these losses.

        Raises
        ------
        ConfigError
            There is only one cell, so that it can be compared with no other. JAX traces this function when it compiles
            the first step, so the error comes before training.
        """
        config, tokens = self.config, batch["tokens"]
        bags, cells = tokens.shape[:2]
        if bags * cells < 2:
            raise ConfigError(
                "data.cells_per_bag and the number of bags in a microbatch are 1, but objective.contrast and "
                "objective.label_contrast compare the cells of a microbatch with each other: increase "
                "data.cells_per_bag or train.batch_size, decrease train.grad_accum_steps, or set both weights to 0."
            )
        vectors = _by_cell(
            outputs["code"] if self.model_config.code_dim else flat_cells(outputs["transformer_out"], cells)
        )
        valid = _by_cell(self._visible_cells(batch, self._eligible(batch, tokens), mask))
        own = jnp.arange(bags * cells)
        study, row = jnp.repeat(batch["study"], cells), _by_cell(batch["rows"])
        # Bags of neighbors overlap, and bags of two epochs may meet in a batch.
        same = (study[:, None] == study) & (row[:, None] == row) & (own[:, None] != own)
        found: MetricSums = dict(_NO_CONTRASTS)
        if config.contrast:
            key = jax.random.fold_in(rng, _OTHER_BAGS)
            taken = other_places(key, batch["study"], batch["random_cells"], cells)

            def moved(x: jax.Array) -> jax.Array:
                return axes.constrain(
                    _by_cell(x)[taken].reshape(x.shape), axes.BATCH, axes.CELL, *[None] * (x.ndim - 2)
                )

            others = moved(batch.get("full_tokens", tokens))
            eligible = self._eligible(batch, others)
            other_mask = config.masking(
                jax.random.fold_in(rng, _OTHER_VIEW), eligible, self.model_config.num_bins
            )
            inputs = masking.apply(others, other_mask, self.model_config.num_bins)
            # Without coordinates, which would tell cells apart whatever their counts are.
            second = self.model.apply(variables, inputs, method="cell_vectors")
            both = valid[taken] & _by_cell(self._visible_cells(batch, eligible, other_mask))
            alike = same
            if config.label_contrast:
                labels = _by_cell(batch["labels"])
                alike |= (labels[:, None] == labels) & (labels >= 0)
            losses = info_nce(
                vectors[taken], _by_cell(cast(jax.Array, second)), config.contrast_temperature, both,
                alike[taken][:, taken],
            )  # fmt: skip
            found |= {"contrast": losses.sum(), "contrast_cells": both.sum()}
        if config.label_contrast:
            losses, counted = supervised_contrast(
                vectors, _by_cell(batch["labels"]), config.contrast_temperature, valid, same
            )
            found |= {"label_contrast": losses.sum(), "label_contrast_cells": counted.sum()}
        return found

    def compute_metrics(self, sums: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Return the mean loss, and the accuracy over all masked genes; and the means of the further terms.

        `cell_decoding_gain` is the loss of the frequencies of the levels of each gene in training cells, minus the loss
        of cell decoding. Validation does not compute the contrastive losses.
        """
        count = max(float(sums["masked"]), 1.0)
        found = {"loss": float(sums["loss"]) / count, "accuracy": float(np.trace(sums["confusion"])) / count}
        if self.config.max_masked_fraction:
            found["dropped_targets"] = float(sums["dropped_targets"])
        if "cell_decoding" in sums:
            cells = max(float(sums["decoded_cells"]), 1.0)
            found["cell_decoding"] = float(sums["cell_decoding"]) / cells
            if "cell_decoding_prior" in sums:
                found["cell_decoding_gain"] = (
                    float(sums["cell_decoding_prior"]) / cells - found["cell_decoding"]
                )
        for name in ("contrast", "label_contrast"):
            if cells := float(sums.get(f"{name}_cells", 0.0)):
                found[name] = float(sums[name]) / cells
        return found

    @property
    def head_positions(self) -> int | None:
        """Number of positions per bag at which training evaluates the head; None for all."""
        if not self.config.max_masked_fraction:
            return None
        return max(1, round(self.config.max_masked_fraction * self.tokens_per_record))

    def operations(self, records: int) -> float:
        """Return the FLOPs of the matrix products in one forward pass. A multiply-add counts as 2 FLOPs."""
        config, model, cells = self.config, self.model_config, self.cells_per_bag
        total = SCT.flops(model, records, cells, self.head_positions)
        if config.cell_decoding:
            genes = min(config.cell_decoding_genes or model.num_genes, model.num_genes)
            total += CellCode.decoder_flops(model, records, cells, genes)
        if config.contrast:
            total += SCT.cell_vector_flops(model, records, cells)
        return total

    def data_record(self, noise_fraction: float) -> dict[str, Any]:
        """Return the options with which counts become training inputs, for the model folder."""
        return {
            "cells_per_bag": self.cells_per_bag,
            "noise_fraction": noise_fraction,
            "masking": dataclasses.asdict(self.config.masking),
            "logit_adjustment": self.config.logit_adjustment,
        }

    def _outputs(self, variables: Variables, *inputs: Any) -> dict[str, jax.Array]:
        return cast(dict[str, jax.Array], self.model.apply(variables, *inputs))


_NO_CONTRASTS = dict.fromkeys(("contrast", "contrast_cells", "label_contrast", "label_contrast_cells"), 0.0)


def other_places(key: jax.Array, study: jax.Array, random_cells: jax.Array, cells: int) -> jax.Array:
    """Draw new places for the cells of a batch, each in a bag of its study.

    Parameters
    ----------
    key
        PRNG key.
    study
        Number of the study of each bag, integers (B,).
    random_cells
        Bags of random cells, bool (B,). The cells of other bags keep their places.
    cells
        Number of cells in a bag (K).

    Returns
    -------
    The number of the cell that comes to each place, a permutation of 0 .. B * K - 1.
    """
    own, of = jnp.arange(len(study) * cells), jnp.repeat(study, cells)
    group = jnp.where(jnp.repeat(random_cells, cells), of, 1 + of.max() + own)
    drawn = jax.random.uniform(key, own.shape)
    # The places of a study, in order, get the cells of the study, in random order.
    return jnp.zeros_like(own).at[jnp.argsort(group)].set(jnp.lexsort((drawn, group)))


def _by_cell(x: jax.Array) -> jax.Array:
    """Reshape (B, K, ...) to (B * K, ...). Every device gets all cells, because all cells are compared."""
    return axes.constrain(x, *[None] * x.ndim).reshape(-1, *x.shape[2:])


def _check_model(config: MaskedExpressionConfig, model: SCTConfig) -> None:
    """Raise `ConfigError` if options of the objective contradict those of the model."""
    if config.cell_decoding and not model.code_dim:
        raise ConfigError(
            "objective.cell_decoding is above 0, but model.code_dim is 0, so there is no code to decode: set "
            "model.code_dim to the width of the code, such as 64, or objective.cell_decoding to 0."
        )
    if model.code_dim and not (config.cell_decoding or config.contrast or config.label_contrast):
        raise ConfigError(
            f"model.code_dim is {model.code_dim}, but no term of the objective trains the code: set "
            "objective.cell_decoding above 0, or model.code_dim to 0, which also leaves out the code of a model in "
            "init_from."
        )
    if config.skip_dropout and not model.use_skip_connection:
        raise ConfigError(
            f"objective.skip_dropout is {config.skip_dropout:g}, but model.use_skip_connection is False, so there is "
            "nothing to drop: set one of them differently."
        )
