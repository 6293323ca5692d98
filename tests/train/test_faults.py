"""Faults that are injected: nothing is lost beyond the last complete checkpoint, and the message names the thing."""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from sct.data.bags import BagSource
from sct.data.store import Store
from sct.errors import CheckpointError, DivergedError, StoreError
from sct.families.tasks import make_task
from sct.tasks.masked_expression import MaskedExpression
from sct.train import loop
from sct.train.checkpoint import Checkpoints, RunProgress
from sct.train.logging import MetricLog
from sct.train.state import State

from .conftest import CONFIG, board, learn, merged, read_log, same, without_times

ROOT = Path(__file__).resolve().parents[2]
SHORT = {
    "model__num_downsamples": 1,
    "train__steps": 12,
    "train__eval_every": 12,
    "train__checkpoint_every": 3,
    "train__keep_last": 9,
}


def saved(folder: Path) -> list[str]:
    """Names of what lies in the folder of checkpoints: steps, and what was not finished."""
    names = [path.name for path in (folder / "checkpoints").iterdir() if path.is_dir()]
    return sorted(names, key=lambda name: (len(name), name))


@pytest.fixture
def config(full_config):
    """What is compared bit for bit with `whole` is compiled as that is."""
    return full_config


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory):
    """A run in which nothing goes wrong, and its folder."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return learn(merged(CONFIG, data__store=str(store), **SHORT), folder), folder


def goes_on(config, whole, folder: Path) -> None:
    """Run again without the fault, and end as the run without faults did."""
    resumed, (expected, other) = learn(config(**SHORT), folder), whole
    assert resumed.progress == expected.progress
    chex.assert_trees_all_equal(resumed.state, expected.state, strict=True)
    assert without_times(read_log(folder)) == without_times(read_log(other))
    assert saved(folder) == saved(other)


KILLED = """
import json, os, signal, sys
from pathlib import Path
import sct.train.loop as loop
from tests.train.conftest import learn

step, event, number = 0, sys.argv[3], int(sys.argv[4])
original = loop.sharding.put_batch

def counting(batch, mesh):
    global step
    step += 1
    return original(batch, mesh)

loop.sharding.put_batch = counting

def audit(name, arguments):
    global number
    # The first two checkpoints, of steps 3 and 6, are left alone.
    if step > 6 and name == event and any("/checkpoints/9" in str(argument) for argument in arguments):
        number -= 1
        if not number:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(audit)
learn(json.loads(sys.argv[1]), Path(sys.argv[2]))
"""


# Before the folder is made, while files are written in it, and before it gets the name of a complete one.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("event", "number"),
    [("os.rename", 1), ("os.mkdir", 1),
     ("open", 1), ("open", 3)],
)  # fmt: skip
def test_killed_while_a_checkpoint_is_written(config, tmp_path, whole, event, number):
    plain, folder = config(**SHORT), tmp_path / "killed"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps(plain), str(folder), event, str(number)],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == -9, done.stderr
    assert saved(folder)[:2] == ["3", "6"]
    assert "9" not in saved(folder)
    goes_on(config, whole, folder)


@contextlib.contextmanager
def files_no_larger_than(size: int):
    """Let the system refuse to write files beyond a size, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.slow
@pytest.mark.parametrize("limit", [200, 20_000])
def test_a_disk_that_fills_up_while_a_checkpoint_is_written(config, tmp_path, whole, monkeypatch, limit):
    folder, original = tmp_path / "full", Checkpoints.save
    with contextlib.ExitStack() as limited, monkeypatch.context() as patched:

        def save(self, state, progress):
            if progress.step == 9:
                self.wait()
                limited.enter_context(files_no_larger_than(limit))
                monkeypatch.setattr(MetricLog, "write", lambda *_: None)  # its own test is below
            original(self, state, progress)

        patched.setattr(Checkpoints, "save", save)
        patched.setattr(MetricLog, "write", MetricLog.write)
        with pytest.raises(CheckpointError) as error:
            learn(config(**SHORT), folder)
    monkeypatch.undo()
    message = str(error.value)
    assert "\n" not in message
    assert (
        f"the checkpoint of step 9 cannot be written to {folder / 'checkpoints'} (File too large)" in message
    )
    assert message.endswith("step 6.")
    assert "9" not in saved(folder)
    goes_on(config, whole, folder)


