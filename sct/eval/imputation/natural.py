"""Evaluate imputation of genes that may or may not be expressed, as in practice.

The sCT paper scores only masked genes that are expressed. A user who imputes a gene does not know whether it is
expressed. Here a fraction of the *measured* genes of each cell is masked at random and every masked position is scored.
The metrics test three things: how well a method separates expressed from unexpressed genes, whether its probabilities
are calibrated (a probability of 0.3 should be right in 30% of cases), and how close its expected counts are to the true
counts. Every method returns probabilities of expression levels and an expected count for the same (cell, gene) pairs.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import numpy as np
from scipy.special import betainc

from sct.data.bags import BagSource
from sct.data.tokenize import expected_counts, level_borders
from sct.errors import SctError
from sct.eval import metrics
from sct.eval.imputation import baselines
from sct.eval.imputation.baselines import OTHER_CELLS, THESE_CELLS, TRAINING, Unavailable
from sct.eval.imputation.eval_cells import EvalCells, Masked, mask_measured, mask_measured_genes
from sct.eval.imputation.scoring import ImputationModel, Probabilities
from sct.eval.reports.report import FITTED_ON, METHOD, MODEL, REMARK, Column, Report
from sct.progress import progress

RATIO = 0.15
# Maximum number of positions scored per draw: enough for three digits of every metric; limits memory and time.
SCORED = 2_000_000
# A gene enters "imputed / counted" if the expected sum of its masked counts in a draw is at least this number.
_COUNTS_PER_GENE = 20
_CELLS_AT_ONCE = 256
# Below this dispersion, a negative binomial equals a Poisson distribution to six digits.
_LEAST_DISPERSION = 1e-6
_ITERATIONS = 50

# The two tables of a report: column title -> (key of the metric, whether "max" or "min" is better).
EXPRESSION = {
    "AUROC": ("auroc", "max"),
    "average precision": ("average_precision", "max"),
    "cross-entropy": ("cross_entropy", "min"),
    "ECE": ("ece", "min"),
    "MCC, all levels": ("mcc", "max"),
}
COUNTS = {
    "MAE per gene": ("mae_per_gene", "min"),
    "MAE per cell": ("mae_per_cell", "min"),
    "r per gene": ("r_per_gene", "max"),
    "r per cell": ("r_per_cell", "max"),
    "imputed / counted": ("imputed_to_counted", ""),
}
SUMMARY = {
    name: (EXPRESSION | COUNTS)[name]
    for name in ("AUROC", "cross-entropy", "ECE", "MCC, all levels", "r per gene", "imputed / counted")
}
_SCORED = (
    "Random measured genes are masked, whether they are expressed or not. All masked positions are scored."
)
_EXPRESSION_NOTES = (
    _SCORED,
    "AUROC and average precision score the probability that the gene is expressed. Cross-entropy scores the levels, in "
    "nats. ECE is the expected calibration error of the probability of expression, in 15 bins.",
)
_RANGES = (
    "For all methods, levels use the cell's own range of counts, including its masked genes. For levels 2 and up, "
    "expected counts use the mean count of the level among the visible genes. Baselines that predict counts get "
    "probabilities from a negative binomial distribution. To fit its dispersion, some visible counts are masked as "
    "well and the baseline predicts them."
)
_COUNTS_NOTES = (
    _SCORED,
    "MAE and r are the mean absolute error and the Pearson correlation of expected and true raw counts, averaged over "
    "genes or over cells. 'imputed / counted' is the imputed mean of a gene divided by its true mean, as the median "
    "over genes (1 is unbiased).",
)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Hold level probabilities (n, num_bins) and expected raw counts (n,) of the n scored (cell, gene) pairs."""

    chance: np.ndarray
    counts: np.ndarray


class Estimator(Protocol):
    """Interface of an imputation method that returns level probabilities and expected counts as an `Estimate`.

    See `sct.eval.imputation.baselines.ImputationMethod` for the attributes.
    """

    name: str
    fitted_on: str
    remark: str

    def estimate(self, eval_cells: EvalCells, masked: Masked) -> Estimate:
        """Estimate probabilities of expression levels, and expected counts, for the scored (cell, gene) pairs.

        The method may use the same data as `ImputationMethod.predict`.

        Raises
        ------
        Unavailable
            The method cannot run on these cells.
        """
        ...


