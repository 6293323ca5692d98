"""Convolutions and pooling against XLA's own and plain sums."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from sct.nn.conv import Conv, conv, conv_transpose_2x, pool_2x

pytestmark = pytest.mark.usefixtures("_exact")


@pytest.fixture
def _exact():
    with jax.default_matmul_precision("highest"):
        yield


def arrays(*shapes: tuple[int, ...], seed: int = 0) -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def close(got, expected, tolerance=1e-5):
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("taps", "length"), [*((taps, 9) for taps in range(1, 8)), (5, 1), (4, 2)])
def test_transposed_convolution_is_that_of_lax(taps, length):
    x, kernel, weights = arrays((2, length, 3), (taps, 3, 4), (2, 2 * length, 4), seed=taps)

    def reference(x, kernel):
        return lax.conv_transpose(x, kernel, (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))

    @jax.jit
    def both(x, kernel):
        made = []
        for function in (conv_transpose_2x, reference):
            value, backward = jax.vjp(function, x, kernel)
            made.append((value, *backward(weights)))
        return made

    got, expected = both(x, kernel)
    for mine, theirs in zip(got, expected, strict=True):
        close(mine, theirs)
        assert np.abs(theirs).max() > 0


@pytest.mark.parametrize("taps", [1, 2, 3, 5, 15])
def test_convolution_is_a_sum_over_taps(taps):
    x, kernel = arrays((2, 11, 3), (taps, 3, 4))
    left = (taps - 1) // 2
    padded = np.pad(np.asarray(x), ((0, 0), (left, taps - 1 - left), (0, 0)))
    expected = sum(padded[:, j : j + 11] @ np.asarray(kernel[j]) for j in range(taps))
    close(conv(x, kernel), expected)


@pytest.mark.parametrize("upsample", [False, True])
def test_the_layer_has_one_kernel_shape_and_a_bias(upsample):
    x, bias = arrays((2, 6, 3), (4,))
    layer = Conv(4, 5, upsample)
    params = layer.init(jax.random.key(0), x)["params"]
    kernel = params["kernel"].unbox()
    assert kernel.shape == (5, 3, 4)
    function = conv_transpose_2x if upsample else conv
    got = layer.apply({"params": {"kernel": kernel, "bias": bias}}, x)
    assert got.shape == (2, 12 if upsample else 6, 4)
    close(got, function(x, kernel) + bias)


def test_the_layer_computes_in_its_type_with_float32_parameters():
    (x,) = arrays((1, 8, 3))
    layer = Conv(4, 5, dtype=jnp.bfloat16)
    variables = layer.init(jax.random.key(0), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert layer.apply(variables, x).dtype == jnp.bfloat16


def test_pooling_joins_neighbouring_pairs():
    x = jnp.asarray([[[1.0, 5], [3, -5], [10, 0], [0, 2]]])
    np.testing.assert_array_equal(pool_2x(x, "avg"), [[[2, 0], [5, 1]]])
    np.testing.assert_array_equal(pool_2x(x, "max"), [[[3, 5], [10, 2]]])
    gradient = jax.grad(lambda x: pool_2x(x, "max").sum())(x)
    np.testing.assert_array_equal(gradient, [[[0, 1], [1, 0], [1, 0], [0, 1]]])
