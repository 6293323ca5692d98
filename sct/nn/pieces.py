"""A function over the pieces of a sequence, one after the other."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Arrays = tuple[jax.Array, ...]
# (params, inputs of one piece, kept arrays or None) -> (output of the piece, arrays to keep), see `map_pieces`.
Piece = Callable[[Any, Arrays, Arrays | None], tuple[jax.Array, Arrays]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def map_pieces(function: Piece, keep: bool, params: Any, inputs: Arrays) -> jax.Array:
    """Apply a function to one piece of each input after the other; stack the outputs.

    The result of `jax.lax.map`, whose gradient goes through the pieces again. It keeps `params` and `inputs` for
    that, and with `keep` also what the function gives beside its output, which it then gets back as its last
    argument, to be used in place of computing it again (see `known`).

    `lax.map` would fill its outputs with zeros first, which XLA for the CPU (jax 0.10) does for all the loops of a
    program at its beginning, each with a copy of its own: at full size half of all memory.

    Parameters
    ----------
    function
        Pure function; hashable, since it is a static argument.
    keep
        Whether to keep what the function offers, for the gradient.
    params
        Tree of arrays; its gradient is summed over the pieces.
    inputs
        Arrays (P, ...) of P pieces.
    """
    return _run(function, params, inputs, False)[0]


def _run(function: Piece, params: Any, inputs: Arrays, keep: bool) -> tuple[jax.Array, Arrays]:
    """Outputs of the pieces, stacked, and what they offer to keep, if it is wanted."""
    count = inputs[0].shape[0]

    def of_piece(piece: Arrays) -> Arrays:
        output, offered = function(params, piece, None)
        return (output, *offered) if keep else (output,)

    shapes = jax.eval_shape(of_piece, tuple(each[0] for each in inputs))
    after = max(inputs, key=lambda each: each.size)
    room = tuple(_room((count, *each.shape), each.dtype, after) for each in shapes)

    def step(i: jax.Array, outputs: Arrays) -> Arrays:
        return _put(outputs, of_piece(_piece(inputs, i)), i)

    output, *kept = lax.fori_loop(0, count, step, room)
    return output, tuple(kept)


@jax.custom_vjp
def known(computed: jax.Array, value: jax.Array) -> jax.Array:
    """`value`, which is what `computed` was before; the gradient goes to `computed`, whose own value is not needed."""
    return value


known.defvjp(
    lambda computed, value: (value, None), lambda kept, gradient: (gradient, jnp.zeros_like(gradient))
)


def _piece(arrays: Arrays, i: jax.Array) -> Arrays:
    return tuple(lax.dynamic_index_in_dim(each, i, keepdims=False) for each in arrays)


def _put(arrays: Arrays, pieces: Sequence[jax.Array], i: jax.Array) -> Arrays:
    both = zip(arrays, pieces, strict=True)
    return tuple(lax.dynamic_update_index_in_dim(whole, piece, i, 0) for whole, piece in both)


def _room(shape: tuple[int, ...], dtype: Any, after: jax.Array) -> jax.Array:
    """Array to be overwritten, which depends on another, so that it takes memory no earlier than that."""
    first = lax.slice(after, [0] * after.ndim, [1] * after.ndim).reshape(())
    return jnp.broadcast_to((first * 0).astype(dtype), shape)


def _forward(
    function: Piece, keep: bool, params: Any, inputs: Arrays
) -> tuple[jax.Array, tuple[Any, Arrays, Arrays]]:
    output, kept = _run(function, params, inputs, keep)
    return output, (params, inputs, kept)


def _backward(
    function: Piece, keep: bool, saved: tuple[Any, Arrays, Arrays], gradient: jax.Array
) -> tuple[Any, Arrays]:
    params, inputs, kept = saved

    def step(i: jax.Array, sums: tuple[Any, Arrays]) -> tuple[Any, Arrays]:
        by_params, by_inputs = sums
        again = _piece(kept, i) if keep else None
        _, pull = jax.vjp(lambda params, piece: function(params, piece, again)[0], params, _piece(inputs, i))
        of_params, of_inputs = pull(lax.dynamic_index_in_dim(gradient, i, keepdims=False))
        return jax.tree.map(jnp.add, by_params, of_params), _put(by_inputs, of_inputs, i)

    start = (
        jax.tree.map(jnp.zeros_like, params),
        tuple(_room(each.shape, each.dtype, gradient) for each in inputs),
    )
    return lax.fori_loop(0, inputs[0].shape[0], step, start)


map_pieces.defvjp(_forward, _backward)