class LevelFrequency:
    """Baseline that predicts the same probabilities in every cell: the frequency of each level of the gene.

    The frequencies are counted in other cells.

    Parameters
    ----------
    train
        Level frequencies in the training studies, as returned by `sct.eval.imputation.baselines.level_frequencies`.
        None if there are no training studies, or if `others` is True.
    others
        Whether to use the other cells of the same study, including their masked genes, instead of training studies.
    """

    remark = ""

    def __init__(self, train: np.ndarray | None, others: bool = False):
        self.name = "frequency of levels per gene"
        self.fitted_on = OTHER_CELLS if others else TRAINING
        self._of = (
            baselines.OthersCommonLevel(expressed=False)
            if others
            else baselines.CommonLevel(expressed=False, train=train)
        )

    def estimate(self, eval_cells: EvalCells, masked: Masked) -> Estimate:
        """Estimate level probabilities and counts of the scored (cell, gene) pairs; see `Estimator`."""
        # One pseudocount, spread over all levels, so that no probability is zero.
        chance = self._of.frequencies(eval_cells, masked) + 1 / eval_cells.num_bins
        chance = (chance / chance.sum(axis=1, keepdims=True)).astype(np.float32)
        return from_levels(masked, chance)


class CountMethod(abc.ABC):
    """Base class of methods that predict counts, from which level probabilities are computed.

    The level probabilities are those of a negative binomial distribution whose mean is the predicted count.

    To fit the dispersion of each gene, some of the visible genes are masked as well. The method predicts the counts of
    these genes, and the predictions are compared with the true counts.
    """

    name: str
    fitted_on: str
    remark: str

    @abc.abstractmethod
    def counts(self, eval_cells: EvalCells, masked: Masked) -> np.ndarray:
        """Return the expected counts (n,) of the scored (cell, gene) pairs.

        Raises
        ------
        Unavailable
            The method cannot run on these cells.
        """

    def _of_visible(self) -> CountMethod:
        """Return the variant of the method that uses only visible counts.

        The dispersion is fitted with this variant.
        """
        return self

    def estimate(self, eval_cells: EvalCells, masked: Masked) -> Estimate:
        """Estimate level probabilities and counts of the scored (cell, gene) pairs; see `Estimator`."""
        known = _mask_more(eval_cells, masked)
        expected = self._of_visible().counts(eval_cells, known)
        dispersion = dispersions(known.genes, expected, known.counts, masked.mask.shape[1])
        return negative_binomial(masked, self.counts(eval_cells, masked), dispersion)


def _mask_more(eval_cells: EvalCells, masked: Masked) -> Masked:
    """Also mask a random part of the genes that are still visible, and score only these additional genes."""
    rng = np.random.default_rng(len(masked.cells))
    more = masked.shown & (rng.random(masked.mask.shape, np.float32) < RATIO)
    places = np.flatnonzero(more)
    if len(places) > SCORED:
        places = np.sort(rng.choice(places, SCORED, replace=False))
    return Masked.of(eval_cells, masked.mask | more, np.divmod(places, more.shape[1]))


