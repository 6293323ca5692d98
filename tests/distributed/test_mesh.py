"""Training is the same on one device and on any mesh."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from sct.errors import ConfigError
from sct.train import sharding

ROOT = Path(__file__).resolve().parents[2]
MESHES = [
    {"data": 1}, {"data": 8}, {"fsdp": 8}, {"sequence": 4}, {"tensor": 4},
    {"data": 2, "fsdp": 4}, {"data": 2, "sequence": 2, "tensor": 2},
]  # fmt: skip


# Splitting length and channels at once is what XLA alone gets wrong, so it is always tested.
FEW = [{"data": 1}, {"fsdp": 8}, {"data": 2, "sequence": 2, "tensor": 2}]


@pytest.mark.parametrize("meshes", [FEW, pytest.param(MESHES, marks=pytest.mark.slow)], ids=["few", "all"])
def test_losses_and_gradients_do_not_depend_on_the_mesh(config, meshes):
    plain = config(data__cells_per_bag=4, train__batch_size=8)
    request = json.dumps({"config": plain, "meshes": meshes})
    done = subprocess.run(
        [sys.executable, "-m", "tests.distributed.mesh_steps", request],
        cwd=ROOT, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    single, *others = json.loads(done.stdout.splitlines()[-1])
    assert single["losses"][2] < single["losses"][0]
    for sizes, other in zip(meshes[1:], others, strict=True):
        for what in ("losses", "norms", "size"):
            np.testing.assert_allclose(other[what], single[what], rtol=1e-5, err_msg=f"{what} on {sizes}")
    for sizes, other in zip(meshes[1:], others, strict=True):
        # Parameters and moments are really divided, but for small arrays that do not divide.
        parts = sizes.get("fsdp", 1) * sizes.get("tensor", 1)
        share = other["bytes"] / single["bytes"]
        assert share == 1 if parts == 1 else 1 / parts <= share < 1 / parts + 0.25, (sizes, share)


def test_a_mesh_must_fit_the_devices():
    with pytest.raises(ConfigError, match="does not fit 1 devices"):
        sharding.make_mesh(sharding.MeshConfig(data=-1, fsdp=2), jax.devices()[:1])


def test_a_batch_must_divide_over_the_mesh():
    mesh = jax.sharding.AbstractMesh((4, 2, 1, 1), sharding.MESH_AXES)
    with pytest.raises(ConfigError, match=r"multiple of 8, such as --config\.train\.batch_size=16"):
        sharding.check_batch_size(12, mesh)
    sharding.check_batch_size(16, mesh)
