"""The small store and configuration of the training tests."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.train.conftest import full_config, store

__all__ = ["answer", "config", "full_config", "store"]


def answer(module: str, request: dict[str, Any]) -> Any:
    """Last line, as JSON, of what a module of these tests prints in a process with eight simulated devices."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.distributed.{module}", json.dumps(request)],
        cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True, timeout=7200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def config(full_config):
    """Function that gives the small configuration with changes."""
    return full_config
