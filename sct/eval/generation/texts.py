"""Compare generated texts with true texts by embedding similarity, embedding distributions, BLEU and ROUGE."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from scipy.spatial.distance import cdist, pdist
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics.pairwise import cosine_similarity, rbf_kernel

from sct.checks import check_at_least, check_finite, check_not_empty, check_one_each
from sct.errors import ConfigError, DataError, MissingExtraError
from sct.eval import metrics
from sct.eval.reports.report import CONTROL, MODEL, Column, Report
from sct.extras import load_extra
from sct.progress import track

SHUFFLED = "{}, pairs shuffled"
DRAWN, TYPICAL = "random training texts", "most typical training text for all"
TFIDF = "TF-IDF + truncated SVD (words in common, not meaning)"
UNDEFINED, UNMEASURED = "n/a", "-"
ROUGE = ("rouge1", "rouge2", "rougeL")
PAIRED = ("cosine (own)", "cosine (others)", "t", "p (t)", "KS", "p (KS)", "Pearson", "Spearman")
DISTRIBUTIONS = ("MMD", "Wasserstein")
WORDS = ("BLEU", *ROUGE)

EmbedTexts = Callable[[Sequence[str]], np.ndarray]


def tfidf_embedding(fitted_on: Sequence[str], components: int = 100, *, seed: int = 0) -> EmbedTexts:
    """Return a text embedding by TF-IDF and truncated SVD, which needs no downloaded model.

    The embedding compares the words of texts, not their meaning: a paraphrase in other words has a distant embedding.
    Words that do not occur in `fitted_on` are ignored. To compare numbers with a paper, use the embedding of a language
    model.

    Parameters
    ----------
    fitted_on
        Texts to fit the vocabulary, the word weights and the SVD on; use the same texts for all compared methods.
    components
        Number of dimensions D; lower if there are fewer texts or words.
    seed
        Random seed for the start vector of the SVD.

    Returns
    -------
    Function that converts n texts to embeddings, float64 (n, D).

    Raises
    ------
    DataError
        `fitted_on` has fewer than two texts, or the texts have fewer than two distinct words.
    """
    words = TfidfVectorizer(sublinear_tf=True, stop_words="english")
    try:
        weights = words.fit_transform(fitted_on)
    except ValueError:
        weights = np.zeros((len(fitted_on), 0))
    if min(weights.shape) < 2:
        raise DataError(
            f"`fitted_on` has {len(fitted_on)} texts with {weights.shape[1]} distinct words, but TF-IDF "
            "needs at least two texts and two distinct words: pass more texts."
        )
    svd = TruncatedSVD(min(components, min(weights.shape) - 1), algorithm="arpack", random_state=seed)
    svd.fit(weights)
    return lambda texts: svd.transform(words.transform(texts))


class Similarity(NamedTuple):
    """Hold the similarity of generated texts to their own true text, and to the true texts of other studies.

    Attributes
    ----------
    own, others
        Mean cosine similarity of generated texts to their own true text, and to the other true texts, in [-1, 1].
    t, t_p
        Statistic and two-sided p-value of Student's t-test; t is positive if texts are closer to their own true text.
    ks, ks_p
        Statistic, in [0, 1], and two-sided p-value of the Kolmogorov-Smirnov test.
    pearson, spearman
        Mean correlation between the embedding components of a generated text and those of its own true text.
    """

    own: float
    others: float
    t: float
    t_p: float
    ks: float
    ks_p: float
    pearson: float
    spearman: float


def similarity(generated: np.ndarray, true: np.ndarray, pairs: Any) -> Similarity:
    """Test if generated texts are closer to their own true text than to other true texts.

    See Cell2Sentence, section 4.4, Table 4.

    The cosine similarities between the texts generated for study i and the true text of study j are averaged to one
    number per pair (i, j). The tests compare the numbers with i = j to those with i != j. The tests assume independent
    samples, but these numbers are only approximately independent. Therefore compare the result with that of shuffled
    pairs.

    Parameters
    ----------
    generated
        (N, D) embeddings of generated texts.
    true
        (S, D) embeddings of the true texts, one per study.
    pairs
        int (N,): for each generated text, the index of the true text of its study. A true text for which no text was
        generated is used only for the mean `others`.

    Returns
    -------
    See `Similarity`. Higher is better, except for `others` and the p-values. With a single true text, `others` and the
    tests are NaN. If texts were generated for only one true text, the tests are NaN.

    Raises
    ------
    DataError
        Shapes do not fit, `pairs` contains an invalid index, or values are not finite.
    """
    generated, true, pairs = np.asarray(generated, float), np.asarray(true, float), np.asarray(pairs)
    _check(generated, true)
    if pairs.shape != (len(generated),) or not np.issubdtype(pairs.dtype, np.integer):
        raise DataError(
            f"`pairs` has the shape {pairs.shape} and type {pairs.dtype}, but {len(generated)} integers are "
            "needed: for each generated text, pass the row number of its true text."
        )
    if pairs.min() < 0 or pairs.max() >= len(true):
        raise DataError(
            f"`pairs` has values from {pairs.min()} to {pairs.max()}, but there are {len(true)} true texts: "
            f"use row numbers of true texts, from 0 to {len(true) - 1}."
        )
    asked, numbers = np.unique(pairs, return_inverse=True)
    sums = np.zeros((len(asked), len(true)))
    np.add.at(sums, numbers, cosine_similarity(generated, true))
    means = sums / np.bincount(numbers)[:, None]
    is_own = asked[:, None] == np.arange(len(true))
    own, others = means[is_own], means[~is_own]
    t = t_p = ks = ks_p = np.nan
    with metrics.quiet():  # scipy warns about constant embeddings, whose correlation is NaN
        if len(own) > 1:
            # Assume equal variances, because only then the paper's t of 2.96 gives its p of 0.003.
            t, t_p = stats.ttest_ind(own, others)
            ks, ks_p = stats.ks_2samp(own, others)
        both = [
            (stats.pearsonr(a, b)[0], stats.spearmanr(a, b)[0])
            for a, b in _components(generated, true[pairs])
        ]
    pearson, spearman = np.mean(both, axis=0) if both else (np.nan, np.nan)
    far = others.mean() if others.size else np.nan
    return Similarity(*map(float, (own.mean(), far, t, t_p, ks, ks_p, pearson, spearman)))


def _components(generated: np.ndarray, true: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the pairs of embeddings for which a correlation is defined.

    A correlation is defined if each of the two embeddings has at least two components that are not all equal.
    """
    if generated.shape[1] < 2:
        return []
    varied = (np.ptp(generated, axis=1) > 0) & (np.ptp(true, axis=1) > 0)
    return list(zip(generated[varied], true[varied], strict=True))


