"""Genes of another species by their human orthologues: a table of pairs, and which of an input's genes it maps."""

from __future__ import annotations

import csv
import io
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sct.data.alignment import (
    ENSEMBL,
    ID_PREFERENCE,
    REFUSE_BELOW,
    look_up,
    name_places,
    some,
    without_version,
)
from sct.data.genes import GeneVocabulary
from sct.data.text.gene_corpus import read_text
from sct.errors import DataError

# What becomes of a gene of an input.
MAPPED, SEVERAL, WITHOUT, AMBIGUOUS, UNKNOWN = (
    "mapped", "with several orthologues", "without an orthologue", "of ambiguous name", "not in the table",
)  # fmt: skip
_BIOMART = re.compile(r"(?:(.+) )?gene (stable id|name)")
_KIND = re.compile(r"(?:.+ )?(?:homology|orthology) ?type")
_ONE_TO_ONE = "ortholog_one2one"
_COLUMNS = (
    "name the columns (source= and target= in Python, --orthologue_columns=SOURCE,TARGET of the ingest)"
)


@dataclass(frozen=True)
class Orthologues:
    """One-to-one pairs of genes of another species and genes of a vocabulary.

    Attributes
    ----------
    name
        Name of the table, e.g. that of its file.
    target_of
        Gene of the other species -> its orthologue: the vocabulary's key of it, or the table's name for a gene that
        the vocabulary lacks. A gene of the other species is known by its Ensembl id, or its symbol where there is none.
    owners
        Ensembl id or symbol -> genes of the other species that have it.
    several
        Genes with several orthologues, and those whose orthologue is that of several genes.
    without
        Genes without an orthologue.
    vocabulary
        Where orthologues were looked up.
    """

    name: str
    target_of: dict[str, str]
    owners: dict[str, tuple[str, ...]]
    several: frozenset[str]
    without: frozenset[str]
    vocabulary: GeneVocabulary

    def __len__(self) -> int:
        return len(self.target_of)

    def __repr__(self) -> str:
        return f"Orthologues({self.name!r}, {len(self):,} one-to-one pairs)"

    def summary(self) -> str:
        """Say in one sentence what is there and what was left out."""
        return (
            f"{len(self):,} one-to-one pairs in {self.name}; left out are {len(self.several):,} genes with several "
            f"orthologues or one that others share, and {len(self.without):,} without any"
        )

    def fate(self, name: str) -> tuple[str, str]:
        """What becomes of a gene that is called so (`MAPPED`, ...), and its orthologue or ''."""
        owners = self.owners.get(name) or self.owners.get(without_version(name), ())
        if len(owners) != 1:
            return (AMBIGUOUS if owners else UNKNOWN), ""
        if target := self.target_of.get(owners[0], ""):
            return MAPPED, target
        return (SEVERAL if owners[0] in self.several else WITHOUT), ""


@dataclass(frozen=True)
class MappedGenes:
    """The genes of an input by their orthologues.

    Attributes
    ----------
    targets
        Orthologue of each gene of the input, '' where it has no single one.
    names
        The input's own names, as they were looked up.
    source
        Where they stand, e.g. `index (Ensembl ids)`.
    table
        Name of the table.
    dropped
        Reason -> number of genes of the input.
    report_name
        Name of the input, '' where it has none.
    """

    targets: tuple[str, ...]
    names: tuple[str, ...]
    source: str
    table: str
    dropped: dict[str, int]
    report_name: str = ""

    @property
    def matched(self) -> int:
        """Number of genes of the input that have an orthologue."""
        return len(self.targets) - sum(self.dropped.values())

    def summary(self) -> str:
        """Say in one sentence how many genes were mapped, and why the others were not."""
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in self.dropped.items())
        return (
            f"{f'{self.report_name}: ' if self.report_name else ''}{self.matched:,} of {len(self.targets):,} genes "
            f"have a one-to-one orthologue in {self.table}, by {self.source}"
            + (f"; dropped: {reasons}" if reasons else "")
        )


