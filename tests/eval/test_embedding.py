"""Embeddings beside baselines: every method has its row, and the same call gives the same numbers."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import numpy as np
import pytest
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from sct.errors import ConfigError, DataError, MissingExtraError
from sct.eval import metrics
from sct.eval.embedding.baselines import BaselineCells, classify
from sct.eval.embedding.measures import EmbeddingMethod, EmbeddingMetricOptions, measure, umap

needs_igraph = pytest.mark.skipif(
    find_spec("igraph") is None, reason='needs igraph: pip install "sct-jax[analysis]"'
)
needs_scib = pytest.mark.skipif(
    find_spec("scib_metrics") is None, reason='needs scib-metrics: pip install "sct-jax[analysis]"'
)
QUICK = EmbeddingMetricOptions(seeds=2, components=5, genes=20, baselines=("PCA",))
CLASSIFIERS = EmbeddingMetricOptions(
    seeds=2, components=5, baselines=("PCA + k-NN", "PCA + logistic regression")
)


def cells(n: int = 90, genes: int = 40, seed: int = 0) -> tuple[sparse.csr_matrix, np.ndarray, np.ndarray]:
    """Counts of three types, each with its own genes high, the labels, and an embedding that tells them."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(["B", "NK", "T"], n // 3))
    types = np.unique(labels, return_inverse=True)[1]
    rates = np.full((3, genes), 1.0)
    for each in range(3):
        rates[each, each * 10 : each * 10 + 10] = 4
    embedding = np.eye(3)[types] + rng.normal(0, 0.05, (n, 3))
    return (
        sparse.csr_matrix(rng.poisson(rates[types]).astype(np.float32)),
        labels,
        embedding.astype(np.float32),
    )


def rows(report) -> dict[str, dict]:
    return {row[0]: dict(zip(report.titles, row, strict=True)) for row in report.rows}


@pytest.fixture(autouse=True)
def no_scvi(monkeypatch):
    """scVI is absent, whether or not it is installed: its training has no place in a quick test."""
    monkeypatch.setitem(sys.modules, "scvi", None)


@pytest.mark.slow
@needs_igraph
def test_every_method_has_its_row_and_the_same_call_the_same_numbers(recwarn, capsys):
    counts, labels, embedding = cells()
    noise = EmbeddingMethod(lambda seed: np.random.default_rng(seed).normal(size=(90, 4)), "nothing", fits=2)
    options = EmbeddingMetricOptions(seeds=2, components=5, genes=20)
    report, numbers = measure({"model": embedding, "noise": noise}, counts, labels, options=options)
    assert report.titles == (
        "method", "fitted on", "5-NN accuracy", "macro F1", "NMI", "ARI", "silhouette", "remark",
    )  # fmt: skip
    table = rows(report)
    assert list(table) == [
        "model", "noise", "PCA", "HVG + PCA", "scVI", "PCA + 5-NN", "PCA + logistic regression",
    ]  # fmt: skip
    assert table["model"]["fitted on"] == "nothing (zero-shot)"
    assert table["model"]["5-NN accuracy"] == [1.0, 1.0]
    assert table["noise"]["5-NN accuracy"][0] < 0.6
    assert [len(table["noise"][column]) for column in ("NMI", "silhouette")] == [2, 2]
    assert len(table["model"]["silhouette"]) == 1  # nothing random
    for name in ("PCA", "HVG + PCA"):
        assert min(table[name]["5-NN accuracy"]) > 0.8
        assert table[name]["remark"] == ""
    for name in ("PCA + 5-NN", "PCA + logistic regression"):
        assert min(table[name]["5-NN accuracy"]) > 0.8
        assert table[name]["NMI"] == table[name]["silhouette"] == "n/a"
    assert table["scVI"]["remark"].endswith("pip install scvi-tools")
    assert table["scVI"]["NMI"] == "-"
    for name, values in numbers.items():
        assert {column: table[name][column] for column in values} == values
    assert not recwarn.list
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "arn" not in shown.err

    again, _ = measure({"model": embedding, "noise": noise}, counts, labels, options=options)
    assert again.as_dict() == report.as_dict()
    names = dict(zip(["B", "NK", "T"], ("z", "y", "x"), strict=True))
    _, renamed = measure(
        {"model": embedding, "noise": noise}, counts, [names[x] for x in labels], options=options
    )
    assert renamed == numbers


