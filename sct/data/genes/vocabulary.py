"""Define the gene vocabulary: the ordered list of genes that matrices, models and stores use."""

from __future__ import annotations

import gzip
import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sct.atomic import write_text
from sct.checks import check_not_empty, check_one_each
from sct.data.genes import alignment
from sct.data.genes.alignment import GeneAlignment, gene_names, some, without_version
from sct.errors import DataError, StoreError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["HUMAN_VERSION", "GeneAlignment", "GeneVocabulary"]

HUMAN_VERSION = "human-protein-coding-gencode48"
_HUMAN_ASSET = "genes_human.tsv.gz"

# Columns of a saved vocabulary -> fields. Two more columns (see _HEADER) repeat name and size in every row. The file
# remains a plain table, and truncation can be detected.
_FIELDS = {
    "ensembl_id": "ensembl_ids",
    "symbol": "symbols",
    "name": "names",
    "locus_group": "locus_groups",
    "location": "locations",
    "alias_symbols": "aliases",
    "prev_symbols": "previous",
}
_LISTS = ("aliases", "previous")
# Ensembl ids begin with ENS, a code of the species ("" for human) and G for a gene.
_SPECIES = {"": "human", "MUS": "mouse", "RNO": "rat", "DAR": "zebrafish"}
_HEADER = (*_FIELDS, "vocabulary", "vocabulary_size")


