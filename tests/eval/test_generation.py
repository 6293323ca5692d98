"""Generated cells: laws of the measures, and reports whose controls are where they have to be."""

from __future__ import annotations

import dataclasses
import sys
from importlib.util import find_spec

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from sklearn.neighbors import KNeighborsClassifier

from sct.errors import ConfigError, DataError, MissingExtraError
from sct.eval.generation import cells as generation
from sct.eval.generation import measures as generated
from sct.eval.generation import perturbation
from sct.eval.generation.cells import GenerationOptions
from sct.eval.generation.measures import CellSet


def needs(module: str, extra: str):
    return pytest.mark.skipif(
        find_spec(module) is None, reason=f'needs {module}: pip install "sct-jax[{extra}]"'
    )


needs_rapidfuzz, needs_pot, needs_scanpy = (
    needs("rapidfuzz", "text"),
    needs("ot", "analysis"),
    needs("scanpy", "analysis"),
)
laws = settings(max_examples=40, deadline=None)
GENES = np.array([f"G{i}" for i in range(40)])


def counts(labels: np.ndarray, seed: int) -> sparse.csr_matrix:
    """Raw counts (n, 40) of types a, b, c, each with ten genes of its own."""
    rates = np.full((3, len(GENES)), 0.6)
    for i in range(3):
        rates[i, 10 * i : 10 * i + 10] = 6
    kinds = np.searchsorted(["a", "b", "c"], labels.astype(str))
    return sparse.csr_matrix(np.random.default_rng(seed).poisson(rates[kinds]).astype(np.float32))


def sentences(expression: np.ndarray, top: int = 12) -> list[str]:
    dense = expression.toarray() if sparse.issparse(expression) else expression
    return [" ".join(GENES[np.argsort(-row, kind="stable")[:top]]) for row in dense]


def express(matrix: sparse.csr_matrix):
    expression, _ = generation.log_normalized(matrix)
    return expression, sentences(expression)


def cells(n: int = 60, seed: int = 0) -> CellSet:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.array(["a", "b", "c"], object), n // 3))
    expression, words = express(counts(labels, seed))
    return CellSet(expression, labels, words)


def rows(report) -> dict[str, dict]:
    return {row[0]: dict(zip(report.titles, row, strict=True)) for row in report.rows}


# Levenshtein distances


def slow_distance(first: list[str], second: list[str]) -> int:
    """By the recurrence itself."""
    line = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        above, line = line, [i]
        for j, b in enumerate(second, 1):
            line.append(min(above[j] + 1, line[-1] + 1, above[j - 1] + (a != b)))
    return line[-1]


words = st.lists(st.sampled_from(["CD3E", "CD3D", "B2M", "é", "MALAT1"]), max_size=7)


@needs_rapidfuzz
@laws
@given(st.lists(words, min_size=1, max_size=4), st.lists(words, min_size=1, max_size=4))
def test_distances_count_genes_not_characters(first, second):
    found = generated.token_distances(*([" ".join(each) for each in side] for side in (first, second)))
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, [[slow_distance(a, b) for b in second] for a in first])


@needs_rapidfuzz
def test_more_genes_than_characters_before_the_gap_of_surrogates():
    names = [f"G{i}" for i in range(60_000)]
    found = generated.token_distances([" ".join(names)], [" ".join(names[1:]), " ".join(names), ""])
    np.testing.assert_array_equal(found, [[1, 0, 60_000]])


def test_without_rapidfuzz_an_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidfuzz", None)
    with pytest.raises(MissingExtraError, match=r'pip install "sct-jax\[text\]"'):
        generated.token_distances(["A"], ["A"])


# Nearest neighbours


@laws
@given(st.integers(0, 10_000), st.integers(1, 9))
def test_neighbours_vote_as_in_scikit_learn_where_votes_do_not_tie(seed, k):
    rng = np.random.default_rng(seed)
    real, made = rng.normal(size=(30, 3)), rng.normal(size=(20, 3))
    labels, asked = rng.choice(["x", "y"], 30), rng.choice(["x", "y"], 20)
    asked = np.where(np.isin(asked, labels), asked, labels[0])
    k = 2 * k - 1  # two labels cannot tie
    found = generated.nearest_label_accuracy(generated.expression_distances(made, real), labels, asked, [k])
    assert found == {k: KNeighborsClassifier(k).fit(real, labels).score(made, asked)}


