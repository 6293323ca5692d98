"""sCT (sCellTransformer): a UNet of convolutions around a transformer, over the genes of many cells.

Source: "A long range foundation model for zero-shot predictions in single-cell and spatial transcriptomics
data", section 3. Where the text and the published checkpoint differ the flags of `SCTConfig` name both.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from sct.errors import ConfigError, DataError
from sct.nn import axes
from sct.nn.attention import TransformerBlock
from sct.nn.conv import Conv, halo_of, pool_2x
from sct.nn.linear import Embed, Linear
from sct.nn.norm import EPSILON, LayerNorm, SharedLayerNorm
from sct.nn.pieces import map_pieces
from sct.nn.plain import wants_plain
from sct.nn.spatial import spatial_features

_CHOICES = {
    "norm": ("shared", "shared_fixed", "layer", "none"),
    "pool": ("avg", "max"),
    "conv_boundary": ("flat", "cell"),
    "spatial_encoding": ("paper", "reference"),
    "remat": ("none", "products", "level"),
    "dtype": ("float32", "bfloat16", "float16"),
}
_LEAST = {
    "num_genes": 1,
    "num_bins": 2,
    "token_embed_dim": 1,
    "embed_dim": 1,
    "num_downsamples": 1,
    "num_layers": 0,
    "num_heads": 1,
    "ffn_dim": 1,
    "num_hidden_layers_head": 0,
    "stem_taps": 1,
    "conv_taps": 1,
    "num_scales": 1,
}


@dataclasses.dataclass(frozen=True)
class SCTConfig:
    """Architecture of sCT; the defaults are the published model at 19,968 gene positions.

    Parameters
    ----------
    num_genes
        Gene positions of a cell, a multiple of 2 ** num_downsamples (pad the vocabulary up to it).
    num_bins
        Expression levels, zero included (5: unexpressed and four levels). PAD is `num_bins`, MASK is
        `num_bins + 1`, the alphabet has `num_bins + 2` tokens.
    token_embed_dim, embed_dim
        Width before the tower and in the transformer; widths between them grow linearly.
    num_downsamples
        Levels of the tower; each halves the number of positions.
    num_layers, num_heads, ffn_dim
        Transformer blocks, heads, and width of the gated feed-forward.
    num_hidden_layers_head
        Hidden layers of the head, each `embed_dim` wide.
    stem_taps, conv_taps
        Kernel lengths of the stem and of the towers.
    use_skip_connection
        Whether a level's input is added to the matching level of the deconvolution tower.
    norm
        "shared" (the paper), "shared_fixed" (no learnable scale and bias), "layer" or "none".
    pool
        "avg" as in the published checkpoint, "max" as in the paper's text.
    conv_boundary
        "flat": convolutions run over the flat cells-by-genes sequence and see across cell borders, as in the
        paper; "cell": they stay inside a cell.
    rotary
        Rotary position embedding over the whole flat sequence; False makes the transformer blind to order.
    use_spatial, spatial_encoding, num_scales, sigma_min, sigma_max
        Encoding of coordinates, see `sct.nn.spatial.spatial_features`.
    layer_norm_eps
        Epsilon of every norm.
    remat
        What levels and blocks keep for the backward pass beside their inputs: "level" nothing, the least memory;
        "products" the outputs of convolutions and matrix products, so that only what is cheap is computed again;
        "none" everything.
    dtype
        Type of the computation; parameters, norms and logits stay float32.
    """

    num_genes: int = 19_968
    num_bins: int = 5
    token_embed_dim: int = 64
    embed_dim: int = 1024
    num_downsamples: int = 8
    num_layers: int = 4
    num_heads: int = 16
    ffn_dim: int = 2048
    num_hidden_layers_head: int = 1
    stem_taps: int = 15
    conv_taps: int = 5
    use_skip_connection: bool = True
    norm: str = "shared"
    pool: str = "avg"
    conv_boundary: str = "flat"
    rotary: bool = True
    use_spatial: bool = False
    spatial_encoding: str = "paper"
    num_scales: int = 10
    sigma_min: float = 1.0
    sigma_max: float = 10.0
    layer_norm_eps: float = EPSILON
    remat: str = "none"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for field, choices in _CHOICES.items():
            if getattr(self, field) not in choices:
                raise ConfigError(f"{field}={getattr(self, field)!r} is not one of {', '.join(choices)}.")
        for field, least in _LEAST.items():
            if getattr(self, field) < least:
                raise ConfigError(f"{field} is {getattr(self, field)}, but it must be at least {least}.")
        if self.num_bins > 254:
            raise ConfigError(f"num_bins is {self.num_bins}, but tokens are bytes: use at most 254.")
        if not 0 < self.sigma_min <= self.sigma_max:
            raise ConfigError(
                f"sigma_min is {self.sigma_min} and sigma_max is {self.sigma_max}, but 0 < sigma_min <= "
                "sigma_max is needed."
            )
        if self.num_genes % 2**self.num_downsamples:
            raise ConfigError(
                f"num_genes is {self.num_genes}, but {self.num_downsamples} downsamples need a multiple of "
                f"{2**self.num_downsamples}: use {pad_to_multiple(self.num_genes, self.num_downsamples)}."
            )
        if self.use_skip_connection and self.token_embed_dim % 32:
            raise ConfigError(
                f"token_embed_dim is {self.token_embed_dim}, but skip connections need a multiple of 32."
            )
        if self.embed_dim % (2 * self.num_heads) or self.embed_dim % 32:
            raise ConfigError(
                f"embed_dim is {self.embed_dim}, but it must be a multiple of 32 and of twice num_heads "
                f"({2 * self.num_heads})."
            )

    @classmethod
    def fit(cls, values: Mapping[str, Any], num_genes: int) -> dict[str, Any]:
        """Values of a configuration with `num_genes` 0 or absent replaced by a vocabulary's size, padded."""
        levels = values.get("num_downsamples", cls.num_downsamples)
        if not isinstance(levels, int):
            raise ConfigError(f"num_downsamples is {levels!r}, but a whole number is needed.")
        return {**values, "num_genes": values.get("num_genes") or pad_to_multiple(num_genes, levels)}

    @property
    def pad(self) -> int:
        """Token of a gene position or cell that is not there."""
        return self.num_bins

    @property
    def mask(self) -> int:
        """Token of a masked position."""
        return self.num_bins + 1

    @property
    def filters(self) -> tuple[int, ...]:
        """Widths at the borders of the levels: `num_downsamples + 1` numbers, multiples of 32."""
        widths = np.linspace(self.token_embed_dim, self.embed_dim, self.num_downsamples + 1)
        return tuple(int(32 * np.ceil(width / 32)) for width in widths)


