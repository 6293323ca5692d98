"""Predict masked genes of held-out cells in batches, with several random masks per cell."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from sct.data.loader import spread
from sct.progress import track

_BATCH = 8
ModelOutputs = TypeVar("ModelOutputs")
# Function (variables, records, key) that returns predictions, and which genes of each cell are masked, bool (B, L).
Predict = Callable[[Any, Mapping[str, jax.Array], jax.Array], tuple[ModelOutputs, jax.Array]]


class Records(Protocol):
    """Records of single cells, in file order."""

    def __len__(self) -> int: ...

    def record(self, number: int, epoch: int = 0) -> dict[str, np.ndarray]:
        """Return the record of one cell."""
        ...


class MaskedCells(NamedTuple):
    """Cells of a batch with one random mask.

    Attributes
    ----------
    seed
        Number of the mask.
    batch
        Records of the cells, stacked, (B, ...).
    made
        Predictions of the model.
    masked
        Which genes are masked, bool (B, L); False in cells that fill up the last batch.
    """

    seed: int
    batch: dict[str, np.ndarray]
    made: Any
    masked: np.ndarray


def masked_cells(
    predict: Predict[Any], variables: Any, source: Records, cells: int, seeds: int, what: str
) -> Iterator[MaskedCells]:
    """Yield predictions for up to `cells` cells of a source with `seeds` masks each; `what` names the progress bar."""
    predict = jax.jit(predict)
    numbers = spread(len(source), cells)
    for start in track(range(0, len(numbers), _BATCH), what):
        rows = numbers[start : start + _BATCH]
        records = [source.record(number) for number in rows]
        records += records[-1:] * (_BATCH - len(rows))
        batch = {name: np.stack([record[name] for record in records]) for name in records[0]}
        for seed in range(seeds):
            key = jax.random.fold_in(jax.random.key(seed), start)
            made, mask = predict(variables, jax.tree.map(jnp.asarray, batch), key)
            masked = np.array(mask)
            masked[len(rows) :] = False
            yield MaskedCells(seed, batch, made, masked)
