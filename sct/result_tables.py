"""`sct.export`: write results of an AnnData to a CSV or Parquet file for other programs."""

from __future__ import annotations

import gzip
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from sct.atomic import atomic_write
from sct.checks import check_choice, check_distinct, check_not_empty
from sct.errors import ConfigError, DataError
from sct.extras import load_extra

if TYPE_CHECKING:
    from anndata import AnnData

FORMATS = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet")
# Number of values that are converted at once.
_BLOCK = 1 << 22

Columns = tuple[list[str], Callable[[slice], Any]]


def export(adata: AnnData, keys: str | Sequence[str], path: str | os.PathLike[str]) -> Path:
    """Write results to a table with one row per cell, as a CSV or Parquet file.

    The first column, "cell", has the names of the cells. Large results are written block by block. The file appears
    under its name only when it is complete. An existing file is replaced.

    Parameters
    ----------
    adata
        AnnData with the cells (N, n_var), in memory or backed. The AnnData is not changed.
    keys
        Results to write, one key or several: columns of `obs` (such as "sct_label"), keys of `obsm` ("X_sct"), or keys
        of `layers` ("sct_expected"). A key that is both in `obsm` and in `layers`, as after `sct.tl.impute`, gives the
        columns of both.

        A column of `obs` keeps its name. The columns of an array in `obsm` are numbered from 0: "X_sct_0", "X_sct_1".
        The columns of a table in `obsm` keep their names. The columns of a layer have the names of the genes. If
        `sct.tl.impute` wrote the layer, only the columns of imputed genes are written. With several keys, the column
        names of tables and layers begin with the key: "sct_expected:CD3E".
    path
        File to write: .csv, .csv.gz, .tsv, .tsv.gz or .parquet. The folder must exist.

    Returns
    -------
    The path.

    Raises
    ------
    DataError
        A key does not exist, or two columns have the same name.
    ConfigError
        The suffix of the path is unknown, or the folder does not exist.
    OutputError
        The file cannot be written. An existing file is unchanged.
    MissingExtraError
        The file is Parquet, but pyarrow is not installed.
    """
    target = Path(path).expanduser()
    check_suffix(target, "path")
    if not target.parent.is_dir():
        raise ConfigError(
            f"the folder of path={str(path)!r} does not exist: create the folder {str(target.parent)!r}, or choose "
            "another path."
        )
    listed = [keys] if isinstance(keys, str) else list(keys)
    check_not_empty("keys", listed)
    check_distinct("keys", listed)
    parts = [part for key in listed for part in _parts(adata, key, several=len(listed) > 1)]
    names = ["cell", *(name for columns, _ in parts for name in columns)]
    check_distinct("the list of column names", names, error=DataError, advice="rename one of these columns")
    step = max(1, _BLOCK // len(names))

    def blocks() -> Iterator[pd.DataFrame]:
        for start in range(0, max(adata.n_obs, 1), step):
            rows = slice(start, min(start + step, adata.n_obs))
            cells = pd.DataFrame({"cell": adata.obs_names[rows].astype(str)})
            read = [pd.DataFrame(values(rows), columns=columns) for columns, values in parts]
            yield pd.concat([cells, *(each.set_axis(cells.index, axis=0) for each in read)], axis=1)

    _write(target, blocks())
    return target


def check_suffix(path: Path, name: str, others: Sequence[str] = ()) -> None:
    """Check that a path has the suffix of a table format, and that the library for this format is installed.

    Parameters
    ----------
    path
        Path of the file.
    name
        Name of the option, for messages.
    others
        Other suffixes that the option allows.

    Raises
    ------
    ConfigError
        The suffix is neither one of `FORMATS` nor one of `others`.
    MissingExtraError
        The file is Parquet, but pyarrow is not installed.
    """
    suffix = _suffix(path)
    if suffix not in others:
        check_choice(
            f"the suffix of {name}",
            suffix,
            (*others, *FORMATS),
            advice="end the file name in one of these suffixes",
        )
    if suffix == ".parquet":
        _parquet()


def _suffix(path: Path) -> str:
    """Return the suffix of a path in lower case. For a compressed file, return the last two suffixes."""
    last = path.suffix.lower()
    return Path(path.stem).suffix.lower() + last if last == ".gz" else last


def _parquet() -> Any:
    return load_extra("pyarrow.parquet", "parquet", "pyarrow", what="a Parquet file")


def _parts(adata: AnnData, key: str, several: bool) -> list[Columns]:
    """For the table stored under a key, return the column names and a function that reads the given rows."""
    prefix = f"{key}:" if several else ""
    found: list[Columns] = []
    if key in adata.obs:
        column = adata.obs[key]
        found.append(([key], lambda rows: _plain(column.iloc[rows])))
    if key in adata.obsm:
        array = adata.obsm[key]
        if isinstance(array, pd.DataFrame):
            found.append(
                ([f"{prefix}{name}" for name in array.columns], lambda rows: array.iloc[rows].to_numpy())
            )
        else:
            width = int(np.prod(array.shape[1:]))
            found.append(([f"{key}_{i}" for i in range(width)], lambda rows: _dense(array[rows])))
    if key in adata.layers:
        chosen = _imputed(adata, key)
        names = [f"{prefix}{name}" for name in adata.var_names[chosen]]
        found.append((names, lambda rows: _dense(adata[rows, chosen].layers[key])))
    if not found:
        known = [*adata.obs.columns, *adata.obsm, *filter(None, adata.layers)]
        check_choice("a key of obs, obsm or layers", key, known, error=DataError)
    return found


def _imputed(adata: AnnData, key: str) -> np.ndarray:
    """Return the numbers of those columns of a layer that are written.

    These are the columns of the imputed genes, or all columns if another tool wrote the layer.
    """
    record = adata.uns.get(key.rpartition("_")[0])
    if isinstance(record, Mapping) and "var_names" in record and "counts_from" in record:
        names = np.ravel(np.asarray(record["var_names"], dtype=object)).astype(str)
        chosen = adata.var_names.get_indexer_for(names)
        if len(names) and (chosen >= 0).all():
            return chosen
    return np.arange(adata.n_vars)


def _plain(column: pd.Series) -> np.ndarray:
    """Return the values of a column of `obs`. For a categorical column, return the category of each cell."""
    return (
        column.astype(object).to_numpy()
        if isinstance(column.dtype, pd.CategoricalDtype)
        else column.to_numpy()
    )


def _dense(block: Any) -> np.ndarray:
    """Return a block of rows as a dense matrix (n, columns)."""
    block = np.asarray(block.toarray() if sparse.issparse(block) else block)
    return block.reshape(len(block), -1)


def _write(path: Path, blocks: Iterator[pd.DataFrame]) -> None:
    suffix = _suffix(path)
    with atomic_write(path) as temporary:
        if suffix == ".parquet":
            _write_parquet(temporary, blocks)
            return
        with _text(temporary, suffix.endswith(".gz")) as file:
            for number, block in enumerate(blocks):
                block.to_csv(
                    file,
                    sep="\t" if suffix.startswith(".tsv") else ",",
                    index=False,
                    header=number == 0,
                    lineterminator="\n",
                )


@contextmanager
def _text(path: Path, compressed: bool) -> Iterator[Any]:
    """Open a file for text. A compressed file has no time stamp, so that the same table gives the same file."""
    with path.open("wb") as raw:
        packed = gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) if compressed else raw
        with io.TextIOWrapper(packed, encoding="utf-8", newline="") as text:
            yield text
            text.flush()
            if compressed:
                packed.close()


def _write_parquet(path: Path, blocks: Iterator[pd.DataFrame]) -> None:
    parquet = _parquet()
    import pyarrow

    writer = None
    try:
        for block in blocks:
            table = pyarrow.Table.from_pandas(
                block, schema=None if writer is None else writer.schema, preserve_index=False
            )
            if writer is None:
                writer = parquet.ParquetWriter(path, table.schema)
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()