def read_orthologues(
    path: str | os.PathLike[str],
    *,
    source: str | Sequence[str] | None = None,
    target: str | Sequence[str] | None = None,
    vocabulary: GeneVocabulary | None = None,
) -> Orthologues:
    """Read a table of orthologues, and keep its one-to-one pairs.

    A pair is one-to-one where neither of the two genes stands in another pair. Where the table says of what kind a pair
    is (Ensembl's "Human homology type"), only those of the kind "ortholog_one2one" are taken. What is left out is
    counted.

    Parameters
    ----------
    path
        Table with a header, separated by tabs or, where the header has none, by commas; it may end with .gz.
    source, target
        Columns of the other species' genes and of their orthologues: Ensembl ids, symbols, or a column of each. By
        default the columns that Ensembl's BioMart gives ("Gene stable ID", "Gene name", "Human gene stable ID",
        "Human gene name", whichever there are and from whichever of the two species' tables), else the first two.
    vocabulary
        Where orthologues are looked up; by default the shipped human genes. Other genes stay as the table names them.

    Raises
    ------
    DataError
        The file is absent, damaged, empty or without such columns, hardly any orthologue is a gene of the vocabulary,
        or no pair is one-to-one.
    """
    path, vocabulary = Path(path).expanduser(), vocabulary or GeneVocabulary.human()
    table = _read(path)
    sources, targets = _chosen(table, path, source, target)
    kind = _kind_column(table, sources, targets)
    rows = table.shape[0]
    of_sources, of_targets = (_names(table, columns) for columns in (sources, targets))
    if not any(map(any, of_sources)):
        raise DataError(f"{path} has no gene in the column {sources[0]!r}; {_COLUMNS}")
    keys = [_first(names) for names in of_sources]
    found, n_known = _keys_of(of_targets, vocabulary)
    _check_direction(path, of_sources, sources, targets, found, n_known, vocabulary)
    fits = np.ones(rows, bool)
    if kind is not None:
        fits = (table[kind].str.strip() == _ONE_TO_ONE).to_numpy()
        if not fits.any():
            have = some(sorted(set(table[kind])))
            raise DataError(
                f'{path} has no pair of the kind "{_ONE_TO_ONE}" in the column {kind!r} but {have}; give Ensembl\'s '
                "kinds, or a table without this column"
            )
    owners: dict[str, set[str]] = defaultdict(set)
    targets_of: dict[str, set[str]] = defaultdict(set)
    sources_of: dict[str, set[str]] = defaultdict(set)
    several: set[str] = set()
    for key, names, gene, fit in zip(keys, of_sources, found, fits, strict=True):
        if not key:
            continue
        for name in names:
            if name:
                owners[name].add(key)
        if not gene:
            continue
        if not fit:
            several.add(key)
            continue
        targets_of[key].add(gene)
        sources_of[gene].add(key)
    pairs = {
        key: next(iter(genes))
        for key, genes in targets_of.items()
        if len(genes) == 1 and len(sources_of[next(iter(genes))]) == 1
    }
    if not pairs:
        raise DataError(f"{path} has no pair of genes that is one-to-one; give a table with such pairs")
    several = (several | set(targets_of)) - set(pairs)
    everything = {key for key in keys if key}
    return Orthologues(
        path.name,
        pairs,
        {name: tuple(sorted(keys)) for name, keys in owners.items()},
        frozenset(several),
        frozenset(everything - several - set(pairs)),
        vocabulary,
    )


