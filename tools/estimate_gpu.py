"""Estimate the speed of sCT on a GPU from the program that XLA compiles for it. No GPU is needed.

    python tools/estimate_gpu.py --target=h200 --mode=train --batch=4 --remat=products
    python tools/estimate_gpu.py --target=a100 --program=step.hlo

Prints one line of JSON, a table of the kernels by kind of work, and a table of the slowest kernels. `sct.speed.kernels`
describes what the estimate counts, and `sct.speed.gpu_targets` lists the required packages. `--save` writes the
compiled program to a file. `--program` reads such a file, for example to estimate the time at other rates.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp

from sct.errors import DataError, SctError, first_line
from sct.models.sct_config import SCTConfig
from sct.nn import axes, target
from sct.nn.paths import unflatten
from sct.speed.gpu_targets import OPTIONS, TARGETS, GpuTarget
from sct.speed.kernels import Kernel, Program, Rates, by_group, kernels
from sct.speed.memory import memory_of, planned_bytes
from sct.tasks.masked_objective import MaskedExpressionConfig, MaskedObjective
from sct.train import sharding
from sct.train.optim import OptimizerConfig, make_optimizer
from sct.train.state import init_state, make_train_step

_NEEDS = "// memory: "  # first line of a saved program
# A correct count is not below the formula, except for products with constants, which XLA simplifies.
_LEAST_COUNTED = 0.95


def compiled(
    task: MaskedObjective, gpu: GpuTarget, mode: str, batch: int, library: bool, options: Mapping[str, Any]
) -> Any:
    """Compile a training step or a forward pass of sCT for a GPU.

    With `library`, attention uses cuDNN. `options` are options of XLA.

    Raises
    ------
    SctError
        XLA cannot compile the program.
    """
    config, cells = task.model_config, task.cells_per_bag
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1, devices=1), gpu.devices())
    with target.tracing_for("gpu", float(gpu.capability) if library else 0.0):
        abstract, _ = init_state(
            task, lambda shapes: make_optimizer(OptimizerConfig(), 10, shapes)[0], mesh, 0
        )
        tokens = jax.ShapeDtypeStruct((batch, cells, config.num_genes), jnp.uint8)
        if mode == "train":
            optimizer = make_optimizer(OptimizerConfig(), 10, abstract.trained)[0]
            inputs = {
                "tokens": tokens,
                "measured": jax.ShapeDtypeStruct((batch, config.num_genes), bool),
                "example_mask": jax.ShapeDtypeStruct((batch,), jnp.float32),
            }
            lowered = make_train_step(task, optimizer, mesh, abstract).lower(abstract, inputs)  # type: ignore[attr-defined]
        else:

            def logits(flat: Any, tokens: jax.Array) -> jax.Array:
                with axes.on_mesh(mesh, sharding.RULES):
                    return task.model.apply(unflatten(flat), tokens)["logits"]  # type: ignore[index,call-overload,no-any-return]

            placed = jax.ShapeDtypeStruct(tokens.shape, tokens.dtype, sharding=sharding.batch_sharding(mesh))
            lowered = jax.jit(logits).lower(abstract.trained, placed)
    try:
        return lowered.compile(compiler_options={**OPTIONS, **options})
    except RuntimeError as error:
        raise SctError(
            f"XLA cannot compile this program ({first_line(error)}): try another --batch, or other --xla_options."
        ) from error


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))


def _place(source: str) -> str:
    """Return the layer and the last operation of a path in the traced code, such as "down_0 conv/reduce_sum"."""
    layers = re.findall(r"\b(?:down|up|transformer)_\d+|\b(?:stem|head|token_embed)\b", source)
    return " ".join([*layers[-1:], "/".join(source.split("/")[-3:])])


def report(found: Sequence[Kernel], rates: Rates, slowest: int) -> str:
    """Return the tables of kernels by kind of work, and of the slowest kernels, as Markdown."""
    groups = [
        [name, f"{runs:,}", f"{flops / 1e12:.2f}", f"{moved / 1e9:.1f}", f"{1e3 * seconds:.2f}"]
        for name, runs, flops, moved, seconds in by_group(found, rates)
    ]
    ordered = sorted(found, key=lambda one: -one.seconds(rates))[:slowest]
    single = [
        [
            f"`{_place(one.source)}`", one.group, f"{one.times:,}",
            f"{one.times * one.flops / 1e12:.3f}", f"{one.times * one.bytes / 1e9:.2f}",
            f"{1e3 * one.seconds(rates):.3f}",
        ]
        for one in ordered
    ]  # fmt: skip
    return "\n\n".join((
        _table(("kind of work", "kernels", "TFLOP", "GB", "ms"), groups),
        _table(("slowest kernels", "kind of work", "runs", "TFLOP", "GB", "ms"), single),
    ))  # fmt: skip


def summary(found: Sequence[Kernel], rates: Rates) -> dict[str, float]:
    """Return the sums over all kernels: operations, bytes and estimated seconds."""
    return {
        "tflop": sum(one.times * one.flops for one in found) / 1e12,
        "gigabytes": sum(one.times * one.bytes for one in found) / 1e9,
        "kernels": float(sum(one.times for one in found)),
        "estimated_seconds": sum(one.seconds(rates) for one in found),
    }


def _read(path: Path) -> tuple[str, dict[str, int | None]]:
    """Read a file that `--save` wrote: the text of the program, and the memory that it needs in bytes."""
    try:
        first, _, text = path.read_text().partition("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} cannot be read ({first_line(error)}): give a file that --save wrote."
        ) from error
    if not first.startswith(_NEEDS):
        raise DataError(f"{path} is not a program that --save wrote: write the file again with --save.")
    return text, json.loads(first.removeprefix(_NEEDS))


def estimate(given: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Return the sums of an estimate, and its tables.

    Raises
    ------
    SctError
        The operations of a kernel cannot be counted, or the program has fewer operations than the model.
    """
    gpu = TARGETS[given.target]
    model: Mapping[str, Any] = {"dtype": "bfloat16", "remat": given.remat, **json.loads(given.model)}
    fraction = given.max_masked_fraction if given.mode == "train" else 0.0
    objective = MaskedExpressionConfig(max_masked_fraction=fraction)
    task = MaskedObjective(objective, SCTConfig(**model), given.cells)
    if given.program:
        text, needs = _read(given.program)
    else:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        program = compiled(
            task, gpu, given.mode, given.batch, given.cudnn_attention, json.loads(given.xla_options)
        )
        text, needs = program.as_text(), memory_of(program)
        if given.save:
            given.save.write_text(f"{_NEEDS}{json.dumps(needs)}\n{text}")
    found = kernels(Program(text))
    peak, bandwidth = given.peak_tflops * 1e12 or gpu.flops, given.bandwidth_tb * 1e12 or gpu.bandwidth
    rates = Rates(peak * given.products, peak * given.convolutions, bandwidth * given.memory)
    sums = summary(found, rates)
    flops = (3 if given.mode == "train" else 1) * task.operations(given.batch)
    if sums["tflop"] * 1e12 < _LEAST_COUNTED * flops:
        raise SctError(
            f"the kernels have {sums['tflop']:.3g} TFLOP, but the model has {flops / 1e12:.3g}: give --mode, --batch, "
            "--cells and --model as for the compiled program, or add the missing kind of kernel to "
            "sct/speed/kernels.py."
        )
    achieved = flops / sums["estimated_seconds"]
    gib = {name: (value or 0) / 2**30 for name, value in needs.items()}
    return {
        **{name: getattr(given, name) for name in ("target", "mode", "batch", "cells", "remat")},
        **sums,
        "formula_tflop": flops / 1e12,
        "estimated_tokens_per_s": given.batch * task.tokens_per_record / sums["estimated_seconds"],
        "estimated_share_of_peak": achieved / peak,
        "estimated_share_of_products": achieved / rates.product_flops,
        **{name.replace("bytes", "gib"): value for name, value in gib.items()},
        "planned_gib": (planned_bytes(needs) or 0) / 2**30,
        "device_gib": gpu.memory / 2**30,
    }, report(found, rates, given.slowest)  # fmt: skip


