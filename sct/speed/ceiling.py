"""Measure the compute ceiling: the operations per second of a large matrix product in the dtype of the model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Sides of the square matrices: large enough to use a device fully, small enough to leave memory for a model.
_SIZES = {"cpu": (2048, 4096), "gpu": (8192, 16384), "tpu": (4096, 8192)}
_REPEATS = 5
# If a product takes more seconds, larger sizes are skipped: 16-bit arithmetic without hardware support is this slow.
_TOO_LONG = 2.0


def arithmetic(dtype: str) -> str:
    """Return the number format in which the default devices compute matrix products of a dtype.

    "float32" products do not always use float32. By default, GPUs round the inputs of products to 10 mantissa bits
    ("tf32"), and TPUs round them to 7 bits ("bfloat16"). `jax_default_matmul_precision` changes this default.
    """
    if dtype != "float32":
        return dtype
    precision = getattr(jax.config, "jax_default_matmul_precision", None)
    reduced = {"gpu": "tf32", "tpu": "bfloat16"}.get(jax.default_backend(), "float32")
    return reduced if precision in (None, "default", "fastest", "tensorfloat32", "bfloat16") else "float32"


def matmul_ceiling(dtype: str, size: int = 0, devices: Sequence[Any] | None = None) -> tuple[float, int]:
    """Measure the highest rate of operations of a matrix product, summed over the devices.

    Parameters
    ----------
    dtype
        Data type of the matrices. The precision is the configured one (`jax_default_matmul_precision`).
    size
        Number of rows and columns of the square matrices; 0 tries the default sizes for the type of device.
    devices
        Devices that compute at the same time. Default: all devices.

    Returns
    -------
    Operations per second (a multiply-add counts as two), and the size of the matrices with the highest rate.
    """
    used = np.asarray(jax.devices() if devices is None else devices)
    best, at = 0.0, 0
    for side in (size,) if size else _SIZES.get(jax.default_backend(), _SIZES["gpu"]):
        try:
            seconds = _product_seconds(side, dtype, used)
        except RuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or not best:
                raise
            break  # the memory that the model leaves is too small for larger matrices
        rate = 2.0 * side**3 * len(used) / seconds
        if rate > best:
            best, at = rate, side
        if seconds > _TOO_LONG:
            break
    return best, at


def _product_seconds(side: int, dtype: str, devices: np.ndarray) -> float:
    """Time a product of two square matrices several times, and return the shortest time in seconds.

    All devices compute at the same time, one product each.
    """
    mesh = Mesh(devices, ("device",))
    split = PartitionSpec("device")

    def make() -> tuple[jax.Array, jax.Array]:
        shape = (len(devices) * side, side)
        # Random values, because a GPU at full load needs less power for zeros and then runs at a higher clock rate.
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
