"""A store or an ingest that loses bytes while it is in use: an error that names the thing, never other cells."""

from __future__ import annotations

import itertools
import json
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from store_inputs import VOCABULARY, leftovers, make_adata, run, write_as

from sct.data.bags import BagOptions, BagSource
from sct.data.ingest.sorting import BucketSort, Sizes
from sct.data.loader import Loader
from sct.data.store import Store
from sct.errors import StoreError


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """One study in many files."""
    monkeypatch.setattr("sct.data.ingest.writer.CHUNK", 64)
    monkeypatch.setattr("sct.data.ingest.writer.CHUNKS_PER_SHARD", 4)
    # Nothing of what was read before a file is damaged may hide the damage.
    monkeypatch.setattr("sct.data.store._CACHE_BYTES", 0)
    monkeypatch.setattr("sct.data.store._context", None)
    run([("cells", make_adata(200))], tmp_path / "store")
    return Store.open(tmp_path / "store")


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def bags(store: Store) -> BagSource:
    return BagSource(store.studies, BagOptions(8, 64, noise_fraction=0))


@pytest.mark.parametrize("array", ["X/data", "X/indices"])
@pytest.mark.parametrize("opened", [True, False])
def test_a_truncated_chunk_stops_only_the_bags_that_need_it(store: Store, array: str, opened: bool) -> None:
    (study,) = store.studies
    source = bags(store)
    expected = [source.record(i)["tokens"] for i in range(len(source))]
    files = sorted((study.path / array / "c").iterdir(), key=lambda file: int(file.name))
    truncate(files[len(files) // 2])
    if not opened:
        source = bags(Store.open(store.path))
    found, errors = 0, []
    for number, tokens in enumerate(expected):
        try:
            np.testing.assert_array_equal(source.record(number)["tokens"], tokens)
            found += 1
        except StoreError as error:
            errors.append(str(error))
    assert found > len(expected) // 2
    assert errors
    for message in errors:
        assert f"study 'cells': {study.path / array} cannot be read in rows " in message
        assert "run the ingest again" in message
        assert "\n" not in message


@pytest.mark.parametrize("threads", [1, 4])
def test_a_loader_ends_with_the_sentence_of_the_store_and_no_batch_is_wrong(
    store: Store, threads: int
) -> None:
    expected = list(itertools.islice(Loader(bags(store), 2, seed=1), 12))
    (study,) = store.studies
    truncate(sorted((study.path / "X/indices/c").iterdir())[3])
    iterator = Loader(bags(Store.open(store.path)), 2, seed=1, num_threads=threads).iterate()
    drawn: list[dict[str, np.ndarray]] = []
    with pytest.raises(StoreError, match=r"X/indices .*rows \d+ to \d+"):
        drawn.extend(itertools.islice(iterator, 12))
    iterator.close()
    assert len(drawn) < 12
    assert iterator.records_drawn == 2 * len(drawn)
    for batch, truth in zip(drawn, expected, strict=False):
        np.testing.assert_array_equal(batch["tokens"], truth["tokens"])


def test_a_spilled_file_that_lost_its_end_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = BucketSort.load

    def load(sort: BucketSort, bucket: int):
        if bucket == 2:
            truncate(sort.folder / "2")
        return original(sort, bucket)

    monkeypatch.setattr(BucketSort, "load", load)
    monkeypatch.setattr("sct.data.ingest.inputs.Sizes", lambda: Sizes(500, 300, 0))
    path = write_as(make_adata(), "csr", tmp_path)
    with pytest.raises(StoreError, match=r"sample\.spill/2"):
        run([path], tmp_path / "store")
    assert not leftovers(tmp_path / "store")


def test_chunks_of_another_size_and_codec_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores outlive the choice of chunks: the arrays say themselves how they were written."""
    run([("cells", make_adata(200))], tmp_path / "now")
    monkeypatch.setattr("sct.data.ingest.writer.CHUNK", 100)
    monkeypatch.setattr("sct.data.ingest.writer.CHUNKS_PER_SHARD", 3)
    monkeypatch.setattr(
        "sct.data.ingest.writer.COMPRESSOR", {"cname": "lz4", "clevel": 5, "shuffle": "noshuffle"}
    )
    run([("cells", make_adata(200))], tmp_path / "before")
    (now,), (before,) = (Store.open(tmp_path / name).studies for name in ("now", "before"))
    metadata = [(study.path / "X/data/zarr.json").read_text() for study in (now, before)]
    assert "zstd" in metadata[0]
    assert "lz4" in metadata[1]
    assert (now.read(0, 200) != before.read(0, 200)).nnz == 0
    rows = [190, 3, 77, 4]
    assert (now.read_rows(rows) != before.read_rows(rows)).nnz == 0
    assert now.n_genes == len(VOCABULARY)


def use(path: Path, group: str) -> None:
    """Read what a group of the study holds, and the whole study."""
    study = Store.open(path).studies[0]
    uses = {
        "obs": [study.obs, lambda: study.obs({"quality"})],
        "var": [lambda: study.gene_totals, lambda: study.measured],
        "obsm": [lambda: study.coordinates],
        "uns": [study.rescaled_coordinates],
        "X": [lambda: study.read(0, study.n_cells)],
    }
    for read in (*uses[group], study.to_anndata):
        with pytest.raises(StoreError, match="cells" if read == study.to_anndata else f"/{group}") as error:
            read()
        assert "\n" not in str(error.value)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


@pytest.fixture
def plane(tmp_path: Path, store: Store) -> Path:
    """A store of one spatial study, all of whose cells are of one type and of no quality."""
    adata = make_adata(200, spatial=True)
    adata.obs["cell_type"], adata.obs["quality"] = pd.Categorical(["B"] * 200), 0.0
    run([("cells", adata)], tmp_path / "plane")
    return tmp_path / "plane"


def test_every_file_of_a_study_is_checked(plane: Path) -> None:
    study = plane / "studies/cells.zarr"
    files = [
        file
        for group in ("obs", "var", "obsm", "X")
        for file in sorted((study / group).rglob("*"))
        if file.is_file()
    ]
    # Of X, one chunk of each array is enough.
    files = [file for file in files if "/X/" not in str(file) or file.name in ("zarr.json", "1")]
    assert len(files) > 20
    wrong = []
    for file in files:
        before, group = file.read_bytes(), file.relative_to(study).parts[0]
        if file == study / group / "zarr.json" and group in ("X", "obsm"):
            continue  # a description of the group, which holds no number
        for alter in (flip_a_bit, Path.unlink):
            alter(file)
            try:
                use(plane, group)
            except BaseException as error:
                wrong.append(f"{file.relative_to(study)}, {alter.__name__}: {error!r}"[:300])
            file.write_bytes(before)
    assert not wrong, "\n".join(wrong)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (Store.open(plane).studies[0].obs()["cell_type"] == "B").all()


def test_stores_without_hashes_open_with_a_note(plane: Path) -> None:
    """Earlier versions did not write chunks that hold nothing but the fill value."""
    manifest = json.loads((plane / "manifest.json").read_text())
    del manifest["sha256"], manifest["studies"][0]["hashes"], manifest["vocabulary"]["sha256"]
    (plane / "manifest.json").write_text(json.dumps(manifest))
    for column in ("cell_type/codes", "quality"):
        (plane / "studies/cells.zarr/obs" / column / "c/0").unlink()
    with pytest.warns(UserWarning, match="no hashes") as notes:
        study = Store.open(plane).studies[0]
    assert len(notes) == 1
    for obs in (study.obs(), study.to_anndata().obs):
        assert (obs["cell_type"] == "B").all()
        assert (obs["quality"] == 0).all()
