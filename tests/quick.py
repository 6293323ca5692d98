"""How tests use a machine: programs compiled quickly rather than to run quickly, and one thread for linear algebra.

Imported before JAX and NumPy, by `conftest.py`. `SCT_TESTS_COMPILE=full` compiles as the program does for its users.
"""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path

CACHE = Path(__file__).resolve().parents[1] / ".pytest_cache" / "xla"
# Loops emitted without MLIR: of one train step 1.5 s of compilation in place of 5.3 s. XLA ends a process that
# names a flag it does not know, and later versions do not know this one.
_FLAG = "--xla_cpu_use_fusion_emitters=false"
_VERSION = "0.10."
_QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
# Matrices are small, so that threads of a library wait for each other: a fit of 90 cells took twice the time.
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def prepare() -> None:
    """Compile with few optimizations, keep what is compiled and use one thread, here and in processes started here."""
    for name in _THREADS:
        os.environ.setdefault(name, "1")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
    if os.environ.get("SCT_TESTS_COMPILE", "quick") == "full":
        return
    for name, value in _QUICK.items():
        os.environ.setdefault(name, value)
    flags = os.environ.get("XLA_FLAGS", "")
    if metadata.version("jaxlib").startswith(_VERSION) and _FLAG not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_FLAG}".strip()


def compile_fully() -> None:
    """Undo quick compilation in a process that has asked JAX for no device yet: for what is measured of a program."""
    import jax

    for name in _QUICK:
        os.environ.pop(name, None)
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "").replace(_FLAG, "").strip()
    jax.config.update("jax_disable_most_optimizations", False)
