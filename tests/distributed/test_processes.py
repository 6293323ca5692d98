"""Several real processes train as one does, each reads its share, and all end where one ends."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import sct
from sct.data.loader import Loader
from sct.data.store import Store
from sct.errors import AGAIN, ConfigError, DataError, ProcessLostError
from sct.families.tasks import make_task
from sct.train import processes, resume
from sct.train.experiment import run
from tests.distributed.processes import ROOT, Run, free_port, write_config
from tests.train.conftest import CONFIG, merged

# Runs stop before their last step, after which they would be measured, which takes longer than the training.
STEPS, STOP, BATCH = 12, 11, 4
SMALL = {
    "model__num_downsamples": 1, "train__batch_size": BATCH, "train__steps": STEPS, "train__eval_every": 6,
    "train__checkpoint_every": 3, "train__keep_last": 20, "train__stop_at": STOP, "train__loader_threads": 1,
    "train__mesh": {"data": -1, "fsdp": 1, "sequence": 1, "tensor": 1},
}  # fmt: skip


@pytest.fixture
def small(config):
    return lambda **changes: config(**{**SMALL, **changes})


@pytest.fixture(scope="module")
def straight(store, tmp_path_factory) -> Path:
    """Folder of the run that one process makes without a stop."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    run(merged(CONFIG, **{"data__store": str(store), **SMALL}), folder)
    return folder


def numbers(workdir: Path) -> dict[int, dict[str, float]]:
    """What the log says of each step but how fast it was."""
    steps: dict[int, dict[str, float]] = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        values = {key: value for key, value in entry.items() if "/" in key and "per_second" not in key}
        steps.setdefault(entry["step"], {}).update(values)
    return steps


def assert_same(workdir: Path, other: Path, steps: int = STOP) -> None:
    here, there = numbers(workdir), numbers(other)
    assert list(here) == list(range(1, steps + 1))
    for step, values in here.items():
        assert {"train/loss", "train/gradient_norm"} <= set(values) == set(there[step])
        for name, value in values.items():
            np.testing.assert_allclose(
                value, there[step][name], rtol=1e-5, atol=1e-6, err_msg=f"{step} {name}"
            )


def assert_one_error(text: str) -> str:
    """The one line that tells a user what happened."""
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, text
    assert "Traceback" not in text
    return errors[0]


@pytest.mark.slow
def test_two_processes_train_as_one_read_their_share_and_one_goes_on(small, straight, tmp_path):
    file = write_config(small(train__stop_at=6), tmp_path / "two.py")
    with Run(file, tmp_path / "run", 2) as two:
        assert two.statuses() == [0, 0], two.everything()
        assert_same(tmp_path / "run", straight, 6)

        task, _ = make_task(small(), Store.open(small()["data"]["store"]))
        entries = Loader(task.dataset("train"), BATCH, seed=0)._sequence()
        ahead = 20  # batches, more than are read in advance
        order = [entries[i][:2] for i in range(BATCH * ahead)]
        assert len(set(order)) == len(order)
        for number in (0, 1):
            share = [
                [order[batch * BATCH + row] for row in (2 * number, 2 * number + 1)] for batch in range(ahead)
            ]
            used, all_of_it = (set(itertools.chain(*share[:n])) for n in (6, ahead))
            assert used <= two.read(number) <= all_of_it
        assert "run folder" in two.said(0)
        assert "run folder" not in two.said(1)
    run(small(), tmp_path / "run")
    assert_same(tmp_path / "run", straight)


@pytest.mark.slow
def test_two_processes_train_the_run_that_they_build_on(small, tmp_path):
    first = small(train__stop_at=0, train__steps=3)
    parent = {"option": "init_from", "workdir": str(tmp_path / "first"), "config": first}
    config = {**small(train__stop_at=2), "init_from": parent["workdir"], "builds_on": {"first": parent}}
    with Run(write_config(config, tmp_path / "two.py"), tmp_path / "run", 2) as two:
        assert two.statuses() == [0, 0], two.everything()
        assert "does not exist yet: training it first" in two.said(0)
        assert "training it first" not in two.said(1)
    assert resume.is_finished(tmp_path / "first")
    alone = run(
        {**config, "init_from": str(tmp_path / "first" / "model"), "builds_on": {}}, tmp_path / "alone"
    )
    assert alone.progress.step == 2
    assert_same(tmp_path / "run", tmp_path / "alone", 2)


