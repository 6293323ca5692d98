"""tools/gpu_suite.py runs from end to end with few libraries, ends in time, and leaves a model that opens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

import sct
from sct.data.packed_cells import PackedCells
from tests.data.store_inputs import small_vocabulary

ROOT = Path(__file__).resolve().parents[1]
# Absent on a machine with the JAX stack only; Flax itself imports those of the second set, this project must not.
ABSENT = (
    "grain", "ml_collections", "anndata", "zarr", "scanpy", "pandas", "sklearn", "h5py", "tensorboardX", "numcodecs",
    "torch", "transformers", "matplotlib", "tokenizers", "sentencepiece", "tests", "configs",
)  # fmt: skip
OF_FLAX = ("rich", "orbax", "tensorstore")
RUN = f"""
import runpy, sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        frame = sys._getframe(1)
        while "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        ours = frame.f_code.co_filename.startswith({str(ROOT)!r})
        if top in {ABSENT!r} or (ours and top in {OF_FLAX!r}):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
sys.argv = ["gpu_suite", *sys.argv[1:]]
runpy.run_path({str(ROOT / "tools" / "gpu_suite.py")!r}, run_name="__main__")
"""
FIGURES = (
    "ceiling, bfloat16", "ceiling, float32", "bandwidth", "difference from the CPU, bfloat16, loss",
    "difference from the CPU, float32, gradient", "difference of a resumed run", "train, batch 1, remat none",
    "train, batch 1, remat products", "train, batch 1, remat level", "forward, batch 1", "generation, GPT-2 small",
    "generation, LLaMA of a billion parameters", "ZerOmics step, 2 rows", "training of a small sCT, loss",
    "small sCT, loss in validation studies", "small sCT",
)  # fmt: skip


def run_suite(*words: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-c", RUN, *map(str, words), "--tiny"],
        env=environment, capture_output=True, text=True, timeout=3000, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def cells(tmp_path_factory) -> Path:
    vocabulary, rng = small_vocabulary(), np.random.default_rng(0)
    counts = rng.poisson(0.4, (30, len(vocabulary))).astype(np.uint16)
    no = np.zeros((2, len(vocabulary)), bool)
    study = np.repeat(np.arange(2, dtype=np.int32), 15)
    packed = PackedCells(
        sparse.csr_matrix(counts), study, ("one", "two"), np.asarray([False, True]), ~no, no, vocabulary
    )
    path = tmp_path_factory.mktemp("cells") / "cells.npz"
    packed.save(path)
    return path


def test_the_suite_measures_everything_and_trains_a_model_without_the_other_libraries(cells, tmp_path):
    done = run_suite(f"--output={tmp_path}", f"--cells={cells}", "--budget=2900", "--most_steps=3")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "figures.json").read_text())
    figures = {row["figure"]: row for row in found["figures"]}
    assert set(FIGURES) <= set(figures)
    assert [name for name, row in figures.items() if row["value"] is None] == []
    table = (tmp_path / "figures.md").read_text()
    assert [name for name in FIGURES if f"| {name} |" not in table] == []
    for name, row in figures.items():
        if "limit" in row:
            assert row["value"] <= row["limit"], name
    assert figures["training of a small sCT, loss"]["steps"] == 3
    model = sct.load(tmp_path / "model")
    assert model.vocabulary.hash == small_vocabulary().hash
    tokens = np.zeros((1, 2, model.config.num_genes), np.uint8)
    assert np.isfinite(model.apply(tokens=tokens)["cell_embedding"]).all()
    assert {path.name for path in tmp_path.iterdir()} == {"figures.json", "figures.md", "model", "cache.tgz"}

    # A second run keeps the figures, and ends when its time is over.
    again, started = tmp_path / "again", time.monotonic()
    done = run_suite(
        f"--output={again}", f"--previous={tmp_path / 'figures.json'}", f"--cells={cells}", "--budget=0.1"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert time.monotonic() - started < 600
    kept = json.loads((again / "figures.json").read_text())
    assert {row["figure"] for row in kept["figures"]} >= set(figures)
    assert any("time of 0 s was over" in note for note in kept["notes"])
