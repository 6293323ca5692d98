"""A backed file is embedded in memory that does not grow with it."""

from __future__ import annotations

import tracemalloc

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

import sct
from tests.tl.conftest import GENES


def cells(n: int, model, path) -> None:
    rng = np.random.default_rng(0)
    counts = sp.random(n, GENES * 20, density=0.2, format="csr", random_state=0, dtype=np.float32)
    counts.data = rng.integers(1, 9, counts.nnz).astype(np.float32)
    names = [*model.genes.keys, *(f"other{i}" for i in range(GENES * 19))]
    counts = sp.hstack([sp.csr_matrix(np.ones((n, 1), np.float32)), counts[:, 1:]], format="csr")
    table = ad.AnnData(counts)
    table.var_names, table.obs_names = names, [f"c{i}" for i in range(n)]
    table.write_h5ad(path)


def peak(model, path) -> float:
    backed = ad.read_h5ad(path, backed="r")
    tracemalloc.start()
    sct.tl.embed(backed, model, batch_size=4)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most - backed.obsm["X_sct"].nbytes


@pytest.mark.slow
def test_memory_is_that_of_a_window(model, tmp_path, monkeypatch):
    monkeypatch.setattr("sct.data.cells.WINDOW", 300)
    monkeypatch.setattr("sct.data.counts.BLOCK_VALUES", 100_000)
    sizes = {}
    for n in (1_000, 8_000):
        cells(n, model, tmp_path / f"{n}.h5ad")
        sizes[n] = peak(model, tmp_path / f"{n}.h5ad")
    stored = 8_000 * GENES * 20 * 0.2 * 8
    assert sizes[8_000] - sizes[1_000] < 0.15 * stored, (sizes, stored)
