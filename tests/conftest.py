"""Shared fixtures: where optional real data lies, and small inputs made once per session."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

from tests.quick import prepare

ROOT = Path(__file__).resolve().parents[1]

prepare()
# Tracing makes very many objects that all live on: looking through them took a tenth of the time of tests.
gc.set_threshold(100_000, 50, 100)


def _optional(env: str, folder: str) -> Path:
    path = Path(os.environ.get(env, ROOT.parent / "shared" / folder))
    if not path.is_dir():
        pytest.skip(f"the optional folder of {folder} is not here: set {env} to its path")
    return path


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real public h5ad files; tests that need it are skipped where it is absent."""
    return _optional("SCT_SHARED_DATA", "data")


@pytest.fixture(scope="session")
def shared_goldens() -> Path:
    """Folder of published models' inputs and outputs; tests that need it are skipped where absent."""
    return _optional("SCT_SHARED_GOLDENS", "goldens")
