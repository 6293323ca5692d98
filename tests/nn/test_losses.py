"""The loss of many positions in pieces is the loss of all at once: values and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh

from sct.nn import axes, losses
from sct.nn.losses import token_losses
from sct.nn.reference import reference_kernels, smaller_chunks
from sct.train import sharding

VOCAB, WIDTH = 13, 5


@pytest.fixture(autouse=True, scope="module")
def _quickly():
    with jax.default_matmul_precision("highest"):
        yield


def data(batch: int, length: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(batch, length, WIDTH)).astype(np.float32)
    return (
        hidden,
        rng.integers(0, VOCAB, (batch, length)).astype(np.int32),
        rng.normal(size=(WIDTH, VOCAB)).astype("f"),
    )


def expected(hidden, targets, table):
    scores = hidden.astype(float) @ table
    highest = scores.max(axis=-1, keepdims=True)
    total = np.log(np.exp(scores - highest).sum(axis=-1)) + highest[..., 0]
    own = np.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
    return total - own, scores.argmax(axis=-1) == targets


def gradients(hidden, targets, table, weights):
    """Losses, hits, and gradients of a weighted sum by hidden vectors and by the head, which is closed over."""

    @jax.jit
    def run(hidden, table):
        def loss(hidden, table):
            found, right = token_losses(lambda x: x @ table, hidden, targets, VOCAB)
            return (found * weights).sum(), (found, right)

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(hidden, table)

    return jax.tree.map(np.asarray, run(hidden, table))


@pytest.mark.slow
@settings(max_examples=3, deadline=None)
@given(st.integers(1, 3), st.integers(1, 41), st.integers(1, 45))
@example(batch=2, length=12, most=4)  # no remainder
@example(batch=2, length=13, most=4)
@example(batch=1, length=41, most=40)
def test_pieces_are_the_whole(batch, length, most):
    hidden, targets, table = data(batch, length, seed=length)
    weights = np.random.default_rng(1).normal(size=(batch, length)).astype(np.float32)
    with reference_kernels():
        whole = gradients(hidden, targets, table, weights)
    before, losses._SCORES = losses._SCORES, most * VOCAB
    try:
        pieces = gradients(hidden, targets, table, weights)
    finally:
        losses._SCORES = before
    value, right = expected(hidden, targets, table)
    for _, (found, hit) in (whole, pieces):
        assert found.shape == hit.shape == (batch, length)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, value, atol=1e-5)
        np.testing.assert_array_equal(hit, right)
    for a, b in zip(whole[0], pieces[0], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(a).max()))
    assert np.abs(whole[0][1]).max() > 1e-3


def test_scores_of_all_positions_never_exist():
    batch, length, vocab = 2, 512, 4096
    shapes = [
        jax.ShapeDtypeStruct(shape, kind)
        for shape, kind in (
            ((batch, length, 8), "float32"),
            ((batch, length), "int32"),
            ((8, vocab), "float32"),
        )
    ]
    whole = batch * length * vocab * 4

    def needs():
        def loss(hidden, targets, table):
            return token_losses(lambda x: x @ table, hidden, targets, vocab)[0].sum()

        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 2)))
        return step.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    with reference_kernels():
        assert needs() >= whole
    with smaller_chunks(1 / 128):  # 32 positions
        assert needs() < whole / 4


@pytest.mark.parametrize(
    ("length", "most", "sizes"), [(10, 4, [4]), (10, 10, [10]), (9, 4, [3]), (5, 1, [1])]
)
def test_pieces_are_equal_and_as_few_as_can_be(monkeypatch, length, most, sizes):
    seen = []
    monkeypatch.setattr(losses, "_SCORES", most * VOCAB)
    hidden, targets, table = data(1, length)

    def scores(x):
        seen.append(x.shape[1])
        return x @ table

    token_losses(scores, hidden, targets, VOCAB)
    assert sorted(set(seen)) == sizes


@pytest.mark.parametrize(("rows", "sizes"), [(4, [8]), (3, [2])])
def test_pieces_are_as_large_as_the_devices_that_share_them(monkeypatch, rows, sizes):
    monkeypatch.setattr(losses, "_SCORES", 2 * rows * VOCAB)
    mesh = AbstractMesh(
        (1, 4, 1, 2), sharding.MESH_AXES
    )  # four share rows that they divide, none the 13 tokens
    hidden, targets, table = data(rows, 16)
    seen = []

    def scores(x):
        seen.append(x.shape[1])
        return x @ table

    with axes.on_mesh(mesh, sharding.RULES):
        token_losses(scores, hidden, targets, VOCAB)
    assert sorted(set(seen)) == sizes


def test_a_vocabulary_beyond_the_limit_is_one_position_at_a_time(monkeypatch):
    monkeypatch.setattr(losses, "_SCORES", 2)
    hidden, targets, table = data(2, 3)
    found, right = token_losses(lambda x: x @ jnp.asarray(table), hidden, targets, VOCAB)
    np.testing.assert_allclose(found, expected(hidden, targets, table)[0], atol=1e-5)
    np.testing.assert_array_equal(right, expected(hidden, targets, table)[1])
