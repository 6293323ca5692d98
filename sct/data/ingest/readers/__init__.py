"""Read counts from input files in bounded memory.

Every reader returns the tables of cells and genes, optional coordinates, and blocks of counts. A block is a pair: row
numbers, and a CSR matrix that has these rows and all genes of the input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sct.data.counts import COUNTS, Values
from sct.data.ingest.input_files import Input
from sct.data.ingest.readers.h5ad import anndata_source, from_group, from_memory
from sct.data.ingest.readers.stream import UNREADABLE, OpenInput, reading
from sct.data.ingest.readers.tenx import mtx_header, tenx_h5, tenx_mtx
from sct.errors import DataError
from sct.extras import load_extra

__all__ = ["OpenInput", "count_cells", "open_source"]

_CHUNK_CACHE = 16 << 20


@contextmanager
def open_source(
    item: Input,
    *,
    layer: str | None,
    spatial_key: str,
    folder: Path,
    census_version: str = "stable",
    values: Values = COUNTS,
) -> Iterator[OpenInput]:
    """Open an input. Use it in a `with` statement.

    Parameters
    ----------
    item
        The input.
    layer
        Matrix to read: "X", "raw" or the name of a layer. Default: the first of X, raw and layers["counts"] that has
        raw counts.
    spatial_key
        Key of the coordinates in `obsm`. Inputs without this key are not spatial.
    folder
        Folder for a temporary download.
    census_version
        Release of the CELLxGENE Census for `census:` inputs.
    values
        "counts" or "activity". With "activity", the default layer is X.

    Raises
    ------
    DataError
        The input is damaged, has no raw counts, or its cells or coordinates are invalid.
    """
    if item.kind == "census":
        path = _download(item.location, folder, census_version)
        try:
            item = Input(item.name, "h5ad", str(path))
            with open_source(
                item, layer=layer, spatial_key=spatial_key, folder=folder, values=values
            ) as source:
                yield source
        finally:
            path.unlink(missing_ok=True)
        return
    with reading(item.location):
        # Activities cannot be recognized by their values, so there is no search: the default is X.
        source, close = _open(item, "X" if layer is None and values != COUNTS else layer, spatial_key)
    try:
        _check_cells(source)
        yield source
    finally:
        close()


def count_cells(item: Input) -> int | None:
    """Return the number of cells of an input, for the progress bar, or None if counting the cells would be slow."""
    try:
        if item.adata is not None:
            return item.adata.n_obs
        if item.kind == "mtx":
            return mtx_header(Path(item.location))[1]
        if item.kind == "zarr":
            import zarr

            return _axis_length(zarr.open_group(item.location, mode="r")["obs"])
        if item.kind in ("h5ad", "10x_h5"):
            import h5py

            with h5py.File(item.location, "r") as file:
                if item.kind == "h5ad":
                    return _axis_length(file["obs"])
                return sum(len(each["barcodes"]) for each in file.values() if "barcodes" in each)
    except UNREADABLE:
        pass
    return None


def _axis_length(table: Any) -> int:
    index = table[table.attrs["_index"]]
    return len(index["values"] if hasattr(index, "keys") else index)


def _open(item: Input, layer: str | None, spatial_key: str) -> tuple[OpenInput, Callable[[], None]]:
    if item.kind in ("10x_h5", "mtx") and layer not in (None, "X"):
        raise DataError(f"{item.location} has no layers, but layer={layer!r} was given: leave out `layer`.")
    if item.kind == "mtx":
        return tenx_mtx(Path(item.location)), lambda: None
    if item.adata is not None:
        return anndata_source(item.location, from_memory(item.adata), layer, spatial_key), lambda: None
    if item.kind == "zarr":
        import zarr

        group = zarr.open_group(item.location, mode="r")
        return anndata_source(item.location, from_group(group), layer, spatial_key), lambda: None
    import h5py

    # With HDF5's default cache of 1 MiB, a compressed chunk is decompressed again for every block that overlaps it.
    file = h5py.File(item.location, "r", rdcc_nbytes=_CHUNK_CACHE)
    try:
        if item.kind == "10x_h5":
            return tenx_h5(item.location, file), file.close
        return anndata_source(item.location, from_group(file), layer, spatial_key), file.close
    except BaseException:
        file.close()
        raise


def _check_cells(source: OpenInput) -> None:
    if len(source.obs) == 0:
        raise DataError(f"{source.label} has no cells: leave out this input.")
    repeated = source.obs.index[source.obs.index.duplicated()]
    if len(repeated):
        raise DataError(
            f"{source.label} has {len(repeated)} duplicate cell names, e.g. {repeated[0]!r}: make them unique with "
            "adata.obs_names_make_unique(), and write the file again."
        )


def _download(dataset: str, folder: Path, version: str) -> Path:
    census = load_extra("cellxgene_census", "census", "cellxgene-census", what=f"census:{dataset}")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "source.h5ad"
    path.unlink(missing_ok=True)
    try:
        census.download_source_h5ad(dataset, str(path), census_version=version, progress_bar=False)
    except Exception as error:
        path.unlink(missing_ok=True)
        cause = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise DataError(
            f"census:{dataset} could not be downloaded ({cause}): check the id and the network connection."
        ) from error
    return path
