"""Reference kernels: every layer as its definition says, to compare the fast forms with.

Layers choose among several forms of the same map (phases of a transposed convolution, chunks, their own gradients) by
backend and size. Inside `reference_kernels` each takes the form that follows its definition.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_reference: ContextVar[bool] = ContextVar("sct_reference_kernels", default=False)


@contextmanager
def reference_kernels() -> Iterator[None]:
    """Trace every layer in its reference form."""
    token = _reference.set(True)
    try:
        yield
    finally:
        _reference.reset(token)


def use_reference() -> bool:
    """Whether layers take their reference form."""
    return _reference.get()


_share: ContextVar[float] = ContextVar("sct_share_of_chunks", default=1.0)


@contextmanager
def smaller_chunks(share: float) -> Iterator[None]:
    """Trace with the limits on all chunks multiplied by `share`.

    A few cells are then cut into as many chunks as a bag that is larger by 1 / share. So a comparison of a few cells
    with the reference kernels covers the code that the whole bag runs.
    """
    token = _share.set(share)
    try:
        yield
    finally:
        _share.reset(token)


def chunk_limit(limit: int) -> int:
    """Largest size of a chunk, where `limit` is the best one for inputs of full size."""
    return max(1, round(limit * _share.get()))
