"""Masked bins: a cell model predicts the bin and the text item of masked genes (ZerOmics paper, section 3.1)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sct.checks import check_at_least, check_share
from sct.data import masking
from sct.data.cell_records import CellOptions, CellSource, known_genes
from sct.data.genes.corpus import GeneCorpus, suffix_of
from sct.data.genes.vocabulary import GeneVocabulary
from sct.data.store import Store
from sct.errors import ConfigError
from sct.gene_features.features import GeneFeatures
from sct.gene_features.files import TABLES
from sct.models import registry
from sct.models.adapter_kinds import AdapterConfig
from sct.models.zeromics_cells import FEATURES, ZerOmicsCells, ZerOmicsCellsConfig
from sct.nn.losses import token_losses
from sct.tasks.base import (
    DeviceBatch,
    Evaluator,
    MetricSums,
    ObjectiveConfig,
    StoreConfig,
    Variables,
    held_out_split,
)
from sct.tasks.task_spec import TaskInputs, TaskSpec
from sct.weights.load import load

NAME = "masked_bins"


def check_binned(data: Any) -> None:
    """Raise `ConfigError` where a data section asks for values that are no bins, or for genes that no file lists."""
    if CellOptions.of(2, data).name != "bins" or data.genes == "listed":
        raise ConfigError(
            f"data.values is {data.values!r} and data.genes {data.genes!r}, but bins (quantiles or levels) of genes "
            "that follow from each cell are needed."
        )


@dataclasses.dataclass(frozen=True)
class BinData(StoreConfig):
    """Where cells come from, and what is known of their genes.

    Parameters
    ----------
    max_genes, genes, values
        Which genes of a cell are read, by default all of the vocabulary, or with `max_genes` the so many most highly
        expressed ones; and which bins of them ("quantiles", or "levels" of equal width). See
        `sct.data.cell_records.CellOptions`.
    corpus
        "built_in", or a file with summaries of genes (`sct.data.genes.corpus`).
    features
        What makes a feature of a summary: a text model (folder or id), "lsa" (latent semantic analysis, no model
        needed), "random", or a file with a table of features, which needs no corpus.
    features_cache
        Folder for features of text models; by default one for all runs.
    feature_dim
        Width of features of "lsa" and "random".
    """

    max_genes: int = 0
    genes: str = ""
    values: str = "quantiles"
    corpus: str = "built_in"
    features: str = "lsa"
    features_cache: str = ""
    feature_dim: int = 256

    def __post_init__(self) -> None:
        check_at_least("data.max_genes", self.max_genes, 0)
        check_at_least("data.feature_dim", self.feature_dim, 1)
        check_binned(self)


def gene_features(
    data: BinData, vocabulary: GeneVocabulary, seed: int
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Features (G, F) of the genes of a vocabulary, which genes have one, bool (G,), and what made them.

    Raises
    ------
    SctError
        Corpus, model or table are missing or damaged, or are those of other genes.
    """
    path = Path(data.features).expanduser()
    if suffix_of(path) in TABLES:
        made = GeneFeatures.load(path)
    elif data.features == "random":
        made = GeneFeatures.random(vocabulary, data.feature_dim, seed)
    else:
        corpus = GeneCorpus.built_in() if data.corpus == "built_in" else GeneCorpus.load(data.corpus)
        if data.features == "lsa":
            made = GeneFeatures.lsa(corpus, data.feature_dim, seed)
        else:
            made = GeneFeatures.encode(corpus, load(data.features), cache=data.features_cache or None)
    table, known = made.of(vocabulary)
    return table, known, dict(made.source)


@dataclasses.dataclass(frozen=True)
class MaskedBinsConfig(ObjectiveConfig):
    """Options of the task.

    Parameters
    ----------
    masked
        Probability that a non-zero bin is masked (p_m, equation 1).
    substituted
        Probability that another non-zero bin is replaced by a random other one, zero included (p_s).
    max_masked_fraction
        The heads are evaluated at no more than this share of a cell's positions. Masked positions beyond it are left
        out of the loss and counted in `dropped_targets`.
    report_cells, report_seeds
        Held-out cells that the table after training is made of (0: no table), and draws of what is masked.
    """

    masked: float = 0.15
    substituted: float = 0.1
    max_masked_fraction: float = dataclasses.field(default=0.2, metadata={"formerly": "head_budget"})
    report_cells: int = 500
    report_seeds: int = 3

    def __post_init__(self) -> None:
        for name in ("masked", "max_masked_fraction"):
            check_share(name, getattr(self, name), zero=False)
        check_share("substituted", self.substituted)
        check_at_least("report_cells", self.report_cells, 0)
        check_at_least("report_seeds", self.report_seeds, 1)


