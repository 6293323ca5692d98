"""Evaluate the predicted labels, generated cells and generated texts of a model that was trained on cell sentences."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from sct.data.store import Study
from sct.data.text.cell_sentence import sentences
from sct.data.text.prompts import parse_labels, render_labels
from sct.errors import ConfigError
from sct.eval.generation import cells as generation
from sct.eval.generation import perturbation, texts
from sct.eval.generation.measures import CellSet
from sct.eval.labels import measures as labels
from sct.eval.reports.report import Report
from sct.generation.cell_sentence_model import MAX_LABELS, CellSentenceModel

TRAINING_CELLS = 5000  # number of training cells that baselines are fitted on


@dataclasses.dataclass(frozen=True)
class LabeledReferenceCells:
    """Labeled cells of one data split, read into memory.

    Attributes
    ----------
    counts
        Raw counts (N, G).
    labels
        Label of each cell (N,). Combined labels are written as one string.
    keys
        Key of each cell, uint64 (N,), which seeds random choices for the cell; see
        `sct.data.text.cell_sentence.cell_keys`.
    """

    counts: sparse.csr_matrix
    labels: np.ndarray
    keys: np.ndarray

    @classmethod
    def read(cls, studies: Sequence[Any], field: str, most: int) -> LabeledReferenceCells:
        """Read up to about `most` cells that have the label `field`. Larger studies give more cells.

        `studies` are `sct.data.text.source.Texts` or `sct.data.text.instructions.StudyQuestions`.
        """
        total = sum(each.study.n_cells for each in studies)
        counts, names, keys = [], [], []
        for each in studies:
            study: Study = each.study
            wanted = min(study.n_cells, -(-most * study.n_cells // total))
            block = study.read(0, wanted)
            values = [each.values(row).get(field) for row in range(wanted)]
            known = [row for row, value in enumerate(values) if value is not None and block[row].nnz]
            counts.append(block[known])
            names += [_text(values[row]) for row in known]
            keys.append(each.keys[:wanted][known])
        return cls(sparse.vstack(counts, format="csr"), np.array(names, dtype=object), np.concatenate(keys))


def _text(value: Any) -> str:
    return render_labels(value) if isinstance(value, Mapping) else str(value)


def _table(names: Sequence[str], field: str) -> pd.DataFrame:
    """Convert labels (N,), which may be combined labels, to a table with one column per single label."""
    if field != "labels":
        return pd.DataFrame({field: list(names)})
    return pd.DataFrame([parse_labels(name) for name in names])


def _written(sentence_model: CellSentenceModel, cells: LabeledReferenceCells) -> list[str]:
    return sentences(
        cells.counts, sentence_model.gene_names, top_k=sentence_model.top_k or None, keys=cells.keys
    )


class PredictedLabels:
    """Predict labels of held-out cells by candidate scoring; compare them with baselines (Cell2Sentence, Table 3).

    Parameters
    ----------
    sentence_model
        Function that takes variables and returns the model that predicts.
    train, held_out
        Cells on which the baselines are fitted, and cells that are predicted.
    field
        "cell_type", "tissue" or "labels".
    seeds
        Number of seeds of the random baselines.
    """

    def __init__(
        self,
        sentence_model: Callable[[Any], CellSentenceModel],
        train: LabeledReferenceCells,
        held_out: LabeledReferenceCells,
        field: str,
        seeds: int,
    ):
        self.name = f"predicted_{field}"
        self.sentence_model, self.train, self.held_out, self.field, self.seeds = (
            sentence_model,
            train,
            held_out,
            field,
            seeds,
        )
        self.report: Report | None = None
        self.note = ""

    def __call__(self, variables: Any) -> Iterator[tuple[str, float]]:
        """Evaluate the model, yield all metrics as (name, value) pairs, and store the table in `report`."""
        sentence_model = self.sentence_model(variables)
        answers = _values(sentence_model, self.field)
        asked = [
            {"cell": text, **_cut(sentence_model, text)} for text in _written(sentence_model, self.held_out)
        ]
        probabilities = np.exp(sentence_model.score(f"cell_to_{self.field}", asked, answers, batch_size=16))
        best = [answers[i] for i in probabilities.argmax(axis=1)]
        parts = _table(answers, self.field)
        by_key = {key: pd.DataFrame(probabilities).T.groupby(parts[key].to_numpy()).sum().T for key in parts}
        self.report, numbers = labels.compare(
            {"cell sentences": labels.LabelPrediction(_table(best, self.field), by_key)},
            _table(self.held_out.labels.tolist(), self.field),
            _table(self.train.labels.tolist(), self.field),
            self.held_out.counts,
            self.train.counts,
            options=labels.LabelOptions(seeds=self.seeds),
        )
        self.report.notes = (*self.report.notes, *filter(None, [self.note]))
        yield from means(numbers)


def _values(sentence_model: CellSentenceModel, field: str) -> list[str]:
    """Return a label's values in the training cells; raise `ConfigError` if the model did not record them."""
    if field not in sentence_model.labels:
        raise ConfigError(
            f"the label {field} has no values or more than {MAX_LABELS:,} different values in the training cells, but "
            "the report scores each value as a possible answer: use a column with fewer values, or set "
            "objective.report_cells to 0 to skip the reports."
        )
    return list(sentence_model.labels[field])


