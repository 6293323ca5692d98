"""Which inputs there are: finding files in folders, naming studies, telling whether inputs changed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp

from sct.errors import ConfigError, DataError

if TYPE_CHECKING:
    import anndata

CENSUS = "census:"
MTX = re.compile(r"matrix\.mtx(\.gz)?$")
_NAMED = re.compile(r"(?P<name>[\w.-]+)=(?P<location>.+)", re.DOTALL)
# What 10x pipelines call their outputs: the sample's name is in a folder above.
_GENERIC = re.compile(
    r"(sample_)?(raw|filtered)_(feature|gene)_bc_matri(x|ces)(_h5|_mex)?|matrix|outs|count|counts|gene|filtered|raw"
    r"|grch38|hg19|genefull|solo_?out",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Input:
    """One file, folder, Census data set or object in memory that becomes one study (or several).

    Attributes
    ----------
    name
        Name of the study.
    kind
        "h5ad", "10x_h5", "mtx", "zarr", "census" or "memory".
    location
        Path, Census data set id, or a description; used in messages.
    adata
        The object itself, where it is in memory.
    """

    name: str
    kind: str
    location: str
    adata: anndata.AnnData | None = None

    def fingerprint(self) -> str:
        """Digest that changes when the input changes: sizes and times of files, content of objects.

        Raises
        ------
        DataError
            The input has vanished or cannot be read.
        """
        digest = hashlib.sha256(f"{self.kind}\n".encode())
        if self.kind == "census":
            digest.update(self.location.encode())
        elif self.adata is not None:
            _hash_anndata(self.adata, digest)
        else:
            try:
                for file in sorted(_files(Path(self.location))):
                    stat = file.stat()
                    digest.update(f"{file.name}\n{stat.st_size}\n{stat.st_mtime_ns}\n".encode())
            except OSError as error:
                raise DataError(f"{self.location} cannot be read: {error.strerror or error}") from error
        return digest.hexdigest()[:32]


def find_inputs(
    inputs: Sequence[str | Path | tuple[str, anndata.AnnData]], exclude: Path | None = None
) -> tuple[list[Input], list[str]]:
    """Resolve what a user gave into inputs, searching folders recursively, in a fixed order.

    Parameters
    ----------
    inputs
        h5ad files, 10x .h5 files, folders with `matrix.mtx[.gz]`, AnnData zarr groups, folders that hold any
        of these, `census:DATASET_ID`, each optionally as `NAME=...`; or `(name, AnnData)` pairs.
    exclude
        A folder that is not searched (the output may lie inside an input).

    Returns
    -------
    The inputs, and the .h5 files found in folders that are no 10x count matrix (they are left out).

    Raises
    ------
    DataError
        Something does not exist, is of no known kind, or two inputs would have the same name.
    ConfigError
        No inputs were given.
    """
    found: list[Input] = []
    ignored: list[str] = []
    for item in inputs:
        if isinstance(item, tuple):
            found.append(Input(sanitise(item[0]), "memory", f"{item[0]} (in memory)", item[1]))
            continue
        name, text = None, str(item)
        match = _NAMED.fullmatch(text)
        if match and not Path(text).exists():
            name, text = sanitise(match["name"]), match["location"]
        if text.startswith(CENSUS):
            dataset = text.removeprefix(CENSUS)
            found.append(Input(name or sanitise(dataset), "census", dataset))
            continue
        path = Path(text).expanduser()
        each, left = _at(path, exclude.resolve() if exclude else None)
        if not each:
            raise DataError(
                f"{path} is no h5ad, 10x .h5, 10x mtx or AnnData zarr data and holds none: check the path"
                if path.exists()
                else f"{path} does not exist: check the path"
            )
        if name is not None and len(each) > 1:
            raise DataError(
                f"{path} holds {len(each)} inputs, one name {name!r} cannot be given to all of them"
            )
        found += [Input(name or _study_name(where), kind, str(where)) for kind, where in each]
        ignored += left
    if not found:
        raise ConfigError("no input was given: name files, folders or census:DATASET_ID")
    return _without_repeats(found), ignored


def sanitise(name: str) -> str:
    """Turn any text into a name of letters, digits, `-` and `_`, as folders and flags can carry it.

    Raises
    ------
    DataError
        Nothing is left of the text.
    """
    clean = re.sub(r"[^A-Za-z0-9-]+", "_", name).strip("_-")
    if not clean:
        raise DataError(
            f"no study name can be made of {name!r}: give one as NAME=PATH, in letters and digits"
        )
    return clean


def _at(path: Path, exclude: Path | None) -> tuple[list[tuple[str, Path]], list[str]]:
    """Inputs at or below a path as (kind, location), and the .h5 files that are none."""
    if not path.exists():
        return [], []
    if path.is_file():
        return ([(kind, path)] if (kind := _file_kind(path)) else []), []
    found: list[tuple[str, Path]] = []
    ignored: list[str] = []
    if _is_anndata_zarr(path):
        return [("zarr", path)], []
    if _is_zarr(path):
        return [], []
    for child in sorted(path.iterdir()):
        if child.name.startswith(".") or child.resolve() == exclude:
            continue
        if child.is_dir():
            below, left = _at(child, exclude)
            found += below
            ignored += left
        elif child.suffix == ".h5" and not is_tenx(child):
            ignored.append(str(child))
        elif (kind := _file_kind(child)) is not None:
            found.append((kind, child))
    return found, ignored


def _file_kind(path: Path) -> str | None:
    if MTX.search(path.name):
        return "mtx"
    return {".h5ad": "h5ad", ".h5": "10x_h5"}.get(path.suffix)


def is_tenx(path: Path) -> bool:
    """Whether an HDF5 file has the groups of a 10x count matrix (either version)."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            groups = [each for each in file.values() if isinstance(each, h5py.Group)]
            return any("barcodes" in each and "indptr" in each for each in groups)
    except OSError:
        return False


