"""Laws of `sct.tl.impute`."""

from __future__ import annotations

import copy
import dataclasses

import anndata as ad
import jax
import numpy as np
import pytest
import scipy.sparse as sp

import sct
from sct.data.bag_order import random_order
from sct.data.ingest.build import ingest
from sct.data.store import Store
from sct.data.tokenize import bin_counts, expected_counts, noisy_genes
from sct.errors import ConfigError, DataError
from tests.tl.conftest import BAG, CELLS, GENES


def changed(adata: ad.AnnData, rows: np.ndarray, columns: np.ndarray) -> ad.AnnData:
    """Copy with other counts in some rows and columns."""
    other = adata.copy()
    dense = other.X.toarray()
    part = np.ix_(rows, columns)
    dense[part] = np.random.default_rng(9).poisson(30, dense[part].shape)
    other.X = sp.csr_matrix(dense)
    return other


def dense(matrix) -> np.ndarray:
    return matrix.toarray() if sp.issparse(matrix) else np.asarray(matrix)


def test_hidden_genes_are_not_looked_at(adata, model):
    genes = list(adata.var_names[[2, 5, 40]])
    other = changed(adata, np.arange(CELLS), np.array([2, 5, 40]))
    for cells in (adata, other):
        sct.tl.impute(cells, model, genes=genes)
    for name in ("sct_expected", "sct_level", "sct_probability"):
        one, two = (dense(cells[:, genes].layers[name]) for cells in (adata, other))
        np.testing.assert_array_equal(one, two)
    assert dense(adata[:, genes].layers["sct_expected"]).std() > 0


@pytest.mark.parametrize("keys", [{}, {"spatial_key": "spatial"}, {"batch_key": "batch"}])
def test_hidden_cells_are_not_looked_at(adata, spatial_model, keys):
    rows = np.array([0, 7, 8, 30])
    other = changed(adata, rows, np.arange(GENES))
    for cells in (adata, other):
        sct.tl.impute(cells, spatial_model, cells=rows, **keys)
    one, two = (dense(cells.layers["sct_expected"])[rows] for cells in (adata, other))
    known = adata.var_names.isin(spatial_model.genes.keys)
    np.testing.assert_array_equal(one[:, known], two[:, known])
    assert (one[:, known] > 0).mean() > 0.5
    np.testing.assert_array_equal(one[:, ~known], adata.X.toarray()[rows][:, ~known])


def test_genes_that_the_panel_lacks_are_not_hidden_with_a_cell(adata, model, monkeypatch):
    panel, rows, shown = adata[:, :20].copy(), np.array([0, 7]), []
    apply = type(model).apply

    def spy(self, **inputs):
        shown.append(np.asarray(inputs["tokens"]).reshape(-1, inputs["tokens"].shape[-1]))
        return apply(self, **inputs)

    monkeypatch.setattr(type(model), "apply", spy)
    sct.tl.impute(panel, model, cells=rows)
    tokens = np.concatenate(shown)
    hidden = (tokens == model.config.mask).any(axis=1)
    measured = model.genes.align(panel.var).columns >= 0
    assert 2 <= hidden.sum() < len(tokens)
    np.testing.assert_array_equal(
        tokens[hidden][:, : len(measured)] == model.config.mask, np.tile(measured, (hidden.sum(), 1))
    )


def test_expected_counts_and_levels_are_those_of_the_distribution(adata, model):
    gene = adata.var_names[10]
    sct.tl.impute(adata, model, genes=gene)
    order = random_order(np.arange(CELLS), BAG, seed=0)
    rows = order.rows[:BAG]
    counts = model.genes.align(adata.var).project(adata.X).toarray()
    drop = noisy_genes(counts.sum(axis=0), CELLS)
    position = int(model.genes.find([gene])[0])
    shown = counts.copy()
    shown[:, position] = 0
    bins = bin_counts(sp.csr_matrix(shown[rows]), num_positions=64, drop=drop, with_values=True)
    tokens = bins.tokens.copy()
    tokens[:, position] = 6
    logits = np.asarray(model.apply(tokens=tokens[None])["logits"])[0, :, position, :5].astype(np.float64)
    chance = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    ours = dense(adata[:, gene].layers["sct_expected"])[rows, 0]
    np.testing.assert_allclose(ours, expected_counts(chance, bins.means, bins.low, bins.high), rtol=1e-4)
    probability = dense(adata[:, gene].layers["sct_probability"])[rows, 0]
    np.testing.assert_allclose(probability, chance[:, 1:].sum(axis=1), rtol=1e-4)
    np.testing.assert_array_equal(dense(adata[:, gene].layers["sct_level"])[rows, 0], chance.argmax(axis=1))


