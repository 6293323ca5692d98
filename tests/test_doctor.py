"""`sct doctor` and `sct models`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from sct import devices, families
from sct.commands import doctor, models
from sct.commands.configuration import config_folder
from sct.errors import SctError
from sct.global_settings import settings
from sct.weights import listing
from sct.weights.listing import find_models
from tests.tl.conftest import made

ROOT = Path(__file__).resolve().parents[1]
# Extras of programs that are run, and of plugins that JAX finds by itself.
NOT_LISTED = {"test", "docs", "cuda", "tpu"}


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
    return subprocess.run(
        [sys.executable, "-m", "sct", *words], capture_output=True, text=True, check=False, cwd=ROOT,
        env={**inherited, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip


def test_doctor_leads_with_its_finding(tmp_path):
    done = run("doctor", SCT_CACHE_DIR=str(tmp_path))
    first = done.stdout.splitlines()[0]
    assert first.startswith("ready: sct ") if done.returncode == 0 else first.startswith("not ready: ")
    assert max(map(len, done.stdout.splitlines())) <= max(80, 20 + len(str(tmp_path / "gene_features")))
    for word in ("Software", "Devices", "Caches", "Extras", "jaxlib", "test program", str(tmp_path)):
        assert word in done.stdout
    assert not done.stderr


def test_doctor_says_what_is_wrong_and_ends_with_1(tmp_path):
    (tmp_path / "file").write_text("")
    done = run("doctor", SCT_CACHE_DIR=str(tmp_path / "file" / "cache"), JAX_PLATFORMS="no_such_platform")
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[0].startswith("not ready: ")
    assert "JAX does not run" in done.stdout
    assert "SCT_CACHE_DIR" in done.stdout
    assert "Traceback" not in done.stderr


def test_doctor_sees_a_gpu_that_jax_does_not_use(monkeypatch):
    problems: list[str] = []
    monkeypatch.setattr(devices, "hardware", lambda: "gpu")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    # The command sets these variables if they are not set; here they must not stay set for other tests.
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "2")
    rows = list(doctor._devices(problems))
    assert any("cuda]" in problem for problem in problems)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES" in devices.advice("gpu")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    problems.clear()
    rows = list(doctor._devices(problems))
    assert not problems
    assert any("JAX_PLATFORMS=cpu" in value for _, value in rows)


def test_doctor_knows_every_extra_and_the_command_that_installs_it(monkeypatch):
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(doctor.EXTRAS) == set(declared) - NOT_LISTED
    monkeypatch.setattr(doctor, "_version", lambda library: "" if library == "scanpy" else "1")
    monkeypatch.setattr(doctor, "_requirements", lambda: {"cells": ["scanpy"], "hub": ["huggingface_hub"]})
    rows = dict(doctor._extras([]))
    assert "scanpy" in rows["cells"]
    assert "[cells]" in rows["cells"]
    assert rows["hub"].startswith("installed")


def test_models_describes_each_family_from_its_manifest():
    done = run("models")
    assert done.returncode == 0, done.stderr
    plain = " ".join(done.stdout.split())
    assert max(map(len, done.stdout.splitlines())) <= 80
    for family in families.all_families().values():
        formats = [f"--from={name}" for name in family.converters]
        for word in (f"{family.name}: ", family.paper, *family.models, *formats):
            assert word in plain
    # Every configuration of a model is there, and no family is named in the command.
    for path in config_folder().glob("*.py"):
        if "config.family" in path.read_text():
            assert path.stem in plain
    source = (ROOT / "sct" / "commands" / "models.py").read_text()
    assert not [name for name in families.all_families() if f'"{name}"' in source]


def test_models_in_folders_are_described_without_their_weights(tmp_path):
    model = made()
    model.save_pretrained(tmp_path / "all" / "mine")
    (tmp_path / "all" / "notes").mkdir()
    (found,) = find_models(tmp_path / "all")
    assert (found.kind, found.architecture, found.parameters) == ("model", model.family, model.size)
    assert found.genes == len(model.vocabulary)
    assert not found.trouble
    damaged = tmp_path / "all" / "damaged"
    model.save_pretrained(damaged)
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps({**config, "format_version": 99}))
    states = {each.path.name: bool(each.trouble) for each in find_models(tmp_path / "all")}
    assert states == {"mine": False, "damaged": True}
    with pytest.raises(SctError, match="does not exist"):
        list(find_models(tmp_path / "none"))


def test_an_unreadable_folder_is_listed_with_its_reason(tmp_path, monkeypatch):
    """A folder without the permission to read it, to look into it, or to read the files of its model."""
    for name in ("a", "b", "c", "d/e"):
        (tmp_path / name).mkdir(parents=True)
    kind, inside = listing._kind, Path.iterdir

    def refuse(what):
        raise PermissionError(13, "Permission denied", str(what))

    monkeypatch.setattr(
        listing,
        "_kind",
        lambda path: refuse(path) if path.name == "a" else "run" * (path.name == "c") or kind(path),
    )
    monkeypatch.setattr(Path, "iterdir", lambda path: refuse(path) if path.name in "be" else inside(path))
    monkeypatch.setitem(listing._READERS, "run", refuse)
    found = {each.path.name: (each.kind, each.trouble) for each in find_models(tmp_path)}
    assert {name: kind for name, (kind, _) in found.items()} == {"a": "folder", "b": "folder", "c": "run"}
    assert all("Permission denied" in trouble for _, trouble in found.values())


def test_quiet_prints_only_the_problems(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(settings, "_verbosity", 0)
    for name in ("_software", "_devices", "_caches", "_extras"):
        monkeypatch.setattr(doctor, name, lambda problems: iter([("JAX runs on", "1 CPU device")]))
    assert doctor.main([]) == 0
    assert not capsys.readouterr().out
    monkeypatch.setattr(doctor, "_caches", lambda problems: problems.append("the disk is full.") or [])
    assert doctor.main([]) == 1
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["not", "-"]
    made().save_pretrained(tmp_path / "mine")
    shutil.copytree(tmp_path / "mine", tmp_path / "damaged")
    (tmp_path / "damaged" / "config.json").write_text("{")
    monkeypatch.setattr(models, "_INPUT", SimpleNamespace(value=[]))
    assert models.main(["models"]) == 0
    assert models.main(["models", str(tmp_path / "mine")]) == 0
    assert not capsys.readouterr().out
    assert models.main(["models", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert said.splitlines()[0] == str(tmp_path / "damaged")
    assert "mine" not in said


@pytest.mark.slow
def test_the_command_lists_models(tmp_path):
    made().save_pretrained(tmp_path / "mine")
    done = run("models", f"--input={tmp_path}")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("1 model in ")
    assert f"{made().size:,} parameters" in done.stdout
    assert run("models", str(tmp_path / "none")).returncode == 1
