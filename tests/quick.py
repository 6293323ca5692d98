"""Programs that are compiled in less time and run slower: for tests of what surrounds them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import jax

FLAG = "jax_disable_most_optimizations"


@contextmanager
def compiled_quickly() -> Iterator[None]:
    """Compile what is inside with few optimisations, in this process and in those that it starts."""
    before, environment = jax.config.read(FLAG), os.environ.get(FLAG.upper())
    jax.config.update(FLAG, True)
    os.environ[FLAG.upper()] = "1"
    try:
        yield
    finally:
        jax.config.update(FLAG, before)
        if environment is None:
            del os.environ[FLAG.upper()]
        else:
            os.environ[FLAG.upper()] = environment
