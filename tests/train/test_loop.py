"""Laws of the training loop: resuming changes nothing, nothing is lost, nothing bad is kept."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sct
from sct.data.datasets import simulate_atlas
from sct.data.genes.vocabulary import GeneVocabulary
from sct.data.ingest.build import IngestOptions, ingest
from sct.data.store import Store
from sct.errors import CheckpointError, ConfigError, DivergedError, FolderInUseError, StoreError
from sct.families.tasks import make_task
from sct.tasks.masked_expression import MaskedExpression
from sct.train import loop, resume, sweep
from sct.train.experiment import run
from sct.train.optim import OptimizerConfig, make_optimizer
from sct.train.run_spec import RunSpec
from sct.train.sharding import MeshConfig
from sct.train.state import init_state, make_train_step

from .conftest import CONFIG, board, merged, read_log, same, without_times

ROOT = Path(__file__).resolve().parents[2]


def recorded(monkeypatch) -> list[int]:
    """Every batch that is drawn from now on, by hash of its bytes."""
    seen: list[int] = []
    original = loop.sharding.put_batch

    def recording(batch, mesh):
        seen.append(hash(tuple(batch[key].tobytes() for key in sorted(batch))))
        return original(batch, mesh)

    monkeypatch.setattr(loop.sharding, "put_batch", recording)
    return seen


@pytest.fixture
def drawn(monkeypatch) -> list[int]:
    """See `recorded`."""
    return recorded(monkeypatch)


@pytest.fixture(scope="module")
def finished(store, tmp_path_factory):
    """A run that never stopped, its folder, and the batches that it drew; to be read or copied."""
    plain = merged(CONFIG, data__store=str(store), model__num_downsamples=1)
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        batches = recorded(patch)
        result = run(plain, folder)
    return result, folder, batches


@pytest.mark.slow
def test_stopping_and_resuming_equals_never_stopping_bit_for_bit(config, tmp_path, finished, drawn):
    # Validation batches pass through the same function, so both runs validate at the same steps.
    whole, folder, batches = finished
    # Not a multiple of any interval: stopping must not add a validation.
    first = run(config(train__stop_at=7), tmp_path / "parts")
    assert (first.reason, first.progress.step) == ("stop_at", 7)
    assert not same(first.state, whole.state)
    second = run(config(), tmp_path / "parts")
    assert second.reason == "finished"
    assert drawn == batches
    assert len(set(batches[:20])) > 15
    chex.assert_trees_all_equal(whole.state, second.state, strict=True)
    assert without_times(read_log(folder)) == without_times(read_log(tmp_path / "parts"))


@pytest.mark.slow
def test_a_finished_run_is_not_trained_further(config, tmp_path, finished, drawn):
    folder = shutil.copytree(finished[1], tmp_path / "run")
    before = read_log(folder)
    again = run(config(), folder)
    assert again.progress.step == 20
    assert read_log(folder) == before
    assert not drawn


@pytest.mark.slow
def test_the_model_is_saved_before_its_readout_is_fitted(config, tmp_path, finished, monkeypatch):
    folder = shutil.copytree(finished[1], tmp_path / "run")
    shutil.rmtree(folder / "model")

    def stopped(*_):
        raise SystemExit(75)

    with monkeypatch.context() as patch:
        patch.setattr("sct.train.experiment.completed", stopped)
        with pytest.raises(SystemExit):
            run(config(), folder)
    early = sct.load(folder / "model")
    assert early.readout is None
    assert early.step == finished[0].progress.step
    run(config(), folder)
    assert sct.load(folder / "model").readout is not None


@pytest.mark.slow
def test_the_run_folder_holds_what_was_promised(finished):
    tmp_path = finished[1]
    for name in ("config.json", "genes.tsv", "metrics.jsonl", "report.md", "report.json", "model/config.json",
                 "model/model.safetensors", "model/genes.tsv", "model/README.md", "model/readout.safetensors",
                 "model/training_cells.safetensors"):  # fmt: skip
        assert (tmp_path / name).stat().st_size > 0, name
    assert any((tmp_path / "tensorboard").iterdir())
    report = (tmp_path / "report.md").read_text()
    for method in (
        "model",
        "most common level per gene",
        "most common expressed level per gene",
        "kNN smoothing",
    ):
        assert f"| {method}" in report


@pytest.mark.slow
def test_kept_checkpoints_are_the_last_ones_and_the_best(config, tmp_path, monkeypatch):
    # Where the largest loss counts as the best, the best step is the first validated one.
    monkeypatch.setattr(MaskedExpression, "monitor_mode", "max")
    result = run(config(train__eval_every=5, train__steps=25, train__patience=0), tmp_path)
    kept = {int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()}
    assert result.progress.best_step == 5
    assert kept == {5, 20, 25}


@pytest.mark.slow
def test_early_stopping(config, tmp_path):
    changes = {"optimizer__peak_lr": 1e-12, "optimizer__init_lr": 1e-12, "train__steps": 200}
    result = run(config(train__eval_every=2, train__patience=3, **changes), tmp_path)
    assert result.reason == "early stop"
    assert result.progress.stale == 3
    assert result.progress.step == result.progress.best_step + 6
    again = run(config(train__eval_every=2, train__patience=3, **changes), tmp_path)
    assert (again.reason, again.progress.step) == ("early stop", result.progress.step)


class Poisoned(MaskedExpression):
    """A task whose loss is not a number from the eighth step on (a step of the learning-rate warm-up)."""

    def loss(self, variables, batch, rng, train):
        loss, sums = super().loss(variables, batch, rng, train)
        bad = jnp.sum(batch["rows"]) == Poisoned.rows if train else False
        return jnp.where(bad, jnp.nan, loss), sums


@pytest.mark.slow
def test_a_loss_that_is_not_finite_names_the_batch_and_keeps_the_good_checkpoint(
    config, tmp_path, monkeypatch
):
    plain = config(train__log_every=4, train__eval_every=100)
    task, _ = make_task(plain, Store.open(plain["data"]["store"]))
    batches = loop.Loader(task.dataset("train"), 2, seed=0).iterate()
    Poisoned.rows = [int(next(batches)["rows"].sum()) for _ in range(8)][-1]
    batches.close()
    monkeypatch.setattr("sct.tasks.masked_expression.MaskedExpression", Poisoned)
    with pytest.raises(DivergedError, match=r"step 8 .*'study\d', rows \d+ to \d+") as error:
        run(plain, tmp_path)
    assert "\n" not in str(error.value)
    kept = [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
    assert kept == [5]


def start(config: dict, workdir: Path) -> subprocess.Popen:
    """Train in another process, as a user would."""
    code = "import json, sys; from sct.train.experiment import run; run(json.loads(sys.argv[1]), sys.argv[2])"
    return subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(config), str(workdir)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def wait_for_step(workdir: Path, step: int, process: subprocess.Popen) -> None:
    end = time.monotonic() + 300
    log = workdir / "metrics.jsonl"
    while time.monotonic() < end:
        assert process.poll() is None, process.communicate()[0]
        if log.exists() and log.read_text().count("train/loss") >= step:
            return
        time.sleep(0.02)
    raise AssertionError("the run did not get going")


@pytest.mark.slow
def test_a_killed_run_resumes_from_its_last_complete_checkpoint(config, tmp_path):
    plain = config(train__steps=200, train__eval_every=50, train__checkpoint_every=10, train__log_every=3)
    whole = run(plain, tmp_path / "whole")
    killed = tmp_path / "killed"
    for asked in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        lines = (killed / "metrics.jsonl").read_text().count("train/loss") if killed.exists() else 0
        process = start(plain, killed)
        # Any moment will do: the law does not depend on it.
        wait_for_step(killed, lines + 3 + int(time.time_ns() % 9), process)
        process.send_signal(asked)
        process.communicate()
        assert process.returncode == (-9 if asked == signal.SIGKILL else 0)
    (killed / "checkpoints" / "999.orbax-checkpoint-tmp").mkdir()  # what a save that was cut off leaves
    resumed = run(plain, killed)
    chex.assert_trees_all_equal(whole.state, resumed.state, strict=True)
    assert without_times(read_log(tmp_path / "whole")) == without_times(read_log(killed))
    assert board(tmp_path / "whole") == board(killed)


@pytest.mark.slow
def test_two_trainings_on_one_folder(config, tmp_path, capfd):
    plain = config(train__steps=100_000, train__eval_every=100_000, train__checkpoint_every=1000)
    folder = tmp_path / "sweep" / "base"
    process = start(plain, folder)
    try:
        wait_for_step(folder, 2, process)
        began = time.monotonic()
        swept = {**plain, "sweep": {"other": {"model": {"ffn_dim": 64}}}}
        for second in (lambda: run(plain, folder), lambda: sweep.run(swept, tmp_path / "sweep")):
            with pytest.raises(FolderInUseError, match=rf"{folder} .*process {process.pid}"):
                second()
        assert time.monotonic() - began < 30
        assert process.poll() is None
        assert not (tmp_path / "sweep" / "other").exists()
        # Stopped and started again at once: the second one waits for what the first one saves, and goes on from there.
        process.send_signal(signal.SIGTERM)
        stop = 50 + read_log(folder)[-1]["step"]
        again = run({**plain, "train": {**plain["train"], "stop_at": stop}}, folder)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, output
    saved = int(re.search(r"saving step (\d+)", output)[1])
    assert again.reason == "stop_at"
    said = capfd.readouterr()
    assert f"resuming from step {saved:,}" in said.out
    lines = [line["step"] for line in read_log(folder)]
    assert lines == list(range(1, again.progress.step + 1)), "neither process lost or doubled a line"


@pytest.mark.slow
def test_other_options_on_an_old_folder_are_refused(config, tmp_path):
    run(config(train__stop_at=5), tmp_path)
    with pytest.raises(ConfigError, match=r"optimizer\.peak_lr .*0\.001.*0\.002"):
        run(config(optimizer__peak_lr=2e-3), tmp_path)
    with pytest.raises(ConfigError, match=r"objective\.report_seeds"):
        run(config(objective__report_seeds=2), tmp_path)
    run(config(train__stop_at=6, train__log_every=2), tmp_path)


@pytest.mark.slow
def test_step_two_and_later_do_not_compile(config, tmp_path):
    with jax.log_compiles(False):
        compiled: list[str] = []
        jax.monitoring.register_event_duration_secs_listener(
            lambda name, duration, **_: compiled.append(name) if "backend_compile" in name else None
        )
        counts = []
        original = loop.sharding.put_batch

        def counting(batch, mesh):
            counts.append(len(compiled))
            return original(batch, mesh)

        loop.sharding.put_batch = counting
        try:
            run(config(train__steps=9, train__eval_every=50, train__checkpoint_every=50), tmp_path)
        finally:
            loop.sharding.put_batch = original
    assert compiled
    assert counts[2] == counts[8], counts


def test_a_run_from_before_an_option_goes_on_with_what_the_option_stood_for(tmp_path):
    new = {"family": "sct", "task": "masked_expression", "objective": {"logit_adjustment": False}}
    for old in (
        {**new, "objective": {"masking": {"kind": "stratified", "low": 0.05}}},
        {**new, "objective": None},
    ):
        resume.check_options(old, RunSpec.of(new), tmp_path)
        with pytest.raises(ConfigError, match="logit_adjustment"):
            resume.check_options(old, RunSpec.of({**new, "objective": {"logit_adjustment": True}}), tmp_path)
        other = {"logit_adjustment": False, "masking": {"kind": "uniform"}}
        with pytest.raises(ConfigError, match="masking"):
            resume.check_options(old, RunSpec.of({**new, "objective": other}), tmp_path)


@pytest.mark.slow
def test_a_step_is_what_it_was(store):
    # Recorded on CPU in float32, of the paper's loss; a change here means that older runs can no longer be reproduced.
    golden = json.loads((Path(__file__).parent / "golden_step.json").read_text())
    task, _ = make_task(merged(CONFIG, objective__logit_adjustment=False), Store.open(store))
    mesh = loop.sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
    optimizer_config = OptimizerConfig(peak_lr=1e-3, init_lr=1e-3)
    abstract, make = init_state(task, lambda p: make_optimizer(optimizer_config, 10, p)[0], mesh, seed=5)
    optimizer, _ = make_optimizer(optimizer_config, 10, abstract.trained)
    step, state = make_train_step(task, optimizer, mesh, abstract), make()
    # Tokens by arithmetic, since streams of random numbers may change with numpy.
    tokens = (np.arange(2 * 4 * 104, dtype=np.uint64).reshape(2, 4, 104) * 2654435761 >> 11) % 5
    tokens[..., 100:] = 5
    batch = {
        "tokens": tokens.astype(np.uint8),
        "example_mask": np.ones(2, np.float32),
        "measured": np.ones((2, 104), bool),
    }
    for expected in golden:
        state, scalars, _ = step(state, loop.sharding.put_batch(batch, mesh))
        np.testing.assert_allclose(scalars["loss"], expected["loss"], rtol=1e-5)
        np.testing.assert_allclose(scalars["gradient_norm"], expected["gradient_norm"], rtol=1e-4)


def other_store(folder, ids, sizes):
    atlas = simulate_atlas(len(sizes), 60, 100, seed=3)
    inputs = [
        (f"study{i}", adata[:size].copy()) for i, (adata, size) in enumerate(zip(atlas, sizes, strict=True))
    ]
    genes = GeneVocabulary.from_ids(ids)
    ingest(inputs, folder, vocabulary=genes, options=IngestOptions(validation=("study2",), test=("study3",)))
    return str(folder)


@pytest.mark.slow
def test_a_run_does_not_go_on_with_other_data(config, tmp_path):
    plain = config(train__stop_at=5)
    run(plain, tmp_path / "run")
    genes = (tmp_path / "run" / "genes.tsv").read_bytes()
    ids = list(Store.open(plain["data"]["store"]).vocabulary.ensembl_ids)
    reordered = other_store(tmp_path / "reordered", ids[::-1], [60] * 4)
    with pytest.raises(StoreError, match="vocabulary"):
        run(config(data__store=reordered), tmp_path / "run")
    smaller = other_store(tmp_path / "smaller", ids, [60, 50, 60, 60])
    with pytest.raises(StoreError, match="study1"):
        run(config(data__store=smaller), tmp_path / "run")
    moved = other_store(tmp_path / "moved", ids, [60] * 4)
    assert run(config(data__store=moved), tmp_path / "run").reason == "finished"
    assert (tmp_path / "run" / "genes.tsv").read_bytes() == genes


@pytest.mark.slow
def test_a_damaged_checkpoint_says_what_to_do(config, tmp_path):
    run(config(train__stop_at=10), tmp_path)
    newest = tmp_path / "checkpoints" / "10"
    for file in (newest / "state").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"checkpoints/10/.*step 5") as error:
        run(config(), tmp_path)
    assert "\n" not in str(error.value)
    shutil.rmtree(newest)
    assert run(config(), tmp_path).reason == "finished"


@pytest.mark.slow
def test_a_changed_model_is_refused_with_the_differences(config, tmp_path):
    run(config(train__stop_at=5), tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["model"]["ffn_dim"] = 64
    del settings["sha256"]  # or else the change itself is refused
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"params/transformer_0/mlp/down/kernel \(32, 32\).*\(64, 32\)"):
        run(config(model__ffn_dim=64), tmp_path)


@pytest.mark.slow
def test_patience_counts_across_interruptions(config, tmp_path):
    changes = {"optimizer__peak_lr": 1e-12, "optimizer__init_lr": 1e-12, "train__steps": 200}
    plain = config(train__eval_every=2, train__patience=3, **changes)
    whole = run(plain, tmp_path / "whole")
    for stop in (3, 5):
        run({**plain, "train": {**plain["train"], "stop_at": stop}}, tmp_path / "parts")
    parts = run(plain, tmp_path / "parts")
    assert (parts.reason, parts.progress) == ("early stop", whole.progress)


@pytest.mark.slow
def test_a_validation_of_few_records_is_spread_over_the_split(config, tmp_path):
    plain = config(train__eval_records=3)
    task, _ = make_task(plain, Store.open(plain["data"]["store"]))
    source = task.dataset("validation")
    loader = loop.Loader(source, 2, shuffle=False, limit=3)
    batches = list(loader)
    assert len(batches) == len(loader) == 2
    rows = [batch["rows"][i, 0] for batch in batches for i in range(2) if batch["example_mask"][i]]
    assert rows == [source.record(number)["rows"][0] for number in (0, 7, 14)]
    assert run(plain, tmp_path).reason == "finished"


@pytest.mark.slow
@pytest.mark.parametrize(("asked", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_sigterm_and_ctrl_c_save_and_are_not_taken_for_success(store, tmp_path, asked, status):
    words = [f"--config.{name}" for name in (
        f"data.store={store}", "data.dataset=", "data.cells_per_bag=4", "model.num_downsamples=1", "train.steps=100000",
        "train.log_every=1", "train.eval_every=100000", "train.checkpoint_every=100000",
    )]  # fmt: skip
    config = "--config=configs/sct_sc.py:quickstart"
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.train", config, f"--workdir={tmp_path}", *words],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        wait_for_step(tmp_path, 3, process)
        process.send_signal(asked)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == status, output
    assert "Traceback" not in output
    steps = [int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]
    assert len(steps) == 1
    assert steps[0] >= 3
    assert f"saving step {steps[0]}" in output


# Runs the command of the command line with runs and sweeps that end at once, and prints each time the exit status.
STATUSES = """
import sys
from types import SimpleNamespace
from sct import errors
from sct.cli import main
from sct.train import experiment, sweep

