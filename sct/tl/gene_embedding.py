"""`sct.tl.gene_embeddings`: one vector per gene."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import anndata as ad
import numpy as np
import pandas as pd

from sct import families
from sct.checks import check_not_empty
from sct.errors import ConfigError, DataError
from sct.inference import inputs
from sct.inference.bags import plan_bags
from sct.inference.gene_vectors import GeneVectors
from sct.tl.embedding import Contexts


def gene_embeddings(
    model: inputs.ModelLike,
    genes: str | Iterable[str] | None = None,
    *,
    adata: ad.AnnData | None = None,
    layer: str | None = None,
    batch_key: str | None = None,
    spatial_key: str | None = None,
    cells_per_bag: int | None = None,
    batch_size: int | None = None,
    gene_column: str | None = None,
    duplicates: Literal["error", "sum"] = "error",
    seed: int = 0,
) -> pd.DataFrame:
    """Return one vector per gene, for example to find genes that the model represents by similar vectors.

    The meaning of the vector depends on the model:

    - **ZerOmics**: the text feature of the gene, projected to the width of the cell model. Genes without a text feature
      have no vector.
    - **Cell encoders that read genes as tokens**: the embedding of the gene, after its layer norm.
    - **Cell-sentence models**: the mean input embedding of the tokens of the gene name.
    - **sCT**: sCT embeds only expression levels, so it has no vector of a gene alone. Pass cells as `adata`. The vector
      is the activation before the output head at the position of the gene, averaged over these cells. The vectors
      depend on the cells, so compare only genes from the same call. Genes that were not measured in these cells have no
      vector.

    Parameters
    ----------
    model
        Result of `sct.load`, a path or a Hub id.
    genes
        Ids or symbols of genes. Default: all genes that have a vector.
    adata
        Cells with raw counts (N, n_var), for sCT. The AnnData is not changed.
    layer, batch_key, spatial_key, cells_per_bag, batch_size, gene_column, duplicates, seed
        With `adata`: see `sct.tl.embed`.

    Returns
    -------
    Table (genes, D) float32. The index has the names in `genes`. Without `genes`, the index has gene symbols; a gene
    whose symbol is not unique has its Ensembl id.

    Raises
    ------
    ConfigError
        The model has no gene vectors, or `adata` is missing or has no effect.
    DataError
        A gene is unknown or has no vector, or `sct.tl.embed` cannot read the data.
    CheckpointError
        The model output is not finite.
    """
    handle = inputs.load_model(model)
    maker: GeneVectors = families.require(handle, "embed_genes")
    vocabulary = handle.vocabulary
    if maker.needs_cells and adata is None:
        raise ConfigError(
            f"`adata` is missing, but a model of the family {handle.family!r} computes the vector of a gene from the "
            "cells that express it: pass cells as adata=..."
        )
    if not maker.needs_cells and adata is not None:
        raise ConfigError(
            f"`adata` has no effect, because the gene vectors of the family {handle.family!r} do not depend on cells: "
            "do not pass `adata`."
        )
    listed = None if genes is None else inputs.gene_names("genes", genes)
    if listed is not None:
        check_not_empty("genes", listed)
    wanted = np.arange(len(vocabulary)) if listed is None else vocabulary.find(listed)
    if adata is None:
        vectors = maker.vectors(None, None)
    else:
        inputs.check_table(adata, False)
        found = Contexts.of(
            adata, handle, layer=layer, batch_key=batch_key, spatial_key=spatial_key, cells_per_bag=cells_per_bag,
            batch_size=batch_size, gene_column=gene_column, duplicates=duplicates, seed=seed,
        )  # fmt: skip
        orders = [
            plan_bags(part, found.settings["cells_per_bag"], seed, found.context)
            for part in found.cells.sections
        ]
        vectors = maker.vectors(found.cells, orders, batch_size)
    there = ~np.isnan(vectors[wanted]).any(axis=1)
    if listed is None:
        wanted = wanted[there]
        names = [
            vocabulary.symbols[gene]
            if vocabulary.owners_of_symbol.get(vocabulary.symbols[gene]) == (gene,)
            else vocabulary.keys[gene]
            for gene in wanted.tolist()
        ]
    else:
        names = listed
        if not there.all():
            lacking = "the model has no vector for" if adata is None else "adata has no counts of"
            raise DataError(
                f"{lacking} {int((~there).sum()):,} of the genes (first: {listed[int(np.argmin(there))]!r}): leave out "
                "these genes."
            )
    return pd.DataFrame(vectors[wanted], index=pd.Index(names, name="gene", dtype=object))
