"""Levels of sCT's convolution and deconvolution towers.

Source: "A long range foundation model for zero-shot predictions in single-cell and spatial transcriptomics
data", section 3.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from sct.models.sct_config import SCTConfig
from sct.nn import axes
from sct.nn.conv import Conv, halo_of, pool_2x
from sct.nn.norm import LayerNorm, SharedLayerNorm
from sct.nn.pieces import Arrays, known, map_pieces
from sct.nn.plain import at_once, wants_plain

# Name of the outputs of convolutions and matrix products among what the backward pass may keep.
PRODUCT = "product"
# What a level keeps for the backward pass, beside its inputs.
_KEPT: dict[str, Callable[..., bool] | None] = {
    "none": None,
    "products": jax.checkpoint_policies.save_only_these_names(PRODUCT),
    "level": jax.checkpoint_policies.nothing_saveable,
}
# Positions that a level handles at once on CPU: enough for the products to run at full speed.
_POSITIONS_AT_ONCE = 4096


def gelu(x: jax.Array) -> jax.Array:
    """GELU in its tanh form."""
    return jax.nn.gelu(x, approximate=True)


def applied(module: nn.Module, method: str) -> Callable[..., jax.Array]:
    """Make the function (params, *inputs) of a method of an unbound module."""

    def function(params: Any, *inputs: jax.Array | None) -> jax.Array:
        return cast(jax.Array, module.apply({"params": params}, *inputs, method=method))

    return function


class ConvBlock(nn.Module):
    """Norm and convolution, which a GELU follows: the unit of both towers; `upsample` doubles the positions."""

    config: SCTConfig
    features: int
    taps: int
    num_positions: int
    upsample: bool = False

    def setup(self) -> None:
        """Declare norm and convolution."""
        config = self.config
        if config.norm == "layer":
            self.norm: nn.Module = LayerNorm(config.layer_norm_eps)
        elif config.norm != "none":
            self.norm = SharedLayerNorm(self.num_positions, config.norm == "shared", config.layer_norm_eps)
        self.conv = Conv(self.features, self.taps, self.upsample, jnp.dtype(config.dtype))

    def normalise(self, x: jax.Array) -> jax.Array:
        """Norm of whole cells (B, K * G, C)."""
        return x if self.config.norm == "none" else self.norm(x)

    def convolve(self, x: jax.Array, with_halo: bool = False, in_loop: bool = False) -> jax.Array:
        """Map what the norm gave to (B, K * G or 2 K G, features); see `Conv` for halo and loop."""
        if self.config.conv_boundary == "cell" and self.taps > 1:
            halo = halo_of(self.taps, self.upsample) if with_halo else 0
            cells = rearrange(x, "b (k g) c -> (b k) g c", g=self.num_positions)
            y = self.conv(jnp.pad(cells, ((0, 0), (halo, halo), (0, 0))), with_halo, in_loop)
            y = rearrange(y, "(b k) g c -> b (k g) c", b=x.shape[0])
        else:
            y = self.conv(x, with_halo, in_loop)
        return checkpoint_name(y, PRODUCT)


class TowerLevel(nn.Module):
    """One level of a tower: a block that changes the width, and a residual block with a kernel of one.

    A level of the convolution tower halves the number of positions in the end, by pooling; a level of the
    deconvolution tower doubles it first, and adds the skip connection in the end.
    """

    config: SCTConfig
    features: int
    num_positions: int
    upsample: bool = False

    def setup(self) -> None:
        """Declare the blocks."""
        config, positions = self.config, self.num_positions * (2 if self.upsample else 1)
        self.block = ConvBlock(
            config, self.features, config.conv_kernel_size, self.num_positions, self.upsample
        )
        self.residual = ConvBlock(config, self.features, 1, positions)

    def __call__(self, x: jax.Array, skip: jax.Array | None = None) -> jax.Array:
        """Map (B, K * G, C) to (B, K * G / 2 or 2 K G, features); `skip` is added to the latter."""
        config = self.config
        if self.is_initializing():
            return self.whole(x, skip)
        pure = self.clone(parent=None, name=None)

        def level(params: Any, x: jax.Array, skip: jax.Array | None) -> jax.Array:
            # Of a mesh each device sees its own cells here.
            cells = x.shape[1] // self.num_positions
            chunk = _cells_at_once(config, cells, self.num_positions)
            run = (
                applied(pure, "whole") if chunk == cells else functools.partial(_in_pieces, pure, chunk=chunk)
            )
            keeps_itself = chunk < cells and config.remat != "level"
            if config.remat != "none" and not keeps_itself:
                run = jax.checkpoint(run, policy=_KEPT[config.remat])
            return cast(jax.Array, run(params, x, skip))

        cells = x.shape[1] // self.num_positions
        y = axes.on_each_part(level, self.variables["params"], x, skip, cells=cells)
        return axes.constrain(y, axes.BATCH, axes.LENGTH, axes.CHANNEL)

    @property
    def halo(self) -> int:
        """Positions at each end of some cells that their neighbours see."""
        config = self.config
        return 0 if config.conv_boundary == "cell" else halo_of(config.conv_kernel_size, self.upsample)

    def whole(self, x: jax.Array, skip: jax.Array | None) -> jax.Array:
        """All cells at once."""
        y, halo = self.block.normalise(x), self.halo
        if halo and axes.has_neighbours():
            before, behind = axes.neighbours(y, halo)
            product = self.convolve(before, y, behind, in_loop=False)
        else:
            product = self.block.convolve(y)
        return self.join(product, self.refine(product), skip)

    def normalise(self, x: jax.Array) -> jax.Array:
        """First norm, of whole cells."""
        return self.block.normalise(x)

    def convolve(self, left: jax.Array, x: jax.Array, right: jax.Array, in_loop: bool) -> jax.Array:
        """First convolution, of some cells between the border positions of their neighbours."""
        return self.block.convolve(jnp.concatenate([left, x, right], axis=1), True, in_loop)

    def refine(self, product: jax.Array) -> jax.Array:
        """Second norm and product."""
        return self.residual.convolve(self.residual.normalise(gelu(product)))

    def after_norm(self, inputs: Arrays, kept: Arrays | None) -> tuple[jax.Array, Arrays]:
        """What follows the first norm, of some cells between the border positions of their neighbours.

        `inputs` are the left border, the cells, the right border, and the skip connection if there is one; the
        products are given beside the result, and taken from `kept` if they are known.
        """
        left, x, right, *skip = inputs
        product = self.convolve(left, x, right, in_loop=True)
        product = product if kept is None else known(product, kept[0])
        refined = self.refine(product)
        refined = refined if kept is None else known(refined, kept[1])
        return self.join(product, refined, *skip), (product, refined)

    def join(self, product: jax.Array, refined: jax.Array, skip: jax.Array | None = None) -> jax.Array:
        """Add the blocks, and pool or add the skip connection."""
        y = gelu(product) + gelu(refined)
        if not self.upsample:
            return pool_2x(y, self.config.pool)
        return y if skip is None else y + skip


@dataclasses.dataclass(frozen=True)
class _Normalise:
    """First norm of a level as a function of parameters and of one piece of a bag."""

    level: TowerLevel

    def __call__(self, params: Any, inputs: Arrays, kept: Arrays | None) -> tuple[jax.Array, Arrays]:
        return cast(jax.Array, self.level.apply({"params": params}, *inputs, method="normalise")), ()


@dataclasses.dataclass(frozen=True)
class _AfterNorm:
    """What follows it."""

    level: TowerLevel

    def __call__(self, params: Any, inputs: Arrays, kept: Arrays | None) -> tuple[jax.Array, Arrays]:
        result = self.level.apply({"params": params}, inputs, kept, method="after_norm")
        return cast(tuple[jax.Array, Arrays], result)


def _in_pieces(level: TowerLevel, params: Any, x: jax.Array, skip: jax.Array | None, chunk: int) -> jax.Array:
    """A level, some cells after the other; a piece sees the border positions of its neighbours."""
    batch = x.shape[0]
    pieces = x.shape[1] // level.num_positions // chunk

    def split(x: jax.Array) -> jax.Array:
        return rearrange(x, "b (n l) c -> (b n) 1 l c", n=pieces)

    def border(x: jax.Array) -> jax.Array:
        return rearrange(x, "b n l c -> (b n) 1 l c")

    config, block = level.config, params["block"]
    norm = {"block": {name: block[name] for name in block if name == "norm"}}
    rest = {"block": {"conv": block["conv"]}, "residual": params["residual"]}
    main = split(x)
    if config.norm != "none":
        main = map_pieces(_Normalise(level), False, norm, (main,))
    ends = rearrange(main, "(b n) 1 l c -> b n l c", b=batch)
    before, behind = axes.neighbours(rearrange(ends, "b n l c -> b (n l) c"), level.halo)
    left = jnp.concatenate([before[:, None], ends[:, :-1, ends.shape[2] - level.halo :]], axis=1)
    right = jnp.concatenate([ends[:, 1:, : level.halo], behind[:, None]], axis=1)
    inputs = (border(left), main, border(right), *([] if skip is None else [split(skip)]))
    y = map_pieces(_AfterNorm(level), config.remat != "level", rest, inputs)
    return rearrange(y, "(b n) 1 l c -> b (n l) c", b=batch)


def _cells_at_once(config: SCTConfig, cells: int, positions: int) -> int:
    """Cells of `positions` that a level handles at once, a divisor of the `cells` of a bag.

    On CPU a level goes through a bag in pieces, which stay in the cache and need little memory; what lies between
    its products costs half as much then (docs/performance.md). Elsewhere it takes the bag at once. On a mesh a
    bag is the device's part of it.
    """
    if wants_plain() or jax.default_backend() != "cpu" or axes.is_split():
        return cells
    fitting = (n for n in range(1, cells) if cells % n == 0 and n * positions >= at_once(_POSITIONS_AT_ONCE))
    return next(fitting, cells)
