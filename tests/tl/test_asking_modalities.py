"""Questions about cells that are not human counts: gene activity of chromatin, few genes of a panel, mouse genes."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import sct
from sct.data.genes.orthologs import read_orthologs
from sct.errors import ConfigError, DataError
from tests.data.ortholog_tables import mouse_id, pairs_of, write
from tests.data.text.toy_texts import vocabulary
from tests.tl.test_asking import asked, cells

__all__ = ["asked", "cells"]

TYPES = ["B cell", "T cell", "NK cell"]


def shares(adata: ad.AnnData, model, **options) -> np.ndarray:
    made = sct.tl.annotate(adata, model, candidates=TYPES, copy=True, **options)
    return made.obsm["sct_label_probabilities"]


@pytest.mark.slow
def test_gene_activity_is_answered_where_it_is_called_so(asked, cells):
    """By the order of a cell's genes: any rising function of its values gives the same answers."""
    # Of more genes than the model reads, which of equal ones are left out follows from the values themselves.
    cells = cells[np.diff(cells.X.indptr) <= asked.data["max_genes"]].copy()
    assert len(cells) > 3
    expected = shares(cells, asked)
    assert np.ptp(expected, axis=0).max() > 1e-3
    scores = cells.copy()
    scores.X = sp.csr_matrix(np.sqrt(cells.X.toarray()) * np.linspace(0.01, 0.9, len(cells))[:, None])
    for call in (
        lambda: sct.tl.annotate(scores, asked, candidates=TYPES),
        lambda: sct.tl.find_rare(scores, asked),
        lambda: sct.tl.find_tumor(scores, asked, diseases=["glioma"]),
        lambda: sct.tl.infer_pathways(scores, asked, gene_sets=["HYPOXIA", "APOPTOSIS"]),
        lambda: sct.tl.ask(scores, asked, "Why?"),
    ):
        with pytest.raises(DataError, match="not integers"):
            call()
    np.testing.assert_allclose(shares(scores, asked, values="activity"), expected, atol=1e-5)
    sct.tl.find_rare(scores, asked, values="activity")
    sct.tl.ask(scores, asked, "Why?", max_new_tokens=4, values="activity")
    assert scores.uns["sct_rare"]["values"] == scores.uns["sct_answer"]["values"] == "activity"
    named = cells.copy()
    named.layers["scores"] = scores.X
    np.testing.assert_allclose(shares(named, asked, values="activity", layer="scores"), expected, atol=1e-5)
    assert sct.tl.annotate(cells, asked, candidates=TYPES, copy=True).uns["sct_label"]["values"] == "counts"


def test_what_is_no_activity_is_refused(asked, cells, model):
    scaled = cells.copy()
    scaled.X = cells.X - 0.5 * (cells.X > 0).multiply(2)
    scaled.X.data[:3] = -1.5
    with pytest.raises(DataError, match="negative values"):
        sct.tl.find_rare(scaled, asked, values="activity")
    with pytest.raises(ConfigError, match="'counts', 'activity'"):
        sct.tl.find_rare(cells, asked, values="scores")
    with pytest.raises(TypeError, match="values"):
        sct.tl.embed(cells, model, values="activity")


def test_a_panel_of_few_genes_is_a_cell_without_the_others(asked, cells):
    panel = cells[:, :6].copy()
    silent = cells.copy()
    silent.X = sp.csr_matrix(np.where(np.arange(cells.n_vars) < 6, cells.X.toarray(), 0))
    ids = [vocabulary().ensembl_ids[gene] for gene in asked.data["dropped"]]
    read = panel[:, ~panel.var_names.isin(ids)]  # other genes have no features, and a cell of them is refused
    there = np.asarray(read.X.sum(axis=1)).ravel() > 0
    panel, silent = panel[there].copy(), silent[there].copy()
    panel.obsm["spatial"] = np.arange(2.0 * len(panel)).reshape(-1, 2)
    np.testing.assert_allclose(shares(panel, asked), shares(silent, asked), atol=1e-5)


def test_mouse_cells_are_answered_as_the_human_ones(asked, cells, tmp_path):
    expected = shares(cells, asked)
    named = {gene: mouse_id(at) for at, gene in enumerate(vocabulary().ensembl_ids)}
    mouse = cells.copy()
    mouse.var = pd.DataFrame(index=[named[gene] for gene in cells.var_names])
    with pytest.raises(DataError, match=r"sct\.pp\.to_orthologs|species"):
        shares(mouse, asked)
    pairs = pairs_of(vocabulary())
    table = read_orthologs(write(pairs, tmp_path / "t.csv"), vocabulary=vocabulary())
    mapped = sct.pp.to_orthologs(mouse, table)
    np.testing.assert_allclose(shares(mapped, asked), expected, atol=1e-5)
