"""Metrics against scikit-learn on the labels themselves, and baselines on cells made by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import matthews_corrcoef

from sct.data.bags import BagOptions, BagSource
from sct.eval.baselines import (
    KnnSmoothing,
    level_frequencies,
    most_common_expressed_level,
    most_common_level,
)
from sct.eval.metrics import matthews, matthews_from_confusion
from tests.data.fake_study import FakeStudy, toy_study

matrices = st.integers(2, 6).flatmap(lambda n: hnp.arrays(np.int64, (n, n), elements=st.integers(0, 6)))
laws = settings(max_examples=60, deadline=None)


def expand(confusion: np.ndarray, first: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """True and predicted labels that a confusion matrix counts; its first row is the class `first`."""
    true, predicted = np.indices(confusion.shape)
    return np.repeat(true.ravel() + first, confusion.ravel()), np.repeat(predicted.ravel(), confusion.ravel())


@laws
@given(matrices)
@pytest.mark.filterwarnings("ignore:A single label")
def test_the_coefficient_of_a_confusion_matrix_is_that_of_its_labels(confusion):
    true, predicted = expand(confusion)
    if not true.size:
        assert np.isnan(matthews_from_confusion(confusion))
        return
    np.testing.assert_allclose(
        matthews_from_confusion(confusion), matthews_corrcoef(true, predicted), atol=1e-12
    )
    assert matthews(true, predicted) == matthews_corrcoef(true, predicted)
    np.testing.assert_allclose(
        matthews_from_confusion(confusion.astype(np.float32)), matthews_from_confusion(confusion), atol=1e-6
    )


@laws
@given(matrices, st.integers(1, 3))
@pytest.mark.filterwarnings("ignore:A single label")
def test_rows_left_out_are_classes_that_are_not_scored(confusion, skipped):
    part = confusion[min(skipped, len(confusion) - 1) :]
    true, predicted = expand(part, first=len(confusion) - len(part))
    if true.size:
        np.testing.assert_allclose(
            matthews_from_confusion(part), matthews_corrcoef(true, predicted), atol=1e-12
        )
    else:
        assert np.isnan(matthews_from_confusion(part))


def test_perfect_wrong_and_constant_predictions():
    assert matthews_from_confusion(np.diag([3, 5, 9])) == 1
    assert matthews_from_confusion(np.array([[0, 4], [4, 0]])) == -1
    assert matthews_from_confusion(np.array([[0, 4], [0, 4]])) == 0
    assert np.isnan(matthews(np.zeros(0), np.zeros(0)))
    # Expressed genes alone: a true level 1 called unexpressed is an error that must count.
    assert matthews_from_confusion(np.array([[0, 5, 0], [0, 0, 5]])) == 1
    assert matthews_from_confusion(np.array([[3, 2, 0], [0, 0, 5]])) < 1


# Baselines

# Five cells x four genes. In each cell the first gene is the lowest and the second the highest.
COUNTS = np.array(
    [
        [1, 31, 0, 7],
        [1, 31, 0, 7],
        [1, 31, 3, 0],
        [1, 31, 0, 0],
        [1, 31, 0, 15],
    ]
)


def source(*counts: np.ndarray, cells: int = 2, positions: int = 6, **options) -> BagSource:
    studies = [FakeStudy(each, str(i)) for i, each in enumerate(counts)]
    return BagSource(studies, BagOptions(cells, positions, with_counts=True, **options), exhaustive=True)


@pytest.mark.parametrize("cells", [1, 2, 3, 8])
def test_levels_are_counted_over_all_cells_and_pad_is_not(cells):
    frequencies = level_frequencies(source(COUNTS, COUNTS[:1], cells=cells))
    expected = np.zeros((6, 5), int)
    expected[0, 1] = expected[1, 4] = 6
    expected[2, [0, 2]] = 5, 1
    expected[3, [0, 3, 4]] = 2, 3, 1
    np.testing.assert_array_equal(frequencies, expected)


def test_most_common_levels_by_hand():
    frequencies = level_frequencies(source(COUNTS))
    np.testing.assert_array_equal(most_common_level(frequencies), [1, 4, 0, 0, 0, 0])
    np.testing.assert_array_equal(most_common_expressed_level(frequencies), [1, 4, 2, 3, 1, 1])


# kNN smoothing


def dense(study: FakeStudy, positions: int) -> np.ndarray:
    counts = np.zeros((study.n_cells, positions), np.float32)
    counts[:, : study.n_genes] = study.counts.toarray()
    return counts


def test_smoothing_against_a_plain_reference():
    train, asked = toy_study(25, seed=1), dense(toy_study(9, seed=2), 16)
    knn = KnnSmoothing(BagSource([train], BagOptions(4, 16)), neighbours=3)
    mask = np.random.default_rng(0).random(asked.shape) < 0.3
    got = knn(asked, mask)
    assert got.shape == asked.shape
    reference = train.counts.toarray().astype(float)

    def profile(x):
        return np.log1p(1e4 * x / max(x.sum(), 1))

    for cell in range(9):
        visible = np.where(mask[cell], 0, asked[cell])[:12].astype(float)
        q = profile(visible)
        distance = [1 - q @ profile(r) / np.linalg.norm(q) / np.linalg.norm(profile(r)) for r in reference]
        mean = reference[np.argsort(distance)[:3]].mean(axis=0)
        factor = visible.sum() / mean[~mask[cell, :12]].sum()
        np.testing.assert_allclose(got[cell, :12], mean * factor, rtol=1e-4)
    assert not got[:, 12:].any()


@laws
@given(st.integers(0, 1000))
def test_smoothing_does_not_see_masked_counts(seed):
    rng = np.random.default_rng(seed)
    knn = smoother()
    counts = dense(toy_study(5, seed=seed), 16)
    mask = rng.random(counts.shape) < 0.4
    other = np.where(mask, rng.integers(0, 500, counts.shape), counts).astype(np.float32)
    np.testing.assert_array_equal(knn(counts, mask), knn(other, mask))
    changed = counts + 5 * ~mask
    assert (knn(changed, mask) != knn(counts, mask)).any()


def smoother(made: list[KnnSmoothing] = []) -> KnnSmoothing:  # noqa: B006
    if not made:
        made.append(KnnSmoothing(BagSource([toy_study(25, seed=1)], BagOptions(4, 16)), neighbours=3))
    return made[0]


def test_smoothing_keeps_the_library_size_and_knows_its_own_cells():
    train = toy_study(20, seed=1)
    knn = KnnSmoothing(BagSource([train], BagOptions(4, 12)), neighbours=1)
    own = dense(train, 12)
    nothing = np.zeros(own.shape, bool)
    np.testing.assert_allclose(knn(own, nothing), own, rtol=1e-5)
    np.testing.assert_allclose(knn(3 * own, nothing).sum(axis=1), 3 * own.sum(axis=1), rtol=1e-5)


def test_smoothing_without_a_common_gene_stays_finite():
    train = np.zeros((4, 6))
    train[:, :3] = [[5, 1, 2], [4, 1, 2], [6, 1, 1], [5, 2, 2]]
    knn = KnnSmoothing(source(train), neighbours=2)
    cell = np.array([[0, 0, 0, 9, 9, 9]], np.float32)
    mask = np.array([[True, True, True, False, False, False]])
    assert knn(cell, mask).max() <= 6
    assert np.isfinite(knn(np.zeros_like(cell), mask)).all()


def test_smoothing_searches_a_limited_number_of_cells_from_all_studies_and_all_over_a_slide():
    cells, slide = toy_study(40, seed=1), toy_study(40, seed=2, spatial=True, name="slide")
    knn = KnnSmoothing(BagSource([cells, slide], BagOptions(4, 12)), max_cells=20)
    assert knn.counts.shape == (20, 12)
    rows = knn.counts[:, 0].toarray().ravel() - 1  # the first gene tells the row
    np.testing.assert_array_equal(rows[:10], np.arange(10))
    assert rows[10] == 0
    assert rows[-1] == 39
    assert np.diff(rows[10:]).min() > 2
    few = KnnSmoothing(BagSource([toy_study(3)], BagOptions(2, 12)))
    assert few.counts.shape[0] == few.neighbours == 3
