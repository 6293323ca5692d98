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


_share: ContextVar[float] = ContextVar("sct_share_of_sizes", default=1.0)


@contextmanager
def smaller_pieces(share: float) -> Iterator[None]:
    """Trace what is inside with all limits on what a layer takes at once multiplied by `share`.

    A small input is then cut into pieces as one that is larger by 1 / share, so that a comparison of a few cells with
    the reference path goes through the same forms as the step of all cells that it vouches for.
    """
    token = _share.set(share)
    try:
        yield
    finally:
        _share.reset(token)


def at_once(limit: int) -> int:
    """What a layer takes at once, where `limit` is the best for inputs of full size."""
    return max(1, round(limit * _share.get()))