def _cut(sentence_model: CellSentenceModel, text: str) -> dict[str, int]:
    number = text.count(" ") + 1
    return {"num_genes": number} if number == sentence_model.top_k else {}


class GeneratedCells:
    """Evaluate cells generated for given labels against held-out cells (Cell2Sentence, Tables 1, 8 and 11).

    The report also has controls and baselines. All cells, generated and real, are first written as cell sentences. The
    expression values to compare are then computed from the ranks of the genes, with the linear fit of the training
    cells.

    Parameters
    ----------
    sentence_model, train, held_out, field, seeds
        See `PredictedLabels`.
    cells
        Largest number of cells to generate for all labels together. The number of cells for each label is proportional
        to the number of held-out cells with this label.
    """

    def __init__(
        self,
        sentence_model: Callable[[Any], CellSentenceModel],
        train: LabeledReferenceCells,
        held_out: LabeledReferenceCells,
        field: str,
        seeds: int,
        cells: int,
    ):
        self.name = f"generated_by_{field}"
        self.sentence_model, self.train, self.held_out, self.field = sentence_model, train, held_out, field
        self.seeds, self.cells = seeds, cells
        self.report: Report | None = None
        self.note = ""

    def __call__(self, variables: Any) -> Iterator[tuple[str, float]]:
        """Evaluate the model, yield all metrics as (name, value) pairs, and store the table in `report`."""
        sentence_model = self.sentence_model(variables)
        sizes = pd.Series(self.held_out.labels).value_counts()
        if self.field != "labels":
            sizes = sizes[sizes.index.isin(_values(sentence_model, self.field))]
        express = _expression(sentence_model)
        self.report, numbers = generation.compare(
            _generate(sentence_model, self.field, sizes, self.cells),
            _cell_set(sentence_model, self.held_out),
            self.train.counts,
            self.train.labels,
            express=express,
            options=generation.GenerationOptions(seeds=self.seeds),
        )
        self.report.notes = (*self.report.notes, *filter(None, [self.note]))
        yield from means(numbers)


def _generate(sentence_model: CellSentenceModel, field: str, sizes: pd.Series, cells: int) -> CellSet:
    """Generate about `cells` cells in all.

    The number of cells to generate for a label is proportional to the label's number of held-out cells (`sizes`). It is
    at most half the number of held-out cells, but at least 1.
    """
    number = np.maximum(1, np.floor(sizes / 2 * min(1.0, 2 * cells / sizes.sum()))).astype(int)
    wanted = np.repeat(sizes.index.to_numpy(), number)
    cut = {"num_genes": sentence_model.top_k} if sentence_model.top_k else {}
    made = sentence_model.answer(
        f"{field}_to_cell", [{field: label, **cut} for label in wanted], batch_size=32
    )
    texts = made["answer"].where(made["answer"].notna(), made["text"]).tolist()
    expression, quality = sentence_model.expression(texts)
    return CellSet(expression, wanted, texts, quality)