def test_a_model_without_adjustment_imputes_as_one_whose_logits_have_the_offset(adata, model):
    rates = {"cells_per_bag": BAG, "masking": {"expressed": 0.5, "unexpressed": 0.1}}
    unadjusted = dataclasses.replace(model, data={**rates, "logit_adjustment": False})
    variables = copy.deepcopy(jax.device_get(model.variables))
    variables["params"]["head"]["logits"]["bias"] = variables["params"]["head"]["logits"]["bias"] + np.log(
        5.0
    ) * (np.arange(7) == 0).astype(np.float32)
    shifted = dataclasses.replace(model, data={**rates, "logit_adjustment": True}, variables=variables)
    gene = adata.var_names[10]
    first, second = adata.copy(), adata.copy()
    sct.tl.impute(first, unadjusted, genes=gene)
    sct.tl.impute(second, shifted, genes=gene)
    for name in ("sct_expected", "sct_probability", "sct_level"):
        one, two = (dense(cells.layers[name]) for cells in (first, second))
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)
    assert first.uns["sct"]["class_offset"] == pytest.approx(np.log(5))
    assert second.uns["sct"]["class_offset"] == 0


def test_assumed_masking_rates_are_said_once(adata, model):
    old = dataclasses.replace(model, data={"cells_per_bag": BAG})
    with pytest.warns(UserWarning, match="15% of expressed") as said:
        sct.tl.impute(adata, old, genes=adata.var_names[10])
    assert len([w for w in said if "15% of expressed" in str(w.message)]) == 1
    assert adata.uns["sct"]["class_offset"] == pytest.approx(np.log(15))


def test_the_rest_stays_as_it_was_counted(adata, model):
    before = adata.X.toarray()
    gene = adata.var_names[10]
    sct.tl.impute(adata, model, genes=[gene], key_added="new")
    np.testing.assert_array_equal(
        dense(adata.layers["new_probability"])[:, adata.var_names != gene],
        before[:, adata.var_names != gene] > 0,
    )
    rest = adata.var_names != gene
    np.testing.assert_array_equal(dense(adata.layers["new_expected"])[:, rest], before[:, rest])
    np.testing.assert_array_equal(adata.X.toarray(), before)
    levels = dense(adata.layers["new_level"])
    known = adata.var_names.isin(model.genes.keys)
    np.testing.assert_array_equal((levels > 0)[:, rest & known], (before > 0)[:, rest & known])
    assert set(np.unique(levels)) <= set(range(5))
    assert list(adata.uns["new"]["genes"]) == [gene]


def test_levels_of_the_rest_follow_all_counts_of_the_cell(adata, model):
    counts = model.genes.align(adata.var).project(adata.X)
    largest = int(np.argmax(np.asarray(counts.sum(axis=0)).ravel()))
    sct.tl.impute(adata, model, genes=[model.genes.keys[largest]])
    column = adata.var_names.get_indexer(model.genes.keys)
    rest = (column >= 0) & (np.arange(len(column)) != largest)
    levels = dense(adata.layers["sct_level"])[:, column[rest]]
    np.testing.assert_array_equal(levels, bin_counts(counts).tokens[:, rest])
    shown = counts.tolil()
    shown[:, largest] = 0
    assert (levels != bin_counts(shown.tocsr()).tokens[:, rest]).any()


