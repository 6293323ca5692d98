"""Meshes, and the one table from logical axis names to mesh axes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sct.errors import ConfigError
from sct.nn.axes import RULES

__all__ = ["MESH_AXES", "RULES", "MeshConfig", "batch_sharding", "check_batch_size", "make_mesh", "put_batch"]

MESH_AXES = ("data", "fsdp", "sequence", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each mesh axis; -1, at most once, takes what is left.

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
    """

    data: int = -1
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """Mesh over all devices with the axes `data`, `fsdp`, `sequence`, `tensor`."""
    devices = jax.devices() if devices is None else devices
    shape = [getattr(config, axis) for axis in MESH_AXES]
    if shape.count(-1) == 1:
        rest = math.prod(size for size in shape if size != -1)
        shape[shape.index(-1)] = len(devices) // rest if rest > 0 else 0
    if min(shape) < 1 or math.prod(shape) != len(devices):
        raise ConfigError(
            f"a mesh of {dict(zip(MESH_AXES, shape, strict=True))} does not fit {len(devices)} devices: "
            "choose sizes whose product is that number, or one of them -1."
        )
    return jax.make_mesh(
        tuple(shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices
    )


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
    if batch_size % share:
        raise ConfigError(
            f"batch_size is {batch_size}, but the mesh splits a batch over {share} devices: use a multiple "
            f"of {share}, such as --config.train.batch_size={-(-batch_size // share) * share}."
        )


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Make global arrays of this process's share of a batch."""
    sharding = batch_sharding(mesh)
    return {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()}
