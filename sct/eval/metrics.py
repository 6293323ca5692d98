"""Metrics of arrays, from scikit-learn; this module imports nothing of the project."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import matthews_corrcoef, mean_absolute_error

__all__ = ["matthews", "matthews_from_confusion", "mean_absolute_error"]


def matthews(true: np.ndarray, predicted: np.ndarray) -> float:
    """Matthews correlation coefficient of several classes, in [-1, 1]; 0 where either side is constant."""
    if len(true) == 0:
        return float("nan")
    return float(matthews_corrcoef(true, predicted))


def matthews_from_confusion(confusion: np.ndarray) -> float:
    """Matthews correlation coefficient of a matrix of counts whose last columns are the classes.

    Parameters
    ----------
    confusion
        (rows, classes): true class by predicted class. With fewer rows than classes the rows are the last
        classes (a matrix without the row of class 0 restricts the metric to the others).

    Returns
    -------
    The coefficient, NaN for an empty matrix.
    """
    confusion = np.asarray(confusion)
    if confusion.sum() == 0:
        return float("nan")
    skipped = confusion.shape[1] - confusion.shape[0]
    true, predicted = np.nonzero(confusion)
    weight = confusion[true, predicted]
    return float(matthews_corrcoef(true + skipped, predicted, sample_weight=weight))
