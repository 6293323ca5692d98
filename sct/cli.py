"""Run the `sct` command, such as `sct train` and `sct ingest`. The command works without a clone of the repository."""

from __future__ import annotations

import ctypes
import importlib
import os
import resource
import select
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from sct.commands.flag_parsing import Command

_COMMANDS = {
    "embed": "compute an embedding for each cell of an .h5ad file",
    "impute": "impute genes or whole cells of an .h5ad file",
    "annotate": "annotate cells, by label transfer, a fine-tuned model or a language model",
    "finetune": "fine-tune a model for the cell types of an .h5ad file",
    "perturb": "knock out genes in silico, and compare with random genes",
    "generate": "generate cells with a model of cell sentences",
    "benchmark": "benchmark a model against reference baselines",
    "train": "train a model, or resume a run",
    "ingest": "ingest h5ad, 10x, zarr and CELLxGENE Census data into a store",
    "convert": "convert published weights to a model folder, and back",
    "speed": "measure the speed of a configuration on this machine",
    "models": "list ready models, model families, and the models in folders",
    "doctor": "check the installation and the devices of this machine",
}

# Commands that run a model.
_COMPUTING = ("embed", "impute", "annotate", "finetune", "perturb", "generate", "benchmark", "train", "speed")

# Flags that ask for help. They are handled here, because absl's own help prints local file names and exits with 1.
_HELP = ("-h", "--help", "-help", "-?", "--helpfull", "--helpshort", "--helpxml", "--help=true")

# Advice for each command when the memory does not suffice.
_SMALLER = {
    "train": "use smaller batches or bags (--config.train.batch_size, --config.data.cells_per_bag), or set "
    "--config.model.remat=level",
    "benchmark": "use fewer cells (--config.data.max_cells, --config.data.max_bags) or smaller bags "
    "(--config.data.cells_per_bag)",
    "finetune": "use smaller batches (--batch_size=8)",
    "generate": "generate fewer cells at once (--batch_size=1)",
    "speed": "use smaller batches or bags (--config.train.batch_size, --config.data.cells_per_bag), or compare fewer "
    "cells with the reference implementation (--check_cells=1)",
    **dict.fromkeys(
        ("embed", "impute", "annotate", "perturb"),
        "compute fewer or smaller bags at once (--batch_size=1, --cells_per_bag)",
    ),
}


def _usage() -> str:
    lines = [f"  sct {name:<10} {what}" for name, what in _COMMANDS.items()]
    return "\n".join(
        [
            "usage: sct COMMAND [--flag=value ...]",
            "",
            *lines,
            "",
            "sct COMMAND --help lists its flags. sct --version prints the version.",
        ]
    )


def main(command: str | None = None) -> None:
    """Run the command that is named on the command line, such as `train`.

    Parameters
    ----------
    command
        Name of the command. The default is the first argument of the command line.
    """
    with _closed_pipes_end_silently():
        _main(command)


