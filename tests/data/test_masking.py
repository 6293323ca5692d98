"""Masking: what is never masked, how much is, and that a key alone decides where."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sct.data import masking
from sct.data.masking import Masking
from sct.errors import ConfigError

NUM_BINS, PAD, MASK = 5, 5, 6
SHAPE = (3, 4, 64)
ALL = {
    "stratified": Masking(),
    "uniform": Masking("uniform", expressed=0.3),
    "drawn": Masking("drawn"),
    "cells": Masking("cells", num_cells=2),
    "genes": Masking("genes", genes=(0, 3, 63)),
    "ratio": Masking("ratio", expressed=0.4),
    "drawn_uniform": Masking("drawn_uniform"),
    "drawn_genes": Masking("drawn_genes"),
    "mixture": Masking("mixture", mixture=(("drawn", 2.0), ("drawn_uniform", 1.0), ("cells", 1.0))),
}
RULES = {name: jax.jit(partial(rule, num_bins=NUM_BINS)) for name, rule in ALL.items()}
seeds = st.integers(0, 2**31 - 1)
laws = settings(max_examples=25, deadline=None)


def make_tokens(seed: int, shape=SHAPE) -> np.ndarray:
    """Tokens with half of the genes unexpressed, PAD at the last positions and, in a bag, a cell of PAD."""
    rng = np.random.default_rng(seed)
    tokens = np.where(rng.random(shape) < 0.5, 0, rng.integers(1, NUM_BINS, shape)).astype(np.uint8)
    tokens[..., shape[-1] - rng.integers(1, 9) :] = PAD
    tokens[rng.integers(shape[0]), rng.integers(shape[1])] = PAD
    return tokens


def share_within(mask: np.ndarray, among: np.ndarray, rate: float) -> None:
    """The share masked lies within five standard deviations of the rate (binomial)."""
    n = among.sum()
    assert n > 1000
    assert abs(mask[among].mean() - rate) <= 5 * np.sqrt(rate * (1 - rate) / n) + 1e-9


def test_drawn_genes_are_hidden_in_all_cells_and_their_share_is_drawn_per_bag():
    tokens = np.zeros((400, 3, 200), np.uint8)
    tokens[:, 1] = 2
    tokens[:, 2] = PAD
    rule = partial(masking.drawn_genes, low=0.2, high=0.6, num_bins=NUM_BINS)
    mask = np.asarray(rule(jax.random.key(0), tokens))
    assert not mask[:, 2].any()
    np.testing.assert_array_equal(mask[:, 0], mask[:, 1])
    share = mask[:, 0].mean(axis=1)
    assert 0.05 < share.min() < 0.25
    assert 0.55 < share.max() < 0.75
    assert abs(share.mean() - 0.4) < 0.03
    assert abs(mask[:, 0].mean(axis=0) - 0.4).max() < 0.15, "every gene alike"


def test_the_kinds_under_test_are_all_kinds():
    assert set(ALL) == {*masking.KINDS, masking.MIXTURE}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ALL)
@laws
@given(seeds)
def test_pad_is_never_masked_and_the_key_alone_decides(kind, seed):
    tokens = make_tokens(seed)
    mask = np.asarray(RULES[kind](jax.random.key(seed), tokens))
    assert mask.dtype == bool
    assert mask.shape == tokens.shape
    assert mask.any()
    assert not mask[tokens == PAD].any()
    np.testing.assert_array_equal(mask, RULES[kind](jax.random.key(seed), tokens))
    np.testing.assert_array_equal(mask, ALL[kind](jax.random.key(seed), jnp.asarray(tokens), NUM_BINS))
    other = np.asarray(RULES[kind](jax.random.key(seed + 1), tokens))
    if kind == "genes":
        np.testing.assert_array_equal(mask, other)
    elif kind != "cells":  # the same two of four cells can be drawn twice
        assert (mask != other).any()


@pytest.mark.parametrize("kind", ALL)
def test_tokens_of_pad_alone_have_nothing_to_mask(kind):
    assert not RULES[kind](jax.random.key(0), np.full(SHAPE, PAD, np.uint8)).any()


def test_whole_cells_differ_between_keys_and_bags():
    tokens = np.zeros((40, 4, 8), np.uint8)
    first = np.asarray(masking.whole_cells(jax.random.key(0), tokens, 1, NUM_BINS)).any(axis=-1)
    second = np.asarray(masking.whole_cells(jax.random.key(1), tokens, 1, NUM_BINS)).any(axis=-1)
    assert (first != second).any()
    assert first.any(axis=0).all(), "some cell of a bag is never chosen"


@laws
@given(seeds)
def test_apply_writes_the_mask_token_there_and_only_there(seed):
    tokens = make_tokens(seed)
    mask = np.asarray(RULES["uniform"](jax.random.key(seed), tokens))
    shown = np.asarray(masking.apply(jnp.asarray(tokens), mask, NUM_BINS))
    assert shown.dtype == np.uint8
    assert (shown[mask] == MASK).all()
    np.testing.assert_array_equal(shown[~mask], tokens[~mask])


def test_stratified_rates_are_those_of_expressed_and_unexpressed_genes():
    tokens = make_tokens(0, (16, 16, 512))
    mask = np.asarray(masking.stratified(jax.random.key(1), tokens, 0.15, 0.01, NUM_BINS))
    share_within(mask, (tokens > 0) & (tokens < PAD), 0.15)
    share_within(mask, tokens == 0, 0.01)
    assert Masking() == Masking("stratified", expressed=0.15, unexpressed=0.01), "the paper's rates"
    np.testing.assert_array_equal(mask, Masking()(jax.random.key(1), jnp.asarray(tokens), NUM_BINS))


def test_uniform_takes_no_notice_of_expression():
    tokens = make_tokens(0, (16, 16, 512))
    mask = np.asarray(masking.uniform(jax.random.key(1), tokens, 0.2, NUM_BINS))
    for among in (tokens == 0, (tokens > 0) & (tokens < PAD)):
        share_within(mask, among, 0.2)


def test_the_drawn_rate_belongs_to_a_bag_and_stays_in_its_range():
    tokens = make_tokens(0, (64, 8, 512))
    mask = np.asarray(masking.drawn(jax.random.key(1), tokens, 0.2, 0.6, 0.5, NUM_BINS))
    rates = []
    for bag, masked in zip(tokens, mask, strict=True):
        expressed = (bag > 0) & (bag < PAD)
        rates.append(masked[expressed].mean())
        cells = [m[e].mean() for m, e in zip(masked, expressed, strict=True) if e.any()]
        np.testing.assert_allclose(cells, rates[-1], atol=5 * 0.5 / np.sqrt(200))
        np.testing.assert_allclose(masked[bag == 0].mean(), rates[-1] / 2, atol=5 * 0.5 / np.sqrt(1500))
    noise = 5 * 0.5 / np.sqrt(1500)
    assert min(rates) > 0.2 - noise
    assert max(rates) < 0.6 + noise
    # Of 64 uniform draws the extremes miss a quarter of the range with a probability of 1e-8.
    assert min(rates) < 0.3
    assert max(rates) > 0.5


def test_the_unexpressed_part_of_drawn_is_that_of_the_two_rates():
    rule = Masking("drawn", expressed=0.5, unexpressed=0.1, low=0.89, high=0.91)
    tokens = make_tokens(0, (16, 16, 512))
    mask = np.asarray(rule(jax.random.key(3), jnp.asarray(tokens), NUM_BINS))
    assert abs(mask[(tokens > 0) & (tokens < PAD)].mean() - 0.9) < 0.02
    assert abs(mask[tokens == 0].mean() - 0.18) < 0.02


@laws
@given(seeds, st.integers(0, 6))
def test_whole_cells_masks_exactly_so_many_present_cells_entirely(seed, number):
    tokens = make_tokens(seed)
    mask = np.asarray(masking.whole_cells(jax.random.key(seed), tokens, number, NUM_BINS))
    present = tokens < PAD
    for m, p in zip(mask, present, strict=True):
        touched = m.any(axis=1)
        assert touched.sum() == min(number, p.any(axis=1).sum())
        np.testing.assert_array_equal(m[touched], p[touched])


def test_fixed_genes_are_the_same_in_every_cell():
    tokens = make_tokens(2)
    mask = np.asarray(ALL["genes"](jax.random.key(0), jnp.asarray(tokens), NUM_BINS))
    expected = np.zeros(SHAPE[-1], bool)
    expected[[0, 3, 63]] = True
    np.testing.assert_array_equal(mask, expected & (tokens < PAD))


@laws
@given(seeds, st.sampled_from([0.0, 0.15, 0.3, 0.4, 0.8, 1.0]), st.booleans())
def test_the_exact_ratio_holds_in_every_cell(seed, ratio, expressed_only):
    tokens = make_tokens(seed)
    mask = np.asarray(
        masking.exact_ratio(jax.random.key(seed), tokens, ratio, NUM_BINS, expressed_only=expressed_only)
    )
    eligible = (tokens < PAD) & ((tokens > 0) if expressed_only else True)
    assert not mask[~eligible].any()
    expected = np.rint(np.float32(ratio) * eligible.sum(axis=-1).astype(np.float32))
    np.testing.assert_array_equal(mask.sum(axis=-1), expected)


def test_the_exact_ratio_treats_all_levels_alike():
    tokens = make_tokens(0, (16, 16, 512))
    mask = np.asarray(Masking("ratio", expressed=0.3)(jax.random.key(5), jnp.asarray(tokens), NUM_BINS))
    for level in range(NUM_BINS):
        share_within(mask, tokens == level, 0.3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "random"}, "kind is 'random'"),
        ({"expressed": 1.5}, r"expressed is 1\.5"),
        ({"unexpressed": -0.1}, "unexpressed"),
        ({"low": float("nan")}, "low"),
        ({"kind": "drawn", "low": 0.5, "high": 0.5}, "low must be less than high"),
        ({"kind": "drawn", "expressed": 0.0}, "expressed is 0"),
        (
            {"kind": "drawn", "expressed": 0.1, "unexpressed": 0.3},
            "lower masking.high or masking.unexpressed",
        ),
        ({"kind": "mixture"}, "mixture"),
        ({"kind": "mixture", "mixture": (("drawn", 0.0),)}, "mixture"),
        ({"kind": "mixture", "mixture": (("drawn", 1.0), ("drawn", 2.0))}, "mixture"),
        ({"kind": "mixture", "mixture": (("mixture", 1.0),)}, "mixture"),
        ({"kind": "mixture", "mixture": (("drawn", 1.0), ("cells", 1.0)), "num_cells": 0}, "num_cells"),
        ({"kind": "cells", "num_cells": 0}, "num_cells"),
        ({"kind": "genes"}, "gene positions"),
        ({"kind": "genes", "genes": (2, -1)}, "gene positions"),
    ],
)
def test_a_rule_that_cannot_be_meant_is_refused_in_one_sentence(options, message):
    with pytest.raises(ConfigError, match=message) as error:
        Masking(**options)
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)


def test_a_gene_beyond_the_cells_is_refused():
    with pytest.raises(ConfigError, match="position 64"):
        Masking("genes", genes=(1, 64))(jax.random.key(0), jnp.asarray(make_tokens(0)), NUM_BINS)


def test_a_rule_can_be_a_static_argument():
    assert len({Masking(), Masking(), Masking("uniform")}) == 2


def test_a_mixture_draws_one_kind_per_bag_by_weight():
    tokens = np.zeros((400, 3, 50), np.uint8)
    rule = Masking("mixture", mixture=(("cells", 1.0), ("uniform", 3.0)), expressed=0.5)
    mask = np.asarray(rule(jax.random.key(0), tokens, NUM_BINS))
    per_cell = mask.sum(axis=-1)
    cells = (np.sort(per_cell, axis=1) == [0, 0, 50]).all(axis=1)
    share_within(~cells[:, None].repeat(3, 1), np.ones((400, 3), bool), 0.75)
    assert (per_cell[~cells] < 50).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ALL)
def test_the_log_ratio_of_a_bag_is_that_of_its_masking_rates(kind):
    rng = np.random.default_rng(0)
    tokens = np.where(rng.random((48, 4, 2048)) < 0.6, 0, 2).astype(np.uint8)
    mask, log_ratio = (np.asarray(x) for x in ALL[kind].draw(jax.random.key(0), tokens, NUM_BINS))
    np.testing.assert_array_equal(mask, ALL[kind](jax.random.key(0), tokens, NUM_BINS))
    assert log_ratio.shape == (48,)
    for ratio in np.unique(log_ratio):
        same = log_ratio == ratio
        share = [mask[same][expressed].mean() for expressed in (tokens[same] > 0, tokens[same] == 0)]
        if kind != "genes":  # the same few genes, whose number says little
            np.testing.assert_allclose(np.log(share[0] / share[1]), ratio, atol=0.15)
    assert len(np.unique(log_ratio)) == (2 if kind == "mixture" else 1)
    expected = np.mean([ALL[kind].log_ratio_of(each) * weight for each, weight in ALL[kind].components])
    np.testing.assert_allclose(ALL[kind].log_ratio, expected * len(ALL[kind].components), rtol=1e-6)


def test_a_class_that_is_never_masked_has_no_ratio():
    rules = {
        "unexpressed": [Masking(unexpressed=0.0), Masking("drawn", unexpressed=0.0)],
        "expressed": [
            Masking(expressed=0.0),
            Masking("uniform", expressed=0.0),
            Masking("ratio", expressed=0.0),
        ],
    }
    rules["unexpressed"].append(
        Masking("mixture", mixture=(("stratified", 1.0), ("cells", 1.0)), unexpressed=0.0)
    )
    for name, refused in rules.items():
        for rule in refused:
            with pytest.raises(ConfigError, match=f"masking.{name}"):
                _ = rule.log_ratio