class GeneMean(CountMethod):
    """Baseline that predicts the mean count of each gene, scaled to the library size of the cell.

    The library size is the sum over the visible genes of the cell.

    Parameters
    ----------
    fitted_on
        Counts from which the means are computed. `TRAINING`: the training studies. `OTHER_CELLS`: the other cells of
        the study, including their masked genes. `THESE_CELLS`: only the visible counts of the other cells of the study.
    train
        Result of `training_means`; used only if `fitted_on` is `TRAINING`.
    """

    remark = ""

    def __init__(self, fitted_on: str, train: tuple[np.ndarray, np.ndarray] | None = None):
        self.name, self.fitted_on, self._train = "mean per gene, by library size", fitted_on, train

    def _of_visible(self) -> CountMethod:
        return GeneMean(THESE_CELLS) if self.fitted_on == OTHER_CELLS else self

    def counts(self, eval_cells: EvalCells, masked: Masked) -> np.ndarray:
        """Return the expected count (n,) of each scored (cell, gene) pair; see `CountMethod`."""
        if self.fitted_on == TRAINING and self._train is None:
            raise Unavailable(
                "this method needs training studies, but none were given: give a store with training studies"
            )
        known = masked.visible if self.fitted_on == THESE_CELLS else eval_cells.counts
        shown = masked.shown if self.fitted_on == THESE_CELLS else eval_cells.eligible
        if self.fitted_on == THESE_CELLS:
            baselines.require_shown(masked)
        positions, studies = masked.mask.shape[1], len(eval_cells.measured)
        totals, numbers = np.zeros((2, studies, positions))
        for study in np.unique(eval_cells.study):
            if self._train is not None:
                means, cells = self._train
                totals[study, : len(means)], numbers[study, : len(means)] = means * cells, cells
            else:
                own = eval_cells.study == study
                totals[study] = np.asarray(known[own].sum(axis=0)).ravel()
                numbers[study] = shown[own].sum(axis=0)
        out = np.zeros(len(masked.cells), np.float32)
        for block, part in _blocks(masked):
            total, number = totals[eval_cells.study[block]], numbers[eval_cells.study[block]]
            if self._train is None:  # leave the cell itself out of its mean
                total, number = np.maximum(total - known[block].toarray(), 0), number - shown[block]
            mean = np.divide(total, number, out=np.zeros_like(total), where=number > 0)
            average = mean.sum(axis=1, keepdims=True) / np.maximum((number > 0).sum(axis=1, keepdims=True), 1)
            # One pseudo-cell with the average count of all genes, so that no gene has a mean of zero.
            mean = (total + average) / (number + 1)
            seen, visible = masked.shown[block], masked.visible[block].toarray()
            expected = (mean * seen).sum(axis=1)
            factor = np.divide(
                (visible * seen).sum(axis=1), expected, out=np.zeros_like(expected), where=expected > 0
            )
            cell = masked.cells[part] - block.start
            out[part] = mean[cell, masked.genes[part]] * factor[cell]
        return out


