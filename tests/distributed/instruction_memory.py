"""Memory and cost of a train step of ZerOmics' second stage on eight devices that are not there; nothing is allocated.

python -m tests.distributed.instruction_memory '{"target": "a100", "llm": {"embed_dim": 5120, ...}, "runs": [
    {"batch": 64, "grad_accum_steps": 1, "mesh": {"fsdp": 8}, "max_genes": 0}, ...]}'

Models, rows and optimiser are those of configs/zeromics_llm.py and configs/zeromics_sc.py; the decoder is LLaMA-2-7B
but for what `llm` says. Each line of the answer is one run, as JSON.
"""

from __future__ import annotations

import json
import math
import sys
from types import SimpleNamespace
from typing import Any, cast

import jax
import numpy as np

from configs import zeromics_llm, zeromics_sc
from sct.data.store import Store
from sct.data.text.tokenizer import Tokenizer
from sct.models.decoder_config import LlamaConfig
from sct.models.registry import build, computing
from sct.models.zeromics import ZerOmics, ZerOmicsConfig
from sct.models.zeromics_cells import ZerOmicsCells, ZerOmicsCellsConfig
from sct.nn import chunked_attention
from sct.tasks.instructions import InstructionData, Instructions, InstructionsConfig
from sct.train.optim import OptimizerConfig
from tests.distributed.programs import compiled_step, memory, moved

# What an A100 can do at most (bfloat16 products, NVLink in one direction), and the shares of it that are assumed.
PEAK_FLOPS, PEAK_LINK = 312e12, 300e9
SHARE_FLOPS, SHARE_LINK = 0.45, 0.7


def make_task(llm: dict[str, Any], max_genes: int) -> tuple[Instructions, OptimizerConfig]:
    """The task and its optimiser, without cells, tokenizer or files."""
    config = zeromics_llm.get_config().to_dict()
    model = config["model"]
    model["llm"] |= llm
    width = model["llm"].get("embed_dim", LlamaConfig.embed_dim)
    sizes = {"num_genes": ZerOmicsCellsConfig.num_genes, "feature_dim": width}
    model["cells"] = computing({**zeromics_sc.get_config().model.to_dict(), **sizes}, model["cells"])
    made = build(ZerOmicsConfig, model, "model")
    # The bundled data set has an abstract; nothing else of it is read.
    data = build(InstructionData, {**config["data"], "dataset": "pbmc68k", "max_genes": max_genes}, "data")
    store = SimpleNamespace(vocabulary=range(made.num_genes), split=lambda name: [], path="")
    tokenizer = SimpleNamespace(vocab_size=made.llm.vocab_size)
    known = np.ones(made.num_genes, bool)
    objective = build(InstructionsConfig, config["objective"], "objective")
    task = Instructions(
        objective, data, made, cast(Tokenizer, tokenizer), cast(Store, store), known, {}, seed=0
    )
    return task, build(OptimizerConfig, config["optimizer"], "optimizer")


def batch_of(task: Instructions, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch as the task's loader makes it."""
    genes, row = task.data.max_genes, (task.data.length,)
    parts: dict[str, tuple[tuple[int, ...], Any]] = {
        "bins": ((genes or task.model_config.num_genes,), np.uint8),
        **({"genes": ((genes,), np.int32)} if genes else {}),
        "input_ids": (row, np.int32),
        "attention_mask": (row, np.bool_),
        "predicted": (row, np.bool_),
        "task": ((), np.int32),
        "example_mask": ((), np.float32),
    }
    return {name: jax.ShapeDtypeStruct((size, *shape), kind) for name, (shape, kind) in parts.items()}


def step_flops(task: Instructions, size: int) -> float:
    """Operations of the matrix products of a step.

    The cell model runs forwards alone. The decoder runs forwards twice, the second time because `remat` kept nothing,
    and its gradient, for activations alone, is counted as once more; so is all of the map between them.
    """
    model, length = task.model_config, task.data.length
    genes = task.data.max_genes or model.num_genes
    cells = ZerOmicsCells.flops(model.cells, size, genes)
    return cells + 3 * (ZerOmics.flops(model, size, length, genes) - cells)


def measure(llm: dict[str, Any], run: dict[str, Any], target: str) -> dict[str, Any]:
    """What one device needs, GiB of the whole state, and a step's seconds on A100s as an estimate.

    It lets products and exchanges follow one another, at the shares of the peaks that are assumed above.
    """
    size, mesh = run["batch"], run["mesh"]
    task, options = make_task(llm, run.get("max_genes", 0))
    microbatch = size // run.get("grad_accum_steps", 1)
    state, compiled = compiled_step(task, batch_of(task, size), mesh, options, microbatch, target)
    whole = {name: gib(getattr(state, name)) for name in ("frozen", "trained", "optimizer")}
    exchanged = moved(compiled.as_text())
    flops = step_flops(task, size) / math.prod(mesh.values())
    seconds = flops / (SHARE_FLOPS * PEAK_FLOPS) + sum(exchanged.values()) / (SHARE_LINK * PEAK_LINK)
    return {
        **run,
        **memory(compiled),
        "whole": whole,
        "teraflop": flops / 1e12,
        "exchanged_gb": {name: number / 1e9 for name, number in exchanged.items()},
        "estimated_seconds": seconds,
    }


def gib(tree: Any) -> float:
    """Size of all arrays."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) / 2**30


if __name__ == "__main__":
    request: dict[str, Any] = json.loads(sys.argv[1])
    # Blocks of attention as an accelerator takes them.
    chunked_attention.CPU_CHUNKS = chunked_attention.CHUNKS
    chunked_attention.CPU_SMALL_CHUNKS = chunked_attention.ORDERED_CHUNKS
    chunked_attention.CPU_SHORT, chunked_attention.CPU_FEW = 0, 10**9
    for run in request["runs"]:
        print(json.dumps(measure(request.get("llm", {}), run, request.get("target", "cpu"))), flush=True)