def _main(command: str | None) -> None:
    argv, program = sys.argv, f"python -m launch.{command}"
    if command is None:
        if len(argv) < 2 or argv[1] in _HELP or argv[1] == "help":
            print(_usage())
            sys.exit(0 if len(argv) > 1 else 2)
        if argv[1] in ("--version", "-V"):
            from sct import __version__

            print(__version__)
            sys.exit(0)
        command, program = argv[1], f"sct {argv[1]}"
        argv = [program, *argv[2:]]
    if command not in _COMMANDS:
        from sct.commands.flag_errors import nearest

        found = nearest(command, _COMMANDS)
        meant = f"did you mean sct {found}?" if found else f"choose from {', '.join(_COMMANDS)}."
        what = (
            "the command must come first" if command.startswith("-") else f"there is no command {command!r}"
        )
        print(f"error: {what}: {meant}\n{_usage().splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
    asks_for_help = bool(set(_HELP) & set(argv[1:]))
    if command in _COMPUTING and not asks_for_help:
        keep_freed_memory()
    module = importlib.import_module(f"sct.commands.{command}")
    for name in getattr(module, "FLAG_MODULES", ()):
        importlib.import_module(name)
    from sct.commands.flag_parsing import Command

    called = Command(program, module)
    if asks_for_help:
        from sct.commands import flag_help

        print(flag_help.text(called))
        sys.exit(0)

    def program_of(words: list[str]) -> int | None:
        from sct.commands import session_flags

        session_flags.apply()
        started = time.monotonic()
        if command in _COMPUTING:
            _prepare_jax(command)
        status: int | None = module.main(words)
        _hint_at_costs(started, command in _COMPUTING)
        return status

    run_main(
        program_of,
        argv,
        called,
        "resume" if command in ("train", "ingest") else "start over",
        _SMALLER.get(command, "use smaller inputs, or a machine with more memory"),
        stoppable=command != "train",  # `train` saves a checkpoint first
    )


def _prepare_jax(command: str) -> None:
    """Choose the device and the folder for compiled programs, before JAX starts."""
    from sct.commands import device_flag
    from sct.commands.compilation import keep_programs

    device_flag.select()
    if command != "train":  # `train` has a flag for the folder, and joins other processes before JAX starts
        keep_programs()
        device_flag.check()


def _hint_at_costs(started: float, computing: bool) -> None:
    """Print a hint with the device, the time and the memory that a command used."""
    from sct import devices, messages
    from sct.global_settings import HINTS, settings

    if settings.verbosity < HINTS:
        return
    where = f" on {devices.described()}" if computing and "jax" in sys.modules else ""
    # Linux counts in kB, macOS in bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    messages.hint(
        f"hint: {time.monotonic() - started:,.1f} s{where}; peak memory of the process {peak / 1e9:.2f} GB"
    )


@contextmanager
def _closed_pipes_end_silently() -> Iterator[None]:
    """Exit without a message when the program that reads the output has ended, as in `| head -1`.

    The exit status is 141 (SIGPIPE).
    """
    try:
        try:
            yield
        finally:
            # Python sets a stream to None if the process was started with it closed (`>&-`).
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()
    except (BrokenPipeError, SystemExit) as error:
        # rich raises SystemExit on a broken pipe. Errors of other pipes than standard output and error are raised.
        if not isinstance(error, BrokenPipeError) and not isinstance(error.__context__, BrokenPipeError):
            raise
        if not _drop_closed_outputs() and isinstance(error, BrokenPipeError):
            raise
        sys.exit(128 + signal.SIGPIPE)


def _drop_closed_outputs() -> bool:
    """Redirect each output with a closed pipe to the null device, so that Python's final flush cannot fail.

    Return whether any output had a closed pipe.
    """
    closed = [stream for stream in (sys.stdout, sys.stderr) if stream is not None and _is_closed(stream)]
    for stream in closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return bool(closed)


def _is_closed(stream: TextIO) -> bool:
    """Return whether a stream writes to a pipe whose reader has ended."""
    try:
        stream.flush()
        poll = select.poll()
        poll.register(stream.fileno(), 0)  # `poll` always reports errors and closed pipes
    except BrokenPipeError:
        return True
    except (OSError, ValueError):  # the stream has no file descriptor, as in a notebook or a test
        return False
    return bool(poll.poll(0))


def _on_cpu_of_linux() -> bool:
    accelerators = [path for name in ("nvidia*", "accel*", "kfd") for path in Path("/dev").glob(name)]
    return sys.platform.startswith("linux") and not accelerators


_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def keep_freed_memory() -> None:
    """Keep freed memory in the process for the next step.

    This applies only to a Linux machine that has neither accelerators nor huge pages.

    A training step at full size allocates and frees gigabytes. With pages of 4 KiB, which the system clears one by one,
    allocating and freeing takes a sixth of the time of the step (docs/performance.md). With huge pages the gain is not
    worth the higher peak memory. Call this function before JAX starts its threads.
    """
    if not _on_cpu_of_linux():
        return
    pages = _PAGES.read_text() if _PAGES.exists() else "[never]"
    libc = ctypes.CDLL(None)
    if "[never]" in pages and hasattr(libc, "mallopt"):
        # Constants from malloc.h: use one arena for all threads, never use separate mappings, never shrink the heap.
        m_arena_max, m_mmap_max, m_trim_threshold = -8, -4, -1
        for option, value in ((m_arena_max, 1), (m_mmap_max, 0), (m_trim_threshold, 2**31 - 1)):
            libc.mallopt(option, value)


