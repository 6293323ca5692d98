"""Rows of text tokens from the cells of a store: sentences in prompts, several to a row, for `sct.data.loader`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sct.data.genes.vocabulary import GeneVocabulary
from sct.data.store import Study
from sct.data.text.cell_sentence import cell_keys, sentences
from sct.data.text.prompts import TASKS, Example, Prompts, draw_task
from sct.data.text.studies import read_study_file, wrong_form
from sct.data.text.tokenizer import Tokenizer
from sct.errors import ConfigError

_SAMPLE = 64  # cells whose length tells how many fit into a row


@dataclasses.dataclass(frozen=True)
class SentenceOptions:
    """How cells become texts.

    Parameters
    ----------
    top_k
        Words of a cell sentence at most; 0 for all expressed genes.
    length
        Tokens of a row (T).
    tasks
        Pairs of a task of `sct.data.text.prompts.TASKS` and how often it is drawn, relative to the others.
    fields
        Field of the prompts -> column of `obs` that holds it.
    labels
        Columns of `obs` that together are the field "labels".
    studies
        Study -> field -> text that is the same for all its cells, such as an abstract.
    all_tokens
        Whether all tokens are to be predicted, or those of responses alone.
    seed
        Of ties, of tasks and of templates.
    """

    top_k: int = 100
    length: int = 1024
    tasks: tuple[tuple[str, float], ...] = (("unconditional", 1.0),)
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    labels: tuple[str, ...] = ()
    studies: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    all_tokens: bool = False
    seed: int = 0


def sentence_gene_names(vocabulary: GeneVocabulary) -> tuple[str, ...]:
    """Word of each gene: its symbol, or its Ensembl id where it has none, shares it, or it holds white space."""
    symbols = pd.Series(vocabulary.symbols)
    usable = ~symbols.duplicated(keep=False) & symbols.str.fullmatch(r"\S+").astype(bool)
    return tuple(np.where(usable, symbols, vocabulary.keys).tolist())


def read_studies(path: str | Path) -> dict[str, dict[str, str]]:
    """Read a YAML file with texts of studies, `STUDY: {abstract: ..., tissue: ...}`.

    Raises
    ------
    ConfigError
        It cannot be read, or is not of that form.
    """
    form = "STUDY: {abstract: TEXT, tissue: TEXT}"
    content = read_study_file(path, form)
    texts = [text for entry in content.values() for text in entry.values()]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise wrong_form(path, form)
    return {study: {str(field): text for field, text in entry.items()} for study, entry in content.items()}


class Texts:
    """What is written about the cells of one study.

    Parameters
    ----------
    study
        Of a store.
    vocabulary
        Its genes.
    options, prompts
        How texts are made.
    """

    def __init__(self, study: Study, vocabulary: GeneVocabulary, options: SentenceOptions, prompts: Prompts):
        study.check_counts()
        self.study, self.options, self.prompts = study, options, prompts
        self.gene_names = sentence_gene_names(vocabulary)

    @functools.cached_property
    def obs(self) -> pd.DataFrame:
        """Metadata of the cells, as far as prompts speak of them."""
        return self.study.obs({*self.options.fields.values(), *self.options.labels})

    @functools.cached_property
    def keys(self) -> np.ndarray:
        """Key of each cell, uint64 (N,)."""
        return cell_keys(self.obs.index)

    def values(self, row: int) -> dict[str, Any]:
        """Fields of a cell but for its sentence, as far as they are known."""
        found: dict[str, Any] = dict(self.options.studies.get(self.study.name, {}))
        columns = self._columns
        for field, column in self.options.fields.items():
            if column in columns and (value := columns[column][row]):
                found[field] = value
        labels = {name: columns[name][row] for name in self.options.labels if name in columns}
        if labels and all(labels.values()) and len(labels) == len(self.options.labels):
            found["labels"] = labels
        return found

    @functools.cached_property
    def _columns(self) -> dict[str, np.ndarray]:
        """Texts of each column; "" where a cell has none."""
        return {
            name: np.where(self.obs[name].isna(), "", self.obs[name].astype(str).str.strip()).astype(object)
            for name in self.obs
        }

    def sentences(self, start: int, stop: int, epoch: int = 0) -> list[str]:
        """Cell sentences of rows `start` to `stop`; genes of equal counts change places from epoch to epoch."""
        options = self.options
        return sentences(
            self.study.read(start, stop), self.gene_names, top_k=options.top_k or None, seed=options.seed + epoch,
            keys=self.keys[start:stop],
        )  # fmt: skip

    def fields(self, row: int, sentence: str) -> dict[str, Any]:
        """Fields of a cell with its sentence."""
        number = sentence.count(" ") + 1
        cut = {"num_genes": number} if number == self.options.top_k else {}
        return {**self.values(row), "cell": sentence, **cut}

    def examples(self, start: int, stop: int, epoch: int) -> list[Example]:
        """One example for each cell of rows `start` to `stop` that has what a task needs; others are left out."""
        made = []
        for row, sentence in zip(range(start, stop), self.sentences(start, stop, epoch), strict=True):
            if not sentence:
                continue
            fields, key = self.fields(row, sentence), int(self.keys[row])
            task = _draw(self.options.tasks, fields, (self.options.seed, key, epoch))
            if task is not None:
                made.append(self.prompts.render(task, fields, seed=self.options.seed, key=key, epoch=epoch))
        return made


def _draw(tasks: Sequence[tuple[str, float]], fields: Mapping[str, Any], key: tuple[int, ...]) -> str | None:
    """Task for a cell, by weight, among those whose fields are known."""
    able = [
        (name, weight) for name, weight in tasks if {TASKS[name].answer, *TASKS[name].prompt} <= set(fields)
    ]
    return draw_task(able, key) if able else None


class SentenceSource:
    """Records of cell sentences; see `sct.data.loader.RecordSource`.

    A record is a row of T tokens with the texts of a few cells that follow each other in the store, which is a random
    order. How many is chosen from the lengths of some of them, so that rows are seldom too short; what does not fit
    into a row is cut off and counted.

    Parameters
    ----------
    studies, vocabulary
        Of a store.
    options, prompts, tokenizer
        How texts and tokens are made.
    needs_all
        Whether each task must be possible for some cells; otherwise it is left out where it is not.

    Raises
    ------
    ConfigError
        No cell has what one of the tasks needs.
    """

    def __init__(
        self,
        studies: Sequence[Study],
        vocabulary: GeneVocabulary,
        options: SentenceOptions,
        prompts: Prompts,
        tokenizer: Tokenizer,
        needs_all: bool = True,
    ):
        self.options, self.tokenizer = options, tokenizer
        if tokenizer.eos is None:
            raise ConfigError("the tokenizer has no token that ends a text: name one (eos) in its files.")
        self.texts = [Texts(study, vocabulary, options, prompts) for study in studies]
        if needs_all:
            self._check_fields()
        self.cells_per_row = self._cells_per_row()
        rows = [-(-study.n_cells // self.cells_per_row) for study in studies]
        self._ends = np.cumsum(rows)

    def _check_fields(self) -> None:
        columns: set[str] = set()
        named = {TASKS[name].answer for name, _ in self.options.tasks}
        named = named.union(*(TASKS[name].prompt for name, _ in self.options.tasks))
        if self.options.labels and "labels" not in named:
            raise ConfigError(
                f"data.labels names {', '.join(self.options.labels)}, but no task asks for labels: add labels_to_cell "
                "or cell_to_labels to objective.tasks, or leave data.labels out."
            )
        for name, _ in self.options.tasks:
            needed = {TASKS[name].answer, *TASKS[name].prompt} - {"cell"}
            for texts in self.texts:
                there = set(texts.study.obs_columns)
                columns |= there
                known = {field for field, column in self.options.fields.items() if column in there}
                known |= set(self.options.studies.get(texts.study.name, {}))
                known |= {"labels"} if self.options.labels and set(self.options.labels) <= there else set()
                if needed <= known:
                    break
            else:
                raise ConfigError(
                    f"the task {name!r} needs {' and '.join(sorted(needed))}, which no study has: name columns of obs "
                    f"(there are {', '.join(sorted(columns)) or 'none'}), or leave the task out."
                )

    @property
    def possible(self) -> bool:
        """Whether any of the first cells of any study has what a task needs."""
        return any(texts.examples(0, min(texts.study.n_cells, _SAMPLE), 0) for texts in self.texts)

    def _cells_per_row(self) -> int:
        """Cells whose texts fit into a row nearly always."""
        texts = max(self.texts, key=lambda each: each.study.n_cells)
        examples = texts.examples(0, min(texts.study.n_cells, _SAMPLE), 0)
        lengths = np.array([len(ids) for ids, _ in self._tokens(examples)] or [self.options.length], float)
        fitting, mean, deviation = 1, lengths.mean(), lengths.std()
        while (fitting + 1) * mean + 2 * np.sqrt(fitting + 1) * deviation <= self.options.length:
            fitting += 1
        return fitting

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _place(self, number: int) -> tuple[Texts, int, int]:
        which = int(np.searchsorted(self._ends, number, side="right"))
        texts = self.texts[which]
        start = (number - (int(self._ends[which - 1]) if which else 0)) * self.cells_per_row
        return texts, start, min(start + self.cells_per_row, texts.study.n_cells)

    def describe(self, number: int, epoch: int = 0) -> str:
        """Name the cells of a record."""
        texts, start, stop = self._place(number)
        return f"cells {start} to {stop - 1} of study {texts.study.name!r}"

    def _tokens(self, examples: Sequence[Example]) -> list[tuple[np.ndarray, int]]:
        """Tokens of each example with its end, and how many of them are its prompt."""
        if not examples:
            return []
        tokenizer = self.tokenizer
        begins = tokenizer.begin
        prompts = tokenizer.encode_batch([example.prompt for example in examples])
        responses = tokenizer.encode_response([example.response for example in examples])
        return [
            (
                np.concatenate([begins, prompt, response, [tokenizer.eos]]).astype(np.int32),
                len(begins) + len(prompt),
            )
            for prompt, response in zip(prompts, responses, strict=True)
        ]

    def record(self, number: int, epoch: int = 0) -> dict[str, np.ndarray]:
        """Record of a row.

        Returns
        -------
        `input_ids` int32 (T,); `segments` int32 (T,), numbers of the texts from 1 and 0 for padding; `predicted` bool
        (T,), the tokens that the loss counts, each of which follows from those before it in its text; `cut` int32 (),
        the number of such tokens that did not fit.
        """
        texts, start, stop = self._place(number)
        length = self.options.length
        ids, segments = np.zeros((2, length), np.int32)
        predicted, at, cut = np.zeros(length, bool), 0, 0
        tokens = self._tokens(texts.examples(start, stop, epoch))
        for segment, (own, prompt) in enumerate(tokens, 1):
            first = 1 if self.options.all_tokens else prompt
            fits = min(len(own), length - at)
            ids[at : at + fits], segments[at : at + fits] = own[:fits], segment
            predicted[at + min(first, fits) : at + fits] = True
            cut += len(own) - max(first, fits)
            at += fits
        return {
            "input_ids": ids,
            "segments": segments,
            "predicted": predicted,
            "cut": np.asarray(cut, np.int32),
        }
