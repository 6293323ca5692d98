"""The small store and configuration of the training tests, and folders as earlier versions wrote them."""

from __future__ import annotations

import json
from pathlib import Path

from tests.train.conftest import config, full_config, store

__all__ = ["config", "full_config", "store", "unsealed"]


def unsealed(folder: Path) -> Path:
    """Model folder as version 0.1.0 wrote it at first: without hashes."""
    content = json.loads((folder / "config.json").read_text())
    for name in ("files", "sha256"):
        content.pop(name)
    (folder / "config.json").write_text(json.dumps(content))
    return folder
