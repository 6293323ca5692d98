"""Define the interface of readers (which run a model over cells), and the base class for reading single cells.

The reader of bags of cells is in `sct.inference.bags`.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from sct.data.bag_order import BagOrder
from sct.data.cells import CellCounts
from sct.data.loader import RecordSource
from sct.inference.readouts import Readout
from sct.inference.records import SingleCellRecords
from sct.inference.runner import Record, RecordOutputs, Runner
from sct.progress import progress
from sct.weights.pretrained import Pretrained

BLOCK = 4096  # number of cells that are converted to records at once
# Tokens per device and batch. A transformer holds several activation vectors per token, so this is less than for bags.
_TOKENS = 1 << 16


class CellReader(Protocol):
    """Interface of objects that run a model over cells and return one vector per cell.

    Attributes
    ----------
    model
        Model to run.
    in_bags
        Whether the embedding of a cell depends on the other cells of its bag.
    readout
        Name of the output (or intermediate) of the model that holds the cell embeddings.
    readouts
        Kinds of cell embeddings that the user can choose, by name. Empty if there is only one kind.
    """

    model: Pretrained
    in_bags: bool
    readout: str

    @property
    def readouts(self) -> Mapping[str, Readout]:
        """Return the kinds of cell embeddings that the user can choose, by name."""
        ...

    def cells_per_bag(self, asked: int | None = None) -> int:
        """Return the number of cells per bag: `asked`, or by default the number used in training."""
        ...

    def results(
        self,
        cells: CellCounts,
        orders: Sequence[BagOrder | None] | None,
        names: Sequence[str] | Mapping[str, Readout],
        what: str,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> Iterator[RecordOutputs]:
        """Run the model over all cells, with a progress bar; yield the outputs of each record.

        Parameters
        ----------
        cells
            Table of cells.
        orders
            For each section (tissue slice or study), the order in which its cells are put into bags. None if the model
            reads one cell at a time.
        names
            Names of the model outputs to return, or a dict of readouts, which are returned by their names in the dict.
        what
            Label of the progress bar.
        batch_size
            Number of records per batch. The default is computed from the number of tokens per record.
        seed
            Seed of random choices, such as the order of genes with equal counts.
        """
        ...

    def source(
        self,
        cells: CellCounts,
        rows: np.ndarray,
        *,
        shuffle: bool,
        seed: int = 0,
        cells_per_bag: int | None = None,
    ) -> RecordSource:
        """Return the cells in some rows (n,) of a table as training records, with the model inputs of `results`.

        A record also has the arrays `rows` int32 (K,), the row numbers of its cells in the table, and `is_target` bool
        (K,), whether the record counts for the cell; K is 1 for readers of single cells. With `shuffle`, bags have
        other cells in every epoch, and `is_target` is True for all of them. Without it, every cell is the target of
        exactly one record, as in `results`.
        """
        ...

    def tokens_per_record(self, cells_per_bag: int | None = None) -> int:
        """Return the approximate number of tokens in one record of `source`."""
        ...


class SingleCells(abc.ABC):
    """Base class of readers that read cells one by one. A subclass converts cells to model inputs (`records`).

    Parameters
    ----------
    model
        Model to run.
    """

    in_bags = False
    readout = "cell_embedding"
    readouts: Mapping[str, Readout] = MappingProxyType({})
    samples = False  # whether the inputs of a cell are drawn at random, with the seed

    def __init__(self, model: Pretrained):
        self.model = model

    def cells_per_bag(self, asked: int | None = None) -> int:
        """Return 1, because these readers read cells one by one."""
        return 1

    @property
    @abc.abstractmethod
    def tokens(self) -> int:
        """Return the approximate number of tokens per cell."""

    @abc.abstractmethod
    def records(self, cells: CellCounts, rows: np.ndarray, seed: int) -> dict[str, np.ndarray]:
        """Convert the cells in the rows (n,) of the table to model inputs (n, ...)."""

    def inputs_of_cells(self, made: Mapping[str, np.ndarray]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the inputs of each cell as (position in the arrays, inputs), given the result of `records`.

        Consecutive cells whose inputs have equal shapes share a batch.
        """
        for place in range(len(next(iter(made.values())))):
            yield place, {name: values[place] for name, values in made.items()}

    def training_length(self, cells: CellCounts, rows: np.ndarray) -> int:
        """Return the number of tokens that the cells in the rows (n,) of a table have in training, padding included."""
        return self.tokens

    def to_length(self, records: dict[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
        """Pad or cut records to `training_length`. Most readers make records of one length."""
        return records

    def tokens_per_record(self, cells_per_bag: int | None = None) -> int:
        """Return the approximate number of tokens per cell."""
        return self.tokens

    def source(
        self,
        cells: CellCounts,
        rows: np.ndarray,
        *,
        shuffle: bool,
        seed: int = 0,
        cells_per_bag: int | None = None,
    ) -> RecordSource:
        """Return cells as training records, one by one; see `CellReader.source`."""
        return SingleCellRecords(self, cells, rows, seed, in_order=not shuffle)

    def results(
        self,
        cells: CellCounts,
        orders: Sequence[BagOrder | None] | None,
        names: Sequence[str] | Mapping[str, Readout],
        what: str,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> Iterator[RecordOutputs]:
        """Run the model over all cells, one by one; see `CellReader.results`."""
        runner = Runner(self.model, batch_size, _TOKENS, "cells")
        self.model = runner.model  # a second call then finds the parameters on the devices
        is_target = np.ones(1, bool)

        def read() -> Iterator[Record]:
            for start in range(0, cells.n_cells, BLOCK):
                rows = np.arange(start, min(start + BLOCK, cells.n_cells))
                for place, inputs in self.inputs_of_cells(self.records(cells, rows, seed)):
                    yield Record(rows[place : place + 1], is_target, inputs)

        size = runner.size(cells.n_cells, self.tokens)
        with progress(what, cells.n_cells) as bar:
            for result in runner(read(), size, names):
                outputs = {name: value[None] for name, value in result.outputs.items()}
                yield dataclasses.replace(result, outputs=outputs)
                bar.update(1)