def _expression(sentence_model: CellSentenceModel) -> generation.Express:
    """Return a function that writes cells as sentences and recovers their expression from the sentences.

    The function takes raw counts (N, G), and returns the recovered expression (N, G) and the N sentences.
    """

    def express(counts: sparse.csr_matrix) -> tuple[Any, Sequence[str]]:
        written = sentences(counts, sentence_model.gene_names, top_k=sentence_model.top_k or None)
        return sentence_model.expression(written)[0], written

    return express


def _cell_set(sentence_model: CellSentenceModel, cells: LabeledReferenceCells) -> CellSet:
    """Write real cells as cell sentences; return them with the expression recovered from these sentences."""
    written = _written(sentence_model, cells)
    return CellSet(sentence_model.expression(written)[0], cells.labels, written)


@dataclasses.dataclass(frozen=True)
class Contrast:
    """Choose the training cells with which an unseen combination of labels is compared.

    Attributes
    ----------
    perturbation, control
        `perturbation` is the label that names the treatment of a cell. `control` is the treatment with which every
        other treatment is compared. "" means the most frequent other treatment in the training cells.
    seen
        Combinations of labels in the training cells.
    """

    perturbation: str
    control: str
    seen: frozenset[str]

    def opposites(self, train: np.ndarray, held_out: np.ndarray) -> dict[str, str]:
        """Map each unseen combination of labels to the training combination with which it is compared.

        The two combinations differ only in the perturbation, and each has two or more cells. Unseen combinations
        without a matching training combination are left out.
        """
        known, asked = pd.Series(train).value_counts(), pd.Series(held_out).value_counts()
        # `value_counts` sorts the most frequent value first.
        known = known[known > 1]
        parts = {name: parse_labels(name) for name in {*known.index, *asked.index}}
        others = [name for name in known.index if self.control in ("", parts[name][self.perturbation])]

        def rest(name: str) -> dict[str, str]:
            return {key: value for key, value in parts[name].items() if key != self.perturbation}

        pairs = {
            name: next((other for other in others if rest(other) == rest(name)), None)
            for name in asked.index[(asked > 1) & ~asked.index.isin(self.seen)]
        }
        return {name: other for name, other in sorted(pairs.items()) if other is not None}


class PerturbedCells:
    """Evaluate cells that were generated for unseen combinations of labels (Cell2Sentence, section 4.2, Table 2).

    An unseen combination is one that no training cell has.

    Parameters
    ----------
    sentence_model, train, held_out, seeds, cells
        See `GeneratedCells`.
    contrast
        Chooses the training cells with which an unseen combination of labels is compared.

    Attributes
    ----------
    opposite
        Maps each unseen combination of labels to a training combination that differs only in the perturbation.
    """

    name = "perturbed"

    def __init__(
        self,
        sentence_model: Callable[[Any], CellSentenceModel],
        train: LabeledReferenceCells,
        held_out: LabeledReferenceCells,
        seeds: int,
        cells: int,
        contrast: Contrast,
    ):
        self.sentence_model, self.train, self.held_out = sentence_model, train, held_out
        self.seeds, self.cells = seeds, cells
        self.opposite = contrast.opposites(train.labels, held_out.labels)
        self.report: Report | None = None
        self.note = ""

    def __call__(self, variables: Any) -> Iterator[tuple[str, float]]:
        """Evaluate the model, yield all metrics as (name, value) pairs, and store the table in `report`."""
        sentence_model = self.sentence_model(variables)
        unseen = pd.Series(self.held_out.labels)
        sizes = unseen[unseen.isin(list(self.opposite))].value_counts()
        self.report, numbers = perturbation.compare_perturbations(
            _generate(sentence_model, "labels", sizes, self.cells),
            _cell_set(sentence_model, self.held_out),
            _cell_set(sentence_model, self.train),
            self.opposite,
            generation.GenerationOptions(seeds=self.seeds),
        )
        pairs = "; ".join(f"{name} with {other}" for name, other in self.opposite.items())
        self.report.notes = (*self.report.notes, f"Compared: {pairs}.", *filter(None, [self.note]))
        yield from means(numbers)


