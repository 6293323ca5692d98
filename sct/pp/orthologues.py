"""`sct.pp.to_orthologues`."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence

import anndata as ad
import numpy as np
import pandas as pd

from sct.data.alignment import ENSEMBL, look_up, some
from sct.data.orthologues import MappedGenes, Orthologues, map_orthologues, read_orthologues
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

    Values are those of `adata`, in X, in every layer and in raw. One sentence on standard error says how many genes
    were mapped and why the others were not.

    Parameters
    ----------
    adata
        (N, n_var), in memory or backed, of which the genes that are kept are read into memory. It is not changed.
    table
        File of orthologues, or what `sct.data.orthologues.read_orthologues` made of one.
    source, target
        Columns of the file, see `read_orthologues`.
    gene_column
        Column of `var` with Ensembl ids or symbols as the table has them ("index" for its index); by default it is
        found.
    key_added
        `uns[key_added]`: name of the table, number of its pairs, where the genes were named, how many there were, were
        mapped, and were dropped, by reason.

    Returns
    -------
    AnnData (N, mapped genes): `var_names` are symbols (the Ensembl id where two genes share a symbol, the table's own
    name where the human genes lack it), `var["ensembl_id"]` the Ensembl ids, '' where unknown, and `var["source_gene"]`
    the names before.

    Raises
    ------
    DataError
        The table cannot be used, it maps hardly any gene, the genes are human already, or two columns are one gene.
    """
    if not isinstance(adata, ad.AnnData):
        raise DataError(
            f"the data is a {type(adata).__name__}, but an AnnData is needed: read a file with anndata.read_h5ad first."
        )
    if not isinstance(table, Orthologues):
        table = read_orthologues(table, source=source, target=target)
    elif source is not None or target is not None:
        raise DataError(
            "source and target are columns of a file, but the table is read already; leave them out"
        )
    mapped = map_orthologues(adata.var, table, column=gene_column)
    result = _renamed(adata, mapped, table)
    if adata.raw is not None:
        raw = adata.raw.to_adata()
        column = gene_column if gene_column in raw.var else None
        result.raw = _renamed(raw, map_orthologues(raw.var, table, column=column, report_name="raw"), table)
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
        bar.write(mapped.summary())
    return result


def _renamed(adata: ad.AnnData, mapped: MappedGenes, table: Orthologues) -> ad.AnnData:
    """The genes that have an orthologue, under its name."""
    kept = np.flatnonzero([bool(target) for target in mapped.targets])
    targets = [mapped.targets[at] for at in kept]
    named: dict[str, list[str]] = defaultdict(list)
    for at, target in zip(kept.tolist(), targets, strict=True):
        named[target].append(mapped.names[at])
    twice = {target: names for target, names in named.items() if len(names) > 1}
    if twice:
        shown = some(f"{' and '.join(names)} for {target}" for target, names in twice.items())
        raise DataError(
            f"{len(twice):,} genes stand in more than one column by {mapped.source} ({shown}); add these columns up or "
            "remove the surplus ones, or name a column of var in which genes differ (gene_column=)"
        )
    part = adata[:, kept]
    result = part.to_memory() if adata.isbacked else part.copy()
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
    result.var["ensembl_id"] = np.array(ids, dtype=object)
    result.var["source_gene"] = np.array([mapped.names[at] for at in kept], dtype=object)
    return result
