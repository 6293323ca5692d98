"""`sct.tl.benchmark`: what it writes, on what, and what it refuses."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import sparse

import sct
from sct.benchmarks import instructions, zero_shot
from sct.benchmarks.zero_shot import BenchmarkOptions, ZeroShotData, open_cells, part_of
from sct.commands import benchmark as command
from sct.data.coordinates import rescale_coordinates
from sct.data.genes.vocabulary import GeneVocabulary
from sct.data.ingest.build import IngestOptions, ingest
from sct.errors import ConfigError, DataError, StoreError, TrainingStoppedError
from sct.inference import inputs
from tests.tl.conftest import made, slide

ROOT = Path(__file__).resolve().parents[2]
CONFIG = runpy.run_path(str(ROOT / "configs" / "benchmark.py"))["get_config"]


def config(output: Path, **changes):
    """The quick configuration with changes, given as `section__field=value`."""
    values = CONFIG("quick").to_dict() | {"output": str(output)}
    values["embedding"]["run"] = False
    for name, value in changes.items():
        section, _, field = name.partition("__")
        if field:
            values[section][field] = value
        else:
            values[section] = value
    return values


def numbers(output: Path) -> dict:
    return json.loads((output / "results.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of everything that needs no optional package, on cells with labels, batches and positions."""
    output = tmp_path_factory.mktemp("benchmark") / "out"
    cells = slide()
    cells.obs["cell_type"] = np.array(["T", "B", "NK"])[np.arange(cells.n_obs) % 3]
    settings = config(output, seeds=2, embedding__run=True, embedding__folds=2, data__batch_key="batch")
    reports = sct.tl.benchmark(settings, cells, made(use_spatial=True))
    return output, reports


@pytest.mark.slow
def test_every_protocol_has_its_tables(whole):
    output, reports = whole
    titles = [report.title for report in reports]
    for words in (
        "15% masked genes",
        "80% masked genes",
        "1 of 6 cells",
        "5 of 6 cells",
        "low sparsity",
        "very high",
    ):
        assert sum(words in title for title in titles) == 1, (words, titles)
    assert {path.name for path in output.iterdir() if path.name != ".lock"} == {
        "report.md",
        "report.json",
        "report.html",
        "results.json",
    }


@pytest.mark.slow
def test_every_row_has_numbers_of_every_seed_or_a_reason(whole):
    _, reports = whole
    for report in reports:
        remark = report.keys.index("remark")
        for row in report.rows:
            measured = [cell for cell in row if isinstance(cell, list)]
            seeds = {2} if "delta_mcc" in report.keys else {1, 2}
            assert (measured and all(len(cell) in seeds for cell in measured)) or row[remark], row
    imputation = [report for report in reports if "delta_mcc" in report.keys]
    for report in imputation:
        assert "most common expressed level" in report.rows[0][0]
        assert report.row_keys[0] == "reference"
        assert "model" in report.row_keys
        assert any("training studies" in row[1] and row[-1] for row in report.rows), (
            "no training studies: a reason"
        )


@pytest.mark.slow
def test_the_page_and_the_facts(whole):
    output, _ = whole
    page = (output / "report.html").read_text()
    assert page.count("<svg") >= 5
    for fact in ("command", "seeds", "time", "jax", "license of the model"):
        assert fact in numbers(output)["facts"]
        assert fact in page
    measured = numbers(output)["embedding"]["cells"]
    assert all(measured[f"model, {name}"] for name in ("mean", "flat", "conv"))


