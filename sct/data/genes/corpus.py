"""The gene corpus: one text for each gene, from a file or from the shipped gene table.

ZerOmics paper, appendices A.2 and A.3: GeneCards summaries of the genes of the HUGO Gene Nomenclature, and only genes
that have one are used. GeneCards is not free to ship, so the corpus is the user's file; `GeneCorpus.built_in` has what
the shipped table says of each gene, in the manner of the first sentence of the paper's Table 6.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sct.checks import check_distinct, check_not_empty, check_one_each
from sct.data.genes.alignment import some
from sct.data.genes.vocabulary import GeneVocabulary
from sct.errors import DataError

GENE_COLUMNS = ("ensembl_id", "symbol", "gene")
TEXT_COLUMNS = ("text", "summary")
_DELIMITERS = {".tsv": "\t", ".csv": ","}
_KINDS = {
    "protein-coding gene": "a protein-coding gene",
    "non-coding RNA": "a gene of non-coding RNA",
    "pseudogene": "a pseudogene",
    "other": "a gene",  # of the table's groups the one that says nothing
}
_PLACES = {
    "mitochondria": "in the mitochondrial genome",
    "14 unplaced": "on an unplaced part of chromosome 14",
}


@dataclass(frozen=True)
class GeneCorpus:
    """One text for each of some genes.

    Attributes
    ----------
    keys
        Ensembl ids without version, as in `GeneVocabulary.keys`.
    texts
        Text of each gene.
    name
        Name of the corpus, e.g. that of its file.
    left_out
        Names in the file that mean no gene of the table, or not one alone; '' where a text names none.
    empty
        Number of genes in the file without text.
    """

    keys: tuple[str, ...]
    texts: tuple[str, ...]
    name: str
    left_out: tuple[str, ...] = field(default=(), compare=False)
    empty: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        check_not_empty("the gene corpus", self.keys, error=DataError)
        check_one_each("texts", len(self.texts), "genes", len(self.keys))
        check_distinct("the gene corpus", self.keys, error=DataError, advice="give one text for each gene")
        bare = [key for key, text in zip(self.keys, self.texts, strict=True) if not text.strip()]
        if bare:
            raise DataError(f"{len(bare)} genes have an empty text ({some(bare)}); leave them out")

    def __len__(self) -> int:
        return len(self.keys)

    def __repr__(self) -> str:
        return f"GeneCorpus({self.name!r}, {len(self):,} genes, hash {self.hash[:12]})"

    @cached_property
    def hash(self) -> str:
        """sha256 (hexadecimal) over keys and texts in their order."""
        return hashlib.sha256(json.dumps([self.keys, self.texts]).encode()).hexdigest()

    @cached_property
    def text_of(self) -> dict[str, str]:
        """Key of a gene -> its text."""
        return dict(zip(self.keys, self.texts, strict=True))

    def summary(self) -> str:
        """Say in one sentence what is there and what was left out."""
        parts = [f"{len(self):,} genes of {self.name} have a text"]
        if self.left_out:
            shown = some(name or "no name" for name in self.left_out)
            parts.append(
                f"{len(self.left_out):,} names that mean no gene of the table were left out ({shown})"
            )
        if self.empty:
            parts.append(f"{self.empty:,} genes without text were left out")
        return "; ".join(parts)

    @classmethod
    def load(cls, path: str | os.PathLike[str], genes: GeneVocabulary | None = None) -> GeneCorpus:
        """Read a corpus.

        Genes stand in the order of the table, whatever their order in the file. Names are resolved as by
        `GeneVocabulary.align`: Ensembl ids with or without version, approved symbols, then aliases and previous
        symbols of one gene alone that the file does not name itself. What is not resolved and what has no text is
        left out and counted.

        Parameters
        ----------
        path
            A .tsv or .csv file with a header, one of the columns `ensembl_id`, `symbol`, `gene` (in this order the
            first that is not empty names a row's gene) and one of `text`, `summary`; or a .json file with
            {gene: text} or a list of objects with such fields; each may end with .gz.
        genes
            Table that names are looked up in, by default the shipped human one.

        Raises
        ------
        DataError
            The file is absent, damaged or without such columns, a gene has two texts, or hardly any gene is known.
        """
        path = Path(path).expanduser()
        genes = GeneVocabulary.human() if genes is None else genes
        rows = _json_rows(path) if suffix_of(path) == ".json" else _table_rows(path)
        if not rows:
            raise DataError(f"{path} holds no genes; give at least one with its text")
        given = [(name.strip(), text.strip()) for name, text in rows if text.strip()]
        named = [(name, text) for name, text in given if name]
        if not named:
            raise DataError(f"no gene in {path} has a name and a text; give at least one")
        at, unknown = find_genes([name for name, _ in named], genes, str(path), "text")
        chosen = sorted(np.flatnonzero(at >= 0).tolist(), key=lambda row: at[row])
        return cls(
            tuple(genes.keys[at[row]] for row in chosen),
            tuple(named[row][1] for row in chosen),
            path.name,
            (*unknown, *[""] * (len(given) - len(named))),
            len(rows) - len(given),
        )

    @classmethod
    def built_in(cls) -> GeneCorpus:
        """Corpus of the shipped human table: kind, place and names of each gene that HGNC knows.

        Genes outside the HUGO Gene Nomenclature have none, as in the paper (appendix A.2).
        """
        human = GeneVocabulary.human()
        # The table takes the locus group from HGNC, so a gene without one is not in its nomenclature.
        known = [at for at, group in enumerate(human.locus_groups) if group]
        return cls(
            tuple(human.keys[at] for at in known), tuple(_described(human, at) for at in known), human.name
        )

    def texts_of(self, vocabulary: GeneVocabulary) -> list[str | None]:
        """Text of each gene of a vocabulary, found by its key; None where the corpus has none."""
        return [self.text_of.get(key) for key in vocabulary.keys]

    def restricted(self, vocabulary: GeneVocabulary) -> GeneVocabulary:
        """Return the genes of a vocabulary that have a text, in its order (appendix A.3, "gene list mapping").

        Raises
        ------
        DataError
            There are none.
        """
        there = [gene for gene in vocabulary.ensembl_ids if gene in self.text_of]
        if not there:
            raise DataError(
                f"none of the {len(vocabulary):,} genes of {vocabulary.name} has a text in the corpus {self.name}; "
                "give a corpus of genes of the same organism"
            )
        return vocabulary if len(there) == len(vocabulary) else vocabulary.subset(there)


def find_genes(
    names: Sequence[str], genes: GeneVocabulary, where: str, what: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Look up the genes that a file has something about.

    Parameters
    ----------
    names
        Ensembl ids or symbols, n of them, none empty.
    genes
        Table to look in.
    where, what
        The file, and what it has about each gene ("text"), for messages.

    Returns
    -------
    Positions in the table, int64 (n,), -1 where a name means no gene or not one alone; and these names.

    Raises
    ------
    DataError
        Two names mean one gene, or hardly any name is known.
    """
    with warnings.catch_warnings():
        # That few are known is no fault here: the caller counts those left out.
        warnings.simplefilter("ignore", UserWarning)
        try:
            found = genes.align(names, duplicates="sum")
        except DataError:
            raise DataError(
                f"hardly any of the {len(names):,} names in {where} ({some(names)}) is a gene of {genes.name}; are "
                "they of another organism? Give symbols or Ensembl ids of its genes"
            ) from None
    if found.duplicates:
        shown = some(f"{gene} as {' and '.join(given)}" for gene, given in found.duplicates.items())
        raise DataError(
            f"{len(found.duplicates):,} genes have more than one {what} in {where} ({shown}); keep one of each"
        )
    return found.columns, tuple(names[at] for at in np.flatnonzero(found.columns < 0).tolist())


def suffix_of(path: Path) -> str:
    """Last suffix of a file's name in small letters, without ".gz"."""
    name = path.name.lower().removesuffix(".gz")
    return os.path.splitext(name)[1]


def read_text(path: Path) -> str:
    """Content of a text file in UTF-8, unpacked where its name ends with .gz.

    Raises
    ------
    DataError
        It is absent, damaged, or not such text.
    """
    try:
        content = path.read_bytes()
        if path.name.lower().endswith(".gz"):
            content = gzip.decompress(content)
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path} line {line}: found bytes that are not UTF-8; write it again") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read {path} ({reason}); check the path and the file") from None


