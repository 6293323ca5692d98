"""Record which cells a model was trained on, as hashes of their counts.

A cell is identified by its raw counts of a few broadly expressed genes, not of all genes: files of the same cells often
lack rarely expressed genes, and the genes of a hash must all be present. So the genes form several bands, and a cell
is found if one band agrees.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from scipy import sparse

from sct.data.genes.vocabulary import GeneVocabulary
from sct.errors import CheckpointError, DataError
from sct.progress import progress
from sct.weights import model_folder

if TYPE_CHECKING:  # models load without the libraries of tables
    import pandas as pd

# A band of 64 broadly expressed genes has about 40 expressed genes in a cell of usual depth, which identify it.
BANDS, GENES_PER_BAND = 4, 64
# A band with fewer expressed genes says too little about a cell: shallow cells often have equal counts of few genes.
LEAST_EXPRESSED = 20
_BLOCK = 4096  # cells that are read at once


class CountedStudy(Protocol):
    """A study with raw counts, such as `sct.data.store.Study`: N cells and G genes, of which some are measured."""

    name: str
    n_cells: int

    @property
    def measured(self) -> np.ndarray:
        """Return a mask of the measured genes, bool (G,)."""
        ...

    def read(self, start: int, stop: int) -> sparse.csr_matrix:
        """Return the raw counts of the cells `start` to `stop` - 1."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingCells:
    """Hashes of the training cells of a model. The arrays are read from the model folder when they are first needed.

    Attributes
    ----------
    info
        Plain JSON values. `cells`: number of cells. `studies`: names of the studies. `init_from`: model that training
        started from ("" for none), whose training cells are not included. `without_counts`: training studies that are
        not included, because they have no raw counts. `least_expressed`: a band decides only about cells that express
        this many of its genes. `tuned`: whether the model was fine-tuned later on cells that
        are not included.
    source
        The arrays, or the model folder that holds them. `genes` int32 (bands, n): positions of the genes of each band
        in the vocabulary of the model. `hashes_0`, `hashes_1`, ...: the sorted hashes of each band, uint64.
    """

    info: Mapping[str, Any]
    source: Mapping[str, np.ndarray] | Path

    @functools.cached_property
    def arrays(self) -> Mapping[str, np.ndarray]:
        """Return the arrays, see `source`."""
        if not isinstance(self.source, Path):
            return self.source
        with model_folder.FolderReader(self.source, model_folder.TRAINING_CELLS) as reader:
            found = {name: reader.part(name, ()) for name in reader.shapes}
        named = {"genes", *(f"hashes_{band}" for band in range(len(found.get("genes", ()))))}
        if set(found) != named or found["genes"].ndim != 2:
            raise CheckpointError(
                f"{self.source / model_folder.TRAINING_CELLS} has unknown contents: the file is damaged, so restore "
                "it from a copy."
            )
        return found

    def record(self) -> dict[str, Any]:
        """Return the entry of the hashes in `config.json` of a model folder."""
        return dict(self.info)

    @classmethod
    def of(
        cls, studies: Sequence[CountedStudy], vocabulary: GeneVocabulary, *, bar: bool = True, **info: Any
    ) -> TrainingCells:
        """Compute the hashes of all cells of some studies, which have the genes of the vocabulary.

        Parameters
        ----------
        studies
            Studies of a store, with raw counts.
        vocabulary
            Genes of the model.
        bar
            Whether to show a progress bar.
        info
            Further entries of `info`.

        Raises
        ------
        DataError
            The studies have too few genes in common.
        """
        genes = _broadly_expressed(studies)
        keys = gene_keys(vocabulary)
        found: list[list[np.ndarray]] = [[] for _ in genes]
        with progress("hashing training cells", sum(study.n_cells for study in studies), active=bar) as shown:
            for block in _blocks(studies):
                for hashes, chosen in zip(found, genes, strict=True):
                    values, expressed = hash_rows(block[:, chosen], keys[chosen])
                    hashes.append(values[expressed >= LEAST_EXPRESSED])
                shown.update(block.shape[0])
        arrays = {f"hashes_{band}": np.unique(np.concatenate(each)) for band, each in enumerate(found)}
        cells = sum(study.n_cells for study in studies)
        names = [study.name for study in studies]
        info = {"cells": cells, "studies": names, "least_expressed": LEAST_EXPRESSED, **info}
        return cls(info, {"genes": genes.astype(np.int32), **arrays})

    def contains(
        self, counts: sparse.csr_matrix, measured: np.ndarray, vocabulary: GeneVocabulary
    ) -> pd.array:
        """Return which cells are training cells: a nullable boolean array (N,), with NA where this cannot be decided.

        Parameters
        ----------
        counts
            Raw counts (N, G) in the gene order of the model.
        measured
            Genes that the file of the cells has, bool (G,).
        vocabulary
            Genes of the model.
        """
        keys, arrays = gene_keys(vocabulary), self.arrays
        least = self.info.get("least_expressed", LEAST_EXPRESSED)
        seen, decided = np.zeros((2, counts.shape[0]), bool)
        for band, chosen in enumerate(arrays["genes"]):
            if not measured[chosen].all():
                continue
            values, expressed = hash_rows(counts[:, chosen], keys[chosen])
            informative, known = expressed >= least, arrays[f"hashes_{band}"]
            place = np.searchsorted(known, values).clip(max=max(len(known) - 1, 0))
            seen |= informative & (known[place] == values if len(known) else False)
            decided |= informative
        import pandas as pd

        return pd.arrays.BooleanArray(seen, ~decided)


