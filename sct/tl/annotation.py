"""`sct.tl.annotate`: predict cell types or other labels of cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import anndata as ad
import jax.numpy as jnp
import numpy as np
import pandas as pd
from scipy.special import softmax
from sklearn.neighbors import NearestNeighbors

from sct import families
from sct.checks import check_at_least, check_choice, check_finite, check_share
from sct.data.counts import COUNTS, Values
from sct.data.genes.alignment import check_shared
from sct.errors import ConfigError, DataError
from sct.inference import inputs
from sct.inference.answers import Annotator, write_answers
from sct.inference.labels import warn_of_labels
from sct.models import classifier
from sct.tl.embedding import Contexts
from sct.version import __version__
from sct.weights.pretrained import ANNOTATION, Pretrained

UNKNOWN = "unknown"
CONTEXTS = 3  # default number of bag draws; docs/tools.md has measurements with other numbers
# Options that are passed on to `embed` or to a text model -> default.
_DEFAULTS: dict[str, Any] = {
    "layer": None, "batch_key": None, "spatial_key": None, "context": "tiles", "cells_per_bag": None,
    "batch_size": None, "gene_column": None, "duplicates": "error", "seed": 0, "templates": 1, "abstract": None,
    "values": COUNTS,
}  # fmt: skip
_TEXT_OPTIONS = ("templates", "abstract", "values")


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
    layer: str | None = None,
    batch_key: str | None = None,
    spatial_key: str | None = None,
    context: str = "tiles",
    cells_per_bag: int | None = None,
    batch_size: int | None = None,
    gene_column: str | None = None,
    duplicates: Literal["error", "sum"] = "error",
    seed: int = 0,
    templates: int = 1,
    abstract: str | None = None,
    values: Values = COUNTS,
    over_clustering: str | None = None,
    key_added: str = "sct_label",
    copy: bool = False,
) -> ad.AnnData | None:
    """Annotate cells by label transfer from a reference, with a fine-tuned model, or with a text model.

    **With a reference**, each cell gets the label of its nearest reference cells in the embedding space. No training is
    needed. The probability of a label is the fraction of the `n_neighbors` nearest reference cells (cosine distance)
    that have this label. Reference cells without a label are ignored. If two labels have the same probability, the
    label whose neighbors have the smaller summed distance wins.

    **With a fine-tuned model** (`sct.tl.finetune`) and no reference, the classifier of the model predicts the labels
    with which it was trained. The probabilities are calibrated on validation cells, which also chose the best epoch, so
    the probabilities of new cells can be too high. Cells of other types also get one of the labels, so set a
    `threshold` if there may be such cells.

    **With a text model** and no reference, the model answers questions in text. A cell-sentence model (Cell2Sentence
    paper, section 4.3) and a ZerOmics model (ZerOmics paper, section 3.2) can do this. The function computes the
    probability of each candidate answer for each cell, so the label is always one of the candidates. A ZerOmics model
    also reads an abstract of the study.

    In all cases, a cell whose best probability is below `threshold` gets the label "unknown".

    Parameters
    ----------
    adata
        Cells to annotate.
    model
        Result of `sct.load`, a path or a Hub id. Not needed with `use_rep`.
    reference
        Labeled cells with raw counts. The genes can differ from those of `adata`.
    label_key
        With a reference: column of `reference.obs` with the labels. For a cell-sentence model: "cell_type", "tissue",
        or the list of labels that the model learned together; by default, the first of these that the model learned.
    candidates
        Possible answers of a text model. For a cell-sentence model: strings, or mappings for labels that the model
        learned together; by default, all values of the training data. For a ZerOmics model: names of cell types; by
        default, `adata.uns["cell_types"]`.
    use_rep
        Key of an existing embedding in `obsm` of `adata` and of the reference. By default, both are embedded with
        `model`.
    n_neighbors
        Number of nearest reference cells that vote.
    threshold
        Minimum probability of a label; cells below it are "unknown". Default: 0.5 with a reference, otherwise 0.
    n_contexts
        Number of random draws of the bags (seeds `seed`, `seed + 1`, ...). With a reference, neighbors are computed
        from the mean embedding over these draws. A classifier averages its probabilities over the draws. Default: 3 for
        models that read bags, otherwise 1. With `spatial_key`, `n_contexts` must be 1, because the spatial positions
        determine the bags. If only the reference has no positions, the bags of the reference are still drawn only once.
    layer, gene_column, duplicates
        See `sct.tl.embed`.
    batch_key, spatial_key, context, cells_per_bag
        With a reference: options of the bags, see `sct.tl.embed`. `batch_key` and `spatial_key` are used for each
        AnnData that has them.
    batch_size
        Number of bags or cells processed at once. Default: with a reference, see `sct.tl.embed`; for text models, 8
        cells.
    seed
        With a reference: random seed of the bags. For a cell-sentence model: random seed of the order of genes with
        equal counts. For a ZerOmics model: random seed of the order in which the question lists the possible answers.
    templates
        For text models: number of question templates. The probabilities are averaged over the templates.
    abstract
        For a ZerOmics model: abstract of the study, which the model reads with each cell. Default:
        `adata.uns["abstract"]`.
    values
        For a ZerOmics model: "activity" for values that are not counts, such as gene activity of chromatin.
    over_clustering
        Column of `obs` with fine clusters of the cells. Majority voting then also writes the most common label of each
        cell's cluster, not counting "unknown" cells.
    key_added
        Prefix of the results:

        - `obs[key_added]`: labels, categorical.
        - `obs[key_added + "_probability"]`: probability of the best label, also for "unknown" cells.
        - `obsm[key_added + "_probabilities"]`: float32 (N, labels).
        - `uns[key_added]`: the parameters; "labels" names the columns of the probabilities.
        - `obsm["X_sct"]` of `adata` and of the reference: the embedding, if it was computed here.
        - `obs[key_added + "_agreement"]`, with several contexts: fraction of the draws in which the cell has the same
          best label as with the mean embedding, also for "unknown" cells. `uns[key_added]["agreement"]` is the mean
          over all cells.
        - `obs[key_added + "_majority"]`, with `over_clustering`: most common label of the cluster.
        - `obs[key_added + "_" + label]`: one column per label, for labels that the model learned together.
    copy
        If True, return a modified copy and leave `adata` unchanged.

    Raises
    ------
    ConfigError
        Neither `model` nor `use_rep` is given, an option does not apply, or a number is out of range.
    DataError
        A column or an embedding is missing, no reference cell has a label, or `sct.tl.embed` cannot read the data.
    """
    inputs.check_table(adata, copy)
    passed = {
        "layer": layer, "batch_key": batch_key, "spatial_key": spatial_key, "context": context,
        "cells_per_bag": cells_per_bag, "batch_size": batch_size, "gene_column": gene_column, "duplicates": duplicates,
        "seed": seed, "templates": templates, "abstract": abstract, "values": values,
    }  # fmt: skip
    options = {name: value for name, value in passed.items() if value != _DEFAULTS[name]}
    if over_clustering is not None:
        inputs.column(adata, over_clustering, "over_clustering")
    if reference is None:
        if use_rep is not None or n_neighbors != 15:
            raise ConfigError(
                "`use_rep` and `n_neighbors` have no effect without a reference: set "
                "reference=..., or do not pass these two options."
            )
        handle = inputs.load_model(model) if model is not None else None
        limit = 0.0 if threshold is None else threshold
        if handle is not None and classifier.COLLECTION in handle.variables:
            target = inputs.output_adata(adata, copy)
            _by_classifier(target, handle, label_key, candidates, limit, n_contexts, key_added, options)
        else:
            if n_contexts is not None:
                raise ConfigError(
                    "`n_contexts` has no effect without a reference or a fine-tuned model: set reference=..., or do "
                    "not pass `n_contexts`."
                )
            found = _by_answers(adata, handle, label_key, candidates, limit, key_added, copy, options)
            target = adata if found is None else found
        _vote(target, key_added, over_clustering)
        return target if copy else None
    if candidates is not None or not isinstance(label_key, str):
        raise ConfigError(
            "with `reference`, the labels come from one column of `reference.obs`: set `label_key` to the "
            "name of this column, and do not pass `candidates`."
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
            f"all reference cells have a missing label in obs[{label_key!r}]: set `label_key` to a column "
            "with labels."
        )
    given = options if n_contexts is None else {**options, "n_contexts": n_contexts}
    _check_options(adata, reference, use_rep, given)
    target = inputs.output_adata(adata, copy)
    drawn: list[np.ndarray] = []  # best label of each cell in each context
    given_embedding = use_rep is not None
    if use_rep is None:
        if model is None:
            raise ConfigError(
                "`model` and `use_rep` are both missing: pass `model` to compute embeddings, or set "
                "`use_rep` to the key of existing embeddings in obsm."
            )
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
            f"use_rep (key in obsm of {name})",
            use_rep,
            cells.obsm,
            error=DataError,
            advice=f"run sct.tl.embed on {name}, or leave use_rep out",
        )
        vectors = np.asarray(cells.obsm[use_rep])[known if cells is reference else slice(None)]
        check_finite(
            f"obsm[{use_rep!r}] of {name}", vectors, "cells", advice="embed these cells again, or remove them"
        )
    searched, asked = np.asarray(reference.obsm[use_rep])[known], np.asarray(target.obsm[use_rep])
    if searched.shape[1] != asked.shape[1]:
        raise DataError(
            f"obsm[{use_rep!r}] of adata has {asked.shape[1]} columns, but obsm[{use_rep!r}] of the "
            f"reference has {searched.shape[1]}: compute both embeddings with the same model."
        )
    shares, best = _shares(searched, asked, labels.to_numpy()[known], n_neighbors)
    probability = shares.to_numpy()[np.arange(len(asked)), best].astype(np.float32)
    named = np.where(probability >= threshold, shares.columns.to_numpy()[best], UNKNOWN)
    why = "their neighbors have different labels, so check the embedding, or change n_neighbors or threshold"
    # With use_rep no model is at fault, and a query may contain cells of one type only.
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
    _vote(target, key_added, over_clustering)
    return target if copy else None


def _vote(target: ad.AnnData, key: str, clusters: str | None) -> None:
    """Write the most common label of each cell's cluster; "unknown" cells do not vote."""
    target.obs.drop(columns=f"{key}_majority", errors="ignore", inplace=True)
    if clusters is None:
        return
    labels = target.obs[key].astype(str)
    groups = target.obs[clusters].astype(str)
    counts = pd.crosstab(groups, labels).drop(columns=UNKNOWN, errors="ignore")
    most = counts.idxmax(axis=1).where(counts.sum(axis=1) > 0, UNKNOWN) if len(counts.columns) else None
    voted = groups.map(most) if most is not None else pd.Series(UNKNOWN, index=groups.index)
    target.obs[f"{key}_majority"] = pd.Categorical(voted.fillna(UNKNOWN))
    target.uns[key]["over_clustering"] = clusters


