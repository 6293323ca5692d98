"""One-dimensional convolutions over a channels-last sequence."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.typing import DTypeLike

from sct.nn import axes
from sct.nn.plain import wants_plain

_DIMENSIONS = ("NWC", "WIO", "NWC")


def conv(
    x: jax.Array, kernel: jax.Array, padding: tuple[int, int] | None = None, in_loop: bool = False
) -> jax.Array:
    """Stride-1 convolution of x (B, L, C) with kernel (k, C, F), giving (B, L, F).

    `padding` is the number of zeros before and after the sequence, by default "SAME"; a negative number takes
    positions away. `in_loop` says that it is one step of a loop, which needs another gradient on CPU.
    """
    taps = kernel.shape[0]
    pads = ((taps - 1) // 2, taps // 2) if padding is None else padding
    if wants_plain():
        return _plain_conv(x, kernel, pads)
    if taps == 1:
        return jnp.einsum("blc,cf->blf", x, kernel[0])
    if in_loop and jax.default_backend() == "cpu":
        return _conv_in_loop(x, kernel, pads)
    return _plain_conv(x, kernel, pads)


def _plain_conv(x: jax.Array, kernel: jax.Array, pads: tuple[int, int]) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, (1,), [pads], dimension_numbers=_DIMENSIONS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv_in_loop(x: jax.Array, kernel: jax.Array, pads: tuple[int, int]) -> jax.Array:
    """The kernel's gradient is one matrix product per tap: inside a loop XLA (jax 0.10) runs it as a convolution
    with a kernel of the sequence's length at 5 GFLOP/s, the products at 100 and more.
    """  # noqa: D205
    return _plain_conv(x, kernel, pads)


def _conv_in_loop_forward(
    x: jax.Array, kernel: jax.Array, pads: tuple[int, int]
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _plain_conv(x, kernel, pads), (x, kernel)


def _conv_in_loop_backward(
    pads: tuple[int, int], kept: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    (before, after), taps, length = pads, kernel.shape[0], gradient.shape[1]
    turned = rearrange(jnp.flip(kernel, 0), "taps c f -> taps f c")
    by_x = _plain_conv(gradient, turned, (taps - 1 - before, taps - 1 - after))
    padded = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (before, after, 0), (0, 0, 0)])
    by_tap = [jnp.einsum("blf,blc->fc", gradient, padded[:, j : j + length]).T for j in range(taps)]
    return by_x, jnp.stack(by_tap)


_conv_in_loop.defvjp(_conv_in_loop_forward, _conv_in_loop_backward)


def conv_transpose_2x(x: jax.Array, kernel: jax.Array, halo: int = 0, in_loop: bool = False) -> jax.Array:
    """Transposed convolution of stride 2 and "SAME" padding: (B, L, C) -> (B, 2L, F).

    With a `halo`, x has so many further positions at each end, of its neighbours, in place of the padding; for
    `in_loop` see `conv`.

    The map of `lax.conv_transpose(x, kernel, (2,), "SAME")`, written as two stride-1 convolutions, one for
    the even and one for the odd output positions, that are then interleaved. On CPU the gradient of the
    strided form runs at 3 GFLOP/s; this form has an ordinary convolution's gradient.

    Output position 2m + p sums kernel[j] * x[m + (p + j - a) / 2] over the taps j of matching parity, where
    a is the left padding of the dilated input.
    """
    taps = kernel.shape[0]
    left = -(-taps // 2) if taps > 1 else 0  # left padding of the dilated input under "SAME", stride 2
    if wants_plain():
        dilated = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (0, 0, 1), (0, 0, 0)])
        return _plain_conv(dilated, kernel, (left, taps - left))
    phases: list[jax.Array] = []
    for p in (0, 1):
        used = [j for j in range(taps) if (p + j - left) % 2 == 0]
        if not used:  # a kernel of one tap leaves the odd positions empty
            phases.append(jnp.zeros_like(phases[0]))
            continue
        low, high = ((p + j - left) // 2 for j in (used[0], used[-1]))
        phases.append(conv(x, kernel[used[0] :: 2], (-low - halo, high - halo), in_loop))
    return rearrange(jnp.stack(phases, axis=2), "b l phase f -> b (l phase) f")


def halo_of(taps: int, upsample: bool = False) -> int:
    """Positions at each end of a sequence that the convolution of its neighbours sees."""
    return (taps + 1) // 4 if upsample else taps // 2


class Conv(nn.Module):
    """Convolution with "SAME" padding; `upsample=True` is the transposed one of stride 2.

    The kernel has shape (taps, in, out) in both cases.
    """

    features: int
    taps: int
    upsample: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, with_halo: bool = False, in_loop: bool = False) -> jax.Array:
        """Map (B, L, C) to (B, L, features), or (B, 2L, features) when upsampling.

        `with_halo`: x has `halo_of(taps, upsample)` further positions at each end, of its neighbours, in place of
        the padding, as the pieces of a sequence have. `in_loop`: it is one step of a loop over them, see `conv`.
        """
        shape = (self.taps, x.shape[-1], self.features)
        kernel = axes.param(
            self, "kernel", axes.kernel_init, shape, (axes.TAPS, axes.CHANNEL_IN, axes.CHANNEL)
        )
        bias = axes.param(self, "bias", axes.zeros, (self.features,), (axes.CHANNEL,))
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        halo = halo_of(self.taps, self.upsample) if with_halo else 0
        if self.upsample:
            y = conv_transpose_2x(x, kernel, halo, in_loop)
        else:
            y = conv(x, kernel, ((self.taps - 1) // 2 - halo, self.taps // 2 - halo), in_loop)
        return y + bias.astype(self.dtype)


def pool_2x(x: jax.Array, kind: str) -> jax.Array:
    """Join neighbouring pairs of positions: (B, L, C) -> (B, L / 2, C), by "avg" or "max"."""
    pairs = rearrange(x, "b (l pair) c -> b l pair c", pair=2)
    if kind == "avg":
        # Not `mean`, whose sum over two numbers the CPU computes ten times slower.
        return (pairs[:, :, 0] + pairs[:, :, 1]) * 0.5
    # The gradient of `max` divides by the number of equal values, which is zero where a compiler computes the
    # input again with other rounding (seen on CPU with low optimisation): a choice has no such quotient.
    first, second = pairs[:, :, 0], pairs[:, :, 1]
    return jnp.where(first < second, second, first)
