"""The loader: a Grain pipeline over a source of numbered records, the same for every model family.

The order of records is a function of the seed alone: batch b is made of records b * B to b * B + B - 1 of a
globally shuffled sequence, whatever the number of processes, and the loader's whole state is the number of
records drawn so far.
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
    """Records addressable by number within an epoch."""

    def __len__(self) -> int:
        """Records in an epoch."""
        ...

    def record(self, number: int, epoch: int = 0) -> Batch:
        """Record `number` of `epoch`: a dict of arrays of fixed shapes."""
        ...

    def describe(self, number: int, epoch: int = 0) -> str:
        """Name the record for a person."""
        ...


def spread(number: int, limit: int) -> list[int]:
    """At most `limit` numbers below `number`, spread evenly over them; all with a limit of 0."""
    if not limit or limit >= number:
        return list(range(number))
    return [round(i) for i in np.linspace(0, number - 1, limit)]


class Loader:
    """Endless batches of shuffled records, or one ordered pass.

    Parameters
    ----------
    source
        Records.
    batch_size
        Records in a batch over all processes, B.
    seed
        Seed of the order.
    shuffle
        True: endless, shuffled anew each epoch. False: one pass in order; the last batch is filled up with
        copies of its last record, marked by a zero in `example_mask`.
    limit
        Records of an ordered pass, spread evenly over the source; 0 for all.
    process_index, process_count
        Which share of each batch this process reads.
    num_threads, prefetch
        Threads that read and tokenise, and records that they keep ready.

    Notes
    -----
    Every batch has an entry `example_mask`, float32 (B,): 1 for a record, 0 for a filled-up one.
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
        """Numbers of records within their epochs, with the epoch and the weight."""
        length = len(self.source)
        if (ordered := self._ordered) is not None:
            return grain.MapDataset.range(len(self) * self.batch_size).map(
                lambda index: (ordered[min(int(index), len(ordered) - 1)], 0, float(index < len(ordered)))
            )
        numbers = grain.MapDataset.range(length).seed(self.seed).shuffle().repeat()
        return numbers.map_with_index(lambda index, number: (int(number), index // length, 1.0))

    def __len__(self) -> int:
        """Batches in one pass."""
        records = len(self.source if self._ordered is None else self._ordered)
        return -(-records // self.batch_size)

    def describe(self, first: int) -> list[str]:
        """Name the records of the batch that starts at record `first` of the sequence."""
        sequence = self._sequence()
        records = [sequence[i] for i in range(first, first + self.batch_size)]
        return [self.source.describe(number, epoch) for number, epoch, _ in records]

    def __iter__(self) -> BatchIterator:
        return self.iterate()

    def iterate(self, records_drawn: int = 0) -> BatchIterator:
        """Batches from record `records_drawn` of the sequence on."""

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
        # Each process has a run of the batch's records, so that the processes' parts in order are the batch.
        own = grain.MapDataset.range((len(sequence) - records_drawn) // self.process_count).map(
            lambda i: sequence[first + i // local * self.batch_size + i % local]
        )
        share = own.map(read)
        options = grain.ReadOptions(num_threads=self.num_threads, prefetch_buffer_size=self.prefetch)
        batches = share.to_iter_dataset(options).batch(local, drop_remainder=True)
        return BatchIterator(iter(batches), records_drawn, self.batch_size)


class BatchIterator(Iterator[Batch]):
    """Iterator over batches whose state is one number, saved with every checkpoint."""

    def __init__(self, batches: Any, records_drawn: int, batch_size: int):
        self._batches, self.records_drawn, self._batch_size = batches, records_drawn, batch_size

    def __next__(self) -> Batch:
        batch = next(self._batches)
        self.records_drawn += self._batch_size
        return batch

    def close(self) -> None:
        """Stop the threads that read ahead."""
        if hasattr(self._batches, "close"):
            self._batches.close()
