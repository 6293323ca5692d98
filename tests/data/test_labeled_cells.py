"""Division of labeled cells into training, validation and test cells."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from sct.data.labeled_cells import MISSING, TEST, TRAIN, VALIDATION, AnnotatedCells, SplitOptions, divide
from sct.errors import DataError
from tests.cases import each
from tests.train import tuned_models


def table(cells: int = 200, donors: int = 10) -> tuple[pd.DataFrame, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.choice(["T", "B", "rare"], cells, p=[0.6, 0.35, 0.05]).astype(object)
    return pd.DataFrame({"donor": [f"d{i}" for i in rng.integers(donors, size=cells)]}), labels


def test_donors_are_in_one_split():
    obs, labels = table()
    split, how = divide(obs, labels, SplitOptions(donor_key="donor"))
    donors = {name: set(obs["donor"][split == name]) for name in (TRAIN, VALIDATION, TEST)}
    assert [len(donors[name]) for name in (TRAIN, VALIDATION, TEST)] == [7, 1, 2]
    assert not donors[TRAIN] & donors[TEST]
    assert not donors[VALIDATION] & (donors[TRAIN] | donors[TEST])
    assert "by donor" in how
    other, _ = divide(obs, labels, SplitOptions(donor_key="donor", split_seed=1))
    assert (other != split).any()
    again, _ = divide(obs, labels, SplitOptions(donor_key="donor"))
    assert (again == split).all()


def test_without_donors_each_type_is_divided():
    obs, labels = table(donors=2)
    for options in (SplitOptions(), SplitOptions(donor_key="donor")):
        split, how = divide(obs, labels, options)
        for label in ("T", "B", "rare"):
            share = np.mean(split[labels == label] == TEST)
            assert 0.1 < share < 0.35
            assert (split[labels == label] == TRAIN).any()
        assert "at random within each label" in how
    assert "only 2 donors" in how


def test_a_column_gives_the_split():
    obs, labels = table()
    obs["fold"] = np.where(np.arange(200) < 150, "train", np.where(np.arange(200) < 190, "Test", "other"))
    split, how = divide(obs, labels, SplitOptions(split_key="fold"))
    assert set(np.flatnonzero(split == TEST)) == set(range(150, 190))
    assert (split[190:] == "").all()
    assert 10 <= (split == VALIDATION).sum() <= 20
    split, how = divide(obs, labels, SplitOptions(split_key="fold", donor_key="donor"))
    assert obs["donor"][split == VALIDATION].nunique() == 1
    assert "validation" in how


def test_labels_of_no_training_cell_are_told():
    adata = tuned_models.cells()
    adata.obs["fold"] = ["train"] * 60 + ["test"] * 12
    adata.obs.loc[adata.obs_names[65], "cell_type"] = "new"
    made = AnnotatedCells.of(adata, tuned_models.vocabulary(), "cell_type", SplitOptions(split_key="fold"))
    assert made.names == tuned_models.NAMES
    assert made.codes[65] == MISSING
    assert 65 in made.rows[TEST]
    assert "new" in made.how
    assert len(made.cells.sections) == 4, "the cell without a label is in none of the splits"
    assert made.counts(TEST).shape == (11, tuned_models.GENES)
    assert list(made.labels(TEST)[:2]) == ["B", "NK"]


def test_mistakes_are_refused():
    def check(change, options, word):
        adata = tuned_models.cells()
        change(adata)
        with pytest.raises(DataError, match=word):
            AnnotatedCells.of(adata, tuned_models.vocabulary(), "cell_type", SplitOptions(**options))

    def one_label(adata):
        adata.obs["cell_type"] = "T"

    def empty_cell(adata):
        counts = adata.X.toarray()
        counts[3] = 0
        adata.X = counts

    def nothing(adata):
        pass

    each(
        check,
        [
            (one_label, {}, "two labels"),
            (empty_cell, {}, "no counts"),
            (nothing, {"split_key": "donor"}, "train, validation and test"),
            (nothing, {"donor_key": "patient"}, "patient"),
        ],
    )
