"""Errors that a user can mend.

Every message is one sentence: what was found, what was expected, what to do next. The command line
prints the message alone and exits with status 1 (a `ProcessLostError`: `AGAIN`); a traceback is kept for defects
of this project.
"""

from __future__ import annotations

import errno
import os
import traceback

# Exit status of a command that has saved its work and goes on where it is run again: EX_TEMPFAIL of sysexits.h.
AGAIN: int = getattr(os, "EX_TEMPFAIL", 75)


class SctError(Exception):
    """Base of all errors that come from input, configuration or the machine, not from a defect."""


class DataError(SctError, ValueError):
    """Counts, genes, coordinates or labels are not what the function needs."""


class StoreError(SctError, ValueError):
    """A store is missing, incomplete, corrupted, or made for another vocabulary."""


class ConfigError(SctError, ValueError):
    """A configuration names something that does not exist or contradicts itself."""


class FolderInUseError(SctError, RuntimeError):
    """Another process writes to the folder; the message names it."""


class CheckpointError(SctError, ValueError):
    """A checkpoint or model folder cannot be used; the message lists the differences."""


class DivergedError(SctError, ArithmeticError):
    """The loss is not finite; the message names the step and the batch."""


class ProcessLostError(SctError, ConnectionError):
    """Another process of the run has ended or does not answer."""


class OutputError(SctError, OSError):
    """A file or folder cannot be written: arguments are those of `OSError`, with the path as its file name."""

    def __str__(self) -> str:
        return (
            f"{self.filename} cannot be written ({self.strerror}): check its permissions and the free space, or choose "
            "another place."
        )


class MissingExtraError(SctError, ImportError):
    """An optional dependency is not installed; the message gives the pip command."""


def space_hint(reason: str) -> str:
    """What to look at first where a file cannot be written for a reason of the system: space, where it is that."""
    short = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG)
    return " (free space?)" if reason in map(os.strerror, short) else ""


def first_line(error: BaseException, limit: int = 200) -> str:
    """What a library's error says, at most its first line and `limit` characters; its name where it says nothing."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:limit]


# A full disk or quota, a file that a limit or a read-only disk forbids, a broken disk.
_DISK = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG, errno.EROFS, errno.EIO)
# Libraries whose errors may hide that of the system that they were handling.
_WRITERS = ("h5py", "tensorstore", "zarr", "anndata", "orbax")


def disk_trouble(error: BaseException) -> str:
    """What the system says of a disk that is full, read-only or broken; '' for every other error.

    Libraries (HDF5, TensorStore, Orbax) give it as text inside errors of their own, or as the cause of one. A defect
    that comes up while such an error is handled is still a defect.
    """
    seen: BaseException | None = error
    for _ in range(10):
        if seen is None:
            break
        if isinstance(seen, OSError | RuntimeError | ValueError):
            for number in _DISK:
                if getattr(seen, "errno", None) == number or os.strerror(number) in str(seen):
                    return os.strerror(number)
        follows = not seen.__suppress_context__ and (isinstance(seen, OSError) or _is_of_writer(seen))
        seen = seen.__cause__ or (seen.__context__ if follows else None)
    return ""


def _is_of_writer(error: BaseException) -> bool:
    """Whether a library that writes files raised this RuntimeError or ValueError."""
    if not isinstance(error, RuntimeError | ValueError):
        return False
    module = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = str(frame.f_globals.get("__name__", ""))
    return module.partition(".")[0] in _WRITERS
