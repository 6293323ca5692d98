"""Number the labels of cells, such as Cell Ontology ids, from a column that some studies of a store have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sct.errors import ConfigError

if TYPE_CHECKING:
    from sct.data.store import Study

# Labels that mean "no label", in lower case. Most come from sct.tl.annotate, CELLxGENE and published tables.
_PLACEHOLDERS = frozenset(
    ("", "na", "n/a", "nan", "none", "<na>", "null", "unknown", "unassigned", "unlabeled", "unlabelled", "unannotated",
     "not available", "not assigned", "undetermined", "missing")
)  # fmt: skip
NO_LABEL = -1  # number of cells without a label, or with a label that is not listed


def is_placeholder(label: str) -> bool:
    """Return whether a label means that the cell has no label, such as "" and "unknown"."""
    return label.strip().lower() in _PLACEHOLDERS


def _column(study: Study, key: str) -> list[str]:
    """Return the labels of the cells of a study; "" for a cell without a label, or if the study lacks the column."""
    if key not in study.obs_columns:
        return [""] * study.n_cells
    entries = study.obs([key])[key]
    labels = entries.astype(object).where(entries.notna(), "").astype(str).str.strip()
    return ["" if is_placeholder(label) else label for label in labels]


def label_names(studies: Sequence[Study], key: str) -> tuple[str, ...]:
    """Return the labels of the cells of some studies, in alphabetical order, without placeholders such as "unknown".

    Raises
    ------
    ConfigError
        Fewer than two labels occur.
    """
    names = tuple(sorted({name for study in studies for name in _column(study, key)} - {""}))
    if len(names) < 2:
        raise ConfigError(
            f"data.label_key is {key!r}, but the training studies have {len(names)} labels in this column of obs, "
            "without placeholders such as 'unknown': set data.label_key to a column with at least two labels, or set "
            "objective.label_contrast to 0."
        )
    return names


def label_numbers(study: Study, key: str, names: Sequence[str]) -> np.ndarray:
    """Return the number of the label of each cell in `names`, int32 (n_cells,); `NO_LABEL` for other cells."""
    numbers = {name: number for number, name in enumerate(names)}
    return np.array([numbers.get(name, NO_LABEL) for name in _column(study, key)], np.int32)
