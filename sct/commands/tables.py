"""Reading and writing the AnnData files that commands work on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import anndata as ad

from sct import outputs
from sct.atomic import atomic_write
from sct.errors import ConfigError, DataError, disk_trouble, first_line

# Files above are read in place of being loaded.
BACKED_BYTES = 1 << 30
_BLOCK = 16 << 20


def read(path: str, may_be_backed: bool = True) -> ad.AnnData:
    """Open an .h5ad file or a .zarr folder; a large .h5ad file stays on disk.

    Raises
    ------
    DataError
        It is not there, or cannot be read.
    """
    file = Path(path).expanduser()
    if not file.exists():
        raise DataError(f"there is no file {file}.")
    if file.suffix not in (".h5ad", ".zarr"):
        raise DataError(
            f"{file} is neither .h5ad nor .zarr: read it in Python (scanpy.read_10x_h5, ...) and write it with "
            "adata.write_h5ad."
        )
    try:
        if file.suffix == ".zarr":
            return ad.read_zarr(file)
        large = may_be_backed and file.stat().st_size > BACKED_BYTES
        return ad.read_h5ad(file, backed="r" if large else None)
    except (OSError, KeyError, ValueError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{file} cannot be read as AnnData ({reason}): give another file.") from error


def check_output(path: str, source: str | None = None, overwrite: bool = False, needed: int = 0) -> Path:
    """Refuse an output that is not .h5ad, is the input, exists (unless `overwrite`) or cannot be written.

    It will hold all of `source`, and at least `needed` bytes.
    """
    target = Path(path).expanduser()
    if target.suffix != ".h5ad":
        raise ConfigError(f"the output {target} must end with .h5ad.")
    if source is not None and target.resolve() == Path(source).expanduser().resolve():
        raise ConfigError(f"the output {target} is the input: choose another --output.")
    copied = 0
    if source is not None and Path(source).suffix == ".h5ad":
        copied = outputs.size_of(Path(source).expanduser())
    outputs.check_file(target, "--output", overwrite, max(copied, needed))
    return target


def write(adata: ad.AnnData, source: str, target: Path, added: Mapping[str, Sequence[str]]) -> None:
    """Write the input with what was added to it; the file appears when it is complete.

    Parameters
    ----------
    adata
        What `read` gave, with results.
    source
        Where it was read.
    target
        File to write.
    added
        "obs", "obsm", "layers", "uns" -> keys that are new; of an .h5ad input everything else is copied as it is.
    """
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
    """The bytes of an input, piece by piece; `DataError` where they cannot be read."""
    try:
        with file.open("rb") as source:
            while block := source.read(_BLOCK):
                yield block
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise DataError(f"{file} cannot be read ({reason}): give another file.") from error


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Give a place to write a file to, which takes the place of `target` when it is complete.

    Raises
    ------
    DataError
        It cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(target, hold=False) as temporary:  # HDF5 locks what it writes
            yield temporary
    except (OSError, RuntimeError) as error:  # HDF5 raises either of a full disk
        if isinstance(error, RuntimeError) and not disk_trouble(error):
            raise
        reason = disk_trouble(error) or getattr(error, "strerror", None) or first_line(error)
        raise DataError(f"{target} cannot be written ({reason}): choose another --output.") from error
