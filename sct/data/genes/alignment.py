"""Match the genes of an input to a gene vocabulary, and report the result."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
from scipy import sparse

from sct import messages
from sct.checks import check_choice, check_not_empty
from sct.errors import DataError

WARN_BELOW = 0.5  # fraction of the genes that could match
REFUSE_BELOW = 0.05
# Ensembl ids are preferred over symbols even if they match up to this fraction fewer genes, because ids are
# unambiguous.
ID_PREFERENCE = 0.02

ENSEMBL = re.compile(r"(ENS[A-Z]*G\d{11})(?:\.\d+)?(_PAR_Y)?")
_HUMAN_ID = re.compile(r"ENSG\d{11}")
_OTHER_SPECIES = re.compile(r"ENS(?!G\d)[A-Z]+\d{11}(?:\.\d+)?")
_MOUSE = re.compile(r"ENSMUSG\d{11}(?:\.\d+)?|[A-Z][a-z]+[a-z0-9-]*")
_REGION = re.compile(r"(?:chr)?[\w.]+[:_-]\d+[_-]\d+")
_BY_TABLE = (
    "map them to human orthologs with a table (sct.pp.to_orthologs(adata, TABLE) in Python, --orthologs=TABLE for "
    "sct ingest)"
)

# How the name of an input gene was matched.
_UNKNOWN, _ID, _SYMBOL, _ALIAS, _PAR_Y, _AMBIGUOUS = range(6)


class Vocabulary(Protocol):
    """Define the methods that this module needs from a gene vocabulary; see `vocabulary.GeneVocabulary`."""

    def __len__(self) -> int:
        """Return the number of genes (G)."""
        ...

    @property
    def name(self) -> str:
        """Return the name of the vocabulary, for messages."""
        ...

    @property
    def keys(self) -> tuple[str, ...]:
        """Return a unique key of each gene, which is its Ensembl id, or its symbol if it has no id."""
        ...

    @property
    def symbols(self) -> tuple[str, ...]:
        """Return the approved symbol of each gene."""
        ...

    @property
    def position_of_id(self) -> Mapping[str, int]:
        """Return a dict from each Ensembl id to the position of its gene in the vocabulary."""
        ...

    @property
    def owners_of_symbol(self) -> Mapping[str, tuple[int, ...]]:
        """Return a dict from each approved symbol to the vocabulary positions of the genes with this symbol."""
        ...

    @property
    def owners_of_alias(self) -> Mapping[str, tuple[int, ...]]:
        """Return a dict from each alias or previous symbol to the vocabulary positions of the genes with this name."""
        ...

    @classmethod
    def human(cls) -> Self:
        """Return the vocabulary of human protein-coding genes, which helps to explain why few genes match."""
        ...


@dataclass(frozen=True)
class GeneAlignment:
    """Map the columns of an input to the genes of a vocabulary, and report names that did not match.

    Attributes
    ----------
    columns
        Vocabulary position of each input column, int64 (n_var,); -1 for columns that are not used.
    vocabulary_size
        Number of genes in the vocabulary, G.
    source
        Where the gene names were found, e.g. ``column "ensembl_id" (Ensembl ids)`` or ``index (symbols)``.
    matched
        Number of vocabulary genes that the input has.
    by_alias
        Dict from each input name that is an alias or previous symbol to the gene that it was matched to.
    ambiguous
        Dict from each ambiguous input name to its candidate genes. A name is ambiguous if it belongs to several genes,
        or if it is an alias of a gene that another column names directly. Columns with ambiguous names are not used.
    missing
        Vocabulary genes that the input lacks, each as its Ensembl id, or as its symbol if it has no id.
    unknown
        Input names that are not in the vocabulary. A column without a name is listed as ''.
    duplicates
        Dict from each gene with several columns to the input names of these columns. This includes the ``_PAR_Y`` copy
        of a gene whose X copy is present. The ``_PAR_Y`` copy is used only if duplicates are summed.
    warning
        Warning about a suspicious result, or ''.
    """

    columns: np.ndarray
    vocabulary_size: int
    source: str
    matched: int
    by_alias: dict[str, str]
    ambiguous: dict[str, tuple[str, ...]]
    missing: tuple[str, ...]
    unknown: tuple[str, ...]
    duplicates: dict[str, tuple[str, ...]]
    warning: str = ""

    def __repr__(self) -> str:
        return f"GeneAlignment({self.matched:,} genes matched by {self.source})"

    def summary(self) -> str:
        """Return the report as text, one finding per line."""
        lines = [
            f"{self.matched:,} of {self.vocabulary_size:,} vocabulary genes found among "
            f"{len(self.columns):,} input genes, by {self.source}"
        ]
        if self.by_alias:
            pairs = some(f"{old} = {new}" for old, new in self.by_alias.items())
            lines.append(f"{len(self.by_alias):,} of them by alias or previous symbol ({pairs})")
        for names, what in (
            (self.ambiguous, "ambiguous names, not used"),
            (self.duplicates, "genes in several columns"),
            (self.unknown, "input genes outside the vocabulary"),
            (self.missing, "vocabulary genes not measured"),
        ):
            if names:
                lines.append(f"{len(names):,} {what} ({some(name or 'no name' for name in names)})")
        if self.warning:
            lines.append(f"warning: {self.warning}")
        return "\n".join(lines)

    def project(self, matrix: Any) -> sparse.csr_matrix:
        """Reorder the columns of a count matrix, so that column i holds gene i of the vocabulary.

        Parameters
        ----------
        matrix
            Sparse or dense array (N, n_var) in memory, with the columns that were aligned.

        Returns
        -------
        CSR (N, G) in the dtype of `matrix`, with sorted indices and without stored zeros. Vocabulary genes that the
        input lacks have zero counts. If several columns hold the same gene (only with `duplicates="sum"`), these
        columns are summed, and integers become int64.

        Raises
        ------
        DataError
            The number of columns of the matrix differs from the number of columns that were aligned.
        """
        if matrix.ndim != 2 or matrix.shape[1] != len(self.columns):
            raise DataError(
                f"the matrix has shape {tuple(matrix.shape)}, but {len(self.columns)} genes were aligned: pass the "
                "matrix whose genes were aligned."
            )
        rows = sparse.csr_matrix(matrix)
        n_cells, size = rows.shape[0], self.vocabulary_size
        used = self.columns >= 0
        dtype = rows.dtype
        if np.count_nonzero(used) > self.matched and np.issubdtype(dtype, np.integer):
            dtype = np.dtype(np.int64)
        # Unused columns become one extra last column. Converting to CSC and back sorts the columns of every cell, six
        # times faster than `sort_indices`.
        column = np.where(used, self.columns, size).astype(rows.indices.dtype)
        named = (rows.data.astype(dtype, copy=False), np.take(column, rows.indices), rows.indptr)
        by_gene = sparse.csr_matrix(named, shape=(n_cells, size + 1)).tocsc()
        end = by_gene.indptr[size]
        known = (by_gene.data[:end], by_gene.indices[:end], by_gene.indptr[: size + 1])
        projected = sparse.csc_matrix(known, shape=(n_cells, size)).tocsr()
        projected.sum_duplicates()
        if np.count_nonzero(projected.data) < projected.nnz:
            projected.eliminate_zeros()
        return projected


def align(
    vocabulary: Vocabulary, var: Any, column: str | None, duplicates: str, report_name: str
) -> GeneAlignment:
    """Match the genes of an input to a vocabulary; see `GeneVocabulary.align`."""
    check_choice("duplicates", duplicates, ("error", "sum"), error=DataError)
    prefix = f"{report_name}: " if report_name else ""
    tried = []
    for label, names in name_places(var, column, prefix):
        positions, kinds = look_up(vocabulary, names)
        by_id = int(np.isin(kinds, (_ID, _PAR_Y)).sum())
        label += " (Ensembl ids)" if 2 * by_id > (positions >= 0).sum() else " (symbols)"
        tried.append((len(np.unique(positions[positions >= 0])), by_id, label, names, positions, kinds))
    enough = (1 - ID_PREFERENCE) * max(found for found, *_ in tried)
    _, _, source, names, positions, kinds = max(
        (one for one in tried if one[0] >= enough), key=lambda one: (one[1], one[0])
    )
    return _report(vocabulary, names, positions, kinds, source, duplicates == "sum", prefix)


def find(vocabulary: Vocabulary, names: Iterable[str]) -> np.ndarray:
    """Return the positions of named genes; see `GeneVocabulary.find`."""
    listed = [name.strip() for name in gene_names(names, "the list of genes")]
    check_not_empty("the list of genes", listed, error=DataError, advice="name at least one gene")
    positions, kinds = look_up(vocabulary, listed)
    unknown = [name for name, kind in zip(listed, kinds, strict=True) if kind == _UNKNOWN]
    if unknown:
        near = difflib.get_close_matches(
            unknown[0].upper(), [symbol for symbol in vocabulary.symbols if symbol], 3
        )
        raise DataError(
            f"{some(unknown)} not found among the {len(vocabulary):,} genes of the vocabulary {vocabulary.name}: give "
            "Ensembl ids or symbols of these genes"
            + (f" (did you mean {', '.join(near)}?)." if near else ".")
        )
    for name, kind in zip(listed, kinds, strict=True):
        if kind == _AMBIGUOUS:
            owners = vocabulary.owners_of_symbol.get(name) or vocabulary.owners_of_alias[name]
            raise DataError(
                f"the name {name} is ambiguous (it means {' or '.join(vocabulary.keys[o] for o in owners)}): "
                "give the Ensembl id."
            )
    named: dict[int, str] = {}
    for name, position in zip(listed, positions.tolist(), strict=True):
        if position in named:
            raise DataError(f"{named[position]} and {name} are names of the same gene: remove one of them.")
        named[position] = name
    return positions


def look_up(vocabulary: Vocabulary, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Look up each of n names separately.

    Returns
    -------
    Two arrays: the vocabulary position of each name, int64 (n,), with -1 for a name that is unknown or ambiguous; and
    how each name was matched, int8 (n,).
    """
    positions = np.full(len(names), -1, np.int64)
    kinds = np.full(len(names), _UNKNOWN, np.int8)
    for at, name in enumerate(names):
        position = vocabulary.position_of_id.get(name)
        kind = _ID
        if position is None and (match := ENSEMBL.fullmatch(name)) is not None:
            position = vocabulary.position_of_id.get(match[1])
            kind = _PAR_Y if match[2] else _ID
        if position is not None:
            positions[at], kinds[at] = position, kind
            continue
        owners, kind = vocabulary.owners_of_symbol.get(name, ()), _SYMBOL
        if not owners:
            owners, kind = vocabulary.owners_of_alias.get(name, ()), _ALIAS
        if len(owners) == 1:
            positions[at], kinds[at] = owners[0], kind
        elif owners:
            kinds[at] = _AMBIGUOUS
    return positions, kinds


