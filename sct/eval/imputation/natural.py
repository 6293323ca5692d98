"""Imputation of genes hidden without regard to expression: tests whether probabilities and counts are right.

The sCT paper scores hidden genes that are expressed. A person who imputes a gene does not know whether it is
expressed, so here a share of the *measured* genes of each cell is hidden and every hidden position is scored:
how well expression is told from no expression, whether a probability of 0.3 is right in 30% of cases, and whether
expected counts are those that were counted. Every method answers with probabilities of the levels and an expected
count at the same positions.
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
# Positions scored per draw: enough for three digits of every metric, and a bound on memory and time.
SCORED = 2_000_000
# Hidden counts of a gene (all cells of a draw), as they are expected from all of its counts, from which its ratio of
# imputed to counted means is taken.
_COUNTS_PER_GENE = 20
_CELLS_AT_ONCE = 256
# Below it, counts are Poisson to six digits.
_LEAST_DISPERSION = 1e-6
_ITERATIONS = 50

# Title of a column -> (its key, which is that of the number, and which is better); the two tables of a report.
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
_SCORED = "Measured genes are chosen at random, whether expressed or not, and hidden; all hidden positions are scored."
_EXPRESSION_NOTES = (
    _SCORED,
    "AUROC and average precision: of the probability that a count was measured. Cross-entropy: of the levels, in nats. "
    "ECE: expected calibration error of that probability, 15 bins.",
)
_RANGES = (
    "Levels follow each cell's own range of counts, hidden genes included, for all methods. Expected counts use the "
    "mean counts of levels 2 and up among visible genes. Baselines that expect counts give probabilities by a "
    "negative binomial distribution, whose dispersion is that of known counts around what the method expects."
)
_COUNTS_NOTES = (
    _SCORED,
    "Expected raw counts against counted ones: mean absolute error and Pearson correlation, averaged over genes and "
    "over cells; and the imputed mean of a gene divided by its counted mean, median over genes (1 is unbiased).",
)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Probabilities of the levels (n, num_bins) and expected raw counts (n,) at the scored positions."""

    chance: np.ndarray
    counts: np.ndarray


class Estimator(Protocol):
    """A row of the tables; the attributes are those of `sct.eval.imputation.baselines.ImputationMethod`."""

    name: str
    fitted_on: str
    remark: str

    def estimate(self, eval_cells: EvalCells, masked: Masked) -> Estimate:
        """Estimate the hidden positions, looking at what a method may look at; raises `Unavailable`."""
        ...


