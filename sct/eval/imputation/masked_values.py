"""Evaluate a model's prediction of the expression values of masked genes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from sct.data.gene_tokens import TokenSource
from sct.data.loader import spread
from sct.eval.imputation.masked_cells import Predict, masked_cells
from sct.eval.imputation.value_baselines import (
    COMPONENTS,
    EXPRESSED,
    GENE,
    GROUPS,
    PSEUDOCOUNTS,
    SIZE,
    TRAINING_CELLS,
    TrainingValues,
)
from sct.eval.reports.report import CONTROL, METHOD, MODEL, REFERENCE, Column, Report

MSE = Column("mse", "MSE")
CORRELATION = Column("correlation", "correlation")
EXPLAINED = Column("explained", "explained")
COLUMNS = (MSE, CORRELATION, EXPLAINED)
TITLES = {"value": "cell model", "mvc": "cell embedding (MVC)"}
PredictValues = Predict[dict[str, Any]]


class PredictedValues:
    """Evaluate how well a model predicts the values of masked genes in held-out cells; see `sct.tasks.base.Evaluator`.

    The model is compared with predictions from the training cells: means of all genes, of the masked gene, and of the
    masked gene in similar cells, and a regression on the known genes of the cell; see
    `sct.eval.imputation.value_baselines`.

    Parameters
    ----------
    predict
        Function (variables, records, key) that returns the predicted values of each head, by name, (B, L) each, and
        which of the L genes of each cell are masked, bool (B, L).
    train, eval_cells
        Training cells, from which the baselines are computed, and held-out cells, whose masked genes are predicted.
    num_rows
        Number of rows of the gene table (V).
    zeros
        Whether values of zero are masked too. If False, the means leave them out.
    cells, seeds
        Maximum number of held-out cells, and number of random masks per cell.
    split
        Name of the held-out split, for the title.
    note
        Sentence added below the table.
    """

    name = "predicted_values"

    def __init__(
        self, predict: PredictValues, train: TokenSource, eval_cells: TokenSource, num_rows: int, zeros: bool,
        cells: int, seeds: int, split: str, note: str = "",
    ):  # fmt: skip
        self.predict, self.train, self.eval_cells = predict, train, eval_cells
        self.num_rows, self.zeros, self.cells, self.seeds = num_rows, zeros, cells, seeds
        self.split, self.note = split, note
        self.report: Report | None = None

    def __call__(self, variables: Any) -> Iterator[tuple[str, float]]:
        """Evaluate the model, yield all metrics as (name, value) pairs, and store the table in `report`."""
        baselines = TrainingValues(self.train, self.num_rows, self.zeros)
        found: dict[str, list[list[np.ndarray]]] = {}
        true: list[list[np.ndarray]] = [[] for _ in range(self.seeds)]
        for each in masked_cells(
            self.predict, variables, self.eval_cells, self.cells, self.seeds, "predicting masked values"
        ):
            true[each.seed].append(each.batch["values"][each.masked])
            named = {
                title: np.asarray(each.made[name])[each.masked]
                for name, title in TITLES.items()
                if name in each.made
            }
            named |= baselines.predictions(each.batch, each.masked)
            for name, values in named.items():
                found.setdefault(name, [[] for _ in range(self.seeds)])[each.seed].append(values)
        number = len(spread(len(self.eval_cells), self.cells))
        report = Report(
            f"values of masked genes in {number:,} {self.split} cells",
            (METHOD, *COLUMNS),
            better={MSE.key: "min", CORRELATION.key: "max", EXPLAINED.key: "max"},
            notes=(
                "MSE is the mean squared error, in squared units of the model's values. The column 'explained' is the "
                f"fraction of the squared error of '{GENE}' that a method removes. The baselines come from up to "
                f"{TRAINING_CELLS:,} training cells. The means have {PSEUDOCOUNTS:.0f} pseudocounts; library sizes and "
                f"numbers of expressed genes are divided into {GROUPS} groups of equal size. '{COMPONENTS}' is "
                f"the better one of '{SIZE}' and '{EXPRESSED}', plus a principal-component ridge regression on the "
                "known genes that the model reads. All choices are made on training cells.",
                *filter(None, [self.note]),
            ),
        )
        for name, parts in found.items():
            scored = [
                scores(np.concatenate(true[seed]), *(np.concatenate(p[seed]) for p in (parts, found[GENE])))
                for seed in range(self.seeds)
            ]
            columns = list(zip(*scored, strict=True))
            # The other heads of the model are not baselines.
            own = CONTROL if name in TITLES.values() else ""
            kind = REFERENCE if name == GENE else MODEL if name == next(iter(found)) else own
            report.add(name, *(list(column) for column in columns), key=kind)
            for column, values in zip(COLUMNS, columns, strict=True):
                yield f"{name}/{column.key}", float(np.mean(values))
        self.report = report


def scores(true: np.ndarray, predicted: np.ndarray, reference: np.ndarray) -> tuple[float, float, float]:
    """Return squared error, correlation, and the fraction of the reference's squared error that is removed.

    The correlation is NaN for constant predictions.
    """
    true, predicted, reference = (np.asarray(x, np.float64) for x in (true, predicted, reference))
    if not len(true):
        return (float("nan"),) * 3
    error, at_most = np.square(predicted - true).mean(), np.square(reference - true).mean()
    varied = predicted.std() > 1e-9 and true.std() > 1e-9
    correlation = float(np.corrcoef(true, predicted)[0, 1]) if varied else float("nan")
    return float(error), correlation, float(1 - error / at_most) if at_most > 0 else float("nan")
