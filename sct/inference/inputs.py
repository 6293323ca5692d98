"""Check the model and the AnnData that a function of `sct.tl` gets, and record how a result was made."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import anndata as ad
import numpy as np

from sct import messages
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
    """Return a loaded model: `model` itself, or the model at this path or Hub id.

    Raises
    ------
    ConfigError
        `model` is not a model, a path or a Hub id, or the model cannot run on this machine's device.
    """
    check_type(
        "model",
        model,
        (Pretrained, str, os.PathLike),
        "a model from sct.load, a path or a Hub id",
        advice="pass it as the argument after adata",
    )
    handle = model if isinstance(model, Pretrained) else load(model)
    registry.check_device(handle.config)
    return handle


def check_table(adata: Any, copy: bool) -> None:
    """Raise `DataError` if `adata` is not an AnnData, has no cells, or is backed and cannot store results."""
    check_type(
        "adata",
        adata,
        ad.AnnData,
        "an AnnData",
        error=DataError,
        advice="read a file with anndata.read_h5ad first",
    )
    if not adata.n_obs:
        raise DataError(
            "adata has no cells, but at least one is needed: check the filters that were applied to adata."
        )
    if adata.isbacked and adata.is_view:
        raise DataError(
            "adata is a view of a backed AnnData, and a view cannot store results: load adata with adata.to_memory() "
            "first."
        )
    if adata.isbacked and copy:
        raise DataError(
            "adata is backed and cannot be copied, but copy is True: set copy=False, or load adata with "
            "adata.to_memory()."
        )


def output_adata(adata: ad.AnnData, copy: bool) -> ad.AnnData:
    """Return the AnnData to which results are written: a copy, or `adata` itself. A view becomes an actual AnnData."""
    if copy:
        return adata.copy()
    if adata.is_view:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ad.ImplicitModificationWarning)
            adata.obs = adata.obs.copy()
    return adata


def sections(adata: ad.AnnData, batch_key: str | None, spatial_key: str | None) -> list[Section]:
    """Split the cells into sections (batches or slides) by the column `batch_key` of `obs`.

    Sections are in the order of their first appearance. Positions are rescaled per section, see
    `sct.data.coordinates.Scale`. If `uns` contains the scale of a section, this stored scale is used, so that a subset
    keeps the coordinates of the whole section. Otherwise the scale is computed from the given cells.

    Raises
    ------
    DataError
        The column or the key does not exist, a cell has no batch, or a position is missing or does not have two
        coordinates.

    Warns
    -----
    UserWarning
        The positions look wrong.
    """
    if batch_key is None:
        parts = [("", np.arange(adata.n_obs))]
    else:
        values = column(adata, batch_key, "batch_key")
        if values.isna().any():
            raise DataError(
                f"obs[{batch_key!r}] has no value for {int(values.isna().sum()):,} cells, but every cell "
                "needs a batch: fill in the values, or remove these cells."
            )
        parts = [(str(name), np.flatnonzero(values == name)) for name in values.unique()]
    if spatial_key is None:
        return [Section(name, rows) for name, rows in parts]
    check_choice(
        "spatial_key",
        spatial_key,
        adata.obsm,
        error=DataError,
        advice="set it to the key of the positions in obsm, or omit spatial_key",
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
                messages.warn(f"{where}: {doubt}")
        found.append(section)
    return found


def gene_names(option: str, names: Any) -> list[str]:
    """Return the gene names in an option as a list; raise `ConfigError` if the option has another type.

    The option is one gene name or several gene names.
    """
    check_type(option, names, (str, Iterable), "a gene name, or a list of gene names")
    listed = [names] if isinstance(names, str) else list(names)
    for name in listed:
        check_type(f"a gene name in {option}", name, str, "a string")
    return listed


def keep_scales(
    target: ad.AnnData, sections: Sequence[Section], batch_key: str | None, spatial_key: str | None
) -> None:
    """Write to `uns` how the positions of each section are rescaled, so that subsets of `target` keep this scale."""
    scales = {section.name: section.scale for section in sections if section.scale is not None}
    if spatial_key is not None and scales:
        target.uns[SCALES] = {
            **target.uns.get(SCALES, {}), spatial_key: write_scales(scales, batch_key),
        }  # fmt: skip


def column(adata: ad.AnnData, name: str, what: str) -> Any:
    """Return the column `name` of `obs`; raise `DataError` if it is missing. The message names the argument `what`."""
    check_choice(what, name, adata.obs.columns, error=DataError, advice="set it to a column of obs")
    return adata.obs[name]


def check_counted(cells: CellCounts, needed: np.ndarray | None = None) -> None:
    """Raise `DataError` if a cell in `needed` (by default all cells) has no counts of the model's genes."""
    empty = cells.cell_totals == 0
    if needed is not None:
        empty &= needed
    if empty.any():
        raise DataError(
            f"{int(empty.sum()):,} of {cells.n_cells:,} cells have no counts of the model's genes (first: row "
            f"{int(np.argmax(empty))}), but every cell needs some counts of these genes: remove such cells, for "
            "example with adata = adata[adata[:, model.genes.align(adata.var).columns >= 0].X.sum(axis=1) > "
            "0].copy()."
        )


def record(model: Pretrained, table: CellCounts, /, **settings: Any) -> Mapping[str, Any]:
    """Return the parameters that a function writes to `uns`, so that its result can be reproduced.

    None becomes "", because h5ad files cannot store None.
    """
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
