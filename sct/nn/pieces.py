"""A function over the pieces of a sequence, one after the other."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# (params, inputs of one piece) -> output of the piece.
Piece = Callable[[Any, tuple[jax.Array, ...]], jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def map_pieces(function: Piece, params: Any, inputs: tuple[jax.Array, ...]) -> jax.Array:
    """Apply `function(params, piece of each input)` along the first axis of `inputs`; stack the outputs.

    The result of `jax.lax.map`, whose gradient keeps `params` and `inputs` alone and goes through the pieces again.
    `lax.map` would fill its outputs with zeros first, which XLA for the CPU (jax 0.10) does for all the loops of a
    program at its beginning, each with a copy of its own: at full size half of all memory.

    Parameters
    ----------
    function
        Pure function; hashable, since it is a static argument.
    params
        Tree of arrays; its gradient is summed over the pieces.
    inputs
        Arrays (P, ...) of P pieces.
    """
    count = inputs[0].shape[0]
    shape = jax.eval_shape(function, params, tuple(each[0] for each in inputs))

    def step(i: jax.Array, output: jax.Array) -> jax.Array:
        return lax.dynamic_update_index_in_dim(output, function(params, _piece(inputs, i)), i, 0)

    return lax.fori_loop(
        0, count, step, _room((count, *shape.shape), shape.dtype, max(inputs, key=lambda each: each.size))
    )


def _piece(arrays: tuple[jax.Array, ...], i: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(lax.dynamic_index_in_dim(each, i, keepdims=False) for each in arrays)


def _room(shape: tuple[int, ...], dtype: Any, after: jax.Array) -> jax.Array:
    """Array to be overwritten, which depends on another, so that it takes memory no earlier than that."""
    first = lax.slice(after, [0] * after.ndim, [1] * after.ndim).reshape(())
    return jnp.broadcast_to((first * 0).astype(dtype), shape)


def _forward(
    function: Piece, params: Any, inputs: tuple[jax.Array, ...]
) -> tuple[jax.Array, tuple[Any, tuple[jax.Array, ...]]]:
    return map_pieces(function, params, inputs), (params, inputs)


def _backward(
    function: Piece, kept: tuple[Any, tuple[jax.Array, ...]], gradient: jax.Array
) -> tuple[Any, tuple[jax.Array, ...]]:
    params, inputs = kept

    def step(i: jax.Array, sums: tuple[Any, tuple[jax.Array, ...]]) -> tuple[Any, tuple[jax.Array, ...]]:
        by_params, by_inputs = sums
        _, pull = jax.vjp(function, params, _piece(inputs, i))
        of_params, of_inputs = pull(lax.dynamic_index_in_dim(gradient, i, keepdims=False))
        placed = [
            lax.dynamic_update_index_in_dim(whole, part, i, 0)
            for whole, part in zip(by_inputs, of_inputs, strict=True)
        ]
        return jax.tree.map(jnp.add, by_params, of_params), tuple(placed)

    start = (
        jax.tree.map(jnp.zeros_like, params),
        tuple(_room(each.shape, each.dtype, gradient) for each in inputs),
    )
    by_params, by_inputs = lax.fori_loop(0, inputs[0].shape[0], step, start)
    return by_params, by_inputs


map_pieces.defvjp(_forward, _backward)
