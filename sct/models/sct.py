"""sCT (sCellTransformer): a UNet of convolutions around a transformer, over the genes of many cells.

Source: "A long range foundation model for zero-shot predictions in single-cell and spatial transcriptomics data",
section 3. Where its text and the published checkpoint differ, an option of `SCTConfig` has both.

    tokens (B, K, G) -> embeddings (B, K * G, 64) -> stem -> convolution tower (B, K * G / 256, 1024)
                     -> transformer -> deconvolution tower with skip connections (B, K * G, 64) -> head (B, K, G, 7)

B bags, K cells in a bag, G gene positions; widths of the published model. How the layers run (devices, chunks, what is
saved for the gradient) stands in `sct.nn.execution`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, reduce

from sct.errors import ConfigError, DataError
from sct.models.checks import check_range
from sct.models.sct_config import SCTConfig
from sct.nn import axes
from sct.nn.attention import TransformerBlock
from sct.nn.chunked_map import saveable
from sct.nn.conv import Borders, Conv, halo_of, pool_2x
from sct.nn.execution import by_cells, by_positions, rematerialized
from sct.nn.linear import Embed, Linear
from sct.nn.norm import LayerNorm, SharedLayerNorm
from sct.nn.spatial import spatial_features


def gelu(x: jax.Array) -> jax.Array:
    """GELU in its tanh form."""
    return jax.nn.gelu(x, approximate=True)


class Stem(nn.Module):
    """Convolution with a long kernel over the embedded tokens, then GELU."""

    config: SCTConfig

    def setup(self) -> None:
        """Declare the convolution."""
        config = self.config
        cell = config.num_genes if config.conv_boundary == "cell" else None
        dtype = jnp.dtype(config.dtype)
        self.conv = Conv(config.filters[0], config.stem_kernel_size, segment=cell, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, K * G, token_embed_dim) to (B, K * G, filters[0])."""
        halo = 0 if self.config.conv_boundary == "cell" else halo_of(self.config.stem_kernel_size)
        return by_cells(self, x, num_positions=self.config.num_genes, halo=halo, chunked=False)

    def normalize(self, x: jax.Array) -> jax.Array:
        """Return x: the stem has no norm."""
        return x

    def convolve(self, x: jax.Array, borders: Borders | None, skip: None) -> jax.Array:
        """Convolution and GELU."""
        return gelu(self.conv(x, borders))


class ConvBlock(nn.Module):
    """Norm and convolution, the unit of both towers; a GELU follows. `upsample` doubles the positions."""

    config: SCTConfig
    features: int
    kernel_size: int
    num_positions: int
    upsample: bool = False

    def setup(self) -> None:
        """Declare norm and convolution."""
        config, positions = self.config, self.num_positions
        if config.norm == "layer":
            self.norm: nn.Module = LayerNorm(config.layer_norm_eps)
        elif config.norm != "none":
            self.norm = SharedLayerNorm(positions, config.norm == "shared", config.layer_norm_eps)
        cell = positions if config.conv_boundary == "cell" else None
        dtype = jnp.dtype(config.dtype)
        self.conv = Conv(self.features, self.kernel_size, self.upsample, cell, dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, K * G, C) to (B, K * G, features), or to (B, 2 K * G, features)."""
        return self.convolve(self.normalize(x))

    def normalize(self, x: jax.Array) -> jax.Array:
        """Normalize each cell of (B, K * G, C)."""
        return x if self.config.norm == "none" else self.norm(x)

    def convolve(self, x: jax.Array, borders: Borders | None = None) -> jax.Array:
        """Convolve the normalized sequence (B, K * G, C); for its borders see `Conv`."""
        return saveable(self.conv(x, borders))


class TowerLevel(nn.Module):
    """Level of a tower: a block that changes the width, then a residual block with a kernel of one.

        h = conv(norm(x));  y = GELU(h) + GELU(conv_1(norm(GELU(h))))

    In the convolution tower the level ends with pooling, which halves the positions. In the deconvolution tower `conv`
    is transposed, which doubles them, and the level ends by adding the skip connection.
    """

    config: SCTConfig
    features: int
    num_positions: int
    upsample: bool = False

    def setup(self) -> None:
        """Declare the blocks."""
        config, positions = self.config, self.num_positions
        self.block = ConvBlock(config, self.features, config.conv_kernel_size, positions, self.upsample)
        self.residual = ConvBlock(config, self.features, 1, positions * 2 if self.upsample else positions)

    def __call__(self, x: jax.Array, skip: jax.Array | None = None) -> jax.Array:
        """Map (B, K * G, C) to (B, K * G / 2, features), or with `upsample` to (B, 2 K * G, features)."""
        config = self.config
        halo = 0 if config.conv_boundary == "cell" else halo_of(config.conv_kernel_size, self.upsample)
        y = by_cells(self, x, skip, num_positions=self.num_positions, halo=halo, remat=config.remat)
        return axes.constrain(y, axes.BATCH, axes.LENGTH, axes.CHANNEL)

    def normalize(self, x: jax.Array) -> jax.Array:
        """First norm."""
        return self.block.normalize(x)

    def convolve(self, x: jax.Array, borders: Borders | None, skip: jax.Array | None) -> jax.Array:
        """All that follows the first norm."""
        h = self.block.convolve(x, borders)
        y = gelu(h) + gelu(self.residual(gelu(h)))
        if not self.upsample:
            return pool_2x(y, self.config.pool)
        return y if skip is None else y + skip


class Head(nn.Module):
    """GELU, then hidden layers with GELU, then logits of the alphabet in float32."""

    config: SCTConfig

    def setup(self) -> None:
        """Declare the layers."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        for layer in range(config.num_hidden_layers_head):
            setattr(self, f"hidden_{layer}", Linear(config.embed_dim, dtype=dtype))
        self.logits = Linear(config.num_bins + 2, dtype=dtype)

    def __call__(self, x: jax.Array, cells: int | None = None) -> jax.Array:
        """Map (..., filters[0]) to (..., num_bins + 2); `cells` is K where x is a whole bag (B, K * G, filters[0])."""
        return by_positions(self, "mlp", x, cells)

    def mlp(self, x: jax.Array) -> jax.Array:
        """All layers, of each position by itself."""
        x = gelu(x)
        for layer in range(self.config.num_hidden_layers_head):
            x = gelu(getattr(self, f"hidden_{layer}")(x))
        return self.logits(x).astype(jnp.float32)


