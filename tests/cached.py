"""Arrays that are made once for all tests of a process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax


def cached(make: Callable[..., Any]) -> Callable[..., Any]:
    """Keep what a function makes, as numbers also where it is first called inside of a traced function."""

    @functools.cache
    @functools.wraps(make)
    def made(*arguments: Any, **options: Any) -> Any:
        with jax.ensure_compile_time_eval():
            return make(*arguments, **options)

    return made
