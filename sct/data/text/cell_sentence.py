"""Convert cells to cell sentences and back (Cell2Sentence paper, section 3.1).

A cell sentence lists the names of the expressed genes in descending order of expression. Genes with equal counts are in
a random order. The seed, the key of the cell and the genes determine this order. A cell sentence does not depend on
other cells or on the order of cells and genes in the table. Ranks start at 1, and logarithms of ranks are natural
logarithms. Expression is log10(1 + counts per 10,000).
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

_BLOCK = 256  # sentences to split at a time, so that their words fit into the CPU cache


@dataclasses.dataclass(frozen=True)
class RankFit:
    """Store the line that was fitted to a data set: expression = slope x ln(rank) + intercept (section 3.1).

    Expression is log10(1 + counts per 10,000).

    Attributes
    ----------
    slope
        Change of the expression when ln(rank) increases by 1.
    intercept
        Expression at rank 1.
    r2
        Fraction of the variance of expression that the line explains.
    pearson, spearman
        Correlations between the fitted and the measured expression.
    n
        Number of pairs of rank and expression, over all cells.
    top_k
        Maximal rank that was used for the fit, or None for all ranks.
    """

    slope: float
    intercept: float
    r2: float
    pearson: float
    spearman: float
    n: int
    top_k: int | None


def normalize(counts: sparse.csr_matrix, target: float = TARGET) -> sparse.csr_matrix:
    """Return the normalized expression log10(1 + target x count / total count of the cell) (equation 1).

    Cells without counts stay empty.

    Parameters
    ----------
    counts
        Raw counts (N, G).
    target
        Total count of each cell after normalization.

    Returns
    -------
    float32 CSR (N, G).

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
    """Return masks of the cells and genes that pass quality control (Cell2Sentence paper, section 3.1).

    There are three filters, applied once in this order:

    1. Remove cells with fewer than `min_genes` expressed genes.
    2. Remove genes that are expressed in fewer than `min_cells` of the remaining cells.
    3. Remove cells with more than `max_counts` counts, and cells whose fraction of mitochondrial counts is above
       `max_mitochondrial`. Both numbers are computed from the remaining genes.

    Parameters
    ----------
    counts
        Raw counts (N, G).
    names
        G gene symbols. Symbols of mitochondrial genes start with "MT-" or "mt-".
    min_genes
        Minimal number of expressed genes per cell.
    min_cells
        Minimal number of cells per gene.
    max_counts
        Maximal total count of a cell. The paper uses 2,500; None disables the filter.
    max_mitochondrial
        Maximal fraction of mitochondrial counts, between 0 and 1. The paper uses 0.2; None disables the filter.

    Returns
    -------
    Two masks: the cells to keep, bool (N,), and the genes to keep, bool (G,).

    Raises
    ------
    DataError
        The counts or names are invalid, or `max_mitochondrial` is given but no gene name starts with "MT-".
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
                f"no gene name starts with 'MT-' (the names are {some(names)}), but max_mitochondrial needs "
                "mitochondrial genes: give gene symbols, or set max_mitochondrial=None."
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
    """Return the cell sentences: the names of each cell's expressed genes in descending order of expression.

    The sentence of an empty cell is empty. A sentence does not depend on the other cells. The order of two genes in a
    sentence does not depend on the other genes or on the order of the columns.

    Parameters
    ----------
    counts, top_k, seed, keys
        See `rank`.
    names
        G unique gene names without white space.
    separator
        Text between two gene names.

    Returns
    -------
    N sentences.

    Raises
    ------
    DataError
        The counts are invalid, or a gene name is repeated, empty, or contains white space or the separator.
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
    """Fit normalized expression as a linear function of log(rank), over all cells (Cell2Sentence paper, 3.1).

    Parameters
    ----------
    counts
        Raw counts (N, G).
    seed, keys
        Seed and cell keys; see `rank`. If there are more than `max_cells` cells, the seed and the keys determine which
        cells are sampled.
    max_cells
        Maximal number of cells to use; None for all.
    top_k
        Use only the first `top_k` ranks, for sentences of at most `top_k` genes.

    Returns
    -------
    The fitted line and its quality.

    Raises
    ------
    DataError
        The counts are invalid, or there are fewer than two different ranks or expression values.
    """
    counts = canonical(counts)
    if max_cells is not None and counts.shape[0] > max_cells:
        chosen = choose(counts, max_cells, seed=seed, keys=keys)
        counts, keys = counts[chosen], None if keys is None else keys[chosen]
    ranked = rank(counts, top_k=top_k, seed=seed, keys=keys)
    lengths = np.diff(ranked.indptr)
    n = len(ranked.genes)
    position = np.arange(1, n + 1) - np.repeat(ranked.indptr[:-1], lengths)
    # Genes of a cell with equal counts form a run. Values and their ranks are computed once per run.
    factors = np.repeat(per_count(counts, dtype=np.float64), lengths)
    starts = np.flatnonzero((position == 1) | (np.diff(ranked.counts, prepend=0) != 0))
    weight = np.diff(starts, append=n)
    values = np.log10(1 + ranked.counts[starts] * factors[starts])
    if lengths.max(initial=0) < 2:
        raise DataError(
            f"none of the {len(lengths):,} cells has more than one ranked gene, but fitting a line needs at least two "
            "ranks: give cells with more expressed genes, or increase top_k."
        )
    if not np.ptp(values):
        raise DataError(
            f"the {n:,} ranked genes all have the same expression, but fitting a line needs at least two different "
            "values: give cells with more expressed genes."
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
    """Convert cell sentences to expression (equations 2 and 3, appendix D).

    The rank of a gene is its position in the sentence. Unknown words are ignored, but the words after them keep their
    rank. A gene that occurs several times gets the mean of its ranks. A gene that does not occur gets expression 0. At
    high ranks, the fitted line can be negative. Negative expression is set to 0.

    Parameters
    ----------
    sentences
        N sentences. The index of a pandas Series becomes the index of the table.
    names
        G gene names, which become the columns of the result. Upper and lower case matter.
    fit
        Fitted line of the data set, from `fit_rank`.
    separator
        Text between two gene names. A white space separator matches any white space.

    Returns
    -------
    tuple
        Expression, float32 CSR (N, G), as log10(1 + counts per 10,000), and a table with one row per cell:
        `n_words`, `n_valid` (words that are gene names, including repetitions), `n_unique` (different genes),
        `valid_share` (n_valid / n_words) and `unique_share` (n_unique / n_words), as in the paper's table 11. The
        shares of an empty sentence are 0.

    Raises
    ------
    DataError
        A sentence is not a string, or a gene name is invalid (see `sentences`).
    """
    index = sentences.index if isinstance(sentences, pd.Series) else None
    texts = list(sentences)
    if isinstance(sentences, str) or not all(isinstance(text, str) for text in texts):
        raise DataError("sentences must be a list of strings: give one string per cell.")
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
    """Convert n sentences to expression, and count words.

    Return two arrays: the expression, float32 CSR (n, G), and the counts n_words, n_valid and n_unique, int64 (3, n).
    """
    if separator.isspace() or not separator:
        n_words, gene = names.find(texts)
    else:
        n_words, gene = names.look_up(
            [[word for part in text.split(separator) if (word := part.strip())] for text in texts]
        )
    ends = np.cumsum(n_words)
    position = np.arange(1, len(gene) + 1) - np.repeat(ends - n_words, n_words)
    # Pack gene and position into one number: sorting it is several times faster than sorting by two keys.
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
    """Convert log expression to counts: (10 ** expression - 1) x total / 10,000, CSR (N, G).

    The result is not rounded to integers. If the expression comes from a sentence, the counts of a cell sum to `total`
    only approximately, because the fitted line is approximate.

    Parameters
    ----------
    expression
        CSR (N, G), as log10(1 + counts per 10,000).
    total
        Total count of a cell.
    """
    result = expression.copy()
    result.data = ((10.0**result.data - 1) * (total / TARGET)).astype(expression.dtype)
    return result


def _mean_ranks(times: np.ndarray) -> np.ndarray:
    """Return the mean rank of each distinct value, in rank order. `times` says how often each value occurs."""
    return np.cumsum(times) - (times - 1) / 2


def _checked_names(names: Iterable[str], n: int, separator: str = " ") -> list[str]:
    """Return n gene names as a list; raise `DataError` unless each is a unique single word."""
    names = list(names)
    check_one_each("gene names", len(names), "genes", n)

    def is_word(name: object) -> bool:
        whole = isinstance(name, str) and name.split() == [name]
        return whole and not (separator and separator in str(name))

    wrong = [name for name in names if not is_word(name)]
    if wrong:
        raise DataError(
            f"the gene name {wrong[0]!r} must be a string without white space and without the separator {separator!r}: "
            "rename the gene."
        )
    repeated = pd.Index(names, dtype=object)
    repeated = repeated[repeated.duplicated()].unique()
    if len(repeated):
        raise DataError(
            f"{len(repeated)} gene names occur more than once ({some(list(repeated))}), but they must be unique: "
            "rename these genes, or sum their counts."
        )
    return names
