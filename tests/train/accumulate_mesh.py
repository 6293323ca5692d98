"""Three accumulated steps on meshes of simulated devices, printed as JSON; run in a process of its own."""

from __future__ import annotations

import json
import sys

import jax
import numpy as np

from sct.data.store import Store
from sct.families.tasks import make_task
from sct.train import sharding
from sct.train.optim import OptimizerConfig, make_optimizer
from sct.train.state import init_state, make_train_step


def measure(config: dict, microbatch: int, sizes: dict[str, int]) -> dict:
    """Losses, gradient norms, final parameters' norm, and bytes of the state on the first device."""
    task, _ = make_task(config, Store.open(config["data"]["store"]))
    count = int(np.prod(list(sizes.values())))
    mesh = sharding.make_mesh(sharding.MeshConfig(**{"data": 1, **sizes}), jax.devices()[:count])
    options = OptimizerConfig(peak_lr=1e-3, init_lr=1e-3)
    abstract, make = init_state(task, lambda p: make_optimizer(options, 10, p)[0], mesh, seed=0)
    optimizer, _ = make_optimizer(options, 10, abstract.trained)
    step, state = make_train_step(task, optimizer, mesh, abstract, microbatch), make()
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    size = config["train"]["batch_size"]
    bags = [task.dataset("train").record(i) for i in range(size)]
    batch = {key: np.stack([bag[key] for bag in bags]) for key in bags[0]}
    batch["example_mask"] = np.ones(size, np.float32)
    losses, norms = [], []
    for _ in range(3):
        state, scalars, _ = step(state, sharding.put_batch(batch, mesh))
        losses.append(float(scalars["loss"]))
        norms.append(float(scalars["gradient_norm"]))
    norm = float(np.sqrt(sum(float((np.asarray(v, np.float64) ** 2).sum()) for v in state.trained.values())))
    return {"losses": losses, "norms": norms, "size": norm, "bytes": held}


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    print(
        json.dumps([measure(request["config"], request["microbatch"], sizes) for sizes in request["meshes"]])
    )
