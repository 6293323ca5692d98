"""Read and write the AnnData files of the commands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import anndata as ad

from sct import outputs, result_tables
from sct.atomic import atomic_write
from sct.errors import ConfigError, DataError, disk_trouble, first_line

# Larger .h5ad files are opened in backed mode instead of being loaded into memory.
BACKED_BYTES = 1 << 30
_BLOCK = 16 << 20


def read(path: str, may_be_backed: bool = True) -> ad.AnnData:
    """Read an .h5ad file or a .zarr folder. Open a large .h5ad file in backed mode if `may_be_backed`.

    Raises
    ------
    DataError
        The file does not exist, or cannot be read as AnnData.
    """
    file = Path(path).expanduser()
    if not file.exists():
        raise DataError(f"the input {file} does not exist: check the path.")
    if file.suffix not in (".h5ad", ".zarr"):
        raise DataError(
            f"the input {file} is neither an .h5ad file nor a .zarr folder: read the file in Python (for "
            "example with scanpy.read_10x_h5) and write it as .h5ad with adata.write_h5ad."
        )
    try:
        if file.suffix == ".zarr":
            return ad.read_zarr(file)
        large = may_be_backed and file.stat().st_size > BACKED_BYTES
        return ad.read_h5ad(file, backed="r" if large else None)
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise DataError(
            f"the input {file} cannot be read as AnnData ({first_line(error)}): give an .h5ad file or a "
            ".zarr folder that anndata can read."
        ) from error


def check_output(path: str, source: str | None = None, overwrite: bool = False, needed: int = 0) -> Path:
    """Check the path of the file that a command will write, and return the path.

    The path must end with .h5ad. If the command has an input file, the path may also end with .csv, .tsv or .parquet;
    the output is then a table, see `sct.export`. Raises `ConfigError` if the path has another suffix, is the input
    file, exists (unless `overwrite`), or cannot be written.

    Parameters
    ----------
    path
        Path of the output.
    source
        Path of the input file, whose content is copied to the output; None if there is no input.
    overwrite
        Whether the output may replace an existing file.
    needed
        Minimum size of the output in bytes; used only if there is no input.
    """
    target = Path(path).expanduser()
    if source is not None:
        result_tables.check_suffix(target, "--output", [".h5ad"])
    elif target.suffix != ".h5ad":
        raise ConfigError(f"--output is {target}, but must end with .h5ad: change --output.")
    if source is not None and target.resolve() == Path(source).expanduser().resolve():
        raise ConfigError(f"--output is {target}, which is also the input file: choose another --output.")
    copied = 0
    if source is not None and Path(source).suffix == target.suffix == ".h5ad":
        copied = outputs.size_of(Path(source).expanduser())
    outputs.check_file(target, "--output", overwrite, max(copied, needed))
    return target


def write(
    adata: ad.AnnData, source: str, target: Path, added: Mapping[str, Sequence[str]], table: Sequence[str]
) -> None:
    """Write a copy of the input file with the results added, or write a table that contains only the results.

    The output file gets its name only when the file is complete.

    Parameters
    ----------
    adata
        AnnData that `read` returned, to which the results were added.
    source
        Path of the file from which `adata` was read.
    target
        File to write.
    added
        New keys in each of "obs", "obsm", "layers" and "uns". If the input is an .h5ad file, all other content is
        copied unchanged from the input file.
    table
        Keys of the results to write if `target` is a table, see `sct.export`.
    """
    if target.suffix != ".h5ad":
        target.parent.mkdir(parents=True, exist_ok=True)
        result_tables.export(adata, table, target)
        return
    with replacing(target) as temporary:
        if Path(source).suffix != ".h5ad":
            adata.write_h5ad(temporary)
            return
        import h5py

        with temporary.open("wb") as copy:
            for block in _blocks(Path(source).expanduser()):
                copy.write(block)
        with h5py.File(temporary, "r+") as file:
            for slot, keys in added.items():
                if slot == "obs":
                    ad.io.write_elem(file, "obs", adata.obs)
                    continue
                if slot not in file:
                    ad.io.write_elem(file, slot, {})
                for key in keys:
                    ad.io.write_elem(file[slot], key, getattr(adata, slot)[key])


def _blocks(file: Path) -> Iterator[bytes]:
    """Yield the bytes of a file, block by block. Raises `DataError` if the file cannot be read."""
    try:
        with file.open("rb") as source:
            while block := source.read(_BLOCK):
                yield block
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise DataError(
            f"the input {file} cannot be read ({reason}): check the file, or give another input file."
        ) from error


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a temporary path to write to. When the temporary file is complete, it replaces `target`.

    Raises
    ------
    DataError
        The file cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(target, hold=False) as temporary:  # HDF5 locks the file itself
            yield temporary
    except (OSError, RuntimeError) as error:  # HDF5 raises either one when the disk is full
        if isinstance(error, RuntimeError) and not disk_trouble(error):
            raise
        reason = disk_trouble(error) or getattr(error, "strerror", None) or first_line(error)
        raise DataError(
            f"the output {target} cannot be written ({reason}): choose another --output."
        ) from error
