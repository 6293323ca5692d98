"""Apply a model to cells or bags of cells, in batches, on all devices of this process."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sct.checks import check_at_least
from sct.inference.readouts import Readout, of_outputs
from sct.models import registry
from sct.models.checks import check_outputs
from sct.weights.pretrained import Pretrained

# Default number of tokens per device and batch. A batch has at least one record per device, however long it is.
TOKENS_PER_DEVICE = 1 << 20


@dataclasses.dataclass(frozen=True)
class Record:
    """Hold one input example of a model: a bag of cells, or a single cell.

    Attributes
    ----------
    rows
        int (K,), row numbers of the cells in the table of cells.
    is_target
        bool (K,): whether the result of the cell is taken from this record.
    inputs
        Inputs of the model by name, without the batch axis.
    bag
        Other arrays about these cells. These arrays are not model inputs, but are passed on to the outputs.
    """

    rows: np.ndarray
    is_target: np.ndarray
    inputs: Mapping[str, np.ndarray]
    bag: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class RecordOutputs:
    """Hold the outputs of the model for one record.

    Attributes
    ----------
    rows, is_target, bag
        See `Record`.
    outputs
        Outputs of the model by name, without the batch axis. Outputs per cell have the shape (K, ...).
    """

    rows: np.ndarray
    is_target: np.ndarray
    bag: Mapping[str, np.ndarray]
    outputs: dict[str, np.ndarray]


class Runner:
    """Apply a model to records (single cells or bags of cells), batch by batch.

    Parameters
    ----------
    model
        Model to apply. Its variables are copied to every device.
    batch_size
        Number of records per batch. By default, a batch has about `tokens` tokens per device.
    tokens
        Number of tokens per device, for the default batch size.
    noun
        Plural noun that error messages use for the records, such as "cells".

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
        self._everywhere = NamedSharding(self._mesh, PartitionSpec())
        self.model = dataclasses.replace(model, variables=jax.device_put(model.variables, self._everywhere))

    def size(self, number: int, tokens: int) -> int:
        """Choose the batch size for `number` records of `tokens` tokens each, as a multiple of the device count."""
        devices = len(self._devices)
        size = self.batch_size
        if size is None:
            size = devices * max(1, self.tokens // tokens)
        return -(-min(size, number) // devices) * devices

    def __call__(
        self, records: Iterable[Record], size: int, names: Sequence[str] | Mapping[str, Readout]
    ) -> Iterator[RecordOutputs]:
        """Yield the outputs of the model for each record.

        Parameters
        ----------
        records
            Records in any order. Consecutive records with equal shapes share a batch.
        size
            Number of records per batch, see the method `size`.
        names
            Names of the outputs or intermediates of the model to return; or a dict of readouts, which are computed on
            the devices and returned under their names in the dict.

        Raises
        ------
        CheckpointError
            An output of the model is not finite.
        """
        readouts = of_outputs(names)
        needed = list(dict.fromkeys(readout.output for readout in readouts.values()))
        maps = {name: readout.on_devices(self._everywhere) for name, readout in readouts.items()}
        inner = set(registry.family(self.model.family).module.intermediates)
        outputs = [name for name in needed if name not in inner]
        split = NamedSharding(self._mesh, PartitionSpec("data"))

        def start(batch: list[Record]) -> tuple[list[Record], Any]:
            given = [one.inputs for one in batch]
            given += given[-1:] * (
                size - len(given)
            )  # pad the last batch: a new shape would be compiled again
            stacked = {name: np.stack([one[name] for one in given]) for name in given[0]}
            made = self.model.apply(
                outputs=outputs,
                intermediates=[name for name in needed if name in inner],
                **jax.device_put(stacked, split),
            )
            cells = len(batch[0].rows)
            return batch, {
                name: readout.read(made[readout.output], cells, maps[name])
                for name, readout in readouts.items()
            }

        def finish(pending: tuple[list[Record], Any]) -> Iterator[RecordOutputs]:
            batch, made = pending
            arrays = {name: np.asarray(made[name]) for name in readouts}
            for name, array in arrays.items():
                check_outputs(array[: len(batch)], readouts[name].output, self.noun)
            for place, one in enumerate(batch):
                yield RecordOutputs(
                    one.rows, one.is_target, one.bag, {name: array[place] for name, array in arrays.items()}
                )

        # Read the next batch while the devices compute the current one.
        pending = None
        for batch in _batches(records, size):
            begun = start(batch)
            if pending is not None:
                yield from finish(pending)
            pending = begun
        if pending is not None:
            yield from finish(pending)


def _batches(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    """Yield lists of at most `size` consecutive records with equal shapes."""
    for _, same in itertools.groupby(records, lambda one: {n: v.shape for n, v in one.inputs.items()}):
        while batch := list(itertools.islice(same, size)):
            yield batch
