"""Generated texts beside the true ones: similarity of embeddings, their distributions, BLEU and ROUGE."""

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
from sct.eval.reports.report import Column, Report
from sct.extras import load_extra
from sct.progress import track

SHUFFLED = "{}, pairs shuffled"
DRAWN, TYPICAL = "training texts drawn by chance", "most typical training text for all"
TFIDF = "TF-IDF + truncated SVD (words in common, not meaning)"
UNDEFINED, UNMEASURED = "n/a", "-"
ROUGE = ("rouge1", "rouge2", "rougeL")
PAIRED = ("cosine (own)", "cosine (others)", "t", "p (t)", "KS", "p (KS)", "Pearson", "Spearman")
DISTRIBUTIONS = ("MMD", "Wasserstein")
WORDS = ("BLEU", *ROUGE)

EmbedTexts = Callable[[Sequence[str]], np.ndarray]


def tfidf_embedding(fitted_on: Sequence[str], components: int = 100, *, seed: int = 0) -> EmbedTexts:
    """Embedding of texts by their words, which needs no download: TF-IDF and a truncated SVD.

    It knows which words texts share, not what they mean: a paraphrase in other words is far away, and a word that no
    text of `fitted_on` has does not count. For numbers beside those of a paper give the embedding of a
    language model.

    Parameters
    ----------
    fitted_on
        Texts that give the words, their weights and the components; the same for all that is compared.
    components
        Dimensions, fewer where there are fewer texts or words.
    seed
        Start vector of the decomposition.

    Returns
    -------
    A function of n texts that gives (n, D) float64.

    Raises
    ------
    DataError
        There are fewer than two texts, or no words in them.
    """
    words = TfidfVectorizer(sublinear_tf=True, stop_words="english")
    try:
        weights = words.fit_transform(fitted_on)
    except ValueError:
        weights = np.zeros((len(fitted_on), 0))
    if min(weights.shape) < 2:
        raise DataError(
            f"an embedding was asked for of {len(fitted_on)} texts with {weights.shape[1]} words; "
            "give two texts or more with words in them."
        )
    svd = TruncatedSVD(min(components, min(weights.shape) - 1), algorithm="arpack", random_state=seed)
    svd.fit(weights)
    return lambda texts: svd.transform(words.transform(texts))


class Similarity(NamedTuple):
    """Similarity of generated texts to their own true text, beside that to the others.

    Attributes
    ----------
    own, others
        Mean cosine similarity, in [-1, 1].
    t, t_p
        Statistic and two-sided p of Student's t test, positive where a text is nearer to its own.
    ks, ks_p
        Statistic, in [0, 1], and two-sided p of the Kolmogorov-Smirnov test.
    pearson, spearman
        Mean correlation between the components of a generated text's embedding and those of its own.
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
    """Whether generated texts are nearer to their own true text than to others (Cell2Sentence, section 4.4, Table 4).

    The cosine similarities of the texts generated for study i with the text of study j are averaged to one number for
    each (i, j). The tests compare those of i = j with those of i != j, as samples that are independent, which
    they are not quite: shuffled pairs say what a value means.

    Parameters
    ----------
    generated
        (N, D) embeddings of generated texts.
    true
        (S, D) embeddings of the true texts, one for each study.
    pairs
        (N,) row of `true` that each text was generated for; those of which nothing was generated are only "others".

    Returns
    -------
    See `Similarity`. Higher is better, but for `others` and p. The tests and `others` are NaN with one true text, the
    tests with texts generated for one.

    Raises
    ------
    DataError
        Shapes do not fit, a pair is none of the true texts, or values are not finite.
    """
    generated, true, pairs = np.asarray(generated, float), np.asarray(true, float), np.asarray(pairs)
    _check(generated, true)
    if pairs.shape != (len(generated),) or not np.issubdtype(pairs.dtype, np.integer):
        raise DataError(
            f"pairs have the shape {pairs.shape} and type {pairs.dtype}; one row number is needed for each text."
        )
    if pairs.min() < 0 or pairs.max() >= len(true):
        raise DataError(
            f"pairs run from {pairs.min()} to {pairs.max()} for {len(true)} true texts; count from 0."
        )
    asked, numbers = np.unique(pairs, return_inverse=True)
    sums = np.zeros((len(asked), len(true)))
    np.add.at(sums, numbers, cosine_similarity(generated, true))
    means = sums / np.bincount(numbers)[:, None]
    is_own = asked[:, None] == np.arange(len(true))
    own, others = means[is_own], means[~is_own]
    t = t_p = ks = ks_p = np.nan
    with metrics.quiet():  # a constant embedding has no correlation
        if len(own) > 1:
            # With equal variances: the paper's p of 0.003 follows from its t of 2.96 in that way only.
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
    """Pairs of embeddings that can be correlated: two components or more, which differ."""
    if generated.shape[1] < 2:
        return []
    varied = (np.ptp(generated, axis=1) > 0) & (np.ptp(true, axis=1) > 0)
    return list(zip(generated[varied], true[varied], strict=True))


def _check(generated: np.ndarray, true: np.ndarray) -> None:
    if generated.ndim != 2 or true.ndim != 2 or generated.shape[1] != true.shape[1] or not generated.size:
        raise DataError(
            f"embeddings have the shapes {generated.shape} and {true.shape}; matrices with the same number of columns "
            "are needed."
        )
    check_finite("the embedding of generated texts", generated, "texts")
    check_finite("the embedding of true texts", true, "texts")


def mmd(generated: np.ndarray, true: np.ndarray) -> float:
    """Maximum mean discrepancy of two sets of embeddings (Cell2Sentence, section 4.4, Table 4).

    The root of the biased estimate (the mean kernel within the sets minus twice that across), with the Gaussian
    kernel exp(-d^2 / 2 s^2) and s the median distance between different points of both sets.

    Parameters
    ----------
    generated, true
        (N, D) and (M, D).

    Returns
    -------
    A number in [0, sqrt(2)], lower is better; 0 for equal sets. That of two samples of one distribution is
    above 0 and shrinks with their size.
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
    """Wasserstein (earth mover's) distance of two sets of embeddings (Cell2Sentence, section 4.4, Table 4).

    Parameters
    ----------
    generated, true
        (N, D) and (M, D); all points of a set have equal weight, the cost is the Euclidean distance (POT's
        `emd2`).

    Returns
    -------
    A number from 0 up, in units of the embedding, lower is better; 0 for equal sets.

    Raises
    ------
    MissingExtraError
        POT is not installed.
    """
    generated, true = np.asarray(generated, float), np.asarray(true, float)
    _check(generated, true)
    with metrics.quiet():
        ot = load_extra("ot", "analysis", "POT")
        # POT's own distances come from a matrix product, whose rounding keeps equal points apart.
        return float(ot.emd2([], [], cdist(generated, true)))


