"""Applies a model to records of cells, several at once, on all devices of this process."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sct.checks import check_at_least
from sct.models import registry
from sct.models.checks import check_outputs
from sct.weights.pretrained import Pretrained

# Tokens that one device reads at once, unless one record alone has more.
TOKENS_PER_DEVICE = 1 << 20


@dataclasses.dataclass(frozen=True)
class Record:
    """What a model reads as one: a bag of cells, or one cell.

    Attributes
    ----------
    rows, is_target
        (K,) rows of the table; True where this record gives the cell's result.
    inputs
        Inputs of the model by name, without the batch axis.
    record
        Other values of these cells that the reader keeps.
    """

    rows: np.ndarray
    is_target: np.ndarray
    inputs: Mapping[str, np.ndarray]
    bag: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class RecordOutputs:
    """A record and the model's outputs.

    Attributes
    ----------
    rows, is_target, record
        See `Record`.
    outputs
        Results of the model by name: of each cell (K, ...), or of what else was asked for.
    """

    rows: np.ndarray
    is_target: np.ndarray
    bag: Mapping[str, np.ndarray]
    outputs: dict[str, np.ndarray]


class Runner:
    """Applies a model to records.

    Parameters
    ----------
    model
        The model; its variables are copied to every device.
    batch_size
        Records at once; by default as many as hold about `tokens` tokens on each device.
    tokens
        See above.
    noun
        Word for records in messages.

    Raises
    ------
    ConfigError
        `batch_size` is less than 1.
    """

    def __init__(
        self,
        model: Pretrained,
        batch_size: int | None = None,
        tokens: int = TOKENS_PER_DEVICE,
        noun: str = "bags",
    ):
        if batch_size is not None:
            check_at_least("batch_size", batch_size, 1)
        self._devices = jax.local_devices()
        self._mesh = Mesh(np.asarray(self._devices), ("data",))
        self.batch_size, self.tokens, self.noun = batch_size, tokens, noun
        everywhere = NamedSharding(self._mesh, PartitionSpec())
        self.model = dataclasses.replace(model, variables=jax.device_put(model.variables, everywhere))

    def size(self, number: int, tokens: int) -> int:
        """Records at once, of so many in all with so many tokens each: a multiple of the devices."""
        devices = len(self._devices)
        size = self.batch_size
        if size is None:
            size = devices * max(1, self.tokens // tokens)
        return -(-min(size, number) // devices) * devices

    def __call__(self, records: Iterable[Record], size: int, names: Sequence[str]) -> Iterator[RecordOutputs]:
        """Outputs of the model for each record.

        Parameters
        ----------
        records
            In any order; those of one shape that follow one another share a batch.
        size
            Records at once, see `size`.
        names
            Outputs or intermediates of the model.

        Raises
        ------
        CheckpointError
            What the model computes is not finite.
        """
        inner = set(registry.family(self.model.family).module.intermediates)
        outputs = [name for name in names if name not in inner]
        split = NamedSharding(self._mesh, PartitionSpec("data"))

        def start(batch: list[Record]) -> tuple[list[Record], Any]:
            given = [one.inputs for one in batch]
            given += given[-1:] * (size - len(given))  # one shape, compiled once
            stacked = {name: np.stack([one[name] for one in given]) for name in given[0]}
            made = self.model.apply(
                outputs=outputs,
                intermediates=[name for name in names if name in inner],
                **jax.device_put(stacked, split),
            )
            return batch, made

        def finish(pending: tuple[list[Record], Any]) -> Iterator[RecordOutputs]:
            batch, made = pending
            arrays = {name: np.asarray(made[name]) for name in names}
            for name, array in arrays.items():
                check_outputs(array[: len(batch)], name, self.noun)
            for place, one in enumerate(batch):
                yield RecordOutputs(
                    one.rows, one.is_target, one.bag, {name: array[place] for name, array in arrays.items()}
                )

        # While the devices work on one batch the next is read.
        pending = None
        for batch in _batches(records, size):
            begun = start(batch)
            if pending is not None:
                yield from finish(pending)
            pending = begun
        if pending is not None:
            yield from finish(pending)


def _batches(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    """Lists of at most `size` records of one shape."""
    for _, same in itertools.groupby(records, lambda one: {n: v.shape for n, v in one.inputs.items()}):
        while batch := list(itertools.islice(same, size)):
            yield batch