def _by_classifier(
    target: ad.AnnData,
    model: Pretrained,
    label_key: Any,
    candidates: Any,
    threshold: float,
    n_contexts: int | None,
    key_added: str,
    options: Mapping[str, Any],
) -> None:
    """Annotate cells with the classifier of a fine-tuned model."""
    check_share("threshold", threshold)
    record = model.data[ANNOTATION]
    if candidates is not None or label_key not in (None, record["label_key"]):
        raise ConfigError(
            f"the fine-tuned model predicts the labels of {record['label_key']!r} with which it was trained: do not "
            "pass `label_key` and `candidates`."
        )
    for name in _TEXT_OPTIONS:
        if name in options:
            raise ConfigError(
                f"`{name}` is an option of text models, but the model has a classifier: do not pass it."
            )
    if n_contexts is None:
        several = families.require(model, "embed").in_bags and options.get("spatial_key") is None
        n_contexts = CONTEXTS if several else 1
    # The classifier was trained on the training output of the model, not on the default readout of `embed`.
    contexts = Contexts.of(target, model, **{**options, "n_contexts": n_contexts, "readout": ()})
    total, drawn = np.zeros((0, 0)), list[np.ndarray]()
    for vectors in contexts.draws():
        logits = np.asarray(classifier.logits(model.variables[classifier.COLLECTION], jnp.asarray(vectors)))
        made = softmax(logits.astype(np.float64) / record["temperature"], axis=1)
        total = made if not drawn else total + made
        drawn.append(made.argmax(axis=1))
    probabilities = total / n_contexts
    write_answers(target, record["labels"], probabilities, key_added, threshold, UNKNOWN)
    target.obs.drop(columns=f"{key_added}_agreement", errors="ignore", inplace=True)
    agreement: dict[str, float] = {}
    if n_contexts > 1:
        same = np.mean([one == probabilities.argmax(axis=1) for one in drawn], axis=0, dtype=np.float32)
        target.obs[f"{key_added}_agreement"] = same
        agreement = {"agreement": float(same.mean())}
    target.uns[key_added] = {
        **inputs.record(model, contexts.cells, **contexts.settings), "label_key": record["label_key"],
        "labels": list(record["labels"]), "method": record["method"], "threshold": threshold, **agreement,
    }  # fmt: skip


