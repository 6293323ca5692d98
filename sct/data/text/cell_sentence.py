"""Cell sentences: gene names by descending expression, and back (Cell2Sentence paper, section 3.1).

A sentence is a pure function of one cell: genes with equal counts stand in a random order that follows from
the seed, the cell's key and the gene alone, whatever other cells and genes are in the table and in whatever
order. Ranks start at 1 and logarithms of ranks are natural; expression is log10(1 + counts per 10,000).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from scipy import sparse

from sct.checks import check_one_each, check_share
from sct.data.genes.alignment import some
from sct.data.normalization import TARGET, per_count
from sct.data.text.gene_tokens import GeneTokens
from sct.data.text.ranking import Ranked, canonical, cell_keys, choose, hash_names, mix, rank, sort_rows
from sct.errors import DataError

__all__ = [
    "RankFit",
    "Ranked",
    "cell_keys",
    "counts_like",
    "expression",
    "fit_rank",
    "normalize",
    "quality",
    "rank",
    "sentences",
]

_BLOCK = 256  # sentences to split at a time: their words stay in the cache, and in bounded memory


@dataclasses.dataclass(frozen=True)
class RankFit:
    """The line expression = slope x log(rank) + intercept of one data set (section 3.1).

    Attributes
    ----------
    slope, intercept
        In log10(1 + counts per 10,000), per unit of the natural logarithm of the rank.
    r2
        Share of the variance of expression that the line explains.
    pearson, spearman
        Correlations of the line's expression with the actual one.
    n
        Pairs of rank and expression, over all cells.
    top_k
        Length at which sentences were cut, or None.
    """

    slope: float
    intercept: float
    r2: float
    pearson: float
    spearman: float
    n: int
    top_k: int | None


def normalize(counts: sparse.csr_matrix, target: float = TARGET) -> sparse.csr_matrix:
    """Normalised expression log10(1 + target x count / cell sum), float32 CSR (N, G) (equation 1).

    Empty cells stay empty.

    Raises
    ------
    DataError
        Counts are negative or not finite.
    """
    counts = canonical(counts)
    lengths = np.diff(counts.indptr)
    data = np.log10(1 + counts.data * np.repeat(per_count(counts, target, np.float64), lengths))
    return sparse.csr_matrix((data.astype(np.float32), counts.indices, counts.indptr), counts.shape)


def quality(
    counts: sparse.csr_matrix,
    names: Sequence[str],
    *,
    min_genes: int = 200,
    min_cells: int = 200,
    max_counts: float | None = None,
    max_mitochondrial: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Cells and genes to keep, as two masks, bool (N,) and bool (G,) (section 3.1).

    In this order: cells with fewer than `min_genes` expressed genes go; then genes expressed in fewer than
    `min_cells` of the cells left; then, on the genes left, cells with more than `max_counts` counts or a
    larger share of mitochondrial counts. Each step is taken once.

    Parameters
    ----------
    counts
        Raw counts (N, G).
    names
        G gene symbols; mitochondrial genes are those that start with "MT-" or "mt-".
    max_counts
        The paper has 2,500; None keeps all.
    max_mitochondrial
        Share between 0 and 1, the paper has 0.2; None keeps all.

    Raises
    ------
    DataError
        Bad counts or names, or a mitochondrial bound where no gene is mitochondrial by its name.
    """
    counts = canonical(counts)
    names = _checked_names(names, counts.shape[1])
    cells = np.diff(counts.indptr) >= min_genes
    genes = np.bincount(counts[cells].indices, minlength=counts.shape[1]) >= min_cells
    totals = counts @ genes.astype(np.float64)
    if max_counts is not None:
        cells &= totals <= max_counts
    if max_mitochondrial is not None:
        check_share("max_mitochondrial", max_mitochondrial, error=DataError, advice="give e.g. 0.2")
        mitochondrial = np.array([name[:3].upper() == "MT-" for name in names])
        if not mitochondrial.any():
            raise DataError(
                f"no gene name starts with 'MT-' ({some(names)}) but max_mitochondrial needs mitochondrial "
                f"genes; give gene symbols or max_mitochondrial=None"
            )
        cells &= counts @ (mitochondrial & genes).astype(np.float64) <= max_mitochondrial * totals
    return cells, genes


