"""Every mode from configuration to report, and the command."""

from __future__ import annotations

import functools
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from rich.console import Console

from sct.errors import ConfigError, SctError
from sct.models.sct import SCT
from sct.models.sct_config import SCTConfig
from sct.speed import compare, report, run, saving
from sct.speed.job import SpeedOptions
from sct.speed.run import measure
from sct.train.checkpoint import Checkpoints
from tests.speed.conftest import CONFIG, SMALL
from tests.train.conftest import merged

ROOT = Path(__file__).resolve().parents[2]
ALWAYS = {
    "mode", "check", "step_seconds", "step_seconds_spread", "step_seconds_all", "peak_host_bytes",
    "device", "cpu_count", "python", "versions", "config", "command", "load_average", "synthetic",
}  # fmt: skip
CELLS = {"cells_per_s", "tokens_per_s"}
STEPS = {
    "dtype", "arithmetic", "ceiling_flops", "ceiling_before_flops", "ceiling_after_flops", "peak_device_bytes",
}  # fmt: skip
PROGRAM = {
    "compile_seconds", "compiled_flops", "temporaries_bytes", "model_flops", "achieved_flops", "utilisation",
}  # fmt: skip
KEYS = {
    "train": CELLS | STEPS | PROGRAM | {"input_wait_seconds"},
    "forward": CELLS | STEPS | PROGRAM,
    "embed": CELLS | STEPS | {"first_call_seconds"},
    "loader": {
        *CELLS, "raw_cells_per_s", "disk_read_bytes_per_s", "disk_read_from", "first_batch_seconds",
        "store_bytes_per_s", "host_bytes_first_repetition", "host_bytes_last_repetition",
    },
    "save": STEPS | {"save_blocked_seconds", "saved_bytes", "checkpoint_interval_seconds"},
    "ingest": {"cells_per_s", "disk_read_bytes_per_s", "input_bytes_per_s", "processes"},
}  # fmt: skip


@functools.cache
def of(mode: str) -> dict[str, Any]:
    """Measurement of the small configuration in a mode, made once."""
    return measured(mode)


def measured(mode: str, **changes: Any) -> dict[str, Any]:
    return measure(merged(CONFIG, **changes), SpeedOptions(mode, **SMALL), apart=False)


@pytest.mark.slow
def test_a_save_is_read_again_and_its_cost_counted(monkeypatch):
    found = of("save")
    assert 0 < found["save_blocked_seconds"] <= found["step_seconds_spread"]["max"]
    parameters = 4 * sum(x.size for x in jax.tree.leaves(jax.eval_shape(SCT(SCTConfig(**CONFIG["model"])).init,
        jax.random.key(0), **SCT.example(SCTConfig(**CONFIG["model"])))))  # fmt: skip
    assert 0.8 * 3 * parameters < found["saved_bytes"], (
        "parameters and two moments, as random as they will be"
    )
    assert saving.interval(blocked=0.5, written=60.0, processor=0.0) == 60, "no save waits for the one before"
    assert saving.interval(blocked=0.5, written=2.0, processor=0.0) == 25
    restore = Checkpoints.restore
    monkeypatch.setattr(
        Checkpoints,
        "restore",
        lambda *a: (lambda state, now: (state.replace(step=state.step + 1), now))(*restore(*a)),
    )
    with pytest.raises(SctError, match="checkpoint"):
        measured("save")


@pytest.mark.slow
@pytest.mark.parametrize("mode", KEYS)
def test_a_mode_measures_what_it_promises(mode, tmp_path):
    found = of(mode)
    assert ALWAYS | KEYS[mode] <= set(found)
    assert len(found["step_seconds_all"]) == 3
    spread = found["step_seconds_spread"]
    assert 0 < spread["min"] <= found["step_seconds"] <= spread["max"]
    assert found["synthetic"] == {"cells": 60, "expressed_genes_of_a_cell": 6}
    assert found["peak_host_bytes"] > 1 << 20
    report.write(found, tmp_path / "speed.json")
    assert json.loads((tmp_path / "speed.json").read_text())["mode"] == mode
    console = Console(width=200, file=io.StringIO())
    console.print(report.table(found))
    assert "time of a step" in console.file.getvalue()
    assert any("reference implementation" in note for note in report.notes(found))


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "passes"), [("forward", 1), ("train", 3)])
def test_operations_are_those_of_the_formula(mode, passes):
    found = of(mode)
    config = SCTConfig(**CONFIG["model"])
    positions = None if mode == "forward" else round(0.1 * 4 * 64)
    flops = passes * SCT.flops(config, 2, 4, positions)
    assert found["model_flops"] == flops
    assert math.isclose(found["achieved_flops"], flops / found["step_seconds"])
    assert math.isclose(found["utilisation"], found["achieved_flops"] / found["ceiling_flops"])
    assert found["ceiling_flops"] == max(found["ceiling_before_flops"], found["ceiling_after_flops"])
    assert found["tokens_per_step"] == 2 * 4 * 64


def test_a_step_that_is_wrong_gets_no_time(monkeypatch):
    monkeypatch.setattr(compare, "difference", lambda made, reference: 0.01)
    started = []
    monkeypatch.setattr(run.compute, "run_steps", lambda *arguments, **options: started.append(1))
    with pytest.raises(SctError, match=r"reference .*0\.01"):
        measured("forward")
    assert not started


def test_a_store_of_ones_own_is_measured(made):
    store = made.folder / "store"
    before = sorted(path for path in store.rglob("*"))
    found = measured("loader", data__store=str(store))
    assert found["synthetic"] is None
    assert found["store_cells"] == 60
    assert sorted(path for path in store.rglob("*")) == before


