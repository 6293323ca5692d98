"""Readers of single cells; the reader of bags is in `sct.inference.bags`."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from sct.data.bag_order import BagOrder
from sct.data.cells import CellCounts
from sct.inference.runner import Record, RecordOutputs, Runner
from sct.progress import progress
from sct.weights.pretrained import Pretrained

BLOCK = 4096  # cells made into records at once
# Tokens at once on a device: a transformer over all tokens of a cell keeps some vectors of each.
_TOKENS = 1 << 16


class CellReader(Protocol):
    """Reads cells and returns one vector per cell.

    Attributes
    ----------
    model
        The model.
    in_bags
        Whether a cell's embedding depends on other cells of its bag.
    readout
        Output (or intermediate) of the model that is the embedding of each cell.
    """

    model: Pretrained
    in_bags: bool
    readout: str

    def cells_per_bag(self, asked: int | None = None) -> int:
        """Cells that are read together: so many as are asked for, or as in training."""
        ...

    def results(
        self,
        cells: CellCounts,
        orders: Sequence[BagOrder | None] | None,
        names: Sequence[str],
        what: str,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> Iterator[RecordOutputs]:
        """Run over all cells, with a progress bar.

        Parameters
        ----------
        cells
            The table.
        orders
            Bags of each section; None for readers of single cells.
        names
            Outputs of the model.
        what
            Text of the progress bar.
        batch_size
            Records per batch; by default from a token budget.
        seed
            Seed of what the reader draws, such as the order of genes with equal counts.
        """
        ...


class SingleCells(abc.ABC):
    """Reads cells one by one; a family says what a cell looks like (`records`).

    Parameters
    ----------
    model
        The model.
    """

    in_bags = False
    readout = "cell_embedding"

    def __init__(self, model: Pretrained):
        self.model = model

    def cells_per_bag(self, asked: int | None = None) -> int:
        """One."""
        return 1

    @property
    @abc.abstractmethod
    def tokens(self) -> int:
        """Approximate number of tokens per cell."""

    @abc.abstractmethod
    def records(self, cells: CellCounts, rows: np.ndarray, seed: int) -> dict[str, np.ndarray]:
        """Inputs of the model (n, ...) of some rows (n,) of the table."""

    def results(
        self,
        cells: CellCounts,
        orders: Sequence[BagOrder | None] | None,
        names: Sequence[str],
        what: str,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> Iterator[RecordOutputs]:
        """See `CellReader`."""
        runner = Runner(self.model, batch_size, _TOKENS, "cells")
        self.model = runner.model  # on the devices already, when it is asked again
        is_target = np.ones(1, bool)

        def read() -> Iterator[Record]:
            for start in range(0, cells.n_cells, BLOCK):
                rows = np.arange(start, min(start + BLOCK, cells.n_cells))
                made: dict[str, Any] = self.records(cells, rows, seed)
                for place in range(len(rows)):
                    inputs = {name: values[place] for name, values in made.items()}
                    yield Record(rows[place : place + 1], is_target, inputs)

        size = runner.size(cells.n_cells, self.tokens)
        with progress(what, cells.n_cells) as bar:
            for result in runner(read(), size, names):
                outputs = {name: value[None] for name, value in result.outputs.items()}
                yield dataclasses.replace(result, outputs=outputs)
                bar.update(1)