def sentences(
    counts: sparse.csr_matrix,
    names: Sequence[str],
    *,
    top_k: int | None = None,
    seed: int = 0,
    keys: np.ndarray | None = None,
    separator: str = " ",
) -> list[str]:
    """Cell sentences: the names of each cell's expressed genes in descending order of expression.

    An empty cell has an empty sentence. A sentence does not depend on the other cells, and the order of two
    genes in it does not depend on the other genes or on the order of the columns.

    Parameters
    ----------
    counts, top_k, seed, keys
        See `rank`.
    names
        G gene names, each once and without white space.
    separator
        What stands between words.

    Raises
    ------
    DataError
        Bad counts, or a gene name that occurs twice, is empty, or holds white space or the separator.
    """
    words = np.empty(counts.shape[1], object)
    words[:] = _checked_names(names, counts.shape[1], separator)
    gene_keys = mix(hash_names(words.tolist(), "the name of gene"))
    indptr, genes, _ = rank(counts, top_k=top_k, seed=seed, keys=keys, gene_keys=gene_keys)
    return [separator.join(words[genes[a:b]].tolist()) for a, b in itertools.pairwise(indptr.tolist())]


def fit_rank(
    counts: sparse.csr_matrix,
    *,
    seed: int = 0,
    keys: np.ndarray | None = None,
    max_cells: int | None = 5000,
    top_k: int | None = None,
) -> RankFit:
    """Fit normalised expression to the natural logarithm of the rank, over all cells (section 3.1).

    Parameters
    ----------
    counts
        Raw counts (N, G).
    seed, keys
        Choose the cells of a larger table, and the order of ties (which changes no pair); see `rank`.
    max_cells
        Cells to use at most, chosen by their keys; None for all.
    top_k
        Use these ranks alone, for sentences that are cut at this length.

    Raises
    ------
    DataError
        Bad counts, or fewer than two different ranks or values of expression.
    """
    counts = canonical(counts)
    if max_cells is not None and counts.shape[0] > max_cells:
        chosen = choose(counts, max_cells, seed=seed, keys=keys)
        counts, keys = counts[chosen], None if keys is None else keys[chosen]
    ranked = rank(counts, top_k=top_k, seed=seed, keys=keys)
    lengths = np.diff(ranked.indptr)
    n = len(ranked.genes)
    position = np.arange(1, n + 1) - np.repeat(ranked.indptr[:-1], lengths)
    # Genes of one count of a cell form a run: values, and their ranks, are computed once for each.
    factors = np.repeat(per_count(counts, dtype=np.float64), lengths)
    starts = np.flatnonzero((position == 1) | (np.diff(ranked.counts, prepend=0) != 0))
    weight = np.diff(starts, append=n)
    values = np.log10(1 + ranked.counts[starts] * factors[starts])
    if lengths.max(initial=0) < 2 or not np.ptp(values):
        raise DataError(
            f"the {n:,} pairs of rank and expression have one rank or one value only, but a line needs two of "
            f"each; give cells with more genes"
        )
    _, which = np.unique(values, return_inverse=True)
    value_rank = _mean_ranks(np.bincount(which, weight))[which]
    log_rank = np.log(np.arange(1, lengths.max() + 1))[position - 1]
    covariance = np.cov(log_rank, np.repeat(values, weight))
    slope = covariance[0, 1] / covariance[0, 0]
    intercept = np.average(values, weights=weight) - slope * log_rank.mean()
    pearson = abs(covariance[0, 1]) / np.sqrt(covariance[0, 0] * covariance[1, 1])
    rank_rank = _mean_ranks(np.bincount(position - 1))[position - 1]
    spearman = np.sign(slope) * np.corrcoef(rank_rank, np.repeat(value_rank, weight))[0, 1]
    slope, intercept, r2 = float(slope), float(intercept), float(pearson) ** 2
    return RankFit(slope, intercept, r2, float(pearson), float(spearman), n, top_k)


def expression(
    sentences: Iterable[str], names: Sequence[str], fit: RankFit, *, separator: str = " "
) -> tuple[sparse.csr_matrix, pd.DataFrame]:
    """Turn sentences back into expression (equations 2 and 3, appendix D).

    Words that are no gene are ignored, but the genes after them keep their position as their rank. A gene
    that occurs several times has the mean of its ranks; one that does not occur has expression zero. The line
    of the fit falls below zero at high ranks: such values are zero too, because expression is not negative.

    Parameters
    ----------
    sentences
        N texts; the index of a pandas Series goes to the table.
    names
        G gene names, the columns of the result; upper and lower case differ.
    fit
        Line of the data set that is imitated.
    separator
        What stands between words; white space stands for any white space.

    Returns
    -------
    tuple
        float32 CSR (N, G) in log10(1 + counts per 10,000), and a table of the cells with `n_words`,
        `n_valid` (words that are genes, with repetition), `n_unique` (different genes), and as shares of
        n_words `valid_share` and `unique_share` (0 for an empty sentence), as in the paper's table 11.

    Raises
    ------
    DataError
        A sentence is not text, or a gene name is unusable (see `sentences`).
    """
    index = sentences.index if isinstance(sentences, pd.Series) else None
    texts = list(sentences)
    if isinstance(sentences, str) or not all(isinstance(text, str) for text in texts):
        raise DataError("the sentences are not a list of texts; give one text per cell")
    names = _checked_names(names, len(names), separator)
    words = GeneTokens(names)
    blocks = [
        _restore(texts[start : start + _BLOCK], words, fit, separator)
        for start in range(0, max(len(texts), 1), _BLOCK)
    ]
    matrix = sparse.vstack([block for block, _ in blocks], format="csr")
    numbers = np.concatenate([numbers for _, numbers in blocks], axis=1)
    table = pd.DataFrame(dict(zip(("n_words", "n_valid", "n_unique"), numbers, strict=True)), index=index)
    for share, number in (("valid_share", "n_valid"), ("unique_share", "n_unique")):
        table[share] = table[number] / np.maximum(table["n_words"], 1)
    return matrix, table


