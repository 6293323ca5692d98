"""`sct.tl.annotate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from sklearn.neighbors import NearestNeighbors

from sct import families
from sct.checks import check_at_least, check_choice, check_finite, check_share
from sct.data.genes.alignment import check_shared
from sct.errors import ConfigError, DataError
from sct.inference import inputs
from sct.inference.answers import Annotator
from sct.inference.labels import warn_of_labels
from sct.tl.embedding import Contexts
from sct.version import __version__
from sct.weights.pretrained import Pretrained

UNKNOWN = "unknown"
CONTEXTS = 3  # draws of the bags; see docs/tools.md for what more bring
_EMBED_OPTIONS = (
    "layer", "batch_key", "spatial_key", "context", "cells_per_bag", "batch_size", "gene_column", "duplicates", "seed",
)  # fmt: skip


def annotate(
    adata: ad.AnnData,
    model: inputs.ModelLike | None = None,
    *,
    reference: ad.AnnData | None = None,
    label_key: str | Sequence[str] | None = None,
    candidates: Sequence[Any] | None = None,
    use_rep: str | None = None,
    n_neighbors: int = 15,
    threshold: float | None = None,
    n_contexts: int | None = None,
    key_added: str = "sct_label",
    copy: bool = False,
    **options: Any,
) -> ad.AnnData | None:
    """Name cells: by nearest neighbours among annotated ones, or by a model that answers in words.

    With a reference, labels are transferred by nearest neighbours among embeddings, without training. The probability
    of a label is the share of the `n_neighbors` nearest reference cells (cosine distance) that have it; reference cells
    without a label take no part. A cell whose most probable label has a share below `threshold` is "unknown". With
    equal shares the label of the nearer cells (smaller summed distance) wins.

    A model of cell sentences needs no reference: it is asked about each cell, and the probability of each candidate
    answer is computed, so that an answer is always one of the candidates (Cell2Sentence paper, section 4.3). So does a
    ZerOmics model, which is told an abstract of the study as well (ZerOmics paper, section 3.2).

    Parameters
    ----------
    adata
        Cells to annotate.
    model
        Embeds both, or answers; of `sct.load`, or its path. Not needed with `use_rep`.
    reference
        Cells with labels, raw counts of any genes of the model.
    label_key
        Column of `reference.obs`. For a model of cell sentences "cell_type", "tissue", or the names of labels that it
        learned together; by default the first of them that it learned.
    candidates
        For a model of cell sentences: answers to choose among (texts, or for labels learned together mappings); by
        default all values in its training. For a ZerOmics model: names of cell types, by default
        `adata.uns["cell_types"]`.
    use_rep
        Key of an embedding that is in `obsm` of both already, instead of a new one.
    n_neighbors
        See above.
    threshold
        Least probability of a label; below it a cell is "unknown". By default 0.5 with a reference, 0 for answers.
    n_contexts
        Draws of the bags in which a model reads the cells, by `seed`, `seed + 1`, ...: neighbours are those by the mean
        embedding. By default 3; 1 with `use_rep`, and with `spatial_key`, where bags follow from positions (a
        reference without positions is then read in one random draw).
    key_added
        Results: `obs[key_added]`, categorical; `obs[key_added + "_probability"]`, the share of the best label
        (of cells that became "unknown" too); `obsm[key_added + "_probabilities"]`, float32 (N, labels);
        `uns[key_added]`, the parameters, and "labels", the names of these columns. A new embedding stays in
        `obsm["X_sct"]` of both. With several contexts `obs[key_added + "_agreement"]`, the share of them in which the
        embedding alone gives the same best label (of cells that became "unknown" too), whose mean is
        `uns[key_added]["agreement"]`. For labels learned together
        there is a column `obs[key_added + "_" + label]` for each, too.
    copy
        Return a changed copy, and leave `adata` as it is.
    options
        For `sct.tl.embed`: `layer`, `batch_key`, `spatial_key`, `seed`, ...; `batch_key` and `spatial_key` are
        applied to whichever of the two has them. For a model of cell sentences: `layer`, `gene_column`, `duplicates`,
        `seed`, `batch_size` (cells at once), and `templates`, the number of wordings of the question to average over.
        For a ZerOmics model these, `abstract`, by default `adata.uns["abstract"]`, and `values`, "activity" for a
        matrix that is no counts.

    Raises
    ------
    ConfigError
        Neither a model nor `use_rep`, or a number out of range.
    DataError
        No such column or embedding, no labels, and what `sct.tl.embed` refuses.
    """
    inputs.check_table(adata, copy)
    if reference is None:
        if use_rep is not None or n_neighbors != 15:
            raise ConfigError("use_rep and n_neighbors are for a reference: give one, or leave them out.")
        if n_contexts is not None:
            raise ConfigError(
                "n_contexts is for a reference, whose cells a model reads in bags: give one, or leave it out."
            )
        return _by_answers(
            adata,
            model,
            label_key,
            candidates,
            0.0 if threshold is None else threshold,
            key_added,
            copy,
            options,
        )
    if candidates is not None or not isinstance(label_key, str):
        raise ConfigError(
            "labels of a reference are those of one of its columns: give label_key, the column's name, and no "
            "candidates."
        )
    threshold = 0.5 if threshold is None else threshold
    inputs.check_table(reference, False)
    check_share("threshold", threshold)
    check_at_least("n_neighbors", n_neighbors, 1)
    try:
        labels = inputs.column(reference, label_key, "label_key")
    except DataError as error:
        raise DataError(f"the reference: {error}") from error
    known = np.flatnonzero(labels.notna().to_numpy())
    if not len(known):
        raise DataError(
            f"no reference cell has a label in obs[{label_key!r}]: name the column that holds them."
        )
    given = options if n_contexts is None else {**options, "n_contexts": n_contexts}
    _check_options(adata, reference, use_rep, given)
    target = inputs.output_adata(adata, copy)
    drawn: list[np.ndarray] = []  # best label of each cell in each context
    given_embedding = use_rep is not None
    if use_rep is None:
        if model is None:
            raise ConfigError("give a model to embed with, or use_rep=... to use an embedding that is there.")
        handle, use_rep = inputs.load_model(model), "X_sct"
        if n_contexts is None:
            several = families.require(handle, "embed").in_bags and options.get("spatial_key") is None
            n_contexts = CONTEXTS if several else 1
        pair = _contexts(reference, target, handle, {**options, "n_contexts": n_contexts})
        totals: list[np.ndarray] = []
        for found in zip(*(each.draws() for each in pair), strict=True):
            if n_contexts > 1:
                drawn.append(_shares(found[0][known], found[1], labels.to_numpy()[known], n_neighbors)[1])
            if not totals:
                totals = list(found)
                continue
            for total, one in zip(totals, found, strict=True):
                total += one
        for each, cells, total in zip(pair, (reference, target), totals, strict=True):
            each.write(cells, total, use_rep)
    for name, cells in (("adata", target), ("the reference", reference)):
        check_choice(
            f"use_rep, a key of obsm of {name},",
            use_rep,
            cells.obsm,
            error=DataError,
            advice=f"run sct.tl.embed on {name}, or leave use_rep out",
        )
        values = np.asarray(cells.obsm[use_rep])[known if cells is reference else slice(None)]
        check_finite(
            f"obsm[{use_rep!r}] of {name}", values, "cells", advice="embed them again, or leave them out"
        )
    searched, asked = np.asarray(reference.obsm[use_rep])[known], np.asarray(target.obsm[use_rep])
    if searched.shape[1] != asked.shape[1]:
        raise DataError(
            f"obsm[{use_rep!r}] has {asked.shape[1]} columns, but that of the reference {searched.shape[1]}: embed "
            "both with the same model."
        )
    shares, best = _shares(searched, asked, labels.to_numpy()[known], n_neighbors)
    probability = shares.to_numpy()[np.arange(len(asked)), best].astype(np.float32)
    named = np.where(probability >= threshold, shares.columns.to_numpy()[best], UNKNOWN)
    why = "their neighbours disagree, so look at the embedding, or change n_neighbors or threshold"
    # No model computed an embedding that is given, and a query may well be cells of one type.
    warn_of_labels(named, shares.columns, probability, UNKNOWN, why, may_be_alike=given_embedding)
    target.obs[key_added] = pd.Categorical(named)
    target.obs[f"{key_added}_probability"] = probability
    target.obsm[f"{key_added}_probabilities"] = shares.to_numpy()
    target.obs.drop(columns=f"{key_added}_agreement", errors="ignore", inplace=True)
    contexts: dict[str, Any] = {"n_contexts": n_contexts or 1}
    if drawn:
        agreement = np.mean([one == best for one in drawn], axis=0, dtype=np.float32)
        target.obs[f"{key_added}_agreement"] = agreement
        contexts["agreement"] = float(agreement.mean())
    target.uns[key_added] = {
        "sct_version": __version__,
        **contexts,
        "label_key": label_key,
        "labels": shares.columns.tolist(),
        "use_rep": use_rep,
        "n_neighbors": n_neighbors,
        "threshold": threshold,
        "reference_cells": len(known),
    }
    return target if copy else None


def _by_answers(
    adata: ad.AnnData,
    model: inputs.ModelLike | None,
    label_key: Any,
    candidates: Any,
    threshold: float,
    key_added: str,
    copy: bool,
    options: Mapping[str, Any],
) -> ad.AnnData | None:
    """Annotate without a reference, by a model that answers in words."""
    handle = inputs.load_model(model) if model is not None else None
    if handle is None or families.model(handle.family).annotate is None:
        words = dict.fromkeys(
            each.config for each in families.models().values() if each.annotate and each.config
        )
        raise ConfigError(
            "annotated cells are needed to transfer labels from: give reference=... and label_key=..., or a model that "
            f"answers in words (of {' or '.join(words)})."
        )
    check_share("threshold", threshold)
    annotator: Annotator = families.require(handle, "annotate")
    for name in options:
        check_choice(
            "the option",
            name,
            annotator.options,
            advice="leave it out, or give one of a model that answers in words",
        )
    return annotator.annotate(
        adata, label_key=label_key, candidates=candidates, threshold=threshold, unknown=UNKNOWN,
        key_added=key_added, copy=copy, **options,
    )  # fmt: skip


def _contexts(
    reference: ad.AnnData, query: ad.AnnData, model: Pretrained, options: Mapping[str, Any]
) -> list[Contexts]:
    """How the model reads the reference and the query; `DataError` where they share hardly any gene."""
    found = []
    for cells in (reference, query):
        here = {name: value for name, value in options.items() if _applies(name, value, cells)}
        try:
            found.append(Contexts.of(cells, model, **here))
        except DataError as error:
            raise DataError(f"the reference: {error}" if cells is reference else str(error)) from error
    # Each may have enough of the model's genes, and yet they may be others.
    measured = [each.cells.measured for each in found]
    shared = int((measured[0] & measured[1]).sum())
    check_shared(shared, min(int(each.sum()) for each in measured), "those of adata and of the reference")
    return found


def _check_options(
    adata: ad.AnnData, reference: ad.AnnData, use_rep: str | None, options: Mapping[str, Any]
) -> None:
    """Refuse options that would be ignored."""
    for name in options:
        check_choice("the option", name, (*_EMBED_OPTIONS, "n_contexts"))
        if use_rep is not None:
            raise ConfigError(
                f"{name} is for a new embedding, but use_rep={use_rep!r} takes one that is there: give one of both."
            )
    for name, where in (("batch_key", "obs"), ("spatial_key", "obsm")):
        key = options.get(name)
        if key is not None and not any(key in getattr(cells, where) for cells in (adata, reference)):
            raise DataError(
                f"neither adata nor the reference has {where}[{key!r}]: name another ({name}=...)."
            )


def _applies(name: str, value: Any, cells: ad.AnnData) -> bool:
    """Whether an option of `embed` is for these cells: keys are for those that have them."""
    if value is None:
        return False
    if name == "batch_key":
        return value in cells.obs
    return value in cells.obsm if name == "spatial_key" else True


def _shares(
    searched: np.ndarray, asked: np.ndarray, labels: np.ndarray, n_neighbors: int
) -> tuple[pd.DataFrame, np.ndarray]:
    """Share of each label among the neighbours of each cell, (N, labels), and the best label's column (N,)."""
    codes, names = pd.factorize(labels.astype(str), sort=True)
    size = min(n_neighbors, len(searched))
    index = NearestNeighbors(n_neighbors=size, metric="cosine").fit(searched)
    distance, found = index.kneighbors(asked)
    shares, nearness = np.zeros((2, len(asked), len(names)), np.float64)
    rows = np.repeat(np.arange(len(asked)), size)
    np.add.at(shares, (rows, codes[found].ravel()), 1 / size)
    np.add.at(nearness, (rows, codes[found].ravel()), 2 - distance.ravel())
    # Shares are multiples of 1/k, so a smaller number than that only breaks ties.
    best = np.argmax(np.round(shares * size) + nearness / (2 * size + 1), axis=1)
    return pd.DataFrame(shares.astype(np.float32), columns=names), best
