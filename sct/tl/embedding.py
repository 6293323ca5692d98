"""`sct.tl.embed`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import anndata as ad
import numpy as np

from sct import families
from sct.checks import check_at_least
from sct.data.cells import CellCounts
from sct.errors import ConfigError
from sct.inference import bags, inputs
from sct.inference.readers import CellReader
from sct.weights.pretrained import Pretrained


def embed(
    adata: ad.AnnData,
    model: inputs.ModelLike,
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
    """Embed cells without training, by any model that reads cells.

    Embeddings are means: for sCT over a cell's transformer positions (sCT paper, section 4), for the cell model of
    ZerOmics over a cell's genes, for cell-sentence models over the last hidden states of the sentence's tokens. All but
    sCT read single cells: they ignore the groups of `batch_key`, and refuse `spatial_key`, `context`, `cells_per_bag`
    and `n_contexts`.

    sCT reads bags of cells, and the embedding of a cell depends on its bag. Bags are drawn with `seed` from windows of
    10,000 cells of a batch; with `spatial_key` they are compact tiles. The last bag is filled with the first cells
    (with `spatial_key`, with the nearest). The result depends on the cells, their order and the seed. It does not
    depend on `batch_size`, the devices, or whether `adata` is backed (up to rounding). The same call gives the same
    bytes.

    Parameters
    ----------
    adata
        Raw counts (N, n_var), in memory or backed. X is never changed.
    model
        Result of `sct.load`, a path or a Hub id.
    layer
        Where the raw counts are; by default the first of X, raw and layers["counts"] that holds them.
    key_added
        Embedding: `obsm[key_added]`, float32 (N, D). Parameters: `uns[key_added]`. With `spatial_key`, also the scales
        of sections: `uns["sct_sections"]`.
    batch_key
        Column of `obs`: cells share a bag only within a batch (a donor, a slide).
    spatial_key
        Key of positions in `obsm`, for sCT: bags are neighbors. Models trained on coordinates also read them.
    context
        With `spatial_key`: "tiles", or "neighbors": one bag per cell with its nearest cells, as in training;
        `cells_per_bag` times the work.
    cells_per_bag
        K; by default that of training.
    batch_size
        Bags (or cells) at once; by default about a million gene tokens per device (65,536 where cells are read one by
        one).
    gene_column, duplicates
        See `sct.GeneVocabulary.align`.
    seed
        Seed of the bags; for cell sentences, of the order of genes with equal counts.
    n_contexts
        Draws of the bags, by `seed`, `seed + 1`, ..., whose mean is the embedding. With `spatial_key` bags follow from
        positions, and 1 is needed.
    copy
        Return a changed copy, and leave `adata` as it is.

    Raises
    ------
    ConfigError
        The model has no cell embedding, or does not take an option.
    DataError
        No raw counts, unknown genes, cells without a count, a missing column or key.
    CheckpointError
        What the model computes is not finite; nothing is written then.
    """
    inputs.check_table(adata, copy)
    found = Contexts.of(
        adata, inputs.load_model(model), layer=layer, batch_key=batch_key, spatial_key=spatial_key, context=context,
        cells_per_bag=cells_per_bag, batch_size=batch_size, gene_column=gene_column, duplicates=duplicates, seed=seed,
        n_contexts=n_contexts,
    )  # fmt: skip
    draws = found.draws()
    total = next(draws)
    for one in draws:
        total += one
    target = inputs.output_adata(adata, copy)
    found.write(target, total, key_added)
    return target if copy else None


@dataclasses.dataclass(frozen=True)
class Contexts:
    """The cells of an AnnData, and the bags in which a model reads them: several draws of them, each with an embedding.

    Attributes
    ----------
    model, reader, cells
        What reads, how, and what is read.
    settings
        The parameters, as `uns` keeps them.
    context, batch_size
        See `embed`.
    """

    model: Pretrained
    reader: CellReader
    cells: CellCounts
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
        reader: CellReader = families.require(model, "embed")
        _check_single(
            reader,
            model,
            cells_per_bag=cells_per_bag,
            spatial_key=spatial_key,
            n_contexts=n_contexts,
            context=context,
        )
        size = reader.cells_per_bag(cells_per_bag)
        check_at_least("seed", seed, 0)
        check_at_least("n_contexts", n_contexts, 1)
        if n_contexts > 1 and spatial_key is not None:
            raise ConfigError(
                f"n_contexts is {n_contexts}, but with spatial_key bags follow from positions, so there is nothing to "
                "average: leave out n_contexts or spatial_key."
            )
        parts = inputs.sections(adata, batch_key, spatial_key)
        bags.check_context(context, parts[0])
        cells = CellCounts(
            adata, model.vocabulary, parts, layer=layer, gene_column=gene_column, duplicates=duplicates
        )
        inputs.check_counted(cells)
        read_in = context if spatial_key is not None else "random"
        settings = {
            "cells_per_bag": size, "batch_key": batch_key, "spatial_key": spatial_key,
            "context": read_in if reader.in_bags else "single", "seed": seed, "n_contexts": n_contexts,
        }  # fmt: skip
        return cls(model, reader, cells, settings, context, batch_size)

    def draws(self) -> Iterator[np.ndarray]:
        """The embedding (N, D) float32 in each draw of the bags."""
        said, name = self.settings, self.reader.readout
        for seed in range(said["seed"], said["seed"] + said["n_contexts"]):
            orders = None
            if self.reader.in_bags:
                orders = [
                    bags.plan_bags(part, said["cells_per_bag"], seed, self.context)
                    for part in self.cells.sections
                ]
            embedding = np.zeros((0, 0), np.float32)
            for one in self.reader.results(
                self.cells, orders, (name,), "embedding cells", self.batch_size, seed
            ):
                vectors = one.outputs[name]
                if not embedding.size:
                    embedding = np.zeros((self.cells.n_cells, vectors.shape[-1]), np.float32)
                embedding[one.rows[one.is_target]] = vectors[one.is_target]
            yield embedding

    def write(self, target: ad.AnnData, total: np.ndarray, key: str) -> None:
        """Write the mean of the draws, of their sum (N, D), and how it was made."""
        said = self.settings
        target.obsm[key] = (total / np.float32(said["n_contexts"])).astype(np.float32, copy=False)
        inputs.keep_scales(target, self.cells.sections, said["batch_key"], said["spatial_key"])
        target.uns[key] = inputs.record(self.model, self.cells, **said)


def _check_single(reader: CellReader, model: Pretrained, **given: Any) -> None:
    """Raise `ConfigError` where options of bags are given for a model that reads cells one by one."""
    defaults = {"cells_per_bag": None, "spatial_key": None, "n_contexts": 1, "context": bags.CONTEXTS[0]}
    for name, value in given.items():
        if not reader.in_bags and value != defaults[name]:
            raise ConfigError(
                f"{name} is {value!r}, but a model of the family {model.family!r} reads cells one by one: leave {name} "
                "out."
            )