@pytest.mark.slow
def test_what_was_measured_before_a_stop_is_kept(adata, tmp_path, monkeypatch):
    def stopped(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("sct.eval.imputation.protocols.whole_cell_imputation", stopped)
    with pytest.raises(KeyboardInterrupt):
        sct.tl.benchmark(config(tmp_path / "out", model="", seeds=1), adata)
    kept = json.loads((tmp_path / "out" / "unfinished.json").read_text())
    assert [each["protocol"] for each in kept["imputation"]] == [
        "natural imputation",
        "natural imputation of whole genes",
        "gene imputation",
    ]
    assert len(kept["reports"]) >= 6
    monkeypatch.undo()
    settings = config(
        tmp_path / "out", model="", seeds=1, gene_imputation__run=False, cell_imputation__run=False
    )
    sct.tl.benchmark(settings, adata, overwrite=False)  # what is unfinished is in nobody's way
    assert not (tmp_path / "out" / "unfinished.json").exists()
    assert len(numbers(tmp_path / "out")["imputation"]) < 4


@pytest.mark.slow
def test_the_same_call_gives_the_same_numbers(adata, model, tmp_path):
    settings = config(tmp_path / "out", gene_imputation__ratios=(0.3,), cell_imputation__run=False)
    sct.tl.benchmark(settings, adata, model)
    natural, protocol, *_ = numbers(tmp_path / "out")["imputation"]
    assert natural["protocol"] == "natural imputation"
    rows = [each["settings"][0]["rows"] for each in (natural, protocol)]
    for each in rows:
        assert len({len(row["mcc"]) for row in each if row.get("mcc")}) == 1
    again = tmp_path / "again"
    sct.tl.benchmark({**settings, "output": str(again)}, adata, model)
    assert numbers(again)["imputation"] == numbers(tmp_path / "out")["imputation"]


@pytest.mark.slow
def test_a_store_has_its_own_training_studies(adata, model, tmp_path):
    inputs = [("a", adata[:20].copy()), ("b", adata[20:].copy())]
    ingest(inputs, tmp_path / "store", vocabulary=model.genes, options=IngestOptions(test=("b",)))
    settings = config(tmp_path / "out", data__path=str(tmp_path / "store"))
    reports = sct.tl.benchmark(settings, model=model)
    assert "Natural imputation" in reports[0].title
    masked = next(report for report in reports if "masked genes" in report.title)
    common = [row for row in masked.rows if row[1] == "training studies" and "common" in row[0]]
    assert len(common) == 2
    assert all(isinstance(row[3], list) for row in common)
    with pytest.raises(DataError, match="split 'validation'"):
        sct.tl.benchmark(
            config(tmp_path / "x", data__path=str(tmp_path / "store"), data__split="validation"), model=model
        )


def test_every_readout_is_a_row_beside_components_of_the_training_cells(model, tmp_path, monkeypatch):
    cells = slide()
    cells.obs["cell_type"] = np.array(["T", "B", "NK"])[np.arange(cells.n_obs) % 3]
    inputs = [("a", cells[:20].copy()), ("b", cells[20:].copy())]
    ingest(inputs, tmp_path / "store", vocabulary=model.genes, options=IngestOptions(test=("b",)))
    none = {f"{part}_imputation__run": False for part in ("natural", "gene", "cell")}
    settings = config(
        tmp_path / "out", data__path=str(tmp_path / "store"), embedding__run=True, embedding__folds=2,
        fixed_genes__run="never", **none,
    )  # fmt: skip
    fitted = sct.tl.fit_readout(model, tmp_path / "store", dim=4)
    (report,) = sct.tl.benchmark(settings, model=fitted)
    rows = {row[0]: row for row in report.rows}
    names = ["model, mean", "model, flat", "model, conv", "model, fitted", "zero-shot PCA"]
    assert list(rows)[:5] == names
    assert all(len(rows[name][2]) == 1 for name in names)
    assert [rows[name][1] for name in names[2:]] == [
        "nothing (zero-shot)",
        "training studies",
        "training studies",
    ]
    assert any("default readout of the model is mean" in note for note in report.notes)
    recorded = sct.tl.record_benchmark(fitted, tmp_path / "out")
    best = max(names[:4], key=lambda name: rows[name][2][0])
    assert rows[f"model, {recorded.embedding['default']}"][2] == rows[best][2]
    assert recorded.embedding["measured"][0]["components"] == pytest.approx(
        rows["zero-shot PCA"][2][0], abs=1e-4
    )
    with monkeypatch.context() as patch:
        patch.setattr("sct.inference.readouts.os.sysconf", lambda name: 100)
        (report,) = sct.tl.benchmark(settings, model=fitted)
    assert [row[0] for row in report.rows][:3] == ["model, mean", "model, fitted", "zero-shot PCA"]
    assert any("not measured: flat, conv" in note for note in report.notes)
    settings["embedding"] |= {"readouts": ("flat",), "training_cells": 0}
    (report,) = sct.tl.benchmark(settings, model=fitted)
    assert [row[0] for row in report.rows][:2] == ["model, flat", "PCA"]


def test_baselines_without_a_model_and_studies_of_a_file(adata, tmp_path):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    vocabulary = GeneVocabulary.human().subset(list(adata.var_names))
    vocabulary.save(tmp_path / "genes.tsv")
    files = {"data__path": str(tmp_path / "cells.h5ad"), "genes": str(tmp_path / "genes.tsv")}
    settings = config(tmp_path / "out", data__study_key="batch", data__cells_per_bag=5, **files)
    reports = sct.tl.benchmark(settings)
    assert not any("model" in report.row_keys for report in reports)
    assert "cells.a" in numbers(tmp_path / "out")["facts"]["cells"]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({}, ConfigError, "data.path is not set"),
        ({"data__path": "nowhere.h5ad"}, DataError, "nowhere.h5ad"),
        ({"data__path": "x", "seeds": 0}, ConfigError, "seeds"),
        ({"data__path": "x", "data__split": "eval"}, ConfigError, "data.split"),
        ({"data__path": "x", "gene_imputation__ratios": (1.5,)}, ConfigError, "ratios"),
        ({"data__path": "x", "fixed_genes__run": "yes"}, ConfigError, "fixed_genes.run"),
        ({"data__path": "x", "data__max_bags": -1}, ConfigError, "max_bags"),
        ({"data__path": "x", "speed": 1}, ConfigError, "'speed'"),
        ({"data__path": ".", "data__train": "nowhere"}, StoreError, "nowhere"),
    ],
)
def test_wrong_options_are_a_sentence(tmp_path, changes, error, words):
    with pytest.raises(error, match=words):
        sct.tl.benchmark(config(tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_what_cannot_run_is_a_row_and_the_rest_runs(adata, model, tmp_path):
    del adata.obs["cell_type"]
    settings = config(tmp_path / "out", data__cells_per_bag=1, embedding__run=True, fixed_genes__run="never")
    before = adata.copy()
    reports = sct.tl.benchmark(settings, adata, model)
    reasons = {report.title: report.rows[0][1] for report in reports if report.keys == ("method", "remark")}
    assert "cells_per_bag` is 1" in reasons["Imputation of whole cells"]
    assert "has no column 'cell_type'" in reasons["Embedding, cells"]
    assert any("15% masked genes" in report.title for report in reports)
    assert set(adata.obsm) == set(before.obsm)
    assert set(adata.uns) == set(before.uns)


def test_at_most_so_many_cells_and_neighbours_stay_neighbours(adata, tmp_path):
    from sct.benchmarks.zero_shot import ZeroShotData, _divided

    ((_, part),) = _divided(adata, ZeroShotData(max_cells=9), "cells")
    places, kept = adata.obsm["spatial"], adata.obs_names.isin(part.obs_names)
    assert part.n_obs == 9
    assert places[kept].std(axis=0).sum() < 0.7 * places.std(axis=0).sum()
    ((_, drawn),) = _divided(adata, ZeroShotData(max_cells=9, spatial_key="no"), "cells")
    assert drawn.n_obs == 9
    assert list(drawn.obs_names) != list(adata.obs_names[:9])


def test_a_batch_key_that_is_not_there(adata, model, tmp_path):
    with pytest.raises(DataError, match="'lab'"):
        sct.tl.benchmark(config(tmp_path / "out", data__batch_key="lab"), adata, model)


def test_the_configuration_and_the_options_have_the_same_fields():
    import dataclasses

    written = CONFIG().to_dict()
    for field in dataclasses.fields(BenchmarkOptions):
        value = written.pop(field.name)
        if isinstance(value, dict):
            factory = field.default_factory
            assert value == dataclasses.asdict(factory()), field.name
        else:
            assert value == field.default, field.name
    assert not written


@pytest.mark.slow
def test_a_part_of_a_section_is_measured_as_it_lies_in_the_whole():
    cells = slide()
    del cells.obs["batch"]
    counts = cells.X.toarray()
    counts[::5] = 0  # left out
    cells.X = sparse.csr_matrix(counts)
    whole = rescale_coordinates(cells.obsm["spatial"])
    model = made(use_spatial=True)
    for key, most in (("", 0), ("", 20), ("half", 10)):
        cells.obs["half"] = np.where(np.arange(cells.n_obs) < 22, "a", "b")
        options = ZeroShotData(path="x", max_cells=most, study_key=key)
        (name, study), *more = open_cells(options, cells)[0]
        part = part_of(name, study, model.vocabulary, options)
        at = cells.obs_names.get_indexer(part.adata.obs_names)
        expected = whole if not key else rescale_coordinates(cells.obsm["spatial"][:22])
        places = part.table.sections[0].places
        np.testing.assert_array_equal(places, expected[at])
        assert len(at) == len(places) <= (most or 36)
        again = inputs.sections(part.adata, None, "spatial")  # as sct.tl.embed divides them
        np.testing.assert_array_equal(again[0].places, places)
        assert len(more) == bool(key)


def stopped_training(reason):
    """A training of a needed model that stopped, in the place of `train_parents`."""
    return lambda builds_on: SimpleNamespace(reason=reason, progress=SimpleNamespace(step=7))


def test_mistakes_in_the_cells_are_found_before_a_model_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(zero_shot, "train_parents", lambda builds_on: pytest.fail("trained first"))
    settings = config(
        tmp_path / "out", data__path=str(tmp_path / "nowhere.h5ad"), model=str(tmp_path / "run")
    )
    with pytest.raises(DataError, match=r"nowhere\.h5ad"):
        sct.tl.benchmark(settings)
    with pytest.raises(DataError, match="no_such_batch"):
        sct.tl.benchmark(config(tmp_path / "out", data__batch_key="no_such_batch"), slide())
    questions = runpy.run_path(str(ROOT / "configs" / "benchmark_zeromics.py"))["get_config"](
        "quick"
    ).to_dict()
    questions |= {"output": str(tmp_path / "out")}
    questions["data"] |= {"dataset": "", "path": str(tmp_path / "nowhere.h5ad")}
    with pytest.raises(DataError, match=r"nowhere\.h5ad"):
        instructions.benchmark(questions)


def test_a_stopped_training_is_an_error_of_the_library_and_a_status_of_the_command(monkeypatch, tmp_path):
    for reason, status in (("signal", 75), ("stop_at", 0)):
        monkeypatch.setattr(zero_shot, "train_parents", stopped_training(reason))
        with pytest.raises(TrainingStoppedError, match="step 7") as caught:
            sct.tl.benchmark(config(tmp_path / "out"), slide())
        assert caught.value.reason == reason
        settings = config(tmp_path / "out", data__path="cells.h5ad")
        values = SimpleNamespace(value=SimpleNamespace(to_dict=lambda settings=settings: settings))
        monkeypatch.setattr(command, "_CONFIG", values)
        monkeypatch.setattr(command, "_OUTPUT", SimpleNamespace(value=None))
        monkeypatch.setattr(command.output_flags, "OVERWRITE", SimpleNamespace(value=True))
        monkeypatch.setattr(zero_shot, "open_cells", lambda data, adata: ([], None))
        assert command.main(["benchmark"]) == status
    monkeypatch.setattr(zero_shot, "train_parents", stopped_training("interrupt"))
    with pytest.raises(KeyboardInterrupt):
        sct.tl.benchmark(config(tmp_path / "out"), slide())
