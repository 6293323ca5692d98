"""The comparison with the reference implementation: it lets the right through and stops the wrong."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sct.models.sct as model
from sct.data import bags
from sct.errors import SctError
from sct.nn import attention, chunked_attention, conv, execution
from sct.nn.reference import use_reference
from sct.speed import compare, data, embedding, reference, synthetic
from tests.speed.conftest import small

pool_2x, bin_counts = model.pool_2x, bags.bin_counts
CHECKS = {"train": reference.check_train, "forward": reference.check_forward, "embed": embedding.check_embed}


@pytest.mark.slow
@pytest.mark.parametrize("mode", CHECKS)
def test_the_right_path_passes_and_says_what_was_compared(job, mode):
    made = job(mode)
    found = CHECKS[mode](made, made.open_store())
    assert found["arithmetic"] == "float32"
    assert found["limits"].keys() == found["differences"].keys()
    assert all(0 <= value <= found["limits"][name] for name, value in found["differences"].items())
    assert found["cells_per_bag"] == 2
    assert found["gene_positions"] == 64


@pytest.mark.slow
def test_sixteen_bits_pass_within_their_own_limit_and_are_exact_in_float32(job):
    made = job("forward", model__dtype="bfloat16")
    found = reference.check_forward(made, made.open_store())
    assert found["arithmetic"] == "bfloat16"
    assert found["differences_in_float32"]["logits"] < compare.TOLERANCE < found["differences"]["logits"]
    assert found["differences"]["logits"] <= found["limits"]["logits"] < 0.2


@pytest.mark.slow
def test_a_layer_that_is_wrong_in_sixteen_bits_alone_is_refused(job, monkeypatch):
    def layer(x: jax.Array, kind: str) -> jax.Array:
        return pool_2x(x, kind) * (1.0 if use_reference() or x.dtype == jnp.float32 else 1.3)

    monkeypatch.setattr(model, "pool_2x", layer)
    made = job("forward", model__dtype="bfloat16")
    with pytest.raises(SctError, match=r"forward .*bfloat16"):
        reference.check_forward(made, made.open_store())


@pytest.mark.slow
def test_microbatches_are_compared_with_their_own_masks(job):
    made = job("train", train__accumulate=2)
    assert reference.check_train(made, made.open_store())["bags"] == 2


def wrong_layer(x: jax.Array, kind: str) -> jax.Array:
    """Pooling whose fast form is wrong by 1%."""
    return pool_2x(x, kind) * (1.0 if use_reference() else 1.01)


@jax.custom_vjp
def wrong_gradient(x: jax.Array) -> jax.Array:
    return x


wrong_gradient.defvjp(lambda x: (x, None), lambda _, cotangent: (1.01 * cotangent,))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["forward", "embed"])
def test_a_wrong_layer_is_refused(job, monkeypatch, mode):
    monkeypatch.setattr(model, "pool_2x", wrong_layer)
    # A program of the right layer, compiled before, would be found again.
    made = job(mode, model__layer_norm_eps=1.5e-5)
    with pytest.raises(SctError, match="reference") as caught:
        CHECKS[mode](made, made.open_store())
    assert "\n" not in str(caught.value)
    assert "not timed" in str(caught.value)


def wrong_by(function, where):
    """Make the same function with its values wrong by 1% in the fast path."""

    def wrong(*args, **kwargs):
        return function(*args, **kwargs) * (1.0 if use_reference() else 1.01)

    return where, function.__name__, wrong


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong",
    [
        wrong_by(conv.conv_transpose_2x, conv),
        wrong_by(conv._conv_in_loop, conv),
        wrong_by(attention.chunked_attention, attention),
    ],
    ids=["transposed", "in_loop", "attention"],
)
def test_forms_that_only_a_larger_bag_takes_are_compared(job, monkeypatch, wrong):
    """Eight cells are timed, two of them compared: in as many chunks as the eight."""
    monkeypatch.setattr(*wrong)
    # Eight cells have 512 positions in the outer level and 256 in the attention, two a quarter of that.
    monkeypatch.setattr(execution, "LEVEL_CHUNK_CPU", 256)
    monkeypatch.setattr(chunked_attention, "CPU_SMALL_CHUNKS", (32, 128))
    made = job("forward", data__cells_per_bag=8, model__layer_norm_eps=1.6e-5)
    with pytest.raises(SctError, match="reference"):
        reference.check_forward(made, made.open_store())


@pytest.mark.slow
def test_a_wrong_gradient_alone_is_refused(job, monkeypatch):
    def layer(x: jax.Array, kind: str) -> jax.Array:
        x = pool_2x(x, kind)
        return x if use_reference() else wrong_gradient(x)

    monkeypatch.setattr(model, "pool_2x", layer)
    made = job("train")
    with pytest.raises(SctError, match=r"gradient .*float32"):
        reference.check_train(made, made.open_store())
    reference.check_forward(made, made.open_store())


@pytest.mark.slow
def test_what_is_no_number_is_refused(job, monkeypatch):
    def layer(x: jax.Array, kind: str) -> jax.Array:
        return pool_2x(x, kind) * (1.0 if use_reference() else jnp.nan)

    monkeypatch.setattr(model, "pool_2x", layer)
    made = job("forward")
    with pytest.raises(SctError, match="by nan"):
        reference.check_forward(made, made.open_store())


@pytest.mark.slow
def test_positions_beyond_the_budget_of_the_head_are_left_out_on_both_sides(job):
    made = job("train", objective__max_masked_fraction=0.005, objective__masking={"kind": "stratified"})
    found = reference.check_train(made, made.open_store())
    assert found["dropped_targets"] > 0


def test_one_wrong_leaf_among_many_is_found():
    rng = np.random.default_rng(0)
    right = {"large": rng.normal(size=10_000), "small": 0.1 * rng.normal(size=10), "none": np.zeros(3)}
    whole, worst, leaf = compare.gradient_difference({**right, "small": -right["small"]}, right)
    assert whole < 0.02
    assert worst > 1
    assert leaf == "small"
    # Rounding in a leaf without a gradient is no error.
    noisy = {**right, "none": np.full(3, 1e-9)}
    assert compare.gradient_difference(noisy, right)[1] < 1e-6
    assert compare.gradient_difference({"large": right["large"]}, right)[0] == np.inf


def test_wrong_tokens_are_refused(job, monkeypatch):
    made = job("loader")
    store = made.open_store()
    assert data.check_loader(made, store)["differences"] == {"tokens": 0.0}

    def shifted(counts, **options):
        bins = bin_counts(counts, **options)
        bins.tokens[0, 0] += 1
        return bins

    monkeypatch.setattr(bags, "bin_counts", shifted)
    with pytest.raises(SctError, match=r"1 of \d+ tokens"):
        data.check_loader(made, store)


def test_levels_by_definition_agree_at_the_edges():
    # 7 lies on an edge of four equal bins between log 2 and log 32.
    counts = np.array([[1, 7, 31, 0, 3], [5, 5, 0, 0, 0], [0, 0, 0, 0, 0]], float)
    expected = [[1, 3, 4, 0, 2, 5], [1, 1, 0, 0, 0, 5], [0, 0, 0, 0, 0, 5]]
    np.testing.assert_array_equal(data._tokens_by_definition(counts, 5, 6), expected)


def test_an_ingest_of_other_cells_is_refused(made, tmp_path):
    other = small("ingest", folder=tmp_path)
    store = made.open_store()
    synthetic.write_h5ad(tmp_path / "same.h5ad", other.genes, 60, other.nonzeros)
    assert data.check_ingest(tmp_path / "same.h5ad", store)["cells"] > 10
    synthetic.write_h5ad(tmp_path / "other.h5ad", other.genes, 60, other.nonzeros, seed=1)
    with pytest.raises(SctError, match=re.compile(r"of \d+ checked cells of the store differ")):
        data.check_ingest(tmp_path / "other.h5ad", store)
