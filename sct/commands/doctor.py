"""Check the installation: versions, devices, memory, caches and extras.

    sct doctor
    sct doctor --verbose

Prints whether sct is ready on this machine, and what to do if it is not. Then it prints the versions of sct and its
libraries, the devices of JAX with their memory, the cache folders with their sizes, and the extras that are missing.
With --verbose, the versions of all required libraries are printed; with --quiet, only the problems. The exit status is
0 if sct is ready, otherwise 1.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

from sct import devices
from sct.commands.compilation import usual_folder
from sct.errors import first_line
from sct.global_settings import HINTS, INFO, settings
from sct.outputs import size, size_of
from sct.version import DISTRIBUTION, __version__

_WIDTH, _INDENT = 80, 20
_LIBRARIES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scipy", "pandas", "anndata", "scanpy",
)  # fmt: skip
# What the optional extras are for.
EXTRAS = {
    "cells": "example cells (sct.datasets.pbmc68k)",
    "analysis": "plots (sct.pl), clustering, baselines and embedding metrics of benchmarks",
    "text": "tokenizers and text metrics of language models",
    "hub": "models of the Hugging Face Hub",
    "haiku": "conversion of the published sCellTransformer weights",
    "torch": "weights in the format pytorch_model.bin",
    "parquet": "results as Parquet files",
    "census": "ingest from CELLxGENE Census",
}
_LEAST_DISK, _LEAST_MEMORY = 1e9, 2e9


def main(argv: list[str]) -> int:
    """Print the state of the installation, and return the exit status."""
    problems: list[str] = []
    found: list[tuple[str, list[tuple[str, str]]]] = [
        ("Software", list(_software(problems))),
        ("Devices", list(_devices(problems))),
        ("Caches", list(_caches(problems))),
        ("Extras", list(_extras(problems))),
    ]
    if problems:
        what = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
        print(f"not ready: sct {__version__} has {what} on this machine")
        for problem in problems:
            print(textwrap.fill(problem, _WIDTH, initial_indent="  - ", subsequent_indent="    "))
    elif settings.verbosity >= INFO:
        where = next((value for name, value in found[1][1] if name == "JAX runs on"), "")
        print(f"ready: sct {__version__} runs on {where}")
    for title, rows in found if settings.verbosity >= INFO else ():
        print(f"\n{title}")
        for name, value in rows:
            print(
                textwrap.fill(
                    value, _WIDTH, initial_indent=f"  {name:<{_INDENT - 2}}", subsequent_indent=" " * _INDENT,
                    break_on_hyphens=False, break_long_words=False,
                )
            )  # fmt: skip
    return 1 if problems else 0


def _version(library: str) -> str:
    """Return the version of a library, or "" if the library is not installed."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _requirements() -> dict[str, list[str]]:
    """Return the libraries that each extra requires, as a dict. The key "" holds those that sct always requires."""
    try:
        listed = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found: dict[str, list[str]] = {}
    for line in listed:
        name = re.match(r"[\w.-]+", line)
        extra = re.search(r"extra\s*==\s*['\"](\w+)['\"]", line)
        if name:
            found.setdefault(extra[1] if extra else "", []).append(name[0])
    return found


def _software(problems: list[str]) -> Iterator[tuple[str, str]]:
    yield "sct", f"{__version__} in {Path(__file__).parents[1]}"
    yield "Python", f"{platform.python_version()} in {sys.prefix}"
    yield "system", f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    required = _requirements()
    also = required.get("", []) if settings.verbosity >= HINTS else []
    for library in dict.fromkeys((*_LIBRARIES, *also)):
        yield library, _version(library) or "not installed"
    if not required:
        problems.append(
            f"{DISTRIBUTION} is not installed as a package, so its requirements are unknown: run pip install -e . in "
            "the clone."
        )
    missing = [name for name in required.get("", []) if not _version(name)]
    if missing:
        problems.append(
            f"required libraries are missing ({', '.join(missing)}): run pip install {DISTRIBUTION}."
        )


