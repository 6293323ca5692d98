"""Score a model and the baselines on the same masked (cell, gene) pairs, and make the result tables."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sct.data import masking
from sct.data.tokenize import level_average
from sct.errors import SctError
from sct.eval import metrics
from sct.eval.imputation.baselines import (
    OTHER_CELLS,
    TRAINING,
    ImputationMethod,
    LevelPrediction,
    Unavailable,
)
from sct.eval.imputation.eval_cells import EvalCells, Masked
from sct.eval.reports.report import FITTED_ON, METHOD, MODEL, REFERENCE, REMARK, Column, Report

GIVEN = Column("given_expressed", "given expressed")
NUMBERS = (Column("mcc", "MCC"), Column("delta_mcc", "ΔMCC"), Column("mae", "MAE (counts)"))
COLUMNS = (METHOD, FITTED_ON, GIVEN, *NUMBERS, REMARK)
REFERENCE_NAME = f"most common expressed level per gene, {OTHER_CELLS}"
_NOTES = (
    "Only masked genes that are expressed are scored. Methods marked 'given expressed' know this, so their task is "
    "easier.",
    f"Row 1 is the reference baseline: the {REFERENCE_NAME}. It knows every gene of those cells. ΔMCC is the MCC of a "
    "method minus the MCC of the reference at the same masked positions.",
)
OWN_RANGES = (
    "For all methods, levels and level counts use the cell's own range of counts, including its masked genes."
)
BAG_RANGES = (
    "True levels follow each cell's own range. Predictions of all methods use the mean range and the mean level counts "
    "of the visible cells of the bag, so that no method knows the library size of a masked cell."
)

Draw = tuple[Masked, Mapping[str, np.ndarray]]
Probabilities = Callable[[Any, jax.Array, jax.Array | None], jax.Array]


class ImputationModel:
    """Use a trained model as an imputation method.

    Parameters
    ----------
    probabilities
        Function of the variables, the masked tokens (B, K, P), and the coordinates (B, K, 2) or None. The function
        returns probabilities of the expression levels (B, K, P, num_bins), corrected for the masking rates in training.
    variables
        Parameters of the model.
    odds
        Factor by which `predict` multiplies the odds of being expressed when it chooses among all levels. The factor
        reproduces the evaluation of the sCT paper, whose training loss has the same effect (`sct.data.class_prior`).
    name, fitted_on, remark
        See `sct.eval.imputation.baselines.ImputationMethod`.
    bags_per_batch
        Number of bags that the model reads at once (B); 0 chooses the number from the size of a bag.
    """

    def __init__(
        self,
        probabilities: Probabilities,
        variables: Any,
        *,
        odds: float = 1.0,
        name: str = "model",
        fitted_on: str = TRAINING,
        remark: str = "",
        bags_per_batch: int = 0,
    ):
        self.name, self.fitted_on, self.remark = name, fitted_on, remark
        self.variables, self.odds, self.bags_per_batch = variables, odds, bags_per_batch
        self._probabilities = jax.jit(probabilities)

    def chances(
        self, eval_cells: EvalCells, masked: Masked, tick: Callable[[int], None] = lambda bags: None
    ) -> np.ndarray:
        """Return the predicted probability of each expression level for each scored pair, (n, num_bins).

        `tick` is called with the number of bags finished since the last call.
        """
        num_bins = eval_cells.num_bins
        chance = np.zeros((len(masked.cells), num_bins), np.float32)
        for batch in eval_cells.batches(self.bags_per_batch):
            mask = eval_cells.padded(batch, masked.mask, False)
            tokens = eval_cells.padded(batch, eval_cells.tokens, num_bins)
            coordinates = None
            if eval_cells.spatial and eval_cells.coordinates is not None:
                coordinates = jnp.asarray(eval_cells.padded(batch, eval_cells.coordinates, np.nan))
            elif eval_cells.spatial:
                coordinates = jnp.full((*tokens.shape[:2], 2), jnp.nan, jnp.float32)
            shown = masking.apply(jnp.asarray(tokens), jnp.asarray(mask), num_bins)
            predicted = np.asarray(self._probabilities(self.variables, shown, coordinates))
            part = slice(*np.searchsorted(masked.cells, [batch.cells.start, batch.cells.stop]))
            cell = masked.cells[part] - batch.cells.start
            chance[part] = predicted[batch.bag[cell], batch.slot[cell], masked.genes[part]]
            tick(len(np.unique(batch.bag)))
        return chance

    def predict(
        self, eval_cells: EvalCells, masked: Masked, tick: Callable[[int], None] = lambda bags: None
    ) -> dict[bool, LevelPrediction]:
        """Predict expression levels and raw counts twice: with and without knowing that the genes are expressed.

        The predicted count is the expected median count of the levels, as in the sCT paper.
        """
        chance = self.chances(eval_cells, masked, tick)
        tilted, known = chance.copy(), chance
        tilted[:, 1:] *= self.odds
        known[:, 0] = 0
        medians = masked.medians[masked.cells]
        out = {}
        for given_expressed, each in ((False, tilted), (True, known)):
            each /= np.maximum(each.sum(axis=1, keepdims=True), 1e-30)
            out[given_expressed] = LevelPrediction(each.argmax(axis=1), level_average(each, medians))
        return out


@dataclasses.dataclass
class ScoreRow:
    """Hold the metrics of one method, with or without the knowledge that the masked genes are expressed.

    Attributes
    ----------
    method, fitted_on, remark
        See `sct.eval.imputation.baselines.ImputationMethod`. If the method could not run, `remark` is the reason.
    given_expressed
        Whether the method knows that the masked genes are expressed; None if it could not run.
    mcc, delta_mcc, mae, msle
        One number per random mask: MCC of the expression levels, MCC minus the MCC of the reference baseline, mean
        absolute error of the raw counts, and mean squared error of the log1p counts.
    confusion
        int (num_bins, num_bins): confusion matrix of true (rows) and predicted (columns) levels, summed over the masks.
    both
        Whether the method has two rows: one that knows that the masked genes are expressed, and one that does not. If
        so, `label` must name the variant.
    key
        `sct.eval.reports.report.MODEL` for the model, `REFERENCE` for the reference baseline, "" for other baselines.
    """

    method: str
    fitted_on: str
    given_expressed: bool | None
    remark: str
    mcc: list[float] = dataclasses.field(default_factory=list)
    delta_mcc: list[float] = dataclasses.field(default_factory=list)
    mae: list[float] = dataclasses.field(default_factory=list)
    msle: list[float] = dataclasses.field(default_factory=list)
    confusion: np.ndarray | None = None
    both: bool = True
    key: str = ""

    @property
    def label(self) -> str:
        """Return a unique name of the row: the method and the cells it is fitted on.

        If the method has two rows, "given expressed" is added to the name of one of them.
        """
        name = self.method if self.key == MODEL else f"{self.method}, {self.fitted_on}"
        return f"{name}, given expressed" if self.given_expressed and self.both else name

    def score(self, masked: Masked, prediction: LevelPrediction, chosen: np.ndarray, num_bins: int) -> None:
        """Compute the metrics of one random mask and append them.

        The mask `chosen` (n,) is True for the (cell, gene) pairs to use.
        """
        true, levels = masked.levels[chosen].astype(np.int64), prediction.levels[chosen].astype(np.int64)
        truth, counts = masked.counts[chosen], np.asarray(prediction.counts[chosen], np.float64)
        with warnings.catch_warnings():
            # scikit-learn warns if all levels are equal; the MCC is then 0, which is correct.
            warnings.filterwarnings("ignore", message="A single label")
            self.mcc.append(metrics.matthews(true, levels))
        self.mae.append(float(metrics.mean_absolute_error(truth, counts)) if len(true) else math.nan)
        squares = (np.log1p(truth.astype(np.float64)) - np.log1p(counts)) ** 2
        self.msle.append(float(squares.mean()) if len(true) else math.nan)
        matrix = np.bincount(true * num_bins + levels, minlength=num_bins**2).reshape(num_bins, num_bins)
        self.confusion = matrix if self.confusion is None else self.confusion + matrix

    def as_dict(self) -> dict[str, Any]:
        """Return the row as a dict that JSON can store."""
        out = {**dataclasses.asdict(self), "label": self.label}
        return {key: value for key, value in out.items() if key not in ("confusion", "both")}


@dataclasses.dataclass(frozen=True)
class Setting:
    """Hold the result of one setting of a protocol, such as one fraction of masked genes; it becomes one table.

    Attributes
    ----------
    name, value
        Title of the setting, and its value on the horizontal axis of a plot, such as the fraction of masked genes.
    rows
        Rows of the table.
    positions
        Number of scored (cell, gene) pairs in each draw of the random mask.
    notes
        Further notes below the table.
    ranges
        Note on how expression levels and counts are derived from the expression range of a cell.
    """

    name: str
    value: float | str
    rows: list[ScoreRow]
    positions: list[int]
    notes: tuple[str, ...] = ()
    ranges: str = OWN_RANGES

    def report(self) -> Report:
        """Return the result table of this setting."""
        total, draws = sum(self.positions), len(self.positions)
        title = f"{self.name} ({total:,} masked expressed genes in {draws} draw{'s' * (draws != 1)})"
        report = Report(title, COLUMNS, notes=(*_NOTES, self.ranges, *self.notes))
        for row in self.rows:
            given_expressed = "-" if row.given_expressed is None else "yes" if row.given_expressed else "no"
            numbers: tuple[Any, ...] = (row.mcc, row.delta_mcc, row.mae) if row.mcc else ("-", "-", "-")
            report.add(row.method, row.fitted_on, given_expressed, *numbers, row.remark, key=row.key)
        return report


@dataclasses.dataclass(frozen=True)
class ProtocolResult:
    """Hold the results of all settings of an imputation protocol.

    Attributes
    ----------
    name
        Name of the protocol.
    axis
        Quantity that differs between the settings: "ratio", "cells" (number of masked cells) or "sparsity".
    settings
        Results of the settings.
    """

    name: str
    axis: str
    settings: list[Setting]

    @property
    def reports(self) -> list[Report]:
        """Return one result table per setting."""
        return [setting.report() for setting in self.settings]

    @property
    def curves(self) -> dict[str, list[tuple[Any, list[float]]]]:
        """Return the MCCs of each row in each setting, as {row label: [(setting, [MCC of each draw]), ...]}."""
        curves: dict[str, list[tuple[Any, list[float]]]] = {}
        for setting in self.settings:
            for row in setting.rows:
                if row.mcc:
                    curves.setdefault(row.label, []).append((setting.value, row.mcc))
        return curves

    def labels(self, key: str) -> list[str]:
        """Return the labels of all table rows that have the given key."""
        rows = (row for setting in self.settings for row in setting.rows)
        return list(dict.fromkeys(row.label for row in rows if row.key == key))

    @property
    def confusion(self) -> dict[Any, dict[str, np.ndarray]]:
        """Return the confusion matrices of the model; rows are true levels and columns are predicted levels.

        The result has the form {value of the setting: {row label: (num_bins, num_bins)}}.
        """
        return {
            setting.value: {
                row.label: row.confusion
                for row in setting.rows
                if row.key == MODEL and row.confusion is not None
            }
            for setting in self.settings
        }

    def as_dict(self) -> dict[str, Any]:
        """Return all numbers as a dict that JSON can store."""
        settings = [
            {
                self.axis: setting.value,
                "title": setting.name,
                "positions": setting.positions,
                "rows": [row.as_dict() for row in setting.rows],
                "confusion": {k: v.tolist() for k, v in self.confusion[setting.value].items()},
                "notes": [setting.ranges, *setting.notes],
            }
            for setting in self.settings
        ]
        return {"protocol": self.name, "axis": self.axis, "settings": settings, "curves": self.curves}


def _answer(
    method: ImputationMethod, eval_cells: EvalCells, masked: Masked, tick: Callable[[int], None]
) -> dict[bool, LevelPrediction] | str:
    """Run a method and return its predictions, or the reason why the method cannot run."""
    try:
        if isinstance(method, ImputationModel):
            return method.predict(eval_cells, masked, tick)
        predictions = method.predict(eval_cells, masked)
        tick(1)
    except Unavailable as reason:
        tick(1)
        return str(reason)
    except Exception as error:
        # A library error in one baseline must not lose the whole table. Errors of the model or the data are raised.
        if isinstance(method, ImputationModel) or isinstance(error, SctError):
            raise
        tick(1)
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return predictions


def measure(
    eval_cells: EvalCells,
    methods: Sequence[ImputationMethod],
    draws: Iterable[Callable[[], Draw]],
    tick: Callable[[int], None] = lambda units: None,
) -> tuple[dict[str, list[ScoreRow]], dict[str, list[int]]]:
    """Score all methods on the same masked (cell, gene) pairs.

    Parameters
    ----------
    eval_cells
        Cells to score.
    methods
        Imputation methods. The first one is the reference baseline.
    draws
        List of functions. Each function returns one random mask (`Masked`), and the groups of its scored pairs as a
        dict {group: mask (n,)}. Groups are scored separately, and all draws have the same groups.
    tick
        Progress callback, called with the number of finished units of work: bags for the model, draws for the
        baselines.

    Returns
    -------
    Two dicts with the groups as keys. The first holds the rows of each group, in the order reference baseline, model,
    other methods. The second holds the number of scored pairs of each group in each draw. A method that fails in one
    draw has a single row with the reason.
    """
    rows: dict[str, dict[tuple[int, bool], ScoreRow]] = {}
    positions: dict[str, list[int]] = {}
    reasons: dict[int, str] = {}
    keys = [MODEL if isinstance(method, ImputationModel) else "" for method in methods]
    keys[0] = keys[0] or REFERENCE
    for make in draws:
        masked, groups = make()
        for group, chosen in groups.items():
            positions.setdefault(group, []).append(int(np.count_nonzero(chosen)))
        for number, method in enumerate(methods):
            answer = reasons.get(number) or _answer(method, eval_cells, masked, tick)
            if isinstance(answer, str):
                reasons[number] = answer
                continue
            for given_expressed, prediction in sorted(answer.items()):
                for group, chosen in groups.items():
                    row = rows.setdefault(group, {}).setdefault(
                        (number, given_expressed),
                        ScoreRow(
                            method.name,
                            method.fitted_on,
                            given_expressed,
                            method.remark,
                            both=len(answer) > 1,
                            key=keys[number],
                        ),
                    )
                    row.score(masked, prediction, chosen, eval_cells.num_bins)
    tables = {}
    for group in positions:
        table = []
        for number, method in enumerate(methods):
            if number in reasons:
                table.append(ScoreRow(method.name, method.fitted_on, None, reasons[number], key=keys[number]))
            else:
                table += [row for (n, _), row in rows[group].items() if n == number]
        reference = table[0].mcc
        for row in table:
            row.delta_mcc = [mcc - base for mcc, base in zip(row.mcc, reference, strict=False)]
        tables[group] = [table[0], *sorted(table[1:], key=lambda row: row.key != MODEL)]
    return tables, positions
