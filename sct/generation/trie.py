"""Answers from a list: a tree of the allowed sequences of tokens, walked while decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sct.checks import check_not_empty
from sct.errors import ConfigError


class Trie(NamedTuple):
    """Tree of sequences; node 0 is its root.

    Attributes
    ----------
    tokens
        Tokens that may follow each node, int32 (nodes, most children), -1 where there are fewer.
    children
        Node that each of them leads to.
    stop, longest
        Token that ends every sequence, and tokens of the longest one with it.
    """

    tokens: jax.Array
    children: jax.Array
    stop: int
    longest: int

    def allowed(self, nodes: jax.Array, vocab_size: int) -> jax.Array:
        """Which tokens may follow nodes (B,), bool (B, V)."""
        tokens = self.tokens[nodes]
        rows = jnp.arange(len(nodes))[:, None]
        where = jnp.where(tokens >= 0, tokens, vocab_size)  # outside, so that it is dropped
        return jnp.zeros((len(nodes), vocab_size), bool).at[rows, where].set(True, mode="drop")

    def follow(self, nodes: jax.Array, tokens: jax.Array) -> jax.Array:
        """Nodes (B,) behind allowed tokens (B,)."""
        taken = self.tokens[nodes] == tokens[:, None]
        return jnp.where(taken, self.children[nodes], 0).sum(axis=1)


def make_trie(sequences: Sequence[Sequence[int]], stop: int) -> Trie:
    """Tree in which each sequence ends with the token `stop`.

    Raises
    ------
    ConfigError
        There is no sequence, or one is empty or holds `stop`.
    """
    check_not_empty("the list of allowed answers", sequences)
    nodes: list[dict[int, int]] = [{}]
    for sequence in sequences:
        if not len(sequence) or stop in sequence:
            raise ConfigError(
                f"an allowed answer has the tokens {list(map(int, sequence))}, but it must have at least one and not "
                f"the token {stop} that ends it."
            )
        node = 0
        for token in (*sequence, stop):
            if token not in nodes[node]:
                nodes[node][int(token)] = len(nodes)
                nodes.append({})
            node = nodes[node][int(token)]
        nodes[node] = {stop: node}  # what is finished stays so
    width = max(map(len, nodes))
    tokens, children = np.full((2, len(nodes), width), -1, np.int32)
    for number, following in enumerate(nodes):
        tokens[number, : len(following)] = list(following)
        children[number, : len(following)] = list(following.values())
    longest = 1 + max(map(len, sequences))
    return Trie(jnp.asarray(tokens), jnp.asarray(np.maximum(children, 0)), stop, longest)
