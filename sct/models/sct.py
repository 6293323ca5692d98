"""Define sCT (sCellTransformer): a convolutional U-Net over the genes of many cells, with a transformer at its center.

Source: "A long range foundation model for zero-shot predictions in single-cell and spatial transcriptomics data",
section 3. Where the paper's text and the published checkpoint differ, an option of `SCTConfig` chooses between them.

    tokens (B, K, G) -> embeddings (B, K * G, 64) -> stem -> convolution tower (B, K * G / 256, 1024)
                     -> transformer -> deconvolution tower with skip connections (B, K * G, 64) -> head (B, K, G, 7)

B is the number of bags, K the number of cells in a bag, and G the number of gene positions. The widths are those of the
published model. `sct.nn.execution` runs the layers: on several devices, in chunks, and with a choice of the values
saved for the backward pass.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, reduce

from sct.errors import ConfigError, DataError
from sct.models.cell_code import CellCode, flat_cells
from sct.models.checks import check_range
from sct.models.sct_config import SCTConfig
from sct.nn import axes
from sct.nn.attention import TransformerBlock
from sct.nn.conv import Borders, Conv, halo_of, pool_2x
from sct.nn.execution import by_cells, by_positions, rematerialized
from sct.nn.linear import Embed, Linear
from sct.nn.norm import LayerNorm, SharedLayerNorm
from sct.nn.spatial import spatial_features


def gelu(x: jax.Array) -> jax.Array:
    """Apply GELU with its tanh approximation."""
    return jax.nn.gelu(x, approximate=True)


class Stem(nn.Module):
    """Apply a convolution with a long kernel to the embedded tokens, then GELU."""

    config: SCTConfig

    def setup(self) -> None:
        """Declare the convolution."""
        config = self.config
        cell = config.num_genes if config.conv_boundary == "cell" else None
        dtype = jnp.dtype(config.dtype)
        self.conv = Conv(config.filters[0], config.stem_kernel_size, segment=cell, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the stem to token embeddings x (B, K * G, token_embed_dim) and return (B, K * G, filters[0])."""
        halo = 0 if self.config.conv_boundary == "cell" else halo_of(self.config.stem_kernel_size)
        return by_cells(self, x, num_positions=self.config.num_genes, halo=halo, chunked=False)

    def normalize(self, x: jax.Array) -> jax.Array:
        """Return x unchanged. The stem has no norm."""
        return x

    def convolve(self, x: jax.Array, borders: Borders | None, skip: None) -> jax.Array:
        """Apply convolution and GELU to x (B, K * G, token_embed_dim); see `Conv` for `borders`."""
        return gelu(self.conv(x, borders))


