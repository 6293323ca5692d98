"""Baselines of imputation: none sees what is hidden, each agrees with a plain loop on cells made by hand."""

from __future__ import annotations

import importlib.util
import warnings

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from sct.data.bags import BagOptions, BagSource
from sct.eval.imputation import eval_cells as drawing
from sct.eval.imputation.baselines import (
    CommonLevel,
    KnnSmoothing,
    Magic,
    NeighborMean,
    OthersCommonLevel,
    OwnKnnSmoothing,
    Unavailable,
    from_counts,
    level_frequencies,
    standard_methods,
)
from sct.eval.imputation.eval_cells import Masked
from tests.data.fake_study import FakeStudy, toy_study
from tests.eval.toy_cells import GENES, NUM_BINS, POSITIONS, changed, hold_out, random_mask, source, study

needs_magic = pytest.mark.skipif(
    importlib.util.find_spec("magic") is None, reason="MAGIC needs its package: pip install magic-impute"
)

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
TRAIN = source(study(25, seed=1, name="train"))
CELLS = hold_out(study(30, seed=2, name="a"), study(9, seed=3, name="b"))


def by_hand(*counts: np.ndarray, cells: int = 2, positions: int = 6) -> BagSource:
    studies = [FakeStudy(each, str(i)) for i, each in enumerate(counts)]
    for each in studies:
        each.measured = np.ones(each.n_genes, bool)
    return BagSource(studies, BagOptions(cells, positions, with_counts=True), exhaustive=True)


# Most common levels


@pytest.mark.parametrize("cells", [1, 2, 3, 8])
def test_levels_are_counted_over_all_cells_and_pad_is_not(cells):
    expected = np.zeros((2, 6, 5), int)
    expected[0, 0, 1] = expected[0, 1, 4] = 5
    expected[0, 2, [0, 2]] = 4, 1
    expected[0, 3, [0, 3, 4]] = 2, 2, 1
    expected[1, 0, 1] = expected[1, 1, 4] = expected[1, 2, 0] = expected[1, 3, 3] = 1
    bags = by_hand(COUNTS, COUNTS[:1], cells=cells)
    np.testing.assert_array_equal(level_frequencies(bags), expected.sum(axis=0))
    np.testing.assert_array_equal(drawing.EvalCells.read(bags).frequencies, expected)


def test_most_common_levels_by_hand():
    frequencies = level_frequencies(by_hand(COUNTS))
    cells = drawing.EvalCells.read(by_hand(np.full((1, 4), [5, 6, 7, 8])))
    everything = Masked.of(cells, np.ones(cells.tokens.shape, bool))
    np.testing.assert_array_equal(everything.genes, range(4))
    for expressed, levels in ((False, [1, 4, 0, 0]), (True, [1, 4, 2, 3])):
        ((given_expressed, prediction),) = (
            CommonLevel(expressed, frequencies).predict(cells, everything).items()
        )
        assert given_expressed == expressed
        np.testing.assert_array_equal(prediction.levels, levels)
        np.testing.assert_array_equal(prediction.counts, cells.medians[0, levels])


@pytest.mark.parametrize("expressed", [False, True])
def test_the_bar_is_the_common_level_of_the_other_cells_of_the_study(expressed):
    masked = random_mask(CELLS, 0.5)
    ((_, got),) = OthersCommonLevel(expressed).predict(CELLS, masked).items()
    for place, (cell, gene) in enumerate(zip(masked.cells, masked.genes, strict=True)):
        others = (CELLS.study == CELLS.study[cell]) & (np.arange(len(CELLS)) != cell)
        frequency = np.bincount(CELLS.tokens[others, gene], minlength=NUM_BINS)[int(expressed) :]
        assert got.levels[place] == int(expressed) + frequency.argmax()
        assert got.counts[place] == CELLS.medians[cell, got.levels[place]]


