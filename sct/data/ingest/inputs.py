"""Convert one input to studies: read, validate, align genes, sort, write, and finally move them into the store."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from sct.atomic import remove, write_json
from sct.checks import check_choice
from sct.data.coordinates import SECTION_COLUMNS, Scale, doubts
from sct.data.counts import COUNTS, CountsChecker, Values, check_values, exact_integers
from sct.data.genes.orthologs import MappedGenes, Orthologs, map_orthologs, read_orthologs
from sct.data.genes.vocabulary import GeneAlignment, GeneVocabulary
from sct.data.ingest.input_files import Input, sanitize
from sct.data.ingest.readers import OpenInput, open_source
from sct.data.ingest.sorting import BucketSort, Sizes, cut_places, hilbert_rank, random_rank
from sct.data.ingest.writer import MAX_COUNT, portable_table, write_study, writing
from sct.data.store import SCHEMA_VERSION, STUDIES, study_path
from sct.errors import ConfigError, DataError

_MANY_BUCKETS = 256


@dataclass(frozen=True)
class IngestOptions:
    """Options of an ingest.

    Attributes
    ----------
    layer
        Matrix to read: "X", "raw" or the name of a layer. Default: the first of X, raw and layers["counts"] that has
        raw counts.
    gene_column
        Column of `var` with Ensembl ids or symbols. Default: the column that matches most genes.
    duplicates
        What to do if several columns hold the same gene: "error", or "sum" their counts.
    study_key
        Column of `obs` that splits an input into studies, such as a column of tissue sections or donors.
    spatial_key
        Key of the coordinates in `obsm`. Inputs with this key become spatial studies.
    seed
        Random seed of the order of the cells in non-spatial studies, and of the choice of validation studies.
    min_genes, min_counts
        Minimum number of expressed genes and minimum total count of a cell, over the genes of the vocabulary. Cells
        below a minimum are dropped, and the number of dropped cells is reported. With `values="activity"`, the default
        of `min_counts` drops only cells whose values are all zero.
    validation, test
        Names of the studies in the validation split and in the test split. None keeps the current split.
    validation_fraction
        Fraction of the studies for validation; see `sct.data.ingest.splits.assign_splits`.
    processes
        Number of processes. Each reads one input at a time.
    skip_bad
        Leave out refused inputs and complete the store. Otherwise one refused input leaves the store incomplete.
    census_version
        Release of the CELLxGENE Census for `census:` inputs.
    orthologs
        Ortholog table for inputs of another species (`sct.data.genes.orthologs.read_orthologs`). All inputs must
        be of this species. None: do not map the genes.
    ortholog_columns
        Gene column and ortholog column of the ortholog table. By default, the columns are found by their names.
    values
        "counts" for raw counts, or "activity" for other non-negative values, such as gene activities of chromatin data.
        Only ZerOmics can read a store of activities.
    """

    layer: str | None = None
    gene_column: str | None = None
    duplicates: Literal["error", "sum"] = "error"
    study_key: str | None = None
    spatial_key: str = "spatial"
    seed: int = 0
    min_genes: int = 0
    min_counts: int = 1
    validation: tuple[str, ...] | None = None
    test: tuple[str, ...] | None = None
    validation_fraction: float | None = None
    processes: int = 1
    skip_bad: bool = False
    census_version: str = "stable"
    orthologs: str | None = None
    ortholog_columns: tuple[str, str] | None = None
    values: Values = COUNTS

    def __post_init__(self) -> None:
        check_values(self.values)
        if self.ortholog_columns is not None:
            columns = ",".join(self.ortholog_columns)
            if self.orthologs is None:
                raise ConfigError(
                    f"ortholog_columns is {columns}, but no ortholog table was given: set orthologs to the file "
                    "of the table."
                )
            if len(self.ortholog_columns) != 2:
                raise ConfigError(
                    f"ortholog_columns is {columns}, but must name two columns of the ortholog table: write "
                    "SOURCE,TARGET, where SOURCE is the column of the genes and TARGET the column of their orthologs."
                )

    def read_orthologs(self, vocabulary: GeneVocabulary) -> Orthologs | None:
        """Read the ortholog table, or return None without one; raise `DataError` if it is invalid."""
        if self.orthologs is None:
            return None
        source, target = self.ortholog_columns or (None, None)
        return read_orthologs(self.orthologs, source=source, target=target, vocabulary=vocabulary)

    def digest(self, table: Orthologs | None = None) -> str:
        """Return a hash of the options and the ortholog table, which determine a study together with its input."""
        content: tuple[Any, ...] = (
            SCHEMA_VERSION,
            self.layer,
            self.gene_column,
            self.duplicates,
            self.study_key,
            self.spatial_key,
            self.seed,
            self.min_genes,
            self.min_counts,
            self.census_version,
        )
        # Add these only if they are used, so that the digest of studies made without them stays the same.
        if table is not None:
            # The word has its former spelling, so that ingests that were interrupted earlier can be resumed.
            content += (("orthologues", table.digest, self.ortholog_columns),)
        if self.values != COUNTS:
            content += (("values", self.values),)
        return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def ingest_input(
    root: Path,
    item: Input,
    fingerprint: str,
    vocabulary: GeneVocabulary,
    options: IngestOptions,
    *,
    table: Orthologs | None = None,
    stale: Sequence[str] = (),
    advance: Callable[[float], None] = lambda cells: None,
    sizes: Sizes | None = None,
) -> list[dict[str, Any]]:
    """Write the studies of one input to the folder `root`/studies; return the metadata of each study as a dict.

    Parameters
    ----------
    root
        Folder of the store.
    item, fingerprint
        The input and its fingerprint.
    vocabulary, options
        Gene vocabulary and options of the ingest.
    table
        Ortholog table for inputs of another species.
    stale
        Names of the studies that an earlier version of the input gave. These studies are deleted.
    advance
        Progress callback. Its argument is the number of cells that were finished since the last call.
    sizes
        Memory limits. They do not change the result.

    Raises
    ------
    DataError
        The input is refused.
    StoreError
        The studies cannot be written.
    """
    sizes = sizes or Sizes()
    folder = root / STUDIES
    spill = folder / f".{item.name}.spill"
    download = folder / f".{item.name}.download"
    partial: dict[str, Path] = {}
    try:
        with open_source(
            item,
            layer=options.layer,
            spatial_key=options.spatial_key,
            folder=download,
            census_version=options.census_version,
            values=options.values,
        ) as source:
            records = _write_studies(
                source, item, folder, spill, partial, vocabulary, options, table, sizes, advance
            )
        for record in records:
            record["source"] = {
                "location": absolute_location(item),
                "kind": item.kind,
                "input": item.name,
                "fingerprint": fingerprint,
                "options": options.digest(table),
                "vocabulary": vocabulary.hash,
                "siblings": [each["name"] for each in records],
            }
        with writing(spill):
            for name in {*stale, *partial}:
                (folder / f"{name}.json").unlink(missing_ok=True)
                remove(folder / f"{name}.zarr")
            for record in records:
                os.replace(partial[record["name"]], folder / f"{record['name']}.zarr")
                write_json(folder / f"{record['name']}.json", record)
        return records
    finally:
        for path in (spill, download, *partial.values()):
            remove(path)


def _write_studies(
    source: OpenInput,
    item: Input,
    folder: Path,
    spill: Path,
    partial: dict[str, Path],
    vocabulary: GeneVocabulary,
    options: IngestOptions,
    table: Orthologs | None,
    sizes: Sizes,
    advance: Callable[[float], None],
) -> list[dict[str, Any]]:
    """Write the studies of an open input under temporary names; add the names to `partial` and return the metadata."""
    alignment, mapped = _align(source, vocabulary, options, table)
    groups = _groups(source, item.name, options.study_key)
    n_cells = len(source.obs)
    place = np.empty(n_cells, np.int64)
    start = 0
    for name, rows in groups:
        if source.spatial is not None:
            place[rows] = start + hilbert_rank(source.spatial[rows])
        else:
            place[rows] = start + random_rank(len(rows), name, options.seed)
        start += len(rows)
    cell_at = np.argsort(place)
    # Every block is split among all buckets, so large inputs get larger buckets instead of more buckets.
    bucket = min(max(sizes.bucket, source.n_values // _MANY_BUCKETS), 4 * sizes.bucket)
    edges, buckets = cut_places([len(rows) for _, rows in groups], source.n_values, bucket)
    sort = BucketSort(spill, edges, len(vocabulary), sizes.held)
    with writing(spill):
        lengths, totals, maxima = _stream(source, alignment, sort, place, sizes, advance, options.values)
    measured = np.zeros(len(vocabulary), bool)
    measured[alignment.columns[alignment.columns >= 0]] = True
    obs, dropped_columns = portable_table(source.obs)
    notes = [mapped.summary()] if mapped is not None else []
    notes += [alignment.warning] if alignment.warning else []
    if options.values != COUNTS:
        notes.append(
            f"{source.label}: the values of {source.taken} are read as {options.values} instead of counts, so only "
            "ZerOmics can read this study"
        )
    if dropped_columns:
        notes.append(
            f"{source.label}: left out the obs columns {', '.join(dropped_columns)}, which AnnData cannot store"
        )
    notes += _doubts(source, groups, options)
    records: list[dict[str, Any]] = []
    start = 0
    for (name, rows), own in zip(groups, buckets, strict=True):
        places = slice(start, start + len(rows))
        start += len(rows)
        kept, dropped = _filter(lengths[places], totals[places], options)
        if not kept.any():
            reasons = ", ".join(f"{n:,} {reason}" for reason, n in dropped.items())
            raise DataError(
                f"{source.label}: no cell of the study {name!r} remains after filtering ({reasons}): remove "
                "this study from the input, or lower min_genes and min_counts."
            )
        maximum = float(maxima[places][kept].max())
        if options.values == COUNTS and maximum >= MAX_COUNT:
            raise DataError(
                f"{source.label} has a count of {maximum:,.0f}, but the largest count that can be stored exactly is "
                f"{MAX_COUNT - 1:,}: check that the values are raw counts of molecules."
            )
        cells = cell_at[places][kept]
        partial[name] = folder / f".{name}.partial"
        facts = write_study(
            partial[name],
            _sorted_blocks(sort, own, advance),
            kept,
            lengths[places],
            maximum if options.values == COUNTS else np.inf,
            {
                "obs": obs.iloc[cells],
                "vocabulary": vocabulary,
                "measured": measured,
                "coordinates": None if source.spatial is None else source.spatial[cells],
                # The scale is computed from all cells of the study, with positions as float32 like in the store.
                "scale": None
                if source.spatial is None
                else Scale.of(source.spatial[rows].astype(np.float32)),
            },
        )
        records.append(
            {
                "name": name,
                "path": study_path(name),
                **facts,
                "n_genes_matched": alignment.matched,
                "spatial": source.spatial is not None,
                "order": "random" if source.spatial is None else "curve",
                "seed": options.seed,
                "dropped": dropped,
                "counts_from": source.taken,
                "values": options.values,
                "genes_from": alignment.source,
                "notes": notes if not records else [],
            }
        )
    return records


def _align(
    source: OpenInput, vocabulary: GeneVocabulary, options: IngestOptions, table: Orthologs | None
) -> tuple[GeneAlignment, MappedGenes | None]:
    """Align the genes of an input to the vocabulary.

    With an ortholog table, the genes are first mapped to their orthologs.
    """
    mapped = None
    if table is not None:
        mapped = map_orthologs(source.var, table, column=options.gene_column, report_name=source.label)
        if options.duplicates == "error":
            mapped.check_distinct('sum their counts with duplicates="sum", or remove the extra columns')
    with warnings.catch_warnings():
        # The warning of the alignment goes into the notes instead.
        warnings.simplefilter("ignore", UserWarning)
        alignment = vocabulary.align(
            source.var if mapped is None else mapped.targets,
            column=options.gene_column if mapped is None else None,
            duplicates=options.duplicates,
            report_name=source.label,
        )
    if mapped is not None:
        alignment = replace(alignment, source=f"{mapped.source}, orthologs of {mapped.table}")
    return alignment, mapped


def _doubts(source: OpenInput, groups: Sequence[tuple[str, np.ndarray]], options: IngestOptions) -> list[str]:
    """Return notes about suspicious coordinates, such as several tissue sections that may share one plane."""
    if source.spatial is None:
        return []
    found = [
        f"{source.label}{f' ({name})' if len(groups) > 1 else ''}: {doubt}"
        for name, rows in groups
        for doubt in doubts(source.spatial[rows], source.obs.iloc[rows], "--study_key={}")
    ]
    if options.study_key is not None or any("--study_key" in each for each in found):
        return found
    for name in SECTION_COLUMNS:
        if name in source.obs and source.obs[name].nunique() > 1:
            return [
                *found,
                f"{source.label} is spatial and obs[{name!r}] has {source.obs[name].nunique()} values: if these are "
                f"sections with separate coordinates, ingest the file with --study_key={name}",
            ]
    return found


def _groups(source: OpenInput, name: str, study_key: str | None) -> list[tuple[str, np.ndarray]]:
    """Return the name and the row numbers of each study of an input."""
    if study_key is None:
        return [(name, np.arange(len(source.obs)))]
    check_choice(
        f"{source.label}: study_key", study_key, source.obs, error=DataError, advice="name a column of obs"
    )
    column = source.obs[study_key]
    gaps = int(column.isna().sum())
    if gaps:
        raise DataError(
            f"{source.label}: obs[{study_key!r}] has no value for {gaps} cells: fill in the values, or remove "
            "these cells."
        )
    codes, values = pd.factorize(column.astype(str).to_numpy(dtype=object), sort=True)
    groups: dict[str, np.ndarray] = {}
    for code, value in enumerate(values):
        study = f"{name}.{sanitize(str(value))}"
        if study in groups:
            raise DataError(
                f"{source.label}: two values of obs[{study_key!r}] would both give the study name {study!r}: rename "
                "one of these values."
            )
        groups[study] = np.flatnonzero(codes == code)
    return list(groups.items())


def _stream(
    source: OpenInput,
    alignment: GeneAlignment,
    sort: BucketSort,
    place: np.ndarray,
    sizes: Sizes,
    advance: Callable[[float], None],
    values: Values,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Add all counts to `sort`. Return the number, sum and maximum of each cell's non-zero counts.

    Each of the three arrays has the shape (N,) and is in the stored order of the cells.
    """
    n = len(place)
    lengths, totals, maxima = np.zeros(n, np.int64), np.zeros(n), np.zeros(n)

    def note(places: np.ndarray, counts: Any) -> None:
        filled = np.flatnonzero(np.diff(counts.indptr))
        lengths[places] = np.diff(counts.indptr)
        if filled.size:
            starts = counts.indptr[filled]
            totals[places[filled]] = np.add.reduceat(counts.data, starts, dtype=np.float64)
            maxima[places[filled]] = np.maximum.reduceat(counts.data, starts)

    checker = CountsChecker(f"{source.taken} of {source.label}", values)
    for rows, counts in source.blocks(sizes.block):
        checker.update(counts)
        aligned = alignment.project(exact_integers(counts) if checker.inexact else counts)
        if source.whole_rows:
            note(place[rows], aligned)
        sort.add(place[rows], aligned)
        # Reading counts as half of the progress, sorting and writing as the other half.
        share = len(rows) / n if source.whole_rows else counts.nnz / max(source.n_values, 1)
        advance(0.5 * n * share)
    checker.finish()
    if not source.whole_rows:
        adds = np.count_nonzero(alignment.columns >= 0) > alignment.matched
        for bucket in range(len(sort.edges) - 1):
            counts, summed = sort.load(bucket)
            if summed and not adds:
                raise DataError(
                    f"{source.label} has two entries for the same cell and gene, so the file is damaged: create the "
                    "file again from the original data."
                )
            note(np.arange(sort.edges[bucket], sort.edges[bucket + 1]), counts)
    return lengths, totals, maxima


