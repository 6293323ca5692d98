"""Mouse files become studies of human genes: the same as the human files they were made of."""

from __future__ import annotations

import json
from pathlib import Path

import anndata as ad
import pytest
from store_inputs import VOCABULARY, files_of, make_adata, matrix, run, write_as
from test_ingest_command import command

from sct.data.ingest import workers as ingest_jobs
from sct.data.ingest.build import IngestOptions
from sct.data.store import Store
from sct.errors import ConfigError, DataError, StoreError
from tests.data.ortholog_tables import mouse_id, pairs_of, write


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write(pairs_of(VOCABULARY), tmp_path / "orthologs.tsv.gz")


def mouse_of(adata: ad.AnnData) -> ad.AnnData:
    """The same cells with mouse genes; those outside the vocabulary are outside the table, too."""
    named = {gene: mouse_id(at) for at, gene in enumerate(VOCABULARY.ensembl_ids)}
    made = adata.copy()
    made.var_names = [f"{named.get(name, mouse_id(900 + at))}.2" for at, name in enumerate(adata.var_names)]
    return made


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csr", "csc", "dense", "mtx", "tenx3", "zarr3"])
def test_a_mouse_file_is_the_human_study(kind, table, tmp_path):
    human = make_adata(spatial=kind == "csr")
    run([write_as(human, kind, tmp_path / "human")], tmp_path / "expected")
    report = run(
        [write_as(mouse_of(human), kind, tmp_path / "mouse")], tmp_path / "store", orthologs=str(table)
    )
    assert files_of(tmp_path / "store/studies/sample.zarr") == files_of(
        tmp_path / "expected/studies/sample.zarr"
    )
    (record,) = report.studies
    (expected,) = Store.open(tmp_path / "expected").manifest["studies"]
    assert record["n_genes_matched"] == expected["n_genes_matched"] == 55
    assert record["genes_from"].endswith("orthologs of orthologs.tsv.gz")
    assert any(
        "55 of 65 genes have a one-to-one ortholog" in note and "10 not in the table" in note
        for note in report.notes
    )


def test_mouse_joins_human_and_resumes(table, tmp_path):
    human = write_as(make_adata(40, 1), "csr", tmp_path, "human")
    mouse = write_as(mouse_of(make_adata(40, 2)), "csr", tmp_path, "mouse")
    run([human], tmp_path / "store")
    first = run([mouse], tmp_path / "store", orthologs=str(table))
    assert {each["name"] for each in first.studies} == {"human", "mouse"}
    assert first.kept == ()
    assert run([mouse], tmp_path / "store", orthologs=str(table)).kept == ("mouse",)
    assert run([human], tmp_path / "store").kept == ("human",)
    # Another table makes another study.
    before = matrix(tmp_path / "store", "mouse")
    write(pairs_of(VOCABULARY).iloc[:30], table)
    changed = run([mouse], tmp_path / "store", orthologs=str(table))
    assert changed.kept == ()
    after = matrix(tmp_path / "store", "mouse").loc[before.index]
    assert not after.iloc[:, 30:].to_numpy().any()
    assert (after.iloc[:, :30] == before.iloc[:, :30]).all(axis=None)


def test_the_columns_of_a_table_are_a_part_of_the_study(table, tmp_path):
    rows = pairs_of(VOCABULARY)
    write(rows.assign(other=rows["human"].iloc[::-1].tolist()), table)
    mouse = write_as(mouse_of(make_adata(40)), "csr", tmp_path, "mouse")
    for target, kept in (("human", ()), ("human", ("mouse",)), ("other", ())):
        options = {"orthologs": str(table), "ortholog_columns": ("mouse", target)}
        assert run([mouse], tmp_path / "store", **options).kept == kept


@pytest.mark.parametrize("change", [Path.unlink, lambda path: write(pairs_of(VOCABULARY).iloc[:30], path)])
def test_a_table_that_changes_while_the_ingest_runs(change, table, tmp_path, monkeypatch):
    """It is read once, so that a study is what its digest says."""
    before = table.read_bytes()
    inputs = [write_as(mouse_of(make_adata(40, i)), "csr", tmp_path, name) for i, name in enumerate("ab")]
    original = ingest_jobs.ingest_input

    def slow(*args, **kwargs):
        if table.exists():
            change(table)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ingest_jobs, "ingest_input", slow)
        report = run(inputs, tmp_path / "store", orthologs=str(table))
    assert [each["n_genes_matched"] for each in report.studies] == [55, 55]
    table.write_bytes(before)
    assert run(inputs, tmp_path / "store", orthologs=str(table)).kept == ("a", "b")


@pytest.mark.slow
def test_processes_have_the_table(table, tmp_path):
    inputs = [write_as(mouse_of(make_adata(40, i)), "csr", tmp_path, name) for i, name in enumerate("ab")]
    for processes in (1, 2):
        run(inputs, tmp_path / f"store{processes}", orthologs=str(table), processes=processes)
    assert files_of(tmp_path / "store1") == files_of(tmp_path / "store2")


