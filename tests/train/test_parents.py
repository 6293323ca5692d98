"""A run trains the runs that it builds on, resumes and reuses them, and refuses folders that are something else."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest

from sct.errors import ConfigError, FolderInUseError, StoreError
from sct.folder_lock import only_one
from sct.train import experiment, parents, resume
from sct.train.checkpoint import RunProgress
from sct.train.experiment import run
from sct.train.loop import TrainResult
from sct.weights import run_folder

from .conftest import merged, read_log, without_times
from .test_loop import wait_for_step

ROOT = Path(__file__).resolve().parents[2]
SHORT = {"train__steps": 4, "train__eval_every": 2, "train__checkpoint_every": 2}


@pytest.fixture
def pair(config, tmp_path):
    """Function that gives a configuration that starts from the model of another run."""

    def make(**changes: Any) -> dict[str, Any]:
        first = str(tmp_path / "first")
        entry = {"option": "init_from", "workdir": first, "config": config(**{**SHORT, **changes})}
        return {**config(**SHORT), "init_from": first, "builds_on": {"first_stage": entry}}

    return make


def test_only_the_models_that_options_name_are_trained(pair, tmp_path):
    values, builds_on = parents.split(pair())
    assert "builds_on" not in values
    assert [(each.name, each.option, each.folder) for each in builds_on] == [
        ("first_stage", "init_from", tmp_path / "first")
    ]
    values, builds_on = parents.split({**pair(), "init_from": "elsewhere"})
    assert (values["init_from"], builds_on) == ("elsewhere", ())
    assert parents.split({"model": "x"}) == ({"model": "x"}, ())
    entry = pair()["builds_on"]["first_stage"]
    for wrong, word in (
        ({"a": {"option": "x"}}, "workdir"),
        ([1], "builds_on"),
        ({"a": 1}, r"builds_on\.a"),
        ({"a": {**entry, "config": "sct_sc"}}, r"builds_on\.a\.config"),
        ({"a": {**entry, "option": "init_form"}}, r"builds_on\.a\.option.*init_form"),
        ({"a": {**entry, "option": "init_from.model"}}, r"builds_on\.a\.option"),
    ):
        with pytest.raises(ConfigError, match=word):
            parents.split({**values, "builds_on": wrong})


def test_one_folder_may_be_written_in_several_ways(pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    entry = {**pair()["builds_on"]["first_stage"], "workdir": "runs/x"}
    same = (
        "runs/x",
        "./runs/x",
        "runs/x/",
        "runs//x",
        "~/runs/x",
        "runs/y/../x",
        str(tmp_path / "runs" / "x"),
    )
    others = ("", None, "runs", "runs/x/model", "~nobody_has_this_name/runs/x")
    found = {
        named: len(parents.split({**pair(), "init_from": named, "builds_on": {"a": entry}})[1])
        for named in (*same, *others)
    }
    assert found == {**dict.fromkeys(same, 1), **dict.fromkeys(others, 0)}


def test_a_run_that_another_process_finished_is_not_trained_again(pair, monkeypatch, capsys):
    """The other process finishes between the first look at the folder and the lock."""
    answers = [False, True]
    monkeypatch.setattr(parents.ParentRun, "is_ready", lambda parent: answers.pop(0))
    monkeypatch.setattr(experiment, "_run", lambda *arguments: pytest.fail("trained again"))
    assert experiment.train_parents(parents.split(pair())[1]) is None
    assert not answers
    assert not capsys.readouterr().out


def test_only_one_result_is_in_memory(pair, config, tmp_path, monkeypatch):
    """The model of the first run is freed before the second run is trained."""
    first = pair()["builds_on"]["first_stage"]
    entries = {name: {**first, "workdir": str(tmp_path / name), "option": name} for name in "ab"}
    living: list[weakref.ref[Any]] = []

    def trained(spec: Any, workdir: Path) -> Any:
        gc.collect()
        assert not [each for each in living if each() is not None]
        result = TrainResult(None, RunProgress(), "finished")
        living.append(weakref.ref(result))
        return result

    monkeypatch.setattr(experiment, "_run", trained)
    monkeypatch.setattr(experiment.processes, "check_shared", lambda path: None)
    options = {name: entry["workdir"] for name, entry in entries.items()}
    assert experiment.train_parents(parents.split({**options, "builds_on": entries})[1]) is None
    assert len(living) == 2


def test_a_folder_that_is_something_else_is_refused_before_training(pair, tmp_path):
    first = tmp_path / "first"
    first.mkdir()
    (first / "thesis.docx").write_text("")
    with pytest.raises(ConfigError, match=r"init_from is .*first.*neither"):
        run(pair(), tmp_path / "second")
    assert [file.name for file in first.iterdir()] == ["thesis.docx"]
    shutil.rmtree(first)
    first.write_text("")
    with pytest.raises(ConfigError, match=r"init_from is .*first.*neither"):
        run(pair(), tmp_path / "second")
    first.unlink()
    with (
        only_one(first, "training", "--workdir"),
        pytest.raises(FolderInUseError, match=r"--config\.init_from"),
    ):
        run(pair(), tmp_path / "second")
    assert not (tmp_path / "second").exists()
    # Mistakes in the second stage are found before the first stage is trained.
    with pytest.raises(StoreError, match="nowhere"):
        run(merged(pair(), data__store="nowhere"), tmp_path / "second")
    assert not first.exists()


@pytest.mark.slow
def test_what_a_run_builds_on_is_trained_resumed_and_reused(pair, tmp_path, capfd, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    stopped = run(pair(train__stop_at=2), second)
    assert (stopped.reason, stopped.progress.step) == ("stop_at", 2)
    assert f"init_from is {first}, which does not exist yet: training it first" in capfd.readouterr().out
    assert run_folder.steps(first) == [2]
    assert not run_folder.steps(second)

    with pytest.raises(ConfigError, match=r"init_from is .*first, an unfinished run .*peak_lr"):
        run(pair(optimizer__peak_lr=2e-3), second)
    assert run(pair(), second).reason == "finished"
    said = capfd.readouterr().out
    assert f"init_from is {first}, which is not finished: resuming it first" in said
    assert "resuming from step 2" in said
    assert resume.is_finished(first)
    assert resume.is_finished(second)
    assert '"builds_on"' not in (second / "config.json").read_text()

    # A finished one is reused, whatever its options; so is a model folder. A run that goes on needs neither.
    log = read_log(first)
    third = run(pair(optimizer__peak_lr=2e-3, train__steps=9), tmp_path / "third")
    assert without_times(read_log(tmp_path / "third")) == without_times(read_log(second))
    assert read_log(first) == log
    shutil.copytree(first / "model", tmp_path / "model")
    shutil.rmtree(first)
    again = run(pair(), second)
    assert again.progress.step == third.progress.step == 4
    shutil.move(tmp_path / "model", first)
    assert run(pair(), tmp_path / "fourth").reason == "finished"
    assert "first" not in capfd.readouterr().out.replace(str(tmp_path), "")


@pytest.mark.slow
def test_a_run_that_was_killed_before_its_first_checkpoint_is_begun_again(pair, tmp_path, monkeypatch):
    def killed(*arguments: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "train", killed)
        with pytest.raises(MemoryError):
            run(pair(), tmp_path / "second")
    assert (tmp_path / "first" / "config.json").is_file()
    assert run(pair(), tmp_path / "second").reason == "finished"


@pytest.mark.slow
@pytest.mark.parametrize(("asked", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train", ["--config=zeromics_llm:quickstart", "--workdir=second"]),
        ("benchmark", ["--config=benchmark_zeromics:quick", "--config.output=second"]),
    ],
)
def test_stopping_in_the_first_training_is_continued_by_the_same_command(
    tmp_path, command, words, asked, status
):
    """The quick starts as a new user runs them, stopped in the first training."""
    section = (
        "builds_on.cell_model.config"
        if command == "train"
        else "builds_on.model.config.builds_on.cell_model.config"
    )
    words = [*words, f"--config.{section}.train.log_every=1", f"--config.{section}.model.num_layers=1"]
    folder = tmp_path / "runs" / "zeromics_sc"
    program = [sys.executable, "-m", f"launch.{command}", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        program, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        wait_for_step(folder, 2, process)
        process.send_signal(asked)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == status, output
    assert "Traceback" not in output
    assert "runs/zeromics_sc, which does not exist yet: training it first" in output
    assert "to resume" in output
    assert "start over" not in output
    (step,) = run_folder.steps(folder)
    assert not resume.is_finished(folder)
    assert f"saving step {step}" in output