def map_orthologues(
    var: pd.DataFrame | pd.Index | Iterable[str],
    table: Orthologues,
    *,
    column: str | None = None,
    report_name: str = "",
) -> MappedGenes:
    """Map the genes of an input.

    Parameters
    ----------
    var
        `AnnData.var`, or the names themselves: Ensembl ids with or without version, or symbols, as the table has them.
    table
        See `read_orthologues`.
    column
        Column of `var` that holds the names ("index" for its index). By default the index and every text column are
        tried and the one that finds most genes is taken, ids before symbols where they find nearly as many.
    report_name
        Name of the input in messages.

    Raises
    ------
    DataError
        No genes, names that are not text, genes of the vocabulary itself, or under 5% of the genes that could be mapped
        are.
    """
    prefix = f"{report_name}: " if report_name else ""
    places = []
    for label, names in name_places(var, column, prefix):
        fates = [table.fate(name) for name in names]
        found = len({target for _, target in fates if target})
        mapped = [name for name, (fate, _) in zip(names, fates, strict=True) if fate == MAPPED]
        ids = sum(ENSEMBL.fullmatch(name) is not None for name in mapped)
        places.append((found, ids, label, names, fates))
    enough = (1 - ID_PREFERENCE) * max(found for found, *_ in places)
    found, ids, label, names, fates = max(
        (place for place in places if place[0] >= enough), key=lambda place: (place[1], place[0])
    )
    _check_species(table, places, found, names, prefix)
    source = f"{label} ({'Ensembl ids' if 2 * ids > found else 'symbols'})"
    dropped = {
        reason: number
        for reason in (SEVERAL, WITHOUT, AMBIGUOUS, UNKNOWN)
        if (number := sum(fate == reason for fate, _ in fates))
    }
    targets = tuple(target for _, target in fates)
    return MappedGenes(targets, tuple(names), source, table.name, dropped, report_name)


def _check_species(
    table: Orthologues, places: Sequence[tuple[Any, ...]], found: int, chosen: Sequence[str], prefix: str
) -> None:
    """Refuse an input of the vocabulary's own genes, or of genes that the table does not know."""

    def own(names: Sequence[str]) -> int:
        positions, _ = look_up(table.vocabulary, names)
        return len(np.unique(positions[positions >= 0]))

    here = own(chosen)
    possible = min(len([name for name in chosen if name]), len(table))
    if here <= found and found >= max(REFUSE_BELOW * possible, 1):
        return
    # Where nothing is mapped, any of the places may tell which genes these are.
    most, names = (here, chosen) if here > found else max((own(names), names) for *_, names, _ in places)
    if most > found:
        raise DataError(
            f"{prefix}the genes are those of {table.vocabulary.name} already ({some(names)}), not of another species; "
            f"leave the table of orthologues {table.name} (--orthologues) out for this input"
        )
    raise DataError(
        f"{prefix}only {found:,} of {len(chosen):,} gene names ({some(chosen)}) have an orthologue in {table.name}, "
        f"whose genes are named like {some(table.owners)}; give a table of this species with this kind of names, or "
        "name the column of var that holds the table's kind (gene_column=)"
    )


def _read(path: Path) -> pd.DataFrame:
    """The table, all of it as text."""
    text = read_text(path)
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter="\t" if "\t" in text.partition("\n")[0] else ",", strict=True)
    rows: list[list[str]] = []
    try:
        for row in filter(None, reader):
            rows.append(row)
            if len(row) != len(rows[0]):
                raise DataError(
                    f"{path} line {reader.line_num}: found {len(row)} fields where {len(rows[0])} are expected; write "
                    "it again"
                )
    except csv.Error as error:
        raise DataError(f"{path} line {reader.line_num}: {error}; write it again") from None
    if len(rows) < 2:
        raise DataError(
            f"{path} is empty{' but for its header' * len(rows)}; give a table of orthologues with a header"
        )
    if len(rows[0]) < 2:
        raise DataError(
            f"{path} has the one column {rows[0][0]!r}, but a table of orthologues has a column of genes and one of "
            "their orthologues; give both, with tabs or commas between"
        )
    return pd.DataFrame(rows[1:], columns=pd.Index(rows[0], dtype=object))


