"""Laws of `sct.tl.embed`."""

from __future__ import annotations

import dataclasses
import warnings

import anndata as ad
import jax
import numpy as np
import pytest
import scipy.sparse as sp

import sct
from sct.data.bag_order import random_order, tile_order
from sct.data.coordinates import rescale_coordinates
from sct.data.tokenize import bin_counts, noisy_genes
from sct.errors import CheckpointError, ConfigError, DataError
from sct.inference.inputs import sections
from tests.tl.conftest import BAG, CELLS, made


def embedded(adata, model, **options) -> np.ndarray:
    result = sct.tl.embed(adata, model, copy=True, **options)
    return result.obsm["X_sct"]


def test_an_embedding_is_what_the_model_gives_for_the_bag(adata, model):
    ours = embedded(adata, model)
    order = random_order(np.arange(CELLS), BAG, seed=0)
    counts = model.genes.align(adata.var).project(adata.X)
    drop = noisy_genes(np.asarray(counts.sum(axis=0)).ravel(), CELLS)
    for number in (0, 3, len(order.rows) // BAG - 1):
        rows = order.rows[number * BAG : (number + 1) * BAG]
        tokens = bin_counts(counts[rows], num_positions=64, drop=drop).tokens[None]
        expected = np.asarray(model.apply(tokens=tokens)["cell_embedding"])[0]
        is_target = order.is_target[number * BAG : (number + 1) * BAG]
        np.testing.assert_allclose(ours[rows[is_target]], expected[is_target], rtol=1e-5, atol=1e-5)
    assert ours.std(axis=0).min() > 1e-3, "cells differ, so that the comparison says something"


def test_the_same_call_gives_the_same_bytes_and_changes_nothing_else(adata, model):
    before = adata.copy()
    assert sct.tl.embed(adata, model) is None
    first = adata.obsm["X_sct"].tobytes()
    sct.tl.embed(adata, model)
    assert adata.obsm["X_sct"].tobytes() == first
    np.testing.assert_array_equal(adata.X.toarray(), before.X.toarray())
    assert set(adata.obsm) == {"spatial", "X_sct"}
    assert list(adata.obs) == list(before.obs)
    assert set(adata.uns) - set(before.uns) == {"X_sct"}


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_result_does_not_depend_on_how_many_bags_are_run_at_once(adata, model, batch_size):
    np.testing.assert_allclose(
        embedded(adata, model, batch_size=batch_size), embedded(adata, model), rtol=1e-5, atol=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{}, {"batch_key": "batch"}, {"spatial_key": "spatial"}])
def test_a_backed_file_gives_what_memory_gives(adata, model, tmp_path, keys, monkeypatch):
    monkeypatch.setattr("sct.data.cells.WINDOW", 10)  # so that there are several windows
    adata.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    sct.tl.embed(backed, model, **keys)
    np.testing.assert_array_equal(backed.obsm["X_sct"], embedded(adata, model, **keys))


def test_columns_may_stand_in_any_order_under_any_name(adata, model):
    expected = embedded(adata, model)
    shuffled = adata[:, np.random.default_rng(0).permutation(adata.n_vars)].copy()
    np.testing.assert_array_equal(embedded(shuffled, model), expected)
    versioned = adata.copy()
    versioned.var_names = [f"{name}.7" for name in adata.var_names]
    np.testing.assert_array_equal(embedded(versioned, model), expected)
    extra = ad.concat(
        [adata, ad.AnnData(sp.csr_matrix(np.ones((CELLS, 1))), adata.obs, {"_": ["FOO"]})], axis=1
    )
    extra.obsm = adata.obsm
    np.testing.assert_array_equal(embedded(extra, model), expected)