class _Terminated(SystemExit):
    """Signal that the process has received SIGTERM."""


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Raise `_Terminated` on the first SIGTERM, to clean up temporary files. A second SIGTERM kills the process."""
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


def _without_home(words: list[str]) -> str:
    """Return the error message for a path that begins with ~ but has no home folder.

    An example is ~name/x without a user `name`. The message names the command line word with this path.
    """
    paths = [word for word in words if word.rpartition("=")[2].startswith("~")]
    unknown = [path for path in paths if os.path.expanduser(path.rpartition("=")[2]).startswith("~")]
    where = unknown[0] if unknown else "a path"
    return f"{where} begins with ~ and no home folder was found for it: give the full path"


def run_main(
    program: Callable[[list[str]], int | None],
    argv: list[str] | None = None,
    command: Command | None = None,
    again: str = "resume",
    smaller: str = "use smaller inputs, or a machine with more memory",
    stoppable: bool = True,
) -> None:
    """Run `program(arguments)` with absl flags. A user's mistake is printed as one sentence, with exit status 1.

    Errors of `sct.errors`, a full or broken disk, and exhausted memory are printed as one sentence. Any other exception
    is a bug of this project and keeps its traceback. The exit status is 2 after a wrong command line, and
    `sct.errors.AGAIN` if another process of the run was lost.

    Parameters
    ----------
    program
        Function that takes the remaining arguments and returns the exit status, or None for 0.
    argv
        Command line as a list of words. The default is `sys.argv`.
    command
        Command that reads the flags. The usage of this command is printed after an error in the command line.
    again
        Verb, such as "resume". It says what the command does if the user runs it again after Ctrl-C or a disk error.
    smaller
        Advice for the user if the memory does not suffice, such as to use a smaller batch.
    stoppable
        Whether SIGTERM stops the program in the same way as Ctrl-C, but with exit status 143.
    """
    # Hide the start-up messages of the XLA runtime, which do not concern users.
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
        nonlocal again
        # Hide the log messages of JAX and Orbax: the search for backends, and every stage of saving.
        logging.set_verbosity(logging.ERROR)
        warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
        try:
            with _ended_by_sigterm() if stoppable else nullcontext():
                return program(rest)
        except FlagError as error:
            return refuse(error)
        except SctError as error:
            print(f"error: {error}", file=sys.stderr)
            return AGAIN if isinstance(error, ProcessLostError) else 1
        except (KeyboardInterrupt, _Terminated) as stop:
            # A stopped training says itself what the same command does.
            again = str(stop) if isinstance(stop, KeyboardInterrupt) and stop.args else again
            print(f"stopped; run the same command again to {again}", file=sys.stderr)
            return 130 if isinstance(stop, KeyboardInterrupt) else 143
        except Exception as error:
            if trouble := disk_trouble(error):
                what = getattr(error, "filename", None) or "a file"
                print(
                    f"error: writing or reading {what} failed ({trouble}): free space or repair the disk, then run the "
                    f"same command again to {again}.",
                    file=sys.stderr,
                )
                return 1
            if isinstance(error, RuntimeError) and "home directory" in str(error):  # of Path.expanduser
                print(f"error: {_without_home(sys.argv if argv is None else argv)}", file=sys.stderr)
                return 1
            if not isinstance(error, MemoryError) and not (
                isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
            ):
                raise
            print(f"error: out of memory: {smaller}.", file=sys.stderr)
            return 1

    app.run(guarded, argv=sys.argv if argv is None else argv, flags_parser=parse)
