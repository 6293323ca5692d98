"""`sct.tl.embed`: compute cell embeddings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import anndata as ad
import numpy as np

from sct import families, messages
from sct.checks import check_at_least, check_choice
from sct.data.cells import CellCounts
from sct.errors import ConfigError
from sct.inference import bags, inputs
from sct.inference.readers import CellReader
from sct.inference.readouts import FITTED, Readout, check_memory
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

    By default, the embedding of a cell is a mean of output vectors of the model. sCT averages over the transformer
    positions of the cell (sCT paper, section 4). The ZerOmics cell model averages over the genes of the cell.
    Cell-sentence models average the last hidden states over the tokens of the sentence. sCT and the cell encoders that
    read genes as tokens have several embeddings; see `readout`. All models except sCT read single cells. Models of
    single cells ignore the groups of `batch_key` (except models that normalize each batch separately), and do not
    accept `spatial_key`, `context`, `cells_per_bag` and `n_contexts`.

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
        draws, for any readout. With `spatial_key`, `n_contexts` must be 1, because the spatial positions determine the
        bags.
    readout
        Which vector is the embedding, for models that offer several. Default: the readout that the model folder
        records as its default (`sct.tl.record_benchmark`), otherwise the one described above.

        Cell encoders: "cls" is the output at the CLS token. "mean" is the mean output over CLS and the genes.
        "weighted" is the sum of the outputs, weighted by the values of the genes and scaled to length 1.

        sCT, with L transformer positions per cell: "mean" (D) is the mean over these positions (sCT paper, section 4).
        "flat" (L * D) holds these positions side by side, and "conv" (L * D) the output positions of the convolution
        tower. "fitted" is a fixed linear map of one of these two to a few dimensions, which is stored in the model
        folder; see `sct.tl.fit_readout`. "code" (code_dim) is the code of models that were trained with one. The flat
        readouts of a full-size model have tens of thousands of numbers per cell.
    copy
        If True, return a modified copy and leave `adata` unchanged.

    Raises
    ------
    ConfigError
        The model has no cell embeddings or does not accept an option; or the embeddings of all cells would not fit into
        the memory of this machine.
    DataError
        The data has no raw counts, too few genes of the model, or cells without counts; or a column or key is missing.
    CheckpointError
        The model output is not finite. In this case nothing is written.

    Warns
    -----
    UserWarning
        The default readout of the model was worse on unseen studies than principal components of the training cells.
    """
    inputs.check_table(adata, copy)
    model = inputs.load_model(model)
    if readout is None:
        _warn_if_worse(model)
    found = Contexts.of(
        adata, model, layer=layer, batch_key=batch_key, spatial_key=spatial_key, context=context,
        cells_per_bag=cells_per_bag, batch_size=batch_size, gene_column=gene_column, duplicates=duplicates, seed=seed,
        n_contexts=n_contexts, readout=readout,
    )  # fmt: skip
    (total,) = found.totals().values()
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
    readouts
        The kinds of embeddings to compute, by name.
    settings
        The parameters in the form in which they are written to `uns`.
    context, batch_size
        See `embed`.
    """

    model: Pretrained
    reader: CellReader
    cells: CellCounts
    readouts: Mapping[str, Readout]
    settings: dict[str, Any]
    context: str
    batch_size: int | None

    @classmethod
    def of(
        cls, adata: ad.AnnData, model: Pretrained, *, layer: str | None = None, batch_key: str | None = None,
        spatial_key: str | None = None, context: str = "tiles", cells_per_bag: int | None = None,
        batch_size: int | None = None, gene_column: str | None = None,
        duplicates: Literal["error", "sum"] = "error", seed: int = 0, n_contexts: int = 1,
        readout: str | Sequence[str] | None = None,
    ) -> Contexts:  # fmt: skip
        """Check the arguments of `embed`, and prepare the embedding of the cells.

        `readout` may name several readouts; only the method `totals` then works. An empty sequence means the output
        on which classifiers are trained.
        """
        reader: CellReader = families.require(model, "embed")
        if readout is None:
            readout = default_readout(model)
        names = [readout] if isinstance(readout, str) else list(readout or ())
        readouts = {name: _chosen(reader, model, name) for name in names}
        if len(readouts) == 1:
            reader.readout = readouts[names[0]].output
        chosen = {"readout": names[0]} if len(names) == 1 else {}
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
        readouts = readouts or {reader.readout: Readout(reader.readout)}
        # With several draws: their sum, the draw that is being added, and the next draw.
        check_memory(readouts, model, cells.n_cells, 1 if n_contexts == 1 else 3)
        read_in = context if spatial_key is not None else "random"
        settings = {
            "cells_per_bag": size, "batch_key": batch_key, "spatial_key": spatial_key,
            "context": read_in if reader.in_bags else "single", "seed": seed, "n_contexts": n_contexts, **chosen,
        }  # fmt: skip
        return cls(model, reader, cells, readouts, settings, context, batch_size)

    def totals(self) -> dict[str, np.ndarray]:
        """Return the sum of the embeddings over all bag draws, float32 (N, D), for each readout by its name."""
        draws = self._draws()
        totals = next(draws)
        for one in draws:
            for name in totals:
                totals[name] += one.pop(name)  # frees the memory before the next draw
        return totals

    def draws(self, masked_genes: np.ndarray | None = None) -> Iterator[np.ndarray]:
        """Yield the embedding (N, D) float32 of each bag draw.

        Parameters
        ----------
        masked_genes
            Mask of genes that are hidden from the model in all cells, bool (G,). Only models that read bags of cells
            and have a mask token can hide genes.
        """
        for one in self._draws(masked_genes):
            (embedding,) = one.values()
            yield embedding

    def _draws(self, masked_genes: np.ndarray | None = None) -> Iterator[dict[str, np.ndarray]]:
        """Yield the embeddings of each bag draw by the name of their readout; see `draws`."""
        settings = self.settings
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
            found: dict[str, np.ndarray] = {}
            for one in self.reader.results(
                self.cells, orders, self.readouts, "embedding cells", self.batch_size, seed, **hidden
            ):
                for name, vectors in one.outputs.items():
                    if name not in found:
                        found[name] = np.zeros((self.cells.n_cells, vectors.shape[-1]), np.float32)
                    found[name][one.rows[one.is_target]] = vectors[one.is_target]
            yield found

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
        if settings["n_contexts"] > 1:
            total /= np.float32(settings["n_contexts"])  # in place, because flat readouts are large
        target.obsm[key] = total
        inputs.keep_scales(target, self.cells.sections, settings["batch_key"], settings["spatial_key"])
        target.uns[key] = inputs.record(self.model, self.cells, **settings)


def default_readout(model: Pretrained) -> str | None:
    """Return the readout that a model folder records as the default of the model, or None."""
    return model.embedding.get("default")


def default_name(model: Pretrained) -> str:
    """Return the name of the readout that `embed` uses by default; "" for models with one kind of embedding."""
    reader: CellReader = families.require(model, "embed")
    # Cell encoders have an output that is one of their readouts, which the architecture chooses.
    outputs = (reader.readout, getattr(model.config, "cell_embedding", None))
    found = [name for output in outputs for name, each in reader.readouts.items() if each.output == output]
    return default_readout(model) or next(iter(found), "")


def worse_than_components(model: Pretrained) -> str:
    """Return a sentence if the default embedding was worse than principal components of the training cells, or "".

    The measured 5-NN accuracies are recorded in the model folder; see `sct.tl.record_benchmark`.
    """
    measured = model.embedding.get("measured") or ()
    pairs = [
        (each["accuracy"], each["components"]) for each in measured if each.get("components") is not None
    ]
    if not pairs:
        return ""
    own, components = np.mean(pairs, axis=0)
    if own >= components:
        return ""
    name = default_readout(model)
    return (
        f"the default embedding of this model{f' ({name})' if name else ''} was worse than principal components of the "
        f"training cells (mean 5-NN accuracy {own:.2f} against {components:.2f} on {len(pairs)} unseen studies)"
    )


def comparison_note(model: Pretrained) -> str:
    """Return a line for models with several readouts whose default was not compared with a baseline, or ""."""
    if model.embedding.get("measured") or not families.require(model, "embed").readouts:
        return ""
    return (
        f"note: the default embedding of this model ({default_readout(model) or 'mean output'}) was not compared with "
        "principal components of the training cells; sct benchmark compares all readouts"
    )


_warned: set[str] = set()  # models for which this process has given the warning


def _warn_if_worse(model: Pretrained) -> None:
    text = worse_than_components(model)
    if text and text not in _warned:
        _warned.add(text)
        messages.warn(f"{text}: compare the readouts with sct.tl.benchmark before you use it.")


def _chosen(reader: CellReader, model: Pretrained, readout: str) -> Readout:
    """Return a readout of a model by its name. Raises `ConfigError` if the model does not have this readout."""
    if not reader.readouts:
        raise ConfigError(
            f"readout is {readout!r}, but models of the family {model.family!r} have only one kind of cell embedding: "
            "do not pass `readout`."
        )
    flat = any(each.flat for each in reader.readouts.values())
    if readout == FITTED and readout not in reader.readouts and flat:
        raise ConfigError(
            f"readout is {readout!r}, but this model has no fitted readout: fit one with model = "
            "sct.tl.fit_readout(model, cells), where cells is an AnnData or a store with training cells, and keep it "
            "with model.save_pretrained(FOLDER)."
        )
    check_choice("readout", readout, reader.readouts)
    return reader.readouts[readout]


def _check_single(reader: CellReader, model: Pretrained, **given: Any) -> None:
    """Raise `ConfigError` if bag options are set for a model that reads single cells."""
    defaults = {"cells_per_bag": None, "spatial_key": None, "n_contexts": 1, "context": bags.CONTEXTS[0]}
    for name, value in given.items():
        if not reader.in_bags and value != defaults[name]:
            raise ConfigError(
                f"{name} is {value!r}, but models of the family {model.family!r} read single cells, not "
                f"bags: do not pass `{name}`."
            )
