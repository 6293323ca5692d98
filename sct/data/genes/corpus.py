"""Read or make the gene corpus: a text description of each gene, from a file or from the shipped gene table.

The ZerOmics paper (appendices A.2 and A.3) uses the GeneCards summaries of the genes in the HUGO Gene Nomenclature, and
leaves out genes without a summary. The license of GeneCards does not allow this package to ship the summaries, so users
supply their own file. `GeneCorpus.built_in` describes each gene with text from the shipped table, in the style of the
first sentence in the paper's Table 6.
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
    "other": "a gene",  # this locus group carries no information
}
_PLACES = {
    "mitochondria": "in the mitochondrial genome",
    "14 unplaced": "on an unplaced part of chromosome 14",
}


@dataclass(frozen=True)
class GeneCorpus:
    """Hold one text description for each gene.

    Attributes
    ----------
    keys
        Ensembl ids without version, as in `GeneVocabulary.keys`.
    texts
        Text of each gene.
    name
        Name of the corpus, such as its file name.
    left_out
        Names in the file that are unknown or ambiguous in the gene table. A text without a gene name is listed as ''.
    empty
        Number of genes for which the file has no text.
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
            raise DataError(f"{len(bare)} genes have an empty text ({some(bare)}): remove these genes.")

    def __len__(self) -> int:
        return len(self.keys)

    def __repr__(self) -> str:
        return f"GeneCorpus({self.name!r}, {len(self):,} genes, hash {self.hash[:12]})"

    @cached_property
    def hash(self) -> str:
        """Return a hash (sha256, hexadecimal) of the gene keys and texts in their order."""
        return hashlib.sha256(json.dumps([self.keys, self.texts]).encode()).hexdigest()

    @cached_property
    def text_of(self) -> dict[str, str]:
        """Return a dict from each gene key to the text of the gene."""
        return dict(zip(self.keys, self.texts, strict=True))

    def summary(self) -> str:
        """Return a sentence that says how many genes have a text and how many genes were left out."""
        parts = [f"{len(self):,} genes of {self.name} have a text"]
        if self.left_out:
            shown = some(name or "no name" for name in self.left_out)
            parts.append(f"{len(self.left_out):,} unknown or ambiguous gene names were left out ({shown})")
        if self.empty:
            parts.append(f"{self.empty:,} genes without text were left out")
        return "; ".join(parts)

    @classmethod
    def load(cls, path: str | os.PathLike[str], genes: GeneVocabulary | None = None) -> GeneCorpus:
        """Read a corpus from a file.

        Gene names are resolved as in `GeneVocabulary.align`: Ensembl ids with or without version, approved symbols, and
        unambiguous aliases and previous symbols. Genes whose name cannot be resolved and genes without a text are left
        out and counted. The genes of the corpus are in the order of the gene table, whatever the order of the file.

        Parameters
        ----------
        path
            A .tsv or .csv file with a header, or a .json file; each may be compressed (.gz). A table has a gene column
            (`ensembl_id`, `symbol` or `gene`) and a text column (`text` or `summary`). If a table has several gene
            columns, the first non-empty one names the gene. A JSON file has the form {gene: text}, or is a list of
            objects that have the columns of a table as fields.
        genes
            Gene table for looking up names. Default: the shipped human genes.

        Raises
        ------
        DataError
            The file is missing, is damaged, or lacks a gene column or text column. A gene has two texts, or less than
            5% of the genes are known.
        """
        path = Path(path).expanduser()
        genes = GeneVocabulary.human() if genes is None else genes
        rows = _json_rows(path) if suffix_of(path) == ".json" else _table_rows(path)
        if not rows:
            raise DataError(f"{path} has no genes: give at least one gene with its text.")
        given = [(name.strip(), text.strip()) for name, text in rows if text.strip()]
        named = [(name, text) for name, text in given if name]
        if not named:
            raise DataError(
                f"no gene in {path} has both a name and a text: give at least one gene with both."
            )
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
        """Return a corpus made from the shipped human gene table.

        Each text gives the type, the location and the names of a gene.

        Genes outside the HUGO Gene Nomenclature (HGNC) have no text, as in the paper (appendix A.2).
        """
        human = GeneVocabulary.human()
        # The locus group comes from HGNC, so a gene without one is not in the nomenclature.
        known = [at for at, group in enumerate(human.locus_groups) if group]
        return cls(
            tuple(human.keys[at] for at in known), tuple(_described(human, at) for at in known), human.name
        )

    def texts_of(self, vocabulary: GeneVocabulary) -> list[str | None]:
        """Return the text of each gene of a vocabulary, or None for genes without a text."""
        return [self.text_of.get(key) for key in vocabulary.keys]

    def restricted(self, vocabulary: GeneVocabulary) -> GeneVocabulary:
        """Return a vocabulary with only those genes of `vocabulary` that have a text, in the same order.

        This is the "gene list mapping" of the ZerOmics paper (appendix A.3).

        Raises
        ------
        DataError
            No gene of the vocabulary has a text.
        """
        described = [gene for gene in vocabulary.ensembl_ids if gene in self.text_of]
        if not described:
            raise DataError(
                f"none of the {len(vocabulary):,} genes of {vocabulary.name} has a text in the corpus {self.name}: "
                "give a corpus for the same organism."
            )
        return vocabulary if len(described) == len(vocabulary) else vocabulary.subset(described)


