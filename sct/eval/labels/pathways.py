"""Decide by a rank-based score which pathways are active in each cell, and compare predictions with baselines.

Source: ZerOmics paper, section 4.3 and appendix B.1 (cell pathway inference).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse
from scipy.stats import rankdata, spearmanr
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.neighbors import KNeighborsClassifier

from sct.checks import check_choice, check_finite, check_shape
from sct.data.normalization import log_expression
from sct.errors import ConfigError, DataError
from sct.eval import metrics
from sct.eval.labels import measures as labels
from sct.eval.reports.report import FITTED_ON, METHOD, Report
from sct.extras import load_extra
from sct.progress import track

AREAS = ("a-AUROC", "f-AUROC", "a-AUPRC", "f-AUPRC")
FREQUENCY, MEANS = "frequency of active pathways", "mean expression of the pathway's genes"
# Gene symbols with a vowel in the names of MSigDB's hallmark sets.
_SYMBOLS = frozenset({"AKT", "DNA", "JAK", "KRAS", "MTOR", "MYC", "TNFA", "UV"})
_BLOCK = 512  # cells whose ranks are in memory at once
_LEAST = 5  # minimum number of measured genes of a set, decoupler's default


def read_gene_sets(path: str | Path, names: Sequence[str] = ()) -> dict[str, tuple[str, ...]]:
    """Read gene sets from a GMT file.

    Parameters
    ----------
    path
        GMT file, such as MSigDB's hallmark sets. Each line has a name, a description and gene symbols, separated by
        tabs.
    names
        Names of the gene sets to read, as in the file or as returned by `plain_name`; empty to read all sets.

    Returns
    -------
    Dict that maps the readable name of each set (see `plain_name`) to its gene symbols.

    Raises
    ------
    DataError
        The file cannot be read, is not a GMT file, or lacks one of the names.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"cannot read the gene sets in {path} ({reason}): pass a readable GMT file."
        ) from error
    # decoupler's reader splits at any white space, so a word of the description would become a gene.
    rows = [[field.strip() for field in line.split("\t")] for line in lines if line.strip()]
    if any(len(row) < 3 or not row[0] for row in rows) or not rows:
        raise DataError(
            f"{path} is not a GMT file: write one line per set, with name, description and genes separated by tabs."
        )
    found = {row[0]: tuple(gene for gene in row[2:] if gene) for row in rows}
    plain = {plain_name(name): own for name, own in found.items()}
    if len(plain) < len(rows):
        name, _ = Counter(plain_name(row[0]) for row in rows).most_common(1)[0]
        raise DataError(
            f"{path} has more than one gene set named {name!r}: rename all but one of these sets."
        )
    if commas := [name for name in plain if "," in name]:
        raise DataError(
            f"{path} has a gene set named {commas[0]!r}, but the gene sets of a cell are listed with commas between "
            "them: remove the comma from this name."
        )
    for name in (name for name in names if plain_name(name) not in plain):
        check_choice("the gene set", name, found, error=DataError, advice=f"choose a set of {path}")
    return {plain_name(name): plain[plain_name(name)] for name in names} if names else plain


def plain_name(name: str) -> str:
    """Return a readable name of a gene set: "HALLMARK_TNFA_SIGNALING_VIA_NFKB" becomes "TNFA signaling via NFKB"."""
    words = name.strip().removeprefix("HALLMARK_").replace("_", " ").split()
    return " ".join(word if _is_symbol(word) else word.lower() for word in words)


def _is_symbol(word: str) -> bool:
    """Return whether a word is a gene symbol: a word that has a digit, has no vowel, or is in `_SYMBOLS`."""
    return any(c.isdigit() for c in word) or not set(word.upper()) & set("AEIOUY") or word in _SYMBOLS


