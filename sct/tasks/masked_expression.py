"""Train a model to predict the expression levels of masked genes (sCT paper, section 3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sct.data.bags import BagOptions, BagSource, check_thinning
from sct.data.cell_labels import label_names
from sct.data.class_prior import ClassPrior
from sct.data.level_prior import log_level_prior
from sct.data.store import SPLITS, Store, Study
from sct.errors import ConfigError
from sct.models import registry
from sct.models.adapter_kinds import AdapterConfig
from sct.models.sct import level_probabilities
from sct.models.sct_config import SCTConfig, pad_to_multiple
from sct.tasks.base import Evaluator, StoreConfig, held_out_split
from sct.tasks.masked_objective import MaskedExpressionConfig, MaskedObjective
from sct.tasks.task_spec import BAG_SPEED, TaskInputs, TaskSpec

NAME = "masked_expression"
_CODE_BIAS = "params/cell_code/bias"


@dataclasses.dataclass(frozen=True)
class BagData(StoreConfig):
    """Data options: which cells to train on, and how they are grouped into bags.

    Parameters
    ----------
    cells_per_bag, shuffle_cells, spatial_bags, noise_fraction, thinning
        See `sct.data.bags.BagOptions`.
    label_key
        Column of `obs` with labels of cells, for `objective.label_contrast`. Studies without this column have no
        labels. Cells without an entry, or with a placeholder such as "unknown", have no label.
    """

    cells_per_bag: int = BagOptions.cells_per_bag
    shuffle_cells: int = BagOptions.shuffle_cells
    spatial_bags: bool = BagOptions.spatial_bags
    noise_fraction: float = BagOptions.noise_fraction
    thinning: tuple[float, ...] = BagOptions.thinning
    label_key: str = BagOptions.label_key

    def __post_init__(self) -> None:
        check_thinning(self.thinning)

    def options(self, seed: int) -> BagOptions:
        """Return the bag options with the given seed."""
        return BagOptions(
            cells_per_bag=self.cells_per_bag,
            shuffle_cells=self.shuffle_cells,
            spatial_bags=self.spatial_bags,
            noise_fraction=self.noise_fraction,
            thinning=self.thinning,
            label_key=self.label_key,
            seed=seed,
        )


class MaskedExpression(MaskedObjective):
    """Task that trains sCT; see `sct.tasks.base.Task`.

    Parameters
    ----------
    config
        Options of the objective.
    model
        Configuration of the architecture. `num_genes` must be at least the size of the store's vocabulary.
    bags
        Options for forming bags. The model's configuration overrides `num_positions`, `num_bins` and `spatial`.
    store
        Store with the cells.
    """

    # A model trained without coordinates has no spatial layer: the layer starts at zero when spatial training begins.
    # A model trained without a code has no parameters for it.
    may_be_missing: Sequence[str] = (r"^params/spatial/", r"^params/cell_code/")
    lora: AdapterConfig | None = None
    license = "unknown"

    def __init__(self, config: MaskedExpressionConfig, model: SCTConfig, bags: BagOptions, store: Store):
        genes = len(store.vocabulary)
        if model.num_genes < genes:
            raise ConfigError(
                f"model.num_genes is {model.num_genes}, but the store's vocabulary has {genes} genes: set "
                f"model.num_genes to {pad_to_multiple(genes, model.num_downsamples)}, or to 0 to compute it from the "
                "vocabulary."
            )
        for split in SPLITS:
            for study in store.split(split):
                study.check_counts()
        studies = store.split("train")
        if model.use_spatial and studies and not any(study.spatial for study in studies):
            raise ConfigError(
                f"model.use_spatial is True, but no training study of {store.path} has coordinates: ingest the data "
                "with --spatial_key, or set model.use_spatial to False."
            )
        largest = max((study.n_cells for study in studies), default=bags.cells_per_bag)
        if bags.cells_per_bag > largest:
            raise ConfigError(
                f"data.cells_per_bag is {bags.cells_per_bag}, but the largest training study has only {largest} cells: "
                f"set data.cells_per_bag to {largest} or less."
            )
        super().__init__(config, model, bags.cells_per_bag)
        self.store = store
        self.vocabulary = store.vocabulary
        contrasts = bool(config.contrast or config.label_contrast)
        self.bags = dataclasses.replace(
            bags, num_positions=model.num_genes, num_bins=model.num_bins, spatial=model.use_spatial,
            with_study=contrasts, label_names=_label_names(config, bags, studies),
        )  # fmt: skip
        self._prior: np.ndarray | None = None

    def level_prior(self) -> np.ndarray | None:
        """Return the log frequency of each level of each gene in the training studies, float32 (G, num_bins).

        Return None if no loss uses it, or if there are no training studies.
        """
        studies = self.store.split("train")
        if self._prior is None and self.config.cell_decoding and studies:
            self._prior = log_level_prior(BagSource(studies, self.bags, exhaustive=True))
        return self._prior

    def take_pretrained_params(self) -> Mapping[str, Any]:
        """Return the initial bias of the decoder of the code. All other parameters start from random values."""
        prior = self.level_prior()
        return {} if prior is None else {_CODE_BIAS: prior}

    def compute_metrics(self, sums: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Return the mean loss, the MCC over masked expressed genes and the accuracy over all masked genes."""
        from sct.eval import (
            metrics,
        )  # imports scikit-learn, which takes a second and would delay the first step

        found = super().compute_metrics(sums)
        mcc = metrics.matthews_from_confusion(np.asarray(sums["confusion"])[1:])
        return {"loss": found.pop("loss"), "mcc_expressed": mcc, **found}

    def dataset(self, split: str) -> BagSource | None:
        """Return the bags of a split. Return None for an empty split.

        The bags of the split "train" are random. In other splits, the bags contain every cell once.
        """
        studies = self.store.split(split)
        return BagSource(studies, self.bags, exhaustive=split != "train") if studies else None

    def evaluators(self) -> Sequence[Evaluator]:
        """Return the evaluations of imputation against baselines.

        The evaluations use the test studies, or the validation studies if there are no test studies.

        The first evaluation masks genes at random and scores all masked genes. The second evaluation follows the sCT
        paper.
        """
        from sct.eval.imputation.natural import NaturalImputation
        from sct.eval.imputation.protocols import GeneImputation

        held_out, _ = held_out_split(self.store)
        if held_out is None:
            return ()
        bags = dataclasses.replace(self.bags, with_counts=True)
        prior = ClassPrior.of(self.exports()["data"])
        probabilities = level_probabilities(self.model_config, prior.offset)
        given = (
            BagSource(self.store.split("train"), bags, exhaustive=True),
            BagSource(self.store.split(held_out), bags, exhaustive=True),
            held_out,
            self.config.report_ratio,
            self.config.report_seeds,
            self.config.report_bags,
        )
        return (
            NaturalImputation(probabilities, *given),
            GeneImputation(probabilities, *given, odds=prior.odds),
        )

    def tokens(self, batch: Mapping[str, Any]) -> int:
        """Return the number of gene positions in a batch."""
        return int(np.prod(batch["tokens"].shape))

    def exports(self) -> dict[str, Any]:
        """Return the genes, and the options with which counts become training inputs."""
        bags = self.bags
        further = {"thinning": list(bags.thinning), "label_key": bags.label_key}
        data = self.data_record(bags.noise_fraction)
        return {"genes": self.vocabulary, "data": data | {name: v for name, v in further.items() if v}}

    def notes(self, fresh: bool) -> Sequence[str]:
        """Return a notice if a spatial model starts from random parameters."""
        if not (fresh and self.model_config.use_spatial):
            return ()
        return (
            "the spatial model starts from random parameters: set --config.init_from=RUN_OR_MODEL to start from a "
            "pretrained single-cell model.",
        )


def _label_names(
    config: MaskedExpressionConfig, bags: BagOptions, studies: Sequence[Study]
) -> tuple[str, ...]:
    """Return the labels of the training studies; () without labels.

    Raises
    ------
    ConfigError
        Only one of `label_key` and `label_contrast` is set, or there are too few labels.
    """
    if bool(bags.label_key) != bool(config.label_contrast):
        raise ConfigError(
            f"data.label_key is {bags.label_key!r} and objective.label_contrast is {config.label_contrast:g}, but each "
            "needs the other: set both, or neither."
        )
    return label_names(studies, bags.label_key) if bags.label_key else ()


def make(inputs: TaskInputs) -> MaskedExpression:
    """Build the task from `TaskInputs`, which hold the sections of a configuration."""
    model = registry.model_config(inputs.architecture, inputs.model, len(inputs.store.vocabulary))
    return MaskedExpression(inputs.objective, model, inputs.data.options(inputs.seed), inputs.store)


SPEC = TaskSpec(
    NAME, MaskedExpressionConfig, BagData, make, speed=BAG_SPEED, everywhere={"max_masked_fraction": 0.0}
)
