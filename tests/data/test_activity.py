"""Matrices that are no counts, such as gene activities of chromatin: taken where a person says so, and nowhere else."""

from __future__ import annotations

import re

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from store_inputs import VOCABULARY, make_adata, matrix, run, write_as
from test_ingest_command import command

from sct.data.bags import BagOptions, BagSource
from sct.data.cell_options import CellOptions
from sct.data.cell_records import CellSource, cell_records
from sct.data.cells import CellCounts
from sct.data.counts import CountsChecker, validate
from sct.data.ingest.build import IngestOptions
from sct.data.store import Store
from sct.data.text.prompts import load_prompts
from sct.data.text.source import SentenceOptions, Texts
from sct.errors import ConfigError, DataError, StoreError
from sct.eval.imputation.baselines import KnnSmoothing
from sct.models.sct_config import SCTConfig
from sct.tasks.masked_expression import MaskedExpression, MaskedExpressionConfig


def activity(n_cells: int = 60, seed: int = 0) -> ad.AnnData:
    """Fractional scores: each cell's counts times a number of its own, and some that are smaller than one in all."""
    made = make_adata(n_cells, seed)
    factors = np.random.default_rng(seed).uniform(1e-3, 3.0, n_cells)
    made.X = sp.csr_matrix(sp.diags_array(factors) @ made.X.astype(np.float64))
    return made


def genes_of(adata: ad.AnnData) -> np.ndarray:
    """Values (N, G) of the vocabulary's genes."""
    table = adata.to_df().reindex(columns=list(VOCABULARY.ensembl_ids), fill_value=0.0)
    return table.to_numpy()


@pytest.mark.parametrize("kind", ["csr", "csc", "dense"])
def test_a_store_of_activity_holds_the_values(kind, tmp_path):
    adata = activity()
    path = write_as(adata, kind, tmp_path)
    with pytest.raises(DataError, match=r"sample\.h5ad.*integer"):
        run([path], tmp_path / "store")
    report = run([path], tmp_path / "store", values="activity")
    assert any("are read as activity instead of counts, so only ZerOmics" in note for note in report.notes)
    found = matrix(tmp_path / "store").loc[adata.obs_names].to_numpy()
    np.testing.assert_array_equal(found, genes_of(adata).astype(np.float32))
    assert (adata.X.sum(axis=1) < 1).any()  # such cells are not taken for empty ones
    (study,) = Store.open(tmp_path / "store").studies
    assert study.values == study.record["values"] == "activity"
    assert study.record["dropped"] == {}
    # Unlike what was ingested as counts, and kept when it has not changed.
    assert run([path], tmp_path / "store", values="activity").kept == ("sample",)


def test_zeromics_reads_it_as_it_reads_counts(tmp_path):
    """Bins are quantiles within a cell, which a factor does not change."""
    counts = make_adata(60)
    run([write_as(activity(), "csr", tmp_path, "atac")], tmp_path / "store", values="activity")
    run([write_as(counts, "csr", tmp_path, "rna")], tmp_path / "store")
    store = Store.open(tmp_path / "store")
    assert [study.values for study in store.studies] == ["activity", "counts"]
    expected = cell_records(sp.csr_matrix(genes_of(counts).astype(np.float32)), CellOptions(4))["bins"]
    for study in store.studies:
        source = CellSource([study], CellOptions(4), exhaustive=True)
        names = study.obs().index
        rows = [counts.obs_names.get_loc(name) for name in names]
        found = np.stack([source.record(i)["bins"] for i in range(len(source))])
        np.testing.assert_array_equal(found, expected[rows], err_msg=study.name)
        assert expected.max() == 4


def test_models_of_counts_refuse_it(tmp_path):
    run([write_as(activity(), "csr", tmp_path)], tmp_path / "store", values="activity")
    store = Store.open(tmp_path / "store")
    words = "'sample' .* has activity values.*ZerOmics"
    with pytest.raises(StoreError, match=words):
        BagSource(store.studies, BagOptions(cells_per_bag=4)).record(0)
    with pytest.raises(StoreError, match=words):
        Texts(store.studies[0], store.vocabulary, SentenceOptions(), load_prompts())
    with pytest.raises(StoreError, match=words):
        KnnSmoothing(BagSource(store.studies, BagOptions(cells_per_bag=4)))
    with pytest.raises(DataError, match="not integers"):
        validate(store.studies[0].to_anndata())


