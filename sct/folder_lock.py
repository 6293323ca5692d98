"""One process at a time writes to a folder: a lock that names its holder and that the system drops when it dies."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sct.errors import ConfigError, FolderInUseError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
# The holder touches the file this often; without a touch for so long, a holder on another host counts as dead.
BEAT_SECONDS, SILENT_SECONDS = 5.0, 30.0
# A touch older than this is not waited for: no two clocks of a cluster differ by so much.
OLD_SECONDS = 600.0
# How soon a holder that was asked to stop has said so, and how long it may take to save.
NOTICE_SECONDS = 3.0
SAVING_SECONDS = 900.0
_POLL_SECONDS = 0.2
_open: set[_Lock] = set()


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who holds a folder, as it wrote itself down in the lock file.

    Attributes
    ----------
    host, pid
        Machine and process.
    since
        Local time there, ISO 8601.
    doing
        "training", "benchmark".
    stopping
        Whether it was asked to stop (SIGTERM, Ctrl-C) and only saves.
    token
        Different for every holder.
    """

    host: str
    pid: int
    since: str
    doing: str
    stopping: bool = False
    token: str = ""

    def __str__(self) -> str:
        return f"a {self.doing} on {self.host} (process {self.pid}, since {self.since})"


@contextmanager
def only_one(folder: Path, doing: str, option: str) -> Iterator[None]:
    """Hold a folder, which is made where it does not exist, and refuse it to every other process meanwhile.

    The lock is `flock` on the file `.lock`, which the system drops when the holder dies however it dies. Some network
    file systems do not have it, or keep it to one host: the holder therefore also touches the file every few seconds,
    and one on another host counts as dead after `SILENT_SECONDS` without a touch. A holder that was asked to stop is
    waited for.

    Parameters
    ----------
    folder
        What to hold. If nothing is in it afterwards, it is removed again where it was made here.
    doing
        What it is held for, for the messages: "training".
    option
        Names the folder on the command line, for the messages.

    Raises
    ------
    FolderInUseError
        Another process, or another thread of this one, holds it.
    ConfigError
        The folder cannot be written.
    """
    made: list[Path] = []
    lock = _Lock(folder / LOCK, doing)
    try:
        try:
            made = [each for each in (folder, *folder.parents) if not each.exists()]
            lock.acquire(option)
        except OSError as error:
            raise ConfigError(
                f"the folder {folder} cannot be written ({error.strerror}): choose another {option}."
            ) from error
        yield
    finally:
        lock.release()
        with suppress(OSError):
            for each in made:  # not empty where something came into it
                each.rmdir()


