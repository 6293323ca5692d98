from __future__ import annotations

import sys
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from store_inputs import (
    leftovers,
    make_adata,
    run,
    write_as,
)

from sct.data.ingest.input_files import Input, find_inputs
from sct.data.store import Store
from sct.errors import ConfigError, DataError, MissingExtraError, SctError


def test_folders_are_searched(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_as(make_adata(), "csr", data / "deep", "one")
    write_as(make_adata(), "zarr3", data, "two")
    write_as(make_adata(), "tenx3", data / "s1/outs", "filtered_feature_bc_matrix")
    write_as(make_adata(), "mtx_gz", data / "s2/outs", "filtered_feature_bc_matrix")
    write_as(make_adata(), "tenx2", data, "molecules")
    (data / "s1/notes.txt").write_text("nothing")
    import h5py

    with h5py.File(data / "other.h5", "w") as file:
        file["x"] = 1
    found, ignored = find_inputs([data])
    assert [(each.name, each.kind) for each in found] == [
        ("one", "h5ad"),
        ("molecules", "10x_h5"),
        ("s1", "10x_h5"),
        ("s2", "mtx"),
        ("two", "zarr"),
    ]
    assert ignored == [str(data / "other.h5")]
    # The store may lie inside the folder that is searched, and files may be named twice.
    run([data, data / "deep/one.h5ad"], data / "store")
    report = run([data], data / "store")
    assert len(report.studies) == len(report.kept) == 5
    assert any("other.h5" in note for note in report.notes)


def test_two_inputs_of_one_name_are_refused(tmp_path: Path) -> None:
    one = write_as(make_adata(), "csr", tmp_path / "x")
    two = write_as(make_adata(), "csr", tmp_path / "y")
    with pytest.raises(DataError, match="NAME=PATH") as caught:
        find_inputs([one, two])
    assert str(one) in str(caught.value)
    assert str(two) in str(caught.value)
    found, _ = find_inputs([one, f"other={two}"])
    assert [each.name for each in found] == ["sample", "other"]
    with pytest.raises(DataError, match="'both'"):
        find_inputs([f"both={tmp_path}"])
    with pytest.raises(ConfigError, match="no input"):
        find_inputs([])


def test_values_of_a_study_key_must_stay_apart(tmp_path: Path) -> None:
    adata = make_adata()
    adata.obs["batch"] = np.where(adata.obs["batch"] == "one", "a b", "a_b")
    with pytest.raises(DataError, match=r"'sample\.a_b'"):
        run([("sample", adata)], tmp_path / "store", study_key="batch")
    adata.obs["batch"] = pd.Categorical([None, *["x"] * 149])
    with pytest.raises(DataError, match=r"obs\['batch'\] .*1 cells"):
        run([("sample", adata)], tmp_path / "store", study_key="batch")


def test_census_downloads_and_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(dataset_id: str, to_path: str, *, census_version: str, progress_bar: bool) -> None:
        asked.append((dataset_id, census_version))
        if dataset_id == "missing":
            raise KeyError("no such data set")
        make_adata().write_h5ad(to_path)

    module = types.SimpleNamespace(download_source_h5ad=download)
    monkeypatch.setitem(sys.modules, "cellxgene_census", module)
    run(["census:1234-ab"], tmp_path / "store")
    assert asked == [("1234-ab", "stable")]
    assert Store.open(tmp_path / "store").study("1234-ab").n_cells == 150
    assert not leftovers(tmp_path / "store")
    run(["census:1234-ab"], tmp_path / "store")
    assert len(asked) == 1
    with pytest.raises(DataError, match="census:missing"):
        run(["census:missing"], tmp_path / "store")


def test_census_without_its_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sct.data.ingest.readers import open_source

    monkeypatch.setitem(sys.modules, "cellxgene_census", None)
    item = Input("x", "census", "x")
    with (
        pytest.raises(MissingExtraError, match=r"sct-jax\[census\]"),
        open_source(item, layer=None, spatial_key="spatial", folder=tmp_path),
    ):
        pass
    with pytest.raises(SctError, match=r"sct-jax\[census\]"):
        run(["census:x"], tmp_path / "store")