def test_the_nearest_cell_decides_among_labels_that_tie():
    labels = np.array(["b", "a", "a", "b"])
    distances = np.array([[1.0, 2.0, 3.0, 4.0], [4.0, 1.0, 3.0, 2.0]])
    found = generated.nearest_label_accuracy(distances, labels, ["b", "a"], [2, 4, 99])
    assert (found[2], found[4]) == (1.0, 1.0)
    assert np.isnan(found[99])  # there are not as many cells
    assert generated.nearest_label_accuracy(distances, labels, ["a", "b"], [4]) == {4: 0.0}


@laws
@given(st.integers(0, 10_000))
def test_neither_the_order_of_cells_nor_the_names_of_labels_matter(seed):
    rng = np.random.default_rng(seed)
    real, made = rng.normal(size=(24, 2)), rng.normal(size=(15, 2))
    labels, asked = rng.permutation(np.repeat(["x", "y", "z"], 8)), rng.choice(["x", "y", "z"], 15)
    found = generated.nearest_label_accuracy(generated.expression_distances(made, real), labels, asked)
    first, second = rng.permutation(24), rng.permutation(15)
    names = {"x": "q", "y": "p", "z": "o"}
    again = generated.nearest_label_accuracy(
        generated.expression_distances(made[second], real[first]),
        [names[each] for each in labels[first]],
        [names[each] for each in asked[second]],
    )
    assert found == again


def test_cells_of_their_own_type_are_told_and_others_are_not():
    real, made = cells(seed=0), cells(seed=1)
    distances = generated.expression_distances(made.expression, real.expression)
    assert min(generated.nearest_label_accuracy(distances, real.labels, made.labels).values()) == 1
    wrong = np.roll(np.array(["a", "b", "c"]), 1)[np.searchsorted(["a", "b", "c"], made.labels.astype(str))]
    assert max(generated.nearest_label_accuracy(distances, real.labels, wrong).values()) == 0


def test_a_label_that_no_real_cell_has_is_an_error():
    with pytest.raises(DataError, match="'z'"):
        generated.nearest_label_accuracy(np.ones((1, 2)), ["x", "y"], ["z"])
    with pytest.raises(DataError, match=r"\(2, 1\)"):
        generated.nearest_label_accuracy(np.ones((2, 1)), ["x", "y"], ["x"])


# Gromov-Wasserstein


@needs_pot
def test_equal_sets_are_at_zero_and_motions_change_nothing():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(30, 4))
    assert generated.gromov_wasserstein(points, points) == pytest.approx(0, abs=1e-12)
    assert generated.gromov_wasserstein(points, points[rng.permutation(30)] + 0) == pytest.approx(
        0, abs=1e-10
    )
    assert generated.gromov_wasserstein(sparse.csr_matrix(points), points) == pytest.approx(0, abs=1e-12)
    # All distances are equal: from the product of the weights there is no way down.
    assert generated.gromov_wasserstein(np.eye(6), np.eye(6)) == pytest.approx(0, abs=1e-12)
    other = rng.normal(size=(25, 4)) * 2
    found = generated.gromov_wasserstein(points, other)
    assert found > 1
    # Motions of both sets, and the order of cells.
    turn = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    moved = [each[rng.permutation(len(each))] @ turn + 3 for each in (points, other)]
    assert generated.gromov_wasserstein(*moved) == pytest.approx(found, rel=1e-6)


@needs_pot
def test_two_points_have_the_discrepancy_that_is_done_by_hand():
    # Pairs at distance 1 and at distance 3: any coupling leaves (3 - 1)^2 on half of the pairs at best.
    assert generated.gromov_wasserstein(np.array([[0.0], [1.0]]), np.array([[0.0], [3.0]])) == pytest.approx(
        2
    )


