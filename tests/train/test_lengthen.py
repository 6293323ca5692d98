"""A finished run is lengthened by more steps: no training is lost, and the results are replaced at the end."""

from __future__ import annotations

import json
import shutil

import chex
import pytest

import sct
from sct.errors import ConfigError
from sct.train import experiment, resume, sweep
from sct.train.experiment import run
from sct.train.run_spec import RunSpec
from sct.weights import run_folder

from .conftest import CONFIG, merged, read_log, same, without_times
from .test_loop import recorded

LONG = {"train__eval_every": 5, "train__keep_last": 9, "train__patience": 0}
CONSTANT = {"optimizer__schedule": "constant", **LONG}


@pytest.fixture(scope="module")
def short(store, tmp_path_factory):
    """Folder of a finished run of 10 steps with a constant learning rate, and the batches that it drew."""
    plain = merged(CONFIG, data__store=str(store), model__num_downsamples=1, train__steps=10, **CONSTANT)
    folder = tmp_path_factory.mktemp("short") / "run"
    with pytest.MonkeyPatch.context() as patch:
        batches = recorded(patch)
        run(plain, folder)
    return folder, batches


@pytest.mark.slow
def test_a_lengthened_run_equals_one_that_was_always_as_long(config, short, tmp_path, monkeypatch, capfd):
    """With a constant learning rate: the same batches, the same state of every step, the same log."""
    folder = shutil.copytree(short[0], tmp_path / "run")
    old = {
        name: (folder / name).read_bytes() for name in ("report.json", "report.md", "model/model.safetensors")
    }
    drawn = recorded(monkeypatch)
    whole = run(config(train__steps=20, **CONSTANT), tmp_path / "whole")
    expected = drawn.copy()
    drawn.clear()
    capfd.readouterr()

    assert run(config(train__steps=20, train__stop_at=13, **CONSTANT), folder).reason == "stop_at"
    said = capfd.readouterr().out
    assert "the run had 10 steps and now has 20: at step 10, the learning rate stays 0.001" in said
    # Its old results stay until the new ones are made; but it is not finished.
    assert {name: (folder / name).read_bytes() for name in old} == old
    assert not resume.is_finished(folder)
    longer = run(config(train__steps=20, **CONSTANT), folder)
    assert "now has" not in capfd.readouterr().out
    assert resume.is_finished(folder)
    assert longer.reason == "finished"
    assert short[1] + drawn == expected
    chex.assert_trees_all_equal(whole.state, longer.state, strict=True)
    assert (whole.progress.step, whole.progress.best_step) == (20, longer.progress.best_step)
    assert without_times(read_log(tmp_path / "whole")) == without_times(read_log(folder))
    tables = [json.loads((each / "report.json").read_text()) for each in (tmp_path / "whole", folder)]
    assert tables[0] == tables[1]
    assert tables[0] != json.loads(old["report.json"])
    exported = [sct.load(each / "model") for each in (tmp_path / "whole", folder)]
    assert same(exported[0].variables, exported[1].variables)
    assert "20 steps (finished)" in exported[1].card
    assert json.loads((folder / "config.json").read_text())["resolved_steps"] == 20


@pytest.mark.slow
def test_a_schedule_that_decays_is_computed_anew_and_the_change_is_said(config, short, tmp_path, capfd):
    cosine = {"optimizer__schedule": "cosine", **LONG}
    run(config(train__steps=10, train__stop_at=7, **cosine), tmp_path)
    whole = run(config(train__steps=10, **cosine), tmp_path)
    capfd.readouterr()
    run(config(train__steps=20, train__stop_at=11, **cosine), tmp_path)
    said = capfd.readouterr().out
    assert "the cosine schedule is computed anew for 20 steps" in said
    assert "changes the learning rate from 0 to 0.00075" in said
    rates = {
        line["step"]: line["train/learning_rate"]
        for line in read_log(tmp_path)
        if "train/learning_rate" in line
    }
    assert rates[11] == pytest.approx(0.00075)
    assert rates[10] < 2e-4
    assert whole.progress.step == 10

    # Fewer steps than trained are refused; a run that has not come as far may be shortened.
    with pytest.raises(ConfigError, match=r"trained to step 11 of 20.* 10 steps: .*train\.steps to 11"):
        run(config(train__steps=10, **cosine), tmp_path)
    with pytest.raises(ConfigError, match="asks for 5 steps"):
        run(config(train__steps=5, **cosine), tmp_path)
    assert not resume.is_finished(tmp_path)
    # Exactly the trained number ends the run where it is.
    capfd.readouterr()
    ended = run(config(train__steps=11, **cosine), tmp_path)
    assert (ended.reason, ended.progress.step) == ("finished", 11)
    assert "had 20 steps and now has 11" in capfd.readouterr().out
    assert resume.is_finished(tmp_path)
    assert run(config(train__steps=12, **cosine), tmp_path).progress.step == 12
    assert "had 11 steps and now has 12" in capfd.readouterr().out


