"""Pathways: labels of the scorer, areas over cells and pathways, and baselines beside predictions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from sct.errors import ConfigError, DataError
from sct.eval.labels import measures as labels
from sct.eval.labels import pathways

pytest.importorskip("decoupler")

SYMBOLS = [f"G{i}" for i in range(60)]
SETS = {"low": SYMBOLS[:8], "high": SYMBOLS[8:16], "few": [*SYMBOLS[:4], "other"]}


def cells(n: int = 40, seed: int = 0) -> tuple[sp.csr_matrix, np.ndarray]:
    """Counts (N, 60), in which each cell expresses the genes of one of two sets far more than the others."""
    rng = np.random.default_rng(seed)
    which = rng.integers(0, 2, n)
    counts = rng.poisson(2.0, (n, 60))
    for row, own in enumerate(which):
        counts[row, 8 * own : 8 * own + 8] += rng.poisson(15, 8)
    return sp.csr_matrix(counts), which


def test_a_file_of_gene_sets_is_read(tmp_path: Path):
    path = tmp_path / "sets.gmt"
    path.write_text("HALLMARK_E2F_TARGETS\thttp\tA\tB\nHALLMARK_TNFA_SIGNALING_VIA_NFKB\thttp\tC\tD\tE\n")
    found = pathways.read_gene_sets(path)
    assert {name: sorted(own) for name, own in found.items()} == {
        "E2F targets": ["A", "B"], "TNFA signaling via NFKB": ["C", "D", "E"],
    }  # fmt: skip
    for name in ("HALLMARK_E2F_TARGETS", "E2F targets"):
        assert list(pathways.read_gene_sets(path, [name])) == ["E2F targets"]
    with pytest.raises(DataError, match=r"'HYPOXIA'.*HALLMARK_E2F_TARGETS"):
        pathways.read_gene_sets(path, ["HYPOXIA"])
    with pytest.raises(DataError, match=r"none\.gmt"):
        pathways.read_gene_sets(tmp_path / "none.gmt")
    path.write_text("one two\tof two words\tA\tB\n")
    assert pathways.read_gene_sets(path) == {"one two": ("A", "B")}
    for text, words in (
        ("one_two\thttp\tA\none two\thttp\tB\n", "more than one gene set"),
        ("a, b\thttp\tA\n", "comma"),
        ("HYPOXIA A B\n", "GMT"),
        ("", "GMT"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=words):
            pathways.read_gene_sets(path)


def test_names_are_said_as_in_a_text():
    given = [
        "HALLMARK_UV_RESPONSE_DN",
        "HALLMARK_IL6_JAK_STAT3_SIGNALING",
        "HALLMARK_PI3K_AKT_MTOR_SIGNALING",
    ]
    assert [pathways.plain_name(name) for name in given] == [
        "UV response DN", "IL6 JAK STAT3 signaling", "PI3K AKT MTOR signaling",
    ]  # fmt: skip


def test_activity_follows_the_ranks_of_the_genes():
    counts, which = cells()
    scores = pathways.activities(counts, SYMBOLS, SETS)
    assert list(scores) == ["low", "high"]  # of the third, four genes are there
    own = scores.to_numpy()[np.arange(40), which]
    other = scores.to_numpy()[np.arange(40), 1 - which]
    assert (own > other).all()
    # Depth changes no rank.
    again = pathways.activities(counts * 3, SYMBOLS, SETS)
    np.testing.assert_allclose(again, scores)
    found = pathways.active(scores, 0.5)
    np.testing.assert_array_equal(found.to_numpy()[np.arange(40), which], True)
    assert not found.to_numpy()[np.arange(40), 1 - which].any()
    assert not pathways.active(scores * 0).to_numpy().any()
    assert pathways.active(scores - 100, 0.5).equals(found)  # above the other cells, not above zero
    # Equal counts share a rank: the order of genes tells nothing.
    order = np.random.default_rng(3).permutation(60)
    ones = (counts > 0).astype(int)
    named = [SYMBOLS[i] for i in order]
    np.testing.assert_allclose(
        pathways.activities(ones[:, order], named, SETS), pathways.activities(ones, SYMBOLS, SETS), atol=1e-6
    )
    with pytest.raises(DataError, match="1 of the 2 gene sets"):
        pathways.activities(counts, SYMBOLS, {"low": SETS["low"], "few": SETS["few"]})


def test_areas_are_those_of_cells_and_of_all_pairs():
    rng = np.random.default_rng(0)
    true, scores = rng.random((12, 5)) < 0.3, rng.random((12, 5))
    true[0], true[1] = False, True  # neither has an area of its own

    def auroc(own: np.ndarray, given: np.ndarray) -> float:
        pairs = given[own][:, None] - given[~own][None]
        return float((pairs > 0).mean() + 0.5 * (pairs == 0).mean())

    def auprc(own: np.ndarray, given: np.ndarray) -> float:
        ranked = own[np.argsort(-given, kind="stable")]
        precision = np.cumsum(ranked) / np.arange(1, len(ranked) + 1)
        return float(precision[ranked].mean())

    found = pathways.areas(true, scores)
    mixed = [row for row in range(12) if true[row].any() and not true[row].all()]
    assert found.auroc_average == pytest.approx(np.mean([auroc(true[row], scores[row]) for row in mixed]))
    assert found.auprc_average == pytest.approx(np.mean([auprc(true[row], scores[row]) for row in mixed]))
    assert found.auroc_flatten == pytest.approx(auroc(true.ravel(), scores.ravel()))
    assert found.auprc_flatten == pytest.approx(auprc(true.ravel(), scores.ravel()))
    assert np.isnan(pathways.areas(np.zeros((3, 2), bool), np.zeros((3, 2)))).all()
    for wrong, words in ((scores[:3], "shape"), (np.where(true, np.nan, scores), "NaN")):
        with pytest.raises(DataError, match=words):
            pathways.areas(true, wrong)


def test_predictions_stand_beside_baselines_on_the_same_cells():
    counts, _ = cells(90)
    whole = pathways.PathwayCells.of(counts, SYMBOLS, SETS, 0.5)
    fit, asked = whole.rows(np.arange(60)), whole.rows(np.arange(60, 90))
    true = asked.active.to_numpy()
    rng = np.random.default_rng(1)
    given = {"right": ("", [true.astype(float)] * 2), "noise": ("5 cells", [rng.random(true.shape)])}
    table, numbers = pathways.compare(given, asked, fit)
    assert numbers["right"] == {name: [1.0, 1.0] for name in pathways.AREAS}
    assert numbers["noise"]["f-AUROC"][0] < 0.8 < numbers[labels.LOGISTIC]["f-AUROC"][0]
    assert numbers[pathways.MEANS]["a-AUROC"][0] > 0.9
    # The mean of a pathway's genes above that of training cells, in their spread.
    center, spread = fit.means.mean(axis=0), fit.means.std(axis=0)
    found = pathways.baselines(fit, asked, labels.LabelOptions())[pathways.MEANS]
    np.testing.assert_allclose(found * spread + center, asked.means, rtol=1e-5)
    # Without the cell only the more frequent pathway can be told, the same for all.
    share = fit.active.mean().to_numpy()
    expected = pathways.areas(true, np.tile(share, (30, 1)))
    assert numbers[pathways.FREQUENCY]["a-AUROC"] == [pytest.approx(expected.auroc_average)]
    assert [row[:2] for row in table.rows][:2] == [["right", ""], ["noise", "5 cells"]]
    with pytest.raises(ConfigError, match="pathway"):
        pathways.compare({pathways.MEANS: ("", [true.astype(float)])}, asked, fit)


def test_few_cells_are_enough_for_baselines():
    counts, _ = cells(30)
    whole = pathways.PathwayCells.of(counts, SYMBOLS, SETS, 0.5)
    for number in (1, 2, 5):
        made = pathways.baselines(whole.rows(np.arange(number)), whole, labels.LabelOptions())
        assert all(np.isfinite(each).all() and each.shape == (30, 2) for each in made.values())


def test_blocks_of_cells_change_nothing(monkeypatch):
    counts, _ = cells(11)
    whole = pathways.activities(counts, SYMBOLS, SETS)
    monkeypatch.setattr(pathways, "_BLOCK", 4)
    pd.testing.assert_frame_equal(pathways.activities(counts, SYMBOLS, SETS), whole)


def test_means_are_of_log_expression():
    counts, _ = cells(6)
    whole = pathways.PathwayCells.of(counts, SYMBOLS, SETS)
    dense = counts.toarray()
    log = np.log1p(1e4 * dense / dense.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(whole.means[:, 1], log[:, 8:16].mean(axis=1), rtol=1e-4)
    assert isinstance(whole.active, pd.DataFrame)
