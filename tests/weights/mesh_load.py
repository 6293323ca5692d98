"""Load a model folder and a run onto eight simulated devices, said as JSON; run in a process of its own."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np
import safetensors

import sct
from sct.nn.paths import flatten
from sct.train.sharding import MeshConfig, make_mesh


class Watched:
    """A safetensors file that notes how many numbers each read returns."""

    reads: ClassVar[list[int]] = []

    def __init__(self, wrapped):
        self.wrapped = wrapped

    def __getattr__(self, name):
        return getattr(self.wrapped, name)

    def __enter__(self):
        self.wrapped.__enter__()
        return self

    def __exit__(self, *error):
        self.wrapped.__exit__(*error)

    def get_slice(self, name):
        return Watched(self.wrapped.get_slice(name))

    def get_tensor(self, name):
        raise AssertionError("a whole array is read")

    def __getitem__(self, index):
        part = self.wrapped[index]
        Watched.reads.append(part.size)
        return part


def measure(folder: Path) -> dict:
    """Where the arrays lie and how large the reads were."""
    whole = flatten(sct.load(folder).variables)
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    Watched.reads.clear()
    placed = flatten(sct.load(folder, mesh=mesh).variables)
    parts = [part.data for leaf in placed.values() for part in leaf.addressable_shards]
    return {
        "devices": min(len(leaf.sharding.device_set) for leaf in placed.values()),
        "equal": all(np.array_equal(np.asarray(placed[path]), np.asarray(whole[path])) for path in whole),
        "bytes": sum(leaf.nbytes for leaf in whole.values()),
        "bytes_per_device": max(
            sum(
                p.data.nbytes
                for leaf in placed.values()
                for p in leaf.addressable_shards
                if p.device == device
            )
            for device in jax.devices()
        ),
        "split": sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) < leaf.size for leaf in placed.values()
        ),
        "largest_read": max(Watched.reads, default=0),
        "largest_part": max(part.size for part in parts),
    }


if __name__ == "__main__":
    opened = safetensors.safe_open
    safetensors.safe_open = lambda *args, **kwargs: Watched(opened(*args, **kwargs))
    print(json.dumps([measure(Path(folder)) for folder in sys.argv[1:]]))
