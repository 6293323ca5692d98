"""Readouts of sCT: flat outputs, the fitted map, what a model folder keeps of them, and the default."""

from __future__ import annotations

import dataclasses
import json
import warnings

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.decomposition import PCA

import sct
from sct.data.bag_order import random_order
from sct.data.ingest.build import IngestOptions, ingest
from sct.data.store import Store
from sct.data.tokenize import bin_counts, noisy_genes
from sct.errors import CheckpointError, ConfigError, DataError
from sct.inference import fitting, readouts
from sct.inference.bags import BagReader
from sct.tl import embedding
from sct.train.export import ExportConfig, completed
from sct.weights import fitted_readout, model_folder
from sct.weights.fitted_readout import Moments
from sct.weights.pretrained import with_changed_outputs
from tests.tl.conftest import BAG, CELLS, made, slide

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def embedded(adata, model, **options) -> np.ndarray:
    return sct.tl.embed(adata, model, copy=True, **options).obsm["X_sct"]


@pytest.fixture(scope="module")
def fitted(model):
    return sct.tl.fit_readout(model, slide(), dim=5)


def test_flat_readouts_hold_the_positions_of_a_cell_side_by_side(adata, model):
    order = random_order(np.arange(CELLS), BAG, seed=0)
    counts = model.genes.align(adata.var).project(adata.X)
    drop = noisy_genes(np.asarray(counts.sum(axis=0)).ravel(), CELLS)
    rows = order.rows[:BAG]
    tokens = bin_counts(counts[rows], num_positions=64, drop=drop).tokens[None]
    made = model.apply(tokens=tokens, intermediates=("transformer_out", "conv_out"))
    for name, output in (("flat", "transformer_out"), ("conv", "conv_out")):
        got = embedded(adata, model, readout=name)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got[rows], np.asarray(made[output])[0].reshape(BAG, -1), **CLOSE)
    flat = embedded(adata, model, readout="flat")
    np.testing.assert_allclose(
        flat.reshape(CELLS, -1, model.config.embed_dim).mean(axis=1), embedded(adata, model), **CLOSE
    )
    np.testing.assert_array_equal(embedded(adata, model, readout="mean"), embedded(adata, model))


def test_the_fitted_readout_is_the_principal_components_of_the_flat_one(adata, model, fitted):
    flat, ours = (embedded(adata, fitted, readout=name) for name in ("flat", "fitted"))
    pca = PCA(5, svd_solver="full").fit(flat)
    theirs = pca.transform(flat)
    signs = np.sign((ours * theirs).sum(axis=0))
    np.testing.assert_allclose(ours, theirs * signs, rtol=1e-3, atol=1e-3)
    assert fitted.readout.info["explained"] == pytest.approx(pca.explained_variance_ratio_.sum(), abs=1e-3)
    assert fitted.readout.info["cells"] == CELLS
    assert model.readout is None, "the given model does not change"


def test_a_fit_depends_neither_on_the_run_nor_on_the_batches(model, fitted):
    again = sct.tl.fit_readout(model, slide(), dim=5)
    np.testing.assert_array_equal(again.readout.matrix, fitted.readout.matrix)
    in_pieces = sct.tl.fit_readout(model, slide(), dim=5, batch_size=2)
    np.testing.assert_allclose(in_pieces.readout.matrix, fitted.readout.matrix, rtol=1e-3, atol=1e-4)
    assert sct.tl.fit_readout(model, slide(), dim=3, source="conv").readout.source == "conv"


def test_data_sets_share_one_space(model, fitted):
    cells = slide()
    first, second = cells[:24].copy(), cells[24:].copy()  # whole bags each, by the batch
    first.obs["study"], second.obs["study"] = "a", "b"
    both = ad.concat([first, second])
    both.var = cells.var
    together = embedded(both, fitted, readout="fitted", batch_key="study")
    apart = [embedded(each, fitted, readout="fitted", batch_key="study") for each in (first, second)]
    np.testing.assert_allclose(together, np.concatenate(apart), **CLOSE)


