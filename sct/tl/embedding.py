"""`sct.tl.embed`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import anndata as ad
import numpy as np

from sct.data.cells import Cells
from sct.errors import ConfigError
from sct.tl import running
from sct.weights.pretrained import Pretrained


def embed(
    adata: ad.AnnData,
    model: running.Model,
    *,
    layer: str | None = None,
    key_added: str = "X_sct",
    batch_key: str | None = None,
    spatial_key: str | None = None,
    context: str = "tiles",
    cells_per_bag: int | None = None,
    batch_size: int | None = None,
    gene_column: str | None = None,
    duplicates: Literal["error", "sum"] = "error",
    seed: int = 0,
    n_contexts: int = 1,
    copy: bool = False,
) -> ad.AnnData | None:
    """Embed cells without training: the mean of a cell's transformer positions (sCT paper, section 4).

    sCT reads a cell among others, so an embedding is a function of the cell's bag. Bags are made by a rule:
    the cells of a batch (all cells, without `batch_key`), in their order in windows of 10,000, are dealt at
    random by `seed` to bags of `cells_per_bag`; with `spatial_key` a section is cut into compact tiles of that
    many cells instead. The last bag is filled up with the first cells. So the result depends on the cells
    that are given, their order and the seed, and not on `batch_size`, the devices, or whether `adata` is
    backed (up to rounding); the same call gives the same bytes.

    Parameters
    ----------
    adata
        Raw counts (N, n_var), in memory or backed. X is never changed.
    model
        Of `sct.load`, or its path.
    layer
        Where the raw counts are; by default the first of X, raw and layers["counts"] that holds them.
    key_added
        The embedding is written to `obsm[key_added]`, float32 (N, D), and the parameters to `uns[key_added]`.
    batch_key
        Column of `obs`: cells share a bag only within a batch (a donor, a slide).
    spatial_key
        Key of positions in `obsm`. A model trained on coordinates reads them; any model is given neighbours.
    context
        With `spatial_key`: "tiles", or "neighbors" for a bag of its own for each cell, which is first in it and
        has its nearest cells beside it, as in training; `cells_per_bag` times the work.
    cells_per_bag
        K; by default that of training.
    batch_size
        Bags at once; by default about a million gene tokens per device.
    gene_column, duplicates
        See `sct.GeneVocabulary.align`.
    seed
        Of the bags.
    n_contexts
        Draws of the bags, by `seed`, `seed + 1`, ..., whose mean is the embedding. With `spatial_key` bags follow from
        positions, and 1 is needed.
    copy
        Return a changed copy, and leave `adata` as it is.

    Raises
    ------
    DataError
        No raw counts, unknown genes, cells without a count, a missing column or key.
    CheckpointError
        What the model computes is not finite; nothing is written then.
    """
    running.check_table(adata, copy)
    found = Contexts.of(
        adata, running.opened(model), layer=layer, batch_key=batch_key, spatial_key=spatial_key, context=context,
        cells_per_bag=cells_per_bag, batch_size=batch_size, gene_column=gene_column, duplicates=duplicates, seed=seed,
        n_contexts=n_contexts,
    )  # fmt: skip
    draws = found.draws()
    total = next(draws)
    for one in draws:
        total += one
    target = running.to_write(adata, copy)
    found.write(target, total, key_added)
    return target if copy else None


@dataclasses.dataclass(frozen=True)
class Contexts:
    """The cells of an AnnData, and the bags in which a model reads them: several draws of them, each with an embedding.

    Attributes
    ----------
    model, cells
        What reads, and what is read.
    settings
        The parameters, as `uns` keeps them.
    context, batch_size
        See `embed`.
    """

    model: Pretrained
    cells: Cells
    settings: dict[str, Any]
    context: str
    batch_size: int | None

    @classmethod
    def of(
        cls, adata: ad.AnnData, model: Pretrained, *, layer: str | None = None, batch_key: str | None = None,
        spatial_key: str | None = None, context: str = "tiles", cells_per_bag: int | None = None,
        batch_size: int | None = None, gene_column: str | None = None,
        duplicates: Literal["error", "sum"] = "error", seed: int = 0, n_contexts: int = 1,
    ) -> Contexts:  # fmt: skip
        """Check everything that `embed` is given."""
        size = running.bag_size(model, cells_per_bag)
        running.check_seed(seed)
        if n_contexts < 1:
            raise ConfigError(f"n_contexts is {n_contexts}, but at least 1 is needed.")
        if n_contexts > 1 and spatial_key is not None:
            raise ConfigError(
                f"n_contexts is {n_contexts}, but with spatial_key bags follow from positions, so there is nothing to "
                "average: leave out n_contexts or spatial_key."
            )
        parts = running.sections(adata, batch_key, spatial_key)
        running.check_context(context, parts[0])
        cells = Cells(
            adata, model.vocabulary, parts, layer=layer, gene_column=gene_column, duplicates=duplicates
        )
        running.check_not_empty(cells)
        settings = {
            "cells_per_bag": size, "batch_key": batch_key, "spatial_key": spatial_key,
            "context": context if spatial_key is not None else "random", "seed": seed, "n_contexts": n_contexts,
        }  # fmt: skip
        return cls(model, cells, settings, context, batch_size)

    def draws(self) -> Iterator[np.ndarray]:
        """The embedding (N, D) float32 in each draw of the bags."""
        said = self.settings
        runner = running.Runner(self.model, self.batch_size)
        for seed in range(said["seed"], said["seed"] + said["n_contexts"]):
            orders = [
                running.order_of(part, said["cells_per_bag"], seed, self.context)
                for part in self.cells.sections
            ]
            embedding = np.zeros((self.cells.n_cells, self.model.config.embed_dim), np.float32)
            for one in runner(self.cells, orders, ("cell_embedding",), "embedding cells"):
                embedding[one.rows[one.counted]] = one.outputs["cell_embedding"][one.counted]
            yield embedding

    def write(self, target: ad.AnnData, total: np.ndarray, key: str) -> None:
        """Write the mean of the draws, of their sum (N, D), and how it was made."""
        said = self.settings
        target.obsm[key] = (total / np.float32(said["n_contexts"])).astype(np.float32, copy=False)
        running.keep_scales(target, self.cells.sections, said["batch_key"], said["spatial_key"])
        target.uns[key] = running.record(self.model, self.cells, **said)