def bleu(generated: Sequence[str], true: Sequence[str]) -> float:
    """BLEU of generated texts (N) against their own true texts (N), by sacrebleu, in [0, 100], higher is better.

    Raises
    ------
    MissingExtraError
        sacrebleu is not installed.
    """
    _check_texts(generated, true)
    return float(load_extra("sacrebleu", "text").corpus_bleu(list(generated), [list(true)]).score)


def rouge(generated: Sequence[str], true: Sequence[str]) -> dict[str, float]:
    """F of ROUGE-1, -2 and -L of generated texts (N) against their own true texts (N), by rouge-score with stems.

    Returns
    -------
    "rouge1", "rouge2" and "rougeL" -> mean over texts, in [0, 1], higher is better.

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
    """Texts of a row, one set for each seed, and the true text of each."""

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
    """Generated texts beside controls (Cell2Sentence, section 4.4, Table 4).

    Below each set of generated texts stands the same with pairs shuffled: what the similarity of texts is that do
    not know their cell. With training texts follow such texts drawn by chance, and the one that is most like all
    others, given for every cell.

    Parameters
    ----------
    generated
        Name -> N generated texts.
    true
        The S true texts, one for each study.
    pairs
        (N,) row of `true` that each text was generated for.
    training
        Texts of training studies, or none.
    embed
        n texts -> (n, D); by default `tfidf_embedding` of the true and the training texts.
    embedding
        What `embed` is, for the note.
    seeds
        Shuffles and draws: 0, 1, ...

    Returns
    -------
    The report, and name of the row -> column -> measurements: one of a set of texts, one for each seed of what is
    drawn. A measure whose library is missing is shown as "-", with the reason in a note.

    Raises
    ------
    DataError
        Lengths differ, or there are fewer than two true texts.
    ConfigError
        `seeds` is below 1, or two rows have one name.
    """
    check_at_least("seeds", seeds, 1)
    pairs = np.asarray(pairs)
    if len(true) < 2:
        raise DataError(
            f"there are {len(true)} true texts; two or more are needed to tell one's own from others."
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
        report.add(name, row.fitted_on, *(values.get(c, e) for c, e in zip(columns, empty, strict=True)))
    report.notes = (*reasons, *_notes(embedding))
    return report, numbers


def _rows(
    generated: Mapping[str, Sequence[str]],
    pairs: np.ndarray,
    training: list[str],
    embed: EmbedTexts,
    seeds: int,
) -> dict[str, _Row]:
    """Rows of the table by name."""
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
        raise ConfigError("two rows of the table have one name; give the generated texts other names.")
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
    """Every measure by column; what no library is there for goes into `reasons`."""
    points = np.asarray(embed(list(texts)), float)
    own = [true[i] for i in pairs]
    values = dict(zip(PAIRED, similarity(points, originals, pairs), strict=True))
    parts: list[Callable[[], dict[str, float]]] = [
        lambda: {"BLEU": bleu(texts, own)},
        lambda: rouge(texts, own),
    ]
    if not is_control:
        # Each true text has the weight of what was generated for it.
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
        "t and KS compare the mean cosine similarity to the own text with that to each other one; MMD and Wasserstein "
        "do not look at pairs.",
    ]
