"""Programs of these tests are small and run few times."""

from __future__ import annotations

import pytest

from tests.quick import compiled_quickly


@pytest.fixture(autouse=True, scope="session")
def quickly():
    """Compile with few optimisations."""
    with compiled_quickly():
        yield
