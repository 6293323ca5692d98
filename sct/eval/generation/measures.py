"""Measure generated cells: k-NN accuracy, Gromov-Wasserstein discrepancy, mean profiles, sentence quality."""

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

from sct.checks import check_finite, check_one_each, check_shape
from sct.errors import DataError
from sct.eval import metrics
from sct.extras import load_extra

KS = (3, 5, 10, 25)
QUALITY = ("length", "valid genes", "unique genes")


@dataclasses.dataclass(frozen=True, eq=False)
class CellSet:
    """Hold the expression, the labels and optionally the cell sentences of N cells.

    Attributes
    ----------
    expression
        (N, G) normalized expression, dense or sparse. Compared sets need the same genes and units; Cell2Sentence uses
        log10(1 + counts per 10,000).
    labels
        (N,) cell type or condition: observed for real cells, requested for generated cells.
    sentences
        N cell sentences (gene names separated by spaces), or None.
    quality
        Table of N rows with the columns n_words, n_valid and n_unique (see `sentence_quality`), or None.

    Raises
    ------
    DataError
        Lengths differ, a label is missing, or an expression value is not finite.
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
            raise DataError(f"`labels` has {missing:,} missing values: remove the cells without a label.")
        check_finite(
            "expression",
            matrix.data if sparse.issparse(matrix) else matrix,
            "values" if sparse.issparse(matrix) else "cells",
        )

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> CellSet:
        """Return the cells at the given row numbers, in this order."""
        sentences = None if self.sentences is None else [self.sentences[i] for i in rows]
        quality = None if self.quality is None else self.quality.iloc[rows]
        return CellSet(self.expression[rows], self.labels[rows], sentences, quality)


def token_distances(queries: Sequence[str], references: Sequence[str], *, workers: int = -1) -> np.ndarray:
    """Return Levenshtein distances between cell sentences, counted in genes, not characters (Cell2Sentence, Table 8).

    Parameters
    ----------
    queries, references
        M and N cell sentences.
    workers
        Number of threads; -1 uses all cores.

    Returns
    -------
    int32 (M, N): minimum number of genes to insert, delete or replace to turn one sentence into the other.

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
    flat[flat >= 0xD800] += 0x800  # skip the Unicode surrogates, which are not characters
    ends = np.cumsum([len(each) for each in words])
    # Encode each gene as one character, because rapidfuzz is fastest on strings.
    texts = [part.tobytes().decode("utf-32-le") for part in np.split(flat, ends[:-1])]
    return cdist(
        texts[: len(queries)],
        texts[len(queries) :],
        scorer=Levenshtein.distance,
        dtype=np.int32,
        workers=workers,
    )


def expression_distances(cells: Any, references: Any) -> np.ndarray:
    """Return Euclidean distances (M, N) between cells (M, G) and references (N, G), dense or sparse."""
    return euclidean_distances(cells, references)


def _votes(distances: np.ndarray) -> np.ndarray:
    """Return almost equal vote weights for neighbors sorted by distance.

    Nearer neighbors weigh slightly more, so that in a tie the label of the nearest cell wins.
    """
    return np.tile(1 + 0.5 ** (2 + np.arange(distances.shape[1])), (len(distances), 1))


def nearest_label_accuracy(
    distances: np.ndarray, real_labels: Any, generated_labels: Any, ks: Sequence[int] = KS
) -> dict[int, float]:
    """Return the k-NN accuracy: the fraction of generated cells whose nearest real cells vote for the requested label.

    See Cell2Sentence, section 4.2, Table 1 (expression), Table 8 (Levenshtein distance) and Table 10. If several real
    cells are equally near and could all be the k-th neighbor, the order of the rows decides.

    Parameters
    ----------
    distances
        (M, N) distances from generated to real cells, from `expression_distances` or `token_distances`.
    real_labels, generated_labels
        (N,) labels of the real cells, and (M,) requested labels of the generated cells.
    ks
        Numbers of nearest real cells that vote (k); there is one accuracy for each k.

    Returns
    -------
    Dict from each k to the accuracy in [0, 1], higher is better; NaN if there are fewer than k real cells.

    Raises
    ------
    DataError
        A label of the generated cells does not occur in the real cells, or shapes differ.
    """
    real, asked = np.asarray(real_labels, dtype=object), np.asarray(generated_labels, dtype=object)
    if distances.shape != (len(asked), len(real)) or not distances.size:
        raise DataError(
            f"distances has the shape {distances.shape}, but there are {len(asked):,} generated and {len(real):,} real "
            "labels: pass one row per generated cell and one column per real cell."
        )
    _check_known(asked, real)
    names = metrics.codes(np.concatenate([real, asked]))
    accuracies = {}
    for k in ks:
        if k > len(real):
            accuracies[k] = math.nan
            continue
        # With metric="precomputed", scikit-learn uses only the shape of the training matrix.
        model = KNeighborsClassifier(k, weights=_votes, metric="precomputed")
        model.fit(sparse.eye(len(real), format="csr"), names[: len(real)])
        predicted = model.predict(distances)
        accuracies[k] = metrics.accuracy_and_f1(names[len(real) :], predicted)[0]
    return accuracies


def _check_known(generated: np.ndarray, real: np.ndarray) -> None:
    if unknown := sorted(map(str, set(generated) - set(real))):
        raise DataError(
            f"generated cells have the label {unknown[0]!r}, but no real cell has this label: remove these "
            "generated cells or add real cells of this label."
        )