@pytest.mark.slow
def test_a_disk_that_fills_up_while_metrics_are_written(config, tmp_path, whole, monkeypatch):
    folder, original, save = tmp_path / "full", MetricLog.write, Checkpoints.save
    with contextlib.ExitStack() as limited, monkeypatch.context() as patched:
        # No checkpoint is being written then, which would be told instead.
        patched.setattr(Checkpoints, "save", lambda self, *args: (save(self, *args), self.wait()))

        def write(self, step, values, prefix):
            if step == 8:
                size = (folder / "metrics.jsonl").stat().st_size
                limited.enter_context(files_no_larger_than(size + 10))  # part of a line
            original(self, step, values, prefix)

        patched.setattr(MetricLog, "write", write)
        with pytest.raises(CheckpointError) as error:
            learn(config(**SHORT), folder)
    message = str(error.value)
    assert "\n" not in message
    assert f"run folder {folder} (File too large)" in message
    assert not (folder / "metrics.jsonl").read_text().endswith("\n"), "a line that was cut off"
    assert saved(folder) == ["3", "6"]
    goes_on(config, whole, folder)


FULL = """
import json, os, subprocess, sys
from pathlib import Path
import jax, numpy as np
from sct.errors import CheckpointError
from tests.train.conftest import learn

config, folder, output = json.loads(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", folder], check=True)
learn({**config, "train": {**config["train"], "stop_at": 6}}, folder)
with open(folder / "ballast", "wb", buffering=0) as ballast:
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    while free > 60_000:
        ballast.write(bytes(free - 50_000))
        free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
try:
    learn(config, folder)
except CheckpointError as error:
    print("REFUSED", error)
(folder / "ballast").unlink()
result = learn(config, folder)
arrays = {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(result.state))}
np.savez(output, **arrays)
"""


@pytest.mark.slow
def test_a_small_disk_that_is_full(config, tmp_path, whole):
    if not shutil.which("unshare") or subprocess.run(
        ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", tmp_path],
        capture_output=True, check=False,
    ).returncode:  # fmt: skip
        pytest.skip("this system does not let a user mount a small disk of his own (unshare --mount)")
    folder, output = tmp_path / "full", tmp_path / "state.npz"
    folder.mkdir()
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", sys.executable, "-c", FULL, json.dumps(config(**SHORT)),
         str(folder), str(output)],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    refused = next(line for line in done.stdout.splitlines() if line.startswith("REFUSED"))
    assert "No space left on device" in refused
    assert str(folder) in refused
    arrays = np.load(output)
    chex.assert_trees_all_equal(
        [arrays[name] for name in arrays.files], jax.tree.leaves(whole[0].state), strict=True
    )


def test_an_error_of_the_last_save_is_not_swallowed(tmp_path):
    state = State(jnp.zeros((), jnp.int32), {"a": jnp.ones(100_000)}, {}, (), jnp.zeros(2, jnp.uint32))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    with files_no_larger_than(500), pytest.raises(CheckpointError, match=r"step 7 .*from the beginning\.$"):  # noqa: PT012
        checkpoints.save(state, RunProgress(step=7))
        checkpoints.close()
    assert Checkpoints(tmp_path / "checkpoints").latest is None


def test_an_error_in_the_background_is_told_before_the_next_save(tmp_path):
    state = State(jnp.zeros((), jnp.int32), {"a": jnp.ones(100_000)}, {}, (), jnp.zeros(2, jnp.uint32))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.check()
    with files_no_larger_than(500), pytest.raises(CheckpointError, match="step 7"):  # noqa: PT012
        checkpoints.save(state, RunProgress(step=7))
        end = time.monotonic() + 60
        while time.monotonic() < end:
            checkpoints.check()
    checkpoints.close()


