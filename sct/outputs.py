"""Whether an output can be written: asked before anything is computed."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from sct.errors import ConfigError, first_line


def check_file(path: Path, option: str, overwrite: bool = False, needed: int = 0) -> None:
    """Raise `ConfigError` where a file cannot be written, or is there and may not be replaced.

    Parameters
    ----------
    path
        File to write; folders above it that are missing can be made.
    option
        Names it on the command line, for the messages: "--output".
    overwrite
        Whether it may be replaced.
    needed
        Bytes that it will have at least.
    """
    with _readable(path, option):
        is_folder, is_there = path.is_dir(), path.exists() or path.is_symlink()
    if is_folder:
        raise ConfigError(f"the output {path} is a folder, but a file is written: choose another {option}.")
    if is_there and not overwrite:
        raise ConfigError(
            f"the output {path} already exists: replace it with --overwrite, or choose another {option}."
        )
    check_room(path.parent, option, needed)


def check_folder(
    folder: Path, option: str, overwrite: bool = False, needed: int = 0, files: Collection[str] | None = None
) -> None:
    """Raise `ConfigError` where a folder cannot be written, or has content that may not be replaced.

    Parameters
    ----------
    folder, option, overwrite, needed
        As for `check_file`.
    files
        Names of the files in it that are written; None where the folder is replaced as a whole.
    """
    with _readable(folder, option):
        is_file = folder.exists() and not folder.is_dir()
        there = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    if is_file:
        raise ConfigError(f"the output {folder} is a file, but it must be a folder: choose another {option}.")
    replaced = [name for name in there if files is None or name in files]
    if replaced and not overwrite:
        raise ConfigError(
            f"the output {folder} already holds {replaced[0]}: replace it with --overwrite (in Python overwrite=True), "
            f"or choose another {option}."
        )
    # A folder that is replaced as a whole is made beside it.
    check_room(folder if files is not None else folder.parent, option, needed)


@contextmanager
def _readable(path: Path, option: str) -> Iterator[None]:
    """Say what keeps a path from being looked at: a name that is too long, a folder that may not be entered."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"the output {path} cannot be used ({error.strerror or first_line(error)}): choose another {option}."
        ) from error


def check_room(folder: Path, option: str, needed: int = 0) -> None:
    """Raise `ConfigError` where a folder cannot be made or written to, or lies on a disk without room."""
    place = folder.absolute()
    with _readable(folder, option):
        while not place.exists() and place != place.parent:
            place = place.parent
    if not place.is_dir():
        raise ConfigError(f"{place} is not a folder, so {folder} cannot be written: choose another {option}.")
    try:
        with tempfile.TemporaryFile(dir=place) as probe:  # permissions do not tell what a file system allows
            probe.write(b"0")
            probe.flush()
        free = shutil.disk_usage(place).free
    except OSError as error:
        raise ConfigError(
            f"{place} cannot be written ({error.strerror or first_line(error)}): choose another {option}."
        ) from error
    if free < needed:
        raise ConfigError(
            f"{place} has {size(free)} of free space, but at least {size(needed)} are needed: free space, or choose "
            f"another {option}."
        )


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder; 0 where there is nothing."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def size(n_bytes: int) -> str:
    """A number of bytes as it is read: "1.5 GB"."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= factor:
            return f"{n_bytes / factor:.1f} {unit}"
    return f"{n_bytes} bytes"
