"""Map genes of another species to their human orthologs by a table of gene pairs."""

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

# Result for a gene of an input.
MAPPED, SEVERAL, WITHOUT, AMBIGUOUS, UNKNOWN = (
    "mapped", "with several orthologs", "without an ortholog", "of ambiguous name", "not in the table",
)  # fmt: skip
# Column names of the BioMart website and R package, such as "Human gene stable ID" and hsapiens_homolog_ensembl_gene.
_BIOMART = re.compile(
    r"(?:(?P<species>.+?) )??(?:homolog )?"
    r"(?:(?P<id>gene stable id|ensembl gene(?: id)?)|(?P<name>(?:associated |external )?gene name)|"
    r"(?P<kind>(?:homology|orthology) ?type))"
)
_HUMAN = ("human", "hsapiens")
_ONE_TO_ONE = "ortholog_one2one"
# Entries that mean "no gene" in tables. They must be filtered, because some are also aliases of human genes.
_ABSENT = frozenset(("", "NA", "N/A", "NaN", "nan", "NULL", "None", "-"))
_COLUMNS = (
    "give the names of the gene column and the ortholog column (source= and target= in Python, "
    "--ortholog_columns=SOURCE,TARGET for sct ingest)"
)


@dataclass(frozen=True)
class Orthologs:
    """Hold one-to-one pairs of genes: a gene of another species, and its ortholog.

    A gene of the other species is identified by its Ensembl id, or by its symbol if it has no id.

    Attributes
    ----------
    name
        Name of the table, such as its file name.
    target_of
        Dict from each gene of the other species to its ortholog. The ortholog is given as its key in the
        vocabulary, or as its name in the table if the vocabulary lacks it.
    owners
        Dict from each Ensembl id or symbol to the genes of the other species with this name.
    several
        Genes of the other species that have an ortholog, but not a one-to-one pair: the gene has several orthologs,
        or shares an ortholog with another gene.
    without
        Genes of the other species without an ortholog.
    vocabulary
        Gene vocabulary in which the orthologs were looked up.
    digest
        SHA-256 hash of the table.
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
        return f"Orthologs({self.name!r}, {len(self):,} one-to-one pairs)"

    def summary(self) -> str:
        """Return a sentence that says how many pairs the table has and how many genes were left out."""
        return (
            f"{len(self):,} one-to-one pairs in {self.name}; left out: {len(self.several):,} genes with several "
            f"orthologs or a shared ortholog, and {len(self.without):,} genes without an ortholog"
        )

    def fate(self, name: str) -> tuple[str, str]:
        """Look up a gene name. Return the outcome (`MAPPED`, `SEVERAL`, ...), and the ortholog or ''."""
        owners = self.owners.get(name) or self.owners.get(without_version(name), ())
        if len(owners) != 1:
            return (AMBIGUOUS if owners else UNKNOWN), ""
        if target := self.target_of.get(owners[0], ""):
            return MAPPED, target
        return (SEVERAL if owners[0] in self.several else WITHOUT), ""


@dataclass(frozen=True)
class MappedGenes:
    """Hold the genes of an input and the ortholog to which each gene is mapped.

    Attributes
    ----------
    targets
        Ortholog of each gene of the input; '' for genes without a one-to-one ortholog.
    names
        Names of the genes in the input.
    source
        Where the names were found, e.g. `index (Ensembl ids)`.
    table
        Name of the ortholog table.
    dropped
        Dict from each reason to the number of genes that were not mapped for this reason.
    report_name
        Name of the input for messages, or ''.
    """

    targets: tuple[str, ...]
    names: tuple[str, ...]
    source: str
    table: str
    dropped: dict[str, int]
    report_name: str = ""

    @property
    def matched(self) -> int:
        """Return the number of genes of the input that were mapped."""
        return len(self.targets) - sum(self.dropped.values())

    def summary(self) -> str:
        """Return a sentence that says how many genes were mapped, and why the other genes were not mapped."""
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in self.dropped.items())
        return (
            f"{f'{self.report_name}: ' if self.report_name else ''}{self.matched:,} of {len(self.targets):,} genes "
            f"have a one-to-one ortholog in {self.table}, by {self.source}"
            + (f"; dropped: {reasons}" if reasons else "")
        )

    def check_distinct(self, remedy: str) -> None:
        """Raise `DataError` if several columns map to the same gene. `remedy` tells the user what to do."""
        named: dict[str, list[str]] = defaultdict(list)
        for name, target in zip(self.names, self.targets, strict=True):
            if target:
                named[target].append(name)
        twice = {target: names for target, names in named.items() if len(names) > 1}
        if twice:
            shown = some(f"{' and '.join(names)} for {target}" for target, names in twice.items())
            raise DataError(
                f"{f'{self.report_name}: ' if self.report_name else ''}{len(twice):,} genes occur in more than one "
                f"column, according to the names in {self.source} ({shown}): {remedy}."
            )


def read_orthologs(
    path: str | os.PathLike[str],
    *,
    source: str | Sequence[str] | None = None,
    target: str | Sequence[str] | None = None,
    vocabulary: GeneVocabulary | None = None,
) -> Orthologs:
    """Read a table of orthologs and keep its one-to-one pairs.

    A pair is one-to-one if neither gene occurs in another pair. If the table has a column with the homology type (such
    as Ensembl's "Human homology type"), only pairs of the type "ortholog_one2one" are kept. Genes that are left out are
    counted.

    Parameters
    ----------
    path
        Table with a header, separated by tabs (or by commas if the header has no tab), optionally compressed (.gz). NA,
        N/A, NaN, nan, NULL, None, - and empty cells mean "no gene".
    source, target
        Column(s) with the genes of the other species, and column(s) with their orthologs. Each may be a column of
        Ensembl ids, a column of symbols, or both. Default: the columns of Ensembl's BioMart ("Gene stable ID", "Gene
        name", "Human gene stable ID", "Human gene name", hsapiens_homolog_ensembl_gene and similar names, exported for
        either species); otherwise the first two columns.
    vocabulary
        Gene vocabulary in which orthologs are looked up. Default: the shipped human genes. Orthologs outside the
        vocabulary keep their name in the table.

    Returns
    -------
    The one-to-one pairs.

    Raises
    ------
    DataError
        The file is missing, damaged or empty, lacks a gene column or ortholog column, or has several columns with
        homology types. Less than 5% of the orthologs are genes of the vocabulary, or no pair is one-to-one.
    """
    path, vocabulary = Path(path).expanduser(), vocabulary or GeneVocabulary.human()
    text = read_text(path)
    table = _table(text, path)
    sources, targets = _chosen(table, path, source, target, vocabulary)
    kind = _kind_column(list(table.columns), path, (*sources, *targets))
    rows = table.shape[0]
    of_sources, of_targets = (_names(table, columns) for columns in (sources, targets))
    if not any(map(any, of_sources)):
        raise DataError(f"{path} has no gene in the column {sources[0]!r}: {_COLUMNS}.")
    keys = [_first(names) for names in of_sources]
    found, n_known = _keys_of(of_targets, vocabulary)
    _check_direction(path, of_sources, sources, targets, found, n_known, vocabulary)
    fits = np.ones(rows, bool)
    if kind is not None:
        fits = (table[kind].str.strip() == _ONE_TO_ONE).to_numpy()
        if not fits.any():
            have = some(sorted(set(table[kind])))
            raise DataError(
                f"{path} has no pair of type {_ONE_TO_ONE!r} in the column {kind!r}, only the types {have}: use the "
                "names of homology types in Ensembl, or remove this column."
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
        raise DataError(
            f"{path} has no one-to-one pair of genes, but only genes with exactly one ortholog can be mapped: give "
            "a table with one-to-one pairs."
        )
    several = set(targets_of) - set(pairs)
    everything = {key for key in keys if key}
    return Orthologs(
        path.name,
        pairs,
        {name: tuple(sorted(keys)) for name, keys in owners.items()},
        frozenset(several),
        frozenset(everything - several - set(pairs)),
        vocabulary,
        hashlib.sha256(text.encode()).hexdigest(),
    )


def map_orthologs(
    var: pd.DataFrame | pd.Index | Iterable[str],
    table: Orthologs,
    *,
    column: str | None = None,
    report_name: str = "",
) -> MappedGenes:
    """Map the genes of an input to their orthologs.

    Parameters
    ----------
    var
        `AnnData.var`, or the gene names: symbols or Ensembl ids, as in the table. The version of an id is ignored.
    table
        Orthologs from `read_orthologs`.
    column
        Column of `var` with the gene names ("index" for its index). Default: try the index and every string column, and
        use the one that matches most genes. Ensembl ids are preferred if they match almost as many genes as symbols.
    report_name
        Name of the input for messages.

    Returns
    -------
    The ortholog of each gene.

    Raises
    ------
    DataError
        There are no genes, a name is not a string, the input already has genes of the vocabulary, or less than 5% of
        the genes that could be mapped are in the table.
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
    table: Orthologs, places: Sequence[tuple[Any, ...]], found: int, chosen: Sequence[str], prefix: str
) -> None:
    """Raise `DataError` if the input already has genes of the vocabulary, or if the table has too few of its genes."""

    def own(names: Sequence[str], fates: Sequence[tuple[str, str]]) -> int:
        # Ignore names that are also in the table, because symbols of many species are spelled like the human ones.
        foreign = [name for name, (fate, _) in zip(names, fates, strict=True) if fate == UNKNOWN]
        positions, _ = look_up(table.vocabulary, foreign)
        return len(np.unique(positions[positions >= 0]))

    possible = min(len([name for name in chosen if name]), len(table))
    enough = found >= max(REFUSE_BELOW * possible, 1)
    # If almost nothing was mapped, look for genes of the vocabulary in all columns.
    most, names = max(
        (own(names, fates), names) for *_, names, fates in places if names is chosen or not enough
    )
    if most > found:
        raise DataError(
            f"{prefix}the gene names are already those of {table.vocabulary.name} ({some(names)}), so the ortholog "
            f"table {table.name} cannot map them: leave out the table (--orthologs) for this input, or give a table "
            "from these genes to other genes."
        )
    if not enough:
        raise DataError(
            f"{prefix}only {found:,} of {len(chosen):,} gene names (such as {some(chosen)}) are in the ortholog "
            f"table {table.name}, which has names such as {some(table.owners)}: give a table for the species of the "
            "input, or set gene_column= to a column of var with names like those of the table."
        )