@pytest.mark.parametrize("expressed", [False, True])
def test_the_bar_does_not_know_the_cell_itself(expressed):
    method, seen = OthersCommonLevel(expressed), 0
    for cell in range(9):
        mask = np.zeros(CELLS.tokens.shape, bool)
        mask[cell] = True
        other = changed(CELLS, mask, seed=cell)
        ((_, before),) = method.predict(CELLS, Masked.of(CELLS, mask)).items()
        ((_, after),) = method.predict(other, Masked.of(other, mask)).items()
        np.testing.assert_array_equal(before.levels, after.levels)
        neighbor = np.roll(mask, 1, axis=0)
        ((_, of_other),) = method.predict(other, Masked.of(other, neighbor)).items()
        ((_, of_same),) = method.predict(CELLS, Masked.of(CELLS, neighbor)).items()
        seen += (of_other.levels != of_same.levels).any()
    assert seen, "the cells beside it do matter"


# What methods of counts have in common

METHODS = {
    "kNN": lambda cells: KnnSmoothing(TRAIN, neighbors=3),
    "own kNN": lambda cells: OwnKnnSmoothing(neighbors=3),
    "neighbours": lambda cells: NeighborMean(cells, 2),
    "MAGIC": lambda cells: Magic(),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=needs_magic if n == "MAGIC" else []) for n in METHODS]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_no_method_sees_what_is_hidden(name, seed):
    cells = hold_out(study(40, seed=4, spatial=True))
    masked = drawing.mask_cells(cells, 3, seed) if name == "neighbours" else random_mask(cells, 0.3, seed)
    other = changed(cells, masked.mask, seed)
    again = Masked.of(other, masked.mask)
    assert (again.counts != masked.counts).mean() > 0.9
    before, after = (
        METHODS[name](given).predict(given, draw) for given, draw in ((cells, masked), (other, again))
    )
    assert before.keys() == after.keys() == {False, True}
    for given_expressed, prediction in before.items():
        np.testing.assert_array_equal(prediction.counts, after[given_expressed].counts)
        np.testing.assert_array_equal(prediction.levels, after[given_expressed].levels)
    # It does look at the rest.
    third = changed(cells, ~masked.mask, seed)
    assert (
        METHODS[name](third).predict(third, masked_as(third, masked))[True].counts != before[True].counts
    ).any()


def masked_as(cells: drawing.EvalCells, masked: Masked) -> Masked:
    return Masked.of(cells, masked.mask)


def test_counts_become_levels_of_the_cells_range():
    masked = random_mask(CELLS, 0.5)
    counts = masked.counts.copy()
    both = from_counts(masked, counts)
    for prediction in both.values():
        np.testing.assert_array_equal(prediction.levels, masked.levels)
        np.testing.assert_array_equal(prediction.counts, counts)
    few = np.full(len(counts), 0.49, np.float32)
    both = from_counts(masked, few)
    assert set(both[True].levels) == {1}
    assert set(both[True].counts) == {1}, "an expressed gene has one count at least"
    assert set(both[False].levels) == {0}
    np.testing.assert_array_equal(both[False].counts, few)


# kNN smoothing


def test_smoothing_against_a_plain_reference():
    masked = random_mask(CELLS, 0.3)
    got = KnnSmoothing(TRAIN, neighbors=3).predict(CELLS, masked)[False].counts
    own = OwnKnnSmoothing(neighbors=3).predict(CELLS, masked)[False].counts
    reference = TRAIN.studies[0].counts.toarray().astype(float)
    visible = np.where(masked.mask, 0, CELLS.counts.toarray())[:, :GENES].astype(float)

    def profile(x):
        return np.log1p(1e4 * x / np.maximum(x.sum(axis=1, keepdims=True), 1))

    def nearest(cell, others, shown):
        """By the cosine over what both show."""
        mine, cosines = profile(visible)[cell], np.zeros(len(others))
        for row, one in enumerate(profile(others)):
            both = shown[row] & ~masked.mask[cell, :GENES]
            norm = np.linalg.norm(one[both]) * np.linalg.norm(mine[both])
            cosines[row] = one[both] @ mine[both] / max(norm, 1e-6)
        if others is visible:
            cosines[cell] = -1
        return np.argsort(cosines)[-3:]

    for place, (cell, gene) in enumerate(zip(masked.cells, masked.genes, strict=True)):
        open_genes = ~masked.mask[cell, :GENES]
        mean = reference[nearest(cell, reference, np.ones(reference.shape, bool))].mean(axis=0)
        expected = mean[gene] * visible[cell].sum() / mean[open_genes].sum()
        np.testing.assert_allclose(got[place], expected, rtol=1e-4)
        near = nearest(cell, visible, ~masked.mask[:, :GENES])
        shown = ~masked.mask[near, :GENES]
        mean = (visible[near] * shown).sum(axis=0) / np.maximum(shown.sum(axis=0), 1)
        both = open_genes & shown.any(axis=0)
        expected = mean[gene] * visible[cell][both].sum() / mean[both].sum()
        np.testing.assert_allclose(own[place], expected, rtol=1e-4)


