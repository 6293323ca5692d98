"""Several processes as one run: joining them, and ending all of them where one ends."""

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

# Seconds after which a process that does not answer is given up: the others end within a minute.
HEARTBEAT_SECONDS = 30

_HOW = "start it through Slurm or on a TPU pod, or give --coordinator=HOST:PORT, --num_processes and --process_id"
_CODES = "UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED"  # of a status that tells of somebody else
# What a collective or a barrier says where it fails because another process is gone.
_LOST = re.compile(
    rf"^(?:{_CODES}): |(?i:\bgloo \w+ failed\b|\bnccl operation\b|\bconnection (?:reset|closed|refused)\b)"
)
# The last words of JAX's coordination client, before it calls `abort` in a thread of its own.
_ENDED = re.compile(rb"JAX distributed service detected fatal errors[^\n]*absl::Status: ([^\n]+)\n")
_watches: list[_Watch] = []


def join(coordinator: str | None, count: int | None, number: int | None, seconds: int = 300) -> None:
    """Make this process one of several, before anything else is done with JAX.

    Parameters
    ----------
    coordinator
        "HOST:PORT" of process 0; None where Slurm or a TPU pod tells.
    count, number
        Processes, and which of them this is, from 0; None where Slurm or a TPU pod tells.
    seconds
        How long the processes wait for each other.

    Raises
    ------
    ConfigError
        The processes do not find each other. What JAX finds out itself ends the process, after the same sentence.
    """
    _check(coordinator, count, number, seconds)
    failure = (
        f"--multihost did not bring the processes together within {seconds} s ({{}}): check that all are "
        "started with the same --coordinator and --num_processes, each with its own --process_id."
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
    """Find what would end in a crash or a long wait."""
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
                f"process 0 cannot listen at port {port} ({error.strerror}): choose another one in --coordinator, "
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
        f"process 0 did not answer at {host}:{port} within {seconds:g} s ({reason}): start it too, with the same "
        "--coordinator, or check that its machine can be reached under that name."
    )


def _told(status: str, number: int, count: int) -> tuple[int, str] | None:
    """Exit status and sentence where a status of JAX's coordination service tells of another process's end."""
    if count == 1 or not re.match(rf"({_CODES}): ", status):
        return None
    return AGAIN, _lost(number, count, status[:200])


class _Watch:
    """Ends this process with a sentence where JAX's coordination client is about to end it by `abort`.

    That client says why on standard error, which a thread reads here; meanwhile `abort` waits in the C function
    `sleep`. No Python runs in the handler of the signal: it could wait for ever, for the interpreter or for the
    heap. After a few seconds the signal acts as ever, so any other `abort` only comes a little later.

    Parameters
    ----------
    answer
        Status of the coordination service -> exit status and sentence, or None to let the signal act.
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
        """Let standard error be what it was, and write what was held back."""
        self.answer = lambda status: None
        if os.name == "posix":
            os.dup2(self.real, 2)
            os.write(2, os.pread(self.held.fileno(), 1 << 20, 0))

    def go_on(self, answer: Callable[[str], tuple[int, str] | None]) -> None:
        """Hold nothing back any more, but go on reading what C code writes."""
        self.give_back()
        if os.name != "posix" or shutil.which("tee") is None:
            return
        self.answer = answer
        file = self.held.fileno()
        # A process of its own, so that words are shown even if they are the last ones; it ends with this process.
        tee = subprocess.Popen(
            ["sh", "-c", "trap '' HUP INT TERM; exec tee -a \"$0\"", f"/dev/fd/{file}"],
            stdin=subprocess.PIPE, stdout=self.real, pass_fds=[file], start_new_session=True,
        )  # fmt: skip
        assert tee.stdin is not None
        os.dup2(tee.stdin.fileno(), 2)
        self.tee = tee
        # Python's own words need no detour, and a bar of progress must see that there is a terminal.
        sys.stderr = os.fdopen(os.dup(self.real), "w", buffering=1, errors="backslashreplace")


def _delay_abort() -> None:
    """Let the next `abort` wait as many seconds as its signal's number, 6."""
    dumps = faulthandler.is_enabled()
    faulthandler.disable()
    libc = ctypes.CDLL(None)
    once = getattr(libc, "sysv_signal", libc.signal)  # a second signal from outside acts at once
    once.argtypes, once.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    once(int(signal.SIGABRT), ctypes.cast(libc.sleep, ctypes.c_void_p))
    if dumps:  # comes first, with the stack of every thread
        faulthandler.enable()


@contextmanager
def together() -> Iterator[None]:
    """End this process at once where something is raised inside, so that the others do not wait for it.

    The error is raised as ever and printed by the caller; the process then ends without taking leave of the others,
    which JAX would wait for. An error that comes from another process's end becomes a `ProcessLostError`.
    """
    if jax.process_count() == 1:
        yield
        return
    try:
        yield
    except SystemExit:
        raise  # asked to stop, as all are
    except BaseException as error:
        for watch in _watches:
            watch.answer = lambda status: None  # what happened is told by the error
        lost = next((each for each in _chain(error) if _tells_of_loss(each)), None)
        status = 130 if isinstance(error, KeyboardInterrupt) else 1 if lost is None else AGAIN
        # Runs before JAX's own function, which was registered earlier.
        atexit.register(_leave, status)
        if lost is not None:
            reason = first_line(lost)
            raise ProcessLostError(_lost(jax.process_index(), jax.process_count(), reason)) from error
        raise


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Errors of libraries from which an error arose, itself included."""
    while error is not None:
        if isinstance(error, Exception) and not isinstance(error, SctError):
            yield error
        error = error.__cause__ or error.__context__


def _tells_of_loss(error: BaseException) -> bool:
    """Whether JAX says that another process is gone; other libraries' errors hold paths and names of users."""
    return isinstance(error, jax.errors.JaxRuntimeError) and _LOST.search(str(error)) is not None


def _leave(status: int) -> None:
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _lost(number: int, count: int, reason: str) -> str:
    return (
        f"process {number} of {count} lost another one, which has ended or does not answer ({reason}): see what the "
        "others said last, and run the same command again, with any number of processes, to go on from the last "
        "checkpoint."
    )


def check_shared(file: Path, seconds: float = 60.0) -> None:
    """Raise ConfigError where this process does not see a file that process 0 has written.

    Called by all processes. File systems of clusters may show a new file late, hence the patience.
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
        blind = ", ".join(map(str, np.flatnonzero(~seen)))
        raise ConfigError(
            f"process {blind} does not see {file}, which process 0 has written: choose a --workdir on a file system "
            "that all processes share."
        )


@contextmanager
def held_by_first(folder: Path, doing: str, option: str) -> Iterator[None]:
    """Keep other runs out of a folder, see `sct.folder_lock.only_one`: process 0 holds it for all.

    Called by all processes. Where it cannot, all of them raise what it found.
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
            words = str(refusal or "").encode()[: len(room)]
            room[: len(words)] = np.frombuffer(words, np.uint8)
            said = bytes(multihost_utils.broadcast_one_to_all(room)).rstrip(b"\0").decode(errors="replace")
            refusal = refusal or (FolderInUseError(said) if said else None)
        if refusal is not None:
            raise refusal
        yield


@contextmanager
def only_first_speaks() -> Iterator[None]:
    """Keep progress bars and warnings of all processes but the first to themselves."""
    if jax.process_index() == 0:
        yield
        return
    with open(os.devnull, "w") as nothing, redirect_stderr(nothing):
        yield
