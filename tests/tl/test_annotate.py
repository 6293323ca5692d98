"""Laws of `sct.tl.annotate` and `sct.tl.spatial_neighbors`."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import sct
from sct.errors import ConfigError, DataError
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
    sct.tl.embed(again, model, batch_key="batch")
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
        ({"label_key": "kind", "use_rep": "Y"}, DataError, "no obsm\\['Y'\\]"),
        ({"label_key": "kind", "use_rep": "X", "threshold": 2}, ConfigError, "threshold"),
        ({"label_key": "kind", "use_rep": "X", "n_neighbors": 0}, ConfigError, "n_neighbors"),
        ({"label_key": "kind", "use_rep": "X", "n_neighbours": 3}, ConfigError, "'n_neighbours'"),
        ({"label_key": "kind", "use_rep": "X", "seed": 3}, ConfigError, "give one of both"),
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
