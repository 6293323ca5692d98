"""Meshes, and the one table from logical axis names to mesh axes."""

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
REST = -1  # as many devices as are left
HOSTS = 0  # as many as there are hosts


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each mesh axis.

    -1, at most once, takes what is left; 0 is the number of hosts. In a configuration and on the command line a
    mesh may also be written as a text, see `parse`.

    Parameters
    ----------
    data
        Copies of the model, each with its share of the batch.
    fsdp
        Devices that share the batch and the parameters' and optimiser's storage.
    sequence
        Devices that share the cells of a bag.
    tensor
        Devices that share the channels of a layer.
    devices
        Use the first so many devices only; 0 uses all, and is the only choice with several processes.
    """

    data: int = REST
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1
    devices: int = 0

    @classmethod
    def parse(cls, text: str) -> MeshConfig:
        """Make a mesh of a preset's name or of sizes such as "data=2,fsdp=4".

        Presets: "data", all devices on the axis of that name; "single", the first device alone; "fsdp", all
        devices on the axis of that name; "pod", copies of the model on the hosts, each divided by fsdp over the
        devices of its host. Of sizes, `data` takes what is left where neither it nor a -1 is written.
        """
        if text in PRESETS:
            return PRESETS[text]
        sizes: dict[str, int] = {}
        for part in text.split(","):
            name, _, size = (word.strip() for word in part.partition("="))
            if name not in (*MESH_AXES, "devices") or name in sizes or not size.removeprefix("-").isdecimal():
                raise ConfigError(
                    f"the mesh {text!r} is neither one of {', '.join(PRESETS)} nor sizes of the axes "
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
    """Mesh with the axes `data`, `fsdp`, `sequence`, `tensor` over the devices, by default all of them.

    Raises
    ------
    ConfigError
        The sizes do not fit the devices, or leave a process without any.
    """
    if config.devices and jax.process_count() > 1:
        raise ConfigError(
            f"the mesh uses {config.devices} device(s) only, which leaves some of the {jax.process_count()} "
            "processes without work: start one process, or use all devices."
        )
    arranged = arrange(config, jax.devices() if devices is None else devices)
    types = (AxisType.Auto,) * len(MESH_AXES)
    if len({_host(device) for device in arranged.flat}) > 1:
        return Mesh(arranged, MESH_AXES, axis_types=types)
    # Follows the wires between the chips of a host.
    return jax.make_mesh(arranged.shape, MESH_AXES, axis_types=types, devices=list(arranged.flat))


def arrange(config: MeshConfig, devices: Sequence[Any]) -> np.ndarray:
    """Devices in the shape of a mesh.

    The devices of a host stay together, so that the last axes, which exchange most, stay inside a host as far as
    their sizes allow.

    Raises
    ------
    ConfigError
        The sizes do not fit the devices.
    """
    check_at_least(
        "devices of the mesh",
        config.devices,
        0,
        most=len(devices),
        advice=f"use at most the {len(devices)} devices that there are",
    )
    used = sorted(devices[: config.devices or None], key=lambda d: (_host(d), d.process_index, d.id))
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    shape = [len({_host(device) for device in used}) if size == HOSTS else size for size in sizes]
    if shape.count(REST) == 1:
        rest = math.prod(size for size in shape if size != REST)
        shape[shape.index(REST)] = len(used) // rest if rest > 0 else 0
    if min(shape) < 1 or math.prod(shape) != len(used):
        raise ConfigError(
            f"a mesh of {dict(zip(MESH_AXES, shape, strict=True))} does not fit {len(used)} devices: "
            "choose sizes whose product is that number, or one of them -1."
        )
    arranged = np.empty(len(used), object)
    arranged[:] = used
    return arranged.reshape(shape)


def _host(device: Any) -> int:
    """Host of a device: GPUs that are wired together, which several processes may share; else a process."""
    wired = getattr(device, "slice_index", None) if device.platform == "gpu" else None
    return int(device.process_index if wired is None else wired)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batches are split along their first axis."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raise `ConfigError` where a batch cannot be split evenly over the mesh."""
    share = mesh.shape["data"] * mesh.shape["fsdp"]
    if share % jax.process_count():
        raise ConfigError(
            f"the mesh splits a batch over {share} devices, but each of the {jax.process_count()} processes reads "
            "its own part of a batch: choose data x fsdp as a multiple of the number of processes."
        )
    check_multiple(
        "batch_size",
        batch_size,
        share,
        "the devices over which the mesh splits a batch",
        advice=f"use a multiple, such as --config.train.batch_size={-(-batch_size // share) * share}",
    )


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Make global arrays of this process's share of a batch."""
    sharding = batch_sharding(mesh)
    return {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()}
