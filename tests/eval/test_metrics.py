"""Metrics against scikit-learn on the labels themselves."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse
from sklearn.metrics import matthews_corrcoef

from sct.eval import metrics
from sct.eval.metrics import matthews, matthews_from_confusion

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


# Embeddings

needs_igraph = pytest.mark.skipif(
    find_spec("igraph") is None, reason='needs igraph: pip install "sct-jax[analysis]"'
)
needs_scib = pytest.mark.skipif(
    find_spec("scib_metrics") is None, reason='needs scib-metrics: pip install "sct-jax[analysis]"'
)


def blobs(sizes: tuple[int, ...] = (30, 30, 30), spread: float = 0.1, seed: int = 0):
    """Cells (N, 3) around one corner for each label, in random order."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    return (np.eye(len(sizes), 3)[labels] + rng.normal(0, spread, (len(labels), 3))).astype(
        np.float32
    ), labels


def test_accuracy_and_f1_by_hand():
    # F1 of the first label: precision 1, recall 2/3; of the second: precision 1/2, recall 1.
    assert metrics.accuracy_and_f1(np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1])) == (
        0.75,
        pytest.approx((0.8 + 2 / 3) / 2),
    )


@pytest.mark.parametrize("seed", range(3))
def test_knn_accuracy_by_hand(seed):
    # Ten cells a and two of ten b on one point: five neighbours there are never three b.
    place = np.array([0.0] * 12 + [100.0] * 8)[:, None]
    labels = ["a"] * 10 + ["b"] * 10
    score = metrics.knn_accuracy(place, labels, seed=seed)
    assert score.accuracy == 0.9
    assert score.macro_f1 == pytest.approx((2 * (10 / 12) / (1 + 10 / 12) + 2 * 0.8 / 1.8) / 2)
    assert (score.left_out_cells, score.left_out_labels) == (0, 0)


def test_labels_smaller_than_the_folds_are_left_out_and_counted():
    embedding, labels = blobs((30, 30))
    alone = metrics.knn_accuracy(embedding, labels)
    # Eight cells of three rare labels on top of the others: none is learnt from, none is scored.
    crowded = np.vstack([embedding, embedding[:8]])
    names = np.concatenate([labels, [2, 2, 2, 2, 3, 3, 3, 4]])
    score = metrics.knn_accuracy(crowded, names)
    assert score == (alone.accuracy, alone.macro_f1, 8, 3)
    with pytest.raises(ValueError, match="1 of 2 labels"):
        metrics.knn_accuracy(embedding[:9], [0] * 5 + [1] * 4)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.permutations(["T", "B", "NK"]))
def test_what_labels_are_called_changes_no_metric(seed, names):
    embedding, labels = blobs((20, 25, 30), spread=1.0, seed=seed)
    renamed = np.array(names)[labels]
    assert metrics.knn_accuracy(embedding, renamed, 4, seed=seed) == metrics.knn_accuracy(
        embedding, labels, 4, seed=seed
    )
    assert metrics.silhouette(embedding, renamed) == metrics.silhouette(embedding, labels)
    clusters = np.random.default_rng(seed).integers(0, 4, len(labels))
    assert metrics.nmi(renamed, clusters) == metrics.nmi(labels, clusters)
    assert metrics.ari(renamed, clusters) == metrics.ari(labels, clusters)


def test_shuffled_labels_give_chance():
    embedding, labels = blobs((200, 200))
    assert metrics.knn_accuracy(embedding, labels).accuracy > 0.99
    shuffled = np.random.default_rng(1).permutation(labels)
    score = metrics.knn_accuracy(embedding, shuffled)
    assert abs(score.accuracy - 0.5) < 0.1
    assert abs(metrics.silhouette(embedding, shuffled)) < 0.02
    assert abs(metrics.ari(labels, shuffled)) < 0.02


def test_folds_are_a_seeded_partition_with_every_label_in_each():
    labels = np.repeat([0, 1, 2], [10, 15, 3])
    pairs, kept = metrics.stratified_folds(labels, 5, seed=3)
    assert kept.sum() == 25
    np.testing.assert_array_equal(np.sort(np.concatenate([test for _, test in pairs])), np.flatnonzero(kept))
    for train, test in pairs:
        assert not set(train) & set(test)
        np.testing.assert_array_equal(np.bincount(labels[test]), [2, 3])
    again, other = (metrics.stratified_folds(labels, 5, seed=seed)[0] for seed in (3, 4))
    assert all(np.array_equal(a[1], b[1]) for a, b in zip(pairs, again, strict=True))
    assert not all(np.array_equal(a[1], b[1]) for a, b in zip(pairs, other, strict=True))


def test_nmi_and_ari_by_hand():
    labels = ["x", "x", "y", "y"]
    mutual = 0.5 * np.log(4 / 3) + 0.25 * np.log(2 / 3) + 0.25 * np.log(2)
    entropies = np.log(2), -0.75 * np.log(0.75) - 0.25 * np.log(0.25)
    assert metrics.nmi(labels, [0, 0, 0, 1]) == pytest.approx(mutual / np.mean(entropies))
    assert metrics.ari(labels, [0, 0, 0, 1]) == 0
    assert metrics.ari(labels, [0, 0, 1, 2]) == pytest.approx(4 / 7)
    assert metrics.nmi(labels, ["b", "b", "a", "a"]) == pytest.approx(1)
    assert metrics.ari(labels, ["b", "b", "a", "a"]) == 1


