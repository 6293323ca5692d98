from __future__ import annotations

import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from store_inputs import expected_counts, make_adata, small_vocabulary

from sct.data.coordinates import rescale_coordinates
from sct.data.genes.vocabulary import GeneVocabulary
from sct.data.ingest.build import IngestOptions, ingest
from sct.data.store import Store
from sct.errors import StoreError
from sct.inference.inputs import sections

INPUTS = {"plain": make_adata(400), "plane": make_adata(130, seed=1, spatial=True)}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "store"
    options = IngestOptions(validation=("plane",))
    ingest(list(INPUTS.items()), path, vocabulary=small_vocabulary(), options=options)
    return path


@pytest.fixture
def copied(pristine: Path, tmp_path: Path) -> Path:
    """A store that a test may damage."""
    return Path(shutil.copytree(pristine, tmp_path / "copied"))


@pytest.mark.parametrize("name", INPUTS)
def test_rows_are_the_cells_of_the_source(pristine: Path, name: str) -> None:
    study = Store.open(pristine).study(name)
    truth = expected_counts(INPUTS[name], small_vocabulary())
    block = study.read(0, study.n_cells)
    names = list(study.obs().index)
    assert sorted(names) == sorted(truth.index)
    assert block.dtype == np.float32
    assert study.nnz == block.nnz == (truth.to_numpy() > 0).sum()
    np.testing.assert_array_equal(block.toarray(), truth.loc[names].to_numpy())
    np.testing.assert_array_equal(study.gene_totals, truth.sum().to_numpy())
    np.testing.assert_array_equal(study.measured, [each in INPUTS[name].var_names for each in truth.columns])


@pytest.mark.parametrize("name", INPUTS)
def test_anndata_reads_a_study(pristine: Path, name: str) -> None:
    study = Store.open(pristine).study(name)
    source = INPUTS[name]
    read = ad.read_zarr(study.path)
    assert (study.read(0, study.n_cells) != read.X).nnz == 0
    assert read.X.dtype == np.uint16
    assert tuple(read.var_names) == small_vocabulary().ensembl_ids
    assert tuple(read.var["symbol"]) == small_vocabulary().symbols
    for column in source.obs:
        assert list(read.obs[column]) == list(source.obs.loc[read.obs_names, column])
    if study.spatial:
        points = source[read.obs_names].obsm["spatial"].astype(np.float32)
        np.testing.assert_array_equal(read.obsm["spatial"], points)
        np.testing.assert_array_equal(study.coordinates, points)
    else:
        assert study.coordinates is None
    assert (study.to_anndata().X != read.X).nnz == 0


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_reading_parts_is_slicing_the_whole(pristine: Path, data: st.DataObject) -> None:
    study = Store.open(pristine).study("plain")
    whole = study.read(0, study.n_cells)
    dense = whole.toarray()
    start = data.draw(st.integers(0, study.n_cells))
    stop = data.draw(st.integers(start, study.n_cells))
    part = study.read(start, stop)
    assert part.shape == (stop - start, study.n_genes)
    assert (part != whole[start:stop]).nnz == 0
    rows = data.draw(st.lists(st.integers(0, study.n_cells - 1), max_size=30))
    assert np.array_equal(study.read_rows(rows).toarray(), dense[rows])


def test_far_rows_are_read_in_pieces(pristine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # With small chunks the gaps between these rows are worth skipping.
    monkeypatch.setattr("sct.data.store.CHUNK", 100)
    study = Store.open(pristine).study("plain")
    runs = []
    original = study._read_runs
    monkeypatch.setattr(study, "_read_runs", lambda spans: runs.extend(spans) or original(spans))
    rows = [399, 3, 200, 4, 3]
    assert np.array_equal(study.read_rows(rows).toarray(), original([(0, 400)])[rows].toarray())
    assert runs == [(3, 5), (200, 201), (399, 400)]


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (0, 401), (5, 4)])
def test_rows_outside_are_an_index_error(pristine: Path, start: int, stop: int) -> None:
    study = Store.open(pristine).study("plain")
    with pytest.raises(IndexError, match="400 cells"):
        study.read(start, stop)
    with pytest.raises(IndexError, match="400 cells"):
        study.read_rows([0, 400])


