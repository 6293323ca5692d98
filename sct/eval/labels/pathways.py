"""Which pathways are active in cells: labels by a rank-based scorer, and predictions beside baselines.

Source: ZerOmics paper, section 4.3 and appendix B.1 (cell pathway inference).
"""

from __future__ import annotations

import dataclasses
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
FREQUENCY, MEANS = "how often each pathway is active", "mean expression of the pathway's genes"
# Symbols with a vowel in names of MSigDB's hallmark sets.
_SYMBOLS = frozenset({"AKT", "DNA", "JAK", "KRAS", "MTOR", "MYC", "TNFA", "UV"})
_BLOCK = 512  # cells whose ranks are in memory at once
_LEAST = 5  # genes of a set that the cells must have, as decoupler asks


def read_gene_sets(path: str | Path, names: Sequence[str] = ()) -> dict[str, tuple[str, ...]]:
    """Read gene sets of a GMT file, all or those of some names.

    Parameters
    ----------
    path
        Lines of name, description, symbols, between tabulators, such as MSigDB's hallmark sets.
    names
        As in the file, or as `plain_name` writes them.

    Returns
    -------
    Plain name -> symbols.

    Raises
    ------
    DataError
        The file cannot be read, or has no set of a name.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        said = getattr(error, "strerror", None) or error
        raise DataError(f"the gene sets in {path} cannot be read ({said}): give a GMT file.") from error
    # decoupler's reader divides at any white space, so a description of two words would become a gene.
    rows = [[field.strip() for field in line.split("\t")] for line in lines if line.strip()]
    if any(len(row) < 3 or not row[0] for row in rows) or not rows:
        raise DataError(
            f"{path} is no GMT file: lines of name, description and genes between tabulators are needed."
        )
    found = {row[0]: tuple(gene for gene in row[2:] if gene) for row in rows}
    plain = {plain_name(name): own for name, own in found.items()}
    if len(plain) < len(rows) or any("," in name for name in plain):
        raise DataError(f"{path} has two sets of one name, or a name with a comma: give other names.")
    for name in (name for name in names if plain_name(name) not in plain):
        check_choice("the gene set", name, found, error=DataError, advice=f"name a set of {path}")
    return {plain_name(name): plain[plain_name(name)] for name in names} if names else plain


def plain_name(name: str) -> str:
    """Name of a gene set as a text says it: "HALLMARK_TNFA_SIGNALING_VIA_NFKB" is "TNFA signaling via NFKB"."""
    words = name.strip().removeprefix("HALLMARK_").replace("_", " ").split()
    return " ".join(word if _is_symbol(word) else word.lower() for word in words)


def _is_symbol(word: str) -> bool:
    """Whether a word in capitals is one of genes or complexes: it has a digit, or no vowel, or is known to be one."""
    return any(c.isdigit() for c in word) or not set(word.upper()) & set("AEIOUY") or word in _SYMBOLS


def activities(counts: Any, symbols: Sequence[str], gene_sets: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """Activity of gene sets in cells: how much higher a set's genes rank in a cell than its other genes.

    The univariate linear model of decoupler on the ranks of a cell's genes: the statistic of a rank-sum test. Equal
    counts share their mean rank, so that the order of genes plays no part (decoupler's AUCell ranks them by column,
    and most counts are equal).

    Parameters
    ----------
    counts
        (N, G) raw counts of genes that were measured; only the order of a cell's genes matters.
    symbols
        Of the G genes.
    gene_sets
        Name -> symbols.

    Returns
    -------
    float64 (N, sets): t values, of the sets of which five genes or more are among the G.

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
        of_sets = {gene for own in gene_sets.values() for gene in own}
        raise DataError(
            f"of the {len(of_sets):,} genes of the gene sets {len(known & of_sets):,} are measured in these cells and "
            f"known to the model, so that fewer than two sets have {_LEAST}: give sets of human symbols or other cells."
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
    """Which sets are active, bool (N, sets): those that score so many standard deviations above the cells' mean."""
    return scores > scores.mean() + deviations * scores.std(ddof=0)


class PathwayAreas(NamedTuple):
    """Areas under curves of N cells times S pathways (appendix B.1), in [0, 1], 1 the best.

    Attributes
    ----------
    auroc_average, auprc_average
        Of the pathways of one cell, averaged over cells that have active and inactive ones; NaN where none has.
    auroc_flatten, auprc_flatten
        Of all pairs of a cell and a pathway at once.
    """

    auroc_average: float
    auroc_flatten: float
    auprc_average: float
    auprc_flatten: float


def areas(true: np.ndarray, scores: np.ndarray) -> PathwayAreas:
    """AUROC and AUPRC of scores (N, S), higher for active, with which (N, S) bool are `true`."""
    check_shape("the true table", true, ("cells", "pathways"))
    check_shape("the table of scores", scores, ((len(true), "cells"), (true.shape[1], "pathways")))
    check_finite("the table of scores", scores, "cells")
    if true.all() or not true.any():
        return PathwayAreas(*[float("nan")] * 4)
    mixed = true.any(axis=1) & ~true.all(axis=1)
    own = [float("nan")] * 2
    if mixed.any():
        # Of one cell against the rest of its pathways, as sklearn's "samples".
        own = [
            float(measure(true[mixed], scores[mixed], average="samples"))
            for measure in (roc_auc_score, average_precision_score)
        ]
    flat = true.ravel(), scores.ravel()
    return PathwayAreas(own[0], float(roc_auc_score(*flat)), own[1], float(average_precision_score(*flat)))


@dataclasses.dataclass(frozen=True, eq=False)
class PathwayCells:
    """Cells with the activity of S pathways.

    Attributes
    ----------
    counts
        (N, G) raw counts.
    active
        bool (N, S), columns the pathways.
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
        """Label cells by the scorer."""
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
        """Some of the cells."""
        picked = self.active.iloc[rows].reset_index(drop=True)
        return PathwayCells(self.counts[rows], picked, self.means[rows])


def _with_depth(cells: PathwayCells) -> float:
    """Rank correlation of how many pathways are active in a cell with its counts."""
    with metrics.quiet():
        return float(spearmanr(cells.active.sum(axis=1), np.asarray(cells.counts.sum(axis=1)).ravel())[0])


def _probabilities(kind: Any, before: np.ndarray, true: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Probability (N, S) that each pathway is active, by a classifier for each."""
    made = np.zeros((len(after), true.shape[1]))
    for number, own in enumerate(true.T):
        if own.all() or not own.any():
            made[:, number] = float(own[0])
        else:
            made[:, number] = kind().fit(before, own).predict_proba(after)[:, 1]
    return made


def logistic(train: PathwayCells, cells: PathwayCells, options: labels.LabelOptions) -> np.ndarray:
    """Scores (N, S) of logistic regression on principal components, a model for each pathway."""
    before, after = labels.components(train.counts, cells.counts, options.components)
    with metrics.quiet():
        return _probabilities(
            lambda: LogisticRegression(max_iter=1000), before, train.active.to_numpy(), after
        )


def baselines(
    train: PathwayCells, cells: PathwayCells, options: labels.LabelOptions
) -> dict[str, np.ndarray]:
    """Scores (N, S) of classifiers fitted on training cells, of the pathways' frequency there, and of the genes' means.

    The last looks at the genes from which the labels were made.
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
    """Predicted activity of pathways beside baselines fitted on training cells (ZerOmics, Table 4).

    Parameters
    ----------
    predictions
        Name -> what it was fitted on, and scores (N, S), one array for each seed.
    cells, train
        Cells to predict, and those that baselines are fitted on, with the same pathways.
    options
        See `sct.eval.labels.measures.LabelOptions`.

    Returns
    -------
    The report, and name of the row -> column of `AREAS` -> measurements.

    Raises
    ------
    ConfigError
        A prediction is called like a baseline.
    DataError
        Shapes differ.
    """
    options = options or labels.LabelOptions()
    rows: dict[str, tuple[str, Sequence[np.ndarray]]] = dict(predictions)
    for name, scores in baselines(train, cells, options).items():
        if name in rows:
            raise ConfigError(f"a prediction is called {name!r} like a baseline; give another name.")
        rows[name] = labels.TRAINING, [scores]
    true = cells.active.to_numpy()
    report = Report(
        f"Active pathways of {len(true):,} cells: {true.shape[1]}, of which a cell has {true.sum(axis=1).mean():.1f}",
        (METHOD, FITTED_ON, *AREAS),
        notes=(
            "a-: of the pathways of one cell, averaged over cells; f-: of all pairs of cell and pathway. By chance the "
            f"AUROC is 0.5 and the f-AUPRC {true.mean():.3f}.",
            "Active is what ranks high in a cell, which the mean expression of the same genes comes near to.",
            f"Spearman correlation of a cell's active pathways with its counts: {_with_depth(cells):.2f}.",
        ),
        better=dict.fromkeys(AREAS, "max"),
    )
    if empty := int((~true.any(axis=1)).sum()):
        report.notes = (*report.notes, f"{empty:,} cells have no active pathway and count in f- alone.")
    numbers: metrics.MetricDraws = {}
    for name in track(list(rows), "measuring pathways"):
        fitted_on, given = rows[name]
        measured = [areas(true, np.asarray(each, dtype=float)) for each in given]
        numbers[name] = {column: [each[i] for each in measured] for i, column in enumerate(AREAS)}
        report.add(name, fitted_on, *numbers[name].values())
    return report, numbers
