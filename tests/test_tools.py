"""The programs in tools/ make what the repository holds."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from sct.eval.imputation.baselines import standard_methods
from sct.eval.imputation.eval_cells import mask_ratio
from sct.eval.imputation.scoring import ImputationModel, ScoreRow
from sct.eval.reports.report import MODEL
from sct.models.sct_config import SCTConfig
from tests.eval.toy_cells import NUM_BINS, hold_out, source, study

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


def test_the_results_figure_names_rows_that_the_benchmark_has():
    for name in ("matplotlib", "scanpy", "magic"):
        pytest.importorskip(name)
    labels = runpy.run_path(str(ROOT / "tools" / "draw_results.py"))["LABELS"]
    cells = hold_out(study(22, seed=2, name="held out"))
    masked = mask_ratio(cells, 0.3, 0)
    model = ImputationModel(lambda variables, shown, _: jnp.full((*shown.shape, NUM_BINS), 1 / NUM_BINS), {})
    rows = set()
    for method in (model, *standard_methods(cells, source(study(30, seed=1, name="train")))):
        answers = method.predict(cells, masked)
        rows |= {
            ScoreRow(
                method.name, method.fitted_on, given, method.remark, both=len(answers) > 1,
                key=MODEL if method is model else "",
            ).label
            for given in answers
        }  # fmt: skip
    assert not labels.keys() - rows
