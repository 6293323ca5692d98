"""A small configuration of training, whose cells are synthetic, and jobs on it."""

from __future__ import annotations

from typing import Any

import pytest

from sct.speed.job import SpeedJob, SpeedOptions
from tests.train.conftest import merged

CONFIG: dict[str, Any] = {
    "family": "sct",
    "task": "masked_expression",
    "model": {
        "num_genes": 64, "token_embed_dim": 32, "embed_dim": 32, "num_downsamples": 1, "num_layers": 1,
        "num_heads": 2, "ffn_dim": 32, "dtype": "float32", "remat": "level",
    },
    "data": {"cells_per_bag": 4},
    "objective": {"max_masked_fraction": 0.1},
    "optimizer": {"warmup_steps": 2},
    "train": {"batch_size": 2, "loader_threads": 1},
}  # fmt: skip
SMALL = {"steps": 3, "cells": 60, "ceiling_size": 128}


def small(mode: str = "train", **changes: Any) -> SpeedJob:
    """Job in a mode on the small configuration; changes are `section__field=value`, the folder is to be set."""
    folder = changes.pop("folder")
    return SpeedJob(merged(CONFIG, **changes), SpeedOptions(mode, **SMALL), folder)


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> SpeedJob:
    """A job whose store of synthetic cells is there."""
    job = small(folder=tmp_path_factory.mktemp("speed"))
    job.prepare_cells()
    return job


@pytest.fixture
def job(made):
    """Function that gives the job with other options of the model, the task or training, on the same store."""
    store = str(made.folder / "store")
    return lambda mode="train", **changes: small(
        mode, folder=made.folder, **{"data__store": store, **changes}
    )
