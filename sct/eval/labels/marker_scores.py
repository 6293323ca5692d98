"""Labels by marker genes: each cell is what the genes of a label are highest for, without any model."""

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
    """Read marker genes of labels, a JSON file `{"B cell": ["MS4A1", "CD79A"], ...}`; `DataError` for another form."""
    try:
        content = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or error
        raise DataError(f"the markers in {path} cannot be read ({said}): give a JSON file.") from error
    form = '{"B cell": ["MS4A1", "CD79A"], ...}'
    if not isinstance(content, dict) or not content:
        raise DataError(f"{path} is not of the form {form}: write it so.")
    for label, genes in content.items():
        if not isinstance(genes, list) or not genes or not all(isinstance(gene, str) for gene in genes):
            raise DataError(f"the markers of {label!r} in {path} are no list of genes: write {form}.")
    return {str(label): tuple(genes) for label, genes in content.items()}


def _table(counts: Any, symbols: Sequence[str]) -> ad.AnnData:
    return ad.AnnData(
        X=log_expression(sparse.csr_matrix(counts, dtype=np.float32)), var=pd.DataFrame(index=list(symbols))
    )


@contextlib.contextmanager
def _told(label: str) -> Iterator[None]:
    """Say of which label scanpy cannot score the markers, as where they are all genes of their level."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise DataError(
            f"the markers of {label!r} cannot be scored ({error}): give fewer, or more genes."
        ) from error


def find_markers(
    counts: Any, names: Sequence[str], symbols: Sequence[str], number: int = 25
) -> dict[str, tuple[str, ...]]:
    """Genes that tell the cells of each label from the others (Welch's t-test, scanpy), the first ones with a plus.

    Parameters
    ----------
    counts, names
        (N, G) raw counts, and labels (N,); a label of a single cell has no markers.
    symbols
        Of the G genes.
    number
        Genes of a label at most.
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
    """How much higher the markers of each candidate are than other genes of the same level (scanpy's `score_genes`).

    Parameters
    ----------
    counts
        (N, G) raw counts.
    symbols
        Of the G genes.
    markers
        Label -> genes.
    candidates
        Labels; one without markers that were measured has the lowest score of all for every cell.

    Returns
    -------
    float64 (N, candidates).

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
            with metrics.quiet(), _told(label):
                # Of a panel of few genes, whose bins of equal expression would hold none to compare with.
                bins = min(25, max(table.n_vars // 20, 2))
                scanpy.tl.score_genes(table, own, score_name="score", n_bins=bins, random_state=0)
            scores[label] = table.obs["score"].to_numpy(float)
    if not scores:
        raise DataError(
            "no candidate has a marker among the genes of the cells: name them as the candidates are written."
        )
    lowest = min(own.min() for own in scores.values())
    return pd.DataFrame(
        {label: scores.get(label, np.full(table.n_obs, lowest - 1.0)) for label in candidates}
    )
