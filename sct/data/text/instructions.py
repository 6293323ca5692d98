"""Make instructions: questions about a cell, in which soft tokens (vectors) stand for the cell, with their answers.

ZerOmics paper, section 3.2 ("Instruction design", "Tuning strategy"), appendix A.3 and Table 7. The metadata of the
studies is read from a YAML file::

    STUDY:
      abstract: The abstract of the study.
      cell_types: [B cell, T cell, ...]   # candidate cell types; default: the cell types of its cells
      rare: [plasma cell, ...]            # rare cell types; default: those of fewer than rare_share of its cells
      diseases: [glioma, ...]             # candidate diseases for tumor cells; default: the diseases of its cells
      gene_sets: [hypoxia, ...]           # candidate pathways; default: the pathways of its cells
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd

from sct.checks import check_choice, check_distinct
from sct.data.cell_options import CellOptions
from sct.data.cell_records import CellSource
from sct.data.store import Study
from sct.data.text.cell_sentence import cell_keys
from sct.data.text.prompts import INSTRUCTIONS, Example, Prompts, draw_task, task_name
from sct.data.text.studies import read_study_file
from sct.data.text.tokenizer import Tokenizer
from sct.errors import ConfigError

# Placeholder of the cell in a text before tokenization. User text must not contain it.
MARK = "\0"
NORMAL, YES, NO = "normal cell", "Yes", "No"
# Separator of the pathways of a cell. Names of pathways must not contain it.
BETWEEN = ", "
_LISTS = ("cell_types", "rare", "diseases", "gene_sets")


@dataclasses.dataclass(frozen=True)
class InstructionOptions:
    """Options of the instructions about cells.

    Parameters
    ----------
    tasks
        Pairs of a task of `sct.data.text.prompts.INSTRUCTIONS` and its relative sampling weight.
    num_soft
        Number of soft tokens per cell (K).
    length
        Number of tokens per row (T), including the soft tokens.
    cell_type, disease, pathways
        Names of columns of `obs`; "" if there is no column. The pathways column holds the active pathways of a cell,
        such as "hypoxia, apoptosis".
    normal
        Values of the disease column that mean a normal cell.
    rare_share
        A cell type is rare if the fraction of the study's cells with this type is below `rare_share`. This option is
        ignored for studies whose metadata lists the rare types.
    studies
        Dict from the name of each study to its metadata in the YAML file.
    seed
        Random seed of the choice of tasks and templates, and of the order of the candidate answers.
    """

    tasks: tuple[tuple[str, float], ...] = (("cta", 1.0), ("rci", 1.0), ("tcd", 1.0))
    num_soft: int = 500
    length: int = 1024
    cell_type: str = "cell_type"
    disease: str = ""
    pathways: str = ""
    normal: tuple[str, ...] = ("normal", "healthy")
    rare_share: float = 0.05
    studies: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    seed: int = 0


def read_study_texts(path: str | Path) -> dict[str, dict[str, Any]]:
    """Read the YAML file with the metadata of studies. The module docstring shows its format.

    Raises
    ------
    ConfigError
        The file cannot be read, or a field is invalid. The message names the study and the field.
    """
    content = read_study_file(path, "STUDY: {abstract: TEXT, cell_types: [...]}")
    known = ("abstract", *_LISTS)
    for study, entry in content.items():
        for field, value in entry.items():
            check_choice(f"{path}: a field of {study}", field, known)
            good = isinstance(value, str) if field == "abstract" else isinstance(value, list) and value
            texts = [value] if field == "abstract" else value
            if not good or not all(
                isinstance(text, str) and text.strip() and MARK not in text for text in texts
            ):
                form = "a non-empty text without NUL" if field == "abstract" else "a list of non-empty texts"
                raise ConfigError(
                    f"{path}: {field} of {study} is {value!r}, but must be {form}: correct this field."
                )
            if field == "gene_sets" and any(BETWEEN.strip() in text for text in texts):
                raise ConfigError(
                    f"{path}: gene_sets of {study} has a name with a comma, but commas separate the pathways of a "
                    "cell: remove the comma from this name."
                )
            check_distinct(f"{path}: {field} of {study}", texts)
    return content


class LabeledCells(Protocol):
    """Interface of labeled cells, such as a `sct.data.store.Study`."""

    @property
    def name(self) -> str:
        """Return the name of the study."""
        ...

    @property
    def n_cells(self) -> int:
        """Return the number of cells (N)."""
        ...

    def obs(self, columns: Collection[str] | None = None) -> pd.DataFrame:
        """Return the labels of the cells. Requested columns that do not exist are left out."""
        ...


class StudyQuestions:
    """Determine which questions can be asked about the cells of one study, and their answers.

    Parameters
    ----------
    study
        A study of a store, or other labeled cells.
    options
        See `InstructionOptions`.

    Raises
    ------
    ConfigError
        The study has no abstract.
    """

    def __init__(self, study: LabeledCells, options: InstructionOptions):
        self.study, self.options = study, options
        self.study_metadata = options.studies.get(study.name, {})
        if "abstract" not in self.study_metadata:
            raise ConfigError(
                f"the study {study.name!r} has no abstract: add `{study.name}: {{abstract: ...}}` to the file given as "
                "data.studies."
            )

    @functools.cached_property
    def _labels(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return the key of each cell, and a dict from each column to its labels.

        Equal labels share one string, to save memory.
        """
        named = (self.options.cell_type, self.options.disease, self.options.pathways)
        table = self.study.obs({name for name in named if name})
        return cell_keys(table.index), {str(name): _shared_texts(table[name]) for name in table}

    @property
    def keys(self) -> np.ndarray:
        """Return the key of each cell, uint64 (N,). The key is a hash of the cell's name."""
        return self._labels[0]

    def _column(self, name: str) -> np.ndarray | None:
        return self._labels[1].get(name) if name else None

    @functools.cached_property
    def cell_types(self) -> np.ndarray | None:
        """Return the cell type of each cell, or "" if unknown. Return None if the study has no cell-type column."""
        return self._column(self.options.cell_type)

    @functools.cached_property
    def diseases(self) -> np.ndarray | None:
        """Return the disease of each cell (or `NORMAL`), or "" if unknown.

        Return None if the study has no disease column.
        """
        found = self._column(self.options.disease)
        return None if found is None else np.where(np.isin(found, self.options.normal), NORMAL, found)

    @functools.cached_property
    def pathways(self) -> np.ndarray | None:
        """Return the active pathways of each cell as one string.

        The string is "" if no pathway is active. Return None if the study has no pathways column.
        """
        return self._column(self.options.pathways)

    @functools.cached_property
    def rare(self) -> frozenset[str]:
        """Return the rare cell types of the study."""
        if self.cell_types is None:
            return frozenset()
        if "rare" in self.study_metadata:
            return frozenset(self.study_metadata["rare"]) & frozenset(self.cell_types)
        shares = pd.Series(self.cell_types[self.cell_types != ""]).value_counts(normalize=True)
        return frozenset(shares.index[shares < self.options.rare_share])

    @functools.cached_property
    def candidates(self) -> dict[str, tuple[str, ...]]:
        """Return a dict from each task to its candidate answers. Tasks for which no cell has an answer are left out.

        Raises
        ------
        ConfigError
            The metadata file lists cell types, diseases or pathways, but no cell has any of them.
        """
        found: dict[str, Sequence[str]] = {}
        types = self._named("cell_types", self.cell_types, ())
        if len(types) > 1:
            found["cta"] = types
        if self.cell_types is not None and self.rare and set(self.cell_types) - {""} - self.rare:
            found["rci"] = (YES, NO)
        diseases = self._named("diseases", self.diseases, {NORMAL, *self.options.normal})
        if diseases:
            found["tcd"] = (*diseases, NORMAL)
        listed = None if self.pathways is None else _names(self.pathways)
        pathways = self._named("gene_sets", listed, ())
        if len(pathways) > 1:
            found["cpi"] = pathways
        return {task: tuple(many) for task, many in found.items()}

    def _named(self, field: str, values: np.ndarray | None, without: Collection[str]) -> list[str]:
        """Return the names in a field of the metadata file.

        Without this field, return the names in the labels of the cells.
        """
        if values is None:
            return []
        present = set(values) - {""}
        listed = self.study_metadata.get(field)
        if listed is None:
            return sorted(present - set(without))
        if present - {NORMAL} and not present & set(listed):
            raise ConfigError(
                f"the metadata of the study {self.study.name!r} list {field}, but no cell of the study has any: "
                f"write the names in the metadata as they are in the cells ({', '.join(sorted(present)[:5])})."
            )
        return [name for name in listed if name not in without]

    def values(self, row: int) -> dict[str, str]:
        """Return the known answers about a cell, as a dict from task to answer."""
        return {task: answer for task in self.candidates if (answer := self.answer(task, row))}

    def longest(self, task: str) -> str:
        """Return the longest possible answer to a task. The task must have candidates."""
        if task != "cpi" or self.pathways is None:
            return max(self.candidates[task], key=len)
        _, rows = np.unique(self.pathways, return_index=True)
        return max((self.answer(task, int(row)) for row in rows), key=len) or self.candidates[task][0]

    def answer(self, task: str, row: int) -> str:
        """Return the answer to a task for a cell. The answer is "" if it is unknown or if no pathway is active."""
        if task not in self.candidates:
            return ""
        if task == "tcd":
            value = str(self.diseases[row]) if self.diseases is not None else ""
        elif task == "cpi":
            own = (
                np.array([], dtype=object) if self.pathways is None else _names(self.pathways[row : row + 1])
            )
            return BETWEEN.join(name for name in own if name in self.candidates[task])
        else:
            value = str(self.cell_types[row]) if self.cell_types is not None else ""
            if task == "rci" and value:
                value = YES if value in self.rare else NO
        return value if value in self.candidates[task] else ""