def find_genes(
    names: Sequence[str], genes: GeneVocabulary, where: str, what: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Look up the genes of a file that has one entry per gene.

    Parameters
    ----------
    names
        n non-empty Ensembl ids or symbols.
    genes
        Gene table for looking up names.
    where, what
        The file and the kind of its entries (such as "text"), for messages.

    Returns
    -------
    Two values: the position of each name in the gene table, int64 (n,), with -1 for unknown or ambiguous names; and a
    list of the unknown or ambiguous names.

    Raises
    ------
    DataError
        Two names mean the same gene, or less than 5% of the names are known.
    """
    with warnings.catch_warnings():
        # A low match rate is normal here; the caller reports the names that were left out.
        warnings.simplefilter("ignore", UserWarning)
        try:
            found = genes.align(names, duplicates="sum")
        except DataError:
            raise DataError(
                f"almost none of the {len(names):,} names in {where} ({some(names)}) is a gene of the vocabulary "
                f"{genes.name}: give symbols or Ensembl ids of the organism of this vocabulary."
            ) from None
    if found.duplicates:
        shown = some(f"{gene} as {' and '.join(given)}" for gene, given in found.duplicates.items())
        raise DataError(
            f"{len(found.duplicates):,} genes have more than one {what} in {where} ({shown}): keep one for each gene."
        )
    return found.columns, tuple(names[at] for at in np.flatnonzero(found.columns < 0).tolist())


def suffix_of(path: Path) -> str:
    """Return the last suffix of a file name in lower case, ignoring ".gz"."""
    name = path.name.lower().removesuffix(".gz")
    return os.path.splitext(name)[1]


def read_text(path: Path) -> str:
    """Read a UTF-8 text file, and decompress it if its name ends with .gz.

    Raises
    ------
    DataError
        The file is missing, damaged, or not UTF-8 text.
    """
    try:
        content = path.read_bytes()
        if path.name.lower().endswith(".gz"):
            content = gzip.decompress(content)
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path} line {line}: the text is not UTF-8: save the file as UTF-8.") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"{path} cannot be read ({reason}): check that the path is right and that the file is complete."
        ) from None


def _columns(header: Iterable[str], where: str) -> tuple[list[str], str]:
    """Return the names of the gene columns and of the text column, in the spelling of the file."""
    folded = [(name.strip().casefold(), name) for name in header]
    spelled, times = dict(folded), Counter(name for name, _ in folded)
    naming = [spelled[name] for name in GENE_COLUMNS if name in spelled]
    telling = [spelled[name] for name in TEXT_COLUMNS if name in spelled]
    for found, wanted in ((naming, GENE_COLUMNS), (telling, TEXT_COLUMNS)):
        twice = next((name for name in wanted if times[name] > 1), None)
        if twice is not None:
            raise DataError(f"{where} has the column {twice} more than once: rename or remove all but one.")
        if not found:
            have = ", ".join(spelled.values()) or "nothing"
            raise DataError(
                f"{where} has the columns {have}, but needs a column named {' or '.join(wanted)}: give one of the "
                "columns this name."
            )
    return naming, telling[0]


def _table_rows(path: Path) -> list[tuple[str, str]]:
    """Read the gene names and texts of a table with a header."""
    delimiter = _DELIMITERS.get(suffix_of(path))
    if delimiter is None:
        raise DataError(f"{path} must be a .tsv, .csv or .json file: convert it to one of these formats.")
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
                    f"{path} line {reader.line_num}: the line has {len(row)} fields, but the header has "
                    f"{len(header)}: correct this line."
                )
            fields = dict(zip(header, row, strict=True))
            rows.append((_first(fields, naming), fields[telling]))
    except csv.Error as error:
        raise DataError(
            f"{path} line {reader.line_num}: the line is not valid ({error}): correct this line."
        ) from None
    if header is None:
        raise DataError(f"{path} is empty: give a table with a header.")
    return rows


def _json_rows(path: Path) -> list[tuple[str, str]]:
    """Read the gene names and texts of a JSON file."""
    try:
        # Read objects as lists of pairs to find repeated genes; a dict would keep only the last one.
        content = json.loads(read_text(path), object_pairs_hook=_Pairs)
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is not valid JSON ({error}): correct the file at this position.") from None
    pairs: list[tuple[Any, Any]] = []
    if isinstance(content, _Pairs):
        pairs = list(content)
    elif isinstance(content, list) and all(isinstance(item, _Pairs) for item in content):
        for number, item in enumerate(content, start=1):
            fields = dict(item)
            naming, telling = _columns(fields, f"{path} entry {number}")
            pairs.append((_first(fields, naming), fields[telling]))
    else:
        raise DataError(
            f"{path} must contain a JSON object {{gene: text}}, or a list of JSON objects with a name and a text "
            "each: rewrite the file in one of these forms."
        )
    for name, text in pairs:
        if not isinstance(name, str) or not isinstance(text, str | None):
            raise DataError(
                f"{path} has the text {text!r} for the gene {name!r}, but both must be strings: correct this entry."
            )
    return [(name, text or "") for name, text in pairs]


class _Pairs(list[tuple[str, Any]]):
    """Store a JSON object as a list of (key, value) pairs, so that repeated keys are not lost."""


def _first(fields: dict[str, Any], names: Sequence[str]) -> Any:
    """Return the value of the first field in `names` that is not empty, or '' if all are empty."""
    return next((fields[name] for name in names if fields[name] not in ("", None)), "")


def _described(genes: GeneVocabulary, at: int) -> str:
    """Return the text of a gene, made from its entry in the gene table."""
    group, place = genes.locus_groups[at], genes.locations[at]
    name = f" ({genes.names[at]})" if genes.names[at] else ""
    parts = [f"{genes.symbols[at]}{name} is {_KINDS.get(group, f'a gene of the group {group}')}."]
    if place:
        parts.append(f"It lies {_PLACES.get(place, f'on {place}')}.")
    if genes.aliases[at]:
        parts.append(f"It is also called {_listed(genes.aliases[at])}.")
    if genes.previous[at]:
        parts.append(f"It was formerly called {_listed(genes.previous[at])}.")
    return " ".join(parts)


def _listed(names: Sequence[str]) -> str:
    """Join names as in "A, B and C"."""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
