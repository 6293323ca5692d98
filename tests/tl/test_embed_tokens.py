"""Embeddings of cells and of genes by the scGPT-compatible cell encoder."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import sct
from sct.data.genes.vocabulary import GeneVocabulary
from sct.errors import ConfigError, DataError
from sct.inference import token_cells
from sct.models.cell_encoder_config import CellEncoderConfig
from sct.weights.pretrained import Pretrained
from tests.random_models import random_model

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def cells():
    return sct.datasets.pbmc68k()[:40].copy()


@pytest.fixture(scope="module")
def encoder(cells) -> Pretrained:
    """Model of the genes of the human table, in another order, some of which have no row."""
    genes = GeneVocabulary.human()
    rows = np.random.default_rng(0).permutation(len(genes))
    rows[::7] = -1
    config = CellEncoderConfig(
        vocab_size=len(genes) + 2, pad_id=len(genes), cls_id=len(genes) + 1, embed_dim=16, num_layers=1, num_heads=2,
        ffn_dim=16,
    )  # fmt: skip
    data = {"max_genes": 100, "genes": "top", "values": "quantiles", "gene_rows": rows.tolist()}
    return random_model("scgpt", config, genes=genes, data=data)


def embedded(adata, model, **options):
    return sct.tl.embed(adata, model, copy=True, **options).obsm["X_sct"]


def test_an_embedding_depends_on_its_own_cell_alone(encoder, cells, monkeypatch):
    """Neither the order of the cells, nor batches, nor blocks, nor the other cells change it."""
    monkeypatch.setattr(token_cells, "_SHORTEST", 16)  # so that cells have sequences of several lengths
    order = np.random.default_rng(1).permutation(len(cells))
    found = {}
    for readout in ("cls", "mean", "weighted"):
        found[readout] = embedded(cells, encoder, readout=readout)
        wrong = []
        for what, other, rows in (
            ("order", embedded(cells[order].copy(), encoder, readout=readout), order),
            ("alone", embedded(cells[7:8].copy(), encoder, readout=readout), [7]),
            ("batches", embedded(cells, encoder, readout=readout, batch_size=3), slice(None)),
        ):
            difference = np.abs(other - found[readout][rows]).max()
            wrong += [f"{readout} {what}: {difference:.1e}"] if not difference <= 1e-5 else []
        assert not wrong
    monkeypatch.setattr("sct.inference.readers.BLOCK", 9)
    np.testing.assert_allclose(embedded(cells, encoder), found["cls"], **CLOSE)
    monkeypatch.setattr(token_cells, "_SHORTEST", 512)
    np.testing.assert_allclose(embedded(cells, encoder), found["cls"], **CLOSE)
    assert np.ptp(found["cls"], axis=0).max() > 1e-3
    assert np.abs(found["cls"] - found["mean"]).max() > 1e-3
    np.testing.assert_allclose(np.linalg.norm(found["weighted"], axis=1), 1, rtol=1e-5)


def test_cells_without_weights_are_refused_where_weights_are_needed(encoder, cells):
    """A listed gene that no cell expresses is a weight of zero."""
    rows, counts = np.asarray(encoder.data["gene_rows"]), sct.data.cells.CellCounts(cells, encoder.genes)
    silent = np.flatnonzero((rows >= 0) & counts.measured & (counts.gene_totals.sum(axis=0) == 0))[:2]
    data = {**encoder.data, "genes": "listed", "max_genes": 0, "listed": silent.tolist()}
    model = dataclasses.replace(encoder, data=data)
    assert len(silent) == 2
    with pytest.raises(DataError, match=r"40 of 40 cells.*readout"):
        embedded(cells, model, readout="weighted")
    assert np.isfinite(embedded(cells, model, readout="mean")).all()


def test_readouts_are_named_and_recorded(encoder, cells, model):
    made = sct.tl.embed(cells, encoder, readout="mean", copy=True)
    assert made.uns["X_sct"]["readout"] == "mean"
    assert "readout" not in sct.tl.embed(cells, encoder, copy=True).uns["X_sct"]
    with pytest.raises(ConfigError, match=r"readout.*'pool'"):
        sct.tl.embed(cells, encoder, readout="pool")
    with pytest.raises(ConfigError, match=r"readout is 'cls'.*'mean', 'flat', 'conv'"):
        sct.tl.embed(cells, model, readout="cls")


def test_models_that_normalize_batches_need_them(encoder, cells):
    config = dataclasses.replace(encoder.config, num_batches=2, use_batch_labels=False, domain_norm="affine")
    data = {**encoder.data, "batches": ["a", "b"]}
    normed = random_model("scgpt", config, scale=0.0, genes=encoder.genes, data=data)
    means = np.stack([np.zeros(16), np.linspace(-1, 1, 16)]).astype(np.float32)
    statistics = {"domain_norm": {"mean": means, "variance": np.ones((2, 16), np.float32)}}
    shifted = {**normed.variables, "batch_stats": statistics}
    normed = dataclasses.replace(normed, variables=shifted)
    table = cells.copy()
    table.obs["batch"] = ["a", "b"] * 20
    found = embedded(table, normed, batch_key="batch")
    table.obs["batch"] = "a"
    alone = embedded(table, normed, batch_key="batch")
    np.testing.assert_allclose(found[::2], alone[::2], **CLOSE)
    assert np.abs(found[1::2] - alone[1::2]).max() > 1e-3
    for change, options in (("a", {}), ("c", {"batch_key": "batch"})):
        table.obs["batch"] = change
        with pytest.raises(DataError, match="batch"):
            sct.tl.embed(table, normed, **options)


def test_vectors_of_genes_are_their_embeddings(encoder):
    names = [encoder.genes.symbols[at] for at in (1, 2, 3)]
    made = sct.tl.gene_embeddings(encoder, names)
    params = encoder.variables["params"]
    table = np.asarray(params["gene"]["embedding"])[[encoder.data["gene_rows"][at] for at in (1, 2, 3)]]
    expected = (table - table.mean(1, keepdims=True)) / np.sqrt(table.var(1, keepdims=True) + 1e-5)
    expected = expected * np.asarray(params["gene_norm"]["scale"]) + np.asarray(params["gene_norm"]["bias"])
    np.testing.assert_allclose(made, expected, rtol=1e-4, atol=1e-5)
    assert len(sct.tl.gene_embeddings(encoder)) == (np.asarray(encoder.data["gene_rows"]) >= 0).sum()
    with pytest.raises(DataError, match="no vector for 1 of the genes"):
        sct.tl.gene_embeddings(encoder, [encoder.genes.symbols[0]])
