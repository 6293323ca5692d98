"""Evaluate a model's prediction of the expression values of masked genes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sct.data.gene_tokens import TokenSource
from sct.data.loader import spread
from sct.eval.reports.report import METHOD, MODEL, REFERENCE, Column, Report
from sct.progress import track

_TRAINING_CELLS = 5000  # training cells from which the baselines are computed
_BATCH = 8
_GROUPS = 10  # groups of training cells by library size
_PSEUDOCOUNTS = 10.0
MSE = Column("mse", "MSE")
CORRELATION = Column("correlation", "correlation")
EXPLAINED = Column("explained", "explained")
COLUMNS = (MSE, CORRELATION, EXPLAINED)
GENE, SIZE = "mean of the gene in training", "mean by gene and library size"
ALL = "mean of all genes in training"
TITLES = {"value": "cell model", "mvc": "cell embedding (MVC)"}
PredictValues = Callable[[Any, Mapping[str, jax.Array], jax.Array], tuple[dict[str, jax.Array], jax.Array]]


class PredictedValues:
    """Evaluate how well a model predicts the values of masked genes in held-out cells; see `sct.tasks.base.Evaluator`.

    The model is compared with means of the training cells: of all genes, of the masked gene, and of the masked gene in
    cells with a similar library size.

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
        means = TrainingMeans(self.train, self.num_rows, self.zeros)
        predict = jax.jit(self.predict)
        found: dict[str, list[list[np.ndarray]]] = {}
        true: list[list[np.ndarray]] = [[] for _ in range(self.seeds)]
        numbers = spread(len(self.eval_cells), self.cells)
        for start in track(range(0, len(numbers), _BATCH), "predicting masked values"):
            rows = numbers[start : start + _BATCH]
            records = [self.eval_cells.record(number) for number in rows]
            records += records[-1:] * (_BATCH - len(rows))
            batch = {name: np.stack([record[name] for record in records]) for name in records[0]}
            sizes = np.broadcast_to(batch["library_size"][:, None], batch["values"].shape)
            for seed in range(self.seeds):
                key = jax.random.fold_in(jax.random.key(seed), start)
                made, mask = predict(variables, jax.tree.map(jnp.asarray, batch), key)
                masked = np.array(mask)
                masked[len(rows) :] = False
                true[seed].append(batch["values"][masked])
                named = {TITLES[name]: np.asarray(made[name])[masked] for name in TITLES if name in made}
                named |= means.predictions(batch["gene_ids"][masked], sizes[masked])
                for name, values in named.items():
                    found.setdefault(name, [[] for _ in range(self.seeds)])[seed].append(values)
        report = Report(
            f"values of masked genes in {len(numbers):,} {self.split} cells",
            (METHOD, *COLUMNS),
            better={MSE.key: "min", CORRELATION.key: "max", EXPLAINED.key: "max"},
            notes=(
                "MSE is the mean squared error, in squared units of the model's values. The column 'explained' is the "
                f"fraction of the squared error of '{GENE}' that a method removes. The baselines are means over up to "
                f"{_TRAINING_CELLS:,} training cells, with {_PSEUDOCOUNTS:.0f} pseudocounts. Library sizes are divided "
                f"into {_GROUPS} groups of equal size.",
                *filter(None, [self.note]),
            ),
        )
        for name, parts in found.items():
            scored = [
                scores(np.concatenate(true[seed]), *(np.concatenate(p[seed]) for p in (parts, found[GENE])))
                for seed in range(self.seeds)
            ]
            columns = list(zip(*scored, strict=True))
            kind = REFERENCE if name == GENE else MODEL if name == next(iter(found)) else ""
            report.add(name, *(list(column) for column in columns), key=kind)
            for column, values in zip(COLUMNS, columns, strict=True):
                yield f"{name}/{column.key}", float(np.mean(values))
        self.report = report


class TrainingMeans:
    """Means of the values of genes in training cells, as predictions of masked values.

    Parameters
    ----------
    cells
        Training cells.
    num_rows
        Number of rows of the gene table (V).
    zeros
        Whether values of zero count.
    """

    def __init__(self, cells: TokenSource, num_rows: int, zeros: bool):
        records = [cells.record(n) for n in track(spread(len(cells), _TRAINING_CELLS), "averaging values")]
        sizes = np.array([record["library_size"] for record in records])
        self.borders = np.quantile(sizes, np.linspace(0, 1, _GROUPS + 1)[1:-1])
        total, count = np.zeros((2, _GROUPS, num_rows))
        for record, group in zip(records, self.groups(sizes), strict=True):
            kept = ~record["padding_mask"] & (record["gene_ids"] != cells.cls_id)
            if not zeros:
                kept &= record["values"] > 0
            np.add.at(total[group], record["gene_ids"][kept], record["values"][kept])
            np.add.at(count[group], record["gene_ids"][kept], 1)
        self.overall = float(total.sum() / max(count.sum(), 1))
        self.gene = _smoothed(total.sum(axis=0), count.sum(axis=0), self.overall)
        self.by_size = _smoothed(total, count, self.gene)

    def groups(self, sizes: np.ndarray) -> np.ndarray:
        """Return the group of each library size."""
        return np.searchsorted(self.borders, sizes, side="right")

    def predictions(self, rows: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
        """Return the predicted values (n,) of genes, given by their rows (n,), in cells of some library sizes (n,)."""
        return {
            SIZE: self.by_size[self.groups(sizes), rows],
            GENE: self.gene[rows],
            ALL: np.full(len(rows), self.overall),
        }


def _smoothed(total: np.ndarray, count: np.ndarray, prior: Any) -> np.ndarray:
    return (total + _PSEUDOCOUNTS * prior) / (count + _PSEUDOCOUNTS)


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
