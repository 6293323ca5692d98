"""Compute SHA-256 hashes, to detect changed files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SEAL = "sha256"  # key of a JSON object for the hash of all its other entries
_THREADS = 8


def hash_file(path: Path) -> str:
    """Return the hexadecimal hash of a file. The memory use does not depend on the file size."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(folder: Path, names: Collection[str]) -> dict[str, str]:
    """Return the hash of each named file in a folder. Several files are read in parallel."""
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda name: hash_file(folder / name), names)
        return dict(zip(names, found, strict=True))


def files_below(folder: Path) -> list[str]:
    """Return the sorted relative paths of all files in a folder and its subfolders."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def hash_folder(folder: Path) -> str:
    """Return one hash of the names and contents of all files in a folder and its subfolders."""
    return hash_json(hash_files(folder, files_below(folder)))


def hash_json(content: Any) -> str:
    """Return the hash of a JSON value. The formatting and the order of keys do not change the hash."""
    plain = json.dumps(json.loads(json.dumps(content)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(plain.encode()).hexdigest()


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a JSON object that also has a hash of all entries, under the key `SEAL`."""
    rest = {name: value for name, value in content.items() if name != SEAL}
    return {**rest, SEAL: hash_json(rest)}


def is_changed(content: Mapping[str, Any]) -> bool:
    """Return whether a JSON object has a stored hash that its entries do not match."""
    return SEAL in content and content[SEAL] != sealed(content)[SEAL]


def first_changed(folder: Path, recorded: Mapping[str, str], shared: bool = False) -> str | None:
    """Return the first file that is missing or does not match its recorded hash. Return None if all files match.

    Parameters
    ----------
    folder
        Folder of the files.
    recorded
        Dict from the name of each file to its hash when it was written.
    shared
        If True, all JAX processes must call this function. Each process reads a part of the files, and all get the same
        result.

    Raises
    ------
    OSError
        A file exists but cannot be read.
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