def _columns(there: Iterable[str], where: str) -> tuple[list[str], str]:
    """Columns that name a gene, and the one of its text, as the file spells them."""
    folded = [(name.strip().casefold(), name) for name in there]
    spelled, times = dict(folded), Counter(name for name, _ in folded)
    naming = [spelled[name] for name in GENE_COLUMNS if name in spelled]
    telling = [spelled[name] for name in TEXT_COLUMNS if name in spelled]
    for found, wanted in ((naming, GENE_COLUMNS), (telling, TEXT_COLUMNS)):
        twice = next((name for name in wanted if times[name] > 1), None)
        if twice is not None:
            raise DataError(f"{where} has the column {twice} more than once; rename all but the one meant")
        if not found:
            have = ", ".join(spelled.values()) or "nothing"
            raise DataError(
                f"{where} has no column {' or '.join(wanted)} but {have}; rename the one that is meant"
            )
    return naming, telling[0]


def _table_rows(path: Path) -> list[tuple[str, str]]:
    """Names and texts of a table with a header."""
    delimiter = _DELIMITERS.get(suffix_of(path))
    if delimiter is None:
        raise DataError(f"{path} is none of .tsv, .csv and .json; give a corpus of one of these forms")
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
    rows, header = [], None
    try:
        for row in reader:
            if not row:
                continue
            if header is None:
                header = row
                naming, telling = _columns(header, str(path))
                continue
            if len(row) != len(header):
                raise DataError(
                    f"{path} line {reader.line_num}: found {len(row)} fields where {len(header)} are expected; write "
                    "it again"
                )
            fields = dict(zip(header, row, strict=True))
            rows.append((_first(fields, naming), fields[telling]))
    except csv.Error as error:
        raise DataError(f"{path} line {reader.line_num}: {error}; write it again") from None
    if header is None:
        raise DataError(f"{path} is empty; give a table with a header")
    return rows


