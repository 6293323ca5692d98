"""Laws of `sct.tl.annotate` and `sct.tl.spatial_neighbors`."""

from __future__ import annotations

import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import sct
from sct.errors import ConfigError, DataError
from sct.inference.labels import warn_of_labels
from tests.tl.conftest import CELLS


def blobs(n: int, seed: int, labels: bool = True) -> ad.AnnData:
    """Two groups of cells that an embedding separates."""
    rng = np.random.default_rng(seed)
    group = np.arange(n) % 2
    cells = ad.AnnData(np.ones((n, 1), np.float32), pd.DataFrame(index=[f"c{i}" for i in range(n)]))
    cells.obsm["X"] = np.eye(2)[group] * 5 + rng.normal(0, 0.1, (n, 2))
    if labels:
        cells.obs["kind"] = np.array(["T", "B"])[group]
    return cells


def test_labels_of_the_nearest_cells():
    query, reference = blobs(10, 0, labels=False), blobs(40, 1)
    sct.tl.annotate(query, reference=reference, label_key="kind", use_rep="X")
    assert list(query.obs["sct_label"]) == ["T", "B"] * 5
    np.testing.assert_array_equal(query.obs["sct_label_probability"], 1)
    np.testing.assert_allclose(query.obsm["sct_label_probabilities"].sum(axis=1), 1)


def test_a_split_vote_is_unknown_and_its_share_is_told():
    reference = blobs(4, 1)
    query = blobs(1, 0, labels=False)
    query.obsm["X"][:] = [[5.0, 5.1]]
    with pytest.warns(UserWarning, match=r"100%.*'unknown'"):
        sct.tl.annotate(
            query, reference=reference, label_key="kind", use_rep="X", n_neighbors=4, threshold=0.6
        )
    assert query.obs["sct_label"].iloc[0] == "unknown"
    assert query.obs["sct_label_probability"].iloc[0] == 0.5
    sct.tl.annotate(query, reference=reference, label_key="kind", use_rep="X", n_neighbors=4, threshold=0.5)
    assert query.obs["sct_label"].iloc[0] == "B", "of equal shares that of the nearer cells"


@pytest.mark.slow
def test_one_label_for_all_cells_is_doubted(adata, model):
    query, reference = adata[:20].copy(), adata[20:].copy()
    reference.obs["cell_type"] = ["T"] * (reference.n_obs - 1) + ["B"]
    options = {"reference": reference, "label_key": "cell_type"}
    with pytest.warns(
        UserWarning, match=r"20 of 20 cells have the same label 'T' out of 2 candidates \(mean probability"
    ):
        sct.tl.annotate(query, model, n_contexts=1, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        sct.tl.annotate(query, use_rep="X_sct", **options)
    assert set(query.obs["sct_label"]) == {"T"}
    cases = {
        "few cells": (["T"] * 19, ["T", "B"], 0),
        "nothing to choose from": (["T"] * 90, ["T"], 0),
        "several labels": (["T"] * 88 + ["B"] * 2, ["T", "B"], 0),
        "nearly all": (["T"] * 1999 + ["B"], ["T", "B"], 1),
        "all unknown": (["?"] * 90, ["T", "B"], 1),
    }
    wrong = {}
    for name, (labels, answers, expected) in cases.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warn_of_labels(np.array(labels, object), answers, np.ones(len(labels)), "?", "why")
        if len(caught) != expected:
            wrong[name] = [str(each.message) for each in caught]
    assert not wrong


def test_cells_without_a_label_take_no_part():
    query, reference = blobs(10, 0, labels=False), blobs(40, 1)
    reference.obs["kind"] = reference.obs["kind"].where(np.arange(40) > 20)
    reference.obsm["X"][:20] = query.obsm["X"][0]
    sct.tl.annotate(query, reference=reference, label_key="kind", use_rep="X", n_neighbors=3)
    assert list(query.obs["sct_label"]) == ["T", "B"] * 5
    reference.obs["kind"] = np.nan
    with pytest.raises(DataError, match="reference"):
        sct.tl.annotate(query, reference=reference, label_key="kind", use_rep="X")


def test_a_model_embeds_both(adata, model):
    query, reference = adata[:20].copy(), adata[20:].copy()
    sct.tl.annotate(
        query, model, reference=reference, label_key="cell_type", batch_key="batch", threshold=0.0
    )
    assert "X_sct" in query.obsm
    assert "X_sct" in reference.obsm
    assert set(query.obs["sct_label"]) <= set(reference.obs["cell_type"])
    again = adata[:20].copy()
    sct.tl.embed(again, model, batch_key="batch", n_contexts=3)
    np.testing.assert_array_equal(again.obsm["X_sct"], query.obsm["X_sct"])


def test_itself_as_the_reference_gives_its_own_labels(adata, model):
    reference = adata.copy()
    sct.tl.annotate(adata, model, reference=reference, label_key="cell_type", n_neighbors=1)
    assert list(adata.obs["sct_label"].astype(str)) == list(adata.obs["cell_type"].astype(str))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"label_key": "type", "use_rep": "X"}, DataError, r"'type'.*'kind'"),
        ({"label_key": "kind"}, ConfigError, "model"),
        ({"label_key": "kind", "use_rep": "Y"}, DataError, r"obsm of adata\) is 'Y'"),
        ({"label_key": "kind", "use_rep": "X", "threshold": 2}, ConfigError, "threshold"),
        ({"label_key": "kind", "use_rep": "X", "n_neighbors": 0}, ConfigError, "n_neighbors"),
        ({"label_key": "kind", "use_rep": "X", "templates": 3}, ConfigError, "`templates`.*reference"),
        ({"label_key": "kind", "abstract": "A study."}, ConfigError, "`abstract`.*reference"),
        ({"label_key": "kind", "use_rep": "X", "seed": 3}, ConfigError, "seed.*use_rep='X'"),
    ],
)
def test_wrong_input_is_a_sentence(options, error, words):
    with pytest.raises(error, match=words):
        sct.tl.annotate(blobs(4, 0), reference=blobs(8, 1), **options)