def test_a_disturbed_ceiling_is_said():
    found = {
        "check": {"differences": {}, "limits": {}},
        "ceiling_before_flops": 1e11,
        "ceiling_after_flops": 5e10,
    }
    assert any("ceiling changed" in note for note in report.notes(found))
    found["ceiling_after_flops"] = 0.95e11
    assert not any("ceiling changed" in note for note in report.notes(found))


def test_generation_names_the_families_that_can():
    with pytest.raises(ConfigError, match="gpt2, neox, llama"):
        measured("generate")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "fast"}, ["--mode", "'fast'", "forward"]),
        ({"steps": 2}, ["--steps", "3"]),
        ({"mode": "ingest", "steps": 0}, ["--steps", "1"]),
        ({"warmup": 0}, ["--warmup"]),
        ({"check_cells": -1}, ["--check_cells"]),
        ({"cells": -5}, ["--cells"]),
        ({"nonzeros": -1}, ["--nonzeros"]),
        ({"ceiling_size": -1}, ["--ceiling_size"]),
    ],
)
def test_a_wrong_flag_is_one_sentence(options, words):
    with pytest.raises(ConfigError) as caught:
        SpeedOptions(**options)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model": {}}, ["single training run"]),
        ({**CONFIG, "sweep": {"a": {}}}, ["single training run"]),
        (merged(CONFIG, data__cells_per_bag=100), ["--cells is 60", "100"]),
        (merged(CONFIG, data__store="no/such/store"), ["no/such/store"]),
        (merged(CONFIG, data__store="s", data__dataset="pbmc68k"), ["data.store and data.dataset"]),
        (merged(CONFIG, train__mesh={"data": 3}), ["does not fit"]),
        (merged(CONFIG, model__no_such=1), ["no_such"]),
    ],
    ids=["no training", "sweep", "cells", "store", "two sources", "mesh", "field"],
)
def test_a_wrong_configuration_is_one_sentence(config, words):
    with pytest.raises(SctError) as caught:
        measure(config, SpeedOptions("train", **SMALL), apart=False)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def command(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    model = [f"--config.model.{name}={value}" for name, value in CONFIG["model"].items()]
    small = [f"--{name}={value}" for name, value in SMALL.items()]
    return subprocess.run(
        [sys.executable, "-m", "launch.speed", "--config=configs/sct_sc.py", *model, *small, *words],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.slow
def test_the_command_prints_a_table_and_writes_all_numbers(tmp_path):
    file = tmp_path / "speed.json"
    done = command("--mode=forward", "--config.data.cells_per_bag=4", f"--output={file}")
    assert done.returncode == 0, done.stderr
    assert "achieved / ceiling" in done.stdout
    lines = done.stdout.splitlines()
    assert lines[0].startswith("forward: ")
    assert "of the limit of this machine" in lines[0]
    assert max(len(line) for line in lines if line[:1] in "┏┃┡│└") <= 80
    assert str(file) in done.stdout
    found = json.loads(file.read_text())
    assert found["mode"] == "forward"
    assert found["config"]["data"]["cells_per_bag"] == 4
    assert "-m launch.speed --config=" in found["command"]
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--mode=generate"], "gpt2, neox, llama"),
        (["--mode=train", "--output=pyproject.toml/speed.json"], "another --output"),
    ],
)
def test_a_mistake_is_one_sentence(words, sentence):
    done = command(*words)
    assert done.returncode == 1
    assert sentence in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["forward", "train"])
def test_several_devices_are_measured_together(tmp_path, mode):
    file = tmp_path / "speed.json"
    done = command(
        f"--mode={mode}", "--config.data.cells_per_bag=4", f"--output={file}", "--config.train.mesh=data=2,sequence=2",
        "--config.train.batch_size=2",
        JAX_NUM_CPU_DEVICES="4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert found["device_count"] == 4
    assert found["check"]["bags"] == 2


@pytest.mark.slow
def test_the_cell_encoder_is_measured():
    model = {
        "embed_dim": 16,
        "num_layers": 1,
        "num_heads": 2,
        "ffn_dim": 16,
        "num_bins": 5,
        "mvc": "inner product",
    }
    config = {
        "family": "scgpt", "task": "masked_values", "model": model, "data": {"max_genes": 40}, "objective": {},
        "optimizer": {}, "train": {"steps": 3, "batch_size": 4},
    }  # fmt: skip
    found = measure(config, SpeedOptions("train", steps=3, cells=1_000), apart=False)
    assert found["tokens_per_step"] == 4 * 41
    assert max(found["check"]["differences"].values()) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["train", "save"])
def test_tasks_of_single_cells_are_measured(mode):
    """The cell model of ZerOmics: the reference implementation evaluates its head at all places."""
    model = {
        "num_genes": 60,
        "feature_dim": 8,
        "embed_dim": 16,
        "num_layers": 1,
        "num_heads": 2,
        "ffn_dim": 16,
    }
    config = {
        "family": "zeromics_cells", "task": "masked_bins", "model": {**model, "remat": "none"},
        "data": {"features": "random", "feature_dim": 8, "max_genes": 40}, "objective": {"max_masked_fraction": 0.3},
        "optimizer": {}, "train": {"steps": 3, "batch_size": 4},
    }  # fmt: skip
    found = measure(config, SpeedOptions(mode, steps=3, cells=1_000), apart=False)
    assert found["step_seconds"] > 0
    if mode == "train":
        assert found["tokens_per_step"] == 4 * 40
        assert max(found["check"]["differences"].values()) < 1e-3
    with pytest.raises(ConfigError, match="--mode=embed cannot measure the task 'masked_bins'"):
        measure(config, SpeedOptions("embed", steps=3), apart=False)
