from __future__ import annotations

import gzip
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
from store_inputs import (
    log1p_file,
    make_adata,
    run,
    three_files,
    write_as,
)

from sct.data.datasets import simulate_atlas
from sct.data.ingest.build import IngestOptions, ingest
from sct.data.store import Store
from sct.errors import DataError, SctError, StoreError


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    return three_files(tmp_path / "inputs")


def _late_fraction(folder: Path) -> Path:
    adata = make_adata(150)
    adata.X.data[len(adata.X.data) // 3] = 0.5
    return write_as(adata, "csr", folder)


def _spatial(value) -> callable:
    def make(folder: Path) -> Path:
        adata = make_adata(spatial=True)
        adata.obsm["spatial"] = value(adata.obsm["spatial"])
        return write_as(adata, "csr", folder)

    return make


def _nan(points: np.ndarray) -> np.ndarray:
    points[7, 1] = np.nan
    return points


def _twins(folder: Path) -> Path:
    adata = make_adata()
    adata.obs_names = ["twin", "twin", *adata.obs_names[2:]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return write_as(adata, "csr", folder)


def _no_cells(folder: Path) -> Path:
    return write_as(make_adata()[:0].copy(), "csr", folder)


def _other_species(folder: Path) -> Path:
    adata = make_adata()
    adata.var_names = [f"ENSMUSG{i:011d}" for i in range(adata.n_vars)]
    return write_as(adata, "csr", folder)


def _empty(folder: Path) -> Path:
    adata = make_adata()
    adata.X = sp.csr_matrix(adata.shape, dtype=np.float32)
    return write_as(adata, "csr", folder)


def _only_foreign(folder: Path) -> Path:
    adata = make_adata()
    known = adata.var_names.str.startswith("ENSG99")
    adata.X = adata.X @ sp.diags_array(np.where(known, 0.0, 1.0))
    adata.X.eliminate_zeros()
    return write_as(adata, "csr", folder)


def _cut(kind: str) -> callable:
    def make(folder: Path) -> Path:
        path = write_as(make_adata(), kind, folder)
        file = next(path.glob("matrix*")) if path.is_dir() else path
        file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
        return path

    return make


def _text(name: str) -> callable:
    def make(folder: Path) -> Path:
        path = folder / name
        path.write_text("gene,cell\n1,2\n")
        return path

    return make


def _no_barcodes(folder: Path) -> Path:
    path = write_as(make_adata(), "mtx", folder)
    (path / "barcodes.tsv").unlink()
    return path


def _twice_in_mtx(folder: Path) -> Path:
    path = write_as(make_adata(), "mtx_gz", folder)
    file = path / "matrix.mtx.gz"
    lines = gzip.decompress(file.read_bytes()).decode().splitlines()
    lines[-1] = lines[-2]
    file.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


def _wrong_barcodes(folder: Path) -> Path:
    path = write_as(make_adata(), "mtx", folder)
    (path / "barcodes.tsv").write_text("one\ntwo\n")
    return path


BAD = {
    "a fraction late in the file": (_late_fraction, "not integers"),
    "log1p": (log1p_file, "no raw counts"),
    "coordinates in space": (_spatial(lambda points: np.c_[points, points[:, 0]]), r"\(150, 3\)"),
    "coordinates with gaps": (_spatial(_nan), "NaN or infinity in 1 of 150"),
    "duplicate cells": (_twins, "duplicate cell names, e.g. 'twin'"),
    "no cells": (_no_cells, "no cells|no raw counts"),
    "another species": (_other_species, "0 of 65 gene names"),
    "no counts": (_empty, "only zeros"),
    "no counts of known genes": (_only_foreign, "150 without counts"),
    "cut h5ad": (_cut("csr"), "cannot be read"),
    "cut gzip": (_cut("mtx_gz"), "cannot be read"),
    "cut mtx": (_cut("mtx"), "cannot be read"),
    "cut 10x": (_cut("tenx3"), "cannot be read"),
    "text as h5ad": (_text("sample.h5ad"), "cannot be read"),
    "text as 10x": (_text("sample.h5"), "cannot be read"),
    "text as mtx": (_text("matrix.mtx"), "features.tsv or genes.tsv"),
    "no barcodes": (_no_barcodes, "barcodes.tsv"),
    "other barcodes": (_wrong_barcodes, "lists 2 cells"),
    "an entry twice": (_twice_in_mtx, "two entries"),
    "an empty folder": (lambda folder: folder, "contains no h5ad"),
    "nothing": (lambda folder: folder / "missing.h5ad", "does not exist"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_sentence(case: str, tmp_path: Path) -> None:
    make, words = BAD[case]
    (tmp_path / "input").mkdir()
    path = make(tmp_path / "input")
    with pytest.raises(DataError, match=words) as caught:
        run([path], tmp_path / "store")
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert not list(tmp_path.glob("store/studies/*"))
    assert not list(tmp_path.glob("store/studies/.*"))
    with pytest.raises(StoreError):
        Store.open(tmp_path / "store")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layer": "spliced"}, r"'spliced'.*X"),
        ({"study_key": "donor"}, r"'donor'.*'cell_type', 'batch', 'quality'"),
        ({"gene_column": "symbols"}, "symbols"),
        ({"min_genes": 1000}, r"150 .*1000 genes"),
    ],
)
def test_options_that_do_not_fit_the_input(tmp_path: Path, options: dict, words: str) -> None:
    path = write_as(make_adata(), "csr", tmp_path)
    with pytest.raises(DataError, match=words) as caught:
        run([path], tmp_path / "store", **options)
    assert str(path) in str(caught.value)


def test_a_bad_file_does_not_lose_the_others(three: list[Path], tmp_path: Path) -> None:
    bad = log1p_file(tmp_path)
    store = tmp_path / "store"
    with pytest.raises(DataError, match=r"1 of 4 inputs.*--skip_invalid") as caught:
        run([*three[:1], bad, *three[1:]], store)
    assert str(bad) in str(caught.value)
    with pytest.raises(StoreError):
        Store.open(store)
    report = run([*three, bad], store, skip_bad=True)
    assert report.kept == ("a", "b", "c")
    assert list(report.refused) == [str(bad)]
    assert [each.name for each in Store.open(store).studies] == ["a", "b", "c"]
    with pytest.raises(DataError, match="raw counts"):
        run([bad], tmp_path / "other", skip_bad=True)


def test_a_full_disk_is_one_sentence(
    three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sct.data.ingest import writer

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(writer, "write_frame", full)
        with pytest.raises(StoreError, match=r"\.a\.partial .*No space left"):
            run(three, tmp_path / "store")
    assert not (tmp_path / "store").exists()
    run(three, tmp_path / "store")


def test_output_that_cannot_be_a_folder(three: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file"):
        run(three, tmp_path / "file")


def test_the_same_name_from_another_file_is_refused(three: list[Path], tmp_path: Path) -> None:
    run(three, tmp_path / "store")
    other = write_as(make_adata(30, seed=9), "csr", tmp_path / "elsewhere", "a")
    with pytest.raises(DataError, match=r"elsewhere/a\.h5ad .*NAME=PATH"):
        run([other], tmp_path / "store")
    run([f"a2={other}"], tmp_path / "store")
    assert [each.name for each in Store.open(tmp_path / "store").studies] == ["a", "a2", "b", "c"]


def test_a_refused_input_leaves_no_folder_behind(tmp_path):
    (tmp_path / "broken.h5ad").write_bytes(b"no h5ad")
    with pytest.raises(SctError):
        ingest([tmp_path / "broken.h5ad"], tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_key_of_coordinates_that_is_not_there_is_refused(tmp_path):
    slide = simulate_atlas(1, 30, 80, spatial=True)[0]
    with pytest.raises(DataError, match=r"obsm\['pixels'\]"):
        ingest([("slide", slide)], tmp_path / "store", options=IngestOptions(spatial_key="pixels"))
