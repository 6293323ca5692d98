"""ZerOmics on chromatin, tissue sections and mouse: from files through both stages to answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

import sct
from sct.data.cell_options import CellOptions
from sct.data.cell_records import CellSource
from sct.data.cell_values import quantile_bins
from sct.data.datasets import simulate_atlas
from sct.data.genes.vocabulary import GeneVocabulary
from sct.data.ingest.build import IngestOptions, ingest
from sct.data.store import Store
from sct.errors import DataError
from sct.train.experiment import run
from tests.data.ortholog_tables import mouse_id, pairs_of, write

CELLS = {"embed_dim": 8, "num_layers": 1, "num_heads": 2, "ffn_dim": 12, "num_bins": 4}
LLM = {"embed_dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 24, "max_length": 512}
MAX_GENES = 48


def scores(adata: ad.AnnData, seed: int = 0) -> ad.AnnData:
    """Fractional gene activity: fragments at a gene and, weighted by distance, at others, of each cell's depth."""
    rng = np.random.default_rng(seed)
    near = sparse.csr_matrix(np.eye(adata.n_vars) + 0.3 * np.eye(adata.n_vars, k=1))
    made = adata.copy()
    depth = sparse.diags_array(rng.uniform(0.1, 2.0, adata.n_obs))
    made.X = sparse.csr_matrix(depth @ (adata.X.astype(np.float64) @ near))
    return made


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Chromatin, a section of a panel of 120 genes, mouse cells, and human cells of each kind of study to test on."""
    folder = tmp_path_factory.mktemp("files")
    made = simulate_atlas(3, 40, 400, seed=5)
    (section,) = simulate_atlas(1, 40, 400, spatial=True, seed=5)
    scores(made[0]).write_h5ad(folder / "chromatin.h5ad")
    section[:, :120].copy().write_h5ad(folder / "panel.h5ad")
    genes = GeneVocabulary.human()
    mouse = made[1].copy()
    mouse.var = mouse.var[[]]
    mouse.var_names = [mouse_id(genes.position_of_id[name]) for name in mouse.var_names]
    mouse.write_h5ad(folder / "mouse.h5ad")
    made[2].write_h5ad(folder / "human.h5ad")
    write(pairs_of(genes), folder / "orthologs.tsv.gz")
    return folder


@pytest.fixture(scope="module")
def store(files) -> Store:
    path, table = files / "store", str(files / "orthologs.tsv.gz")
    ingest([files / "chromatin.h5ad"], path, options=IngestOptions(values="activity"))
    ingest([files / "mouse.h5ad"], path, options=IngestOptions(orthologs=table))
    ingest([files / "panel.h5ad", files / "human.h5ad"], path, options=IngestOptions(validation=("human",)))
    return Store.open(path)


@pytest.fixture(scope="module")
def model(store, files) -> Any:
    """ZerOmics after some steps of both stages on all of them."""
    texts = "".join(f"{study.name}: {{abstract: Cells of {study.name}.}}\n" for study in store.studies)
    (files / "studies.yaml").write_text(texts)
    train = {"batch_size": 4, "steps": 2, "eval_every": 2, "checkpoint_every": 2, "loader_threads": 1}
    train |= {"log_every": 1, "eval_records": 4}
    first = {
        "family": "zeromics_cells", "task": "masked_bins", "model": {**CELLS, "feature_dim": 0},
        "data": {"store": str(store.path), "max_genes": MAX_GENES, "features": "random", "feature_dim": 5},
        "objective": {"report_cells": 0}, "optimizer": {"peak_lr": 1e-3, "warmup_steps": 1}, "train": train,
    }  # fmt: skip
    second = {
        "family": "zeromics", "task": "instructions", "model": {"llm": LLM, "num_soft": 3, "tokenizer": "pooled"},
        "data": {
            "store": str(store.path), "cell_encoder": str(files / "cells"), "studies": str(files / "studies.yaml"),
            "max_genes": MAX_GENES, "length": 400, "vocab_size": 600,
        },
        "objective": {"tasks": (("cta", 1.0),), "rank": 2, "alpha": 2.0, "train_llm": True, "report_cells": 0},
        "optimizer": {"peak_lr": 1e-3, "warmup_steps": 1}, "train": train,
    }  # fmt: skip
    assert run(first, files / "cells").progress.step == 2
    assert run(second, files / "llm").progress.step == 2
    return sct.load(files / "llm")


def bins_of(store: Store, name: str, known: np.ndarray | None = None) -> tuple[list[str], np.ndarray]:
    """Names of the cells of a study, and their bins (N, G) as models read them."""
    study = store.study(name)
    source = CellSource([study], CellOptions(4), known, exhaustive=True)
    found = {int(one["row"]): one["bins"] for one in map(source.record, range(len(source)))}
    return list(study.obs().index), np.stack([found[row] for row in range(study.n_cells)])


@pytest.mark.parametrize(
    ("name", "values"), [("chromatin", "activity"), ("panel", "counts"), ("mouse", "counts")]
)
def test_cells_are_read_as_their_file_has_them(store, files, name, values):
    adata = ad.read_h5ad(files / f"{name}.h5ad")
    genes = GeneVocabulary.human()
    where = {mouse_id(at): at for at in range(len(genes))} | genes.position_of_id
    columns = [where[gene] for gene in adata.var_names]
    expected = quantile_bins(sparse.csr_matrix(adata.X, dtype=np.float32), 4).toarray()
    names, found = bins_of(store, name)
    rows = [adata.obs_names.get_loc(each) for each in names]
    np.testing.assert_array_equal(found[:, columns], expected[rows])
    assert found.sum() == expected[rows].sum()
    assert store.study(name).values == values
    assert store.study(name).measured.sum() == adata.n_vars


@pytest.mark.slow
def test_models_answer_about_all_of_them(store, files, model):
    table = files / "orthologs.tsv.gz"
    mouse = sct.pp.to_orthologs(ad.read_h5ad(files / "mouse.h5ad"), table)
    for name, adata, options in (
        ("chromatin", ad.read_h5ad(files / "chromatin.h5ad"), {"values": "activity"}),
        ("panel", ad.read_h5ad(files / "panel.h5ad"), {}),
        ("mouse", mouse, {}),
    ):
        few = adata[:5].copy()
        few.uns["abstract"] = f"Cells of {name}."
        sct.tl.annotate(few, model, candidates=["type 1", "type 2"], **options)
        assert np.isfinite(few.obsm["sct_label_probabilities"]).all()
        # The same cells of the store, which are human counts or activities.
        study = store.study(name).to_anndata()[few.obs_names].copy()
        study.uns["abstract"] = few.uns["abstract"]
        sct.tl.annotate(study, model, candidates=["type 1", "type 2"], **options)
        np.testing.assert_allclose(
            study.obsm["sct_label_probabilities"],
            few.obsm["sct_label_probabilities"],
            atol=2e-3,
            err_msg=name,
        )
    with pytest.raises(DataError, match="not integers"):
        sct.tl.annotate(ad.read_h5ad(files / "chromatin.h5ad"), model, candidates=["a", "b"], abstract="x")
    with pytest.raises(DataError, match="mouse"):
        sct.tl.annotate(ad.read_h5ad(files / "mouse.h5ad"), model, candidates=["a", "b"], abstract="x")


SECTIONS = pytest.mark.parametrize(
    ("name", "genes"), [("visium_dlpfc_151510", 500), ("st_pdac_moncada", 25753)]
)


def spots(shared_data: Path, name: str, genes: int) -> ad.AnnData:
    """Some spots of a real section: a panel of 500 genes of Visium, or all genes of Spatial Transcriptomics."""
    adata = ad.read_h5ad(shared_data / "spatial" / f"{name}.h5ad")
    assert adata.n_vars == genes
    return adata[np.random.default_rng(0).permutation(adata.n_obs)[:60]].copy()


@SECTIONS
def test_real_sections_are_read_as_their_file_has_them(name, genes, shared_data, tmp_path):
    few = spots(shared_data, name, genes)
    (record,) = ingest([(name, few)], tmp_path / "store").studies
    assert record["spatial"]
    assert record["order"] == "curve"
    names, found = bins_of(Store.open(tmp_path / "store"), name)
    alignment = GeneVocabulary.human().align(few.var)
    expected = quantile_bins(alignment.project(few[names].X).astype(np.float32), 4).toarray()
    np.testing.assert_array_equal(found, expected)
    assert (found.max(axis=1) == 4).all()


@pytest.mark.slow
@SECTIONS
def test_models_answer_about_real_sections(name, genes, shared_data, model):
    few = spots(shared_data, name, genes)[:4].copy()
    sct.tl.annotate(few, model, candidates=["Layer1", "Layer2"], abstract="Spots of a section.")
    shares = few.obsm["sct_label_probabilities"]
    assert np.isfinite(shares).all()
    assert np.ptp(shares[:, 0]) > 0  # of different spots
    np.testing.assert_allclose(shares.sum(axis=1), 1, atol=1e-5)
