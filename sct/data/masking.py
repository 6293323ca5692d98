"""Which tokens a model has to predict: pure functions of a key and tokens, run on the device.

Each takes tokens (B, K, G) and returns a bool mask of the same shape; PAD is never masked. `apply` puts the
MASK token there. Token numbers: levels 0 .. num_bins - 1, PAD = num_bins, MASK = num_bins + 1.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from sct.errors import ConfigError

KINDS = ("stratified", "uniform", "drawn", "cells", "genes", "ratio")


def apply(tokens: jax.Array, mask: jax.Array, num_bins: int) -> jax.Array:
    """Put the MASK token at the masked positions."""
    return jnp.where(mask, jnp.asarray(num_bins + 1, tokens.dtype), tokens)


def stratified(
    key: jax.Array,
    tokens: jax.Array,
    expressed: jax.Array | float,
    unexpressed: jax.Array | float,
    num_bins: int,
) -> jax.Array:
    """Mask expressed genes with one probability and unexpressed ones with another (paper: 0.15 and 0.01).

    The rates are numbers, or arrays that broadcast against (B, K, G).
    """
    rate = jnp.where(tokens == 0, unexpressed, expressed)
    return (jax.random.uniform(key, tokens.shape) < rate) & (tokens < num_bins)


def uniform(key: jax.Array, tokens: jax.Array, rate: float, num_bins: int) -> jax.Array:
    """Mask every gene with the same probability (ablation of the paper)."""
    return stratified(key, tokens, rate, rate, num_bins)


def drawn(
    key: jax.Array, tokens: jax.Array, low: float, high: float, unexpressed_share: float, num_bins: int
) -> jax.Array:
    """Mask expressed genes with a rate drawn per bag from U(low, high).

    Unexpressed genes are masked with `unexpressed_share` x that rate. Training so makes one model fit for all
    masking ratios.
    """
    draw, place = jax.random.split(key)
    rate = jax.random.uniform(draw, (tokens.shape[0], 1, 1), minval=low, maxval=high)
    return stratified(place, tokens, rate, rate * unexpressed_share, num_bins)


def whole_cells(key: jax.Array, tokens: jax.Array, num_cells: int, num_bins: int) -> jax.Array:
    """Mask all genes of `num_cells` cells of each bag, chosen among the cells that are there."""
    present = jnp.any(tokens < num_bins, axis=-1)
    score = jnp.where(present, jax.random.uniform(key, present.shape), jnp.inf)
    rank = jnp.argsort(jnp.argsort(score, axis=-1), axis=-1)
    return (rank < num_cells)[..., None] & (tokens < num_bins)


def fixed_genes(tokens: jax.Array, genes: jax.Array, num_bins: int) -> jax.Array:
    """Mask the same genes in all cells; `genes` is a bool array (G,)."""
    return jnp.broadcast_to(genes, tokens.shape) & (tokens < num_bins)


def exact_ratio(
    key: jax.Array, tokens: jax.Array, ratio: float, num_bins: int, expressed_only: bool = False
) -> jax.Array:
    """Mask exactly round(ratio x n) of the n genes of each cell, for evaluation.

    With `expressed_only`, of its n expressed genes.
    """
    eligible = (tokens < num_bins) & ((tokens > 0) | (not expressed_only))
    score = jnp.where(eligible, jax.random.uniform(key, tokens.shape), jnp.inf)
    rank = jnp.argsort(jnp.argsort(score, axis=-1), axis=-1)
    number = jnp.round(ratio * eligible.sum(axis=-1, keepdims=True)).astype(rank.dtype)
    return (rank < number) & eligible


def within_budget(key: jax.Array, mask: jax.Array, budget: int) -> tuple[jax.Array, jax.Array]:
    """Positions of masked places, of which a static number is looked at.

    The count starts at a random place, so that no position is more often beyond the budget than others.

    Parameters
    ----------
    mask
        bool (..., L).
    budget
        Places per row (P); masked ones beyond it are left out.

    Returns
    -------
    Positions int32 (..., P), and whether there is a masked one, bool (..., P); where there is none the position is 0.
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
    """A masking rule with its parameters, hashable, as configurations give it.

    Parameters
    ----------
    kind
        "stratified" (the paper), "uniform", "drawn", "cells", "genes" or "ratio"; see the functions.
    expressed, unexpressed
        Rates of "stratified"; `expressed` is also the rate of "uniform" and the ratio of "ratio".
    low, high
        Range of the rate of "drawn"; unexpressed genes take its `unexpressed / expressed` part.
    num_cells
        Cells of each bag masked by "cells".
    genes
        Gene positions masked by "genes".

    Raises
    ------
    ConfigError
        A number out of its range, or a rule that could never mask anything.
    """

    kind: str = "stratified"
    expressed: float = 0.15
    unexpressed: float = 0.01
    low: float = 0.05
    high: float = 0.95
    num_cells: int = 1
    genes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"masking kind {self.kind!r} is not one of {', '.join(KINDS)}.")
        for name in ("expressed", "unexpressed", "low", "high"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"masking {name} is {getattr(self, name)}, but it must lie in [0, 1].")
        if self.kind == "drawn" and not (self.low < self.high and self.expressed > 0):
            raise ConfigError("masking kind 'drawn' needs low < high and expressed > 0.")
        if self.kind == "cells" and self.num_cells < 1:
            raise ConfigError(f"masking num_cells is {self.num_cells}, but it must be at least 1.")
        if self.kind == "genes" and (not self.genes or min(self.genes) < 0):
            raise ConfigError("masking kind 'genes' needs gene positions of 0 or more in genes.")

    def __call__(self, key: jax.Array, tokens: jax.Array, num_bins: int) -> jax.Array:
        """Mask of tokens (B, K, G)."""
        match self.kind:
            case "stratified":
                return stratified(key, tokens, self.expressed, self.unexpressed, num_bins)
            case "uniform":
                return uniform(key, tokens, self.expressed, num_bins)
            case "drawn":
                share = self.unexpressed / self.expressed
                return drawn(key, tokens, self.low, self.high, share, num_bins)
            case "cells":
                return whole_cells(key, tokens, self.num_cells, num_bins)
            case "genes":
                if max(self.genes) >= tokens.shape[-1]:  # a scatter would leave it out without a word
                    raise ConfigError(
                        f"masking genes name position {max(self.genes)}, but cells have {tokens.shape[-1]}."
                    )
                chosen = jnp.zeros(tokens.shape[-1], bool).at[jnp.asarray(self.genes, jnp.int32)].set(True)
                return fixed_genes(tokens, chosen, num_bins)
            case _:
                return exact_ratio(key, tokens, self.expressed, num_bins)
