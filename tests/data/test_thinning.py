"""Thinned counts, labels and studies in training bags, and the frequencies of levels."""

from __future__ import annotations

import pickle

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from sct.data.bags import BagOptions, BagSource
from sct.data.cell_labels import label_names, label_numbers
from sct.data.level_prior import log_level_prior
from sct.data.loader import Loader
from sct.data.thinning import thin
from sct.data.tokenize import bin_counts
from sct.errors import ConfigError, DataError
from tests.data.fake_study import toy_study

THINNED = BagOptions(4, 16, noise_fraction=0, thinning=(0.3, 0.9))


def test_thinned_counts_are_binomial():
    counts = sp.csr_matrix(np.tile([0, 1, 5, 40], (20_000, 1)).astype(np.float32))
    before = counts.copy()
    fixed = thin(counts, 0.3, 0.3, np.random.default_rng(0)).toarray()
    np.testing.assert_allclose(fixed.mean(0), [0, 0.3, 1.5, 12], rtol=0.03)
    np.testing.assert_allclose(fixed.var(0), [0, 0.21, 1.05, 8.4], rtol=0.05)
    # With a share drawn for each cell, E[s] = 0.6 and Var[s] = 0.8² / 12.
    drawn = thin(counts, 0.2, 1.0, np.random.default_rng(0))
    spread = 40 * (0.6 - (0.36 + 0.64 / 12)) + 40**2 * 0.64 / 12
    dense = drawn.toarray()
    np.testing.assert_allclose(dense[:, 3].mean(), 24, rtol=0.02)
    np.testing.assert_allclose(dense[:, 3].var(), spread, rtol=0.05)
    assert np.corrcoef(dense[:, 2], dense[:, 3])[0, 1] > 0.3, "the genes of a cell have one share"
    assert drawn.data.min() > 0
    assert (counts != before).nnz == 0, "the counts that are given stay as they are"
    np.testing.assert_array_equal(
        thin(counts, 1.0, 1.0, np.random.default_rng(0)).toarray(), counts.toarray()
    )


def test_fractions_are_not_thinned():
    with pytest.raises(DataError, match=r"data\.thinning"):
        thin(sp.csr_matrix(np.array([[1.5, 2.0]], np.float32)), 0.5, 1.0, np.random.default_rng(0))


def test_training_bags_are_thinned_in_the_same_way_each_time():
    source = BagSource([toy_study(40), toy_study(20, name="other")], THINNED)
    first = source.record(3, 2)
    for again in (pickle.loads(pickle.dumps(source)), BagSource([source.studies[0]], THINNED)):
        np.testing.assert_array_equal(again.record(3, 2)["tokens"], first["tokens"])
    whole = bin_counts(source.studies[0].read_rows(first["rows"]), num_positions=16).tokens
    np.testing.assert_array_equal(first["full_tokens"], whole)
    assert (first["tokens"] != whole).any()
    assert not first["tokens"][whole == 0].any(), "no gene appears"
    # All cells in one bag: the same cells in each epoch.
    one = BagSource([toy_study(4)], THINNED)
    bags = [one.record(0, epoch) for epoch in (0, 1)]
    np.testing.assert_array_equal(bags[0]["rows"], bags[1]["rows"])
    assert (bags[0]["tokens"] != bags[1]["tokens"]).any()
    other = BagSource([toy_study(4)], BagOptions(4, 16, noise_fraction=0, thinning=(0.3, 0.9), seed=1))
    assert (other.record(0)["tokens"] != bags[0]["tokens"]).any()


def test_thinning_does_not_depend_on_threads_or_on_where_a_run_resumes():
    source = BagSource([toy_study(40)], THINNED)

    def tokens(threads: int, drawn: int, number: int) -> list[np.ndarray]:
        batches = Loader(source, 2, num_threads=threads).iterate(drawn)
        found = [next(batches)["tokens"] for _ in range(number)]
        batches.close()
        return found

    whole = tokens(0, 0, 8)
    np.testing.assert_array_equal(tokens(4, 0, 8), whole)
    np.testing.assert_array_equal(tokens(2, 10, 3), whole[5:])