def _table(text: str, path: Path) -> pd.DataFrame:
    """Read a table with all values as strings."""
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter="\t" if "\t" in text.partition("\n")[0] else ",", strict=True)
    rows: list[list[str]] = []
    try:
        for row in filter(None, reader):
            rows.append(row)
            if len(row) != len(rows[0]):
                raise DataError(
                    f"{path} line {reader.line_num}: the line has {len(row)} fields, but the header has "
                    f"{len(rows[0])}: correct this line."
                )
    except csv.Error as error:
        raise DataError(
            f"{path} line {reader.line_num}: the line is not valid ({error}): correct this line."
        ) from None
    if len(rows) < 2:
        raise DataError(
            f"{path} {'has only a header' if rows else 'is empty'}: give an ortholog table with a header and rows."
        )
    if len(rows[0]) < 2:
        raise DataError(
            f"{path} has only the column {rows[0][0]!r}, but an ortholog table has a column of genes and a column of "
            "orthologs: give both, separated by tabs or commas."
        )
    return pd.DataFrame(rows[1:], columns=pd.Index(rows[0], dtype=object))


def _chosen(
    table: pd.DataFrame,
    path: Path,
    source: str | Sequence[str] | None,
    target: str | Sequence[str] | None,
    vocabulary: GeneVocabulary,
) -> tuple[list[str], list[str]]:
    """Return two lists of column names: the gene columns and the ortholog columns of the table."""
    if (source is None) != (target is None):
        raise DataError("only one of `source` and `target` was given: give both columns, or neither of them.")
    named = list(table.columns)
    if source is None or target is None:
        sources, targets = _found(named, path, vocabulary)
    else:
        sources, targets = ([each] if isinstance(each, str) else list(each) for each in (source, target))
    for name in (*sources, *targets):
        if named.count(name) != 1:
            number = "no" if name not in named else "more than one"
            raise DataError(
                f"{path} has {number} column named {name!r}; the columns are {', '.join(named)}: {_COLUMNS}."
            )
    return sources, targets