LINE = np.array([[0.0], [1.0], [10.0], [12.0]])
WIDTHS = np.array([10 / 11, 9 / 10, 7.5 / 9.5, 9.5 / 11.5])


def test_silhouette_by_hand():
    assert metrics.silhouette(LINE, ["a", "a", "b", "b"]) == pytest.approx(WIDTHS.mean())
    assert np.isnan(metrics.silhouette(LINE, ["a"] * 4))
    assert np.isnan(metrics.silhouette(LINE, ["a", "b", "c", "d"]))


def test_silhouette_of_many_cells_is_that_of_a_seeded_sample():
    embedding, labels = blobs((200, 200), spread=0.5)
    whole = metrics.silhouette(embedding, labels)
    samples = [metrics.silhouette(embedding, labels, max_cells=100, seed=seed) for seed in (0, 0, 1)]
    assert samples[0] == samples[1] != samples[2]
    np.testing.assert_allclose(samples, whole, atol=0.1)
    assert metrics.silhouette(embedding, labels, max_cells=400, seed=1) == whole


def test_the_first_neighbour_is_the_cell_itself_even_among_equals():
    place = np.array([[0.0], [0.0], [0.0], [3.0], [7.0]])
    indices, distances = metrics.exact_neighbors(place, 3)
    np.testing.assert_array_equal(indices[:, 0], np.arange(5))
    np.testing.assert_array_equal(distances, [[0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 3, 3], [0, 4, 7]])
    assert all(len(set(row)) == 3 for row in indices.tolist())


@needs_igraph
def test_two_cliques_are_two_clusters():
    graph = sparse.csr_matrix(sparse.block_diag([np.ones((4, 4)) - np.eye(4)] * 2))
    for seed in range(3):
        assert metrics.leiden_of_graph(graph, seed=seed).tolist() in ([0] * 4 + [1] * 4, [1] * 4 + [0] * 4)


@pytest.mark.slow
@needs_igraph
def test_leiden_finds_what_lies_apart_and_is_seeded():
    embedding, labels = blobs((40, 50, 60), spread=0.01)
    clusters = metrics.leiden_clusters(embedding, 0.2, seed=1)
    assert metrics.ari(labels, clusters) == 1
    np.testing.assert_array_equal(clusters, metrics.leiden_clusters(embedding, 0.2, seed=1))
    assert len(set(metrics.leiden_clusters(embedding, 5.0).tolist())) > 3
    graph = metrics.neighbor_graph(embedding)
    assert (graph != graph.T).nnz == 0
    rows, columns = graph.nonzero()
    np.testing.assert_array_equal(labels[rows], labels[columns])


