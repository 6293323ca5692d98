"""Apply a function to the chunks of its inputs, one after the other, to save memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

# Name that `saveable` gives to values, for the policies of `jax.checkpoint`.
SAVEABLE = "saveable"
# (params, inputs of one chunk) -> output of the chunk.
ChunkFunction = Callable[[Any, Any], jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def chunked_map(function: ChunkFunction, save: bool, params: Any, inputs: Any) -> jax.Array:
    """Apply a function to the chunks of its inputs, one after the other, and stack the outputs.

    The output equals that of `jax.lax.map`. The backward pass recomputes each chunk from `params` and `inputs`. With
    `save`, it uses the saved values that the function marks as `saveable`, and recomputes only the rest.

    `lax.map` itself would need more memory, because it first fills a buffer for its outputs with zeros. XLA for CPU
    (jax 0.10) fills the buffers of all loops when a program starts, and gives each loop its own buffer. In one
    measurement, these buffers took 1.5 GiB of the 4.1 GiB of temporary memory (docs/performance.md).

    Parameters
    ----------
    function
        Pure function. The function must be hashable, because it is a static argument of a compiled function.
    save
        Whether the forward pass saves the `saveable` values for the backward pass.
    params
        Tree of arrays, the same for all chunks. The gradient of `params` is summed over the chunks.
    inputs
        Tree of arrays (n, ...), for n chunks.

    Returns
    -------
    The outputs of the n chunks, stacked along the first axis: (n, ...).
    """
    return _map(function, False, params, inputs)[0]


_Mark = Callable[[jax.Array], jax.Array]
# What `saveable` does inside a chunk; None outside.
_mark: ContextVar[_Mark | None] = ContextVar("sct_saveable", default=None)


def saveable(x: jax.Array) -> jax.Array:
    """Mark the array `x` as a value that may be saved for the backward pass, and return `x`.

    Mark the outputs of convolutions and matrix products. Norms and GELUs cost only one pass over memory, so the
    backward pass recomputes them.
    """
    mark = _mark.get()
    return cast(jax.Array, checkpoint_name(x, SAVEABLE)) if mark is None else mark(x)


def inside_chunk() -> bool:
    """Return whether code is being traced inside a `chunked_map`."""
    return _mark.get() is not None


@contextmanager
def _marking(mark: _Mark) -> Iterator[None]:
    token = _mark.set(mark)
    try:
        yield
    finally:
        _mark.reset(token)


@jax.custom_vjp
def with_saved_value(computed: jax.Array, saved: jax.Array) -> jax.Array:
    """Return `saved`, the value of `computed` that the forward pass saved, but pass the gradient to `computed`.

    The value of `computed` is not used, so XLA does not compute it.
    """
    return saved


with_saved_value.defvjp(
    lambda computed, saved: (saved, None), lambda _, gradient: (gradient, jnp.zeros_like(gradient))
)


def _map(
    function: ChunkFunction, save: bool, params: Any, inputs: Any
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Compute the outputs (n, ...) of all chunks.

    With `save`, also return the values (n, ...) that the function marks as `saveable`.
    """

    def one(chunk: Any) -> tuple[jax.Array, ...]:
        saved: list[jax.Array] = []

        def mark(x: jax.Array) -> jax.Array:
            if save:
                saved.append(x)
            return x

        with _marking(mark):
            return (function(params, chunk), *saved)

    arrays = jax.tree.leaves(inputs)
    count, largest = arrays[0].shape[0], max(arrays, key=lambda x: x.size)
    shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], inputs))
    room = tuple(_room((count, *each.shape), each.dtype, largest) for each in shapes)
    output, *saved = lax.fori_loop(0, count, lambda i, made: _put(made, one(_take(inputs, i)), i), room)
    return output, tuple(saved)


def _forward(function: ChunkFunction, save: bool, params: Any, inputs: Any) -> tuple[jax.Array, Any]:
    output, saved = _map(function, save, params, inputs)
    return output, (params, inputs, saved)


def _backward(function: ChunkFunction, save: bool, residuals: Any, gradient: jax.Array) -> tuple[Any, Any]:
    params, inputs, saved = residuals

    def step(i: jax.Array, sums: tuple[Any, Any]) -> tuple[Any, Any]:
        by_params, by_inputs = sums
        values = iter(_take(saved, i))  # in the order in which the function marks them
        with _marking(lambda x: with_saved_value(x, next(values)) if save else x):
            _, pull = jax.vjp(function, params, _take(inputs, i))
        of_params, of_chunk = pull(_take(gradient, i))
        return jax.tree.map(jnp.add, by_params, of_params), _put(by_inputs, of_chunk, i)

    zeros = jax.tree.map(jnp.zeros_like, params)
    room = jax.tree.map(lambda x: _room(x.shape, x.dtype, gradient), inputs)
    return lax.fori_loop(0, gradient.shape[0], step, (zeros, room))


chunked_map.defvjp(_forward, _backward)


def _take(arrays: Any, i: jax.Array) -> Any:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), arrays)


def _put(arrays: Any, chunks: Any, i: jax.Array) -> Any:
    return jax.tree.map(lambda x, chunk: lax.dynamic_update_index_in_dim(x, chunk, i, 0), arrays, chunks)


def _room(shape: tuple[int, ...], dtype: Any, after: jax.Array) -> jax.Array:
    """Return a buffer of a given shape.

    The initial values of the buffer do not matter, because all of them are overwritten later.

    The buffer depends on the array `after`, so XLA does not allocate it before `after` exists.
    """
    first = lax.slice(after, [0] * after.ndim, [1] * after.ndim).reshape(())
    return jnp.broadcast_to((first * 0).astype(dtype), shape)
