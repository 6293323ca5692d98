"""Load batches of training examples (records) for all model families, with the library Grain.

The seed alone determines the order of the records. Batch b consists of the records b * B to b * B + B - 1 of a globally
shuffled sequence, for any number of processes. The state of the loader is the number of records returned so far.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import grain
import numpy as np

from sct.checks import check_at_least, check_multiple
from sct.errors import StoreError

Batch = dict[str, np.ndarray]


class RecordSource(Protocol):
    """Interface of a data source that returns one training example (a record) for a record number and an epoch."""

    def __len__(self) -> int:
        """Return the number of records in an epoch."""
        ...

    def record(self, number: int, epoch: int = 0) -> Batch:
        """Return record `number` of `epoch`: a dict of arrays with fixed shapes."""
        ...

    def describe(self, number: int, epoch: int = 0) -> str:
        """Return the text that identifies record `number` of `epoch` in messages."""
        ...


def spread(number: int, limit: int) -> list[int]:
    """Return at most `limit` evenly spaced integers from 0 to `number` - 1, or all these integers if `limit` is 0."""
    if not limit or limit >= number:
        return list(range(number))
    return [round(i) for i in np.linspace(0, number - 1, limit)]


class Loader:
    """Iterate over batches of training examples (records), either shuffled and endless or in order and once.

    Parameters
    ----------
    source
        Source of the records.
    batch_size
        Number of records in a batch (B), counted over all processes.
    seed
        Random seed of the order of the records.
    shuffle
        True: endless batches, shuffled differently in each epoch. False: one pass in order. The last batch is filled up
        with copies of the last record. These copies have `example_mask` 0.
    limit
        With `shuffle=False`: number of records to read, evenly spaced over the source; 0 for all.
    process_index, process_count
        Index of this process and number of processes. Each process reads its part of every batch.
    num_threads, prefetch
        Number of threads that read and tokenize, and number of records to read ahead.

    Notes
    -----
    Every batch has the array `example_mask`, float32 (B,): 1 for records, 0 for copies that fill up the last batch.
    """

    def __init__(
        self,
        source: RecordSource,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        limit: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        num_threads: int = 2,
        prefetch: int = 8,
    ):
        check_at_least("batch_size", batch_size, 1)
        check_multiple("batch_size", batch_size, process_count, "the number of processes")
        check_at_least(
            "process_index", process_index, 0, most=process_count - 1, advice="number the processes from 0"
        )
        self.source, self.batch_size, self.seed, self.shuffle = source, batch_size, seed, shuffle
        self.process_index, self.process_count = process_index, process_count
        check_at_least("num_threads", num_threads, 0)
        check_at_least("prefetch", prefetch, 1)
        check_at_least("limit", limit, 0)
        self.num_threads, self.prefetch = num_threads, prefetch
        self._ordered = None if shuffle else spread(len(source), limit)

    def _sequence(self) -> grain.MapDataset:
        """Return the order in which records are read, as a sequence of entries (record number, epoch, example mask)."""
        length = len(self.source)
        if (ordered := self._ordered) is not None:
            return grain.MapDataset.range(len(self) * self.batch_size).map(
                lambda index: (ordered[min(int(index), len(ordered) - 1)], 0, float(index < len(ordered)))
            )
        numbers = grain.MapDataset.range(length).seed(self.seed).shuffle().repeat()
        return numbers.map_with_index(lambda index, number: (int(number), index // length, 1.0))

    def __len__(self) -> int:
        """Return the number of batches in one pass."""
        records = len(self.source if self._ordered is None else self._ordered)
        return -(-records // self.batch_size)

    def describe(self, first: int) -> list[str]:
        """Return one text per record of a batch, for messages. `first` is the index of the first record."""
        sequence = self._sequence()
        records = [sequence[i] for i in range(first, first + self.batch_size)]
        return [self.source.describe(number, epoch) for number, epoch, _ in records]

    def __iter__(self) -> BatchIterator:
        return self.iterate()

    def iterate(self, records_drawn: int = 0) -> BatchIterator:
        """Iterate over batches, starting at record `records_drawn` of the sequence."""

        def read(entry: tuple[int, int, float]) -> Batch:
            number, epoch, weight = entry
            try:
                bag = self.source.record(number, epoch)
            except OSError as error:
                raise StoreError(
                    f"{self.source.describe(number, epoch)} cannot be read ({error}): check the disk and run the "
                    "same command again."
                ) from error
            except Exception as error:
                error.add_note(f"while reading {self.source.describe(number, epoch)}")
                raise
            return {**bag, "example_mask": np.asarray(weight, np.float32)}

        sequence, local = self._sequence(), self.batch_size // self.process_count
        first = records_drawn + self.process_index * local
        # Each process reads consecutive records of the batch, so concatenating the parts in order gives the batch.
        own = grain.MapDataset.range((len(sequence) - records_drawn) // self.process_count).map(
            lambda i: sequence[first + i // local * self.batch_size + i % local]
        )
        share = own.map(read)
        options = grain.ReadOptions(num_threads=self.num_threads, prefetch_buffer_size=self.prefetch)
        batches = share.to_iter_dataset(options).batch(local, drop_remainder=True)
        return BatchIterator(iter(batches), records_drawn, self.batch_size)


class BatchIterator(Iterator[Batch]):
    """Iterate over batches. The only state is the number `records_drawn`, which checkpoints save."""

    def __init__(self, batches: Any, records_drawn: int, batch_size: int):
        self._batches, self.records_drawn, self._batch_size = batches, records_drawn, batch_size

    def __next__(self) -> Batch:
        batch = next(self._batches)
        self.records_drawn += self._batch_size
        return batch

    def close(self) -> None:
        """Stop the reader threads."""
        if hasattr(self._batches, "close"):
            self._batches.close()
