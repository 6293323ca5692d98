"""Store compiled programs in a folder (JAX's persistent compilation cache).

If the folder cannot be used, the command continues without it.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from sct import messages
from sct.global_settings import WARNINGS, settings

DEFAULT = "~/.cache/sct/xla"  # `sct.settings.cache_dir` replaces ~/.cache/sct
_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
_TROUBLE = re.compile(
    r"Error (reading|writing) persistent compilation cache entry for '(.+?)': (.*)", re.DOTALL
)
_usual: Any = None


def usual_folder() -> str:
    """Return the folder in the environment variable JAX_COMPILATION_CACHE_DIR.

    If the variable is not set, return the folder `xla` inside `sct.settings.cache_dir`.
    """
    return os.environ.get(_VARIABLE, str(settings.cache_dir / "xla"))


def keep_programs(folder: str | None = None) -> str:
    """Store compiled programs in a folder, so that later runs do not compile them again.

    If the folder cannot be used, one sentence is printed on standard error. If the file of a stored program cannot be
    read, the program is compiled again and the file is replaced.

    Parameters
    ----------
    folder
        Folder to use. '' means no folder. None means the result of `usual_folder`.

    Returns
    -------
    The folder in use, or '' if there is none.
    """
    chosen = usual_folder() if folder is None else folder
    # JAX itself handles buckets (gs://...).
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
        messages.hint(f"hint: compiled programs are kept in {chosen}")
    return chosen


def _listen(folder: Path) -> None:
    """Handle JAX's warnings about stored programs: report write errors only once, and delete damaged files."""
    global _usual
    reported: set[str] = set()
    _usual = _usual or warnings.showwarning
    usual = _usual

    def show(message: Warning | str, *rest: Any, **options: Any) -> None:
        found = _TROUBLE.match(str(message))
        if found is None:
            usual(message, *rest, **options)
            return
        what, program, reason = found.groups()
        if what == "writing" and not reported:
            reported.add(what)
            _say(str(folder), reason.strip().splitlines()[0])
        # A run that was stopped, or a disk that was full, may leave an incomplete entry. JAX would fail to read it in
        # every later run, because it never overwrites an entry.
        for entry in folder.glob(f"{program}-*"):
            try:
                entry.unlink()
            except OSError:
                continue

    warnings.filterwarnings("always", message="Error (reading|writing) persistent compilation cache")
    warnings.showwarning = show


def _say(folder: str, reason: str) -> None:
    messages.notice(
        f"the folder for compiled programs {folder} cannot be written ({reason}), so every run compiles again: set "
        "another folder with --compilation_cache=FOLDER or JAX_COMPILATION_CACHE_DIR.",
        WARNINGS,
    )
