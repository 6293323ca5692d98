"""The small store and configuration of the training tests."""

from tests.train.conftest import config, store

__all__ = ["config", "store"]
