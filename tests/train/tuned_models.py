"""Small models of all architectures that are fine-tuned, and labeled cells that they can read."""

from __future__ import annotations

import functools

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from sct.data.genes.vocabulary import GeneVocabulary
from sct.models.registry import family
from sct.weights.pretrained import Pretrained
from tests.random_models import random_model

GENES, CELLS = 24, 72
NAMES = ("B", "NK", "T")


@functools.cache
def vocabulary() -> GeneVocabulary:
    human = GeneVocabulary.human()
    return human.subset(list(human.ensembl_ids[:GENES]))


def cells(number: int = CELLS, seed: int = 0) -> ad.AnnData:
    """Cells of three types, each with its own genes, of six donors; the label of the last cell is missing."""
    rng = np.random.default_rng(seed)
    kind = np.arange(number) % 3
    rates = np.full((3, GENES), 0.02)
    for place in range(3):
        rates[place, place * 8 : place * 8 + 8] = 20.0
    counts = rng.poisson(rates[kind]).astype(np.float32)
    labels = np.array(NAMES, dtype=object)[kind]
    labels[-1] = None
    obs = pd.DataFrame(
        {"cell_type": labels, "donor": [f"d{i % 6}" for i in rng.permutation(number)]},
        index=[f"c{i}" for i in range(number)],
    )
    return ad.AnnData(sparse.csr_matrix(counts), obs, pd.DataFrame(index=list(vocabulary().ensembl_ids)))


@functools.cache
def zeromics() -> Pretrained:
    config = family("zeromics_cells").config(
        num_genes=GENES, feature_dim=8, embed_dim=16, num_layers=2, num_heads=2, ffn_dim=16, remat="none",
        num_bins=4,
    )  # fmt: skip
    data = {"max_genes": 0, "dropped": [], "task": "masked_bins"}
    return random_model("zeromics_cells", config, 0.8, genes=vocabulary(), data=data)


@functools.cache
def sct() -> Pretrained:
    config = family("sct").config(
        num_genes=GENES,
        token_embed_dim=32,
        embed_dim=32,
        num_downsamples=2,
        num_layers=2,
        num_heads=2,
        ffn_dim=32,
    )
    data = {"cells_per_bag": 5, "noise_fraction": 0.003, "masking": {}, "logit_adjustment": True}
    return random_model("sct", config, 0.1, genes=vocabulary(), data=data)


@functools.cache
def scgpt() -> Pretrained:
    config = family("scgpt").config(
        vocab_size=GENES + 2, pad_id=GENES, cls_id=GENES + 1, embed_dim=16, num_layers=2, num_heads=2, ffn_dim=16,
        num_bins=5, remat="none",
    )  # fmt: skip
    data = {"max_genes": 12, "genes": "sampled", "values": "quantiles", "dropped": []}
    return random_model("scgpt", config, 0.3, genes=vocabulary(), data=data)
