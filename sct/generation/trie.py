"""Constrain decoding by a trie (prefix tree), so that the answer is always one of a list of token sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sct.checks import check_not_empty
from sct.errors import ConfigError


class Trie(NamedTuple):
    """Prefix tree of the allowed sequences; node 0 is the root.

    Attributes
    ----------
    tokens
        Tokens allowed after each node, int32 (nodes, maximum number of children), padded with -1.
    children
        Node that is reached by each token in `tokens`, int32 of the same shape.
    stop
        Stop token at the end of each sequence.
    longest
        Length of the longest sequence, including the stop token.
    """

    tokens: jax.Array
    children: jax.Array
    stop: int
    longest: int

    def allowed(self, nodes: jax.Array, vocab_size: int) -> jax.Array:
        """Return which tokens are allowed after each node (B,), as a mask (B, V)."""
        tokens = self.tokens[nodes]
        rows = jnp.arange(len(nodes))[:, None]
        where = jnp.where(tokens >= 0, tokens, vocab_size)  # out of bounds: dropped by mode="drop"
        return jnp.zeros((len(nodes), vocab_size), bool).at[rows, where].set(True, mode="drop")

    def follow(self, nodes: jax.Array, tokens: jax.Array) -> jax.Array:
        """Return the nodes (B,) that are reached from `nodes` (B,) by the allowed tokens `tokens` (B,)."""
        taken = self.tokens[nodes] == tokens[:, None]
        return jnp.where(taken, self.children[nodes], 0).sum(axis=1)


def make_trie(sequences: Sequence[Sequence[int]], stop: int) -> Trie:
    """Build the trie of the allowed token sequences. Each sequence is followed by the token `stop`.

    Raises
    ------
    ConfigError
        No sequence is given, or a sequence is empty or contains `stop`.
    """
    check_not_empty("the list of allowed answers", sequences)
    nodes: list[dict[int, int]] = [{}]
    for sequence in sequences:
        if not len(sequence) or stop in sequence:
            raise ConfigError(
                f"an allowed answer has the token ids {list(map(int, sequence))}, but must have at least "
                f"one token and must not contain the stop token ({stop}): correct the list of answers."
            )
        node = 0
        for token in (*sequence, stop):
            if token not in nodes[node]:
                nodes[node][int(token)] = len(nodes)
                nodes.append({})
            node = nodes[node][int(token)]
        nodes[node] = {stop: node}  # finished sequences repeat the stop token
    width = max(map(len, nodes))
    tokens, children = np.full((2, len(nodes), width), -1, np.int32)
    for number, following in enumerate(nodes):
        tokens[number, : len(following)] = list(following)
        children[number, : len(following)] = list(following.values())
    longest = 1 + max(map(len, sequences))
    return Trie(jnp.asarray(tokens), jnp.asarray(np.maximum(children, 0)), stop, longest)
