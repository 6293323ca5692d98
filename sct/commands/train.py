"""Train a model, or go on with a run.

    sct train --config=sct_sc:quickstart
    sct train --config=sct_sc --config.data.store=STORE --config.optimizer.peak_lr=2e-4 --workdir=runs/mine

A configuration is a file, or the name of one that comes with sct; a variant follows a colon, and any of its
fields is overridden as `--config.section.field=value`. Running the same command again resumes the run in
`--workdir`. In a clone, `python -m launch.train` is the same program.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import sys
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

import sct
from sct.errors import ConfigError

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration: FILE_OR_NAME[:VARIANT].")
_WORKDIR = flags.DEFINE_string("workdir", None, "Run folder; runs/CONFIGURATION[-VARIANT] by default.")
_CACHE = flags.DEFINE_string(
    "compilation_cache", "~/.cache/sct/xla", "Folder of compiled programs kept between runs; '' for none."
)
_MULTIHOST = flags.DEFINE_bool(
    "multihost", False, "This is one process of several; Slurm and TPU pods need nothing else."
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, with --multihost elsewhere.")
_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes, with --coordinator.")
_PROCESS = flags.DEFINE_integer("process_id", None, "Number of this process, from 0, with --coordinator.")
flags.mark_flag_as_required("config")


def config_folder() -> Path:
    """Where the configurations lie: in the installed package, or beside it in a clone."""
    package = Path(sct.__file__).parent
    return next(f for f in (package / "configs", package.parent / "configs") if f.is_dir())


def prepare(argv: list[str]) -> list[str]:
    """Replace the name of a configuration that comes with sct by its file, in a list of arguments."""
    found = []
    for index, word in enumerate(argv):
        prefix, _, value = word.partition("=") if word.startswith("--config=") else ("", "", word)
        if prefix or (index and argv[index - 1] == "--config"):
            name, colon, variant = value.partition(":")
            path = _find(name)
            _check_fields(path, variant if colon else None, argv)
            value = f"{path}{colon}{variant}"
            word = f"{prefix}={value}" if prefix else value
        found.append(word)
    return found


def _find(name: str) -> Path:
    folder = config_folder()
    candidates = [Path(name), folder / f"{name}.py"]
    if Path(name).parent in (Path(), Path("configs")):
        candidates.append(folder / Path(name).name)
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    known = ", ".join(sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__"))
    raise ConfigError(f"there is no configuration {name!r}: give a file, or one of {known}.")


def _check_fields(path: Path, variant: str | None, argv: list[str]) -> None:
    """Refuse a variant, or a field of `--config.section.field=value`, that a configuration does not have."""
    module = runpy.run_path(str(path))
    try:
        config = module["get_config"](*([] if variant is None else [variant]))
    except ValueError as error:
        raise ConfigError(f"{path.name}: {error}.") from error
    for word in argv:
        if not word.startswith("--config."):
            continue
        node, names = config, word.removeprefix("--config.").partition("=")[0].split(".")
        for depth, name in enumerate(names):
            if not isinstance(node, ConfigDict) or name not in node:
                where = ".".join(["config", *names[:depth]])
                choices = f": choose from {', '.join(node)}" if isinstance(node, ConfigDict) else ""
                raise ConfigError(f"{where} has no field {name!r}{choices}.")
            node = node[name]


def _keep_freed_memory() -> None:
    """Let the C library reuse the memory of a step for the next one, where a step runs on the CPU.

    glibc gives large blocks back to the system when they are freed and gets them again, cleared page by page,
    in the next step: in the quickstart a third of the time, on two cores. Must precede JAX's threads.
    """
    accelerators = [path for name in ("nvidia*", "accel*", "kfd") for path in Path("/dev").glob(name)]
    if not sys.platform.startswith("linux") or accelerators:
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        # From malloc.h: one arena for all threads, no separate mappings, never shrink.
        m_arena_max, m_mmap_max, m_trim_threshold = -8, -4, -1
        for option, value in ((m_arena_max, 1), (m_mmap_max, 0), (m_trim_threshold, 2**31 - 1)):
            libc.mallopt(option, value)


def main(argv: list[str]) -> int:
    """Train as the flags say; 0, or 130 after Ctrl-C."""
    if len(argv) > 1:
        raise ConfigError(f"{argv[1]!r} is not a flag: options are written --name=value.")
    _keep_freed_memory()
    import jax

    from sct.train.experiment import run

    if _MULTIHOST.value:
        try:
            jax.distributed.initialize(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
        except (ValueError, RuntimeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ConfigError(
                f"--multihost found no cluster to join ({reason}): start it through Slurm or on a TPU pod, or "
                "give --coordinator=HOST:PORT, --num_processes and --process_id."
            ) from error
    if _CACHE.value:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(_CACHE.value))
    file, _, variant = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    default = Path("runs") / "-".join([Path(file).stem, *([variant] if variant else [])])
    result = run(_CONFIG.value.to_dict(), _WORKDIR.value or default)
    return 130 if result.reason == "interrupt" else 0
