"""Genes of small models: which genes are chosen, and in which order."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from sct.data import gene_selection
from sct.data.gene_selection import chosen_vocabulary, coexpression_order, hvg_of
from sct.data.genes.vocabulary import GeneVocabulary
from sct.data.ingest.build import IngestOptions, ingest
from sct.data.store import Store
from sct.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS, EACH = 4, 6  # genes of one program rise and fall together


def study(seed: int, cells: int, offset: float) -> ad.AnnData:
    """Cells with four programs of genes that are mixed in the gene order, and four genes that no cell expresses."""
    rng = np.random.default_rng(seed)
    activity = rng.gamma(0.7, 1.0, (cells, PROGRAMS))
    counts = rng.poisson(2 + 25 * activity[:, np.arange(PROGRAMS * EACH) % PROGRAMS])
    counts[:, : PROGRAMS * EACH // 2] += int(offset)  # the studies differ in half of the genes
    counts = np.hstack([counts, np.zeros((cells, 4), int)])
    ids = list(GeneVocabulary.human().ensembl_ids[: counts.shape[1]])
    return ad.AnnData(sparse.csr_matrix(counts.astype(np.float32)), var=pd.DataFrame(index=ids))


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    folder = tmp_path_factory.mktemp("genes") / "store"
    some = study(2, 80, 60.0)
    cut = some[:, np.r_[0:5, 6 : some.n_vars]].copy()  # this file lacks a gene
    genes = GeneVocabulary.human().subset(list(some.var_names))
    ingest([("a", study(1, 120, 0.0)), ("b", cut), ("c", study(3, 40, 0.0))], folder, vocabulary=genes,
           options=IngestOptions(test=("c",)))  # fmt: skip
    return Store.open(folder)


def test_genes_of_one_program_are_next_to_each_other(store):
    order = coexpression_order(store.split("train"), np.arange(PROGRAMS * EACH))
    assert sorted(order) == list(range(PROGRAMS * EACH))
    programs = order % PROGRAMS
    assert (np.diff(programs) != 0).sum() == PROGRAMS - 1, programs
    np.testing.assert_array_equal(order, coexpression_order(store.split("train"), np.arange(PROGRAMS * EACH)))
    shuffled = coexpression_order(store.split("train"), np.random.default_rng(0).permutation(PROGRAMS * EACH))
    assert (np.diff(shuffled % PROGRAMS) != 0).sum() == PROGRAMS - 1


def test_a_vocabulary_of_variable_genes_in_order_makes_a_store(store, tmp_path):
    made = chosen_vocabulary(store, 10, by_coexpression=True)
    assert len(made) == 10
    variable = hvg_of(store.split("train"), 10, np.ones(len(store.vocabulary), bool), everywhere=False)
    ids = [store.vocabulary.ensembl_ids[at] for at in variable]
    assert set(made.ensembl_ids) == set(ids)
    assert list(chosen_vocabulary(store, 10).ensembl_ids) == ids, "without an order, that of the store"
    assert list(made.ensembl_ids) != ids
    assert len(chosen_vocabulary(store)) == PROGRAMS * EACH, "no cell expresses the other genes"
    made.save(tmp_path / "genes.tsv")
    cells = study(1, 120, 0.0)
    ingest([("a", cells)], tmp_path / "small", vocabulary=GeneVocabulary.load(tmp_path / "genes.tsv"))
    (small,) = Store.open(tmp_path / "small").split("train")
    (whole,) = (each for each in store.split("train") if each.name == "a")
    at = [store.vocabulary.position_of_id[gene] for gene in made.ensembl_ids]
    found, expected = (np.sort(each.read(0, 120).toarray().sum(axis=1)) for each in (small, whole))
    assert found.sum() < expected.sum()
    np.testing.assert_array_equal(small.gene_totals, whole.gene_totals[at])


def test_the_tool_writes_the_table(store, tmp_path, monkeypatch, capsys):
    words = [f"--store={store.path}", "--number=10", f"--output={tmp_path / 'genes.tsv'}"]
    monkeypatch.setattr(sys, "argv", ["choose_genes.py", *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "tools" / "choose_genes.py"), run_name="__main__")
    assert ended.value.code == 0
    assert "10 genes" in capsys.readouterr().out
    assert (
        GeneVocabulary.load(tmp_path / "genes.tsv").ensembl_ids
        == chosen_vocabulary(store, 10, by_coexpression=True).ensembl_ids
    )
    monkeypatch.setattr(sys, "argv", ["choose_genes.py", "--store=nowhere", *words[1:]])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "tools" / "choose_genes.py"), run_name="__main__")
    assert ended.value.code == 1
    assert "error: " in capsys.readouterr().err


def test_genes_that_do_not_vary_keep_their_order(store):
    genes = np.arange(PROGRAMS * EACH, PROGRAMS * EACH + 4)  # no cell expresses them
    np.testing.assert_array_equal(coexpression_order(store.split("train"), genes), genes)


def test_too_many_genes_are_refused(store, monkeypatch):
    with pytest.raises(ConfigError, match="number is -1"):
        chosen_vocabulary(store, -1)
    monkeypatch.setattr(gene_selection, "_MOST_ORDERED", 5)
    with pytest.raises(DataError, match="choose at most 5"):
        chosen_vocabulary(store, 10, by_coexpression=True)
