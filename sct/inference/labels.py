"""Warn the user if predicted cell labels look wrong."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sct import messages

_MIN_CELLS = 20  # fewer cells may really all have the same label
_SAME_SHARE = 0.99  # share of cells with the same label that causes a warning


def warn_of_labels(
    labels: np.ndarray,
    answers: Sequence[str],
    probability: np.ndarray,
    unknown: str,
    why_unknown: str,
    *,
    may_be_alike: bool = False,
) -> None:
    """Warn if most cells are unknown, or if nearly all cells have the same predicted label.

    Parameters
    ----------
    labels
        Label of each cell, (N,).
    answers
        Labels among which the model could choose.
    probability
        Probability of each label, (N,).
    unknown
        Label of cells without a prediction, such as "unknown".
    why_unknown
        Text for the warning. It says why a cell has no prediction, and what the user can do.
    may_be_alike
        If True, do not warn if nearly all cells have the same label. This is expected in a search for rare or tumor
        cells.

    Warns
    -----
    UserWarning
        More than half of the cells are unknown, or at least 99% have the same label.
    """
    lost = float(np.mean(labels == unknown))
    if lost > 0.5:
        messages.warn(f"{lost:.0%} of the cells are {unknown!r}: {why_unknown}")
    names, counts = np.unique(labels[labels != unknown].astype(str), return_counts=True)
    if may_be_alike or len(labels) < _MIN_CELLS or len(answers) < 2 or not len(names):
        return
    most = int(counts.argmax())
    if counts[most] >= _SAME_SHARE * len(labels):
        mean = float(probability[labels == names[most]].mean())
        messages.warn(
            f"{counts[most]:,} of {len(labels):,} cells have the same label {str(names[most])!r} out of "
            f"{len(answers):,} candidates (mean probability {mean:.4f}): the model may not distinguish these cells, so "
            "check it on cells with known labels first",
        )
