"""Select reference kernels: the plain implementation of every layer, to which tests compare the fast implementations.

Layers have several equivalent implementations (two phases for a transposed convolution, chunks, custom gradients). Each
layer chooses one of them according to the backend and the size of the input. Inside `reference_kernels`, each layer
uses the implementation that follows its mathematical definition.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_reference: ContextVar[bool] = ContextVar("sct_reference_kernels", default=False)


@contextmanager
def reference_kernels() -> Iterator[None]:
    """Use the reference implementation of every layer that is traced inside this context."""
    token = _reference.set(True)
    try:
        yield
    finally:
        _reference.reset(token)


def use_reference() -> bool:
    """Return whether the current code is inside a `reference_kernels` context."""
    return _reference.get()


_share: ContextVar[float] = ContextVar("sct_share_of_chunks", default=1.0)


@contextmanager
def smaller_chunks(share: float) -> Iterator[None]:
    """Multiply the size limits of all chunks by `share`, in code that is traced inside this context.

    A few cells are then cut into as many chunks as a bag that is 1 / share times as large. A comparison of a few cells
    with the reference kernels therefore tests the same code that a whole bag uses.
    """
    token = _share.set(share)
    try:
        yield
    finally:
        _share.reset(token)


def chunk_limit(limit: int) -> int:
    """Return the largest allowed chunk size: `limit` multiplied by the share that `smaller_chunks` sets.

    `limit` is the best chunk size for inputs of full size.
    """
    return max(1, round(limit * _share.get()))
