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
from einops import rearrange, reduce

from sct.errors import ConfigError, DataError
from sct.models.checks import check_range
from sct.models.sct_config import SCTConfig
from sct.models.sct_tower import TowerLevel, applied, gelu
from sct.nn import axes
from sct.nn.attention import TransformerBlock
from sct.nn.conv import Conv, halo_of
from sct.nn.linear import Embed, Linear
from sct.nn.pieces import Arrays, map_pieces
from sct.nn.plain import at_once, wants_plain
from sct.nn.spatial import spatial_features


class Stem(nn.Module):
    """Convolution with a long kernel over the embedded tokens, then GELU."""

    config: SCTConfig

    def setup(self) -> None:
        """Declare the convolution."""
        config = self.config
        self.conv = Conv(config.filters[0], config.stem_kernel_size, dtype=jnp.dtype(config.dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, K * G, token_embed_dim) to (B, K * G, filters[0])."""
        if self.is_initializing():
            return self.part(x)
        run = applied(self.clone(parent=None, name=None), "part")
        cells = x.shape[1] // self.config.num_genes
        return axes.on_each_part(run, self.variables["params"], x, cells=cells)

    def part(self, x: jax.Array) -> jax.Array:
        """All cells at once, or those of one device."""
        config = self.config
        if config.conv_boundary == "cell":
            cells = self.conv(rearrange(x, "b (k g) c -> (b k) g c", g=config.num_genes))
            return gelu(rearrange(cells, "(b k) g c -> b (k g) c", b=x.shape[0]))
        if axes.has_neighbours():
            before, behind = axes.neighbours(x, halo_of(config.stem_kernel_size))
            return gelu(self.conv(jnp.concatenate([before, x, behind], axis=1), with_halo=True))
        return gelu(self.conv(x))


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
        """Map (..., filters[0]) to (..., num_bins + 2); `cells` is their number where (B, K * G, C) is all positions.

        The hidden layers are 16 times as wide as what they read, so a long sequence goes through in pieces; on a mesh
        only where devices have their own cells.
        """
        if self.is_initializing() or wants_plain() or (cells is None and axes.is_split()):
            return self.whole(x)
        run = functools.partial(_head_in_pieces, self.clone(parent=None, name=None))
        if cells is None:
            return run(self.variables, x)
        return axes.on_each_part(run, self.variables, x, cells=cells)

    def whole(self, x: jax.Array) -> jax.Array:
        """All positions at once."""
        x = gelu(x)
        for layer in range(self.config.num_hidden_layers_head):
            x = gelu(getattr(self, f"hidden_{layer}")(x))
        return self.logits(x).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class _Piece:
    """The head as a function of its variables and of one piece of a sequence."""

    head: Head

    def __call__(self, variables: Any, inputs: Arrays, kept: Arrays | None) -> tuple[jax.Array, Arrays]:
        return cast(jax.Array, self.head.apply(variables, *inputs, method="whole")), ()


# Positions that the head handles at once: few stay in a processor's cache, many keep an accelerator busy.
_HEAD_POSITIONS_CPU, _HEAD_POSITIONS = 4096, 65_536


def _head_in_pieces(head: Head, variables: Any, x: jax.Array) -> jax.Array:
    most = at_once(_HEAD_POSITIONS_CPU if jax.default_backend() == "cpu" else _HEAD_POSITIONS)
    positions = x.size // x.shape[-1]
    pieces = -(-positions // most)
    if pieces == 1:
        return cast(jax.Array, head.apply(variables, x, method="whole"))
    # The most even pieces, the last one filled up.
    size = -(-positions // pieces)
    filled = jnp.pad(rearrange(x, "... d -> (...) d"), ((0, pieces * size - positions), (0, 0)))
    parts = rearrange(filled, "(n s) d -> n s d", n=pieces)
    y = rearrange(map_pieces(_Piece(head), False, variables, (parts,)), "n s c -> (n s) c")
    return y[:positions].reshape(*x.shape[:-1], -1)


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

    def setup(self) -> None:
        """Declare the parts, named as in the paper."""
        config = self.config
        dtype = jnp.dtype(config.dtype)
        block = TransformerBlock
        if config.remat != "none":
            keeps = {"products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
            block = nn.remat(TransformerBlock, policy=keeps.get(config.remat))
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
        return rearrange(x, "b k g d -> b (k g) d")

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
        batch, cells, _ = tokens.shape
        conv_out, skips = self.encode(self.embed(tokens, coordinates))
        x = conv_out
        for block in self.transformer:
            x = axes.constrain(block(x), axes.BATCH, axes.LENGTH, axes.EMBED)
        deconv_out = self.decode(x, skips)
        if positions is None:
            logits = rearrange(self.head(deconv_out, cells), "b (k g) c -> b k g c", k=cells)
        else:
            parts = positions.reshape(batch, -1, positions.shape[-1])
            rows = rearrange(deconv_out, "b (s l) d -> b s l d", s=parts.shape[1])
            chosen = jnp.take_along_axis(rows, parts[..., None], axis=2)
            chosen = axes.constrain(chosen, axes.BATCH, axes.CELL, None, None)
            logits = self.head(chosen).reshape(*positions.shape, -1)
        embedding = reduce(x.astype(jnp.float32), "b (k l) d -> b k d", "mean", k=cells)
        return {
            "logits": logits,
            "cell_embedding": embedding,
            "conv_out": conv_out,
            "transformer_out": x,
            "deconv_out": deconv_out,
        }


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
