"""Files and folders that take their place at once, when they are complete, or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sct.errors import OutputError, SctError, disk_trouble, first_line

_LONGEST = 200  # bytes of a name, which with what is added stays below the 255 of most file systems
# What is younger may be of a process that does not hold it yet, or that writes HDF5. No clocks differ by so much.
_YOUNG_SECONDS = 600.0


def _kept(path: Path) -> str:
    """The part of a name that a temporary name has too."""
    return os.fsencode(path.name)[:_LONGEST].decode("utf-8", "ignore")


def _beside(path: Path) -> Path:
    """A name beside `path` that nobody can foresee."""
    return path.with_name(f".{_kept(path)}.{secrets.token_hex(8)}.tmp")


@contextmanager
def atomic_write(path: str | os.PathLike[str], hold: bool = True) -> Iterator[Path]:
    """Give an empty file to write to, which takes the place of `path` when the block ends.

    The file is new: nothing that lies in the folder is written to, and no link is followed. It is on the disk before it
    takes its place, and gone where the block fails. A link at `path` is replaced, not what it names. Files of processes
    that died while they wrote `path` are removed.

    Parameters
    ----------
    path
        File to write, in a folder that exists.
    hold
        Whether the new file is locked (`flock`) meanwhile. False where the library that writes it does so, as HDF5.

    Raises
    ------
    OutputError
        The file cannot be written, in one sentence; also where the block fails for a full disk.
    """
    target = Path(path)
    temporary = _beside(target)
    with _told(target):
        os.close(
            os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666)
        )
    try:
        with _held(temporary) if hold else contextlib.nullcontext():
            _remove_leftover_files(target)
            with _told(target, disk_alone=True):
                yield temporary
            with _told(target):
                flush(temporary)
                os.replace(temporary, target)
    except BaseException:
        remove(temporary)
        raise
    flush(target.parent)


@contextmanager
def _told(path: Path, disk_alone: bool = False) -> Iterator[None]:
    """Turn what the system says of an output into one sentence; of other code, a full disk and its like alone."""
    try:
        yield
    except SctError:
        raise
    except Exception as error:
        reason = disk_trouble(error)
        if not reason and (disk_alone or not isinstance(error, OSError)):
            raise
        reason = reason or getattr(error, "strerror", None) or first_line(error)
        raise OutputError(getattr(error, "errno", None), reason, str(path)) from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text by `atomic_write`, line ends as they are."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write a JSON file by `atomic_write`."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def replaced(folder: Path) -> Path:
    """Where an old folder waits while `atomic_folder` puts a new one in its place."""
    return folder.with_name(f".{folder.name}.old")


@contextmanager
def atomic_folder(
    folder: Path, is_leftover: Callable[[Path], bool] = lambda leftover: False
) -> Iterator[Path]:
    """Give a new folder to fill, which takes the place of `folder` when the block ends.

    An old folder is renamed to `replaced(folder)` just before and removed after; where the process dies between these
    two, it is found there, and the next call puts it back first.

    Parameters
    ----------
    folder
        Folder to write; the folder above is made.
    is_leftover
        Whether a folder that a process left behind, which died while it wrote, may be removed.

    Raises
    ------
    OutputError
        The folder cannot be written, in one sentence; the old one is as it was.
    """
    old, new = replaced(folder), _beside(folder)
    with _told(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        new.mkdir()
    try:
        with _held(new):
            _remove_leftovers(folder, is_leftover)
            with _told(folder, disk_alone=True):
                yield new
            with _told(folder):
                for file in new.rglob("*"):
                    flush(file)
                flush(new)
                _exchange(new, old, folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def _exchange(new: Path, old: Path, folder: Path) -> None:
    remove(old)
    if folder.exists() or folder.is_symlink():
        os.replace(folder, old)
    try:
        os.replace(new, folder)
    except BaseException:
        if old.exists():
            os.replace(old, folder)
        raise
    flush(folder.parent)
    remove(old)


def remove(path: Path) -> None:
    """Remove a file, a link (and not what it names) or a folder, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        path.unlink()


def _remove_leftovers(folder: Path, is_leftover: Callable[[Path], bool]) -> None:
    """Remove what processes left that died while they wrote `folder`: nobody holds it."""
    for path in _temporaries(folder, stat.S_ISDIR):
        with contextlib.suppress(OSError):  # removed meanwhile
            # A process that has just made its folder does not hold it yet, and nothing is in it.
            if is_leftover(path) and (any(path.iterdir()) or not _is_young(path)):
                _remove_unheld(path)


def _remove_leftover_files(target: Path) -> None:
    """Remove what processes left that died while they wrote `target`: it is old, and nobody holds it."""
    for path in _temporaries(target, stat.S_ISREG):
        if not _is_young(path):
            _remove_unheld(path)


def _temporaries(target: Path, is_kind: Callable[[int], bool]) -> list[Path]:
    """What lies beside `target` under a name that `_beside` gives."""
    name = re.compile(rf"\.{re.escape(_kept(target))}\.[0-9a-f]{{16}}\.tmp")
    with contextlib.suppress(OSError), os.scandir(target.parent) as entries:
        return [
            target.with_name(entry.name)
            for entry in entries
            if name.fullmatch(entry.name) and is_kind(entry.stat(follow_symlinks=False).st_mode)
        ]
    return []


def _is_young(path: Path) -> bool:
    """Whether a file or folder changed a short time ago, or is gone."""
    try:
        return time.time() - path.lstat().st_mtime < _YOUNG_SECONDS
    except OSError:
        return True


def _remove_unheld(path: Path) -> None:
    with _held(path) as held:
        if held:
            remove(path)


@contextmanager
def _held(path: Path) -> Iterator[bool]:
    """Hold a file or folder while this process lives; False where another does, or where there are no locks."""
    try:
        import fcntl

        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    except (ImportError, OSError):
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # folders cannot be opened on every system
        return
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(handle)