def _check(generated: np.ndarray, true: np.ndarray) -> None:
    if generated.ndim != 2 or true.ndim != 2 or generated.shape[1] != true.shape[1] or not generated.size:
        raise DataError(
            f"embeddings have the shapes {generated.shape} and {true.shape}: pass matrices with the same number of "
            "columns."
        )
    check_finite("the embedding of generated texts", generated, "texts")
    check_finite("the embedding of true texts", true, "texts")


def mmd(generated: np.ndarray, true: np.ndarray) -> float:
    """Return the maximum mean discrepancy between two sets of embeddings (Cell2Sentence, section 4.4, Table 4).

    The result is the square root of the biased estimate of the squared discrepancy. This estimate is the sum of the
    mean kernel values within each set, minus twice the mean kernel value between the sets. The kernel is Gaussian,
    exp(-d^2 / (2 s^2)), and s is the median of the non-zero distances between all points.

    Parameters
    ----------
    generated, true
        (N, D) and (M, D) embeddings.

    Returns
    -------
    Value in [0, sqrt(2)], lower is better; 0 for equal sets. Two samples of the same distribution have a value above 0,
    which decreases with the sample size.
    """
    generated, true = np.asarray(generated, float), np.asarray(true, float)
    _check(generated, true)
    both = np.vstack([generated, true])
    distances = pdist(both)
    apart = distances[distances > 0]
    if not apart.size:
        return 0.0
    kernel = rbf_kernel(both, gamma=1 / (2 * np.median(apart) ** 2))
    n = len(generated)
    squared = kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()
    return float(np.sqrt(max(0.0, squared)))


