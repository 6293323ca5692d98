"""Define the flags --quiet and --verbose of every command. Commands that run a model also have the flag --device."""

from __future__ import annotations

import warnings

from absl import flags

from sct.commands.flag_errors import FlagError
from sct.global_settings import ERRORS, HINTS, settings

_QUIET = flags.DEFINE_bool("quiet", False, "Print only errors.")
_VERBOSE = flags.DEFINE_bool(
    "verbose",
    False,
    "Also print hints: the device, cache folders, and the time and memory that the command used.",
)


def apply() -> None:
    """Set `sct.settings.verbosity` to the level that the flags choose.

    Raises
    ------
    FlagError
        Both --quiet and --verbose are given.
    """
    if _QUIET.value and _VERBOSE.value:
        raise FlagError("--quiet and --verbose contradict each other: remove one of them.")
    if _QUIET.value or _VERBOSE.value:
        settings.verbosity = ERRORS if _QUIET.value else HINTS
    if _QUIET.value:
        warnings.simplefilter("ignore")  # also the warnings of libraries