def pad_to_multiple(num_genes: int, num_downsamples: int) -> int:
    """Smallest number of gene positions >= `num_genes` that `num_downsamples` halvings divide."""
    step = 2**num_downsamples
    return -(-num_genes // step) * step


def _check_range(name: str, values: Any, most: int) -> None:
    """Raise `DataError` for integers outside of 0 .. `most`, which an index would silently clip."""
    if not jnp.issubdtype(values.dtype, jnp.integer):
        raise DataError(f"{name} are {values.dtype}, but integers are needed.")
    if isinstance(values, jax.core.Tracer) or not getattr(values, "is_fully_addressable", True):
        return
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    if low < 0 or high > most:
        raise DataError(f"{name} reach from {low} to {high}, but 0 to {most} is what the model knows.")


def level_probabilities(config: SCTConfig) -> Callable[[Any, jax.Array, jax.Array | None], jax.Array]:
    """Make the function (variables, tokens (B, K, G), coordinates) -> probabilities of levels (B, K, G, num_bins)."""
    module = SCT(config)

    def probabilities(variables: Any, tokens: jax.Array, coordinates: jax.Array | None) -> jax.Array:
        outputs = cast(dict[str, jax.Array], module.apply(variables, tokens, coordinates))
        return jax.nn.softmax(outputs["logits"][..., : config.num_bins], axis=-1)

    return probabilities


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


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


class ConvBlock(nn.Module):
    """Norm, convolution, GELU: the unit of both towers; `upsample` doubles the number of positions."""

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

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, K * G, C) to (B, K * G or 2 K G, features); G is `num_positions`."""
        return _gelu(self.convolve(self.normalise(x)))

    def normalise(self, x: jax.Array) -> jax.Array:
        """Norm of whole cells (B, K * G, C)."""
        return x if self.config.norm == "none" else self.norm(x)

    def convolve(self, x: jax.Array, with_halo: bool = False) -> jax.Array:
        """Convolution of what the norm gave; see `Conv` for the halo."""
        if self.config.conv_boundary == "cell" and self.taps > 1:
            halo = halo_of(self.taps, self.upsample) if with_halo else 0
            cells = x.reshape(-1, self.num_positions, x.shape[-1])
            y = self.conv(jnp.pad(cells, ((0, 0), (halo, halo), (0, 0))), with_halo)
            y = y.reshape(x.shape[0], -1, self.features)
        else:
            y = self.conv(x, with_halo)
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
        self.block = ConvBlock(config, self.features, config.conv_taps, self.num_positions, self.upsample)
        self.residual = ConvBlock(config, self.features, 1, positions)

    def __call__(self, x: jax.Array, skip: jax.Array | None = None) -> jax.Array:
        """Map (B, K * G, C) to (B, K * G / 2 or 2 K G, features); `skip` is added to the latter."""
        config = self.config
        if self.is_initializing():
            return self.whole(x, skip)
        pure = self.clone(parent=None, name=None)

        def whole(params: Any, x: jax.Array, skip: jax.Array | None) -> jax.Array:
            return cast(jax.Array, pure.apply({"params": params}, x, skip, method="whole"))

        def level(params: Any, x: jax.Array, skip: jax.Array | None) -> jax.Array:
            # Of a mesh each device sees its own cells here.
            cells = x.shape[1] // self.num_positions
            chunk = _cells_at_once(config, cells, self.num_positions)
            run = whole if chunk == cells else functools.partial(_in_pieces, pure, chunk=chunk)
            keeps_itself = chunk < cells and config.remat == "products"
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
        return 0 if config.conv_boundary == "cell" else halo_of(config.conv_taps, self.upsample)

    def whole(self, x: jax.Array, skip: jax.Array | None) -> jax.Array:
        """All cells at once."""
        y, halo = self.block.normalise(x), self.halo
        if halo and axes.has_neighbours():
            before, behind = axes.neighbours(y, halo)
            product = self.convolve(before, y, behind)
        else:
            product = self.block.convolve(y)
        return self.join(product, self.refine(product), skip)

    def normalise(self, x: jax.Array) -> jax.Array:
        """First norm, of whole cells."""
        return self.block.normalise(x)

    def convolve(self, left: jax.Array, x: jax.Array, right: jax.Array) -> jax.Array:
        """First convolution, of some cells between the border positions of their neighbours."""
        return self.block.convolve(jnp.concatenate([left, x, right], axis=1), with_halo=True)

    def refine(self, product: jax.Array) -> jax.Array:
        """Second norm and product."""
        return self.residual.convolve(self.residual.normalise(_gelu(product)))

    def after_norm(self, left: jax.Array, x: jax.Array, right: jax.Array, *skip: jax.Array) -> jax.Array:
        """What follows the first norm, of some cells between the border positions of their neighbours."""
        product = self.convolve(left, x, right)
        return self.join(product, self.refine(product), *skip)

    def join(self, product: jax.Array, refined: jax.Array, skip: jax.Array | None = None) -> jax.Array:
        """Add the blocks, and pool or add the skip connection."""
        y = _gelu(product) + _gelu(refined)
        if not self.upsample:
            return pool_2x(y, self.config.pool)
        return y if skip is None else y + skip


@dataclasses.dataclass(frozen=True)
class _Stage:
    """A method of a level as a function of parameters and of the inputs of one piece of a bag."""

    level: TowerLevel
    method: str

    def __call__(self, params: Any, inputs: tuple[jax.Array, ...]) -> jax.Array:
        return cast(jax.Array, self.level.apply({"params": params}, *inputs, method=self.method))


def _in_pieces(level: TowerLevel, params: Any, x: jax.Array, skip: jax.Array | None, chunk: int) -> jax.Array:
    """A level, some cells after the other; a piece sees the border positions of its neighbours."""
    batch, length, width = x.shape
    pieces = length // level.num_positions // chunk

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(batch * pieces, 1, -1, x.shape[-1])

    def run(method: str, blocks: dict[str, Any], *inputs: jax.Array) -> jax.Array:
        return map_pieces(_Stage(level, method), blocks, inputs)

    config, block = level.config, params["block"]
    norm = {"block": {name: block[name] for name in block if name == "norm"}}
    first, second = {"block": {"conv": block["conv"]}}, {"residual": params["residual"]}
    main = split(x) if config.norm == "none" else run("normalise", norm, split(x))
    ends = main.reshape(batch, pieces, -1, width)
    before, behind = axes.neighbours(main.reshape(batch, -1, width), level.halo)
    left = jnp.concatenate([before[:, None], ends[:, :-1, ends.shape[2] - level.halo :]], axis=1)
    right = jnp.concatenate([ends[:, 1:, : level.halo], behind[:, None]], axis=1)
    inputs, added = (split(left), main, split(right)), [] if skip is None else [split(skip)]
    if config.remat == "products":
        product = run("convolve", first, *inputs)
        refined = run("refine", second, product)
        y = run("join", {}, product, refined, *added)
    else:
        y = run("after_norm", first | second, *inputs, *added)
    return y.reshape(batch, -1, level.features)


def _cells_at_once(config: SCTConfig, cells: int, positions: int) -> int:
    """Cells of `positions` that a level handles at once, a divisor of the `cells` of a bag.

    On CPU a level goes through a bag in pieces, which stay in the cache and need little memory; what lies between
    its products costs half as much then (docs/performance.md). Elsewhere it takes the bag at once.
    On a mesh a bag is the device's part of it.
    """
    if wants_plain() or config.remat == "none" or jax.default_backend() != "cpu" or axes.is_split():
        return cells
    fitting = (n for n in range(1, cells) if cells % n == 0 and n * positions >= _POSITIONS_AT_ONCE)
    return next(fitting, cells)


class Stem(nn.Module):
    """Convolution with a long kernel over the embedded tokens, then GELU."""

    config: SCTConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, K * G, token_embed_dim) to (B, K * G, filters[0])."""
        config = self.config
        layer = Conv(config.filters[0], config.stem_taps, dtype=jnp.dtype(config.dtype), name="conv")
        if config.conv_boundary == "cell":
            cells = layer(x.reshape(-1, config.num_genes, x.shape[-1]))
            return jax.nn.gelu(cells.reshape(x.shape[0], -1, config.filters[0]), approximate=True)
        return jax.nn.gelu(layer(x), approximate=True)


