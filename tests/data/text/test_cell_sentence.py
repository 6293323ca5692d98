"""Cell sentences: laws of the order and of its inverse, the paper's formulas, and numbers of real cells."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from sct.data.text import ranking
from sct.data.text.cell_sentence import (
    RankFit,
    cell_keys,
    counts_like,
    expression,
    fit_rank,
    normalize,
    quality,
    rank,
    sentences,
)
from sct.errors import DataError

tables = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=14),
    elements=st.one_of(st.just(0.0), st.sampled_from([1.0, 1.0, 2.0, 3.0]), st.integers(0, 10**6).map(float)),
)
seeds = st.integers(0, 2**63)
laws = settings(max_examples=40, deadline=None)


def csr(table) -> sp.csr_matrix:
    return sp.csr_matrix(np.asarray(table, np.float32))


def genes_of(n: int) -> list[str]:
    return [f"GENE{i}-{'A' * (i % 5)}" for i in range(n)]


def keys_of(n: int) -> np.ndarray:
    return cell_keys(f"cell {i}" for i in range(n))


def simulated(n_cells: int = 60, n_genes: int = 500, seed: int = 0) -> sp.csr_matrix:
    """Counts whose genes differ in abundance by orders of magnitude, as they do in a cell."""
    rng = np.random.default_rng(seed)
    abundance = rng.lognormal(0, 2, n_genes)
    return csr(rng.poisson(4000 * abundance / abundance.sum(), (n_cells, n_genes)))


@laws
@given(tables, seeds)
def test_a_sentence_names_each_expressed_gene_once_in_descending_order(table, seed):
    ranked = rank(csr(table), seed=seed, keys=keys_of(len(table)))
    for i, row in enumerate(table):
        columns = ranked.genes[ranked.indptr[i] : ranked.indptr[i + 1]]
        assert sorted(columns) == np.flatnonzero(row).tolist()
        assert (np.diff(row[columns]) <= 0).all()
        np.testing.assert_array_equal(ranked.counts[ranked.indptr[i] : ranked.indptr[i + 1]], row[columns])


@laws
@given(tables, seeds, st.integers(1, 6), st.randoms(use_true_random=False))
def test_a_sentence_depends_on_its_cell_alone(table, seed, top_k, random):
    names, keys = genes_of(table.shape[1]), keys_of(table.shape[0])
    whole = sentences(csr(table), names, seed=seed, keys=keys)
    cut = sentences(csr(table), names, seed=seed, keys=keys, top_k=top_k)
    assert cut == [" ".join(text.split()[:top_k]) for text in whole]

    rows = random.sample(range(len(table)), random.randint(1, len(table)))
    assert sentences(csr(table[rows]), names, seed=seed, keys=keys[rows]) == [whole[i] for i in rows]

    columns = random.sample(range(len(names)), random.randint(1, len(names)))
    kept = {names[j] for j in columns}
    expected = [" ".join(word for word in text.split() if word in kept) for text in whole]
    assert sentences(csr(table[:, columns]), [names[j] for j in columns], seed=seed, keys=keys) == expected


@laws
@given(tables, seeds)
def test_without_keys_the_order_follows_the_cells_own_counts(table, seed):
    names = genes_of(table.shape[1])
    whole = sentences(csr(table), names, seed=seed)
    assert sentences(csr(table[::-1]), names, seed=seed) == whole[::-1]
    assert sentences(csr(table[:1]), names, seed=seed) == whole[:1]


def test_blocks_do_not_show(monkeypatch):
    counts, names = simulated(), genes_of(500)
    whole = sentences(counts, names), sentences(counts, names, top_k=7)
    monkeypatch.setattr(ranking, "_BLOCK", 300)
    assert (sentences(counts, names), sentences(counts, names, top_k=7)) == whole


def test_ties_are_fair():
    n_cells, n_genes = 4000, 8
    counts = csr(np.ones((n_cells, n_genes)))
    first = rank(counts, keys=keys_of(n_cells)).genes.reshape(n_cells, n_genes)
    for place in (0, 3, 7):
        assert stats.chisquare(np.bincount(first[:, place], minlength=n_genes)).pvalue > 1e-4
    other = rank(counts, keys=keys_of(n_cells), seed=1).genes.reshape(n_cells, n_genes)
    assert 0.08 < (first == other).mean() < 0.17  # 1 / 8 by chance
    assert len(np.unique(first, axis=0)) > 3500


def test_stored_zeros_and_repeated_entries_do_not_show():
    plain = csr([[1, 0, 3], [0, 0, 0]])
    odd = sp.csr_matrix((np.float32([2, 1, 1, 0, 0]), [2, 0, 2, 1, 1], [0, 4, 5]), shape=(2, 3))
    names = ["A", "B", "C"]
    assert sentences(odd, names) == sentences(plain, names) == ["C A", ""]
    assert odd.nnz == 5
    as_integers = sp.csr_matrix(plain.toarray().astype(np.int64))
    assert sentences(as_integers, names) == ["C A", ""]


def test_keys_are_the_same_in_every_process():
    code = "from sct.data.text.cell_sentence import cell_keys; print(cell_keys(['AAAC-1', 'é', '']).tolist())"
    other = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[3],
        env={**os.environ, "PYTHONHASHSEED": "1", "PYTHONIOENCODING": "utf-8"},
    ).stdout
    assert other == f"{cell_keys(pd.Index(['AAAC-1', 'é', ''])).tolist()}\n"
    # Sentences of a run that is resumed elsewhere depend on these numbers.
    assert cell_keys(["AAAC-1"]).tolist() == [8412538666485350103]


@laws
@given(tables)
def test_normalisation_is_equation_1(table):
    totals = table.astype(np.float64).sum(axis=1, keepdims=True)
    expected = np.log10(1 + 1e4 * np.divide(table, totals, out=np.zeros(table.shape), where=totals > 0))
    result = normalize(csr(table))
    assert result.dtype == np.float32
    np.testing.assert_allclose(result.toarray(), expected, rtol=1e-6)


def test_counts_like_undoes_the_logarithm():
    counts = simulated()
    back = counts_like(normalize(counts), total=1e6).toarray()
    expected = counts.toarray() / counts.sum(axis=1) * 1e6
    np.testing.assert_allclose(back, expected, rtol=2e-5)


def test_quality_follows_the_order_that_is_documented():
    # Cell 0 has one gene and goes first; so gene 0 is left in two cells and goes; then come the counts.
    table = [[5, 0, 0, 0], [1, 9, 0, 1], [1, 2, 2, 1], [0, 3, 3, 6]]
    names = ["A", "B", "MT-C", "D"]
    cells, genes = quality(csr(table), names, min_genes=2, min_cells=3)
    assert cells.tolist() == [False, True, True, True]
    assert genes.tolist() == [False, True, False, True]
    cells, _ = quality(csr(table), names, min_genes=2, min_cells=2, max_counts=11)
    assert cells.tolist() == [False, True, True, False]
    cells, _ = quality(csr(table), names, min_genes=2, min_cells=2, max_mitochondrial=0.25)
    assert cells.tolist() == [False, True, False, True]
    with pytest.raises(DataError, match="'MT-'"):
        quality(csr(table), ["A", "B", "C", "D"], max_mitochondrial=0.2)
    with pytest.raises(DataError, match="max_mitochondrial"):
        quality(csr(table), names, max_mitochondrial=20)


@pytest.mark.parametrize("top_k", [None, 20])
def test_the_fit_is_that_of_scipy(top_k):
    counts = simulated()
    log_rank, values = [], []
    for row in normalize(counts).toarray().astype(np.float64):
        ordered = np.sort(row[row > 0])[::-1][:top_k]
        log_rank.append(np.log(np.arange(1, len(ordered) + 1)))
        values.append(ordered)
    log_rank, values = np.concatenate(log_rank), np.concatenate(values)
    line = stats.linregress(log_rank, values)
    restored = line.slope * log_rank + line.intercept
    fit = fit_rank(counts, top_k=top_k)
    assert (fit.n, fit.top_k) == (len(values), top_k)
    np.testing.assert_allclose([fit.slope, fit.intercept], [line.slope, line.intercept], rtol=1e-5)
    residual = 1 - np.square(values - restored).sum() / np.square(values - values.mean()).sum()
    np.testing.assert_allclose(fit.r2, residual, rtol=1e-5)
    np.testing.assert_allclose(fit.pearson, stats.pearsonr(values, restored).statistic, rtol=1e-5)
    # float32 of the reference makes equal counts of equal cells differ in the last bit, hence the width.
    np.testing.assert_allclose(fit.spearman, stats.spearmanr(values, restored).statistic, rtol=1e-4)


def test_cells_of_the_fit_are_chosen_by_their_keys():
    counts = simulated(80)
    keys = keys_of(80)
    fit = fit_rank(counts, keys=keys, max_cells=10)
    order = np.random.default_rng(0).permutation(80)
    again = fit_rank(counts[order], keys=keys[order], max_cells=10)
    np.testing.assert_allclose([fit.slope, fit.r2], [again.slope, again.r2], rtol=1e-9)
    assert fit.n == again.n < fit_rank(counts, keys=keys).n
    assert fit_rank(counts, keys=keys, max_cells=10, seed=1).slope != fit.slope
    assert fit_rank(counts, max_cells=10).n == fit_rank(counts[order], max_cells=10).n


def test_a_line_of_one_value_is_refused():
    with pytest.raises(DataError, match="rank"):
        fit_rank(csr(np.ones((3, 4))))
    with pytest.raises(DataError, match="rank"):
        fit_rank(csr([[1, 0], [0, 5]]))
    with pytest.raises(DataError, match="rank"):
        fit_rank(sp.csr_matrix((0, 4), dtype=np.float32))


@laws
@given(tables, seeds)
def test_sentence_to_expression_to_sentence_is_the_identity(table, seed):
    names = genes_of(table.shape[1])
    texts = sentences(csr(table), names, seed=seed)
    restored, numbers = expression(texts, names, RankFit(-0.3, 2.7, 0.9, 0.9, 0.9, 9, None))
    assert restored.dtype == np.float32
    assert ((restored.toarray() > 0) == (table > 0)).all()
    assert sentences(restored, names) == texts
    n_expressed = np.count_nonzero(table, axis=1)
    for column in ("n_words", "n_valid", "n_unique"):
        assert numbers[column].tolist() == n_expressed.tolist()
    assert numbers["unique_share"].tolist() == (n_expressed > 0).astype(float).tolist()


words = st.sampled_from(["A", "B", "C", "a", "not", "genes"])


@laws
@given(st.lists(st.lists(words, max_size=9), max_size=6))
def test_expression_is_equations_2_and_3(cells):
    names, fit = ["A", "B", "C"], RankFit(-1.1, 1.5, 0.9, 0.9, 0.9, 9, None)
    texts = [" \n".join(cell) for cell in cells]
    restored, numbers = expression(texts, names, fit)
    assert restored.shape == (len(cells), 3)
    for i, cell in enumerate(cells):
        for j, name in enumerate(names):
            ranks = [place for place, word in enumerate(cell, 1) if word == name]
            value = fit.slope * np.log(np.mean(ranks)) + fit.intercept if ranks else 0
            assert restored[i, j] == pytest.approx(max(value, 0), rel=1e-6)
        n_valid = sum(word in names for word in cell)
        n_unique = len(set(cell) & set(names))
        assert numbers.loc[i, ["n_words", "n_valid", "n_unique"]].tolist() == [len(cell), n_valid, n_unique]
        length = max(len(cell), 1)
        shares = numbers.loc[i, ["valid_share", "unique_share"]].tolist()
        assert shares == [n_valid / length, n_unique / length]
    assert (restored.data > 0).all()


def test_an_invalid_word_keeps_its_rank_position():
    fit = RankFit(-0.5, 3, 1, 1, 1, 9, None)
    restored, _ = expression(["A B xyz C A"], ["A", "B", "C"], fit)
    np.testing.assert_allclose(restored.toarray()[0], 3 - 0.5 * np.log([3, 2, 4]), rtol=1e-6)


def test_blocks_of_sentences_do_not_show_and_a_series_keeps_its_index():
    counts, names = simulated(600), genes_of(500)
    fit = fit_rank(counts)
    texts = pd.Series(sentences(counts, names), index=[f"cell {i}" for i in range(600)])
    restored, numbers = expression(texts, names, fit)
    assert numbers.index.equals(texts.index)
    one, table = expression(texts.iloc[[300]], names, fit)
    np.testing.assert_array_equal(one.toarray(), restored[300].toarray())
    assert table.iloc[0].equals(numbers.iloc[300])


def test_other_separators():
    counts, names = simulated(5), genes_of(500)
    fit = fit_rank(counts)
    expected, _ = expression(sentences(counts, names), names, fit)
    for separator in (", ", "\t"):
        texts = sentences(counts, names, separator=separator)
        assert separator in texts[0]
        restored, _ = expression(texts, names, fit, separator=separator)
        np.testing.assert_array_equal(restored.toarray(), expected.toarray())


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["A", "B C"], "'B C'"),
        (["A", ""], "''"),
        (["A", 3], r"\b3\b"),
        (["A", "A"], r"more than once \(A\)"),
        (["A"], "2 genes"),
    ],
)
def test_unusable_names_are_named(names, said):
    with pytest.raises(DataError, match=said):
        sentences(csr([[1, 2]]), names)


def test_unusable_input_is_refused():
    names = ["A", "B"]
    with pytest.raises(DataError, match="'B-C'"):
        sentences(csr([[1, 2]]), ["A", "B-C"], separator="-")
    with pytest.raises(DataError, match="NaN or infinity"):
        sentences(csr([[1, -2]]), names)
    with pytest.raises(DataError, match="NaN or infinity"):
        normalize(csr([[1, np.nan]]))
    with pytest.raises(DataError, match="CSR"):
        rank(np.ones((2, 2)))
    with pytest.raises(DataError, match="top_k"):
        sentences(csr([[1, 2]]), names, top_k=0)
    with pytest.raises(DataError, match="seed is -1"):
        sentences(csr([[1, 2]]), names, seed=-1)
    with pytest.raises(DataError, match=r"keys .*int64"):
        sentences(csr([[1, 2]]), names, keys=np.array([1]))
    with pytest.raises(DataError, match="None"):
        cell_keys(["a", None])
    with pytest.raises(DataError, match="131,072"):
        rank(sp.csr_matrix((1, 131_073), dtype=np.float32))
    fit = RankFit(-0.5, 3, 1, 1, 1, 9, None)
    for texts in ("A B", ["A", None]):
        with pytest.raises(DataError, match="sentences"):
            expression(texts, names, fit)


def test_real_cells_follow_the_line(shared_data):
    cells = ad.read_h5ad(shared_data / "single_cell" / "pbmc3k_10x.h5ad")
    names, keys = list(cells.var_names), cell_keys(cells.obs_names)
    fit = fit_rank(cells.X, keys=keys)
    # The paper has R2 above 0.81 for its immune data set.
    assert fit.slope < 0
    assert 0.85 < fit.r2 < 0.95
    assert 0.92 < fit.pearson < 0.97
    assert 0.78 < fit.spearman < 0.9
    restored, numbers = expression(sentences(cells.X, names, keys=keys), names, fit)
    assert (numbers["unique_share"] == 1).all()
    actual = normalize(cells.X)
    assert restored.nnz == actual.nnz
    assert np.corrcoef(restored.toarray().ravel(), actual.toarray().ravel())[0, 1] > 0.98
