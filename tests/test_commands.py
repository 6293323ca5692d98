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
from sct.models.cell_encoder_config import CellEncoderConfig
from sct.nn.paths import flatten
from sct.weights import adapter_folder, packaged
from tests.random_models import random_model
from tests.tl.conftest import made, slide
from tests.train import tuned_models

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


BOX = """
import sys
from pathlib import Path
from sct.weights import packaged
packaged.FOLDER = Path(sys.argv.pop(1))
from sct.cli import main
main()
"""


@pytest.mark.slow
def test_embed_uses_the_packaged_model_if_no_model_is_given(files, tmp_path):
    words = [sys.executable, "-c", BOX, str(tmp_path), "embed", f"--input={files}/cells.h5ad"]
    words.append(f"--output={tmp_path}/out.h5ad")
    options = {"capture_output": True, "text": True, "env": {**os.environ, "PYTHONPATH": str(ROOT)}}
    done = subprocess.run(words, check=False, **options)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --model is missing: ")
    made().save_pretrained(tmp_path / packaged.DEFAULT, dtype="float16")
    done = subprocess.run(words, check=False, **options)
    assert done.returncode == 0, done.stderr
    told = f"Using the packaged model {packaged.DEFAULT}. Set --model to choose another model.\n"
    assert done.stdout.startswith(told)
    after, before = ad.read_h5ad(tmp_path / "out.h5ad"), slide()
    sct.tl.embed(before, sct.load(tmp_path / packaged.DEFAULT))
    np.testing.assert_allclose(after.obsm["X_sct"], before.obsm["X_sct"], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_embed_takes_the_readouts_that_the_model_offers(files):
    genes = made().genes
    config = CellEncoderConfig(
        vocab_size=len(genes) + 2, pad_id=len(genes), cls_id=len(genes) + 1, embed_dim=8, num_layers=1, num_heads=1,
        ffn_dim=8,
    )  # fmt: skip
    model = random_model("scgpt", config, genes=genes, data={"max_genes": 10, "genes": "top"})
    model.save_pretrained(files / "encoder")
    words = ["embed", f"--input={files}/cells.h5ad", f"--output={files}/readout.h5ad"]
    done = run(*words, f"--model={files}/encoder", "--readout=mean")
    assert done.returncode == 0, done.stderr
    after, before = ad.read_h5ad(files / "readout.h5ad"), slide()
    sct.tl.embed(before, model, readout="mean")
    np.testing.assert_allclose(after.obsm["X_sct"], before.obsm["X_sct"], rtol=1e-4, atol=1e-5)
    for name, readout, named in (("encoder", "pool", "weighted"), ("model", "cls", "flat")):
        done = run(*words, "--overwrite", f"--model={files}/{name}", f"--readout={readout}")
        assert done.returncode == 1
        assert "readout" in done.stderr
        assert named in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_a_table_holds_the_results_alone(files):
    """The suffix of --output chooses the format, and the columns are named by gene."""
    import pandas as pd

    source, gene = f"--input={files}/cells.h5ad", slide().var_names[10]
    cells = slide()
    cases = {
        "embed": ([], "out.csv", [f"X_sct_{i}" for i in range(32)]),
        "impute": ([f"--genes={gene}"], "out.parquet", [gene]),
        "perturb": ([f"--genes={gene}", "--n_random=1"], "out.tsv", [gene]),
        "annotate": (
            [f"--reference={files}/cells.h5ad", "--label_key=cell_type", "--n_contexts=1"],
            "deep/out.csv.gz",
            ["sct_label", "sct_label_probability"],
        ),
    }
    for command, (options, name, columns) in cases.items():
        done = run(command, source, f"--model={files}/model", f"--output={files}/{name}", *options)
        assert done.returncode == 0, done.stderr
        assert name in done.stdout
        path = files / name
        table = (
            pd.read_parquet(path)
            if path.suffix == ".parquet"
            else pd.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",")
        )
        assert list(table.columns) == ["cell", *columns], command
        assert table["cell"].tolist() == list(cells.obs_names)
        if command == "embed":
            sct.tl.embed(cells, made())
            np.testing.assert_allclose(table.iloc[:, 1:], cells.obsm["X_sct"], rtol=1e-4, atol=1e-5)
    again = run("embed", source, f"--model={files}/model", f"--output={files}/out.csv")
    assert again.returncode == 1
    assert "--overwrite" in again.stderr


@pytest.mark.slow
def test_perturb_prints_effects_and_writes_them(files):
    genes = list(slide().var_names[10:12])
    done = run(
        "perturb", f"--input={files}/cells.h5ad", f"--model={files}/model", f"--output={files}/perturbed.h5ad",
        f"--genes={genes[0]},{genes[0]}+{genes[1]}", "--n_random=3", f"--targets={slide().var_names[20]}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    after, before = ad.read_h5ad(files / "perturbed.h5ad"), slide()
    sct.tl.perturb(before, made(), [genes[0], genes], n_random=3, targets=[slide().var_names[20]])
    np.testing.assert_allclose(after.obsm["sct_perturb"], before.obsm["sct_perturb"], rtol=1e-4)
    effects = after.uns["sct_perturb"]["effects"]
    assert effects["p_value"].tolist() == before.uns["sct_perturb"]["effects"]["p_value"].tolist()
    assert len(after.uns["sct_perturb"]["targets"]) == 2
    assert done.stdout.count(f", {slide().var_names[20]}\n") == 2
    assert all(name in done.stdout for name in effects.index)


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
        (["--input=cells.h5ad", "--model=model", "--output=o.txt"], "suffix of --output"),
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


@pytest.mark.slow
def test_fine_tuned_adapters_annotate(tmp_path):
    tuned_models.zeromics().save_pretrained(tmp_path / "model")
    cells = tuned_models.cells(90)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    common = [f"--input={tmp_path}/cells.h5ad", f"--model={tmp_path}/model"]
    tuned = ["finetune", *common, f"--output={tmp_path}/tuned", "--label_key=cell_type", "--epochs=2"]
    tuned.append("--learning_rate=0.03")
    done = run(*tuned, "--method=lora", '--method_options={"rank": 2, "layers": [1]}', "--nobaselines")
    assert done.returncode == 0, done.stderr
    assert "report.html" in done.stdout + done.stderr
    base, adapters = tuned_models.zeromics(), tmp_path / "tuned" / "adapters"
    made = adapter_folder.load(base, adapters)
    flat = flatten(made.variables["adapters"])
    chosen = [value.tolist() for path, value in flat.items() if path.split("/")[-1].endswith("layers")]
    assert chosen
    assert all(numbers == [1] for numbers in chosen)
    done = run("annotate", *common, f"--adapters={adapters}", f"--output={tmp_path}/out.h5ad")
    assert done.returncode == 0, done.stderr
    written = ad.read_h5ad(tmp_path / "out.h5ad")
    sct.tl.annotate(cells, made)
    expected = cells.obsm["sct_label_probabilities"]
    assert np.ptp(expected, axis=0).max() > 1e-3, "the cells differ, so that the comparison says something"
    np.testing.assert_allclose(written.obsm["sct_label_probabilities"], expected, rtol=1e-4, atol=1e-6)
    done = run(*tuned, "--method_options=rank")
    assert done.returncode != 0
    assert "method_options" in done.stderr
    assert "Traceback" not in done.stderr