def test_a_large_checkpoint_has_hours_to_be_written_and_hashed(tmp_path, monkeypatch):
    asked, original = [], ocp.AsyncOptions
    monkeypatch.setattr(ocp, "AsyncOptions", lambda **options: asked.append(options) or original(**options))
    Checkpoints(tmp_path / "checkpoints").close()
    # Process 0 reads 156 GB of a model of 13 billion parameters, at 20 MB/s from a shared disk.
    assert asked[0]["timeout_secs"] >= 156e9 / 20e6


def test_what_was_measured_is_on_the_disk_before_a_checkpoint(tmp_path):
    log = MetricLog(tmp_path)
    log.write(1, {"loss": 0.5}, "train")
    log.flush()
    assert board(tmp_path) == [(1, "train/loss", 0.5)]
    assert [line["train/loss"] for line in read_log(tmp_path)] == [0.5]
    log.close()


def test_what_is_saved_is_the_state_of_its_step_although_it_is_donated(tmp_path):
    # Arrays large enough that the next updates run while they are being written.
    keep = Checkpoints(tmp_path / "checkpoints", keep_last=9)
    step = jax.jit(
        lambda state: state.replace(step=state.step + 1, trained=jax.tree.map(jnp.cos, state.trained)),
        donate_argnums=0,
    )
    random = jax.random.normal(jax.random.key(0), (1_000_000,))
    state = State(jnp.zeros((), jnp.int32), {"a": random, "b": random + 1}, {}, (), jnp.zeros(2, jnp.uint32))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    before = {}
    for number in (1, 2):
        before[number] = jax.tree.map(lambda leaf: np.array(leaf), state)
        keep.save(state, RunProgress(step=number))
        for _ in range(5):
            state = step(state)
    keep.wait()
    assert not same(before[1], before[2])
    for number, expected in before.items():
        chex.assert_trees_all_equal(keep.restore(abstract, number)[0], expected, strict=True)
    keep.close()


class Poisoned(MaskedExpression):
    """A task whose loss of one training record is not a number."""

    rows = 0

    def loss(self, variables, batch, rng, train):
        loss, sums = super().loss(variables, batch, rng, train)
        bad = (jnp.sum(batch["rows"], axis=1) == Poisoned.rows).any() if train else False
        return jnp.where(bad, jnp.nan, loss), sums


@pytest.mark.slow
def test_one_bad_microbatch_names_its_batch_and_spoils_no_checkpoint(config, tmp_path, monkeypatch):
    changes = {"train__batch_size": 4, "train__accumulate": 4, "train__batch_ramp": [[4, 1]]}
    plain = config(**SHORT | changes, train__log_every=10)
    task, _ = make_task(plain, Store.open(plain["data"]["store"]))
    source = task.dataset("train")
    batches = loop.Loader(source, 1, seed=0).iterate()
    records = [next(batches) for _ in range(16)]
    batches.close()
    # Steps 1 to 4 take a record each, 5 takes records 4 to 7, 6 takes 8 to 11, 7 takes 12 to 15.
    Poisoned.rows = int(records[13]["rows"].sum())
    assert [int(record["rows"].sum()) for record in records].count(Poisoned.rows) == 1
    expected = loop.Loader(source, 4, seed=0).describe(12)
    monkeypatch.setattr("sct.tasks.masked_expression.MaskedExpression", Poisoned)
    with pytest.raises(DivergedError, match="the loss of step 7 is nan") as error:
        learn(plain, tmp_path / "run")
    assert f"(batch: {'; '.join(expected)})" in str(error.value)
    assert saved(tmp_path / "run") == ["3", "6"]
    with ocp.PyTreeCheckpointer() as reader:
        kept = reader.restore(tmp_path / "run" / "checkpoints" / "6" / "state")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(kept))


