"""The bundled real cells and the simulated atlases."""

from __future__ import annotations

import sys
import warnings

import numpy as np
import pytest
from scipy import sparse

import sct
from sct.data.counts import validate
from sct.data.datasets import MAX_RESIDUAL, pbmc68k, recover_counts, simulate_atlas
from sct.data.genes.vocabulary import GeneVocabulary
from sct.errors import DataError, MissingExtraError

# Real cells ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cells():
    pytest.importorskip("scanpy", reason="the real cells ship with scanpy, which is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # pbmc68k must not pass on the warnings of its dependencies
        return sct.datasets.pbmc68k()


def test_real_cells_are_raw_counts_with_labels(cells):
    assert cells.shape == (700, 765)
    assert isinstance(cells.X, sparse.csr_matrix)
    assert cells.X.dtype == np.float32
    assert validate(cells).messages == ()
    assert (cells.X.data == np.rint(cells.X.data)).all()
    assert cells.X.data.min() == 1
    assert cells.obs["cell_type"].nunique() == 10
    assert (cells.obs["cell_type"] == cells.obs["bulk_labels"]).all()
    assert cells.obs_names.is_unique
    assert cells.var_names.is_unique
    assert "10x Genomics" in cells.uns["source"]
    assert not cells.obsm
    assert cells.raw is None


def test_integers_are_unique_because_the_residual_is_small(cells):
    import scanpy

    shipped = scanpy.datasets.pbmc68k_reduced()
    counts, residual = recover_counts(shipped.raw.X, shipped.obs["n_counts"].to_numpy())
    assert residual < MAX_RESIDUAL == 0.13
    assert counts.nnz == shipped.raw.X.nnz  # nothing was rounded to zero
    assert (counts != cells.X).nnz == 0
    # Normalising the counts again gives what was shipped, to its three decimals.
    again = np.log1p(1e4 * counts.toarray() / shipped.obs["n_counts"].to_numpy()[:, None])
    assert np.abs(again - shipped.raw.X.toarray()).max() < 2e-3


def test_library_sizes_are_consistent(cells):
    total = np.asarray(cells.X.sum(axis=1)).ravel()
    share = total / cells.obs["n_counts"].to_numpy()
    assert ((share > 0.05) & (share < 0.4)).all()  # 765 variable genes of about 20,000
    assert np.corrcoef(total, cells.obs["n_counts"])[0, 1] > 0.4


def test_real_cells_align_to_the_vocabulary(cells):
    aligned = GeneVocabulary.human().align(cells.var)
    assert aligned.matched == 738
    assert aligned.project(cells.X).sum() == cells.X[:, aligned.columns >= 0].sum()


def test_without_scanpy_the_command_to_install_it_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "scanpy", None)
    with pytest.raises(MissingExtraError, match=r'pip install "sct-jax\[cells\]"'):
        pbmc68k()


def test_values_that_are_no_counts_are_refused(cells, monkeypatch):
    import scanpy

    shipped = scanpy.datasets.pbmc68k_reduced()
    shipped.obs["n_counts"] *= 1.1
    monkeypatch.setattr(scanpy.datasets, "pbmc68k_reduced", lambda: shipped)
    with pytest.raises(DataError, match=r"pbmc68k_reduced.*scanpy >="):
        pbmc68k()


def test_recovered_counts_are_those_that_were_normalised():
    rng = np.random.default_rng(0)
    counts = rng.poisson(1.0, (30, 50)).astype(float)
    totals = counts.sum(axis=1) + rng.integers(0, 500, 30)
    logged = np.round(np.log1p(1e4 * counts / totals[:, None]), 4)
    recovered, residual = recover_counts(sparse.csc_matrix(logged), totals)
    np.testing.assert_array_equal(recovered.toarray(), counts)
    assert 0 < residual < 0.01


# Simulated atlases ---------------------------------------------------------------------------------------


def same(a, b) -> bool:
    return (a.X != b.X).nnz == 0 and a.obs.equals(b.obs) and a.var.equals(b.var)


@pytest.mark.parametrize("spatial", [False, True])
def test_a_study_depends_on_seed_and_number_alone(spatial):
    three = simulate_atlas(3, 50, 200, spatial, seed=4)
    two = simulate_atlas(2, 50, 200, spatial, seed=4)
    assert [study.uns["study"] for study in three] == ["simulated_000", "simulated_001", "simulated_002"]
    assert all(same(a, b) for a, b in zip(three, two, strict=False))
    assert not same(three[0], three[1])
    assert not same(three[0], simulate_atlas(1, 50, 200, spatial, seed=5)[0])