@needs_pot
def test_large_sets_are_sampled_by_the_seed():
    rng = np.random.default_rng(0)
    points, other = rng.normal(size=(60, 3)), rng.normal(size=(50, 3))
    found = [generated.gromov_wasserstein(points, other, max_cells=20, seed=seed) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert generated.gromov_wasserstein(points, other, seed=0) == generated.gromov_wasserstein(
        points, other, seed=1
    )


def test_without_pot_an_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(MissingExtraError, match=r'pip install "sct-jax\[analysis\]"'):
        generated.gromov_wasserstein(np.eye(3), np.eye(3))


# Mean profiles


def test_profiles_are_means_of_each_label_sparse_or_dense():
    found = generated.mean_profiles(sparse.csr_matrix([[1.0, 0], [3, 2], [5, 5]]), ["x", "x", "y"])
    pd.testing.assert_frame_equal(
        found, pd.DataFrame([[2.0, 1.0], [5.0, 5.0]], index=["x", "y"]), check_index_type=False
    )
    dense = generated.mean_profiles(np.array([[1.0, 0], [3, 2], [5, 5]]), ["x", "x", "y"])
    pd.testing.assert_frame_equal(found, dense)


def test_correlations_of_small_profiles():
    found = generated.correlations(np.array([1.0, 2, 3]), np.array([2.0, 4, 6]))
    assert found == pytest.approx((1, 1, 1 - 14 / 2))  # R2 is of the values as they are
    assert generated.correlations(np.array([1.0, 2, 3]), np.array([1.0, 2, 3])) == pytest.approx((1, 1, 1))
    assert generated.correlations(np.array([1.0, 2, 3]), np.array([0.0, -1, -9])).spearman == pytest.approx(
        -1
    )
    assert np.isnan(generated.correlations(np.array([1.0, 2, 3]), np.zeros(3))).all()


def test_mean_correlations_are_by_label_and_equal_sets_have_one():
    real = cells()
    table = generated.mean_correlations(real, real)
    assert sorted(table.index) == ["a", "b", "c"]
    np.testing.assert_allclose(table, 1)
    order = np.random.default_rng(3).permutation(len(real))
    other = generated.mean_correlations(cells(seed=1), real)
    pd.testing.assert_frame_equal(other, generated.mean_correlations(cells(seed=1), real.take(order)))
    assert (other < 1).all(axis=None)
    assert (other["pearson"] > 0.9).all()


def test_a_label_that_has_no_real_profile_is_an_error():
    real = cells()
    only = real.take(np.flatnonzero(real.labels != "c"))
    with pytest.raises(DataError, match="'c'"):
        generated.mean_correlations(real, only)


# Sentences


def test_quality_follows_the_definitions():
    table = pd.DataFrame({"n_words": [4, 2, 0], "n_valid": [3, 2, 0], "n_unique": [2, 2, 0]})
    assert generated.sentence_quality(table) == pytest.approx(
        {"length": 2, "valid genes": (0.75 + 1 + 0) / 3, "unique genes": (0.5 + 1 + 0) / 3}
    )
    with pytest.raises(DataError, match="'n_unique'"):
        generated.sentence_quality(table.drop(columns="n_unique"))
    with pytest.raises(DataError, match="n_words"):
        generated.sentence_quality(table.assign(n_valid=[5, 2, 0]))


# Sets of cells


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": ["a"]}, r"\b1 label"),
        ({"labels": ["a", None]}, r"labels` has 1 "),
        ({"sentences": ["A"]}, r"\b1 sentence"),
        ({"quality": pd.DataFrame({"n_words": [1]})}, r"\b1 quality"),
        ({"expression": np.array([[1.0], [np.nan]])}, "NaN"),
        ({"expression": np.ones(2)}, "cells, genes"),
    ],
)
def test_what_does_not_fit_is_an_error(change, message):
    with pytest.raises(DataError, match=message):
        CellSet(**{"expression": np.ones((2, 1)), "labels": ["a", "b"], **change})


def test_options_that_make_no_sense_are_errors():
    for change in ({"seeds": 0}, {"ks": ()}, {"ks": (0,)}, {"differential_genes": 1}):
        with pytest.raises(ConfigError, match=next(iter(change))):
            GenerationOptions(**change)


# Draws from mean profiles


