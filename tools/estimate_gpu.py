"""Estimate the speed of sCT on a GPU from the program that XLA compiles for it. No GPU is needed.

    python tools/estimate_gpu.py --target=h200 --mode=train --batch=4 --remat=products
    python tools/estimate_gpu.py --target=a100 --program=step.hlo

Prints one line of JSON, then tables of the kernels by kind of work and of the slowest kernels. See
`sct.speed.kernels` for what the estimate counts, and `sct.speed.gpu_targets` for the packages that it takes. `--save`
writes the compiled program to a file, which `--program` reads, for example to estimate it with other rates.
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

from sct.models.sct import SCT
from sct.models.sct_config import SCTConfig
from sct.nn import axes, target
from sct.nn.paths import unflatten
from sct.speed.gpu_targets import OPTIONS, TARGETS, GpuTarget
from sct.speed.kernels import Kernel, Program, Rates, by_group, kernels
from sct.speed.memory import memory_of
from sct.tasks.masked_objective import MaskedExpressionConfig, MaskedObjective
from sct.train import sharding
from sct.train.optim import OptimizerConfig, make_optimizer
from sct.train.state import init_state, make_train_step


def compiled(
    config: SCTConfig, gpu: GpuTarget, mode: str, batch: int, cells: int, fraction: float, library: bool
) -> Any:
    """Compile a training step or a forward pass of sCT for a GPU.

    With `library`, attention is that of cuDNN.
    """
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1, devices=1), gpu.devices())
    task = MaskedObjective(MaskedExpressionConfig(max_masked_fraction=fraction), config)
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
    return lowered.compile(compiler_options=OPTIONS)


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


def main(words: Sequence[str] | None = None) -> int:
    """Compile, estimate and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--target", choices=sorted(TARGETS), default="h200")
    parser.add_argument("--mode", choices=("train", "forward"), default="train")
    parser.add_argument("--batch", type=int, default=1, help="Bags per step.")
    parser.add_argument("--cells", type=int, default=50, help="Cells per bag.")
    parser.add_argument("--remat", choices=("none", "products", "level"), default="products")
    parser.add_argument("--model", default="{}", help="Options of SCTConfig as JSON.")
    parser.add_argument("--max_masked_fraction", type=float, default=0.05)
    parser.add_argument("--cudnn_attention", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--products", type=float, default=0.8, help="Share of the peak that matrix products reach."
    )
    parser.add_argument("--convolutions", type=float, default=0.6, help="Share of the peak for convolutions.")
    parser.add_argument(
        "--memory", type=float, default=0.9, help="Share of the memory bandwidth that is reached."
    )
    parser.add_argument("--slowest", type=int, default=15, help="Number of slowest kernels to list.")
    parser.add_argument("--save", type=Path, help="Write the compiled program to this file.")
    parser.add_argument("--program", type=Path, help="Read this compiled program instead of compiling one.")
    given = parser.parse_args(words)
    gpu = TARGETS[given.target]
    model: Mapping[str, Any] = {"dtype": "bfloat16", "remat": given.remat, **json.loads(given.model)}
    config, needs = SCTConfig(**model), {}
    if given.program:
        text = given.program.read_text()
    else:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        program = compiled(
            config,
            gpu,
            given.mode,
            given.batch,
            given.cells,
            given.max_masked_fraction,
            given.cudnn_attention,
        )
        text, needs = program.as_text(), memory_of(program)
        if given.save:
            given.save.write_text(text)
    found = kernels(Program(text))
    rates = gpu.rates(given.products, given.convolutions, given.memory)
    sums = summary(found, rates)
    positions = given.cells * config.num_genes
    head = max(1, round(given.max_masked_fraction * positions)) if given.mode == "train" else None
    flops = (3 if given.mode == "train" else 1) * SCT.flops(config, given.batch, given.cells, head)
    print(
        json.dumps({
            **{name: getattr(given, name) for name in ("target", "mode", "batch", "cells", "remat")},
            **sums,
            "formula_tflop": flops / 1e12,
            "estimated_tokens_per_s": given.batch * positions / sums["estimated_seconds"],
            "estimated_share_of_peak": flops / sums["estimated_seconds"] / gpu.flops,
            **{name.replace("bytes", "gib"): (value or 0) / 2**30 for name, value in needs.items()},
        })
    )  # fmt: skip
    print(report(found, rates, given.slowest))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
