"""Print all messages except errors. `sct.settings.verbosity` determines which messages are printed."""

from __future__ import annotations

import os
import sys
import warnings
from typing import TYPE_CHECKING

from sct.global_settings import HINTS, INFO, WARNINGS, settings

if TYPE_CHECKING:
    from rich.console import Console

_PACKAGE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "")


def info(text: str) -> None:
    """Print a line about a result on standard output."""
    if settings.verbosity >= INFO:
        print(text, flush=True)


def notice(text: str, level: int = INFO) -> None:
    """Print a line on standard error if `sct.settings.verbosity` is at least `level`."""
    if settings.verbosity >= level:
        print(text, file=sys.stderr, flush=True)


def hint(text: str) -> None:
    """Print a line on standard error if `sct.settings.verbosity` is "hints"."""
    notice(text, HINTS)


def warn(text: str, category: type[Warning] = UserWarning) -> None:
    """Issue a warning, unless verbosity is "errors". The warning names the line of the user's code that called sct."""
    if settings.verbosity < WARNINGS:
        return
    # Python 3.12 has skip_file_prefixes for this, but Python 3.11 does not.
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, category, stacklevel=level)


def in_notebook() -> bool:
    """Return whether the output goes to a Jupyter notebook, directly or from a command that a cell runs with `!`."""
    # A command of a cell has a pseudo-terminal, although its output is stored as text.
    return is_kernel() or "JPY_PARENT_PID" in os.environ


def is_kernel() -> bool:
    """Return whether this process is the Python kernel of a Jupyter notebook."""
    interactive = sys.modules.get("IPython")
    return interactive is not None and hasattr(interactive.get_ipython(), "kernel")


def console(*, quiet: bool = False, stderr: bool = False, level: int = INFO) -> Console:
    """Return a rich console for tables and text. The console prints nothing if the verbosity is below `level`.

    Text is printed unchanged: paths and error messages can contain `[x]` or `:x:`, which rich would read as markup or
    emoji. Notebooks get plain text, because control sequences of terminals would be stored in the notebook.
    """
    from rich.console import Console

    quiet = quiet or settings.verbosity < level
    if in_notebook():
        return Console(
            quiet=quiet, stderr=stderr, markup=False, emoji=False, force_terminal=False, force_jupyter=False,
            color_system=None,
        )  # fmt: skip
    return Console(quiet=quiet, stderr=stderr, markup=False, emoji=False)
