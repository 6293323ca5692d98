"""Division of labeled cells into training, validation and test cells."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest

from sct.data.ingest.build import IngestOptions, ingest
from sct.data.labeled_cells import MISSING, TEST, TRAIN, VALIDATION, AnnotatedCells, SplitOptions, divide
from sct.data.store import Store
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


def test_missing_labels_of_all_types_are_not_labels():
    _, labels = table(60)
    number = pd.Series(labels).map({"T": 1.5, "B": 2.0, "rare": 3.0}).to_numpy()
    made = {
        "category": pd.Categorical(labels),
        "string": pd.array(labels, "string"),
        "object": labels,
        "float": number,
    }

    def check(kind):
        adata = tuned_models.cells(60)
        adata.obs["cell_type"] = made[kind]
        adata.obs.loc[adata.obs_names[[3, 7]], "cell_type"] = None
        values = adata.obs["cell_type"].to_numpy(object)
        split, _ = divide(adata.obs, values, SplitOptions())
        assert set(np.flatnonzero(split == "")) == {3, 7}
        cells = AnnotatedCells.of(adata, tuned_models.vocabulary(), "cell_type", SplitOptions())
        assert set(cells.names) == ({"1.5", "2.0", "3.0"} if kind == "float" else {"T", "B", "rare"})
        assert set(np.flatnonzero(cells.codes == MISSING)) == {3, 7}
        assert set(range(60)) - set(np.concatenate(list(cells.rows.values()))) == {3, 7}

    each(check, [(kind,) for kind in made])


def test_cells_without_a_donor_are_left_out_and_counted():
    obs, labels = table()
    obs.loc[[1, 2, 3], "donor"] = None
    obs["fold"] = "train"
    for options in (SplitOptions(donor_key="donor"), SplitOptions(split_key="fold", donor_key="donor")):
        split, how = divide(obs, labels, options)
        assert set(np.flatnonzero(split == "")) == {1, 2, 3}
        assert "without a donor are not used (3)" in how
        assert "donor nan" not in how
        assert "donor None" not in how


def test_few_training_cells_leave_the_other_sections_alone():
    adata, whole = tuned_models.cells(90), SplitOptions()
    every = AnnotatedCells.of(adata, tuned_models.vocabulary(), "cell_type", whole)
    few = AnnotatedCells.of(
        adata, tuned_models.vocabulary(), "cell_type", dataclasses.replace(whole, shots=4)
    )
    assert list(np.bincount(few.codes[few.rows[TRAIN]])) == [4, 4, 4]
    assert set(few.rows[TRAIN]) < set(every.rows[TRAIN])
    for name in (VALIDATION, TEST):
        assert list(few.rows[name]) == list(every.rows[name])
    np.testing.assert_array_equal(few.cells.sections[0].rows, few.rows[TRAIN])
    assert "at most 4" in few.how


def test_studies_with_other_genes_share_their_measured_genes(tmp_path):
    genes = tuned_models.GENES
    parts = [tuned_models.cells(60, seed) for seed in (0, 1)]
    parts[1] = parts[1][:, : genes - 4].copy()
    ingest(
        [("first", parts[0]), ("second", parts[1])],
        tmp_path / "store",
        vocabulary=tuned_models.vocabulary(),
        options=IngestOptions(min_genes=1),
    )
    made = AnnotatedCells.of_store(Store.open(tmp_path / "store"), "cell_type", SplitOptions())
    assert made.cells.measured.sum() == genes - 4
    assert made.counts(TRAIN)[:, ~made.cells.measured].nnz == 0
    assert "4 genes" in made.how


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

    def other_labels(adata):
        adata.obs["fold"] = ["train"] * 40 + ["validation"] * 12 + ["test"] * 20
        adata.obs.loc[adata.obs["fold"] == "validation", "cell_type"] = "new"

    def nothing(adata):
        pass

    each(
        check,
        [
            (one_label, {}, "two labels"),
            (empty_cell, {}, "no counts"),
            (nothing, {"split_key": "donor"}, "train, validation and test"),
            (nothing, {"donor_key": "patient"}, "patient"),
            (nothing, {"split_key": "fold", "donor_key": "patient"}, "fold"),
            (other_labels, {"split_key": "fold"}, "validation cell"),
            (other_labels, {"split_key": "fold", "donor_key": "patient"}, "patient"),
        ],
    )
