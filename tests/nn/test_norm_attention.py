"""Norms, attention, rotary embedding, gated unit and spatial features against plain references."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sct.nn import axes, target
from sct.nn.attention import GatedMlp, SelfAttention, TransformerBlock, rotary
from sct.nn.conv import Conv
from sct.nn.linear import Embed, Linear
from sct.nn.norm import EPSILON, LayerNorm, SharedLayerNorm
from sct.nn.reference import reference_kernels
from sct.nn.spatial import spatial_features

pytestmark = pytest.mark.usefixtures("_exact")


@pytest.fixture
def _exact():
    with jax.default_matmul_precision("highest"):
        yield


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def variables_of(module: nn.Module, *inputs) -> dict:
    """Initial variables moved off zero and one, so that every one of them counts."""
    variables = nn.meta.unbox(module.init(jax.random.key(0), *inputs))
    leaves, tree = jax.tree.flatten(variables)
    moved = [leaf + 0.1 * normal(*leaf.shape, seed=i) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(tree, moved)


def close(got, expected, tolerance=1e-5):
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


# Norms


def test_layer_norm_by_hand():
    x = normal(2, 3, 8) * 4 + 1
    variables = variables_of(LayerNorm(), x)
    params = variables["params"]
    standard = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + EPSILON)
    close(LayerNorm().apply(variables, x), standard * params["scale"] + params["bias"])


def test_shared_layer_norm_by_hand():
    cells, genes, width = 3, 8, 4
    x = normal(2, cells * genes, width) * 5 - 2
    module = SharedLayerNorm(genes)
    variables = variables_of(module, x)
    scale, bias = variables["params"]["scale"], variables["params"]["bias"]
    assert scale.shape == bias.shape == (genes,)
    expected = np.empty_like(x)
    for b in range(2):
        for cell in range(cells):
            for channel in range(width):
                rows = slice(cell * genes, (cell + 1) * genes)
                each = x[b, rows, channel].astype(np.float64)
                each = (each - each.mean()) / np.sqrt(each.var() + EPSILON)
                expected[b, rows, channel] = each * scale + bias
    close(module.apply(variables, x), expected)


def test_shared_layer_norm_without_parameters_has_mean_zero_and_variance_one_over_genes():
    x = normal(2, 5 * 64, 3) * 7 + 3
    module = SharedLayerNorm(64, learnable=False)
    variables = module.init(jax.random.key(0), x)
    assert not jax.tree.leaves(variables)
    y = np.asarray(module.apply(variables, x)).reshape(2, 5, 64, 3)
    close(y.mean(axis=2), 0, 1e-4)
    close(y.var(axis=2), 1, 1e-3)
    close(module.apply(variables, x * 3 + 11), module.apply(variables, x), 1e-4)


def test_statistics_of_norms_are_float32_even_for_bfloat16():
    x = (1000 + normal(1, 64, 1)).astype(jnp.bfloat16)
    for module in (SharedLayerNorm(64), LayerNorm()):
        y = x if isinstance(module, SharedLayerNorm) else x.reshape(1, 1, 64)
        out = module.apply(module.init(jax.random.key(0), y), y)
        assert out.dtype == jnp.bfloat16
        exact = np.asarray(y, np.float64).ravel()
        exact = (exact - exact.mean()) / np.sqrt(exact.var() + EPSILON)
        np.testing.assert_allclose(np.asarray(out, np.float64).ravel(), exact, atol=0.02)


# Rotary embedding


def test_rotary_by_hand():
    x, positions = normal(1, 3, 1, 4), jnp.asarray([0, 2, 7])
    got = np.asarray(rotary(x, positions))
    for l, position in enumerate([0, 2, 7]):  # noqa: E741
        for i, frequency in enumerate([1.0, 10_000**-0.5]):
            turn = np.exp(1j * position * frequency)
            pair = complex(x[0, l, 0, i], x[0, l, 0, i + 2]) * turn
            close(got[0, l, 0, [i, i + 2]], [pair.real, pair.imag])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 2000))
def test_rotated_products_depend_on_the_distance_alone(first, second, shift):
    query, key = normal(1, 1, 2, 8), normal(1, 1, 2, 8, seed=1)

    def product(i, j):
        return np.sum(rotary(query, jnp.asarray([i])) * rotary(key, jnp.asarray([j])), axis=-1)

    close(product(first, second), product(first + shift, second + shift), 5e-3)
    close(np.linalg.norm(rotary(query, jnp.asarray([first]))), np.linalg.norm(query), 1e-4)


def test_distance_matters():
    query, key = normal(1, 1, 1, 8), normal(1, 1, 1, 8, seed=1)
    turned = rotary(key, jnp.asarray([5]))
    assert abs(np.sum(query * turned) - np.sum(query * key)) > 1e-2


# Attention


@pytest.mark.parametrize("use_rotary", [True, False])
def test_attention_against_a_plain_reference(use_rotary):
    batch, length, heads, size = 2, 9, 2, 4
    x = normal(batch, length, heads * size)
    module = SelfAttention(heads, use_rotary)
    variables = variables_of(module, x)
    params = variables["params"]

    def linear(name, x):
        return x @ np.asarray(params[name]["kernel"]) + np.asarray(params[name]["bias"])

    query, key, value = (
        linear(name, x).reshape(batch, length, heads, size) for name in ("query", "key", "value")
    )
    if use_rotary:
        query, key = (np.asarray(rotary(part, jnp.arange(length))) for part in (query, key))
    mixed = np.empty((batch, length, heads, size))
    for b in range(batch):
        for head in range(heads):
            score = query[b, :, head] @ key[b, :, head].T / np.sqrt(size)
            weight = np.exp(score - score.max(axis=1, keepdims=True))
            mixed[b, :, head] = weight / weight.sum(axis=1, keepdims=True) @ value[b, :, head]
    close(module.apply(variables, x), linear("out", mixed.reshape(batch, length, -1)))


@pytest.mark.parametrize("use_rotary", [True, False])
def test_attention_is_blind_to_order_without_rotary_only(use_rotary):
    x, order = normal(1, 8, 16), np.random.default_rng(0).permutation(8)
    module = TransformerBlock(2, 24, use_rotary)
    variables = variables_of(module, x)
    plain, permuted = module.apply(variables, x)[:, order], module.apply(variables, x[:, order])
    difference = np.abs(np.asarray(plain - permuted)).max()
    assert difference > 1e-3 if use_rotary else difference < 1e-5


def test_gated_mlp_by_hand():
    x = normal(2, 3, 8)
    module = GatedMlp(12)
    variables = variables_of(module, x)
    gate, up, down = (np.asarray(variables["params"][name]["kernel"]) for name in ("gate", "up", "down"))
    assert all(set(layer) == {"kernel"} for layer in variables["params"].values()), "no biases"
    gated = x @ gate
    close(module.apply(variables, x), (gated / (1 + np.exp(-gated)) * (x @ up)) @ down)


def test_a_block_adds_attention_and_mlp_of_the_normed_input():
    x = normal(1, 6, 16)
    variables = variables_of(TransformerBlock(2, 24), x)
    params = variables["params"]

    def apply(module, name, x):
        return module.apply({"params": params[name]}, x)

    y = x + apply(SelfAttention(2), "attention", apply(LayerNorm(), "attention_norm", x))
    y = y + apply(GatedMlp(24), "mlp", apply(LayerNorm(), "mlp_norm", y))
    close(TransformerBlock(2, 24).apply(variables, x), y)


def test_embedding_and_linear():
    ids = np.asarray([[0, 6], [3, 3]], np.uint8)
    table = variables_of(Embed(7, 4), ids)
    np.testing.assert_array_equal(Embed(7, 4).apply(table, ids), table["params"]["embedding"][ids])
    x = normal(2, 3, 5)
    variables = variables_of(Linear(4), x)
    close(Linear(4).apply(variables, x), x @ variables["params"]["kernel"] + variables["params"]["bias"])


# Declarations


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (Linear(4), (2, 3)),
        (Conv(4, 5), (1, 8, 3)),
        (LayerNorm(), (2, 3)),
        (SharedLayerNorm(4), (1, 8, 3)),
        (TransformerBlock(2, 24), (1, 8, 16)),
        (Embed(7, 4), (2, 3)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_every_dimension_of_a_parameter_has_a_name(module, shape):
    boxed = module.init(jax.random.key(0), jnp.zeros(shape, jnp.int32 if isinstance(module, Embed) else None))
    known = {value for name, value in vars(axes).items() if name.isupper() and name != "RULES"}
    boxes = jax.tree.leaves(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))
    assert boxes
    for box in boxes:
        assert isinstance(box, nn.LogicallyPartitioned)
        assert len(box.names) == box.value.ndim
        assert set(box.names) <= known
        assert box.value.dtype == jnp.float32


def test_a_parameter_with_too_few_names_is_refused():
    class Wrong(nn.Module):
        @nn.compact
        def __call__(self):
            return axes.param(self, "kernel", axes.zeros, (2, 3), (axes.EMBED,))

    with pytest.raises(ValueError, match="kernel"):
        Wrong().init(jax.random.key(0))


# Spatial features


@pytest.mark.parametrize(("scales", "low", "high"), [(10, 1.0, 10.0), (3, 0.5, 8.0), (1, 2.0, 10.0)])
def test_spatial_features_are_those_of_equation_1(scales, low, high):
    places = normal(2, 3, 2) * 10
    got = np.asarray(spatial_features(places, scales, low, high, "paper"))
    assert got.shape == (2, 3, 4 * scales)
    assert got.dtype == np.float32
    for s in range(scales):
        sigma = low * (high / low) ** (s / max(scales - 1, 1))
        x, y = places[..., 0] / sigma, places[..., 1] / sigma
        expected = np.stack([np.cos(x), np.cos(y), np.sin(x), np.sin(y)], axis=-1)
        np.testing.assert_allclose(got[..., 4 * s : 4 * s + 4], expected, atol=2e-5)


@pytest.mark.slow
def test_spatial_features_of_the_published_checkpoint():
    places = normal(1, 3, 2) * 10
    got = np.asarray(spatial_features(places, 10, 1.0, 10.0, "reference"))
    assert got.shape == (1, 3, 20)
    for s in range(10):
        sigma = 10 ** ((s + 1) / 9)
        expected = np.stack([np.cos(places[..., 0] / sigma), np.sin(places[..., 1] / sigma)], axis=-1)
        np.testing.assert_allclose(got[..., 2 * s : 2 * s + 2], expected, atol=2e-5)


def test_the_shared_norm_of_accelerators_keeps_its_digits():
    """On accelerators, the statistics come from one pass over the values."""
    genes = 256
    norm, rng = SharedLayerNorm(genes), np.random.default_rng(2)
    # The mean is large, or one gene has far larger values than all others: (mean, gene and value, tolerance). The
    # second tolerance is that of numbers near 1,000 in float32; without the shift, the error is above 0.01.
    cases = [
        (0.0, None, 1e-5),
        (1000.0, None, 1e-3),
        *((0.0, (gene, 300.0), 2e-5) for gene in (0, 1, 8, 100, 255)),
    ]
    failed = []
    for offset, outlier, tolerance in cases:
        cells = rng.standard_normal((6, genes, 5)).astype(np.float32) * (
            0.1 if outlier else 1.0
        ) + np.float32(offset)
        if outlier:
            cells[:, outlier[0]] = outlier[1] * 0.1
        x = jnp.asarray(cells.reshape(2, 3 * genes, 5))
        variables = variables_of(norm, x)
        cotangent = normal(2, 3 * genes, 5, seed=9)

        def run(x, variables, cotangent=cotangent):
            return (norm.apply(variables, x) * cotangent).sum()

        with target.tracing_for("gpu"):
            y, pulled = jax.jit(lambda x, v: (norm.apply(v, x), jax.grad(run, (0, 1))(x, v)))(x, variables)
        exact = cells.reshape(2, 3, genes, 5).astype(np.float64)
        unit = (exact - exact.mean(2, keepdims=True)) / np.sqrt(exact.var(2, keepdims=True) + EPSILON)
        leaves = {name: np.asarray(value)[:, None] for name, value in variables["params"].items()}
        with reference_kernels():
            expected = jax.jit(jax.grad(run, (0, 1)))(x, variables)
        pairs = [(y.reshape(exact.shape), unit * leaves["scale"] + leaves["bias"], tolerance)]
        pairs += [
            (got, right, 3 * tolerance)
            for got, right in zip(*map(jax.tree.leaves, (pulled, expected)), strict=True)
        ]
        for number, (got, right, limit) in enumerate(pairs):
            error = np.abs(np.asarray(got, np.float64) - right).max() / np.abs(right).max()
            failed += [] if error <= limit else [(offset, outlier, number, error)]
    assert not failed, failed
