"""Compare a step with the reference implementation before it is timed.

The reference implementation uses the same model, parameters, bag and masks. All layers use reference kernels
(`sct.nn.reference`), all computations are in exact float32, the head is evaluated at all positions, and there is no
rematerialization. Parameters are random. Parameters that are initialized to 0 or 1 get random offsets, so that their
effect is tested too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import numpy as np
import optax

from sct.data import masking
from sct.data.store import Store
from sct.nn import axes
from sct.nn.adapters import KINDS
from sct.nn.paths import unflatten
from sct.speed.compare import Check, Outputs, compare
from sct.speed.job import SpeedJob
from sct.tasks.base import Task
from sct.train import sharding
from sct.train.state import State, init_state, load_into, make_train_step

_MOVED = 0.1
# Scalars of adapters, which are options and not parameters.
_NUMBERS = {name for kind in KINDS for name in (*kind.numbers, kind.layers)}
_MORE_BAGS = 2  # two bags, to detect errors that mix the bags of a batch


def small_batch(job: SpeedJob, store: Store) -> tuple[Any, Any, dict[str, np.ndarray], int]:
    """Make small inputs for the comparison.

    Return the task with small bags, the mesh, a batch of up to two bags per data shard, and the number of cells per
    bag.
    """
    mesh = sharding.make_mesh(job.train.mesh)
    cells = checked_cells(job, mesh.shape["sequence"])
    task = job.task(store, data=job.of_cells(cells))
    sharding.check_batch_size(job.train.batch_size, mesh)
    source = task.dataset("train")
    assert source is not None
    bags = [
        source.record(i % len(source)) for i in range(min(job.train.batch_size, _MORE_BAGS * _share(mesh)))
    ]
    batch = {name: np.stack([bag[name] for bag in bags]) for name in bags[0]}
    return task, mesh, {**batch, "example_mask": np.ones(len(bags), np.float32)}, cells


def checked_cells(job: SpeedJob, devices: int = 1) -> int:
    """Return the number of cells per bag in the comparison. Devices that share a bag get equal numbers of cells."""
    wanted = -(-(job.options.check_cells or 2) // devices) * devices
    return min(wanted, job.cells_per_record)


def share_of(job: SpeedJob, cells: int) -> float:
    """Return the number of cells of a bag in the comparison, divided by the number of cells of a timed bag."""
    return cells / job.cells_per_record


def _share(mesh: Any) -> int:
    return int(mesh.shape["data"] * mesh.shape["fsdp"])


def keep_gradient() -> optax.GradientTransformation:
    """Return an optimizer that leaves the parameters unchanged and stores the last gradient as its state."""

    def zeros(tree: Any) -> Any:
        return jax.tree.map(jax.numpy.zeros_like, tree)

    return optax.GradientTransformation(
        zeros, lambda gradient, state, params=None: (zeros(gradient), gradient)
    )


def moved_state(task: Task, mesh: Any, seed: int) -> tuple[State, State, dict[str, np.ndarray]]:
    """Make a training state with random parameters and random offsets; see the docstring of this module.

    Return the state, its shapes and dtypes, and a copy of its variables by path.
    """
    abstract, make_state = init_state(task, lambda _: keep_gradient(), mesh, seed)
    state = make_state()
    rng, arrays = np.random.default_rng(seed), {}
    for path, value in sorted({**state.frozen, **state.trained}.items()):
        array = np.array(value)  # a copy, because the step donates the state
        number = path.rpartition("/")[2] in _NUMBERS or not np.issubdtype(array.dtype, np.floating)
        if not number and (array.ndim < 2 or not array.any()):
            array = array + _MOVED * rng.standard_normal(array.shape, np.float32)
        arrays[path] = array
    return load_into(state, arrays, ()), abstract, arrays


def check_train(job: SpeedJob, store: Store) -> Check:
    """Compare the loss and gradient of the compiled training step with the reference implementation; see `compare`."""
    task, mesh, batch, cells = small_batch(job, store)
    micro = _share(mesh) if job.train.grad_accum_steps > 1 else len(batch["example_mask"])
    parts = len(batch["example_mask"]) // micro
    seed, data = job.train.seed, job.of_cells(cells)
    known: dict[str, Any] = {}

    def fast(model: Mapping[str, Any]) -> Outputs:
        task = job.task(store, data=data, model=model)
        state, abstract, arrays = moved_state(task, mesh, seed)
        known.update(arrays=arrays, trained=tuple(state.trained), key=np.array(state.key))
        step = make_train_step(task, keep_gradient(), mesh, abstract, micro)
        after, scalars, sums = step(state, sharding.put_batch(batch, mesh))
        known["dropped_targets"] = float(np.asarray(sums.get("dropped_targets", 0.0)))
        gradient = {path: np.array(value) for path, value in after.optimizer.items()}
        return {"loss": float(scalars["loss"]), "gradient": gradient}

    def plain(model: Mapping[str, Any]) -> Outputs:
        # If the fast step drops targets that exceed the head's budget, the reference must drop them too.
        objective = {} if known["dropped_targets"] else job.task_spec.everywhere
        task = job.task(store, data=data, model=model, objective=objective)
        frozen = {path: value for path, value in known["arrays"].items() if path not in known["trained"]}

        def loss_of(trained: dict[str, Any], batch: dict[str, Any]) -> jax.Array:
            rng = jax.random.fold_in(jax.random.wrap_key_data(jax.numpy.asarray(known["key"])), 0)
            variables = unflatten({**frozen, **trained})
            total = weight = jax.numpy.zeros(())
            for part in range(parts):  # each microbatch has its own masks
                own = jax.random.fold_in(rng, part) if parts > 1 else rng
                chosen = {name: value[part::parts] for name, value in batch.items()}
                loss, sums = task.loss(variables, chosen, own, True)
                total, weight = total + loss * sums[task.loss_normalizer], weight + sums[task.loss_normalizer]
            return total / weight

        trained = {path: known["arrays"][path] for path in known["trained"]}
        loss, gradient = jax.jit(jax.value_and_grad(loss_of))(trained, batch)
        return {"loss": float(loss), "gradient": jax.device_get(gradient)}

    found = compare("the training step", task.model_config.dtype, fast, plain, share_of(job, cells))
    return {**found, **shape(batch), "dropped_targets": known["dropped_targets"]}


def shape(batch: Mapping[str, Any]) -> dict[str, int]:
    """Return the report entries for the size of the batch on which a model is compared with its reference."""
    tokens = batch.get("tokens")
    if tokens is None:  # records are not bags
        return {"records": len(batch["example_mask"])}
    return dict(zip(("bags", "cells_per_bag", "gene_positions"), tokens.shape, strict=True))


def masked_inputs(task: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model inputs of a batch, masked as in training with a fixed random key."""
    bins = task.model_config.num_bins
    mask = task.config.masking(jax.random.key(0), batch["tokens"], bins)
    inputs = {"tokens": masking.apply(batch["tokens"], mask, bins)}
    return inputs | ({"coordinates": batch["coordinates"]} if "coordinates" in batch else {})


