"""Write a study as an AnnData group of zarr v3 arrays that TensorStore can read fast.

TensorStore writes X, one shard at a time. A shard consists of compressed chunks, and each chunk has a checksum. anndata
writes the tables.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from sct.data.coordinates import SCALES, SPATIAL_KEY, Scale, write_scales
from sct.data.genes.vocabulary import GeneVocabulary
from sct.data.store import CHUNK, GROUPS, hash_group
from sct.errors import SctError, StoreError

CHUNKS_PER_SHARD = 128  # shards of 4M values: about 5 MB each on disk, hundreds of files for a million cells
_ROW_CHUNK = 8_192
# Compression level 3 takes twice the time and saves only 2% of disk space.
COMPRESSOR = {"cname": "zstd", "clevel": 1, "shuffle": "shuffle"}
MAX_COUNT = 1 << 24  # float32 represents all integers below this exactly


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Convert disk errors to a `StoreError`, and delete `path` after any error."""
    try:
        yield
    except BaseException as error:
        shutil.rmtree(path, ignore_errors=True)
        # TensorStore reports errors of the operating system as ValueError that starts with a status code.
        status = str(error).partition(":")[0]
        from_system = isinstance(error, OSError) or (isinstance(error, ValueError) and status.isupper())
        if from_system and not isinstance(error, SctError):
            cause = getattr(error, "strerror", None) or str(error).split(" [")[0]
            raise StoreError(
                f"{path} could not be written ({cause}): free disk space or check the disk, then run the ingest again "
                "to resume."
            ) from error
        raise


class _Appender:
    """Write a one-dimensional array incrementally, one shard at a time."""

    def __init__(self, path: Path, dtype: str, length: int, fill: int):
        self._array = create_array(path, dtype, (length,), CHUNK, CHUNK * CHUNKS_PER_SHARD, fill)
        self._dtype, self._length = np.dtype(dtype), length
        self._parts: list[np.ndarray] = []
        self._n, self._at = 0, 0
        self._pending: Any = None

    def append(self, values: np.ndarray) -> None:
        self._parts.append(values.astype(self._dtype, copy=False))
        self._n += len(values)
        shard = CHUNK * CHUNKS_PER_SHARD
        if self._n < shard:
            return
        whole = np.concatenate(self._parts)
        ready = len(whole) - len(whole) % shard
        for start in range(0, ready, shard):
            self._write(whole[start : start + shard])
        self._parts, self._n = [whole[ready:].copy()], len(whole) - ready

    def _write(self, values: np.ndarray) -> None:
        if self._pending is not None:
            self._pending.result()
        self._pending = self._array[self._at : self._at + len(values)].write(values)
        self._at += len(values)

    def finish(self) -> None:
        if self._n:
            self._write(np.concatenate(self._parts))
        if self._pending is not None:
            self._pending.result()
        assert self._at == self._length, "fewer values were appended than announced"


def create_array(
    path: Path, dtype: str, shape: tuple[int, ...], chunk: int, shard: int, fill: Any, encoded: bool = False
) -> Any:
    """Create a sharded, compressed zarr v3 array in which each chunk has a checksum.

    Parameters
    ----------
    path
        Folder of the array.
    dtype, shape
        dtype and shape of the array.
    chunk, shard
        Lengths of chunks and shards along the first axis.
    fill
        Fill value of missing chunks. Choose a value that does not occur in the data, so that missing chunks are not
        taken for data.
    encoded
        Add the attributes that AnnData requires for an array.

    Returns
    -------
    The TensorStore handle.
    """
    import tensorstore as ts

    rest = list(shape[1:])
    shard = min(shard, -(-max(shape[0], 1) // chunk) * chunk)
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    inner = [
        little,
        {
            "name": "blosc",
            "configuration": {**COMPRESSOR, "blocksize": 0, "typesize": np.dtype(dtype).itemsize},
        },
        {"name": "crc32c"},
    ]
    sharding = {
        "chunk_shape": [chunk, *rest],
        "codecs": inner,
        "index_codecs": [little, {"name": "crc32c"}],
        "index_location": "end",
    }
    metadata = {
        "shape": list(shape),
        "data_type": dtype,
        "fill_value": fill,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard, *rest]}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "attributes": {"encoding-type": "array", "encoding-version": "0.2.0"} if encoded else {},
    }
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}, "metadata": metadata}
    return ts.open(spec, create=True).result()


@contextmanager
def quiet_anndata() -> Iterator[None]:
    """Set the format in which anndata writes, and hide the warnings of anndata and zarr from users."""
    import anndata
    import zarr

    with warnings.catch_warnings():
        for module in ("anndata", "zarr", "numcodecs"):
            warnings.filterwarnings("ignore", module=rf"{module}(\.|$)")
        # Without sharding, a small column is a single file in all anndata releases.
        warnings.filterwarnings("ignore", message="zarr v3 autosharding")
        # Also write chunks that contain only the fill value, so that a missing chunk is always an error.
        complete = zarr.config.set({"array.write_empty_chunks": True})
        with anndata.settings.override(auto_shard_zarr_v3=False), complete:
            yield


