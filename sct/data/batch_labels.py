"""Number the batches of cells, such as donors or sequencing runs, from a column of the store."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sct.data.store import Study
from sct.errors import ConfigError

UNKNOWN = -1  # label of cells whose batch is not among the known ones


def _column(study: Study, key: str) -> np.ndarray:
    """Return the entries of a column as text, object (n_cells,)."""
    if key not in study.obs_columns:
        raise ConfigError(
            f"data.batch_key is {key!r}, but study {study.name!r} has only the columns "
            f"{', '.join(study.obs_columns) or 'none'}: choose one of these, or ingest the cells with this column."
        )
    entries = study.obs([key])[key]
    missing = int(entries.isna().sum())
    if missing:
        raise ConfigError(
            f"data.batch_key is {key!r}, but {missing:,} cells of study {study.name!r} have no entry there: choose "
            "another column, or fill the entries and ingest the cells again."
        )
    return entries.astype(str).to_numpy(object)


def batches_of(studies: Sequence[Study], key: str) -> tuple[str, ...]:
    """Return the batches of the cells of some studies, in alphabetical order.

    Raises
    ------
    ConfigError
        A study does not have the column, or some cells have no entry.
    """
    return tuple(sorted({str(name) for study in studies for name in np.unique(_column(study, key))}))


def check_distinct(studies: Sequence[Study], key: str) -> None:
    """Raise `ConfigError` if an entry of the column occurs in several studies, where it may mean different batches."""
    owners: dict[str, list[str]] = {}
    for study in studies:
        for name in np.unique(_column(study, key)):
            owners.setdefault(str(name), []).append(study.name)
    repeated = {name: where for name, where in owners.items() if len(where) > 1}
    if repeated:
        name, where = next(iter(sorted(repeated.items())))
        raise ConfigError(
            f"{len(repeated):,} entries of data.batch_key={key!r} occur in several studies (first: {name!r} in "
            f"{', '.join(where[:3])}{', ...' if len(where) > 3 else ''}): set data.shared_batches to True if they are "
            "the same batches, or ingest the cells with different names of batches."
        )


def batch_labels(study: Study, key: str, batches: Sequence[str]) -> np.ndarray:
    """Return the number of the batch of each cell, int32 (n_cells,); `UNKNOWN` for a batch that is not listed."""
    numbers = {name: number for number, name in enumerate(batches)}
    return np.array([numbers.get(name, UNKNOWN) for name in _column(study, key)], np.int32)