def test_draws_of_bags_are_averaged_before_or_after_the_map(adata, fitted):
    draws = [embedded(adata, fitted, readout="flat", seed=seed) for seed in (0, 1)]
    mean = np.mean(draws, axis=0)
    np.testing.assert_allclose(embedded(adata, fitted, readout="flat", n_contexts=2), mean, **CLOSE)
    mapped = (mean - fitted.readout.mean) @ fitted.readout.matrix
    np.testing.assert_allclose(embedded(adata, fitted, readout="fitted", n_contexts=2), mapped, **CLOSE)


@pytest.mark.parametrize("standardize", [False, True])
def test_moments_give_the_components_of_all_cells(standardize, monkeypatch):
    rng = np.random.default_rng(0)
    scales = np.r_[np.geomspace(5, 0.5, 6), np.full(34, 0.05)]
    x = rng.normal(size=(300, 40)) @ np.diag(scales) @ np.linalg.qr(rng.normal(size=(40, 40)))[0] + 3
    x[:, 7] = 2.0  # a constant feature
    deviation = x.std(axis=0)
    deviation[7] = 1
    scaled = (x - x.mean(axis=0)) / (deviation if standardize else 1)
    expected = PCA(4, svd_solver="full").fit(scaled).transform(scaled)
    results = []
    for exact, blocks in ((2048, 1), (2048, 7), (20, 3), (20, 5)):
        monkeypatch.setattr(fitted_readout, "EXACT", exact)
        monkeypatch.setattr(fitted_readout, "TEST_VECTORS", 20)
        moments = Moments(40, 4)
        for block in np.array_split(x, blocks):
            moments.add(block)
        made = moments.fit("flat", standardize)
        ours = (x - made.mean) @ made.matrix
        signs = np.sign((ours * expected).sum(axis=0))
        same = np.abs(np.corrcoef((ours * signs).T, expected.T)[:4, 4:].diagonal())
        assert same.min() > (0.9999 if exact > 40 else 0.98)
        results.append(made.matrix)
    np.testing.assert_allclose(results[0], results[1], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(results[2], results[3], rtol=1e-4, atol=1e-6)
    assert np.abs(results[0][7]).max() < 1e-6


def test_a_model_folder_keeps_the_map(adata, fitted, tmp_path):
    expected = embedded(adata, fitted, readout="fitted")
    fitted.save_pretrained(tmp_path / "model")
    loaded = sct.load(tmp_path / "model")
    np.testing.assert_allclose(embedded(adata, loaded, readout="fitted"), expected, **CLOSE)
    loaded.save_pretrained(tmp_path / "half", dtype="bfloat16")
    again = sct.load(tmp_path / "half")
    np.testing.assert_array_equal(again.readout.matrix, fitted.readout.matrix)
    assert again.readout.record() == fitted.readout.record()
    content = json.loads((tmp_path / "model" / "config.json").read_text())
    assert content["readout"]["dim"] == 5
    assert content["readout"]["cells"] == CELLS
    loaded.save_pretrained(tmp_path / "model")  # replaces the folder
    assert sct.load(tmp_path / "model").readout is not None
    assert loaded.fingerprint == made().fingerprint, "the map does not change the weights"
    assert with_changed_outputs(loaded, variables={}).readout is None


def test_a_changed_or_missing_map_is_noticed(fitted, tmp_path):
    folder = tmp_path / "model"
    fitted.save_pretrained(folder)
    path = folder / model_folder.READOUT
    whole = path.read_bytes()
    path.write_bytes(whole[:-4] + b"\0\0\0\1")
    with pytest.raises(CheckpointError, match=r"readout\.safetensors is damaged or was changed"):
        sct.load(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"has no readout\.safetensors"):
        sct.load(folder)
    content = json.loads((folder / "config.json").read_text())
    content["readout"]["dim"] = 4
    content.pop("sha256")
    content.pop("files")
    (folder / "config.json").write_text(json.dumps(content))
    path.write_bytes(whole)
    with (
        pytest.warns(UserWarning, match="no hashes"),
        pytest.raises(CheckpointError, match=r"does not fit the entry 'readout'"),
    ):
        sct.load(folder)


def test_what_cannot_be_fitted_or_read_is_a_sentence(adata, model, monkeypatch):
    with pytest.raises(ConfigError, match=r"no fitted readout: fit one with model = sct\.tl\.fit_readout"):
        embedded(adata, model, readout="fitted")
    for options, error, words in (
        ({"source": "mean"}, ConfigError, r"source is 'mean'.*'flat', 'conv'"),
        ({"dim": 0}, ConfigError, "dim"),
        ({"dim": CELLS}, DataError, "more than 45 cells"),
        ({"max_cells": 3}, DataError, "there are 3"),
    ):
        with pytest.raises(error, match=words):
            sct.tl.fit_readout(model, adata, **options)
    with pytest.raises(ConfigError, match="cells"):
        sct.tl.fit_readout(model, 3)
    monkeypatch.setattr(readouts.os, "sysconf", lambda name: 200)
    with pytest.raises(ConfigError, match=r"'flat' has 256 numbers per cell.*45 cells.*GB"):
        embedded(adata, model, readout="flat")
    assert embedded(adata, model).shape == (CELLS, 32)


def test_a_code_is_offered_by_models_that_have_one(model):
    assert "code" not in BagReader(model).readouts

    class WithCode:
        code_dim = 8

    found = BagReader(dataclasses.replace(model, config=WithCode())).readouts
    assert found["code"].output == "code"


@pytest.fixture(scope="module")
def store(tmp_path_factory, model) -> Store:
    cells = slide()
    inputs = [("a", cells[:20].copy()), ("b", cells[20:35].copy()), ("c", cells[35:].copy())]
    folder = tmp_path_factory.mktemp("store") / "store"
    ingest(inputs, folder, vocabulary=model.genes, options=IngestOptions(test=("c",)))
    return Store.open(folder)


def test_a_store_gives_its_training_studies_in_proportion(model, store):
    fitted = sct.tl.fit_readout(model, store, dim=3)
    assert fitted.readout.info["studies"] == ["a", "b"]
    assert fitted.readout.info["cells"] == 35
    some = sct.tl.fit_readout(model, store.path, dim=3, max_cells=14)
    assert some.readout.info["cells"] == 18, "whole bags of 6 cells"
    studies = store.split("train")
    chosen = fitting.parts(studies, 14, seed=0)
    assert [rows.stop - rows.start for rows in chosen] == [8, 6]
    in_bags = fitting.parts(studies, 14, seed=0, multiple=BAG)
    assert [rows.stop - rows.start for rows in in_bags] == [12, 6]
    assert [rows.stop - rows.start for rows in fitting.parts(studies, 34, seed=0, multiple=BAG)] == [20, 15]
    table = fitting.table_of(studies[0], model.genes, chosen[0])
    expected = studies[0].read(chosen[0].start, chosen[0].stop).toarray()
    np.testing.assert_array_equal(table.read(np.arange(8)).toarray(), expected)
    np.testing.assert_array_equal(table.measured, studies[0].measured)


def test_an_export_fits_the_map_and_records_the_training_cells(model, store):
    made, notes = completed(model, store, ExportConfig(readout_dim=4, readout_source="conv"), "runs/parent")
    assert notes == []
    assert (made.readout.source, made.readout.dim) == ("conv", 4)
    assert made.training_cells.info["cells"] == 35
    assert made.training_cells.info["init_from"] == "runs/parent"
    none, notes = completed(model, store, ExportConfig(readout_dim=0, training_cells=34))
    assert (none.readout, none.training_cells, notes) == (None, None, [])
    few, notes = completed(model, store, ExportConfig(readout_dim=64))
    assert few.readout is None
    assert few.training_cells is not None
    assert len(notes) == 1
    assert "more than 64 cells" in notes[0]
    with pytest.raises(ConfigError, match=r"export\.readout_cells"):
        ExportConfig(readout_cells=0)


def test_an_export_reports_what_it_cannot_make_and_keeps_the_rest(model, store, monkeypatch):
    def crash(*_, **__):
        raise RuntimeError("out of memory\nat line 3")

    monkeypatch.setattr(fitting, "fit_to_store", crash)
    made, notes = completed(model, store, ExportConfig(readout_dim=4))
    assert made.readout is None
    assert made.training_cells is not None
    assert notes == ["no readout was fitted: RuntimeError: out of memory"]
    monkeypatch.setattr("sct.weights.training_cells.TrainingCells.of", crash)
    made, notes = completed(model, store, ExportConfig(readout_dim=0))
    assert made is model
    assert notes == ["no hashes of the training cells were stored: RuntimeError: out of memory"]


def test_a_new_map_drops_the_record_of_the_old_one(model, store):
    recorded = sct.tl.record_benchmark(model, results(model, 0.9, 0.8))
    assert sct.tl.fit_readout(recorded, store, dim=3).embedding == {}


def results(model, readout: float, components: float | None) -> dict:
    rows = {"model, mean": {"5-NN accuracy": [0.3, 0.2]}, "model, flat": {"5-NN accuracy": [readout]}}
    if components is not None:
        rows["zero-shot PCA"] = {"5-NN accuracy": [components]}
    return {"facts": {"weights": model.fingerprint}, "embedding": {"kang": rows, "pdac": rows}}


def test_the_record_chooses_the_default_and_warns_once(adata, model, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "_warned", set())
    recorded = sct.tl.record_benchmark(model, results(model, 0.5, 0.81))
    assert recorded.embedding["default"] == "flat"
    assert recorded.embedding["measured"][0] == {
        "study": "kang", "accuracy": 0.5, "components": 0.81, "readouts": {"mean": 0.25, "flat": 0.5},
    }  # fmt: skip
    recorded.save_pretrained(tmp_path / "model")
    loaded = sct.load(tmp_path / "model")
    assert loaded.embedding == recorded.embedding
    with pytest.warns(UserWarning, match=r"default embedding.*\(flat\) was worse.*0\.50 against 0\.81"):
        found = sct.tl.embed(adata, loaded, copy=True)
    assert found.uns["X_sct"]["readout"] == "flat"
    np.testing.assert_array_equal(found.obsm["X_sct"], embedded(adata, model, readout="flat"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embedded(adata, loaded)  # no second warning
        monkeypatch.setattr(embedding, "_warned", set())
        embedded(adata, loaded, readout="mean")  # a choice of the user
        embedded(adata, sct.tl.record_benchmark(model, results(model, 0.9, 0.81)))
    assert embedding.comparison_note(loaded) == ""
    assert "was not compared" in embedding.comparison_note(model)
    assert (
        sct.tl.record_benchmark(model, results(model, 0.5, None), default="mean").embedding["default"]
        == "mean"
    )


def test_results_that_cannot_be_recorded_are_a_sentence(model, tmp_path):
    for given, words in (
        ({"facts": {"weights": "other"}}, "weights other"),
        ({"embedding": {}}, "do not record the weights"),
        ({"facts": {"weights": model.fingerprint}, "embedding": {}}, "no k-NN accuracy"),
        (tmp_path / "nowhere", "cannot be read"),
    ):
        with pytest.raises(DataError, match=words):
            sct.tl.record_benchmark(model, given)
    with pytest.raises(ConfigError, match="default"):
        sct.tl.record_benchmark(model, results(model, 0.5, 0.8), default="fitted")


def test_components_of_training_cells_are_applied_unchanged():
    from sct.eval.embedding.baselines import fit_components

    rng = np.random.default_rng(0)
    train, other = (sp.csr_matrix(rng.poisson(2.0, (50, 30)).astype(np.float32)) for _ in range(2))
    transform = fit_components(train, 4)
    whole = transform(sp.vstack([train, other]).tocsr())
    np.testing.assert_allclose(transform(other), whole[50:], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(whole[:50].mean(axis=0), 0, atol=1e-4)