def wasserstein(generated: np.ndarray, true: np.ndarray) -> float:
    """Return the Wasserstein (earth mover's) distance between two sets of embeddings, computed by POT's `emd2`.

    See Cell2Sentence, section 4.4, Table 4. All points of a set have equal weight. The cost is the Euclidean distance.

    Parameters
    ----------
    generated, true
        (N, D) and (M, D) embeddings.

    Returns
    -------
    Distance >= 0, in units of the embedding, lower is better; 0 for equal sets.

    Raises
    ------
    MissingExtraError
        POT is not installed.
    """
    generated, true = np.asarray(generated, float), np.asarray(true, float)
    _check(generated, true)
    with metrics.quiet():
        ot = load_extra("ot", "analysis", "POT")
        # POT computes distances by a matrix product; its rounding errors give equal points a non-zero distance.
        return float(ot.emd2([], [], cdist(generated, true)))


def bleu(generated: Sequence[str], true: Sequence[str]) -> float:
    """Return the corpus BLEU score of N generated texts against their N true texts, in [0, 100], higher is better.

    The library sacrebleu computes the score.

    Raises
    ------
    MissingExtraError
        sacrebleu is not installed.
    """
    _check_texts(generated, true)
    return float(load_extra("sacrebleu", "text").corpus_bleu(list(generated), [list(true)]).score)


def rouge(generated: Sequence[str], true: Sequence[str]) -> dict[str, float]:
    """Return the ROUGE-1, ROUGE-2 and ROUGE-L F-scores of N generated texts against their N true texts.

    The library rouge-score computes the scores, with stemming.

    Returns
    -------
    Dict with the keys "rouge1", "rouge2" and "rougeL": means over texts, in [0, 1], higher is better.

    Raises
    ------
    MissingExtraError
        rouge-score is not installed.
    """
    _check_texts(generated, true)
    library = load_extra("rouge_score.rouge_scorer", "text", "rouge-score")
    scorer = library.RougeScorer(list(ROUGE), use_stemmer=True)
    scores = [scorer.score(own, made) for made, own in zip(generated, true, strict=True)]
    return {name: float(np.mean([score[name].fmeasure for score in scores])) for name in ROUGE}


def _check_texts(generated: Sequence[str], true: Sequence[str]) -> None:
    check_not_empty("the list of true texts", true, error=DataError)
    check_one_each("generated texts", len(generated), "true texts", len(true))


@dataclasses.dataclass(frozen=True, eq=False)
class _Row:
    """Describe a row of the table by the texts that are compared.

    Attributes
    ----------
    texts, pairs
        For each seed, `texts` holds N texts, and `pairs` holds the indices of the true texts with which these texts are
        compared, int (N,).
    fitted_on
        Studies from which the texts were copied; "" for generated texts.
    is_control
        Whether the pairs are shuffled. If so, the row leaves out the metrics that do not depend on the pairs.
    """

    texts: list[Sequence[str]]
    pairs: list[np.ndarray]
    fitted_on: str = ""
    is_control: bool = False


def compare(
    generated: Mapping[str, Sequence[str]],
    true: Sequence[str],
    pairs: Any,
    training: Sequence[str] = (),
    *,
    embed: EmbedTexts | None = None,
    embedding: str = "a given embedding",
    seeds: int = 5,
) -> tuple[Report, metrics.MetricDraws]:
    """Compare generated texts with controls and baselines (Cell2Sentence, section 4.4, Table 4).

    The control of each set of generated texts is the same set with shuffled pairs. The control shows how similar texts
    are to the true texts if the texts do not depend on the cells. If training texts are given, two baselines are added.
    One uses random training texts. The other uses the same training text for every cell: the one that is most similar
    to all other training texts.

    Parameters
    ----------
    generated
        Dict from the name of each method to its N generated texts.
    true
        The S true texts, one per study.
    pairs
        int (N,): for each generated text, the index of the true text of its study.
    training
        Texts of the training studies; may be empty.
    embed
        Function that converts n texts to embeddings (n, D). Default: `tfidf_embedding` of the true and the training
        texts.
    embedding
        Description of `embed`, for the note below the table.
    seeds
        Number of times that pairs are shuffled and random texts are drawn, with the seeds 0, 1, ...

    Returns
    -------
    The report, and a nested dict of all numbers: {row name: {column: [values]}}. Random rows have one value per seed.
    If the library of a metric is missing, the table shows "-" and the reason in a note.

    Raises
    ------
    DataError
        Lengths differ, or there are fewer than two true texts.
    ConfigError
        `seeds` is below 1, or two rows have the same name.
    """
    check_at_least("seeds", seeds, 1)
    pairs = np.asarray(pairs)
    if len(true) < 2:
        raise DataError(
            f"there are {len(true)} true texts, but at least two are needed to compare a generated text "
            "with the texts of other studies: add true texts."
        )
    for name, texts in generated.items():
        check_one_each(f"texts of {name!r}", len(texts), "pairs", len(pairs))
    embedding = embedding if embed else TFIDF
    embed = embed or tfidf_embedding([*true, *training])
    rows = _rows(generated, pairs, list(training), embed, seeds)
    originals = np.asarray(embed(list(true)), float)
    columns = (*PAIRED, *DISTRIBUTIONS, *WORDS)
    report = Report(
        f"{len(pairs):,} generated texts for {len(np.unique(pairs))} of {len(true)} true texts",
        ("texts", Column("made_of", "made of"), *columns),
    )
    numbers: metrics.MetricDraws = {}
    reasons: dict[str, None] = {}
    for name in track(list(rows), "measuring texts"):
        row = rows[name]
        values: dict[str, list[float]] = {}
        for texts, asked in zip(row.texts, row.pairs, strict=True):
            for column, value in _measured(
                texts, asked, true, originals, embed, row.is_control, reasons
            ).items():
                values.setdefault(column, []).append(value)
        numbers[name] = values
        empty = [
            UNDEFINED if row.is_control and column in DISTRIBUTIONS else UNMEASURED for column in columns
        ]
        row_key = MODEL if name in generated else CONTROL if row.is_control else ""
        row_cells = (values.get(c, e) for c, e in zip(columns, empty, strict=True))
        report.add(name, row.fitted_on, *row_cells, key=row_key)
    report.notes = (*reasons, *_notes(embedding))
    return report, numbers