def _by_answers(
    adata: ad.AnnData,
    handle: Pretrained | None,
    label_key: Any,
    candidates: Any,
    threshold: float,
    key_added: str,
    copy: bool,
    options: Mapping[str, Any],
) -> ad.AnnData | None:
    """Annotate cells without a reference, with a model that answers in text."""
    if handle is None or families.model(handle.family).annotate is None:
        words = dict.fromkeys(
            each.config for each in families.models().values() if each.annotate and each.config
        )
        raise ConfigError(
            "annotate() needs a reference, a fine-tuned model, or a model that answers in text: set reference=... and "
            "label_key=..., or pass a model that sct.tl.finetune returned, or a model that answers in text "
            f"({' or '.join(words)})."
        )
    check_share("threshold", threshold)
    annotator: Annotator = families.require(handle, "annotate")
    for name in options:
        check_choice(
            "the option",
            name,
            annotator.options,
            advice="leave it out, or choose an option of this model",
        )
    return annotator.annotate(
        adata, label_key=label_key, candidates=candidates, threshold=threshold, unknown=UNKNOWN,
        key_added=key_added, copy=copy, **options,
    )  # fmt: skip


def _contexts(
    reference: ad.AnnData, query: ad.AnnData, model: Pretrained, options: Mapping[str, Any]
) -> list[Contexts]:
    """Prepare the embedding of the reference and `adata`; raise `DataError` if the two share almost no genes."""
    found = []
    for cells in (reference, query):
        here = {name: value for name, value in options.items() if _applies(name, value, cells)}
        try:
            found.append(Contexts.of(cells, model, **here))
        except DataError as error:
            raise DataError(f"the reference: {error}" if cells is reference else str(error)) from error
    # Each can have enough genes of the model and still share few with the other.
    measured = [each.cells.measured for each in found]
    shared = int((measured[0] & measured[1]).sum())
    check_shared(shared, min(int(each.sum()) for each in measured), "adata and the reference")
    return found


