"""Make training records of cell sentences: rows of tokens. Each row has the prompts and answers of several cells."""

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

_SAMPLE = 64  # cells whose text lengths determine how many cells fit into a row


@dataclasses.dataclass(frozen=True)
class SentenceOptions:
    """Options for converting cells to text.

    Parameters
    ----------
    top_k
        Maximal number of genes in a cell sentence; 0 for all expressed genes.
    length
        Number of tokens per row (T).
    tasks
        Pairs of a task of `sct.data.text.prompts.TASKS` and its relative sampling weight.
    fields
        Dict from each prompt field to the column of `obs` that has the values of the field.
    labels
        Columns of `obs` that form the field "labels".
    studies
        Texts that apply to all cells of a study, such as its abstract: {study name: {prompt field: text}}.
    all_tokens
        Compute the loss on all tokens instead of only the response tokens.
    seed
        Random seed of the order of genes with equal counts, and of the choice of tasks and templates.
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
    """Return, for each gene, the name that cell sentences use for it.

    The name is the gene's symbol. If the symbol is missing, not unique or contains white space, the name is the Ensembl
    id.
    """
    symbols = pd.Series(vocabulary.symbols)
    usable = ~symbols.duplicated(keep=False) & symbols.str.fullmatch(r"\S+").astype(bool)
    return tuple(np.where(usable, symbols, vocabulary.keys).tolist())


def read_studies(path: str | Path) -> dict[str, dict[str, str]]:
    """Read a YAML file with the metadata of studies, `STUDY: {abstract: ..., tissue: ...}`.

    Raises
    ------
    ConfigError
        The file cannot be read or does not have this format.
    """
    form = "STUDY: {abstract: TEXT, tissue: TEXT}"
    content = read_study_file(path, form)
    texts = [text for entry in content.values() for text in entry.values()]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise wrong_form(path, form)
    return {study: {str(field): text for field, text in entry.items()} for study, entry in content.items()}


class Texts:
    """Make the prompts and cell sentences of one study.

    Parameters
    ----------
    study
        A study of a store.
    vocabulary
        Gene vocabulary of the store.
    options, prompts
        How cells are converted to text, and the prompt templates.
    """

    def __init__(self, study: Study, vocabulary: GeneVocabulary, options: SentenceOptions, prompts: Prompts):
        study.check_counts()
        self.study, self.options, self.prompts = study, options, prompts
        self.gene_names = sentence_gene_names(vocabulary)

    @functools.cached_property
    def obs(self) -> pd.DataFrame:
        """Return the metadata of the cells, with only the columns that prompts use."""
        return self.study.obs({*self.options.fields.values(), *self.options.labels})

    @functools.cached_property
    def keys(self) -> np.ndarray:
        """Return the key of each cell, uint64 (N,). The key is a hash of the cell's name."""
        return cell_keys(self.obs.index)

    def values(self, row: int) -> dict[str, Any]:
        """Return the known prompt fields of a cell, as a dict without the cell sentence."""
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
        """Return the values of each column as strings. A missing value is ""."""
        return {
            name: np.where(self.obs[name].isna(), "", self.obs[name].astype(str).str.strip()).astype(object)
            for name in self.obs
        }

    def sentences(self, start: int, stop: int, epoch: int = 0) -> list[str]:
        """Return the sentences of rows `start` to `stop` - 1. The order of genes with equal counts differs by epoch."""
        options = self.options
        return sentences(
            self.study.read(start, stop), self.gene_names, top_k=options.top_k or None, seed=options.seed + epoch,
            keys=self.keys[start:stop],
        )  # fmt: skip

    def fields(self, row: int, sentence: str) -> dict[str, Any]:
        """Return the known prompt fields of a cell, as a dict with the cell sentence."""
        number = sentence.count(" ") + 1
        cut = {"num_genes": number} if number == self.options.top_k else {}
        return {**self.values(row), "cell": sentence, **cut}

    def examples(self, start: int, stop: int, epoch: int) -> list[Example]:
        """Return one question with its answer for each cell in the rows `start` to `stop` - 1.

        A cell is left out if its sentence is empty, or if every task has a field that is unknown for the cell.
        """
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
    """Draw a task for a cell by weight, from the tasks whose fields are all known. Return None if no task remains."""
    able = [
        (name, weight) for name, weight in tasks if {TASKS[name].answer, *TASKS[name].prompt} <= set(fields)
    ]
    return draw_task(able, key) if able else None


class SentenceSource:
    """Make training records of cell sentences; see `sct.data.loader.RecordSource`.

    A record is a row of T tokens with the texts of several consecutive cells of a study. The store keeps cells in
    random order. The number of cells per row is estimated from the text lengths of a sample, so that nearly all texts
    fit. Tokens that do not fit into a row are cut off and counted.

    Parameters
    ----------
    studies, vocabulary
        Studies of a store, and its gene vocabulary.
    options, prompts, tokenizer
        How cells are converted to text and tokens.
    needs_all
        If True, each task must be possible for at least one study. If False, tasks that are not possible are skipped.

    Raises
    ------
    ConfigError
        No study has the fields that a task needs, or the tokenizer has no EOS token.
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
            raise ConfigError(
                "the tokenizer has no end-of-text token: set eos_token in its tokenizer_config.json."
            )
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
                f"data.labels is {', '.join(self.options.labels)}, but no task uses labels: add labels_to_cell or "
                "cell_to_labels to objective.tasks, or leave out data.labels."
            )
        for name, _ in self.options.tasks:
            needed = {TASKS[name].answer, *TASKS[name].prompt} - {"cell"}
            for texts in self.texts:
                own = set(texts.study.obs_columns)
                columns |= own
                known = {field for field, column in self.options.fields.items() if column in own}
                known |= set(self.options.studies.get(texts.study.name, {}))
                known |= {"labels"} if self.options.labels and set(self.options.labels) <= own else set()
                if needed <= known:
                    break
            else:
                raise ConfigError(
                    f"the task {name!r} needs {' and '.join(sorted(needed))}, but no study has all of these fields: "
                    "set the options for these fields to columns of obs (available: "
                    f"{', '.join(sorted(columns)) or 'none'}), or remove the task."
                )

    @property
    def possible(self) -> bool:
        """Return whether at least one of the first cells of a study has all prompt fields of a task."""
        return any(texts.examples(0, min(texts.study.n_cells, _SAMPLE), 0) for texts in self.texts)

    def _cells_per_row(self) -> int:
        """Return how many cells to put into one row, so that their texts together almost always fit."""
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
        """Return the text that identifies the cells of a record in messages."""
        texts, start, stop = self._place(number)
        return f"cells {start} to {stop - 1} of study {texts.study.name!r}"

    def _tokens(self, examples: Sequence[Example]) -> list[tuple[np.ndarray, int]]:
        """Return a pair for each example: the tokens with EOS at the end, and the number of prompt tokens."""
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
        """Return one record: a row of tokens with the texts of several cells.

        Returns
        -------
        Arrays by name:

        - `input_ids` int32 (T,): tokens.
        - `segments` int32 (T,): number of the text to which a token belongs, counted from 1; 0 for padding.
        - `predicted` bool (T,): True for the tokens that the loss predicts. A token is predicted from the previous
          tokens of the same text.
        - `cut` int32 (): number of predicted tokens that did not fit into the row.
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
