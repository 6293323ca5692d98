"""A function over chunks equals `lax.map`, gradients included, and saves its inputs and what is marked."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sct.nn.chunked_map import chunked_map, inside_chunk, saveable, with_saved_value


def function(params, inputs):
    x, y = inputs
    return jnp.tanh(saveable(x @ params["w"])) * y["scale"].sum() + params["b"]


def arguments(seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return (
        {"w": draw(3, 4), "b": draw(4)},
        (draw(5, 6, 3), {"scale": draw(5, 2), "none": None}),
        draw(5, 6, 4),
    )


def by_map(params, inputs):
    return jax.lax.map(lambda chunk: function(params, chunk), inputs)


@pytest.mark.parametrize("save", [False, True])
def test_outputs_and_gradients_are_those_of_lax_map(save):
    params, inputs, weights = arguments()
    made = []
    for form in (lambda p, i: chunked_map(function, save, p, i), by_map):
        value, pull = jax.vjp(form, params, inputs)
        made.append(jax.tree.leaves((value, pull(weights))))
    for mine, theirs in zip(*made, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
        assert np.abs(theirs).max() > 0


def test_the_gradient_reads_saved_values_in_place_of_its_own():
    params, inputs, weights = arguments()
    calls = []

    def drifting(params, chunk):
        """Computes something else in the backward pass, which is the last call that is traced."""
        calls.append(inside_chunk())
        x, y = chunk
        products = [saveable(x @ params["w"] + drift), saveable(x @ params["w"] * 2.0 + drift)]
        return jnp.tanh(products[0] + products[1]) * y["scale"].sum() + params["b"]

    drift = 0.0
    value, pull = jax.vjp(lambda p, i: chunked_map(drifting, True, p, i), params, inputs)
    drift = 1e3
    saved = jax.tree.leaves(pull(weights))
    drift = 0.0
    by_map_of = lambda p, i: jax.lax.map(lambda chunk: drifting(p, chunk), i)  # noqa: E731
    assert all(calls)
    value_of_map, pull_of_map = jax.vjp(by_map_of, params, inputs)
    assert calls[-1] is False
    np.testing.assert_allclose(value, value_of_map, rtol=1e-5)
    for mine, theirs in zip(saved, jax.tree.leaves(pull_of_map(weights)), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_a_saved_value_stands_for_what_was_computed():
    value, pull = jax.vjp(with_saved_value, jnp.float32(2.0), jnp.float32(3.0))
    assert value == 3.0
    assert pull(jnp.float32(5.0)) == (5.0, 0.0)


@pytest.mark.parametrize(("save", "products"), [(False, 0), (True, 5 * 6 * 4)])
def test_the_gradient_saves_the_inputs_and_what_is_marked(save, products):
    params, inputs, _ = arguments()
    _, pull = jax.vjp(lambda p, i: chunked_map(function, save, p, i), params, inputs)
    saved = sum(leaf.size for leaf in jax.tree.leaves(pull) if hasattr(leaf, "size"))
    assert saved == sum(leaf.size for leaf in jax.tree.leaves((params, inputs))) + products


def test_a_number_that_is_not_finite_stays_where_it_is():
    params, (x, y), _ = arguments()
    broken = (x.at[0].set(jnp.nan), y)  # the first number is what the room for the outputs depends on
    value = chunked_map(function, False, params, broken)
    assert np.isnan(value[0]).all()
    np.testing.assert_allclose(value[1:], by_map(params, (x, y))[1:], rtol=1e-5)
