"""The tools for an AnnData give the same on several devices as on one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.tools import worked

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_four_devices_give_what_one_gives(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "tests.distributed.tools", str(tmp_path / "four.npz")],
        cwd=ROOT,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu"},
        check=True,
        capture_output=True,
    )
    four, cells = np.load(tmp_path / "four.npz"), worked()
    assert int(four["devices"]) == 4
    for name, one in (
        ("embedding", cells.obsm["X_sct"]),
        ("expected", cells.layers["sct_expected"].toarray()),
    ):
        np.testing.assert_allclose(four[name], one, rtol=1e-4, atol=1e-5)
        assert one.std() > 0
