"""Steps of instruction tuning on meshes of eight simulated devices, printed as JSON; run in a process of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.distributed.mesh_steps import most_bytes, recorder, relative  # first: it sets the devices up

# isort: split
import jax
import numpy as np
import optax

from sct.nn.paths import flatten
from sct.train import sharding
from sct.train.optim import OptimizerConfig, make_optimizer
from sct.train.state import init_state, load_into, make_train_step
from tests.train.test_instructions import batch_of, parameters, task_of

CELLS = 8


def batch(task: Any) -> dict[str, np.ndarray]:
    """Cells of all tasks, one of no weight; one of two microbatches has long answers, the other short ones."""
    records = batch_of(task, 4 * CELLS)
    length, half = records["predicted"].sum(axis=1), CELLS // 2
    answered = np.flatnonzero(length)

    def chosen(order: np.ndarray) -> list[int]:
        """The first of each task, and of what follows as many as are left."""
        _, first = np.unique(records["task"][order], return_index=True)
        return [*order[np.sort(first)], *np.delete(order, first)][:half]

    # Microbatches are records 0, 2, ... and 1, 3, ...
    turned = [chosen(answered[np.argsort(sign * length[answered], kind="stable")]) for sign in (-1, 1)]
    rows = np.stack(turned, axis=1).ravel()
    made = {name: value[rows] for name, value in records.items()}
    made["example_mask"][-1] = 0
    return made


def steps(
    texts: Path, sizes: dict[str, int], microbatch: int
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Losses and sums of three steps, bytes on a device, and the first gradient."""
    task = task_of(texts)
    count = int(np.prod(list(sizes.values())))
    mesh = sharding.make_mesh(sharding.MeshConfig(**{"data": 1, **sizes}, devices=count))
    options = OptimizerConfig(peak_lr=1e-2, init_lr=1e-2)

    def optimizer(trained: Any) -> optax.GradientTransformation:
        return optax.chain(recorder(), make_optimizer(options, 10, trained)[0])

    abstract, make = init_state(task, optimizer, mesh, seed=0)
    state = load_into(make(), jax.device_get(flatten(parameters(texts))), ())
    held = most_bytes(state.trained)
    step = make_train_step(task, optimizer(abstract.trained), mesh, abstract, microbatch)
    placed = sharding.put_batch(batch(task), mesh)
    losses, gradients, sums = [], [], {}
    for _ in range(3):
        state, scalars, sums = step(state, placed)
        losses.append(float(scalars["loss"]))
        gradients.append(jax.device_get(state.optimizer[0]))
    said = {name: np.asarray(value).tolist() for name, value in sums.items()}
    return {"losses": losses, "sums": said, "bytes": held}, gradients[0]


def mixed(gradient: dict[str, np.ndarray], task: Any) -> dict[str, float]:
    """Norm of the gradient of each member of the mixture of adapters."""
    found = {}
    for name in task.mixture.members:
        at = task.mixture.place(name)
        parts = [
            np.moveaxis(value, -1 if path.endswith("lora_a") else -2, 0)[at]
            for path, value in gradient.items()
            if path.endswith(("lora_a", "lora_b"))
        ]
        found[name] = float(np.sqrt(sum(np.square(part).sum() for part in parts)))
    return found


def compare(texts: Path, runs: list[tuple[dict[str, int], int]]) -> list[dict[str, Any]]:
    """For each run its losses, the gradient that differs most from the first run's, and that of each adapter."""
    task, first, found = task_of(texts), {}, []
    for sizes, microbatch in runs:
        said, gradient = steps(texts, sizes, microbatch)
        first = first or gradient
        errors = {path: relative(value, first[path]) for path, value in gradient.items()}
        worst = max(errors, key=errors.__getitem__)
        found.append({**said, "worst": worst, "error": errors[worst], "adapters": mixed(gradient, task)})
    return found


def halves(texts: Path) -> dict[str, Any]:
    """Loss and predicted tokens of the whole batch and of each half of it."""
    task, variables = task_of(texts), parameters(texts)
    whole = batch(task)
    loss = jax.jit(task.loss, static_argnums=3)
    found = []
    for part in (slice(None), slice(0, None, 2), slice(1, None, 2)):
        value, sums = loss(
            variables, {name: array[part] for name, array in whole.items()}, jax.random.key(0), True
        )
        found.append((float(value), float(sums["predicted"])))
    return {"found": found, "tasks": sorted(set(whole["task"][whole["example_mask"] > 0].tolist()))}


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    texts = Path(request["texts"])
    print(json.dumps({"runs": compare(texts, request["runs"]), "halves": halves(texts)}))
