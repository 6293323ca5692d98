"""Read a store: a folder with one AnnData zarr group per study. All studies have the same genes in the same order.

    STORE/manifest.json        list of the studies; written last, so a store that can be opened is complete
    STORE/genes.tsv            the gene vocabulary
    STORE/studies/NAME.zarr    an AnnData group (zarr v3), also readable by `anndata.read_zarr`

TensorStore reads the rows. Consecutive rows are stored next to each other on disk, and every chunk has a checksum.
Reading a missing or damaged chunk raises an error and never returns zeros. `sct.data.ingest.build` writes this format.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from sct import messages
from sct.checks import check_choice, check_distinct
from sct.data.coordinates import SCALES, SPATIAL_KEY, Scale, read_scales, write_scales
from sct.data.genes.vocabulary import GeneVocabulary
from sct.data.tokenize import noisy_genes
from sct.errors import SctError, StoreError, first_line
from sct.hashes import SEAL, hash_file, hash_files, hash_folder, hash_json, is_changed

if TYPE_CHECKING:
    import anndata
    import pandas as pd

SCHEMA_VERSION = 1
# Schema version of stores with activities. Releases that only know version 1 would read activities as counts.
ACTIVITY_VERSION = 2
SPLITS = ("train", "validation", "test")
MANIFEST, GENES, STUDIES = "manifest.json", "genes.tsv", "studies"
# Groups of a study. anndata writes the tables, whose chunks have no checksums.
GROUPS = {"obs": "table", "var": "table", "uns": "table", "X": "arrays", "obsm": "arrays"}
# Values per compressed chunk of X. This is about 16 cells with 2,000 genes, so a bag decodes four or five chunks.
CHUNK = 32_768
_CACHE_BYTES = 64 << 20
# Valid study names, as `sct.data.ingest.input_files.sanitize` makes them. The name is also the folder name.
_STUDY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9][A-Za-z0-9_-]*)*")
_STUDY_FIELDS = ("name", "path", "n_cells", "n_genes_matched", "nnz", "total_counts", "spatial", "split")

_context: Any = None


def _shared_context() -> Any:
    """Return the TensorStore context of this process. All studies share its cache, which has a maximum size."""
    global _context
    if _context is None:
        import tensorstore as ts

        _context = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})
    return _context


def _cause(error: BaseException) -> str:
    """Return the message of a TensorStore or zarr error, without the array specification at the end of the message."""
    return first_line(error, limit=1000).split(" [")[0]


def hash_group(study: Path, name: str) -> str:
    """Return one hash of the files in a zarr group of a study, except files that contain checksums.

    Only the chunks of arrays contain checksums. The files of tables and the zarr.json files do not.
    """
    if GROUPS[name] == "table":
        return hash_folder(study / name)
    files = sorted(path.relative_to(study).as_posix() for path in (study / name).rglob("zarr.json"))
    return hash_json(hash_files(study, files))


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _rising(indices: np.ndarray, indptr: np.ndarray, n_genes: int) -> bool:
    """Return whether the column indices of each row are strictly increasing and below `n_genes`."""
    filled = np.flatnonzero(np.diff(indptr))
    if not filled.size:
        return True
    first, last = indptr[filled], indptr[filled + 1] - 1
    rising = indices[1:] > indices[:-1]
    rising[first[1:] - 1] = True
    # In increasing rows, it is enough to check the first and the last column.
    return bool(rising.all() and indices[first].min() >= 0 and indices[last].max() < n_genes)


class Study:
    """Read one study of a store: the cells of one input, in the stored order.

    Objects are cheap to create, picklable and thread-safe. Files are opened at the first read.

    Attributes
    ----------
    name, path
        Name, and folder of the AnnData group.
    split
        "train", "validation" or "test".
    n_cells, n_genes, nnz
        Number of cells (N), number of genes in the vocabulary (G), and number of stored values of X.
    spatial
        Whether the cells have coordinates. The cells of spatial studies are stored along a space-filling curve. The
        cells of other studies are stored in random order.
    record
        Entry of the study in `manifest.json`, as a dict.
    values
        "counts", or "activity" for other non-negative values.
    """

    def __init__(self, root: Path, record: Mapping[str, Any], n_genes: int):
        self.record = dict(record)
        self.name: str = record["name"]
        self.path = root / record["path"]
        self.n_cells = int(record["n_cells"])
        self.nnz = int(record["nnz"])
        self.spatial = bool(record["spatial"])
        self.split: str = record["split"]
        self.values: str = record.get("values", "counts")
        self.n_genes = n_genes
        self._open: dict[str, Any] = {}
        self._cached: dict[str, np.ndarray] = {}
        self._verified: set[str] = set()  # groups whose hashes were checked

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}, "_cached": {}, "_verified": set()}

    def __len__(self) -> int:
        return self.n_cells

    def __repr__(self) -> str:
        kind = "spatial" if self.spatial else "single-cell"
        return f"Study({self.name!r}, {self.n_cells:,} cells, {kind}, {self.split})"

    @property
    def gene_totals(self) -> np.ndarray:
        """Return the total raw count of each gene over the cells of the study, float64 (G,)."""
        totals = self._whole("var/total_counts", self.n_genes)
        if not np.isclose(totals.sum(), float(self.record["total_counts"]), rtol=1e-9, atol=0.5):
            raise self._damaged("var/total_counts", "its sum differs from the total in the manifest")
        return totals

    def noisy_genes(self, fraction: float) -> np.ndarray:
        """Return a mask of the genes that are treated as noise, bool (G,); see `sct.data.tokenize.noisy_genes`."""
        self.check_counts()
        return noisy_genes(self.gene_totals, self.n_cells, fraction)

    def check_counts(self) -> None:
        """Raise `StoreError` if the values of the study are not counts."""
        if self.values != "counts":
            raise StoreError(
                f"the study {self.name!r} of {self.path.parent.parent} has {self.values} values, but raw counts are "
                "needed here (only models of the family ZerOmics read other values): use a store without this study."
            )

    @property
    def measured(self) -> np.ndarray:
        """Return a mask of the measured genes, bool (G,). A gene was measured if the input had a column for this gene.

        The counts of genes that were not measured are unknown, not zero.
        """
        return self._whole("var/measured", self.n_genes).astype(bool, copy=False)

    @property
    def coordinates(self) -> np.ndarray | None:
        """Return the coordinates of the cells in the unit of the input, float32 (N, 2).

        Return None if the study has no coordinates.
        """
        if not self.spatial:
            return None
        return self._whole("obsm/spatial", self.n_cells).astype(np.float32, copy=False)

    def rescaled_coordinates(self) -> np.ndarray:
        """Return the coordinates (N, 2) in the units of models; see `sct.data.coordinates.Scale`."""
        return self._scale().apply(np.asarray(self.coordinates))

    def _scale(self) -> Scale:
        """Return the recorded scale of the coordinates. For an old store without a scale, compute it from the cells."""
        import zarr
        from anndata.io import read_elem

        self._verify("uns")
        try:
            group: Any = zarr.open_group(str(self.path), mode="r")
            uns = read_elem(group["uns"]) if "uns" in group else {}
            scales = read_scales(uns, SPATIAL_KEY, None)
        except Exception as error:
            raise self._damaged("uns", _cause(error)) from error
        if "" in scales:
            return scales[""]
        return Scale.of(np.asarray(self.coordinates), stray=np.zeros(self.n_cells, bool))

    def read(self, start: int, stop: int) -> sp.csr_matrix:
        """Read the rows `start` to `stop` - 1.

        Returns
        -------
        Raw counts, float32 CSR (stop - start, G), with sorted column indices and without explicit zeros.

        Raises
        ------
        IndexError
            The rows are outside the study.
        StoreError
            Files of the study are missing, truncated or corrupted.
        """
        if not 0 <= start <= stop <= self.n_cells:
            raise IndexError(
                f"the rows {start}:{stop} are not all in the study {self.name!r}, which has {self.n_cells} cells: use "
                f"a range within 0:{self.n_cells} (the end is exclusive)."
            )
        return self._read_runs([(int(start), int(stop))])

    def read_rows(self, rows: Sequence[int] | np.ndarray) -> sp.csr_matrix:
        """Read rows in any order. Rows may be repeated. Rows that are close together are read in one request.

        Returns
        -------
        Raw counts, float32 CSR (len(rows), G).

        Raises
        ------
        IndexError
            A row is outside the study.
        StoreError
            Files of the study are missing, truncated or corrupted.
        """
        rows = np.asarray(rows, dtype=np.int64).ravel()
        if rows.size == 0:
            return sp.csr_matrix((0, self.n_genes), dtype=np.float32)
        if rows[0] >= 0 and rows[-1] < self.n_cells and (np.diff(rows) == 1).all():
            return self._read_runs([(int(rows[0]), int(rows[-1]) + 1)])
        unique, inverse = np.unique(rows, return_inverse=True)
        if unique[0] < 0 or unique[-1] >= self.n_cells:
            raise IndexError(
                f"row {unique[0] if unique[0] < 0 else unique[-1]} is outside the study {self.name!r}, which has "
                f"{self.n_cells} cells: use row numbers from 0 to {self.n_cells - 1}."
            )
        # Join rows that are less than about one chunk apart, because a second read would decode the same chunk again.
        gap = max(1, CHUNK * self.n_cells // max(self.nnz, 1))
        breaks = np.flatnonzero(np.diff(unique) > gap)
        first = unique[np.concatenate([[0], breaks + 1])]
        last = unique[np.concatenate([breaks, [unique.size - 1]])] + 1
        block = self._read_runs(list(zip(first.tolist(), last.tolist(), strict=True)))
        run = np.searchsorted(last, unique, side="right")
        offset = np.concatenate([[0], np.cumsum(last - first)[:-1]])
        position = (unique - first[run] + offset[run])[inverse.ravel()]
        if position.size == block.shape[0] and np.array_equal(position, np.arange(position.size)):
            return block
        return block[position]

    def obs(self, columns: Collection[str] | None = None) -> pd.DataFrame:
        """Return the metadata of the cells, indexed by cell name.

        `columns` selects columns. Names of columns that do not exist are ignored.
        """
        import pandas as pd
        import zarr
        from anndata.io import read_elem

        self._verify("obs")
        try:
            group: Any = zarr.open_group(str(self.path), mode="r")["obs"]
            if columns is None:
                return read_elem(group)
            index = read_elem(group[str(group.attrs["_index"])])
            chosen = [name for name in self.obs_columns if name in columns]
            return pd.DataFrame({name: read_elem(group[name]) for name in chosen}, index=pd.Index(index))
        except Exception as error:
            raise self._damaged("obs", _cause(error)) from error

    @property
    def obs_columns(self) -> tuple[str, ...]:
        """Return the names of the columns of `obs`."""
        import zarr

        self._verify("obs", once=True)
        try:
            group: Any = zarr.open_group(str(self.path), mode="r")["obs"]
            return tuple(map(str, group.attrs["column-order"]))
        except Exception as error:
            raise self._damaged("obs", _cause(error)) from error

    def to_anndata(self) -> anndata.AnnData:
        """Load the complete study into memory, with raw counts as CSR (N, G)."""
        import anndata

        for name in self.record.get("hashes", ()):
            self._verify(name)
        for array in ("X/data", "X/indices", "X/indptr", *(["obsm/spatial"] if self.spatial else [])):
            self._check_chunks(array)
        try:
            adata = anndata.read_zarr(self.path)
        except Exception as error:
            raise self._damaged("", _cause(error)) from error
        if self.spatial:
            adata.uns[SCALES] = {SPATIAL_KEY: write_scales({"": self._scale()}, None)}
        return adata

    def _verify(self, group: str, once: bool = False, key: str = "") -> None:
        """Raise `StoreError` if a file of a group was changed since it was written. Check only files without checksums.

        Parameters
        ----------
        group
            Name of the group.
        once
            Skip the check if the group was already checked.
        key
            Element that the message names instead of the group.

        Notes
        -----
        Stores of earlier releases have no hashes; see `Store.open`.
        """
        recorded = self.record.get("hashes", {}).get(group)
        if recorded is None or (once and group in self._verified):
            return
        try:
            found = hash_group(self.path, group)
        except OSError as error:
            raise self._damaged(group, error.strerror or str(error)) from error
        if found != recorded:
            raise self._damaged(
                key or group, f"a file of {group} is missing or was changed after it was written"
            )
        self._verified.add(group)

    def _check_chunks(self, key: str) -> None:
        """Raise `StoreError` if a chunk of an array (1-D or 2-D) is missing.

        Without this check, zarr would return fill values for the chunk.
        """
        array = self._array(key)
        length, rows = array.shape[0], array.chunk_layout.write_chunk.shape[0]
        for number in range(-(-length // rows)):
            chunk = self.path / key / "/".join(["c", str(number), *["0"] * (array.ndim - 1)])
            if not chunk.is_file():
                raise self._damaged(key, f"its chunk {number} is missing")

    def _array(self, key: str) -> Any:
        handle = self._open.get(key)
        if handle is None:
            self._verify(key.split("/")[0], once=True, key=key)
            import tensorstore as ts

            spec = {
                "driver": "zarr3",
                "kvstore": {"driver": "file", "path": f"{self.path / key}/"},
                "recheck_cached_data": "open",
                "recheck_cached_metadata": "open",
                "fill_missing_data_reads": False,
            }
            try:
                handle = ts.open(spec, read=True, context=_shared_context()).result()
            except Exception as error:
                raise self._damaged(key, _cause(error)) from error
            self._open[key] = handle
        return handle

    def _whole(self, key: str, length: int) -> np.ndarray:
        if key not in self._cached:
            handle = self._array(key)
            if handle.shape[0] != length:
                raise self._damaged(key, f"it has {handle.shape[0]} rows instead of {length}")
            try:
                self._cached[key] = np.asarray(handle.read().result())
            except Exception as error:
                raise self._damaged(key, _cause(error)) from error
        return self._cached[key]

    def _request(self, key: str, length: int, runs: Sequence[tuple[int, int]], rows: str) -> list[Any]:
        """Start reading parts of an array in the background."""
        handle = self._array(key)
        if handle.shape[0] != length:
            raise self._damaged(key, f"it has {handle.shape[0]} values instead of {length}", rows)
        return [handle[start:stop].read() for start, stop in runs]

    def _receive(self, key: str, pending: Sequence[Any], rows: str) -> list[np.ndarray]:
        try:
            return [np.asarray(each.result()) for each in pending]
        except Exception as error:
            raise self._damaged(key, _cause(error), rows) from error

    def _read_runs(self, runs: list[tuple[int, int]]) -> sp.csr_matrix:
        rows = f" in rows {runs[0][0]} to {runs[-1][1]}"
        ends = [(start, stop + 1) for start, stop in runs]
        pointers = self._receive("X/indptr", self._request("X/indptr", self.n_cells + 1, ends, rows), rows)
        lengths = np.concatenate([np.diff(each) for each in pointers])
        spans = [(int(each[0]), int(each[-1])) for each in pointers]
        if (lengths < 0).any() or min(spans)[0] < 0 or max(end for _, end in spans) > self.nnz:
            raise self._damaged("X/indptr", "its values do not increase from 0 to the number of values", rows)
        # Request both arrays first, so that they are decoded in parallel.
        pending = {key: self._request(key, self.nnz, spans, rows) for key in ("X/indices", "X/data")}
        indices, data = (_joined(self._receive(key, each, rows)) for key, each in pending.items())
        indptr = np.concatenate([[0], np.cumsum(lengths)])
        if not _rising(indices, indptr, self.n_genes):
            raise self._damaged("X/indices", "its column indices are not increasing or out of range", rows)
        # If there is a NaN, the minimum is NaN, which is not above zero.
        if data.size and not (data.min() > 0 and (data.dtype.kind != "f" or data.max() < np.inf)):
            raise self._damaged("X/data", "its values are not positive counts", rows)
        matrix = sp.csr_matrix(
            (data.astype(np.float32, copy=False), indices.astype(np.int32, copy=False), indptr),
            shape=(len(lengths), self.n_genes),
        )
        matrix.has_canonical_format = True
        return matrix

    def _damaged(self, key: str, cause: str, rows: str = "") -> StoreError:
        return StoreError(
            f"study {self.name!r}: {self.path / key} cannot be read{rows} ({cause}): delete {self.path}, and run the "
            "ingest again to rebuild it."
        )


class Store:
    """Give access to the studies of a store, which share a gene vocabulary. Use `Store.open` to open a store.

    Attributes
    ----------
    path
        Folder of the store.
    manifest
        Content of `manifest.json`.
    vocabulary
        Gene vocabulary.
    studies
        The studies, in the order of the manifest.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], vocabulary: GeneVocabulary):
        self.path, self.manifest, self.vocabulary = path, manifest, vocabulary
        self.studies = tuple(Study(path, each, len(vocabulary)) for each in manifest["studies"])

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """Open a store and check that it is complete.

        Raises
        ------
        StoreError
            The folder, the manifest, the vocabulary or the group of a study is missing or damaged, or the store has
            another schema version.

        Warns
        -----
        UserWarning
            The store has no hashes of its files, so changed files cannot be detected.
        """
        path = Path(path)
        manifest = read_manifest(path)
        if manifest is None:
            if path.is_file():
                raise StoreError(
                    f"{path} is a file, but must be the folder of a store: convert the file with launch.ingest "
                    f"--input={path} --output=STORE."
                )
            if not path.is_dir():
                raise StoreError(f"there is no store at {path}: make one with launch.ingest --output={path}.")
            if (path / "store" / MANIFEST).is_file():
                raise StoreError(f"{path} is a run folder, but must be a store: use {path / 'store'}.")
            raise StoreError(
                f"{path} has no {MANIFEST}, so the ingest was interrupted or refused, or never ran: run the ingest "
                "again."
            )
        genes = path / GENES
        try:
            vocabulary = GeneVocabulary.load(genes)
        except (OSError, SctError) as error:
            raise StoreError(f"{genes} cannot be read ({_cause(error)}): run the ingest again.") from error
        expected = manifest["vocabulary"]["hash"]
        if vocabulary.hash != expected:
            raise StoreError(
                f"{genes} has hash {vocabulary.hash}, but {path / MANIFEST} expects {expected}: restore the original "
                "file, or run the ingest again."
            )
        if manifest["vocabulary"].get("sha256", hash_file(genes)) != hash_file(genes):
            raise StoreError(
                f"{genes} was changed after it was written (its sha256 differs from the one in {path / MANIFEST}): "
                "restore the original file, or run the ingest again."
            )
        store = cls(path, manifest, vocabulary)
        if not all("hashes" in study.record for study in store.studies):
            messages.warn(
                f"{path / MANIFEST} was written by an earlier release and has no hashes of some studies, so changes of "
                "their cell metadata cannot be detected: run the ingest again to rebuild these studies.",
            )
        for study in store.studies:
            if not (study.path / "zarr.json").is_file():
                raise StoreError(
                    f"{study.path} is missing, but {path / MANIFEST} lists it: run the ingest again to rebuild it."
                )
        return store

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r}, {len(self.studies)} studies, {self.n_cells:,} cells)"

    @property
    def n_cells(self) -> int:
        """Return the total number of cells of all studies."""
        return sum(each.n_cells for each in self.studies)

    def split(self, name: str) -> tuple[Study, ...]:
        """Return the studies of a split ("train", "validation" or "test"). The tuple can be empty."""
        check_choice("the split", name, SPLITS, error=StoreError)
        return tuple(each for each in self.studies if each.split == name)

    def study(self, name: str) -> Study:
        """Return a study by its name; raise `StoreError` if the store has no study of this name."""
        for each in self.studies:
            if each.name == name:
                return each
        known = ", ".join(each.name for each in self.studies)
        raise StoreError(f"the store {self.path} has no study {name!r}: choose from {known}.")

    def check_vocabulary(self, vocabulary: GeneVocabulary) -> None:
        """Raise `StoreError` unless the store has the genes of `vocabulary`, in the same order."""
        if vocabulary.hash != self.vocabulary.hash:
            raise StoreError(
                f"the store {self.path} has the gene vocabulary {self.vocabulary.name!r} ({self.vocabulary.hash}), "
                f"but must have {vocabulary.name!r} ({vocabulary.hash}): ingest the data again with the vocabulary "
                f"{vocabulary.name!r}."
            )


