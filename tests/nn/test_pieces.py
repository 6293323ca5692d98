"""A function over pieces equals `lax.map`, gradients included, and keeps its inputs and what is asked for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sct.nn.pieces import known, map_pieces


def function(params, inputs, kept):
    x, y = inputs
    product = x @ params["w"]
    product = product if kept is None else known(product, kept[0])
    return jnp.tanh(product) * y.sum() + params["b"], (product,)


def function_of_what_was_kept(params, inputs, kept):
    """Gives nonsense unless the kept product is used in place of its own."""
    x, y = inputs
    product = x @ params["w"]
    if kept is not None:
        product = known(product + 1e3, kept[0])
    return jnp.tanh(product) * y.sum() + params["b"], (product,)


def arguments(seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {"w": draw(3, 4), "b": draw(4)}, (draw(5, 6, 3), draw(5, 2)), draw(5, 6, 4)


def by_map(params, inputs):
    return jax.lax.map(lambda piece: function(params, piece, None)[0], inputs)


@pytest.mark.parametrize(
    ("function", "keep"), [(function, False), (function, True), (function_of_what_was_kept, True)]
)
def test_outputs_and_gradients_are_those_of_lax_map(function, keep):
    params, inputs, weights = arguments()
    made = []
    for form in (lambda p, i: map_pieces(function, keep, p, i), by_map):
        value, pull = jax.vjp(form, params, inputs)
        made.append(jax.tree.leaves((value, pull(weights))))
    for mine, theirs in zip(*made, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
        assert np.abs(theirs).max() > 0


@pytest.mark.parametrize(("keep", "products"), [(False, 0), (True, 5 * 6 * 4)])
def test_what_is_kept_are_the_inputs_and_what_is_asked_for(keep, products):
    params, inputs, _ = arguments()
    _, pull = jax.vjp(lambda p, i: map_pieces(function, keep, p, i), params, inputs)
    kept = sum(leaf.size for leaf in jax.tree.leaves(pull) if hasattr(leaf, "size"))
    assert kept == sum(leaf.size for leaf in jax.tree.leaves((params, inputs))) + products


def test_a_number_that_is_not_finite_stays_where_it_is():
    params, (x, y), _ = arguments()
    broken = (x.at[0].set(jnp.nan), y)  # the first number is what the room for the outputs depends on
    value = map_pieces(function, False, params, broken)
    assert np.isnan(value[0]).all()
    np.testing.assert_allclose(value[1:], by_map(params, (x, y))[1:], rtol=1e-5)