def _report(
    vocabulary: Vocabulary,
    names: Sequence[str],
    positions: np.ndarray,
    kinds: np.ndarray,
    source: str,
    add: bool,
    prefix: str,
) -> GeneAlignment:
    """Resolve conflicts between gene names of an input that mean the same gene, and return the alignment."""
    keys = vocabulary.keys
    columns = positions.copy()
    ambiguous = {}
    for at in np.flatnonzero(kinds == _AMBIGUOUS).tolist():
        name = names[at]
        owners = vocabulary.owners_of_symbol.get(name) or vocabulary.owners_of_alias[name]
        ambiguous[name] = tuple(keys[owner] for owner in owners)
    columns_of: dict[int, list[int]] = defaultdict(list)
    for at in np.flatnonzero(positions >= 0).tolist():
        columns_of[int(positions[at])].append(at)
    duplicates: dict[str, tuple[str, ...]] = {}
    refused = []
    for position, group in columns_of.items():
        if len(group) == 1:
            continue
        gene = keys[position]
        aliases = [at for at in group if kinds[at] == _ALIAS]
        copies = [at for at in group if kinds[at] == _PAR_Y]
        direct = [at for at in group if kinds[at] in (_ID, _SYMBOL)]
        columns[aliases] = -1
        ambiguous.update((names[at], (gene,)) for at in aliases)
        if len(direct) + len(copies) < 2:
            continue
        duplicates[gene] = tuple(names[at] for at in group if kinds[at] != _ALIAS)
        # Some annotations list the Y copy of a pseudoautosomal gene separately. This is not an error in the input.
        if direct and not add:
            columns[copies] = -1
        if len(direct or copies) > 1:
            refused.append(gene)
    if refused and not add:
        shown = some(f"{gene} as {' and '.join(duplicates[gene])}" for gene in refused)
        raise DataError(
            f"{prefix}{len(refused):,} genes occur in more than one column, according to the names in {source} "
            f'({shown}): sum their counts with duplicates="sum", or remove the extra columns.'
        )
    present = np.zeros(len(vocabulary), bool)
    present[columns[columns >= 0]] = True
    matched = int(present.sum())
    by_alias = np.flatnonzero((kinds == _ALIAS) & (columns >= 0)).tolist()
    return GeneAlignment(
        columns=columns,
        vocabulary_size=len(vocabulary),
        source=source,
        matched=matched,
        by_alias={names[at]: keys[columns[at]] for at in by_alias},
        ambiguous=ambiguous,
        missing=tuple(keys[at] for at in np.flatnonzero(~present).tolist()),
        unknown=tuple(names[at] for at in np.flatnonzero(kinds == _UNKNOWN).tolist()),
        duplicates=duplicates,
        warning=_judge(vocabulary, names, matched, source, prefix),
    )


