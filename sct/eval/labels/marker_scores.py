"""Label cells by marker genes, without a model: each cell gets the label whose marker genes have the highest score."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from sct.data.normalization import log_expression
from sct.errors import DataError
from sct.eval import metrics
from sct.extras import load_extra

NAME = "marker scores"


def read_markers(path: str | Path) -> dict[str, tuple[str, ...]]:
    """Read marker genes from a JSON file such as `{"B cell": ["MS4A1", "CD79A"], ...}`.

    Returns
    -------
    Dict from each label to its marker genes (symbols).

    Raises
    ------
    DataError
        The file cannot be read or has another format.
    """
    try:
        content = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"cannot read the marker file {path} ({reason}): pass a readable JSON file."
        ) from error
    form = '{"B cell": ["MS4A1", "CD79A"], ...}'
    if not isinstance(content, dict) or not content:
        raise DataError(
            f"the marker file {path} must contain a JSON object with at least one label: write the object as {form}."
        )
    for label, genes in content.items():
        if not isinstance(genes, list) or not genes or not all(isinstance(gene, str) for gene in genes):
            raise DataError(
                f"the markers of {label!r} in {path} must be a non-empty list of gene symbols: write {form}."
            )
    return {str(label): tuple(genes) for label, genes in content.items()}


def _table(counts: Any, symbols: Sequence[str]) -> ad.AnnData:
    return ad.AnnData(
        X=log_expression(sparse.csr_matrix(counts, dtype=np.float32)), var=pd.DataFrame(index=list(symbols))
    )


@contextlib.contextmanager
def _name_label(label: str) -> Iterator[None]:
    """If scanpy cannot score the markers of a label, raise an error that names this label."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise DataError(
            f"scanpy cannot score the markers of {label!r} ({error}): pass fewer markers for this label, or cells "
            "with more genes."
        ) from error


def find_markers(
    counts: Any, names: Sequence[str], symbols: Sequence[str], number: int = 25
) -> dict[str, tuple[str, ...]]:
    """Return the marker genes of each label: the genes that are most upregulated in cells with this label.

    The cells are compared with all other cells by Welch's t-test, as computed by scanpy.

    Parameters
    ----------
    counts, names
        Raw counts (N, G) and labels (N,). A label with a single cell gets no markers.
    symbols
        Symbols of the G genes.
    number
        Maximum number of genes per label.

    Returns
    -------
    Dict from each label to its marker genes (symbols), the best first. The dict is empty if there are fewer than two
    labels.
    """
    scanpy = load_extra("scanpy", "cells")
    table = _table(counts, symbols)
    table.obs["label"] = pd.Categorical(np.asarray(names, dtype=object).astype(str))
    sizes = table.obs["label"].value_counts()
    groups = [str(label) for label in table.obs["label"].cat.categories if sizes[label] > 1]
    if len(sizes) < 2 or not groups:
        return {}
    with metrics.quiet():
        scanpy.tl.rank_genes_groups(table, "label", groups=groups, method="t-test", n_genes=number)
    found = table.uns["rank_genes_groups"]
    return {
        label: tuple(
            str(gene)
            for gene, score in zip(found["names"][label], found["scores"][label], strict=True)
            if score > 0
        )
        for label in groups
    }


def marker_scores(
    counts: Any, symbols: Sequence[str], markers: Mapping[str, Sequence[str]], candidates: Sequence[str]
) -> pd.DataFrame:
    """Score the markers of each candidate label in each cell with scanpy's `score_genes`.

    The score is the mean expression of the markers minus that of control genes with a similar expression level.

    Parameters
    ----------
    counts
        (N, G) raw counts.
    symbols
        Symbols of the G genes.
    markers
        Dict from each label to its marker genes (symbols).
    candidates
        Candidate labels. A candidate without measured markers gets a score below all others in every cell.

    Returns
    -------
    Table float64 (N, candidates).

    Raises
    ------
    DataError
        No candidate has a marker among the genes.
    """
    scanpy = load_extra("scanpy", "cells")
    table, known, scores = _table(counts, symbols), set(symbols), {}
    for label in candidates:
        own = [gene for gene in dict.fromkeys(markers.get(label, ())) if gene in known]
        if own:
            with metrics.quiet(), _name_label(label):
                # Panels of few genes need fewer expression bins, or a bin would have no control genes.
                bins = min(25, max(table.n_vars // 20, 2))
                scanpy.tl.score_genes(table, own, score_name="score", n_bins=bins, random_state=0)
            scores[label] = table.obs["score"].to_numpy(float)
    if not scores:
        raise DataError(
            "none of the candidate labels has a marker gene that is measured in these cells: use the candidate "
            "labels as keys of the marker dict, and symbols of measured genes as its values."
        )
    lowest = min(own.min() for own in scores.values())
    return pd.DataFrame(
        {label: scores.get(label, np.full(table.n_obs, lowest - 1.0)) for label in candidates}
    )