class LevelFrequency:
    """How often each gene takes each level in other cells, whatever the cell.

    Parameters
    ----------
    train
        Frequencies of levels in the training studies (`sct.eval.imputation.baselines.level_frequencies`) or, for
        `others`, None.
    others
        Whether they are those of the other cells of the study, all of whose genes are known.
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
        """See `Estimator`."""
        # One further cell, of no particular level: no probability is zero.
        chance = self._of.frequencies(eval_cells, masked) + 1 / eval_cells.num_bins
        chance = (chance / chance.sum(axis=1, keepdims=True)).astype(np.float32)
        return from_levels(masked, chance)


class CountMethod(abc.ABC):
    """A method that expects a count at each position, with negative binomial counts around it.

    The dispersion of a gene is that of counts around what the method expects where the count is known: some of the
    visible genes are hidden as well, and the method is asked for them.
    """

    name: str
    fitted_on: str
    remark: str

    @abc.abstractmethod
    def counts(self, eval_cells: EvalCells, masked: Masked) -> np.ndarray:
        """Expected counts (n,); raises `Unavailable`."""

    def _of_visible(self) -> CountMethod:
        """The method, without a look at hidden counts of other cells: what was hidden tells no dispersion."""
        return self

    def estimate(self, eval_cells: EvalCells, masked: Masked) -> Estimate:
        """See `Estimator`."""
        known = _hide_more(eval_cells, masked)
        expected = self._of_visible().counts(eval_cells, known)
        dispersion = dispersions(known.genes, expected, known.counts, masked.mask.shape[1])
        return negative_binomial(masked, self.counts(eval_cells, masked), dispersion)


def _hide_more(eval_cells: EvalCells, masked: Masked) -> Masked:
    """A draw in which a share of what is visible is hidden, too; that is what is scored."""
    rng = np.random.default_rng(len(masked.cells))
    more = masked.shown & (rng.random(masked.mask.shape, np.float32) < RATIO)
    places = np.flatnonzero(more)
    if len(places) > SCORED:
        places = np.sort(rng.choice(places, SCORED, replace=False))
    return Masked.of(eval_cells, masked.mask | more, np.divmod(places, more.shape[1]))


class GeneMean(CountMethod):
    """Mean count of each gene, scaled to the cell's library size.

    The library size is that of the measured genes that are visible in the cell.

    Parameters
    ----------
    fitted_on
        `TRAINING`; `OTHER_CELLS`, of which all genes are known; or `THESE_CELLS`, of which what is hidden is not.
    train
        See `training_means`.
    """

    remark = ""

    def __init__(self, fitted_on: str, train: tuple[np.ndarray, np.ndarray] | None = None):
        self.name, self.fitted_on, self._train = "mean per gene, by library size", fitted_on, train

    def _of_visible(self) -> CountMethod:
        return GeneMean(THESE_CELLS) if self.fitted_on == OTHER_CELLS else self

    def counts(self, eval_cells: EvalCells, masked: Masked) -> np.ndarray:
        """See `CountMethod`."""
        if self.fitted_on == TRAINING and self._train is None:
            raise Unavailable("no training studies were given")
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
            if self._train is None:  # a cell does not tell of itself
                total, number = np.maximum(total - known[block].toarray(), 0), number - shown[block]
            mean = np.divide(total, number, out=np.zeros_like(total), where=number > 0)
            average = mean.sum(axis=1, keepdims=True) / np.maximum((number > 0).sum(axis=1, keepdims=True), 1)
            # One further cell with the average of all genes, so that no gene has the mean zero.
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
    """Mean count (G,) of each gene in an average training cell, and the number of cells (G,) that measured it.

    Maximum likelihood of total = depth of the study x mean of the gene, over the genes that each study measured, so
    that a panel of few genes and a whole transcriptome agree about the genes that they share.
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
    """A method that smooths counts over similar cells; its attributes are those of `baselines.ImputationMethod`."""

    name: str
    fitted_on: str
    remark: str

    def smooth(self, eval_cells: EvalCells, masked: Masked) -> tuple[np.ndarray, np.ndarray]:
        """Mean counts (n,) at the scored positions, and of how many cells (n,); raises `Unavailable`."""
        ...


class Smoothed(CountMethod):
    """A method that smooths counts over similar cells.

    Few neighbours say zero where the gene is only rare, so the mean of the gene counts as one more neighbour.

    Parameters
    ----------
    method
        Whose counts are taken.
    gene_mean
        Of the same cells.
    """

    def __init__(self, method: Smoother, gene_mean: GeneMean):
        self.name, self.fitted_on = method.name, method.fitted_on
        self.remark = "; ".join(filter(None, (method.remark, "the gene's mean counts as one cell more")))
        self._method, self._mean = method, gene_mean

    def counts(self, eval_cells: EvalCells, masked: Masked) -> np.ndarray:
        """See `CountMethod`."""
        smoothed, cells = self._method.smooth(eval_cells, masked)
        return (cells * smoothed + self._mean.counts(eval_cells, masked)) / (cells + 1)


class ModelEstimator:
    """A model, whose probabilities are those of an ordinary gene."""

    def __init__(self, model: ImputationModel):
        self.name, self.fitted_on, self.remark = model.name, model.fitted_on, model.remark
        self._model = model

    def estimate(
        self, eval_cells: EvalCells, masked: Masked, tick: Callable[[int], None] = lambda bags: None
    ) -> Estimate:
        """See `Estimator`; `tick` is told of bags that are done."""
        chance = self._model.chances(eval_cells, masked, tick)
        return from_levels(masked, chance)