def _judge(vocabulary: Vocabulary, names: Sequence[str], matched: int, source: str, prefix: str) -> str:
    """Return a warning if few genes matched, otherwise ''; raise `DataError` if too few genes matched."""
    named = [name for name in names if name]
    # Most genes of a complete annotation are not protein-coding, so the input may have far more genes than can match.
    possible = min(len(named), len(vocabulary))
    if possible and matched >= WARN_BELOW * possible:
        return ""
    message = (
        f"{prefix}only {matched:,} of {len(named):,} gene names, taken from {source}, were found in the vocabulary "
        f"{vocabulary.name} ({len(vocabulary):,} genes): {_likely_cause(vocabulary, named)}"
    )
    if not possible or matched < REFUSE_BELOW * possible:
        raise DataError(message)
    messages.warn(message)
    return message


def check_shared(shared: int, possible: int, what: str, missing: str = "treated as zero counts") -> None:
    """Check that two data sets share enough genes, with the thresholds of `GeneVocabulary.align`.

    Parameters
    ----------
    shared
        Number of shared genes.
    possible
        Number of genes that would be shared in the best case, for example the size of the smaller set.
    what
        The two data sets as text for messages, e.g. "adata and the reference".
    missing
        What happens to genes that are not shared, as text for messages.

    Raises
    ------
    DataError
        Less than 5% of the possible genes are shared.

    Warns
    -----
    UserWarning
        Less than half of the possible genes are shared.
    """
    if possible and shared >= WARN_BELOW * possible:
        return
    message = (
        f"only {shared:,} of {possible:,} genes are shared by {what}, and missing genes are {missing}: "
        "use data with the same genes."
    )
    if shared < max(1, REFUSE_BELOW * possible):
        raise DataError(message)
    messages.warn(message)