def training_means(train: BagSource) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean count of each gene in an average training cell, and the number of cells that measured the gene.

    Both arrays have the shape (G,). The means are maximum likelihood estimates in a model in which the expected total
    count of a gene in a study is the depth of the study x the mean of the gene. Only the genes that a study measured
    are used. Therefore, studies of a small gene panel and studies of the whole transcriptome are combined correctly.
    """
    totals = np.array([study.gene_totals for study in train.studies], np.float64)
    measured = np.array([study.measured for study in train.studies])
    cells = np.array([study.n_cells for study in train.studies])
    totals *= measured
    depth = totals.sum(axis=1)
    for _ in range(_ITERATIONS):
        mean = totals.sum(axis=0) / np.maximum(depth @ measured, 1e-12)
        depth = totals.sum(axis=1) / np.maximum(measured @ mean, 1e-12)
    return mean * depth.sum() / cells.sum(), cells @ measured


class Smoother(Protocol):
    """Interface of methods that average counts over similar cells; see `baselines.ImputationMethod` for attributes."""

    name: str
    fitted_on: str
    remark: str

    def smooth(self, eval_cells: EvalCells, masked: Masked) -> tuple[np.ndarray, np.ndarray]:
        """Return two arrays (n,): the mean count of each scored (cell, gene) pair, and the number of averaged cells.

        Raises
        ------
        Unavailable
            The method cannot run on these cells.
        """
        ...


class Smoothed(CountMethod):
    """Baseline that averages counts over similar cells and one artificial cell with the mean count of each gene.

    If a gene is rare but not absent, its mean over a few neighbors is often zero. The artificial cell avoids this.

    Parameters
    ----------
    method
        Smoothing method.
    gene_mean
        Baseline with the mean count of each gene in the cells that `method` averages over.
    """

    def __init__(self, method: Smoother, gene_mean: GeneMean):
        self.name, self.fitted_on = method.name, method.fitted_on
        self.remark = "; ".join(filter(None, (method.remark, "the mean of the gene counts as one more cell")))
        self._method, self._mean = method, gene_mean

    def counts(self, eval_cells: EvalCells, masked: Masked) -> np.ndarray:
        """Return the expected count (n,) of each scored (cell, gene) pair; see `CountMethod`."""
        smoothed, cells = self._method.smooth(eval_cells, masked)
        return (cells * smoothed + self._mean.counts(eval_cells, masked)) / (cells + 1)


class ModelEstimator:
    """Adapt an `ImputationModel` to the interface `Estimator`.

    The level probabilities come from `ImputationModel.chances`.
    """

    def __init__(self, model: ImputationModel):
        self.name, self.fitted_on, self.remark = model.name, model.fitted_on, model.remark
        self._model = model

    def estimate(
        self, eval_cells: EvalCells, masked: Masked, tick: Callable[[int], None] = lambda bags: None
    ) -> Estimate:
        """Return the model's level probabilities and expected counts of the scored (cell, gene) pairs.

        `tick` is called with the number of bags finished since the last call.
        """
        chance = self._model.chances(eval_cells, masked, tick)
        return from_levels(masked, chance)


def from_levels(masked: Masked, chance: np.ndarray) -> Estimate:
    """Compute expected counts from level probabilities (n, num_bins), and return both as an `Estimate`."""
    low, high, means = (values[masked.cells] for values in (masked.low, masked.high, masked.means))
    return Estimate(chance, expected_counts(chance, means, low, high))


def _blocks(masked: Masked) -> Iterator[tuple[slice, slice]]:
    """Cut the cells into blocks.

    For each block, yield the slice of its cells and the slice of their scored (cell, gene) pairs.
    """
    for first in range(0, len(masked.mask), _CELLS_AT_ONCE):
        stop = min(first + _CELLS_AT_ONCE, len(masked.mask))
        yield slice(first, stop), slice(*np.searchsorted(masked.cells, [first, stop]))


def dispersions(genes: np.ndarray, mean: np.ndarray, counts: np.ndarray, num_genes: int) -> np.ndarray:
    """Estimate the dispersion of each gene, in the model variance = mean + dispersion * mean^2.

    The method of moments gives a dispersion per gene. With few counts this estimate is uncertain, so it is shrunk
    towards the mean dispersion of all genes. The prior standard deviation of a gene's dispersion equals that mean.

    Parameters
    ----------
    genes, mean, counts
        (n,) gene, expected count and true count of each position.
    num_genes
        Number of genes.

    Returns
    -------
    Dispersions (num_genes,).
    """
    mean, counts = mean.astype(np.float64), counts.astype(np.float64)

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(genes, weights=values, minlength=num_genes)

    # Rescale the expected counts to each gene's true total, so that a biased mean does not look like dispersion.
    mean = mean * ((total(counts) + 1) / (total(mean) + 1))[genes]
    square = total(mean**2)
    informative = square > 0
    own = total((counts - mean) ** 2 - mean)[informative] / square[informative]
    overall = 0.0
    for _ in range(2):  # the weights of the mean depend on the mean
        variance = mean + overall * mean**2
        error = total(variance + 2 * variance**2)[informative] / square[informative] ** 2
        overall = max(float((own / error).sum() / (1 / error).sum()), 0.0) if informative.any() else 0.0
    weight = overall**2 / (overall**2 + error) if overall > 0 else np.zeros(int(informative.sum()))
    found = np.full(num_genes, overall)
    found[informative] = np.maximum(weight * own + (1 - weight) * overall, 0)
    return found


def negative_binomial(masked: Masked, mean: np.ndarray, dispersion: np.ndarray) -> Estimate:
    """Return the expression level probabilities that follow from negative binomial counts.

    The n counts have the means `mean` (n,), and each gene has a dispersion, (P,).

    The expression range of each cell determines which counts belong to which level. A dispersion of zero is a Poisson
    distribution.
    """
    num_bins = masked.medians.shape[1]
    # `low` and `high` are log1p of whole counts, rounded to float32. Recompute them exactly for the level borders.
    low, high = (np.log1p(np.rint(np.expm1(x.astype(np.float64)))) for x in (masked.low, masked.high))
    borders = level_borders(low, high, num_bins)
    # If all counts of a cell are equal, its range is empty and level 1 is the only level above zero.
    borders = np.where(borders > 0, borders, np.inf)
    borders = np.column_stack([np.ones(len(borders)), borders])
    size = 1 / np.maximum(dispersion, _LEAST_DISPERSION)
    chance = np.empty((len(mean), num_bins), np.float32)
    for cells, part in _blocks(masked):
        edge = borders[cells][masked.cells[part] - cells.start]
        rate, r = np.maximum(mean[part].astype(np.float64), 1e-9), size[masked.genes[part]]
        above = betainc(np.where(np.isinf(edge), 1, edge), r[:, None], (rate / (rate + r))[:, None])
        above = np.column_stack([np.ones(len(edge)), np.where(np.isinf(edge), 0, above), np.zeros(len(edge))])
        chance[part] = above[:, :-1] - above[:, 1:]
    return Estimate(np.maximum(chance, 0), np.asarray(mean, np.float32))


def estimators(
    eval_cells: EvalCells, model: ImputationModel | None, train: BagSource | None, *, magic: bool = True
) -> list[Estimator]:
    """Return the model (if given) and all baselines as estimators. The parameters are those of `natural_imputation`."""
    frequencies = None if train is None else baselines.level_frequencies(train)
    means = None if train is None else training_means(train)
    of_training, of_these = GeneMean(TRAINING, means), GeneMean(THESE_CELLS)
    found: list[Estimator] = [] if model is None else [ModelEstimator(model)]
    found += [
        LevelFrequency(frequencies), LevelFrequency(None, others=True),
        of_training, GeneMean(OTHER_CELLS),
    ]  # fmt: skip
    for k in (5, 30):
        found.append(Smoothed(baselines.KnnSmoothing(train, k), of_training))
    for k in (5, 30):
        found.append(Smoothed(baselines.OwnKnnSmoothing(k), of_these))
    if magic:
        found.append(Smoothed(baselines.Magic(), of_these))
    return found


@dataclasses.dataclass
class NaturalRow:
    """Hold the metrics of one imputation method, which become one row of the tables.

    Attributes
    ----------
    method, fitted_on, remark
        See `sct.eval.imputation.baselines.ImputationMethod`. If the method could not run, `remark` is the reason.
    key
        `sct.eval.reports.report.MODEL` for the model, "" for baselines.
    numbers
        Dict from the name of each metric to a list with one number per draw of the random mask.
    reliability
        Data of a reliability diagram: how well the predicted probabilities that genes are expressed are calibrated. The
        list has one entry per draw of the random mask.
    """

    method: str
    fitted_on: str
    remark: str
    key: str = ""
    numbers: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    reliability: list[metrics.Reliability] = dataclasses.field(default_factory=list)

    @property
    def label(self) -> str:
        """Return a unique name of the row: the method and, for baselines, the cells it is fitted on."""
        return self.method if self.key == MODEL else f"{self.method}, {self.fitted_on}"

    def score(self, eval_cells: EvalCells, masked: Masked, estimate: Estimate) -> None:
        """Compute the metrics of an estimate for one random mask, and append them to `numbers`."""
        expressed = masked.levels > 0  # noise genes count as unexpressed
        probability = 1 - estimate.chance[:, 0]
        table = metrics.reliability(expressed, probability)
        genes, cells = masked.mask.shape[1], len(masked.mask)
        error = np.abs(estimate.counts - masked.counts)
        imputed, is_target, hidden = (
            np.bincount(masked.genes, weights=values, minlength=genes)
            for values in (estimate.counts, masked.counts, np.ones(len(masked.genes)))
        )
        # Select genes by all their counts. Selecting by masked counts would favor genes with many counts in the mask
        # and bias the ratio.
        total, measured = np.asarray(eval_cells.counts.sum(axis=0)).ravel(), eval_cells.eligible.sum(axis=0)
        enough = (total > 0) & (total * hidden >= _COUNTS_PER_GENE * np.maximum(measured, 1))
        per_cell = np.bincount(masked.cells, minlength=cells)
        values = {
            "auroc": metrics.roc_auc(expressed, probability),
            "average_precision": metrics.average_precision(expressed, probability),
            "cross_entropy": metrics.cross_entropy(masked.levels, estimate.chance),
            "ece": table.calibration_error,
            "mcc": metrics.matthews(masked.levels, estimate.chance.argmax(axis=1)),
            "expressed": float(expressed.mean()),
            "predicted_expressed": float(probability.mean()),
            "mae_per_gene": _mean_of_means(masked.genes, error, hidden),
            "mae_per_cell": _mean_of_means(masked.cells, error, per_cell),
            "r_per_gene": _mean(metrics.grouped_pearson(estimate.counts, masked.counts, masked.genes, genes)),
            "r_per_cell": _mean(metrics.grouped_pearson(estimate.counts, masked.counts, masked.cells, cells)),
            "imputed_to_counted": (
                float(np.median(imputed[enough] / np.maximum(is_target[enough], 0.5)))
                if enough.any()
                else float("nan")
            ),
        }
        for name, value in values.items():
            self.numbers.setdefault(name, []).append(value)
        self.reliability.append(table)


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if (~np.isnan(values)).any() else float("nan")


def _mean_of_means(group: np.ndarray, values: np.ndarray, sizes: np.ndarray) -> float:
    """Average the values within each group, and return the mean of these averages over all non-empty groups."""
    sums = np.bincount(group, weights=values, minlength=len(sizes))
    return _mean(np.divide(sums, sizes, out=np.full(len(sizes), np.nan), where=sizes > 0))


@dataclasses.dataclass(frozen=True)
class NaturalResult:
    """Hold the result of `natural_imputation`.

    Attributes
    ----------
    title
        Title of the tables, which says what was masked and in which cells.
    ratio
        Fraction of the measured genes that was masked.
    rows
        Metrics of each method, the model first.
    positions
        Number of scored (cell, gene) pairs in each draw of the random mask.
    whole_genes
        Whether the same genes were masked in all cells.
    """

    title: str
    ratio: float
    rows: list[NaturalRow]
    positions: list[int]
    whole_genes: bool = False

    axis = "ratio"

    @property
    def name(self) -> str:
        """Return the name of the evaluation protocol."""
        return f"natural imputation{' of whole genes' * self.whole_genes}"

    def report(self, columns: dict[str, tuple[str, str]], what: str, notes: tuple[str, ...]) -> Report:
        """Return a table with the metrics in `columns`. The text `what` is part of the table title."""
        draws = len(self.positions)
        expressed = [x for row in self.rows for x in row.numbers.get("expressed", ())][:draws]
        share = f", {np.mean(expressed):.1%} expressed" if expressed else ""
        report = Report(
            f"{self.title}: {what} ({sum(self.positions):,} masked positions in {draws} "
            f"draw{'s' * (draws != 1)}{share})",
            (METHOD, FITTED_ON, *(Column(key, title) for title, (key, _) in columns.items()), REMARK),
            notes=notes,
            better={key: better for key, better in columns.values() if better},
        )
        for row in self.rows:
            numbers = [row.numbers.get(name, "-") for name, _ in columns.values()]
            report.add(row.method, row.fitted_on, *numbers, row.remark, key=row.key)
        return report

    @property
    def reports(self) -> list[Report]:
        """Return two tables: the metrics of predicting whether genes are expressed, and the metrics of the counts."""
        return [
            self.report(EXPRESSION, "expression", (*_EXPRESSION_NOTES, _RANGES)),
            self.report(COUNTS, "counts", (*_COUNTS_NOTES, _RANGES)),
        ]

    @property
    def summary(self) -> Report:
        """Return one table with the most important metrics."""
        return self.report(
            SUMMARY, "expression and counts", (*_EXPRESSION_NOTES, *_COUNTS_NOTES[1:], _RANGES)
        )

    def labels(self, key: str) -> list[str]:
        """Return the labels of all table rows that have the given key."""
        return [row.label for row in self.rows if row.key == key]

    @property
    def reliability(self) -> dict[str, metrics.Reliability]:
        """For each row of the table, return a reliability diagram over all random masks, as {row label: data}."""
        found = {}
        for row in self.rows:
            if not row.reliability:
                continue
            count = np.sum([each.number for each in row.reliability], axis=0)
            sums = [
                np.sum([np.nan_to_num(getattr(each, name)) * each.number for each in row.reliability], axis=0)
                for name in ("predicted", "observed")
            ]
            predicted, observed = (
                np.divide(s, count, out=np.full(len(count), np.nan), where=count > 0) for s in sums
            )
            found[row.label] = metrics.Reliability(predicted, observed, count)
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return all numbers as a dict that JSON can store."""
        rows = [
            {
                "method": row.method,
                "fitted_on": row.fitted_on,
                "remark": row.remark,
                "key": row.key,
                **row.numbers,
            }
            for row in self.rows
        ]
        curves = {
            name: {field: getattr(table, field).tolist() for field in table._fields}
            for name, table in self.reliability.items()
        }
        setting = {"ratio": self.ratio, "title": self.title, "positions": self.positions, "rows": rows}
        return {"protocol": self.name, "axis": self.axis, "settings": [setting], "reliability": curves}


