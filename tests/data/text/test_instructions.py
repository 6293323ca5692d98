"""Instructions: what is asked of a cell, how it becomes tokens, and what an answer may not be told by."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest

from sct.data.cell_options import CellOptions
from sct.data.cell_records import cell_records
from sct.data.text import instructions
from sct.data.text.instructions import InstructionOptions, InstructionSource, StudyQuestions, read_study_texts
from sct.data.text.prompts import INSTRUCTION_PROMPTS, INSTRUCTIONS, load_prompts
from sct.data.text.tokenizer import Tokenizer, train_bpe
from sct.errors import ConfigError
from tests.data.test_cell_records import Study
from tests.data.text.toy_texts import GENES

ABSTRACT = "We looked at cells of the gut."
TYPES, DISEASES = ("B cell", "T cell", "NK cell"), ("normal", "glioma", "melanoma")
CELLS = CellOptions(num_bins=4, max_genes=GENES)


def study(name: str = "one", n: int = 120, split: str = "train") -> Study:
    rng = np.random.default_rng(len(name))
    made = Study(rng.poisson(1.0, (n, GENES)), name, split)
    drawn = rng.choice([*TYPES[:2], None], n, p=[0.55, 0.35, 0.1]).astype(object)
    drawn[:: n // 4] = "NK cell"  # rare
    made.table["cell_type"] = drawn
    made.table["disease"] = rng.choice([*DISEASES, None], n)
    return made


@cache
def tokenizer() -> Tokenizer:
    prompts = load_prompts(None, INSTRUCTION_PROMPTS)
    texts = [template.prompt for many in prompts.templates.values() for template in many]
    return train_bpe([*texts, *TYPES, *DISEASES, ABSTRACT] * 3, 400)


def options(**changes: Any) -> InstructionOptions:
    given: dict[str, Any] = {
        "num_soft": 5, "length": 160, "disease": "disease", "studies": {"one": {"abstract": ABSTRACT}},
    }  # fmt: skip
    return InstructionOptions(**{**given, **changes})


def source(*studies: Study, exhaustive: bool = False, **changes: Any) -> InstructionSource:
    prompts = load_prompts(None, INSTRUCTION_PROMPTS)
    made = studies or (study(),)
    return InstructionSource(made, CELLS, options(**changes), prompts, tokenizer(), exhaustive=exhaustive)


def test_there_are_three_templates_of_each_task():
    prompts = load_prompts(None, INSTRUCTION_PROMPTS)
    assert set(prompts.templates) == set(INSTRUCTIONS) == {"cta", "rci", "tcd", "cpi"}
    assert {len(many) for many in prompts.templates.values()} == {3}
    for task, many in prompts.templates.items():
        for template in many:
            assert template.prompt_fields == set(INSTRUCTIONS[task].prompt), (task, template.prompt)


def test_a_record_is_a_question_with_the_cell_and_its_answer():
    made, bpe = source(), tokenizer()
    seen: Counter[str] = Counter()
    for number in range(len(made)):
        record = made.record(number)
        cell = made.cells.record(number)
        np.testing.assert_array_equal(record["bins"], cell["bins"])
        row, length = int(record["row"]), int(record["attention_mask"].sum())
        table = made.questions["one"].study.table.iloc[row]
        ids = record["input_ids"][:length]
        assert not record["input_ids"][length:].any()
        assert not record["predicted"][length:].any()
        if not length:
            assert table.isna().all()
            continue
        task = made.options.tasks[int(record["task"])][0]
        seen[task] += 1
        # The cell stands there once, its tokens in order; the answer and the end alone are predicted.
        np.testing.assert_array_equal(ids[ids < 0], [-1, -2, -3, -4, -5])
        assert (np.diff(np.flatnonzero(ids < 0)) == 1).all()
        predicted = record["predicted"][:length]
        assert predicted[-1]
        assert ids[-1] == bpe.eos
        assert (np.diff(predicted.astype(int)) >= 0).all()
        answer = bpe.decode(ids[predicted][:-1]).strip()
        question = bpe.decode(ids[~predicted & (ids >= 0)])
        assert ABSTRACT in question
        expected = {
            "cta": table["cell_type"],
            "rci": "Yes" if table["cell_type"] == "NK cell" else "No",
            "tcd": "normal cell" if table["disease"] == "normal" else table["disease"],
        }
        assert answer == expected[task]
        listed = {"cta": TYPES, "rci": (), "tcd": ("glioma", "melanoma")}[task]
        assert all(candidate in question for candidate in listed)
    assert min(seen.values()) > 15
    assert set(seen) == {"cta", "rci", "tcd"}


def test_the_order_of_candidates_tells_nothing():
    """Each candidate stands at each place about equally often, whatever the answer."""
    places: Counter[tuple[str, str, int]] = Counter()
    for key in range(900):
        answer = TYPES[key % 3]
        fields = instructions.fields_of("cta", ABSTRACT, TYPES, (0, key, 0), answer)
        listed = fields["candidates"].split(", ")
        assert sorted(listed) == sorted(TYPES)
        places.update((answer, name, place) for place, name in enumerate(listed))
    assert len(places) == 27
    assert min(places.values()) > 70
    assert max(places.values()) < 130


def test_task_template_and_order_follow_from_seed_cell_and_epoch():
    def written(made: InstructionSource, epoch: int) -> list[bytes]:
        found = {}
        for number in range(len(made)):
            record = made.record(number, epoch)
            found[int(record["row"])] = record["input_ids"].tobytes()
        return [found[row] for row in sorted(found)]

    one = source(tasks=(("cta", 1.0), ("tcd", 1.0)))
    again, other = (
        source(tasks=(("cta", 1.0), ("tcd", 1.0))),
        source(tasks=(("cta", 1.0), ("tcd", 1.0)), seed=1),
    )
    assert written(one, 0) == written(again, 0)
    for changed in (written(one, 1), written(other, 0)):
        same = np.mean([a == b for a, b in zip(written(one, 0), changed, strict=True)])
        assert same < 0.2


def test_what_a_study_says_of_itself_goes_first():
    study_metadata = {"abstract": ABSTRACT, "cell_types": ["B cell", "T cell", "plasma cell"], "rare": ["T cell"],
            "diseases": ["glioma", "lymphoma"]}  # fmt: skip
    asked = StudyQuestions(study(), options(studies={"one": study_metadata}))
    assert asked.candidates["cta"] == ("B cell", "T cell", "plasma cell")
    assert asked.rare == {"T cell"}
    assert asked.candidates["tcd"] == ("glioma", "lymphoma", "normal cell")
    table = asked.study.table
    for row in range(20):
        # Tables have None or NaN for what is missing, as the version of pandas has it.
        name, disease = ("" if pd.isna(value) else value for value in table.iloc[row])
        # What is none of the candidates has no answer.
        assert asked.answer("cta", row) == (name if name in study_metadata["cell_types"] else "")
        assert asked.answer("rci", row) == ({"T cell": "Yes", "": ""}.get(name, "No"))
        assert asked.answer("tcd", row) == ({"normal": "normal cell", "glioma": "glioma"}.get(disease, ""))


def test_normal_cells_are_no_disease():
    for diseases in (["glioma", "normal"], ["normal cell", "glioma"]):
        asked = StudyQuestions(
            study(), options(studies={"one": {"abstract": ABSTRACT, "diseases": diseases}})
        )
        assert asked.candidates["tcd"] == ("glioma", "normal cell")


def test_pathways_are_several_answers_in_any_order():
    made = study()
    made.table["active"] = np.where(np.arange(120) % 3 == 0, "", "hypoxia, apoptosis,DNA repair")
    asked = StudyQuestions(made, options(pathways="active"))
    assert asked.candidates["cpi"] == ("DNA repair", "apoptosis", "hypoxia")
    assert asked.answer("cpi", 0) == ""
    assert asked.answer("cpi", 1) == "DNA repair, apoptosis, hypoxia"
    listed = {"one": {"abstract": ABSTRACT, "gene_sets": ["hypoxia", "apoptosis", "glycolysis"]}}
    some = StudyQuestions(made, options(pathways="active", studies=listed))
    assert some.candidates["cpi"] == ("hypoxia", "apoptosis", "glycolysis")
    assert some.answer("cpi", 1) == "apoptosis, hypoxia"
    # The first one of an answer is any of them, and does not follow the order of the candidates.
    pairs = Counter()
    for epoch in range(200):
        fields = instructions.fields_of(
            "cpi", ABSTRACT, asked.candidates["cpi"], (0, 1, epoch, 1), asked.answer("cpi", 1)
        )
        assert sorted(fields["answer"].split(", ")) == sorted(asked.candidates["cpi"])
        pairs[fields["candidates"].split(", ")[0], fields["answer"].split(", ")[0]] += 1
    assert len(pairs) == 9
    assert min(pairs.values()) > 8
    asks: dict[str, Any] = {"pathways": "active", "tasks": (("cpi", 1.0),)}
    with pytest.raises(ConfigError, match=r"'one' .*16[0-9] tokens.*160"):
        source(made, **asks)
    records = source(made, **asks, length=180)
    known = [bool(records.record(number)["predicted"].any()) for number in range(120)]
    assert sum(known) == 80


def test_a_task_without_pathways_names_the_column():
    with pytest.raises(ConfigError, match=r"'pathway'.*data\.pathways"):
        source(tasks=(("cpi", 1.0),))


@pytest.mark.parametrize(
    ("study_metadata", "words"),
    [
        ({"rare": ["Nk cell"]}, r"rare .*'one'.*'Nk cell'"),
        (
            {"cell_types": ["b cell", "t cell"]},
            r"'one' .*cell_types",
        ),
        ({"diseases": ["Glioma"]}, r"'one' .*diseases"),
    ],
)
def test_names_that_no_cell_has(study_metadata, words):
    with pytest.raises(ConfigError, match=words):
        source(studies={"one": {"abstract": ABSTRACT, **study_metadata}})


def test_a_prompt_has_the_cell_once(tmp_path):
    prompts = load_prompts(None, INSTRUCTION_PROMPTS).plain()
    prompts["rci"][0]["prompt"] += " {cell}"
    path = tmp_path / "prompts.json"
    tasks = {task: {"replace": True, "templates": many} for task, many in prompts.items()}
    path.write_text(json.dumps({"version": 1, "tasks": tasks}))
    with pytest.raises(ConfigError, match=r"\{cell\}"):
        load_prompts(path, INSTRUCTION_PROMPTS)


def test_tasks_that_a_study_cannot_be_asked():
    plain = study()
    plain.table["cell_type"], plain.table["disease"] = "B cell", "normal"
    assert StudyQuestions(plain, options()).candidates == {}
    del plain.table["disease"]
    assert StudyQuestions(plain, options(rare_share=1.1)).candidates == {}
    with pytest.raises(ConfigError, match=r"'cell_type'.*data\.cell_type"):
        source(plain)
    with pytest.raises(ConfigError, match=r"data\.disease"):
        source(tasks=(("tcd", 1.0),), disease="")
    # Held-out cells may have none of what is asked.
    record = source(plain, exhaustive=True).record(0)
    assert not record["attention_mask"].any()
    np.testing.assert_array_equal(record["bins"], cell_records(plain.counts[:1], CELLS)["bins"][0])


def test_a_study_without_an_abstract_and_a_row_that_is_too_short():
    with pytest.raises(ConfigError, match=r"'two' .*two: \{abstract"):
        source(study("two"))
    with pytest.raises(ConfigError, match=r"data\.length"):
        source(length=40)
    with pytest.raises(ConfigError, match=r"data\.length"):
        source(length=40, exhaustive=True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- one", "form"),
        ("one: text", "form"),
        ("one: {summary: text}", "'summary'"),
        ("one: {abstract: [text]}", "abstract of one"),
        ("one: {rare: B cell}", r"rare of one .*'B cell'"),
        ("one: {diseases: []}", "a list of non-empty texts"),
        ('one: {abstract: "a\\0b"}', "text"),
        ("one: {rare: [B cell, B cell]}", r"rare of one .*twice"),
        ("one: {", "cannot be read"),
    ],
)
def test_files_that_say_something_else(tmp_path, text, words):
    path = tmp_path / "studies.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_study_texts(path)


def test_a_file_about_studies(tmp_path):
    path = tmp_path / "studies.yaml"
    path.write_text("one:\n  abstract: Cells.\n  rare: [NK cell]\n7: {abstract: More.}\n")
    assert read_study_texts(path) == {
        "one": {"abstract": "Cells.", "rare": ["NK cell"]},
        "7": {"abstract": "More."},
    }
    with pytest.raises(ConfigError, match=r"nothing\.yaml"):
        read_study_texts(tmp_path / "nothing.yaml")


def test_a_file_of_templates_names_tasks_by_name_or_code(tmp_path):
    template = {"prompt": "{cell} {abstract} {candidates}, which?", "response": "{answer}"}
    loaded = []
    for name in ("tumor", "tcd"):
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps({"version": 1, "tasks": {name: {"templates": [template]}}}))
        loaded.append(load_prompts(file, INSTRUCTION_PROMPTS).plain())
    assert loaded[0] == loaded[1]
    assert template in loaded[0]["tcd"]
    assert "tumor" not in loaded[0]
    both = {name: {"templates": [template], "replace": True} for name in ("tcd", "tumor")}
    file.write_text(json.dumps({"version": 1, "tasks": both}))
    with pytest.raises(ConfigError, match="two entries"):
        load_prompts(file, INSTRUCTION_PROMPTS)
    file.write_text(json.dumps({"version": 1, "tasks": {"tumors": {"templates": [template]}}}))
    with pytest.raises(ConfigError, match="did you mean 'tumor'"):
        load_prompts(file, INSTRUCTION_PROMPTS)