class Head(nn.Module):
    """GELU, then hidden layers with GELU, then logits of the alphabet in float32."""

    config: SCTConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (..., filters[0]) to (..., num_bins + 2)."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        x = jax.nn.gelu(x, approximate=True)
        for layer in range(config.num_hidden_layers_head):
            x = Linear(config.embed_dim, dtype=dtype, name=f"hidden_{layer}")(x)
            x = jax.nn.gelu(x, approximate=True)
        return Linear(config.num_bins + 2, dtype=dtype, name="logits")(x).astype(jnp.float32)


class SCT(nn.Module):
    """The whole model; see `SCTConfig`."""

    config: SCTConfig
    outputs: ClassVar[tuple[str, ...]] = ("logits", "cell_embedding")
    intermediates: ClassVar[tuple[str, ...]] = ("conv_out", "transformer_out", "deconv_out")

    @staticmethod
    def example(config: SCTConfig) -> dict[str, jax.Array]:
        """Smallest inputs of a call, by name."""
        return {"tokens": jnp.zeros((1, 1, config.num_genes), jnp.uint8)}

    @staticmethod
    def flops(config: SCTConfig, batch: int, cells: int, head_positions: int | None = None) -> float:
        """Operations of the matrix products and convolutions of one forward pass; a multiply-add counts as two.

        Parameters
        ----------
        config
            Architecture.
        batch, cells
            Bags (B) and cells of each (K).
        head_positions
            Positions of a bag at which the head is evaluated; None for all of them.
        """
        filters, levels = config.filters, config.num_downsamples
        length = cells * config.num_genes
        total: float = length * config.stem_taps * config.token_embed_dim * filters[0]
        for i in range(levels):
            narrow, wide = filters[i], filters[i + 1]
            down = (length >> i) * (config.conv_taps * narrow * wide + wide**2)
            # Half of the taps of a transposed convolution of stride 2 meet an inserted zero.
            up = (length >> i) * (config.conv_taps * narrow * wide / 2 + narrow**2)
            total += down + up
        inner, width = length >> levels, config.embed_dim
        block = 4 * width**2 + 2 * inner * width + 3 * width * config.ffn_dim
        total += config.num_layers * inner * block
        hidden = [filters[0], *([width] * config.num_hidden_layers_head), config.num_bins + 2]
        head = sum(into * out for into, out in itertools.pairwise(hidden))
        total += (length if head_positions is None else head_positions) * head
        return 2.0 * batch * total

    @staticmethod
    def check_inputs(config: SCTConfig, inputs: Mapping[str, Any]) -> None:
        """Raise `DataError` unless the inputs fit; values are looked at where they are known (not traced)."""
        tokens = inputs["tokens"]
        if tokens.ndim != 3 or not jnp.issubdtype(tokens.dtype, jnp.integer) or not tokens.size:
            raise DataError(
                f"tokens are {tokens.dtype} of shape {tokens.shape}, but integers (bags, cells, "
                f"{config.num_genes} gene positions), none of them zero, are needed."
            )
        batch, cells, genes = tokens.shape
        if genes != config.num_genes:
            raise DataError(
                f"tokens have {genes} gene positions, but the model has {config.num_genes}: pad with token "
                f"{config.pad} in the model's order of genes."
            )
        _check_range("tokens", tokens, config.mask)
        for name, last in (("coordinates", 2), ("positions", None)):
            value = inputs.get(name)
            if value is None:
                continue
            fits = value.ndim == 2 and value.shape[0] == batch
            if last is not None:
                fits = value.shape == (batch, cells, last)
            if not fits:
                wanted = f"({batch}, {cells}, {last})" if last else f"({batch}, any number)"
                raise DataError(
                    f"{name} have the shape {value.shape}, but {wanted} is needed for the tokens."
                )
        if inputs.get("coordinates") is not None and not config.use_spatial:
            raise DataError("coordinates were given, but the model has no spatial encoding: leave them out.")
        if inputs.get("positions") is not None:
            _check_range("positions", inputs["positions"], cells * genes - 1)

    def setup(self) -> None:
        """Declare the parts, named as in the paper."""
        config = self.config
        dtype = jnp.dtype(config.dtype)
        block = TransformerBlock if config.remat == "none" else nn.remat(TransformerBlock)
        filters, genes = config.filters, config.num_genes
        self.token_embed = Embed(config.num_bins + 2, config.token_embed_dim, dtype)
        if config.use_spatial:
            # Zero, so that training on spatial data continues exactly where training on cells stopped.
            self.spatial = Linear(config.token_embed_dim, dtype=jnp.float32, kernel_init=axes.zeros)
        self.stem = Stem(config)
        self.down = [TowerLevel(config, filters[i + 1], genes >> i) for i in range(config.num_downsamples)]
        self.transformer = [
            block(config.num_heads, config.ffn_dim, config.rotary, config.layer_norm_eps, dtype)
            for _ in range(config.num_layers)
        ]
        inwards = reversed(range(config.num_downsamples))  # level 0 of the way up is the innermost
        self.up = [TowerLevel(config, filters[i], genes >> (i + 1), True) for i in inwards]
        self.head = Head(config)

    def embed(self, tokens: jax.Array, coordinates: jax.Array | None = None) -> jax.Array:
        """Embed tokens (B, K, G), and coordinates (B, K, 2) if any, as (B, K * G, token_embed_dim)."""
        config = self.config
        batch, cells, genes = tokens.shape
        if genes != config.num_genes:
            raise ConfigError(f"tokens have {genes} gene positions, but the model has {config.num_genes}.")
        x = self.token_embed(tokens)
        if config.use_spatial:
            if coordinates is None:
                # The term is zero for data without coordinates; the call declares the parameters.
                self.spatial(jnp.zeros((batch, cells, self._spatial_width())))
            else:
                present = jnp.isfinite(coordinates).all(axis=-1, keepdims=True)
                features = spatial_features(
                    jnp.where(present, coordinates, 0.0),
                    config.num_scales,
                    config.sigma_min,
                    config.sigma_max,
                    config.spatial_encoding,
                )
                x = x + jnp.where(present, self.spatial(features), 0.0).astype(x.dtype)[:, :, None, :]
        elif coordinates is not None:
            raise ConfigError("coordinates were given, but the model was built with use_spatial=False.")
        return x.reshape(batch, cells * genes, config.token_embed_dim)

    def _spatial_width(self) -> int:
        return self.config.num_scales * (4 if self.config.spatial_encoding == "paper" else 2)

    def encode(self, x: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """Stem and convolution tower: (B, K * G / 2^n, embed_dim) and the inputs of the levels."""
        x = self.stem(x)
        skips = []
        for level in self.down:
            skips.append(x)
            x = level(x)
        return x, skips

    def decode(self, x: jax.Array, skips: list[jax.Array]) -> jax.Array:
        """Deconvolution tower: (B, K * G, filters[0])."""
        for level, skip in zip(self.up, reversed(skips), strict=True):
            x = level(x, skip if self.config.use_skip_connection else None)
        return x

    def __call__(
        self,
        tokens: jax.Array,
        coordinates: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> dict[str, jax.Array]:
        """Compute logits, cell embeddings and the activations between the parts.

        Parameters
        ----------
        tokens
            Integers (B, K, G): 0 unexpressed, 1 .. num_bins - 1 levels, PAD, MASK.
        coordinates
            Rescaled positions of the cells (B, K, 2), for models with `use_spatial`; NaN for a cell without a
            position, whose spatial term is zero.
        positions
            Flat positions (B, P) in the K * G sequence at which to evaluate the head; None for all. Or (B, S, P)
            in S equal parts of it, each counted from the part's start, so that devices look at their own.

        Returns
        -------
        `logits` float32 (B, K, G, num_bins + 2), or those at `positions`, with num_bins + 2 as a further axis;
        `cell_embedding` float32 (B, K, embed_dim): the mean over a cell's transformer positions; `conv_out`,
        `transformer_out` (B, K G / 2^n, embed_dim); `deconv_out` (B, K G, filters[0]).
        """
        batch, cells, genes = tokens.shape
        conv_out, skips = self.encode(self.embed(tokens, coordinates))
        x = conv_out
        for block in self.transformer:
            x = axes.constrain(block(x), axes.BATCH, axes.LENGTH, axes.EMBED)
        deconv_out = self.decode(x, skips)
        if positions is None:
            logits = self.head(deconv_out).reshape(batch, cells, genes, -1)
        else:
            parts = positions.reshape(batch, -1, positions.shape[-1])
            rows = deconv_out.reshape(batch, parts.shape[1], -1, deconv_out.shape[-1])
            chosen = jnp.take_along_axis(rows, parts[..., None], axis=2)
            chosen = axes.constrain(chosen, axes.BATCH, axes.CELL, None, None)
            logits = self.head(chosen.reshape(*positions.shape, -1))
        embedding = x.astype(jnp.float32).reshape(batch, cells, -1, x.shape[-1]).mean(axis=2)
        return {
            "logits": logits,
            "cell_embedding": embedding,
            "conv_out": conv_out,
            "transformer_out": x,
            "deconv_out": deconv_out,
        }
