"""Connect the processes of a training run, and end all of them when one ends."""

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

# A process that does not answer for this many seconds counts as lost. The others then end within a minute.
HEARTBEAT_SECONDS = 30

_HOW = (
    "start the command through Slurm or on a TPU pod, or give --coordinator=HOST:PORT, --num_processes and "
    "--process_id"
)
_CODES = (
    "UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED"  # status codes that mean that another process has ended
)
# Messages of a collective or barrier that fails because another process has ended.
_LOST = re.compile(
    rf"^(?:{_CODES}): |(?i:\bgloo \w+ failed\b|\bnccl operation\b|\bconnection (?:reset|closed|refused)\b)"
)
# Last message of JAX's coordination client before it calls `abort` in its own thread.
_ENDED = re.compile(rb"JAX distributed service detected fatal errors[^\n]*absl::Status: ([^\n]+)\n")
_watches: list[_Watch] = []


def join(coordinator: str | None, count: int | None, number: int | None, seconds: int = 300) -> None:
    """Connect this process to the other processes of the run. Call this function before any other use of JAX.

    Parameters
    ----------
    coordinator
        "HOST:PORT" of process 0. Use None under Slurm or on a TPU pod, where JAX finds the address.
    count, number
        Number of processes, and number of this process, counted from 0. Use None under Slurm or on a TPU pod, where JAX
        finds both numbers.
    seconds
        Maximum time in seconds for which the processes wait for each other.

    Raises
    ------
    ConfigError
        The processes cannot connect. If JAX itself notices the failure, the same message is printed, and JAX ends the
        process.
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
        watch.restore()
        raise ConfigError(
            f"--multihost was given, but no cluster was found ({first_line(error)}): {_HOW}."
        ) from error
    number, count = jax.process_index(), jax.process_count()
    watch.keep_reading(lambda status: _answer_to_loss(status, number, count))


def _check(coordinator: str | None, count: int | None, number: int | None, seconds: int) -> None:
    """Raise `ConfigError` for arguments with which `join` would crash or wait for a long time."""
    if seconds < 1:
        raise ConfigError(f"--join_seconds is {seconds}, but must be at least 1: set it to 1 or more.")
    if count is not None and number is not None and not 0 <= number < count:
        raise ConfigError(
            f"--process_id is {number}, but with --num_processes={count} it must be between 0 and {count - 1}: number "
            "the processes from 0."
        )
    if coordinator is None:
        return
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(
            f"--coordinator is {coordinator!r}, but must be HOST:PORT: give the address of process 0, such as "
            "node1:8476, in every process."
        )
    if number == 0:
        try:
            socket.create_server(("", int(port))).close()
        except OSError as error:
            raise ConfigError(
                f"process 0 cannot listen on port {port} ({error.strerror}): give another port in --coordinator, the "
                "same in every process."
            ) from error
    elif number is not None:
        _find(host.strip("[]"), int(port), seconds)


def _find(host: str, port: int, seconds: float) -> None:
    """Wait until process 0 accepts connections. Raises `ConfigError` after the given number of seconds."""
    end, reason = time.monotonic() + seconds, ""
    while (left := end - time.monotonic()) > 0:
        try:
            socket.create_connection((host, port), timeout=left).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
        time.sleep(min(0.5, max(left, 0)))
    raise ConfigError(
        f"process 0 did not answer at {host}:{port} within {seconds:g} s ({reason}): start process 0 with the same "
        f"--coordinator, or check that this machine can reach {host}."
    )


def _answer_to_loss(status: str, number: int, count: int) -> tuple[int, str] | None:
    """Return the exit status and the message with which this process ends when another process is lost.

    `status` is a text from JAX's coordination service. If the text does not report the end of another process, return
    None.
    """
    if count == 1 or not re.match(rf"({_CODES}): ", status):
        return None
    return AGAIN, _lost(number, count, status[:200])


class _Watch:
    """End this process with a clear message when JAX's coordination client is about to call `abort`.

    The client writes the reason only to standard error. Standard error is therefore redirected to a file, and a thread
    reads this file. To give the thread time, the handler of SIGABRT is the C function `sleep`. A Python handler could
    wait forever for the interpreter or the heap. After 6 seconds the signal has its usual effect, so an `abort` for any
    other reason is only delayed.

    Parameters
    ----------
    answer
        Function that maps a status of the coordination service to an exit status and a message, or to None if the
        signal should have its usual effect.
    """

    def __init__(self, answer: Callable[[str], tuple[int, str] | None]) -> None:
        self.answer = answer
        if os.name != "posix":
            return
        sys.stderr.flush()
        self.held = tempfile.TemporaryFile()  # noqa: SIM115 - open until the process ends
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

    def restore(self) -> None:
        """Restore standard error, and write to it the output that was held back."""
        self.answer = lambda status: None
        if os.name == "posix":
            os.dup2(self.real, 2)
            os.write(2, os.pread(self.held.fileno(), 1 << 20, 0))

    def keep_reading(self, answer: Callable[[str], tuple[int, str] | None]) -> None:
        """Stop hiding standard error, but keep reading the messages that C code writes to standard error."""
        self.restore()
        if os.name != "posix" or shutil.which("tee") is None:
            return
        self.answer = answer
        file = self.held.fileno()
        # `tee` is a separate process, so that it can show the last message too. It ends when this process ends.
        tee = subprocess.Popen(
            ["sh", "-c", "trap '' HUP INT TERM; exec tee -a \"$0\"", f"/dev/fd/{file}"],
            stdin=subprocess.PIPE, stdout=self.real, pass_fds=[file], start_new_session=True,
        )  # fmt: skip
        assert tee.stdin is not None
        os.dup2(tee.stdin.fileno(), 2)
        self.tee = tee
        # Python code writes to the original standard error, because a progress bar needs the terminal.
        sys.stderr = os.fdopen(os.dup(self.real), "w", buffering=1, errors="backslashreplace")


def _delay_abort() -> None:
    """Delay the next `abort` by 6 seconds.

    The signal handler is the C function `sleep`, whose argument is the number of the signal: SIGABRT = 6.
    """
    dumps = faulthandler.is_enabled()
    faulthandler.disable()
    libc = ctypes.CDLL(None)
    once = getattr(libc, "sysv_signal", libc.signal)  # the handler runs once; a second signal is not delayed
    once.argtypes, once.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    once(int(signal.SIGABRT), ctypes.cast(libc.sleep, ctypes.c_void_p))
    if dumps:  # the handler of `faulthandler` then runs first, and prints the stack of every thread
        faulthandler.enable()


@contextmanager
def together() -> Iterator[None]:
    """Make this process end soon after an error inside this context, so that the other processes do not wait for it.

    The error is raised again, so that the caller can print it. The process then ends without JAX's shutdown barrier,
    which would wait for the other processes. An error that was caused by the end of another process becomes a
    `ProcessLostError`.
    """
    if jax.process_count() == 1:
        yield
        return
    try:
        yield
    except SystemExit:
        raise  # a signal that stops the run reaches all processes
    except BaseException as error:
        for watch in _watches:
            watch.answer = lambda status: None  # the error already has a message
        lost = next((each for each in _chain(error) if _is_loss(each)), None)
        status = 130 if isinstance(error, KeyboardInterrupt) else 1 if lost is None else AGAIN
        # This runs before JAX's shutdown, because JAX registered its shutdown earlier.
        atexit.register(_leave, status)
        if lost is not None:
            reason = first_line(lost)
            raise ProcessLostError(_lost(jax.process_index(), jax.process_count(), reason)) from error
        raise


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and the errors that caused it, except errors of `sct.errors`."""
    while error is not None:
        if isinstance(error, Exception) and not isinstance(error, SctError):
            yield error
        error = error.__cause__ or error.__context__


