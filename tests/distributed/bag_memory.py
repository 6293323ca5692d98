"""Memory of a train step on simulated devices, from the compiled program; nothing is allocated.

python -m tests.distributed.bag_memory '{"model": {...}, "head_budget": 0.05, "bags": [{"cells": 50}, ...]}'
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from types import SimpleNamespace
from typing import Any, cast

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

from sct.data.bags import BagOptions
from sct.data.store import Store
from sct.models.sct_config import SCTConfig
from sct.tasks.masked_expression import MaskedExpression, MaskedExpressionConfig
from sct.train import sharding
from sct.train.optim import OptimizerConfig, make_optimizer
from sct.train.state import init_state, make_train_step

_BYTES = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2}


def measure(model: SCTConfig, head_budget: float, cells: int, **sizes: int) -> dict[str, float]:
    """GiB of temporaries and arguments of a device, and of the largest array of its program."""
    store = SimpleNamespace(vocabulary=range(model.num_genes), split=lambda name: [], path="")
    objective = MaskedExpressionConfig(head_budget=head_budget)
    task = MaskedExpression(objective, model, BagOptions(cells_per_bag=cells), cast(Store, store))
    devices = math.prod(sizes.values())
    mesh = sharding.make_mesh(sharding.MeshConfig(**{"data": 1, **sizes}, devices=devices))
    options = OptimizerConfig()
    abstract, _ = init_state(task, lambda shapes: make_optimizer(options, 10, shapes)[0], mesh, 0)
    step = make_train_step(task, make_optimizer(options, 10, abstract.trained)[0], mesh, abstract)
    batch = {
        "tokens": jax.ShapeDtypeStruct((1, cells, model.num_genes), np.uint8),
        "weight": jax.ShapeDtypeStruct((1,), np.float32),
    }
    compiled = step.lower(abstract, batch).compile()
    needs = compiled.memory_analysis()
    arrays = re.findall(r"\b([a-z]+\d+)\[([\d,]+)\]", compiled.as_text())
    largest = max(_BYTES.get(kind, 1) * math.prod(map(int, shape.split(","))) for kind, shape in arrays)
    sums = (needs.temp_size_in_bytes, needs.argument_size_in_bytes, largest)
    return dict(zip(("temporaries", "arguments", "largest"), (size / 2**30 for size in sums), strict=True))


if __name__ == "__main__":
    request: dict[str, Any] = json.loads(sys.argv[1])
    model = SCTConfig(**{"remat": "level", **request["model"]})
    print(json.dumps([measure(model, request["head_budget"], **bag) for bag in request["bags"]]))