def gene_keys(vocabulary: GeneVocabulary) -> np.ndarray:
    """Return a hash of the key (usually the Ensembl id) of each gene, uint64 (G,)."""
    made = (hashlib.blake2b(name.encode(), digest_size=8).digest() for name in vocabulary.keys)
    return np.frombuffer(b"".join(made), "<u8").astype(np.uint64)


def hash_rows(counts: sparse.csr_matrix, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hash the (gene, count) pairs of each cell; neither the order of genes nor genes with zero counts matter.

    Parameters
    ----------
    counts
        Raw counts (N, n).
    keys
        Hash of each gene, uint64 (n,).

    Returns
    -------
    The hash of each cell, uint64 (N,), and its number of expressed genes, int (N,).
    """
    counts = sparse.csr_matrix(counts, copy=True)
    counts.sum_duplicates()
    counts.eliminate_zeros()
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64
        pairs = _mixed(keys[counts.indices] + _mixed(counts.data.astype(np.uint64)))
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(pairs, dtype=np.uint64)])
        return sums[counts.indptr[1:]] - sums[counts.indptr[:-1]], np.diff(counts.indptr)


def _mixed(x: np.ndarray) -> np.ndarray:
    """Mix the bits of 64-bit integers (the finalizer of SplitMix64: Steele et al. 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _blocks(studies: Iterable[CountedStudy]) -> Iterable[sparse.csr_matrix]:
    """Yield the raw counts of all cells of some studies, block by block."""
    for study in studies:
        for start in range(0, study.n_cells, _BLOCK):
            yield study.read(start, min(start + _BLOCK, study.n_cells))


def _broadly_expressed(studies: Sequence[CountedStudy]) -> np.ndarray:
    """Choose the genes of the bands, int (bands, n): genes that all studies measured and most cells express.

    The genes are dealt to the bands in turn, so that the bands are equally informative. Each study has the same weight.
    """
    measured = np.logical_and.reduce([study.measured for study in studies])
    share = np.zeros(len(measured))
    for study in studies:
        rows = study.read(0, min(_BLOCK, study.n_cells))
        share += np.diff(rows.tocsc().indptr) / max(rows.shape[0], 1)
    ranked = np.flatnonzero(measured)[np.argsort(-share[measured], kind="stable")]
    ranked = ranked[: BANDS * GENES_PER_BAND]
    bands = min(BANDS, len(ranked) // (2 * LEAST_EXPRESSED))
    if not bands:
        raise DataError(
            f"the studies have only {len(ranked)} measured genes in common, which is too few to recognize their cells: "
            "set export.training_cells to 0."
        )
    return ranked[: len(ranked) // bands * bands].reshape(-1, bands).T