def _check_options(
    adata: ad.AnnData, reference: ad.AnnData, use_rep: str | None, options: Mapping[str, Any]
) -> None:
    """Raise `ConfigError` or `DataError` if an option is set that would have no effect."""
    for name in options:
        if name in _TEXT_OPTIONS:
            raise ConfigError(
                f"`{name}` is an option of text models, but `reference` was passed, so the labels come from the cells "
                f"of the reference: leave out either `{name}` or `reference`."
            )
        if use_rep is not None:
            raise ConfigError(
                f"`{name}` is an option for computing a new embedding, but use_rep={use_rep!r} selects an "
                f"existing embedding: pass only one of `{name}` and `use_rep`."
            )
    for name, where in (("batch_key", "obs"), ("spatial_key", "obsm")):
        key = options.get(name)
        if key is not None and not any(key in getattr(cells, where) for cells in (adata, reference)):
            raise DataError(
                f"neither adata nor the reference has {where}[{key!r}]: set `{name}` to a key of {where}."
            )


def _applies(name: str, value: Any, cells: ad.AnnData) -> bool:
    """Return whether an option of `embed` can be used for these cells.

    An option that names a key can be used only if the AnnData contains this key.
    """
    if value is None:
        return False
    if name == "batch_key":
        return value in cells.obs
    return value in cells.obsm if name == "spatial_key" else True


def _shares(
    searched: np.ndarray, asked: np.ndarray, labels: np.ndarray, n_neighbors: int
) -> tuple[pd.DataFrame, np.ndarray]:
    """Return two values: the label fractions (N, labels) and, for each cell, the column of the best label.

    A label fraction is the fraction of the neighbors of a cell that have the label.
    """
    codes, names = pd.factorize(labels.astype(str), sort=True)
    size = min(n_neighbors, len(searched))
    index = NearestNeighbors(n_neighbors=size, metric="cosine").fit(searched)
    distance, found = index.kneighbors(asked)
    shares, nearness = np.zeros((2, len(asked), len(names)), np.float64)
    rows = np.repeat(np.arange(len(asked)), size)
    np.add.at(shares, (rows, codes[found].ravel()), 1 / size)
    np.add.at(nearness, (rows, codes[found].ravel()), 2 - distance.ravel())
    # Shares are multiples of 1/k, so a term smaller than 1/k only breaks ties.
    best = np.argmax(np.round(shares * size) + nearness / (2 * size + 1), axis=1)
    return pd.DataFrame(shares.astype(np.float32), columns=names), best