def test_validation_bags_are_never_thinned():
    studies = [toy_study(10)]
    plain = BagSource(studies, BagOptions(4, 16, noise_fraction=0), exhaustive=True)
    options = BagOptions(4, 16, noise_fraction=0, thinning=(0.3, 0.9), with_study=True, label_key="x")
    bag = BagSource(studies, options, exhaustive=True).record(1)
    assert bag.keys() == plain.record(1).keys()
    np.testing.assert_array_equal(bag["tokens"], plain.record(1)["tokens"])


def test_cells_that_are_missing_in_a_thinned_bag_are_padding():
    bag = BagSource([toy_study(3)], THINNED).record(0)
    assert (bag["full_tokens"][3] == 5).all()
    assert (bag["tokens"][3] == 5).all()


@pytest.mark.parametrize(
    "thinning", [(0.5,), (0.0, 1.0), (0.9, 0.2), (0.5, 1.1), (0.1, 0.2, 0.3), ("0.2", 1.0), 0.5]
)
def test_a_wrong_range_of_thinning_is_refused(thinning):
    with pytest.raises(ConfigError, match=r"data\.thinning"):
        BagOptions(thinning=thinning)


def labeled(name: str, n_cells: int, entries: list[object] | None):
    study = toy_study(n_cells, name=name)
    study.obs_columns = () if entries is None else ("cl_id",)
    study.obs = lambda columns: pd.DataFrame({"cl_id": pd.Categorical(entries)})
    return study


def test_labels_travel_with_their_cells():
    studies = [
        labeled("a", 6, ["CL:2", "CL:1", None, " ", "CL:2", "CL:9"]),
        labeled("b", 3, None),
    ]
    names = label_names(studies, "cl_id")
    assert names == ("CL:1", "CL:2", "CL:9")
    np.testing.assert_array_equal(label_numbers(studies[0], "cl_id", names[:2]), [1, 0, -1, -1, 1, -1])
    options = BagOptions(4, 16, shuffle_cells=6, with_study=True, label_key="cl_id", label_names=names)
    source = BagSource(studies, options)
    bag, other = source.record(0), source.record(1)
    np.testing.assert_array_equal(bag["labels"], np.array([1, 0, -1, -1, 1, 2])[bag["rows"]])
    np.testing.assert_array_equal(other["labels"], [-1] * 4)
    assert [int(each["study"]) for each in (bag, other)] == [0, 1]
    assert bag["random_cells"]
    with pytest.raises(ConfigError, match=r"data\.label_key"):
        label_names(studies[1:], "cl_id")


def test_placeholders_are_no_labels():
    study = labeled("a", 7, ["CL:2", "unknown", "nan", "Unassigned", "CL:1", " NA ", "missing"])
    names = label_names([study], "cl_id")
    assert names == ("CL:1", "CL:2")
    np.testing.assert_array_equal(label_numbers(study, "cl_id", names), [1, -1, -1, -1, 0, -1, -1])
    with pytest.raises(ConfigError, match="1 labels"):
        label_names([labeled("b", 2, ["CL:2", "unknown"])], "cl_id")


def test_bags_of_neighbors_say_so():
    slide = toy_study(20, spatial=True)
    for spatial_bags in (True, False):
        options = BagOptions(4, 16, with_study=True, spatial_bags=spatial_bags)
        assert bool(BagSource([slide], options).record(0)["random_cells"]) != spatial_bags


def test_frequencies_of_levels_are_those_of_the_cells_that_measured_the_gene():
    studies = [toy_study(300), toy_study(100, seed=1, name="panel")]
    studies[1].measured[:6] = False
    options = BagOptions(8, 16, noise_fraction=0)
    found = np.exp(log_level_prior(BagSource(studies, options, exhaustive=True)))
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)
    levels = [bin_counts(study.counts).tokens for study in studies]
    for gene in range(12):
        known = levels[0][:, gene] if gene < 6 else np.concatenate([each[:, gene] for each in levels])
        np.testing.assert_allclose(found[gene], np.bincount(known, minlength=5) / len(known), atol=0.004)
    assert found[12:].min() > 0, "padding has the frequencies of an average gene"
    np.testing.assert_allclose(found[12], found[13])
    few = log_level_prior(BagSource(studies, options, exhaustive=True), cells=100)
    np.testing.assert_allclose(np.exp(few)[7:12], found[7:12], atol=0.2)
