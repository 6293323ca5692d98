"""Shared fixtures: where optional real data lies, and small inputs made once per session."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.quick import prepare

ROOT = Path(__file__).resolve().parents[1]

prepare()
# Tracing makes very many objects that all live on: looking through them took a tenth of the time of tests.
gc.set_threshold(100_000, 50, 100)


# A compiled program takes six maps of memory and more, of which Linux gives a process 65,530 and XLA dies of the next.
MAPS = 20_000


def drop_programs(limit: int = MAPS) -> bool:
    """Forget compiled programs where they take more than a number of maps of memory; whether it was done."""
    maps = Path("/proc/self/maps")
    if "jax" not in sys.modules or not maps.exists() or maps.read_bytes().count(b"\n") <= limit:
        return False
    sys.modules["jax"].clear_caches()
    gc.collect()
    return True


@pytest.fixture(autouse=True, scope="module")
def _programs_are_dropped() -> Iterator[None]:
    yield
    drop_programs()


@pytest.fixture(autouse=True)
def _settings_are_restored() -> Iterator[None]:
    """A command that a test runs in this process may set `sct.settings` by its flags."""
    from sct.global_settings import settings

    names = ("_verbosity", "_cache_dir", "_device")
    before = [getattr(settings, name) for name in names]
    yield
    for name, value in zip(names, before, strict=True):
        setattr(settings, name, value)


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
