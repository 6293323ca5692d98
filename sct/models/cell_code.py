"""Compute a short code of each cell, and predict the expression levels of all its genes from the code alone.

The masked objective of sCT hardly needs the center of the network: with skip connections, the levels of a cell's other
genes reach the output without passing through the transformer. The code gives the center a task. It is a linear map of
the transformer outputs at the positions of a cell. The decoder predicts the levels of the cell from the code only,
without other cells, skip connections and the input.

    transformer_out (B, K * L, D) -> flat_cells (B, K, L * D) -> code (B, K, code_dim) -> logits (B, K, G, num_bins)

B is the number of bags, K the number of cells in a bag, L the number of transformer positions of a cell, and G the
number of gene positions.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from sct.models.sct_config import SCTConfig
from sct.nn import axes
from sct.nn.linear import Linear
from sct.nn.norm import standardized


def flat_cells(transformer_out: jax.Array, cells: int) -> jax.Array:
    """Return the transformer positions of each cell side by side, standardized: float32 (B, K, L * D).

    Each cell is standardized by itself, to mean 0 and variance 1 over all its positions and features. Transformer
    outputs have no fixed scale, because the blocks add to them without a norm at the end.

    Parameters
    ----------
    transformer_out
        Output of the transformer (B, K * L, D).
    cells
        Number of cells in a bag (K).
    """
    flat = rearrange(transformer_out, "b (k l) d -> b k (l d)", k=cells)
    return standardized(axes.constrain(flat, axes.BATCH, axes.CELL, None))


class CellCode(nn.Module):
    """Linear code of a cell, and a decoder to the expression levels of all genes.

    The decoder adds the output of a small network to the code, and multiplies the sum with one vector of width
    `code_dim` for each gene and level. The network has one hidden layer of width 2 * code_dim.
    """

    config: SCTConfig

    def setup(self) -> None:
        """Declare the layers and the tables of the genes."""
        config = self.config
        width, shape = config.code_dim, (config.num_genes, config.num_bins)
        # A few cells per bag, so float32 costs little.
        self.code = Linear(width)
        self.hidden, self.out = Linear(2 * width), Linear(width)
        # Training starts near the frequencies of the levels: their logarithms are the bias (`sct.data.level_prior`),
        # and the table is small.
        init, names = jax.nn.initializers.normal(0.1 * width**-0.5), (axes.CHANNEL, None, axes.CHANNEL_IN)
        self.table = axes.param(self, "table", init, (*shape, width), names)
        self.bias = axes.param(self, "bias", axes.zeros, shape, (axes.CHANNEL, None))

    def __call__(self, transformer_out: jax.Array, cells: int) -> jax.Array:
        """Return the codes of the cells, float32 (B, K, code_dim); see `flat_cells` for the arguments."""
        code = self.code(flat_cells(transformer_out, cells))
        return axes.constrain(code, axes.BATCH, axes.CELL, None)

    def decode(self, code: jax.Array, genes: jax.Array | None = None) -> jax.Array:
        """Compute logits of the expression levels from codes (B, K, code_dim).

        Parameters
        ----------
        code
            Codes of the cells.
        genes
            Gene positions to predict in each bag, integers (B, g); None for all.

        Returns
        -------
        Logits, float32 (B, K, g, num_bins).
        """
        x = code + self.out(jax.nn.gelu(self.hidden(code), approximate=True))
        if genes is None:
            return jnp.einsum("bkc,gnc->bkgn", x, self.table) + self.bias
        table, bias = (jnp.take(each, genes, axis=0) for each in (self.table, self.bias))
        return jnp.einsum("bkc,bgnc->bkgn", x, table) + bias[:, None]

    @staticmethod
    def decoder_flops(config: SCTConfig, batch: int, cells: int, genes: int) -> float:
        """Count the operations of `decode` for `genes` genes per bag. A multiply-add counts as two operations."""
        width = config.code_dim
        return 2.0 * batch * cells * (4 * width**2 + genes * config.num_bins * width)
