"""Prompt templates: what every template must hold, the choice among them, and answers read back."""

from __future__ import annotations

import itertools
import json
import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sct.data.text.prompts import (
    JOIN,
    TASKS,
    Template,
    load_prompts,
    parse_labels,
    render_labels,
)
from sct.errors import ConfigError, DataError
from tests.cases import each

PROMPTS = load_prompts()
EVERY = [(task, number) for task, templates in PROMPTS.templates.items() for number in range(len(templates))]
FIELDS = {
    "cell": "MALAT1 B2M MT-CO1 HLA-DRA",
    "cell_type": "CD4-positive, alpha-beta T cell",
    "tissue": "bone marrow",
    "abstract": "We sequenced {cells}. They differ.",
    "labels": {"cell type": "B cell", "dose": "0.5 uM"},
}
laws = settings(max_examples=60, deadline=None)


def words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z]+", re.sub(r"\{\w+\}", "", text.lower())))


def test_every_task_has_20_templates_that_need_neither_number_nor_organism():
    assert list(PROMPTS.templates) == list(TASKS)
    for task, templates in PROMPTS.templates.items():
        free = [t for t in templates if t.prompt_fields <= {*TASKS[task].prompt, "genes"}]
        assert len(free) >= 20, task
        assert any("num_genes" in t.prompt_fields for t in templates), task
        assert any("organism" in t.prompt_fields for t in templates), task


def check_wordings(task: str) -> None:
    templates = PROMPTS.templates[task]
    assert len({t.prompt for t in templates}) == len(templates)
    for one, other in itertools.combinations(templates, 2):
        a, b = words(one.prompt), words(other.prompt)
        assert len(a & b) / len(a | b) < 0.6, (one.prompt, other.prompt)


def test_wordings_of_a_task_differ():
    each(check_wordings, [(task,) for task in TASKS])


def check_filled(task: str, number: int) -> None:
    for n, genes in ((None, "expressed genes"), (4, "4 most highly expressed genes")):
        needed = PROMPTS.templates[task][number].prompt_fields
        if n is None and "num_genes" in needed:
            continue
        example = PROMPTS.render(task, {**FIELDS, "num_genes": n, "organism": "human"}, number=number)
        for field in needed - {"labels", "organism", "num_genes", "genes"}:
            assert FIELDS[field] in example.prompt
        if "genes" in needed:
            assert genes in example.prompt
        if "num_genes" in needed:
            assert "4" in example.prompt
        if "labels" in needed:
            assert "cell type: B cell; dose: 0.5 uM" in example.prompt
        assert example.text == example.prompt + JOIN + example.response
        assert example.prompt == example.prompt.strip()
        assert example.response == example.response.strip()
        for text in (example.prompt, example.response):
            assert "  " not in text
            assert not re.search(r"\s[.,;:?!]|\n\s|\s\n", text)
            assert not re.search(r"\ba [aeiou]", text.replace("a uM", "")), text
        if "cell" in needed:
            assert re.search(rf"(^|\s){FIELDS['cell']}(\s|$)", example.prompt)


def test_a_filled_template_holds_its_fields_and_is_well_written():
    each(check_filled, EVERY)


def check_read_back(task: str, number: int) -> None:
    value = FIELDS[TASKS[task].answer]
    response = PROMPTS.response_for(task, number, value)
    text = render_labels(value) if isinstance(value, dict) else value
    assert PROMPTS.parse(task, number, response) == text
    assert PROMPTS.parse(task, number, f"\n {response} \n") == text
    if TASKS[task].answer not in ("cell", "abstract"):
        assert PROMPTS.parse(task, number, f"{response}\nAnd so it goes on.") == text
        assert PROMPTS.parse(task, number, response.rstrip(".")) == text
    assert PROMPTS.parse(task, number, "") is None


def test_the_answer_is_read_back():
    each(check_read_back, EVERY)


@laws
@given(st.sampled_from(EVERY), st.text(min_size=1))
def test_any_answer_in_one_line_is_read_back(which, value):
    task, number = which
    value = " ".join(value.split())
    assume(value)
    assume(not re.search(r"\.(\s|$)", value))
    assert PROMPTS.parse(task, number, PROMPTS.response_for(task, number, value)) == value


