"""Text decoders: places of tokens, dropout, initial parameters, operations, what is refused."""

from __future__ import annotations

import dataclasses
import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sct.errors import ConfigError, DataError
from sct.models.decoder import Decoder, running_positions
from sct.models.decoder_config import DecoderConfig, GPT2Config, LlamaConfig, NeoXConfig
from sct.nn.chunked_attention import Mask
from sct.nn.paths import flatten, unflatten
from sct.nn.reference import reference_kernels
from sct.weights.pretrained import Pretrained
from tests.cached import cached
from tests.random_models import random_model

SIZES = {"vocab_size": 19, "embed_dim": 16, "num_layers": 2, "num_heads": 4, "ffn_dim": 24, "max_length": 24}
CONFIGS: dict[str, DecoderConfig] = {
    "gpt2": GPT2Config(**SIZES),
    "neox": NeoXConfig(**SIZES, rotary_fraction=0.5),
    "llama": LlamaConfig(**SIZES, num_kv_heads=2),
}
# NeoX has the places of LLaMA and the norms of GPT-2.
FAMILIES = ["gpt2", "llama", pytest.param("neox", marks=pytest.mark.slow)]


@cached
def model(family: str) -> Pretrained:
    return random_model(family, CONFIGS[family])


def ids(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, SIZES["vocab_size"], shape).astype(np.int32)


def logits(family: str, **inputs) -> np.ndarray:
    return np.asarray(model(family).apply(**inputs)["logits"])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=9, max_size=9), min_size=1, max_size=3))
def test_places_are_counted_within_a_run_of_equal_numbers(rows):
    found = np.asarray(running_positions(jnp.asarray(rows)))
    for row, places in zip(rows, found.tolist(), strict=True):
        expected: list[int] = []
        for i, number in enumerate(row):
            expected.append(expected[-1] + 1 if i and row[i - 1] == number else 0)
        assert places == expected


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("left", [True, False])
def test_padding_on_either_side_counts_for_nothing(family, left):
    texts = [ids(length, seed=length) for length in (9, 4, 1)]
    filled, mask = ids(3, 12, seed=5), np.zeros((3, 12), np.int32)
    for row, text in enumerate(texts):
        where = slice(12 - len(text), 12) if left else slice(len(text))
        filled[row, where], mask[row, where] = text, 1
    found = logits(family, input_ids=filled, attention_mask=mask)
    assert np.isfinite(found).all()
    for row, text in enumerate(texts):
        alone = logits(family, input_ids=text[None])[0]
        np.testing.assert_allclose(found[row, mask[row] == 1], alone, atol=2e-5)
    np.testing.assert_array_equal(found, logits(family, input_ids=filled, attention_mask=mask.astype(bool)))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_texts_in_a_row_are_texts_alone(family):
    texts = [ids(length, seed=length) for length in (7, 1, 9, 5)]
    row = np.concatenate([*texts, ids(2)])[None]
    # Numbers tell texts apart, in any order, and 0 is padding.
    for numbers in ([1, 2, 3, 4, 0], [7, 3, 9, 2, 0], [1, 2, 3, 4, 4]):
        segments = np.repeat(numbers, [7, 1, 9, 5, 2])[None]
        found = logits(family, input_ids=row, segments=segments)[0]
        np.testing.assert_allclose(
            found[:22], np.concatenate([logits(family, input_ids=text[None])[0] for text in texts]), atol=2e-5
        )
    assert np.abs(logits(family, input_ids=row)[0, 7:22] - found[7:22]).max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_given_positions_are_used(family):
    row = ids(2, 8)
    is_target = logits(family, input_ids=row)
    same = logits(family, input_ids=row, positions=np.broadcast_to(np.arange(8), (2, 8)))
    np.testing.assert_allclose(is_target, same, atol=1e-6)
    apart = logits(family, input_ids=row, positions=np.broadcast_to(2 * np.arange(8), (2, 8)))
    assert np.abs(is_target - apart).max() > 1e-3
    shifted = logits(family, input_ids=row, positions=np.broadcast_to(np.arange(8) + 5, (2, 8)))
    if family == "gpt2":
        assert np.abs(is_target - shifted).max() > 1e-3
    else:  # only distances count
        np.testing.assert_allclose(is_target, shifted, atol=5e-5)


