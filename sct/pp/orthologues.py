"""`sct.pp.to_orthologues`."""

from __future__ import annotations

import os
from collections.abc import Sequence

import anndata as ad
import numpy as np
import pandas as pd

from sct.checks import check_type
from sct.data.genes.alignment import ENSEMBL, look_up
from sct.data.genes.orthologues import MappedGenes, Orthologues, map_orthologues, read_orthologues
from sct.errors import DataError
from sct.progress import progress
from sct.version import __version__


def to_orthologues(
    adata: ad.AnnData,
    table: Orthologues | str | os.PathLike[str],
    *,
    source: str | Sequence[str] | None = None,
    target: str | Sequence[str] | None = None,
    gene_column: str | None = None,
    key_added: str = "sct_orthologues",
) -> ad.AnnData:
    """Name the genes of another species by their human orthologues, and leave out those that have no single one.

    Values are those of `adata`, in X, in every layer and in raw. A sentence on standard error says how many genes were
    mapped and why the others were not, and another one of raw.

    Parameters
    ----------
    adata
        (N, n_var), in memory, or backed and then read whole. It is not changed.
    table
        File of orthologues, or what `sct.data.genes.orthologues.read_orthologues` made of one.
    source, target
        Columns of the file, see `read_orthologues`.
    gene_column
        Column of `var`, and of that of raw, with Ensembl ids or symbols as the table has them ("index" for the index);
        by default it is found in each.
    key_added
        `uns[key_added]`: name of the table, number of its pairs, where the genes were named, how many there were, were
        mapped, and were dropped, by reason.

    Returns
    -------
    AnnData (N, mapped genes): `var_names` are symbols (the Ensembl id where two genes share a symbol, the table's own
    name where the human genes lack it), `var["ensembl_id"]` the Ensembl ids, '' where unknown, and `var["source_gene"]`
    the names before. A column "ensembl_id" that was there is "source_ensembl_id" then.

    Raises
    ------
    DataError
        The table cannot be used, it maps hardly any gene, the genes are human already, or two columns are one gene.
    """
    check_type(
        "adata",
        adata,
        ad.AnnData,
        "an AnnData",
        error=DataError,
        advice="read a file with anndata.read_h5ad first",
    )
    if not isinstance(table, Orthologues):
        table = read_orthologues(table, source=source, target=target)
    elif source is not None or target is not None:
        raise DataError(
            "source and target are columns of a file, but the table is read already; leave them out"
        )
    mapped = map_orthologues(adata.var, table, column=gene_column)
    if adata.isbacked:
        adata = adata.to_memory()
    result = _renamed(adata, mapped, table)
    sentences = [mapped.summary()]
    if adata.raw is not None:
        raw = adata.raw.to_adata()
        mapped_raw = map_orthologues(raw.var, table, column=gene_column, report_name="raw")
        result.raw = _renamed(raw, mapped_raw, table)
        sentences.append(mapped_raw.summary())
    result.uns[key_added] = {
        "sct_version": __version__,
        "table": table.name,
        "pairs": len(table),
        "genes_from": mapped.source,
        "genes": len(mapped.targets),
        "mapped": mapped.matched,
        "dropped": dict(mapped.dropped),
    }
    with progress("orthologues") as bar:
        for sentence in sentences:
            bar.write(sentence)
    return result


def _renamed(adata: ad.AnnData, mapped: MappedGenes, table: Orthologues) -> ad.AnnData:
    """The genes that have an orthologue, under its name."""
    mapped.check_distinct(
        "add these columns up or remove the surplus ones, or name a column of var in which genes differ (gene_column=)"
    )
    kept = np.flatnonzero([bool(target) for target in mapped.targets])
    targets = [mapped.targets[at] for at in kept]
    result = adata[:, kept].copy()
    genes = table.vocabulary
    positions, _ = look_up(genes, targets)
    symbols = [genes.symbols[at] if at >= 0 else "" for at in positions.tolist()]
    shared = pd.Series(genes.symbols).duplicated(keep=False).to_numpy()
    names = [
        symbol if symbol and not shared[at] else target
        for symbol, at, target in zip(symbols, positions.tolist(), targets, strict=True)
    ]
    ids = [
        genes.ensembl_ids[at] if at >= 0 else target * bool(ENSEMBL.fullmatch(target))
        for at, target in zip(positions.tolist(), targets, strict=True)
    ]
    result.var_names = pd.Index(names, dtype=object)
    result.var = result.var.rename(columns={"ensembl_id": "source_ensembl_id"})
    result.var["ensembl_id"] = np.array(ids, dtype=object)
    result.var["source_gene"] = np.array([mapped.names[at] for at in kept], dtype=object)
    return result
