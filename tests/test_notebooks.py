"""The committed notebooks show outputs of their own code that are fit for readers. `make check-notebooks` runs them."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

from sct.version import DISTRIBUTION
from tests.cases import each

ROOT = Path(__file__).resolve().parents[1]
TOOL = SimpleNamespace(**runpy.run_path(str(ROOT / "tools" / "run_notebooks.py"), run_name="run_notebooks"))
NOTEBOOKS = {path.stem: nbformat.read(path, as_version=4) for path in TOOL.notebooks()}
CASES = [(name,) for name in NOTEBOOKS]
LARGEST = 300_000  # bytes of a notebook, so that it opens quickly


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_notebooks_are_valid_and_small():
    def check(name):
        notebook = NOTEBOOKS[name]
        nbformat.validate(notebook)
        assert (TOOL.FOLDER / f"{name}.ipynb").stat().st_size < LARGEST
        assert set(notebook.metadata) == {"kernelspec", "language_info", TOOL.RECORD}

    each(check, CASES)


def test_outputs_come_from_the_code_and_the_version_of_the_project():
    def check(name):
        notebook = NOTEBOOKS[name]
        assert notebook.metadata[TOOL.RECORD] == TOOL.record(notebook), "run `make notebooks`"
        counts = [cell.execution_count for cell in code_cells(notebook)]
        assert counts == list(range(1, len(counts) + 1)), "cells were not run in order: run `make notebooks`"

    each(check, CASES)


def test_outputs_are_fit_for_readers_and_have_a_picture():
    def check(name):
        notebook = NOTEBOOKS[name]
        assert not TOOL.problems(notebook)
        outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
        assert any("image/png" in output.get("data", {}) for output in outputs)

    each(check, CASES)


def test_notebooks_begin_with_title_badge_and_installation_and_set_quick_values_of_their_parameters():
    def check(name):
        notebook = NOTEBOOKS[name]
        assert notebook.cells[0].cell_type == "markdown"
        assert notebook.cells[0].source.startswith("# ")
        badge = TOOL.colab_badge(name)
        assert notebook.cells[0].source.count("colab-badge") == bool(badge)
        assert badge in notebook.cells[0].source, "run `python tools/run_notebooks.py --badges`"
        install, parameters = code_cells(notebook)[:2]
        assert f'"{DISTRIBUTION}[' in install.source
        assert parameters.metadata.get("tags") == ["parameters"]
        names = {target.id for line in ast.parse(parameters.source).body for target in line.targets}
        assert TOOL.QUICK[name].keys() <= names

    each(check, CASES)
    assert TOOL.QUICK.keys() == NOTEBOOKS.keys()


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ({"name": "stdout", "text": "error: --config is missing"}, "an error"),
        ({"name": "stdout", "text": "ok\nTraceback (most recent call last):"}, "an error"),
        ({"name": "stdout", "text": "x.py:1: UserWarning: few genes"}, "a warning"),
        ({"name": "stdout", "text": "\x1b[2Ktraining"}, "a control character"),
        ({"name": "stdout", "text": "training 1\rtraining 2"}, "a control character"),
        ({"name": "stdout", "text": "run folder: /" + "tmp/runs/x"}, "a path of this machine"),
        ({"name": "stderr", "text": "training 1/2"}, "standard error"),
        ({"output_type": "error", "ename": "KeyError", "evalue": "x", "traceback": []}, "KeyError"),
        ({"name": "stdout", "text": "step 20: validation loss 0.93 </tmp> runs/tmp/x"}, None),
    ],
)
def test_outputs_that_are_not_fit_for_readers_are_found(output, reason):
    cell = nbformat.v4.new_code_cell("x")
    cell.outputs = [nbformat.from_dict({"output_type": "stream", **output})]
    found = TOOL.problems(nbformat.v4.new_notebook(cells=[cell]))
    assert (not found) if reason is None else any(reason in problem for problem in found)


def test_an_accepted_warning_hides_no_other_problem():
    accepted = "x.py:1: UserWarning: 60% of the cells are 'unknown'\n  annotate(cells)\n"
    for name, more, expected in (
        ("stderr", "", False),
        ("stderr", "training 1/2\n", True),
        ("stdout", "", False),
        ("stdout", "error: no such file\n", True),
    ):
        cell = nbformat.v4.new_code_cell("x")
        cell.outputs = [nbformat.v4.new_output("stream", name=name, text=accepted + more)]
        found = TOOL.problems(nbformat.v4.new_notebook(cells=[cell]), TOOL.ACCEPTED_IF_QUICK)
        assert bool(found) == expected, (name, more)


def test_the_record_of_a_run_depends_on_code_cells_only():
    notebook = next(iter(NOTEBOOKS.values())).copy()
    before = TOOL.record(notebook)
    notebook.cells = [nbformat.v4.new_markdown_cell("text"), *notebook.cells]
    assert TOOL.record(notebook) == before
    notebook.cells = [*notebook.cells, nbformat.v4.new_code_cell("1")]
    assert TOOL.record(notebook) != before


def test_the_badge_appears_with_the_address_of_the_project_and_disappears_without_it(monkeypatch):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title\n\nText")])
    names = TOOL.set_badge.__globals__
    monkeypatch.setitem(names, "REPOSITORY", "https://github.com/owner/project")
    for _ in range(2):
        TOOL.set_badge(notebook, "01_x")
        title, _, badge, _, text = notebook.cells[0].source.split("\n")
        assert (title, text) == ("# Title", "Text")
        assert "/github/owner/project/blob/main/notebooks/01_x.ipynb)" in badge
    for address in (None, "https://gitlab.com/owner/project"):
        monkeypatch.setitem(names, "REPOSITORY", address)
        TOOL.set_badge(notebook, "01_x")
        assert notebook.cells[0].source == "# Title\n\nText"