def _json_rows(path: Path) -> list[tuple[str, str]]:
    """Names and texts of a JSON file."""
    try:
        # Objects as lists of pairs: a dict would keep the last of two texts of a gene.
        content = json.loads(read_text(path), object_pairs_hook=_Pairs)
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is no JSON ({error}); write it again") from None
    pairs: list[tuple[Any, Any]] = []
    if isinstance(content, _Pairs):
        pairs = list(content)
    elif isinstance(content, list) and all(isinstance(item, _Pairs) for item in content):
        for number, item in enumerate(content, start=1):
            fields = dict(item)
            naming, telling = _columns(fields, f"{path} entry {number}")
            pairs.append((_first(fields, naming), fields[telling]))
    else:
        raise DataError(f"{path} holds neither {{gene: text}} nor a list of objects; write one of these")
    for name, text in pairs:
        if not isinstance(name, str) or not isinstance(text, str | None):
            raise DataError(
                f"{path} has {text!r} for the gene {name!r} where texts are expected; write texts"
            )
    return [(name, text or "") for name, text in pairs]


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as its pairs."""


def _first(fields: dict[str, Any], names: Sequence[str]) -> Any:
    """First of some fields that says something."""
    return next((fields[name] for name in names if fields[name] not in ("", None)), "")


def _described(genes: GeneVocabulary, at: int) -> str:
    """What the table says about a gene."""
    group, place = genes.locus_groups[at], genes.locations[at]
    name = f" ({genes.names[at]})" if genes.names[at] else ""
    said = [f"{genes.symbols[at]}{name} is {_KINDS.get(group, f'a gene of the group {group}')}."]
    if place:
        said.append(f"It lies {_PLACES.get(place, f'on {place}')}.")
    if genes.aliases[at]:
        said.append(f"It is also called {_listed(genes.aliases[at])}.")
    if genes.previous[at]:
        said.append(f"It was formerly called {_listed(genes.previous[at])}.")
    return " ".join(said)


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
