"""Several processes as one run: joining them, and ending all of them where one ends."""

from __future__ import annotations

import atexit
import ctypes
import os
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from sct.errors import ConfigError, ProcessLostError, SctError

# Seconds after which a process that does not answer is given up: the others end within a minute.
HEARTBEAT_SECONDS = 30

_HOW = "start it through Slurm or on a TPU pod, or give --coordinator=HOST:PORT, --num_processes and --process_id"
_LOST = re.compile(
    r"gloo|nccl|rccl|coordination|heartbeat|socket|connection (reset|closed|refused)|UNAVAILABLE|DEADLINE_EXCEEDED",
    re.IGNORECASE,
)
_STATUS = re.compile(r"absl::Status: ([^\n]+)")
_handlers: list[Any] = []  # C calls them as long as the process lives


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
    with _quiet() as said:
        failure = (
            f"--multihost did not bring the processes together within {seconds} s ({{}}): check that all are "
        )
        failure += "started with the same --coordinator and --num_processes, each with its own --process_id."
        _before_abort(lambda: failure.format(_reason(said())))
        try:
            jax.distributed.initialize(
                coordinator, count, number,
                initialization_timeout=seconds, heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            )  # fmt: skip
        except (ValueError, RuntimeError) as error:
            raise ConfigError(
                f"--multihost found no cluster to join ({_first_line(error)}): {_HOW}."
            ) from error
    number, count = jax.process_index(), jax.process_count()
    _before_abort(lambda: _lost(number, count, "JAX's coordination service ended it"))


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


@contextmanager
def _quiet() -> Iterator[Callable[[], str]]:
    """Hold back what C++ code writes to standard error; gives a function that tells what it was."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        real = os.dup(2)
        os.dup2(held.fileno(), 2)

        def restored() -> str:
            os.dup2(real, 2)
            held.seek(0)
            return held.read().decode(errors="replace")

        try:
            yield restored
        finally:
            os.write(real, restored().encode())
            os.close(real)


def _before_abort(sentence: Callable[[], str]) -> None:
    """Say something where C++ code ends this process, which cannot be caught, instead of a long dump.

    JAX's coordination client ends a process by `abort` in a thread of its own.
    """
    if os.name != "posix":
        return

    def speak(number: int) -> None:
        if said := sentence():
            os.write(2, f"error: {said}\n".encode())
        os._exit(1)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(speak)
    _handlers.append(handler)
    ctypes.CDLL(None).signal(int(signal.SIGABRT), handler)


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
        _before_abort(lambda: "")  # what happened is told by the error
        # Runs before JAX's own function, which was registered earlier.
        atexit.register(_leave, 130 if isinstance(error, KeyboardInterrupt) else 1)
        lost = next((each for each in _chain(error) if _LOST.search(str(each))), None)
        if lost is not None:
            reason = _first_line(lost)
            raise ProcessLostError(_lost(jax.process_index(), jax.process_count(), reason)) from error
        raise


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Errors of libraries from which an error arose, itself included."""
    while error is not None:
        if isinstance(error, Exception) and not isinstance(error, SctError):
            yield error
        error = error.__cause__ or error.__context__


def _leave(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _lost(number: int, count: int, reason: str) -> str:
    return (
        f"process {number} of {count} lost another one, which has ended or does not answer ({reason}): see what the "
        "others said last, and run the same command again, with any number of processes, to go on from the last "
        "checkpoint."
    )


def _reason(said: str) -> str:
    found = _STATUS.findall(said)
    return found[-1].strip() if found else (said.strip().splitlines() or ["no reason given"])[-1]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


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
def only_first_speaks() -> Iterator[None]:
    """Keep progress bars and warnings of all processes but the first to themselves."""
    if jax.process_index() == 0:
        yield
        return
    with open(os.devnull, "w") as nothing, redirect_stderr(nothing):
        yield
