"""Training steps on meshes of eight simulated devices, printed as JSON; run in a process of its own."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sct.data.store import Store
from sct.families.tasks import make_task
from sct.nn import chunked_attention, execution
from sct.train import sharding
from sct.train.checkpoint import Checkpoints, RunProgress
from sct.train.optim import OptimizerConfig, make_optimizer
from sct.train.state import State, init_state, make_train_step

# So that the short sequences of a test have several chunks, the last of them not full, and several pieces.
chunked_attention.CPU_SMALL_CHUNKS = (5, 16)
execution.LEVEL_CHUNK_CPU = 32


def recorder() -> optax.GradientTransformation:
    """Keep the last gradient in the optimiser's state."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda gradient, last, params=None: (gradient, gradient),
    )


class Run:
    """A task on one mesh."""

    def __init__(self, config: dict[str, Any], sizes: dict[str, int], parent: dict[str, Any] | None = None):
        self.task, _ = make_task(config, Store.open(config["data"]["store"]), parent_data_spec=parent)
        count = int(np.prod(list(sizes.values())))
        self.mesh = sharding.make_mesh(sharding.MeshConfig(**{"data": 1, **sizes}, devices=count))
        options = OptimizerConfig(peak_lr=1e-3, init_lr=1e-3)

        def optimizer(trained: Any) -> optax.GradientTransformation:
            return optax.chain(recorder(), make_optimizer(options, 10, trained)[0])

        self.abstract, self.make = init_state(self.task, optimizer, self.mesh, seed=0)
        self.step = make_train_step(self.task, optimizer(self.abstract.trained), self.mesh, self.abstract)

    def train(self, state: State, steps: int) -> tuple[State, list[float], list[dict[str, np.ndarray]]]:
        """State, losses and gradients after some steps on the same batch."""
        bags = [self.task.dataset("train").record(i) for i in range(8)]
        batch = {key: np.stack([bag[key] for bag in bags]) for key in bags[0]}
        batch["example_mask"] = np.ones(8, np.float32)
        losses, gradients = [], []
        for _ in range(steps):
            state, scalars, sums = self.step(state, sharding.put_batch(batch, self.mesh))
            self.counts = {name: float(sums[name]) for name in ("masked", "dropped_targets") if name in sums}
            losses.append(float(scalars["loss"]))
            gradients.append(jax.device_get(state.optimizer[0]))
        return state, losses, gradients


def most_bytes(tree: Any) -> int:
    """Bytes on the device that holds most."""
    held: dict[Any, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return max(held.values())


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """Norm of the difference over the norm of the second."""
    return float(np.linalg.norm(np.float64(a) - np.float64(b)) / np.linalg.norm(np.float64(b)))


def with_noise(state: State, scale: float) -> State:
    """State whose trained arrays are changed at random, so that no array of a new adapter is zero."""
    rng = np.random.default_rng(0)

    def add(value: jax.Array) -> jax.Array:
        noise = scale * rng.normal(size=value.shape).astype(np.float32)
        return value + jax.device_put(noise, value.sharding)

    trained = {path: add(value) for path, value in sorted(state.trained.items())}
    return dataclasses.replace(state, trained=trained)


def compare(
    config: dict[str, Any],
    meshes: list[dict[str, int]],
    zero: str = "",
    noise: float = 0.0,
    parent: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """For each mesh its losses, the gradient that differs most from the first mesh's, and bytes per device.

    The gradient of the parameter `zero` is zero but for rounding. `noise` is the deviation of `with_noise`, and
    `parent` the data record of the model that is fine-tuned.
    """
    found: list[dict[str, Any]] = []
    first: dict[str, np.ndarray] = {}
    for sizes in meshes:
        run = Run(config, sizes, parent)
        state = with_noise(run.make(), noise) if noise else run.make()
        held = {"trained": most_bytes(state.trained), "optimizer": most_bytes(state.optimizer)}
        _, losses, gradients = run.train(state, 3)
        gradient = gradients[0]
        first = first or gradient
        assert all(np.linalg.norm(value) > 0 for value in gradient.values()), {
            path for path, value in gradient.items() if not np.linalg.norm(value)
        }
        errors = {path: relative(value, first[path]) for path, value in gradient.items() if path != zero}
        assert not zero or np.linalg.norm(gradient[zero]) < 1e-5 * optax.tree.norm(gradient)
        worst = max(errors, key=errors.__getitem__)
        found.append({"losses": losses, "worst": worst, "error": errors[worst], "bytes": held, **run.counts})
        found[-1]["trained"] = sorted(gradient)
    return found


def hand_over(config: dict[str, Any], meshes: list[dict[str, int]], folder: Path) -> dict[str, Any]:
    """Losses of a run whose checkpoints go from mesh to mesh, two steps on each, beside those of the first alone."""
    losses: list[float] = []
    state: Any = None
    for i, sizes in enumerate(meshes):
        run = Run(config, sizes)
        if i == 0:
            _, expected, _ = run.train(run.make(), 2 * len(meshes))
            state = run.make()
        else:
            before, checkpoints = jax.device_get(state), Checkpoints(folder)
            state, progress = checkpoints.restore(run.abstract)
            checkpoints.close()
            assert progress.step == int(state.step) == 2 * i
            jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state))
            placed = jax.tree.map(lambda leaf, shape: leaf.sharding == shape.sharding, state, run.abstract)
            assert all(jax.tree.leaves(placed))
        state, made, _ = run.train(state, 2)
        losses += made
        checkpoints = Checkpoints(folder)
        checkpoints.save(state, RunProgress(step=int(state.step)))
        checkpoints.close()
    return {"losses": losses, "expected": expected}


def shapes(texts: list[str]) -> list[list[int]]:
    """Sizes of the axes of meshes that are written as texts."""
    meshes = [sharding.make_mesh(sharding.MeshConfig.parse(text)) for text in texts]
    return [[mesh.shape[axis] for axis in sharding.MESH_AXES] for mesh in meshes]


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    if "texts" in request:
        answer: Any = shapes(request["texts"])
    elif "folder" in request:
        answer = hand_over(request["config"], request["meshes"], Path(request["folder"]))
    else:
        answer = compare(**request)
    print(json.dumps(answer))