@pytest.mark.parametrize("factor", [1, 4])
def test_a_cell_of_the_training_studies_is_its_own_nearest(factor):
    rest = np.random.default_rng(0).integers(0, 4, (6, 6))
    counts = np.concatenate([100 * np.eye(6, dtype=int), rest], axis=1)
    train, deeper = by_hand(counts, positions=16), by_hand(counts * factor, positions=16)
    cells = drawing.EvalCells.read(deeper)
    masked = drawing.mask_genes(cells, np.arange(6, 12))
    got = KnnSmoothing(train, neighbors=1).predict(cells, masked)[True].counts
    np.testing.assert_allclose(got, masked.counts, rtol=1e-5)


def test_smoothing_without_a_common_gene_stays_finite():
    train = np.zeros((4, 6))
    train[:, :3] = [[5, 1, 2], [4, 1, 2], [6, 1, 1], [5, 2, 2]]
    knn = KnnSmoothing(by_hand(train), neighbors=2)
    cells = drawing.EvalCells.read(by_hand(np.array([[1, 1, 1, 9, 9, 9], [1, 2, 3, 0, 0, 0]])))
    mask = np.zeros(cells.tokens.shape, bool)
    mask[:, :3] = True
    counts = knn.predict(cells, Masked.of(cells, mask))[True].counts
    assert np.isfinite(counts).all()
    assert counts.max() <= 6


def test_smoothing_searches_a_limited_number_of_cells_from_all_studies_and_all_over_a_slide():
    cells, slide = toy_study(40, seed=1), toy_study(40, seed=2, spatial=True, name="slide")
    knn = KnnSmoothing(BagSource([cells, slide], BagOptions(4, 12)), max_cells=20)
    assert knn._reference.counts.shape == (20, 12)
    rows = knn._reference.counts[:, 0].toarray().ravel() - 1  # the first gene tells the row
    np.testing.assert_array_equal(rows[:10], np.arange(10))
    assert rows[10] == 0
    assert rows[-1] == 39
    assert np.diff(rows[10:]).min() > 2
    few = KnnSmoothing(BagSource([toy_study(3)], BagOptions(2, 12)))
    assert few._reference.counts.shape[0] == few.neighbors == 3


# Whole cells


@pytest.mark.parametrize("spatial", [False, True])
def test_whole_cells_are_the_mean_of_the_visible_ones_beside_them(spatial):
    cells = hold_out(study(20, seed=5, spatial=spatial))
    masked = drawing.mask_cells(cells, 5, 0)
    method = NeighborMean(cells, 2)
    assert ("nearest" in method.name) == spatial
    got = method.predict(cells, masked)[False].counts
    dense, hidden = cells.counts.toarray(), masked.mask.any(axis=1)
    for place, (cell, gene) in enumerate(zip(masked.cells, masked.genes, strict=True)):
        (visible,) = np.nonzero(~hidden & (cells.bag == cells.bag[cell]))
        if spatial:
            far = np.linalg.norm(cells.coordinates[visible] - cells.coordinates[cell], axis=1)
            visible = visible[np.argsort(far)[:2]]
        np.testing.assert_allclose(got[place], dense[visible, gene].mean(), rtol=1e-5)


