"""Compare generated cells with real cells, with controls, and with baseline generators that need no model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from sct.checks import check_at_least, check_not_empty, check_one_each
from sct.data.normalization import log_expression
from sct.errors import ConfigError, DataError, MissingExtraError
from sct.eval import metrics
from sct.eval.generation.measures import (
    KS,
    QUALITY,
    CellSet,
    expression_distances,
    gromov_wasserstein,
    mean_correlations,
    nearest_label_accuracy,
    sentence_quality,
    token_distances,
)
from sct.eval.reports.report import CONTROL, MODEL, Column, Report
from sct.extras import load_extra
from sct.progress import track

GENERATED, SHUFFLED = "generated", "generated, labels shuffled"
REAL, COPIED, PROFILE = "other real cells", "copied training cells", "mean profile of the label"
CHANCE, MAJORITY = "guess by frequency", "most common label"
TRAINING, HELD_OUT = "training cells", "held-out cells"
UNDEFINED = "n/a"
CORRELATIONS = ("Pearson", "Spearman", "R2")
Express = Callable[[sparse.csr_matrix], tuple[Any, Sequence[str] | None]]


@dataclasses.dataclass(frozen=True)
class GenerationOptions:
    """Options of the evaluation of generated cells.

    Attributes
    ----------
    seeds
        Number of random draws of the compared cells. The draws have the seeds 0, 1, ...
    ks
        Numbers of neighbors (k) of the k-NN accuracy.
    per_label
        Maximum number of cells per label (500 in the paper).
    max_cells
        Maximum number of cells per set for the Gromov-Wasserstein discrepancy; 0 skips this metric.
    variable_genes
        Perturbations only: number of highly variable genes, selected in the training cells; 0 for all genes.
    differential_genes
        Perturbations only: number of differential genes per condition. These are the genes whose expression differs
        most between the condition and its opposite condition (such as the control).
    log_base
        Perturbations only: base of the logarithm of expression.
    """

    seeds: int = 5
    ks: tuple[int, ...] = KS
    per_label: int = 500
    max_cells: int = 1000
    variable_genes: int = 5000
    differential_genes: int = 20
    log_base: float = 10.0

    def __post_init__(self) -> None:
        least = {"seeds": 1, "per_label": 1, "max_cells": 0, "variable_genes": 0, "differential_genes": 2}
        for name, value in least.items():
            check_at_least(name, getattr(self, name), value)
        check_not_empty("ks", self.ks)
        for k in self.ks:
            check_at_least("ks", k, 1)


def log_normalized(counts: sparse.csr_matrix) -> tuple[sparse.csr_matrix, None]:
    """Convert raw counts (N, G) to log10(1 + counts per 10,000) (Cell2Sentence, equation 1).

    Return two values: this expression, and None in place of cell sentences.
    """
    return sparse.csr_matrix(log_expression(counts, np.float64) / np.log(10)), None


def profile_counts(
    counts: Any, labels: Any, asked: Any, rng: np.random.Generator
) -> tuple[sparse.csr_matrix, np.ndarray]:
    """Draw cells from the mean expression profile of their label.

    The drawn cells are a baseline: they follow the mean of each label, but not how genes vary together within a label.

    Parameters
    ----------
    counts, labels
        (T, G) raw counts and (T,) labels of the training cells.
    asked
        (M,) label of each cell to draw.
    rng
        Random number generator.

    Returns
    -------
    Two values: the raw counts (M, G) of the drawn cells, and the row numbers (M,) of the training cells that set their
    total counts. For each drawn cell, a random training cell with the same label is chosen. The drawn cell is a
    multinomial sample from the summed counts of the label, with the total count of the chosen training cell. A training
    cell is chosen twice only if the label has fewer training cells than drawn cells.

    Raises
    ------
    DataError
        Counts are negative or fractional, lengths differ, or a label has no training cell.
    """
    counts, labels = sparse.csr_matrix(counts), np.asarray(labels, dtype=object)
    asked = np.asarray(asked, dtype=object)
    check_one_each("training labels", len(labels), "cells", counts.shape[0])
    if ((counts.data < 0) | (counts.data % 1 != 0)).any():
        raise DataError(
            "the training counts have negative or fractional values, but must be whole numbers of at least 0: pass "
            "raw counts."
        )
    if missing := sorted(map(str, set(asked) - set(labels))):
        raise DataError(
            f"cells with the label {missing[0]!r} are requested, but no training cell has this "
            "label: remove the label from the request or add training cells."
        )
    totals = np.asarray(counts.sum(axis=1)).ravel().astype(np.int64)
    donors = np.empty(len(asked), np.int64)
    blocks, order = [], []
    for label in pd.unique(asked):
        rows, places = np.flatnonzero(labels == label), np.flatnonzero(asked == label)
        summed = np.asarray(counts[rows].sum(axis=0), dtype=float).ravel()
        donors[places] = rng.choice(rows, len(places), replace=len(places) > len(rows))
        drawn = rng.multinomial(totals[donors[places]], summed / max(summed.sum(), 1))
        blocks.append(sparse.csr_matrix(drawn.astype(np.float32)))
        order.append(places)
    return sparse.vstack(blocks, format="csr")[np.argsort(np.concatenate(order))], donors


def _split(
    generated: CellSet, real: CellSet, labels: Sequence[Any], options: GenerationOptions, seed: int
) -> tuple[CellSet, CellSet, CellSet]:
    """Split the real cells into halves; return the reference half, sampled generated cells, and the other half.

    For each label, the second and the third set have the same number of cells.
    """
    rng = np.random.default_rng(seed)
    parts: list[list[np.ndarray]] = [[], [], []]
    for label in labels:
        true = rng.permutation(np.flatnonzero(real.labels == label))
        made = rng.permutation(np.flatnonzero(generated.labels == label))
        half = (len(true) + 1) // 2
        number = min(len(true) - half, len(made), options.per_label)
        rows = (true[:half][: options.per_label], made[:number], true[half:][:number])
        for part, each in zip(parts, rows, strict=True):
            part.append(each)
    # Shuffle the reference cells, because the order of rows decides ties of distances.
    chosen = [rng.permutation(np.concatenate(parts[0])), *map(np.concatenate, parts[1:])]
    return real.take(chosen[0]), generated.take(chosen[1]), real.take(chosen[2])


def _shared_labels(generated: CellSet, real: CellSet, training: Any = None) -> tuple[list[Any], list[str]]:
    """Return the labels that can be compared, and notes on the excluded cells.

    A label can be compared if it has generated cells, at least two real cells and, if `training` is given, a training
    cell.
    """
    if generated.expression.shape[1] != real.expression.shape[1]:
        raise DataError(
            f"generated cells have {generated.expression.shape[1]:,} genes, but real cells have "
            f"{real.expression.shape[1]:,}: use the same genes for both."
        )
    sizes = pd.Series(real.labels).value_counts()
    has = [sizes.reindex(pd.unique(generated.labels), fill_value=0) > 1]
    if training is not None:
        has.append(pd.Series(has[0].index.isin(training), has[0].index))
    keep = np.logical_and.reduce(has)
    labels = sorted(has[0].index[keep], key=str)
    if not labels:
        needed = "at least two real cells" + (
            " and at least one training cell" if training is not None else ""
        )
        raise DataError(
            f"none of the labels of the generated cells has {needed}, so no label can be compared: generate cells for "
            "labels of real cells."
        )
    left, unasked = (~pd.Series(cells.labels).isin(labels) for cells in (generated, real))
    notes = []
    if left.any():
        notes.append(
            f"{left.sum():,} cells generated for {len(keep) - len(labels)} labels are excluded: these labels have "
            f"fewer than two real cells{'' if training is None else ' or no training cell'}."
        )
    if unasked.any():
        notes.append(f"{unasked.sum():,} real cells of labels that are not compared are excluded.")
    return labels, notes


def _column(k: int, space: str) -> str:
    return f"{k}-NN accuracy" + (" (Levenshtein)" if space == "sentences" else "")


def _by_label(
    cells: CellSet, distances: Mapping[str, np.ndarray], reference: CellSet, options: GenerationOptions
) -> dict[str, float]:
    """Compute the metrics that depend on labels, as a dict by column.

    These metrics are the k-NN accuracies and the correlations of mean profiles.
    """
    values: dict[str, float] = {}
    for space, matrix in distances.items():
        accuracies = nearest_label_accuracy(matrix, reference.labels, cells.labels, options.ks)
        values |= {_column(k, space): accuracy for k, accuracy in accuracies.items()}
    means = mean_correlations(cells, reference).mean()
    return values | dict(zip(CORRELATIONS, means.astype(float), strict=True))


def _distances(cells: CellSet, reference: CellSet, spaces: Sequence[str]) -> dict[str, np.ndarray]:
    found = {"expression": expression_distances(cells.expression, reference.expression)}
    if "sentences" in spaces and cells.sentences is not None and reference.sentences is not None:
        found["sentences"] = token_distances(cells.sentences, reference.sentences)
    return found


def compare(
    generated: CellSet,
    real: CellSet,
    training_counts: Any = None,
    training_labels: Any = None,
    *,
    express: Express = log_normalized,
    options: GenerationOptions | None = None,
) -> tuple[Report, metrics.MetricDraws]:
    """Compare generated cells with real cells, controls and baseline generators (Cell2Sentence, Tables 1, 7 and 8).

    For each seed, the real cells of each label are split into two halves. One half is the reference, with which all
    rows of the table are compared. The rows have equal numbers of cells per label:

    - the generated cells, and the same cells with shuffled labels (control);
    - the other half of the real cells, which shows the best values that a generator can reach;
    - copied training cells, and multinomial draws from the mean training profile of the label (baselines);
    - labels guessed at random by their frequency, and the most common label for all cells (baselines for the accuracy
      only).

    Parameters
    ----------
    generated, real
        Generated cells, and held-out real cells. If both have sentences, the k-NN accuracy is also computed with the
        Levenshtein distance.
    training_counts, training_labels
        (T, G) raw counts and (T,) labels of the generator's training cells, or both None.
    express
        Function that converts raw counts (n, G) to expression (n, G) and to a list of n sentences or None. The real
        cells must have been converted by the same function.
    options
        See `GenerationOptions`.

    Returns
    -------
    The report, and a nested dict of all numbers: {row name: {column: [one value per seed]}}. If the library of a metric
    is missing, the table shows "-" and the reason in a note.

    Raises
    ------
    DataError
        Fewer than two labels can be compared, or the numbers of genes differ.
    ConfigError
        Only one of `training_counts` and `training_labels` is given.
    """
    options = options or GenerationOptions()
    if (training_counts is None) != (training_labels is None):
        raise ConfigError(
            "only one of `training_counts` and `training_labels` is given: pass both or neither."
        )
    labels, notes = _shared_labels(generated, real, training_labels)
    if len(labels) < 2:
        raise DataError(
            f"all cells that can be compared have the label {labels[0]!r}, but at least two labels are needed: add "
            "cells of other labels."
        )
    counts = None if training_counts is None else sparse.csr_matrix(training_counts)
    spaces, measured, missing = _available(generated, real, options)
    fitted_on = {GENERATED: "", SHUFFLED: "", REAL: HELD_OUT}
    if counts is not None:
        fitted_on |= {COPIED: TRAINING, PROFILE: TRAINING}
    fitted_on |= {CHANCE: HELD_OUT, MAJORITY: HELD_OUT}
    columns = [_column(k, space) for space in spaces for k in options.ks]
    numbers: metrics.MetricDraws = {name: {} for name in fitted_on}

    for seed in track(range(options.seeds), "measuring generated cells"):
        reference, made, others = _split(generated, real, labels, options, seed)
        rng = np.random.default_rng([seed, 1])
        sets = {GENERATED: made, REAL: others}
        if counts is not None:
            drawn, donors = profile_counts(counts, training_labels, made.labels, rng)
            sets[COPIED] = CellSet(*_expressed(express, counts[donors], made.labels))
            sets[PROFILE] = CellSet(*_expressed(express, drawn, made.labels))
        results: dict[str, dict[str, float]] = {}
        for name, cells in sets.items():
            distances = _distances(cells, reference, spaces)
            results[name] = _by_label(cells, distances, reference, options)
            if name == GENERATED:
                shuffled = dataclasses.replace(cells, labels=rng.permutation(cells.labels))
                results[SHUFFLED] = _by_label(shuffled, distances, reference, options)
            if measured:
                results[name]["Gromov-Wasserstein"] = gromov_wasserstein(
                    reference.expression, cells.expression, max_cells=options.max_cells, seed=seed
                )
            if cells.quality is not None:
                results[name] |= sentence_quality(cells.quality)
        results |= _guesses(made.labels, reference.labels, columns)
        for name, values in results.items():
            for column, value in values.items():
                numbers[name].setdefault(column, []).append(value)

    columns += [*(["Gromov-Wasserstein"] if options.max_cells else []), *CORRELATIONS]
    columns += QUALITY if generated.quality is not None else ()
    report = Report(
        f"{len(generated):,} generated cells, {len(labels)} labels, compared with {len(real):,} real cells",
        ("cells", Column("made_of", "made of"), *columns),
        notes=(*notes, *missing, *_notes(made, reference, options)),
    )
    unmeasured = {"Gromov-Wasserstein"} if not measured else set()
    for name, source in fitted_on.items():
        empty = ["-" if column in unmeasured and name != SHUFFLED else UNDEFINED for column in columns]
        cells_of_row = [numbers[name].get(c, e) for c, e in zip(columns, empty, strict=True)]
        row_key = {GENERATED: MODEL, SHUFFLED: CONTROL, REAL: CONTROL}.get(name, "")
        report.add(name, source, *cells_of_row, key=row_key)
    return report, numbers


def _expressed(express: Express, counts: sparse.csr_matrix, labels: np.ndarray) -> tuple[Any, ...]:
    expression, sentences = express(counts)
    return expression, labels, sentences


def _available(
    generated: CellSet, real: CellSet, options: GenerationOptions
) -> tuple[list[str], bool, list[str]]:
    """Return three values: the k-NN distances to use, whether Gromov-Wasserstein can be computed, and notes.

    The notes say which libraries are missing.
    """
    spaces, measured, missing = ["expression"], options.max_cells > 0, []
    if generated.sentences is not None and real.sentences is not None:
        try:
            load_extra("rapidfuzz", "text")
            spaces.append("sentences")
        except MissingExtraError as error:
            missing.append(f"Levenshtein distances are not computed: {error}.")
    if measured:
        try:
            with metrics.quiet():
                load_extra("ot", "analysis", "POT")
        except MissingExtraError as error:
            measured = False
            missing.append(f"The Gromov-Wasserstein discrepancy is not computed: {error}.")
    return spaces, measured, missing


def _guesses(made: np.ndarray, real: np.ndarray, columns: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the expected accuracy of two baselines that only guess labels, as {row: {column: value}}.

    One baseline guesses labels at random by their frequency in real cells. The other always guesses the most common
    label.
    """
    frequency = pd.Series(real).value_counts(normalize=True)
    asked = pd.Series(made).value_counts(normalize=True).reindex(frequency.index, fill_value=0.0)
    # If several labels are most common, average over them.
    top = asked[frequency == frequency.max()].mean()
    return {
        CHANCE: dict.fromkeys(columns, float((frequency * asked).sum())),
        MAJORITY: dict.fromkeys(columns, float(top)),
    }


def _notes(made: CellSet, reference: CellSet, options: GenerationOptions) -> list[str]:
    notes = [
        f"Each of {options.seeds} draws compares {len(made):,} cells per row with {len(reference):,} real cells, which "
        "are half of the held-out cells of each label."
    ]
    if options.max_cells:
        notes.append(
            "Gromov-Wasserstein: squared loss of Euclidean distances in expression space, equal weights, at most "
            f"{options.max_cells:,} cells per set. The row '{REAL}' shows the lowest value that a generator can reach."
        )
    return notes
