"""Instruction tuning is the same on one device and on any mesh, at once and in microbatches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.text.test_instructions import ABSTRACT

ROOT = Path(__file__).resolve().parents[2]
# Axes of the mesh, and records of a microbatch (0: all eight at once).
RUNS: list[tuple[dict[str, int], int]] = [
    ({"data": 1}, 0), ({"data": 1}, 4), ({"data": 2}, 0), ({"fsdp": 2}, 0), ({"fsdp": 2, "tensor": 2}, 0),
    ({"data": 2}, 4), ({"fsdp": 2, "tensor": 2}, 4),
]  # fmt: skip


def measured(runs: list[tuple[dict[str, int], int]], folder: Path) -> dict[str, Any]:
    """What a process with eight simulated devices finds."""
    texts = folder / "studies.yaml"
    texts.write_text(f"one: {{abstract: {ABSTRACT}}}\n")
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.instructions_mesh", json.dumps({"texts": str(texts), "runs": runs})],
        cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slowest
@pytest.mark.parametrize("runs", [RUNS], ids=["all"])
def test_losses_and_gradients_do_not_depend_on_mesh_or_microbatches(runs, tmp_path):
    answer = measured(runs, tmp_path)
    single, *others = answer["runs"]
    assert single["losses"][2] < single["losses"][0]
    # A batch that tells means over tokens from means over answers or microbatches, with every adapter at work.
    (whole, tokens), *parts = answer["halves"]["found"]
    assert answer["halves"]["tasks"] == [0, 1, 2]
    assert whole == pytest.approx(sum(loss * n for loss, n in parts) / tokens, rel=1e-4)
    assert abs(np.mean([loss for loss, _ in parts]) - whole) > 1e-3 * whole
    assert single["losses"][0] == pytest.approx(whole, rel=1e-4)
    assert single["sums"]["predicted"] == tokens
    assert len(single["adapters"]) == 4
    assert min(single["adapters"].values()) > 1e-4
    for (sizes, microbatch), other in zip(runs[1:], others, strict=True):
        where = f"{sizes}, microbatch {microbatch}"
        np.testing.assert_allclose(other["losses"], single["losses"], rtol=1e-5, err_msg=where)
        assert other["error"] < 1e-5, f"gradient of {other['worst']} on {where} differs by {other['error']}"
        for name, norm in single["adapters"].items():
            assert other["adapters"][name] == pytest.approx(norm, rel=1e-5), (where, name)
        for name in ("predicted", "right", "answers", "exact"):
            assert other["sums"][name] == single["sums"][name], (where, name)
        # Parameters are really divided, but for small arrays that do not divide.
        divided = sizes.get("fsdp", 1) * sizes.get("tensor", 1)
        share = other["bytes"] / single["bytes"]
        assert share == 1 if divided == 1 else share < 0.75, (where, share)
