"""Read AnnData objects in memory, in HDF5 files and in zarr groups. Matrices on disk are read in blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from sct.checks import check_finite, check_shape
from sct.data.coordinates import SPATIAL_KEY
from sct.data.counts import CountsChecker
from sct.data.ingest.readers.stream import Matrix, OpenInput, guarded
from sct.errors import DataError

if TYPE_CHECKING:
    import anndata


@dataclass(frozen=True)
class H5adParts:
    """Collect functions that return the parts of an AnnData in memory or on disk. They return None for a missing part.

    Attributes
    ----------
    obs
        Function that returns the table of cells.
    var
        Function that returns the table of genes. With the argument True, the function returns the table of genes of
        `raw`.
    matrix
        Function that returns X, raw or a layer, given its name.
    obsm
        Function that returns an array of `obsm`, given its key.
    layers
        Names of the layers.
    """

    obs: Callable[[], Any]
    var: Callable[[bool], Any]
    matrix: Callable[[str], Matrix | None]
    obsm: Callable[[str], Any]
    layers: tuple[str, ...]


def from_memory(adata: anndata.AnnData) -> H5adParts:
    """Return the parts of an AnnData object. A backed object is loaded completely; pass its path to avoid this."""
    if adata.isbacked:
        adata = adata.to_memory()
    raw = adata.raw

    def matrix(where: str) -> Matrix | None:
        if where in ("raw", "raw.X"):
            return None if raw is None else _memory_matrix(raw.X)
        return _memory_matrix(adata.X if where == "X" else adata.layers.get(where))

    return H5adParts(
        obs=lambda: adata.obs,
        var=lambda of_raw: raw.var if of_raw else adata.var,
        matrix=matrix,
        obsm=adata.obsm.get,
        layers=tuple(adata.layers.keys()),
    )


def _memory_matrix(x: Any) -> Matrix | None:
    if x is None:
        return None
    if not sp.issparse(x):
        return Matrix("dense", x.shape, np.asarray(x))
    x = x if x.format in ("csr", "csc") else x.tocsr()
    return Matrix(x.format, x.shape, x.data, x.indices, x.indptr)


def from_group(group: Any) -> H5adParts:
    """Return the parts of an AnnData in an HDF5 file or zarr group. Matrices stay on disk."""
    from anndata.io import read_elem

    def matrix(where: str) -> Matrix | None:
        path = {"X": "X", "raw": "raw/X", "raw.X": "raw/X"}.get(where, f"layers/{where}")
        return _stored_matrix(group[path]) if path in group else None

    def obsm(key: str) -> Any:
        path = f"obsm/{key}"
        return read_elem(group[path]) if path in group else None

    if not hasattr(group["obs"], "keys"):
        raise DataError(
            f"{getattr(group, 'filename', 'the input')} has the format of anndata before 0.7: read the file with "
            "anndata.read_h5ad, and save the result with write_h5ad."
        )
    return H5adParts(
        obs=lambda: read_elem(group["obs"]),
        var=lambda of_raw: read_elem(group["raw/var" if of_raw else "var"]),
        matrix=matrix,
        obsm=obsm,
        layers=tuple(group["layers"].keys()) if "layers" in group else (),
    )


def _stored_matrix(element: Any) -> Matrix | None:
    if not hasattr(element, "keys"):
        return Matrix("dense", tuple(element.shape), element) if len(element.shape) == 2 else None
    kind = str(element.attrs.get("encoding-type", element.attrs.get("h5sparse_format", "")))
    if not kind.startswith(("csr", "csc")):
        return None
    shape = element.attrs["shape"] if "shape" in element.attrs else element.attrs["h5sparse_shape"]
    rows, columns = (int(each) for each in shape)
    return Matrix(kind[:3], (rows, columns), element["data"], element["indices"], element["indptr"])


def anndata_source(label: str, parts: H5adParts, layer: str | None, spatial_key: str) -> OpenInput:
    """Find the matrix with the counts, check the coordinates, and return the open input."""
    obs = parts.obs()
    taken, matrix = _find_counts(label, parts, layer)
    var = parts.var(taken == "raw.X")
    if matrix.shape != (len(obs), len(var)):
        raise ValueError(
            f"{taken} has shape {matrix.shape}, but there are {len(obs)} cells and {len(var)} genes"
        )
    return OpenInput(
        label=label,
        obs=obs,
        var=var,
        spatial=_coordinates(label, parts.obsm(spatial_key), spatial_key),
        taken=taken,
        n_values=matrix.n_values,
        whole_rows=matrix.layout != "csc",
        blocks=guarded(label, matrix.blocks),
    )


def _find_counts(label: str, parts: H5adParts, layer: str | None) -> tuple[str, Matrix]:
    """Return the first matrix whose sampled values are raw counts. All values are checked later, during reading."""
    if layer is not None:
        matrix = parts.matrix(layer)
        if matrix is None:
            known = ["X", *(["raw"] if parts.matrix("raw") is not None else []), *parts.layers]
            raise DataError(f"{label} has no layer {layer!r}: choose one of {', '.join(known)}.")
        return {"X": "X", "raw": "raw.X", "raw.X": "raw.X"}.get(layer, f'layers["{layer}"]'), matrix
    refused: list[str] = []
    for where, name in (("X", "X"), ("raw", "raw.X"), ("counts", 'layers["counts"]')):
        matrix = parts.matrix(where)
        if matrix is None:
            continue
        checker = CountsChecker(name)
        try:
            checker.update(matrix.sample())
            checker.finish()
        except DataError as error:
            refused.append(getattr(error, "finding", str(error)))
        else:
            return name, matrix
    found = "; ".join(refused) or "it has neither X nor raw nor layers['counts']"
    raise DataError(
        f"{label} has no raw counts ({found}): set --layer= to the layer with raw counts, or leave out such inputs "
        "with --skip_invalid."
    )


def _coordinates(label: str, value: Any, key: str) -> np.ndarray | None:
    """Check coordinates, and return the coordinates as float64 (N, 2), or None if `value` is None."""
    if value is None:
        if key != SPATIAL_KEY:
            raise DataError(
                f"{label} has no obsm[{key!r}]: set spatial_key to the key of the coordinates, or leave out "
                "spatial_key."
            )
        return None
    points = np.asarray(value, dtype=np.float64)
    check_shape(
        f"{label}: obsm[{key!r}]",
        points,
        ("cells", (2, "coordinates")),
        empty=True,
        advice="keep the two columns of the section plane, or split the file by section",
    )
    check_finite(
        f"{label}: obsm[{key!r}]", points, "cells", advice="remove these cells, or set another spatial_key"
    )
    return points
