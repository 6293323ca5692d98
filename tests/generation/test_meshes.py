"""A model whose parameters lie on several devices generates what it generates on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_meshes_generate_what_one_device_generates():
    """Eight simulated devices, in a process of their own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.generation.mesh_models"], cwd=ROOT, capture_output=True, text=True, check=False,
        timeout=1800, env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert [each["family"] for each in found] == ["gpt2", "neox", "llama"]
    for each in found:
        one, mesh = each["one"], each["mesh"]
        assert one["tokens"].keys() == {"best token", "drawn", "beams", "of a list"}
        assert mesh["tokens"] == one["tokens"], each["family"]
        # Each way finds other answers, of many tokens.
        assert len({str(answers) for answers in one["tokens"].values()}) == 4
        assert len({token for answers in one["tokens"]["drawn"] for token in answers}) > 8
        np.testing.assert_allclose(mesh["values"], one["values"], rtol=1e-5, atol=1e-4)
        # No device is handed the whole of the model on the way.
        assert each["share"] < 0.3, each["family"]
