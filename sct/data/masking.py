"""Choose the tokens that a model has to predict.

The functions are pure functions of a random key and tokens, and run on the device. Each function takes tokens (B, K, G)
and returns a bool mask of the same shape. PAD is never masked. `apply` replaces masked tokens by MASK. A token is an
expression level from 0 to num_bins - 1, or PAD = num_bins, or MASK = num_bins + 1.

A rule that masks expressed genes more often than unexpressed ones changes the class balance: masked genes are expressed
more often than genes in general. `Masking.draw` therefore also returns the log ratio of the two rates, so that the loss
can correct for it (logit adjustment, Menon et al., ICLR 2021).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sct.checks import check_at_least, check_choice, check_positive, check_share
from sct.errors import ConfigError

KINDS = ("stratified", "uniform", "drawn", "drawn_uniform", "drawn_genes", "cells", "genes", "ratio")
MIXTURE = "mixture"


def apply(tokens: jax.Array, mask: jax.Array, num_bins: int) -> jax.Array:
    """Replace masked tokens by MASK."""
    return jnp.where(mask, jnp.asarray(num_bins + 1, tokens.dtype), tokens)


def stratified(
    key: jax.Array,
    tokens: jax.Array,
    expressed: jax.Array | float,
    unexpressed: jax.Array | float,
    num_bins: int,
) -> jax.Array:
    """Mask expressed genes with one probability and unexpressed genes with another (paper: 0.15 and 0.01).

    Both probabilities are numbers, or arrays that can be broadcast to (B, K, G).
    """
    rate = jnp.where(tokens == 0, unexpressed, expressed)
    return (jax.random.uniform(key, tokens.shape) < rate) & (tokens < num_bins)


def uniform(key: jax.Array, tokens: jax.Array, rate: float, num_bins: int) -> jax.Array:
    """Mask all genes with the same probability (an ablation in the paper)."""
    return stratified(key, tokens, rate, rate, num_bins)


def drawn(
    key: jax.Array, tokens: jax.Array, low: float, high: float, unexpressed_share: float, num_bins: int
) -> jax.Array:
    """Mask expressed genes with a probability that is drawn for each bag from the uniform distribution U(low, high).

    Unexpressed genes are masked with `unexpressed_share` times this probability. A model that is trained with this rule
    can be used with any fraction of masked genes.
    """
    draw, place = jax.random.split(key)
    rate = jax.random.uniform(draw, (tokens.shape[0], 1, 1), minval=low, maxval=high)
    return stratified(place, tokens, rate, rate * unexpressed_share, num_bins)


def drawn_genes(key: jax.Array, tokens: jax.Array, low: float, high: float, num_bins: int) -> jax.Array:
    """Mask the same genes in all cells of a bag. The masking probability of a bag is drawn from U(low, high).

    This rule trains a model to impute genes that were measured in no cell. If the genes that are masked in a cell were
    always visible in other cells of the bag, the model would learn to copy their values, and would learn little about
    how often a gene is expressed.
    """
    draw, place = jax.random.split(key)
    rate = jax.random.uniform(draw, (tokens.shape[0], 1, 1), minval=low, maxval=high)
    chosen = jax.random.uniform(place, (tokens.shape[0], 1, tokens.shape[2])) < rate
    return chosen & (tokens < num_bins)


def whole_cells(key: jax.Array, tokens: jax.Array, num_cells: int, num_bins: int) -> jax.Array:
    """Mask all genes in `num_cells` random cells of each bag. Cells that consist of PAD are never chosen."""
    present = jnp.any(tokens < num_bins, axis=-1)
    score = jnp.where(present, jax.random.uniform(key, present.shape), jnp.inf)
    rank = jnp.argsort(jnp.argsort(score, axis=-1), axis=-1)
    return (rank < num_cells)[..., None] & (tokens < num_bins)


def fixed_genes(tokens: jax.Array, genes: jax.Array, num_bins: int) -> jax.Array:
    """Mask the same genes in all cells; `genes` is a mask, bool (G,)."""
    return jnp.broadcast_to(genes, tokens.shape) & (tokens < num_bins)


def exact_ratio(
    key: jax.Array, tokens: jax.Array, ratio: float, num_bins: int, expressed_only: bool = False
) -> jax.Array:
    """Mask exactly round(ratio x n) of the n genes in each cell, for evaluation.

    With `expressed_only`, n is the number of expressed genes, and only expressed genes are masked.
    """
    eligible = (tokens < num_bins) & ((tokens > 0) | (not expressed_only))
    score = jnp.where(eligible, jax.random.uniform(key, tokens.shape), jnp.inf)
    rank = jnp.argsort(jnp.argsort(score, axis=-1), axis=-1)
    number = jnp.round(ratio * eligible.sum(axis=-1, keepdims=True)).astype(rank.dtype)
    return (rank < number) & eligible


def within_budget(key: jax.Array, mask: jax.Array, budget: int) -> tuple[jax.Array, jax.Array]:
    """Return the positions of masked tokens as an array of static size.

    If there are more than `budget` masked tokens in a row, some are left out. The search starts at a random position,
    so all positions are equally likely to be left out.

    Parameters
    ----------
    key
        PRNG key.
    mask
        bool (..., L).
    budget
        Maximum number of masked tokens to return per row (P).

    Returns
    -------
    Two arrays: the positions, int32 (..., P), and a mask of the valid positions, bool (..., P). Invalid positions are
    0.
    """
    length = mask.shape[-1]
    turn = jax.random.randint(key, (), 0, length)

    def find(row: jax.Array) -> jax.Array:
        return jnp.nonzero(row, size=budget, fill_value=length)[0]

    for _ in mask.shape[:-1]:
        find = jax.vmap(find)
    positions = find(jnp.roll(mask, -turn, axis=-1))
    taken = positions < length
    return jnp.where(taken, (positions + turn) % length, 0), taken


@dataclasses.dataclass(frozen=True)
class Masking:
    """Define how tokens are masked: the kind of masking and its parameters. The object is hashable.

    Parameters
    ----------
    kind
        One of "stratified" (the paper), "uniform", "drawn", "drawn_uniform", "drawn_genes", "cells", "genes" and
        "ratio" (see the functions of this module), or "mixture", which draws one of several kinds for each bag.
    expressed, unexpressed
        Masking rates of "stratified". `expressed` is also the masking rate of "uniform" and the masked fraction of
        "ratio".
    low, high
        Range of the masking rate of "drawn", "drawn_uniform" and "drawn_genes". With "drawn", the masking rate of
        unexpressed genes is `unexpressed / expressed` times the rate of expressed genes. With "drawn_uniform" and
        "drawn_genes", expressed and unexpressed genes have the same rate.
    num_cells
        Number of cells per bag that "cells" masks.
    genes
        Vocabulary positions of the genes that "genes" masks.
    mixture
        Kinds and weights of "mixture", such as (("drawn", 3.0), ("cells", 1.0)). The fields above give the parameters
        of each kind.

    Raises
    ------
    ConfigError
        A parameter is out of range, or the rule can never mask anything.
    """

    kind: str = "stratified"
    expressed: float = 0.15
    unexpressed: float = 0.01
    low: float = 0.05
    high: float = 0.95
    num_cells: int = 1
    genes: tuple[int, ...] = ()
    mixture: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        check_choice("masking.kind", self.kind, (*KINDS, MIXTURE))
        for name in ("expressed", "unexpressed", "low", "high"):
            check_share(f"masking.{name}", getattr(self, name))
        self._check_mixture()
        kinds = [kind for kind, _ in self.components]
        if {"drawn", "drawn_uniform", "drawn_genes"} & set(kinds) and not self.low < self.high:
            raise ConfigError(
                f"masking.low is {self.low} and masking.high is {self.high}, but low must be less than high for the "
                f"kind {self.kind!r}: lower masking.low, or increase masking.high."
            )
        if "drawn" in kinds:
            check_positive("masking.expressed", self.expressed, advice="set it above 0 for the kind 'drawn'")
        if "drawn" in kinds and self.high * self.unexpressed > self.expressed:
            raise ConfigError(
                "masking kind 'drawn' masks unexpressed genes with rates up to high x unexpressed / expressed = "
                f"{self.high * self.unexpressed / self.expressed:.3g}, but a rate must be at most 1: lower "
                "masking.high or masking.unexpressed."
            )
        if "cells" in kinds:
            check_at_least("masking.num_cells", self.num_cells, 1)
        if "genes" in kinds and (not self.genes or min(self.genes) < 0):
            raise ConfigError(
                "masking.genes is empty or has a negative number, but the masking kind 'genes' needs the gene "
                "positions to mask: list them in masking.genes, counted from 0."
            )

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Masking:
        """Make a masking rule from its JSON entry in a model folder or run folder.

        Raises
        ------
        ConfigError
            A field is unknown or has a wrong type.
        """
        fields: dict[str, Any] = {
            name: tuple(tuple(each) if isinstance(each, list) else each for each in value)
            if isinstance(value, list)
            else value
            for name, value in record.items()
        }
        try:
            return cls(**fields)
        except TypeError as error:
            raise ConfigError(
                f"the entry `masking` of the model's configuration is not valid ({error}): restore the original "
                "configuration file."
            ) from error

    def _check_mixture(self) -> None:
        if self.kind != MIXTURE:
            return
        pairs = [pair for pair in self.mixture if isinstance(pair, tuple) and len(pair) == 2]
        kinds = [kind for kind, _ in pairs]
        sound = all(isinstance(w, int | float) and math.isfinite(w) and w > 0 for _, w in pairs)
        if not pairs or len(pairs) < len(self.mixture) or not sound or len(set(kinds)) < len(kinds):
            raise ConfigError(
                f"masking.mixture is {self.mixture!r}, but must list each kind at most once, with a positive weight: "
                "write it like (('drawn', 3.0), ('cells', 1.0))."
            )
        for kind in kinds:
            check_choice("masking.mixture", kind, KINDS)

    @property
    def components(self) -> tuple[tuple[str, float], ...]:
        """Return pairs of a masking kind and its probability. Without a mixture, there is one pair."""
        if self.kind != MIXTURE:
            return ((self.kind, 1.0),)
        total = sum(weight for _, weight in self.mixture)
        return tuple((kind, weight / total) for kind, weight in self.mixture)

    def log_ratio_of(self, kind: str) -> float:
        """Return log(masking rate of expressed genes / masking rate of unexpressed genes) for one kind of masking.

        Raises
        ------
        ConfigError
            One of the two rates is 0, so the log ratio is undefined.
        """
        if kind not in ("stratified", "drawn"):
            if kind in ("uniform", "ratio") and not self.expressed:
                raise ConfigError(
                    f"masking.expressed is 0, so the masking kind {kind!r} masks no gene: set masking.expressed above "
                    "0."
                )
            return 0.0
        for name in ("expressed", "unexpressed"):
            if not getattr(self, name):
                raise ConfigError(
                    f"masking.{name} is 0, so {name} genes are never masked and the model cannot learn the probability "
                    f"of expression: set masking.{name} above 0, or set objective.logit_adjustment=False."
                )
        return math.log(self.expressed / self.unexpressed)

    @property
    def log_ratio(self) -> float:
        """Return the log ratio of the masking rates of expressed and unexpressed genes.

        The log ratio of a mixture is the mean over its kinds, weighted by their probabilities.
        """
        return sum(weight * self.log_ratio_of(kind) for kind, weight in self.components)

    def __call__(self, key: jax.Array, tokens: jax.Array, num_bins: int) -> jax.Array:
        """Return the mask, bool (B, K, G), for tokens (B, K, G)."""
        if self.kind != MIXTURE:
            return self._mask(self.kind, key, tokens, num_bins)
        mask = jnp.zeros(tokens.shape, bool)
        chosen = self._chosen(key, tokens.shape[0])
        for number, (kind, _) in enumerate(self.components):
            here = self._mask(kind, jax.random.fold_in(key, number), tokens, num_bins)
            mask |= here & (chosen == number)[:, None, None]
        return mask

    def draw(self, key: jax.Array, tokens: jax.Array, num_bins: int) -> tuple[jax.Array, jax.Array]:
        """Return the mask for tokens (B, K, G), and the log ratio of the masking rates.

        Returns
        -------
        Two arrays: the mask, bool (B, K, G), and the log ratio of each bag, float32 (B,). The log ratio is log(masking
        rate of expressed genes / masking rate of unexpressed genes).
        """
        ratios = jnp.asarray([self.log_ratio_of(kind) for kind, _ in self.components], jnp.float32)
        return self(key, tokens, num_bins), ratios[self._chosen(key, tokens.shape[0])]

    def _chosen(self, key: jax.Array, num_bags: int) -> jax.Array:
        """Draw a kind of masking from the mixture for each bag. Return the indices of the kinds in `mixture`, (B,)."""
        if self.kind != MIXTURE:
            return jnp.zeros(num_bags, jnp.int32)
        weights = jnp.log(jnp.asarray([weight for _, weight in self.components], jnp.float32))
        return jax.random.categorical(jax.random.fold_in(key, len(KINDS)), weights, shape=(num_bags,))

    def _mask(self, kind: str, key: jax.Array, tokens: jax.Array, num_bins: int) -> jax.Array:
        match kind:
            case "stratified":
                return stratified(key, tokens, self.expressed, self.unexpressed, num_bins)
            case "uniform":
                return uniform(key, tokens, self.expressed, num_bins)
            case "drawn":
                share = self.unexpressed / self.expressed
                return drawn(key, tokens, self.low, self.high, share, num_bins)
            case "drawn_uniform":
                return drawn(key, tokens, self.low, self.high, 1.0, num_bins)
            case "drawn_genes":
                return drawn_genes(key, tokens, self.low, self.high, num_bins)
            case "cells":
                return whole_cells(key, tokens, self.num_cells, num_bins)
            case "genes":
                if max(self.genes) >= tokens.shape[-1]:  # JAX would silently ignore it
                    raise ConfigError(
                        f"masking.genes has position {max(self.genes)}, but cells have only {tokens.shape[-1]} gene "
                        "positions: use positions below this number."
                    )
                chosen = jnp.zeros(tokens.shape[-1], bool).at[jnp.asarray(self.genes, jnp.int32)].set(True)
                return fixed_genes(tokens, chosen, num_bins)
            case _:
                return exact_ratio(key, tokens, self.expressed, num_bins)
