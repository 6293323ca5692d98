"""Compiled train steps on eight simulated devices, and what they say of themselves; nothing is allocated.

Sizes are those of one device. To be imported before JAX is asked for its devices, which it sets.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.experimental import topologies

from sct.tasks.base import Task
from sct.train import sharding
from sct.train.optim import OptimizerConfig, make_optimizer
from sct.train.state import State, init_state, make_train_step
from tests.quick import compile_fully

compile_fully()  # what a program needs depends on how it is compiled
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

_BYTES = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_ARRAY = re.compile(r"\b([a-z]+\d+|pred)\[([\d,]*)\]")
# What the compiler asks about a device (A100-SXM4, 80 GB).
_A100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 167936
  threads_per_core_limit: 2048
  core_count: 108
  fpus_per_core: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 2039040000000
  l2_cache_size: 41943040
  clock_rate_ghz: 1.41
  device_memory_size: 85100068864
  shared_memory_per_block_optin: 166912
  cuda_compute_capability { major: 8 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 patch: 0 }
device_description_str: "NVIDIA A100-SXM4-80GB"
"""
_OPERATION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")


def compiled_step(
    task: Task,
    batch: Mapping[str, jax.ShapeDtypeStruct],
    mesh: Mapping[str, int],
    options: OptimizerConfig,
    microbatch: int = 0,
    target: str = "cpu",
) -> tuple[State, Any]:
    """Abstract state, and the compiled program, of a train step on a mesh of these sizes.

    The target is "cpu", or "a100" (see `a100s`), whose program computes in the types that the model names.
    """
    count = math.prod(mesh.values())
    # Without a device no kernel can be timed.
    devices, how = (jax.devices(), {}) if target == "cpu" else (a100s(), {"xla_gpu_autotune_level": 0})
    placed = sharding.make_mesh(sharding.MeshConfig(**{"data": 1, **mesh}, devices=count), devices)
    abstract, _ = init_state(task, lambda shapes: make_optimizer(options, 10, shapes)[0], placed, 0)
    optimizer = make_optimizer(options, 10, abstract.trained)[0]
    step = make_train_step(task, optimizer, placed, abstract, microbatch)
    return abstract, step.lower(abstract, dict(batch)).compile(compiler_options=how)


def a100s() -> list[Any]:
    """Eight A100 of one host, for which programs can be compiled where there is none.

    It takes the packages jax-cuda12-plugin and jax-cuda12-pjrt of JAX's version, and nvidia-cuda-nvcc-cu12.
    """
    topology = topologies.get_topology_desc("a100", "cuda", target_config=_A100, topology="1x1x8")
    return list(topology.devices)


def _sizes(text: str) -> list[int]:
    """Bytes of the arrays whose types stand in a text."""
    return [
        _BYTES.get(kind, 1) * math.prod(int(size) for size in shape.split(",") if size)
        for kind, shape in _ARRAY.findall(text)
    ]


def memory(compiled: Any) -> dict[str, float]:
    """GiB of temporaries, arguments (what is updated is overwritten), and the largest array of the program."""
    needs = compiled.memory_analysis()
    sums = (needs.temp_size_in_bytes, needs.argument_size_in_bytes, max(_sizes(compiled.as_text())))
    return dict(zip(("temporaries", "arguments", "largest"), (size / 2**30 for size in sums), strict=True))


def operations(text: str) -> Iterator[tuple[int, str, str, str]]:
    """Operations of a compiled program: how often a step runs each (0: not known), its kind, type, and the rest."""
    bodies: dict[str, list[tuple[str, str, str]]] = {}
    entry = ""
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
            name = head[2]
            bodies[name], entry = [], name if head[1] else entry
        elif found := _OPERATION.match(line):
            bodies[name].append((found[3], found[2], found[4]))

    def walk(name: str, times: int) -> Iterator[tuple[int, str, str, str]]:
        for kind, type_, rest in bodies[name]:
            yield times, kind, type_, rest
            inside = times
            if kind == "while":
                trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', rest)
                inside = times * int(trips[1]) if trips else 0
            for called in re.findall(r"(?:body|condition|calls|to_apply|_computation)=%?([\w.-]+)", rest):
                yield from walk(called, inside)
            for many in re.findall(r"branch_computations=\{(.*?)\}", rest):
                for called in many.split(","):
                    yield from walk(called.strip().lstrip("%"), inside)

    yield from walk(entry, 1)


def moved(text: str) -> dict[str, float]:
    """Bytes that a device receives in a step, by kind of collective operation, by the ring algorithms.

    An array of S bytes that is gathered from n devices costs (n - 1) / n S, one that is summed over them twice as much.

    Raises
    ------
    ValueError
        A collective operation lies in a loop of which nobody knows how often it runs.
    """
    total = dict.fromkeys(_COLLECTIVES, 0.0)
    for times, kind, type_, rest in operations(text):
        started, kind = kind.endswith("-start"), kind.removesuffix("-start")
        if kind not in total:
            continue
        if not times:
            raise ValueError(f"{kind} of {type_} lies in a loop of unknown length.")
        sizes = _sizes(type_)
        if started and kind != "all-reduce":  # its inputs are named, too
            sizes = sizes[len(sizes) // 2 :]
        total[kind] += times * sum(sizes) * _share(kind, rest)
    return total


def _share(kind: str, rest: str) -> float:
    """Bytes that a device receives for one byte of what a collective operation gives it."""
    if kind == "collective-permute":
        return 1.0
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        devices = len(listed[1].split(","))
    elif tiled := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        devices = int(tiled[1])
    elif named := re.search(r"replica_groups=mesh\[(.*?)\].*?\{(.*?)\}", rest):
        axes = dict(re.findall(r"('\w+')=(\d+)", named[1]))
        devices = math.prod(int(axes[name]) for name in re.findall(r"'\w+'", named[2]))
    else:
        raise ValueError(f"it is not known which devices take part in {kind}({rest}.")
    if kind == "reduce-scatter":
        return devices - 1.0
    return (2 if kind == "all-reduce" else 1) * (devices - 1) / devices