def test_what_fails_is_a_row_with_its_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "igraph", None)
    counts, labels, embedding = cells()
    broken = embedding.copy()
    broken[3, 1] = np.nan

    def fails(seed: int) -> np.ndarray:
        raise RuntimeError("out of luck\nat some line")

    methods = {"good": embedding, "broken": broken, "short": embedding[:50], "fails": EmbeddingMethod(fails)}
    table = rows(measure(methods, counts, labels, options=QUICK)[0])
    assert list(table) == [*methods, "PCA"]
    assert table["good"]["5-NN accuracy"] == [1.0, 1.0]
    assert table["good"]["NMI"] == table["good"]["ARI"] == "-"
    assert table["good"]["remark"] == 'clusters: igraph is not installed: pip install "sct-jax[analysis]"'
    assert "1 of 90 cells" in table["broken"]["remark"]
    assert "(50, 3)" in table["short"]["remark"]
    assert table["fails"]["remark"] == "RuntimeError: out of luck"
    for name in ("broken", "short", "fails"):
        assert {table[name][column] for column in ("5-NN accuracy", "macro F1", "NMI", "silhouette")} == {"-"}


def test_without_scanpy_its_baseline_is_a_row_with_the_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "scanpy", None)
    counts, labels, _ = cells()
    table = rows(
        measure({}, counts, labels, options=EmbeddingMetricOptions(seeds=1, baselines=("HVG + PCA",)))[0]
    )
    assert table["HVG + PCA"]["remark"] == 'scanpy is not installed: pip install "sct-jax[analysis]"'


def test_classifiers_that_cannot_run_are_rows_with_the_reason():
    counts, _, _ = cells()
    labels = ["a"] * 86 + ["b"] * 4
    table = rows(measure({}, counts, labels, options=CLASSIFIERS)[0])
    assert list(table) == ["PCA + 5-NN", "PCA + logistic regression"]
    assert all("1 of 2 labels" in row["remark"] and row["macro F1"] == "-" for row in table.values())


@pytest.mark.slow
def test_cells_without_a_label_are_left_out_and_counted():
    counts, labels, embedding = cells()
    labels = labels.astype(object)
    labels[5] = "unknown"
    batch = np.arange(90) % 2
    options = EmbeddingMetricOptions(
        seeds=1, components=5, baselines=("PCA", "PCA + k-NN"), scib=("graph connectivity",)
    )
    _, alone = measure({"model": embedding[4:]}, counts[4:], labels[4:], batch[4:], options)
    for nothing in (np.nan, None, " "):
        labels[:4] = nothing
        report, numbers = measure({"model": embedding}, counts, labels, batch, options)
        assert "4 cells without a label are excluded." in report.notes
        assert (
            "1 cells of 1 labels with fewer than 5 cells are excluded from accuracy and F1." in report.notes
        )
        assert "86 cells, 4 labels, 2 batches" in report.title
        np.testing.assert_equal(numbers, alone, err_msg=repr(nothing))  # NaN included


def test_wrong_input_is_a_sentence():
    counts, labels, embedding = cells()
    with pytest.raises(DataError, match="the same label"):
        measure({}, counts, ["T"] * 89 + [np.nan], options=QUICK)
    with pytest.raises(DataError, match="89 labels"):
        measure({}, counts, labels[1:], options=QUICK)
    with pytest.raises(DataError, match="80 batches"):
        measure({}, counts, labels, np.zeros(80), options=QUICK)
    with pytest.raises(DataError, match="same batch"):
        measure({}, counts, labels, np.zeros(90), options=QUICK)
    with pytest.raises(ConfigError, match="'PCA'"):
        measure({"PCA": embedding}, counts, labels, options=QUICK)
    with pytest.raises(ConfigError, match="seeds"):
        EmbeddingMetricOptions(seeds=0)
    with pytest.raises(ConfigError, match=r"'MAGIC'.*PCA"):
        EmbeddingMetricOptions(baselines=("MAGIC",))