class DescribedCells:
    """Evaluate generated texts against the abstracts of the held-out studies (Cell2Sentence, section 4.4, Table 4).

    Parameters
    ----------
    sentence_model, train, held_out, seeds
        See `PredictedLabels`. The label of a cell is the abstract of its study.
    """

    name = "described"

    def __init__(
        self,
        sentence_model: Callable[[Any], CellSentenceModel],
        train: LabeledReferenceCells,
        held_out: LabeledReferenceCells,
        seeds: int,
    ):
        self.sentence_model, self.train, self.held_out, self.seeds = sentence_model, train, held_out, seeds
        self.report: Report | None = None
        self.note = ""

    def __call__(self, variables: Any) -> Iterator[tuple[str, float]]:
        """Evaluate the model, yield all metrics as (name, value) pairs, and store the table in `report`."""
        sentence_model = self.sentence_model(variables)
        asked = [
            {"cell": text, **_cut(sentence_model, text)} for text in _written(sentence_model, self.held_out)
        ]
        made = sentence_model.answer(
            "cell_to_abstract", asked, keys=self.held_out.keys.tolist(), batch_size=16
        )
        true, pairs = np.unique(self.held_out.labels.astype(str), return_inverse=True)
        self.report, numbers = texts.compare(
            {"cell sentences": made["answer"].where(made["answer"].notna(), made["text"]).tolist()},
            true.tolist(),
            pairs,
            sorted(set(self.train.labels.tolist())),
            seeds=self.seeds,
        )
        self.report.notes = (*self.report.notes, *filter(None, [self.note]))
        yield from means(numbers)


def means(numbers: Mapping[str, Mapping[str, Sequence[float]]]) -> Iterator[tuple[str, float]]:
    """Yield the mean over seeds of each entry of a result table, as ("row/column", mean)."""
    for row, columns in numbers.items():
        for column, values in columns.items():
            if len(values):
                yield f"{row}/{column}", float(np.mean(values))


Measurement = PredictedLabels | GeneratedCells | PerturbedCells | DescribedCells


def reports(
    sentence_model: Callable[[Any], CellSentenceModel],
    train: Sequence[Any],
    held_out: Sequence[Any],
    tasks: Sequence[str],
    cells: int,
    seeds: int,
    note: str = "",
    contrast: Contrast | None = None,
) -> Iterator[Measurement]:
    """Yield one evaluation for each task that a model was trained on. The text `note` is shown below each report.

    The evaluations cover predicted labels, generated cells and generated texts. With a `contrast`, cells generated for
    unseen combinations of labels are also evaluated. A label is skipped if held-out and training cells share fewer than
    two of its values.
    """
    made: list[Measurement] = []
    for field in ("cell_type", "tissue", "labels"):
        able = [name for name in (f"cell_to_{field}", f"{field}_to_cell") if name in tasks]
        if not able:
            continue
        before, after = (
            LabeledReferenceCells.read(many, field, n)
            for many, n in ((train, TRAINING_CELLS), (held_out, cells))
        )
        shared = set(before.labels) & set(after.labels)
        # For combined labels, new combinations of known values are also worth evaluating.
        if len(set(after.labels) if field == "labels" else shared) > 1 and f"cell_to_{field}" in able:
            made.append(PredictedLabels(sentence_model, before, after, field, seeds))
        if len(shared) > 1 and f"{field}_to_cell" in able:
            made.append(GeneratedCells(sentence_model, before, after, field, seeds, cells))
        if field == "labels" and contrast and "labels_to_cell" in able:
            perturbed = PerturbedCells(sentence_model, before, after, seeds, cells, contrast)
            made += [perturbed] if perturbed.opposite else []
    if "cell_to_abstract" in tasks:
        before, after = (LabeledReferenceCells.read(many, "abstract", cells) for many in (train, held_out))
        if len(np.unique(after.labels)) > 1:
            made.append(DescribedCells(sentence_model, before, after, seeds))
    for each in made:
        each.note = note
    yield from made