def main(words: Sequence[str] | None = None) -> int:
    """Compile, estimate and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--target", choices=sorted(TARGETS), default="h200", help="Type of GPU.")
    add("--mode", choices=("train", "forward"), default="train", help="Training step or forward pass.")
    add("--batch", type=int, default=1, help="Bags per step.")
    add("--cells", type=int, default=50, help="Cells per bag.")
    add(
        "--remat",
        choices=("none", "products", "level"),
        default="products",
        help="What the backward pass computes again; see `SCTConfig.remat`.",
    )
    add("--model", default="{}", help="Options of SCTConfig as JSON.")
    add(
        "--max_masked_fraction",
        type=float,
        default=0.05,
        help="Share of the positions at which the output head is computed in training.",
    )
    add("--cudnn_attention", action=argparse.BooleanOptionalAction, default=True, help="Use cuDNN attention.")
    add("--xla_options", default="{}", help="Options of XLA as JSON.")
    add(
        "--peak_tflops",
        type=float,
        default=0.0,
        help="Peak rate in TFLOP/s; default: that of the data sheet.",
    )
    add(
        "--bandwidth_tb",
        type=float,
        default=0.0,
        help="Memory bandwidth in TB/s; default: that of the data sheet.",
    )
    add("--products", type=float, default=0.8, help="Share of the peak that matrix products reach.")
    add("--convolutions", type=float, default=0.6, help="Share of the peak that convolutions reach.")
    add("--memory", type=float, default=0.9, help="Share of the memory bandwidth that is reached.")
    add("--slowest", type=int, default=15, help="Number of slowest kernels to list.")
    add("--save", type=Path, help="Write the compiled program to this file.")
    add("--program", type=Path, help="Read this compiled program instead of compiling one.")
    try:
        sums, tables = estimate(parser.parse_args(words))
    except SctError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(sums))
    print(tables)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
