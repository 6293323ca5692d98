"""Evaluate the answers of an instruction-tuned model about held-out cells against baselines (ZerOmics, section 4.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from sct.data.cell_records import cell_records
from sct.data.text.instructions import YES, StudyQuestions
from sct.data.text.prompts import task_name
from sct.eval.labels import measures as labels
from sct.eval.reports.report import Report
from sct.generation.instruction_model import InstructionModel
from sct.tasks.sentence_reports import TRAINING_CELLS, LabeledReferenceCells, means

MODEL, OTHERS = "ZerOmics", "ZerOmics, soft tokens of other cells"


class Answers:
    """Evaluate a model's answers in one task on held-out cells, by scoring all candidate answers.

    The report also has a control, in which each cell gets the soft tokens of another cell of its study. The accuracy of
    this control shows how much the text of the question alone reveals.

    Parameters
    ----------
    instruction_model
        Function that takes variables and returns the model that answers.
    task
        Code of the task: "cta" (cell type), "rci" (rare cell) or "tcd" (tumor).
    train, held_out
        Studies on which the baselines are fitted, and studies that are evaluated.
    cells, seeds
        Largest number of held-out cells, and number of random seeds.
    note
        Note to add below the report. "" means no note.
    """

    def __init__(
        self, instruction_model: Callable[[Any], InstructionModel], task: str, train: Sequence[StudyQuestions],
        held_out: Sequence[StudyQuestions], cells: int, seeds: int, note: str = "",
    ):  # fmt: skip
        self.name = f"answers_{task_name(task)}"
        self.instruction_model, self.task, self.seeds, self.note = instruction_model, task, seeds, note
        self.train = LabeledReferenceCells.read(
            [each for each in train if task in each.candidates], task, TRAINING_CELLS
        )
        asked = [each for each in held_out if task in each.candidates]
        total = sum(each.study.n_cells for each in asked)
        self.held_out = [
            (each, LabeledReferenceCells.read([each], task, -(-cells * each.study.n_cells // total)))
            for each in asked
        ]
        self.report: Report | None = None

    def __call__(self, variables: Any) -> Iterator[tuple[str, float]]:
        """Evaluate the model, yield all metrics as (name, value) pairs, and store the table in `report`."""
        instruction_model = self.instruction_model(variables)
        names = sorted({name for each, _ in self.held_out for name in each.candidates[self.task]})
        shares: dict[str, list[pd.DataFrame]] = {MODEL: [], OTHERS: []}
        for asked, cells in self.held_out:
            records = cell_records(cells.counts, instruction_model.cells, instruction_model.known)
            candidates, abstracts = (
                asked.candidates[self.task],
                [asked.study_metadata["abstract"]] * len(cells.labels),
            )
            mixed = np.random.default_rng(0).permutation(len(cells.labels))
            for name, order in ((MODEL, None), (OTHERS, mixed.tolist())):
                keys = [int(key) for key in cells.keys]
                logs = instruction_model.score(
                    self.task, records, abstracts, candidates, keys=keys, cells=order
                )
                # Names that were not candidates in this study get probability 0.
                table = pd.DataFrame(np.exp(logs), columns=list(candidates))
                shares[name].append(table.reindex(columns=names, fill_value=0.0))
        predictions = {}
        for name, tables in shares.items():
            table = pd.concat(tables, ignore_index=True)
            best = pd.DataFrame({self.task: table.columns.to_numpy()[table.to_numpy().argmax(axis=1)]})
            predictions[name] = labels.LabelPrediction(best, {self.task: table})
        self.report, numbers = labels.compare(
            {MODEL: predictions[MODEL]},
            pd.DataFrame({self.task: np.concatenate([cells.labels for _, cells in self.held_out])}),
            pd.DataFrame({self.task: self.train.labels}),
            sparse.vstack([cells.counts for _, cells in self.held_out], format="csr"),
            self.train.counts,
            options=labels.LabelOptions(seeds=self.seeds, positive=YES if self.task == "rci" else ""),
            beside={OTHERS: ("", predictions[OTHERS])},
        )
        self.report.notes = (*self.report.notes, *filter(None, [self.note]))
        yield from means(numbers)


def reports(
    instruction_model: Callable[[Any], InstructionModel],
    train: Sequence[StudyQuestions],
    held_out: Sequence[StudyQuestions],
    tasks: Sequence[str],
    cells: int,
    seeds: int,
    note: str = "",
) -> Iterator[Answers]:
    """Yield the evaluation of each task, with `note` below its report.

    A task is skipped if the training cells or the held-out cells have fewer than two different answers. The task
    "pathway" is always skipped, because a cell may have several pathways. The benchmark evaluates this task.
    """
    for task in tasks:
        if task != "cpi" and all(
            any(task in each.candidates for each in studies) for studies in (train, held_out)
        ):
            made = Answers(instruction_model, task, train, held_out, cells, seeds, note)
            answers = np.concatenate([each.labels for _, each in made.held_out])
            if len(set(answers)) > 1 and len(set(made.train.labels)) > 1:
                yield made