def test_draws_keep_totals_and_means_of_their_label():
    train = cells(300)
    raw = counts(train.labels, 0)
    asked = np.array(["c", "a"] * 400, object)
    drawn, donors = generation.profile_counts(raw, train.labels, asked, np.random.default_rng(0))
    np.testing.assert_array_equal(train.labels[donors], asked)
    np.testing.assert_array_equal(drawn.sum(axis=1), raw[donors].sum(axis=1))
    for label in "ac":
        mean = np.asarray(drawn[asked == label].mean(axis=0)).ravel()
        true = np.asarray(raw[train.labels == label].mean(axis=0)).ravel()
        np.testing.assert_allclose(mean, true, atol=0.5)
    _, donors = generation.profile_counts(raw, train.labels, train.labels, np.random.default_rng(0))
    assert len(set(donors)) == len(train)
    for arguments, message in (
        ((raw * 0.3, train.labels, asked), "whole numbers"),
        ((-raw, train.labels, asked), "whole numbers"),
        ((raw, train.labels[1:], asked), "299"),
        ((raw, train.labels, ["z"]), "'z'"),
    ):
        with pytest.raises(DataError, match=message):
            generation.profile_counts(*arguments, np.random.default_rng(0))


# Reports


QUICK = GenerationOptions(seeds=2, ks=(3, 5), max_cells=30)


@needs_rapidfuzz
@needs_pot
def test_a_good_generator_is_near_the_ceiling_and_controls_are_near_chance():
    made, real, train = cells(150, 1), cells(150, 2), cells(150, 3)
    quality = pd.DataFrame({"n_words": 12, "n_valid": 12, "n_unique": 11}, index=range(150))
    made = CellSet(made.expression, made.labels, made.sentences, quality)
    report, numbers = generation.compare(
        made, real, counts(train.labels, 3), train.labels, express=express, options=QUICK
    )
    table = rows(report)
    assert list(table) == [
        generation.GENERATED,
        generation.SHUFFLED,
        generation.REAL,
        generation.COPIED,
        generation.PROFILE,
        generation.CHANCE,
        generation.MAJORITY,
    ]
    accuracies = [column for column in report.titles if "accuracy" in column]
    assert accuracies == [
        "3-NN accuracy",
        "5-NN accuracy",
        "3-NN accuracy (Levenshtein)",
        "5-NN accuracy (Levenshtein)",
    ]
    for column in accuracies:
        for name in (generation.GENERATED, generation.REAL, generation.COPIED, generation.PROFILE):
            assert len(table[name][column]) == 2
            assert min(table[name][column]) > 0.9
        assert max(table[generation.SHUFFLED][column]) < 0.55
        np.testing.assert_allclose(table[generation.CHANCE][column], 1 / 3)
        np.testing.assert_allclose(table[generation.MAJORITY][column], 1 / 3)
    assert min(table[generation.GENERATED]["R2"]) > 0.8 > 0.4 > max(table[generation.SHUFFLED]["R2"])
    assert table[generation.GENERATED]["unique genes"] == pytest.approx([11 / 12] * 2)
    assert (
        table[generation.REAL]["unique genes"]
        == table[generation.SHUFFLED]["Gromov-Wasserstein"]
        == generation.UNDEFINED
    )
    assert min(table[generation.GENERATED]["Gromov-Wasserstein"]) > 0
    assert {name: list(values) for name, values in numbers.items()} == {
        name: [column for column in values if isinstance(table[name][column], list)]
        for name, values in numbers.items()
    }
    _, more = generation.compare(made, real, options=dataclasses.replace(QUICK, max_cells=1000))
    for name in (generation.GENERATED, generation.REAL):  # discrepancies shrink with the size of the sets
        assert max(more[name]["Gromov-Wasserstein"]) < min(numbers[name]["Gromov-Wasserstein"])
    again, _ = generation.compare(
        made, real, counts(train.labels, 3), train.labels, express=express, options=QUICK
    )
    assert again.as_dict() == report.as_dict()


@needs_pot
def test_what_ignores_its_label_is_at_chance_and_what_collapses_is_far_from_real_cells():
    real = cells(150, 2)
    labels = np.random.default_rng(0).permutation(real.labels)
    blind = CellSet(cells(150, 1).expression, labels)
    _, numbers = generation.compare(blind, real, options=QUICK)
    assert np.mean(numbers[generation.GENERATED]["5-NN accuracy"]) < 0.5
    constant = CellSet(np.repeat(real.expression[:1].toarray(), 150, axis=0), real.labels)
    _, numbers = generation.compare(constant, real, options=QUICK)
    values = {name: numbers[name]["Gromov-Wasserstein"] for name in (generation.GENERATED, generation.REAL)}
    assert min(values[generation.GENERATED]) > 5 * max(values[generation.REAL])


