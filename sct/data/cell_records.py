"""Convert cells to training records: selected genes of a cell, and the expression values of these genes.

The selection of genes and the kind of expression values are independent options (`sct.data.cell_options`): any gene
selection works with any kind of values in `sct.data.cell_values.VALUES`. First, the values of a cell are computed from
all genes that the model knows. Then the genes are selected.

With quantile bins, zero is bin 0, and non-zero values get bins 1 to N by their quantile among the non-zero values of
the cell (ZerOmics, appendix A.3). Scaling all values of a cell does not change quantiles. Therefore raw counts give the
same bins as counts normalized to 10,000 per cell.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import sparse

from sct.data.bags import BagOptions, BagSource
from sct.data.cell_options import FIXED, CellOptions
from sct.data.cell_values import VALUES
from sct.data.store import Study
from sct.data.text.ranking import canonical, content_keys, rank
from sct.errors import ConfigError, DataError

ABSENT = -1  # gene number of padding


def known_genes(number: int, dropped: Sequence[int]) -> np.ndarray:
    """Return a mask of the genes that a model knows, bool (G,).

    `dropped` has the vocabulary positions of all other genes.
    """
    known = np.ones(number, bool)
    known[list(dropped)] = False
    return known


def cell_records(
    counts: sparse.csr_matrix,
    options: CellOptions,
    known: np.ndarray | None = None,
    listed: np.ndarray | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Convert counts of cells to model inputs: vocabulary positions and expression values of the selected genes.

    Parameters
    ----------
    counts
        Raw counts (N, G), CSR.
    options
        See `sct.data.cell_options.CellOptions`.
    known
        Mask of the genes that the model knows, bool (G,). Other genes are left out before values are computed.
    listed
        Vocabulary positions of the genes to read, (S,), in ascending order. Used only with `genes="listed"` and
        `genes="hvg"`.
    seed
        Seed of the choice of genes in cells with more than `max_genes` expressed genes.

    Returns
    -------
    Dict of arrays. With `values="log1p"`, the expression values are in the array `values`, float32 (N, S). Otherwise,
    they are in the array `bins`, uint8 (N, S), or uint16 for more than 253 bins. With `genes="all"`, S is G. With any
    other gene selection, the dict also has the array `genes`, int32 (N, S). Each row has the gene numbers in ascending
    order, padded with `ABSENT`.

    Raises
    ------
    ConfigError
        With `genes="listed"` or `genes="hvg"`: `listed` is missing, is not in ascending order, or has genes that the
        model does not know.
    DataError
        With `genes="expressed"`: a cell has more expressed genes than `max_genes`.
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
    if options.choice in FIXED:
        if listed is None or (np.diff(listed) <= 0).any():
            raise ConfigError(
                f"genes={options.choice!r} needs the positions of the genes in the vocabulary, in ascending order, but "
                "`listed` is missing or not ascending: pass these positions as `listed`."
            )
        if known is not None and not known[listed].all():
            raise ConfigError(
                f"the model does not know {int((~known[listed]).sum())} of the {len(listed)} genes in `listed`: remove "
                "these genes from `listed`."
            )
        genes = np.broadcast_to(np.asarray(listed, np.int32), (n_cells, len(listed)))
        return {options.name: values[:, listed].toarray(), "genes": genes.copy()}
    most, longest = options.max_genes, int(np.diff(values.indptr).max(initial=0))
    if longest > most and options.choice == "expressed":
        raise DataError(
            f"a cell has {longest:,} expressed genes, but max_genes is {most:,}: increase max_genes, or set genes to "
            "'top' or 'sampled' to keep only max_genes genes of such a cell."
        )
    if longest > most:
        keys = content_keys(counts)
        if options.choice == "sampled":  # with equal counts, ranking selects random genes
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
    """Make training records of single cells; see `sct.data.loader.RecordSource`.

    A record has the arrays of `cell_records`, and the array `row`, int32 (): the row number of the cell in its study.

    Parameters
    ----------
    studies
        Studies of one store.
    options
        See `sct.data.cell_options.CellOptions`.
    known
        Mask of the genes that the model knows, bool (G,).
    exhaustive
        Return the cells in file order instead of random order.
    seed
        Random seed of the order of the cells, and of the genes that are sampled in each epoch.
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
        """Return the text that identifies a cell in messages: the study and the row of the cell."""
        study, rows = self.cells.rows(number, epoch)
        return f"study {study.name!r}, row {rows[0]}"

    def record(self, number: int, epoch: int = 0) -> dict[str, np.ndarray]:
        """Return the record of one cell."""
        study, rows = self.cells.rows(number, epoch)
        return self.converted(study.read_rows(rows), rows[0], epoch)

    def converted(self, counts: sparse.csr_matrix, row: int, epoch: int) -> dict[str, np.ndarray]:
        """Convert the counts (1, G) of the cell in a row of its study to a record."""
        sampled = self.options.choice == "sampled"  # only sampled genes differ between epochs
        drawn = int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0]) if sampled else 0
        record = cell_records(counts, self.options, self.known, self.listed, drawn)
        return {**{name: value[0] for name, value in record.items()}, "row": np.asarray(row, np.int32)}
