"""Vectors of genes: what they are in each family, and what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import sct
from sct.errors import ConfigError, DataError
from sct.models.registry import family
from sct.nn.paths import flatten
from tests.random_models import random_model
from tests.tl.test_asking import asked  # noqa: F401  (a model, as a fixture)
from tests.tl.test_embed_families import cell_model  # noqa: F401
from tests.tl.test_sentences import cells, text_model  # noqa: F401


def test_vectors_within_cells_are_means_of_activations(adata, model):
    found = sct.tl.gene_embeddings(model, adata=adata, seed=2)
    measured = model.genes.align(adata.var).columns
    assert len(found) == len(model.genes) == 60
    np.testing.assert_allclose(
        sct.tl.gene_embeddings(model, adata=adata, seed=2, batch_size=1), found, rtol=1e-4, atol=1e-5
    )
    # Each cell is read once, in the bags of embed; by hand for bags that hold all cells.
    whole = adata[:10].copy()
    made = sct.tl.gene_embeddings(model, adata=whole, cells_per_bag=10)
    from sct.data.cells import CellCounts
    from sct.inference.bags import BagReader, plan_bags

    table = CellCounts(whole, model.genes)
    order = plan_bags(table.sections[0], 10, 0)
    (one,) = BagReader(model).results(table, [order], ("logits",), "x", with_counts=True)
    hidden = model.apply(tokens=one.bag["tokens"][None], outputs=[], intermediates=["deconv_out"])[
        "deconv_out"
    ]
    mean = np.asarray(hidden).reshape(10, 64, -1).mean(axis=0)[:60]
    np.testing.assert_allclose(made, mean, rtol=1e-4, atol=1e-5)
    some = list(adata.var_names[[i for i in measured if i >= 0][:3]])
    part = sct.tl.gene_embeddings(model, some[::-1], adata=adata, seed=2)
    assert list(part.index) == some[::-1]
    np.testing.assert_array_equal(part, found.iloc[model.genes.find(some[::-1])])
    # Genes that a panel lacks have no vector.
    panel = adata[:, [name for name in adata.var_names if name != some[1]]].copy()
    assert len(sct.tl.gene_embeddings(model, adata=panel)) == 59
    with pytest.raises(DataError, match=rf"no counts.*'{some[1]}'"):
        sct.tl.gene_embeddings(model, some, adata=panel)
    with pytest.raises(ConfigError, match="adata"):
        sct.tl.gene_embeddings(model)
    with pytest.raises(DataError, match="no such gene"):
        sct.tl.gene_embeddings(model, "no such gene", adata=adata)
    with pytest.raises(ConfigError, match="genes"):
        sct.tl.gene_embeddings(model, [], adata=adata)


def test_vectors_of_text_features_and_of_names(asked, cell_model, text_model, cells):  # noqa: F811
    params = flatten(cell_model.variables["params"])
    wanted = params["features"] @ params["project/kernel"] + params["project/bias"]
    known = np.setdiff1d(np.arange(len(cell_model.genes)), cell_model.data["dropped"])
    for model in (cell_model, asked):
        found = sct.tl.gene_embeddings(model)
        np.testing.assert_allclose(found, np.asarray(wanted)[known], rtol=1e-5, atol=1e-6)
    dropped = dataclasses.replace(cell_model, data={**cell_model.data, "dropped": [2]})
    assert len(sct.tl.gene_embeddings(dropped)) == len(cell_model.genes) - 1
    with pytest.raises(DataError, match=r"no vector.*ENSG99000000002"):
        sct.tl.gene_embeddings(dropped, cell_model.genes.keys[2])

    found = sct.tl.gene_embeddings(text_model)
    table = np.asarray(flatten(text_model.variables)["params/token/embedding"])
    sentence = sct.tl.to_sentences(cells, model=text_model).iloc[0]
    ids = text_model.tokenizer.encode(sentence)
    # A sentence is its first name, and then each name after a space.
    parts = text_model.tokenizer.encode_response(sentence.split()[1:])
    np.testing.assert_array_equal(np.concatenate(parts), ids[-sum(map(len, parts)) :])
    names = sentence.split()[1:]
    vectors = found.set_axis(list(text_model_names(text_model)), axis=0).loc[names]
    np.testing.assert_allclose(vectors, [table[part].mean(axis=0) for part in parts], rtol=1e-5)
    for model in (cell_model, text_model):
        with pytest.raises(ConfigError, match="adata"):
            sct.tl.gene_embeddings(model, adata=cells)


def text_model_names(model) -> tuple[str, ...]:
    from sct.inference.sentences import cell_sentence_model_of

    return cell_sentence_model_of(model).gene_names


def test_a_model_without_vectors_of_genes_is_refused():
    bert = random_model(
        "bert", family("bert").config(vocab_size=30, embed_dim=8, num_layers=1, num_heads=2, ffn_dim=8)
    )
    with pytest.raises(ConfigError, match="embed genes"):
        sct.tl.gene_embeddings(bert)