def test_studies_travel_to_other_processes_and_threads(pristine: Path) -> None:
    study = Store.open(pristine).study("plain")
    whole = study.read(0, study.n_cells)
    again = pickle.loads(pickle.dumps(study))
    assert (again.name, again.split, again.n_cells) == (study.name, study.split, study.n_cells)
    spans = [(i, i + 37) for i in range(0, 360, 3)]
    with ThreadPoolExecutor(8) as pool:
        blocks = list(pool.map(lambda span: again.read(*span), spans))
    for (start, stop), block in zip(spans, blocks, strict=True):
        assert (block != whole[start:stop]).nnz == 0


def test_store_knows_its_studies(pristine: Path) -> None:
    store = Store.open(pristine)
    assert [each.name for each in store.studies] == ["plain", "plane"]
    assert [each.name for each in store.split("train")] == ["plain"]
    assert [each.name for each in store.split("validation")] == ["plane"]
    assert store.split("test") == ()
    assert store.n_cells == 530
    assert store.vocabulary.hash == small_vocabulary().hash
    assert pickle.loads(pickle.dumps(store)).study("plane").read(0, 1).shape == (1, 60)
    with pytest.raises(StoreError, match=r"'other'.*plain, plane"):
        store.study("other")
    with pytest.raises(StoreError, match=r"'training'.*'train', 'validation', 'test'"):
        store.split("training")


def test_another_vocabulary_is_refused(pristine: Path) -> None:
    store = Store.open(pristine)
    store.check_vocabulary(small_vocabulary())
    other = GeneVocabulary.from_ids([*reversed(small_vocabulary().ensembl_ids)], name="backwards")
    with pytest.raises(StoreError) as caught:
        store.check_vocabulary(other)
    for word in ("toy", "backwards", other.hash, store.vocabulary.hash):
        assert word in str(caught.value)


ARRAYS = ("X/data", "X/indices", "X/indptr", "var/total_counts", "var/measured", "obsm/spatial")


def _touch(store: Store, array: str) -> None:
    study = store.study("plane")
    reads = {
        "var/total_counts": lambda: study.gene_totals,
        "var/measured": lambda: study.measured,
        "obsm/spatial": lambda: study.coordinates,
    }
    reads.get(array, lambda: study.read(3, 9))()


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[5] ^= 0xFF
    file.write_bytes(bytes(content))


# Tables are written by anndata, whose chunks carry no checksum: a flipped bit in them is not always seen.
DAMAGES = [(array, damage) for array in ARRAYS for damage in (_truncate, Path.unlink)]
DAMAGES += [(array, _flip) for array in ARRAYS if not array.startswith("var")]


@pytest.mark.parametrize(("array", "damage"), DAMAGES)
def test_damaged_chunks_are_errors_that_name_the_file(copied: Path, array: str, damage) -> None:
    store = Store.open(copied)
    _touch(store, array)
    chunks = [each for each in (store.study("plane").path / array / "c").rglob("*") if each.is_file()]
    damage(chunks[0])
    with pytest.raises(StoreError) as caught:
        _touch(Store.open(copied), array)
    assert str(store.study("plane").path / array) in str(caught.value)
    assert "run the ingest again" in str(caught.value)
    if array.startswith("X"):
        assert "rows 3 to 9" in str(caught.value)


