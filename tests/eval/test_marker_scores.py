"""Labels by marker genes: found where they are, scored as scanpy does, and read from a file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sct.errors import DataError
from sct.eval.labels.marker_scores import find_markers, marker_scores, read_markers
from tests.eval.test_pathways import SETS, SYMBOLS, cells

pytest.importorskip("scanpy")


def test_markers_are_found_and_name_other_cells():
    counts, which = cells(120)
    names = np.array(["low", "high"], dtype=object)[which]
    markers = find_markers(counts[:80], names[:80].tolist(), SYMBOLS, number=8)
    assert {label: set(own) for label, own in markers.items()} == {
        name: set(SETS[name]) for name in ("low", "high")
    }
    table = marker_scores(counts[80:], SYMBOLS, markers, ["low", "high"])
    assert (table.to_numpy().argmax(axis=1) == which[80:]).all()


def test_labels_without_markers_are_never_the_best():
    counts, _ = cells(20)
    table = marker_scores(
        counts, SYMBOLS, {"low": SETS["low"], "strange": ["XYZ"]}, ["strange", "low", "none"]
    )
    assert list(table) == ["strange", "low", "none"]
    assert (table.to_numpy().argmax(axis=1) == 1).all()
    assert np.isfinite(table.to_numpy()).all()
    with pytest.raises(DataError, match="marker"):
        marker_scores(counts, SYMBOLS, {"strange": ["XYZ"]}, ["strange"])


def test_one_label_or_single_cells_have_no_markers():
    counts, _ = cells(6)
    assert find_markers(counts, ["a"] * 6, SYMBOLS) == {}
    assert find_markers(counts[:2], ["a", "b"], SYMBOLS) == {}
    assert set(find_markers(counts, ["a", "b", "b", "b", "b", "b"], SYMBOLS)) == {"b"}


def test_a_file_of_markers(tmp_path: Path):
    path = tmp_path / "markers.json"
    path.write_text(json.dumps({"B cell": ["MS4A1", "CD79A"]}))
    assert read_markers(path) == {"B cell": ("MS4A1", "CD79A")}
    for content, words in (
        ("{", "cannot read"),
        ("[]", "JSON object"),
        ('{"B": "MS4A1"}', "'B'"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=words):
            read_markers(path)
