"""Provide example data: real cells that need no download, and simulated atlases for tests with many cells."""

from __future__ import annotations

import warnings

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from sct.checks import check_at_least
from sct.data.genes.vocabulary import GeneVocabulary
from sct.errors import DataError
from sct.extras import load_extra

__all__ = ["pbmc68k", "simulate_atlas"]

# Counts are stored as rounded log1p(1e4 * count / total). With a residual below this, the integer is unambiguous.
MAX_RESIDUAL = 0.13

_N_TYPES = 12
_N_DOMAINS = 7
_SPOT_DISTANCE = 100.0  # micrometers
_DISPERSION = 4.0  # negative binomial size: variance = mean + mean^2 / 4
_FULL_SIZE = 20_124  # number of genes at which the mean library size is _LIBRARY
_LIBRARY = 5_000.0
_BLOCK_VALUES = 8_000_000


def __dir__() -> list[str]:
    return sorted(__all__)


def pbmc68k() -> ad.AnnData:
    """Return raw counts of 700 real peripheral blood cells x 765 genes (Zheng et al. 2017, 10x Genomics).

    The cells are those of `scanpy.datasets.pbmc68k_reduced`, which has normalized values. The integer counts are
    recovered from the normalized values and the total counts: C = rint(expm1(raw.X) * n_counts / 1e4).

    Returns
    -------
    AnnData. `X` (700, 765) has the raw counts as CSR float32. `obs["cell_type"]` and `obs["bulk_labels"]` have the same
    labels. `obs["n_counts"]` has the total count of each cell over all measured genes. `var` is indexed by symbol.
    `uns` has the entries "study" and "source".

    Raises
    ------
    MissingExtraError
        scanpy is not installed.
    DataError
        A value is not within 0.13 of an integer, so this scanpy release contains other data than expected.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecation warnings of scanpy and its dependencies
        return _pbmc68k()


def _pbmc68k() -> ad.AnnData:
    scanpy = load_extra("scanpy", "cells", what="the data set pbmc68k")
    shipped = scanpy.datasets.pbmc68k_reduced()
    counts, residual = recover_counts(shipped.raw.X, shipped.obs["n_counts"].to_numpy())
    if residual >= MAX_RESIDUAL:
        raise DataError(
            f"the counts recovered from scanpy's pbmc68k_reduced differ from integers by up to {residual:.3f}, but "
            f"must differ by less than {MAX_RESIDUAL}, so this release of scanpy contains other data: install scanpy "
            ">= 1.11."
        )
    labels = shipped.obs["bulk_labels"].astype(str).astype("category")
    return ad.AnnData(
        X=counts,
        obs=pd.DataFrame(
            {
                "bulk_labels": labels,
                "cell_type": labels,
                "n_counts": shipped.obs["n_counts"].astype(np.int32),
            },
            index=pd.Index(shipped.obs_names.astype(str), name=None),
        ),
        var=pd.DataFrame(index=pd.Index(shipped.raw.var_names.astype(str), name=None)),
        uns={
            "study": "pbmc68k",
            "source": "10x Genomics fresh 68k PBMCs (Zheng et al. 2017): 700 cells x 765 genes shipped with "
            "scanpy, counts recovered from normalized values",
        },
    )


def recover_counts(logged: sparse.spmatrix, totals: np.ndarray) -> tuple[sparse.csr_matrix, float]:
    """Recover raw counts from log1p of counts normalized to 10,000 per cell.

    Parameters
    ----------
    logged
        log1p(1e4 * counts / totals), (N, G).
    totals
        Total count of each cell, (N,).

    Returns
    -------
    Two values: the integer counts, float32 CSR (N, G), and the largest difference between a value before rounding and
    the nearest integer.
    """
    rows = sparse.csr_matrix(logged).astype(np.float64)
    per_value = np.repeat(totals.astype(np.float64), np.diff(rows.indptr))
    values = np.expm1(rows.data) * per_value / 1e4
    rows.data = np.rint(values)
    residual = float(np.abs(values - rows.data).max(initial=0.0))
    rows.eliminate_zeros()
    return rows.astype(np.float32), residual


def simulate_atlas(
    n_studies: int, n_cells: int, n_genes: int, spatial: bool = False, seed: int = 0
) -> list[ad.AnnData]:
    """Simulate studies of one tissue, for tests and benchmarks that need many cells.

    Simulated cells do not replace real cells.

    All studies share 12 cell types. Each type has a set of upregulated genes over a common heavy-tailed baseline. Each
    study has its own gene effects, depth and cell-type proportions. Each cell has a log-normal library size and a
    position on three continuous gene programs. Counts are negative binomial with dropout. Dropout is more frequent for
    counts with a low expected value. The cells of a study depend only on `seed` and the index of the study, not on
    `n_studies`.

    Parameters
    ----------
    n_studies
        Number of studies.
    n_cells
        Number of cells of each study.
    n_genes
        Number of genes, at most 20,124. The genes are a random subset of the human vocabulary, in the order of the
        vocabulary.
    spatial
        Arrange the cells as spots of a tissue section, with domains that differ in their mixture of cell types.
    seed
        Random seed.

    Returns
    -------
    One AnnData per study. `X` (n_cells, n_genes) has raw counts as CSR float32. `obs` has the columns "cell_type" (for
    a spot: its most frequent cell type) and "study". `var` is indexed by Ensembl id and has the column "symbol".
    `uns["study"]` is the name of the study. With `spatial`, there are also `obsm["spatial"]` (n_cells, 2) in
    micrometers and `obs["domain"]`.

    Raises
    ------
    DataError
        A number is out of range.
    """
    vocabulary = GeneVocabulary.human()
    for name, value, most in (
        ("n_studies", n_studies, None),
        ("n_cells", n_cells, None),
        ("n_genes", n_genes, len(vocabulary)),
    ):
        check_at_least(name, value, 1, most=most, error=DataError)
    rng = np.random.default_rng([seed, 0])
    genes = np.sort(rng.permutation(len(vocabulary))[:n_genes])
    var = pd.DataFrame(
        {"symbol": [vocabulary.symbols[gene] for gene in genes]},
        index=[vocabulary.ensembl_ids[gene] for gene in genes],
    )
    programs = _programs(rng, n_genes)
    mixtures = rng.dirichlet(np.full(_N_TYPES, 0.3), size=_N_DOMAINS)
    return [
        _study(np.random.default_rng([seed, 1, study]), study, n_cells, programs, mixtures, var, spatial)
        for study in range(n_studies)
    ]


def _programs(rng: np.random.Generator, n_genes: int) -> np.ndarray:
    """Return the log expression of each cell type, (types, G): a common baseline with 5% of the genes upregulated."""
    baseline = rng.normal(0.0, 2.0, n_genes)
    raised = rng.random((_N_TYPES, n_genes)) < 0.05
    # With this limit, the strongest of 20,000 genes has about 1% of a cell's counts.
    return np.minimum(baseline + raised * rng.gamma(4.0, 0.5, (_N_TYPES, n_genes)), 7.0)


def _study(
    rng: np.random.Generator,
    number: int,
    n_cells: int,
    programs: np.ndarray,
    mixtures: np.ndarray,
    var: pd.DataFrame,
    spatial: bool,
) -> ad.AnnData:
    n_genes = programs.shape[1]
    name = f"simulated_{number:03d}"
    log_rates = programs + rng.normal(0.0, 0.3, n_genes)
    profiles = np.exp(log_rates)
    profiles /= profiles.sum(axis=1, keepdims=True)
    # The library size falls with the square root of the number of genes, because panels consist of informative genes.
    library = _LIBRARY * (n_genes / _FULL_SIZE) ** 0.5 * rng.lognormal(0.0, 0.2)
    libraries = library * rng.lognormal(0.0, 0.4, n_cells)
    if spatial:
        coordinates, domains, composition = _section(rng, n_cells, mixtures)
    else:
        proportions = rng.dirichlet(np.full(_N_TYPES, 2.0))
        composition = np.eye(_N_TYPES)[rng.choice(_N_TYPES, n_cells, p=proportions)]
    states = rng.normal(0.0, 0.3, (3, n_genes))
    positions = rng.normal(0.0, 1.0, (n_cells, 3))
    counts = _counts(rng, composition, profiles, libraries, positions, states)
    adata = ad.AnnData(
        X=counts,
        obs=pd.DataFrame(
            {
                "cell_type": _category(composition.argmax(axis=1), "type"),
                "study": pd.Categorical([name] * n_cells),
            },
            index=[f"{name}:{cell}" for cell in range(n_cells)],
        ),
        var=var.copy(),
        uns={"study": name, "source": "simulated by sct.datasets.simulate_atlas"},
    )
    if spatial:
        adata.obsm["spatial"] = coordinates
        adata.obs["domain"] = _category(domains, "domain")
    return adata


def _counts(
    rng: np.random.Generator,
    composition: np.ndarray,
    profiles: np.ndarray,
    libraries: np.ndarray,
    positions: np.ndarray,
    states: np.ndarray,
) -> sparse.csr_matrix:
    """Draw counts (N, G) block by block: first draw which counts are positive, then draw the positive values."""
    n_cells, n_genes = len(composition), profiles.shape[1]
    profiles, states = profiles.astype(np.float32), states.astype(np.float32)
    dropout_at = np.float32(libraries.mean() / n_genes * 0.2)
    step = max(1, _BLOCK_VALUES // n_genes)
    blocks = []
    for start in range(0, n_cells, step):
        rows = slice(start, start + step)
        means = composition[rows].astype(np.float32) @ profiles
        means *= np.exp(positions[rows].astype(np.float32) @ states)
        means *= (libraries[rows] / means.sum(axis=1)).astype(np.float32)[:, None]
        positive = (
            means * np.float32(1 / _DISPERSION) + 1
        )  # after the next lines: the probability of a positive count
        np.log(positive, out=positive)
        positive *= -_DISPERSION
        np.exp(positive, out=positive)
        np.subtract(1, positive, out=positive)
        positive *= means / (means + dropout_at)
        cells, genes = np.nonzero(rng.random(means.shape, dtype=np.float32) < positive)
        values = _positive_counts(rng, means[cells, genes].astype(np.float64))
        blocks.append(
            sparse.csr_matrix((values.astype(np.float32), (cells, genes)), shape=(len(means), n_genes))
        )
    return sparse.vstack(blocks, format="csr")


def _positive_counts(rng: np.random.Generator, means: np.ndarray) -> np.ndarray:
    """Draw negative binomial counts, given that each count is positive, by inverse transform sampling."""
    odds = means / (means + _DISPERSION)
    term = (1 - odds) ** _DISPERSION  # probability of the count 0, then of 1, 2, ...
    below = term.copy()
    target = below + rng.random(len(means)) * (1 - below)
    counts = np.zeros(len(means))
    active = np.arange(len(means))
    k = 0
    while len(active) and k < 10_000:
        k += 1
        term = term * odds * ((k - 1 + _DISPERSION) / k)
        below = below + term
        counts[active] = k
        more = below < target
        active, term, odds, below, target = active[more], term[more], odds[more], below[more], target[more]
    return counts


def _section(
    rng: np.random.Generator, n_cells: int, mixtures: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Place spots on a jittered grid. Return coordinates, domains and the mixture of cell types in each spot."""
    side = int(np.ceil(n_cells**0.5))
    grid = np.stack(np.divmod(np.arange(n_cells), side), axis=1) + rng.uniform(-0.2, 0.2, (n_cells, 2))
    centers = rng.uniform(0, side, (len(mixtures), 2))
    distance = np.linalg.norm(grid[:, None] - centers, axis=2)
    near = np.exp(-(distance - distance.min(axis=1, keepdims=True)) / max(1.0, 0.03 * side))
    expected = (near / near.sum(axis=1, keepdims=True)) @ mixtures
    drawn = rng.gamma(30.0 * expected + 1e-3)
    return grid * _SPOT_DISTANCE, distance.argmin(axis=1), drawn / drawn.sum(axis=1, keepdims=True)


def _category(codes: np.ndarray, stem: str) -> pd.Categorical:
    return pd.Categorical([f"{stem} {code}" for code in codes])
