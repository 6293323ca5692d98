"""A folder that one process writes to: who is refused, who waits, and what a dead holder leaves."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sct import folder_lock
from sct.errors import ConfigError, FolderInUseError
from sct.folder_lock import LOCK, only_one

ROOT = Path(__file__).resolve().parents[1]

# Holds a folder until a line comes; with "saves", SIGTERM lets it end only after a long call of C code, during which no
# handler runs; with "forks", a process that it made goes on after it.
HOLDER = """
import hashlib, os, signal, sys, time
from pathlib import Path
from sct.folder_lock import only_one

asked = []
if sys.argv[2] == "saves":
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
with only_one(Path(sys.argv[1]), "training", "--workdir"):
    child = os.fork() if sys.argv[2] == "forks" else 1
    if not child:
        time.sleep(60)
        os._exit(0)
    print("held", child, flush=True)
    if sys.argv[2] == "saves":
        end = time.monotonic() + 3
        while time.monotonic() < end or not asked:
            hashlib.pbkdf2_hmac("sha256", b"a", b"b", 3_000_000)
    else:
        sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def _soon(request, monkeypatch):
    if "asked_to_stop" not in request.node.name:
        monkeypatch.setattr(folder_lock, "NOTICE_SECONDS", 0.3)


@pytest.fixture
def holder():
    """Function that starts a process that holds a folder, and the word behind "held"."""
    started: list[subprocess.Popen] = []

    def start(folder: Path, how: str = "waits") -> tuple[subprocess.Popen, int]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(folder), how],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        word, number = process.stdout.readline().split()
        assert word == "held"
        return process, int(number)

    yield start
    for process in started:
        process.kill()
        process.communicate()


def held(folder: Path) -> None:
    with only_one(folder, "training", "--workdir"):
        assert (folder / LOCK).stat().st_size > 0


def test_a_second_process_is_refused_at_once_and_told_by_whom(tmp_path, holder):
    process, _ = holder(tmp_path / "run")
    started = time.monotonic()
    for _ in range(2):
        with pytest.raises(FolderInUseError) as error:
            held(tmp_path / "run")
    assert time.monotonic() - started < 3
    message = str(error.value)
    assert "\n" not in message
    for part in (
        str(tmp_path / "run"), "a training on", socket.gethostname(), f"process {process.pid}", "since 20",
        f"kill {process.pid}", "another --workdir",
    ):  # fmt: skip
        assert part in message, part
    process.communicate("\n")
    assert process.returncode == 0
    held(tmp_path / "run")


def test_a_dead_holder_does_not_block(tmp_path, holder):
    for how in ("waits", "forks"):
        process, child = holder(tmp_path / how, how)
        process.kill()
        process.wait()
        assert (tmp_path / how / LOCK).stat().st_size > 0, "what it wrote down is still there"
        started = time.monotonic()
        held(tmp_path / how)
        assert time.monotonic() - started < 2, how
        if how == "forks":
            os.kill(child, signal.SIGKILL)