class MaskedBins:
    """Task of the cell model of ZerOmics; see `sct.tasks.base.Task`.

    Parameters
    ----------
    config, data
        Options.
    model
        Architecture.
    store
        Cells.
    known
        Genes that have a feature, bool (G,); the others are dropped.
    features
        float32 (G, F) to start from; None where a checkpoint or another model has them.
    described
        What is told of the features in the model folder.
    seed
        Of the order of cells.
    """

    trainable: Sequence[tuple[str, bool]] = ((f"^{FEATURES}$", False), (".*", True))
    may_be_missing: Sequence[str] = ()
    lora: AdapterConfig | None = None
    license = "unknown"
    loss_normalizer = "masked"
    monitor, monitor_mode = "loss", "min"

    def __init__(
        self,
        config: MaskedBinsConfig,
        data: BinData,
        model: ZerOmicsCellsConfig,
        store: Store,
        known: np.ndarray,
        features: np.ndarray | None,
        described: Mapping[str, Any],
        seed: int,
    ):
        if model.num_genes != len(store.vocabulary):
            raise ConfigError(
                f"the model has {model.num_genes} genes, but the store's vocabulary {len(store.vocabulary)}: set "
                "model.num_genes to 0."
            )
        if features is not None and features.shape != (model.num_genes, model.feature_dim):
            raise ConfigError(
                f"the features of genes are {features.shape[1]} wide, but model.feature_dim is {model.feature_dim}: "
                "set it to 0."
            )
        if model.encoder != "transformer":
            raise ConfigError(
                "without layers there is nothing to learn of masked genes: train with model.encoder=transformer, and "
                "give --config.model.cells.encoder=weighted to the second stage."
            )
        self.config, self.data, self.model_config, self.store, self.seed = config, data, model, store, seed
        self.model, self.vocabulary = ZerOmicsCells(model), store.vocabulary
        self.known, self.described = known, described
        self.given: Mapping[str, Any] = {} if features is None else {FEATURES: features}
        self.options = CellOptions.of(model.num_bins, data)
        self.tokens_per_record = data.max_genes or model.num_genes

    def take_pretrained_params(self) -> Mapping[str, Any]:
        """Features of genes."""
        given, self.given = self.given, {}
        return given

    def init(self, rng: jax.Array) -> Variables:
        """Initial variables, boxed."""
        return cast(Variables, self.model.init(rng, *ZerOmicsCells.example(self.model_config).values()))

    def mask_bins(
        self, rng: jax.Array, bins: jax.Array, valid_mask: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Bins (B, S) as the model sees them, and which are masked, bool (B, S), of the places that are there."""
        config, levels = self.config, self.model_config.num_bins
        first, second, third = jax.random.split(rng, 3)
        expressed = (bins > 0) & valid_mask
        masked = expressed & (jax.random.uniform(first, bins.shape) < config.masked)
        swapped = expressed & ~masked & (jax.random.uniform(second, bins.shape) < config.substituted)
        other = (bins + jax.random.randint(third, bins.shape, 1, levels + 1)) % (levels + 1)
        seen = jnp.where(swapped, other, bins)
        return jnp.where(masked, self.model_config.mask, seen), masked

    def loss(
        self, variables: Variables, batch: DeviceBatch, rng: jax.Array, train: bool
    ) -> tuple[jax.Array, MetricSums]:
        """Mean of the cross-entropies of bin and gene item at masked places (section 3.1, equations 4 and 5).

        Returns the loss and sums over masked places: `loss`, `masked` (count), `bin_loss`, `gene_loss`, `bin_right`,
        `gene_right`, `dropped_targets`.
        """
        bins, genes = batch["bins"].astype(jnp.int32), batch.get("genes")
        valid_mask = jnp.broadcast_to((batch["example_mask"] > 0)[:, None], bins.shape)
        hiding, place, dropping = jax.random.split(rng, 3)
        seen, masked = self.mask_bins(hiding, bins, valid_mask)
        rngs = {"dropout": dropping} if train and self.model_config.dropout else {}
        hidden = cast(jax.Array, self.model.apply(variables, seen, genes, rngs=rngs, method="hidden_states"))
        budget = min(bins.shape[1], max(1, round(self.config.max_masked_fraction * bins.shape[1])))
        positions, taken = masking.within_budget(place, masked, budget)
        picked = jnp.take_along_axis(hidden, positions[..., None], axis=1)
        targets = jnp.take_along_axis(bins, positions, axis=1)
        items = positions if genes is None else jnp.maximum(jnp.take_along_axis(genes, positions, axis=1), 0)

        def scores(x: jax.Array) -> jax.Array:
            return cast(jax.Array, self.model.apply(variables, x, method="gene_logits"))

        logits = cast(jax.Array, self.model.apply(variables, picked, method="bin_logits"))
        bin_losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        gene_losses, gene_right = token_losses(scores, picked, items, self.model_config.num_genes)
        weights = taken.astype(jnp.float32)
        count = weights.sum()
        sums = {
            "masked": count,
            "bin_loss": (bin_losses * weights).sum(),
            "gene_loss": (gene_losses * weights).sum(),
            "bin_right": ((logits.argmax(axis=-1) == targets) * weights).sum(),
            "gene_right": (gene_right * weights).sum(),
            "dropped_targets": masked.sum().astype(jnp.float32) - count,
        }
        sums["loss"] = (sums["bin_loss"] + sums["gene_loss"]) / 2
        return sums["loss"] / jnp.maximum(count, 1.0), sums

    def compute_metrics(self, sums: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Mean losses in nats, and shares of masked genes whose bin and item are right."""
        count = max(float(sums["masked"]), 1.0)
        names = {
            "loss": "loss",
            "bin_loss": "bin_loss",
            "gene_loss": "gene_loss",
            "bin_right": "bin_accuracy",
        }
        summary = {shown: float(sums[name]) / count for name, shown in names.items()}
        summary["gene_accuracy"] = float(sums["gene_right"]) / count
        return (
            {**summary, "dropped_targets": dropped_targets}
            if (dropped_targets := float(sums["dropped_targets"]))
            else summary
        )

    @functools.cache  # noqa: B019 (a run has one task)
    def dataset(self, split: str) -> CellSource | None:
        """Cells of a split."""
        studies = self.store.split(split)
        if not studies:
            return None
        return CellSource(studies, self.options, self.known, exhaustive=split != "train", seed=self.seed)

    def evaluators(self) -> Sequence[Evaluator]:
        """Bins of masked genes beside what is known of each gene, on the test studies, else the validation ones."""
        held_out, note = held_out_split(self.store)
        if held_out is None or not self.config.report_cells:
            return ()
        from sct.eval.imputation.masked_bins import PredictedBins

        source, cells = self.dataset(held_out), self.dataset("train")
        assert source is not None
        assert cells is not None
        model, config = self.model_config, self.config
        return (
            PredictedBins(
                self._predict, cells, source, model.num_bins, model.num_genes, config.report_cells,
                config.report_seeds, held_out, note,
            ),
        )  # fmt: skip

    def _predict(
        self, variables: Variables, batch: Mapping[str, jax.Array], rng: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Logarithms of the probabilities of bins float32 (B, S, num_bins + 1), and which are masked."""
        bins, genes = batch["bins"].astype(jnp.int32), batch.get("genes")
        seen, masked = self.mask_bins(rng, bins, jnp.ones(bins.shape, bool))
        hidden = self.model.apply(variables, seen, genes, method="hidden_states")
        logits = cast(jax.Array, self.model.apply(variables, hidden, method="bin_logits"))
        return jax.nn.log_softmax(logits, axis=-1), masked

    def tokens(self, batch: Mapping[str, Any]) -> int:
        """Places of genes in a batch."""
        return int(np.prod(batch["bins"].shape))

    def operations(self, records: int) -> float:
        """Operations of the matrix products of a forward pass without heads; a multiply-add counts as two."""
        return ZerOmicsCells.flops(self.model_config, records, self.tokens_per_record)

    def exports(self) -> dict[str, Any]:
        """Genes, and how inputs were made in training."""
        data = {
            "task": NAME,
            **self.options.record(),
            "features": dict(self.described),
            "dropped": np.flatnonzero(~self.known).tolist(),
        }
        return {"genes": self.vocabulary, "data": data}

    def notes(self, fresh: bool) -> Sequence[str]:
        """Tell what genes the model knows."""
        dropped = int((~self.known).sum())
        return (
            f"{len(self.known) - dropped:,} genes have a feature ({self.described['kind']})"
            + (f", {dropped:,} are dropped" if dropped else "")
            + f"; {self.tokens_per_record:,} genes of each cell are read.",
            *(
                [
                    f"masked is {self.config.masked}, above max_masked_fraction, {self.config.max_masked_fraction}: "
                    "masked genes beyond it are left out of the loss."
                ]
                if self.data.max_genes and self.config.max_masked_fraction < self.config.masked
                else []
            ),
        )


def make(inputs: TaskInputs) -> MaskedBins:
    """Make the task of the parts of a configuration."""
    vocabulary, parent, features = inputs.store.vocabulary, inputs.parent_data_spec, None
    if parent is not None and parent.get("task") == NAME:
        known = known_genes(len(vocabulary), parent["dropped"])
        described = parent["features"]
    else:
        features, known, described = gene_features(inputs.data, vocabulary, inputs.seed)
    values = {
        **inputs.model,
        "feature_dim": inputs.model.get("feature_dim") or (0 if features is None else features.shape[1]),
    }
    model = registry.model_config(inputs.architecture, values, len(vocabulary))
    return MaskedBins(
        inputs.objective, inputs.data, model, inputs.store, known, features, described, inputs.seed
    )


SPEC = TaskSpec(
    NAME, MaskedBinsConfig, BinData, make, inherits_architecture=True, everywhere={"max_masked_fraction": 1.0}
)