def test_counts_are_found_where_they_are(adata, model):
    expected = embedded(adata, model)
    normalized = adata.copy()
    normalized.layers["counts"] = adata.X.copy()
    normalized.X = adata.X.log1p()
    np.testing.assert_array_equal(embedded(normalized, model), expected)
    np.testing.assert_array_equal(embedded(normalized, model, layer="counts"), expected)
    del normalized.layers["counts"]
    with pytest.raises(DataError, match="log1p"):
        sct.tl.embed(normalized, model)
    assert "X_sct" not in normalized.obsm


def test_a_batch_is_not_seen_by_another(adata, model):
    before = embedded(adata, model, batch_key="batch")
    changed = adata.copy()
    of_a = (adata.obs["batch"] == "a").to_numpy()
    rows = changed.X.toarray()
    rows[of_a] = rows[of_a][:, ::-1] + 1
    changed.X = sp.csr_matrix(rows)
    after = embedded(changed, model, batch_key="batch")
    np.testing.assert_allclose(after[~of_a], before[~of_a], rtol=1e-5, atol=1e-5)
    assert np.abs(after[of_a] - before[of_a]).max() > 1e-3
    mixed = embedded(changed, model) - embedded(adata, model)
    assert np.abs(mixed[~of_a]).max() > 1e-4, "without batch_key cells share bags, so that context shows"


@pytest.mark.slow
def test_positions_are_read_by_a_spatial_model(adata, spatial_model):
    with_places = embedded(adata, spatial_model, spatial_key="spatial")
    moved = adata.copy()
    moved.obsm["spatial"] = adata.obsm["spatial"] * 0.35 + 1000  # another unit and origin
    np.testing.assert_allclose(
        embedded(moved, spatial_model, spatial_key="spatial"), with_places, rtol=1e-3, atol=1e-3
    )
    assert np.abs(embedded(adata, spatial_model) - with_places).max() > 1e-2
    centred = embedded(adata, spatial_model, spatial_key="spatial", context="neighbors")
    assert centred.shape == with_places.shape
    assert np.abs(centred - with_places).max() > 1e-3


def test_the_seed_changes_the_bags(adata, model):
    assert np.abs(embedded(adata, model, seed=1) - embedded(adata, model)).max() > 1e-4


def test_fewer_cells_than_a_bag(adata, model):
    few = adata[:3].copy()
    assert np.isfinite(embedded(few, model)).all()


def test_results_survive_a_file(adata, model, tmp_path):
    sct.tl.embed(adata, model, batch_key="batch")
    adata.write_h5ad(tmp_path / "out.h5ad")
    again = ad.read_h5ad(tmp_path / "out.h5ad")
    np.testing.assert_array_equal(again.obsm["X_sct"], adata.obsm["X_sct"])
    assert again.uns["X_sct"]["batch_key"] == "batch"
    assert again.uns["X_sct"]["cells_per_bag"] == BAG


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"batch_key": "donor"}, DataError, "'donor'"),
        ({"spatial_key": "places"}, DataError, "'places'"),
        ({"layer": "raw_counts"}, DataError, "'raw_counts'"),
        ({"context": "rings", "spatial_key": "spatial"}, ConfigError, "rings"),
        ({"cells_per_bag": 0}, ConfigError, "cells_per_bag"),
        ({"batch_size": 0}, ConfigError, "batch_size"),
        ({"gene_column": "ids"}, DataError, "'ids'"),
    ],
)
def test_wrong_input_is_a_sentence(adata, model, options, error, words):
    with pytest.raises(error, match=words):
        sct.tl.embed(adata, model, **options)
    assert "X_sct" not in adata.obsm