def natural_imputation(
    eval_cells: EvalCells,
    model: ImputationModel | None,
    train: BagSource | None = None,
    *,
    ratio: float = RATIO,
    seeds: int = 5,
    magic: bool = True,
    cells_name: str = "held-out cells",
    whole_genes: bool = False,
) -> NaturalResult:
    """Evaluate imputation of randomly masked measured genes; all masked genes are scored, expressed or not.

    Parameters
    ----------
    ratio
        Fraction of the measured genes of each cell to mask.
    whole_genes
        Whether to mask the same genes in all cells, as `sct.tl.impute(genes=...)` does. By default, each cell has its
        own random genes.
    eval_cells, model, train, seeds, magic, cells_name
        See `sct.eval.imputation.protocols.gene_imputation`.
    """
    methods = estimators(eval_cells, model, train, magic=magic)
    rows = [
        NaturalRow(m.name, m.fitted_on, m.remark, MODEL if isinstance(m, ModelEstimator) else "")
        for m in methods
    ]
    positions = []
    units = seeds * sum(eval_cells.num_bags if row.key == MODEL else 1 for row in rows)
    hide = mask_measured_genes if whole_genes else mask_measured
    with progress(
        "imputing genes masked in all cells" if whole_genes else "imputing masked genes", units
    ) as bar:
        for seed in range(seeds):
            masked = hide(eval_cells, ratio, seed, SCORED)
            positions.append(len(masked.cells))
            for row, method in zip(rows, methods, strict=True):
                if isinstance(method, ModelEstimator):
                    row.score(eval_cells, masked, method.estimate(eval_cells, masked, bar.update))
                    continue
                bar.update(1)
                if seed and not row.numbers:  # the method failed in an earlier draw
                    continue
                try:
                    row.score(eval_cells, masked, method.estimate(eval_cells, masked))
                except SctError:
                    raise
                except Exception as error:  # a library error in one baseline must not lose the whole table
                    known = isinstance(error, Unavailable)
                    reason = (str(error).splitlines() or [""])[0]
                    row.remark = reason if known else f"{type(error).__name__}: {reason}"
                    row.numbers, row.reliability = {}, []
    what = f"{ratio:.0%} of the measured genes masked in {'all ' * whole_genes}{cells_name}"
    return NaturalResult(f"Natural imputation, {what}", ratio, rows, positions, whole_genes)