@functools.cache
def step(family: str, drops: bool = False, **changes):
    """Compiled loss and gradients of a packed row: (variables, key) -> both."""
    module = Decoder(dataclasses.replace(CONFIGS[family], **changes))
    row, segments = ids(2, 14), np.repeat([[1, 2, 0]], [8, 4, 2], axis=1).repeat(2, axis=0)

    @jax.jit
    @jax.value_and_grad
    def run(variables, key):
        scores = module.apply(variables, row, segments=segments, rngs={"dropout": key} if drops else {})[
            "logits"
        ]
        return -(jax.nn.log_softmax(scores)[..., 3] * (segments > 0)).mean()

    return lambda key=0: run(model(family).variables, jax.random.key(key))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "dropout"), [*((family, 0.0) for family in CONFIGS), ("gpt2", 0.3)])
def test_what_is_kept_for_the_backward_pass_changes_nothing(family, dropout):
    expected = step(family, dropout > 0, dropout=dropout)(3)
    for remat in ("products", "level"):
        found = step(family, dropout > 0, dropout=dropout, remat=remat)(3)
        chex.assert_trees_all_close(found, expected, rtol=2e-4, atol=2e-6)


@pytest.mark.slow
def test_dropout_is_for_training_alone():
    plain = step("gpt2", dropout=0.0)()[0]
    assert step("gpt2", dropout=0.3)()[0] == plain, "without a key nothing is left out"
    drawn = [float(step("gpt2", True, dropout=0.3)(key)[0]) for key in (0, 0, 1)]
    assert drawn[0] == drawn[1]
    assert len({drawn[0], drawn[2], float(plain)}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "neox"])  # branches one after the other, and side by side
def test_what_is_left_out_differs_between_branches_layers_and_texts(family):
    config = dataclasses.replace(CONFIGS[family], dropout=0.5)
    flat = {path: jnp.zeros_like(leaf) for path, leaf in flatten(model(family).variables).items()}
    # Each branch adds a power of two of its own, so that a sum tells which of them were left out.
    flat["params/token/embedding"] += 1.0
    flat["params/layers/attention/out/bias"] += jnp.asarray([[2.0], [4.0]])
    flat["params/layers/mlp/down/bias"] += jnp.asarray([[8.0], [16.0]])

    def run(variables, key):
        def states(module):
            row, places = ids(2, 40), jnp.broadcast_to(jnp.arange(40) % 24, (2, 40))
            return module.layers(module.embed(row, places), places, Mask())[0]

        return Decoder(config).apply(variables, rngs={"dropout": key}, method=states)

    sums = np.asarray(jax.jit(run)(unflatten(flat), jax.random.key(0))) / 2
    assert set(np.unique(sums)) <= set(range(32))
    masks = np.stack([sums.astype(int) >> bit & 1 for bit in range(5)])
    assert (np.abs(masks.mean(axis=(2, 3)) - 0.5) < 4.5 * 0.5 / (40 * 16) ** 0.5).all()
    rows = [mask.tobytes() for branch in masks for mask in branch]
    assert len(set(rows)) == len(rows) == 10


@pytest.mark.slow
@pytest.mark.parametrize("init", ["normal", "xavier"])
@pytest.mark.parametrize("family", FAMILIES)
def test_initial_parameters_have_the_deviation_of_their_choice(family, init):
    sizes = {"vocab_size": 300, "embed_dim": 64, "num_layers": 3, "num_heads": 4, "ffn_dim": 96}
    config = dataclasses.replace(CONFIGS[family], **sizes, init=init)
    variables = nn.unbox(jax.jit(Decoder(config).init)(jax.random.key(0), **Decoder.example(config)))
    for path, leaf in flatten(variables).items():
        values = np.asarray(leaf)
        if path.endswith("scale"):
            np.testing.assert_array_equal(values, 1, err_msg=path)
        elif path.endswith("bias"):
            np.testing.assert_array_equal(values, 0, err_msg=path)
        else:
            expected = 0.02
            if path.endswith("kernel") and init == "xavier":
                expected = (2 / sum(values.shape[-2:])) ** 0.5
            elif any(f"{name}/kernel" in path for name in ("out", "down")):
                expected = 0.02 / (2 * 3) ** 0.5
            # Truncated tails, and few values.
            assert values.std() == pytest.approx(expected, rel=0.06), path
            assert abs(values.mean()) < 5 * expected / values.size**0.5, path
            if "layers" in path:
                assert np.abs(values[0] - values[1]).max() > expected, f"{path}: layers are drawn apart"


