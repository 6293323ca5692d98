"""The `sct` command: `sct train`, `sct ingest`, for people who do not clone the repository."""

from __future__ import annotations

import ctypes
import importlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from sct.commands.flag_parsing import Command

_COMMANDS = {
    "embed": "compute an embedding for each cell of an .h5ad file",
    "impute": "impute genes or whole cells of an .h5ad file",
    "annotate": "annotate cells, by label transfer or by a model that answers with text",
    "generate": "generate cells with a model of cell sentences",
    "benchmark": "benchmark a model against reference baselines",
    "train": "train a model, or resume a run",
    "ingest": "ingest h5ad, 10x, zarr and CELLxGENE Census data into a store",
    "convert": "convert published weights to a model folder, and back",
    "speed": "measure the speed of a configuration on this machine",
}

# Those that run a model step by step.
_COMPUTING = ("embed", "impute", "annotate", "generate", "benchmark", "train", "speed")

# absl's own help names files of this machine and ends with status 1.
_HELP = ("-h", "--help", "-help", "-?", "--helpfull", "--helpshort")

_SMALLER = {
    "train": "take smaller batches or bags (--config.train.batch_size, --config.data.cells_per_bag), or "
    "--config.model.remat=level",
    "benchmark": "score fewer cells (--config.data.max_cells, --config.data.max_bags) or take smaller bags "
    "(--config.data.cells_per_bag)",
    "generate": "take fewer cells at once (--batch_size=1)",
    "speed": "take smaller batches or bags (--config.train.batch_size, --config.data.cells_per_bag), or compare fewer "
    "cells with the reference path (--check_cells=1)",
    **dict.fromkeys(
        ("embed", "impute", "annotate"),
        "take fewer or smaller bags at once (--batch_size=1, --cells_per_bag)",
    ),
}


def _usage() -> str:
    lines = [f"  sct {name:<10} {what}" for name, what in _COMMANDS.items()]
    return "\n".join(
        ["usage: sct COMMAND [--flag=value ...]", "", *lines, "", "sct COMMAND --help lists its flags."]
    )


def main(command: str | None = None) -> None:
    """Run a command of the command line.

    Parameters
    ----------
    command
        Name of the command; by default the first argument of the command line.
    """
    with _closed_pipes_end_silently():
        _main(command)


