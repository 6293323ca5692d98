"""`sct.pp.to_orthologs`: replace the genes of another species by their human orthologs."""

from __future__ import annotations

import os
from collections.abc import Sequence

import anndata as ad
import numpy as np
import pandas as pd

from sct import messages
from sct.checks import check_type
from sct.data.genes.alignment import ENSEMBL, look_up
from sct.data.genes.orthologs import MappedGenes, Orthologs, map_orthologs, read_orthologs
from sct.errors import DataError
from sct.version import __version__


def to_orthologs(
    adata: ad.AnnData,
    table: Orthologs | str | os.PathLike[str],
    *,
    source: str | Sequence[str] | None = None,
    target: str | Sequence[str] | None = None,
    gene_column: str | None = None,
    key_added: str = "sct_orthologs",
) -> ad.AnnData:
    """Replace the genes of another species by their human one-to-one orthologs, and drop all other genes.

    The values of the genes that remain do not change in X, in the layers and in raw. A message on standard error
    reports how many genes were mapped and why the others were dropped. A second message reports the same for raw.

    Parameters
    ----------
    adata
        Cells (N, n_var) in memory or backed; a backed AnnData is loaded into memory. The input is not changed.
    table
        Path of an ortholog table, or the result of `sct.data.genes.orthologs.read_orthologs`.
    source, target
        Columns of the file, see `read_orthologs`.
    gene_column
        Column of `var` and `raw.var` with the Ensembl ids or symbols that the table uses ("index" for the index). By
        default, the column is detected.
    key_added
        `uns[key_added]`: name of the table and its number of gene pairs, the column with the gene names, the number of
        genes before the mapping, the number of mapped genes, and the number of dropped genes for each reason.

    Returns
    -------
    AnnData (N, mapped genes). `var_names` are human gene symbols, with two exceptions. Genes that share a symbol get
    their Ensembl ids. A gene that is missing from the human gene table gets the name that it has in the ortholog
    table. `var["ensembl_id"]` has the human Ensembl ids, or '' if unknown. `var["source_gene"]` has the original names.
    An existing column "ensembl_id" is renamed to "source_ensembl_id".

    Raises
    ------
    DataError
        The table cannot be used or maps almost no genes, the genes are already human, or two columns map to the same
        gene.
    """
    check_type(
        "adata",
        adata,
        ad.AnnData,
        "an AnnData",
        error=DataError,
        advice="read a file with anndata.read_h5ad first",
    )
    if not isinstance(table, Orthologs):
        table = read_orthologs(table, source=source, target=target)
    elif source is not None or target is not None:
        raise DataError(
            "`source` and `target` select columns of a file, but `table` is already an Orthologs object: "
            "do not pass `source` and `target`."
        )
    mapped = map_orthologs(adata.var, table, column=gene_column)
    if adata.isbacked:
        adata = adata.to_memory()
    result = _renamed(adata, mapped, table)
    sentences = [mapped.summary()]
    if adata.raw is not None:
        raw = adata.raw.to_adata()
        mapped_raw = map_orthologs(raw.var, table, column=gene_column, report_name="raw")
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
    for sentence in sentences:
        messages.notice(sentence)
    return result


def _renamed(adata: ad.AnnData, mapped: MappedGenes, table: Orthologs) -> ad.AnnData:
    """Keep only the genes that have an ortholog, and rename each gene to its ortholog."""
    mapped.check_distinct(
        "sum these columns or remove all but one, or set gene_column to a column of var with distinct genes"
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
