"""Read outputs of 10x pipelines: .h5 files of both format versions, and folders with Matrix Market files."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from sct.data.ingest.input_files import MTX
from sct.data.ingest.readers.stream import Matrix, OpenInput, RowBlock, guarded
from sct.errors import DataError


def tenx_h5(label: str, file: Any) -> OpenInput:
    """Open a 10x .h5 file.

    The file stores a CSC matrix (genes, cells). The same arrays form the transposed matrix (cells, genes) in CSR
    format.
    """
    groups = [each for each in file.values() if hasattr(each, "keys") and "barcodes" in each]
    if len(groups) != 1:
        names = ", ".join(file.keys())
        raise DataError(
            f"{label} has {len(groups)} 10x count matrices (groups: {names}), but must have exactly one: give a file "
            "with one matrix, such as one file per genome."
        )
    group = groups[0]
    features = group.get("features")
    if features is not None:
        ids, symbols = features["id"].asstr()[:], features["name"].asstr()[:]
        kinds = features["feature_type"].asstr()[:] if "feature_type" in features else None
    else:
        ids, symbols, kinds = group["genes"].asstr()[:], group["gene_names"].asstr()[:], None
    n_genes, n_cells = (int(each) for each in group["shape"][:])
    matrix = Matrix("csr", (n_cells, n_genes), group["data"], group["indices"], group["indptr"])
    barcodes = group["barcodes"].asstr()[:]
    return _of_features(
        label, barcodes, ids, symbols, kinds, matrix.shape, matrix.n_values, matrix.blocks, True
    )


def _of_features(
    label: str,
    barcodes: np.ndarray,
    ids: np.ndarray,
    symbols: np.ndarray,
    kinds: np.ndarray | None,
    shape: tuple[int, int],
    n_values: int,
    blocks: Callable[[int], Iterator[RowBlock]],
    whole_rows: bool,
) -> OpenInput:
    """Make an `OpenInput` from a 10x matrix. Features that are not genes (antibodies, guides) are left out."""
    if shape != (len(barcodes), len(ids)):
        raise ValueError(
            f"its matrix has shape {shape}, but it lists {len(barcodes)} cells and {len(ids)} features"
        )
    var = pd.DataFrame({"gene_ids": ids, "symbol": symbols}, index=pd.Index(ids, dtype=object))
    genes = np.ones(len(ids), bool) if kinds is None else np.asarray(kinds) == "Gene Expression"
    if not genes.any():
        raise DataError(f"{label} has no features of type 'Gene Expression': leave out this input.")

    def only_genes(entries: int) -> Iterator[RowBlock]:
        for rows, counts in blocks(entries):
            yield rows, counts if genes.all() else counts[:, genes]

    return OpenInput(
        label=label,
        obs=pd.DataFrame(index=pd.Index(barcodes, dtype=object)),
        var=var[genes],
        spatial=None,
        taken="matrix",
        n_values=n_values,
        whole_rows=whole_rows,
        blocks=guarded(label, only_genes),
    )


def tenx_mtx(path: Path) -> OpenInput:
    """Open a 10x folder with `matrix.mtx`, `barcodes.tsv`, and `features.tsv` or `genes.tsv`.

    Each file name may end with `.gz`.
    """
    prefix = MTX.sub("", path.name)
    features = _companion(path, prefix, ("features.tsv", "genes.tsv"))
    table = pd.read_csv(features, sep="\t", header=None, dtype=str, keep_default_na=False, quoting=3)
    barcodes = pd.read_csv(
        _companion(path, prefix, ("barcodes.tsv",)), sep="\t", header=None, dtype=str, quoting=3
    )[0].to_numpy(dtype=object)
    ids = table[0].to_numpy(dtype=object)
    symbols = table[1].to_numpy(dtype=object) if table.shape[1] > 1 else ids
    kinds = table[2].to_numpy(dtype=object) if table.shape[1] > 2 else None
    n_genes, n_cells, n_values = mtx_header(path)
    shape = (n_cells, n_genes)

    def blocks(entries: int) -> Iterator[RowBlock]:
        seen = 0
        types = {0: np.int64, 1: np.int64, 2: np.float64}
        with _text(path) as handle:
            while handle.readline().startswith("%"):
                pass
            if n_values == 0:
                return
            for chunk in pd.read_csv(handle, sep=r"\s+", header=None, dtype=types, chunksize=entries):
                genes, cells, values = (chunk[each].to_numpy() for each in range(3))
                seen += len(chunk)
                if min(genes.min(), cells.min()) < 1 or genes.max() > n_genes or cells.max() > n_cells:
                    raise ValueError(
                        f"an entry has an index beyond the {n_genes} features and {n_cells} cells of the matrix"
                    )
                block = sp.coo_matrix((values, (cells - 1, genes - 1)), shape=shape).tocsr()
                if block.nnz != len(chunk):
                    raise ValueError("it has two entries for the same cell and feature")
                rows = np.flatnonzero(np.diff(block.indptr))
                yield rows, block[rows]
        if seen != n_values:
            raise ValueError(f"it ends after {seen} of {n_values} entries")

    return _of_features(str(path), barcodes, ids, symbols, kinds, shape, n_values, blocks, False)


def mtx_header(path: Path) -> tuple[int, int, int]:
    """Return the numbers of features, cells and values in the header of a Matrix Market file."""
    with _text(path) as handle:
        banner = handle.readline().lower().split()
        if banner[:3] != ["%%matrixmarket", "matrix", "coordinate"] or banner[3] not in ("integer", "real"):
            raise ValueError(
                "it is not a Matrix Market file in coordinate format with integer or real values"
            )
        line = handle.readline()
        while line.startswith("%"):
            line = handle.readline()
        n_features, n_cells, n_values = (int(each) for each in line.split())
    return n_features, n_cells, n_values


def _text(path: Path) -> Any:
    return gzip.open(path, "rt") if path.suffix == ".gz" else path.open("rt")


def _companion(path: Path, prefix: str, names: tuple[str, ...]) -> Path:
    """Return the first existing file of `names`, with or without .gz, next to a 10x matrix.

    Raise `DataError` if none of the files exists.
    """
    for name in names:
        for suffix in ("", ".gz"):
            file = path.with_name(f"{prefix}{name}{suffix}")
            if file.is_file():
                return file
    raise DataError(
        f"there is no {prefix}{' or '.join(names)} next to {path}: put the 10x files into one folder."
    )
