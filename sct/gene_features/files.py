"""Read files of gene features in common formats."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from sct.data.genes.corpus import GENE_COLUMNS, read_text, suffix_of
from sct.errors import DataError, first_line

_NAMES, _TABLES = ("keys", "genes", "symbols"), ("table", "embeddings")
DELIMITERS = {".csv": ",", ".tsv": "\t", ".txt": r"\s+", ".vec": r"\s+", ".w2v": r"\s+"}
TABLES = (".npz", *DELIMITERS)  # file extensions that can be read


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an .npz file. The checksums of the zip format detect damaged arrays."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise DataError(f"the file {path} does not exist: check the path.") from None
    except Exception as error:  # numpy and zipfile raise many types of errors for a damaged file
        to_do = "check that the file is complete and has the format .npz"
        if "allow_pickle" in str(error):
            to_do = "save the file again, with the gene names as a NumPy string array instead of dtype object"
        raise DataError(f"{path} cannot be read ({first_line(error)}): {to_do}.") from None


def named_rows(path: Path, arrays: Mapping[str, np.ndarray]) -> tuple[list[str], np.ndarray]:
    """Return the gene names and the feature table of an .npz file that another tool wrote."""
    chosen = []
    for wanted in (_NAMES, _TABLES):
        name = next((name for name in wanted if name in arrays), None)
        if name is None:
            have = ", ".join(arrays) or "none"
            raise DataError(
                f"{path} has the arrays {have}, but needs an array named {' or '.join(wanted)}: rename the array that "
                f"contains the {'gene names' if wanted == _NAMES else 'features'}."
            )
        chosen.append(arrays[name])
    names, table = chosen
    if names.dtype.kind != "U" or names.ndim != 1 or table.ndim != 2 or len(names) != len(table):
        raise DataError(
            f"{path} has names of shape {names.shape} ({names.dtype}) and a table of shape {table.shape}, but needs "
            "strings of shape (genes,) and numbers of shape (genes, features): save the file again with arrays of "
            "these shapes."
        )
    return [name.strip() for name in names.tolist()], table


def text_rows(path: Path) -> tuple[list[str], np.ndarray]:
    """Return the gene names and the feature table of a text file."""
    delimiter, text = DELIMITERS[suffix_of(path)], read_text(path)
    first, _, rest = text.partition("\n")
    promised = re.fullmatch(r"(\d+)[ \t]+(\d+)\s*", first) if delimiter == r"\s+" else None
    if promised is not None or (delimiter != r"\s+" and _is_header(first.split(delimiter))):
        text = rest
    try:
        frame = pd.read_csv(
            io.StringIO(text), sep=delimiter, header=None, dtype={0: str}, keep_default_na=False,
            low_memory=False, quoting=3 if delimiter == r"\s+" else 0,
        )  # fmt: skip
    except (pd.errors.ParserError, pd.errors.EmptyDataError, ValueError) as error:
        raise DataError(
            f"{path} is not a table with a name and numbers in each line ({error}): write one line per gene, with the "
            "gene name and the same number of values."
        ) from None
    names, numbers = frame[0].str.strip().tolist(), frame.iloc[:, 1:]
    for column in numbers.columns[[kind.kind not in "fiu" for kind in numbers.dtypes]]:
        wrong = pd.to_numeric(numbers[column], errors="coerce").isna()
        at = int(np.flatnonzero(wrong)[0]) if wrong.any() else 0
        raise DataError(
            f"{path} has {numbers[column].iloc[at]!r} as feature {column} of {names[at]!r}, but must have a number: "
            "correct this value."
        )
    if promised is not None and numbers.shape != (expected := tuple(map(int, promised.groups()))):
        raise DataError(
            f"{path} has {numbers.shape[0]} rows of {numbers.shape[1]} numbers, but its first line announces "
            f"{expected[0]} rows of {expected[1]}: the file is incomplete, so download it again."
        )
    return names, numbers.to_numpy(np.float64)


def _is_header(fields: Sequence[str]) -> bool:
    """Return whether the first line of a table is a header. A header that pandas wrote can consist of numbers."""

    def is_number(field: str) -> bool:
        try:
            return float(field) is not None
        except ValueError:
            return False

    first, *others = [field.strip(' "\r') for field in fields]
    return first.casefold() in ("", *GENE_COLUMNS) or not any(map(is_number, others))
