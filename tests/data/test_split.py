from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from store_inputs import (
    run,
    three_files,
)

from sct.data.ingest.splits import assign_splits
from sct.errors import ConfigError


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    return three_files(tmp_path / "inputs")


NAMES = [f"s{i}" for i in range(12)]


def test_few_studies_are_all_for_training() -> None:
    splits, note = assign_splits(NAMES[:9], {})
    assert set(splits.values()) == {"train"}
    assert "--validation=" in note


def test_many_studies_get_a_validation_study_that_stays() -> None:
    splits, note = assign_splits(NAMES, {})
    held_out = [name for name, split in splits.items() if split == "validation"]
    assert len(held_out) == 1
    assert held_out[0] in note
    again, _ = assign_splits([*NAMES, *[f"t{i}" for i in range(12)]], splits)
    assert [name for name, split in again.items() if split == "validation"] == held_out


@given(fraction=st.floats(0, 0.9), n=st.integers(2, 12), seed=st.integers(0, 5))
def test_a_fraction_of_studies(fraction: float, n: int, seed: int) -> None:
    splits, _ = assign_splits(NAMES[:n], {}, fraction=fraction, seed=seed)
    held_out = sum(split == "validation" for split in splits.values())
    assert held_out == min(n - 1, max(round(fraction * n), int(fraction > 0)))


def test_lists_replace_what_was() -> None:
    splits, _ = assign_splits(NAMES[:4], {"s0": "validation"}, validation=("s1",), test=("s2",))
    assert splits == {"s0": "train", "s1": "validation", "s2": "test", "s3": "train"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"validation": ("s1",), "test": ("s1",)}, r"\bs1\b"),
        ({"validation": ("x",)}, r"\bx\b"),
        ({"validation": ("s0", "s1"), "test": ("s2",)}, "train"),
        ({"validation": ("s0",), "fraction": 0.5}, "fraction"),
        ({"fraction": 1.5}, "1.5"),
    ],
)
def test_splits_that_contradict(options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        assign_splits(NAMES[:3], {}, **options)


def test_unknown_names_are_refused_before_any_work(three: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\bz\b"):
        run(three, tmp_path / "store", validation=("z",))
    assert not (tmp_path / "store").exists()
