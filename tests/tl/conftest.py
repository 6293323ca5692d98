"""A small model with random weights, and cells it can read."""

from __future__ import annotations

import anndata as ad
import flax.linen as nn
import jax
import numpy as np
import pytest

from sct.data.datasets import simulate_atlas
from sct.data.genes.vocabulary import GeneVocabulary
from sct.models.sct import SCT
from sct.models.sct_config import SCTConfig
from sct.weights.pretrained import Pretrained

CELLS, GENES, BAG = 45, 60, 6


def made(use_spatial: bool = False, genes: int = GENES) -> Pretrained:
    atlas = simulate_atlas(1, 5, genes + 10, seed=3)[0]
    vocabulary = GeneVocabulary.human().subset(list(atlas.var_names)[:genes])
    config = SCTConfig(
        num_genes=64, token_embed_dim=32, embed_dim=32, num_downsamples=3, num_layers=1, num_heads=2,
        ffn_dim=32, use_spatial=use_spatial,
    )  # fmt: skip
    variables = nn.unbox(jax.jit(SCT(config).init)(jax.random.key(0), *SCT.example(config).values()))
    # Layers that start at zero would make a test of what flows through them empty.
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    data = {"cells_per_bag": BAG, "noise_fraction": 0.003, "masking": {}, "logit_adjustment": True}
    return Pretrained("sct", config, jax.tree.unflatten(tree, noisy), vocabulary, data=data)


@pytest.fixture(scope="session")
def model() -> Pretrained:
    return made()


@pytest.fixture(scope="session")
def spatial_model() -> Pretrained:
    return made(use_spatial=True)


def slide() -> ad.AnnData:
    """Cells with ten genes more than the model knows, positions, and a batch."""
    cells = simulate_atlas(1, CELLS, GENES + 10, spatial=True, seed=3)[0]
    cells.obs["batch"] = np.where(np.arange(CELLS) % 3 == 0, "a", "b")
    counts = cells.X.tolil()
    counts[:, 0] = 1  # no cell is empty
    cells.X = counts.tocsr()
    return cells


@pytest.fixture
def adata() -> ad.AnnData:
    """See `slide`."""
    return slide()