def forward(task: Any, mesh: Any) -> Callable[[Any, Mapping[str, Any]], jax.Array]:
    """Return the compiled forward pass: (variables, inputs) -> logits (B, K, G, levels + 2) at all positions."""

    def logits(variables: Any, inputs: Mapping[str, Any]) -> jax.Array:
        with axes.on_mesh(mesh, sharding.RULES):
            return cast(dict[str, jax.Array], task.model.apply(variables, **inputs))["logits"]

    return jax.jit(logits)


def plain_output(task: Any, arrays: dict[str, np.ndarray], inputs: Mapping[str, Any], name: str) -> Any:
    """Compute one output of the model on the default device.

    Layers use reference kernels if the caller is inside `reference_kernels`, and fast kernels otherwise.
    """

    def output(variables: Any, inputs: Mapping[str, Any]) -> jax.Array:
        return cast(dict[str, jax.Array], task.model.apply(variables, **inputs))[name]

    return jax.device_get(jax.jit(output)(unflatten(arrays), dict(inputs)))


def check_forward(job: SpeedJob, store: Store) -> Check:
    """Compare the logits of the compiled forward pass with the reference implementation; see `compare`."""
    task, mesh, batch, cells = small_batch(job, store)
    given = masked_inputs(task, sharding.put_batch(batch, mesh))
    host_inputs, data = jax.device_get(given), job.of_cells(cells)
    known: dict[str, Any] = {}

    def fast(model: Mapping[str, Any]) -> Outputs:
        task = job.task(store, data=data, model=model)
        state, _, known["arrays"] = moved_state(task, mesh, job.train.seed)
        return {"logits": np.array(forward(task, mesh)(state.variables, given))}

    def plain(model: Mapping[str, Any]) -> Outputs:
        task = job.task(store, data=data, model=model)
        return {"logits": plain_output(task, known["arrays"], host_inputs, "logits")}

    share = share_of(job, cells)
    return {**compare("the forward pass", task.model_config.dtype, fast, plain, share), **shape(batch)}