def ends(*words):
    if issubclass(made := getattr(errors, reason, type(None)), Exception):
        raise made("told")
    if reason == "SIGTERM while it is measured":
        raise SystemExit(75)
    return SimpleNamespace(reason=reason)

experiment.run = sweep.run = ends
for reason in sys.argv.pop().split(","):
    try:
        main("train")
    except SystemExit as ended:
        print(reason, ended.code)
"""


@pytest.mark.slow
@pytest.mark.parametrize("config", ["sct_sc.py:quickstart", "sct_ablations.py"])
def test_the_exit_status_tells_whether_the_same_command_goes_on(tmp_path, config):
    expected = {
        "finished": 0, "early stop": 0, "stop_at": 0, "signal": 75, "interrupt": 130, "failed": 1,
        "SIGTERM while it is measured": 75, "ProcessLostError": 75, "ConfigError": 1, "DivergedError": 1,
        "FolderInUseError": 1,
    }  # fmt: skip
    words = [f"--config=configs/{config}", f"--workdir={tmp_path}", ",".join(expected)]
    done = subprocess.run(
        [sys.executable, "-c", STATUSES, *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    found = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())
    assert found == {name: str(status) for name, status in expected.items()}, done.stderr


def test_a_run_folder_that_cannot_be_written(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        run(config(), tmp_path / "file" / "run")
