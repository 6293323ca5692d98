"""Embeddings by models that read cells one by one: the cell model of ZerOmics, and decoders of cell sentences."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import scipy.sparse as sp

import sct
from sct.data.cell_options import CellOptions
from sct.data.cell_records import cell_records
from sct.data.cells import CellCounts
from sct.errors import CheckpointError, ConfigError, DataError
from sct.models.registry import family
from sct.nn.paths import flatten, unflatten
from sct.weights.pretrained import Pretrained
from tests.data.text.toy_texts import GENES
from tests.random_models import random_model
from tests.tl.test_asking import asked  # noqa: F401  (a model, as a fixture)
from tests.tl.test_sentences import cells, text_model  # noqa: F401  (cells and a model, as fixtures)

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def cell_model(asked: Pretrained) -> Pretrained:  # noqa: F811
    """First stage of the model that answers questions."""
    config = asked.config.cells
    data = {name: asked.data[name] for name in ("dropped", "max_genes")} | {"task": "masked_bins"}
    variables = {"params": asked.variables["params"]["cells"]}
    return Pretrained("zeromics_cells", config, variables, asked.genes, data=data)


def embedded(adata, model, **options):
    return sct.tl.embed(adata, model, copy=True, **options).obsm["X_sct"]


def test_bins_of_each_cell_are_read_alone(asked, cell_model, cells):  # noqa: F811
    found = embedded(cells, cell_model)
    assert found.dtype == np.float32
    np.testing.assert_allclose(embedded(cells, cell_model, batch_size=2), found, **CLOSE)
    assert sct.tl.embed(cells, cell_model, copy=True).uns["X_sct"]["context"] == "single"
    drawn = dataclasses.replace(
        cell_model, data={**cell_model.data, "genes": "sampled", "max_genes": 2}
    )  # other genes by another seed
    np.testing.assert_array_equal(embedded(cells, drawn, seed=1), embedded(cells, drawn, seed=1))
    assert np.abs(embedded(cells, drawn, seed=1) - embedded(cells, drawn)).max() > 1e-3
    np.testing.assert_allclose(embedded(cells[::-1].copy(), cell_model), found[::-1], **CLOSE)
    np.testing.assert_allclose(embedded(cells[3:4].copy(), cell_model), found[3:4], **CLOSE)
    # The second stage has the same cell model in it.
    np.testing.assert_allclose(embedded(cells, asked), found, **CLOSE)
    table = CellCounts(cells, cell_model.vocabulary)
    known = np.ones(GENES, bool)
    known[cell_model.data["dropped"]] = False
    options = CellOptions(cell_model.config.num_bins, cell_model.data["max_genes"])
    records = cell_records(table.read(np.arange(9)), options, known)
    hidden = np.asarray(cell_model.apply(**records, outputs=["hidden"])["hidden"])
    means = [
        vectors[genes >= 0].mean(axis=0) for vectors, genes in zip(hidden, records["genes"], strict=True)
    ]
    np.testing.assert_allclose(found, means, rtol=1e-4, atol=1e-5)


def test_sentences_of_each_cell_are_read_alone(text_model, cells):  # noqa: F811
    found = embedded(cells, text_model)
    np.testing.assert_allclose(embedded(cells, text_model, batch_size=2), found, **CLOSE)
    np.testing.assert_allclose(embedded(cells[::-1].copy(), text_model), found[::-1], **CLOSE)
    sentences = sct.tl.to_sentences(cells, model=text_model)
    tokenizer = text_model.tokenizer
    for row, sentence in enumerate(sentences):
        ids = np.concatenate([tokenizer.begin, tokenizer.encode(sentence)])[None]
        hidden = text_model.apply(input_ids=ids, outputs=[], intermediates=["hidden"])["hidden"]
        np.testing.assert_allclose(found[row], hidden[0].mean(axis=0), rtol=1e-4, atol=1e-5)
    assert np.ptp(found, axis=0).max() > 1e-3


def test_what_is_not_for_models_of_single_cells(cell_model, text_model, cells):  # noqa: F811
    for option, value in (
        ("cells_per_bag", 3), ("spatial_key", "spatial"), ("n_contexts", 2), ("context", "neighbors"),
    ):  # fmt: skip
        for each in (cell_model, text_model):
            with pytest.raises(ConfigError, match=f"{option} is {value!r}.*single cells"):
                sct.tl.embed(cells, each, **{option: value})
    assert "X_sct" not in cells.obsm
    values = cells.X.toarray()
    values[2] = 0
    empty = cells.copy()
    empty.X = sp.csr_matrix(values)
    with pytest.raises(DataError, match="1 of 9 cells"):
        sct.tl.embed(empty, cell_model)
    untuned = dataclasses.replace(text_model, data={})
    with pytest.raises(ConfigError, match="not trained on cell sentences"):
        sct.tl.embed(cells, untuned)
    bert = random_model(
        "bert", family("bert").config(vocab_size=30, embed_dim=8, num_layers=1, num_heads=2, ffn_dim=8)
    )
    with pytest.raises(ConfigError, match=r"'bert', which does not read cells.*embed cells"):
        sct.tl.embed(cells, bert)


def test_vectors_that_are_not_finite_are_refused(cell_model, cells):  # noqa: F811
    flat = flatten(cell_model.variables)
    name = "params/project/kernel"
    flat[name] = np.full_like(flat[name], np.nan)
    with pytest.raises(CheckpointError, match=r"cell_embedding.* cells"):
        sct.tl.embed(cells, dataclasses.replace(cell_model, variables=unflatten(flat)))
    assert "X_sct" not in cells.obsm


def test_labels_are_transferred_between_sentences(text_model, cells):  # noqa: F811
    reference = cells.copy()
    reference.obs["kind"] = ["T", "B", "T"] * 3
    sct.tl.annotate(cells, text_model, reference=reference, label_key="kind", n_neighbors=1)
    # Each cell is its own nearest neighbour, read once: there are no bags to draw.
    assert list(cells.obs["sct_label"]) == list(reference.obs["kind"])
    assert cells.uns["sct_label"]["n_contexts"] == 1
    assert "sct_label_agreement" not in cells.obs


def test_a_gene_is_knocked_out_of_the_cells_that_express_it(asked, cell_model, text_model, cells):  # noqa: F811
    """Models of single cells see a knock-out in no other cell, and cannot hide a gene."""
    for model in (asked, cell_model, text_model):
        columns = model.genes.align(cells.var).columns
        share = np.asarray((cells.X > 0).mean(axis=0)).ravel()
        usable = [
            name
            for name, at, s in zip(cells.var_names, columns, share, strict=True)
            if at >= 0 and 0.2 < s < 0.8
        ]
        gene = usable[0]
        made = sct.tl.perturb(cells, model, [gene], n_random=2, copy=True)
        changed = made.obsm["sct_perturb"][gene].to_numpy()
        expressed = cells[:, gene].X.toarray().ravel() > 0
        assert (changed[~expressed] < 1e-9).all()
        assert changed[expressed].max() > 1e-6
        for options in ({"mode": "mask"}, {"targets": [usable[1]]}):
            with pytest.raises(ConfigError, match="impute"):
                sct.tl.perturb(cells, model, [gene], n_random=2, **options)
