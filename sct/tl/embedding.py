"""`sct.tl.embed`: compute cell embeddings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import anndata as ad
import numpy as np

from sct import families
from sct.checks import check_at_least, check_choice
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
    readout: str | None = None,
    copy: bool = False,
) -> ad.AnnData | None:
    """Compute cell embeddings with a pretrained model, without training.

    The embedding of a cell is a mean of output vectors of the model. sCT averages over the transformer positions of the
    cell (sCT paper, section 4). The ZerOmics cell model averages over the genes of the cell. Cell-sentence models
    average the last hidden states over the tokens of the sentence. Cell encoders that read genes as tokens have several
    embeddings; see `readout`. All models except sCT read single cells. Models of single cells ignore the
    groups of `batch_key` (except models that normalize each batch separately), and do not accept `spatial_key`,
    `context`, `cells_per_bag` and `n_contexts`.

    sCT reads bags of cells, so the embedding of a cell depends on its bag. Bags are drawn with `seed` from windows of
    10,000 cells of a batch. With `spatial_key`, bags are compact tiles of the tissue section. If the last bag has too
    few cells, it is filled up: without `spatial_key` by the cells drawn first, and with `spatial_key` by the nearest
    cells of other tiles. The result depends only on the cells, their order and the seed. `batch_size`, the devices and
    backed mode change the result at most by rounding errors. Repeating a call gives bit-identical results.

    Parameters
    ----------
    adata
        Raw counts (N, n_var), in memory or backed. X is never changed.
    model
        Result of `sct.load`, a path or a Hub id.
    layer
        Layer with the raw counts. By default, the first of X, raw and layers["counts"] that holds raw counts.
    key_added
        `obsm[key_added]`: the embedding, float32 (N, D). `uns[key_added]`: the parameters. With `spatial_key`,
        `uns["sct_sections"]`: the scale of each section.
    batch_key
        Column of `obs` with the batch of each cell, such as its donor or slide. All cells of a bag come from the same
        batch.
    spatial_key
        Key of the spatial coordinates in `obsm`, for sCT. Bags then contain neighboring cells. Models that were trained
        with coordinates also read them.
    context
        Used with `spatial_key`. "tiles" divides a section into tiles of `cells_per_bag` cells. "neighbors" makes one
        bag per cell, with the cell and its nearest cells, as in training. "neighbors" takes `cells_per_bag` times as
        much computation as "tiles".
    cells_per_bag
        Number of cells in a bag (K). Default: the value from training.
    batch_size
        Number of bags (or single cells) processed at once. By default, a batch has about a million gene tokens per
        device, or 65,536 tokens for models that read single cells.
    gene_column, duplicates
        See `sct.GeneVocabulary.align`.
    seed
        Random seed of the bags. For models that read the most highly expressed genes of a cell, as a sentence or as
        tokens, random seed of the order of genes with equal counts. For models that sample genes, seed of the sample.
    n_contexts
        Number of random draws of the bags (seeds `seed`, `seed + 1`, ...). The result is the mean embedding over the
        draws. With `spatial_key`, `n_contexts` must be 1, because the spatial positions determine the bags.
    readout
        Which vector is the embedding, for models that offer several. "cls": the output at the CLS token. "mean": the
        mean output over CLS and the genes. "weighted": the sum of the outputs, weighted by the values of the genes and
        scaled to length 1. Default: the readout of the model.
    copy
        If True, return a modified copy and leave `adata` unchanged.

    Raises
    ------
    ConfigError
        The model has no cell embeddings or does not accept an option.
    DataError
        The data has no raw counts, too few genes of the model, or cells without counts; or a column or key is missing.
    CheckpointError
        The model output is not finite. In this case nothing is written.
    """
    inputs.check_table(adata, copy)
    found = Contexts.of(
        adata, inputs.load_model(model), layer=layer, batch_key=batch_key, spatial_key=spatial_key, context=context,
        cells_per_bag=cells_per_bag, batch_size=batch_size, gene_column=gene_column, duplicates=duplicates, seed=seed,
        n_contexts=n_contexts, readout=readout,
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
    """Embed the cells of an AnnData. The bags are drawn once or several times.

    Attributes
    ----------
    model
        The loaded model.
    reader
        Object that runs the model over cells.
    cells
        Counts of the cells, aligned to the genes of the model.
    settings
        The parameters in the form in which they are written to `uns`.
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
        readout: str | None = None,
    ) -> Contexts:  # fmt: skip
        """Check the arguments of `embed`, and prepare the embedding of the cells."""
        reader: CellReader = families.require(model, "embed")
        chosen = {} if readout is None else {"readout": readout}
        if readout is not None:
            _choose(reader, model, readout)
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
                f"n_contexts is {n_contexts}, but with spatial_key it must be 1, because the positions "
                "already decide which cells are read together: do not pass `n_contexts`, or do not pass `spatial_key`."
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
            "context": read_in if reader.in_bags else "single", "seed": seed, "n_contexts": n_contexts, **chosen,
        }  # fmt: skip
        return cls(model, reader, cells, settings, context, batch_size)

    def draws(self, masked_genes: np.ndarray | None = None) -> Iterator[np.ndarray]:
        """Yield the embedding (N, D) float32 of each bag draw.

        Parameters
        ----------
        masked_genes
            Mask of genes that are hidden from the model in all cells, bool (G,). Only models that read bags of cells
            and have a mask token can hide genes.
        """
        settings, name = self.settings, self.reader.readout
        hidden: dict[str, Any] = {}
        if masked_genes is not None:
            hidden = {"masked_genes": masked_genes, "inputs": self._masked(np.flatnonzero(masked_genes))}
        for seed in range(settings["seed"], settings["seed"] + settings["n_contexts"]):
            orders = None
            if self.reader.in_bags:
                orders = [
                    bags.plan_bags(part, settings["cells_per_bag"], seed, self.context)
                    for part in self.cells.sections
                ]
            embedding = np.zeros((0, 0), np.float32)
            for one in self.reader.results(
                self.cells, orders, (name,), "embedding cells", self.batch_size, seed, **hidden
            ):
                vectors = one.outputs[name]
                if not embedding.size:
                    embedding = np.zeros((self.cells.n_cells, vectors.shape[-1]), np.float32)
                embedding[one.rows[one.is_target]] = vectors[one.is_target]
            yield embedding

    def _masked(self, genes: np.ndarray) -> bags.PrepareInputs:
        """Return a function that replaces the tokens of some genes in a bag by the mask token.

        `genes` (n,) holds the positions of these genes.
        """
        config = self.model.config

        def prepare(bag: Mapping[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
            tokens = bag["tokens"].copy()
            here = tokens[:, genes]
            tokens[:, genes] = np.where(here < config.num_bins, config.mask, here)
            return {"tokens": tokens}

        return prepare

    def write(self, target: ad.AnnData, total: np.ndarray, key: str) -> None:
        """Write the mean embedding and the parameters to the AnnData.

        `total` (N, D) is the sum of the embeddings over all draws.
        """
        settings = self.settings
        target.obsm[key] = (total / np.float32(settings["n_contexts"])).astype(np.float32, copy=False)
        inputs.keep_scales(target, self.cells.sections, settings["batch_key"], settings["spatial_key"])
        target.uns[key] = inputs.record(self.model, self.cells, **settings)


def _choose(reader: CellReader, model: Pretrained, readout: str) -> None:
    """Set the readout of a reader. Raises `ConfigError` if the model does not have this readout."""
    if not reader.readouts:
        raise ConfigError(
            f"readout is {readout!r}, but models of the family {model.family!r} have only one kind of cell embedding: "
            "do not pass `readout`."
        )
    check_choice("readout", readout, reader.readouts)
    reader.readout = reader.readouts[readout]


def _check_single(reader: CellReader, model: Pretrained, **given: Any) -> None:
    """Raise `ConfigError` if bag options are set for a model that reads single cells."""
    defaults = {"cells_per_bag": None, "spatial_key": None, "n_contexts": 1, "context": bags.CONTEXTS[0]}
    for name, value in given.items():
        if not reader.in_bags and value != defaults[name]:
            raise ConfigError(
                f"{name} is {value!r}, but models of the family {model.family!r} read single cells, not "
                f"bags: do not pass `{name}`."
            )
