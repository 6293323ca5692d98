"""Train a cell encoder to predict the expression bin and the identity of masked genes (ZerOmics, section 3.1)."""

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
from sct.data.cell_options import FIXED, CellOptions
from sct.data.cell_records import CellSource, known_genes
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
    """Raise `ConfigError` if a data section asks for unbinned values, or for a fixed list of genes."""
    if data.genes in FIXED:
        raise ConfigError(
            f"data.genes is {data.genes!r}, but this task does not support a fixed list of genes: set data.genes to "
            "all, expressed, top or sampled."
        )
    if CellOptions.of(2, data).name != "bins":
        raise ConfigError(
            f"data.values is {data.values!r}, but this task supports only binned values: set data.values to quantiles "
            "or levels."
        )


@dataclasses.dataclass(frozen=True)
class BinData(StoreConfig):
    """Data options: which cells to train on, and how the text features of their genes are computed.

    Parameters
    ----------
    max_genes, genes, values
        `genes` selects the genes that are read from each cell. By default, these are all genes of the vocabulary, or
        the `max_genes` most highly expressed genes if `max_genes` is set. `values` is the type of bins: "quantiles",
        or "levels" of equal width. See `sct.data.cell_options.CellOptions`.
    corpus
        "built_in", or a file with gene summaries (`sct.data.genes.corpus`).
    features
        How to compute a feature vector from a gene summary: a text model (folder or Hub id), "lsa" (latent semantic
        analysis, needs no model) or "random". The path of a feature table also works and needs no corpus.
    features_cache
        Folder in which to cache the features of text models. By default, all runs share one folder.
    feature_dim
        Feature dimension F of "lsa" and "random".
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
    """Compute or load the text features of the genes in a vocabulary.

    Returns
    -------
    features : numpy.ndarray
        float32 (G, F).
    known : numpy.ndarray
        bool (G,), whether the gene has a feature.
    source : dict
        Record of how the features were computed.

    Raises
    ------
    SctError
        The corpus, the text model or the feature table is missing or damaged, or none of the genes has a feature.
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
    """Options of the objective: masking, and the report after training.

    Parameters
    ----------
    masked
        Probability that a non-zero bin is masked (p_m, equation 1).
    substituted
        Probability that an unmasked non-zero bin is replaced by a different random bin, which may be zero (p_s).
    max_masked_fraction
        Maximum fraction of a cell's positions at which the output heads are evaluated. Masked positions beyond this
        fraction are left out of the loss and counted in `dropped_targets`.
    report_cells, report_seeds
        Number of held-out cells in the report after training (0: no report), and number of random masks per cell.
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
    """Task that trains the cell encoder of ZerOmics; see `sct.tasks.base.Task`.

    Parameters
    ----------
    config, data
        Options of the objective and of the data.
    model
        Configuration of the architecture.
    store
        Store with the cells.
    known
        bool (G,), whether the gene has a feature. Genes without a feature are dropped.
    features
        Gene features, float32 (G, F). None if they come from a checkpoint or from `init_from`.
    described
        Record of how the features were computed, to save in the model folder.
    seed
        Seed of the order of the cells.
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
                f"the model has {model.num_genes} genes, but the store's vocabulary has {len(store.vocabulary)}: set "
                "model.num_genes to 0 to use the number of genes in the vocabulary."
            )
        if features is not None and features.shape != (model.num_genes, model.feature_dim):
            raise ConfigError(
                f"the gene features have {features.shape[1]} dimensions, but model.feature_dim is "
                f"{model.feature_dim}: set model.feature_dim to 0 to use the number of dimensions of the gene "
                "features."
            )
        if model.encoder != "transformer":
            raise ConfigError(
                f"this task trains a transformer, but model.encoder is {model.encoder!r}, which has no parameters to "
                "train: set model.encoder=transformer, or skip this training and set "
                f"--config.model.cells.encoder={model.encoder} in instruction tuning."
            )
        self.config, self.data, self.model_config, self.store, self.seed = config, data, model, store, seed
        self.model, self.vocabulary = ZerOmicsCells(model), store.vocabulary
        self.known, self.described = known, described
        self.given: Mapping[str, Any] = {} if features is None else {FEATURES: features}
        self.options = CellOptions.of(model.num_bins, data)
        self.tokens_per_record = data.max_genes or model.num_genes

    def take_pretrained_params(self) -> Mapping[str, Any]:
        """Return the gene features by parameter path."""
        given, self.given = self.given, {}
        return given

    def init(self, rng: jax.Array) -> Variables:
        """Return the initial variables, boxed with their logical axis names."""
        return cast(Variables, self.model.init(rng, *ZerOmicsCells.example(self.model_config).values()))

    def mask_bins(
        self, rng: jax.Array, bins: jax.Array, valid_mask: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Mask and substitute bins at valid positions; return the corrupted bins (B, S) and the mask, bool (B, S)."""
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
        """Return the average of two losses at masked positions: the cross-entropy of the bin and that of the gene.

        See section 3.1, equations 4 and 5 of the paper.

        Also returns sums over masked positions: `loss`, `masked` (count), `bin_loss`, `gene_loss`, `bin_right`,
        `gene_right`, `dropped_targets`.
        """
        bins, genes = batch["bins"].astype(jnp.int32), batch.get("genes")
        valid_mask = jnp.broadcast_to((batch["example_mask"] > 0)[:, None], bins.shape)
        hiding, place, dropping = jax.random.split(rng, 3)
        seen, masked = self.mask_bins(hiding, bins, valid_mask)
        # Adapters may have dropout where the model has none.
        keys = (dropping, jax.random.fold_in(dropping, 1), jax.random.fold_in(dropping, 2))
        rngs, bin_rngs, gene_rngs = ({"dropout": key} if train else {} for key in keys)
        hidden = cast(jax.Array, self.model.apply(variables, seen, genes, rngs=rngs, method="hidden_states"))
        budget = min(bins.shape[1], max(1, round(self.config.max_masked_fraction * bins.shape[1])))
        positions, taken = masking.within_budget(place, masked, budget)
        picked = jnp.take_along_axis(hidden, positions[..., None], axis=1)
        targets = jnp.take_along_axis(bins, positions, axis=1)
        items = positions if genes is None else jnp.maximum(jnp.take_along_axis(genes, positions, axis=1), 0)

        def scores(x: jax.Array) -> jax.Array:
            return cast(jax.Array, self.model.apply(variables, x, rngs=gene_rngs, method="gene_logits"))

        logits = cast(jax.Array, self.model.apply(variables, picked, rngs=bin_rngs, method="bin_logits"))
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
        """Return the mean losses in nats, and the accuracies of the predicted bins and genes at masked positions."""
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
        """Return the cells of a split, or None if the split is empty."""
        studies = self.store.split(split)
        if not studies:
            return None
        return CellSource(studies, self.options, self.known, exhaustive=split != "train", seed=self.seed)

    def evaluators(self) -> Sequence[Evaluator]:
        """Return the evaluation of predicted bins against baselines.

        The evaluation uses the test studies, or the validation studies if there are no test studies.
        """
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
        """Mask bins at random and predict them.

        Return log probabilities of all bins, float32 (B, S, num_bins + 1), and the mask, bool (B, S).
        """
        bins, genes = batch["bins"].astype(jnp.int32), batch.get("genes")
        seen, masked = self.mask_bins(rng, bins, jnp.ones(bins.shape, bool))
        hidden = self.model.apply(variables, seen, genes, method="hidden_states")
        logits = cast(jax.Array, self.model.apply(variables, hidden, method="bin_logits"))
        return jax.nn.log_softmax(logits, axis=-1), masked

    def tokens(self, batch: Mapping[str, Any]) -> int:
        """Return the number of gene positions in a batch."""
        return int(np.prod(batch["bins"].shape))

    def operations(self, records: int) -> float:
        """Return the FLOPs of the matrix products in one forward pass without the heads.

        A multiply-add counts as 2 FLOPs.
        """
        return ZerOmicsCells.flops(self.model_config, records, self.tokens_per_record)

    def exports(self) -> dict[str, Any]:
        """Return the genes, and the options with which counts become training inputs."""
        data = {
            "task": NAME,
            **self.options.record(),
            "features": dict(self.described),
            "dropped": np.flatnonzero(~self.known).tolist(),
        }
        return {"genes": self.vocabulary, "data": data}

    def notes(self, fresh: bool) -> Sequence[str]:
        """Return notices on the number of genes that have features, and on masked genes that the loss leaves out."""
        dropped = int((~self.known).sum())
        return (
            f"{len(self.known) - dropped:,} genes have a feature ({self.described['kind']})"
            + (f", {dropped:,} genes without one are dropped" if dropped else "")
            + f"; the model reads {self.tokens_per_record:,} genes of each cell.",
            *(
                [
                    f"masked is {self.config.masked}, but max_masked_fraction is {self.config.max_masked_fraction}: "
                    "the loss leaves out the masked genes beyond this fraction."
                ]
                if self.data.max_genes and self.config.max_masked_fraction < self.config.masked
                else []
            ),
        )


def make(inputs: TaskInputs) -> MaskedBins:
    """Build the task from `TaskInputs`, which hold the sections of a configuration."""
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
