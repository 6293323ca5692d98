"""Models with adapters of all kinds on eight simulated devices, said as JSON; run in a process of its own."""

from __future__ import annotations

import json
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from sct.models import adapters, registry
from sct.models.combined_adapters import combine
from sct.nn import axes
from sct.nn.paths import flatten
from sct.train.sharding import RULES, MeshConfig, make_mesh
from tests.models.lora_models import boxed, config, trained_adapters
from tests.models.test_adapters import LAYER, kinds

COMBINED = (0, 1)  # adapters of the first layer and others of the second one, in one set


def measure() -> dict[str, Any]:
    """Differences of outputs from those without a mesh, and where the arrays lie."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2, sequence=2))
    rng = np.random.default_rng(0)
    given = {
        "llama": (rng.integers(0, 40, (2, 8)),),
        "sct": (rng.integers(0, 5, (2, 4, 16)).astype(np.uint8),),
        "scgpt": (
            rng.integers(0, 18, (2, 8)),
            rng.integers(0, 5, (2, 8)).astype(np.float32),
            np.arange(8) > np.array([[5], [7]]),
        ),
    }
    differences, specs, devices = {}, {}, 0
    for family, inputs in given.items():
        for layers in ((), LAYER, COMBINED):
            if layers == COMBINED:
                own = {name: trained_adapters(family, kinds(name)) for name in ((0,), LAYER)}
                tree = combine(boxed(family)["params"], own, dict.fromkeys(own, 1.0))
            else:
                tree = trained_adapters(family, kinds(layers))
            boxes = adapters.beside(boxed(family), flatten({"adapters": tree}))
            variables = {**nn.unbox(boxed(family)), "adapters": tree}
            module = registry.family(family).module(config(family))

            def run(variables: Any, inputs: Any, module: Any = module) -> jax.Array:
                outputs = module.apply(variables, *inputs)
                return outputs["logits"] if "logits" in outputs else outputs["encoder_output"]

            @jax.jit
            def spread(variables: Any, inputs: Any, run: Any = run) -> jax.Array:
                with axes.on_mesh(mesh, RULES):
                    return run(variables, inputs)

            placed = jax.device_put(variables, axes.shardings(boxes, mesh, RULES))
            expected, found = jax.jit(run)(variables, inputs), spread(placed, inputs)
            size = max(1.0, float(np.abs(expected).max()))
            differences[f"{family} {layers}"] = (
                float(np.abs(np.asarray(found) - np.asarray(expected)).max()) / size
            )
            if family == "llama" and layers == LAYER:
                specs = {
                    path: list(leaf.sharding.shard_shape(leaf.shape))
                    for path, leaf in flatten(placed["adapters"]).items()
                }
                devices = min(len(leaf.sharding.device_set) for leaf in jax.tree.leaves(placed))
    return {"devices": devices, "differences": differences, "specs": specs}


if __name__ == "__main__":
    print(json.dumps(measure()))