def read_manifest(path: Path, name: str = MANIFEST) -> dict[str, Any] | None:
    """Read and check the manifest of a store; return None if the folder has none.

    Raises
    ------
    StoreError
        The manifest is damaged, was changed, or has another schema version.
    """
    file = path / name
    if not file.is_file():
        return None
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        version = manifest["schema_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{file} is not a valid manifest of a store ({_cause(error)}): run the ingest again."
        ) from error
    if version not in (SCHEMA_VERSION, ACTIVITY_VERSION):
        raise StoreError(
            f"{file} has schema version {version}, but this release of sct reads {SCHEMA_VERSION} and "
            f"{ACTIVITY_VERSION}: run the ingest again, or use the release of sct that wrote the store."
        )
    if is_changed(manifest):
        raise StoreError(
            f"{file} is damaged or was changed after it was written (its {SEAL} does not match): restore it or run the "
            f"ingest again, or delete the entry {SEAL!r} if you changed the file on purpose."
        )
    try:
        manifest["vocabulary"]["hash"], manifest["vocabulary"]["name"]
        for each in manifest["studies"]:
            for field in _STUDY_FIELDS:
                each[field]
            check_study(each, file)
    except (KeyError, TypeError) as error:
        raise StoreError(f"{file} has no field {error}: run the ingest again.") from error
    names = [each["name"].casefold() for each in manifest["studies"]]
    check_distinct(f"the list of studies in {file}", names, error=StoreError, advice="run the ingest again")
    return manifest


def study_path(name: str) -> str:
    """Return the folder of a study, relative to the store.

    Raises
    ------
    StoreError
        The name has characters other than letters, digits, `-`, `_` and single dots in between. A name with other
        characters could lead outside the store.
    """
    if not isinstance(name, str) or not _STUDY_NAME.fullmatch(name):
        raise StoreError(
            f"a study is called {name!r}, but names may only have letters, digits, '-', '_' and single dots in "
            "between: rename the study."
        )
    return f"{STUDIES}/{name}.zarr"


def check_study(record: Mapping[str, Any], file: Path) -> None:
    """Raise `StoreError` if the entry of a study in `file` has an invalid study name, folder or split."""
    try:
        expected = study_path(record["name"])
    except StoreError as error:
        raise StoreError(f"{file}: {str(error).rstrip('.')}, and run the ingest again.") from None
    if record["path"] != expected or record.get("split", SPLITS[0]) not in SPLITS:
        raise StoreError(
            f"{file} has the path {record['path']!r} and the split {record.get('split')!r} for the study "
            f"{record['name']!r}, but the path must be {expected!r} and the split must be one of {', '.join(SPLITS)}: "
            "run the ingest again."
        )
