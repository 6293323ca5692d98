"""Make synthetic cells for speed measurements without real data.

Genes are from the human vocabulary. The mean count of a gene per cell is log-normally distributed over genes, and
counts are Poisson-distributed. The cells have no biological meaning. For speed, only the number of values, their
distribution over genes and the file format matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from sct.checks import check_at_least
from sct.data.genes.vocabulary import GeneVocabulary
from sct.data.ingest.build import IngestOptions, ingest
from sct.data.ingest.writer import quiet_anndata
from sct.progress import progress

NAME = "synthetic"
# Standard deviation of the log means: the strongest of 20,000 genes has some hundred times the count of a median gene.
_SPREAD = 1.8
_MOST = 50.0  # maximum mean count of a gene per cell
_BLOCK_VALUES = 4_000_000


def vocabulary(num_genes: int = 0) -> GeneVocabulary:
    """Return the human protein-coding genes, or the first `num_genes` of them."""
    human = GeneVocabulary.human()
    if not num_genes or num_genes >= len(human):
        return human
    return human.subset(list(human.keys[:num_genes]))


def means(n_genes: int, nonzeros: int, seed: int = 0) -> np.ndarray:
    """Return mean counts of genes (G,), chosen so that a cell expresses `nonzeros` genes on average.

    Raises
    ------
    ConfigError
        `nonzeros` is above 90% of the genes.
    """
    check_at_least(
        "--nonzeros",
        nonzeros,
        1,
        most=int(0.9 * n_genes),
        advice=f"set it to at most 90% of the {n_genes:,} genes",
    )
    shape = np.exp(np.random.default_rng([seed, 0]).normal(0.0, _SPREAD, n_genes))
    low, high = -40.0, 40.0  # bisection of the log scale factor
    for _ in range(100):
        middle = (low + high) / 2
        expressed = -np.expm1(-np.minimum(shape * np.exp(middle), _MOST)).sum()
        low, high = (middle, high) if expressed < nonzeros else (low, middle)
    return np.minimum(shape * np.exp(high), _MOST)


def blocks(n_cells: int, n_genes: int, nonzeros: int, seed: int = 0) -> Iterator[sparse.csr_matrix]:
    """Yield the raw counts of `n_cells` cells in float32 CSR blocks (n, n_genes). Equal seeds give equal counts."""
    rates = means(n_genes, nonzeros, seed)
    step = max(1, int(_BLOCK_VALUES / rates.sum()))
    for number, start in enumerate(range(0, n_cells, step)):
        cells = min(step, n_cells - start)
        rng = np.random.default_rng([seed, 1, number])
        # Molecules of a gene are assigned to random cells, so the count of each cell is Poisson-distributed.
        genes = np.repeat(np.arange(n_genes), rng.poisson(rates * cells))
        rows = rng.integers(cells, size=len(genes))
        # Each cell also gets one molecule of the strongest gene, because cells must not be empty.
        rows = np.concatenate([rows, np.arange(cells)])
        genes = np.concatenate([genes, np.full(cells, int(np.argmax(rates)))])
        counts = sparse.csr_matrix(
            (np.ones(len(rows), np.float32), (rows, genes)), shape=(cells, n_genes), dtype=np.float32
        )
        counts.sum_duplicates()
        yield counts


def write_h5ad(path: Path, genes: GeneVocabulary, n_cells: int, nonzeros: int, seed: int = 0) -> None:
    """Write synthetic cells to an .h5ad file, block by block, so that memory does not limit their number."""
    var = pd.DataFrame(index=pd.Index(np.array(genes.keys, dtype=object), dtype=object))
    obs = pd.DataFrame(index=pd.Index([f"cell{i}" for i in range(n_cells)], dtype=object))
    with quiet_anndata(), h5py.File(path, "w") as file, progress("making synthetic cells", n_cells) as bar:
        ad.io.write_elem(file, "/", ad.AnnData(obs=obs, var=var))
        for counts in blocks(n_cells, len(genes), nonzeros, seed):
            if "X" not in file or not isinstance(file["X"], h5py.Group):
                if "X" in file:
                    del file["X"]
                # The total number of values can exceed 32 bits.
                first = counts.copy()
                first.indptr = first.indptr.astype(np.int64)
                ad.io.write_elem(file, "X", first)
            else:
                ad.io.sparse_dataset(file["X"]).append(counts)
            bar.update(counts.shape[0])


def make_store(folder: Path, genes: GeneVocabulary, n_cells: int, nonzeros: int, seed: int = 0) -> None:
    """Write synthetic cells to an .h5ad file and ingest it into a store with one training study."""
    source = folder.parent / f"{NAME}.h5ad"
    write_h5ad(source, genes, n_cells, nonzeros, seed)
    ingest([source], folder, vocabulary=genes, options=IngestOptions(seed=seed))
    source.unlink()