def test_genes_that_the_panel_lacks_are_tables(adata, model):
    lacking, there = adata.var_names[3], adata.var_names[10]
    panel = adata[:, adata.var_names != lacking].copy()
    sct.tl.impute(panel, model, genes=[lacking, there])
    table = panel.obsm["sct_expected"]
    assert list(table.columns) == [lacking]
    assert there in panel.var_names
    assert (dense(panel[:, there].layers["sct_expected"]) != panel[:, there].X.toarray()).any()
    # The same question with the gene measured, but hidden, has nearly the same answer: it is not looked at.
    full = adata.copy()
    sct.tl.impute(full, model, genes=[lacking, there])
    np.testing.assert_allclose(
        table[lacking], dense(full[:, lacking].layers["sct_expected"])[:, 0], rtol=1e-5
    )
    sct.tl.impute(panel, model, genes="missing", key_added="all")
    assert panel.obsm["all_level"].shape == (CELLS, GENES - int(panel.var_names.isin(model.genes.keys).sum()))


def test_genes_of_some_cells_only(adata, model):
    gene, mask = adata.var_names[10], np.arange(CELLS) < 9
    before = adata.X.toarray()
    sct.tl.impute(adata, model, genes=[gene], cells=mask)
    column = dense(adata[:, gene].layers["sct_expected"])[:, 0]
    np.testing.assert_array_equal(column[~mask], before[~mask, 10])
    assert (column[mask] != before[mask, 10]).all()
    panel = adata[:, adata.var_names != gene].copy()
    sct.tl.impute(panel, model, genes=[gene], cells=mask)
    for name in ("sct_expected", "sct_level", "sct_probability"):
        np.testing.assert_array_equal(panel.obsm[name][gene].isna(), ~mask)


def test_cells_by_name_number_and_mask_are_the_same(adata, model):
    rows = np.array([4, 11])
    mask = np.isin(np.arange(CELLS), rows)
    results = []
    for cells in (rows, mask, list(adata.obs_names[rows])):
        sct.tl.impute(adata, model, cells=cells)
        results.append(dense(adata.layers["sct_expected"]))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])
    assert list(adata.uns["sct"]["cells"]) == list(adata.obs_names[rows])


@pytest.mark.parametrize("batch_size", [1, 4])
def test_chunks_do_not_matter(adata, model, batch_size):
    one, two = (
        sct.tl.impute(adata, model, genes=[adata.var_names[1]], batch_size=size, copy=True)
        for size in (batch_size, None)
    )
    np.testing.assert_allclose(
        dense(one.layers["sct_expected"]), dense(two.layers["sct_expected"]), rtol=1e-4, atol=1e-5
    )


def test_a_backed_file_gives_what_memory_gives(adata, model, tmp_path):
    gene = adata.var_names[10]
    adata.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    sct.tl.impute(backed, model, genes=[gene])
    sct.tl.impute(adata, model, genes=[gene])
    np.testing.assert_array_equal(
        backed.obsm["sct_expected"][gene], dense(adata[:, gene].layers["sct_expected"])[:, 0]
    )
    with pytest.raises(DataError, match="to_memory"):
        sct.tl.impute(backed, model, cells=[0])


def test_counts_in_raw(adata, model):
    gene = adata.var_names[10]
    expected = sct.tl.impute(adata, model, genes=[gene], copy=True)
    normalized = adata.copy()
    normalized.raw = adata
    normalized = normalized[:, ::-1][:, 5:].copy()
    normalized.X = normalized.X.log1p()
    sct.tl.impute(normalized, model, genes=[gene])
    np.testing.assert_array_equal(
        dense(normalized.layers["sct_expected"]),
        dense(expected[:, normalized.var_names].layers["sct_expected"]),
    )


