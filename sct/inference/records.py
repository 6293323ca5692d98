"""Turn the cells that a reader reads into training records, with the same model inputs as in inference."""

from __future__ import annotations

import threading
from typing import Protocol

import numpy as np

from sct.data.cells import CellCounts

# Names of the arrays that say which cells a record holds.
ROWS, IS_TARGET = "rows", "is_target"
BLOCK = 256  # number of cells that are converted at once
CACHE_BYTES = 1 << 30  # records that are larger in total are made again in every epoch
_RECENT = (
    4  # number of blocks that are kept when records are read in order; the threads of a loader share them
)


class RecordReader(Protocol):
    """The part of a reader of single cells (`sct.inference.readers.SingleCells`) that makes records."""

    samples: bool

    def records(self, cells: CellCounts, rows: np.ndarray, seed: int) -> dict[str, np.ndarray]:
        """Convert the cells in the rows (n,) of the table to model inputs (n, ...)."""
        ...

    def training_length(self, cells: CellCounts, rows: np.ndarray) -> int:
        """Return the number of tokens that the cells in the rows (n,) of a table have in training, padding included."""
        ...

    def to_length(self, records: dict[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
        """Pad or cut records to `training_length`."""
        ...


class SingleCellRecords:
    """Provide cells one by one as training records (see `sct.data.loader.RecordSource`).

    A record has the inputs of the model without the batch axis, `rows` int32 (1,) with the row number of the cell in
    the table, and `is_target` bool (1,), which is True.

    Parameters
    ----------
    reader
        Reader that converts cells to model inputs.
    cells
        Table of cells.
    rows
        Row numbers of the cells (n,).
    seed
        Seed of random choices of the reader.
    in_order
        Whether records are read in order, not shuffled. They are then made in blocks, even if they are not kept.
    """

    def __init__(
        self,
        reader: RecordReader,
        cells: CellCounts,
        rows: np.ndarray,
        seed: int = 0,
        in_order: bool = False,
    ):
        self.in_order = in_order
        self.reader, self.cells, self.chosen, self.seed = reader, cells, np.asarray(rows, np.int64), seed
        self._lock = threading.Lock()
        self._blocks: dict[tuple[int, int], dict[str, np.ndarray]] = {}
        self._is_cached: bool | None = None
        self.length = reader.training_length(cells, self.chosen)

    def __len__(self) -> int:
        return len(self.chosen)

    def describe(self, number: int, epoch: int = 0) -> str:
        """Return the text that identifies a cell in messages."""
        return f"row {self.chosen[number]}"

    def record(self, number: int, epoch: int = 0) -> dict[str, np.ndarray]:
        """Return the record of one cell. Only readers that sample genes return other inputs in other epochs."""
        epoch = epoch if self.reader.samples else 0
        if self.in_order or (not self.reader.samples and self._caches()):
            made, place = self._block(number // BLOCK, epoch), number % BLOCK
        else:
            made, place = self._made(self.chosen[number : number + 1], epoch), 0
        record = {name: values[place] for name, values in made.items()}
        return {
            **record,
            ROWS: self.chosen[number : number + 1].astype(np.int32),
            IS_TARGET: np.ones(1, bool),
        }

    def _made(self, rows: np.ndarray, epoch: int) -> dict[str, np.ndarray]:
        seed = self.seed
        if epoch:
            seed = int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0])
        return self.reader.to_length(self.reader.records(self.cells, rows, seed), self.length)

    def _caches(self) -> bool:
        with self._lock:
            return self._fits()

    def _fits(self) -> bool:
        if self._is_cached is None:
            one = self._made(self.chosen[:1], 0)
            self._is_cached = sum(value.nbytes for value in one.values()) * len(self) <= CACHE_BYTES
        return self._is_cached

    def _block(self, index: int, epoch: int) -> dict[str, np.ndarray]:
        with self._lock:
            if (index, epoch) not in self._blocks:
                if self.reader.samples or not self._fits():
                    for old in list(self._blocks)[: 1 - _RECENT]:
                        del self._blocks[old]
                self._blocks[index, epoch] = self._made(
                    self.chosen[index * BLOCK : (index + 1) * BLOCK], epoch
                )
            return self._blocks[index, epoch]
