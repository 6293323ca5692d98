"""Prompt templates: what a language model is asked about a cell, and how its answer reads.

A file of templates is JSON::

    {
      "version": 1,
      "tasks": {
        "cell_to_cell_type": {
          "replace": false,
          "templates": [
            {"prompt": "Name this cell. {cell}", "response": "Cell type: {cell_type}."}
          ]
        }
      }
    }

The tasks are those of `TASKS` (cell sentences) or of `INSTRUCTIONS` (ZerOmics, where `{cell}` stands for vectors and
not for text): each has the field that is the answer and the fields that its prompt must hold. A response holds the
answer once and no other field. A prompt may hold any field but the answer; a template is used only where all its fields
are known. `{genes}` is made by the renderer: "expressed genes", or "100 most highly expressed genes" where `num_genes`
is given. A literal brace is doubled. In cell sentences `{cell}` stands between white space, so that every gene remains
one word. With `"replace": true` the built-in templates of the task are left out, otherwise the file's follow them. In
messages templates count from 1.

A prompt ends, and a response begins, without white space; `JOIN` stands between them. One space before the
response is part of its first word for byte-level tokenizers, so that prompt and response have the same tokens
apart and together, and the first gene of a sentence has the tokens that it has elsewhere.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import string
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from sct.atomic import write_text
from sct.checks import check_at_least, check_choice, check_not_empty, check_text
from sct.errors import ConfigError, DataError

JOIN = " "
FIELDS = (
    "cell", "genes", "num_genes", "cell_type", "tissue", "abstract", "labels", "organism", "candidates", "answer"
)  # fmt: skip
_VERSION = 1
_LONG = ("cell", "abstract")  # answers that may have several lines


class TaskFields(NamedTuple):
    """The field that answers a task, and those that its prompt must hold."""

    answer: str
    prompt: tuple[str, ...]
    soft: bool = False  # whether the cell is no text, and may stand beside any mark


TASKS: dict[str, TaskFields] = {
    "unconditional": TaskFields("cell", ()),
    "cell_type_to_cell": TaskFields("cell", ("cell_type",)),
    "cell_to_cell_type": TaskFields("cell_type", ("cell",)),
    "tissue_to_cell": TaskFields("cell", ("tissue",)),
    "cell_to_tissue": TaskFields("tissue", ("cell",)),
    "abstract_to_cell": TaskFields("cell", ("abstract",)),
    "cell_to_abstract": TaskFields("abstract", ("cell",)),
    "labels_to_cell": TaskFields("cell", ("labels",)),
    "cell_to_labels": TaskFields("labels", ("cell",)),
}
# ZerOmics, Table 7: annotation of the cell type, rare cells, tumour cells, pathways.
INSTRUCTIONS: dict[str, TaskFields] = {
    "cta": TaskFields("answer", ("cell", "abstract", "candidates"), True),
    "rci": TaskFields("answer", ("cell", "abstract"), True),
    "tcd": TaskFields("answer", ("cell", "abstract", "candidates"), True),
    "cpi": TaskFields("answer", ("cell", "abstract", "candidates"), True),
}
# Names of these tasks for users -> the paper's codes, which model folders, adapters and files of templates keep.
TASK_CODES = {"cell_type": "cta", "rare_cell": "rci", "tumor": "tcd", "pathway": "cpi"}
_TASK_NAMES = {code: name for name, code in TASK_CODES.items()}
_BUILT_IN = {"prompts_cell2sentence.json": TASKS, "prompts_zeromics.json": INSTRUCTIONS}
SENTENCE_PROMPTS, INSTRUCTION_PROMPTS = _BUILT_IN


def task_code(name: str) -> str:
    """Code of an instruction task by its name or its code; anything else stays as it is."""
    return TASK_CODES.get(name, name)


def task_name(code: str) -> str:
    """Name of an instruction task for users by its code; anything else stays as it is."""
    return _TASK_NAMES.get(code, code)


@dataclasses.dataclass(frozen=True)
class Template:
    """One wording of a question and of its answer.

    Attributes
    ----------
    prompt, response
        Texts with {fields}.
    """

    prompt: str
    response: str

    @cached_property
    def prompt_parts(self) -> tuple[tuple[str, str | None], ...]:
        """Stretches of the prompt: literal text, and the field that follows it or None."""
        return _parts(self.prompt)

    @cached_property
    def prompt_fields(self) -> frozenset[str]:
        """Fields of the prompt."""
        return frozenset(field for _, field in self.prompt_parts if field)

    @cached_property
    def _answer(self) -> tuple[str, str, str]:
        """Text before the answer, its field, and text after it."""
        parts = _parts(self.response)
        at, field = next((i, name) for i, (_, name) in enumerate(parts) if name)
        before, after = ("".join(text for text, _ in side) for side in (parts[: at + 1], parts[at + 1 :]))
        return before, field, after

    def response_for(self, value: str) -> str:
        """Return the response that holds this answer."""
        before, field, after = self._answer
        return before + _text(field, value) + after

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        before, field, after = self._answer
        value = r"(?s:(\S.*?))" if field in _LONG else r"([^\s][^\n]*?)"
        end = r"\s*\Z" if field in _LONG else r"\s*(?:\n|\Z)"
        if after.strip():
            # A word after the answer must be there; a full stop may be missing where the text was cut.
            literal = _flexible(after.rstrip()) + r"(?=\s|\Z)"
            end = f"(?:{literal}|{end})" if not re.search(r"\w", after) else literal
        return re.compile(r"\s*" + _flexible(before) + value + end)

    def parse(self, text: str) -> str | None:
        """Take the answer out of a generated response; None where the response is not of this form.

        White space may differ. A label ends where the template's own text goes on, or at the end of its line,
        and what follows is ignored; a cell or an abstract goes on to the end of the text.
        """
        found = self._pattern.match(text)
        return found.group(1).strip() if found else None


@dataclasses.dataclass(frozen=True)
class Example:
    """A question about one cell and its answer.

    Attributes
    ----------
    task, number
        Where the template stands: `Prompts.templates[task][number]`.
    prompt, response
        Texts; the response is empty where the answer was not given (see `Prompts.ask`).
    """

    task: str
    number: int
    prompt: str
    response: str

    @property
    def text(self) -> str:
        """Prompt, `JOIN` and response."""
        return self.prompt + JOIN + self.response if self.response else self.prompt


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The templates of every task, made by `load_prompts`."""

    templates: Mapping[str, tuple[Template, ...]]
    tasks: Mapping[str, TaskFields] = dataclasses.field(default_factory=lambda: TASKS)

    def render(
        self,
        task: str,
        fields: Mapping[str, Any],
        *,
        seed: int = 0,
        key: int = 0,
        epoch: int = 0,
        number: int | None = None,
    ) -> Example:
        """Fill a template of a task with the fields of a cell.

        The choice among the templates whose fields are all known follows from task, seed, key and epoch.

        Parameters
        ----------
        task
            One of `TASKS`.
        fields
            Values by name; None counts as absent. `num_genes` is the number of words of a cell sentence that
            was cut, absent for a whole one; `labels` may be a mapping (see `render_labels`).
        seed, key, epoch
            Of the choice; the key is that of the cell, see `cell_sentence.cell_keys`.
        number
            Take this template, counted from 0, instead.

        Raises
        ------
        ConfigError
            Unknown task, field or number, or no template whose fields are all known.
        DataError
            A value is empty.
        """
        answer = self._task(task).answer
        if fields.get(answer) is None:
            raise ConfigError(f"the answer {answer!r} of the task {task!r} is missing; give it or call ask()")
        asked = self.ask(task, fields, seed=seed, key=key, epoch=epoch, number=number)
        response = self.templates[task][asked.number].response_for(fields[answer])
        return dataclasses.replace(asked, response=response)

    def ask(
        self,
        task: str,
        fields: Mapping[str, Any],
        *,
        seed: int = 0,
        key: int = 0,
        epoch: int = 0,
        number: int | None = None,
    ) -> Example:
        """Fill the prompt alone, for a model that is to answer; see `render`. The answer is not looked at."""
        needed = self._task(task)
        known = {name: value for name, value in fields.items() if value is not None}
        if unknown := sorted(set(known) - set(FIELDS) | (set(known) & {"genes"})):
            raise ConfigError(
                f"the field {unknown[0]!r} is not one that is given; give fields of "
                f"{', '.join(name for name in FIELDS if name != 'genes')}"
            )
        if missing := [name for name in needed.prompt if name not in known]:
            raise ConfigError(f"the field {missing[0]!r} of the task {task!r} is missing; give it")
        have = known.keys() | {"genes"}
        number = self._choose(task, have, (seed, key, epoch)) if number is None else number
        template = self._template(task, number)
        if missing := sorted(template.prompt_fields - have):
            raise ConfigError(
                f"template {number + 1} of the task {task!r} needs the field {missing[0]!r}; give it or take "
                f"another template"
            )
        n = known.get("num_genes")
        known["genes"] = "expressed genes" if n is None else f"{n} most highly expressed genes"
        filled = [text + (_text(name, known[name]) if name else "") for text, name in template.prompt_parts]
        return Example(task, number, "".join(filled), "")

    def response_for(self, task: str, number: int, value: Any) -> str:
        """Response of a template with this answer, e.g. to score the candidates for a label."""
        return self._template(task, number).response_for(value)

    def parse(self, task: str, number: int, text: str) -> str | None:
        """Take the answer out of a response to this template; see `Template.parse`."""
        return self._template(task, number).parse(text)

    def plain(self) -> dict[str, list[dict[str, str]]]:
        """Templates as plain values, which `of_plain` takes."""
        return {task: [dataclasses.asdict(each) for each in many] for task, many in self.templates.items()}

    @classmethod
    def of_plain(
        cls, templates: Mapping[str, Sequence[Mapping[str, str]]], tasks: Mapping[str, TaskFields] = TASKS
    ) -> Prompts:
        """Make them of plain values."""
        return cls(
            {task: tuple(Template(**each) for each in many) for task, many in templates.items()}, tasks
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file that `load_prompts` reads back as these templates, whatever is built in then."""
        tasks = {task: {"replace": True, "templates": many} for task, many in self.plain().items()}
        text = json.dumps({"version": _VERSION, "tasks": tasks}, indent=1, ensure_ascii=False)
        write_text(path, text + "\n")

    def _choose(self, task: str, have: set[str], key: tuple[int, ...]) -> int:
        usable = [i for i, template in enumerate(self.templates[task]) if template.prompt_fields <= have]
        if not usable:
            raise ConfigError(
                f"no template of the task {task!r} does with the fields {', '.join(sorted(have))}; give more "
                f"fields or add such a template"
            )
        digest = hashlib.blake2b(repr((task, *map(int, key))).encode(), digest_size=8).digest()
        return usable[int.from_bytes(digest, "little") % len(usable)]

    def _task(self, task: str) -> TaskFields:
        check_choice("the task", task, self.templates)
        return self.tasks[task]

    def _template(self, task: str, number: int) -> Template:
        self._task(task)
        n = len(self.templates[task])
        check_at_least(f"the number of a template of the task {task!r}", number, 0, most=n - 1)
        return self.templates[task][number]


def draw_task(weights: Sequence[tuple[str, float]], key: tuple[int, ...]) -> str:
    """One of some tasks, by weight; which one follows from the key alone."""
    digest = hashlib.blake2b(repr(("task", *key)).encode(), digest_size=8).digest()
    place = int.from_bytes(digest, "little") / 2**64 * sum(weight for _, weight in weights)
    for name, weight in weights:
        place -= weight
        if place < 0:
            return name
    return weights[-1][0]


def load_prompts(path: str | os.PathLike[str] | None = None, built_in: str = SENTENCE_PROMPTS) -> Prompts:
    """Return built-in templates, with those of a user's file added or put in their place.

    Parameters
    ----------
    path
        File of the user.
    built_in
        `SENTENCE_PROMPTS` or `INSTRUCTION_PROMPTS`.

    Raises
    ------
    ConfigError
        The file is absent or not as the head of this module says; the message names file, task and template.
    """
    known = _built_in(built_in)
    if path is None:
        return known
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the prompts in {path} ({error}); check the path") from None
    return _merged(known, text, str(path))


def render_labels(labels: Mapping[str, Any]) -> str:
    """Write any number of labels as one text, "cell type: T cell; exposure: acute".

    Raises
    ------
    DataError
        No label, an empty name or value, or one that holds a ';' or a line break, or a name with a ':'.
    """
    texts = {str(name): str(value) for name, value in labels.items()}
    for name, value in texts.items():
        for part, marks in ((name, ";:\n"), (value, ";\n")):
            if not part.strip() or part != part.strip() or any(mark in part for mark in marks):
                raise DataError(
                    f"the label {name!r}: {value!r} is empty, padded, or holds a mark that separates labels "
                    f"(';', a line break, ':' in a name); rename it"
                )
    check_not_empty("labels", texts, error=DataError, advice="give at least one name with its value")
    return "; ".join(f"{name}: {value}" for name, value in texts.items())


def parse_labels(text: str) -> dict[str, str]:
    """Read labels written by `render_labels`; what is not of the form "name: value" is left out."""
    pairs = (part.split(":", 1) for part in text.split(";") if ":" in part)
    stripped = ((name.strip(), value.strip()) for name, value in pairs)
    return {name: value for name, value in stripped if name and value}


@cache
def _built_in(name: str) -> Prompts:
    text = resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
    return _merged(Prompts({}, _BUILT_IN[name]), text, name)


def _text(field: str, value: Any) -> str:
    text = render_labels(value) if field == "labels" and isinstance(value, Mapping) else str(value)
    check_text(f"the field {field!r}", text, error=DataError, advice="leave out such cells")
    return text.strip()


def _parts(text: str) -> tuple[tuple[str, str | None], ...]:
    return tuple((literal, field) for literal, field, *_ in string.Formatter().parse(text))


def _flexible(literal: str) -> str:
    """Return a pattern of a literal text that takes any white space for white space."""
    words = r"\s+".join(re.escape(word) for word in literal.split())
    before, after = (r"\s*" if space.isspace() else "" for space in (literal[:1], literal[-1:]))
    return before + words + after


def _merged(base: Prompts, text: str, file: str) -> Prompts:
    """Check a file of templates and add it to those that are there."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file} is not JSON ({error}); correct it") from None
    if (
        not isinstance(content, dict)
        or set(content) != {"version", "tasks"}
        or content["version"] != _VERSION
    ):
        raise ConfigError(f'{file} is not {{"version": {_VERSION}, "tasks": {{...}}}}; write it like this')
    merged = {task: base.templates.get(task, ()) for task in base.tasks}
    tasks = content["tasks"]
    if not isinstance(tasks, dict):
        raise ConfigError(f'{file}: "tasks" is no object; give an object of tasks')
    for given, entry in tasks.items():
        task = given if given in base.tasks else task_code(given)
        if task not in base.tasks:
            check_choice(f"{file}: the task", given, list(map(task_name, base.tasks)))
        known = isinstance(entry, dict) and set(entry) <= {"replace", "templates"}
        templates = entry.get("templates") if known else None
        replace = entry.get("replace", False) if known else None
        if not isinstance(templates, list) or not templates or not isinstance(replace, bool):
            raise ConfigError(
                f'{file}: the task {task!r} is not {{"replace": false, "templates": [...]}} with at least one '
                f"template; write it like this"
            )
        start = () if replace else merged[task]
        seen = {_squeezed(template): f"built-in template {i}" for i, template in enumerate(start, 1)}
        added = []
        for i, raw in enumerate(templates, 1):
            where = f"{file}: task {task!r}, template {i}"
            template = _checked(raw, base.tasks[task], where)
            if (same := seen.setdefault(_squeezed(template), f"template {i}")) != f"template {i}":
                raise ConfigError(f"{where} repeats {same}; remove one of them")
            added.append(template)
        merged[task] = (*start, *added)
    return Prompts(merged, base.tasks)