def _sorted_blocks(sort: BucketSort, buckets: range, advance: Callable[[float], None]) -> Iterator[Any]:
    """Yield the counts of all cells in stored order, one bucket at a time. A bucket is a range of consecutive cells."""
    for bucket in buckets:
        counts, _ = sort.load(bucket)
        yield counts
        advance(0.5 * counts.shape[0])


def _filter(
    lengths: np.ndarray, totals: np.ndarray, options: IngestOptions
) -> tuple[np.ndarray, dict[str, int]]:
    """Return the mask of cells to keep, and the number of dropped cells for each reason."""
    least = 0 if options.values != COUNTS and options.min_counts == 1 else options.min_counts
    tests = {
        "without counts": (totals == 0) & (options.min_counts > 0 or options.min_genes > 0),
        f"under {options.min_genes} genes": lengths < options.min_genes,
        f"under {options.min_counts} counts": totals < least,
    }
    kept = np.ones(len(lengths), bool)
    dropped: dict[str, int] = {}
    for reason, failed in tests.items():
        n = int((kept & failed).sum())
        if n:
            dropped[reason] = n
        kept &= ~failed
    return kept, dropped


def absolute_location(item: Input) -> str:
    """Return the location of an input, as an absolute path if it is a file."""
    return item.location if item.kind in ("census", "memory") else str(Path(item.location).absolute())