def test_neighbours_stay_on_their_slide(adata):
    sct.tl.spatial_neighbors(adata, cells_per_bag=5, batch_key="batch")
    found, slide = adata.obsm["sct_neighbors"], adata.obs["batch"].to_numpy()
    assert found.shape == (CELLS, 5)
    np.testing.assert_array_equal(found[:, 0], np.arange(CELLS))
    assert (slide[found] == slide[:, None]).all()
    places = adata.obsm["spatial"]
    distance = np.linalg.norm(places[found] - places[:, None], axis=2)
    assert (np.diff(distance, axis=1) >= -1e-3).all()
    np.testing.assert_allclose(adata.obs["sct_neighbors_radius"], distance[:, -1], rtol=1e-5)
    sct.tl.spatial_neighbors(adata, cells_per_bag=CELLS + 1)
    assert (adata.obsm["sct_neighbors"][:, -1] == -1).all()


def test_a_batch_that_neither_has(adata, model):
    with pytest.raises(DataError, match="reference"):
        sct.tl.annotate(adata, model, reference=adata.copy(), label_key="cell_type", batch_key="donr")


def test_several_contexts_are_averaged_and_their_agreement_is_told(adata, model):
    query, reference = adata[:20].copy(), adata[20:].copy()
    options = {"label_key": "cell_type", "n_neighbors": 3, "threshold": 0.0}
    drawn = []
    for seed in (4, 5, 6):
        one = query.copy()
        sct.tl.annotate(one, model, reference=reference, seed=seed, n_contexts=1, **options)
        assert "sct_label_agreement" not in one.obs
        drawn.append((one.obsm["X_sct"], reference.obsm["X_sct"].copy(), one.obs["sct_label"].to_numpy(str)))
    sct.tl.annotate(query, model, reference=reference, seed=4, **options)
    for place, cells in enumerate((query, reference)):
        mean = np.mean([each[place] for each in drawn], axis=0)
        np.testing.assert_allclose(cells.obsm["X_sct"], mean, rtol=1e-5, atol=1e-5)
        assert cells.uns["X_sct"]["n_contexts"] == 3
    label = query.obs["sct_label"].to_numpy(str)
    agreement = np.mean([each[2] == label for each in drawn], axis=0)
    np.testing.assert_allclose(query.obs["sct_label_agreement"], agreement, rtol=1e-6)
    assert query.uns["sct_label"]["agreement"] == pytest.approx(agreement.mean())
    assert 0 < agreement.mean() < 1, "contexts differ, so that the comparison says something"
    again = query.copy()
    sct.tl.annotate(again, reference=reference, use_rep="X_sct", **options)
    assert again.obs["sct_label"].to_numpy(str).tolist() == label.tolist()
    assert "sct_label_agreement" not in again.obs, "that of an earlier call"
    sct.tl.annotate(query, model, reference=reference, spatial_key="spatial", **options)
    assert "sct_label_agreement" not in query.obs, "bags of neighbours are not drawn"
    for given, words in (
        ({"n_contexts": 0}, "n_contexts is 0"),
        ({"n_contexts": 2, "spatial_key": "spatial"}, "do not pass `n_contexts`"),
        ({"n_contexts": 2, "use_rep": "X_sct"}, "n_contexts.*use_rep='X_sct'"),
    ):
        with pytest.raises(ConfigError, match=words):
            sct.tl.annotate(query, model, reference=reference, **options, **given)


def test_cells_that_share_few_genes_with_the_reference(adata, model):
    known = adata[:, np.flatnonzero(model.genes.align(adata.var).columns >= 0)]
    size = known.n_vars
    cases = {
        "none": (0, DataError),
        "hardly any": (1, DataError),
        "few": (size // 8, UserWarning),
        "most": (size // 3, None),
    }
    wrong = []
    for name, (shared, expected) in cases.items():
        half = size // 2
        query, reference = known[:20, : half + shared].copy(), known[20:, half:].copy()
        for cells in (query, reference):
            counts = cells.X.toarray()
            counts[:, 0] += 1  # no cell is empty
            cells.X = counts
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                sct.tl.annotate(query, model, reference=reference, label_key="cell_type", n_contexts=1)
                found = [each.category for each in caught if f"only {shared} of" in str(each.message)]
            except DataError as error:
                found = [DataError if f"only {shared} of" in str(error) else error]
        if found != [expected] * (expected is not None):
            wrong.append((name, found, [str(each.message) for each in caught]))
    assert not wrong
