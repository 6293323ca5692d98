"""Evaluate a model's prediction of the expression bins of masked genes (ZerOmics paper, section 3.1)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from sct.data.cell_records import CellSource
from sct.data.loader import spread
from sct.eval.imputation.masked_cells import Predict, masked_cells
from sct.eval.reports import report as tables
from sct.progress import track

_TRAINING_CELLS = 5000  # training cells used to count bin frequencies
MODEL, GENE, OVERALL = "cell model", "bins of the gene in training", "bins of all genes in training"
COLUMNS = ("cross-entropy", "accuracy")


class PredictedBins:
    """Evaluate how well a model predicts the bins of masked genes in held-out cells; see `sct.tasks.base.Evaluator`.

    The model is compared with two baselines: the bin frequencies of the masked gene in the training cells, and the bin
    frequencies of all genes in the training cells.

    Parameters
    ----------
    predict
        Function of (variables, records, key) that returns two arrays: the log probabilities of the bins (B, S, N + 1),
        and a mask (B, S) that is True for the masked genes of each cell.
    train, eval_cells
        Training cells and held-out cells. The baselines count the bins of the training cells. The masked genes of the
        held-out cells are predicted.
    num_bins, num_genes
        Number of bins of non-zero values (N), and number of genes.
    cells, seeds
        Maximum number of held-out cells, and number of random masks per cell.
    split
        Name of the held-out split, for the title.
    note
        Sentence added below the table.
    """

    name = "predicted_bins"

    def __init__(
        self, predict: Predict[Any], train: CellSource, eval_cells: CellSource, num_bins: int, num_genes: int,
        cells: int, seeds: int, split: str, note: str = "",
    ):  # fmt: skip
        self.predict, self.train, self.eval_cells = predict, train, eval_cells
        self.num_bins, self.num_genes, self.cells, self.seeds, self.split = (
            num_bins,
            num_genes,
            cells,
            seeds,
            split,
        )
        self.note = note
        self.report: tables.Report | None = None

    def __call__(self, variables: Any) -> Iterator[tuple[str, float]]:
        """Evaluate the model, yield all metrics as (name, value) pairs, and store the table in `report`."""
        overall, of_gene = self._frequencies()
        baselines = {GENE: np.log(of_gene), OVERALL: np.broadcast_to(np.log(overall), of_gene.shape)}
        sums = {name: np.zeros((self.seeds, len(COLUMNS))) for name in (MODEL, *baselines)}
        count = np.zeros(self.seeds)
        for seed, batch, made, masked in masked_cells(
            self.predict, variables, self.eval_cells, self.cells, self.seeds, "predicting masked bins"
        ):
            bins, logs = batch["bins"].astype(int), np.asarray(made)
            genes = (
                np.maximum(batch["genes"], 0)
                if "genes" in batch
                else np.arange(self.num_genes)[None] + 0 * bins
            )
            true, at = bins[masked], genes[masked]
            # Only expressed genes are masked. The baselines give no probability to bin 0, so the model's
            # probabilities are renormalized without bin 0.
            shown = logs[masked][:, 1:]
            shown -= np.logaddexp.reduce(shown, axis=1, keepdims=True)
            for name, table in ((MODEL, shown), *((n, values[at]) for n, values in baselines.items())):
                right = table.argmax(axis=1) == true - 1
                sums[name][seed] += -table[np.arange(len(true)), true - 1].sum(), right.sum()
            count[seed] += len(true)
        number = len(spread(len(self.eval_cells), self.cells))
        report = tables.Report(
            f"bins of masked genes in {number:,} {self.split} cells",
            ("prediction", *COLUMNS),
            better={"cross-entropy": "min", "accuracy": "max"},
            notes=(
                f"Cross-entropy in nats over {self.num_bins} bins. The baselines are bin frequencies in training "
                "cells. The frequencies of a gene are smoothed with 10 pseudocounts, distributed as the bins of all "
                "genes.",
                *filter(None, [self.note]),
            ),
        )
        for name, total in sums.items():
            values = (total / np.maximum(count, 1)[:, None]).T
            report.add(name, *(list(column) for column in values), key=tables.MODEL if name == MODEL else "")
            yield from (
                (f"{name}/{column}", float(v.mean())) for column, v in zip(COLUMNS, values, strict=True)
            )
        self.report = report

    def _frequencies(self) -> tuple[np.ndarray, np.ndarray]:
        """Return two arrays of bin frequencies in the training cells: over all genes (N,), and for each gene (G, N)."""
        counts = np.zeros((self.num_genes, self.num_bins + 1))
        for number in track(spread(len(self.train), _TRAINING_CELLS), "counting bins"):
            record = self.train.record(number)
            expressed = np.flatnonzero(record["bins"])
            genes = record["genes"][expressed] if "genes" in record else expressed
            counts[genes, record["bins"][expressed]] += 1
        counts = counts[:, 1:]
        overall = (counts.sum(axis=0) + 1) / (counts.sum() + self.num_bins)
        smooth = counts + 10 * overall
        return overall, smooth / smooth.sum(axis=1, keepdims=True)
