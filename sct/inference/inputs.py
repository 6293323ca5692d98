"""What a tool is given, a model and an AnnData, checked; and the record of what it did."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import anndata as ad
import numpy as np

from sct.checks import check_choice, check_type
from sct.data.cells import CellCounts, Section
from sct.data.coordinates import SCALES, Scale, doubts, read_scales, write_scales
from sct.errors import DataError
from sct.models import registry
from sct.version import __version__
from sct.weights.load import load
from sct.weights.pretrained import Pretrained

ModelLike = Pretrained | str | os.PathLike[str]


def load_model(model: ModelLike) -> Pretrained:
    """Return a model, loaded where a path or an id is given; `ConfigError` for what is neither, or needs a GPU."""
    check_type(
        "model",
        model,
        (Pretrained, str, os.PathLike),
        "a model of sct.load, a path or a Hub id",
        advice="give one after adata",
    )
    handle = model if isinstance(model, Pretrained) else load(model)
    registry.check_device(handle.config)
    return handle


def check_table(adata: Any, copy: bool) -> None:
    """Raise `DataError` for what is no AnnData, has no cells, or cannot hold results."""
    check_type(
        "adata",
        adata,
        ad.AnnData,
        "an AnnData",
        error=DataError,
        advice="read a file with anndata.read_h5ad first",
    )
    if not adata.n_obs:
        raise DataError("the data has no cells: give at least one.")
    if adata.isbacked and adata.is_view:
        raise DataError("a part of a backed AnnData cannot hold results: load it with .to_memory() first.")
    if adata.isbacked and copy:
        raise DataError(
            "a backed AnnData is not copied: leave copy=False, or load it with adata.to_memory()."
        )


def output_adata(adata: ad.AnnData, copy: bool) -> ad.AnnData:
    """Return what results are written into: a copy, or `adata` itself, made independent if it is a view."""
    if copy:
        return adata.copy()
    if adata.is_view:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ad.ImplicitModificationWarning)
            adata.obs = adata.obs.copy()
    return adata


def sections(adata: ad.AnnData, batch_key: str | None, spatial_key: str | None) -> list[Section]:
    """Divide cells by a column of obs, in the order of their first cells.

    Positions are rescaled by section, see `sct.data.coordinates.Scale`: by the scale that `uns` has of it, so that
    a part of a section lies as in the whole, or by that of the cells given. Warns where positions look wrong.

    Raises
    ------
    DataError
        There is no such column, a cell has no batch, or positions are missing or not two
        numbers.
    """
    if batch_key is None:
        parts = [("", np.arange(adata.n_obs))]
    else:
        values = column(adata, batch_key, "batch_key")
        if values.isna().any():
            raise DataError(
                f"obs[{batch_key!r}] is missing for {int(values.isna().sum()):,} cells, but every cell needs a batch: "
                "fill it in or leave these cells out."
            )
        parts = [(str(name), np.flatnonzero(values == name)) for name in values.unique()]
    if spatial_key is None:
        return [Section(name, rows) for name, rows in parts]
    check_choice(
        "spatial_key",
        spatial_key,
        adata.obsm,
        error=DataError,
        advice="name the key of the positions in obsm, or leave spatial_key out",
    )
    given = np.asarray(adata.obsm[spatial_key])
    known_scales = read_scales(adata.uns, spatial_key, batch_key)
    found = []
    for name, rows in parts:
        where = f"obsm[{spatial_key!r}]{f' of {name}' if name else ''}"
        scale, places = known_scales.get(name), given[rows]
        try:
            if scale is None or not scale.holds(places):
                scale = Scale.of(places)
            section = Section(name, rows, scale.apply(places), scale)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        if len(rows) == scale.cells:
            for doubt in doubts(places, adata.obs.iloc[rows], "batch_key={!r}"):
                warnings.warn(f"{where}: {doubt}", UserWarning, stacklevel=3)
        found.append(section)
    return found


def keep_scales(
    target: ad.AnnData, sections: Sequence[Section], batch_key: str | None, spatial_key: str | None
) -> None:
    """Write the scales of sections into `uns`, where parts of `target` keep them."""
    scales = {section.name: section.scale for section in sections if section.scale is not None}
    if spatial_key is not None and scales:
        target.uns[SCALES] = {
            **target.uns.get(SCALES, {}), spatial_key: write_scales(scales, batch_key),
        }  # fmt: skip


def column(adata: ad.AnnData, name: str, what: str) -> Any:
    """Return a column of obs, or say which ones there are."""
    check_choice(what, name, adata.obs.columns, error=DataError, advice="name a column of obs")
    return adata.obs[name]


def check_counted(cells: CellCounts, needed: np.ndarray | None = None) -> None:
    """Raise `DataError` where cells (of those needed) have no count of the model's genes."""
    empty = cells.cell_totals == 0
    if needed is not None:
        empty &= needed
    if empty.any():
        raise DataError(
            f"{int(empty.sum()):,} of {cells.n_cells:,} cells have no count of the model's genes (the first is row "
            f"{int(np.argmax(empty))}): leave them out, for example by adata = "
            "adata[adata[:, model.genes.align(adata.var).columns >= 0].X.sum(axis=1) > 0].copy()."
        )


def record(model: Pretrained, table: CellCounts, /, **settings: Any) -> Mapping[str, Any]:
    """What a tool writes into uns, so that a result can be made again; h5ad knows no None."""
    return {
        "sct_version": __version__,
        "model": repr(model),
        "weights": model.fingerprint,
        "model_step": -1 if model.step is None else model.step,
        "vocabulary_hash": model.vocabulary.hash,
        "counts_from": table.counts_from,
        "genes_matched": table.alignment.matched,
        **{name: "" if value is None else value for name, value in settings.items()},
    }
