from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from store_inputs import (
    KINDS,
    VOCABULARY,
    expected_counts,
    files_of,
    leftovers,
    make_adata,
    matrix,
    run,
    write_as,
)

from sct.data.ingest.build import IngestOptions, ingest
from sct.data.ingest.input_files import find_inputs
from sct.data.ingest.inputs import ingest_input
from sct.data.ingest.sorting import Sizes, hilbert_rank
from sct.data.ingest.writer import portable_table
from sct.data.store import Store
from sct.errors import DataError


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    run([write_as(make_adata(), "csr", folder)], folder / "store")
    return folder / "store"


def test_cells_keep_their_counts_and_labels(reference: Path) -> None:
    source = make_adata()
    cells = matrix(reference)
    truth = expected_counts(source, VOCABULARY)
    assert sorted(cells.index) == sorted(truth.index)
    assert list(cells.index) != list(truth.index), "the order must be random"
    np.testing.assert_array_equal(cells.to_numpy(), truth.loc[cells.index].to_numpy())
    obs = Store.open(reference).study("sample").obs()
    for column in source.obs:
        assert list(obs[column]) == list(source.obs.loc[obs.index, column])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_store(reference: Path, tmp_path: Path, kind: str) -> None:
    report = run([write_as(make_adata(), kind, tmp_path)], tmp_path / "store")
    pd.testing.assert_frame_equal(matrix(tmp_path / "store"), matrix(reference))
    one, other = Store.open(tmp_path / "store").study("sample"), Store.open(reference).study("sample")
    assert files_of(one.path / "X") == files_of(other.path / "X")
    np.testing.assert_array_equal(one.gene_totals, other.gene_totals)
    np.testing.assert_array_equal(one.measured, other.measured)
    taken = {"layer": 'layers["counts"]', "raw": "raw.X"}.get(kind, "matrix" if kind[0] in "tm" else "X")
    assert report.studies[0]["counts_from"] == taken
    assert not leftovers(tmp_path / "store")


def test_objects_in_memory_give_the_same_store(reference: Path, tmp_path: Path) -> None:
    path = write_as(make_adata(), "csr", tmp_path)
    backed = ad.read_h5ad(path, backed="r")
    dense = make_adata()
    dense.X = dense.X.toarray()
    columns = make_adata()
    columns.X = columns.X.tocsc()
    for number, adata in enumerate([make_adata(), backed, dense, columns]):
        run([("sample", adata)], tmp_path / str(number))
        one, other = Store.open(tmp_path / str(number)).study("sample"), Store.open(reference).study("sample")
        assert files_of(one.path / "X") == files_of(other.path / "X")
        pd.testing.assert_frame_equal(one.obs(), other.obs(), check_dtype=False, check_categorical=False)


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(
    kind=st.sampled_from(["csr", "csc", "dense", "mtx", "plane"]),
    block=st.integers(1, 6000),
    bucket=st.integers(20, 6000),
    held=st.integers(0, 6000),
)
def test_block_sizes_do_not_matter(
    tmp_path_factory: pytest.TempPathFactory, kind: str, block: int, bucket: int, held: int
) -> None:
    folder = tmp_path_factory.mktemp("sizes")
    adata = make_adata(60, spatial=kind == "plane")
    path = write_as(adata, "csr" if kind == "plane" else kind, folder)
    (item,), _ = find_inputs([path])
    stores = []
    for number, sizes in enumerate([Sizes(), Sizes(block, bucket, held)]):
        root = folder / str(number)
        (root / "studies").mkdir(parents=True)
        records = ingest_input(root, item, "", VOCABULARY, IngestOptions(study_key=None), sizes=sizes)
        stores.append((records, files_of(root)))
    assert stores[0] == stores[1]


def test_shards_are_written_piece_by_piece(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sct.data.ingest.writer.CHUNK", 64)
    monkeypatch.setattr("sct.data.ingest.writer.CHUNKS_PER_SHARD", 2)
    monkeypatch.setattr("sct.data.ingest.inputs.Sizes", lambda: Sizes(500, 100, 700))
    run([("sample", make_adata())], tmp_path / "store")
    assert len(list((tmp_path / "store/studies/sample.zarr/X/data/c").iterdir())) > 10
    pd.testing.assert_frame_equal(matrix(tmp_path / "store"), matrix(reference))
    read = ad.read_zarr(tmp_path / "store/studies/sample.zarr")
    np.testing.assert_array_equal(read.X.toarray(), matrix(reference).to_numpy())


def test_the_seed_decides_the_order(tmp_path: Path) -> None:
    orders = []
    for number, seed in enumerate([0, 0, 1]):
        run([("sample", make_adata())], tmp_path / str(number), seed=seed)
        orders.append(list(matrix(tmp_path / str(number)).index))
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])