def _found(named: list[str], path: Path, vocabulary: GeneVocabulary) -> tuple[list[str], list[str]]:
    """Find the gene columns and the ortholog columns by their BioMart names.

    Without such names, return the first two columns.
    """
    second = named[1].strip()
    if any(ENSEMBL.fullmatch(name.strip()) for name in named) or second in vocabulary.owners_of_symbol:
        raise DataError(
            f"{path} has genes in its first line ({some(named)}) instead of a header: add a header."
        )
    by_species: dict[str, list[tuple[bool, str]]] = defaultdict(list)
    for name in named:
        match = _biomart(name)
        if match and not match["kind"]:
            by_species[match["species"] or ""].append((match["id"] is None, name))
    if len(by_species) < 2:
        return named[:1], named[1:2]
    # BioMart puts the name of the other species into the names of its columns.
    human = next((species for species in _HUMAN if species in by_species), "")
    others = [species for species in by_species if species != human]
    if human not in by_species or len(others) != 1:
        raise DataError(
            f"{path} has columns of several species ({', '.join(named)}), so it is unclear which two columns to use: "
            f"{_COLUMNS}."
        )
    # Put ids before symbols, because ids are unambiguous.
    of = {species: [name for _, name in sorted(columns)] for species, columns in by_species.items()}
    return of[others[0]], of[human]