def test_labels_that_cannot_be_compared_are_left_out_and_told():
    real, made = cells(90, 2), cells(90, 1)
    real = real.take(np.r_[np.flatnonzero(real.labels != "c"), np.flatnonzero(real.labels == "c")[:1]])
    report, numbers = generation.compare(made, real, options=GenerationOptions(seeds=1, ks=(3,), max_cells=0))
    assert report.notes[0].startswith("30 cells generated for 1 labels are excluded")
    assert report.notes[1].startswith("1 real cells of labels")
    assert "Gromov-Wasserstein" not in report.titles
    assert numbers[generation.CHANCE]["3-NN accuracy"] == [0.5]
    assert generation.PROFILE not in numbers
    with pytest.raises(DataError, match="label 'a'"):
        generation.compare(made, real.take(np.flatnonzero(real.labels == "a")))
    with pytest.raises(DataError, match="generated cells"):
        generation.compare(made, real.take(np.arange(1)))
    with pytest.raises(ConfigError, match=r"counts.*labels"):
        generation.compare(made, real, counts(made.labels, 0))
    with pytest.raises(DataError, match=r"5 genes, .*40"):
        generation.compare(CellSet(made.expression[:, :5], made.labels), real)


def test_missing_libraries_leave_their_columns_out_and_are_told(monkeypatch):
    for name in ("ot", "rapidfuzz"):
        monkeypatch.setitem(sys.modules, name, None)
    report, _ = generation.compare(cells(60, 1), cells(60, 2), options=GenerationOptions(seeds=1, ks=(3,)))
    assert rows(report)[generation.GENERATED]["Gromov-Wasserstein"] == "-"
    assert "3-NN accuracy (Levenshtein)" not in report.titles
    assert any("rapidfuzz is not installed" in note for note in report.notes)
    assert any("POT is not installed" in note for note in report.notes)


# Perturbations


def perturbed(seed: int, effect: float = 6.0, n: int = 25) -> CellSet:
    """Cells of types a and b, untreated and treated; ten genes answer."""
    types = np.repeat(np.array(["a", "b", "a", "b"], object), n)
    treated = np.repeat([0, 0, 1, 1], n)
    raw = counts(types, seed).toarray()
    raw[:, 30:] += np.random.default_rng([seed, 1]).poisson(effect * treated[:, None], (4 * n, 10))
    labels = np.array(
        [f"{a} {'treated' if b else 'control'}" for a, b in zip(types, treated, strict=True)], object
    )
    return CellSet(generation.log_normalized(sparse.csr_matrix(raw))[0], labels)


@needs_scanpy
def test_differential_genes_are_those_that_answer():
    both = perturbed(0)
    found = perturbation.differential_genes(
        both.expression[both.labels == "a treated"], both.expression[both.labels == "a control"], 10
    )
    assert set(found) == set(range(30, 40))
    # Genes that fall count as those that rise.
    found = perturbation.differential_genes(
        both.expression[both.labels == "a control"], both.expression[both.labels == "a treated"], 10
    )
    assert set(found) == set(range(30, 40))


@needs_scanpy
def test_variable_genes_are_those_of_scanpy_whatever_the_base_of_the_logarithm():
    import scanpy
    from anndata import AnnData

    expression = cells(90).expression
    adata = AnnData((expression * np.log(10)).astype(np.float32), uns={"log1p": {"base": None}})
    scanpy.pp.highly_variable_genes(adata, n_top_genes=15)
    expected = np.flatnonzero(adata.var["highly_variable"])
    np.testing.assert_array_equal(perturbation.chosen_genes(expression, 15), expected)
    assert not np.array_equal(perturbation.chosen_genes(expression, 15, log_base=np.e), expected)
    np.testing.assert_array_equal(perturbation.chosen_genes(expression, 0), np.arange(40))


