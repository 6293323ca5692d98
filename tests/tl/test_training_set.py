"""Which cells a model was trained on, by hashes of their counts."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import scipy.sparse as sp

import sct
from sct.data.ingest.build import IngestOptions, ingest
from sct.data.store import Store
from sct.errors import ConfigError, DataError
from sct.weights.pretrained import with_changed_outputs
from sct.weights.training_cells import TrainingCells, hash_rows
from tests.tl.conftest import slide


@pytest.fixture(scope="module", autouse=True)
def _small_groups():
    """Let a group of genes have few genes, because the model of these tests knows only 60."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sct.weights.training_cells.LEAST_EXPRESSED", 8)
        yield


@pytest.fixture(scope="module")
def cells():
    cells = slide()
    counts = np.random.default_rng(0).poisson(3.0, cells.shape)
    cells.X = sp.csr_matrix(counts.astype(np.float32))
    return cells


@pytest.fixture(scope="module")
def store(cells, model, tmp_path_factory):
    inputs = [("a", cells[:15].copy()), ("b", cells[15:30].copy()), ("c", cells[30:].copy())]
    folder = tmp_path_factory.mktemp("store") / "store"
    ingest(inputs, folder, vocabulary=model.genes, options=IngestOptions(test=("c",)))
    return Store.open(folder)


@pytest.fixture(scope="module")
def known(store, model):
    found = TrainingCells.of(store.split("train"), model.genes)
    return dataclasses.replace(model, training_cells=found)


TRAINED = np.arange(45) < 30


def test_training_cells_are_recognized_and_no_others(cells, known):
    found = sct.tl.in_training_set(cells, known)
    assert found.dtype == "boolean"
    assert list(found.index) == list(cells.obs_names)
    np.testing.assert_array_equal(found.to_numpy(bool), TRAINED)
    assert known.training_cells.info["studies"] == ["a", "b"]
    assert known.training_cells.info["cells"] == 30


def test_order_and_further_genes_make_no_difference(cells, known):
    rng = np.random.default_rng(1)
    rows, genes = rng.permutation(45), rng.permutation(cells.n_vars)
    shuffled = cells[rows, genes].copy()
    shuffled.obs_names = [f"renamed-{i}" for i in range(45)]
    np.testing.assert_array_equal(sct.tl.in_training_set(shuffled, known).to_numpy(bool), TRAINED[rows])
    mine = cells[:, known.genes.align(cells.var).columns >= 0].copy()
    np.testing.assert_array_equal(sct.tl.in_training_set(mine, known).to_numpy(bool), TRAINED)


def test_missing_genes_are_either_bridged_or_admitted(cells, known):
    bands = known.training_cells.arrays["genes"]
    position = {int(p): column for column, p in enumerate(known.genes.align(cells.var).columns) if p >= 0}
    one = [position[int(gene)] for gene in bands[0][:2]]
    kept = np.setdiff1d(np.arange(cells.n_vars), one)
    np.testing.assert_array_equal(
        sct.tl.in_training_set(cells[:, kept].copy(), known).to_numpy(bool), TRAINED
    )
    of_each = [position[int(genes[0])] for genes in bands]
    kept = np.setdiff1d(np.arange(cells.n_vars), of_each)
    with pytest.warns(UserWarning, match="no cell can be decided"):
        undecided = sct.tl.in_training_set(cells[:, kept].copy(), known)
    assert undecided.isna().all(), "a cell is not called unseen because its file lacks genes"


def test_cells_with_too_few_counts_are_not_decided(cells, known):
    poor = cells.copy()
    counts = poor.X.toarray()
    counts[3] = 0
    counts[3, :3] = 1
    poor.X = sp.csr_matrix(counts)
    found = sct.tl.in_training_set(poor, known)
    assert found.isna().to_numpy().tolist() == [row == 3 for row in range(45)]
    counts[4] = np.r_[counts[4][:-1] + 1, counts[4][-1]]
    poor.X = sp.csr_matrix(counts)
    assert not sct.tl.in_training_set(poor, known).iloc[4]


def test_a_model_folder_keeps_the_hashes_and_reads_them_when_needed(cells, known, tmp_path):
    known.save_pretrained(tmp_path / "model")
    loaded = sct.load(tmp_path / "model")
    assert "arrays" not in vars(loaded.training_cells)
    np.testing.assert_array_equal(sct.tl.in_training_set(cells, loaded).to_numpy(bool), TRAINED)
    sct.load(tmp_path / "model").save_pretrained(tmp_path / "model")
    again = sct.load(tmp_path / "model")
    assert again.training_cells.record() == known.training_cells.record()
    np.testing.assert_array_equal(
        again.training_cells.arrays["hashes_0"], known.training_cells.arrays["hashes_0"]
    )


def test_what_is_not_known_is_said(cells, known, model, store):
    with pytest.raises(ConfigError, match="no hashes of its training cells"):
        sct.tl.in_training_set(cells, model)
    further = TrainingCells.of(store.split("train"), model.genes, init_from="runs/parent")
    with pytest.warns(UserWarning, match="runs/parent"):
        sct.tl.in_training_set(cells, dataclasses.replace(model, training_cells=further))
    tuned = with_changed_outputs(dataclasses.replace(model, training_cells=known.training_cells))
    with pytest.warns(UserWarning, match="fine-tuned later"):
        np.testing.assert_array_equal(sct.tl.in_training_set(cells, tuned).to_numpy(bool), TRAINED)
    without = TrainingCells.of(store.split("train"), model.genes, without_counts=["atac"])
    with pytest.warns(UserWarning, match=r"without raw counts have no hashes \(atac\)"):
        sct.tl.in_training_set(cells, dataclasses.replace(model, training_cells=without))
    few = [dataclasses.make_dataclass("Few", ["name", "n_cells", "measured", "read"])(
        "few", 2, np.arange(60) < 10, lambda start, stop: sp.csr_matrix(np.ones((2, 60))))]  # fmt: skip
    with pytest.raises(DataError, match="only 10 measured genes in common"):
        TrainingCells.of(few, model.genes)


def test_a_hash_is_of_the_pairs_of_gene_and_count():
    keys = np.random.default_rng(0).integers(1, 2**63, 50).astype(np.uint64)
    counts = np.random.default_rng(1).poisson(1.0, (20, 50))
    order = np.random.default_rng(2).permutation(50)
    first, number = hash_rows(sp.csr_matrix(counts), keys)
    second, _ = hash_rows(sp.csr_matrix(counts[:, order].astype(np.float32)), keys[order])
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(number, (counts > 0).sum(axis=1))
    assert len(np.unique(first)) == 20
    changed = counts.copy()
    changed[0, [0, 1]] = [5, 6]
    swapped = counts.copy()
    swapped[0, [0, 1]] = [6, 5]
    both = [hash_rows(sp.csr_matrix(each), keys)[0][0] for each in (changed, swapped)]
    assert both[0] != both[1]