def test_wrong_values_are_errors(copied: Path) -> None:
    """Values that pass the checksum but are no counts: another program wrote into the store."""
    import zarr

    path = Store.open(copied).study("plane").path
    for array, at, value in (("X/indices", 0, 10_000), ("X/indptr", 5, 0), ("X/data", 0, 0)):
        handle = zarr.open_array(str(path / array), mode="r+")
        before = handle[at]
        handle[at] = value
        with pytest.raises(StoreError, match=array):
            Store.open(copied).study("plane").read(0, 10)
        handle[at] = before
    Store.open(copied).study("plane").read(0, 10)


def _no_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def _broken_manifest(path: Path) -> None:
    _truncate(path / "manifest.json")


def _newer(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "schema_version": 99}))


def _no_splits(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["studies"][0]["split"], manifest["sha256"]
    (path / "manifest.json").write_text(json.dumps(manifest))


def _other_number(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"nnz": ', '"nnz": 1', 1))


def _other_names(path: Path) -> None:
    text = (path / "genes.tsv").read_text()
    (path / "genes.tsv").write_text(text.replace("TOY3", "TOI3"))


def _other_genes(path: Path) -> None:
    small_vocabulary().subset(small_vocabulary().ensembl_ids[:5]).save(path / "genes.tsv")


def _no_genes(path: Path) -> None:
    (path / "genes.tsv").unlink()


def _no_study(path: Path) -> None:
    shutil.rmtree(path / "studies/plane.zarr")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_no_manifest, "manifest.json"),
        (_broken_manifest, "manifest.json"),
        (_newer, r"manifest.json .*99"),
        (_no_splits, r"manifest.json .*'split'"),
        (_other_number, r"manifest.json .*changed"),
        (_other_names, r"genes.tsv .*changed"),
        (_other_genes, r"genes.tsv .*hash"),
        (_no_genes, "genes.tsv"),
        (_no_study, "plane.zarr"),
        (shutil.rmtree, "no store"),
    ],
)
def test_an_incomplete_store_does_not_open(copied: Path, damage, words: str) -> None:
    damage(copied)
    with pytest.raises(StoreError, match=words) as caught:
        Store.open(copied)
    assert str(copied) in str(caught.value)


def test_damaged_tables_are_errors(copied: Path) -> None:
    study = Store.open(copied).study("plane")
    (study.path / "obs/zarr.json").write_text("{")
    with pytest.raises(StoreError, match=r"plane\.zarr/obs"):
        study.obs()
    with pytest.raises(StoreError, match=r"plane\.zarr"):
        study.to_anndata()


def test_the_scale_is_that_of_all_cells_of_the_section(tmp_path: Path) -> None:
    adata = make_adata(60, seed=2, spatial=True)
    corner = np.argmax(adata.obsm["spatial"][:, 0])
    counts = adata.X.toarray()
    counts[corner] = 0  # an ingest drops it, and the others keep their place
    adata.X = sp.csr_matrix(counts)
    del adata.obs["batch"]
    ingest([("plane", adata)], tmp_path / "store", vocabulary=small_vocabulary(), options=IngestOptions())
    study = Store.open(tmp_path / "store").studies[0]
    assert study.n_cells == 59
    names = list(study.obs().index)
    whole = rescale_coordinates(adata.obsm["spatial"].astype(np.float32))
    at = [adata.obs_names.get_loc(name) for name in names]
    np.testing.assert_array_equal(study.rescaled_coordinates(), whole[at])
    (section,) = sections(study.to_anndata(), None, "spatial")
    np.testing.assert_array_equal(section.places, whole[at])
    # A store that an earlier version wrote has no scale, and means what it meant: the box around its own cells.
    shutil.rmtree(study.path / "uns" / "sct_sections")
    del study.record["hashes"]
    own = rescale_coordinates(np.asarray(study.coordinates))
    assert np.abs(own - whole[at]).max() > 1e-3
    np.testing.assert_array_equal(study.rescaled_coordinates(), own)
    (section,) = sections(study.to_anndata(), None, "spatial")
    np.testing.assert_array_equal(section.places, own)