def _shared_texts(column: pd.Series) -> np.ndarray:
    """Return labels as strings (N,). A missing label is "". Equal labels share one string in memory."""
    codes, values = pd.factorize(column)
    names = [*(str(value).strip() for value in values), ""]  # the code of missing labels is -1: the last name
    return np.array(names, dtype=object)[codes]


def _names(texts: Iterable[str]) -> np.ndarray:
    """Return the sorted distinct pathways that occur in comma-separated strings."""
    named = (name.strip() for text in texts for name in str(text).split(BETWEEN.strip()))
    return np.array(sorted({name for name in named if name}), dtype=object)


def fields_of(
    task: str, abstract: str, candidates: Sequence[str], key: tuple[int, ...], answer: str | None = None
) -> dict[str, Any]:
    """Return the fields to fill into a template.

    The key determines a random order of the candidates, so that the order does not reveal the answer. If the answer has
    several pathways, these pathways are shuffled too.

    Parameters
    ----------
    task
        Code of a task of `sct.data.text.prompts.INSTRUCTIONS`.
    abstract
        Abstract of the study.
    candidates
        Candidate answers.
    key
        Seed of the shuffling.
    answer
        The answer, if known.
    """
    if task == "cpi" and answer:
        own = answer.split(BETWEEN)
        answer = BETWEEN.join(own[i] for i in np.random.default_rng([*key, 2]).permutation(len(own)))
    fields: dict[str, Any] = {"cell": MARK, "abstract": abstract, "answer": answer}
    if "candidates" in INSTRUCTIONS[task].prompt:
        # The template itself mentions the normal cell.
        listed = [each for each in candidates if task != "tcd" or each != NORMAL]
        order = np.random.default_rng(list(key)).permutation(len(listed))
        fields["candidates"] = ", ".join(listed[i] for i in order)
    return fields


