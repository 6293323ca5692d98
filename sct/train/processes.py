"""One run of several processes: join them, and end all of them when one ends."""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, suppress
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from sct.errors import AGAIN, ConfigError, FolderInUseError, ProcessLostError, SctError, first_line
from sct.folder_lock import only_one

# Seconds without an answer after which a process counts as lost; the others then end within a minute.
HEARTBEAT_SECONDS = 30

_HOW = "start it through Slurm or on a TPU pod, or give --coordinator=HOST:PORT, --num_processes and --process_id"
_CODES = "UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED"  # status codes that mean another process's end
# Messages of a collective or barrier that fails because another process is gone.
_LOST = re.compile(
    rf"^(?:{_CODES}): |(?i:\bgloo \w+ failed\b|\bnccl operation\b|\bconnection (?:reset|closed|refused)\b)"
)
# Last message of JAX's coordination client, before it calls `abort` in its own thread.
_ENDED = re.compile(rb"JAX distributed service detected fatal errors[^\n]*absl::Status: ([^\n]+)\n")
_watches: list[_Watch] = []


def join(coordinator: str | None, count: int | None, number: int | None, seconds: int = 300) -> None:
    """Join this process to the others. Call it before anything else uses JAX.

    Parameters
    ----------
    coordinator
        "HOST:PORT" of process 0; None where Slurm or a TPU pod gives it.
    count, number
        Number of processes, and number of this one, from 0; None where Slurm or a TPU pod gives them.
    seconds
        How long the processes wait for each other.

    Raises
    ------
    ConfigError
        The processes do not find each other. If JAX finds this out, it ends the process after the same message.
    """
    _check(coordinator, count, number, seconds)
    failure = (
        f"--multihost: not all processes joined within {seconds} s ({{}}): start all of them with the same "
        "--coordinator and --num_processes, each with its own --process_id."
    )
    watch = _Watch(lambda status: (1, failure.format(status)))
    try:
        jax.distributed.initialize(
            coordinator, count, number,
            initialization_timeout=seconds, heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        watch.give_back()
        raise ConfigError(f"--multihost found no cluster to join ({first_line(error)}): {_HOW}.") from error
    number, count = jax.process_index(), jax.process_count()
    watch.go_on(lambda status: _told(status, number, count))


def _check(coordinator: str | None, count: int | None, number: int | None, seconds: int) -> None:
    """Raise `ConfigError` for arguments that would end in a crash or a long wait."""
    if seconds < 1:
        raise ConfigError(f"--join_seconds is {seconds}, but it must be at least 1.")
    if count is not None and number is not None and not 0 <= number < count:
        raise ConfigError(
            f"--process_id is {number}, but with --num_processes={count} it must be one of 0 to {count - 1}."
        )
    if coordinator is None:
        return
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(
            f"--coordinator is {coordinator!r}, but it must be HOST:PORT, such as node1:8476, the same for every "
            "process."
        )
    if number == 0:
        try:
            socket.create_server(("", int(port))).close()
        except OSError as error:
            raise ConfigError(
                f"process 0 cannot listen at port {port} ({error.strerror}): give another port in --coordinator, "
                "the same for every process."
            ) from error
    elif number is not None:
        _find(host.strip("[]"), int(port), seconds)


def _find(host: str, port: int, seconds: float) -> None:
    """Wait until process 0 listens."""
    end, reason = time.monotonic() + seconds, ""
    while (left := end - time.monotonic()) > 0:
        try:
            socket.create_connection((host, port), timeout=left).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
        time.sleep(min(0.5, max(left, 0)))
    raise ConfigError(
        f"process 0 did not answer at {host}:{port} within {seconds:g} s ({reason}): start it with the same "
        "--coordinator, or check that its machine can be reached by that name."
    )


def _told(status: str, number: int, count: int) -> tuple[int, str] | None:
    """Exit status and message if a status of JAX's coordination service means another process's end, else None."""
    if count == 1 or not re.match(rf"({_CODES}): ", status):
        return None
    return AGAIN, _lost(number, count, status[:200])


class _Watch:
    """Ends this process with a message when JAX's coordination client is about to end it by `abort`.

    The client writes the reason to standard error, and offers no other way to learn it. So standard error goes to a
    file, which a thread reads. Meanwhile the handler of the signal of `abort` is the C function `sleep`: a handler in
    Python could wait forever for the interpreter or the heap. After 6 seconds the signal acts as usual, so any other
    `abort` only comes a little later.

    Parameters
    ----------
    answer
        Status of the coordination service -> exit status and message, or None to let the signal act.
    """

    def __init__(self, answer: Callable[[str], tuple[int, str] | None]) -> None:
        self.answer = answer
        if os.name != "posix":
            return
        sys.stderr.flush()
        self.held = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process lives
        self.real = os.dup(2)
        os.dup2(self.held.fileno(), 2)
        _delay_abort()
        _watches.append(self)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        heard, place = b"", 0
        while True:
            time.sleep(0.1)
            new = os.pread(self.held.fileno(), 1 << 20, place)
            if not new:
                continue
            place, heard = place + len(new), (heard + new)[-(1 << 16) :]
            for status in _ENDED.findall(heard):
                if answer := self.answer(status.decode(errors="replace").strip()):
                    os.write(self.real, f"error: {answer[1]}\n".encode())
                    _leave(answer[0])

    def give_back(self) -> None:
        """Restore standard error, and write what was held back."""
        self.answer = lambda status: None
        if os.name == "posix":
            os.dup2(self.real, 2)
            os.write(2, os.pread(self.held.fileno(), 1 << 20, 0))

    def go_on(self, answer: Callable[[str], tuple[int, str] | None]) -> None:
        """Hold nothing back from now on, but still read what C code writes."""
        self.give_back()
        if os.name != "posix" or shutil.which("tee") is None:
            return
        self.answer = answer
        file = self.held.fileno()
        # `tee` is its own process, so that the last message is also shown; it ends with this process.
        tee = subprocess.Popen(
            ["sh", "-c", "trap '' HUP INT TERM; exec tee -a \"$0\"", f"/dev/fd/{file}"],
            stdin=subprocess.PIPE, stdout=self.real, pass_fds=[file], start_new_session=True,
        )  # fmt: skip
        assert tee.stdin is not None
        os.dup2(tee.stdin.fileno(), 2)
        self.tee = tee
        # Python writes directly: a progress bar must see the terminal.
        sys.stderr = os.fdopen(os.dup(self.real), "w", buffering=1, errors="backslashreplace")


def _delay_abort() -> None:
    """Delay the next `abort` by 6 seconds: the handler `sleep` gets the number of the signal, SIGABRT = 6."""
    dumps = faulthandler.is_enabled()
    faulthandler.disable()
    libc = ctypes.CDLL(None)
    once = getattr(libc, "sysv_signal", libc.signal)  # a second signal acts at once
    once.argtypes, once.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    once(int(signal.SIGABRT), ctypes.cast(libc.sleep, ctypes.c_void_p))
    if dumps:  # its handler runs first, and prints the stack of every thread
        faulthandler.enable()


@contextmanager
def together() -> Iterator[None]:
    """End this process at once when an error is raised inside, so that the others do not wait for it.

    The error is raised, and the caller prints it. The process then ends without JAX's shutdown barrier, which would
    wait for the others. An error that comes from another process's end becomes a `ProcessLostError`.
    """
    if jax.process_count() == 1:
        yield
        return
    try:
        yield
    except SystemExit:
        raise  # a signal to stop reaches all processes
    except BaseException as error:
        for watch in _watches:
            watch.answer = lambda status: None  # the error says what happened
        lost = next((each for each in _chain(error) if _tells_of_loss(each)), None)
        status = 130 if isinstance(error, KeyboardInterrupt) else 1 if lost is None else AGAIN
        # Runs before JAX's shutdown, which was registered earlier.
        atexit.register(_leave, status)
        if lost is not None:
            reason = first_line(lost)
            raise ProcessLostError(_lost(jax.process_index(), jax.process_count(), reason)) from error
        raise


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes, without our own errors."""
    while error is not None:
        if isinstance(error, Exception) and not isinstance(error, SctError):
            yield error
        error = error.__cause__ or error.__context__


def _tells_of_loss(error: BaseException) -> bool:
    """Whether JAX says that another process is gone. Other errors may contain such words in paths and names."""
    return isinstance(error, jax.errors.JaxRuntimeError) and _LOST.search(str(error)) is not None


def _leave(status: int) -> None:
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _lost(number: int, count: int, reason: str) -> str:
    return (
        f"process {number} of {count} lost another one, which has ended or does not answer ({reason}): see the last "
        "messages of the others, and run the same command again, with any number of processes, to go on from the "
        "last checkpoint."
    )


def check_shared(file: Path, seconds: float = 60.0) -> None:
    """Raise `ConfigError` if a process does not see a file that process 0 has written.

    All processes call it. They wait up to `seconds`: file systems of clusters may show a new file late.
    """
    if jax.process_count() == 1:
        return
    multihost_utils.sync_global_devices(f"{file.name} is written")
    end = time.monotonic() + seconds
    while not file.exists() and time.monotonic() < end:
        os.listdir(file.parent) if file.parent.is_dir() else None
        time.sleep(0.5)
    seen = multihost_utils.process_allgather(np.asarray(file.exists()))
    if not seen.all():
        missing = ", ".join(map(str, np.flatnonzero(~seen)))
        raise ConfigError(
            f"process {missing} does not see {file}, which process 0 has written: choose a --workdir on a file system "
            "that all processes share."
        )


@contextmanager
def held_by_first(folder: Path, doing: str, option: str) -> Iterator[None]:
    """Keep other runs out of a folder, see `sct.folder_lock.only_one`. Process 0 holds the lock for all.

    All processes call it. If process 0 cannot get the lock, all of them raise its error.
    """
    with ExitStack() as held:
        refusal: SctError | None = None
        if jax.process_index() == 0:
            try:
                held.enter_context(only_one(folder, doing, option))
            except SctError as error:
                refusal = error
        if jax.process_count() > 1:
            room = np.zeros(4096, np.uint8)
            text = str(refusal or "").encode()[: len(room)]
            room[: len(text)] = np.frombuffer(text, np.uint8)
            message = bytes(multihost_utils.broadcast_one_to_all(room)).rstrip(b"\0").decode(errors="replace")
            refusal = refusal or (FolderInUseError(message) if message else None)
        if refusal is not None:
            raise refusal
        yield


@contextmanager
def only_first_speaks() -> Iterator[None]:
    """Discard progress bars and warnings of all processes except the first."""
    if jax.process_index() == 0:
        yield
        return
    with open(os.devnull, "w") as nothing, redirect_stderr(nothing):
        yield
