"""Tables after training on cell sentences: labels of held-out cells, and generated cells beside them."""

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
from sct.generation.cell_sentence_model import CellSentenceModel

TRAINING_CELLS = 5000  # that baselines are fitted on


@dataclasses.dataclass(frozen=True)
class LabeledReferenceCells:
    """Cells of a split with their label.

    Attributes
    ----------
    counts
        Raw counts (N, G).
    labels
        Label of each cell (N,); combined labels as one text.
    keys
        uint64 (N,), see `sct.data.text.cell_sentence.cell_keys`.
    """

    counts: sparse.csr_matrix
    labels: np.ndarray
    keys: np.ndarray

    @classmethod
    def read(cls, studies: Sequence[Any], field: str, most: int) -> LabeledReferenceCells:
        """At most so many cells that have the label, spread over the studies (`sct.data.text.source.Texts`)."""
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
    """Labels as a table with one column for each."""
    if field != "labels":
        return pd.DataFrame({field: list(names)})
    return pd.DataFrame([parse_labels(name) for name in names])


def _written(sentence_model: CellSentenceModel, cells: LabeledReferenceCells) -> list[str]:
    return sentences(
        cells.counts, sentence_model.gene_names, top_k=sentence_model.top_k or None, keys=cells.keys
    )


class PredictedLabels:
    """Label of held-out cells by candidate scoring, beside baselines (Cell2Sentence, Table 3).

    Parameters
    ----------
    sentence_model
        Makes the model of variables.
    train, held_out
        Cells that baselines are fitted on, and that are named.
    field
        "cell_type", "tissue" or "labels".
    seeds
        Of the baselines that draw.
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
        """Measure; yields the numbers of the table and keeps it in `report`."""
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
    """Values of a label in training; `ConfigError` where there are too many to list."""
    if field not in sentence_model.labels:
        raise ConfigError(f"there are too many values of {field} in training to choose among them.")
    return list(sentence_model.labels[field])


def _cut(sentence_model: CellSentenceModel, text: str) -> dict[str, int]:
    number = text.count(" ") + 1
    return {"num_genes": number} if number == sentence_model.top_k else {}


class GeneratedCells:
    """Cells generated for the labels of held-out ones, beside controls and baselines (Cell2Sentence, Tables 1, 8, 11).

    All cells, real ones too, are compared as the model sees them: as sentences, and as the expression that the line of
    the training cells gives these.

    Parameters
    ----------
    sentence_model, train, held_out, field, seeds
        See `PredictedLabels`.
    cells
        Generated at most; each label as often as it has held-out cells, in proportion.
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
        """Measure; yields the numbers of the table and keeps it in `report`."""
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
    """At most so many cells of some labels, in proportion to how many there are of each; half as many at most."""
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
    """How counts become what the model sees of them: the expression that the line gives their sentences."""

    def express(counts: sparse.csr_matrix) -> tuple[Any, Sequence[str]]:
        written = sentences(counts, sentence_model.gene_names, top_k=sentence_model.top_k or None)
        return sentence_model.expression(written)[0], written

    return express


def _cell_set(sentence_model: CellSentenceModel, cells: LabeledReferenceCells) -> CellSet:
    """Real cells as the model sees them."""
    written = _written(sentence_model, cells)
    return CellSet(sentence_model.expression(written)[0], cells.labels, written)


@dataclasses.dataclass(frozen=True)
class Contrast:
    """What unseen combinations of labels are compared with.

    Attributes
    ----------
    perturbation, control
        The label that says what was done to a cell, and its value that others are compared with; "" for the most
        frequent other value in training.
    seen
        Combinations that any training cell has.
    """

    perturbation: str
    control: str
    seen: frozenset[str]

    def opposites(self, train: np.ndarray, held_out: np.ndarray) -> dict[str, str]:
        """Unseen combination of two or more held-out cells -> that of two or more training cells to compare it with.

        It differs in the perturbation alone. A combination without such training cells is left out.
        """
        known, asked = pd.Series(train).value_counts(), pd.Series(held_out).value_counts()
        # `value_counts` has the most frequent first.
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
    """Cells generated for combinations of labels that training had none of (Cell2Sentence, section 4.2, Table 2).

    Parameters
    ----------
    sentence_model, train, held_out, seeds, cells
        See `GeneratedCells`.
    contrast
        What the combinations are compared with.

    Attributes
    ----------
    opposite
        Unseen combination -> the combination of training that differs from it in the perturbation alone.
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
        """Measure; yields the numbers of the table and keeps it in `report`."""
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
    """Texts about held-out cells beside those of their studies, and controls (Cell2Sentence, section 4.4, Table 4).

    Parameters
    ----------
    sentence_model, train, held_out, seeds
        See `PredictedLabels`; the label of a cell is the text of its study.
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
        """Measure; yields the numbers of the table and keeps it in `report`."""
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
    """Mean of each row's measurements in each column, by "row/column"."""
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
    """Measurements of what a model learned: labels that it predicts, cells that it generates, texts that it writes.

    `note` is said below each of them; with a `contrast` unseen combinations of labels are measured, too. A label that
    held-out and training cells do not share two values of is left out.
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
        # Of combined labels new combinations of known values are of interest, too.
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