def _restore(
    texts: list[str], names: GeneTokens, fit: RankFit, separator: str
) -> tuple[sparse.csr_matrix, np.ndarray]:
    """Expression of some sentences, and n_words, n_valid and n_unique of each, int64 (3, n)."""
    if separator.isspace() or not separator:
        n_words, gene = names.find(texts)
    else:
        n_words, gene = names.look_up(
            [[word for part in text.split(separator) if (word := part.strip())] for text in texts]
        )
    ends = np.cumsum(n_words)
    position = np.arange(1, len(gene) + 1) - np.repeat(ends - n_words, n_words)
    # Gene and position in one number, which sorts several times faster than by two keys.
    bits = int(n_words.max(initial=0)).bit_length()
    kind = np.uint32 if bits + len(names.places).bit_length() <= 32 else np.uint64
    known = gene >= 0
    entry = (gene[known] << bits | position[known]).astype(kind)
    rows = np.repeat(np.arange(len(texts)), n_words)[known]
    n_valid = np.bincount(rows, minlength=len(texts)).astype(np.int64)
    sort_rows(entry, np.concatenate([[0], np.cumsum(n_valid)]))
    position = (entry & kind((1 << bits) - 1)).astype(np.int64)
    entry >>= kind(bits)
    starts = np.flatnonzero((np.diff(entry, prepend=entry[:1]) != 0) | (np.diff(rows, prepend=-1) != 0))
    times = np.diff(starts, append=len(entry))
    mean_rank = np.add.reduceat(position, starts) / times if starts.size else np.zeros(0)
    values = np.maximum(fit.slope * np.log(mean_rank) + fit.intercept, 0).astype(np.float32)
    n_unique = np.bincount(rows[starts], minlength=len(texts))
    indptr = np.concatenate([[0], np.cumsum(n_unique)])
    matrix = sparse.csr_matrix(
        (values, entry[starts].astype(np.int32), indptr), (len(texts), len(names.places))
    )
    matrix.eliminate_zeros()
    return matrix, np.stack([n_words, n_valid, n_unique])


def counts_like(expression: sparse.csr_matrix, total: float = TARGET) -> sparse.csr_matrix:
    """Undo the logarithm: (10 ** expression - 1) x total / 10,000, CSR (N, G).

    The result is in counts per `total`, not integer; a cell made of a sentence sums to `total` only as well
    as the line of the fit holds.
    """
    result = expression.copy()
    result.data = ((10.0**result.data - 1) * (total / TARGET)).astype(expression.dtype)
    return result


def _mean_ranks(times: np.ndarray) -> np.ndarray:
    """Mean rank, from 1, of each of some ascending values that occur `times` times."""
    return np.cumsum(times) - (times - 1) / 2


def _checked_names(names: Iterable[str], n: int, separator: str = " ") -> list[str]:
    names = list(names)
    check_one_each("gene names", len(names), "genes", n)

    def is_word(name: object) -> bool:
        whole = isinstance(name, str) and name.split() == [name]
        return whole and not (separator and separator in str(name))

    wrong = [name for name in names if not is_word(name)]
    if wrong:
        raise DataError(
            f"the gene name {wrong[0]!r} is not one word, but words of a sentence are split at "
            f"{separator!r} and white space; rename it"
        )
    repeated = pd.Index(names, dtype=object)
    repeated = repeated[repeated.duplicated()].unique()
    if len(repeated):
        raise DataError(
            f"{len(repeated)} gene names occur more than once ({some(list(repeated))}) but a word must mean "
            f"one gene; make them unique or add these genes up"
        )
    return names
