"""Compiled train steps on eight simulated devices, and what they say of themselves; nothing is allocated.

Sizes are those of one device. To be imported before JAX is asked for its devices, which it sets.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from sct.speed.gpu_targets import TARGETS
from sct.speed.kernels import Program, arrays_of, bytes_of
from sct.tasks.base import Task
from sct.train import sharding
from sct.train.optim import OptimizerConfig, make_optimizer
from sct.train.state import State, init_state, make_train_step
from tests.quick import compile_fully

compile_fully()  # what a program needs depends on how it is compiled
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


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
    return TARGETS["a100"].devices("1x1x8")


def _sizes(text: str) -> list[int]:
    """Bytes of the arrays whose types stand in a text."""
    return [bytes_of(f"{kind}[{','.join(map(str, shape))}]") for kind, shape in arrays_of(text)]


def memory(compiled: Any) -> dict[str, float]:
    """GiB of temporaries, arguments (what is updated is overwritten), and the largest array of the program."""
    needs = compiled.memory_analysis()
    sums = (needs.temp_size_in_bytes, needs.argument_size_in_bytes, max(_sizes(compiled.as_text())))
    return dict(zip(("temporaries", "arguments", "largest"), (size / 2**30 for size in sums), strict=True))


def operations(text: str) -> Iterator[tuple[int, str, str, str]]:
    """Operations of a compiled program: how often a step runs each (0: not known), its kind, type, and the rest."""
    for times, _, one in Program(text).walk():
        yield times, one.kind, one.type, one.rest


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