def from_levels(masked: Masked, chance: np.ndarray) -> Estimate:
    """Estimate of probabilities of levels (n, num_bins)."""
    low, high, means = (values[masked.cells] for values in (masked.low, masked.high, masked.means))
    return Estimate(chance, expected_counts(chance, means, low, high))


def _blocks(masked: Masked) -> Iterator[tuple[slice, slice]]:
    """Cells, some at a time, and their part of the scored positions."""
    for first in range(0, len(masked.mask), _CELLS_AT_ONCE):
        stop = min(first + _CELLS_AT_ONCE, len(masked.mask))
        yield slice(first, stop), slice(*np.searchsorted(masked.cells, [first, stop]))


def dispersions(genes: np.ndarray, mean: np.ndarray, counts: np.ndarray, num_genes: int) -> np.ndarray:
    """Dispersion (`num_genes`,) of each gene, where the variance of a count is mean + dispersion * mean^2.

    By moments, from counts (n,) of genes (n,) around their means (n,). Few counts say little of a gene's dispersion, so
    it is drawn towards the mean of all genes, whose standard deviation is taken to be as large as it is itself.
    """
    mean, counts = mean.astype(np.float64), counts.astype(np.float64)

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(genes, weights=values, minlength=num_genes)

    # Around what the gene has here: a mean that is wrong for a whole study is no dispersion.
    mean = mean * ((total(counts) + 1) / (total(mean) + 1))[genes]
    square = total(mean**2)
    told = square > 0
    own = total((counts - mean) ** 2 - mean)[told] / square[told]
    overall = 0.0
    for _ in range(2):  # the weights of the mean depend on the mean
        variance = mean + overall * mean**2
        error = total(variance + 2 * variance**2)[told] / square[told] ** 2
        overall = max(float((own / error).sum() / (1 / error).sum()), 0.0) if told.any() else 0.0
    weight = overall**2 / (overall**2 + error) if overall > 0 else np.zeros(int(told.sum()))
    found = np.full(num_genes, overall)
    found[told] = np.maximum(weight * own + (1 - weight) * overall, 0)
    return found


def negative_binomial(masked: Masked, mean: np.ndarray, dispersion: np.ndarray) -> Estimate:
    """Negative binomial counts of given means (n,) and dispersions of genes (P,).

    Probabilities of the levels follow from the range of each cell. A dispersion of zero is a Poisson distribution.
    """
    num_bins = masked.medians.shape[1]
    # Levels follow the exact logarithms of counts, which `low` and `high` are up to the precision of float32.
    low, high = (np.log1p(np.rint(np.expm1(x.astype(np.float64)))) for x in (masked.low, masked.high))
    borders = level_borders(low, high, num_bins)
    # A cell whose range has width zero has level 1 alone.
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
    """The model, and simple methods at the same positions."""
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
    """Numbers of a method, one of each draw, or the reason why there are none (`remark`).

    `key` is `sct.eval.reports.report.MODEL` for the model, "" for baselines.
    """

    method: str
    fitted_on: str
    remark: str
    key: str = ""
    numbers: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    reliability: list[metrics.Reliability] = dataclasses.field(default_factory=list)

    @property
    def label(self) -> str:
        """Name of the row beside others: the method, and what a baseline is fitted on."""
        return self.method if self.key == MODEL else f"{self.method}, {self.fitted_on}"

    def score(self, eval_cells: EvalCells, masked: Masked, estimate: Estimate) -> None:
        """Add the numbers of one draw."""
        expressed = masked.levels > 0  # noise genes are read as unexpressed
        probability = 1 - estimate.chance[:, 0]
        table = metrics.reliability(expressed, probability)
        genes, cells = masked.mask.shape[1], len(masked.mask)
        error = np.abs(estimate.counts - masked.counts)
        imputed, is_target, hidden = (
            np.bincount(masked.genes, weights=values, minlength=genes)
            for values in (estimate.counts, masked.counts, np.ones(len(masked.genes)))
        )
        # Chosen by all counts: hidden ones would choose genes of which many happened to be hidden.
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
    """Mean over the groups that have a value of the mean within the group."""
    sums = np.bincount(group, weights=values, minlength=len(sizes))
    return _mean(np.divide(sums, sizes, out=np.full(len(sizes), np.nan), where=sizes > 0))