def _squeezed(template: Template) -> tuple[str, str]:
    """Return what must differ between templates: the words."""
    prompt, response = (" ".join(text.split()).casefold() for text in (template.prompt, template.response))
    return prompt, response


def _checked(raw: Any, needed: TaskFields, where: str) -> Template:
    """Make a template of what the file holds."""
    if (
        not isinstance(raw, dict)
        or set(raw) != {"prompt", "response"}
        or not all(isinstance(text, str) for text in raw.values())
    ):
        raise ConfigError(f'{where} is not {{"prompt": text, "response": text}}; write it like this')
    for side, text in raw.items():
        if not text.strip() or text != text.strip():
            state = "begins or ends with white space" if text.strip() else "is empty"
            raise ConfigError(f"{where}: the {side} {state}; begin and end it with text")
        try:
            parsed = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ConfigError(
                f"{where}: the {side} has a stray brace ({error}); double literal braces"
            ) from None
        names = [
            name + (f":{spec}" if spec else "") + (f"!{conversion}" if conversion else "")
            for _, name, spec, conversion in parsed
            if name is not None
        ]
        if unknown := [name for name in names if name not in FIELDS]:
            raise ConfigError(
                f"{where}: the {side} has the unknown field {{{unknown[0]}}}; use {', '.join(FIELDS)}"
            )
        if side == "response" and names != [needed.answer]:
            raise ConfigError(
                f"{where}: the response has the fields {names}, expected {{{needed.answer}}} once; correct it"
            )
        if side == "prompt" and needed.answer in names:
            raise ConfigError(f"{where}: the prompt tells the answer {{{needed.answer}}}; remove it")
        if side == "prompt" and (missing := [name for name in needed.prompt if name not in names]):
            raise ConfigError(f"{where}: the prompt lacks the field {{{missing[0]}}}; add it")
        if needed.soft and side == "prompt" and names.count("cell") != 1:
            raise ConfigError(f"{where}: the prompt has {{cell}} {names.count('cell')} times; have it once")
        if not needed.soft and re.search(r"\S\{cell\}|\{cell\}\S", text):
            raise ConfigError(
                f"{where}: the {side} has {{cell}} beside other marks; put white space around it"
            )
    return Template(raw["prompt"], raw["response"])
