"""Writing one study as an AnnData group of zarr v3 arrays that TensorStore reads fast.

X is written with TensorStore, in whole shards of compressed chunks that each carry a checksum; tables are
written by anndata.
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

CHUNKS_PER_SHARD = 128  # shards of 4M values: about 5 MB on disk each, hundreds of files for a million cells
_ROW_CHUNK = 8_192
# Level 3 takes twice the time to write for 2% less on disk.
COMPRESSOR = {"cname": "zstd", "clevel": 1, "shuffle": "shuffle"}
MAX_COUNT = 1 << 24  # float32 holds every integer below


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a full disk and its like into one sentence, and leave nothing half-written at `path`."""
    try:
        yield
    except BaseException as error:
        shutil.rmtree(path, ignore_errors=True)
        # TensorStore reports the operating system's errors as ValueError with a status code in front.
        status = str(error).partition(":")[0]
        from_machine = isinstance(error, OSError) or (isinstance(error, ValueError) and status.isupper())
        if from_machine and not isinstance(error, SctError):
            cause = getattr(error, "strerror", None) or str(error).split(" [")[0]
            raise StoreError(
                f"{path} could not be written ({cause}): free space or mend the disk, then run the ingest "
                "again to resume"
            ) from error
        raise


class _Appender:
    """Writes a one-dimensional array piece by piece, in whole shards."""

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
    """Create a sharded, compressed zarr v3 array with a checksum per chunk; return its TensorStore handle.

    Chunks and shards are along the first axis. `fill` must be a value that never occurs: what is missing is
    then never mistaken for data. `encoded` adds the attributes by which AnnData knows an array.
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
    """Fix the format that anndata writes, and keep its and zarr's announcements from users."""
    import anndata
    import zarr

    with warnings.catch_warnings():
        for module in ("anndata", "zarr", "numcodecs"):
            warnings.filterwarnings("ignore", module=rf"{module}(\.|$)")
        # Without shards a small column is one file, in every version of anndata.
        warnings.filterwarnings("ignore", message="zarr v3 autosharding")
        # A chunk that is not there is never one whose values all are the fill value.
        complete = zarr.config.set({"array.write_empty_chunks": True})
        with anndata.settings.override(auto_shard_zarr_v3=False), complete:
            yield


def portable_table(table: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Prepare `obs` for writing, so that every version of anndata reads it.

    Text becomes plain text, or categories where it has gaps. Returns the table and the names of the columns
    that AnnData cannot store (mixed or nested objects, dates); these are left out.
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
    """Whether a column's name can be that of its folder, and of nothing above or of zarr's own."""
    return (
        name.strip() not in ("", ".", "..", "zarr.json")
        and not any(character in "/\\" or not character.isprintable() for character in name)
        and len(name.encode()) <= 255
    )


def _portable(column: pd.Series) -> Any:
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
    """Write everything of an AnnData group but the arrays of X."""
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
    """Write one study's group.

    Parameters
    ----------
    path
        Folder to be made.
    buckets
        Counts of all cells in order, (n, G) each.
    kept
        Which cells are written, (N,) bool in that order.
    lengths
        Values of each cell, (N,) int64.
    maximum
        Largest value of the kept cells, below 2^24; infinity where values need not be whole.
    frame
        `obs`, `vocabulary`, `measured`, `coordinates` and `scale` for `write_frame`, the rows being the kept cells.

    Returns
    -------
    Facts for the manifest: nnz, value_dtype, total_counts, ...
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
