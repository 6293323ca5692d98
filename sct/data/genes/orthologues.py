"""Genes of another species by their human orthologues: a table of pairs, and which of an input's genes it maps."""

from __future__ import annotations

import csv
import hashlib
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

from sct.data.genes.alignment import (
    ENSEMBL,
    ID_PREFERENCE,
    REFUSE_BELOW,
    look_up,
    name_places,
    some,
    without_version,
)
from sct.data.genes.corpus import read_text
from sct.data.genes.vocabulary import GeneVocabulary
from sct.errors import DataError

# What becomes of a gene of an input.
MAPPED, SEVERAL, WITHOUT, AMBIGUOUS, UNKNOWN = (
    "mapped", "with several orthologues", "without an orthologue", "of ambiguous name", "not in the table",
)  # fmt: skip
# Columns as BioMart's site and its R package call them, e.g. "Human gene stable ID", hsapiens_homolog_ensembl_gene.
_BIOMART = re.compile(
    r"(?:(?P<species>.+?) )??(?:homolog )?"
    r"(?:(?P<id>gene stable id|ensembl gene(?: id)?)|(?P<name>(?:associated |external )?gene name)|"
    r"(?P<kind>(?:homology|orthology) ?type))"
)
_HUMAN = ("human", "hsapiens")
_ONE_TO_ONE = "ortholog_one2one"
# What tables hold where there is no gene; some of these are aliases of human genes.
_ABSENT = frozenset(("", "NA", "N/A", "NaN", "nan", "NULL", "None", "-"))
_COLUMNS = "name the columns (source= and target= in Python, --ortholog_columns=SOURCE,TARGET of the ingest)"


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
    digest
        SHA-256 of the table's text.
    """

    name: str
    target_of: dict[str, str]
    owners: dict[str, tuple[str, ...]]
    several: frozenset[str]
    without: frozenset[str]
    vocabulary: GeneVocabulary
    digest: str

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

    def check_distinct(self, remedy: str) -> None:
        """Raise `DataError` where several columns are one gene; `remedy` says what to do about them."""
        named: dict[str, list[str]] = defaultdict(list)
        for name, target in zip(self.names, self.targets, strict=True):
            if target:
                named[target].append(name)
        twice = {target: names for target, names in named.items() if len(names) > 1}
        if twice:
            shown = some(f"{' and '.join(names)} for {target}" for target, names in twice.items())
            raise DataError(
                f"{f'{self.report_name}: ' if self.report_name else ''}{len(twice):,} genes stand in more than one "
                f"column by {self.source} ({shown}); {remedy}"
            )


def read_orthologues(
    path: str | os.PathLike[str],
    *,
    source: str | Sequence[str] | None = None,
    target: str | Sequence[str] | None = None,
    vocabulary: GeneVocabulary | None = None,
) -> Orthologues:
    """Read a table of orthologues, and keep its one-to-one pairs.

    A pair is one-to-one where neither of the two genes stands in another pair, of whatever kind. Where the table says
    of what kind a pair is (Ensembl's "Human homology type"), only those of the kind "ortholog_one2one" are taken. What
    is left out is counted.

    Parameters
    ----------
    path
        Table with a header, separated by tabs or, where the header has none, by commas; it may end with .gz. NA, N/A,
        NaN, nan, NULL, None, - and an empty cell stand for no gene.
    source, target
        Columns of the other species' genes and of their orthologues: Ensembl ids, symbols, or a column of each. By
        default the columns that Ensembl's BioMart gives ("Gene stable ID", "Gene name", "Human gene stable ID",
        "Human gene name", or hsapiens_homolog_ensembl_gene and its like, whichever there are and from whichever of the
        two species' tables), else the first two.
    vocabulary
        Where orthologues are looked up; by default the shipped human genes. Other genes stay as the table names them.

    Raises
    ------
    DataError
        The file is absent, damaged, empty or without such columns, it has several columns of kinds, hardly any
        orthologue is a gene of the vocabulary, or no pair is one-to-one.
    """
    path, vocabulary = Path(path).expanduser(), vocabulary or GeneVocabulary.human()
    text = read_text(path)
    table = _table(text, path)
    sources, targets = _chosen(table, path, source, target, vocabulary)
    kind = _kind_column(list(table.columns), path, (*sources, *targets))
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
    unfit: set[str] = set()
    for key, names, gene, fit in zip(keys, of_sources, found, fits, strict=True):
        if not key:
            continue
        for name in filter(None, names):
            owners[name].add(key)
        if gene:
            targets_of[key].add(gene)
            sources_of[gene].add(key)
            if not fit:
                unfit.add(key)
    pairs = {
        key: gene
        for key, (gene, *others) in targets_of.items()
        if not others and len(sources_of[gene]) == 1 and key not in unfit
    }
    if not pairs:
        raise DataError(f"{path} has no pair of genes that is one-to-one; give a table with such pairs")
    several = set(targets_of) - set(pairs)
    everything = {key for key in keys if key}
    return Orthologues(
        path.name,
        pairs,
        {name: tuple(sorted(keys)) for name, keys in owners.items()},
        frozenset(several),
        frozenset(everything - several - set(pairs)),
        vocabulary,
        hashlib.sha256(text.encode()).hexdigest(),
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

    def own(names: Sequence[str], fates: Sequence[tuple[str, str]]) -> int:
        # Names that the table has as well tell nothing: many species' symbols are spelled like the human ones.
        foreign = [name for name, (fate, _) in zip(names, fates, strict=True) if fate == UNKNOWN]
        positions, _ = look_up(table.vocabulary, foreign)
        return len(np.unique(positions[positions >= 0]))

    possible = min(len([name for name in chosen if name]), len(table))
    enough = found >= max(REFUSE_BELOW * possible, 1)
    # Where hardly anything is mapped, any of the places may tell which genes these are.
    most, names = max(
        (own(names, fates), names) for *_, names, fates in places if names is chosen or not enough
    )
    if most > found:
        raise DataError(
            f"{prefix}the genes are those of {table.vocabulary.name} already ({some(names)}), or named like them; "
            f"leave the table of orthologues {table.name} (--orthologs) out for this input, or give one that has "
            "these names"
        )
    if not enough:
        raise DataError(
            f"{prefix}only {found:,} of {len(chosen):,} gene names ({some(chosen)}) have an orthologue in "
            f"{table.name}, whose genes are named like {some(table.owners)}; give a table of this species with this "
            "kind of names, or name the column of var that holds the table's kind (gene_column=)"
        )


def _table(text: str, path: Path) -> pd.DataFrame:
    """The table, all of it as text."""
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
    table: pd.DataFrame,
    path: Path,
    source: str | Sequence[str] | None,
    target: str | Sequence[str] | None,
    vocabulary: GeneVocabulary,
) -> tuple[list[str], list[str]]:
    """Columns of the genes and of their orthologues."""
    if (source is None) != (target is None):
        raise DataError("one of source and target was given alone; give both columns, or neither")
    named = list(table.columns)
    if source is None or target is None:
        sources, targets = _found(named, path, vocabulary)
    else:
        sources, targets = ([each] if isinstance(each, str) else list(each) for each in (source, target))
    for name in (*sources, *targets):
        if named.count(name) != 1:
            number = "no" if name not in named else "more than one"
            raise DataError(f"{path} has {number} column {name!r} among {', '.join(named)}; {_COLUMNS}")
    return sources, targets


def _found(named: list[str], path: Path, vocabulary: GeneVocabulary) -> tuple[list[str], list[str]]:
    """Columns of genes and of orthologues, as BioMart calls them, or the first two."""
    second = named[1].strip()
    if any(ENSEMBL.fullmatch(name.strip()) for name in named) or second in vocabulary.owners_of_symbol:
        raise DataError(f"{path} begins with genes ({some(named)}), not with a header; add one")
    by_species: dict[str, list[tuple[bool, str]]] = defaultdict(list)
    for name in named:
        match = _biomart(name)
        if match and not match["kind"]:
            by_species[match["species"] or ""].append((match["id"] is None, name))
    if len(by_species) < 2:
        return named[:1], named[1:2]
    # In a table of one species' genes, those of the other are told by its name.
    human = next((species for species in _HUMAN if species in by_species), "")
    others = [species for species in by_species if species != human]
    if human not in by_species or len(others) != 1:
        raise DataError(f"{path} has genes of several species ({', '.join(named)}); {_COLUMNS}")
    # Ids before symbols, for an id means one gene.
    of = {species: [name for _, name in sorted(columns)] for species, columns in by_species.items()}
    return of[others[0]], of[human]


def _kind_column(named: Sequence[str], path: Path, chosen: Sequence[str]) -> str | None:
    """Column that says of what kind the chosen pairs are."""
    matches = [(name, match) for name in named if (match := _biomart(name)) is not None]
    species = {match["species"] for name, match in matches if name in chosen} - {None}
    kinds = [
        name
        for name, match in matches
        if match["kind"] and name not in chosen and (not species or match["species"] in {None, *species})
    ]
    if len(kinds) > 1:
        raise DataError(
            f"{path} has several columns that say of what kind a pair is ({', '.join(kinds)}); leave that of these "
            "pairs alone"
        )
    return kinds[0] if kinds else None


def _names(table: pd.DataFrame, columns: Sequence[str]) -> list[tuple[str, ...]]:
    """Names of a gene in each row, ids without version, '' where there is none."""
    listed = [
        ["" if (name := text.strip()) in _ABSENT else without_version(name) for text in table[column]]
        for column in columns
    ]
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
    ids = {name for names in of_sources for name in names if ENSEMBL.fullmatch(name)}
    own = sum(name in vocabulary.position_of_id for name in ids)
    there = {gene for gene in found if gene}
    hardly = n_known < max(REFUSE_BELOW * len(there), 1)
    # Symbols tell only where the orthologues are none: those of many species are spelled like the human ones.
    if own >= max(REFUSE_BELOW * len(ids), 1) or (hardly and _keys_of(of_sources, vocabulary)[1] > n_known):
        raise DataError(
            f"{path} has genes of {vocabulary.name} in the column {sources[0]!r} rather than in {targets[0]!r}, where "
            f"the orthologues should be; {_COLUMNS}"
        )
    if hardly:
        raise DataError(
            f"hardly any of the {len(there):,} orthologues in the column {targets[0]!r} of {path} "
            f"({some(sorted(there))}) is a gene of {vocabulary.name}; {_COLUMNS}"
        )


def _biomart(name: str) -> re.Match[str] | None:
    """What a column holds, where BioMart calls it so."""
    return _BIOMART.fullmatch(re.sub(r"[\s_.]+", " ", name.strip().casefold()))


def _first(names: Sequence[str]) -> str:
    return next((name for name in names if name), "")