class SCT(nn.Module):
    """The whole model; see `SCTConfig`."""

    config: SCTConfig
    outputs: ClassVar[tuple[str, ...]] = ("logits", "cell_embedding")
    intermediates: ClassVar[tuple[str, ...]] = ("conv_out", "transformer_out", "deconv_out")

    def setup(self) -> None:
        """Declare the parts, named as in the paper."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        filters, genes, levels = config.filters, config.num_genes, range(config.num_downsamples)
        self.token_embed = Embed(config.num_bins + 2, config.token_embed_dim, dtype)
        if config.use_spatial:
            # Zero, so that training on spatial data continues exactly where training on cells stopped.
            self.spatial = Linear(config.token_embed_dim, dtype=jnp.float32, kernel_init=axes.zeros)
        self.stem = Stem(config)
        self.down = [TowerLevel(config, filters[i + 1], genes >> i) for i in levels]
        block = rematerialized(TransformerBlock, config.remat)
        self.transformer = [
            block(config.num_heads, config.ffn_dim, config.rotary, config.layer_norm_eps, dtype)
            for _ in range(config.num_layers)
        ]
        # up_0 is the innermost level.
        self.up = [TowerLevel(config, filters[i], genes >> (i + 1), upsample=True) for i in reversed(levels)]
        self.head = Head(config)

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
            in S equal parts of it, each counted from the part's start, so that each device reads its own part.

        Returns
        -------
        `logits` float32 (B, K, G, num_bins + 2), or those at `positions`, with num_bins + 2 as a further axis;
        `cell_embedding` float32 (B, K, embed_dim): the mean over a cell's transformer positions; `conv_out`,
        `transformer_out` (B, K G / 2^n, embed_dim); `deconv_out` (B, K G, filters[0]).
        """
        cells = tokens.shape[1]
        conv_out, skips = self.encode(self.embed(tokens, coordinates))
        transformer_out = self.transform(conv_out)
        deconv_out = self.decode(transformer_out, skips)
        if positions is None:
            logits = rearrange(self.head(deconv_out, cells), "b (k g) c -> b k g c", k=cells)
        else:
            logits = self.head(_at_positions(deconv_out, positions)).reshape(*positions.shape, -1)
        embedding = reduce(transformer_out.astype(jnp.float32), "b (k l) d -> b k d", "mean", k=cells)
        return {
            "logits": logits,
            "cell_embedding": embedding,
            "conv_out": conv_out,
            "transformer_out": transformer_out,
            "deconv_out": deconv_out,
        }

    def embed(self, tokens: jax.Array, coordinates: jax.Array | None = None) -> jax.Array:
        """Embed tokens (B, K, G), and coordinates (B, K, 2) if any, as (B, K * G, token_embed_dim)."""
        config = self.config
        batch, cells, genes = tokens.shape
        if genes != config.num_genes:
            raise ConfigError(f"tokens have {genes} gene positions, but the model has {config.num_genes}.")
        x = self.token_embed(tokens)
        if config.use_spatial:
            if coordinates is None:
                coordinates = jnp.full((batch, cells, 2), jnp.nan)
            x = x + self.embed_coordinates(coordinates).astype(x.dtype)[:, :, None, :]
        elif coordinates is not None:
            raise ConfigError("coordinates were given, but the model was built with use_spatial=False.")
        return rearrange(x, "b k g d -> b (k g) d")

    def embed_coordinates(self, coordinates: jax.Array) -> jax.Array:
        """Map coordinates (B, K, 2) to (B, K, token_embed_dim); zero for a cell without a position."""
        config = self.config
        present = jnp.isfinite(coordinates).all(axis=-1, keepdims=True)
        features = spatial_features(
            jnp.where(present, coordinates, 0.0),
            config.num_scales,
            config.sigma_min,
            config.sigma_max,
            config.spatial_encoding,
        )
        return jnp.where(present, self.spatial(features), 0.0)

    def encode(self, x: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """Stem and convolution tower: (B, K * G / 2^n, embed_dim), and the inputs of the levels."""
        x = self.stem(x)
        skips = []
        for level in self.down:
            skips.append(x)
            x = level(x)
        return x, skips

    def transform(self, x: jax.Array) -> jax.Array:
        """Transformer: (B, K * G / 2^n, embed_dim)."""
        for block in self.transformer:
            x = axes.constrain(block(x), axes.BATCH, axes.LENGTH, axes.EMBED)
        return x

    def decode(self, x: jax.Array, skips: list[jax.Array]) -> jax.Array:
        """Deconvolution tower: (B, K * G, filters[0])."""
        for level, skip in zip(self.up, reversed(skips), strict=True):
            x = level(x, skip if self.config.use_skip_connection else None)
        return x

    @staticmethod
    def example(config: SCTConfig) -> dict[str, jax.Array]:
        """Smallest inputs of a call, by name."""
        return {"tokens": jnp.zeros((1, 1, config.num_genes), jnp.uint8)}

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
        check_range("tokens", tokens, config.mask)
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
            check_range("positions", inputs["positions"], cells * genes - 1)

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
        total: float = length * config.stem_kernel_size * config.token_embed_dim * filters[0]
        for i in range(levels):
            narrow, wide = filters[i], filters[i + 1]
            down = (length >> i) * (config.conv_kernel_size * narrow * wide + wide**2)
            # Half of the taps of a transposed convolution of stride 2 meet an inserted zero.
            up = (length >> i) * (config.conv_kernel_size * narrow * wide / 2 + narrow**2)
            total += down + up
        inner, width = length >> levels, config.embed_dim
        block = 4 * width**2 + 2 * inner * width + 3 * width * config.ffn_dim
        total += config.num_layers * inner * block
        hidden = [filters[0], *([width] * config.num_hidden_layers_head), config.num_bins + 2]
        head = sum(into * out for into, out in itertools.pairwise(hidden))
        total += (length if head_positions is None else head_positions) * head
        return 2.0 * batch * total


def _at_positions(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Vectors of a sequence (B, L, C) at positions (B, P) or (B, S, P) in S equal parts of it, (B, S or 1, P, C)."""
    parts = positions.reshape(positions.shape[0], -1, positions.shape[-1])
    rows = rearrange(x, "b (s l) c -> b s l c", s=parts.shape[1])
    chosen = jnp.take_along_axis(rows, parts[..., None], axis=2)
    return axes.constrain(chosen, axes.BATCH, axes.CELL, None, None)


def level_probabilities(
    config: SCTConfig, offset: float = 0.0
) -> Callable[[Any, jax.Array, jax.Array | None], jax.Array]:
    """Make the function (variables, tokens (B, K, G), coordinates) -> probabilities of levels (B, K, G, num_bins).

    `offset` is added to the logit of "unexpressed", see `sct.data.class_prior`.
    """
    module = SCT(config)

    def probabilities(variables: Any, tokens: jax.Array, coordinates: jax.Array | None) -> jax.Array:
        outputs = cast(dict[str, jax.Array], module.apply(variables, tokens, coordinates))
        logits = outputs["logits"][..., : config.num_bins]
        return jax.nn.softmax(logits.at[..., 0].add(offset), axis=-1)

    return probabilities
