"""The notebooks run from their first cell to their last, in a fresh kernel, with a short training of a small model."""

from __future__ import annotations

import os
import re
from pathlib import Path

import nbformat
import pytest

from sct.version import DISTRIBUTION, REPOSITORY

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FEW_STEPS = 20
SMALL = "--config.model.num_downsamples=3 --config.model.num_layers=1 --config.data.cells_per_bag=4"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where notebooks run; they share the model that the first of them trains."""
    return tmp_path_factory.mktemp("notebooks")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, folder, monkeypatch):
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    parameters.source, changed = re.subn(r"STEPS = \d+", f"STEPS = {FEW_STEPS}", parameters.source)
    assert changed == 1
    (training,) = [cell for cell in notebook.cells if "sct train --config=" in cell.source]
    training.source = training.source.replace(" --workdir=", f" {SMALL} --workdir=")
    assert SMALL in training.source
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}})
    client.execute()
    printed = [
        output.get("text", "")
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.get("outputs", [])
    ]
    assert not any("error:" in text or "Traceback" in text for text in printed), printed
    # After so few steps most labels are unknown, which annotate says. tqdm, which umap-learn imports, asks for
    # ipywidgets, which nothing here needs.
    expected = ("of the cells are 'unknown'", "TqdmWarning: IProgress not found")
    warned = [text for text in printed if "Warning" in text and not any(each in text for each in expected)]
    assert not warned, warned
    pictures = [
        output
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert pictures


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_clean_and_opens_in_colab_where_there_is_an_address(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code), (
        "outputs are not kept in the repository"
    )
    badge = f"{(REPOSITORY or '').removeprefix('https:/')}/blob/main/notebooks/{path.name}"
    addresses = re.findall(r"\(https://(\S+)\)", notebook.cells[0].source)
    assert any(address.endswith(badge) for address in addresses) == (REPOSITORY is not None)
    assert REPOSITORY or not any("colab" in address for address in addresses)
    assert f'"{DISTRIBUTION}[analysis]"' in code[0].source