def test_log_counts_by_hand():
    made = BaselineCells(sparse.csr_matrix(np.array([[1, 3], [0, 0]], np.float32)), np.zeros(2), None)
    np.testing.assert_allclose(made.log.toarray(), [[np.log1p(2500), np.log1p(7500)], [0, 0]], rtol=1e-6)


def test_classifiers_see_the_training_folds_alone():
    counts, labels, _ = cells(60)
    names = metrics.codes(labels)
    made = BaselineCells(counts, names, None, components=4)
    got = classify(made, seed=3, folds=4, k=3)
    predicted = {"knn": np.zeros(60), "logistic": np.zeros(60)}
    dense = made.log.toarray().astype(float)
    for train, test in metrics.stratified_folds(names, 4, 3)[0]:
        pca = PCA(4, svd_solver="full").fit(dense[train])
        for name, model in (
            ("knn", KNeighborsClassifier(3)),
            ("logistic", LogisticRegression(max_iter=1000)),
        ):
            model.fit(pca.transform(dense[train]), names[train])
            predicted[name][test] = model.predict(pca.transform(dense[test]))
    for name, each in predicted.items():
        assert got[name] == metrics.accuracy_and_f1(names, each)
    whole = PCA(4, svd_solver="full").fit_transform(dense)
    np.testing.assert_allclose(np.abs(made.principal), np.abs(whole), atol=2e-2)


def test_classifiers_of_shuffled_labels_are_at_chance():
    counts, labels, _ = cells(300)
    shuffled = np.random.default_rng(1).permutation(labels)
    _, numbers = measure({}, counts, shuffled, options=CLASSIFIERS)
    for values in numbers.values():
        assert abs(np.mean(values["5-NN accuracy"]) - 1 / 3) < 0.1


@pytest.mark.slow
@needs_scib
def test_batches_bring_the_columns_of_scib():
    counts, labels, embedding = cells()
    batch = np.random.default_rng(0).integers(0, 2, 90).astype(str)
    chosen = ("isolated labels", "graph connectivity", "PCR comparison")
    options = EmbeddingMetricOptions(seeds=1, components=5, baselines=("PCA", "PCA + k-NN"), scib=chosen)
    report, numbers = measure({"model": embedding}, counts, labels, batch, options)
    assert report.titles[7:] == (*chosen, "bio", "batch", "total", "remark")
    table = rows(report)
    assert numbers["model"]["bio"] == numbers["model"]["isolated labels"]
    # The components are what the comparison is with.
    assert numbers["PCA"]["PCR comparison"] == [0.0]
    assert table["PCA + 5-NN"]["bio"] == "n/a"


@pytest.mark.slow
def test_umap_is_seeded_and_keeps_types_together(recwarn):
    pytest.importorskip("umap", reason='needs umap-learn: pip install "sct-jax[analysis]"')
    _, labels, embedding = cells()
    picture = umap(embedding, seed=1)
    assert picture.shape == (90, 2)
    assert picture.dtype == np.float32
    assert metrics.knn_accuracy(picture, labels).accuracy == 1
    np.testing.assert_array_equal(picture, umap(embedding, seed=1))
    assert (picture != umap(embedding, seed=2)).any()
    assert not recwarn.list


def test_umap_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(MissingExtraError, match="umap-learn"):
        umap(np.zeros((10, 2)))
    with pytest.raises(DataError, match="UMAP"):
        umap(np.zeros((3, 2)))


@pytest.mark.slow
def test_components_of_real_cells_tell_their_types(shared_data):
    import anndata

    adata = anndata.read_h5ad(shared_data / "single_cell" / "pbmc3k_10x.h5ad")
    options = EmbeddingMetricOptions(seeds=1, baselines=("PCA",))
    _, numbers = measure({}, adata.X, adata.obs["cell_type"], options=options)
    assert numbers["PCA"]["5-NN accuracy"][0] > 0.85