def test_training_on_counts_refuses_it_before_it_begins(tmp_path):
    """Wherever in the store it is: a run would end at the first bag of it, after hours."""
    counts = write_as(make_adata(60), "csr", tmp_path, "rna")
    run([counts], tmp_path / "store")
    model, bags = SCTConfig(num_genes=256), BagOptions(cells_per_bag=4)
    MaskedExpression(MaskedExpressionConfig(), model, bags, Store.open(tmp_path / "store"))
    run(
        [write_as(activity(), "csr", tmp_path, "atac")], tmp_path / "store", values="activity", test=("atac",)
    )
    with pytest.raises(StoreError, match=r"'atac' .*activity"):
        MaskedExpression(MaskedExpressionConfig(), model, bags, Store.open(tmp_path / "store"))


def test_versions_that_know_counts_alone_do_not_read_it(tmp_path):
    run([write_as(make_adata(60), "csr", tmp_path, "rna")], tmp_path / "store")
    assert Store.open(tmp_path / "store").manifest["schema_version"] == 1
    run([write_as(activity(), "csr", tmp_path, "atac")], tmp_path / "store", values="activity")
    assert Store.open(tmp_path / "store").manifest["schema_version"] == 2


def test_whole_activities_are_counts_without_being_told():
    """Sums of fragments."""
    adata = make_adata(40)
    found = [
        CellCounts(adata, VOCABULARY, values=values).read(np.arange(40)) for values in ("counts", "activity")
    ]
    np.testing.assert_array_equal(found[0].toarray(), genes_of(adata))
    assert (found[0] != found[1]).nnz == 0


def test_the_place_is_x_or_the_one_that_is_named(tmp_path):
    adata = activity()
    adata.layers["counts"] = make_adata(60).X
    adata.layers["scores"] = adata.X * 2
    path = write_as(adata, "csr", tmp_path)
    assert run([path], tmp_path / "found").studies[0]["counts_from"] == 'layers["counts"]'
    named = run([path], tmp_path / "named", values="activity", layer="scores")
    assert named.studies[0]["counts_from"] == 'layers["scores"]'
    found = matrix(tmp_path / "named").loc[adata.obs_names].to_numpy()
    np.testing.assert_array_equal(found, 2 * genes_of(adata).astype(np.float32))


def test_cells_of_a_table(tmp_path):
    adata = activity()
    expected = genes_of(adata).astype(np.float32)
    with pytest.raises(DataError, match="not integers"):
        CellCounts(adata, VOCABULARY)
    cells = CellCounts(adata, VOCABULARY, values="activity")
    assert cells.counts_from == "X"
    np.testing.assert_array_equal(cells.read(np.arange(60)).toarray(), expected)
    np.testing.assert_allclose(cells.cell_totals, expected.sum(axis=1), rtol=1e-5)
    for kind in ("csr", "dense"):
        backed = ad.read_h5ad(write_as(adata, kind, tmp_path, kind), backed="r")
        cells = CellCounts(backed, VOCABULARY, values="activity")
        rows = np.array([7, 3, 3, 50])
        np.testing.assert_array_equal(cells.read(rows).toarray(), expected[rows])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: -x, "negative"),
        (lambda x: x * np.nan, "NaN"),
        (lambda x: x * np.inf, "NaN|infinite"),
        (lambda x: x * 1e-42, "float32"),
        (lambda x: x * 1e39, "float32"),
        (lambda x: x * 0, "only zeros"),
    ],
)
def test_what_is_no_activity(change, words, tmp_path):
    adata = activity()
    with np.errstate(all="ignore"):
        adata.X = sp.csr_matrix(change(adata.X.toarray()))
    with pytest.raises(DataError, match=words) as error:
        validate(adata, values="activity")
    assert "activities must be non-negative numbers" in str(error.value)
    with pytest.raises(DataError, match=words):
        run([write_as(adata, "csr", tmp_path)], tmp_path / "store", values="activity")


def test_the_default_is_counts():
    with pytest.raises(DataError, match="raw counts"):
        validate(activity())
    for wrong in (
        lambda: validate(activity(), values="fragments"),
        lambda: CountsChecker("X", "fragments"),
        lambda: IngestOptions(values="fragments"),
    ):
        with pytest.raises(ConfigError, match=re.escape("must be one of 'counts', 'activity'")):
            wrong()
    adata = activity()
    del adata.X
    with pytest.raises(DataError, match="no X"):
        validate(adata, values="activity")


def test_command_line(tmp_path):
    VOCABULARY.save(tmp_path / "toy.tsv")
    path = write_as(activity(), "csr", tmp_path)
    flags = (f"--input={path}", f"--output={tmp_path / 'store'}", f"--genes={tmp_path / 'toy.tsv'}")
    done = command(*flags, "--values=activity")
    assert done.returncode == 0, done.stderr
    assert "instead of counts, so only ZerOmics" in " ".join(done.stdout.split())
    assert Store.open(tmp_path / "store").studies[0].values == "activity"