def _main(command: str | None) -> None:
    argv, program = sys.argv, f"python -m launch.{command}"
    if command is None:
        if len(argv) < 2 or argv[1] in _HELP or argv[1] == "help":
            print(_usage())
            sys.exit(0 if len(argv) > 1 else 2)
        if argv[1] == "--version":
            from sct import __version__

            print(__version__)
            sys.exit(0)
        command, program = argv[1], f"sct {argv[1]}"
        argv = [program, *argv[2:]]
    if command not in _COMMANDS:
        from sct.commands.flag_errors import nearest

        found = nearest(command, _COMMANDS)
        meant = f"did you mean sct {found}?" if found else f"choose from {', '.join(_COMMANDS)}."
        what = "the command comes first" if command.startswith("-") else f"there is no command {command!r}"
        print(f"error: {what}: {meant}\n{_usage().splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
    asks_for_help = bool(set(_HELP) & set(argv[1:]))
    if command in _COMPUTING and not asks_for_help:
        keep_freed_memory()
    module = importlib.import_module(f"sct.commands.{command}")
    from sct.commands.flag_parsing import Command

    called = Command(program, module)
    if asks_for_help:
        from sct.commands import flag_help

        print(flag_help.text(called))
        sys.exit(0)
    if command in _COMPUTING and command != "train":  # which has a flag for it
        from sct.commands.compilation import keep_programs

        keep_programs()
    run_main(
        module.main,
        argv,
        called,
        "go on" if command in ("train", "ingest") else "start over",
        _SMALLER.get(command, "take less at once, or a machine with more"),
        stoppable=command != "train",  # which saves first
    )


@contextmanager
def _closed_pipes_end_silently() -> Iterator[None]:
    """End with the status of SIGPIPE, 141, where the reader of the output is gone (`| head -1`), and print nothing."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
    except (BrokenPipeError, SystemExit) as error:
        # rich leaves by SystemExit. Other pipes than those of the output are no reason to end silently.
        if not isinstance(error, BrokenPipeError) and not isinstance(error.__context__, BrokenPipeError):
            raise
        if not _drop_closed_outputs() and isinstance(error, BrokenPipeError):
            raise
        sys.exit(128 + signal.SIGPIPE)


def _drop_closed_outputs() -> bool:
    """Send what is still to be written to a closed pipe nowhere, so that Python's own last flush cannot fail."""
    closed = [stream for stream in (sys.stdout, sys.stderr) if _is_closed(stream)]
    for stream in closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return bool(closed)


def _is_closed(stream: TextIO) -> bool:
    """Whether nothing reads the pipe that a stream writes to."""
    try:
        stream.flush()
        poll = select.poll()
        poll.register(stream.fileno(), 0)  # errors and ends are always reported
    except BrokenPipeError:
        return True
    except (OSError, ValueError):  # no file of the system: a notebook, a test
        return False
    return bool(poll.poll(0))


def _on_cpu_of_linux() -> bool:
    accelerators = [path for name in ("nvidia*", "accel*", "kfd") for path in Path("/dev").glob(name)]
    return sys.platform.startswith("linux") and not accelerators


_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def keep_freed_memory() -> None:
    """Keep freed memory for the next step, where a step runs on the CPU and the system has no large pages.

    A training step at full size allocates and frees gigabytes. In pages of 4 KiB, which the system clears one by one,
    that costs a sixth of the step (docs/performance.md). With large pages keeping it is not worth the higher peak.
    Call it before JAX starts its threads.
    """
    if not _on_cpu_of_linux():
        return
    pages = _PAGES.read_text() if _PAGES.exists() else "[never]"
    libc = ctypes.CDLL(None)
    if "[never]" in pages and hasattr(libc, "mallopt"):
        # From malloc.h: one arena for all threads, no separate mappings, never shrink.
        m_arena_max, m_mmap_max, m_trim_threshold = -8, -4, -1
        for option, value in ((m_arena_max, 1), (m_mmap_max, 0), (m_trim_threshold, 2**31 - 1)):
            libc.mallopt(option, value)


class _Terminated(SystemExit):
    """SIGTERM came."""


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let the first SIGTERM end the block as an error would, so that nothing unfinished is left; a second one kills."""
    on_main = threading.current_thread() is threading.main_thread()
    if not on_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def stop(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise _Terminated(128 + number)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def run_main(
    program: Callable[[list[str]], int | None],
    argv: list[str] | None = None,
    command: Command | None = None,
    again: str = "go on",
    smaller: str = "take less at once, or a machine with more",
    stoppable: bool = True,
) -> None:
    """Run `program(arguments)` under absl flags; a user's mistake is one sentence and exit status 1.

    A wrong command line has status 2 and is followed by the usage of the `command`, which reads the flags. Where
    another process was lost, the status is `sct.errors.AGAIN`.

    Only errors of `sct.errors`, a disk that is full or broken and used-up memory are shortened: any other exception is
    a defect of this project and keeps its traceback. `again` and `smaller` say what to do after Ctrl-C and where memory
    does not suffice. Where it is `stoppable`, SIGTERM ends it as Ctrl-C does, with status 143.
    """
    # Start-up chatter of the XLA runtime is of no use to a user.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

    from absl import app, logging

    from sct.commands.flag_errors import FlagError
    from sct.errors import AGAIN, ProcessLostError, SctError, disk_trouble

    def refuse(error: FlagError) -> int:
        print(f"error: {error}", *([command.usage] if command else []), sep="\n", file=sys.stderr)
        return 2

    def parse(words: list[str]) -> list[str]:
        if command is None:
            return app.parse_flags_with_usage(words)
        try:
            return command.parse(words)
        except FlagError as error:
            sys.exit(refuse(error))

    def guarded(rest: list[str]) -> int | None:
        # JAX and Orbax log back-end probing and every stage of a save through absl.
        logging.set_verbosity(logging.ERROR)
        try:
            with _ended_by_sigterm() if stoppable else nullcontext():
                return program(rest)
        except FlagError as error:
            return refuse(error)
        except SctError as error:
            print(f"error: {error}", file=sys.stderr)
            return AGAIN if isinstance(error, ProcessLostError) else 1
        except (KeyboardInterrupt, _Terminated) as stop:
            print(f"stopped; run the same command again to {again}", file=sys.stderr)
            return 130 if isinstance(stop, KeyboardInterrupt) else 143
        except Exception as error:
            if trouble := disk_trouble(error):
                what = getattr(error, "filename", None) or "a file"
                print(
                    f"error: writing or reading {what} failed ({trouble}): free space or mend the disk, then run the "
                    f"same command again to {again}.",
                    file=sys.stderr,
                )
                return 1
            if not isinstance(error, MemoryError) and not (
                isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
            ):
                raise
            print(f"error: the memory is used up: {smaller}.", file=sys.stderr)
            return 1

    app.run(guarded, argv=sys.argv if argv is None else argv, flags_parser=parse)
