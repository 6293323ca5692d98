"""Results as tables: what the columns are called, what is read block by block, and what is refused."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import sct
from sct import result_tables
from sct.errors import ConfigError, DataError, MissingExtraError, OutputError

N = 23


@pytest.fixture
def adata() -> ad.AnnData:
    rng = np.random.default_rng(0)
    cells = ad.AnnData(sparse.random(N, 4, 0.5, "csr", np.float32, rng))
    cells.obs_names = [f"cell, {i}" for i in range(N)]
    cells.var_names = ["CD3E", "CD8A", "MS4A1", "NKG7"]
    cells.obs["sct_label"] = pd.Categorical(["T", "B", None] * 7 + ["T", "B"])
    cells.obs["sct_label_probability"] = rng.random(N).astype(np.float32)
    cells.obsm["X_sct"] = rng.normal(size=(N, 3)).astype(np.float32)
    cells.obsm["sct_expected"] = pd.DataFrame(
        {"FOXP3": np.arange(N, dtype=np.float32)}, index=cells.obs_names
    )
    cells.layers["sct_expected"] = sparse.random(N, 4, 0.5, "csr", np.float32, rng)
    cells.uns["sct"] = {
        "var_names": np.array(["MS4A1", "CD3E"]),
        "counts_from": "X",
        "genes": [],
        "cells": [],
    }
    cells.layers["log"] = cells.X.log1p()
    return cells


def read(path) -> pd.DataFrame:
    if path.suffix == ".parquet":
        return pd.read_parquet(path)
    return pd.read_csv(path, sep="\t" if ".tsv" in path.name else ",", keep_default_na=False, na_values=[""])


def expected(adata: ad.AnnData) -> dict[str, pd.DataFrame]:
    layer = adata.layers["sct_expected"].toarray()
    return {
        "sct_label": pd.DataFrame({"sct_label": adata.obs["sct_label"].astype(object)}),
        "X_sct": pd.DataFrame(adata.obsm["X_sct"], columns=["X_sct_0", "X_sct_1", "X_sct_2"]),
        # Both places of impute, and of the layer only the imputed genes.
        "sct_expected": pd.DataFrame({"FOXP3": np.arange(N), "MS4A1": layer[:, 2], "CD3E": layer[:, 0]}),
        "log": pd.DataFrame(adata.layers["log"].toarray(), columns=list(adata.var_names)),
    }


@pytest.mark.parametrize("suffix", result_tables.FORMATS)
@pytest.mark.parametrize("blocks", [1, 4])
def test_a_table_has_the_values(adata, tmp_path, monkeypatch, suffix, blocks):
    if blocks > 1:
        monkeypatch.setattr(result_tables, "_BLOCK", 24)
    for key, values in expected(adata).items():
        path = sct.export(adata, key, tmp_path / f"{key}{suffix}")
        table = read(path)
        assert list(table.columns) == ["cell", *values.columns]
        assert table["cell"].tolist() == list(adata.obs_names)
        for column in values:
            if values[column].dtype == object:
                # With the string type of pandas 3, `where` would write NaN for None.
                column_read = table[column].astype(object)
                assert column_read.where(column_read.notna(), None).tolist() == [
                    None if pd.isna(each) else each for each in values[column]
                ]
            else:
                np.testing.assert_array_equal(
                    table[column].astype(np.float32), values[column].astype(np.float32)
                )
        first = path.read_bytes()
        assert sct.export(adata, key, str(path)).read_bytes() == first
    assert len(list(tmp_path.iterdir())) == 4


def test_several_keys_stand_side_by_side(adata, tmp_path):
    keys = ["sct_label", "sct_label_probability", "X_sct", "sct_expected", "log"]
    table = read(sct.export(adata, keys, tmp_path / "x.csv"))
    assert list(table.columns) == [
        "cell", "sct_label", "sct_label_probability", "X_sct_0", "X_sct_1", "X_sct_2", "sct_expected:FOXP3",
        "sct_expected:MS4A1", "sct_expected:CD3E", *(f"log:{gene}" for gene in adata.var_names),
    ]  # fmt: skip


def test_a_file_on_disk_and_a_view_are_written_alike(adata, tmp_path):
    adata.write_h5ad(tmp_path / "x.h5ad")
    backed = ad.read_h5ad(tmp_path / "x.h5ad", backed="r")
    for key in expected(adata):
        one = sct.export(adata, key, tmp_path / "one.csv").read_text()
        assert sct.export(backed, key, tmp_path / "two.csv").read_text() == one
        part = sct.export(adata[3:9], key, tmp_path / "part.csv").read_text().splitlines()
        assert part == [one.splitlines()[0], *one.splitlines()[4:10]]


def test_what_cannot_be_written_is_refused_and_leaves_the_old_file(adata, tmp_path, monkeypatch):
    path = tmp_path / "x.csv"
    path.write_text("old")
    adata.obsm["cell"] = pd.DataFrame({"cell": np.zeros(N)}, index=adata.obs_names)
    for keys, name, error, words in (
        ("X_sctt", "x.csv", DataError, "X_sctt.*X_sct"),
        ([], "x.csv", ConfigError, "keys"),
        (["X_sct", "X_sct"], "x.csv", ConfigError, "twice"),
        ("cell", "x.csv", DataError, "cell"),
        ("X_sct", "x.xlsx", ConfigError, "suffix of path.*'.xlsx'"),
        ("X_sct", "x.h5ad", ConfigError, "suffix of path"),
        ("X_sct", "none/x.csv", ConfigError, "folder"),
    ):
        with pytest.raises(error, match=words):
            sct.export(adata, keys, tmp_path / name)
    full = lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device"))  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(pd.DataFrame, "to_csv", full)
        with pytest.raises(OutputError, match=r"x\.csv"):
            sct.export(adata, "X_sct", path)
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["x.csv"]


def test_parquet_without_its_library_names_the_extra(adata, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtraError, match=r"pyarrow.*sct-jax\[parquet\]"):
        sct.export(adata, "X_sct", tmp_path / "x.parquet")
    sct.export(adata, "X_sct", tmp_path / "x.csv")