class _Lock:
    """The lock file of a folder, held by this process or not."""

    def __init__(self, path: Path, doing: str):
        now = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        self.path = path
        self.me = Holder(socket.gethostname(), os.getpid(), now, doing, token=uuid.uuid4().hex)
        self._file = -1
        self._mine = False
        self._beat: _Beat | None = None

    def _reopen(self) -> None:
        self.close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        _open.add(self)

    def close(self) -> None:
        """Close the file; the lock goes with it, unless another process shares the file."""
        _open.discard(self)
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def forget(self) -> None:
        """Let go without a word, in a forked process."""
        beat, self._beat, self._mine = self._beat, None, False
        with suppress(OSError):
            self.close()
        if beat is not None:
            beat.forget()

    def acquire(self, option: str) -> None:
        """Take the lock, or raise `FolderInUseError`."""
        self._reopen()
        began, told = time.monotonic(), False
        while not self._take():
            holder = self._other()
            stopping = holder is not None and holder.stopping
            if time.monotonic() - began > (SAVING_SECONDS if stopping else NOTICE_SECONDS):
                raise self._refusal(holder, option)
            if stopping and not told:
                print(
                    f"{holder} was asked to stop and is still saving to {self.path.parent}: waiting for it to end.",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
                told = True
            time.sleep(_POLL_SECONDS)
        self._mine = True
        self._beat = _Beat(self)

    def _take(self) -> bool:
        """Lock the file and sign it; False where another process holds it."""
        locks = self._flock()
        if locks is False:
            return False
        if not self._is_current():  # removed by the one that held it
            self._reopen()
            return self._take()
        before = self._read()
        # On this host a holder that is alive would have its lock.
        if before is not None and (locks is None or before.host != self.me.host) and self._is_alive(before):
            self._unlock()
            return False
        if not self._is_current():  # removed while its holder was watched
            self._reopen()
            return self._take()
        self._sign(self.me)
        if locks is None:  # of two that come here at once, the last one to sign holds it
            time.sleep(5 * _POLL_SECONDS)
            signed = self._read()
            return signed is not None and signed.token == self.me.token
        return True

    def _flock(self) -> bool | None:
        """Whether the system gives the lock to this process; None where it has no locks."""
        if fcntl is None:
            return None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return None
        return True

    def _unlock(self) -> None:
        if fcntl is not None:
            with suppress(OSError):
                fcntl.flock(self._file, fcntl.LOCK_UN)

    def _is_current(self) -> bool:
        mine = os.fstat(self._file)
        try:
            there = os.stat(self.path)
        except FileNotFoundError:
            return False
        return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)

    def _read(self) -> Holder | None:
        """Who signed the file last and did not end; opened anew, for what other hosts wrote to be seen."""
        try:
            return Holder(**json.loads(self.path.read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def _other(self) -> Holder | None:
        """Who holds the lock, which it may have taken a moment ago."""
        end = time.monotonic() + 5 * _POLL_SECONDS
        while (holder := self._read()) is None and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
        return holder

    def _touched(self) -> float:
        with open(self.path, "rb") as file:
            return os.fstat(file.fileno()).st_mtime

    def _is_alive(self, holder: Holder) -> bool:
        """Whether a holder that the system does not vouch for touches the file."""
        before = self._touched()
        with tempfile.TemporaryFile(dir=self.path.parent) as new:  # the clock of the file system
            if abs(os.fstat(new.fileno()).st_mtime - before) > OLD_SECONDS:
                return False
        print(
            f"{self.path.parent} was last used by {holder}: checking for up to {SILENT_SECONDS:.0f} s "
            "whether it still runs.",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        end = time.monotonic() + SILENT_SECONDS
        while time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
            try:
                if self._touched() != before:
                    return self._other() is not None  # None: it has just ended
            except FileNotFoundError:  # it has just ended
                return False
        return False

    def _refusal(self, holder: Holder | None, option: str) -> FolderInUseError:
        who, stop = "another process, which left no name", ""
        if holder is not None:
            who = str(holder)
            if holder.stopping:
                who += f", which was asked to stop and has not ended after {SAVING_SECONDS:.0f} s"
            if (holder.host, holder.pid) != (self.me.host, self.me.pid):
                stop = f"stop it (`kill {holder.pid}` on {holder.host}), "
        return FolderInUseError(
            f"{self.path.parent} is in use by {who}: wait until it ends, {stop}or choose another {option}."
        )

    def _sign(self, holder: Holder | None) -> None:
        """Write a holder down; nothing for none. A full disk keeps it from being named, not from holding."""
        text = json.dumps(dataclasses.asdict(holder)).encode() if holder is not None else b""
        with suppress(OSError):
            os.lseek(self._file, 0, os.SEEK_SET)
            os.write(self._file, text)
            os.ftruncate(self._file, len(text))
            os.fsync(self._file)

    def is_stopping(self) -> None:
        """Tell those who want the folder that it will soon be free."""
        self._sign(dataclasses.replace(self.me, stopping=True))

    def touch(self) -> None:
        """Show other hosts that the holder is alive."""
        with suppress(OSError):
            os.utime(self.path)

    def release(self) -> None:
        """Let go of the folder."""
        if self._beat is not None:
            self._beat.end()
        if self._mine:
            self._sign(None)
            with suppress(OSError):
                if os.listdir(self.path.parent) == [LOCK]:
                    self.path.unlink()
        self.close()


class _Beat:
    """A thread that touches the lock file, and marks it at once where this process is asked to stop.

    The system tells it of signals by a socket: their handlers only run between two steps, which may take minutes.
    """

    def __init__(self, lock: _Lock):
        self._lock = lock
        self._reads, self._writes = socket.socketpair()
        self._reads.settimeout(BEAT_SECONDS)
        self._writes.setblocking(False)
        self._before: int | None = None
        with suppress(ValueError):  # another thread than the main one gets no signals
            self._before = signal.set_wakeup_fd(self._writes.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._run, daemon=True, name="lock")
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                heard = self._reads.recv(64)
            except TimeoutError:
                self._lock.touch()
                continue
            if not heard:
                return
            if self._before is not None and self._before >= 0:
                with suppress(OSError):
                    os.write(self._before, heard)
            if {signal.SIGTERM, signal.SIGINT} & set(heard):
                self._lock.is_stopping()

    def forget(self) -> None:
        """Listen to no signals in a forked process."""
        if self._before is not None:
            with suppress(ValueError):
                signal.set_wakeup_fd(-1)
        for each in (self._reads, self._writes):
            each.close()

    def end(self) -> None:
        if self._before is not None:
            signal.set_wakeup_fd(self._before)
        with suppress(OSError):
            self._writes.shutdown(socket.SHUT_WR)  # also of the copies that forked processes have
        self._writes.close()
        self._thread.join()
        self._reads.close()


def _forked() -> None:
    """Let a forked process not hold what it does not know of: the lock would outlive the one that took it.

    Nor may its signals be taken for those of the one that holds the lock.
    """
    for lock in list(_open):
        lock.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
