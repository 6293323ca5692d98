"""Evaluation protocols: they take a model's predictions and data and return numbers beside baselines."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sct.data import masking
from sct.data.bags import BagSource
from sct.data.loader import spread
from sct.data.tokenize import digitize, expected_counts
from sct.eval import baselines, metrics
from sct.eval.report import Report
from sct.progress import track

_NOTES = (
    "Scored: masked genes that are expressed; a method that is told so has an easier task.",
    "Levels and their counts follow each cell's own range, masked genes included, for all methods.",
)

Probabilities = Callable[[Any, jax.Array, jax.Array | None], jax.Array]


@dataclasses.dataclass(frozen=True)
class _Predictor:
    """A row of the table: a method, and whether it is told that the masked gene is expressed."""

    name: str
    told: bool


class GeneImputation:
    """Imputation of masked genes (sCT paper, section 4, Table 1), baselines on the same positions.

    In every cell `ratio` of all genes are masked, whatever their level, and the masked genes that are truly
    expressed are scored: MCC of the level, mean absolute error of the raw count. Since only expressed genes
    are scored, a predictor that knows so has an easier task; every method is therefore shown in the form
    that chooses among all levels and, where it has one, in the form that is told that the gene is expressed.
    The most common expressed level is of the second kind.

    Parameters
    ----------
    probabilities
        (variables, masked tokens (B, K, P), coordinates) -> probabilities of levels (B, K, P, num_bins).
    train, held_out
        Exhaustive bags with counts: what baselines are fitted on, and what is scored.
    split
        Name of the held-out split, for the title.
    ratio, seeds
        Share of genes masked; number of draws of the masked positions, over which the spread is given.
    max_bags
        Bags scored, spread evenly over the held-out ones; 0 for all.
    """

    name = "imputation"

    def __init__(
        self,
        probabilities: Probabilities,
        train: BagSource,
        held_out: BagSource,
        split: str = "test",
        ratio: float = 0.15,
        seeds: int = 5,
        max_bags: int = 0,
    ):
        self.train, self.held_out, self.split = train, held_out, split
        self.ratio, self.seeds = ratio, seeds
        self.numbers = spread(len(held_out), max_bags)
        self._probabilities = jax.jit(probabilities)
        self._mask = jax.jit(
            lambda key, tokens: masking.exact_ratio(key, tokens, ratio, held_out.options.num_bins)
        )
        self.report: Report | None = None

    def __call__(self, variables: Any) -> Iterator[tuple[str, float]]:
        """Measure; yields the numbers of the table and keeps it in `report`."""
        frequencies = baselines.level_frequencies(self.train)
        common = baselines.most_common_level(frequencies)
        expressed = baselines.most_common_expressed_level(frequencies)
        knn = baselines.KnnSmoothing(self.train)
        levels: dict[_Predictor, list[list[np.ndarray]]] = {}
        errors: dict[_Predictor, list[list[np.ndarray]]] = {}
        truth: list[list[np.ndarray]] = [[] for _ in range(self.seeds)]

        def record(name: str, told: bool, seed: int, level: np.ndarray, error: np.ndarray) -> None:
            row = _Predictor(name, told)
            for kept, value in ((levels, level), (errors, error)):
                kept.setdefault(row, [[] for _ in range(self.seeds)])[seed].append(value)

        num_bins = self.held_out.options.num_bins
        for number in track(self.numbers, "imputing masked genes"):
            bag = self.held_out.bag(number)
            tokens = jnp.asarray(bag["tokens"])[None]
            coordinates = jnp.asarray(bag["coordinates"])[None] if "coordinates" in bag else None
            for seed in range(self.seeds):
                key = jax.random.fold_in(jax.random.key(seed), number)
                hidden = self._mask(key, tokens)
                shown = masking.apply(tokens, hidden, num_bins)
                predicted = np.asarray(self._probabilities(variables, shown, coordinates))[0]
                mask = np.asarray(hidden)[0]
                cells, genes = np.nonzero(mask & (bag["tokens"] > 0) & (bag["tokens"] < num_bins))
                counts, values = bag["counts"][cells, genes], bag["values"][cells]
                truth[seed].append(bag["tokens"][cells, genes])

                chance = predicted[cells, genes]
                record(
                    "model",
                    False,
                    seed,
                    chance.argmax(-1),
                    np.abs(expected_counts(chance, values) - counts),
                )
                known = np.concatenate([np.zeros_like(chance[:, :1]), chance[:, 1:]], axis=1)
                known /= np.maximum(known.sum(axis=1, keepdims=True), 1e-9)
                record("model", True, seed, known.argmax(-1), np.abs(expected_counts(known, values) - counts))
                for name, told, table in (
                    ("most common level per gene", False, common),
                    ("most common expressed level per gene", True, expressed),
                ):
                    level = table[genes]
                    value = np.take_along_axis(values, level[:, None], axis=1)[:, 0]
                    record(name, told, seed, level, np.abs(value - counts))
                smooth = knn(bag["counts"], mask)[cells, genes]
                level = digitize(np.log1p(smooth), bag["low"][cells], bag["high"][cells], num_bins)
                record("kNN smoothing, k = 5", True, seed, level, np.abs(smooth - counts))
                # Half a count is where the nearest integer turns to zero.
                level = np.where(smooth < 0.5, 0, level)
                record("kNN smoothing, k = 5", False, seed, level, np.abs(smooth - counts))

        true = [np.concatenate(each) for each in truth]
        report = Report(
            f"Imputation of {self.ratio:.0%} masked genes, {self.split} cells "
            f"({len(true[0]):,} masked expressed genes x {self.seeds} draws)",
            ("method", "told expressed", "MCC", "MAE (counts)"),
            notes=_NOTES,
        )
        for row in sorted(levels, key=lambda row: (row.told, row.name != "model", row.name)):
            mcc = [metrics.matthews(t, np.concatenate(p)) for t, p in zip(true, levels[row], strict=True)]
            mae = [float(np.concatenate(e).mean()) for e in errors[row]]
            report.add(row.name, "yes" if row.told else "no", mcc, mae)
            name = f"{row.name}, told" if row.told else row.name
            yield f"{name}/mcc", float(np.mean(mcc))
            yield f"{name}/mae", float(np.mean(mae))
        self.report = report
