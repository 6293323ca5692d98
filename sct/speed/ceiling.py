"""The ceiling: operations per second of a large matrix product, on the devices and in the type of the model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Sides of the square matrices: large enough to fill a device, small enough to leave room for a model.
_SIZES = {"cpu": (2048, 4096), "gpu": (8192, 16384), "tpu": (4096, 8192)}
_REPEATS = 5
# A product that takes longer is not made larger: 16-bit arithmetic without hardware for it.
_TOO_LONG = 2.0


def arithmetic(dtype: str) -> str:
    """Name the arithmetic of a matrix product of this type on the default devices, as it is configured.

    "float32" products are not always computed as such: graphics cards round their inputs to 10 bits ("tf32"),
    TPUs to 7 ("bfloat16"), unless `jax_default_matmul_precision` says otherwise.
    """
    if dtype != "float32":
        return dtype
    precision = getattr(jax.config, "jax_default_matmul_precision", None)
    reduced = {"gpu": "tf32", "tpu": "bfloat16"}.get(jax.default_backend(), "float32")
    return reduced if precision in (None, "default", "fastest", "tensorfloat32", "bfloat16") else "float32"


def matmul_ceiling(dtype: str, size: int = 0, devices: Sequence[Any] | None = None) -> tuple[float, int]:
    """Operations per second of the fastest of several matrix products, over some devices together.

    Parameters
    ----------
    dtype
        Type of the matrices, as the model computes; the precision is the configured one.
    size
        Side of the matrices; 0 tries those that fit the kind of device.
    devices
        Devices that work at the same time; by default all.

    Returns
    -------
    Operations per second (a multiply-add counts as two), and the side of the matrices that gave them.
    """
    used = np.asarray(jax.devices() if devices is None else devices)
    best, at = 0.0, 0
    for side in (size,) if size else _SIZES.get(jax.default_backend(), _SIZES["gpu"]):
        try:
            seconds = _product_seconds(side, dtype, used)
        except RuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or not best:
                raise
            break  # a model leaves no room for the larger ones
        rate = 2.0 * side**3 * len(used) / seconds
        if rate > best:
            best, at = rate, side
        if seconds > _TOO_LONG:
            break
    return best, at


def _product_seconds(side: int, dtype: str, devices: np.ndarray) -> float:
    """Least time of a product of two square matrices, all devices working at once, each on its own."""
    mesh = Mesh(devices, ("device",))
    split = PartitionSpec("device")

    def make() -> tuple[jax.Array, jax.Array]:
        shape = (len(devices) * side, side)
        # Values matter: a card at full load draws less power, and clocks higher, on zeros.
        left, right = (jax.random.normal(jax.random.key(seed), shape, jnp.float32) for seed in (0, 1))
        return left.astype(dtype), right.astype(dtype)

    left, right = jax.jit(make, out_shardings=NamedSharding(mesh, split))()
    product = jax.jit(jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(split, split), out_specs=split))
    if len(devices) == 1:
        product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(left, right))
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(product(left, right))
        times.append(time.perf_counter() - start)
        if times[-1] > _TOO_LONG:
            break
    return min(times)
