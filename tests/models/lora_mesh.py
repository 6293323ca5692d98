"""An adapted model on eight simulated devices, said as JSON; run in a process of its own."""

from __future__ import annotations

import json
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from sct.models import lora, registry
from sct.nn import axes
from sct.nn.paths import flatten
from sct.train.sharding import RULES, MeshConfig, make_mesh
from tests.models.lora_models import ALL, adapted, boxed, call, config, inputs


def shard(array: jax.Array) -> list[int]:
    """Shape of one device's part."""
    return list(array.sharding.shard_shape(array.shape))


def measure() -> dict[str, Any]:
    """Outputs beside those of one device, and where the arrays lie."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    boxes = {**boxed("llama"), "adapters": lora.init(jax.random.key(1), boxed("llama")["params"], ALL)}
    variables = adapted("llama")
    placed = jax.device_put(variables, axes.shardings(boxes, mesh, RULES))
    module = registry.family("llama").module(config("llama"))

    @jax.jit
    def run(variables: Any, ids: jax.Array) -> jax.Array:
        with axes.on_mesh(mesh, RULES):
            return module.apply(variables, ids)["logits"]

    expected = np.asarray(call("llama", variables)["logits"])
    ids = np.concatenate([np.asarray(inputs("llama")["input_ids"])] * 2)
    merged = lora.merge(placed)

    def difference(variables: Any) -> float:
        return float(np.abs(np.asarray(run(variables, ids)) - np.concatenate([expected] * 2)).max())

    kernel = "params/layers/attention/query/kernel"
    return {
        "devices": min(len(leaf.sharding.device_set) for leaf in jax.tree.leaves(placed)),
        "difference": difference(placed),
        "merged": difference(merged),
        "specs": {path: shard(leaf) for path, leaf in flatten(nn.unbox(placed["adapters"])).items()},
        "kernel": shard(flatten(placed)[kernel]),
        "merged_kernel": shard(flatten(merged)[kernel]),
    }


if __name__ == "__main__":
    print(json.dumps(measure()))
