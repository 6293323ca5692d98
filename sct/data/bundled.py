"""Make stores from real cells that installed packages include, for first runs and tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sct.checks import check_choice
from sct.data import datasets
from sct.data.genes.vocabulary import GeneVocabulary
from sct.data.ingest.build import IngestOptions, ingest
from sct.data.store import Store
from sct.errors import StoreError

# Fractions of cells. The data is a single sample, so it must be split by cell instead of by study.
_SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}

# Abstracts of the data sets, written for this project. Source: Zheng et al. 2017.
_ABSTRACTS = {
    "pbmc68k": "Peripheral blood mononuclear cells of a healthy donor were profiled by droplet-based single-cell RNA "
    "sequencing (10x Genomics, 3' counting). T cells, natural killer cells, B cells, monocytes and dendritic cells "
    "were named by their similarity to cells that had been sorted by surface markers."
}


def study_texts(name: str) -> dict[str, dict[str, str]]:
    """Return the metadata of each study in a bundled data set, as a dict by study name.

    `sct.data.text.instructions` describes the metadata.
    """
    check_choice("the data set", name, _ABSTRACTS, advice="choose one of these, or give a store")
    return {f"{name}_{split}": {"abstract": _ABSTRACTS[name]} for split in _SHARES}


def prepare(name: str, folder: Path, seed: int = 0) -> Store:
    """Make a store from a bundled data set, or open the store if it already exists.

    "pbmc68k" has 700 blood cells (`sct.datasets.pbmc68k`), split at random into 70% training, 10% validation and 20%
    test cells. Each part is one study of the store. The vocabulary consists of the human protein-coding genes that were
    measured.

    Parameters
    ----------
    name
        Name of the data set.
    folder
        Folder of the store.
    seed
        Random seed of the split into studies and of the order of the cells.

    Raises
    ------
    ConfigError
        `name` is not the name of a bundled data set.
    """
    check_choice("the data set", name, ("pbmc68k",), advice="use this one, or give a store")
    try:
        return Store.open(folder)
    except StoreError:
        pass  # the store does not exist or is incomplete
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
