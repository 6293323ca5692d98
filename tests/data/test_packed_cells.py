"""Cells of a store in one small file: the same counts and tokens, within the allowed size, or an error."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from sct.data.bags import BagOptions, BagSource
from sct.data.ingest.build import IngestOptions, ingest
from sct.data.packed_cells import PackedCells, pack
from sct.data.store import Store
from sct.errors import DataError, StoreError
from tests.data.store_inputs import make_adata, small_vocabulary


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    folder = tmp_path_factory.mktemp("packed")
    files = []
    for number, cells in enumerate((90, 40, 30)):
        files.append(folder / f"study{number}.h5ad")
        make_adata(cells, seed=number).write_h5ad(files[-1])
    options = IngestOptions(validation=("study2",))
    ingest(files, folder / "store", vocabulary=small_vocabulary(), options=options)
    return Store.open(folder / "store")


def test_packed_cells_are_those_of_the_store(store, tmp_path):
    made = pack(store, tmp_path / "cells.npz", 1 << 20, validation_cells=12)
    read = PackedCells.load(tmp_path / "cells.npz")
    for field in dataclasses.fields(PackedCells):
        one, other = getattr(made, field.name), getattr(read, field.name)
        if field.name == "counts":
            one, other = one.toarray(), other.toarray()
        if field.name == "vocabulary":
            one, other = one.hash, other.hash
        np.testing.assert_array_equal(one, other, err_msg=field.name)
    studies = {study.name: study for split in ("train", "validation") for study in store.split(split)}
    tokens = read.tokens(5, 64)
    assert sorted(map(len, read.rows(held_out=False))) == [40, 90]
    assert [len(rows) for rows in read.rows(held_out=True)] == [12]
    for number, name in enumerate(read.names):
        rows = np.flatnonzero(read.study == number)
        cells = studies[name].read(0, len(rows)).toarray()
        np.testing.assert_array_equal(read.counts[rows].toarray(), cells, err_msg=name)
        options = BagOptions(cells_per_bag=len(rows), num_positions=64)
        bag = BagSource((studies[name],), options, exhaustive=True).record(0)
        np.testing.assert_array_equal(read.measured[number], bag["measured"][:60], err_msg=name)
        if len(rows) == studies[name].n_cells:
            order = np.lexsort(tokens[rows].T)
            theirs = np.lexsort(bag["tokens"].T)
            np.testing.assert_array_equal(tokens[rows][order], bag["tokens"][theirs], err_msg=name)


def test_the_file_is_as_small_as_it_must_be(store, tmp_path):
    whole = pack(store, tmp_path / "whole.npz", 1 << 20)
    size = (tmp_path / "whole.npz").stat().st_size
    smaller = pack(store, tmp_path / "small.npz", size - 1500)
    assert (tmp_path / "small.npz").stat().st_size <= size - 1500
    assert 20 < len(smaller) < len(whole)
    # A file that cannot be written leaves an earlier one as it is, and nothing beside it.
    before = (tmp_path / "small.npz").read_bytes()
    with pytest.raises(DataError, match="validation_cells"):
        pack(store, tmp_path / "small.npz", 100)
    assert (tmp_path / "small.npz").read_bytes() == before
    with pytest.raises(DataError, match="larger file"):
        pack(store, tmp_path / "none.npz", 100)
    assert {path.name for path in tmp_path.iterdir()} == {"whole.npz", "small.npz"}


def test_cells_of_a_spatial_study_come_from_all_of_the_tissue(tmp_path):
    adata = make_adata(400)
    places = np.random.default_rng(0).uniform(0, 1000, (400, 2))
    adata.obsm["spatial"] = places
    adata.write_h5ad(tmp_path / "slide.h5ad")
    ingest(
        [tmp_path / "slide.h5ad"], tmp_path / "store", vocabulary=small_vocabulary(), options=IngestOptions()
    )
    opened = Store.open(tmp_path / "store")
    (study,) = opened.split("train")
    whole = pack(opened, tmp_path / "whole.npz", 1 << 20)
    size = (tmp_path / "whole.npz").stat().st_size
    small = pack(opened, tmp_path / "small.npz", size - (size // 4))
    assert 50 < len(small) < len(whole) == 400
    rows = np.arange(len(small)) * 400 // len(small)
    np.testing.assert_array_equal(small.counts.toarray(), study.read_rows(rows).toarray())
    quarters = {tuple(place > 500) for place in study.coordinates[rows]}
    assert len(quarters) == 4


def test_what_is_not_such_a_file_is_refused(tmp_path):
    for name, content in (("absent", None), ("text", b"no cells"), ("other", "arrays")):
        path = tmp_path / f"{name}.npz"
        if content == "arrays":
            np.savez(path, counts=np.zeros(3))
        elif content is not None:
            path.write_bytes(content)
        with pytest.raises(DataError, match="pack_cells"):
            PackedCells.load(path)


def test_counts_that_do_not_fit_are_refused(tmp_path):
    adata = make_adata(20)
    adata.X[3, 0] = 70_000
    adata.write_h5ad(tmp_path / "large.h5ad")
    ingest(
        [tmp_path / "large.h5ad"], tmp_path / "store", vocabulary=small_vocabulary(), options=IngestOptions()
    )
    (tmp_path / "cells.npz").write_bytes(b"a good file")
    with pytest.raises(StoreError, match="65,535"):
        pack(Store.open(tmp_path / "store"), tmp_path / "cells.npz", 1 << 20)
    assert (tmp_path / "cells.npz").read_bytes() == b"a good file"