def _rows(
    generated: Mapping[str, Sequence[str]],
    pairs: np.ndarray,
    training: list[str],
    embed: EmbedTexts,
    seeds: int,
) -> dict[str, _Row]:
    """Return the rows of the table as a dict by row name."""
    rows: dict[str, _Row] = {}
    rngs = [np.random.default_rng(seed) for seed in range(seeds)]
    shuffled = [rng.permutation(pairs) for rng in rngs]
    for name, texts in generated.items():
        rows[name] = _Row([texts], [pairs])
        rows[SHUFFLED.format(name)] = _Row([texts] * seeds, shuffled, is_control=True)
    if training:
        drawn: list[Sequence[str]] = [
            [training[i] for i in rng.integers(len(training), size=len(pairs))] for rng in rngs
        ]
        rows[DRAWN] = _Row(drawn, [pairs] * seeds, "training texts")
        typical = int(cosine_similarity(embed(training)).mean(axis=1).argmax())
        rows[TYPICAL] = _Row([[training[typical]] * len(pairs)], [pairs], "training texts")
    if len(rows) < 2 * len(generated) + 2 * bool(training):
        others = {SHUFFLED.format(name) for name in generated} | ({DRAWN, TYPICAL} if training else set())
        raise ConfigError(
            f"`generated` has an entry named {next(name for name in generated if name in others)!r}, but another row "
            "of the table has this name: choose another name for this entry."
        )
    return rows


def _measured(
    texts: Sequence[str],
    pairs: np.ndarray,
    true: Sequence[str],
    originals: np.ndarray,
    embed: EmbedTexts,
    is_control: bool,
    reasons: dict[str, None],
) -> dict[str, float]:
    """Compute all metrics of one row of the table, as {column: value}. Add missing libraries to `reasons`."""
    points = np.asarray(embed(list(texts)), float)
    own = [true[i] for i in pairs]
    values = dict(zip(PAIRED, similarity(points, originals, pairs), strict=True))
    parts: list[Callable[[], dict[str, float]]] = [
        lambda: {"BLEU": bleu(texts, own)},
        lambda: rouge(texts, own),
    ]
    if not is_control:
        # Repeat each true text as often as texts were generated for it.
        parts += [
            lambda: {"MMD": mmd(points, originals[pairs])},
            lambda: {"Wasserstein": wasserstein(points, originals[pairs])},
        ]
    for part in parts:
        try:
            values |= part()
        except MissingExtraError as error:
            reasons[f"{error}."] = None
    return values


def _notes(embedding: str) -> list[str]:
    return [
        f"Embedding: {embedding}.",
        "t and KS compare the mean cosine similarity to the own true text with that to each other true text. MMD and "
        "Wasserstein compare the two sets of texts and ignore pairs.",
    ]