def test_what_follows_the_answer_is_ignored():
    template = Template("{cell}", "This is {cell_type}, I believe.")
    assert template.parse("This is  a B cell, I believe. Next") == "a B cell"
    assert template.parse("This is a B cell, I beli") is None
    assert template.parse("That is a B cell, I believe.") is None
    full_stop = Template("{cell}", "Type: {cell_type}.")
    assert full_stop.parse("Type: B cell. Then more.") == "B cell"
    assert full_stop.parse("Type: B cell\nThen more.") == "B cell"
    assert full_stop.parse("Type: Ly6.C monocyte.") == "Ly6.C monocyte"
    assert full_stop.parse("Type: ") is None
    braces = Template("{cell}", "{{x}} {cell_type} {{y}}")
    assert braces.response_for("B cell") == "{x} B cell {y}"
    assert braces.parse("{x} B cell {y} z") == "B cell"


@laws
@given(st.integers(0, 2**63), st.integers(0, 2**64 - 1), st.integers(0, 10**6), st.sampled_from(list(TASKS)))
def test_the_choice_is_a_function_of_seed_key_and_epoch(seed, key, epoch, task):
    chosen = PROMPTS.render(task, FIELDS, seed=seed, key=key, epoch=epoch)
    assert PROMPTS.render(task, FIELDS, seed=seed, key=key, epoch=epoch) == chosen
    assert PROMPTS.render(task, FIELDS, number=chosen.number) == chosen
    without = {name: value for name, value in FIELDS.items() if name != TASKS[task].answer}
    asked = PROMPTS.ask(task, without, seed=seed, key=key, epoch=epoch)
    assert (asked.prompt, asked.number, asked.response) == (chosen.prompt, chosen.number, "")
    assert asked.text == asked.prompt
    assert not PROMPTS.templates[task][chosen.number].prompt_fields & {"num_genes", "organism"}


def test_the_choice_is_fair_and_changes_with_each_of_its_arguments():
    for vary in ("seed", "key", "epoch"):
        numbers = [PROMPTS.render("cell_to_tissue", FIELDS, **{vary: i}).number for i in range(2100)]
        counts = [numbers.count(number) for number in set(numbers)]
        assert len(counts) == 21
        assert 60 < min(counts) < max(counts) < 150
    other = [PROMPTS.render("cell_to_cell_type", FIELDS, key=i).number for i in range(2100)]
    assert other != numbers
    everything = {**FIELDS, "num_genes": 4, "organism": "mouse"}
    numbers = {PROMPTS.render("cell_to_tissue", everything, key=i).number for i in range(1000)}
    assert len(numbers) == len(PROMPTS.templates["cell_to_tissue"])


def test_the_choice_is_the_same_on_every_machine():
    chosen = [PROMPTS.render("cell_to_tissue", FIELDS, seed=1, key=2**63, epoch=i).number for i in range(5)]
    assert chosen == [9, 1, 16, 11, 7]


texts = st.text(min_size=1).map(str.strip).filter(lambda text: text and not set(";:\r\n") & set(text))


@laws
@given(st.dictionaries(texts, texts, min_size=1))
def test_labels_are_read_back(labels):
    assume(not any("\n" in part for pair in labels.items() for part in pair))
    assert parse_labels(render_labels(labels)) == labels


def test_odd_labels():
    assert render_labels({"age": "20:29", "n": 3}) == "age: 20:29; n: 3"
    assert parse_labels("age: 20:29; nonsense; : x; y:; n: 3") == {"age": "20:29", "n": "3"}
    for labels in ({}, {"a": ""}, {"a;": "b"}, {"a:": "b"}, {"a": "b;c"}, {" a": "b"}, {"a": "b\nc"}):
        with pytest.raises(DataError, match="label"):
            render_labels(labels)


def test_missing_and_unknown_fields():
    with pytest.raises(ConfigError, match="answer 'cell_type'"):
        PROMPTS.render("cell_to_cell_type", {"cell": "A"})
    with pytest.raises(ConfigError, match="'cell_to_cell_type' needs the field 'cell'"):
        PROMPTS.render("cell_to_cell_type", {"cell": None, "cell_type": "B cell"})
    with pytest.raises(ConfigError, match="'celltype'"):
        PROMPTS.ask("cell_to_cell_type", {"cell": "A", "celltype": "B cell"})
    with pytest.raises(ConfigError, match="'genes'"):
        PROMPTS.ask("cell_to_cell_type", {"cell": "A", "genes": "genes"})
    with pytest.raises(DataError, match=r"'cell'.* non-empty"):
        PROMPTS.ask("cell_to_cell_type", {"cell": " "})
    with pytest.raises(ConfigError, match="'cell_to_age'"):
        PROMPTS.ask("cell_to_age", {"cell": "A"})
    with pytest.raises(ConfigError, match=r"\b99\b"):
        PROMPTS.parse("unconditional", 99, "A")
    number = next(
        i for i, t in enumerate(PROMPTS.templates["cell_to_tissue"]) if "organism" in t.prompt_fields
    )
    with pytest.raises(ConfigError, match="'organism'"):
        PROMPTS.ask("cell_to_tissue", {"cell": "A"}, number=number)