def test_simulated_counts_are_raw_counts_of_real_genes():
    study = simulate_atlas(1, 300, 2_000)[0]
    assert study.shape == (300, 2_000)
    assert study.X.dtype == np.float32
    assert validate(study).n_empty_cells == 0
    aligned = GeneVocabulary.human().align(study.var)
    assert aligned.source == "index (Ensembl ids)"
    assert aligned.matched == 2_000
    assert (np.diff(aligned.columns) > 0).all()
    symbols = GeneVocabulary.human().symbols
    assert [symbols[at] for at in aligned.columns] == list(study.var["symbol"])
    assert study.obs_names.is_unique


def test_the_whole_vocabulary_is_as_sparse_as_real_cells():
    study = simulate_atlas(1, 200, 20_124)[0]
    assert 0.05 < study.X.nnz / np.prod(study.shape) < 0.10
    total = np.asarray(study.X.sum(axis=1)).ravel()
    assert 0.3 < np.log(total).std() < 0.6
    assert 2_000 < np.median(total) < 10_000
    assert tuple(study.var_names) == GeneVocabulary.human().ensembl_ids


def test_blocks_do_not_change_the_kind_of_counts(monkeypatch):
    whole = simulate_atlas(1, 400, 300)[0]
    monkeypatch.setattr("sct.data.datasets._BLOCK_VALUES", 300 * 7)
    parts = simulate_atlas(1, 400, 300)[0]
    assert parts.shape == whole.shape
    assert abs(parts.X.nnz / whole.X.nnz - 1) < 0.05
    assert abs(parts.X.sum() / whole.X.sum() - 1) < 0.05


def test_cell_types_are_shared_by_studies_and_studies_differ():
    a, b = simulate_atlas(2, 1_500, 1_000, seed=1)

    def profiles(study):
        types = sorted(set(study.obs["cell_type"]))
        mean = {
            t: np.asarray(study.X[(study.obs["cell_type"] == t).to_numpy()].mean(axis=0)).ravel()
            for t in types
        }
        return {t: np.log1p(1e4 * m / m.sum()) for t, m in mean.items()}

    p, q = profiles(a), profiles(b)
    common = sorted(set(p) & set(q))
    assert len(common) > 8
    distance = np.array([[np.linalg.norm(p[s] - q[t]) for t in common] for s in common])
    assert (distance.argmin(axis=1) == np.arange(len(common))).all()  # a type is nearest to itself elsewhere
    assert np.diag(distance).min() > 1  # but not the same: study effects


def test_simulated_counts_are_overdispersed_and_dropped_out():
    study = simulate_atlas(1, 3_000, 300, seed=2)[0]
    cells = study[study.obs["cell_type"] == study.obs["cell_type"].mode()[0]].X.toarray()
    mean, variance = cells.mean(axis=0), cells.var(axis=0)
    seen = mean > 1
    assert seen.sum() > 20
    assert (variance[seen] > 1.2 * mean[seen]).mean() > 0.95
    low = (mean > 0.05) & (mean < 1)
    assert ((cells == 0).mean(axis=0)[low] > np.exp(-mean[low])).mean() > 0.9  # more zeros than Poisson


def test_neighbouring_spots_share_their_composition():
    study = simulate_atlas(1, 900, 200, spatial=True)[0]
    xy = study.obsm["spatial"]
    assert xy.shape == (900, 2)
    from scipy.spatial import cKDTree

    nearest = cKDTree(xy).query(xy, k=2)[1][:, 1]
    random = np.random.default_rng(0).permutation(900)
    for key in ("cell_type", "domain"):
        labels = study.obs[key].to_numpy()
        assert (labels == labels[nearest]).mean() > (labels == labels[random]).mean() + 0.2
    assert study.obs["domain"].nunique() > 3
    distance = np.linalg.norm(xy - xy[nearest], axis=1)
    assert 50 < np.median(distance) < 100  # micrometres
    assert "spatial" not in simulate_atlas(1, 10, 20)[0].obsm


@pytest.mark.parametrize("numbers", [(0, 5, 5), (1, 0, 5), (1, 5, 0), (1, 5, 20_125)])
def test_impossible_sizes_are_refused(numbers):
    with pytest.raises(DataError, match="must be"):
        simulate_atlas(*numbers)