@pytest.mark.slow
def test_a_lengthening_that_never_began_is_undone(config, short, tmp_path, monkeypatch):
    """The configuration of the longer run is on disk, but the newest checkpoint is that of the finished run."""
    folder = shutil.copytree(short[0], tmp_path / "run")

    def killed(*arguments, **options):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "train", killed)
        with pytest.raises(MemoryError):
            run(config(train__steps=1000, **CONSTANT), folder)
    assert not resume.is_finished(folder)
    ended = run(config(train__steps=10, **CONSTANT), folder)
    assert (ended.reason, ended.progress.step) == ("finished", 10)
    assert resume.is_finished(folder)
    assert run_folder.steps(folder) == run_folder.steps(short[0])
    reports = [json.loads((each / "report.json").read_text()) for each in (short[0], folder)]
    assert reports[0] == reports[1]


@pytest.mark.slow
def test_a_run_that_stopped_early_says_what_lengthens_it(config, short, tmp_path):
    folder = shutil.copytree(short[0], tmp_path / "run")
    changes = {**CONSTANT, "train__patience": 1}
    path = folder / "checkpoints" / "10" / "progress" / "metadata"
    path.write_text(json.dumps({**json.loads(path.read_text()), "stale": 2}))
    run_folder.record_checkpoint(path.parents[1])
    with pytest.raises(ConfigError, match=r"stopped early at step 10, after 2 .*train\.patience"):
        run(config(train__steps=20, **changes), folder)
    assert run(config(train__steps=11, **CONSTANT), folder).progress.step == 11


@pytest.mark.slow
def test_length_in_tokens_is_compared_in_steps(short, store):
    folder, _ = short
    settings = json.loads((folder / "config.json").read_text())
    plain = merged(CONFIG, data__store=str(store), model__num_downsamples=1, **CONSTANT)
    found = {}
    for name, steps, tokens in (
        ("same", 0, 2_000.0),
        ("longer", 0, 3_000.0),
        ("steps", 10, 0.0),
        ("more", 11, 0.0),
    ):
        spec = RunSpec.of(merged(plain, train__steps=steps, data__tokens=tokens))
        resume.check_options(settings, spec, folder)
        message = resume.check_length(settings, spec, 100, folder)
        found[name] = (resume.is_length_changed(settings, spec), message.partition(":")[0])
    assert found == {
        "same": (True, ""),
        "longer": (True, "the run had 10 steps and now has 15"),
        "steps": (False, ""),
        "more": (True, "the run had 10 steps and now has 11"),
    }
    # A run of an earlier release does not record the steps that its tokens gave.
    settings.pop("resolved_steps")
    spec = RunSpec.of(merged(plain, train__steps=12))
    assert resume.check_length(settings, spec, 100, folder).startswith("the run had 10 steps and now has 12")


@pytest.mark.slow
def test_a_sweep_is_lengthened(config, tmp_path, monkeypatch):
    asked = []
    original = experiment.run
    monkeypatch.setattr(
        experiment, "run", lambda config, folder: asked.append(folder.name) or original(config, folder)
    )
    plain = {**config(train__steps=2, **LONG), "sweep": {"wide": {"model": {"ffn_dim": 48}}}}
    for steps, trained in ((2, ["base", "wide"]), (2, []), (3, ["base", "wide"]), (3, [])):
        asked.clear()
        assert sweep.run(merged(plain, train__steps=steps), tmp_path).reason == "finished"
        assert asked == trained, steps
    assert resume.read(tmp_path / "base" / "config.json")["resolved_steps"] == 3
