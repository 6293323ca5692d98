"""Define the fitted readout: a fixed linear map from the flat outputs of a model to a cell embedding of few dimensions.

The map is fitted without labels: it holds the principal components of the flat outputs of training cells. It is stored
in the model folder, so that the embeddings of all data sets share one space (DESIGN 4.1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sct.checks import check_at_least
from sct.errors import CheckpointError, DataError
from sct.weights import model_folder

# EXACT: number of features up to which the covariance matrix is computed exactly (its decomposition takes seconds).
# TEST_VECTORS: for more features, number of random directions whose products with the covariance are computed.
EXACT, TEST_VECTORS = 2048, 256


@dataclasses.dataclass(frozen=True, eq=False)
class FittedReadout:
    """Linear map from the flat outputs of a cell to its embedding: (x - mean) @ matrix.

    Attributes
    ----------
    source
        Name of the flat readout that the map reads, such as "flat" or "conv".
    mean, matrix
        float32 (F,) and float32 (F, D): the mean of the F features, and one column per dimension of the embedding.
    info
        How the map was fitted, as plain JSON values: number of cells, names of the studies, whether each feature was
        standardized, and the share of the variance that the D dimensions explain.
    """

    source: str
    mean: np.ndarray
    matrix: np.ndarray
    info: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def dim(self) -> int:
        """Return the number of dimensions of the embedding (D)."""
        return int(self.matrix.shape[1])

    def record(self) -> dict[str, Any]:
        """Return the entry of the map in `config.json` of a model folder."""
        return {"source": self.source, "dim": self.dim, **self.info}

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays of the map by name, for its file in a model folder."""
        return {"mean": self.mean, "matrix": self.matrix}

    @classmethod
    def load(cls, folder: Path, record: Any) -> FittedReadout:
        """Read the map from a model folder.

        `record` is its entry in `config.json`.

        Raises
        ------
        CheckpointError
            The entry or the file is missing or damaged.
        """
        path = folder / model_folder.READOUT
        with model_folder.FolderReader(folder, model_folder.READOUT) as reader:
            shapes = {name: tuple(each.shape) for name, each in reader.shapes.items()}
            features, dim = shapes.get("matrix", (0, 0))
            fits = isinstance(record, Mapping) and record.get("dim") == dim and bool(record.get("source"))
            if not fits or shapes != {"mean": (features,), "matrix": (features, dim)}:
                raise CheckpointError(
                    f"{path} does not fit the entry {model_folder.READOUT_RECORD!r} of {model_folder.CONFIG}: the "
                    "folder is damaged, so restore it from a copy."
                )
            mean, matrix = (reader.part(name, ()) for name in ("mean", "matrix"))
        info = {name: value for name, value in record.items() if name not in ("source", "dim")}
        return cls(str(record["source"]), mean, matrix, info)


class Moments:
    """Sums over cells from which principal components are computed. Cells are added block by block.

    The result depends on the division of the cells into blocks only by rounding. With up to `EXACT` features, the
    components are exact. With more features, the sums are products of the covariance with a few fixed random vectors
    (a Nystrom approximation: Tropp et al. 2017, "Fixed-rank approximation of a positive-semidefinite matrix from
    streaming data"). The memory is then that of (features x test vectors) instead of (features x features).

    Parameters
    ----------
    features
        Number of features (F).
    dim
        Number of components that will be needed (D).
    seed
        Seed of the random vectors.
    """

    def __init__(self, features: int, dim: int, seed: int = 0):
        check_at_least("dim", dim, 1)
        self.n, self.dim = 0, dim
        self.total, self.squares = np.zeros((2, features))
        self.test: np.ndarray | None = None  # None: all features, which is exact
        if features > EXACT:
            number = min(features, max(TEST_VECTORS, 4 * dim))
            self.test = np.random.default_rng(seed).standard_normal((features, number))
        self.products = np.zeros((features, features if self.test is None else self.test.shape[1]))

    def add(self, values: np.ndarray) -> None:
        """Add cells: the features (n, F) of n cells."""
        x = np.asarray(values, np.float64)
        self.n += len(x)
        self.total += x.sum(axis=0)
        self.squares += (x**2).sum(axis=0)
        self.products += x.T @ (x if self.test is None else x @ self.test)

    def fit(self, source: str, standardize: bool = False, **info: Any) -> FittedReadout:
        """Return the map to the first D principal components.

        Parameters
        ----------
        source, info
            See `FittedReadout`.
        standardize
            Whether to divide each feature by its standard deviation first. Features that are constant are left out.

        Raises
        ------
        DataError
            There are too few cells for D components, or all cells have the same features.
        """
        if self.n <= self.dim:
            raise DataError(
                f"a readout of {self.dim} dimensions needs more than {self.dim} cells, but there are {self.n}: give "
                "more cells, or set a smaller `dim`."
            )
        mean = self.total / self.n
        test = np.eye(len(mean)) if self.test is None else self.test
        variance = np.maximum(self.squares / self.n - mean**2, 0.0)
        # Rounding of the sums leaves constant features with a tiny variance.
        varies = variance > 1e-9 * (self.squares / self.n).clip(1e-30)
        scale = np.where(varies, np.sqrt(variance) if standardize else 1.0, np.inf)
        # For the features x / scale, the test vectors become test * scale, and the products become products / scale.
        products = (self.products / self.n - np.outer(mean, mean @ test)) / scale[:, None]
        vectors, values = _eigen(products, None if self.test is None else test, scale)
        if not len(values) or len(values) < self.dim:
            raise DataError(
                f"the outputs of the cells vary in only {len(values)} directions, but `dim` is {self.dim}: give more "
                "cells, or set a smaller `dim`."
            )
        vectors, values = vectors[:, : self.dim], values[: self.dim]
        # The sign of a component is arbitrary: its largest weight is positive, so that fitting is deterministic.
        largest = np.abs(vectors).argmax(axis=0)
        vectors = vectors * np.sign(vectors[largest, np.arange(self.dim)])
        total = float((variance / scale**2).sum())
        info = {"standardize": standardize, "explained": round(float(values.sum()) / total, 4), **info}
        matrix = (vectors / scale[:, None]).astype(np.float32)
        return FittedReadout(source, mean.astype(np.float32), matrix, {"cells": self.n, **info})


def _eigen(products: np.ndarray, test: np.ndarray | None, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return eigenvectors (F, R) and eigenvalues (R,) of a covariance, largest first; only clearly positive ones.

    `products` (F, T) is the covariance times the test vectors (F, T), or with `test=None` the covariance times the
    diagonal matrix of the scales.
    """
    from scipy import linalg

    if test is None:
        finite = np.where(np.isfinite(scale), scale, 1.0)
        covariance = products / finite[None, :]
        covariance[:, ~np.isfinite(scale)] = 0.0
        values, vectors = linalg.eigh((covariance + covariance.T) / 2)
        values, vectors = values[::-1], vectors[:, ::-1]
    else:
        scaled = np.where(
            np.isfinite(scale)[:, None], test * np.where(np.isfinite(scale), scale, 1.0)[:, None], 0.0
        )
        inner = scaled.T @ products
        strength, basis = linalg.eigh((inner + inner.T) / 2)
        kept = strength > strength[-1] * 1e-10
        vectors, values, _ = linalg.svd(
            products @ (basis[:, kept] / np.sqrt(strength[kept])), full_matrices=False
        )
        values = values**2
    kept = values > values[0] * 1e-9 if len(values) and values[0] > 0 else np.zeros(len(values), bool)
    return vectors[:, kept], values[kept]
