"""Sweeps: which runs there are, that they resume, that one failure does not end the others, and the table."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest

from sct.errors import ConfigError, StoreError
from sct.eval.imputation import scoring
from sct.eval.reports import folder as report_folder
from sct.train import experiment, loop, sweep
from sct.train.checkpoint import RunProgress

SWEEP = {
    "norm_none": {"model": {"norm": "none"}},
    "cells_2": {"data": {"cells_per_bag": 2}, "train": {"batch_size": 4}},
    "bins_7": {"model": {"num_bins": 7}},
}


@pytest.fixture
def swept(config):
    """Function that gives the small configuration with a sweep, three steps long."""

    def make(**runs):
        plain = config(
            model__norm="shared",
            model__num_downsamples=1,
            model__num_bins=5,
            train__steps=3,
            train__eval_every=3,
            objective__report_bags=2,
        )
        return {**plain, "sweep": {**SWEEP, **runs}}

    return make


def trained(monkeypatch) -> list[str]:
    """Names of the runs that are trained from now on."""
    names: list[str] = []
    original = experiment.run

    def noted(config, workdir):
        names.append(Path(workdir).name)
        return original(config, workdir)

    monkeypatch.setattr(experiment, "run", noted)
    return names


def rows_of(folder: Path) -> list[dict[str, list]]:
    """Of both tables: name of a run -> its other cells."""
    content = json.loads((folder / "report.json").read_text())
    return [{row[0]: row[1:] for row in each["rows"]} for each in content]


def test_a_run_is_the_base_with_its_own_fields(swept):
    config = swept()
    runs = sweep.configurations(config)
    assert list(runs) == ["base", *SWEEP]
    base = runs["base"]
    assert base == {name: value for name, value in config.items() if name != "sweep"}
    for name, change in SWEEP.items():
        for section in base:
            expected = base[section]
            if section in change:
                expected = {**expected, **change[section]}
            assert runs[name][section] == expected, (name, section)


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        ({"x": {"model": {"no_such_field": 1}}}, r"sweep\.x\.model\.no_such_field is 1.*norm"),
        ({"x": {"model": 3}}, r"sweep\.x\.model is 3.*num_genes"),
        ({"x": {"model": {"norm": {"kind": "none"}}}}, r"sweep\.x\.model\.norm"),
        ({"base": {}}, "'base'"),
        ({"a/b": {}}, "'a/b'"),
        ({"..": {}}, r"'\.\.'"),
        ({"x": 1}, "run names"),
    ],
)
def test_a_sweep_that_cannot_be_is_one_sentence(swept, tmp_path, runs, words):
    with pytest.raises(ConfigError, match=words) as caught:
        sweep.run(swept(**runs), tmp_path / "sweep")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "sweep").exists()


def test_the_folder_of_a_run_lies_in_that_of_the_sweep(swept):
    accepted = []
    for name in ("", ".", "..", "../x", "/x", "a/b", "a\\b", ".a", "-a", "a\n", "a\0", "ä", "a" * 300):
        try:
            sweep.configurations(swept(**{name: {}}))
            accepted.append(name)
        except ConfigError as error:
            accepted += [] if "is named" in str(error) else [name]
    assert not accepted
    assert "a.b-2_C" in sweep.configurations(swept(**{"a.b-2_C": {}}))


def test_an_unknown_run_is_answered_with_the_nearest(swept, tmp_path):
    with pytest.raises(ConfigError, match=r"'bin_7'.*'bins_7'"):
        sweep.run(swept(), tmp_path / "sweep", ["base", "bin_7"])
    assert not (tmp_path / "sweep").exists()


def test_data_that_is_not_there_is_told_once(swept, tmp_path):
    config = swept()
    with pytest.raises(StoreError, match="no/such/store"):
        sweep.run({**config, "data": {**config["data"], "store": "no/such/store"}}, tmp_path / "sweep")
    with pytest.raises(ConfigError, match=r"data\.store"):
        sweep.run({**config, "data": {**config["data"], "store": ""}}, tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


@pytest.mark.slow
def test_a_sweep_resumes_skips_and_survives_a_failure(swept, tmp_path, monkeypatch):
    names = trained(monkeypatch)
    config = swept(wrong={"data": {"cells_per_bag": 100}})
    first = sweep.run(config, tmp_path, ["wrong", "base"])
    assert (first.reason, names) == ("failed", ["base", "wrong"])
    assert {
        name: state for name, state in first.states.items() if name not in ("base", "wrong")
    } == dict.fromkeys(SWEEP, "not trained yet")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "base").rglob("*") if path.is_file()}
    for table in rows_of(tmp_path):
        assert table["cells_2"] == [[], [], [], "not trained yet"]
        assert table["wrong"][:3] == [[], [], []]
        assert "cells_per_bag is 100" in table["wrong"][-1]
        assert len(table["base"][0]) == 1

    # The failed run is mended; a finished one is left alone, and refused other options in its row.
    config["sweep"]["wrong"]["data"]["cells_per_bag"] = 2
    assert sweep.run(config, tmp_path, ["base", "wrong"]).reason == "finished"
    assert names == ["base", "wrong", "wrong"]
    assert before == {path: path.stat().st_mtime_ns for path in before}
    base = json.loads((tmp_path / "base" / "report.json").read_text())
    tables = base["reports"] if isinstance(base, dict) else base
    base = next(table for table in tables if "given_expressed" in table["keys"])
    own = {
        row[base["keys"].index("given_expressed")]: row
        for key, row in zip(base["row_keys"], base["rows"], strict=True)
        if key == "model"
    }
    for told, table in zip(("no", "yes"), rows_of(tmp_path), strict=True):
        assert list(table)[:5] == ["base", *SWEEP, "wrong"]
        assert len(table) > 5, "the baselines of the base are in the table"
        assert table["base"][0] == own[told][base["keys"].index("mcc")]
        assert "other positions are masked" in table["wrong"][-1]
    assert "not trained yet" in (tmp_path / "report.md").read_text()
    config["optimizer"]["peak_lr"] = 0.5
    changed = sweep.run(config, tmp_path, ["base"])
    assert changed.reason == "failed"
    assert "optimizer.peak_lr = 0.001, but the configuration has 0.5" in changed.states["base"]
    with pytest.raises(ConfigError, match="a sweep needs"):
        sweep.run(swept(), tmp_path / "base")


def test_a_damaged_run_does_not_end_the_sweep(swept, tmp_path, monkeypatch):
    names: list[str] = []

    def refused(config, workdir):
        names.append(Path(workdir).name)
        raise ConfigError("not trained here.")

    monkeypatch.setattr(experiment, "run", refused)
    for name in ("base", "bins_7"):
        folder = tmp_path / name
        for file in ("config.json", "report.json", "model/config.json", "checkpoints/3/progress/metadata"):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text("{")
    ended = sweep.run(swept(), tmp_path, ["base", "cells_2"])
    assert (ended.reason, names) == ("failed", ["cells_2"])
    for table in rows_of(tmp_path):
        assert all("not valid JSON" in table[name][-1] for name in ("base", "bins_7"))
        assert table["cells_2"][-1] == "not trained here."
        assert table["norm_none"][-1] == "not trained yet"


@pytest.mark.slow
def test_a_signal_stops_the_sweep_which_goes_on_later(swept, tmp_path, monkeypatch):
    names = trained(monkeypatch)
    original = loop.sharding.put_batch
    with monkeypatch.context() as patched:

        def asking(batch, mesh):
            os.kill(os.getpid(), signal.SIGINT)
            return original(batch, mesh)

        patched.setattr(loop.sharding, "put_batch", asking)
        ended = sweep.run(swept(), tmp_path, ["base", "norm_none"])
    assert (ended.reason, names) == ("interrupt", ["base"])
    assert ended.states["base"] == "stopped at step 1"
    assert rows_of(tmp_path)[0]["base"][-1] == "stopped at step 1"
    assert sweep.run(swept(), tmp_path, ["base"]).states["base"] == ""
    lines = (tmp_path / "base" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "train/loss" in line] == [1, 2, 3]


@pytest.mark.parametrize("reason", ["signal", "interrupt"])
def test_no_run_begins_after_a_signal(swept, tmp_path, monkeypatch, reason):
    begun = []

    def stopped(config, workdir):
        begun.append(Path(workdir).name)
        return loop.TrainResult(None, RunProgress(step=7), reason if len(begun) == 2 else "stop_at")

    monkeypatch.setattr(experiment, "run", stopped)
    ended = sweep.run(swept(), tmp_path)
    assert (ended.reason, begun) == (reason, ["base", "norm_none"])
    assert list(ended.states.values()) == ["stopped at step 7"] * 2 + ["not trained yet"] * 2


@pytest.mark.parametrize("facts", [False, True])
def test_the_table_of_finished_runs(tmp_path, swept, facts):
    """Their reports are as version 0.1.0 wrote them first, without keys."""
    columns = ["method", "fitted on", "told expressed", "MCC", "gain over the bar", "MAE (counts)", "remark"]

    def finished(name, mcc):
        rows = [
            ["model", "nothing", "no", [mcc, mcc + 0.1], [-0.2, -0.1], [2.0, None], ""],
            ["model", "nothing", "yes", [mcc + 0.2], [0.1], [1.5], ""],
            ["MAGIC", "these cells", "no", [], [], [], "not installed"],
        ]
        found = [{"title": "Imputation", "columns": columns, "rows": rows}]
        (tmp_path / name).mkdir()
        content = {"facts": {}, "reports": found} if facts else found
        (tmp_path / name / "report.json").write_text(json.dumps(content))

    runs = sweep.configurations(swept())
    for place, name in enumerate(runs):
        finished(name, place / 10)
    no, yes = sweep.tables(tmp_path, runs, dict.fromkeys(runs, "") | {"norm_none": "the disk is full."})
    assert [row[0] for row in no.rows] == [*runs, "(MAGIC, fitted on these cells)"]
    assert [row[0] for row in yes.rows] == [*runs]
    assert no.rows[0][1:3] == [[0.0, 0.1], [-0.2, -0.1]]
    assert np.isnan(no.rows[0][3][1])
    assert no.rows[1][1:] == [[], [], [], "the disk is full."]
    assert no.rows[-1][1:] == [[], [], [], "not installed"]
    assert "7 levels instead of 5" in no.rows[3][-1]
    assert "other positions are masked" in yes.rows[2][-1]
    assert yes.rows[3][1] == [0.5]


def test_changes_may_have_former_names_of_options(swept):
    plain = swept(two={"train": {"accumulate": 2}, "model": {"stem_taps": 7}})
    plain["train"]["grad_accum_steps"], plain["model"]["stem_kernel_size"] = 1, 15
    with pytest.warns(FutureWarning, match="grad_accum_steps"):
        runs = sweep.configurations(plain)
    assert runs["two"]["train"]["grad_accum_steps"] == 2
    assert runs["two"]["model"]["stem_kernel_size"] == 7
    assert "accumulate" not in runs["two"]["train"]


def test_the_table_of_runs_survives_other_titles(tmp_path, swept, monkeypatch):
    """Columns and rows are found by their keys, and what people read may change."""
    runs = sweep.configurations(swept())
    numbers = {"mcc": [0.4, 0.5], "delta_mcc": [0.1, 0.2], "mae": [1.0, 2.0]}
    rows = [
        scoring.ScoreRow("usual level", "other cells", True, "", [0.3], [0.0], [3.0], key="reference"),
        *(
            scoring.ScoreRow("our network", "nothing", given, "", **numbers, key="model")
            for given in (False, True)
        ),
    ]
    seen = []
    for prefix in ("", "x "):
        titled = [dataclasses.replace(each, title=prefix + each.title) for each in scoring.COLUMNS]
        monkeypatch.setattr(scoring, "COLUMNS", titled)
        for name in runs:
            (tmp_path / name).mkdir(exist_ok=True)
            report_folder.write([scoring.Setting("Imputation", 0.4, rows, [9]).report()], tmp_path / name)
        saved = json.loads((tmp_path / "base" / "report.json").read_text())[0]
        assert saved["columns"][3] == f"{prefix}MCC"
        seen.append([table.rows for table in sweep.tables(tmp_path, runs, dict.fromkeys(runs, ""))])
    assert seen[0] == seen[1]
    no, yes = seen[1]
    assert [row[0] for row in no] == [*runs]
    assert [row[0] for row in yes] == [*runs, "(usual level, fitted on other cells)"]
    assert all(row[1:4] == [*numbers.values()] for row in no)
    assert yes[-1][1:4] == [[0.3], [0.0], [3.0]]


@pytest.mark.parametrize("content", ["", '{"facts"', "3", '[{"title": "no columns"}]'])
def test_a_damaged_report_says_what_to_do(tmp_path, swept, content):
    runs = sweep.configurations(swept())
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "report.json").write_text(content)
    (no, _) = sweep.tables(tmp_path, runs, {**dict.fromkeys(runs, "not trained yet"), "base": ""})
    remarks = {row[0]: row[-1] for row in no.rows}
    assert re.search(r"base.report\.json is damaged .*delete this file", remarks.pop("base"))
    assert set(remarks.values()) == {"not trained yet"}