class ConvBlock(nn.Module):
    """Apply a norm, then a convolution. Both towers consist of these blocks.

    `upsample` doubles the number of positions. The GELU after the convolution is not part of this module.
    """

    config: SCTConfig
    features: int
    kernel_size: int
    num_positions: int
    upsample: bool = False

    def setup(self) -> None:
        """Declare the norm and the convolution."""
        config, positions = self.config, self.num_positions
        if config.norm == "layer":
            self.norm: nn.Module = LayerNorm(config.layer_norm_eps)
        elif config.norm != "none":
            self.norm = SharedLayerNorm(positions, config.norm == "shared", config.layer_norm_eps)
        cell = positions if config.conv_boundary == "cell" else None
        dtype = jnp.dtype(config.dtype)
        self.conv = Conv(self.features, self.kernel_size, self.upsample, cell, dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the block to x (B, K * G, C) and return (B, K * G, features).

        With `upsample`, the result has twice as many positions: (B, 2 K * G, features).
        """
        return self.convolve(self.normalize(x))

    def normalize(self, x: jax.Array) -> jax.Array:
        """Normalize each cell of x (B, K * G, C) and return the same shape. With norm="none", return x unchanged."""
        return x if self.config.norm == "none" else self.norm(x)

    def convolve(self, x: jax.Array, borders: Borders | None = None) -> jax.Array:
        """Convolve the normalized sequence x (B, K * G, C); see `Conv` for `borders`."""
        return cast(jax.Array, self.conv(x, borders))


class TowerLevel(nn.Module):
    """Level of a tower: a block that changes the width, then a residual block with a kernel of size 1.

        h = conv(norm(x));  y = GELU(h) + GELU(conv_1(norm(GELU(h))))

    A level of the convolution tower ends with pooling, which halves the number of positions. In the deconvolution tower
    (`upsample`), `conv` is a transposed convolution, which doubles the number of positions, and the level ends by
    adding the skip connection.
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
        """Apply the level to x (B, K * G, C).

        Returns (B, K * G / 2, features). With `upsample` it returns (B, 2 K * G, features), which is also the shape of
        `skip`.
        """
        config = self.config
        halo = 0 if config.conv_boundary == "cell" else halo_of(config.conv_kernel_size, self.upsample)
        y = by_cells(self, x, skip, num_positions=self.num_positions, halo=halo, remat=config.remat)
        return axes.constrain(y, axes.BATCH, axes.LENGTH, axes.CHANNEL)

    def normalize(self, x: jax.Array) -> jax.Array:
        """Apply the first norm to x (B, K * G, C)."""
        return self.block.normalize(x)

    def convolve(self, x: jax.Array, borders: Borders | None, skip: jax.Array | None) -> jax.Array:
        """Apply to x (B, K * G, C) the operations that follow the first norm of the block; see `Conv` for `borders`."""
        h = self.block.convolve(x, borders)
        y = gelu(h) + gelu(self.residual(gelu(h)))
        if not self.upsample:
            return pool_2x(y, self.config.pool)
        return y if skip is None else y + skip


class Head(nn.Module):
    """Output head: GELU, hidden layers with GELU, and a dense layer that computes float32 logits of all tokens."""

    config: SCTConfig

    def setup(self) -> None:
        """Declare the dense layers."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        for layer in range(config.num_hidden_layers_head):
            setattr(self, f"hidden_{layer}", Linear(config.embed_dim, dtype=dtype))
        self.logits = Linear(config.num_bins + 2, dtype=dtype)

    def __call__(self, x: jax.Array, cells: int | None = None) -> jax.Array:
        """Compute logits (..., num_bins + 2) from vectors x (..., filters[0]).

        If x holds all positions of a bag (B, K * G, filters[0]), `cells` is K; otherwise `cells` is None.
        """
        return by_positions(self, "mlp", x, cells)

    def mlp(self, x: jax.Array) -> jax.Array:
        """Apply all layers to each position of x (..., filters[0]) separately and return (..., num_bins + 2)."""
        x = gelu(x)
        for layer in range(self.config.num_hidden_layers_head):
            x = gelu(getattr(self, f"hidden_{layer}")(x))
        return self.logits(x).astype(jnp.float32)


class SCT(nn.Module):
    """sCT: token embedding, stem, convolution tower, transformer, deconvolution tower and head; see `SCTConfig`."""

    config: SCTConfig
    outputs: ClassVar[tuple[str, ...]] = ("logits", "cell_embedding")
    intermediates: ClassVar[tuple[str, ...]] = ("conv_out", "transformer_out", "deconv_out")
    # Parts that do not affect the other outputs: the option that is 0 without the part, and the start of the paths of
    # its parameters.
    optional_parts: ClassVar[Mapping[str, str]] = types.MappingProxyType({"code_dim": "params/cell_code/"})

    @staticmethod
    def outputs_of(config: SCTConfig) -> tuple[str, ...]:
        """Return the names of the outputs that a model with this configuration computes."""
        return (*SCT.outputs, *["code"] * bool(config.code_dim))

    def setup(self) -> None:
        """Declare the submodules of the model, with the names that the paper uses."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        filters, genes, levels = config.filters, config.num_genes, range(config.num_downsamples)
        self.token_embed = Embed(config.num_bins + 2, config.token_embed_dim, dtype)
        if config.use_spatial:
            # Zero, so that a model trained without coordinates first gives the same outputs on spatial data.
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
        if config.code_dim:
            self.cell_code = CellCode(config)

    def __call__(
        self,
        tokens: jax.Array,
        coordinates: jax.Array | None = None,
        positions: jax.Array | None = None,
        keep_skips: jax.Array | None = None,
    ) -> dict[str, jax.Array]:
        """Compute logits, cell embeddings and intermediate activations.

        Parameters
        ----------
        tokens
            Integers (B, K, G): 0 is unexpressed, 1 to num_bins - 1 are expression levels, and the two highest tokens
            are PAD (num_bins) and MASK (num_bins + 1).
        coordinates
            Rescaled coordinates of the cells (B, K, 2), for models with `use_spatial`. A cell without coordinates has
            NaN, and its coordinate embedding is zero.
        positions
            Positions in the flat sequence of length K * G at which to evaluate the head, integers (B, P). None means
            all positions. With shape (B, S, P), the sequence is cut into S equal parts, and positions are counted from
            the start of each part, so that each device reads only its own part.
        keep_skips
            Bags whose skip connections are used, bool (B,); None means all bags. The other bags are decoded from the
            transformer output alone.

        Returns
        -------
        A dict with these arrays, where n is the number of tower levels:

        - `logits`, float32 (B, K, G, num_bins + 2). If `positions` is given, the shape is that of `positions`, followed
          by num_bins + 2.
        - `cell_embedding`, float32 (B, K, embed_dim), the mean over the transformer positions of a cell.
        - `conv_out` and `transformer_out`, (B, K * G / 2^n, embed_dim).
        - `deconv_out`, (B, K * G, filters[0]).
        - `code`, float32 (B, K, code_dim), for models with a code; see `sct.models.cell_code`.
        """
        cells = tokens.shape[1]
        conv_out, skips = self.encode(self.embed(tokens, coordinates))
        transformer_out = self.transform(conv_out)
        deconv_out = self.decode(transformer_out, skips, keep_skips)
        if positions is None:
            logits = rearrange(self.head(deconv_out, cells), "b (k g) c -> b k g c", k=cells)
        else:
            logits = self.head(_at_positions(deconv_out, positions)).reshape(*positions.shape, -1)
        embedding = reduce(transformer_out.astype(jnp.float32), "b (k l) d -> b k d", "mean", k=cells)
        found = {
            "logits": logits,
            "cell_embedding": embedding,
            "conv_out": conv_out,
            "transformer_out": transformer_out,
            "deconv_out": deconv_out,
        }
        if self.config.code_dim:
            found["code"] = self.cell_code(transformer_out, cells)
            if self.is_initializing():
                self.decode_code(found["code"])  # declares the parameters of the decoder
        return found

    def cell_vectors(self, tokens: jax.Array, coordinates: jax.Array | None = None) -> jax.Array:
        """Return the vector of each cell by which cells are compared in training, float32 (B, K, C).

        The vectors are the codes. For models without a code, they are the standardized transformer outputs
        (`sct.models.cell_code.flat_cells`). The deconvolution tower is not computed. See `__call__` for the arguments.
        """
        x, _ = self.encode(self.embed(tokens, coordinates))
        x = self.transform(x)
        return self.cell_code(x, tokens.shape[1]) if self.config.code_dim else flat_cells(x, tokens.shape[1])

    def decode_code(self, code: jax.Array, genes: jax.Array | None = None) -> jax.Array:
        """Compute the logits of expression levels from codes alone; see `sct.models.cell_code.CellCode.decode`."""
        return cast(jax.Array, self.cell_code.decode(code, genes))

    def embed(self, tokens: jax.Array, coordinates: jax.Array | None = None) -> jax.Array:
        """Embed tokens (B, K, G) and, if given, coordinates (B, K, 2). Returns (B, K * G, token_embed_dim).

        Raises
        ------
        ConfigError
            `tokens` and the model have different numbers of gene positions, or a model without `use_spatial` gets
            coordinates.
        """
        config = self.config
        batch, cells, genes = tokens.shape
        if genes != config.num_genes:
            raise ConfigError(
                f"`tokens` has {genes} gene positions, but the model has {config.num_genes}: make the tokens with the "
                "gene vocabulary of the model."
            )
        x = self.token_embed(tokens)
        if config.use_spatial:
            if coordinates is None:
                coordinates = jnp.full((batch, cells, 2), jnp.nan)
            x = x + self.embed_coordinates(coordinates).astype(x.dtype)[:, :, None, :]
        elif coordinates is not None:
            raise ConfigError(
                "`coordinates` were given, but the model has use_spatial=False: pass coordinates=None, or set "
                "use_spatial=True."
            )
        return rearrange(x, "b k g d -> b (k g) d")

    def embed_coordinates(self, coordinates: jax.Array) -> jax.Array:
        """Embed coordinates (B, K, 2) as (B, K, token_embed_dim). Cells with NaN coordinates get zeros."""
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
        """Apply the stem and the convolution tower of n levels to x (B, K * G, token_embed_dim).

        Returns two values: the output (B, K * G / 2^n, embed_dim), and a list with the input of each level. The skip
        connections use these inputs.
        """
        x = self.stem(x)
        skips = []
        for level in self.down:
            skips.append(x)
            x = level(x)
        return x, skips

    def transform(self, x: jax.Array) -> jax.Array:
        """Apply the transformer to x (B, K * G / 2^n, embed_dim) and return the same shape."""
        for block in self.transformer:
            x = axes.constrain(block(x), axes.BATCH, axes.LENGTH, axes.EMBED)
        return x

    def decode(self, x: jax.Array, skips: list[jax.Array], keep_skips: jax.Array | None = None) -> jax.Array:
        """Apply the deconvolution tower to x (B, K * G / 2^n, embed_dim) and return (B, K * G, filters[0]).

        `skips` are the inputs of the levels of the convolution tower, which `encode` returns. `keep_skips` (B,) is
        False for bags whose skip connections are left out.
        """
        for level, skip in zip(self.up, reversed(skips), strict=True):
            if keep_skips is not None:
                skip = jnp.where(keep_skips[:, None, None], skip, jnp.zeros((), skip.dtype))
            x = level(x, skip if self.config.use_skip_connection else None)
        return x

    @staticmethod
    def example(config: SCTConfig) -> dict[str, jax.Array]:
        """Return the smallest valid inputs of one call, as a dict by argument name."""
        return {"tokens": jnp.zeros((1, 1, config.num_genes), jnp.uint8)}

    @staticmethod
    def check_inputs(config: SCTConfig, inputs: Mapping[str, Any]) -> None:
        """Raise `DataError` unless the inputs fit the model. Values of traced arrays are not checked."""
        tokens = inputs["tokens"]
        if tokens.ndim != 3 or not jnp.issubdtype(tokens.dtype, jnp.integer) or not tokens.size:
            raise DataError(
                f"`tokens` has the type {tokens.dtype} and the shape {tokens.shape}, but must be a non-empty integer "
                "array "
                f"of shape (bags, cells, {config.num_genes} gene positions): give one row of tokens per cell."
            )
        batch, cells, genes = tokens.shape
        if genes != config.num_genes:
            raise DataError(
                f"`tokens` has {genes} gene positions, but the model has {config.num_genes}: put the genes into the "
                f"order of the model, and use token {config.pad} (PAD) for genes that are missing."
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
                    f"{name} has the shape {value.shape}, but must have the shape {wanted} to match `tokens`: correct "
                    f"the shape of {name}."
                )
        if inputs.get("coordinates") is not None and not config.use_spatial:
            raise DataError(
                "`coordinates` were given, but the model has no spatial encoding (use_spatial=False): omit "
                "`coordinates`."
            )
        keep = inputs.get("keep_skips")
        if keep is not None and keep.shape != (batch,):
            raise DataError(
                f"keep_skips has the shape {keep.shape}, but must have the shape ({batch},): give one value per bag."
            )
        if inputs.get("positions") is not None:
            check_range("positions", inputs["positions"], cells * genes - 1)

    @staticmethod
    def flops(config: SCTConfig, batch: int, cells: int, head_positions: int | None = None) -> float:
        """Count the operations of all matrix products and convolutions in one forward pass.

        A multiply-add counts as two operations.

        Parameters
        ----------
        config
            Configuration of the model.
        batch, cells
            Number of bags (B) and number of cells in each (K).
        head_positions
            Number of positions of a bag at which the head is evaluated; None for all positions.
        """
        filters, length = config.filters, cells * config.num_genes
        total = 0.0
        for i in range(config.num_downsamples):
            narrow, wide = filters[i], filters[i + 1]
            # In a transposed convolution of stride 2, half of the kernel positions multiply an inserted zero.
            total += (length >> i) * (config.conv_kernel_size * narrow * wide / 2 + narrow**2)
        hidden = [filters[0], *([config.embed_dim] * config.num_hidden_layers_head), config.num_bins + 2]
        head = sum(into * out for into, out in itertools.pairwise(hidden))
        total += (length if head_positions is None else head_positions) * head
        return SCT.cell_vector_flops(config, batch, cells) + 2.0 * batch * total

    @staticmethod
    def cell_vector_flops(config: SCTConfig, batch: int, cells: int) -> float:
        """Count the operations of `cell_vectors`; see `flops` for the arguments."""
        filters, levels = config.filters, config.num_downsamples
        length = cells * config.num_genes
        total: float = length * config.stem_kernel_size * config.token_embed_dim * filters[0]
        for i in range(levels):
            narrow, wide = filters[i], filters[i + 1]
            total += (length >> i) * (config.conv_kernel_size * narrow * wide + wide**2)
        inner, width = length >> levels, config.embed_dim
        block = 4 * width**2 + 2 * inner * width + 3 * width * config.ffn_dim
        total += config.num_layers * inner * block + inner * width * config.code_dim
        return 2.0 * batch * total


def _at_positions(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Take the vectors of a sequence x (B, L, C) at positions (B, P) and return (B, 1, P, C).

    Positions may also have the shape (B, S, P). Then x is cut into S equal parts, row s of the positions counts from
    the start of part s, and the result has the shape (B, S, P, C).
    """
    parts = positions.reshape(positions.shape[0], -1, positions.shape[-1])
    rows = rearrange(x, "b (s l) c -> b s l c", s=parts.shape[1])
    chosen = jnp.take_along_axis(rows, parts[..., None], axis=2)
    return axes.constrain(chosen, axes.BATCH, axes.CELL, None, None)


def level_probabilities(
    config: SCTConfig, offset: float = 0.0
) -> Callable[[Any, jax.Array, jax.Array | None], jax.Array]:
    """Make a function that computes the probability of each expression level.

    The function takes (variables, tokens (B, K, G), coordinates (B, K, 2) or None) and returns (B, K, G, num_bins).
    `offset` is added to the logit of the level "unexpressed"; see `sct.data.class_prior`.
    """
    module = SCT(config)

    def probabilities(variables: Any, tokens: jax.Array, coordinates: jax.Array | None) -> jax.Array:
        outputs = cast(dict[str, jax.Array], module.apply(variables, tokens, coordinates))
        logits = outputs["logits"][..., : config.num_bins]
        return jax.nn.softmax(logits.at[..., 0].add(offset), axis=-1)

    return probabilities
