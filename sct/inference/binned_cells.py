"""Run the cell encoder of ZerOmics, which reads cells as expression bins (quantiles or levels)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from sct.data.cell_options import CellOptions
from sct.data.cell_records import cell_records, known_genes
from sct.data.cells import CellCounts
from sct.data.genes.alignment import check_shared
from sct.errors import DataError
from sct.inference.readers import BLOCK, SingleCells
from sct.weights.pretrained import Pretrained


def check_known(cells: CellCounts, known: np.ndarray, missing: str = "treated as zero counts") -> None:
    """Raise `DataError` if too few of the genes that the model knows were measured.

    The mask `known` (G,) is True for the genes that the model knows. `missing` is what the model does with genes that
    were not measured; see `check_shared`.
    """
    possible = min(int(cells.measured.sum()), int(known.sum()))
    shared = int((cells.measured & known).sum())
    check_shared(shared, possible, "adata and the genes that the model knows", missing)


def binned(
    cells: CellCounts,
    rows: np.ndarray,
    options: CellOptions,
    known: np.ndarray,
    seed: int = 0,
    listed: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Convert some rows of a table to expression bins; see `sct.data.cell_records.cell_records`.

    Raises
    ------
    DataError
        A cell has no counts of the genes that the model knows.
    """
    counts = cells.read(rows)
    empty = np.asarray(counts[:, known].sum(axis=1)).ravel() == 0
    if empty.any():
        raise DataError(
            f"{int(empty.sum()):,} of {len(rows):,} cells have no counts of the genes that the model knows (first: "
            f"row {int(rows[np.argmax(empty)])}), but every cell needs some counts of these genes: remove the cells "
            "without such counts."
        )
    return cell_records(counts, options, known, listed, seed)


def blocks(
    cells: CellCounts, options: CellOptions, known: np.ndarray
) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Yield blocks of a few thousand cells, each as (records of expression bins, row numbers of the cells)."""
    check_known(cells, known)
    for start in range(0, cells.n_cells, BLOCK):
        rows = np.arange(start, min(start + BLOCK, cells.n_cells))
        yield binned(cells, rows, options, known), rows


class BinReader(SingleCells):
    """Reader that turns each cell into expression bins.

    The embedding of a cell is the mean of the output vectors of its genes.

    Parameters
    ----------
    model
        Cell encoder. The data options that are stored with it must include `max_genes` and `dropped`.
    """

    def __init__(self, model: Pretrained):
        super().__init__(model)
        self.known = known_genes(len(model.vocabulary), model.data["dropped"])
        self.options = CellOptions.of(model.config.num_bins, model.data)
        self.samples = self.options.choice == "sampled"

    @classmethod
    def of_part(cls, model: Pretrained, part: str, architecture: str) -> BinReader:
        """Return a reader for the cell encoder that is part of a larger model.

        Parameters
        ----------
        model
            The larger model.
        part
            Name of the cell encoder in the variables and the configuration of `model`.
        architecture
            Architecture of the cell encoder.
        """
        own = {name: tree[part] for name, tree in model.variables.items() if part in tree}
        config = getattr(model.config, part)
        return cls(dataclasses.replace(model, family=architecture, config=config, variables=own))

    @property
    def tokens(self) -> int:
        """Return the number of genes that the model reads per cell."""
        return self.options.max_genes or len(self.known)

    def records(self, cells: CellCounts, rows: np.ndarray, seed: int) -> dict[str, np.ndarray]:
        """Return the expression bins, uint8 (n, S).

        With `max_genes`, also return the indices of the genes, int32 (n, S).
        """
        if rows[0] == 0:
            check_known(cells, self.known)
        return binned(cells, rows, self.options, self.known, seed)
