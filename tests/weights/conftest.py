"""The small store and configuration of the training tests."""

from tests.train.conftest import config, full_config, store

__all__ = ["config", "full_config", "store"]
