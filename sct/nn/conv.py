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
from sct.nn.chunked_map import inside_chunk
from sct.nn.reference import use_reference

_DIMENSIONS = ("NWC", "WIO", "NWC")


def conv(x: jax.Array, kernel: jax.Array, padding: tuple[int, int] | None = None) -> jax.Array:
    """Stride-1 convolution of x (B, L, C) with kernel (k, C, F), giving (B, L, F).

    `padding` is the number of zeros before and after the sequence, by default "SAME"; a negative number removes
    positions.
    """
    size = kernel.shape[0]
    pads = ((size - 1) // 2, size // 2) if padding is None else padding
    if use_reference():
        return _library_conv(x, kernel, pads)
    if size == 1:
        return jnp.einsum("blc,cf->blf", x, kernel[0])
    if inside_chunk() and jax.default_backend() == "cpu":
        return _conv_in_loop(x, kernel, pads)
    return _library_conv(x, kernel, pads)


def _library_conv(x: jax.Array, kernel: jax.Array, pads: tuple[int, int]) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, (1,), [pads], dimension_numbers=_DIMENSIONS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv_in_loop(x: jax.Array, kernel: jax.Array, pads: tuple[int, int]) -> jax.Array:
    """Convolution whose gradient for the kernel is one matrix product per kernel position.

    XLA for the CPU (jax 0.10) has no fast form of that gradient inside a loop: as a convolution with a kernel as long
    as the sequence it runs at 5 GFLOP/s, the products run at more than 100.
    """
    return _library_conv(x, kernel, pads)


def _conv_in_loop_forward(
    x: jax.Array, kernel: jax.Array, pads: tuple[int, int]
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _library_conv(x, kernel, pads), (x, kernel)


def _conv_in_loop_backward(
    pads: tuple[int, int], kept: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    (before, after), size, length = pads, kernel.shape[0], gradient.shape[1]
    turned = rearrange(jnp.flip(kernel, 0), "k c f -> k f c")
    by_x = _library_conv(gradient, turned, (size - 1 - before, size - 1 - after))
    padded = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (before, after, 0), (0, 0, 0)])
    by_kernel = [jnp.einsum("blf,blc->fc", gradient, padded[:, j : j + length]).T for j in range(size)]
    return by_x, jnp.stack(by_kernel)


_conv_in_loop.defvjp(_conv_in_loop_forward, _conv_in_loop_backward)


def conv_transpose_2x(x: jax.Array, kernel: jax.Array, halo: int = 0) -> jax.Array:
    """Transposed convolution of stride 2 and "SAME" padding: (B, L, C) -> (B, 2L, F).

    With a `halo`, x has that many further positions at each end, of its neighbors, in place of the padding.

    The output is that of `lax.conv_transpose(x, kernel, (2,), "SAME")`. It is computed as two stride-1 convolutions,
    one for the even and one for the odd output positions. On CPU the gradient of the strided form runs at 3 GFLOP/s;
    this form has an ordinary convolution's gradient.

    Output position 2m + p sums kernel[j] * x[m + (p + j - a) / 2] over the kernel positions j of matching parity, where
    a is the left padding of the dilated input.
    """
    size = kernel.shape[0]
    left = -(-size // 2) if size > 1 else 0  # left padding of the dilated input under "SAME", stride 2
    if use_reference():
        dilated = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (0, 0, 1), (0, 0, 0)])
        return _library_conv(dilated, kernel, (left, size - left))
    phases: list[jax.Array] = []
    for p in (0, 1):
        used = [j for j in range(size) if (p + j - left) % 2 == 0]
        if not used:  # a kernel of one position leaves the odd outputs empty
            phases.append(jnp.zeros_like(phases[0]))
            continue
        low, high = ((p + j - left) // 2 for j in (used[0], used[-1]))
        phases.append(conv(x, kernel[used[0] :: 2], (-low - halo, high - halo)))
    return rearrange(jnp.stack(phases, axis=2), "b l phase f -> b (l phase) f")


def halo_of(kernel_size: int, upsample: bool = False) -> int:
    """Positions beyond each end of a sequence that its convolution reads."""
    return (kernel_size + 1) // 4 if upsample else kernel_size // 2


Borders = tuple[jax.Array, jax.Array]


class Conv(nn.Module):
    """Convolution with "SAME" padding; `upsample=True` is the transposed one of stride 2.

    The kernel has shape (kernel_size, in, out) in both cases. With a `segment` the convolution does not cross the
    borders of segments of that many positions.
    """

    features: int
    kernel_size: int
    upsample: bool = False
    segment: int | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, borders: Borders | None = None) -> jax.Array:
        """Map (B, L, C) to (B, L, features), or to (B, 2L, features) when upsampling.

        `borders` are the `halo_of(kernel_size, upsample)` positions (B, halo, C) before and after x, where x is a part
        of a sequence; they replace the padding.
        """
        shape = (self.kernel_size, x.shape[-1], self.features)
        kernel = axes.param(
            self, "kernel", axes.kernel_init, shape, (axes.KERNEL, axes.CHANNEL_IN, axes.CHANNEL)
        )
        bias = axes.param(self, "bias", axes.zeros, (self.features,), (axes.CHANNEL,))
        batch, halo = x.shape[0], 0
        if self.segment is not None and self.kernel_size > 1:
            x = rearrange(x, "b (n l) c -> (b n) l c", l=self.segment)
        elif borders is not None:
            halo = halo_of(self.kernel_size, self.upsample)
            x = jnp.concatenate([borders[0], x, borders[1]], axis=1)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        if self.upsample:
            y = conv_transpose_2x(x, kernel, halo)
        else:
            y = conv(x, kernel, ((self.kernel_size - 1) // 2 - halo, self.kernel_size // 2 - halo))
        return rearrange(y + bias.astype(self.dtype), "(b n) l c -> b (n l) c", b=batch)


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
