"""Losses of cell encoders against plain numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from sct.nn.cell_losses import (
    elastic_similarity,
    info_nce,
    masked_squared_error,
    supervised_contrast,
    zero_loss,
)


def test_masked_positions_alone_count():
    rng = np.random.default_rng(0)
    predicted, probabilities = rng.normal(size=(4, 9)), rng.uniform(0.01, 0.99, (4, 9))
    values, mask = rng.integers(0, 3, (4, 9)).astype(np.float32), rng.random((4, 9)) < 0.4
    error = masked_squared_error(jnp.asarray(predicted), jnp.asarray(values), jnp.asarray(mask))
    np.testing.assert_allclose(error, ((predicted - values) ** 2)[mask].sum(), rtol=1e-5)
    likelihood = np.where(values > 0, probabilities, 1 - probabilities)[mask]
    logits = jnp.asarray(np.log(probabilities / (1 - probabilities)))
    found = zero_loss(logits, jnp.asarray(values), jnp.asarray(mask))
    np.testing.assert_allclose(found, -np.log(likelihood).sum(), rtol=1e-5)


def test_confident_predictions_of_zeros_have_a_gradient():
    logits = jnp.asarray([[-40.0, -20.0, -5.0, 0.0, 5.0, 20.0, 40.0]])
    for value in (0.0, 3.0):
        gradient = jax.grad(zero_loss)(logits, jnp.full((1, 7), value), jnp.ones((1, 7)))
        np.testing.assert_allclose(gradient, jax.nn.sigmoid(logits) - (value > 0), atol=1e-6)


def test_elastic_similarity_is_that_of_the_formula():
    rng = np.random.default_rng(1)
    cells, kept = rng.normal(size=(7, 5)), np.array([1, 1, 0, 1, 1, 0, 1.0])
    for threshold in (0.3, 0.8):
        part = cells[kept > 0]
        unit = part / np.linalg.norm(part, axis=1, keepdims=True)
        similarity = unit @ unit.T
        np.fill_diagonal(similarity, 0)
        similarity[similarity < 0] = 0
        expected = (1 - (similarity - threshold) ** 2).mean()
        found = elastic_similarity(jnp.asarray(cells), threshold, jnp.asarray(kept))
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    # A step against the gradient moves similar cells together and other cells apart.
    for angle, direction in ((0.6, -1), (1.2, 1)):
        pair = jnp.asarray([[1.0, 0.0], [np.cos(angle), np.sin(angle)]])
        gradient = jax.grad(lambda cells: elastic_similarity(cells, 0.6, jnp.ones(2)))(pair)
        moved = np.asarray(pair - 0.05 * gradient)
        turned = np.arctan2(*moved[1, ::-1]) - np.arctan2(*moved[0, ::-1])
        assert direction * (turned - angle) > 1e-3
    empty = jax.grad(lambda cells: elastic_similarity(cells, 0.3, jnp.ones(3)))(jnp.zeros((3, 2)))
    assert np.isfinite(empty).all()


def unit_vectors(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_contrast_of_two_views_is_that_of_the_formula():
    rng = np.random.default_rng(2)
    first, second = rng.normal(size=(2, 6, 4))
    valid, same = np.array([1, 1, 0, 1, 1, 1], bool), np.zeros((6, 6), bool)
    same[0, 4] = same[4, 0] = True  # one cell in two bags
    scores = np.exp(unit_vectors(first) @ unit_vectors(second).T / 0.2)
    expected = np.zeros(6)
    for i in np.flatnonzero(valid):
        others = [j for j in np.flatnonzero(valid) if not same[i, j]]
        shares = scores[i, i] / scores[i, others].sum(), scores[i, i] / scores[others, i].sum()
        expected[i] = -np.log(shares).mean()
    found = info_nce(*map(jnp.asarray, (first, second)), 0.2, jnp.asarray(valid), jnp.asarray(same))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    of_none = jax.grad(lambda x: info_nce(x, x, 0.2, jnp.zeros(6, bool), jnp.asarray(same)).sum())(
        jnp.zeros((6, 4))
    )
    assert np.isfinite(of_none).all()


def test_contrast_of_labels_is_that_of_the_formula():
    rng = np.random.default_rng(3)
    cells, labels = rng.normal(size=(8, 4)), np.array([0, 0, 1, -1, 1, 1, 2, 0])
    valid, same = np.array([1, 1, 1, 1, 1, 1, 1, 0], bool), np.zeros((8, 8), bool)
    same[4, 5] = same[5, 4] = True
    scores = np.exp(unit_vectors(cells) @ unit_vectors(cells).T / 0.5)
    takes_part = valid & (labels >= 0)
    expected = np.zeros(8)
    for i in np.flatnonzero(takes_part):
        others = [j for j in np.flatnonzero(takes_part) if j != i and not same[i, j]]
        shares = [scores[i, j] / scores[i, others].sum() for j in others if labels[j] == labels[i]]
        expected[i] = -np.log(shares).mean() if shares else 0
    given = jnp.asarray(labels), 0.5, jnp.asarray(valid), jnp.asarray(same)
    losses, counted = supervised_contrast(jnp.asarray(cells), *given)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    np.testing.assert_array_equal(counted, [1, 1, 1, 0, 1, 1, 0, 0])  # cell 6 alone has its label
    gradient = jax.grad(lambda x: supervised_contrast(x, *given)[0].sum())(jnp.asarray(cells))
    assert (np.abs(gradient).sum(1) > 0).tolist() == [*[True] * 3, False, *[True] * 3, False]