def test_differences_to_the_opposite_condition_are_correlated():
    # Two genes rise by 1 and 2 in truth and by 2 and 4 as generated; two stay.
    base, true, made = ([[4.0, 3, 2, 1]], [[5.0, 5, 2, 1]], [[6.0, 7, 2, 1]])
    sets = [CellSet(np.array(each), [name]) for each, name in ((made, "t"), (true, "t"), (base, "c"))]
    table = perturbation.perturbation_correlations(*sets, {"t": "c"}, differential={"t": np.array([0, 1])})
    assert list(table.columns) == list(perturbation.PERTURBATION_COLUMNS)
    assert table.loc["t", "Δ Pearson"] == pytest.approx(1)
    assert table.loc["t", "Δ top DE Pearson"] == pytest.approx(1)
    assert table.loc["t", "Pearson"] == pytest.approx(np.corrcoef(true[0], made[0])[0, 1])
    assert np.isnan(table.loc["t", "top DE Pearson"])  # 5 and 5


@needs_scanpy
def test_a_model_that_knows_the_effect_is_above_no_change_and_shuffled_conditions():
    train, real = perturbed(0), perturbed(1)
    train = train.take(np.flatnonzero(train.labels != "x"))
    opposite = {f"{each} treated": f"{each} control" for each in "ab"}
    options = GenerationOptions(seeds=2, variable_genes=35, differential_genes=12)
    report, numbers = perturbation.compare_perturbations(perturbed(2), real, train, opposite, options)
    assert list(rows(report)) == [
        generation.GENERATED,
        generation.SHUFFLED,
        generation.REAL,
        perturbation.NO_CHANGE,
    ]
    assert "35 genes" in report.notes[0]
    assert min(numbers[generation.GENERATED]["Δ Pearson"]) > 0.9
    assert np.isnan(numbers[perturbation.NO_CHANGE]["Δ Pearson"]).all()
    for name in (generation.SHUFFLED, perturbation.NO_CHANGE):
        assert max(numbers[name]["Pearson"]) < min(numbers[generation.GENERATED]["Pearson"])
    # A model that predicts no effect has no correlation of differences.
    _, none = perturbation.compare_perturbations(perturbed(3, effect=0), real, train, opposite, options)
    assert max(none[generation.GENERATED]["Δ Pearson"]) < 0.6
    with pytest.raises(DataError, match="'nothing'"):
        perturbation.compare_perturbations(perturbed(2), real, train, {"a treated": "nothing"}, options)


# Real cells


@needs_pot
@needs_rapidfuzz
def test_real_cells_of_blood(shared_data):
    import anndata

    adata = anndata.read_h5ad(shared_data / "single_cell" / "pbmc3k_10x.h5ad")
    raw = sparse.csr_matrix(adata.X)
    adata = adata[:, np.argsort(-np.asarray(raw.sum(axis=0)).ravel())[:500]]
    raw, labels = sparse.csr_matrix(adata.X), adata.obs["cell_type"].astype(str).to_numpy(object)
    names = adata.var_names.to_numpy()

    def as_sentences(matrix):
        expression, _ = generation.log_normalized(matrix)
        order = np.argsort(-expression.toarray(), axis=1, kind="stable")[:, :50]
        return expression, [" ".join(names[row]) for row in order]

    order = np.random.default_rng(0).permutation(len(labels))
    train, held, model = order[:1000], order[1000:1900], order[1900:]
    real, made = (
        CellSet(expression, labels[part], words)
        for part in (held, model)
        for expression, words in [as_sentences(raw[part])]
    )
    options = GenerationOptions(seeds=1, ks=(5,), max_cells=200)
    _, numbers = generation.compare(
        made, real, raw[train], labels[train], express=as_sentences, options=options
    )
    for column, least in (("5-NN accuracy", 0.6), ("5-NN accuracy (Levenshtein)", 0.45)):
        value = {name: values[column][0] for name, values in numbers.items() if column in values}
        # Real cells stand for the generated ones, so that they reach the ceiling.
        assert value[generation.GENERATED] == pytest.approx(value[generation.REAL], abs=0.08)
        assert (
            value[generation.GENERATED]
            > least
            > value[generation.MAJORITY]
            > value[generation.SHUFFLED] - 0.05
        )
    pearson = {name: values["Pearson"][0] for name, values in numbers.items() if "Pearson" in values}
    assert pearson[generation.GENERATED] == pytest.approx(pearson[generation.REAL], abs=0.02)
    assert pearson[generation.GENERATED] > pearson[generation.SHUFFLED] + 0.05