@pytest.mark.parametrize(
    ("where", "count", "number", "sentence"),
    [
        ("localhost", 2, 0, "HOST:PORT"),
        ("localhost:many", 2, 0, "HOST:PORT"),
        ("localhost:FREE", 2, 2, "--process_id"),
        ("localhost:TAKEN", 2, 0, "listen"),
        ("127.0.0.1:FREE", 2, 1, "127.0.0.1"),
    ],
)
def test_what_cannot_be_joined_is_found_before_anything_is_started(where, count, number, sentence):
    with socket.create_server(("", 0)) as taken:
        where = where.replace("FREE", str(free_port())).replace("TAKEN", str(taken.getsockname()[1]))
        with pytest.raises(ConfigError, match=re.escape(sentence)):
            processes.join(where, count, number, seconds=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["--coordinator=127.0.0.1:PORT", "--num_processes=2", "--process_id=0"],
            "joined within 2 s (DEADLINE",
        ),
        ([], "no cluster was found"),
    ],
    ids=["alone", "nothing"],
)
def test_processes_that_do_not_find_each_other_say_so(small, tmp_path, words, sentence):
    file = write_config(small(), tmp_path / "c.py")
    words = [word.replace("PORT", str(free_port())) for word in words]
    done = subprocess.run(
        [
            sys.executable, "-m", "launch.train", f"--config={file}", f"--workdir={tmp_path}/run", "--multihost",
            "--join_seconds=2", *words,
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert sentence in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path / "run").exists()


# A process that joins others, none or one, and then ends in one of several ways.
ENDS = """
import ctypes, faulthandler, os, sys, threading, time
from sct.train import processes, resume
faulthandler.enable()
processes.join("127.0.0.1:" + sys.argv[1], 1, 0)
libc = ctypes.CDLL(None)
said = b"F0101 client.h:80] Terminating process because the JAX distributed service detected fatal errors. This most \
likely indicates that another task died; see the other task logs. absl::Status: STATUS\\nand a dump\\n"
match sys.argv[2]:
    case "abort":  # holds the interpreter's lock, so no thread of Python runs any more
        os.abort()
    case "thread":
        threading.Thread(target=libc.abort).start()
        time.sleep(60)
    case "signal":
        while True:
            os.kill(os.getpid(), 6)
    case status:
        processes._watches[0].answer = lambda text: processes._answer_to_loss(text, 1, 2)
        os.write(2, said.replace(b"STATUS", status.encode()))
        libc.abort()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ending", "status", "sentence"),
    [
        ("abort", -signal.SIGABRT, ""),
        ("thread", -signal.SIGABRT, ""),
        ("signal", -signal.SIGABRT, ""),
        (
            "UNAVAILABLE: heartbeats",
            AGAIN,
            "process 1 of 2 lost another process, which has ended or does not answer",
        ),
        ("INTERNAL: a defect", -signal.SIGABRT, ""),
    ],
)
def test_only_a_loss_that_jax_tells_of_is_called_one_and_other_aborts_act(ending, status, sentence):
    done = subprocess.run(
        [sys.executable, "-c", ENDS, str(free_port()), ending],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    if sentence:
        assert f"{sentence} (UNAVAILABLE: heartbeats)" in assert_one_error(done.stderr)
    else:
        assert not [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert "Fatal Python error: Aborted" in done.stderr
    # What C code says is shown, even if it is the last.
    assert ("absl::Status" in done.stderr) == (":" in ending)


JAX_ERROR = jax.errors.JaxRuntimeError


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (JAX_ERROR("UNAVAILABLE: failed to connect to all addresses"), True),
        (JAX_ERROR("DEADLINE_EXCEEDED: Barrier timed out."), True),
        (JAX_ERROR("INTERNAL: Gloo AllReduce failed: Connection closed by peer [127.0.0.1]:36055"), True),
        (JAX_ERROR("INTERNAL: NCCL operation ncclAllReduce failed: remote process exited"), True),
        (JAX_ERROR("INVALID_ARGUMENT: gloor/runs/x, study heartbeat_2021, socket, UNAVAILABLE"), False),
        (JAX_ERROR("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes"), False),
        (OSError("gloo/runs/x failed: Connection reset"), False),
        (DataError("UNAVAILABLE: heartbeat of gloo"), False),
        (KeyboardInterrupt("UNAVAILABLE: x"), False),
    ],
)
def test_an_error_is_a_loss_only_where_jax_says_so(monkeypatch, error, lost):
    left = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes.atexit, "register", lambda leave, status: left.append(status))
    with pytest.raises(BaseException) as caught, processes.together():  # noqa: PT012
        try:
            raise error
        except Exception as cause:
            if lost:
                raise ValueError("what a library makes of it") from cause
            raise
    assert isinstance(caught.value, ProcessLostError) == lost
    assert left == [AGAIN if lost else 130 if isinstance(error, KeyboardInterrupt) else 1]


@pytest.mark.slow
def test_two_processes_that_are_asked_to_stop_save_and_say_so(small, tmp_path):
    long = small(
        train__stop_at=0, train__steps=100_000, train__eval_every=100_000, train__checkpoint_every=100_000
    )
    with Run(write_config(long, tmp_path / "c.py"), tmp_path / "run", 2) as two:
        log = tmp_path / "run" / "metrics.jsonl"
        while not log.exists() or log.read_text().count("train/loss") < 3:
            assert two.processes[0].poll() is None, two.everything()
            time.sleep(0.1)
        with Run(write_config(long, tmp_path / "c.py"), tmp_path / "run", 2) as second:
            assert second.statuses(120) == [1, 1], second.everything()
            for number in range(2):
                error = assert_one_error(second.said(number))
                assert f"{tmp_path / 'run'} is in use by a training" in error
                assert f"process {two.processes[0].pid}" in error
        for process in two.processes:
            process.send_signal(signal.SIGTERM)
        assert two.statuses(120) == [AGAIN, AGAIN], two.everything()
        assert "run the same command again" in two.said(0)
    assert len([path for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit()]) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("count", "mesh"), [(2, {"fsdp": 2}), (4, {"data": 2, "fsdp": 2}), (4, {"data": 4})])
def test_every_mesh_of_processes_trains_as_one(small, straight, tmp_path, count, mesh):
    sizes = {**SMALL["train__mesh"], "data": 1, **mesh}
    with Run(write_config(small(train__mesh=sizes), tmp_path / "c.py"), tmp_path / "run", count) as several:
        assert several.statuses() == [0] * count, several.everything()
    assert_same(tmp_path / "run", straight)


@pytest.mark.slow
def test_the_model_of_several_processes_is_whole_and_one_process_speaks(small, straight, tmp_path):
    shutil.copytree(straight, tmp_path / "one")
    run(small(train__stop_at=0), tmp_path / "one")
    sizes = {**SMALL["train__mesh"], "data": 1, "fsdp": 2}
    file = write_config(small(train__stop_at=0, train__mesh=sizes), tmp_path / "c.py")
    with Run(file, tmp_path / "two", 2) as two:
        assert two.statuses() == [0, 0], two.everything()
        assert "Imputation of" in two.said(0)
        assert not [line for line in two.said(1).splitlines() if not line.startswith("[Gloo]")]
    one, other = (dict(_leaves(sct.load(tmp_path / name / "model").variables)) for name in ("one", "two"))
    assert one.keys() == other.keys()
    for path, value in one.items():
        np.testing.assert_allclose(other[path], value, rtol=1e-3, atol=1e-4, err_msg=path)
    assert (tmp_path / "two" / "report.json").exists()


def _leaves(tree, path=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}/{key}")
        else:
            yield f"{path}/{key}", np.asarray(value)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "victim", "then"), [(2, 1, 4), (4, 0, 1)])
def test_where_one_is_killed_the_others_end_and_others_go_on(small, straight, tmp_path, count, victim, then):
    plain = small(train__keep_last=2)
    with Run(write_config(plain, tmp_path / "c.py"), tmp_path / "run", count) as several:
        killed = several.kill_at(3, victim)
        statuses = several.statuses(timeout=60)
        assert time.monotonic() - killed < 60
        for number, status in enumerate(statuses):
            assert status == (-9 if number == victim else AGAIN), several.everything()
            if number != victim:
                error = assert_one_error(several.said(number))
                assert f"process {number} of {count} lost another process" in error
                assert "run the same command again" in error
    if then == 1:
        run(plain, tmp_path / "run")
    else:
        with Run(write_config(plain, tmp_path / "c.py"), tmp_path / "run", then) as others:
            assert others.statuses() == [0] * then, others.everything()
            assert "resuming from step" in others.said(0)
    assert_same(tmp_path / "run", straight)


@pytest.mark.slow
def test_slurm_tells_the_processes_of_each_other(small, straight, tmp_path):
    job = {
        "SLURM_JOB_ID": str(free_port()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_ID": "0",
    }  # fmt: skip
    env = [{**job, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)]
    file = write_config(small(train__stop_at=3), tmp_path / "c.py")
    with Run(file, tmp_path / "run", 2, env=env) as two:
        assert two.statuses() == [0, 0], two.everything()
    assert_same(tmp_path / "run", straight, 3)


@pytest.mark.slow
def test_a_mistake_found_by_one_process_ends_all(small, tmp_path):
    """A run folder that only process 0 can see, as on nodes without a common file system."""
    file = write_config(small(), tmp_path / "c.py")
    with Run(file, tmp_path / "run", 2) as two:
        two.kill_at(3, 1)
        two.statuses(60)
    with Run(file, tmp_path / "run", 2, "--config.optimizer.peak_lr=0.5") as other:
        assert other.statuses(120) == [1, 1]
        for number in range(2):
            assert "optimizer.peak_lr = 0.001, but the configuration has 0.5" in assert_one_error(
                other.said(number)
            )