@pytest.mark.parametrize("missing", ["scanpy", "igraph", "scib_metrics"])
def test_a_missing_library_is_told_with_what_to_install(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    embedding, labels = blobs()
    calls = {
        "scanpy": lambda: metrics.leiden_clusters(embedding),
        "igraph": lambda: metrics.leiden_of_graph(sparse.eye(4, format="csr")),
        "scib_metrics": lambda: metrics.scib(embedding, labels, labels),
    }
    with pytest.raises(ImportError, match=r'pip install "sct-jax\[analysis\]"'):
        calls[missing]()


def global_state() -> list[int]:
    return np.random.get_state()[1].tolist()  # noqa: NPY002


def test_what_libraries_do_to_the_process_stays_inside(recwarn, caplog):
    before = logging.getLogger().handlers[:], os.environ.get("XLA_FLAGS"), global_state()
    with metrics.quiet():
        warnings.warn("from a library", stacklevel=1)
        logging.getLogger("library").warning("from a library")
        logging.getLogger().addHandler(logging.NullHandler())
        os.environ["XLA_FLAGS"] = "--changed"
        np.random.seed(5)  # noqa: NPY002
    after = logging.getLogger().handlers[:], os.environ.get("XLA_FLAGS"), global_state()
    assert before == after
    assert not recwarn.list
    assert not caplog.records
    logging.getLogger("ours").warning("heard again")
    assert caplog.messages == ["heard again"]


@needs_scib
def test_scib_silhouettes_by_hand():
    only = ("label silhouette", "isolated labels")
    # The first label lies in two batches, the second in one: it is the isolated one.
    scores = metrics.scib(LINE, ["a", "a", "b", "b"], [0, 1, 1, 1], metrics=only)
    assert scores["label silhouette"] == pytest.approx((WIDTHS.mean() + 1) / 2, rel=1e-5)
    assert scores["isolated labels"] == pytest.approx((WIDTHS[2:].mean() + 1) / 2, rel=1e-5)
    assert scores["bio"] == pytest.approx(np.mean([scores[name] for name in only]))
    assert np.isnan(scores["batch"])
    assert np.isnan(scores["total"])


@needs_scib
def test_scib_batch_silhouette_by_hand():
    # Cosine distances: 0 along one axis, 1 between two. Batches on their own axes are apart (width 1, score 0);
    # batches with a cell on each have width (1/2 - 1) / 1.
    axes = np.eye(2, dtype=np.float32)
    apart = metrics.scib(axes[[0, 0, 1, 1]], [0] * 4, [0, 0, 1, 1], metrics=("BRAS",))
    mixed = metrics.scib(axes[[0, 1, 0, 1]], [0] * 4, [0, 0, 1, 1], metrics=("BRAS",))
    assert apart["BRAS"] == pytest.approx(0, abs=1e-6)
    assert mixed["BRAS"] == pytest.approx(0.5)
    alone = metrics.scib(axes[[0, 1, 0, 1]], [0, 0, 1, 1], [0, 0, 1, 1], metrics=("BRAS",))
    assert np.isnan(alone["BRAS"])


@needs_scib
def test_scib_neighbourhoods_by_hand():
    # Six cells on each of two points, three of each batch: of the five others two are of a cell's own batch.
    place = np.repeat([[0.0], [50.0]], 6, axis=0)
    scores = metrics.scib(place, np.repeat([0, 1], 6), np.tile([0, 1], 6), metrics=("cLISI", "iLISI"))
    assert scores["cLISI"] == pytest.approx(1, abs=1e-5)
    assert scores["iLISI"] == pytest.approx(1 / ((2 / 5) ** 2 + (3 / 5) ** 2) - 1, rel=1e-5)
    assert scores["total"] == pytest.approx(0.6 * scores["cLISI"] + 0.4 * scores["iLISI"])
    # A label in two far clumps of twenty, another in one.
    rng = np.random.default_rng(0)
    place = np.repeat([[0.0], [1000.0], [2000.0]], 20, axis=0) + rng.normal(size=(60, 1))
    scores = metrics.scib(place, [0] * 40 + [1] * 20, [0, 1] * 30, metrics=("graph connectivity",))
    assert scores["graph connectivity"] == pytest.approx(0.75)


@needs_scib
def test_scib_component_regression_by_hand():
    # All variance lies between batches; half of it where a second direction of the same size has none of it.
    between = np.repeat([[-1.0], [1.0]], 4, axis=0)
    within = np.tile([[-1.0], [1.0]], (4, 1))
    batch, labels = between.ravel(), np.tile([0, 1], 4)
    for embedding, expected in ((between, 0), (within, 1), (np.hstack([between, within]), 0.5)):
        score = metrics.scib(embedding, labels, batch, before=between, metrics=("PCR comparison",))
        assert score["PCR comparison"] == pytest.approx(expected, abs=1e-5)
    assert np.isnan(metrics.scib(within, labels, batch, metrics=("PCR comparison",))["PCR comparison"])


@needs_scib
@pytest.mark.slow
def test_scib_tells_mixed_batches_from_separate_ones():
    embedding, labels = blobs((80, 80), spread=0.05)
    batch = np.random.default_rng(1).integers(0, 2, len(labels))
    moved = embedding + 0.5 * np.eye(3)[2] * batch[:, None]
    mixed = metrics.scib(embedding, labels, batch, before=moved)
    apart = metrics.scib(moved, labels, batch, before=moved)
    assert list(mixed) == list(metrics.SCIB_METRICS)
    assert apart["kBET"] == apart["PCR comparison"] == 0
    assert mixed["kBET"] > 0.8
    assert mixed["batch"] > apart["batch"] + 0.3
    assert mixed["k-means NMI"] == mixed["k-means ARI"] == pytest.approx(1)
    assert mixed["bio"] == pytest.approx(np.mean([mixed[name] for name in metrics.SCIB_BIO]))
    assert mixed["total"] == pytest.approx(0.6 * mixed["bio"] + 0.4 * mixed["batch"])
    renamed = np.array(["x", "a"])[labels]
    some = metrics.scib(embedding, renamed, batch, before=moved, metrics=("cLISI", "iLISI", "BRAS"))
    for name in ("cLISI", "iLISI", "BRAS"):
        assert some[name] == pytest.approx(mixed[name], abs=2e-5)


IMPORT_SCIB = """
import logging, os
import jax, numpy as np
from sct.eval import metrics
settings = dict(jax.config.values)
environment = {key: value for key, value in os.environ.items() if key.startswith(("XLA", "JAX"))}
x = np.random.default_rng(0).normal(size=(20, 3))
metrics.scib(x, [0, 1] * 10, [0] * 10 + [1] * 10, metrics=("isolated labels",))
assert dict(jax.config.values) == settings
assert {key: value for key, value in os.environ.items() if key.startswith(("XLA", "JAX"))} == environment
assert not logging.getLogger().handlers
"""


@needs_scib
@pytest.mark.slow
def test_scib_leaves_jax_and_logging_as_they_were():
    done = subprocess.run([sys.executable, "-c", IMPORT_SCIB], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""