def _devices(problems: list[str]) -> Iterator[tuple[str, str]]:
    """Start JAX, compile a small program, and yield the devices and their memory."""
    # Another program on the machine may need the memory that JAX would reserve.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    free, total = _memory()
    if total:
        yield "memory", f"{size(free)} free of {size(total)}"
        if free < _LEAST_MEMORY:
            problems.append(
                f"only {size(free)} of memory is free, but models need at least {size(int(_LEAST_MEMORY))}: end other "
                "programs."
            )
    try:
        import jax

        started = time.monotonic()
        jax.block_until_ready(jax.jit(lambda x: (x @ x).sum())(jax.numpy.ones((64, 64))))
        yield "JAX runs on", devices.described()
        yield "test program", f"compiled and run in {time.monotonic() - started:.1f} s"
        backend = jax.default_backend()
    except Exception as error:  # a broken driver or plugin raises errors of many types
        yield "JAX runs on", "nothing"
        problems.append(
            f"JAX does not run ({first_line(error)}): check JAX_PLATFORMS and the driver, or install JAX again."
        )
        return
    for text in _memory_of_gpus() if backend == "gpu" else ():
        yield "GPU memory", text
    present = devices.hardware()
    if present and backend == "cpu":
        chosen = os.environ.get("JAX_PLATFORMS", "")
        if chosen:
            yield "note", f"JAX_PLATFORMS={chosen} hides the {present.upper()} of this machine"
        else:
            problems.append(
                f"the machine has a {present.upper()}, but JAX runs on the CPU: {devices.advice(present)}."
            )


def _memory() -> tuple[int, int]:
    """Return the free and the total memory of the machine in bytes; (0, 0) if they are unknown."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return 0, 0
    values = {name: int(kb) * 1024 for name, kb in re.findall(r"(\w+):\s+(\d+) kB", text)}
    return values.get("MemAvailable", 0), values.get("MemTotal", 0)


def _memory_of_gpus() -> list[str]:
    """Return one line of text per NVIDIA GPU, with the free and the total memory of the GPU.

    Return an empty list if the driver reports nothing.
    """
    command = ["nvidia-smi", "--query-gpu=index,memory.free,memory.total", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
        rows = [tuple(map(int, line.split(","))) for line in listed.strip().splitlines()]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []
    return [f"GPU {number}: {size(free << 20)} free of {size(total << 20)}" for number, free, total in rows]


def _caches(problems: list[str]) -> Iterator[tuple[str, str]]:
    compiled = usual_folder()
    folders = {
        "compiled programs": Path(compiled) if compiled and "://" not in compiled else None,
        "gene features": settings.cache_dir / "gene_features",
    }
    for name, folder in folders.items():
        if folder is None:
            yield name, compiled or "not kept (JAX_COMPILATION_CACHE_DIR is empty)"
            continue
        yield name, f"{size(size_of(folder))} in {folder}"
        trouble = _trouble(folder)
        if trouble:
            problems.append(f"the cache folder {folder} cannot be used ({trouble}): set SCT_CACHE_DIR.")
    hub = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser() / "hub"
    if hub.is_dir():
        yield "Hugging Face Hub", f"{size(size_of(hub))} in {hub}"
    yield "free disk here", size(shutil.disk_usage(Path.cwd()).free)


def _trouble(folder: Path) -> str:
    """Return the reason why files cannot be stored in a folder, or "" if they can be stored there."""
    place = folder.expanduser().absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place) as probe:
            probe.write(b"0")
            probe.flush()
    except OSError as error:
        return error.strerror or first_line(error)
    free = shutil.disk_usage(place).free
    return f"only {size(free)} of disk space is free" if free < _LEAST_DISK else ""


def _extras(problems: list[str]) -> Iterator[tuple[str, str]]:
    required = _requirements()
    for extra, what in EXTRAS.items():
        if extra not in required:
            continue
        missing = [name for name in required[extra] if not _version(name)]
        if missing:
            lacks = f"missing {', '.join(missing)}"
            yield extra, f'{lacks}; needed for {what}: pip install "{DISTRIBUTION}[{extra}]"'
        else:
            yield extra, f"installed: {what}"
