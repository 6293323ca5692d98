"""The programs in tools/ make what the repository holds."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from sct.models.sct_config import SCTConfig

ROOT = Path(__file__).resolve().parents[1]


def test_the_picture_of_the_architecture_shows_the_default_model(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "argv", ["draw_architecture", str(tmp_path / "sct.svg")])
    runpy.run_path(str(ROOT / "tools" / "draw_architecture.py"), run_name="__main__")
    drawn, kept = ((folder / "sct.svg").read_text() for folder in (tmp_path, ROOT / "docs" / "images"))
    words = [re.findall(r">([^<>\n]*\S[^<>\n]*)</text>", each) for each in (drawn, kept)]
    assert words[0] == words[1]
    config = SCTConfig()
    positions = 50 * config.num_genes
    for number, width in (
        (positions, config.filters[0]),
        (positions >> config.num_downsamples, config.embed_dim),
    ):
        assert f"{number:,} x {width}" in " ".join(words[1])
