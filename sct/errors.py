"""Define the errors that a user can fix.

Each message is one sentence: what was found, what was expected, what to do next. The command line prints only the
message and exits with status 1 (`AGAIN` for a `ProcessLostError`). Only defects of this project show a traceback.
"""

from __future__ import annotations

import errno
import os
import traceback

# Exit status of a command that has saved its work and continues when it is run again: EX_TEMPFAIL of sysexits.h.
AGAIN: int = getattr(os, "EX_TEMPFAIL", 75)


class SctError(Exception):
    """Base class of all errors whose cause is the input, the configuration or the machine, not a defect of sct."""


class DataError(SctError, ValueError):
    """Counts, genes, coordinates or labels do not meet the requirements of the function."""


class StoreError(SctError, ValueError):
    """A store is missing, incomplete or corrupted, or it was made for another vocabulary."""


class ConfigError(SctError, ValueError):
    """An option or configuration has an invalid value, or two options contradict each other."""


class FolderInUseError(SctError, RuntimeError):
    """Another process is writing to the folder; the message names this process."""


class CheckpointError(SctError, ValueError):
    """A checkpoint or model folder cannot be used; the message lists the differences."""


class DivergedError(SctError, ArithmeticError):
    """The loss is not finite; the message names the step and the batch."""


class ProcessLostError(SctError, ConnectionError):
    """Another process of a multi-process run has ended or does not respond."""


class TrainingStoppedError(SctError, RuntimeError):
    """A training run was stopped after it had saved a checkpoint.

    The rest of the call is not run, because it needs the complete training.

    Attributes
    ----------
    reason
        Why the training stopped: "signal" (SIGTERM) or "stop_at" (the option train.stop_at).
    """

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


class OutputError(SctError, OSError):
    """A file or folder cannot be written. The arguments are those of `OSError`: number, reason, path."""

    def __str__(self) -> str:
        return (
            f"{self.filename} cannot be written ({self.strerror}): check its permissions and the free space, or choose "
            "another path."
        )


class MissingExtraError(SctError, ImportError):
    """An optional dependency is not installed; the message gives the pip command."""


def space_hint(reason: str) -> str:
    """Return " and has enough free space" if a write failed because the disk is full, otherwise ""."""
    short = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG)
    return " and has enough free space" if reason in map(os.strerror, short) else ""


def first_line(error: BaseException, limit: int = 200) -> str:
    """Return the first line of an error message, at most `limit` characters.

    If the error has no message, return the name of the error class.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:limit]


# Full disk, full quota, file size limit, read-only disk, broken disk.
_DISK = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG, errno.EROFS, errno.EIO)
# Libraries that can raise their own error while they handle a system error.
_WRITERS = ("h5py", "tensorstore", "zarr", "anndata", "orbax")


def disk_trouble(error: BaseException) -> str:
    """Return the system's reason if a full, read-only or broken disk caused the error. For all other errors, return ''.

    Libraries (HDF5, TensorStore, Orbax) put the reason into the text or the cause of their own errors. A defect of this
    project that occurs while such an error is handled is still reported as a defect.
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
    """Return whether one of the libraries that write files raised this RuntimeError or ValueError."""
    if not isinstance(error, RuntimeError | ValueError):
        return False
    module = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = str(frame.f_globals.get("__name__", ""))
    return module.partition(".")[0] in _WRITERS