def _is_zarr(path: Path) -> bool:
    return any((path / name).is_file() for name in ("zarr.json", ".zgroup", ".zarray"))


def _is_anndata_zarr(path: Path) -> bool:
    return _is_zarr(path) and (path / "obs").is_dir() and (path / "var").is_dir()


def _study_name(path: Path) -> str:
    """Name after the file, or after the first folder above it that 10x pipelines do not name themselves."""
    stem = MTX.sub("", path.name).strip("._-") if MTX.search(path.name) else path.stem
    if path.suffix in (".h5ad", ".zarr"):
        return sanitise(stem)
    parts = [stem, *reversed(path.absolute().parts[1:-1])]
    for part in parts:
        if part and not _GENERIC.fullmatch(part):
            return sanitise(part)
    return sanitise(stem or path.name)


def _without_repeats(found: Iterable[Input]) -> list[Input]:
    """Drop inputs given twice; refuse two inputs of one name."""
    kept: dict[str, Input] = {}
    for each in found:
        # Some file systems ignore case, and the name becomes a folder.
        other = kept.setdefault(each.name.casefold(), each)
        if other is each:
            continue
        same = each.adata is None and Path(other.location).absolute() == Path(each.location).absolute()
        if not same or other.kind != each.kind:
            raise DataError(
                f"{other.location} and {each.location} would both be the study {each.name!r}: "
                "name one of them as NAME=PATH"
            )
    return list(kept.values())


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return [each for each in path.rglob("*") if each.is_file()]
    path.stat()
    if not MTX.search(path.name):
        return [path]
    prefix = MTX.sub("", path.name)
    return [each for each in path.parent.iterdir() if each.is_file() and each.name.startswith(prefix)]


def _hash_anndata(adata: anndata.AnnData, digest: hashlib._Hash) -> None:
    import pandas as pd

    matrices = {"X": adata.X, **{f"layers/{key}": value for key, value in adata.layers.items()}}
    tables = [adata.obs, adata.var]
    if adata.raw is not None:
        matrices["raw"] = adata.raw.X
        tables.append(adata.raw.var)
    for key in sorted(matrices):
        matrix = matrices[key]
        digest.update(f"{key} {getattr(matrix, 'shape', None)}\n".encode())
        if sp.issparse(matrix):
            matrix = matrix if matrix.format in ("csr", "csc") else matrix.tocsr()
        arrays = (matrix.data, matrix.indices, matrix.indptr) if sp.issparse(matrix) else (matrix,)
        for array in arrays:
            if array is not None:
                digest.update(np.ascontiguousarray(array).tobytes())
    for table in tables:
        digest.update(" ".join(map(str, table.columns)).encode())
        digest.update(pd.util.hash_pandas_object(table.astype(str)).to_numpy().tobytes())
    for key in sorted(adata.obsm):
        digest.update(f"{key}\n".encode() + np.ascontiguousarray(adata.obsm[key]).tobytes())
