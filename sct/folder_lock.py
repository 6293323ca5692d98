"""Lock folders, so that only one process at a time writes to a folder.

The lock file names the process that holds the lock. When this process ends, the lock is released.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import signal
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sct import messages
from sct.errors import ConfigError, FolderInUseError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
# The holder touches the lock file at the first interval. A holder on another host that has not touched it for the
# second interval counts as dead.
BEAT_SECONDS, SILENT_SECONDS = 5.0, 30.0
# A lock file that was last touched longer ago is dead without waiting; the clocks of a cluster differ by less.
OLD_SECONDS = 600.0
# Time in which a holder that was asked to stop marks the lock file, and time in which it must have saved.
NOTICE_SECONDS = 3.0
SAVING_SECONDS = 900.0
_POLL_SECONDS = 0.2
_open: set[_Lock] = set()


@dataclasses.dataclass(frozen=True)
class Holder:
    """Describe the process that holds the lock of a folder. The lock file contains these fields.

    Attributes
    ----------
    host, pid
        Host name and process id.
    since
        Time at which the process took the lock, in ISO 8601 format and the local time of the host.
    doing
        Kind of work that the process does, such as "training" or "benchmark".
    stopping
        Whether the process was asked to stop (SIGTERM, Ctrl-C) and is now saving its state.
    token
        Unique id of the holder.
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
    """Lock a folder for this process while the block runs; create the folder if needed.

    The lock is `flock` on the file `.lock`. The system releases the lock when the process ends for any reason. Some
    network file systems do not support `flock` across hosts. The holder therefore also touches the file every few
    seconds. A holder on another host is treated as dead after `SILENT_SECONDS` without a touch. If the holder was asked
    to stop, this function waits until the holder has ended.

    Parameters
    ----------
    folder
        Folder to lock. The folder is deleted if this function created it and it is empty at the end.
    doing
        Kind of work that this process does, for messages of other processes, such as "training".
    option
        Command line option that sets the folder, for error messages.

    Raises
    ------
    FolderInUseError
        Another process, or another thread of this process, holds the lock.
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
            for each in made:  # rmdir fails if the folder has files, as intended
                each.rmdir()


class _Lock:
    """Open, lock and update the lock file of one folder."""

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
        """Close the lock file. The lock is released, unless a forked process still has the file open."""
        _open.discard(self)
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def forget(self) -> None:
        """Drop the lock in a forked process, without changing the lock file."""
        beat, self._beat, self._mine = self._beat, None, False
        with suppress(OSError):
            self.close()
        if beat is not None:
            beat.forget()

    def acquire(self, option: str) -> None:
        """Take the lock, or raise `FolderInUseError`."""
        self._reopen()
        began, announced = time.monotonic(), False
        while not self._take():
            holder = self._other()
            stopping = holder is not None and holder.stopping
            if time.monotonic() - began > (SAVING_SECONDS if stopping else NOTICE_SECONDS):
                raise self._refusal(holder, option)
            if stopping and not announced:
                messages.notice(
                    f"{holder} was asked to stop and is still saving to {self.path.parent}: waiting for it to end.",
                )
                announced = True
            time.sleep(_POLL_SECONDS)
        self._mine = True
        self._beat = _Beat(self)

    def _take(self) -> bool:
        """Lock the file and write this process to it as the holder. Return False if another process holds the lock."""
        locks = self._flock()
        if locks is False:
            return False
        if not self._is_current():  # the previous holder deleted the file
            self._reopen()
            return self._take()
        before = self._read()
        # A living holder on this host would still hold the flock, so only other hosts need a check.
        if before is not None and (locks is None or before.host != self.me.host) and self._is_alive(before):
            self._unlock()
            return False
        if not self._is_current():  # the file was deleted during the check
            self._reopen()
            return self._take()
        self._sign(self.me)
        if locks is None:  # without flock, the last of several concurrent writers holds the lock
            time.sleep(5 * _POLL_SECONDS)
            signed = self._read()
            return signed is not None and signed.token == self.me.token
        return True

    def _flock(self) -> bool | None:
        """Try to lock the file with flock. Return whether this worked, or None if the system has no flock."""
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
        """Return the holder in the lock file, or None. The file is reopened to see what other hosts wrote."""
        try:
            return Holder(**json.loads(self.path.read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def _other(self) -> Holder | None:
        """Return the holder of the lock. Wait briefly, because the holder may not have written the lock file yet."""
        end = time.monotonic() + 5 * _POLL_SECONDS
        while (holder := self._read()) is None and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
        return holder

    def _touched(self) -> float:
        with open(self.path, "rb") as file:
            return os.fstat(file.fileno()).st_mtime

    def _is_alive(self, holder: Holder) -> bool:
        """Return whether the holder still touches the lock file. This check is for cases that flock cannot decide."""
        before = self._touched()
        with tempfile.TemporaryFile(dir=self.path.parent) as new:  # gives the present time of the file system
            if abs(os.fstat(new.fileno()).st_mtime - before) > OLD_SECONDS:
                return False
        messages.notice(
            f"{self.path.parent} was last used by {holder}: checking for up to {SILENT_SECONDS:.0f} s "
            "whether this process is still running.",
        )
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
        who, stop = "another, unknown process", ""
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
        """Write the holder to the lock file, or clear the file for None. Errors such as a full disk are ignored."""
        text = json.dumps(dataclasses.asdict(holder)).encode() if holder is not None else b""
        with suppress(OSError):
            os.lseek(self._file, 0, os.SEEK_SET)
            os.write(self._file, text)
            os.ftruncate(self._file, len(text))
            os.fsync(self._file)

    def is_stopping(self) -> None:
        """Mark in the lock file that this process is saving and will release the folder soon."""
        self._sign(dataclasses.replace(self.me, stopping=True))

    def touch(self) -> None:
        """Touch the lock file, to show other hosts that the holder is alive."""
        with suppress(OSError):
            os.utime(self.path)

    def release(self) -> None:
        """Release the lock, and delete the lock file if the folder has no other files."""
        if self._beat is not None:
            self._beat.end()
        if self._mine:
            self._sign(None)
            with suppress(OSError):
                if os.listdir(self.path.parent) == [LOCK]:
                    self.path.unlink()
        self.close()


class _Beat:
    """Touch the lock file regularly from a thread. If this process is asked to stop, record this in the file at once.

    The thread receives signals through a socket (`signal.set_wakeup_fd`). Python signal handlers would run too late,
    because one training step can take minutes.
    """

    def __init__(self, lock: _Lock):
        self._lock = lock
        self._reads, self._writes = socket.socketpair()
        self._reads.settimeout(BEAT_SECONDS)
        self._writes.setblocking(False)
        self._before: int | None = None
        with suppress(ValueError):  # only the main thread can receive signals
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
        """Stop receiving signals in a forked process."""
        if self._before is not None:
            with suppress(ValueError):
                signal.set_wakeup_fd(-1)
        for each in (self._reads, self._writes):
            each.close()

    def end(self) -> None:
        if self._before is not None:
            signal.set_wakeup_fd(self._before)
        with suppress(OSError):
            self._writes.shutdown(socket.SHUT_WR)  # also closes the copies in forked processes
        self._writes.close()
        self._thread.join()
        self._reads.close()


def _forked() -> None:
    """Drop all locks in a forked process.

    Otherwise the forked process would keep the lock after its parent has ended, and a signal to the forked process
    would mark the lock as stopping.
    """
    for lock in list(_open):
        lock.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
