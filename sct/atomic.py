"""Write files and folders atomically: a file or folder appears under its name only when it is complete."""

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

_LONGEST = 200  # bytes of the name; with the added parts it stays below the limit of most file systems (255)
# A younger file can belong to a process that has not locked it yet, or that writes HDF5. Clocks differ by less.
_YOUNG_SECONDS = 600.0


def _kept(path: Path) -> str:
    """Return the name of `path` for use in a temporary name. A name that is too long is shortened."""
    return os.fsencode(path.name)[:_LONGEST].decode("utf-8", "ignore")


def _beside(path: Path) -> Path:
    """Return an unpredictable temporary name in the folder of `path`."""
    return path.with_name(f".{_kept(path)}.{secrets.token_hex(8)}.tmp")


@contextmanager
def atomic_write(path: str | os.PathLike[str], hold: bool = True) -> Iterator[Path]:
    """Yield an empty temporary file. When the block ends, this file replaces `path`.

    The temporary file is always new: existing files are not changed, and links are not followed. The temporary file is
    flushed to disk before it replaces `path`. If the block fails, the temporary file is deleted. If `path` is a link,
    the link is replaced, not its target. Temporary files of processes that died while writing `path` are deleted.

    Parameters
    ----------
    path
        File to write, in an existing folder.
    hold
        Whether to lock the temporary file (`flock`) while it is written. Use False if the library that writes the file
        also locks the file, as HDF5 does.

    Raises
    ------
    OutputError
        The file cannot be written, or the block fails because of a full disk.
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
    """Convert errors while writing `path` to `OutputError`. With `disk_alone`, convert only disk errors."""
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
    """Write UTF-8 text with `atomic_write`, without changing line ends."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write a JSON file with `atomic_write`."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def replaced(folder: Path) -> Path:
    """Return the temporary name that the old folder has while `atomic_folder` replaces this folder."""
    return folder.with_name(f".{folder.name}.old")


@contextmanager
def atomic_folder(
    folder: Path, is_leftover: Callable[[Path], bool] = lambda leftover: False
) -> Iterator[Path]:
    """Yield an empty temporary folder. When the block ends, this folder replaces `folder`.

    An existing folder is first renamed to `replaced(folder)` and deleted after the replacement. If the process dies in
    between, the next call restores the old folder first.

    Parameters
    ----------
    folder
        Folder to write. Its parent folder is created if needed.
    is_leftover
        Function that takes a temporary folder. It returns whether a process that died left this folder behind, so that
        the folder may be deleted.

    Raises
    ------
    OutputError
        The folder cannot be written. An existing folder is unchanged.
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
    """Delete a file, a link (not its target) or a folder; ignore errors."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        path.unlink()


def _remove_leftovers(folder: Path, is_leftover: Callable[[Path], bool]) -> None:
    """Delete the temporary folders for `folder` that no process locks. The processes that wrote them have died."""
    for path in _temporaries(folder, stat.S_ISDIR):
        with contextlib.suppress(OSError):  # deleted by another process
            # An empty young folder can belong to a process that has not locked it yet.
            if is_leftover(path) and (any(path.iterdir()) or not _is_young(path)):
                _remove_unheld(path)


def _remove_leftover_files(target: Path) -> None:
    """Delete the old temporary files for `target` that no process locks. The processes that wrote them have died."""
    for path in _temporaries(target, stat.S_ISREG):
        if not _is_young(path):
            _remove_unheld(path)


def _temporaries(target: Path, is_kind: Callable[[int], bool]) -> list[Path]:
    """Return the temporary files or folders for `target`, recognized by the form of their names; see `_beside`."""
    name = re.compile(rf"\.{re.escape(_kept(target))}\.[0-9a-f]{{16}}\.tmp")
    with contextlib.suppress(OSError), os.scandir(target.parent) as entries:
        return [
            target.with_name(entry.name)
            for entry in entries
            if name.fullmatch(entry.name) and is_kind(entry.stat(follow_symlinks=False).st_mode)
        ]
    return []


def _is_young(path: Path) -> bool:
    """Return whether a file or folder was changed recently or no longer exists."""
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
    """Lock a file or folder, and yield whether this worked.

    Yield False if another process holds the lock, or if the system has no locks.
    """
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
    """Flush a file, or the entries of a folder, to disk (fsync)."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # some systems cannot open folders
        return
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(handle)
