"""Set the type of device for which layers are traced.

Layers have equivalent implementations for different types of devices. Outside `tracing_for`, the type is that of JAX's
default backend; `jax.default_device` does not change it. Use `tracing_for` to compile a program for a device that this
machine does not have, or for a device of another backend.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax

_target: ContextVar[tuple[str, float] | None] = ContextVar("sct_target", default=None)


@contextmanager
def tracing_for(platform: str, compute_capability: float = 0.0) -> Iterator[None]:
    """Trace code inside this context for another platform ("cpu", "gpu" or "tpu").

    `compute_capability` is the compute capability of an NVIDIA GPU, such as 9.0 for an H100; 0 for other devices.
    """
    token = _target.set((platform, compute_capability))
    try:
        yield
    finally:
        _target.reset(token)


def platform() -> str:
    """Return the platform for which code is traced: "cpu", "gpu" or "tpu"."""
    target = _target.get()
    return jax.default_backend() if target is None else target[0]


def compute_capability() -> float:
    """Return the compute capability of the NVIDIA GPU for which code is traced; 0 for other devices."""
    target = _target.get()
    if target is not None:
        return target[1]
    try:
        return float(getattr(jax.devices()[0], "compute_capability", 0.0))
    except ValueError:  # AMD GPUs have names such as "gfx90a"
        return 0.0
