"""Make device meshes, and place batches on them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sct.checks import check_at_least, check_multiple
from sct.errors import ConfigError
from sct.nn.axes import RULES

__all__ = [
    "MESH_AXES", "PRESETS", "RULES", "MeshConfig", "arrange", "batch_sharding", "check_batch_size", "make_mesh",
    "put_batch",
]  # fmt: skip

MESH_AXES = ("data", "fsdp", "sequence", "tensor")
REST = -1  # all remaining devices
HOSTS = 0  # the number of hosts


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each mesh axis.

    A size of -1 means all remaining devices; only one axis may have this size. A size of 0 means the number of hosts.
    Configurations and the command line also accept a string; see `parse`.

    Parameters
    ----------
    data
        Number of copies of the model. Each copy processes a part of the batch.
    fsdp
        Number of devices that split the batch, the parameters and the optimizer state.
    sequence
        Number of devices that split the cells of a bag.
    tensor
        Number of devices that split the channels of a layer.
    devices
        Number of devices to use, starting from the first; 0 uses all. With several processes, `devices` must be 0.
    """

    data: int = REST
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1
    devices: int = 0

    @classmethod
    def parse(cls, text: str) -> MeshConfig:
        """Parse a string that is the name of a preset, or sizes of mesh axes such as "data=2,fsdp=4".

        The presets are "data" (all devices on the axis `data`), "single" (only the first device), "fsdp" (all devices
        on the axis `fsdp`) and "pod" (one copy of the model per host, split over the devices of the host by `fsdp`). If
        the string gives sizes, but no size for `data` and no size of -1, then `data` is set to -1.

        Raises
        ------
        ConfigError
            The text is neither the name of a preset nor a valid list of sizes.
        """
        if text in PRESETS:
            return PRESETS[text]
        sizes: dict[str, int] = {}
        for part in text.split(","):
            name, _, size = (word.strip() for word in part.partition("="))
            if name not in (*MESH_AXES, "devices") or name in sizes or not size.removeprefix("-").isdecimal():
                raise ConfigError(
                    f"the mesh is {text!r}, but it must be one of {', '.join(PRESETS)}, or sizes of the axes "
                    f"{', '.join(MESH_AXES)}: write it like data=2,fsdp=4."
                )
            sizes[name] = int(size)
        if REST in sizes.values():
            sizes.setdefault("data", 1)
        return cls(**sizes)


PRESETS = {
    "data": MeshConfig(),
    "single": MeshConfig(data=1, devices=1),
    "fsdp": MeshConfig(data=1, fsdp=REST),
    "pod": MeshConfig(data=HOSTS, fsdp=REST),
}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Make a mesh with the axes `data`, `fsdp`, `sequence`, `tensor` over the given devices, by default all.

    Raises
    ------
    ConfigError
        The product of the sizes is not the number of devices, or a process would have no device.
    """
    if config.devices and jax.process_count() > 1:
        raise ConfigError(
            f"the mesh uses only {config.devices} device(s), but a run with several processes (here "
            f"{jax.process_count()}) must use all devices: set devices=0 (all devices) in the mesh, or start only one "
            "process."
        )
    arranged = arrange(config, jax.devices() if devices is None else devices)
    types = (AxisType.Auto,) * len(MESH_AXES)
    if len({_host(device) for device in arranged.flat}) > 1:
        return Mesh(arranged, MESH_AXES, axis_types=types)
    # `jax.make_mesh` orders the chips of a host by their physical links.
    return jax.make_mesh(arranged.shape, MESH_AXES, axis_types=types, devices=list(arranged.flat))


def arrange(config: MeshConfig, devices: Sequence[Any]) -> np.ndarray:
    """Return the devices as an array in the shape of the mesh.

    Devices of one host are adjacent. Devices communicate most along the last axes of the mesh, so each of these axes
    stays within a host if its size allows it.

    Raises
    ------
    ConfigError
        The product of the sizes is not the number of devices.
    """
    check_at_least(
        "devices of the mesh",
        config.devices,
        0,
        most=len(devices),
        advice=f"use at most {len(devices)}, the number of available devices",
    )
    used = sorted(devices[: config.devices or None], key=lambda d: (_host(d), d.process_index, d.id))
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    shape = [len({_host(device) for device in used}) if size == HOSTS else size for size in sizes]
    if shape.count(REST) == 1:
        rest = math.prod(size for size in shape if size != REST)
        shape[shape.index(REST)] = len(used) // rest if rest > 0 else 0
    if min(shape) < 1 or math.prod(shape) != len(used):
        raise ConfigError(
            f"a mesh of {dict(zip(MESH_AXES, shape, strict=True))} does not fit {len(used)} devices: choose sizes "
            f"whose product is {len(used)}, or set one size to -1 to compute it from the others."
        )
    arranged = np.empty(len(used), object)
    arranged[:] = used
    return arranged.reshape(shape)


def _host(device: Any) -> int:
    """Return the host index of a device.

    GPUs that are linked directly count as one host, even if several processes share them. For other devices, the host
    index is the process index.
    """
    group = getattr(device, "slice_index", None) if device.platform == "gpu" else None
    return int(device.process_index if group is None else group)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of batches: the first axis of each array is split over the mesh axes `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raise `ConfigError` if a batch cannot be split evenly over the mesh."""
    share = mesh.shape["data"] * mesh.shape["fsdp"]
    if share % jax.process_count():
        raise ConfigError(
            f"the mesh splits a batch over {share} devices (data x fsdp), but this number must be a multiple "
            f"of {jax.process_count()}, the number of processes: change data or fsdp of the mesh."
        )
    check_multiple(
        "batch_size",
        batch_size,
        share,
        "the devices over which the mesh splits a batch",
        advice=f"use a multiple, such as --config.train.batch_size={-(-batch_size // share) * share}",
    )


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Make global arrays from the part of a batch that this process has loaded."""
    sharding = batch_sharding(mesh)
    return {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()}
