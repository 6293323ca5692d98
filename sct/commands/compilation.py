"""The folder of compiled programs: used by every command that computes, never a reason to stop."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

DEFAULT = "~/.cache/sct/xla"
_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
_TROUBLE = re.compile(
    r"Error (reading|writing) persistent compilation cache entry for '(.+?)': (.*)", re.DOTALL
)
_usual: Any = None


def keep_programs(folder: str | None = None) -> str:
    """Keep compiled programs in a folder, from which later runs of the same program take them.

    A folder that cannot be used is told in one sentence on standard error, and what cannot be read is compiled
    anew and replaced.

    Parameters
    ----------
    folder
        Where; '' for nowhere; None for the environment's JAX_COMPILATION_CACHE_DIR, or else `~/.cache/sct/xla`.

    Returns
    -------
    The folder in use, or ''.
    """
    chosen = os.environ.get(_VARIABLE, DEFAULT) if folder is None else folder
    # Buckets (gs://...) are JAX's business.
    if chosen and "://" not in chosen:
        chosen = os.path.abspath(os.path.expanduser(chosen))
        try:
            os.makedirs(chosen, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=chosen) as probe:
                probe.write(b"0" * 4096)
        except OSError as error:
            _say(chosen, error.strerror or str(error))
            chosen = ""
    os.environ[_VARIABLE] = chosen
    if "jax" in sys.modules:
        import jax

        jax.config.update("jax_compilation_cache_dir", chosen or None)
    if chosen:
        _listen(Path(chosen))
    return chosen


def _listen(folder: Path) -> None:
    """Take JAX's warnings about the folder, and mend what they are about."""
    global _usual
    told: set[str] = set()
    _usual = _usual or warnings.showwarning
    usual = _usual

    def show(message: Warning | str, *rest: Any, **options: Any) -> None:
        found = _TROUBLE.match(str(message))
        if found is None:
            usual(message, *rest, **options)
            return
        what, program, reason = found.groups()
        if what == "writing" and not told:
            told.add(what)
            _say(str(folder), reason.strip().splitlines()[0])
        # A run that was stopped, or a disk that was full, while an entry was written leaves a part of it, which JAX
        # would read in vain for ever: it never writes over an entry.
        for entry in folder.glob(f"{program}-*"):
            try:
                entry.unlink()
            except OSError:
                continue

    warnings.filterwarnings("always", message="Error (reading|writing) persistent compilation cache")
    warnings.showwarning = show


def _say(folder: str, reason: str) -> None:
    print(
        f"the folder of compiled programs {folder} cannot be written ({reason}), so each run compiles anew: give "
        "another one with --compilation_cache=FOLDER or JAX_COMPILATION_CACHE_DIR.",
        file=sys.stderr,
    )
