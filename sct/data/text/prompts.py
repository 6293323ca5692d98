"""Read and fill prompt templates: texts of questions about a cell and of the answers, with fields to fill in.

A template file is JSON::

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

The tasks are those of `TASKS` (cell sentences) or `INSTRUCTIONS` (ZerOmics, where `{cell}` becomes soft tokens instead
of text). Each task defines its answer field and the fields that a prompt must contain. These rules apply:

- A response contains the answer field once and no other field.
- A prompt may contain any field except the answer. A template is used only for cells that have a known value for each
  of its fields.
- The renderer fills in `{genes}`: "expressed genes", or "100 most highly expressed genes" if `num_genes` is 100.
- A brace in the text is written twice: `{{` or `}}`.
- For cell sentences, white space must surround `{cell}`, so that each gene name remains a separate word.
- With `"replace": true`, the templates of the file replace the built-in templates. Otherwise they are added after the
  built-in templates.
- Error messages count the templates of a task from 1.

A prompt must not end with white space, and a response must not begin with it. `JOIN`, a single space, is put between
them. Byte-level tokenizers make this space part of the first word of the response. Therefore prompt and response have
the same tokens whether they are tokenized separately or together.
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
_LONG = ("cell", "abstract")  # answers that may span several lines


class TaskFields(NamedTuple):
    """Define the answer field of a task, and the fields that the prompt of the task must contain."""

    answer: str
    prompt: tuple[str, ...]
    soft: bool = False  # whether the cell becomes soft tokens, so that {cell} needs no white space around it


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
# ZerOmics, Table 7: cell type annotation, rare cell identification, tumor cell detection, pathway identification.
INSTRUCTIONS: dict[str, TaskFields] = {
    "cta": TaskFields("answer", ("cell", "abstract", "candidates"), True),
    "rci": TaskFields("answer", ("cell", "abstract"), True),
    "tcd": TaskFields("answer", ("cell", "abstract", "candidates"), True),
    "cpi": TaskFields("answer", ("cell", "abstract", "candidates"), True),
}
# User-facing names of these tasks -> the paper's codes, which are stored in model folders, adapters and template files.
TASK_CODES = {"cell_type": "cta", "rare_cell": "rci", "tumor": "tcd", "pathway": "cpi"}
_TASK_NAMES = {code: name for name, code in TASK_CODES.items()}
_BUILT_IN = {"prompts_cell2sentence.json": TASKS, "prompts_zeromics.json": INSTRUCTIONS}
SENTENCE_PROMPTS, INSTRUCTION_PROMPTS = _BUILT_IN


def task_code(name: str) -> str:
    """Return the code of an instruction task from its name. Any other string is returned unchanged."""
    return TASK_CODES.get(name, name) if isinstance(name, str) else name


def task_name(code: str) -> str:
    """Return the user-facing name of an instruction task from its code. Any other string is returned unchanged."""
    return _TASK_NAMES.get(code, code)


@dataclasses.dataclass(frozen=True)
class Template:
    """Store the text of one question and its answer, with fields to fill in.

    Attributes
    ----------
    prompt, response
        Text of the question and text of the answer. Fields are in braces, such as "{cell}".
    """

    prompt: str
    response: str

    @cached_property
    def prompt_parts(self) -> tuple[tuple[str, str | None], ...]:
        """Return the segments of the prompt as pairs: a literal text, and the field after this text (or None)."""
        return _parts(self.prompt)

    @cached_property
    def prompt_fields(self) -> frozenset[str]:
        """Return the fields of the prompt."""
        return frozenset(field for _, field in self.prompt_parts if field)

    @cached_property
    def _answer(self) -> tuple[str, str, str]:
        """Return the text before the answer, the name of the answer field, and the text after the answer."""
        parts = _parts(self.response)
        at, field = next((i, name) for i, (_, name) in enumerate(parts) if name)
        before, after = ("".join(text for text, _ in side) for side in (parts[: at + 1], parts[at + 1 :]))
        return before, field, after

    def response_for(self, value: str) -> str:
        """Return the response of this template, filled with an answer."""
        before, field, after = self._answer
        return before + _text(field, value) + after

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        before, field, after = self._answer
        value = r"(?s:(\S.*?))" if field in _LONG else r"([^\s][^\n]*?)"
        end = r"\s*\Z" if field in _LONG else r"\s*(?:\n|\Z)"
        if after.strip():
            # Words after the answer are required. Punctuation is optional, because the generation may have stopped
            # early.
            literal = _flexible(after.rstrip()) + r"(?=\s|\Z)"
            end = f"(?:{literal}|{end})" if not re.search(r"\w", after) else literal
        return re.compile(r"\s*" + _flexible(before) + value + end)

    def parse(self, text: str) -> str | None:
        """Extract the answer from a generated response; return None if the response does not match the template.

        White space may differ. A label ends where the text of the template continues or at the end of the line. The
        rest of the response is ignored. A cell sentence or an abstract extends to the end of the response.
        """
        found = self._pattern.match(text)
        return found.group(1).strip() if found else None


@dataclasses.dataclass(frozen=True)
class Example:
    """Store a question about one cell, and its answer.

    Attributes
    ----------
    task, number
        Task, and number of the template. The template is `Prompts.templates[task][number]`.
    prompt, response
        Filled template. The response is empty if it was made by `Prompts.ask`.
    """

    task: str
    number: int
    prompt: str
    response: str

    @property
    def text(self) -> str:
        """Return the prompt and the response as one text, joined by `JOIN` (a space)."""
        return self.prompt + JOIN + self.response if self.response else self.prompt


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Hold and fill the templates of all tasks; `load_prompts` makes this object.

    Attributes
    ----------
    templates
        Templates by task.
    tasks
        Answer field and required prompt fields of each task: the dict `TASKS` or `INSTRUCTIONS`.
    """

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
        """Fill a template of a task with the values of a cell.

        The template is drawn from the templates whose fields are all known. Task, seed, key and epoch determine which
        template is drawn.

        Parameters
        ----------
        task
            A task in `self.tasks`.
        fields
            Values by field name; None means unknown. For a truncated cell sentence, `num_genes` is its number of genes;
            for a complete cell sentence, it is unknown. `labels` may be a mapping (see `render_labels`).
        seed, key, epoch
            Seed, key of the cell (see `ranking.cell_keys`) and epoch. They determine which template is drawn.
        number
            Number of the template to use, counted from 0. Default: draw a template.

        Returns
        -------
        The prompt and the response.

        Raises
        ------
        ConfigError
            The task, a field or the number is unknown, the answer is missing, or there is no template whose fields are
            all known.
        DataError
            A value is empty.
        """
        answer = self._task(task).answer
        if fields.get(answer) is None:
            raise ConfigError(
                f"the answer {answer!r} of the task {task!r} is missing: add it to fields, or call ask() for a prompt "
                "without an answer."
            )
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
        """Fill only the prompt, so that a model can generate the answer; see `render` for the parameters."""
        needed = self._task(task)
        known = {name: value for name, value in fields.items() if value is not None}
        if unknown := sorted(set(known) - set(FIELDS) | (set(known) & {"genes"})):
            raise ConfigError(
                f"fields has an unknown field {unknown[0]!r}: use "
                f"{', '.join(name for name in FIELDS if name != 'genes')}."
            )
        if missing := [name for name in needed.prompt if name not in known]:
            raise ConfigError(f"the task {task!r} needs the field {missing[0]!r}: add it to fields.")
        have = known.keys() | {"genes"}
        number = self._choose(task, have, (seed, key, epoch)) if number is None else number
        template = self._template(task, number)
        if missing := sorted(template.prompt_fields - have):
            raise ConfigError(
                f"template {number + 1} of the task {task!r} needs the field {missing[0]!r}: add it to fields, or use "
                "another template."
            )
        n = known.get("num_genes")
        known["genes"] = "expressed genes" if n is None else f"{n} most highly expressed genes"
        filled = [text + (_text(name, known[name]) if name else "") for text, name in template.prompt_parts]
        return Example(task, number, "".join(filled), "")

    def response_for(self, task: str, number: int, value: Any) -> str:
        """Return the response of a template, filled with an answer. This is useful to score candidate labels."""
        return self._template(task, number).response_for(value)

    def parse(self, task: str, number: int, text: str) -> str | None:
        """Extract the answer from a response to this template; see `Template.parse`."""
        return self._template(task, number).parse(text)

    def plain(self) -> dict[str, list[dict[str, str]]]:
        """Return the templates as plain dicts and lists; the inverse of `of_plain`."""
        return {task: [dataclasses.asdict(each) for each in many] for task, many in self.templates.items()}

    @classmethod
    def of_plain(
        cls, templates: Mapping[str, Sequence[Mapping[str, str]]], tasks: Mapping[str, TaskFields] = TASKS
    ) -> Prompts:
        """Make `Prompts` from plain dicts and lists; the inverse of `plain`."""
        return cls(
            {task: tuple(Template(**each) for each in many) for task, many in templates.items()}, tasks
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a template file. `load_prompts` returns exactly these templates, even in later releases of sct."""
        tasks = {task: {"replace": True, "templates": many} for task, many in self.plain().items()}
        text = json.dumps({"version": _VERSION, "tasks": tasks}, indent=1, ensure_ascii=False)
        write_text(path, text + "\n")

    def _choose(self, task: str, have: set[str], key: tuple[int, ...]) -> int:
        usable = [i for i, template in enumerate(self.templates[task]) if template.prompt_fields <= have]
        if not usable:
            raise ConfigError(
                f"no template of the task {task!r} can be filled in with only the fields {', '.join(sorted(have))}: "
                "give more fields, or add a template that needs only these fields."
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
    """Draw a task from (task, weight) pairs. The key determines the result."""
    digest = hashlib.blake2b(repr(("task", *key)).encode(), digest_size=8).digest()
    place = int.from_bytes(digest, "little") / 2**64 * sum(weight for _, weight in weights)
    for name, weight in weights:
        place -= weight
        if place < 0:
            return name
    return weights[-1][0]


def load_prompts(path: str | os.PathLike[str] | None = None, built_in: str = SENTENCE_PROMPTS) -> Prompts:
    """Load the built-in templates and the templates of a file.

    For each task in the file, the templates of the file are added to the built-in templates of the task. With
    `"replace": true`, the templates of the file replace the built-in templates of the task.

    Parameters
    ----------
    path
        Template file; the module docstring describes its format. None loads only the built-in templates.
    built_in
        `SENTENCE_PROMPTS` or `INSTRUCTION_PROMPTS`.

    Raises
    ------
    ConfigError
        The file cannot be read or is invalid. The message names the file, the task and the template.
    """
    known = _built_in(built_in)
    if path is None:
        return known
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the template file {path} cannot be read ({error}): check the path.") from None
    return _merged(known, text, str(path))


def render_labels(labels: Mapping[str, Any]) -> str:
    """Join labels into one string such as "cell type: T cell; exposure: acute".

    Parameters
    ----------
    labels
        Values by label name.

    Raises
    ------
    DataError
        There are no labels, a name or value is empty or contains ';' or a line break, or a name contains ':'.
    """
    texts = {str(name): str(value) for name, value in labels.items()}
    for name, value in texts.items():
        for part, marks in ((name, ";:\n"), (value, ";\n")):
            if not part.strip() or part != part.strip() or any(mark in part for mark in marks):
                raise DataError(
                    f"the label {name!r} has the value {value!r}, but a name or value must not be empty, begin or end "
                    "with white space, or contain ';' or a line break, and a name must not contain ':': rename the "
                    "label or its value."
                )
    check_not_empty("labels", texts, error=DataError, advice="give at least one name with its value")
    return "; ".join(f"{name}: {value}" for name, value in texts.items())


def parse_labels(text: str) -> dict[str, str]:
    """Split a string written by `render_labels` into labels. Parts that are not "name: value" are left out."""
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
    """Return a regular expression that matches a literal text with any amount of white space between its words."""
    words = r"\s+".join(re.escape(word) for word in literal.split())
    before, after = (r"\s*" if space.isspace() else "" for space in (literal[:1], literal[-1:]))
    return before + words + after


def _merged(base: Prompts, text: str, file: str) -> Prompts:
    """Check the content of a template file, and add its templates to existing ones."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file} is not valid JSON ({error}): correct the file at this position.") from None
    if (
        not isinstance(content, dict)
        or set(content) != {"version", "tasks"}
        or content["version"] != _VERSION
    ):
        raise ConfigError(
            f'{file} must have the form {{"version": {_VERSION}, "tasks": {{...}}}}: rewrite the file in this form.'
        )
    merged = {task: base.templates.get(task, ()) for task in base.tasks}
    tasks = content["tasks"]
    if not isinstance(tasks, dict):
        raise ConfigError(
            f'{file}: "tasks" must be a JSON object with one entry per task: rewrite "tasks" in this form.'
        )
    codes = [given if given in base.tasks else task_code(given) for given in tasks]
    for task, given, entry in zip(codes, tasks, tasks.values(), strict=True):
        if codes.count(task) > 1:
            raise ConfigError(
                f"{file}: the task {task_name(task)!r} has two entries, one under its name and one under its code: "
                "keep only one entry."
            )
        if task not in base.tasks:
            check_choice(f"{file}: the task", given, list(map(task_name, base.tasks)))
        known = isinstance(entry, dict) and set(entry) <= {"replace", "templates"}
        templates = entry.get("templates") if known else None
        replace = entry.get("replace", False) if known else None
        if not isinstance(templates, list) or not templates or not isinstance(replace, bool):
            raise ConfigError(
                f'{file}: the task {task!r} must have the form {{"replace": false, "templates": [...]}} with at least '
                "one template: rewrite this entry in this form."
            )
        start = () if replace else merged[task]
        seen = {_squeezed(template): f"built-in template {i}" for i, template in enumerate(start, 1)}
        added = []
        for i, raw in enumerate(templates, 1):
            where = f"{file}: task {task!r}, template {i}"
            template = _checked(raw, base.tasks[task], where)
            if (same := seen.setdefault(_squeezed(template), f"template {i}")) != f"template {i}":
                raise ConfigError(f"{where} repeats {same}: remove one of the two.")
            added.append(template)
        merged[task] = (*start, *added)
    return Prompts(merged, base.tasks)


