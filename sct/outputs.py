"""Check that an output can be written, before anything is computed."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from sct.errors import ConfigError, first_line


def check_file(path: Path, option: str, overwrite: bool = False, needed: int = 0) -> None:
    """Raise `ConfigError` if a file cannot be written, or if it exists and `overwrite` is False.

    Parameters
    ----------
    path
        File to write. Its parent folders may be missing.
    option
        Command line option that sets the file, for error messages, such as "--output".
    overwrite
        Whether an existing file may be replaced.
    needed
        Number of bytes that must be free on the disk for the file.
    """
    with _readable(path, option):
        is_folder, is_there = path.is_dir(), path.exists() or path.is_symlink()
    if is_folder:
        raise ConfigError(f"the output {path} is a folder, but must be a file: choose another {option}.")
    if is_there and not overwrite:
        raise ConfigError(
            f"the output {path} already exists: set --overwrite to replace it, or choose another {option}."
        )
    check_room(path.parent, option, needed)


def check_folder(
    folder: Path, option: str, overwrite: bool = False, needed: int = 0, files: Collection[str] | None = None
) -> None:
    """Raise `ConfigError` if a folder cannot be written.

    The error is also raised if files in the folder would be replaced and `overwrite` is False.

    Parameters
    ----------
    folder, option, overwrite, needed
        See `check_file`.
    files
        Names of the files to write in the folder. None means that the whole folder is replaced.
    """
    with _readable(folder, option):
        is_file = folder.exists() and not folder.is_dir()
        there = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    if is_file:
        raise ConfigError(f"the output {folder} is a file, but it must be a folder: choose another {option}.")
    replaced = [name for name in there if files is None or name in files]
    if replaced and not overwrite:
        raise ConfigError(
            f"the output {folder} already contains {replaced[0]}: set --overwrite (in Python overwrite=True) to "
            f"replace it, or choose another {option}."
        )
    # If the whole folder is replaced, the new one is first written next to it.
    check_room(folder if files is not None else folder.parent, option, needed)


@contextmanager
def _readable(path: Path, option: str) -> Iterator[None]:
    """Convert an `OSError` from the access to a path (name too long, no permission) to a `ConfigError`."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"the output {path} cannot be used ({error.strerror or first_line(error)}): choose another {option}."
        ) from error


def check_room(folder: Path, option: str, needed: int = 0) -> None:
    """Raise `ConfigError` if a folder cannot be created or written, or if its disk has too little free space."""
    place = folder.absolute()
    with _readable(folder, option):
        while not place.exists() and place != place.parent:
            place = place.parent
    if not place.is_dir():
        raise ConfigError(f"{place} is not a folder, so {folder} cannot be written: choose another {option}.")
    try:
        with tempfile.TemporaryFile(
            dir=place
        ) as probe:  # permission bits do not show a read-only file system
            probe.write(b"0")
            probe.flush()
        free = shutil.disk_usage(place).free
    except OSError as error:
        raise ConfigError(
            f"{place} cannot be written ({error.strerror or first_line(error)}): choose another {option}."
        ) from error
    if free < needed:
        raise ConfigError(
            f"{place} has {size(free)} of free space, but the output needs at least {size(needed)}: delete other "
            f"files, or choose another {option}."
        )


def size_of(path: Path) -> int:
    """Return the size of a file, or of all files in a folder, in bytes. Return 0 if the path does not exist."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def size(n_bytes: int) -> str:
    """Format a number of bytes as text, such as "1.5 GB"."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= factor:
            return f"{n_bytes / factor:.1f} {unit}"
    return f"{n_bytes} bytes"