def activities(counts: Any, symbols: Sequence[str], gene_sets: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """Return the activity of each gene set in each cell: how much higher the genes of the set rank than other genes.

    The score comes from decoupler's univariate linear model, fitted to the ranks of the genes of a cell. It is
    equivalent to a rank-sum test. Equal counts share their mean rank, so the score does not depend on the order of the
    genes. decoupler's AUCell is not used, because it ranks equal counts by column, and most counts are equal.

    Parameters
    ----------
    counts
        (N, G) raw counts of measured genes. Only the ranks of the genes within a cell are used.
    symbols
        Symbols of the G genes.
    gene_sets
        Dict from the name of each gene set to its gene symbols.

    Returns
    -------
    Table float64 (N, sets) of t-values. The table contains only gene sets that have at least five of the G genes.

    Raises
    ------
    DataError
        Fewer than two sets have enough genes.
    MissingExtraError
        decoupler is not installed.
    """
    decoupler = load_extra("decoupler", "analysis")
    known = set(symbols)
    pairs = [
        (name, gene)
        for name, own in gene_sets.items()
        if len(known & set(own)) >= _LEAST
        for gene in dict.fromkeys(own)
    ]
    net = pd.DataFrame(pairs, columns=["source", "target"])
    if net["source"].nunique() < 2:
        raise DataError(
            f"only {net['source'].nunique()} of the {len(gene_sets):,} gene sets have {_LEAST} or more genes that are "
            "measured in these cells and known to the model, but at least two such sets are needed: use gene sets "
            "with human symbols, or cells with more measured genes."
        )
    matrix, found = sparse.csr_matrix(counts, dtype=np.float32), []
    for first in track(range(0, matrix.shape[0], _BLOCK), "scoring pathways"):
        ranks = rankdata(matrix[first : first + _BLOCK].toarray(), axis=1).astype(np.float32)
        cells = ad.AnnData(
            ranks,
            obs=pd.DataFrame(index=[str(row) for row in range(len(ranks))]),
            var=pd.DataFrame(index=list(symbols)),
        )
        with metrics.quiet():
            decoupler.mt.ulm(cells, net, tmin=_LEAST, raw=False, empty=False)
        found.append(cells.obsm["score_ulm"])
    table = pd.concat(found, ignore_index=True)
    return table[[name for name in gene_sets if name in table]]


def active(scores: pd.DataFrame, deviations: float = 1.0) -> pd.DataFrame:
    """Return whether each gene set is active in each cell, bool (N, sets).

    A gene set is active in a cell if its score is more than `deviations` standard deviations above its mean score over
    all cells.
    """
    return scores > scores.mean() + deviations * scores.std(ddof=0)


class PathwayAreas(NamedTuple):
    """Hold the AUROC and AUPRC of the scores of S pathways in N cells, in [0, 1] (ZerOmics, appendix B.1).

    Attributes
    ----------
    auroc_average, auprc_average
        Area under the curve over the pathways of a cell, averaged over the cells that have both active and inactive
        pathways; NaN if no cell has both.
    auroc_flatten, auprc_flatten
        Area under the curve over all pairs of a cell and a pathway.
    """

    auroc_average: float
    auroc_flatten: float
    auprc_average: float
    auprc_flatten: float


def areas(true: np.ndarray, scores: np.ndarray) -> PathwayAreas:
    """Return the AUROC and AUPRC of the scores of pathways (N, S).

    `true`, bool (N, S), says whether each pathway is active in each cell.

    A higher score means that a pathway is more likely to be active.
    """
    check_shape("the table of true pathways", true, ("cells", "pathways"))
    check_shape("the table of scores", scores, ((len(true), "cells"), (true.shape[1], "pathways")))
    check_finite("the table of scores", scores, "cells")
    if true.all() or not true.any():
        return PathwayAreas(*[float("nan")] * 4)
    mixed = true.any(axis=1) & ~true.all(axis=1)
    own = [float("nan")] * 2
    if mixed.any():
        # average="samples" computes the area per cell and averages over cells.
        own = [
            float(measure(true[mixed], scores[mixed], average="samples"))
            for measure in (roc_auc_score, average_precision_score)
        ]
    flat = true.ravel(), scores.ravel()
    return PathwayAreas(own[0], float(roc_auc_score(*flat)), own[1], float(average_precision_score(*flat)))


@dataclasses.dataclass(frozen=True, eq=False)
class PathwayCells:
    """Hold the counts of N cells, and which of S pathways are active in each cell.

    Attributes
    ----------
    counts
        (N, G) raw counts.
    active
        bool table (N, S): whether each pathway is active; the columns are the pathways.
    means
        (N, S) mean log1p expression of the genes of each pathway.
    """

    counts: sparse.csr_matrix
    active: pd.DataFrame
    means: np.ndarray

    @classmethod
    def of(
        cls,
        counts: sparse.csr_matrix,
        symbols: Sequence[str],
        gene_sets: Mapping[str, Sequence[str]],
        deviations: float = 1.0,
    ) -> PathwayCells:
        """Compute which pathways are active in the given cells; see `activities` and `active` for the parameters."""
        found = active(activities(counts, symbols, gene_sets), deviations)
        log = log_expression(sparse.csr_matrix(counts, dtype=np.float32))
        places = {symbol: place for place, symbol in enumerate(symbols)}
        means = [
            np.asarray(
                log[:, [places[gene] for gene in dict.fromkeys(gene_sets[name]) if gene in places]].mean(
                    axis=1
                )
            )
            for name in found
        ]
        return cls(counts, found, np.hstack([each.reshape(-1, 1) for each in means]))

    def rows(self, rows: np.ndarray) -> PathwayCells:
        """Return the cells at the given row numbers."""
        picked = self.active.iloc[rows].reset_index(drop=True)
        return PathwayCells(self.counts[rows], picked, self.means[rows])


def _with_depth(cells: PathwayCells) -> float:
    """Return the Spearman correlation, over cells, between the number of active pathways and the total count."""
    with metrics.quiet():
        return float(spearmanr(cells.active.sum(axis=1), np.asarray(cells.counts.sum(axis=1)).ravel())[0])


def _probabilities(kind: Any, before: np.ndarray, true: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Fit one classifier per pathway on training cells, and return the probabilities (N, S).

    Each value is the probability that the pathway is active in the cell.

    Parameters
    ----------
    kind
        Function that returns an unfitted classifier.
    before, true
        (T, D) features and bool (T, S) active pathways of the training cells.
    after
        (N, D) features of the cells to predict.
    """
    made = np.zeros((len(after), true.shape[1]))
    for number, own in enumerate(true.T):
        if own.all() or not own.any():
            made[:, number] = float(own[0])
        else:
            made[:, number] = kind().fit(before, own).predict_proba(after)[:, 1]
    return made


def logistic(train: PathwayCells, cells: PathwayCells, options: labels.LabelOptions) -> np.ndarray:
    """Fit a logistic regression on principal components for each pathway, and return its scores (N, S)."""
    before, after = labels.components(train.counts, cells.counts, options.components)
    with metrics.quiet():
        return _probabilities(
            lambda: LogisticRegression(max_iter=1000), before, train.active.to_numpy(), after
        )


def baselines(
    train: PathwayCells, cells: PathwayCells, options: labels.LabelOptions
) -> dict[str, np.ndarray]:
    """Return the scores (N, S) of all baselines by name.

    Three baselines are fitted on training cells: logistic regression, k-NN and the frequency of each pathway. The
    fourth baseline is the mean expression of the genes of the pathway. These genes also define the true labels.
    """
    before, after = labels.components(train.counts, cells.counts, options.components)
    known = train.active.to_numpy()
    kinds = {
        labels.KNN.format(options.k): lambda: KNeighborsClassifier(min(options.k, len(before))),
        FREQUENCY: lambda: DummyClassifier(strategy="prior"),
    }
    made = {labels.LOGISTIC: logistic(train, cells, options)}
    with metrics.quiet():
        made |= {name: _probabilities(kind, before, known, after) for name, kind in kinds.items()}
    center, spread = train.means.mean(axis=0), train.means.std(axis=0)
    return {**made, MEANS: (cells.means - center) / np.where(spread > 0, spread, 1.0)}


def compare(
    predictions: Mapping[str, tuple[str, Sequence[np.ndarray]]],
    cells: PathwayCells,
    train: PathwayCells,
    options: labels.LabelOptions | None = None,
) -> tuple[Report, metrics.MetricDraws]:
    """Compare predicted pathway activities with baselines fitted on training cells (ZerOmics, Table 4).

    Parameters
    ----------
    predictions
        Dict from the name of each method to a pair: the data that the method was fitted on, and its scores as one array
        (N, S) per seed.
    cells, train
        Cells to predict, and training cells for the baselines, with the same pathways.
    options
        See `sct.eval.labels.measures.LabelOptions`.

    Returns
    -------
    The report, and a nested dict of all numbers: {row name: {column of `AREAS`: [one value per seed]}}.

    Raises
    ------
    ConfigError
        A prediction has the name of a baseline.
    DataError
        Shapes differ.
    """
    options = options or labels.LabelOptions()
    rows: dict[str, tuple[str, Sequence[np.ndarray]]] = dict(predictions)
    for name, scores in baselines(train, cells, options).items():
        if name in rows:
            raise ConfigError(
                f"`predictions` has an entry named {name!r}, but this is the name of a baseline: use "
                "another name."
            )
        rows[name] = labels.TRAINING, [scores]
    true = cells.active.to_numpy()
    report = Report(
        f"Active pathways of {len(true):,} cells: {true.shape[1]} pathways, {true.sum(axis=1).mean():.1f} active each",
        (METHOD, FITTED_ON, *AREAS),
        notes=(
            "a-: area over the pathways of a cell, averaged over cells. f-: area over all pairs of cell and pathway. "
            f"By chance, AUROC is 0.5 and f-AUPRC is {true.mean():.3f}.",
            f"Active pathways are defined by the ranks of their genes in a cell. The row '{MEANS}' uses the same "
            "genes, so it is close to the definition.",
            "Spearman correlation between the number of active pathways of a cell and its total count: "
            f"{_with_depth(cells):.2f}.",
        ),
        better=dict.fromkeys(AREAS, "max"),
    )
    if empty := int((~true.any(axis=1)).sum()):
        report.notes = (
            *report.notes,
            f"{empty:,} cells have no active pathway and enter only the f- columns.",
        )
    numbers: metrics.MetricDraws = {}
    for name in track(list(rows), "measuring pathways"):
        fitted_on, given = rows[name]
        measured = [areas(true, np.asarray(each, dtype=float)) for each in given]
        numbers[name] = {column: [each[i] for each in measured] for i, column in enumerate(AREAS)}
        report.add(name, fitted_on, *numbers[name].values())
    return report, numbers