def _squeezed(template: Template) -> tuple[str, str]:
    """Return the prompt and the response in lower case with single spaces. Repeated templates then become equal."""
    prompt, response = (" ".join(text.split()).casefold() for text in (template.prompt, template.response))
    return prompt, response


def _checked(raw: Any, needed: TaskFields, where: str) -> Template:
    """Check one template of a file, and return it."""
    if (
        not isinstance(raw, dict)
        or set(raw) != {"prompt", "response"}
        or not all(isinstance(text, str) for text in raw.values())
    ):
        raise ConfigError(
            f'{where} must have the form {{"prompt": TEXT, "response": TEXT}}: rewrite the template in this form.'
        )
    for side, text in raw.items():
        if not text.strip() or text != text.strip():
            state = "begins or ends with white space" if text.strip() else "is empty"
            raise ConfigError(
                f"{where}: the {side} {state}, but must begin and end with text: correct the {side}."
            )
        try:
            parsed = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ConfigError(
                f"{where}: the {side} has an unmatched brace ({error}): close the field, or write {{{{ or }}}} for a "
                "brace in the text."
            ) from None
        names = [
            name + (f":{spec}" if spec else "") + (f"!{conversion}" if conversion else "")
            for _, name, spec, conversion in parsed
            if name is not None
        ]
        if unknown := [name for name in names if name not in FIELDS]:
            raise ConfigError(
                f"{where}: the {side} has the unknown field {{{unknown[0]}}}: use {', '.join(FIELDS)}."
            )
        if side == "response" and names != [needed.answer]:
            raise ConfigError(
                f"{where}: the response has the fields {names}, but must have only the field {{{needed.answer}}}, "
                "once: correct the response."
            )
        if side == "prompt" and needed.answer in names:
            raise ConfigError(
                f"{where}: the prompt contains the field {{{needed.answer}}}, which is the answer of the task: remove "
                "this field from the prompt."
            )
        if side == "prompt" and (missing := [name for name in needed.prompt if name not in names]):
            raise ConfigError(
                f"{where}: the prompt lacks the field {{{missing[0]}}}, which every prompt of this task needs: add "
                "this field to the prompt."
            )
        if needed.soft and side == "prompt" and names.count("cell") != 1:
            raise ConfigError(
                f"{where}: the prompt has {{cell}} {names.count('cell')} times, but must have {{cell}} exactly once: "
                "correct the prompt."
            )
        if not needed.soft and re.search(r"\S\{cell\}|\{cell\}\S", text):
            raise ConfigError(
                f"{where}: the {side} has {{cell}} directly next to other characters: put white space around it."
            )
    return Template(raw["prompt"], raw["response"])
