"""Define dense layers and token embeddings."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sct.nn import axes
from sct.nn.adapters import with_adapters, with_bottleneck


class Linear(nn.Module):
    """Dense layer over the last axis: `y = x @ kernel + bias`. If the layer has adapters, they are applied too.

    Parameters
    ----------
    features
        Width of the output.
    kernel_axes
        Logical names of the two axes of the kernel.
    use_bias
        Whether the layer has a bias.
    dtype
        Data type in which the layer computes. Parameters are float32.
    kernel_init
        Initializer of the kernel.
    """

    features: int
    kernel_axes: tuple[str, str] = (axes.CHANNEL_IN, axes.CHANNEL)
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32
    kernel_init: axes.Initializer = axes.kernel_init

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the layer to x (..., in), with its adapters from the collection "adapters"; return (..., features)."""
        kernel = axes.param(self, "kernel", self.kernel_init, (x.shape[-1], self.features), self.kernel_axes)
        y = jnp.einsum("...i,io->...o", x.astype(self.dtype), kernel.astype(self.dtype))
        if self.use_bias:
            bias = axes.param(self, "bias", axes.zeros, (self.features,), self.kernel_axes[1:])
            y = y + bias.astype(self.dtype)
        return with_adapters(self, x, y)


class Embed(nn.Module):
    """Embedding table of `num` vectors of width `features`."""

    num: int
    features: int
    dtype: DTypeLike = jnp.float32
    table_init: axes.Initializer = jax.nn.initializers.normal(stddev=1.0)
    table_axes: tuple[str | None, str] = (axes.VOCAB, axes.CHANNEL)

    def setup(self) -> None:
        """Declare the embedding table."""
        shape = (self.num, self.features)
        self.table = axes.param(self, "embedding", self.table_init, shape, self.table_axes)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Look up the vectors (..., features) of integer ids (...), and apply the table's bottleneck if it has one."""
        vectors = jnp.take(self.table, ids.astype(jnp.int32), axis=0).astype(self.dtype)
        return with_bottleneck(self, vectors)

    def scores(self, x: jax.Array) -> jax.Array:
        """Multiply vectors (..., features) with every vector of the table and return (..., num).

        Models whose output head shares its weights with the token embeddings use this method as the head.
        """
        return jnp.einsum("...i,vi->...v", x.astype(self.dtype), self.table.astype(self.dtype))