def test_results_survive_a_file(adata, model, tmp_path):
    panel = adata[:, 4:].copy()
    sct.tl.impute(panel, model, genes=[adata.var_names[1], adata.var_names[20]])
    panel.write_h5ad(tmp_path / "out.h5ad")
    again = ad.read_h5ad(tmp_path / "out.h5ad")
    np.testing.assert_array_equal(again.obsm["sct_expected"], panel.obsm["sct_expected"])
    np.testing.assert_array_equal(dense(again.layers["sct_level"]), dense(panel.layers["sct_level"]))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({}, ConfigError, "both missing"),
        ({"genes": ["NOSUCHGENE"]}, DataError, "NOSUCHGENE"),
        ({"genes": []}, DataError, "empty"),
        ({"cells": [1, 99]}, DataError, "from 1 to 99"),
        ({"cells": ["nobody"]}, DataError, "'nobody'"),
        ({"cells": np.ones(3, bool)}, DataError, "shape"),
        ({"cells": np.zeros(CELLS, bool)}, DataError, "no cell"),
        ({"cells": np.ones(CELLS, bool)}, DataError, "all 45 cells"),
    ],
)
def test_wrong_input_is_a_sentence(adata, model, options, error, words):
    with pytest.raises(error, match=words):
        sct.tl.impute(adata, model, **options)
    assert not {"sct_expected", "sct_level"} & {*adata.layers, *adata.obsm}


def test_cells_of_one_name_are_not_told_apart(adata, model):
    adata.obs_names = ["same", "same", *adata.obs_names[2:]]
    for cells in (["same"], [1]):
        with pytest.raises(DataError, match="obs_names_make_unique"):
            sct.tl.impute(adata, model, cells=cells)


def test_a_gene_is_named_once(adata, model):
    name = adata.var_names[2]
    with pytest.raises(DataError, match="the same gene"):
        sct.tl.impute(adata, model, genes=[name, f"{name}.3"])


def test_a_gene_in_two_columns_is_a_table(adata, model):
    name = adata.var_names[10]
    twice = adata.copy()
    twice.var_names = [f"{name}.2" if i == 20 else n for i, n in enumerate(adata.var_names)]
    sct.tl.impute(twice, model, genes=[name, adata.var_names[11]], duplicates="sum")
    assert list(twice.obsm["sct_expected"].columns) == [name]
    np.testing.assert_array_equal(dense(twice[:, name].layers["sct_expected"]), twice[:, name].X.toarray())
    assert list(twice.uns["sct"]["var_names"]) == [adata.var_names[11]]


def test_a_study_of_a_store_knows_what_its_panel_lacks(adata, model, tmp_path):
    panel = adata[:, :40].copy()
    ingest([("panel", panel)], tmp_path / "store", vocabulary=model.genes)
    study = Store.open(tmp_path / "store").study("panel").to_anndata()
    sct.tl.impute(study, model, genes="missing")
    measured = int(panel.var_names.isin(model.genes.keys).sum())
    assert len(study.uns["sct"]["genes"]) == GENES - measured
    assert 0 < measured < GENES


def test_whole_cells_need_others_in_their_bag(adata, model):
    for keys in ({}, {"spatial_key": "spatial"}):
        with pytest.raises(ConfigError, match="cells_per_bag` is 1"):
            sct.tl.impute(adata, model, cells=[0, 5], cells_per_bag=1, **keys)
    sct.tl.impute(adata, model, cells=np.arange(30), cells_per_bag=2)
    assert np.isfinite(dense(adata.layers["sct_expected"])).all()


def test_results_of_an_earlier_call_do_not_stay(adata, model):
    lacking = adata.var_names[3]
    panel = adata[:, adata.var_names != lacking].copy()
    sct.tl.impute(panel, model, genes=[lacking])
    assert "sct_expected" in panel.obsm
    sct.tl.impute(panel, model, genes=[adata.var_names[10]])
    assert "sct_expected" not in panel.obsm
    sct.tl.impute(panel, model, genes=[lacking])
    assert "sct_expected" not in panel.layers


def test_repeated_names_with_counts_in_raw(adata, model):
    adata.raw = adata.copy()
    adata.X = adata.X.log1p()
    adata.var_names = ["same"] * 2 + list(adata.var_names[2:])
    with pytest.raises(DataError, match="not unique"):
        sct.tl.impute(adata, model, genes=[adata.var_names[10]])
