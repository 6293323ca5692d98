"""One-dimensional convolutions over a channels-last sequence."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from sct.nn import axes

_DIMENSIONS = ("NWC", "WIO", "NWC")


def conv(x: jax.Array, kernel: jax.Array, padding: str | tuple[int, int] = "SAME") -> jax.Array:
    """Stride-1 convolution of x (B, L, C) with kernel (k, C, F), giving (B, L, F)."""
    if kernel.shape[0] == 1:
        return jnp.einsum("blc,cf->blf", x, kernel[0])
    pads = padding if isinstance(padding, str) else [padding]
    return lax.conv_general_dilated(x, kernel, (1,), pads, dimension_numbers=_DIMENSIONS)


def conv_transpose_2x(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Transposed convolution of stride 2 and "SAME" padding: (B, L, C) -> (B, 2L, F).

    The map of `lax.conv_transpose(x, kernel, (2,), "SAME")`, written as one stride-1 convolution that
    computes the even and odd output positions as two groups of channels, then interleaves them. On CPU the
    gradient of the strided form runs at 3 GFLOP/s; this form has an ordinary convolution's gradient.

    Output position 2m + p sums kernel[j] * x[m + (p + j - a) / 2] over the taps j of matching parity, where
    a is the left padding of the dilated input.
    """
    taps = kernel.shape[0]
    left = -(-taps // 2) if taps > 1 else 0  # left padding of the dilated input under "SAME", stride 2
    offsets = [[(p + j - left) // 2 for j in range(taps) if (p + j - left) % 2 == 0] for p in (0, 1)]
    low = min(min(o, default=0) for o in offsets)
    high = max(max(o, default=0) for o in offsets)
    zero = jnp.zeros(kernel.shape[1:], kernel.dtype)
    phases = []
    for p in (0, 1):
        rows = [left - p + 2 * shift for shift in range(low, high + 1)]
        phases.append(jnp.stack([kernel[j] if 0 <= j < taps else zero for j in rows]))
    both = jnp.concatenate(phases, axis=-1)  # (taps of one phase, C, 2F)
    y = conv(x, both, (-low, high))
    batch, length, _ = x.shape
    return y.reshape(batch, 2 * length, kernel.shape[2])


class Conv(nn.Module):
    """Convolution with "SAME" padding; `upsample=True` is the transposed one of stride 2.

    The kernel has shape (taps, in, out) in both cases.
    """

    features: int
    taps: int
    upsample: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, L, C) to (B, L, features), or (B, 2L, features) when upsampling."""
        shape = (self.taps, x.shape[-1], self.features)
        kernel = axes.param(
            self, "kernel", axes.kernel_init, shape, (axes.TAPS, axes.CHANNEL_IN, axes.CHANNEL)
        )
        bias = axes.param(self, "bias", axes.zeros, (self.features,), (axes.CHANNEL,))
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        y = conv_transpose_2x(x, kernel) if self.upsample else conv(x, kernel)
        return y + bias.astype(self.dtype)


def pool_2x(x: jax.Array, kind: str) -> jax.Array:
    """Join neighbouring pairs of positions: (B, L, C) -> (B, L / 2, C), by "avg" or "max"."""
    pairs = x.reshape(x.shape[0], x.shape[1] // 2, 2, x.shape[2])
    return pairs.mean(axis=2) if kind == "avg" else pairs.max(axis=2)
