"""Cells as records, one by one: which genes of a cell are read, and which values of them.

The two are chosen apart: any genes of `GENES` with any values of `sct.data.cell_values.VALUES`. Values are computed
from all known genes of the cell, whichever genes are read.

Zero is bin 0; non-zero values have bins 1 to N by their quantile among the non-zero values of their cell (ZerOmics,
appendix A.3). Quantiles do not change when all values of a cell are multiplied by one number, so the bins of raw counts
are those of counts that were normalised to a library size of 10,000.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import sparse

from sct.checks import check_at_least, check_choice
from sct.data.bags import BagOptions, BagSource
from sct.data.cell_values import VALUES
from sct.data.store import Study
from sct.data.text.ranking import canonical, content_keys, rank
from sct.errors import ConfigError, DataError

ABSENT = -1  # gene number at a place that a cell does not fill
GENES = ("all", "expressed", "top", "sampled", "listed")


def known_genes(number: int, dropped: Sequence[int]) -> np.ndarray:
    """Mask (G,) of the genes that a model knows, from the numbers of unknown genes."""
    known = np.ones(number, bool)
    known[list(dropped)] = False
    return known


@dataclasses.dataclass(frozen=True)
class CellOptions:
    """How cells become records.

    Parameters
    ----------
    num_bins
        Bins of non-zero values (10 in the ZerOmics paper); zero is bin 0. "levels" has `num_bins` - 1.
    max_genes
        Genes per record; 0 for the whole vocabulary.
    genes
        Which genes are read. "all": the vocabulary, in its order. "expressed": all expressed genes; more than
        `max_genes` is an error. "top": the `max_genes` most highly expressed genes; ties are drawn from the cell, the
        gene and `seed`. "sampled": `max_genes` expressed genes at random. "listed": given genes, expressed or not
        (`sct.data.gene_selection.variable_genes`). "" is "top" with `max_genes`, otherwise "all".
    values
        Name in `sct.data.cell_values.VALUES`.
    """

    num_bins: int = 10
    max_genes: int = 0
    genes: str = ""
    values: str = "quantiles"

    def __post_init__(self) -> None:
        check_at_least("num_bins", self.num_bins, 1, most=253)  # bins are bytes, zero and mask included
        check_at_least("max_genes", self.max_genes, 0)
        for name, known in (("genes", ("", *GENES)), ("values", tuple(VALUES))):
            check_choice(name, getattr(self, name), known)
        if self.values == "levels" and self.num_bins < 2:
            raise ConfigError("num_bins is 1, but levels need 2 or more: raise it.")
        if (self.choice in ("all", "listed")) == bool(self.max_genes):
            needed = "0" if self.max_genes else "1 or more"
            raise ConfigError(
                f"max_genes is {self.max_genes}, but with genes={self.choice!r} {needed} is needed."
            )

    @classmethod
    def of(cls, num_bins: int, data: Any) -> CellOptions:
        """Options of a model, by its number of bins and what its data section or record says of genes and values."""
        given = data if isinstance(data, Mapping) else vars(data)
        named = {name: given[name] for name in ("genes", "values") if name in given}
        return cls(num_bins, int(given["max_genes"]), **named)

    def record(self) -> dict[str, Any]:
        """What a model folder keeps of the options, for `of`."""
        return {"max_genes": self.max_genes, "genes": self.genes, "values": self.values}

    @property
    def choice(self) -> str:
        """One of `GENES`."""
        return self.genes or ("top" if self.max_genes else "all")

    @property
    def name(self) -> str:
        """Name of the values in a record."""
        return "values" if self.values == "log1p" else "bins"


def cell_records(
    counts: sparse.csr_matrix,
    options: CellOptions,
    known: np.ndarray | None = None,
    listed: np.ndarray | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Records of cells.

    Parameters
    ----------
    counts
        Raw counts (N, G), CSR.
    options
        See `CellOptions`.
    known
        bool (G,): genes that the model knows; the others are left out before values are taken.
    listed
        With `genes="listed"`: numbers of the genes (S,), ascending.
    seed
        Of the choice among genes where a cell has too many.

    Returns
    -------
    `bins` uint8 (N, S), or `values` float32 of "log1p". With "all" S = G. Otherwise `genes` int32 (N, S) are the
    numbers of the genes, ascending, `ABSENT` behind the last.

    Raises
    ------
    ConfigError
        With genes="listed": the list is missing, not ascending, or has genes that the model does not know.
    DataError
        With genes="expressed": a cell has more expressed genes than `max_genes`.
    """
    counts = canonical(counts)
    if known is not None and not known.all():
        kept = np.concatenate([[0], np.cumsum(known[counts.indices])])
        keep = known[counts.indices]
        counts = sparse.csr_matrix(
            (counts.data[keep], counts.indices[keep], kept[counts.indptr]), counts.shape
        )
    values = VALUES[options.values](counts, options.num_bins)
    if options.choice == "all":
        return {options.name: values.toarray()}
    n_cells = len(values.indptr) - 1
    if options.choice == "listed":
        if listed is None or (np.diff(listed) <= 0).any():
            raise ConfigError('genes is "listed", but no ascending list of genes is given.')
        if known is not None and not known[listed].all():
            raise ConfigError(
                f"{int((~known[listed]).sum())} of {len(listed)} listed genes are none that the model knows: leave "
                "them out."
            )
        genes = np.broadcast_to(np.asarray(listed, np.int32), (n_cells, len(listed)))
        return {options.name: values[:, listed].toarray(), "genes": genes.copy()}
    most, longest = options.max_genes, int(np.diff(values.indptr).max(initial=0))
    if longest > most and options.choice == "expressed":
        raise DataError(
            f"a cell has {longest:,} expressed genes, but max_genes is {most:,}: raise it, or choose the top or "
            "sampled ones."
        )
    if longest > most:
        keys = content_keys(counts)
        if options.choice == "sampled":  # all equal, so that the order of equal counts chooses
            counts = sparse.csr_matrix(
                (np.ones_like(counts.data), counts.indices, counts.indptr), counts.shape
            )
        ranked = rank(counts, top_k=most, seed=seed, keys=keys)
        chosen = sparse.csr_matrix(
            (np.ones(len(ranked.genes), values.dtype), ranked.genes, ranked.indptr), counts.shape
        )
        values = values.multiply(chosen).tocsr().astype(values.dtype)
        values.sort_indices()
    place = np.arange(most) < np.diff(values.indptr)[:, None]
    made, numbers = np.zeros((n_cells, most), values.dtype), np.full((n_cells, most), ABSENT, np.int32)
    made[place], numbers[place] = values.data, values.indices
    return {options.name: made, "genes": numbers}