def _likely_cause(vocabulary: Vocabulary, names: Sequence[str]) -> str:
    """Return a sentence that says why few names matched and what the user can do."""

    def most(pattern: re.Pattern[str], among: Sequence[str]) -> bool:
        return 2 * sum(pattern.fullmatch(name) is not None for name in among) > len(among)

    if most(_HUMAN_ID, vocabulary.keys):
        if most(_MOUSE, names):
            return (
                f"the names look like mouse genes ({some(names)}), so {_BY_TABLE}, or use a vocabulary of that "
                "species."
            )
        if most(_OTHER_SPECIES, names):
            return (
                f"the names are Ensembl ids of another species or of transcripts ({some(names)}), so give human gene "
                f"ids, or {_BY_TABLE}, or use a vocabulary of that species."
            )
        if most(_REGION, names):
            return (
                f"the names are genomic regions ({some(names)}), so compute a gene activity matrix first (the "
                "fragments of each gene, summed)."
            )
    if most(re.compile(r"\d+"), names):
        return "the names are numbers, so give the column of var with Ensembl ids or symbols (column= or gene_column=)."
    human = most(_HUMAN_ID, vocabulary.keys) and type(vocabulary).human()
    if human and 2 * sum(n in human.position_of_id or n in human.owners_of_symbol for n in names) > len(
        names
    ):
        return (
            f"these are human genes, but few of them are among the {len(vocabulary):,} genes of this vocabulary, so "
            "give all measured genes instead of a selection such as highly variable genes."
        )
    return (
        f"the names ({some(names)}) may be of another species, or the gene names are in another column, so give the "
        "column of var with Ensembl ids or symbols (column= or gene_column=)."
    )