@dataclasses.dataclass(frozen=True)
class NaturalResult:
    """Result of the protocol.

    Attributes
    ----------
    title
        What was hidden, of which cells.
    ratio
        Share of the measured genes that was hidden.
    rows
        The model first.
    positions
        Scored positions of each draw.
    whole_genes
        Whether genes were hidden in all cells.
    """

    title: str
    ratio: float
    rows: list[NaturalRow]
    positions: list[int]
    whole_genes: bool = False

    axis = "ratio"

    @property
    def name(self) -> str:
        """Name of the protocol."""
        return f"natural imputation{' of whole genes' * self.whole_genes}"

    def report(self, columns: dict[str, tuple[str, str]], what: str, notes: tuple[str, ...]) -> Report:
        """A table of some numbers."""
        draws = len(self.positions)
        expressed = [x for row in self.rows for x in row.numbers.get("expressed", ())][:draws]
        share = f", {np.mean(expressed):.1%} expressed" if expressed else ""
        report = Report(
            f"{self.title}: {what} ({sum(self.positions):,} hidden positions in {draws} "
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
        """The tables."""
        return [
            self.report(EXPRESSION, "expression", (*_EXPRESSION_NOTES, _RANGES)),
            self.report(COUNTS, "counts", (*_COUNTS_NOTES, _RANGES)),
        ]

    @property
    def summary(self) -> Report:
        """One table of the most important numbers."""
        return self.report(
            SUMMARY, "expression and counts", (*_EXPRESSION_NOTES, *_COUNTS_NOTES[1:], _RANGES)
        )

    def labels(self, key: str) -> list[str]:
        """Names in `reliability` of the rows with a key."""
        return [row.label for row in self.rows if row.key == key]

    @property
    def reliability(self) -> dict[str, metrics.Reliability]:
        """Reliability of each method's probability of expression, all draws together."""
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
        """All numbers, for JSON."""
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
    """Imputation of measured genes hidden without regard to expression, all of them scored.

    Parameters
    ----------
    ratio
        Share of the measured genes of each cell that is hidden.
    whole_genes
        Whether the same genes are hidden in all cells, as `sct.tl.impute(genes=...)` hides them, and not
        other ones in each cell.
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
        "imputing genes hidden in all cells" if whole_genes else "imputing hidden genes", units
    ) as bar:
        for seed in range(seeds):
            masked = hide(eval_cells, ratio, seed, SCORED)
            positions.append(len(masked.cells))
            for row, method in zip(rows, methods, strict=True):
                if isinstance(method, ModelEstimator):
                    row.score(eval_cells, masked, method.estimate(eval_cells, masked, bar.update))
                    continue
                bar.update(1)
                if seed and not row.numbers:  # it could not run at the first draw
                    continue
                try:
                    row.score(eval_cells, masked, method.estimate(eval_cells, masked))
                except SctError:
                    raise
                except Exception as error:  # a defect of a library must not cost the table
                    known = isinstance(error, Unavailable)
                    reason = (str(error).splitlines() or [""])[0]
                    row.remark = reason if known else f"{type(error).__name__}: {reason}"
                    row.numbers, row.reliability = {}, []
    what = f"{ratio:.0%} of the measured genes {'hidden in all ' if whole_genes else 'of '}{cells_name}"
    return NaturalResult(f"Natural imputation, {what}", ratio, rows, positions, whole_genes)


class NaturalImputation:
    """`natural_imputation` as the measurement after training; without MAGIC.

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
        """Measure; yields the numbers and keeps the table in `report`."""
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