class CellSource:
    """Single cells of studies as records; see `sct.data.loader.RecordSource`.

    A record is that of `cell_records`, with the cell's `row` int32 ().

    Parameters
    ----------
    studies
        Studies of one store.
    options
        See `CellOptions`.
    known
        Genes of the corpus, bool (G,).
    exhaustive
        File order instead of random order.
    seed
        Seed of the cell order and, per epoch, of sampled genes.
    listed
        See `cell_records`.
    """

    def __init__(
        self,
        studies: Sequence[Study],
        options: CellOptions,
        known: np.ndarray | None = None,
        exhaustive: bool = False,
        seed: int = 0,
        listed: np.ndarray | None = None,
    ):
        self.options, self.known, self.listed, self.seed = options, known, listed, seed
        self.cells = BagSource(
            studies, BagOptions(cells_per_bag=1, spatial_bags=False, seed=seed), exhaustive
        )

    def __len__(self) -> int:
        return len(self.cells)

    def describe(self, number: int, epoch: int = 0) -> str:
        """Name a cell for a person: study and row."""
        study, rows = self.cells.rows(number, epoch)
        return f"study {study.name!r}, row {rows[0]}"

    def record(self, number: int, epoch: int = 0) -> dict[str, np.ndarray]:
        """Record of one cell."""
        study, rows = self.cells.rows(number, epoch)
        counts = study.read_rows(rows)
        sampled = self.options.choice == "sampled"  # the ties of the others do not change
        drawn = int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0]) if sampled else 0
        record = cell_records(counts, self.options, self.known, self.listed, drawn)
        return {**{name: value[0] for name, value in record.items()}, "row": np.asarray(rows[0], np.int32)}