def test_hilbert_curve_visits_neighbours() -> None:
    side = 32
    points = np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2)[::-1]
    rank = hilbert_rank(points, bits=5)
    assert sorted(rank) == list(range(side * side))
    steps = np.abs(np.diff(points[np.argsort(rank)], axis=0)).sum(axis=1)
    assert (steps == 1).all()


def test_hilbert_of_one_place_keeps_the_order() -> None:
    np.testing.assert_array_equal(hilbert_rank(np.full((4, 2), 3.0)), np.arange(4))


def test_spatial_cells_lie_along_the_curve(tmp_path: Path) -> None:
    adata = make_adata(2000, spatial=True)
    run([("plane", adata)], tmp_path / "store")
    study = Store.open(tmp_path / "store").study("plane")
    points = study.coordinates
    assert points.dtype == np.float32
    names = list(study.obs().index)
    np.testing.assert_array_equal(points, adata[names].obsm["spatial"].astype(np.float32))
    step = np.linalg.norm(np.diff(points, axis=0), axis=1).mean()
    random_step = np.linalg.norm(np.diff(adata.obsm["spatial"], axis=0), axis=1).mean()
    assert step < 0.1 * random_step
    cells = matrix(tmp_path / "store", "plane")
    truth = expected_counts(adata, VOCABULARY)
    np.testing.assert_array_equal(cells.to_numpy(), truth.loc[names].to_numpy())


def test_spatial_inputs_with_sections_are_noted(tmp_path: Path) -> None:
    adata = make_adata(spatial=True)
    report = run([("plane", adata)], tmp_path / "store")
    assert any("--study_key=batch" in note for note in report.notes)
    report = run([("plane", adata)], tmp_path / "store", study_key="batch")
    assert not any("--study_key" in note for note in report.notes)
    assert [each["name"] for each in report.studies] == ["plane.one", "plane.two"]


def test_study_key_makes_studies(tmp_path: Path) -> None:
    adata = make_adata(spatial=True)
    run([write_as(adata, "csc", tmp_path)], tmp_path / "store", study_key="batch")
    store = Store.open(tmp_path / "store")
    truth = expected_counts(adata, VOCABULARY)
    for value in ("one", "two"):
        cells = matrix(tmp_path / "store", f"sample.{value}")
        assert sorted(cells.index) == sorted(adata.obs_names[adata.obs["batch"] == value])
        np.testing.assert_array_equal(cells.to_numpy(), truth.loc[cells.index].to_numpy())
        assert store.study(f"sample.{value}").coordinates.shape == (len(cells), 2)