def name_places(var: Any, column: str | None, prefix: str) -> list[tuple[str, list[str]]]:
    """Return the index and each string column of `var` as pairs (label, names), because each could hold the gene names.

    Parameters
    ----------
    var
        `AnnData.var`, or the names themselves.
    column
        Use only this column ("index" for the index).
    prefix
        Text at the beginning of each error message.

    Raises
    ------
    DataError
        There are no genes, the given column does not exist, or a name is not a string.
    """
    import pandas as pd  # a machine that only trains needs the vocabulary, but not pandas

    if not isinstance(var, pd.DataFrame):
        if column is not None:
            raise DataError(
                f"{prefix}column={column!r} was given with a list of gene names, but works only with a table: pass var "
                "as a table, or leave out `column`."
            )
        names = gene_names(var, f"{prefix}the list of gene names")
        if not names:
            raise DataError(f"{prefix}the input has no genes: give at least one.")
        return [("index" if isinstance(var, pd.Index) else "names", names)]
    if not len(var):
        raise DataError(f"{prefix}the input has no genes: give at least one.")

    def of_column(name: str) -> tuple[str, list[str]]:
        label = f'column "{name}"'
        return label, gene_names(var[name].astype(object), f"{prefix}{label} of var", missing_allowed=True)

    if column is not None and column in var.columns:
        return [of_column(column)]
    if column is not None and column not in ("index", var.index.name):
        have = ", ".join(repr(name) for name in var.columns) or "only its index"
        raise DataError(
            f"{prefix}var has no column {column!r}, but it has {have}: set column= or gene_column= to one of these or "
            "to 'index'."
        )
    sources: list[tuple[str, list[str]]] = []
    refused: DataError | None = None
    try:
        sources.append(("index", gene_names(var.index, f"{prefix}the index of var")))
    except DataError as error:
        refused = error
    if column is None:
        kinds = {
            name: pd.api.types.infer_dtype(var[name].astype(object), skipna=True) for name in var.columns
        }
        sources += [of_column(name) for name, kind in kinds.items() if kind == "string"]
    if not sources:
        assert refused is not None
        raise refused
    return sources


def gene_names(values: Any, what: str, *, missing_allowed: bool = False) -> list[str]:
    """Return gene names as a list of strings.

    Parameters
    ----------
    values
        The names.
    what
        Description of the names for messages, such as "gene names".
    missing_allowed
        Return a missing name as '' instead of raising an error.

    Raises
    ------
    DataError
        The names are not a list, or a name is missing or not a string.
    """
    if isinstance(values, str):
        raise DataError(f"{what} is the single string {values!r}: give a list of names.")
    try:
        found = list(values)
    except TypeError:
        found = None
    if found is None:
        raise DataError(f"{what} is a {type(values).__name__}: give var, its index or a list of names.")
    for at, value in enumerate(found):
        if isinstance(value, str):
            continue
        import pandas as pd

        if not pd.api.types.is_scalar(value) or not pd.isna(value):
            raise DataError(
                f"{what} has {value!r} ({type(value).__name__}) at position {at}, but gene names must be strings: "
                "convert them to strings, or give another column."
            )
        if not missing_allowed:
            raise DataError(
                f"{what} has a missing name ({value}) at position {at}: name this gene, or remove it."
            )
        found[at] = ""
    return found


def some(names: Iterable[str], n: int = 3) -> str:
    """Return a text with the first `n` names and the number of the remaining names."""
    listed = list(names)
    more = f", and {len(listed) - n:,} more" if len(listed) > n else ""
    return ", ".join(listed[:n]) + more


def without_version(name: str) -> str:
    """Return an Ensembl id without its version. Ids of ``_PAR_Y`` copies and all other names are kept."""
    match = ENSEMBL.fullmatch(name)
    return match[1] if match is not None and not match[2] else name
