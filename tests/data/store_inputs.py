"""Small inputs in every format that can be ingested, and the counts they must give."""

from __future__ import annotations

import gzip
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse as sp

from sct.data.genes.vocabulary import GeneVocabulary
from sct.data.ingest.build import IngestOptions, IngestReport, ingest
from sct.data.store import Store

N_GENES = 60


def small_vocabulary() -> GeneVocabulary:
    ids = [f"ENSG{99_000_000_000 + i}" for i in range(N_GENES)]
    return GeneVocabulary.from_ids(ids, [f"TOY{i}" for i in range(N_GENES)], name="toy")


def make_adata(n_cells: int = 150, seed: int = 0, spatial: bool = False) -> ad.AnnData:
    """Counts with genes in another order than the vocabulary, ten unknown ones among them, five missing."""
    rng = np.random.default_rng(seed)
    names = [f"ENSG{99_000_000_000 + i}" for i in range(N_GENES - 5)] + [
        f"ENSG{98_000_000_000 + i}" for i in range(10)
    ]
    names = list(rng.permutation(names))
    counts = rng.poisson(rng.gamma(0.4, 2.0, (n_cells, len(names))))
    counts[:, 0] += 1  # no empty cells
    known = next(i for i, name in enumerate(names) if name.startswith("ENSG99"))
    counts[:, known] += 1
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical(rng.choice(["B", "T", "NK"], n_cells)),
            "batch": rng.choice(["one", "two"], n_cells),
            "quality": rng.random(n_cells),
        },
        index=[f"cell{seed}_{i}" for i in range(n_cells)],
    )
    adata = ad.AnnData(sp.csr_matrix(counts.astype(np.float32)), obs=obs, var=pd.DataFrame(index=names))
    if spatial:
        adata.obsm["spatial"] = rng.random((n_cells, 2)) * 1000
    return adata


def expected_counts(adata: ad.AnnData, vocabulary: GeneVocabulary) -> pd.DataFrame:
    """Counts by cell name and gene, zero where a gene was not measured."""
    table = pd.DataFrame(np.asarray(adata.X.todense()), index=adata.obs_names, columns=list(adata.var_names))
    return table.reindex(columns=list(vocabulary.ensembl_ids), fill_value=0.0).fillna(0.0)


def write_as(adata: ad.AnnData, kind: str, folder: Path, name: str = "sample") -> Path:
    """Write `adata` in one of the formats of `KINDS`; returns the path to ingest."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.h5ad"
    adata = adata.copy()
    if kind == "csr":
        adata.write_h5ad(path)
    elif kind == "compressed":
        adata.write_h5ad(path, compression="gzip")
    elif kind == "csc":
        adata.X = adata.X.tocsc()
        adata.write_h5ad(path)
    elif kind == "dense":
        adata.X = adata.X.toarray()
        adata.write_h5ad(path)
    elif kind == "integers":
        adata.X = adata.X.astype(np.int64)
        adata.write_h5ad(path)
    elif kind == "layer":
        adata.layers["counts"] = adata.X.copy()
        adata.X = adata.X.log1p()
        adata.write_h5ad(path)
    elif kind == "raw":
        adata.raw = adata.copy()
        adata = adata[:, :7].copy()
        adata.X = adata.X.log1p()
        adata.write_h5ad(path)
    elif kind in ("zarr2", "zarr3"):
        path = folder / f"{name}.zarr"
        with ad.settings.override(zarr_write_format=int(kind[-1])):
            adata.write_zarr(path)
    elif kind in ("tenx2", "tenx3"):
        path = folder / f"{name}.h5"
        _write_tenx(adata, path, kind)
    elif kind in ("mtx", "mtx_gz"):
        path = folder / name
        _write_mtx(adata, path, kind == "mtx_gz")
    else:
        raise AssertionError(kind)
    return path


KINDS = (
    "compressed",
    "csc",
    "dense",
    "integers",
    "layer",
    "raw",
    "zarr2",
    "zarr3",
    "tenx2",
    "tenx3",
    "mtx",
    "mtx_gz",
)


def _write_tenx(adata: ad.AnnData, path: Path, kind: str) -> None:
    """Genes x cells in CSC; version 3 with two antibodies that must be left out."""
    counts = adata.X.tocsr().astype(np.int32)
    ids = list(adata.var_names)
    kinds = ["Gene Expression"] * len(ids)
    if kind == "tenx3":
        antibodies = sp.csr_matrix(np.full((adata.n_obs, 2), 7, np.int32))
        counts = sp.hstack([counts, antibodies]).tocsr()
        ids, kinds = [*ids, "CD3", "CD4"], [*kinds, *["Antibody Capture"] * 2]
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix" if kind == "tenx3" else "GRCh38")
        for key, value in (("data", counts.data), ("indices", counts.indices), ("indptr", counts.indptr)):
            group[key] = value
        group["shape"] = np.array(counts.shape[::-1])
        group["barcodes"] = [name.encode() for name in adata.obs_names]
        if kind == "tenx3":
            features = group.create_group("features")
            for key, value in (("id", ids), ("name", ids), ("feature_type", kinds)):
                features[key] = [each.encode() for each in value]
        else:
            group["genes"] = group["gene_names"] = [each.encode() for each in ids]


def _write_mtx(adata: ad.AnnData, path: Path, compressed: bool) -> None:
    path.mkdir()
    scipy.io.mmwrite(path / "matrix.mtx", adata.X.T.astype(np.int32), field="integer")
    ids = list(adata.var_names)
    if compressed:
        lines = "".join(f"{each}\t{each}\tGene Expression\n" for each in ids)
        (path / "features.tsv").write_text(lines)
    else:
        (path / "genes.tsv").write_text("".join(f"{each}\t{each}\n" for each in ids))
    (path / "barcodes.tsv").write_text("".join(f"{each}\n" for each in adata.obs_names))
    if compressed:
        for file in list(path.iterdir()):
            file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
            file.unlink()


def files_of(path: Path) -> dict[str, bytes]:
    """Content of every file below a folder."""
    return {
        str(each.relative_to(path)): each.read_bytes() for each in sorted(path.rglob("*")) if each.is_file()
    }


VOCABULARY = small_vocabulary()


def run(inputs, output: Path, **options) -> IngestReport:
    """Ingest with the toy vocabulary."""
    return ingest(inputs, output, vocabulary=VOCABULARY, options=IngestOptions(**options))


def matrix(store: Path, name: str = "sample") -> pd.DataFrame:
    """Cells of a study by name, in the store's order."""
    study = Store.open(store).study(name)
    return pd.DataFrame(study.read(0, study.n_cells).toarray(), index=list(study.obs().index))


def leftovers(path: Path) -> list[str]:
    return [each.name for each in path.rglob(".*")]


def log1p_file(folder: Path) -> Path:
    adata = make_adata()
    adata.X = adata.X.log1p()
    return write_as(adata, "csr", folder)


def three_files(folder: Path) -> list[Path]:
    return [write_as(make_adata(40, seed), "csr", folder, name) for seed, name in enumerate("abc")]
