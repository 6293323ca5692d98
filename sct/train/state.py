"""Define the training state, and compile the training step and the evaluation step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sct.nn import axes
from sct.nn.paths import flatten, resolve, unflatten
from sct.tasks.base import MOVING_STATISTICS, DeviceBatch, MetricSums, Objective, Variables
from sct.train import sharding
from sct.weights.pretrained import match


class State(struct.PyTreeNode):
    """Training state: the arrays that a step reads and writes, and that a checkpoint stores.

    Attributes
    ----------
    step
        int32, number of updates so far.
    trained, frozen
        Flat dicts of variables by path. The task's `trainable` table assigns each variable to one of the two. Only the
        variables in `trained` get gradients.
    optimizer
        Optimizer state for `trained`.
    key
        Raw data of the PRNG key of the run. The key of a step is `fold_in(key, step)`.
    """

    step: jax.Array
    trained: dict[str, jax.Array]
    frozen: dict[str, jax.Array]
    optimizer: Any
    key: jax.Array

    @property
    def variables(self) -> Variables:
        """Nested dict of all variables, both trained and frozen."""
        return unflatten({**self.frozen, **self.trained})


def _split(task: Objective, flat: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    trained = resolve(task.trainable, flat, "trainable")
    return (
        {path: value for path, value in flat.items() if trained[path]},
        {path: value for path, value in flat.items() if not trained[path]},
    )


MakeOptimizer = Callable[[dict[str, Any]], optax.GradientTransformation]


def init_state(task: Objective, make_optimizer: MakeOptimizer, mesh: Mesh, seed: int) -> tuple[State, Any]:
    """Return the abstract state (shapes, dtypes and shardings), and a function that makes the state on the mesh.

    `init_state` allocates no memory; only a call of the returned function does.
    """
    key = jax.random.key(seed)
    boxed = jax.eval_shape(task.init, key)
    placed = flatten(axes.shardings(boxed, mesh, sharding.RULES))
    trained_shapes, _ = _split(task, flatten(nn.unbox(boxed)))
    optimizer = make_optimizer(trained_shapes)
    replicated = NamedSharding(mesh, PartitionSpec())

    def make() -> State:
        init_key, run_key = jax.random.split(key)
        trained, frozen = _split(task, flatten(nn.unbox(task.init(init_key))))
        return State(
            jnp.zeros((), jnp.int32), trained, frozen, optimizer.init(trained), jax.random.key_data(run_key)
        )

    def place(path: tuple[Any, ...], leaf: Any) -> Any:
        # A moment of the optimizer has its parameter's path as key, and gets the sharding of the parameter.
        name = next((str(entry.key) for entry in reversed(path) if hasattr(entry, "key")), "")
        where = placed.get(name, replicated)
        where = where if len(where.spec) <= len(leaf.shape) else replicated
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    abstract = jax.tree_util.tree_map_with_path(place, jax.eval_shape(make))
    # The function runs once. On CPU, less optimization cuts its compilation by a third (4 s for the full model).
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return abstract, jax.jit(make, out_shardings=shardings, compiler_options=options)


def load_into(state: State, arrays: Mapping[str, np.ndarray], new: Sequence[str]) -> State:
    """Replace variables of the state by loaded arrays, which get the dtypes and shardings of the state.

    Parameters
    ----------
    state
        Initial state.
    arrays
        Loaded arrays by path.
    new
        Regular expressions. A variable whose path matches one of these expressions may be missing in `arrays`, and then
        keeps its initial value.

    Raises
    ------
    CheckpointError
        Paths or shapes differ; the message lists the differences.
    """
    present = {**state.frozen, **state.trained}
    match(arrays, present, "the model to start from", new)

    def replaced(flat: dict[str, jax.Array]) -> dict[str, jax.Array]:
        def place(path: str, value: jax.Array) -> jax.Array:
            return jax.device_put(arrays[path].astype(value.dtype), value.sharding)

        return {path: place(path, value) if path in arrays else value for path, value in flat.items()}

    return state.replace(trained=replaced(state.trained), frozen=replaced(state.frozen))


def make_train_step(
    task: Objective,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    abstract: State,
    microbatch: int = 0,
) -> Callable[[State, DeviceBatch], tuple[State, dict[str, jax.Array], MetricSums]]:
    """Return the compiled training step: (state, batch) -> (state, {loss, gradient_norm}, sums of the task).

    The state is donated: the caller must not use it again.

    Parameters
    ----------
    microbatch
        Number of records in a microbatch; 0 for the whole batch. If a batch is larger, its size must be a multiple of
        `microbatch`. A batch of n microbatches is processed one microbatch at a time. The records m, m + n, m + 2 n,
        ... form microbatch m, whose PRNG key is `fold_in(key of the step, m)`. The update equals that of the whole
        batch with the same masks.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def gradient_of(
        state: State, batch: DeviceBatch, rng: jax.Array
    ) -> tuple[jax.Array, dict[str, Any], MetricSums]:
        def loss_of(trained: dict[str, jax.Array]) -> tuple[jax.Array, MetricSums]:
            return task.loss(unflatten({**state.frozen, **trained}), batch, rng, True)

        with axes.on_mesh(mesh, sharding.RULES):
            (loss, sums), gradient = jax.value_and_grad(loss_of, has_aux=True)(state.trained)
        return loss, gradient, sums

    def accumulated(
        state: State, batch: DeviceBatch, rng: jax.Array, parts: int
    ) -> tuple[jax.Array, dict[str, Any], MetricSums]:
        # Taking every n-th record keeps each record on its device.
        turned = {
            name: value.reshape(-1, parts, *value.shape[1:]).swapaxes(0, 1) for name, value in batch.items()
        }
        split = NamedSharding(mesh, PartitionSpec(None, *sharding.batch_sharding(mesh).spec))
        turned = jax.lax.with_sharding_constraint(turned, dict.fromkeys(turned, split))

        def add(total: dict[str, Any], part: tuple[jax.Array, DeviceBatch]) -> tuple[dict[str, Any], Any]:
            loss, gradient, sums = gradient_of(state, part[1], jax.random.fold_in(rng, part[0]))
            # The loss is a mean over `weight` items, so microbatches are weighted by their number of items.
            weight = sums[task.loss_normalizer]
            total = jax.tree.map(lambda t, g: t + weight * g, total, gradient)
            return jax.lax.with_sharding_constraint(total, placed.trained), (weight * loss, sums)

        zero = jax.lax.with_sharding_constraint(jax.tree.map(jnp.zeros_like, state.trained), placed.trained)
        total, (losses, sums) = jax.lax.scan(add, zero, (jnp.arange(parts), turned))
        sums = jax.tree.map(lambda value: value.sum(0), sums)
        weight = jnp.maximum(sums[task.loss_normalizer], 1.0)
        return losses.sum() / weight, jax.tree.map(lambda g: g / weight, total), sums

    def step(state: State, batch: DeviceBatch) -> tuple[State, dict[str, jax.Array], MetricSums]:
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        parts = len(next(iter(batch.values()))) // microbatch if microbatch else 1
        if parts > 1:
            loss, gradient, sums = accumulated(state, batch, rng, parts)
        else:
            loss, gradient, sums = gradient_of(state, batch, rng)
        updates, moments = optimizer.update(gradient, state.optimizer, state.trained, value=loss)
        trained = optax.apply_updates(state.trained, updates)
        scalars = {"loss": loss, "gradient_norm": optax.tree.norm(gradient)}
        moved = sums.pop(MOVING_STATISTICS, {})
        frozen = {
            **state.frozen,
            **{path: state.frozen[path] + change / max(parts, 1) for path, change in moved.items()},
        }
        state = state.replace(step=state.step + 1, trained=trained, frozen=frozen, optimizer=moments)
        return state, scalars, sums

    placed = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(placed, sharding.batch_sharding(mesh)),
        out_shardings=(placed, whole, whole),
    )


def make_eval_step(task: Objective, mesh: Mesh) -> Callable[[State, DeviceBatch, jax.Array], MetricSums]:
    """Return the compiled evaluation step: (state, batch, batch number) -> sums of the task.

    The PRNG key depends only on the batch number, so every validation of a run uses the same masks.
    """

    def step(state: State, batch: DeviceBatch, number: jax.Array) -> MetricSums:
        rng = jax.random.fold_in(jax.random.key(0), number)
        with axes.on_mesh(mesh, sharding.RULES):
            return task.loss(state.variables, batch, rng, False)[1]

    return jax.jit(step, out_shardings=NamedSharding(mesh, PartitionSpec()))