def test_the_holder_touches_the_file_also_with_many_files_open(tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(folder_lock, "BEAT_SECONDS", 0.1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1400:
        pytest.skip("so many files cannot be open here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1400), hard))
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        with only_one(tmp_path, "training", "--workdir"):
            os.utime(tmp_path / LOCK, (1, 1))
            end = time.monotonic() + 20
            while (tmp_path / LOCK).stat().st_mtime == 1 and time.monotonic() < end:
                time.sleep(0.05)
            assert (tmp_path / LOCK).stat().st_mtime > 1
    finally:
        for file in files:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_signals_of_a_forked_process_are_its_own(tmp_path):
    """And the holder ends, though the forked process has copies of its sockets and goes on."""
    code = """
import os, signal, sys, time
from pathlib import Path
from sct.folder_lock import LOCK, only_one
folder = Path(sys.argv[1])
with only_one(folder, "training", "--workdir"):
    child = os.fork()
    if not child:
        print(signal.set_wakeup_fd(-1), flush=True)
        time.sleep(60)
        os._exit(0)
    time.sleep(1)
os.kill(child, signal.SIGKILL)
print("ended", flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.stdout.split() == ["-1", "ended"], done


def test_a_folder_that_may_not_be_looked_into_is_told(tmp_path, monkeypatch):
    def refuse(path, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(type(tmp_path), "exists", refuse)
    with pytest.raises(ConfigError, match=r"Permission denied.*--workdir"):
        held(tmp_path / "run")


@pytest.mark.slow
def test_one_that_is_asked_to_stop_is_waited_for(tmp_path, holder, capfd):
    process, _ = holder(tmp_path, "saves")
    process.send_signal(signal.SIGTERM)
    held(tmp_path)
    assert process.wait() == 0
    said = capfd.readouterr().err
    assert said.count("still saving") == 1
    assert f"process {process.pid}" in said


def test_one_that_never_ends_saving_is_not_waited_for(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(folder_lock, "SAVING_SECONDS", 0.5)
    process, _ = holder(tmp_path, "saves")
    process.send_signal(signal.SIGTERM)
    time.sleep(1)
    with pytest.raises(FolderInUseError, match=f"process {process.pid}.* has not ended after"):
        held(tmp_path)


def test_another_thread_of_the_process_is_refused(tmp_path):
    with only_one(tmp_path, "benchmark", "--output"), ThreadPoolExecutor(1) as pool:
        with pytest.raises(FolderInUseError, match=f"a benchmark .*process {os.getpid()}") as error:
            pool.submit(held, tmp_path).result()
        assert "kill" not in str(error.value)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(held, tmp_path).result()


def left_by(folder: Path, host: str, seconds: float = 0) -> Path:
    """Lock file of a holder on a host that this system knows nothing of, last touched some seconds ago."""
    folder.mkdir(exist_ok=True)
    record = {"host": host, "pid": 12, "since": "2025-01-01 12:00:00+00:00", "doing": "training"}
    (folder / LOCK).write_text(json.dumps(record))
    then = time.time() - seconds
    os.utime(folder / LOCK, (then, then))
    return folder / LOCK


def test_a_holder_on_another_host_lives_while_it_touches_the_file(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(folder_lock, "SILENT_SECONDS", 1.5)
    lock, ended = left_by(tmp_path / "alive", "elsewhere"), threading.Event()

    def touch() -> None:
        while not ended.wait(0.3):
            os.utime(lock)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(touch)
        with pytest.raises(FolderInUseError, match="elsewhere"):
            held(tmp_path / "alive")
        ended.set()
    assert json.loads(lock.read_text())["host"] == "elsewhere", "its name stays"

    cases = {"silent": ("elsewhere", 5, 1.4), "long dead": ("elsewhere", 4000, 0), "here": (None, 5, 0)}
    for name, (host, age, least) in cases.items():
        left_by(tmp_path / name, host or socket.gethostname(), age)
        started = time.monotonic()
        held(tmp_path / name)
        took = time.monotonic() - started
        assert least <= took < least + 1.3, (name, took)
    assert "elsewhere" in capfd.readouterr().err


def test_a_holder_that_ends_while_it_is_watched_leaves_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "SILENT_SECONDS", 5)
    lock = left_by(tmp_path, "elsewhere")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: (time.sleep(0.5), lock.unlink()))
        started = time.monotonic()
        held(tmp_path)
    assert time.monotonic() - started < 3


@pytest.mark.slow
def test_file_systems_without_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "fcntl", None)
    monkeypatch.setattr(folder_lock, "SILENT_SECONDS", 1.5)
    monkeypatch.setattr(folder_lock, "BEAT_SECONDS", 0.2)
    with only_one(tmp_path, "training", "--workdir"), pytest.raises(FolderInUseError, match=str(os.getpid())):
        held(tmp_path)
    held(tmp_path)
    left_by(tmp_path, socket.gethostname())
    held(tmp_path)

    # Of several at once, one.
    together, results = threading.Barrier(4), []

    def one() -> None:
        together.wait()
        try:
            with only_one(tmp_path, "training", "--workdir"):
                results.append("held")
                together.wait()
        except FolderInUseError:
            results.append("refused")
            together.wait()

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(one) for _ in range(4)]:
            done.result()
    assert sorted(results) == ["held", "refused", "refused", "refused"]


def test_nothing_is_left_of_a_folder_that_nothing_came_into(tmp_path):
    held(tmp_path / "new" / "run")
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine").mkdir()
    held(tmp_path / "mine")
    assert list((tmp_path / "mine").iterdir()) == []
    with only_one(tmp_path / "new" / "run", "training", "--workdir"):
        (tmp_path / "new" / "run" / "file").write_text("")
    assert (tmp_path / "new" / "run" / "file").exists()
    assert (tmp_path / "new" / "run" / LOCK).stat().st_size == 0


def test_a_folder_that_is_removed_meanwhile(tmp_path, monkeypatch):
    # One process opens the lock file, and the holder removes it before that one locks it.
    original, removed = folder_lock._Lock._flock, []

    def flock(self):
        if not removed:
            removed.append((self.path).unlink())
        return original(self)

    monkeypatch.setattr(folder_lock._Lock, "_flock", flock)
    with only_one(tmp_path, "training", "--workdir"), pytest.raises(FolderInUseError):
        held(tmp_path)
    assert removed


def test_handlers_of_signals_still_run_and_what_was_there_comes_back(tmp_path):
    heard: list[int] = []
    reads, writes = socket.socketpair()
    writes.setblocking(False)
    before, handler = (
        signal.set_wakeup_fd(writes.fileno()),
        signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number)),
    )
    try:
        with only_one(tmp_path, "training", "--workdir"):
            os.kill(os.getpid(), signal.SIGUSR1)
            reads.settimeout(5)
            assert reads.recv(8) == bytes([signal.SIGUSR1]), "whoever listened before still hears"
            assert not json.loads((tmp_path / LOCK).read_text())["stopping"]
        assert heard == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, handler)
        assert signal.set_wakeup_fd(before) == writes.fileno()
        reads.close()
        writes.close()


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / LOCK).symlink_to(tmp_path / "file")
    for folder in (tmp_path / "file" / "run", tmp_path / "linked"):
        with pytest.raises(ConfigError, match=r"cannot be written .*another --workdir"):
            held(folder)
    assert (tmp_path / "file").read_text() == "", "a link is not followed"