def _is_loss(error: BaseException) -> bool:
    """Return whether an error comes from JAX and says that another process has ended.

    An error of another type does not count, because it may contain the same words in paths and names.
    """
    return isinstance(error, jax.errors.JaxRuntimeError) and _LOST.search(str(error)) is not None


def _leave(status: int) -> None:
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _lost(number: int, count: int, reason: str) -> str:
    return (
        f"process {number} of {count} lost another process, which has ended or does not answer ({reason}): read the "
        "last messages of the other processes, and run the same command again, with any number of processes, to resume "
        "from the last checkpoint."
    )


def check_shared(file: Path, seconds: float = 60.0) -> None:
    """Raise `ConfigError` if a process does not see a file that process 0 has written.

    All processes must call this function. Each process waits up to `seconds`, because cluster file systems may show a
    new file late.
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
            f"process 0 has written {file}, but process {missing} cannot see this file: choose a --workdir on a file "
            "system that all processes share."
        )


@contextmanager
def held_by_first(folder: Path, doing: str, option: str) -> Iterator[None]:
    """Lock a folder inside this context, so that no other run uses the folder; see `sct.folder_lock.only_one`.

    Process 0 holds the lock for all processes.

    All processes must call this function. If process 0 cannot get the lock, all processes raise its error.
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


def decided_by_first(ask: Callable[[], bool]) -> bool:
    """Call `ask` in every process, and return the answer of process 0 in all processes.

    All processes must call this function.
    """
    answer = ask()
    if jax.process_count() > 1:
        answer = bool(multihost_utils.broadcast_one_to_all(np.asarray(answer)))
    return answer


@contextmanager
def only_first_speaks() -> Iterator[None]:
    """Discard progress bars and warnings of all processes except the first."""
    if jax.process_index() == 0:
        yield
        return
    with open(os.devnull, "w") as nothing, redirect_stderr(nothing):
        yield
