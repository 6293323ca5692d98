"""What labels of cells are checked for, whoever gave them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

# Fewer cells may well be of one kind.
_FEWEST = 20
_ALIKE = 0.99


def warn_of_labels(
    labels: np.ndarray,
    answers: Sequence[str],
    probability: np.ndarray,
    unknown: str,
    why_unknown: str,
    *,
    may_be_alike: bool = False,
) -> None:
    """Warn where labels say little: most cells are unknown, or (nearly) all cells have the same one.

    Parameters
    ----------
    labels
        Label of each cell, (N,).
    answers
        Labels that there were to choose from.
    probability
        Of the label, (N,).
    unknown
        What cells without a label are called.
    why_unknown
        Why they have none, and what to do, for the sentence.
    may_be_alike
        The same label for (nearly) all cells is no reason for a warning: few cells are rare or of a tumor.
    """
    lost = float(np.mean(labels == unknown))
    if lost > 0.5:
        warnings.warn(f"{lost:.0%} of the cells are {unknown!r}: {why_unknown}", UserWarning, stacklevel=4)
    names, counts = np.unique(labels[labels != unknown].astype(str), return_counts=True)
    if may_be_alike or len(labels) < _FEWEST or len(answers) < 2 or not len(names):
        return
    most = int(counts.argmax())
    if counts[most] >= _ALIKE * len(labels):
        mean = float(probability[labels == names[most]].mean())
        warnings.warn(
            f"{counts[most]:,} of {len(labels):,} cells get the same label {str(names[most])!r} of {len(answers):,} "
            f"(mean probability {mean:.4f}): the model may not tell them apart, so check it on cells with known labels "
            "first",
            UserWarning,
            stacklevel=4,
        )
