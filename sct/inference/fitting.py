"""Fit the readout "fitted" of a model on cells, without labels; see `sct.tl.fit_readout`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import anndata as ad
import numpy as np
import pandas as pd

from sct.checks import check_choice
from sct.data.cells import CellCounts, Section
from sct.data.genes.vocabulary import GeneVocabulary
from sct.data.store import Store, Study
from sct.errors import ConfigError, DataError
from sct.inference import bags
from sct.inference.readers import CellReader
from sct.weights.fitted_readout import FittedReadout, Moments


@dataclasses.dataclass(frozen=True)
class FitOptions:
    """Options of the fit; see `sct.tl.fit_readout`."""

    dim: int = 64
    source: str = "flat"
    standardize: bool = False
    max_cells: int = 20_000
    cells_per_bag: int | None = None
    batch_size: int | None = None
    seed: int = 0


def check_source(reader: CellReader, source: str) -> None:
    """Raise `ConfigError` if a model does not have the flat readout `source`."""
    flat = [name for name, each in reader.readouts.items() if each.flat]
    if not flat:
        raise ConfigError(
            f"models of the family {reader.model.family!r} have no flat readout that could be fitted: use sct.tl.embed "
            "without a fitted readout."
        )
    check_choice("source", source, flat)


def fit_to_store(reader: CellReader, store: Store, options: FitOptions) -> FittedReadout:
    """Return the map that is fitted on the training studies of a store.

    Raises
    ------
    ConfigError
        The model has no such flat readout.
    DataError
        There is no training study, or there are too few cells.
    """
    vocabulary = reader.model.vocabulary
    store.check_vocabulary(vocabulary)
    studies = store.split("train")
    if not studies:
        raise DataError(f"the store {store.path} has no training study: give another store, or an AnnData.")
    chosen = parts(studies, options.max_cells, options.seed, reader.cells_per_bag(options.cells_per_bag))
    tables = (table_of(study, vocabulary, rows) for study, rows in zip(studies, chosen, strict=True))
    return fit(reader, tables, options, [study.name for study in studies])


def fit(
    reader: CellReader, tables: Iterable[CellCounts], options: FitOptions, studies: Sequence[str] = ()
) -> FittedReadout:
    """Return the map that is fitted on all cells of some tables, each cell once.

    Cells without counts are left out. `studies` names the studies of the cells.
    """
    check_source(reader, options.source)
    source, seed = options.source, options.seed
    readouts = {source: reader.readouts[source]}
    size = reader.cells_per_bag(options.cells_per_bag)
    moments = Moments(readouts[source].width(reader.model), options.dim, seed)
    for table in tables:
        orders = [
            bags.plan_bags(part, size, seed) if len(part.rows) else None
            for part in (_with_counts(part, table.cell_totals > 0) for part in table.sections)
        ]
        for one in reader.results(table, orders, readouts, "fitting the readout", options.batch_size, seed):
            moments.add(one.outputs[source][one.is_target])
    return moments.fit(source, options.standardize, studies=list(studies), seed=seed)


def _with_counts(part: Section, filled: np.ndarray) -> Section:
    """Return a section without the cells that have no counts; `filled` is bool (N,)."""
    kept = filled[part.rows]
    places = None if part.places is None else part.places[kept]
    return dataclasses.replace(part, rows=part.rows[kept], places=places)


def parts(studies: Sequence[Study], max_cells: int, seed: int, multiple: int = 1) -> list[slice]:
    """Choose consecutive rows of each study, in proportion to its size.

    There are at most `max_cells` in all, except that the number of each study is rounded up to a multiple of
    `multiple`, such as the number of cells per bag, or is the whole study.

    Single-cell studies are stored in random order, and spatial studies along a curve, so that consecutive rows are a
    random sample of cells, or a compact part of the tissue.
    """
    rng, total = np.random.default_rng(seed), sum(study.n_cells for study in studies)
    found = []
    for study in studies:
        share = max(1, study.n_cells * max_cells // total)
        number = study.n_cells if total <= max_cells else min(study.n_cells, -(-share // multiple) * multiple)
        start = int(rng.integers(study.n_cells - number + 1))
        found.append(slice(start, start + number))
    return found


def table_of(study: Study, vocabulary: GeneVocabulary, rows: slice) -> CellCounts:
    """Return the counts of consecutive cells of a study of a store."""
    counts = study.read(rows.start, rows.stop)
    var = pd.DataFrame(
        {"measured": study.measured, "total_counts": study.gene_totals}, index=pd.Index(vocabulary.keys)
    )
    obs = pd.DataFrame(index=[f"{study.name}-{row}" for row in range(rows.start, rows.stop)])
    places = study.rescaled_coordinates()[rows] if study.spatial else None
    section = Section(study.name, np.arange(counts.shape[0]), places)
    return CellCounts(ad.AnnData(counts, obs, var), vocabulary, [section], layer="X")
