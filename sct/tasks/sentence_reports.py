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
from sct.eval import generation, labels, texts
from sct.eval.generated import CellSet
from sct.eval.report import Report
from sct.generation.cells import CellWriter

_TRAINING_CELLS = 5000  # that baselines are fitted on


@dataclasses.dataclass(frozen=True)
class LabelledCells:
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
    def read(cls, studies: Sequence[Any], field: str, most: int) -> LabelledCells:
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


def _written(writer: CellWriter, cells: LabelledCells) -> list[str]:
    return sentences(cells.counts, writer.words, top_k=writer.top_k or None, keys=cells.keys)


class PredictedLabels:
    """Label of held-out cells by candidate scoring, beside baselines (Cell2Sentence, Table 3).

    Parameters
    ----------
    writer
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
        writer: Callable[[Any], CellWriter],
        train: LabelledCells,
        held_out: LabelledCells,
        field: str,
        seeds: int,
    ):
        self.name = f"predicted_{field}"
        self.writer, self.train, self.held_out, self.field, self.seeds = writer, train, held_out, field, seeds
        self.report: Report | None = None
        self.note = ""

    def __call__(self, variables: Any) -> Iterator[tuple[str, float]]:
        """Measure; yields the numbers of the table and keeps it in `report`."""
        writer = self.writer(variables)
        answers = _values(writer, self.field)
        asked = [{"cell": text, **_cut(writer, text)} for text in _written(writer, self.held_out)]
        probabilities = np.exp(writer.score(f"cell_to_{self.field}", asked, answers, batch_size=16))
        best = [answers[i] for i in probabilities.argmax(axis=1)]
        parts = _table(answers, self.field)
        by_key = {key: pd.DataFrame(probabilities).T.groupby(parts[key].to_numpy()).sum().T for key in parts}
        self.report, numbers = labels.compare(
            {"cell sentences": labels.Prediction(_table(best, self.field), by_key)},
            _table(self.held_out.labels.tolist(), self.field),
            _table(self.train.labels.tolist(), self.field),
            self.held_out.counts,
            self.train.counts,
            options=labels.Options(seeds=self.seeds),
        )
        self.report.notes = (*self.report.notes, *filter(None, [self.note]))
        yield from _means(numbers)


def _values(writer: CellWriter, field: str) -> list[str]:
    """Values of a label in training; `ConfigError` where there are too many to list."""
    if field not in writer.labels:
        raise ConfigError(f"there are too many values of {field} in training to choose among them.")
    return list(writer.labels[field])


def _cut(writer: CellWriter, text: str) -> dict[str, int]:
    number = text.count(" ") + 1
    return {"num_genes": number} if number == writer.top_k else {}


class GeneratedCells:
    """Cells generated for the labels of held-out ones, beside controls and baselines (Cell2Sentence, Tables 1, 8, 11).

    All cells, real ones too, are compared as the model sees them: as sentences, and as the expression that the line of
    the training cells gives these.

    Parameters
    ----------
    writer, train, held_out, field, seeds
        See `PredictedLabels`.
    cells
        Generated at most; each label as often as it has held-out cells, in proportion.
    """

    def __init__(
        self,
        writer: Callable[[Any], CellWriter],
        train: LabelledCells,
        held_out: LabelledCells,
        field: str,
        seeds: int,
        cells: int,
    ):
        self.name = f"generated_by_{field}"
        self.writer, self.train, self.held_out, self.field = writer, train, held_out, field
        self.seeds, self.cells = seeds, cells
        self.report: Report | None = None
        self.note = ""

    def __call__(self, variables: Any) -> Iterator[tuple[str, float]]:
        """Measure; yields the numbers of the table and keeps it in `report`."""
        writer = self.writer(variables)
        sizes = pd.Series(self.held_out.labels).value_counts()
        if self.field != "labels":
            sizes = sizes[sizes.index.isin(_values(writer, self.field))]
        number = np.maximum(1, np.floor(sizes / 2 * min(1.0, 2 * self.cells / sizes.sum()))).astype(int)
        wanted = np.repeat(sizes.index.to_numpy(), number)
        cut = {"num_genes": writer.top_k} if writer.top_k else {}
        made = writer.answer(
            f"{self.field}_to_cell", [{self.field: label, **cut} for label in wanted], batch_size=32
        )
        cells = made["answer"].where(made["answer"].notna(), made["text"]).tolist()
        expression, quality = writer.expression(cells)
        real = _written(writer, self.held_out)

        def express(counts: sparse.csr_matrix) -> tuple[Any, Sequence[str]]:
            written = sentences(counts, writer.words, top_k=writer.top_k or None)
            return writer.expression(written)[0], written

        self.report, numbers = generation.compare(
            CellSet(expression, wanted, cells, quality),
            CellSet(writer.expression(real)[0], self.held_out.labels, real),
            self.train.counts,
            self.train.labels,
            express=express,
            options=generation.Options(seeds=self.seeds),
        )
        self.report.notes = (*self.report.notes, *filter(None, [self.note]))
        yield from _means(numbers)


class DescribedCells:
    """Texts about held-out cells beside those of their studies, and controls (Cell2Sentence, section 4.4, Table 4).

    Parameters
    ----------
    writer, train, held_out, seeds
        See `PredictedLabels`; the label of a cell is the text of its study.
    """

    name = "described"

    def __init__(
        self, writer: Callable[[Any], CellWriter], train: LabelledCells, held_out: LabelledCells, seeds: int
    ):
        self.writer, self.train, self.held_out, self.seeds = writer, train, held_out, seeds
        self.report: Report | None = None
        self.note = ""

    def __call__(self, variables: Any) -> Iterator[tuple[str, float]]:
        """Measure; yields the numbers of the table and keeps it in `report`."""
        writer = self.writer(variables)
        asked = [{"cell": text, **_cut(writer, text)} for text in _written(writer, self.held_out)]
        made = writer.answer("cell_to_abstract", asked, keys=self.held_out.keys.tolist(), batch_size=16)
        true, pairs = np.unique(self.held_out.labels.astype(str), return_inverse=True)
        self.report, numbers = texts.compare(
            {"cell sentences": made["answer"].where(made["answer"].notna(), made["text"]).tolist()},
            true.tolist(),
            pairs,
            sorted(set(self.train.labels.tolist())),
            seeds=self.seeds,
        )
        self.report.notes = (*self.report.notes, *filter(None, [self.note]))
        yield from _means(numbers)


def _means(numbers: Mapping[str, Mapping[str, Sequence[float]]]) -> Iterator[tuple[str, float]]:
    for row, columns in numbers.items():
        for column, values in columns.items():
            if len(values):
                yield f"{row}/{column}", float(np.mean(values))


Measurement = PredictedLabels | GeneratedCells | DescribedCells


def reports(
    writer: Callable[[Any], CellWriter],
    train: Sequence[Any],
    held_out: Sequence[Any],
    tasks: Sequence[str],
    cells: int,
    seeds: int,
    note: str = "",
) -> Iterator[Measurement]:
    """Measurements of what a model learned: labels that it predicts, cells that it generates, texts that it writes.

    `note` is said below each of them. A label that held-out and training cells do not share two values of is left out.
    """
    made: list[Measurement] = []
    for field in ("cell_type", "tissue", "labels"):
        able = [name for name in (f"cell_to_{field}", f"{field}_to_cell") if name in tasks]
        if not able:
            continue
        before, after = (
            LabelledCells.read(many, field, n) for many, n in ((train, _TRAINING_CELLS), (held_out, cells))
        )
        # Of combined labels new combinations of known values are of interest, too.
        if field != "labels" and len(set(before.labels) & set(after.labels)) < 2:
            continue
        if len(np.unique(after.labels)) < 2:
            continue
        if f"cell_to_{field}" in able:
            made.append(PredictedLabels(writer, before, after, field, seeds))
        if f"{field}_to_cell" in able:
            made.append(GeneratedCells(writer, before, after, field, seeds, cells))
    if "cell_to_abstract" in tasks:
        before, after = (LabelledCells.read(many, "abstract", cells) for many in (train, held_out))
        if len(np.unique(after.labels)) > 1:
            made.append(DescribedCells(writer, before, after, seeds))
    for each in made:
        each.note = note
    yield from made
