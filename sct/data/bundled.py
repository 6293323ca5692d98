"""Stores of real cells that come with installed packages, for first runs and tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sct.checks import check_choice
from sct.data import datasets
from sct.data.genes.vocabulary import GeneVocabulary
from sct.data.ingest.build import IngestOptions, ingest
from sct.data.store import Store
from sct.errors import StoreError

# Shares of cells. The data is one sample, so unlike studies it can only be divided by cell.
_SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}


# What is said of the studies of a data set, in the project's own words; source: Zheng et al. 2017.
_ABSTRACTS = {
    "pbmc68k": "Peripheral blood mononuclear cells of a healthy donor were profiled by droplet-based single-cell RNA "
    "sequencing (10x Genomics, 3' counting). T cells, natural killer cells, B cells, monocytes and dendritic cells "
    "were named by their similarity to cells that had been sorted by surface markers."
}


def study_texts(name: str) -> dict[str, dict[str, str]]:
    """What is said of the studies of a bundled data set, by study; see `sct.data.text.instructions`."""
    check_choice("the data set", name, _ABSTRACTS, advice="choose one of these, or give a store")
    return {f"{name}_{split}": {"abstract": _ABSTRACTS[name]} for split in _SHARES}


def prepare(name: str, folder: Path, seed: int = 0) -> Store:
    """Make a store of a bundled data set, or open the one that is there.

    "pbmc68k": 700 blood cells (`sct.datasets.pbmc68k`), divided at random in 70% / 10% / 20% for training,
    validation and test, as three studies; the vocabulary is the human protein-coding genes measured in them.

    Raises
    ------
    ConfigError
        There is no such data set.
    """
    check_choice("the data set", name, ("pbmc68k",), advice="choose this, or give a store")
    try:
        return Store.open(folder)
    except StoreError:
        pass  # never made, or its making was interrupted: make it (again)
    cells = datasets.pbmc68k()
    human = GeneVocabulary.human()
    columns = human.align(cells.var).columns
    genes = human.subset([human.ensembl_ids[i] for i in sorted(columns[columns >= 0])])
    order = np.random.default_rng(seed).permutation(cells.n_obs)
    ends = np.cumsum([round(share * cells.n_obs) for share in _SHARES.values()])
    parts = np.split(order, ends[:-1])
    inputs = [
        (f"{name}_{split}", cells[np.sort(part)].copy()) for split, part in zip(_SHARES, parts, strict=True)
    ]
    options = IngestOptions(validation=(f"{name}_validation",), test=(f"{name}_test",), seed=seed)
    ingest(inputs, folder, vocabulary=genes, options=options)
    return Store.open(folder)
