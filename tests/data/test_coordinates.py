"""Positions of cells: a section's scale is its own, and what looks wrong is said."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from sct.data.coordinates import (
    SCALES,
    SPATIAL_RANGE,
    Scale,
    doubts,
    read_scales,
    rescale_coordinates,
    stray_cells,
    write_scales,
)
from sct.errors import DataError


def grid(side: int = 40, pitch: float = 100.0) -> np.ndarray:
    """Spots of a square array."""
    return np.stack(np.divmod(np.arange(side * side), side), axis=1) * pitch


def said(coordinates: np.ndarray, **columns: np.ndarray) -> list[str]:
    obs = pd.DataFrame(columns, index=[f"c{row}" for row in range(len(coordinates))])
    return doubts(coordinates, obs, "batch_key={!r}")


def rows_like(count: int, names: str) -> np.ndarray:
    """A value per section, for sections one after another."""
    return np.repeat(list(names), count // len(names))


def test_a_part_of_a_section_keeps_its_place():
    whole = grid()
    scale = Scale.of(whole)
    part = whole[::7][20:90]
    np.testing.assert_array_equal(scale.apply(part), rescale_coordinates(whole)[::7][20:90])
    assert scale.holds(part)
    assert scale.holds(whole)
    kept = {SCALES: {"spatial": write_scales({"": scale}, None)}}
    np.testing.assert_array_equal(read_scales(kept, "spatial", None)[""].apply(part), scale.apply(part))
    assert not read_scales(kept, "spatial", "slide"), "of other sections"
    assert not read_scales(kept, "places", None), "of other positions"
    assert not read_scales({}, "spatial", None)


def test_a_scale_is_not_for_other_positions():
    whole = grid()
    scale = Scale.of(whole)
    other = {
        "moved": whole[:50] - 1e4,
        "more cells": np.concatenate([whole, whole]),
        "whole in another unit": whole * 0.5,
        "nothing": whole[:0],
    }
    assert not {name for name, places in other.items() if scale.holds(places)}
    for places in (np.zeros((5, 3)), np.zeros(5), np.full((5, 2), np.nan)):
        with pytest.raises(DataError, match="coordinates"):
            scale.holds(places)


def test_damaged_scales_are_one_sentence():
    whole = write_scales({"a": Scale.of(grid()), "b": Scale.of(grid(9))}, "slide")
    damaged = {
        "a list": [1, 2],
        "a text": "scale",
        "no entry": {name: value for name, value in whole.items() if name != "origin"},
        "fewer": {**whole, "cells": whole["cells"][:1]},
        "three columns": {**whole, "low": np.zeros((2, 3))},
        "words": {**whole, "cells": ["many", "few"]},
        "a number": {**whole, "factor": 3.0},
        "nan": {**whole, "factor": [np.nan, 1.0]},
    }
    wrong = []
    for name, content in damaged.items():
        try:
            read_scales({SCALES: {"spatial": content}}, "spatial", "slide")
            wrong.append(name)
        except DataError as error:
            wrong += [] if SCALES in str(error) else [(name, str(error))]
    assert not wrong
    assert list(read_scales({SCALES: {"spatial": whole}}, "spatial", "slide")) == ["a", "b"]


def test_stray_cells_do_not_shrink_the_section():
    whole = grid()
    strayed = whole.copy()
    strayed[[17, 400]] = [[4e6, 0], [-3e5, 9e5]]
    assert list(np.flatnonzero(stray_cells(strayed))) == [17, 400]
    near = np.delete(np.arange(len(whole)), [17, 400])
    np.testing.assert_allclose(
        rescale_coordinates(strayed)[near], rescale_coordinates(whole)[near], atol=1e-4
    )
    (sentence,) = said(strayed)
    for word in ("2 of 1,600 cells", "c17, c400", "3.9961e+06", "3,900"):
        assert word in sentence, sentence
    # Older stores have no scale: that of the plain box, stray cells or not.
    plain = Scale.of(strayed, stray=np.zeros(len(strayed), bool)).apply(strayed)
    assert np.ptp(plain, axis=0).max() == pytest.approx(SPATIAL_RANGE)


def moved(places: np.ndarray, x: float, y: float) -> np.ndarray:
    return places + np.array([x, y])


def turned(places: np.ndarray, angle: float) -> np.ndarray:
    return places @ np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def test_sections_over_each_other_are_found():
    one = grid()
    two = 2 * len(one)
    letters = rows_like(two, "ab")
    overlaid = {
        "the same array": (np.concatenate([one, one]), {"slide": letters}, "batch_key='slide'"),
        "a part of the same array": (
            np.concatenate([one, one[:300]]), {"donor": ["a"] * len(one) + ["b"] * 300}, "batch_key='donor'",
        ),
        "shifted": (np.concatenate([one, moved(one, 33, 41)]), {}, "batch_key=..."),
        "turned": (np.concatenate([one, turned(one, 0.3)]), {}, "batch_key=..."),
        "three": (np.concatenate([one, moved(one, 30, 20), moved(one, 61, 70)]), {}, "batch_key=..."),
        "named": (np.concatenate([one, moved(one, 33, 41)]), {"library_id": letters}, "batch_key='library_id'"),
        "named, cells anywhere": (
            np.random.default_rng(0).random((two, 2)), {"slide": letters, "kind": letters}, "batch_key='slide'",
        ),
    }  # fmt: skip
    wrong = {}
    for name, (places, columns, words) in overlaid.items():
        found = said(places, **columns)
        if len(found) != 1 or "overlap in one plane" not in found[0] or words not in found[0]:
            wrong[name] = found
    assert not wrong


def test_one_section_raises_no_doubt():
    rng = np.random.default_rng(0)
    one = grid()
    hexagons = np.stack([one[:, 0] + 50 * (one[:, 1] / 100 % 2), one[:, 1] * 0.75**0.5], axis=1)
    sections = {
        "grid": (one, {}),
        "hexagons": (hexagons, {}),
        "hexagons with holes": (hexagons[rng.random(len(one)) < 0.6], {}),
        "jittered": (one + rng.uniform(-20, 20, one.shape), {}),
        "cells anywhere": (rng.random((1600, 2)), {}),
        "a cloud": (rng.normal(size=(1600, 2)), {}),
        "side by side": (np.concatenate([one, moved(one, 6000, 0)]), {"slide": rows_like(3200, "ab")}),
        "a second piece": (np.concatenate([one, moved(one[:60], 7000, 0)]), {}),
        "types": (rng.random((1600, 2)), {"cell_type": rng.choice(["T", "B"], 1600)}),
        "one library": (one, {"library_id": rows_like(1600, "a")}),
        "single cells on spots": (np.repeat(one, 5, axis=0), {}),
        "single cells on some spots": (one[rng.integers(0, len(one), 1600)], {"cell_type": ["T"] * 1600}),
        "single cells on spots side by side": (
            np.repeat(np.concatenate([one, moved(one, 6000, 0)]), 3, axis=0),
            {"slide": rows_like(9600, "ab")},
        ),
        "a few cells": (rng.random((10, 2)), {}),
        "one cell": (rng.random((1, 2)), {}),
        "none": (np.zeros((0, 2)), {}),
    }
    wrong = {
        name: found for name, (places, columns) in sections.items() if (found := said(places, **columns))
    }
    assert not wrong


def test_real_slides(shared_data):
    files = sorted((shared_data / "spatial").glob("*.h5ad"))
    assert len(files) >= 4
    for file in files:
        cells = ad.read_h5ad(file)
        places = np.asarray(cells.obsm["spatial"], float)
        for batch in cells.obs["batch"].unique():
            mine = (cells.obs["batch"] == batch).to_numpy()
            assert not doubts(places[mine], cells.obs[mine], "batch_key={!r}"), (file.name, batch)
        found = doubts(places, cells.obs, "batch_key={!r}")
        assert len(found) == (cells.obs["batch"].nunique() > 1), (file.name, found)
        bare = doubts(places, cells.obs[["cell_type"]], "batch_key={!r}")
        assert len(bare) == (cells.obs["batch"].nunique() > 1), (file.name, bare)