def _chosen(
    table: pd.DataFrame, path: Path, source: str | Sequence[str] | None, target: str | Sequence[str] | None
) -> tuple[list[str], list[str]]:
    """Columns of the genes and of their orthologues."""
    if (source is None) != (target is None):
        raise DataError("one of source and target was given alone; give both columns, or neither")
    named = list(table.columns)
    if source is None or target is None:
        sources, targets = _found(named, path)
    else:
        sources, targets = ([each] if isinstance(each, str) else list(each) for each in (source, target))
    for name in (*sources, *targets):
        if named.count(name) != 1:
            number = "no" if name not in named else "more than one"
            raise DataError(f"{path} has {number} column {name!r} among {', '.join(named)}; {_COLUMNS}")
    return sources, targets


def _found(named: list[str], path: Path) -> tuple[list[str], list[str]]:
    """Columns of genes and of orthologues, as BioMart calls them, or the first two."""
    if any(ENSEMBL.fullmatch(name.strip()) for name in named):
        raise DataError(f"{path} begins with genes ({some(named)}), not with a header; add one")
    by_species: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name in named:
        if match := _BIOMART.fullmatch(_folded(name)):
            by_species[match[1] or ""].append((match[2], name))
    if len(by_species) < 2:
        return named[:1], named[1:2]
    # In a table of one species' genes, those of the other are told by its name.
    human = "human" if "human" in by_species else ""
    others = [species for species in by_species if species != human]
    if human not in by_species or len(others) != 1:
        raise DataError(f"{path} has genes of several species ({', '.join(named)}); {_COLUMNS}")
    # Ids before symbols, for an id means one gene.
    of = {
        species: [name for _, name in sorted(columns, reverse=True)]
        for species, columns in by_species.items()
    }
    return of[others[0]], of[human]


def _kind_column(table: pd.DataFrame, sources: Sequence[str], targets: Sequence[str]) -> str | None:
    """Column that says of what kind a pair is."""
    kinds = [name for name in table.columns if _KIND.fullmatch(_folded(name))]
    return kinds[0] if len(kinds) == 1 and kinds[0] not in (*sources, *targets) else None


def _names(table: pd.DataFrame, columns: Sequence[str]) -> list[tuple[str, ...]]:
    """Names of a gene in each row, ids without version."""
    listed = [[without_version(name.strip()) for name in table[column]] for column in columns]
    return list(zip(*listed, strict=True))


def _keys_of(rows: Sequence[tuple[str, ...]], vocabulary: GeneVocabulary) -> tuple[list[str], int]:
    """Gene of each row, by the first of its names that the vocabulary knows, and how many it knows."""
    flat = [name for names in rows for name in names]
    positions = look_up(vocabulary, flat)[0].reshape(len(rows), -1)
    at = np.take_along_axis(positions, (positions >= 0).argmax(axis=1)[:, None], axis=1)[:, 0]
    keys = vocabulary.keys
    found = [keys[i] if i >= 0 else _first(names) for i, names in zip(at.tolist(), rows, strict=True)]
    return found, len(np.unique(at[at >= 0]))


def _check_direction(
    path: Path,
    of_sources: Sequence[tuple[str, ...]],
    sources: Sequence[str],
    targets: Sequence[str],
    found: Sequence[str],
    n_known: int,
    vocabulary: GeneVocabulary,
) -> None:
    """Refuse columns that are the wrong way round, and orthologues that are no genes of the vocabulary."""
    if _keys_of(of_sources, vocabulary)[1] > n_known:
        raise DataError(
            f"{path} has genes of {vocabulary.name} in the column {sources[0]!r} rather than in {targets[0]!r}, where "
            f"the orthologues should be; {_COLUMNS}"
        )
    there = {gene for gene in found if gene}
    if n_known < max(REFUSE_BELOW * len(there), 1):
        raise DataError(
            f"hardly any of the {len(there):,} orthologues in the column {targets[0]!r} of {path} "
            f"({some(sorted(there))}) is a gene of {vocabulary.name}; {_COLUMNS}"
        )


def _folded(name: str) -> str:
    return re.sub(r"[\s_.]+", " ", name.strip().casefold())


def _first(names: Sequence[str]) -> str:
    return next((name for name in names if name), "")