def test_whole_cells_are_the_mean_of_the_visible_ones_that_express_the_gene():
    cells = hold_out(study(20, seed=5, spatial=True))
    masked = drawing.mask_cells(cells, 5, 0)
    ((given_expressed, got),) = NeighborMean(cells, None, expressed=True).predict(cells, masked).items()
    assert given_expressed
    dense, hidden, lone = cells.counts.toarray(), masked.mask.any(axis=1), 0
    for place, (cell, gene) in enumerate(zip(masked.cells, masked.genes, strict=True)):
        beside = dense[~hidden & (cells.bag == cells.bag[cell]), gene]
        lone += not beside.any()
        np.testing.assert_allclose(got.counts[place], beside[beside > 0].mean() if beside.any() else 1, 1e-5)
    assert lone, "some genes are expressed in none"


# MAGIC


def published_magic(values: np.ndarray, knn: int = 5, knn_max: int = 15, t: int = 3) -> np.ndarray:
    """Diffusion of cells (N, G): adaptive kernel over the nearest cells, symmetrised, normalised, powered."""
    distance = cdist(values, values)
    width = np.sort(distance, axis=1)[:, knn]
    kernel = np.exp(-distance / width[:, None])
    rank = np.argsort(np.argsort(distance, axis=1), axis=1)
    kernel = np.where((rank <= knn_max) & (kernel >= 1e-4), kernel, 0)
    kernel = kernel + kernel.T
    return np.linalg.matrix_power(kernel / kernel.sum(axis=1, keepdims=True), t) @ values


@needs_magic
def test_magic_against_its_published_algorithm_computed_densely(capfd):
    cells = hold_out(study(40, seed=6))
    masked = random_mask(cells, 0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = Magic().predict(cells, masked)[False].counts
    assert capfd.readouterr() == ("", "")
    visible = np.where(masked.mask, 0, cells.counts.toarray()).astype(float)
    total = visible.sum(axis=1, keepdims=True)
    relative = published_magic(np.sqrt(1e4 * visible / total)) ** 2
    scaled = relative * total / np.where(masked.mask, 0, relative).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(got, scaled[masked.cells, masked.genes], rtol=1e-4)


def test_a_missing_package_is_a_reason(monkeypatch):
    import sys
    import types

    masked = random_mask(CELLS, 0.3)
    # None: nothing of the name is installed; a module: another package of the same name is.
    for module in (None, types.ModuleType("magic")):
        monkeypatch.setitem(sys.modules, "magic", module)
        with pytest.raises(Unavailable, match="magic-impute is not installed"):
            Magic().predict(CELLS, masked)


# Where there is no answer


def test_methods_say_why_they_cannot_answer():
    genes, cells = drawing.mask_genes(CELLS, np.array([1, 4])), drawing.mask_cells(CELLS, 2, 0)
    everything = Masked.of(CELLS, np.ones(CELLS.tokens.shape, bool))
    for method, draw, reason in (
        (KnnSmoothing(None), genes, "training"),
        (CommonLevel(True, None), genes, "training"),
        (KnnSmoothing(TRAIN), cells, "masked cells"),
        (OwnKnnSmoothing(), cells, "masked cells"),
        (Magic(), cells, "masked cells"),
        (OwnKnnSmoothing(), genes, "masked in all cells"),
        (Magic(), genes, "masked in all cells"),
        (NeighborMean(CELLS), everything, "without masked genes"),
    ):
        with pytest.raises(Unavailable, match=reason):
            method.predict(CELLS, draw)


def test_the_reference_baseline_is_the_first_method():
    for train in (None, TRAIN):
        for whole in (False, True):
            names = [(m.name, m.fitted_on) for m in standard_methods(CELLS, train, whole_cells=whole)]
            assert names[0] == ("most common expressed level per gene", "other cells of the study")
            assert len(set(names)) == len(names) == 7 + 2 * whole
    spatial = hold_out(study(9, spatial=True))
    names = [method.name for method in standard_methods(spatial, None, whole_cells=True, magic=False)]
    assert names[4:7] == [
        "mean of the 5 nearest visible cells of the bag",
        "mean of the visible cells of the bag",
        "mean of the visible cells of the bag that express the gene",
    ]
    assert CELLS.tokens.shape[1] == POSITIONS