def portable_table(table: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Prepare `obs` for writing, so that all anndata releases can read it.

    String columns stay strings, or become categories if they have missing values.

    Returns
    -------
    Two values: the table, and the names of the columns that were left out because AnnData cannot store their values
    (mixed or nested objects, dates).
    """
    index = pd.Index(table.index.astype(str).to_numpy(dtype=object), dtype=object)
    written = pd.DataFrame(index=index)
    dropped: list[str] = []
    for position, name in enumerate(table.columns):
        usable = isinstance(name, str) and _is_folder_name(name) and name != "_index"
        values = _portable(table.iloc[:, position]) if usable and name not in written else None
        if values is None:
            dropped.append(str(name))
        elif values.dtype == object:
            written[name] = pd.Series(values, index=index, dtype=object)
        else:
            written[name] = values
    return written, dropped


def _is_folder_name(name: str) -> bool:
    """Return whether a column name is a valid and safe folder name."""
    return (
        name.strip() not in ("", ".", "..", "zarr.json")
        and not any(character in "/\\" or not character.isprintable() for character in name)
        and len(name.encode()) <= 255
    )


def _portable(column: pd.Series) -> Any:
    """Convert a column to a type that all anndata releases can read. Return None if the column has no such type."""
    dtype = column.dtype
    if isinstance(dtype, pd.CategoricalDtype):
        kinds = dtype.categories
        if kinds.dtype.kind not in "biuf":
            if not all(isinstance(each, str) for each in kinds):
                return None
            kinds = pd.Index(kinds.to_numpy(dtype=object), dtype=object)
        return pd.Categorical.from_codes(column.cat.codes.to_numpy(), kinds, ordered=bool(dtype.ordered))
    if dtype.kind in "biuf":
        array = column.array
        if isinstance(array, pd.arrays.IntegerArray | pd.arrays.BooleanArray) and column.isna().any():
            return array
        return column.to_numpy() if isinstance(dtype, np.dtype) else column.to_numpy(dtype=np.float64)
    gaps = column.isna().to_numpy()
    values = column.to_numpy(dtype=object)
    if not all(isinstance(each, str) for each in values[~gaps]):
        return None
    if not gaps.any():
        return values
    known = pd.Index(sorted(set(values[~gaps])), dtype=object)
    return pd.Categorical.from_codes(known.get_indexer(np.where(gaps, None, values)), known)


def write_frame(
    path: Path,
    obs: pd.DataFrame,
    vocabulary: GeneVocabulary,
    gene_totals: np.ndarray,
    measured: np.ndarray,
    coordinates: np.ndarray | None,
    scale: Scale | None,
    shape: tuple[int, int],
) -> None:
    """Write all elements of an AnnData group except the arrays of X."""
    import zarr
    from anndata.io import write_elem

    var = pd.DataFrame(index=pd.Index(np.array(vocabulary.keys, dtype=object), dtype=object))
    var["symbol"] = pd.Series(np.array(vocabulary.symbols, dtype=object), index=var.index, dtype=object)
    var["total_counts"] = gene_totals
    var["measured"] = measured
    with quiet_anndata():
        group = zarr.open_group(str(path), mode="a", zarr_format=3)
        group.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        counts = group.create_group("X")
        counts.attrs.update(
            {"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": list(shape)}
        )
        write_elem(group, "obs", obs)
        write_elem(group, "var", var)
        for name in ("obsm", "varm", "obsp", "varp", "layers"):
            write_elem(group, name, {})
        scales = {} if scale is None else {SCALES: {SPATIAL_KEY: write_scales({"": scale}, None)}}
        write_elem(group, "uns", scales)
    if coordinates is not None:
        points = coordinates.astype(np.float32)
        array = create_array(
            path / "obsm/spatial", "float32", points.shape, _ROW_CHUNK, _ROW_CHUNK * 64, "NaN", encoded=True
        )
        array[...].write(points).result()


def write_study(
    path: Path,
    buckets: Iterator[sp.csr_matrix],
    kept: np.ndarray,
    lengths: np.ndarray,
    maximum: float,
    frame: Mapping[str, Any],
) -> dict[str, Any]:
    """Write the AnnData group of a study.

    Parameters
    ----------
    path
        Folder to create.
    buckets
        Counts of all N cells in stored order, as blocks (n, G) of consecutive cells.
    kept
        Mask of the cells to write, bool (N,).
    lengths
        Number of non-zero values of each cell, int64 (N,).
    maximum
        Largest value of the kept cells, below 2^24; infinity if values may be fractions.
    frame
        Arguments of `write_frame`: `obs`, `vocabulary`, `measured`, `coordinates` and `scale`. The rows of `obs` and
        `coordinates` are the kept cells.

    Returns
    -------
    Entries for the manifest: n_cells, nnz, value_dtype, total_counts and others.
    """
    vocabulary: GeneVocabulary = frame["vocabulary"]
    dtype = "uint16" if maximum < 1 << 16 else "float32"
    lengths = lengths[kept]
    nnz = int(lengths.sum())
    totals = np.zeros(len(vocabulary))
    with writing(path):
        path.mkdir(parents=True)
        data = _Appender(path / "X/data", dtype, nnz, 0)
        indices = _Appender(path / "X/indices", "int32", nnz, -1)
        at = 0
        for block in buckets:
            mask = kept[at : at + block.shape[0]]
            at += block.shape[0]
            rows = block if mask.all() else block[mask]
            data.append(rows.data)
            indices.append(rows.indices)
            totals += np.bincount(rows.indices, weights=rows.data, minlength=len(vocabulary))
        data.finish()
        indices.finish()
        indptr = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        shape = (len(lengths), len(vocabulary))
        array = create_array(path / "X/indptr", "int64", indptr.shape, _ROW_CHUNK, _ROW_CHUNK * 128, -1)
        array[...].write(indptr).result()
        write_frame(
            path, frame["obs"], vocabulary, totals, frame["measured"], frame["coordinates"], frame["scale"], shape
        )  # fmt: skip
    return {
        "n_cells": shape[0],
        "nnz": nnz,
        "max_nnz_per_cell": int(lengths.max(initial=0)),
        "median_nnz_per_cell": float(np.median(lengths)) if len(lengths) else 0.0,
        "total_counts": float(totals.sum()),
        "value_dtype": dtype,
        "hashes": {name: hash_group(path, name) for name in GROUPS},
    }
