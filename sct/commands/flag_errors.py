"""What is wrong with a command line, and the name that was probably meant."""

from __future__ import annotations

from collections.abc import Iterable

from sct import checks
from sct.errors import ConfigError

_UNTIL = "0.2.0"  # the release in which former names stop working


class FlagError(ConfigError):
    """The command line is wrong: the command ends with this sentence, its usage and status 2."""


def nearest(word: str, names: Iterable[str]) -> str:
    """The name that a misspelled or shortened one probably means, or ''."""
    names = list(names)
    longer = sorted((name for name in names if len(word) > 1 and name.startswith(word)), key=len)
    return next(iter([*longer, *checks.nearest(word, names)]), "")


def renamed(old: str, new: str) -> str:
    """The notice on a flag that is given by its former name."""
    return f"note: --{old} is now --{new}; the former name works until release {_UNTIL}."