@pytest.mark.parametrize("kind", ["csr", "csc", "mtx"])
def test_duplicate_genes_are_refused_or_summed(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    adata = make_adata(40)
    known = [name for name in adata.var_names if name.startswith("ENSG99")]
    names = [known[0] if name == known[1] else name for name in adata.var_names]
    twice = adata.copy()
    twice.var_names = names
    path = write_as(twice, kind, tmp_path)
    with pytest.raises(DataError, match="duplicates"):
        run([path], tmp_path / "store")
    monkeypatch.setattr("sct.data.ingest.inputs.Sizes", lambda: Sizes(block=20, bucket=50, held=30))
    run([path], tmp_path / "store", duplicates="sum")
    truth = expected_counts(adata, VOCABULARY)
    truth[known[0]] += truth[known[1]]
    truth[known[1]] = 0
    cells = matrix(tmp_path / "store")
    np.testing.assert_array_equal(cells.to_numpy(), truth.loc[cells.index].to_numpy())
    study = Store.open(tmp_path / "store").study("sample")
    assert study.nnz == (truth.to_numpy() > 0).sum()


@pytest.mark.parametrize("kind", ["csr", "csc"])
def test_dropped_cells_are_counted_by_reason(tmp_path: Path, kind: str) -> None:
    adata = make_adata(100, spatial=True)
    counts = adata.X.tolil()
    counts[3:10] = 0
    known = [i for i, name in enumerate(adata.var_names) if name.startswith("ENSG99")]
    foreign = [i for i, name in enumerate(adata.var_names) if name.startswith("ENSG98")]
    counts[10] = 0
    counts[10, foreign[0]] = 5
    counts[11] = 0
    counts[11, known[0]] = 1
    counts[12] = 0
    counts[12, known[:3]] = 1
    adata.X = counts.tocsr()
    path = write_as(adata, kind, tmp_path)
    report = run([path], tmp_path / "empty")
    assert report.studies[0]["dropped"] == {"without counts": 8}
    assert report.studies[0]["n_cells"] == 92
    report = run([path], tmp_path / "store", min_genes=2, min_counts=4)
    assert report.studies[0]["dropped"] == {"without counts": 8, "under 2 genes": 1, "under 4 counts": 1}
    cells = matrix(tmp_path / "store")
    assert len(cells) == Store.open(tmp_path / "store").study("sample").coordinates.shape[0] == 90
    truth = expected_counts(adata, VOCABULARY)
    np.testing.assert_array_equal(cells.to_numpy(), truth.loc[cells.index].to_numpy())
    report = run([path], tmp_path / "all", min_counts=0)
    assert report.studies[0]["dropped"] == {}
    assert matrix(tmp_path / "all").loc["cell0_5"].sum() == 0


def test_large_counts_are_kept_exactly(tmp_path: Path) -> None:
    adata = make_adata(30)
    known = next(i for i, name in enumerate(adata.var_names) if name.startswith("ENSG99"))
    counts = adata.X.tolil()
    counts[4, known] = 65_536
    adata.X = counts.tocsr()
    report = run([("sample", adata)], tmp_path / "store")
    assert report.studies[0]["value_dtype"] == "float32"
    assert matrix(tmp_path / "store").to_numpy().max() == 65_536
    counts[4, known] = 1 << 24
    adata.X = counts.tocsr()
    with pytest.raises(DataError, match="16,777,216"):
        run([("sample", adata)], tmp_path / "other")


@pytest.mark.parametrize("kind", ["csr", "csc", "integers"])
@pytest.mark.parametrize("held", [0, 10_000])
def test_sums_above_the_small_type_are_exact(tmp_path: Path, kind: str, held: int) -> None:
    """Columns of one gene that come in different blocks, each of them within 16 bits."""
    genes = VOCABULARY.ensembl_ids
    names = [genes[0], *genes[1:8], f"{genes[0]}.3"]
    counts = np.full((5, len(names)), 40_000, np.float32)
    adata = ad.AnnData(sp.csr_matrix(counts), var=pd.DataFrame(index=names))
    adata.obs_names = [f"c{i}" for i in range(5)]
    (item,), _ = find_inputs([write_as(adata, kind, tmp_path)])
    (tmp_path / "store/studies").mkdir(parents=True)
    options = IngestOptions(duplicates="sum")
    (record,) = ingest_input(
        tmp_path / "store", item, "", VOCABULARY, options, sizes=Sizes(block=4, bucket=10, held=held)
    )
    assert record["value_dtype"] == "float32"
    read = ad.read_zarr(tmp_path / "store/studies/sample.zarr").X.toarray()
    np.testing.assert_array_equal(read[:, :8], [[80_000] + [40_000] * 7] * 5)


def test_nearly_integers_are_rounded(tmp_path: Path) -> None:
    adata = make_adata(30)
    exact = expected_counts(adata, VOCABULARY)
    adata.X = adata.X.copy()
    adata.X.data = adata.X.data - np.float32(1e-5)
    run([("sample", adata)], tmp_path / "store")
    cells = matrix(tmp_path / "store")
    np.testing.assert_array_equal(cells.to_numpy(), exact.loc[cells.index].to_numpy())


def test_tables_are_written_so_that_they_can_be_read() -> None:
    index = pd.Index(["a", "b", "c"])
    table = pd.DataFrame(
        {
            "text": ["x", "y", "z"],
            "gaps": ["x", None, "z"],
            "kinds": pd.Categorical(["u", None, "u"], categories=["v", "u"], ordered=True),
            "numbers": pd.Categorical([1, 2, 1]),
            "nullable": pd.array([1, None, 3], dtype="Int64"),
            "flags": [True, False, True],
            "mixed": ["x", 1, None],
            "dates": pd.to_datetime(["2020-01-01"] * 3),
            "a/b": [1, 2, 3],
        },
        index=index,
    )
    written, dropped = portable_table(table)
    assert dropped == ["mixed", "dates", "a/b"]
    assert list(written.columns) == ["text", "gaps", "kinds", "numbers", "nullable", "flags"]
    assert list(written["kinds"].cat.categories) == ["v", "u"]
    assert written["kinds"].cat.ordered
    for column in written:
        same = written[column].isna() == table[column].isna()
        assert same.all()
        assert list(written[column].dropna()) == list(table[column].dropna())


def test_real_files(shared_data: Path, tmp_path: Path) -> None:
    names = {
        "single_cell": ["pancreas_panc8_4tech", "brain_dlpfc_snrna"],
        "spatial": ["visium_hcc1"],
        "unlabelled": ["glioma_oligo_tirosh"],
    }
    paths = [shared_data / folder / f"{each}.h5ad" for folder, files in names.items() for each in files]
    report = ingest(paths, tmp_path / "store", options=IngestOptions(skip_bad=True))
    assert list(report.refused) == [str(paths[-1])]
    assert "not integers" in report.refused[str(paths[-1])]
    store = Store.open(tmp_path / "store")
    for path in paths[:-1]:
        source = ad.read_h5ad(path)
        study = store.study(path.stem)
        assert study.n_cells == source.n_obs
        aligned = store.vocabulary.align(source.var)
        cells = study.obs().index
        truth = aligned.project(sp.csr_matrix(source[cells].X))
        assert (truth != study.read(0, study.n_cells)).nnz == 0
        assert study.spatial == ("spatial" in source.obsm)
    assert store.study("visium_hcc1").record["n_genes_matched"] > 1500