def _kind_column(named: Sequence[str], path: Path, chosen: Sequence[str]) -> str | None:
    """Return the name of the column that has the homology type of the chosen pairs, or None."""
    matches = [(name, match) for name in named if (match := _biomart(name)) is not None]
    species = {match["species"] for name, match in matches if name in chosen} - {None}
    kinds = [
        name
        for name, match in matches
        if match["kind"] and name not in chosen and (not species or match["species"] in {None, *species})
    ]
    if len(kinds) > 1:
        raise DataError(
            f"{path} has several columns with homology types ({', '.join(kinds)}): keep only the column for the two "
            "species of the table."
        )
    return kinds[0] if kinds else None


def _names(table: pd.DataFrame, columns: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the ids and symbols of the gene in each row. Ids have no version; a missing id or symbol is ''."""
    listed = [
        ["" if (name := text.strip()) in _ABSENT else without_version(name) for text in table[column]]
        for column in columns
    ]
    return list(zip(*listed, strict=True))


def _keys_of(rows: Sequence[tuple[str, ...]], vocabulary: GeneVocabulary) -> tuple[list[str], int]:
    """Return two values: the key of the gene in each row, and the number of distinct vocabulary genes that were found.

    A row may have several names for its gene. The key is the vocabulary key of the first name that the vocabulary
    contains. If the vocabulary contains no name of the row, the key is the first non-empty name of the row.
    """
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
    """Raise `DataError` if the two columns are swapped, or if the orthologs are not genes of the vocabulary."""
    ids = {name for names in of_sources for name in names if ENSEMBL.fullmatch(name)}
    own = sum(name in vocabulary.position_of_id for name in ids)
    orthologs = {gene for gene in found if gene}
    hardly = n_known < max(REFUSE_BELOW * len(orthologs), 1)
    # Symbols of many species are spelled like the human ones. They are evidence only if the orthologs do not match.
    if own >= max(REFUSE_BELOW * len(ids), 1) or (hardly and _keys_of(of_sources, vocabulary)[1] > n_known):
        raise DataError(
            f"{path} has genes of {vocabulary.name} in the gene column {sources[0]!r}, but must have them in the "
            f"ortholog column {targets[0]!r}: {_COLUMNS}."
        )
    if hardly:
        raise DataError(
            f"almost none of the {len(orthologs):,} orthologs in the column {targets[0]!r} of {path} "
            f"({some(sorted(orthologs))}) is a gene of {vocabulary.name}: {_COLUMNS}."
        )


def _biomart(name: str) -> re.Match[str] | None:
    """Match a column name against the BioMart names; the groups of the match say what the column contains."""
    return _BIOMART.fullmatch(re.sub(r"[\s_.]+", " ", name.strip().casefold()))


def _first(names: Sequence[str]) -> str:
    """Return the first non-empty name, or ''."""
    return next((name for name in names if name), "")
