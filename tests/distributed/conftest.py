"""The small store and configuration of the training tests."""

import pytest

from tests.train.conftest import full_config, store

__all__ = ["config", "full_config", "store"]


@pytest.fixture
def config(full_config):
    """Function that gives the small configuration with changes."""
    return full_config