def test_cells_and_positions_that_are_missing(adata, model):
    empty = adata.copy()
    rows = empty.X.tolil()
    rows[4] = 0
    empty.X = rows.tocsr()
    with pytest.raises(DataError, match=r"1 of 45 cells.*row 4"):
        sct.tl.embed(empty, model)
    nowhere = adata.copy()
    nowhere.obsm["spatial"] = np.full((CELLS, 2), np.nan)
    with pytest.raises(DataError, match="spatial"):
        sct.tl.embed(nowhere, model, spatial_key="spatial")
    nobatch = adata.copy()
    nobatch.obs["batch"] = nobatch.obs["batch"].astype(object).where(np.arange(CELLS) > 2)
    with pytest.raises(DataError, match=r"\b3 cells"):
        sct.tl.embed(nobatch, model, batch_key="batch")
    mouse = adata.copy()
    mouse.var_names = [f"ENSMUSG{i:011d}" for i in range(adata.n_vars)]
    mouse.var = mouse.var[[]]
    with pytest.raises(DataError, match="species"):
        sct.tl.embed(mouse, model)


def test_a_file_by_column_is_refused(adata, model, tmp_path):
    adata.X = adata.X.tocsc()
    expected = embedded(adata, model)
    assert np.isfinite(expected).all()
    adata.write_h5ad(tmp_path / "csc.h5ad")
    with pytest.raises(DataError, match="by column"):
        sct.tl.embed(ad.read_h5ad(tmp_path / "csc.h5ad", backed="r"), model)