def questions_of(prompts: Sequence[str], tokenizer: Tokenizer, num_soft: int) -> list[np.ndarray]:
    """Return the tokens of each question as an int32 array.

    The numbers -1 .. -K stand for the soft tokens of the cell. Text that questions share is tokenized only once.
    """
    parts = [prompt.split(MARK) for prompt in prompts]
    texts = list(dict.fromkeys(text for pair in parts for text in pair))
    tokens = dict(zip(texts, tokenizer.encode_batch(texts), strict=True))
    soft = -1 - np.arange(num_soft)
    return [
        np.concatenate([tokenizer.begin, tokens[before], soft, tokens[after]]).astype(np.int32)
        for before, after in parts
    ]


def tokens_of(example: Example, tokenizer: Tokenizer, num_soft: int) -> tuple[np.ndarray, int]:
    """Return the tokens of an example, int32, and how many of these tokens belong to the question.

    The tokens are those of the question, followed by those of the answer and EOS if there is an answer.
    """
    (question,) = questions_of([example.prompt], tokenizer, num_soft)
    if not example.response:
        return question, len(question)
    (response,) = tokenizer.encode_response([example.response])
    return np.concatenate([question, response, [tokenizer.eos]]).astype(np.int32), len(question)


class InstructionSource:
    """Make training records, each with a cell and one instruction about this cell; see `sct.data.loader.RecordSource`.

    A record has the arrays of `sct.data.cell_records.CellSource` and, in addition:

    - `input_ids` int32 (T,): the tokens of question and answer.
    - `attention_mask` bool (T,): True for tokens, False for padding.
    - `predicted` bool (T,): the tokens of the answer and EOS, which the loss predicts.
    - `task` int32 (): the index of the task in `options.tasks`.

    The seed, the cell and the epoch determine the task, the template and the order of the candidates. If no answer
    about a cell is known, the loss predicts no token of the cell's record.

    Parameters
    ----------
    studies
        Studies of one store.
    cells, known, exhaustive
        See `CellSource`.
    options
        See `InstructionOptions`.
    prompts, tokenizer
        Templates of the instructions, and the tokenizer.

    Raises
    ------
    ConfigError
        No study has labels for one of the tasks, a study has no abstract, an instruction is longer than a row, or the
        tokenizer has no EOS token.
    """

    def __init__(
        self,
        studies: Sequence[Study],
        cells: CellOptions,
        options: InstructionOptions,
        prompts: Prompts,
        tokenizer: Tokenizer,
        known: np.ndarray | None = None,
        exhaustive: bool = False,
    ):
        if tokenizer.eos is None:
            raise ConfigError(
                "the tokenizer has no end-of-text token: set eos_token in its tokenizer_config.json."
            )
        self.options, self.prompts, self.tokenizer = options, prompts, tokenizer
        self.cells = CellSource(studies, cells, known, exhaustive, options.seed)
        self.questions = {study.name: StudyQuestions(study, options) for study in studies}
        if not exhaustive:
            self._check_rare()
            self._check_tasks()
        self._check_lengths()

    def _check_tasks(self) -> None:
        for task, _ in self.options.tasks:
            if not any(task in each.candidates for each in self.questions.values()):
                column = {"tcd": "disease", "cpi": "pathways"}.get(task, "cell_type")
                values = "at least two values"
                if task == "rci":
                    values = f"common types and rare types (below {self.options.rare_share:g} of the cells)"
                raise ConfigError(
                    f"no study has labels for the task {task_name(task)!r}: set data.{column} to a column of obs with "
                    f"{values}, or remove the task."
                )

    def _check_rare(self) -> None:
        """Raise `ConfigError` if the metadata file lists a rare cell type for a study that has no cell of this type."""
        for each in self.questions.values():
            listed = set(each.study_metadata.get("rare", ()))
            if each.cell_types is not None and listed and not listed & set(each.cell_types):
                raise ConfigError(
                    f"the file given as data.studies lists rare cell types of {each.study.name!r} (for example "
                    f"{sorted(listed)[0]!r}), but no cell has one of these types: spell each type exactly as in the "
                    "obs column that data.cell_type names."
                )

    def _check_lengths(self) -> None:
        """Raise `ConfigError` if the longest instruction about a study does not fit into a row."""
        for each in self.questions.values():
            for task, _ in self.options.tasks:
                for number in range(len(self.prompts.templates[task])):
                    if candidates := each.candidates.get(task):
                        fields = fields_of(
                            task, each.study_metadata["abstract"], candidates, (0,), each.longest(task)
                        )
                        example = self.prompts.render(task, fields, number=number)
                        tokens, _ = tokens_of(example, self.tokenizer, self.options.num_soft)
                        self._check_length(len(tokens), each.study)

    def _check_length(self, number: int, study: LabeledCells) -> None:
        if number > self.options.length:
            raise ConfigError(
                f"an instruction about the study {study.name!r} has {number} tokens, but data.length allows only "
                f"{self.options.length}: increase data.length, or shorten the abstract of this study."
            )

    def __len__(self) -> int:
        return len(self.cells)

    def describe(self, number: int, epoch: int = 0) -> str:
        """Return the text that identifies a cell in messages: the study and the row of the cell."""
        return self.cells.describe(number, epoch)

    def example(self, study: Study, row: int, epoch: int) -> tuple[int, Example | None]:
        """Draw a task for a cell.

        Return two values: the number of the task, and the instruction. If no answer about the cell is known, these
        values are 0 and None.
        """
        asked = self.questions[study.name]
        able = [(task, weight) for task, weight in self.options.tasks if asked.answer(task, row)]
        if not able:
            return 0, None
        key = (self.options.seed, int(asked.keys[row]), epoch)
        task = draw_task(able, key)
        fields = fields_of(
            task, asked.study_metadata["abstract"], asked.candidates[task], (*key, 1), asked.answer(task, row)
        )
        number = [name for name, _ in self.options.tasks].index(task)
        return number, self.prompts.render(task, fields, seed=key[0], key=key[1], epoch=epoch)

    def record(self, number: int, epoch: int = 0) -> dict[str, np.ndarray]:
        """Return the record of a cell."""
        study, rows = self.cells.cells.rows(number, epoch)
        task, example = self.example(study, int(rows[0]), epoch)
        length = self.options.length
        ids, predicted = np.zeros(length, np.int32), np.zeros(length, bool)
        attention_mask = np.zeros(length, bool)
        if example is not None:
            tokens, question = tokens_of(example, self.tokenizer, self.options.num_soft)
            self._check_length(len(tokens), study)
            ids[: len(tokens)], attention_mask[: len(tokens)] = tokens, True
            predicted[question : len(tokens)] = True
        own = self.cells.record(number, epoch)
        return {
            **own,
            "input_ids": ids,
            "attention_mask": attention_mask,
            "predicted": predicted,
            "task": np.asarray(task, np.int32),
        }