def gromov_wasserstein(real: Any, generated: Any, *, max_cells: int = 1000, seed: int = 0) -> float:
    """Return the Gromov-Wasserstein discrepancy between two sets of cells (Cell2Sentence, section 4.2, Table 1).

    The discrepancy is the minimum, over couplings of the two sets, of the mean of (d(i, j) - d'(i', j'))^2. Here d and
    d' are the Euclidean distances in expression space within each set, and all cells have equal weight. The library POT
    computes it with `gromov_wasserstein2` and the squared loss, without a square root. The problem is not convex. The
    function returns the lower of two local minima: one starts from the product of the weights, the other from the
    optimal transport plan in expression space.

    Parameters
    ----------
    real, generated
        (N, G) and (M, G) expression.
    max_cells, seed
        A set with more than `max_cells` cells is subsampled without replacement, because memory grows with the square
        and time with the cube of the number of cells. Two samples of the same distribution have a discrepancy above 0,
        which shrinks with the sample size. Therefore compare only values from samples of equal size, and compare them
        with the discrepancy between two sets of real cells.

    Returns
    -------
    Discrepancy >= 0, in squared units of expression; lower is better. The discrepancy is 0 if the sets are equal up to
    rotation, reflection and translation.

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
    """Measure how well two expression profiles agree.

    Attributes
    ----------
    pearson, spearman
        Pearson and Spearman correlation.
    r2
        Coefficient of determination.
    """

    pearson: float
    spearman: float
    r2: float


def correlations(real: np.ndarray, generated: np.ndarray) -> Correlations:
    """Compute how well a generated expression profile agrees with a real one: Pearson and Spearman correlation, and R2.

    Parameters
    ----------
    real, generated
        (G,) mean expression, or difference of mean expression.

    Returns
    -------
    Pearson and Spearman correlation in [-1, 1], and R2 in (-inf, 1]. The best value is 1. All three are NaN if a
    profile is constant. R2 is 1 - residual variance / total variance of the real profile, not the square of the Pearson
    correlation. Table 7 of the paper was probably computed by the same definition, because its R2 is lower than the
    squared Pearson correlation.
    """
    if len(real) < 2 or np.ptp(real) == 0 or np.ptp(generated) == 0:
        return Correlations(np.nan, np.nan, np.nan)
    return Correlations(
        float(stats.pearsonr(real, generated)[0]),
        float(stats.spearmanr(real, generated)[0]),
        float(r2_score(real, generated)),
    )


def mean_profiles(expression: Any, labels: Any) -> pd.DataFrame:
    """Return the mean expression (L, G) of the cells of each of the L labels.

    The labels are in order of first appearance.
    """
    names, labels = pd.factorize(np.asarray(labels, dtype=object))
    member = sparse.csr_matrix((np.ones(len(names)), (names, np.arange(len(names)))))
    sums = member @ expression
    sums = sums.toarray() if sparse.issparse(sums) else np.asarray(sums)
    return pd.DataFrame(sums / np.bincount(names)[:, None], index=labels)


def mean_correlations(generated: CellSet, real: CellSet) -> pd.DataFrame:
    """Return how well the mean generated cell of each label agrees with the mean real cell (Cell2Sentence, Table 7).

    Parameters
    ----------
    generated, real
        Cells to compare, over all genes.

    Returns
    -------
    Table with one row per label of the generated cells and the columns pearson, spearman and r2 (see `correlations`).
    The paper reports the mean over labels.

    Raises
    ------
    DataError
        A label of the generated cells does not occur in the real cells.
    """
    _check_known(generated.labels, real.labels)
    made, true = (mean_profiles(cells.expression, cells.labels) for cells in (generated, real))
    rows = {
        label: correlations(true.loc[label].to_numpy(), made.loc[label].to_numpy()) for label in made.index
    }
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(Correlations._fields))


def sentence_quality(table: pd.DataFrame) -> dict[str, float]:
    """Return the length, validity and uniqueness of generated sentences, averaged over cells (Cell2Sentence, Table 11).

    Parameters
    ----------
    table
        One row per sentence, with the columns n_words (number of words), n_valid (number of words that are genes,
        including repeats) and n_unique (number of distinct genes).

    Returns
    -------
    Dict with three means over sentences. "length" is the mean of n_words. "valid genes" is the mean of n_valid /
    n_words. "unique genes" is the mean of n_unique / n_words. Both fractions are in [0, 1], and 1 is the best value.
    For a sentence without words, both fractions are 0.

    Raises
    ------
    DataError
        A column is missing, or a row violates n_words >= n_valid >= n_unique >= 0.
    """
    names = ["n_words", "n_valid", "n_unique"]
    if missing := [name for name in names if name not in table]:
        raise DataError(
            f"the table of sentences lacks the column {missing[0]!r}: add the columns {', '.join(names)}."
        )
    words, valid, unique = (table[name].to_numpy(float) for name in names)
    if not ((words >= valid) & (valid >= unique) & (unique >= 0)).all():
        raise DataError(
            "the table of sentences has rows that violate n_words >= n_valid >= n_unique >= 0: correct the columns "
            "n_words, n_valid and n_unique."
        )
    shares = [np.divide(n, words, out=np.zeros_like(words), where=words > 0).mean() for n in (valid, unique)]
    return dict(zip(QUALITY, map(float, (words.mean(), *shares)), strict=True))