class NaturalImputation:
    """Run `natural_imputation` after training, without the baseline MAGIC.

    Parameters
    ----------
    probabilities
        See `sct.eval.imputation.scoring.ImputationModel`.
    train, eval_cells, split, ratio, seeds, max_bags
        See `sct.eval.imputation.protocols.GeneImputation`.
    """

    name = "natural_imputation"

    def __init__(
        self,
        probabilities: Probabilities,
        train: BagSource,
        eval_cells: BagSource,
        split: str = "test",
        ratio: float = RATIO,
        seeds: int = 5,
        max_bags: int = 0,
    ):
        self.train, self.eval_cells, self.split = train, eval_cells, split
        self.ratio, self.seeds, self.max_bags = ratio, seeds, max_bags
        self._probabilities = jax.jit(probabilities)
        self.report: Report | None = None

    def __call__(self, variables: Any) -> Iterator[tuple[str, float]]:
        """Evaluate the model, yield all metrics as (name, value) pairs, and store the table in `report`."""
        outcome = natural_imputation(
            EvalCells.read(self.eval_cells, self.max_bags),
            ImputationModel(self._probabilities, variables),
            self.train,
            ratio=self.ratio,
            seeds=self.seeds,
            magic=False,
            cells_name=f"{self.split} cells",
        )
        self.report = outcome.summary
        for row in outcome.rows:
            for name, values in row.numbers.items():
                yield f"{row.label}/{name}", float(np.mean(values))
