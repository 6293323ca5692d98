"""Find input files in folders, name their studies, and detect changed inputs."""

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
# Standard names of 10x outputs. The name of the sample is then the name of a parent folder.
_GENERIC = re.compile(
    r"(sample_)?(raw|filtered)_(feature|gene)_bc_matri(x|ces)(_h5|_mex)?|matrix|outs|count|counts|gene|filtered|raw"
    r"|grch38|hg19|genefull|solo_?out",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Input:
    """Describe one input of an ingest: a file, folder, Census data set or AnnData object.

    Attributes
    ----------
    name
        Name of the study.
    kind
        "h5ad", "10x_h5", "mtx", "zarr", "census" or "memory".
    location
        Path, Census data set id or description.
    adata
        The AnnData object of an input in memory, otherwise None.
    """

    name: str
    kind: str
    location: str
    adata: anndata.AnnData | None = None

    def fingerprint(self) -> str:
        """Return a hash that changes when the input changes.

        The hash of a file is computed from its size and modification time. The hash of an AnnData object is computed
        from its content.

        Raises
        ------
        DataError
            The input does not exist anymore or cannot be read.
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
                raise DataError(
                    f"{self.location} cannot be read ({error.strerror or error}): check the path and its permissions."
                ) from error
        return digest.hexdigest()[:32]


def find_inputs(
    inputs: Sequence[str | Path | tuple[str, anndata.AnnData]], exclude: Path | None = None
) -> tuple[list[Input], list[str]]:
    """Find all inputs. Folders are searched recursively, in a fixed order.

    Parameters
    ----------
    inputs
        Any of: h5ad files, 10x .h5 files, folders with `matrix.mtx[.gz]`, AnnData zarr groups, folders that contain any
        of these, `census:DATASET_ID`, and `(name, AnnData)` pairs. `NAME=PATH` sets the name of the study.
    exclude
        A folder that the search skips, such as an output folder that is inside an input folder.

    Returns
    -------
    Two lists: the inputs, and the .h5 files in the searched folders that were left out because they are not 10x count
    matrices.

    Raises
    ------
    DataError
        A path does not exist or has an unknown format, or two inputs would have the same name.
    ConfigError
        No inputs were given.
    """
    found: list[Input] = []
    ignored: list[str] = []
    for item in inputs:
        if isinstance(item, tuple):
            found.append(Input(sanitize(item[0]), "memory", f"{item[0]} (in memory)", item[1]))
            continue
        name, text = None, str(item)
        match = _NAMED.fullmatch(text)
        if match and not Path(text).exists():
            name, text = sanitize(match["name"]), match["location"]
        if text.startswith(CENSUS):
            dataset = text.removeprefix(CENSUS)
            found.append(Input(name or sanitize(dataset), "census", dataset))
            continue
        path = Path(text).expanduser()
        each, left = _at(path, exclude.resolve() if exclude else None)
        if not each:
            raise DataError(
                f"{path} contains no h5ad, 10x .h5, 10x mtx or AnnData zarr data: check the path."
                if path.exists()
                else f"{path} does not exist: check the path."
            )
        if name is not None and len(each) > 1:
            raise DataError(
                f"{path} contains {len(each)} inputs, but the name {name!r} can be given to only one: give each input "
                "as NAME=PATH."
            )
        found += [Input(name or _study_name(where), kind, str(where)) for kind, where in each]
        ignored += left
    if not found:
        raise ConfigError("no input was given: give files, folders or census:DATASET_ID.")
    return _without_repeats(found), ignored


def sanitize(name: str) -> str:
    """Convert a string to a valid study name: letters, digits, `-` and `_`.

    Raises
    ------
    DataError
        The string has no letter or digit.
    """
    clean = re.sub(r"[^A-Za-z0-9-]+", "_", name).strip("_-")
    if not clean:
        raise DataError(
            f"{name!r} cannot be converted to a study name: give a name with letters and digits as NAME=PATH."
        )
    return clean


def _at(path: Path, exclude: Path | None) -> tuple[list[tuple[str, Path]], list[str]]:
    """Return the inputs at or below a path, as pairs (kind, location), and the .h5 files that are not inputs."""
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
    """Return whether an HDF5 file has the groups of a 10x count matrix (either format version)."""
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
    """Return a study name that is made from a file name.

    Standard 10x file names, such as matrix.mtx, do not identify a study. For a file with a standard name, the study
    name is made from the nearest parent folder that does not have a standard name.
    """
    stem = MTX.sub("", path.name).strip("._-") if MTX.search(path.name) else path.stem
    if path.suffix in (".h5ad", ".zarr"):
        return sanitize(stem)
    parts = [stem, *reversed(path.absolute().parts[1:-1])]
    for part in parts:
        if part and not _GENERIC.fullmatch(part):
            return sanitize(part)
    return sanitize(stem or path.name)


def _without_repeats(found: Iterable[Input]) -> list[Input]:
    """Drop inputs that were given twice; raise `DataError` if two inputs have the same name."""
    kept: dict[str, Input] = {}
    for each in found:
        # Ignore case, because the name becomes a folder name and some file systems ignore case.
        other = kept.setdefault(each.name.casefold(), each)
        if other is each:
            continue
        same = each.adata is None and Path(other.location).absolute() == Path(each.location).absolute()
        if not same or other.kind != each.kind:
            raise DataError(
                f"{other.location} and {each.location} would both have the study name {each.name!r}: give one of them "
                "another name as NAME=PATH."
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
