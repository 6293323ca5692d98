"""`sct.tl.fit_readout` and `sct.tl.record_benchmark`: fit a readout of a model, and record its default readout."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import anndata as ad
import numpy as np

from sct import families
from sct.checks import check_at_least, check_choice, check_type
from sct.data.cells import CellCounts
from sct.data.store import Store
from sct.errors import DataError
from sct.eval.embedding.measures import ZERO_SHOT_PCA
from sct.eval.reports.report import MODEL
from sct.inference import fitting, inputs
from sct.inference.readers import CellReader
from sct.weights.pretrained import Pretrained


def fit_readout(
    model: inputs.ModelLike,
    cells: ad.AnnData | Store | str | os.PathLike[str],
    *,
    dim: int = 64,
    source: str = "flat",
    standardize: bool = False,
    max_cells: int = 20_000,
    layer: str | None = None,
    batch_key: str | None = None,
    cells_per_bag: int | None = None,
    batch_size: int | None = None,
    gene_column: str | None = None,
    duplicates: Literal["error", "sum"] = "error",
    seed: int = 0,
) -> Pretrained:
    """Fit the readout "fitted" of a model: a fixed linear map from a flat readout to a few dimensions.

    The map holds the first `dim` principal components of the flat readout of some cells, usually training cells. No
    labels are used. `save_pretrained` of the returned model keeps the map in the model folder, so that the embeddings
    of all data sets share one space. Training does this by itself when it exports a model (options `export`).

    With up to 2,048 features, the components are exact. With more features, they are computed from products of the
    covariance matrix with 256 fixed random vectors (or 4 x `dim`, if that is more), in one pass over the cells. The
    result does not depend on `batch_size`, except for rounding.

    Parameters
    ----------
    model
        Result of `sct.load`, a path or a Hub id.
    cells
        An AnnData with raw counts, or a store (or its path), whose training studies are used.
    dim
        Number of dimensions of the embedding (D).
    source
        The flat readout to map: "flat" or "conv"; see `sct.tl.embed`.
    standardize
        Whether to divide each feature by its standard deviation first, so that all features have equal weight.
    max_cells
        Approximate largest number of cells to use. Each study of a store gives a part in proportion to its size,
        in whole bags, from consecutive rows. Cells of an AnnData are drawn at random.
    layer, batch_key, cells_per_bag, batch_size, gene_column, duplicates
        See `sct.tl.embed`. `layer`, `batch_key`, `gene_column` and `duplicates` are used only for an AnnData.
    seed
        Random seed of the cells, the bags and the random vectors.

    Returns
    -------
    The model with the fitted readout, without an earlier record of `record_benchmark`. The given model is not changed.

    Raises
    ------
    ConfigError
        The model has no flat readouts, or an option is out of range.
    DataError
        There are too few cells, or the data has no raw counts of the model's genes.
    """
    handle = inputs.load_model(model)
    for name, value, least in (("dim", dim, 1), ("max_cells", max_cells, 1), ("seed", seed, 0)):
        check_at_least(name, value, least)
    check_type(
        "cells", cells, (ad.AnnData, Store, str, os.PathLike), "an AnnData, a store or the path of a store",
        advice="read a file with anndata.read_h5ad first",
    )  # fmt: skip
    reader: CellReader = families.require(handle, "embed")
    fitting.check_source(reader, source)
    options = fitting.FitOptions(dim, source, standardize, max_cells, cells_per_bag, batch_size, seed)
    if isinstance(cells, ad.AnnData):
        table = _of_adata(cells, handle, max_cells, seed, layer, batch_key, gene_column, duplicates)
        fitted = fitting.fit(reader, [table], options)
    else:
        store = cells if isinstance(cells, Store) else Store.open(Path(cells).expanduser())
        fitted = fitting.fit_to_store(reader, store, options)
    return dataclasses.replace(handle, readout=fitted, embedding={})


def _of_adata(
    adata: ad.AnnData, model: Pretrained, max_cells: int, seed: int, layer: str | None, batch_key: str | None,
    gene_column: str | None, duplicates: Literal["error", "sum"],
) -> CellCounts:  # fmt: skip
    """Return the counts of randomly drawn cells of an AnnData."""
    inputs.check_table(adata, False)
    if adata.n_obs > max_cells:
        adata = adata[np.sort(np.random.default_rng(seed).permutation(adata.n_obs)[:max_cells])]
        adata = adata.to_memory() if adata.isbacked else adata
    sections = inputs.sections(adata, batch_key, None)
    return CellCounts(
        adata, model.vocabulary, sections, layer=layer, gene_column=gene_column, duplicates=duplicates
    )


def record_benchmark(
    model: Pretrained,
    results: Mapping[str, Any] | str | os.PathLike[str],
    *,
    default: str | None = None,
) -> Pretrained:
    """Record how the embeddings of a model compare with a baseline, and choose the default readout of `sct.tl.embed`.

    The baseline is the row "zero-shot PCA" of the benchmark: principal components of the training cells. Record
    results on development studies that are in neither the training nor the test set. If the default readout was worse
    than the baseline, `sct.tl.embed` gives one warning. `save_pretrained` of the returned model keeps the record in
    `config.json`.

    Parameters
    ----------
    model
        Result of `sct.load`.
    results
        Folder of a report of `sct.tl.benchmark` for this model, its file `results.json`, or the content of this file.
    default
        The default readout. By default, the readout with the highest mean k-NN accuracy over the studies.

    Returns
    -------
    The model with the record: `embedding["default"]`, and `embedding["measured"]`, a list with the keys `study`,
    `accuracy`, `components` (accuracy of the baseline, or None) and `readouts` (accuracy of each readout).

    Raises
    ------
    DataError
        The results have no embedding of the model, or belong to other weights.
    ConfigError
        The results do not have the readout `default`.
    """
    content: Any = results
    if not isinstance(results, Mapping):
        path = Path(results).expanduser()
        path = path / "results.json" if path.is_dir() else path
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path} cannot be read ({error}): give the folder of a finished benchmark."
            ) from error
    weights = content.get("facts", {}).get("weights")
    if weights is None:
        raise DataError(
            "the results do not record the weights of a model: run sct.tl.benchmark with this model, and give the "
            "folder of its report."
        )
    if weights != model.fingerprint:
        raise DataError(
            f"the results belong to a model with the weights {weights}, but this model has {model.fingerprint}: run "
            "sct.tl.benchmark with this model."
        )
    found = {}
    for study, rows in content.get("embedding", {}).items():
        accuracy = {}
        for row, columns in rows.items():
            values = next((each for name, each in columns.items() if name.endswith("-NN accuracy")), None)
            name = _readout_of(row)
            if values and name:
                accuracy[name] = round(float(np.mean(values)), 4)
        if set(accuracy) - {ZERO_SHOT_PCA}:
            found[study] = accuracy
    if not found:
        raise DataError(
            "the results have no k-NN accuracy of an embedding of the model: run sct.tl.benchmark with labeled cells."
        )
    shared = set.intersection(*(set(each) for each in found.values())) - {ZERO_SHOT_PCA}
    if default is not None:
        check_choice("default", default, sorted(shared))
    elif not shared:
        raise DataError("no readout was measured on all studies of the results: run sct.tl.benchmark again.")
    else:
        default = max(sorted(shared), key=lambda name: np.mean([each[name] for each in found.values()]))
    measured = [
        {
            "study": study,
            "accuracy": each[default],
            "components": each.get(ZERO_SHOT_PCA),
            "readouts": {name: value for name, value in each.items() if name != ZERO_SHOT_PCA},
        }
        for study, each in found.items()
    ]
    return dataclasses.replace(model, embedding={"default": default, "measured": measured})


def row_of(readout: str) -> str:
    """Return the name of the row of a readout in the embedding tables of the benchmark."""
    return f"{MODEL}, {readout}"


def _readout_of(row: str) -> str:
    """Return the readout that a row of the benchmark names, `ZERO_SHOT_PCA` for the baseline, or ""."""
    before, _, readout = row.partition(", ")
    return row if row == ZERO_SHOT_PCA else readout if before == MODEL else ""
