"""Models that come with the package: found by name, without a network, and listed by `sct.models()`."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import sct
from sct.commands import models as command
from sct.errors import CheckpointError
from sct.models.sct_config import SCTConfig
from sct.nn.paths import unflatten
from sct.weights import catalog, model_folder, packaged
from sct.weights.pretrained import Pretrained, expected_shapes
from sct.weights.training_cells import TrainingCells

CONFIG = SCTConfig(
    num_genes=64, token_embed_dim=32, embed_dim=32, num_downsamples=2, num_layers=1, num_heads=2, ffn_dim=48
)


@pytest.fixture(scope="module")
def model() -> Pretrained:
    rng = np.random.default_rng(0)
    arrays = {
        path: rng.normal(size=leaf.shape).astype(leaf.dtype)
        for path, leaf in expected_shapes("sct", CONFIG).items()
    }
    genes = sct.GeneVocabulary.from_ids(sct.GeneVocabulary.human().ensembl_ids[:60])
    cells = TrainingCells(
        {"cells": 12_345, "studies": ["a"]},
        {"genes": np.zeros((1, 2), np.int32), "hashes_0": np.ones(3, np.uint64)},
    )
    return Pretrained(
        "sct", CONFIG, unflatten(arrays), genes, license="cc-by-4.0", embedding={"default": "flat"},
        training_cells=cells,
    )  # fmt: skip


@pytest.fixture
def box(model, tmp_path, monkeypatch) -> Path:
    """Folder of packaged models with one model, without a network and without a cache of the Hub."""
    folder = tmp_path / "box"
    model.save_pretrained(folder / packaged.DEFAULT, dtype="float16")
    (folder / "README.md").write_text("# Packaged models\n")
    monkeypatch.setattr(packaged, "FOLDER", folder)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub.constants", None)
    return folder


@pytest.fixture
def cache(model, tmp_path, monkeypatch) -> Path:
    """Cache of the Hugging Face Hub with two versions of a model, a text model of another project, and a data set."""
    constants = pytest.importorskip(
        "huggingface_hub.constants", reason="the cache of the Hub is read with huggingface_hub"
    )
    folder = tmp_path / "cache"
    monkeypatch.setattr(packaged, "FOLDER", tmp_path / "no box")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    mine = folder / "models--someone--mine"
    model.save_pretrained(mine / "snapshots" / "old")
    dataclasses.replace(model, license="mit").save_pretrained(mine / "snapshots" / "new")
    (mine / "refs").mkdir()
    (mine / "refs" / "main").write_text("old")
    for name in ("models--someone--text", "datasets--someone--cells"):
        other = folder / name / "snapshots" / "1"
        other.mkdir(parents=True)
        (other / "config.json").write_text('{"model_type": "gpt2"}')
    return folder


def test_a_packaged_model_is_loaded_by_its_name(model, box, tmp_path, monkeypatch):
    (tmp_path / packaged.DEFAULT).mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match=r"and of a local folder.*write './sct-mini'"):
        loaded = sct.load("sct-mini")
    assert loaded.size == model.size
    assert loaded.genes == model.genes
    assert loaded.training_cells.info["cells"] == 12_345
    # A path is never the name of a packaged model, so the folder without a model is meant.
    for path in ("./sct-mini", Path("sct-mini")):
        with pytest.raises(CheckpointError, match="neither a model folder"):
            sct.load(path)
    with pytest.raises(CheckpointError, match="step is 3, but"):
        sct.load("sct-mini", step=3)


def test_an_unknown_name_leads_to_the_packaged_models(box, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"does not exist.*did you mean 'sct-mini'\?"):
        sct.load("sct-mni")
    with pytest.raises(CheckpointError, match=r"does not exist.*there are: sct-mini\)") as error:
        sct.load("qwxyz")
    assert "did you mean" not in str(error.value)
    with pytest.raises(CheckpointError, match="does not exist") as error:
        sct.load("./sct-mni")
    assert "packaged" not in str(error.value)


def test_an_installation_without_packaged_models_says_so(box, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "missing"):
        monkeypatch.setattr(packaged, "FOLDER", folder)
        with pytest.raises(CheckpointError, match=r"sct-mini does not exist.*has no packaged models"):
            sct.load("sct-mini")
        assert not packaged.has_default()
        assert sct.models().empty
    command._print_ready()
    assert capsys.readouterr().out.startswith("This installation has no packaged models.\n")


def test_models_are_listed_without_reading_them(model, box, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("only config.json is read")

    monkeypatch.setattr(model_folder.FolderReader, "__init__", refuse)
    monkeypatch.setattr(sct.GeneVocabulary, "load", refuse)
    (row,) = sct.models().to_dict("records")
    assert row.pop("bytes") == sum(file.stat().st_size for file in (box / "sct-mini").iterdir())
    assert pd.isna(row.pop("trouble"))
    assert row == {
        "name": "sct-mini", "where": "package", "family": "sct", "parameters": model.size, "genes": 60,
        "species": "human", "license": "cc-by-4.0", "training_cells": 12_345, "readout": "flat", "default": True,
        "folder": str(box / "sct-mini"),
    }  # fmt: skip


def test_a_damaged_model_is_a_row_with_the_reason(box):
    for name in ("json", "files", "other", "empty"):
        shutil.copytree(box / "sct-mini", box / name)
    (box / "json" / "config.json").write_text("{")
    (box / "files" / "genes.tsv").unlink()
    config = json.loads((box / "other" / "config.json").read_text())
    (box / "other" / "config.json").write_text(json.dumps({**config, "license": "mit"}))
    (box / "empty" / "config.json").unlink()
    found = sct.models().set_index("name")
    assert found.index[found["trouble"].isna()].tolist() == ["sct-mini"]
    for name, reason in (("json", "not valid JSON"), ("files", "no genes.tsv"), ("other", "was changed"),
                         ("empty", "no config.json")):  # fmt: skip
        assert reason in found.loc[name, "trouble"], name
        assert "\n" not in found.loc[name, "trouble"]


def test_a_model_folder_of_an_earlier_version_has_unknown_values(box):
    path = box / "sct-mini" / "config.json"
    config = json.loads(path.read_text())
    for name in ("parameters", "genes", "sha256"):
        del config[name]
    path.write_text(json.dumps(config))
    (row,) = sct.models().itertuples()
    assert sct.models()[["parameters", "genes", "species", "trouble"]].isna().all(axis=None)
    assert (row.family, row.license) == ("sct", "cc-by-4.0")


def test_models_in_the_cache_of_the_hub_are_listed(cache):
    found = sct.models()
    assert found[["name", "where", "license", "default"]].values.tolist() == [
        ["someone/mine", "cache", "cc-by-4.0", False]  # the version of the branch main, which the id loads
    ]
    (cache / "models--someone--mine" / "snapshots" / "old" / "config.json").write_text("{")
    (row,) = sct.models().itertuples()
    assert "not valid JSON" in row.trouble
    (cache / "models--someone--mine" / "refs" / "main").unlink()
    assert sct.models()["name"].tolist() == ["someone/mine"]
    shutil.rmtree(cache)
    assert sct.models().empty


def test_the_command_prints_the_models_that_are_ready(box, capsys, monkeypatch):
    shutil.copytree(box / "sct-mini", box / "damaged")
    (box / "damaged" / "config.json").write_text("{")
    monkeypatch.setenv("COLUMNS", "150")
    command._print_ready()
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if "sct-mini" in line and "package" in line]
    for word in ("sct", "human", "cc-by-4.0", "12,345", "flat"):
        assert word in line
    plain = " ".join(said.split())
    assert f"damaged: {box / 'damaged' / 'config.json'} is not valid JSON" in plain
    assert "sct embed uses sct-mini if --model is missing." in plain
    assert "No model of sct is in the cache" in plain


def test_the_columns_are_documented():
    assert catalog.models.__doc__ is not None
    assert [name for name in sct.models().columns if f"`{name}`" not in catalog.models.__doc__] == []