GOOD = {"prompt": "Which cell is it? {cell}", "response": "It is {cell_type}."}


def written(path, templates, task="cell_to_cell_type", **more):
    content = {"version": 1, "tasks": {task: {"templates": templates, **more}}}
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_a_users_file_adds_to_or_replaces_a_task(tmp_path):
    added = load_prompts(written(tmp_path / "a.json", [GOOD]))
    built_in = PROMPTS.templates["cell_to_cell_type"]
    assert added.templates["cell_to_cell_type"] == (*built_in, Template(**GOOD))
    assert added.templates["unconditional"] == PROMPTS.templates["unconditional"]
    replaced = load_prompts(written(tmp_path / "b.json", [GOOD], replace=True))
    assert replaced.templates["cell_to_cell_type"] == (Template(**GOOD),)
    assert load_prompts() == PROMPTS


def test_saved_templates_are_those_that_load(tmp_path):
    prompts = load_prompts(written(tmp_path / "a.json", [GOOD], replace=True))
    prompts.save(tmp_path / "saved.json")
    assert load_prompts(tmp_path / "saved.json") == prompts


def test_no_template_for_the_fields(tmp_path):
    only = {"prompt": "{organism} {cell}", "response": "{cell_type}"}
    prompts = load_prompts(written(tmp_path / "a.json", [only], replace=True))
    with pytest.raises(ConfigError, match="'cell_to_cell_type'"):
        prompts.ask("cell_to_cell_type", {"cell": "A"})


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ({**GOOD, "prompt": "{cell} {celltype}"}, r"\{celltype\}"),
        ({**GOOD, "prompt": "{cell} {}"}, r"\{\}"),
        ({**GOOD, "prompt": "{cell:>9}"}, r"\{cell:>9\}"),
        ({**GOOD, "prompt": "Which cell?"}, r"\{cell\}"),
        ({**GOOD, "prompt": "{cell} {cell_type}"}, r"\{cell_type\}"),
        ({**GOOD, "prompt": "{cell}."}, "white space"),
        ({**GOOD, "prompt": "{cell} {"}, "unmatched brace"),
        ({**GOOD, "prompt": " "}, "empty"),
        ({**GOOD, "prompt": "{cell} "}, "white space"),
        ({**GOOD, "response": "It is a cell."}, r"\{cell_type\}, once"),
        ({**GOOD, "response": "{cell_type} {cell_type}"}, r"\{cell_type\}, once"),
        ({**GOOD, "response": "{cell_type} {tissue}"}, r"\{cell_type\}, once"),
        ({"prompt": "{cell}"}, "must have the form"),
        ({**GOOD, "weight": 2}, "must have the form"),
        ({**GOOD, "response": 3}, "must have the form"),
        ({"prompt": "which CELL is\nit? {cell}", "response": "It is {cell_type}."}, "repeats template 1"),
    ],
)
def test_a_bad_template_is_named(tmp_path, template, said):
    path = written(tmp_path / "mine.json", [GOOD, template])
    with pytest.raises(ConfigError, match=said) as caught:
        load_prompts(path)
    assert "mine.json: task 'cell_to_cell_type', template 2" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_files_are_named(tmp_path):
    path = tmp_path / "mine.json"
    with pytest.raises(ConfigError, match=r"mine\.json"):
        load_prompts(path)
    for content, said in (
        ("{", "not valid JSON"),
        ("[]", "must have the form"),
        ('{"version": 2, "tasks": {}}', "must have the form"),
        ('{"version": 1, "tasks": []}', "must be a JSON object"),
        ('{"version": 1, "tasks": {"age": {}}}', "'age'"),
        ('{"version": 1, "tasks": {"unconditional": {"templates": []}}}', "at least one"),
        ('{"version": 1, "tasks": {"unconditional": {"template": []}}}', "at least one"),
        ('{"version": 1, "tasks": {"unconditional": {"templates": [1], "replace": 1}}}', "at least one"),
    ):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(ConfigError, match=said):
            load_prompts(path)
    built_in = PROMPTS.templates["cell_to_cell_type"][0]
    written(path, [{"prompt": built_in.prompt, "response": built_in.response}])
    with pytest.raises(ConfigError, match="built-in template 1"):
        load_prompts(path)
