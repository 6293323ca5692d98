"""The reference path: every layer in its plainest form.

Layers choose among several forms of the same map (phases of a transposed convolution, chunks, own gradients), by
backend. Inside `plain_forms` each takes the form that follows the definition word by word, which the fast ones are
compared with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_plain: ContextVar[bool] = ContextVar("sct_plain_forms", default=False)


@contextmanager
def plain_forms() -> Iterator[None]:
    """Trace what is inside with the plainest form of every layer."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def wants_plain() -> bool:
    """Whether layers are to take their plainest form."""
    return _plain.get()