@pytest.mark.slow
def test_metrics_are_the_same_however_often_a_run_is_stopped(config, tmp_path, monkeypatch):
    # Intervals of which none divides another, so that runs stop between lines, validations and checkpoints.
    plain = config(**SHORT | {"train__steps": 24, "train__eval_every": 11, "train__checkpoint_every": 7},
                   train__log_every=5)  # fmt: skip
    whole, folder, original = learn(plain, tmp_path / "whole"), tmp_path / "stopped", loop.sharding.put_batch
    drawn = 0

    def is_target(batch, mesh):
        nonlocal drawn
        drawn -= 1
        if not drawn:
            signal.raise_signal(signal.SIGTERM)
        return original(batch, mesh)

    monkeypatch.setattr(loop.sharding, "put_batch", is_target)
    steps = []
    for number in range(6):
        drawn = 1 + number % 3
        result = learn(plain, folder)
        assert result.reason == "signal"
        steps.append(result.progress.step)
        # What a killed run leaves behind: a line of a later step, and half of one.
        with (folder / "metrics.jsonl").open("ab") as log:
            log.write(b'{"step": 500, "train/loss": 1.0}\n{"step": 501, "train/lo\xff')
    assert len({step % 5 for step in steps}) > 3
    drawn = 0
    resumed = learn(plain, folder)
    assert resumed.progress == whole.progress
    chex.assert_trees_all_equal(resumed.state, whole.state, strict=True)
    assert without_times(read_log(folder)) == without_times(read_log(tmp_path / "whole"))
    assert [line["step"] for line in read_log(folder)] == [
        1,
        5,
        7,
        10,
        11,
        11,
        14,
        15,
        20,
        21,
        22,
        22,
        24,
        24,
    ]
    assert board(folder) == board(tmp_path / "whole")


def within_a_minute(function, *arguments):
    """What a function returns or raises; an error where it hangs."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result(timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize(
    ("error", "kind"),
    [(OSError(5, "Input/output error"), StoreError), (ZeroDivisionError("a defect"), ZeroDivisionError)],
    ids=["disk", "defect"],
)
def test_a_reader_that_fails_names_the_record(config, tmp_path, whole, monkeypatch, threads, error, kind):
    plain, original = config(**SHORT, train__loader_threads=threads), BagSource.record
    source = make_task(plain, Store.open(plain["data"]["store"]))[0].dataset("train")
    bad = loop.Loader(source, 1, seed=0).describe(17)[0]  # of step 9
    assert bad.startswith("study 'study")

    def record(self, number, epoch=0):
        if self.describe(number, epoch) == bad:
            raise error
        return original(self, number, epoch)

    with monkeypatch.context() as patched:
        patched.setattr(BagSource, "record", record)
        with pytest.raises(kind) as raised:
            within_a_minute(learn, plain, tmp_path / "run")
    assert bad in " ".join([str(raised.value), *getattr(raised.value, "__notes__", ())])
    assert saved(tmp_path / "run")[-1] == "6"
    goes_on(config, whole, tmp_path / "run")


@pytest.mark.slow
def test_a_clock_that_jumps_back(config, tmp_path, whole, monkeypatch):
    folder, now = tmp_path / "back", [time.time()]

    def earlier() -> float:
        now[0] -= 600.0
        return now[0]

    with monkeypatch.context() as patched:
        patched.setattr(time, "time", earlier)
        learn(config(**SHORT, train__stop_at=7), folder)
        assert Checkpoints(folder / "checkpoints").latest == 7
    (folder / "checkpoints" / "7").rename(tmp_path / "7")  # the run that nothing stops has none of that step
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", earlier)
        goes_on(config, whole, folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, 13))
    assert all(line.get("train/tokens_per_second", 1) >= 0 for line in lines)
    assert any(line.get("train/tokens_per_second", 0) > 0 for line in lines)
    boards = sorted(path.name for path in (folder / "tensorboard").iterdir())
    assert [name[: len("step") + 12] for name in boards] == ["step000000000000", "step000000000006"]
