"""The `sct` command: `sct train`, `sct ingest`, for people who do not clone the repository."""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

_COMMANDS = {
    "embed": "embed the cells of an .h5ad file",
    "impute": "impute genes or whole cells of an .h5ad file",
    "annotate": "name cells, by annotated ones or by a model that answers in words",
    "generate": "generate cells with a model of cell sentences",
    "benchmark": "measure a model beside honest baselines",
    "train": "train a model from a configuration, or go on with a run",
    "ingest": "turn h5ad, 10x and zarr files into a store",
    "convert": "turn foreign weights into a model folder",
    "speed": "measure steps, loader and ingest beside what the machine can do",
}

# Those that run a model step by step.
_COMPUTING = ("embed", "impute", "annotate", "generate", "benchmark", "train", "speed")

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
    return "\n".join(["usage: sct COMMAND [--flag=value ...]", "", *lines, "", "sct COMMAND --help"])


def main(command: str | None = None) -> None:
    """Run a command of the command line.

    Parameters
    ----------
    command
        Name of the command; by default the first argument of the command line.
    """
    argv = sys.argv
    if command is None:
        if len(argv) < 2 or argv[1] in ("-h", "--help", "help"):
            print(_usage())
            sys.exit(0 if len(argv) > 1 else 2)
        if argv[1] == "--version":
            from sct import __version__

            print(__version__)
            sys.exit(0)
        command, argv = argv[1], [f"sct {argv[1]}", *argv[2:]]
    if command not in _COMMANDS:
        print(f"error: there is no command {command!r}\n\n{_usage()}", file=sys.stderr)
        sys.exit(2)
    asks_for_help = bool({"-h", "--help"} & set(argv[1:]))
    if command in _COMPUTING and not asks_for_help:
        keep_freed_memory()
    module = importlib.import_module(f"sct.commands.{command}")
    if asks_for_help:
        # absl's own help names files of this machine and ends with status 1.
        from absl import flags

        names = (module.__name__, *getattr(module, "FLAG_MODULES", ()))
        listed = "".join(flags.FLAGS.module_help(name).partition(":")[2].rstrip() for name in names)
        print(f"{(module.__doc__ or '').strip()}\n\nFlags:{listed}")
        sys.exit(0)
    if command in _COMPUTING and command != "train":  # which has a flag for it
        from sct.commands.compilation import keep_programs

        keep_programs()
    run_main(
        module.main,
        argv,
        getattr(module, "prepare", None),
        "go on" if command in ("train", "ingest") else "start over",
        _SMALLER.get(command, "take less at once, or a machine with more"),
        getattr(module, "TAKES_ARGUMENTS", False),
        stoppable=command != "train",  # which saves first
    )


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
    prepare: Callable[[list[str]], list[str]] | None = None,
    again: str = "go on",
    smaller: str = "take less at once, or a machine with more",
    takes_arguments: bool = False,
    stoppable: bool = True,
) -> None:
    """Run `program(arguments)` under absl flags; a user's mistake is one sentence and exit status 1.

    Where another process was lost, the status is `sct.errors.AGAIN`.

    Only errors of `sct.errors`, a disk that is full or broken and used-up memory are shortened: any other exception is
    a defect of this project and keeps its traceback. `prepare` may change the arguments before flags are read from
    them; `again` and `smaller` say what to do after Ctrl-C and where memory does not suffice. Words that are no flags
    are refused unless it `takes_arguments`. Where it is `stoppable`, SIGTERM ends it as Ctrl-C does, with status 143.
    """
    # Start-up chatter of the XLA runtime is of no use to a user.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

    from absl import app, logging

    from sct.errors import AGAIN, ConfigError, ProcessLostError, SctError, disk_trouble

    def guarded(rest: list[str]) -> int | None:
        # JAX and Orbax log back-end probing and every stage of a save through absl.
        logging.set_verbosity(logging.ERROR)
        try:
            if len(rest) > 1 and not takes_arguments:
                raise ConfigError(
                    f"{rest[1]!r} is not a flag: options are written --name=value, a list without spaces."
                )
            with _ended_by_sigterm() if stoppable else nullcontext():
                return program(rest)
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

    argv = sys.argv if argv is None else argv
    if prepare is not None:
        try:
            argv = prepare(argv)
        except SctError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)
    app.run(guarded, argv=argv)
