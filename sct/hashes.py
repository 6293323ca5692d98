"""Hashes (sha256) by which a change of a file on the disk is noticed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SEAL = "sha256"  # entry of a JSON object with the hash of all its other entries
_THREADS = 8


def hash_file(path: Path) -> str:
    """Hash of a file's bytes, hexadecimal; memory does not grow with the file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(folder: Path, names: Collection[str]) -> dict[str, str]:
    """Hash of each file of a folder by its name, several files at a time."""
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda name: hash_file(folder / name), names)
        return dict(zip(names, found, strict=True))


def files_below(folder: Path) -> list[str]:
    """Names of all files in a folder and the folders in it, relative to it, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def hash_folder(folder: Path) -> str:
    """One hash of the names and the bytes of all files in a folder and the folders in it."""
    return hash_json(hash_files(folder, files_below(folder)))


def hash_json(content: Any) -> str:
    """Hash of a value that JSON can hold; the layout of a file and the order of entries do not matter."""
    plain = json.dumps(json.loads(json.dumps(content)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(plain.encode()).hexdigest()


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of a JSON object, and the hash of them as the entry `SEAL`."""
    rest = {name: value for name, value in content.items() if name != SEAL}
    return {**rest, SEAL: hash_json(rest)}


def is_changed(content: Mapping[str, Any]) -> bool:
    """Whether a JSON object has a hash, and not that of its other entries."""
    return SEAL in content and content[SEAL] != sealed(content)[SEAL]


def first_changed(folder: Path, recorded: Mapping[str, str], shared: bool = False) -> str | None:
    """First of some files that is missing or not the one whose hash was recorded; None where none is.

    Parameters
    ----------
    folder
        Where the files are.
    recorded
        Hashes by name.
    shared
        All processes of JAX call this: each reads its share of the files, and all get the same answer.

    Raises
    ------
    OSError
        A file that is there cannot be read.
    """
    import jax

    names = sorted(recorded)
    shared = shared and jax.process_count() > 1
    own = names[jax.process_index() :: jax.process_count()] if shared else names
    here = [name for name in own if (folder / name).is_file()]
    found = hash_files(folder, here)
    wrong = [names.index(name) for name in own if found.get(name) != recorded[name]]
    first = min(wrong, default=len(names))
    if shared:
        import numpy as np
        from jax.experimental import multihost_utils

        first = int(multihost_utils.process_allgather(np.asarray(first)).min())
    return names[first] if first < len(names) else None
