"""tools/gpu_suite.py runs from end to end with few libraries, ends in time, and leaves a model that opens."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import sparse

import sct
from configs import sct_sc
from sct.data.packed_cells import PackedCells
from sct.errors import ConfigError, DataError
from sct.train.optim import learning_rate, make_optimizer
from tests.data.store_inputs import small_vocabulary
from tools import gpu_suite
from tools.gpu_suite import TINY, Clock, Figures, ProgramCache, SmallTraining, Suite

ROOT = Path(__file__).resolve().parents[1]
# All that the suite may import: what its docstring names, and what Flax itself requires.
ALLOWED = (
    "jax", "jaxlib", "flax", "optax", "chex", "einops", "numpy", "scipy", "safetensors", "ml_dtypes", "orbax", "sct",
    "tools",
)  # fmt: skip
# Other requirements of this project. Nothing may import them, not even one of the allowed packages.
ABSENT = (
    "grain", "ml_collections", "anndata", "zarr", "scanpy", "pandas", "sklearn", "h5py", "tensorboardX", "numcodecs",
    "torch", "transformers", "matplotlib", "tokenizers", "sentencepiece", "tests", "configs",
)  # fmt: skip
RUN = f"""
import builtins, runpy, sys
real = builtins.__import__
def guarded(name, globals=None, locals=None, fromlist=(), level=0):
    top, file = name.split(".")[0], (globals or {{}}).get("__file__") or ""
    ours = file.startswith({(f"{ROOT}/sct/", f"{ROOT}/tools/")!r})
    if ours and not level and top not in {ALLOWED!r} and top not in sys.stdlib_module_names:
        raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
    return real(name, globals, locals, fromlist, level)
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
builtins.__import__ = guarded
sys.meta_path.insert(0, Hidden())
sys.argv = ["gpu_suite", *sys.argv[1:]]
runpy.run_path({str(ROOT / "tools" / "gpu_suite.py")!r}, run_name="__main__")
"""
LIMITED = (
    *(
        f"difference from the CPU, {dtype}, {name}"
        for dtype in ("float32", "bfloat16")
        for name in ("loss", "gradient", "worst leaf of the gradient")
    ),
    "difference of a resumed run",
)
FIGURES = (
    *LIMITED, "ceiling, bfloat16", "ceiling, float32", "bandwidth", "train, batch 1, remat none",
    "train, batch 1, remat products", "train, batch 1, remat level", "forward, batch 1", "generation, GPT-2 small",
    "generation, LLaMA of a billion parameters", "ZerOmics step, 2 rows",
)  # fmt: skip
OF_TRAINING = ("training of a small sCT, loss", "small sCT, loss in validation studies", "small sCT")


def run_suite(*words: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-c", RUN, *map(str, words), "--tiny"],
        env=environment, capture_output=True, text=True, timeout=3600, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def packed() -> PackedCells:
    vocabulary, rng = small_vocabulary(), np.random.default_rng(0)
    counts = rng.poisson(0.4, (30, len(vocabulary))).astype(np.uint16)
    no = np.zeros((2, len(vocabulary)), bool)
    study = np.repeat(np.arange(2, dtype=np.int32), 15)
    return PackedCells(
        sparse.csr_matrix(counts), study, ("one", "two"), np.asarray([False, True]), ~no, no, vocabulary
    )


@pytest.mark.slow
def test_the_suite_measures_everything_and_trains_a_model_without_the_other_libraries(packed, tmp_path):
    cells, first = tmp_path / "cells.npz", tmp_path / "first"
    packed.save(cells)
    done = run_suite(
        f"--output={first}", f"--cells={cells}", "--budget=3500", "--training_share=0.1", "--most_steps=3"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((first / "figures.json").read_text())
    figures = {row["figure"]: row for row in found["figures"]}
    assert set(figures) == {*FIGURES, *OF_TRAINING}, done.stderr[-3000:]
    assert [name for name, row in figures.items() if row["value"] is None] == []
    table = (first / "figures.md").read_text()
    assert [name for name in figures if f"| {name} |" not in table] == []
    assert {name for name, row in figures.items() if "limit" in row} == set(LIMITED)
    assert [
        row for name, row in figures.items() if name in LIMITED and not row["value"] <= row["limit"]
    ] == []
    assert figures["difference of a resumed run"]["limit"] == 0
    assert all("of_ceiling" in figures[name] for name in FIGURES if name.startswith(("train", "forward")))
    assert figures["training of a small sCT, loss"]["steps"] == 3
    model = sct.load(first / "model")
    assert model.vocabulary.hash == small_vocabulary().hash
    tokens = np.zeros((1, 2, model.config.num_genes), np.uint8)
    assert np.isfinite(model.apply(tokens=tokens)["cell_embedding"]).all()
    assert {path.name for path in first.iterdir()} == {"figures.json", "figures.md", "model", "cache.tar"}

    # A second run measures only what the first one lacks, with its compiled programs.
    lost = ("forward, batch 1", "difference of a resumed run")
    found["figures"] = [row for row in found["figures"] if row["figure"] not in lost]
    (tmp_path / "part.json").write_text(json.dumps(found))
    words = f"--previous={tmp_path / 'part.json'}", f"--cache={first / 'cache.tar'}"
    second = tmp_path / "second"
    done = run_suite(f"--output={second}", *words, "--budget=3500")
    assert done.returncode == 0, done.stderr[-3000:]
    measured = [line.split(":")[0] for line in done.stdout.splitlines() if ": " in line]
    assert [name for name in measured if name in set(figures)] == [
        "forward, batch 1",
        "difference of a resumed run",
    ]
    again = json.loads((second / "figures.json").read_text())
    assert {row["figure"] for row in again["figures"]} == set(figures)
    new, from_cache = map(int, re.findall(r"\d+", again["notes"][-1].split("programs:")[1]))
    assert from_cache > new
    assert from_cache >= 2  # the forward pass and the training step

    # A run whose time is over ends at once.
    third, started = tmp_path / "third", time.monotonic()
    done = run_suite(f"--output={third}", f"--cells={cells}", "--budget=0.1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert time.monotonic() - started < 600
    assert "time limit of 0.1 s was reached" in (third / "figures.md").read_text()


def test_an_error_ends_only_its_figure(tmp_path, monkeypatch):
    figures, clock, called = Figures(tmp_path), Clock(1000.0), []
    figures.keep(
        {"setting": {"device": "x"}, "figures": [{"figure": "known, one", "value": 1.0, "unit": "s"}]},
        {"device": "x"},
    )

    def raising(error: Exception):
        def call() -> None:
            raise error

        return call

    plan = [
        ("a", "known", lambda: called.append("known")),
        ("a", "full", raising(RuntimeError("RESOURCE_EXHAUSTED: Out of memory"))),
        ("b", "too large", raising(ConfigError("the program needs 200 GiB"))),
        ("c", "wrong", raising(KeyError("name"))),
        ("long", "too long", lambda: called.append("too long")),
        ("d", "good", lambda: figures.add("good", 2.0, "s", limit=1.0)),
    ]
    monkeypatch.setattr(gpu_suite, "_plan", lambda suite: plan)
    clock.taken["long"] = 950.0
    after: list[int] = []
    gpu_suite.run(Suite(TINY, figures, clock), {}, 100.0, lambda: after.append(1))
    rows = {row["figure"]: row for row in json.loads((tmp_path / "figures.json").read_text())["figures"]}
    assert called == []
    assert len(after) == 4
    assert rows["full"]["remark"] == "out of memory"
    assert "200 GiB" in rows["too large"]["remark"]
    assert "name" in rows["wrong"]["remark"]
    assert "LIMIT" in rows["good"]["remark"]
    assert set(rows) == {"known, one", "full", "too large", "wrong", "good"}
    assert "too long" in figures.notes[0]
    assert clock.expected("unknown") == 100.0
    assert clock.expected("long") == 950.0


def test_figures_of_another_setting_are_refused(tmp_path):
    previous = {"setting": {"device": "H100", "jax": "1"}, "figures": []}
    with pytest.raises(DataError, match=r"device.*H100.*H200"):
        Figures(tmp_path).keep(previous, {"device": "H200", "jax": "1"})
    Figures(tmp_path).keep(previous, previous["setting"])


def test_a_figure_that_crashed_the_program_is_left_out(tmp_path, monkeypatch):
    setting, called = {"device": "x"}, []
    first = Figures(tmp_path)
    first.keep(None, setting)
    first.add("good", 1.0)
    first.begin("bad, batch 1")  # and the process ends here
    previous = json.loads((tmp_path / "figures.json").read_text())
    plan = [(name, name, lambda name=name: called.append(name)) for name in ("good", "bad, batch 1", "next")]
    monkeypatch.setattr(gpu_suite, "_plan", lambda suite: plan)
    second = Figures(tmp_path / "second")
    second.keep(previous, setting)
    gpu_suite.run(Suite(TINY, second, Clock(1000.0)), {}, 0.0)
    assert called == ["next"]
    rows = {row["figure"]: row for row in second.rows}
    assert "crashed" in rows["bad, batch 1"]["remark"]
    assert json.loads((tmp_path / "second" / "figures.json").read_text())["current"] == ""


def test_a_difference_above_its_limit_is_written(tmp_path, monkeypatch):
    def too_different(what, dtype, fast, plain, share, judge):
        for kind in ("float32", "bfloat16"):
            judge(f"{what} in {kind}", {"loss": 2.0}, {"loss": 1.0}, {"loss": 0.5})

    monkeypatch.setattr(gpu_suite, "compare", too_different)
    figures = Figures(tmp_path)
    Suite(TINY, figures, Clock(1000.0)).correctness()
    assert [(row["value"], row["remark"]) for row in figures.rows] == [(1.0, "ABOVE THE LIMIT")] * 2


def test_programs_that_cannot_fit_are_not_run(tmp_path, monkeypatch):
    suite = Suite(TINY, Figures(tmp_path), Clock(100.0))
    monkeypatch.setattr(gpu_suite, "_memory_limit", lambda: 100 << 30)
    suite.needs["train, none"] = 1, 1 << 30, 34 << 30
    suite._expect_fit("train, none", 2)
    suite._expect_fit("train, level", 8)
    with pytest.raises(sct.errors.SctError, match=r"110 GiB.*100 GiB"):
        suite._expect_fit("train, none", 4)

    class Program:
        def memory_analysis(self):
            return self

        temp_size_in_bytes, argument_size_in_bytes = 90 << 30, 20 << 30
        output_size_in_bytes, alias_size_in_bytes = 20 << 30, 20 << 30

    with pytest.raises(sct.errors.SctError, match="110 GiB"):
        suite._checked(Program(), "forward", 2)
    assert suite.needs["forward"] == (2, 20 << 30, 90 << 30)
    monkeypatch.setattr(gpu_suite, "_memory_limit", lambda: None)
    assert suite._checked(Program())["planned_gib"] == 110.0


def test_training_halves_a_batch_that_does_not_fit(packed, tmp_path, monkeypatch):
    sizes = dataclasses.replace(TINY, small_batch=8)
    training = SmallTraining(packed, sizes, Figures(tmp_path), Clock(100.0))
    tried, trained = [], []

    def prepare(batch: int):
        tried.append(batch)
        if batch > 3:
            raise RuntimeError("RESOURCE_EXHAUSTED")
        return "step", "evaluate", "state"

    monkeypatch.setattr(training, "_prepare", prepare)
    monkeypatch.setattr(training, "_train", lambda batch, *rest: trained.append((batch, rest[-1])))
    training.run(5)
    assert (tried, trained) == ([8, 4, 2], [(2, 5)])

    def failing(batch: int):
        raise RuntimeError("INTERNAL: something else")

    monkeypatch.setattr(training, "_prepare", failing)
    with pytest.raises(RuntimeError, match="something else"):
        training.run(5)

    def wrong(batch: int):
        raise ConfigError("a wrong option")

    monkeypatch.setattr(training, "_prepare", wrong)
    with pytest.raises(ConfigError, match="wrong option"):
        training.run(5)


def test_the_clock_moves_the_schedule_of_the_learning_rate():
    params = {"w": jnp.ones(3)}
    optimizer, _ = make_optimizer(gpu_suite.OPTIMIZER, gpu_suite._UNITS, params)
    schedule = learning_rate(gpu_suite.OPTIMIZER, gpu_suite._UNITS)
    state = optimizer.init(params)
    for share in (0.0, 0.01, 0.03, 0.5, 1.0, 2.0):
        moved = gpu_suite._schedule_at(state, share)
        updates, _ = optimizer.update({"w": jnp.full(3, 0.1)}, moved, params)
        expected = float(schedule(int(gpu_suite._UNITS * min(share, 1.0))))
        np.testing.assert_allclose(np.asarray(updates["w"]), -expected, rtol=1e-4)


def test_the_masking_is_that_of_the_small_configuration():
    masking = sct_sc.get_config("mini").objective.masking
    made = gpu_suite.MASKING
    assert (made.kind, made.mixture, made.low, made.high) == (
        masking.kind,
        masking.mixture,
        masking.low,
        masking.high,
    )


def test_programs_that_took_longest_to_compile_are_kept(tmp_path):
    folder = tmp_path / "programs"
    folder.mkdir()
    cache, rng = ProgramCache(folder, None, 1 << 18), np.random.default_rng(0)
    for number, size in enumerate((100_000, 300_000, 60_000, 90_000, 40_000)):
        name = f"jit_step-{number}-cache" + "x" * (120 if number == 2 else 0)
        (folder / name).write_bytes(rng.bytes(size))
        cache._record("/jax/core/compile/backend_compile_duration", float(number))
        cache._record("/jax/core/compile/jaxpr_trace_duration", 100.0)
    (folder / "other_cache").mkdir()  # a folder that XLA may make
    (folder / "other_cache" / "large").write_bytes(rng.bytes(1 << 20))
    cache._record("/jax/core/compile/backend_compile_duration", 200.0)
    archive = tmp_path / "cache.tar"
    cache.pack(archive)
    assert archive.stat().st_size <= 1 << 18
    other = tmp_path / "other"
    other.mkdir()
    read = ProgramCache(other, archive, 1 << 18)
    # The program of 300 kB does not fit, and then not the fastest one.
    assert sorted(read.seconds.values()) == [2.0, 3.0, 4.0]
    assert {path.name for path in other.iterdir()} == set(read.seconds)
    assert all((other / name).read_bytes() == (folder / name).read_bytes() for name in read.seconds)
    read.pack(archive)
    with tarfile.open(archive) as file:
        assert len(file.getnames()) == 4


def test_mistakes_end_with_one_sentence(tmp_path, capsys, monkeypatch):
    (tmp_path / "text").write_text("no figures")
    cases = {
        "--most_steps=0": "most_steps",
        "--budget=0": "budget",
        "--training_share=2": "training_share",
        f"--previous={tmp_path / 'text'}": "previous",
        f"--previous={tmp_path / 'absent'}": "previous",
        f"--cache={tmp_path / 'text'}": "cache",
        f"--cells={tmp_path / 'text'}": "pack_cells",
    }
    failed = []
    for word, key in cases.items():
        code = gpu_suite.main([f"--output={tmp_path / 'out'}", "--tiny", word])
        error = capsys.readouterr().err
        failed += [] if code == 1 and key in error and error.count("\n") == 1 else [(word, code, error)]
    monkeypatch.setattr(gpu_suite.jax, "default_backend", lambda: "cpu")
    code = gpu_suite.main([f"--output={tmp_path / 'out'}"])
    error = capsys.readouterr().err
    failed += [] if code == 1 and "--tiny" in error and error.count("\n") == 1 else [("no GPU", code, error)]
    assert not failed, failed
