"""Embed and impute in a process with several simulated devices: python -m tests.distributed.tools OUTPUT.npz."""

from __future__ import annotations

import sys

import anndata as ad
import jax
import numpy as np

import sct
from tests.tl.conftest import made, slide


def worked() -> ad.AnnData:
    """Cells with an embedding and an imputed gene."""
    cells, model = slide(), made()
    sct.tl.embed(cells, model)
    sct.tl.impute(cells, model, genes=[cells.var_names[10]])
    return cells


if __name__ == "__main__":
    done = worked()
    arrays = {"embedding": done.obsm["X_sct"], "expected": done.layers["sct_expected"].toarray()}
    np.savez(sys.argv[1], devices=len(jax.devices()), **arrays)
