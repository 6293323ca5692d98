"""Memory of a train step on simulated devices, from the compiled program; nothing is allocated.

python -m tests.distributed.bag_memory '{"model": {...}, "max_masked_fraction": 0.05, "bags": [{"cells": 50}, ...]}'
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any, cast

import jax
import numpy as np

from sct.data.bags import BagOptions
from sct.data.store import Store
from sct.models.sct_config import SCTConfig
from sct.tasks.masked_expression import MaskedExpression, MaskedExpressionConfig
from sct.train.optim import OptimizerConfig
from tests.distributed.programs import compiled_step, memory


def measure(model: SCTConfig, max_masked_fraction: float, cells: int, **sizes: int) -> dict[str, float]:
    """GiB of temporaries and arguments of a device, and of the largest array of its program."""
    store = SimpleNamespace(vocabulary=range(model.num_genes), split=lambda name: [], path="")
    objective = MaskedExpressionConfig(max_masked_fraction=max_masked_fraction)
    task = MaskedExpression(objective, model, BagOptions(cells_per_bag=cells), cast(Store, store))
    batch = {
        "tokens": jax.ShapeDtypeStruct((1, cells, model.num_genes), np.uint8),
        "example_mask": jax.ShapeDtypeStruct((1,), np.float32),
        "measured": jax.ShapeDtypeStruct((1, model.num_genes), np.bool_),
    }
    return memory(compiled_step(task, batch, sizes, OptimizerConfig())[1])


if __name__ == "__main__":
    request: dict[str, Any] = json.loads(sys.argv[1])
    model = SCTConfig(**{"remat": "level", **request["model"]})
    print(json.dumps([measure(model, request["max_masked_fraction"], **bag) for bag in request["bags"]]))