def test_a_rare_gene_of_one_batch_is_noise_by_that_batch_alone(adata, model):
    rare = adata.copy()
    dense = rare.X.toarray()
    of_b = np.flatnonzero(rare.obs["batch"] == "b")
    dense[:, 12] = 0
    dense[of_b[0], 12] = 1
    more = ad.concat([rare] + [rare[rare.obs["batch"] == "a"]] * 40, index_unique="-")  # of the other batch
    more.var = rare.var
    dense_more = more.X.toarray()
    dense_more[:, 12] = 0
    dense_more[of_b[0], 12] = 1
    rare.X, more.X = sp.csr_matrix(dense), sp.csr_matrix(dense_more)
    before, after = (embedded(cells, model, batch_key="batch") for cells in (rare, more))
    np.testing.assert_allclose(after[of_b], before[of_b], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_sections_of_very_different_sizes(adata, model):
    adata.obs["batch"] = np.where(
        np.arange(CELLS) < 2, "two", np.where(np.arange(CELLS) < 10, "eight", "rest")
    )
    whole = embedded(adata, model, batch_key="batch", batch_size=3)
    for name in ("two", "eight", "rest"):
        alone = adata[adata.obs["batch"] == name].copy()
        expected = embedded(alone, model)
        np.testing.assert_allclose(whole[adata.obs["batch"] == name], expected, rtol=1e-5, atol=1e-5)


def test_dense_files_are_read_in_pieces(adata, model, tmp_path, monkeypatch):
    monkeypatch.setattr("sct.data.counts.BLOCK_VALUES", 7 * adata.n_vars)
    dense = adata.copy()
    dense.X = adata.X.toarray()
    dense.write_h5ad(tmp_path / "dense.h5ad")
    backed = ad.read_h5ad(tmp_path / "dense.h5ad", backed="r")
    sct.tl.embed(backed, model, batch_key="batch")
    np.testing.assert_array_equal(backed.obsm["X_sct"], embedded(adata, model, batch_key="batch"))


@pytest.mark.parametrize("options", [{}, {"spatial_key": "spatial"}, {"batch_key": "batch"}])
def test_no_cells_and_no_seed(adata, model, options):
    with pytest.raises(DataError, match="no cells"):
        sct.tl.embed(adata[:0].copy(), model, **options)
    with pytest.raises(ConfigError, match="seed"):
        sct.tl.embed(adata, model, seed=-1, **options)


def test_what_is_no_table_or_no_model(adata, model, tmp_path):
    with pytest.raises(DataError, match="DataFrame"):
        sct.tl.embed(adata.to_df(), model)
    with pytest.raises(ConfigError, match="adata"):
        sct.tl.embed(adata, adata)
    with pytest.raises(ConfigError, match="spatial_key"):
        sct.tl.embed(adata, model, context="neighbors")
    adata.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(DataError, match="backed"):
        sct.tl.embed(ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")[:5], model)


def test_no_tool_copies_a_backed_table(adata, model, tmp_path):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    reference = adata.copy()
    for tool in (
        lambda: sct.tl.embed(backed, model, copy=True),
        lambda: sct.tl.impute(backed, model, genes=[adata.var_names[0]], copy=True),
        lambda: sct.tl.annotate(backed, model, reference=reference, label_key="batch", copy=True),
        lambda: sct.tl.spatial_neighbors(backed, copy=True),
    ):
        with pytest.raises(DataError, match="backed"):
            tool()
    for cells in (backed, reference):
        assert set(cells.obsm) == set(adata.obsm)
        assert set(cells.obs) == set(adata.obs)
        assert set(cells.uns) == set(adata.uns)


@pytest.mark.filterwarnings("error::anndata.ImplicitModificationWarning")
def test_a_view_becomes_a_table_of_its_own_without_a_warning(adata, model):
    view = adata[:20]
    sct.tl.embed(view, model)
    assert view.obsm["X_sct"].shape[0] == 20
    assert "X_sct" not in adata.obsm


@pytest.mark.slow
def test_the_weights_are_named(adata, model):
    other = made(use_spatial=True)
    sct.tl.embed(adata, model)
    assert adata.uns["X_sct"]["weights"] == model.fingerprint == made().fingerprint != other.fingerprint


def by_hand(model, cells, places: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Embeddings (rows, D) of one bag at given positions."""
    counts = model.genes.align(cells.var).project(cells.X)
    drop = noisy_genes(np.asarray(counts.sum(axis=0)).ravel(), cells.n_obs)
    tokens = bin_counts(counts[rows], num_positions=64, drop=drop).tokens[None]
    return np.asarray(model.apply(tokens=tokens, coordinates=places[rows][None])["cell_embedding"])[0]


def test_a_part_of_a_section_is_embedded_as_it_lies_in_the_whole(adata, spatial_model):
    whole = adata.copy()
    sct.tl.embed(whole, spatial_model, spatial_key="spatial")
    chosen = np.arange(10, 10 + BAG)
    places = rescale_coordinates(adata.obsm["spatial"])
    part, alone = whole[chosen].copy(), adata[chosen].copy()
    order = tile_order(np.arange(BAG), places[chosen], BAG).rows
    expected = by_hand(spatial_model, part, places[chosen], order)
    got = embedded(part, spatial_model, spatial_key="spatial")
    np.testing.assert_allclose(got[order], expected, rtol=1e-5, atol=1e-5)
    without = embedded(alone, spatial_model, spatial_key="spatial")
    assert np.abs(without - got).max() > 1e-3, "a part that has lost its section is another section"
    prepared = sct.pp.spatial_scale(adata)[chosen].copy()
    np.testing.assert_array_equal(embedded(prepared, spatial_model, spatial_key="spatial"), got)
    assert "sct_sections" not in adata.uns, "a new AnnData is returned"


def test_a_scale_survives_a_file_and_is_one_of_its_batch(adata, spatial_model, tmp_path):
    options = {"spatial_key": "spatial", "batch_key": "batch"}
    kept = sct.pp.spatial_scale(adata, batch_key="batch")
    part = kept[::2].copy()
    part.write_h5ad(tmp_path / "part.h5ad")
    read = ad.read_h5ad(tmp_path / "part.h5ad")
    backed = ad.read_h5ad(tmp_path / "part.h5ad", backed="r")
    expected = embedded(part, spatial_model, **options)
    np.testing.assert_array_equal(embedded(read, spatial_model, **options), expected)
    sct.tl.embed(backed, spatial_model, **options)
    np.testing.assert_array_equal(backed.obsm["X_sct"], expected)
    for section in sections(part, "batch", "spatial"):
        of_whole = (adata.obs["batch"] == section.name).to_numpy()
        whole = rescale_coordinates(adata.obsm["spatial"][of_whole])
        names = list(adata.obs_names[of_whole])
        at = [names.index(name) for name in part.obs_names[section.rows]]
        np.testing.assert_array_equal(section.places, whole[at])
    moved = part.copy()
    moved.obsm["spatial"] = part.obsm["spatial"] - 1e6  # not those that the scale was made of
    np.testing.assert_allclose(
        np.concatenate([s.places for s in sections(moved, "batch", "spatial")]).min(), 0
    )


def test_positions_that_look_wrong_warn(adata, model):
    stray = adata.copy()
    stray.obsm["spatial"][7] = 1e9
    with pytest.warns(UserWarning, match="1 of 45 cells are far outside"):
        sct.tl.embed(stray, model, spatial_key="spatial")
    del adata.obs["batch"]  # of every third cell
    twice = ad.concat([adata, adata], index_unique="-")
    twice.obs["library_id"] = np.repeat(["a", "b"], CELLS)
    with pytest.warns(UserWarning, match="batch_key='library_id'") as caught:
        sct.tl.embed(twice, model, spatial_key="spatial")
    assert len(caught) == 1, [str(each.message) for each in caught]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sct.tl.embed(twice, model, spatial_key="spatial", batch_key="library_id")


def test_outputs_that_are_not_finite_are_refused_before_anything_is_written(adata, model):
    params = {**model.variables["params"]}
    broken = jax.tree.map(lambda leaf: leaf.at[...].set(np.nan), params["head"])
    stem = jax.tree.map(lambda leaf: leaf.at[...].set(np.inf), params["stem"])
    no_head = dataclasses.replace(model, variables={"params": {**params, "head": broken}})
    no_stem = dataclasses.replace(model, variables={"params": {**params, "stem": stem}})
    reference, known = adata.copy(), adata.copy()
    reference.obs["type"] = "a"
    known.obsm["X_sct"] = np.full((adata.n_obs, 4), np.nan, np.float32)
    calls = {
        "embed": lambda cells: sct.tl.embed(cells, no_stem),
        "impute": lambda cells: sct.tl.impute(cells, no_head, genes=[model.genes.symbols[3]]),
        "annotate": lambda cells: sct.tl.annotate(cells, no_stem, reference=reference, label_key="type"),
    }
    for name, call in calls.items():
        before = [set(part) for part in (adata.obs, adata.obsm, adata.layers, adata.uns)]
        with pytest.raises(CheckpointError, match="NaN or infinity") as error:
            call(adata)
        assert "\n" not in str(error.value)
        assert [set(part) for part in (adata.obs, adata.obsm, adata.layers, adata.uns)] == before, name
        assert "X_sct" not in reference.obsm
    sct.tl.embed(reference, model)
    reference.obsm["X_sct"] = reference.obsm["X_sct"][:, :4]
    with pytest.raises(DataError, match=r"obsm\['X_sct'\] .*NaN or infinity"):
        sct.tl.annotate(known, reference=reference, label_key="type", use_rep="X_sct")
    assert "sct_label" not in known.obs


def test_several_contexts_are_averaged(adata, model):
    mean = np.mean([embedded(adata, model, seed=seed) for seed in (2, 3)], axis=0)
    np.testing.assert_allclose(embedded(adata, model, seed=2, n_contexts=2), mean, rtol=1e-5, atol=1e-5)
    assert sct.tl.embed(adata, model, n_contexts=2, copy=True).uns["X_sct"]["n_contexts"] == 2
    for given, words in (
        ({"n_contexts": 0}, "n_contexts is 0"),
        ({"n_contexts": 2, "spatial_key": "spatial"}, "do not pass `n_contexts`"),
    ):
        with pytest.raises(ConfigError, match=words):
            embedded(adata, model, **given)