@dataclass(frozen=True)
class GeneVocabulary:
    """Hold an ordered list of genes. The order matters, because models with convolutions depend on it.

    Attributes
    ----------
    ensembl_ids
        Ensembl id of each gene without version suffix; '' for a gene without id.
    symbols
        Approved symbol of each gene. A symbol that several genes share is ambiguous as a name.
    aliases, previous
        Alias symbols and previous symbols of each gene.
    names, locus_groups, locations
        Approved name, locus group and cytogenetic location of each gene; '' if unknown.
    name
        Name of the vocabulary, such as the version of the shipped table.
    """

    ensembl_ids: tuple[str, ...]
    symbols: tuple[str, ...]
    aliases: tuple[tuple[str, ...], ...]
    previous: tuple[tuple[str, ...], ...]
    names: tuple[str, ...]
    locus_groups: tuple[str, ...]
    locations: tuple[str, ...]
    name: str

    def __post_init__(self) -> None:
        lengths = {len(getattr(self, field)) for field in _FIELDS.values()}
        if len(lengths) != 1:
            raise DataError(
                f"the lists of a gene vocabulary (ids, symbols, ...) have different lengths ({sorted(lengths)}): give "
                "one entry per gene in each list."
            )
        check_not_empty("the gene vocabulary", self.keys, error=DataError)
        if "" in self.keys:
            raise DataError(
                f"position {self.keys.index('')} of the vocabulary has neither an Ensembl id nor a symbol: give one of "
                "them."
            )
        repeated = [key for key, n in Counter(self.keys).items() if n > 1]
        if repeated:
            raise DataError(
                f"{len(repeated)} genes occur more than once in the vocabulary ({some(repeated)}): give each gene once."
            )

    def __len__(self) -> int:
        return len(self.ensembl_ids)

    def __repr__(self) -> str:
        return f"GeneVocabulary({self.name!r}, {len(self):,} genes, hash {self.hash[:12]})"

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Return a unique key of each gene, which is its Ensembl id, or its symbol if it has no id."""
        return tuple(gene or symbol for gene, symbol in zip(self.ensembl_ids, self.symbols, strict=True))

    @cached_property
    def hash(self) -> str:
        """Return a hash (sha256, hexadecimal) of the gene keys. Equal hashes mean the same genes in the same order."""
        return hashlib.sha256("\n".join(self.keys).encode()).hexdigest()

    @property
    def species(self) -> str:
        """Return the species to which the Ensembl ids belong, such as "human"; "" if it is unknown or not one."""
        found = (re.fullmatch(r"ENS([A-Z]*)G\d+", gene) for gene in self.ensembl_ids if gene)
        species = {_SPECIES.get(match[1], "") if match else "" for match in found}
        return species.pop() if len(species) == 1 else ""

    @cached_property
    def position_of_id(self) -> dict[str, int]:
        """Return a dict from each Ensembl id to the position of its gene in the vocabulary."""
        return {gene: position for position, gene in enumerate(self.ensembl_ids) if gene}

    @cached_property
    def owners_of_symbol(self) -> dict[str, tuple[int, ...]]:
        """Return a dict from each approved symbol to the vocabulary positions of the genes with this symbol."""
        return _owners((symbol,) for symbol in self.symbols)

    @cached_property
    def owners_of_alias(self) -> dict[str, tuple[int, ...]]:
        """Return a dict from each alias or previous symbol to the vocabulary positions of the genes with this name."""
        return _owners(new + old for new, old in zip(self.aliases, self.previous, strict=True))

    @classmethod
    def human(cls) -> GeneVocabulary:
        """Return the shipped human protein-coding genes (G = 20,124). The table is read only once.

        Genes are ordered by chromosome (1 to 22, X, Y, MT), then by cytogenetic band (from the telomere of the short
        arm to the telomere of the long arm), then by Ensembl id. Genes without a location come last, by Ensembl id.
        """
        return _human()

    @classmethod
    def from_ids(
        cls, ids: Iterable[str], symbols: Iterable[str] | None = None, name: str = "custom"
    ) -> GeneVocabulary:
        """Make a vocabulary of genes in the given order.

        The aliases and descriptions of a gene are taken from the shipped human table, if the table has the gene.

        Parameters
        ----------
        ids
            Ensembl ids (a version suffix is dropped) or other identifiers; '' for a gene without id.
        symbols
            Approved symbols. Default: for each gene, its symbol in the shipped table, or its id if this table lacks the
            gene.
        name
            Name of the vocabulary.

        Raises
        ------
        DataError
            A gene occurs twice or has neither id nor symbol, or a name is not a string or contains a tab, a '|' or a
            line break.
        """
        genes = [without_version(gene) for gene in gene_names(ids, "the list of ids")]
        human = cls.human()
        at = [human.position_of_id.get(gene, -1) for gene in genes]
        fields = human._take(at)
        if symbols is None:
            given = [symbol or gene for symbol, gene in zip(fields["symbols"], genes, strict=True)]
        else:
            given = gene_names(symbols, "the list of symbols")
        check_one_each("symbols", len(given), "ids", len(genes))
        for text in (name, *genes, *given):
            if re.search(r"[\t\n\r|]", text):
                raise DataError(
                    f"the name {text!r} contains a tab, a '|' or a line break: rename this gene or vocabulary."
                )
        fields |= {"ensembl_ids": tuple(genes), "symbols": tuple(given)}
        return cls(**fields, name=name)._without_foreign_aliases(human, set(at))

    def subset(self, ensembl_ids: Iterable[str]) -> GeneVocabulary:
        """Return a vocabulary of only the given genes, in the order of this vocabulary.

        Aliases that also belong to a removed gene are dropped. Otherwise the name of the removed gene would be matched
        to another gene.

        Raises
        ------
        DataError
            A gene is not in this vocabulary.
        """
        wanted = [without_version(gene) for gene in gene_names(ensembl_ids, "the list of genes")]
        absent = [gene for gene in wanted if gene not in self.position_of_id]
        if absent:
            raise DataError(
                f"{len(absent)} of {len(wanted)} genes are not in the vocabulary {self.name} ({some(absent)}): give "
                "Ensembl ids of genes of this vocabulary."
            )
        return self.select(sorted({self.position_of_id[gene] for gene in wanted}))

    def select(self, positions: Sequence[int] | np.ndarray) -> GeneVocabulary:
        """Return a vocabulary of only the genes at some different positions, in the given order; see `subset`."""
        at = [int(position) for position in positions]
        part = GeneVocabulary(**self._take(at), name=f"{self.name}, {len(at)} of its genes")
        return part._without_foreign_aliases(self, set(at))

    def align(
        self,
        var: pd.DataFrame | pd.Index | Iterable[str],
        *,
        column: str | None = None,
        duplicates: Literal["error", "sum"] = "error",
        report_name: str = "",
    ) -> GeneAlignment:
        """Match the genes of an input to this vocabulary.

        Gene names are Ensembl ids, with or without version suffix, or symbols. Approved symbols take precedence over
        aliases and previous symbols. An alias is used only if it belongs to a single gene and no other column names
        that gene. Ambiguous names are reported, never guessed.

        Parameters
        ----------
        var
            `AnnData.var`, or the names themselves.
        column
            Column of `var` with the gene names ("index" for its index). Default: try the index and every string column,
            and use the one that matches most genes. Ensembl ids are preferred if they match almost as many genes as
            symbols.
        duplicates
            What to do if several columns hold the same gene: raise an error ("error"), or sum them in
            `GeneAlignment.project` ("sum").
        report_name
            Name of the input for messages.

        Returns
        -------
        The mapping from columns to genes, with a report.

        Raises
        ------
        DataError
            There are no genes, a name is not a string, several columns hold the same gene (with `duplicates="error"`),
            or less than 5% of the genes that could match have a match.

        Warns
        -----
        UserWarning
            Less than half of the genes that could match have a match. The number of genes that could match is the
            number of genes in the input or in the vocabulary, whichever is smaller. The message states the likely
            cause.
        """
        return alignment.align(self, var, column, duplicates, report_name)

    def find(self, names: Iterable[str]) -> np.ndarray:
        """Return the vocabulary positions of genes, int64 (n,).

        Each gene is given as an Ensembl id, a symbol or an unambiguous alias.

        Raises
        ------
        DataError
            A name is unknown or ambiguous, or two names mean the same gene.
        """
        return alignment.find(self, names)

    def check_same(self, other: GeneVocabulary, *, what: str, other_what: str) -> None:
        """Raise `StoreError` unless both vocabularies have the same genes in the same order.

        `what` and `other_what` say in the error message where each vocabulary comes from, such as "the store X" and
        "the model".
        """
        if self.hash == other.hash:
            return
        common = len(set(self.keys) & set(other.keys))
        same_set = common == len(self) == len(other)
        raise StoreError(
            f"{what} has the gene vocabulary {self.name} ({len(self):,} genes, hash {self.hash[:16]}), but "
            f"{other_what} has {other.name} ({len(other):,} genes, hash {other.hash[:16]}), "
            f"{'the same genes in another order' if same_set else f'with {common:,} genes in common'}: use the same "
            f"vocabulary for both, for example by ingesting the data again with the vocabulary {self.name}."
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a tab-separated table with a header. The write is atomic."""
        columns: list[Iterable[str]] = []
        for field in _FIELDS.values():
            values = getattr(self, field)
            columns.append(map("|".join, values) if field in _LISTS else values)
        tail = f"{self.name}\t{len(self)}"
        lines = ["\t".join(_HEADER), *("\t".join((*row, tail)) for row in zip(*columns, strict=True))]
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, "\n".join(lines) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> GeneVocabulary:
        """Read a table written by `save`.

        Raises
        ------
        DataError
            The file is missing or truncated, is not a table of this format, or lists a gene twice. The message gives
            the file and the line.
        """
        try:
            text = Path(path).read_bytes().decode("utf-8")
        except OSError as error:
            raise DataError(
                f"the gene vocabulary {path} cannot be read ({error.strerror}): check the path."
            ) from None
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            raise DataError(
                f"{path} line {line}: the text is not UTF-8: restore the file from a copy."
            ) from None
        rows = _rows(text, _HEADER, str(path))
        name = rows[0][-2]
        seen: dict[str, int] = {}
        for line, row in enumerate(rows, start=2):
            key = row[0] or row[1]
            if not key:
                raise DataError(
                    f"{path} line {line}: the gene has neither an Ensembl id nor a symbol: restore the file from a "
                    "copy."
                )
            if key in seen:
                raise DataError(
                    f"{path} line {line}: {key} is already in line {seen[key]}: remove one of the two lines."
                )
            seen[key] = line
        for line, row in enumerate(rows, start=2):
            if row[-2:] != [name, str(len(rows))]:
                raise DataError(
                    f"{path} line {line}: the line names the vocabulary {row[-2]!r} with {row[-1]} genes, but must "
                    f"name {name!r} with {len(rows)} genes, because lines are missing or come from another file: "
                    "restore the file from a copy."
                )
        return _from_rows(rows, name)

    def _take(self, positions: Sequence[int]) -> dict[str, Any]:
        """Return the table fields (symbols, ...) of the genes at `positions`. The fields are empty for position -1."""
        taken = {}
        for field in _FIELDS.values():
            values, empty = getattr(self, field), () if field in _LISTS else ""
            taken[field] = tuple(values[at] if at >= 0 else empty for at in positions)
        return taken

    def _without_foreign_aliases(self, parent: GeneVocabulary, kept: set[int]) -> GeneVocabulary:
        """Drop each alias that is also a name of a removed gene.

        A gene of `parent` is removed if its position is not in `kept`.
        """

        def own(names: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(
                name
                for name in names
                if kept.issuperset(parent.owners_of_symbol.get(name, ()))
                and kept.issuperset(parent.owners_of_alias.get(name, ()))
            )

        return replace(self, aliases=tuple(map(own, self.aliases)), previous=tuple(map(own, self.previous)))


@cache
def _human() -> GeneVocabulary:
    asset = resources.files("sct.data") / "assets" / _HUMAN_ASSET
    text = gzip.decompress(asset.read_bytes()).decode("utf-8")
    return _from_rows(_rows(text, (*_FIELDS, "hgnc_id"), _HUMAN_ASSET), HUMAN_VERSION)


def _rows(text: str, header: Sequence[str], path: str) -> list[list[str]]:
    """Split a tab-separated table into rows, and check the header and the number of fields of each row."""
    lines = text.split("\n")
    if lines[0].split("\t") != list(header):
        raise DataError(
            f"{path} line 1: the line is {lines[0][:60]!r}, but must be the header of a gene vocabulary ({header[0]}, "
            f"{header[1]}, ...): write the file with GeneVocabulary.save."
        )
    if lines.pop() or len(lines) < 2:
        raise DataError(f"{path} line {len(lines) + 1}: the file is truncated: restore it from a copy.")
    rows = [line.split("\t") for line in lines[1:]]
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise DataError(
                f"{path} line {number}: the line has {len(row)} fields, but must have {len(header)}: restore the file "
                "from a copy."
            )
    return rows


def _from_rows(rows: list[list[str]], name: str) -> GeneVocabulary:
    """Make a vocabulary from the rows of a gene table."""
    fields: dict[str, Any] = dict(zip(_FIELDS.values(), zip(*rows, strict=True), strict=False))
    for field in _LISTS:
        fields[field] = tuple(tuple(text.split("|")) if text else () for text in fields[field])
    return GeneVocabulary(**fields, name=name)


def _owners(names: Iterable[Iterable[str]]) -> dict[str, tuple[int, ...]]:
    """Return a dict from each name to the positions of the genes with this name."""
    owners: dict[str, list[int]] = defaultdict(list)
    for position, of_gene in enumerate(names):
        for name in dict.fromkeys(of_gene):
            if name:
                owners[name].append(position)
    return {name: tuple(positions) for name, positions in owners.items()}