@pytest.mark.parametrize("family", FAMILIES)
def test_operations_by_formula_are_those_that_the_compiler_counts(family):
    sizes = {
        "vocab_size": 120,
        "embed_dim": 64,
        "num_layers": 1,
        "num_heads": 4,
        "ffn_dim": 160,
        "max_length": 256,
    }
    changes = sizes | ({"num_kv_heads": 2} if family == "llama" else {})
    config = dataclasses.replace(CONFIGS[family], **changes)
    shapes = jax.eval_shape(
        lambda key: nn.unbox(Decoder(config).init(key, **Decoder.example(config))), jax.random.key(0)
    )
    batch, length = 2, 256
    with reference_kernels():
        compiled = jax.jit(Decoder(config).apply).lower(
            shapes, jax.ShapeDtypeStruct((batch, length), jnp.int32)
        ).compile()  # fmt: skip
    is_target = compiled.cost_analysis()
    is_target = float((is_target[0] if isinstance(is_target, list) else is_target)["flops"])
    # The plain form computes the half of the scores that is not seen, too; and there are norms, and so on.
    half = 2.0 * batch * length * length * config.num_heads * config.head_size
    whole = Decoder.flops(config, batch, length) + half
    assert whole < is_target < 1.15 * whole
    assert Decoder.flops(config, 2 * batch, length) == 2 * Decoder.flops(config, batch, length)


def test_a_text_longer_than_the_table_of_positions_is_refused():
    long = np.zeros((1, 25), np.int32)
    with pytest.raises(DataError, match="25 tokens"):
        model("gpt2").apply(input_ids=long)
    assert model("gpt2").apply(input_ids=long[:, :24])["logits"].shape == (1, 24, 19)
    with pytest.raises(DataError, match=r"\b3 to 24\b"):
        model("gpt2").apply(input_ids=long[:, :22], positions=np.arange(3, 25)[None])
    assert model("llama").apply(input_ids=long)["logits"].shape == (1, 25, 19), "rotary positions have no end"


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"input_ids": np.full((1, 3), 19)}, r"input_ids .*19"),
        ({"input_ids": np.full((1, 3), -1)}, r"input_ids .*-1"),
        ({"input_ids": np.zeros((1, 3))}, "integer"),
        ({"input_ids": np.zeros(3, int)}, "shape \\(3,\\)"),
        ({"input_ids": np.zeros((1, 0), int)}, "none of them 0"),
        ({"input_ids": np.zeros((1, 3), int), "segments": np.zeros((1, 2), int)}, r"segments .*shape"),
        ({"input_ids": np.zeros((1, 3), int), "attention_mask": np.full((1, 3), 2)}, r"\b2 to 2\b"),
        ({"input_ids": np.zeros((1, 3), int), "tokens": np.zeros((1, 3), int)}, "'tokens'"),
        ({}, "'input_ids'"),
    ],
)
def test_inputs_that_do_not_fit_are_a_sentence(inputs, words):
    with pytest.raises(DataError, match=words):
        model("gpt2").apply(**inputs)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_heads": 3}, "num_heads"),
        ({"num_kv_heads": 3}, "num_heads"),
        ({"positions": "rotary", "rotary_fraction": 0.25}, "even"),
        ({"positions": "none"}, "positions"),
        ({"dropout": 1.0}, "dropout"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"remat": "all"}, "remat"),
    ],
)
def test_architectures_that_cannot_be(changes, words):
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(CONFIGS["gpt2"], **changes)
