"""Cells in memory with labels, as texts are made of them, and a tokenizer of such texts."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from sct.data.genes.vocabulary import GeneVocabulary
from sct.data.text.prompts import Prompts, Template, load_prompts
from sct.data.text.source import SentenceOptions, Texts
from sct.data.text.tokenizer import Tokenizer, train_bpe

GENES = 14


class ToyStudy:
    """Stands in for `sct.data.store.Study`; picklable."""

    def __init__(self, counts: Any, name: str, split: str = "train", **columns: Any):
        self.counts = sp.csr_matrix(np.asarray(counts, np.float32))
        self.name, self.split = name, split
        self.n_cells, self.n_genes = self.counts.shape
        self.table = pd.DataFrame(columns, index=[f"{name}:{i}" for i in range(self.n_cells)])

    def obs(self, columns: Collection[str] | None = None) -> pd.DataFrame:
        return self.table[[name for name in self.table if columns is None or name in columns]]

    def check_counts(self) -> None:
        """They are counts."""

    @property
    def obs_columns(self) -> tuple[str, ...]:
        return tuple(self.table)

    def read(self, start: int, stop: int) -> sp.csr_matrix:
        assert 0 <= start <= stop <= self.n_cells
        return self.counts[start:stop]


class ToyStore:
    """Stands in for `sct.data.store.Store`."""

    path = "toy"

    def __init__(self, *studies: ToyStudy):
        self.studies, self.vocabulary = studies, vocabulary()

    def split(self, name: str) -> list[ToyStudy]:
        return [study for study in self.studies if study.split == name]


@cache
def vocabulary() -> GeneVocabulary:
    ids = [f"ENSG{99_000_000_000 + i}" for i in range(GENES)]
    return GeneVocabulary.from_ids(ids, [f"G{'ABCDEFGHIJKLMN'[i]}{i}" for i in range(GENES)], name="toy")


def counts(n: int, seed: int = 0, low: int = 3, high: int = GENES) -> np.ndarray:
    """Counts (N, G) with `low` to `high` expressed genes, many of them equal."""
    rng = np.random.default_rng(seed)
    order = np.argsort(rng.random((n, GENES)), axis=1)
    return np.where(order < rng.integers(low, high + 1, (n, 1)), 1 + rng.poisson(1.5, (n, GENES)), 0)


def study(
    n: int, name: str = "one", seed: int = 0, split: str = "train", low: int = 3, high: int = GENES
) -> ToyStudy:
    """Cells of three types and two tissues, and one label of each cell's own."""
    rng = np.random.default_rng([seed, 1])
    return ToyStudy(
        counts(n, seed, low, high), name, split,
        cell_type=rng.choice(["B cell", "T cell", "NK cell"], n), tissue=rng.choice(["lung", "gut"], n),
        own=[f"{name} number {i}" for i in range(n)],
    )  # fmt: skip


SHORT = Prompts(
    {
        **load_prompts().templates,
        "unconditional": (Template("Write a cell.", "{cell}"), Template("Any cell:", "It has {cell} ."),),
        "cell_type_to_cell": (Template("Write a {cell_type}.", "{cell}"), Template("{cell_type}?", "{cell}"),),
        "cell_to_cell_type": (Template("Name {cell} now.", "{cell_type}."), Template("{cell} ?", "A {cell_type}."),),
        "labels_to_cell": (Template("Write: {labels}.", "{cell}"),),
        "cell_to_labels": (Template("Labels of {cell} ?", "{labels}."),),
        "tissue_to_cell": (Template("From {tissue}:", "{cell}"),),
    }
)  # fmt: skip
OPTIONS: dict[str, Any] = {
    "top_k": 8, "length": 64, "tasks": (("cell_type_to_cell", 1.0),), "fields": {"cell_type": "cell_type"},
}  # fmt: skip


def options(**changes: Any) -> SentenceOptions:
    """Options of short rows."""
    return SentenceOptions(**{**OPTIONS, **changes})


@cache
def tokenizer(own_begin: bool = False) -> Tokenizer:
    """Small byte-level BPE; `own_begin` gives it a token that begins texts and is not the one that ends them."""
    tasks = (("unconditional", 1.0), ("cell_type_to_cell", 1.0), ("cell_to_cell_type", 1.0))
    texts = Texts(study(90, seed=9), vocabulary(), options(tasks=tasks), SHORT)
    made = train_bpe([example.text for example in texts.examples(0, 90, 0)], 330)
    return made.add_special(["<s>"], bos="<s>") if own_begin else made