def test_a_refused_ingest_leaves_the_store_as_it_was(table, tmp_path):
    store = tmp_path / "store"
    human = write_as(make_adata(40, 1), "csr", tmp_path, "human")
    mouse = write_as(mouse_of(make_adata(40, 2)), "csr", tmp_path, "mouse")
    rest = write_as(mouse_of(make_adata(40, 4)), "csr", tmp_path, "rest")
    run([mouse, rest], store, orthologs=str(table), test=("mouse",))
    before = Store.open(store).manifest
    with pytest.raises(DataError, match="1 of 2 inputs"):
        run([human, mouse], store)
    assert Store.open(store).manifest == before
    with pytest.raises(DataError):
        run([mouse], store, skip_bad=True)
    assert Store.open(store).manifest == before
    report = run([human, mouse], store, skip_bad=True)
    assert list(report.refused) == [str(mouse)]
    assert "mouse was not updated and keeps its earlier content" in report.notes
    assert [(each.name, each.split) for each in Store.open(store).studies] == [
        ("human", "train"),
        ("mouse", "test"),
        ("rest", "train"),
    ]
    assert Store.open(store).study("mouse").record == before["studies"][0]
    assert run([mouse], store, orthologs=str(table)).kept == ("mouse",)
    # Where another study was replaced the old manifest is not true any more.
    write_as(make_adata(50, 3), "csr", tmp_path, "human")
    with pytest.raises(DataError, match="1 of 2 inputs"):
        run([human, mouse], store)
    with pytest.raises(StoreError, match=r"manifest\.json"):
        Store.open(store)
    run([human, mouse], store, skip_bad=True)
    assert [each.n_cells for each in Store.open(store).studies] == [50, 40, 40]


def test_options_of_ingests_without_a_table_mean_what_they_meant():
    """Stores that were made before are not made again."""
    assert IngestOptions().digest() == "cb61f37b86df4ccb"


def test_human_files_and_bad_tables_are_refused(table, tmp_path):
    human = write_as(make_adata(40, 1), "csr", tmp_path, "human")
    mouse = write_as(mouse_of(make_adata(40, 2)), "csr", tmp_path, "mouse")
    with pytest.raises(DataError, match=r"human\.h5ad: .*toy"):
        run([human], tmp_path / "store", orthologs=str(table))
    with pytest.raises(DataError, match="1 of 2 inputs"):
        run([human, mouse], tmp_path / "store", orthologs=str(table))
    with pytest.raises(DataError, match=r"none\.tsv"):
        run([mouse], tmp_path / "other", orthologs=str(tmp_path / "none.tsv"))
    assert not (tmp_path / "other").exists()
    for columns in (("mouse",), ("mouse", "human")):
        with pytest.raises(ConfigError, match="ortholog_columns"):
            IngestOptions(orthologs=None if len(columns) > 1 else "x", ortholog_columns=columns)


def test_two_columns_of_one_gene(table, tmp_path):
    human = make_adata(40)
    mouse = mouse_of(human)
    mouse.var_names = [mouse_id(0) if name == f"{mouse_id(7)}.2" else name for name in mouse.var_names]
    inputs = [write_as(mouse, "csr", tmp_path)]
    words = (
        rf"sample\.h5ad: 1 genes .* index \(Ensembl ids\) \({mouse_id(0)}.* and {mouse_id(0)}.* for ENSG.*with "
        'duplicates="sum"'
    )
    with pytest.raises(DataError, match=words):
        run(inputs, tmp_path / "store", orthologs=str(table))
    run(inputs, tmp_path / "store", orthologs=str(table), duplicates="sum")
    found, genes = matrix(tmp_path / "store"), list(VOCABULARY.ensembl_ids)
    counts = human.to_df().loc[found.index]
    assert (found[0] == counts[genes[0]] + counts[genes[7]]).all()
    assert not found[7].any()


@pytest.mark.slow
def test_command_line(table, tmp_path):
    genes = tmp_path / "toy.tsv"
    VOCABULARY.save(genes)
    mouse = write_as(mouse_of(make_adata(40)), "csr", tmp_path, "mouse")
    flags = (f"--input={mouse}", f"--output={tmp_path / 'store'}", f"--genes={genes}")
    refused = command(*flags)
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr
    done = command(*flags, f"--orthologs={table}", "--ortholog_columns=mouse,human")
    assert done.returncode == 0, done.stderr
    assert "one-to-one ortholog in orthologs.tsv.gz" in done.stdout.replace("\n", " ")
    record = json.loads((tmp_path / "store/studies/mouse.json").read_text())
    assert record["n_genes_matched"] == 55
