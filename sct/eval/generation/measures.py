"""Measures of generated cells: nearest neighbours, Gromov-Wasserstein, mean profiles, sentences."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse, stats
from sklearn.metrics import r2_score
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.neighbors import KNeighborsClassifier

from sct.checks import check_choice, check_finite, check_one_each, check_shape
from sct.errors import DataError
from sct.eval import metrics
from sct.extras import load_extra

KS = (3, 5, 10, 25)
QUALITY = ("length", "valid genes", "unique genes")


@dataclasses.dataclass(frozen=True, eq=False)
class CellSet:
    """Cells with their labels.

    Attributes
    ----------
    expression
        (N, G) normalised expression, dense or sparse; the same genes and the same units in all sets that are
        compared (Cell2Sentence: log10(1 + counts per 10,000)).
    labels
        (N,) the cell type or condition: observed, or the one that the cell was generated for.
    sentences
        N cell sentences, gene names with spaces between them, or None.
    quality
        (N, ...) table with the columns n_words, n_valid and n_unique (see `sentence_quality`), or None.

    Raises
    ------
    DataError
        Lengths differ, a label is missing, or an expression is not finite.
    """

    expression: Any
    labels: np.ndarray
    sentences: Sequence[str] | None = None
    quality: pd.DataFrame | None = None

    def __post_init__(self) -> None:
        matrix = self.expression
        matrix = sparse.csr_matrix(matrix) if sparse.issparse(matrix) else np.asarray(matrix)
        object.__setattr__(self, "expression", matrix)
        object.__setattr__(self, "labels", np.asarray(self.labels, dtype=object))
        check_shape("expression", matrix, ("cells", "genes"), empty=True)
        for name in ("labels", "sentences", "quality"):
            given = getattr(self, name)
            if given is not None:
                check_one_each(name, len(given), "cells", matrix.shape[0])
        if missing := int(pd.isna(self.labels).sum()):
            raise DataError(f"{missing:,} cells have no label; leave these cells out.")
        check_finite(
            "expression",
            matrix.data if sparse.issparse(matrix) else matrix,
            "values" if sparse.issparse(matrix) else "cells",
        )

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> CellSet:
        """The cells of these row numbers, in this order."""
        sentences = None if self.sentences is None else [self.sentences[i] for i in rows]
        quality = None if self.quality is None else self.quality.iloc[rows]
        return CellSet(self.expression[rows], self.labels[rows], sentences, quality)


def token_distances(queries: Sequence[str], references: Sequence[str], *, workers: int = -1) -> np.ndarray:
    """Levenshtein distances of sentences over genes, not over characters (Cell2Sentence, Table 8).

    Parameters
    ----------
    queries, references
        M and N cell sentences.
    workers
        Threads; -1 takes all cores.

    Returns
    -------
    (M, N) int32: the least number of genes inserted, left out or replaced.

    Raises
    ------
    MissingExtraError
        rapidfuzz is not installed.
    """
    load_extra("rapidfuzz", "text")
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    words = [sentence.split() for sentence in (*queries, *references)]
    flat = pd.factorize(np.array([word for each in words for word in each], dtype=object))[0].astype("<u4")
    flat[flat >= 0xD800] += 0x800  # no character has a number in this gap
    ends = np.cumsum([len(each) for each in words])
    # One character stands for one gene, since the library is fastest on texts.
    texts = [part.tobytes().decode("utf-32-le") for part in np.split(flat, ends[:-1])]
    return cdist(
        texts[: len(queries)],
        texts[len(queries) :],
        scorer=Levenshtein.distance,
        dtype=np.int32,
        workers=workers,
    )


def expression_distances(cells: Any, references: Any) -> np.ndarray:
    """Euclidean distances (M, N) of cells (M, G) and (N, G), dense or sparse."""
    return euclidean_distances(cells, references)


def _votes(distances: np.ndarray) -> np.ndarray:
    """Equal votes of sorted neighbours; where labels tie, the one with the nearest cell wins."""
    return np.tile(1 + 0.5 ** (2 + np.arange(distances.shape[1])), (len(distances), 1))


def nearest_label_accuracy(
    distances: np.ndarray, real_labels: Any, generated_labels: Any, ks: Sequence[int] = KS
) -> dict[int, float]:
    """Share of generated cells whose nearest real cells have the label that they were generated for.

    Cell2Sentence, section 4.2, Table 1 (expression), Table 8 (Levenshtein distance) and Table 10. Where several
    real cells are equally far as the k-th neighbour, the order of rows decides among them.

    Parameters
    ----------
    distances
        (M, N) from generated to real cells (`expression_distances`, `token_distances`).
    real_labels, generated_labels
        (N,) and (M,).
    ks
        Numbers of neighbours.

    Returns
    -------
    k -> accuracy in [0, 1], higher is better; NaN where there are fewer than k real cells.

    Raises
    ------
    DataError
        A generated label is none of the real ones, or lengths differ.
    """
    real, asked = np.asarray(real_labels, dtype=object), np.asarray(generated_labels, dtype=object)
    if distances.shape != (len(asked), len(real)) or not distances.size:
        raise DataError(
            f"distances have the shape {distances.shape} for {len(asked):,} generated and {len(real):,} real "
            "labels; one row for each generated and one column for each real cell is needed."
        )
    _check_known(asked, real)
    names = metrics.codes(np.concatenate([real, asked]))
    accuracies = {}
    for k in ks:
        if k > len(real):
            accuracies[k] = math.nan
            continue
        # Of the training matrix of "precomputed" only the shape is looked at.
        model = KNeighborsClassifier(k, weights=_votes, metric="precomputed")
        model.fit(sparse.eye(len(real), format="csr"), names[: len(real)])
        predicted = model.predict(distances)
        accuracies[k] = metrics.accuracy_and_f1(names[len(real) :], predicted)[0]
    return accuracies


def _check_known(generated: np.ndarray, real: np.ndarray) -> None:
    if unknown := sorted(map(str, set(generated) - set(real))):
        raise DataError(
            f"cells were generated for {unknown[0]!r}, which no real cell has; leave them out or add real cells."
        )


def gromov_wasserstein(real: Any, generated: Any, *, max_cells: int = 1000, seed: int = 0) -> float:
    """Gromov-Wasserstein discrepancy between two sets of cells (Cell2Sentence, section 4.2, Table 1).

    The least mean of (d(i, j) - d'(i', j'))^2 over couplings of the two sets, with d and d' the Euclidean
    distances in expression space and equal weights of the cells; POT's `gromov_wasserstein2` with the squared
    loss, and no root is taken. The problem is not convex: the lower of two local minima is returned, one found
    from the product of the weights, one from the optimal transport plan in expression space.

    Parameters
    ----------
    real, generated
        (N, G) and (M, G) expression.
    max_cells, seed
        Of a larger set this many cells, drawn without replacement, stand for all: memory grows with the square
        and time with the cube of their number. The discrepancy of two samples of one distribution is above 0
        and shrinks with their size, so that numbers are compared at one size and beside that of real cells.

    Returns
    -------
    A number from 0 (equal up to a motion) up, in squared units of expression; lower is better.

    Raises
    ------
    MissingExtraError
        POT is not installed.
    """
    with metrics.quiet():
        ot = load_extra("ot", "analysis", "POT")
        rng = np.random.default_rng(seed)
        first, second = (
            each if each.shape[0] <= max_cells else each[rng.permutation(each.shape[0])[:max_cells]]
            for each in (real, generated)
        )
        within = [euclidean_distances(each).astype(np.float64) for each in (first, second)]
        weights = [np.full(len(each), 1 / len(each)) for each in within]
        across = euclidean_distances(first, second).astype(np.float64)
        starts = (None, ot.emd(*weights, across**2))
        found = [ot.gromov_wasserstein2(*within, *weights, "square_loss", G0=start) for start in starts]
    return max(0.0, float(min(found)))


class Correlations(NamedTuple):
    """Agreement of two profiles: Pearson's and Spearman's correlation and the coefficient of determination."""

    pearson: float
    spearman: float
    r2: float


def correlations(real: np.ndarray, generated: np.ndarray) -> Correlations:
    """Agreement of a generated with a real profile (G,).

    Parameters
    ----------
    real, generated
        (G,) mean expression, or differences of it.

    Returns
    -------
    Correlations in [-1, 1] and R2 in (-inf, 1], 1 the best; NaN where a profile is constant. R2 is the share
    of the real profile's variance that the generated one explains as it is (1 - residual / total), not the
    square of Pearson's correlation: in the paper's Table 7 it is lower than that.
    """
    if len(real) < 2 or np.ptp(real) == 0 or np.ptp(generated) == 0:
        return Correlations(np.nan, np.nan, np.nan)
    return Correlations(
        float(stats.pearsonr(real, generated)[0]),
        float(stats.spearmanr(real, generated)[0]),
        float(r2_score(real, generated)),
    )


def mean_profiles(expression: Any, labels: Any) -> pd.DataFrame:
    """Mean expression (L, G) of the cells (N, G) of each label (N,), in the order of first appearance."""
    names, labels = pd.factorize(np.asarray(labels, dtype=object))
    member = sparse.csr_matrix((np.ones(len(names)), (names, np.arange(len(names)))))
    sums = member @ expression
    sums = sums.toarray() if sparse.issparse(sums) else np.asarray(sums)
    return pd.DataFrame(sums / np.bincount(names)[:, None], index=labels)


def mean_correlations(generated: CellSet, real: CellSet) -> pd.DataFrame:
    """Agreement of the mean generated cell of each label with the mean real one (Cell2Sentence, Table 7).

    Parameters
    ----------
    generated, real
        Cells; all genes count.

    Returns
    -------
    (L, 3) table by label of the generated cells, with the columns pearson, spearman and r2 (see `correlations`);
    the paper's number is the mean over labels.

    Raises
    ------
    DataError
        A generated label is none of the real ones.
    """
    _check_known(generated.labels, real.labels)
    made, true = (mean_profiles(cells.expression, cells.labels) for cells in (generated, real))
    rows = {
        label: correlations(true.loc[label].to_numpy(), made.loc[label].to_numpy()) for label in made.index
    }
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(Correlations._fields))


def sentence_quality(table: pd.DataFrame) -> dict[str, float]:
    """Length, validity and uniqueness of generated sentences, averaged over cells (Cell2Sentence, Table 11).

    Parameters
    ----------
    table
        (N, ...) of each sentence: n_words, all its words; n_valid, those that are genes, repeated ones counted
        each time; n_unique, the different genes among them.

    Returns
    -------
    "length", the mean number of words; "valid genes" and "unique genes", the mean shares of n_valid and of n_unique
    in n_words, in [0, 1], 1 the best. A sentence without words has shares of 0.

    Raises
    ------
    DataError
        A column is missing, or the numbers contradict each other.
    """
    names = ["n_words", "n_valid", "n_unique"]
    for name in names:
        check_choice("a column of the table of sentences", name, table.columns, error=DataError)
    words, valid, unique = (table[name].to_numpy(float) for name in names)
    if not ((words >= valid) & (valid >= unique) & (unique >= 0)).all():
        raise DataError(
            "the table of sentences has rows without n_words >= n_valid >= n_unique >= 0; count again."
        )
    shares = [np.divide(n, words, out=np.zeros_like(words), where=words > 0).mean() for n in (valid, unique)]
    return dict(zip(QUALITY, map(float, (words.mean(), *shares)), strict=True))
