"""Define one-dimensional convolutions over sequences whose last axis is the channel axis."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.typing import DTypeLike

from sct.nn import axes, target
from sct.nn.chunked_map import inside_chunk, saveable
from sct.nn.reference import use_reference

_DIMENSIONS = ("NWC", "WIO", "NWC")


def conv(x: jax.Array, kernel: jax.Array, padding: tuple[int, int] | None = None) -> jax.Array:
    """Convolve x (B, L, C) with a kernel (k, C, F) at stride 1 and return (B, L, F).

    `padding` is a pair: the number of zeros to add before the sequence, and the number to add after it. A negative
    number removes positions instead. The default is "SAME" padding. With another padding, the length of the output
    changes accordingly.
    """
    size = kernel.shape[0]
    pads = ((size - 1) // 2, size // 2) if padding is None else padding
    if use_reference():
        return _library_conv(x, kernel, pads)
    if size == 1:
        return jnp.einsum("blc,cf->blf", x, kernel[0])
    if inside_chunk() and target.platform() == "cpu":
        return _conv_in_loop(x, kernel, pads)
    return _library_conv(x, kernel, pads)


def _library_conv(x: jax.Array, kernel: jax.Array, pads: tuple[int, int]) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, (1,), [pads], dimension_numbers=_DIMENSIONS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv_in_loop(x: jax.Array, kernel: jax.Array, pads: tuple[int, int]) -> jax.Array:
    """Convolve as `_library_conv` does, but compute the kernel's gradient as one matrix product per kernel position.

    Inside a loop, XLA for CPU (jax 0.10) computes this gradient as a convolution with a kernel as long as the sequence.
    The convolution runs at 5 GFLOP/s, while the matrix products run at more than 100 GFLOP/s.
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
    """Apply a transposed convolution with stride 2 and "SAME" padding: (B, L, C) -> (B, 2L, F).

    The output equals `lax.conv_transpose(x, kernel, (2,), "SAME")`. The output is computed by two stride-1
    convolutions, one for the even and one for the odd output positions. On CPU, the gradient of the strided convolution
    runs at 3 GFLOP/s. The two stride-1 convolutions avoid this slow gradient, because their gradient is that of an
    ordinary convolution.

    Output position 2m + p is the sum of kernel[j] * x[m + (p + j - a) / 2] over the kernel positions j for which p + j
    - a is even. In this formula, a is the left padding of the dilated input.

    Parameters
    ----------
    x
        Sequence (B, L, C). With a halo, its shape is (B, halo + L + halo, C).
    kernel
        Shape (k, C, F).
    halo
        Number of positions at each end of x that come from the neighboring parts of the sequence. The positions of the
        halo replace the padding.
    """
    size = kernel.shape[0]
    left = -(-size // 2) if size > 1 else 0  # left padding of the dilated input under "SAME", stride 2
    if use_reference():
        dilated = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (0, 0, 1), (0, 0, 0)])
        return _library_conv(dilated, kernel, (left, size - left))
    phases: list[jax.Array] = []
    for p in (0, 1):
        used = [j for j in range(size) if (p + j - left) % 2 == 0]
        if not used:  # a kernel of size 1 reaches no odd output position
            phases.append(jnp.zeros_like(phases[0]))
            continue
        low, high = ((p + j - left) // 2 for j in (used[0], used[-1]))
        phases.append(conv(x, kernel[used[0] :: 2], (-low - halo, high - halo)))
    return rearrange(jnp.stack(phases, axis=2), "b l phase f -> b (l phase) f")


def halo_of(kernel_size: int, upsample: bool = False) -> int:
    """Return the number of positions that a convolution reads beyond each end of its part of a sequence.

    `upsample` is True for the transposed convolution of stride 2.
    """
    return (kernel_size + 1) // 4 if upsample else kernel_size // 2


Borders = tuple[jax.Array, jax.Array]


class Conv(nn.Module):
    """Convolution with "SAME" padding. With `upsample=True`, it is a transposed convolution of stride 2.

    The kernel has the shape (kernel_size, in, out) in both cases. If `segment` is set, the sequence is cut into
    segments of that many positions, and the convolution does not read across their borders.
    """

    features: int
    kernel_size: int
    upsample: bool = False
    segment: int | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, borders: Borders | None = None) -> jax.Array:
        """Convolve x (B, L, C) and return (B, L, features), or (B, 2L, features) with `upsample`.

        If x is a part of a longer sequence, `borders` is a pair of arrays (B, halo, C): the vectors directly before and
        directly after x, with halo = `halo_of(kernel_size, upsample)`. The borders replace the padding.
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
        bias = bias.astype(self.dtype)
        # With kernel size 1 (a matrix product), the result is saved without the bias, and the next pass over memory
        # also adds the bias. With larger kernels, cuDNN adds the bias itself.
        y = saveable(y) + bias if self.kernel_size == 1 else saveable(y + bias)
        return rearrange(y, "(b n) l c -> b (n l) c", b=batch)


def pool_2x(x: jax.Array, kind: str) -> jax.Array:
    """Pool pairs of neighboring positions: (B, L, C) -> (B, L / 2, C). `kind` is "avg" or "max"."""
    pairs = rearrange(x, "b (l pair) c -> b l pair c", pair=2)
    if kind == "avg":
        # On CPU, `mean` over two numbers is ten times slower than this sum.
        return (pairs[:, :, 0] + pairs[:, :, 1]) * 0.5
    # The gradient of `max` divides by the number of values that equal the maximum. That number is zero if the compiler
    # recomputes the input with other rounding (seen on CPU at a low optimization level). `where` has no such division.
    first, second = pairs[:, :, 0], pairs[:, :, 1]
    return jnp.where(first < second, second, first)
