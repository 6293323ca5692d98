"""Define the error for a wrong command line, and suggest the right name for a misspelled one."""

from __future__ import annotations

from collections.abc import Iterable

from sct import checks
from sct.errors import ConfigError

_UNTIL = "0.2.0"  # the release in which former names stop working


class FlagError(ConfigError):
    """Raised if the command line is wrong. The command prints the message and its usage, and exits with status 2."""


def nearest(word: str, names: Iterable[str]) -> str:
    """Return the name that a misspelled or shortened word probably means, or ''."""
    names = list(names)
    longer = sorted((name for name in names if len(word) > 1 and name.startswith(word)), key=len)
    return next(iter([*longer, *checks.nearest(word, names)]), "")


def renamed(old: str, new: str) -> str:
    """Return the notice that is printed if a flag is given by its former name."""
    return f"note: --{old} is now --{new}; the former name works until release {_UNTIL}."
