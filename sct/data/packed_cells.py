"""Pack the cells of a store into one small file, for training on a machine without the libraries that read stores.

The file contains raw counts. `PackedCells.tokens` computes tokens from them. Reading needs only NumPy and SciPy. A cell
with 2,000 expressed genes takes about 3 KB.
"""

from __future__ import annotations

import dataclasses
import io
import os
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from sct.atomic import atomic_write
from sct.checks import check_at_least, check_positive
from sct.data.genes.vocabulary import GeneVocabulary
from sct.data.tokenize import NOISE_FRACTION, bin_counts
from sct.errors import DataError, StoreError

if TYPE_CHECKING:
    from sct.data.store import Store, Study

_VERSION = 1
_LARGEST = np.iinfo(np.uint16).max
_FIRST_TRY = 200  # cells per study from which the size of a cell in the file is estimated
_MARGIN = 0.97  # share of the allowed size to aim for, because the size of cells varies
_FULL, _TRIES = 0.9, 6  # share of the allowed size at which the search stops, and maximum number of attempts


@dataclasses.dataclass(frozen=True)
class PackedCells:
    """Cells of several studies.

    Attributes
    ----------
    counts
        Raw counts, uint16 CSR (N, G).
    study
        Index of the study of each cell, int32 (N,).
    names
        Names of the S studies.
    held_out
        Whether a study is for validation, bool (S,).
    measured, noisy
        Whether a study measured a gene, and whether a gene is treated as unexpressed because it is noise, bool (S, G).
    vocabulary
        Genes of the columns.
    """

    counts: sparse.csr_matrix
    study: np.ndarray
    names: tuple[str, ...]
    held_out: np.ndarray
    measured: np.ndarray
    noisy: np.ndarray
    vocabulary: GeneVocabulary

    def __len__(self) -> int:
        return int(self.counts.shape[0])

    def tokens(self, num_bins: int, num_positions: int) -> np.ndarray:
        """Return the tokens of all cells, uint8 (N, num_positions); see `sct.data.tokenize.bin_counts`."""
        made = np.empty((len(self), num_positions), np.uint8)
        for study in range(len(self.names)):
            rows = np.flatnonzero(self.study == study)
            made[rows] = bin_counts(
                self.counts[rows], num_bins=num_bins, num_positions=num_positions, drop=self.noisy[study]
            ).tokens
        return made

    def rows(self, held_out: bool) -> list[np.ndarray]:
        """Return the row numbers of the cells of each training study; with `held_out`, of each validation study."""
        return [
            np.flatnonzero(self.study == study)
            for study in range(len(self.names))
            if bool(self.held_out[study]) == held_out
        ]

    def save(self, path: Path) -> None:
        """Write a compressed .npz file. An existing file is replaced only when the new file is complete."""
        _write(path, self.content())

    def content(self) -> bytes:
        """Return the content of the file that `save` writes."""
        counts = self.counts
        starts = counts.indptr[:-1][np.diff(counts.indptr) > 0]
        gaps = np.diff(counts.indices.astype(np.int64), prepend=0)
        gaps[starts] = counts.indices[starts]
        lengths = np.diff(counts.indptr)
        most = max((int(x.max(initial=0)) for x in (gaps, lengths, counts.data, self.study)), default=0)
        if most > _LARGEST:
            raise DataError(
                f"a count, a gene or a study has the number {most:,}, but a file of packed cells holds numbers up to "
                f"{_LARGEST:,}: pack fewer genes, or cells with smaller counts."
            )
        if gaps.min(initial=0) < 0:
            raise DataError(
                "the genes of a cell are not in ascending order, but packed cells need sorted genes: call "
                "counts.sort_indices() first."
            )
        arrays: dict[str, Any] = {
            "version": np.asarray(_VERSION),
            "row_lengths": lengths.astype(np.uint16),
            "study": self.study.astype(np.uint16),
            "names": np.asarray(self.names),
            "held_out": self.held_out,
            "measured": np.packbits(self.measured, axis=1),
            "noisy": np.packbits(self.noisy, axis=1),
            "genes": np.frombuffer(_text_of(self.vocabulary), np.uint8),
        }
        # The upper bytes are nearly all zero, so they compress well if they are stored separately.
        for name, values in (("gaps", gaps), ("counts", counts.data)):
            arrays[f"{name}_low"] = (values.astype(np.uint16) & 0xFF).astype(np.uint8)
            arrays[f"{name}_high"] = (values.astype(np.uint16) >> 8).astype(np.uint8)
        file = io.BytesIO()
        np.savez_compressed(file, **arrays)
        return file.getvalue()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PackedCells:
        """Read a file that `save` wrote.

        Raises
        ------
        DataError
            The file is missing or damaged, or does not contain packed cells.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            if int(arrays["version"]) != _VERSION:
                raise ValueError(f"version {arrays['version']}")
            vocabulary = _vocabulary_of(arrays["genes"].tobytes())
            genes = len(vocabulary)
            indptr = np.concatenate([[0], np.cumsum(arrays["row_lengths"], dtype=np.int64)])
            gaps, counts = (
                arrays[f"{name}_low"].astype(np.int64) | arrays[f"{name}_high"].astype(np.int64) << 8
                for name in ("gaps", "counts")
            )
            total = np.concatenate([[0], np.cumsum(gaps)])
            indices = total[1:] - np.repeat(total[indptr[:-1]], np.diff(indptr))
            matrix = sparse.csr_matrix(
                (counts.astype(np.uint16), indices.astype(np.int32), indptr), (len(indptr) - 1, genes)
            )
            measured, noisy = (
                np.unpackbits(arrays[name], axis=1, count=genes).astype(bool)
                for name in ("measured", "noisy")
            )
            names = tuple(arrays["names"].tolist())
            study, held_out = arrays["study"].astype(np.int32), arrays["held_out"]
            return cls(matrix, study, names, held_out, measured, noisy, vocabulary)
        except (
            OSError,
            LookupError,
            ValueError,
            TypeError,
            zipfile.BadZipFile,
            zlib.error,
            EOFError,
        ) as error:
            raise DataError(
                f"{path} cannot be read as packed cells ({error}): write the file again with tools/pack_cells.py."
            ) from error


def _text_of(vocabulary: GeneVocabulary) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        vocabulary.save(Path(folder, "genes.tsv"))
        return Path(folder, "genes.tsv").read_bytes()


def _vocabulary_of(text: bytes) -> GeneVocabulary:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "genes.tsv").write_bytes(text)
        return GeneVocabulary.load(Path(folder, "genes.tsv"))


def pack(store: Store, path: Path, max_bytes: int, validation_cells: int = 200) -> PackedCells:
    """Write as many cells of the training studies as fit into a file of `max_bytes`.

    Each training study contributes the same number of cells, or all its cells if it has fewer.

    Parameters
    ----------
    store
        Store with raw counts.
    path
        Output file (.npz).
    max_bytes
        Largest size of the file.
    validation_cells
        Largest number of cells of each validation study.

    Returns
    -------
    The cells in the file.

    Raises
    ------
    StoreError
        The store has no training study, or a count is larger than 65,535.
    DataError
        One cell of each training study and the cells of the validation studies do not fit into the file.
    """
    check_positive("max_bytes", max_bytes)
    check_at_least("validation_cells", validation_cells, 0)
    training = store.split("train")
    if not training:
        raise StoreError(f"{store.path} has no training study: use a store with training studies.")
    most = max(study.n_cells for study in training)

    def made(each: int) -> tuple[PackedCells, bytes]:
        packed = _some(store, each, validation_cells)
        return packed, packed.content()

    best = made(1)
    least, fits, each = len(best[1]), 1, min(_FIRST_TRY, most)
    if least > max_bytes:
        raise DataError(
            f"a file with one cell of each training study and up to {validation_cells} cells of each validation study "
            f"takes {least:,} bytes, but only {max_bytes:,} are allowed: allow a larger file, lower validation_cells, "
            "or use fewer studies."
        )
    # The size of a file is a constant, which `least` contains, plus about the same number of bytes for each cell.
    for _ in range(_TRIES):
        packed, content = made(each)
        size = len(content)
        if size <= max_bytes:
            fits, best = each, (packed, content)
            if each == most or size > _FULL * max_bytes:
                break
        growth = max(size - least, 1) / max(each - 1, 1)
        wanted = min(most, 1 + int(_MARGIN * (max_bytes - least) / growth))
        each = max(wanted, fits) if size <= max_bytes else max(min(wanted, each - 1), fits)
        if each == fits:
            break
    _write(path, best[1])
    return best[0]


def _write(path: Path, content: bytes) -> None:
    with atomic_write(path) as partial:
        partial.write_bytes(content)


def _rows(study: Study, limit: int) -> sparse.csr_matrix:
    """Return up to `limit` cells of a study.

    The cells of a study are stored in random order, so the first cells are a random sample. The cells of a spatial
    study are stored along a curve through the tissue, so cells at equal distances on this curve cover the tissue.
    """
    number = min(limit, study.n_cells)
    if not study.spatial:
        return study.read(0, number)
    return study.read_rows(np.arange(number) * study.n_cells // number)


def _some(store: Store, each: int, validation_cells: int) -> PackedCells:
    studies: Sequence[tuple[Study, int, bool]] = [
        *((study, each, False) for study in store.split("train")),
        *((study, validation_cells, True) for study in store.split("validation") if validation_cells),
    ]
    blocks = [_rows(study, limit) for study, limit, _ in studies]
    for (study, _, _), block in zip(studies, blocks, strict=True):
        study.check_counts()
        if block.nnz and block.data.max() > _LARGEST:
            raise StoreError(
                f"the study {study.name!r} has a count of {block.data.max():,.0f}, but a packed file holds counts up "
                f"to {_LARGEST:,}: use a store without this study."
            )
    counts = sparse.csr_matrix(sparse.vstack(blocks, format="csr"), dtype=np.uint16)
    counts.sort_indices()
    return PackedCells(
        counts,
        np.repeat(np.arange(len(studies), dtype=np.int32), [block.shape[0] for block in blocks]),
        tuple(study.name for study, _, _ in studies),
        np.asarray([held_out for _, _, held_out in studies]),
        np.stack([study.measured for study, _, _ in studies]),
        np.stack([study.noisy_genes(NOISE_FRACTION) for study, _, _ in studies]),
        store.vocabulary,
    )
