"""The commands that work on .h5ad files, run as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pytest

import sct
from tests.tl.conftest import made, slide

ROOT = Path(__file__).resolve().parents[1]


def run(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "sct", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    made().save_pretrained(folder / "model")
    slide().write_h5ad(folder / "cells.h5ad")
    return folder


@pytest.mark.slow
def test_embed_writes_the_input_with_the_embedding(files):
    done = run(
        "embed", f"--input={files}/cells.h5ad", f"--model={files}/model", f"--output={files}/embedded.h5ad",
        "--n_contexts=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "45 cells embedded" in done.stdout
    assert "Warning" not in done.stderr
    before, after = slide(), ad.read_h5ad(files / "embedded.h5ad")
    sct.tl.embed(before, made(), n_contexts=2)
    np.testing.assert_allclose(after.obsm["X_sct"], before.obsm["X_sct"], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(after.X.toarray(), before.X.toarray())
    assert list(after.obs) == list(before.obs)
    assert not list(files.glob(".*tmp"))


@pytest.mark.slow
def test_impute_genes_there_and_not_there(files):
    genes = [slide().var_names[10], made().genes.keys[0]]
    done = run(
        "impute", f"--input={files}/cells.h5ad", f"--model={files}/model", f"--output={files}/imputed.h5ad",
        f"--genes={','.join(dict.fromkeys(genes))}", "--spatial_key=spatial", "--batch_key=batch",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    after = ad.read_h5ad(files / "imputed.h5ad")
    assert "sct_expected" in after.layers
    assert after.uns["sct"]["model"].startswith("Pretrained('sct'")
    assert list(after.uns["sct_sections"]["spatial"]["section"]) == ["a", "b"], (
        "parts of the file keep the scale"
    )


@pytest.mark.slow
def test_annotate_counts_labels(files):
    done = run(
        "annotate", f"--input={files}/cells.h5ad", f"--reference={files}/cells.h5ad", "--label_key=cell_type",
        f"--model={files}/model", f"--output={files}/labelled.h5ad", "--n_neighbors=1", "--n_contexts=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    after = ad.read_h5ad(files / "labelled.h5ad")
    assert (after.obs["sct_label"].astype(str) == after.obs["cell_type"].astype(str)).all()
    assert (after.obs["sct_label_agreement"] == 1).all()
    assert after.uns["sct_label"]["n_contexts"] == 2
    assert 'obs["sct_label"]' in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--input=no.h5ad", "--model=m", "--output=o.h5ad"], "no.h5ad does not exist"),
        (["--input=cells.h5ad", "--model=m", "--output=o.h5ad"], "m does not exist"),
        (["--input=cells.h5ad", "--model=model", "--output=o.csv"], "must end with .h5ad"),
        (["--input=cells.h5ad", "--model=model", "--step=3", "--output=o.h5ad"], "not a run folder"),
        (["--input=cells.h5ad", "--model=model", "--output=cells.h5ad"], "also the input"),
        (["--input=cells.h5ad", "--model=model", "--output=cells.h5ad/o.h5ad"], "is not a folder"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(files, monkeypatch, words, sentence):
    monkeypatch.chdir(files)
    done = run("embed", *words)
    assert done.returncode == 1
    assert sentence in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (files / "o.h5ad").exists()
