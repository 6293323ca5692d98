"""Read and write the files of a model folder.

A model folder holds `config.json`, `model.safetensors` and `README.md`, plus `genes.tsv`, a tokenizer, or both. Two
optional files are `readout.safetensors` (a fitted readout) and `training_cells.safetensors` (hashes of the training
cells). Any program that reads safetensors files can read the weights without this project.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sct import messages
from sct.atomic import atomic_folder, replaced
from sct.checks import check_choice, check_type
from sct.data.genes.vocabulary import GeneVocabulary
from sct.data.text.tokenizer import Tokenizer
from sct.errors import CheckpointError
from sct.hashes import SEAL, first_changed, hash_files, is_changed, sealed
from sct.models import registry
from sct.version import DISTRIBUTION

FORMAT_VERSION = 1
CONFIG, WEIGHTS, GENES, CARD = "config.json", "model.safetensors", "genes.tsv", "README.md"
INDEX = f"{WEIGHTS}.index.json"
# Optional files, and their entries in config.json. EMBEDDING: entry with the default readout and its comparison.
READOUT, TRAINING_CELLS = "readout.safetensors", "training_cells.safetensors"
READOUT_RECORD, TRAINING_CELLS_RECORD, EMBEDDING = "readout", "training_cells", "embedding"
TORCH = "pytorch_model.bin"  # weights of older Hugging Face folders
SHARD_BYTES = 5_000_000_000
SAVED_DTYPES = ("float32", "bfloat16", "float16")
FILES = "files"  # key in config.json for the hashes of the other files

_CHECKED = 1 << 20  # numbers per step of the finiteness check; bounds its temporary memory
_OURS = re.compile(
    r"config\.json|genes\.tsv|README\.md|model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
    r"|tokenizer\.json|tokenizer\.model|tokenizer_config\.json|readout\.safetensors|training_cells\.safetensors"
)
_PARTS = re.compile(r"[\w.-]+\.safetensors")
_UNFINISHED = re.compile(rf"{_OURS.pattern}|\.genes\.tsv\..*")
# dtype names of safetensors -> NumPy names.
_FILE_DTYPES = {
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "BOOL": "bool",
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
}  # fmt: skip


def _holds_only(folder: Path, names: re.Pattern[str]) -> bool:
    return all(names.fullmatch(file.name) and file.is_file() for file in folder.iterdir())


def _is_model(folder: Path) -> bool:
    """Return whether a folder holds a model and no other files. Replacing such a folder deletes only the model."""
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "sct_version" in config and _holds_only(folder, _OURS)


def is_leftover(folder: Path) -> bool:
    """Return whether a folder holds only files of an interrupted save."""
    return _holds_only(folder, _UNFINISHED)


def check_target(folder: Path) -> Path:
    """Resolve an output folder and check that it is new, empty, or a model folder.

    Raises
    ------
    CheckpointError
        The folder holds other files, is a file, or cannot be accessed.
    """
    try:
        folder = folder.resolve()
        if folder.exists() and not folder.is_dir():
            raise CheckpointError(
                f"{folder} is a file, but the output must be a folder: choose another path."
            )
        if folder.exists() and any(folder.iterdir()) and not _is_model(folder):
            raise CheckpointError(
                f"{folder} has files that do not belong to a saved model, but saving would delete all files in this "
                "folder: choose a new or an empty folder."
            )
        backup = replaced(folder)
        if backup.exists() and not (backup.is_dir() and _holds_only(backup, _UNFINISHED)):
            raise CheckpointError(
                f"{backup} holds other files, but saving needs this path for a backup of the old model: move these "
                "files to another folder."
            )
    except OSError as error:
        raise _unwritable(folder, error) from error
    return folder


def _unwritable(folder: Path, error: Exception) -> CheckpointError:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return CheckpointError(
        f"the model could not be written to {folder} ({reason}): choose a writable folder with enough disk space."
    )


def save(
    folder: Path,
    arrays: Mapping[str, Any],
    config: Mapping[str, Any],
    genes: GeneVocabulary | None,
    tokenizer: Tokenizer | None,
    card: str,
    dtype: str,
    shard_bytes: int,
    foreign: bool = False,
    extra: Mapping[str, Mapping[str, np.ndarray]] = MappingProxyType({}),
) -> None:
    """Write a model folder; see `sct.weights.pretrained.Pretrained.save_pretrained`.

    The write is atomic. The new model is first written to a temporary folder next to the target. Then an old model is
    renamed to a backup, and the temporary folder gets the name of the target. If the process dies between the two
    renames, loading and saving find the backup.

    Parameters
    ----------
    folder
        Output folder.
    arrays
        Arrays by path.
    config
        Content of `config.json`.
    genes, tokenizer
        Gene vocabulary and tokenizer to save next to the weights. Each of the two is None if the model does not have
        it.
    card
        Text of the model card (`README.md`).
    dtype
        Widest floating-point dtype in the file: "float32", "bfloat16" or "float16". Arrays with a narrower dtype keep
        their dtype.
    shard_bytes
        Maximal size of a weights file in bytes.
    foreign
        Whether the folder is for other programs, such as `transformers`. The `config.json` of such a folder has no
        hashes.
    extra
        Arrays of optional files, as a dict by file name. These arrays keep their dtypes.

    Raises
    ------
    CheckpointError
        The folder holds other files or cannot be written, or an array has NaN or infinity, or values that are too large
        for float16. No partial output remains.
    """
    from safetensors import SafetensorError

    check_choice("dtype", dtype, SAVED_DTYPES, error=CheckpointError)
    folder = check_target(folder)
    try:
        with atomic_folder(folder, is_leftover) as new:
            _write(new, arrays, config, genes, tokenizer, card, dtype, shard_bytes, foreign, extra)
            for file in new.iterdir():
                # safetensors creates files that only their owner can read.
                shutil.copymode(new / CONFIG, file)
    except (OSError, SafetensorError) as error:
        raise _unwritable(folder, error) from error


def _write(
    folder: Path,
    arrays: Mapping[str, Any],
    config: Mapping[str, Any],
    genes: GeneVocabulary | None,
    tokenizer: Tokenizer | None,
    card: str,
    dtype: str,
    shard_bytes: int,
    foreign: bool,
    extra: Mapping[str, Mapping[str, np.ndarray]],
) -> None:
    from safetensors.numpy import save_file

    shards = list(_shards(arrays, dtype, shard_bytes))
    index: dict[str, str] = {}
    for number, paths in enumerate(shards, 1):
        name = WEIGHTS
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # Only one shard at a time is in host memory.
        on_host = {path: _host(arrays[path], dtype) for path in paths}
        for path, value in on_host.items():
            if not all_finite(value):
                before = np.asarray(jax.device_get(arrays[path]))
                if all_finite(before):
                    check_range(value, f"the parameter {path}", "save")
                raise CheckpointError(
                    f"the parameter {path} has NaN or infinite values as {value.dtype}: the training has probably "
                    "diverged, so save an earlier checkpoint."
                )
        # Metadata has a single entry, because safetensors writes several in random order.
        save_file(on_host, folder / name, metadata={"format": "pt" if foreign else "sct"})
        index |= dict.fromkeys(paths, name)
    if len(shards) > 1:
        total = sum(_bytes(value, dtype) for value in arrays.values())
        text = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / INDEX).write_text(json.dumps(text, indent=1) + "\n")
    for name, more in extra.items():
        save_file({key: np.ascontiguousarray(value) for key, value in more.items()}, folder / name)
    if genes is not None:
        genes.save(folder / GENES)
    if tokenizer is not None:
        tokenizer.save(folder)
    if not foreign:  # other programs would keep the hashes after they change the files
        names = sorted(file.name for file in folder.iterdir())
        config = sealed({**config, FILES: hash_files(folder, names)})
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    (folder / CARD).write_text(card, encoding="utf-8")


def is_float(value: Any) -> bool:
    """Return whether an array has a floating-point dtype, including bfloat16."""
    return bool(jnp.issubdtype(value.dtype, jnp.floating))


def _kind(value: Any, dtype: str) -> np.dtype:
    """Return the dtype in which an array is saved.

    A float array with a dtype narrower than `dtype` keeps its dtype, because a wider dtype adds no precision.
    """
    wanted = jnp.dtype(dtype)
    own: np.dtype = value.dtype
    return wanted if is_float(value) and own.itemsize >= wanted.itemsize else own


def _host(value: Any, dtype: str) -> np.ndarray:
    array = np.asarray(jax.device_get(value))
    with np.errstate(over="ignore"):  # the caller checks for infinity
        # `ascontiguousarray` would turn a scalar into an array of shape (1,).
        return np.asarray(array.astype(_kind(array, dtype)), order="C")


def all_finite(value: np.ndarray) -> bool:
    """Return whether all values of an array are finite. The result is always True for an integer array."""
    if not is_float(value):
        return True
    bits = np.ascontiguousarray(value).reshape(-1).view(f"uint{8 * value.dtype.itemsize}")
    # Compare bit patterns, because NumPy does not support bfloat16. Without the sign bit, NaN and infinity have the
    # largest patterns, as all their exponent bits are one.
    limit = np.asarray(np.inf, value.dtype).view(bits.dtype)[()]
    most = bits.dtype.type(np.iinfo(bits.dtype).max >> 1)
    return all((bits[at : at + _CHECKED] & most).max() < limit for at in range(0, len(bits), _CHECKED))


def check_range(value: np.ndarray, name: str, action: str = "load") -> None:
    """Raise `CheckpointError` if values of an array became infinite in the conversion to float16.

    `action` is the verb of the advice: "load" or "save" the model with another dtype.
    """
    if value.dtype == np.float16 and not all_finite(value):
        raise CheckpointError(
            f"{name} has values that are too large for float16: {action} the model with dtype bfloat16 or float32."
        )


def check_finite_array(value: np.ndarray, name: str, path: Path) -> None:
    """Raise `CheckpointError` if an array from a weights file has NaN or infinity."""
    if not all_finite(value):
        raise CheckpointError(
            f"{path} has NaN or infinite values in {name}: the file is damaged or the training diverged, so use "
            "another model."
        )


def _bytes(value: Any, dtype: str) -> int:
    return int(np.prod(value.shape)) * _kind(value, dtype).itemsize


def _shards(flat: Mapping[str, Any], dtype: str, limit: int) -> Iterator[list[str]]:
    """Divide the arrays among files of at most `limit` bytes, and yield the paths of the arrays in each file.

    An array that is larger than `limit` gets a file of its own.
    """
    paths: list[str] = []
    size = 0
    for path, value in flat.items():
        if paths and size + _bytes(value, dtype) > limit:
            yield paths
            paths, size = [], 0
        paths.append(path)
        size += _bytes(value, dtype)
    yield paths


def find(folder: Path) -> Path | None:
    """Return the folder that holds the model saved under a path, or None if no model was saved under this path.

    If saving was interrupted while it replaced an older model, return the backup folder, which is next to `folder`.
    """
    candidates = [folder]
    if not folder.exists() and folder.name:
        candidates.append(replaced(folder))
    for candidate in candidates:
        weights = any((candidate / name).is_file() for name in (WEIGHTS, INDEX, TORCH, f"{TORCH}.index.json"))
        if (candidate / CONFIG).is_file() and weights:
            return candidate
    return None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raise `CheckpointError` if the file is missing, unreadable or not an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} has no {path.name}: the folder is incomplete, so copy or save it again."
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): check its permissions.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not valid JSON ({error}): the file is damaged, so restore it from a copy."
        ) from error
    check_type(
        f"the content of {path}",
        content,
        dict,
        "a JSON object",
        error=CheckpointError,
        advice="the file is damaged, so restore it from a copy",
    )
    return content


def is_foreign(folder: Path) -> bool:
    """Return whether the `config.json` of a folder has the Hugging Face format."""
    config = read_json(folder / CONFIG)
    return "model_type" in config and "format_version" not in config


def read_config(folder: Path) -> dict[str, Any]:
    """Read `config.json` of a model folder; raise `CheckpointError` if it is damaged or does not describe a model."""
    path = folder / CONFIG
    config = read_json(path)
    version, family = config.get("format_version"), config.get("family")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format_version {version!r}, but this release reads only version {FORMAT_VERSION}: upgrade "
            f"with pip install --upgrade {DISTRIBUTION}."
        )
    if not isinstance(family, str) or family not in registry.MODELS:
        raise CheckpointError(
            f"{path} has the family {family!r}, but the known families are {', '.join(registry.MODELS)}: upgrade with "
            f"pip install --upgrade {DISTRIBUTION}, or add your own family first with sct.families.register."
        )
    wanted: dict[str, type | tuple[type, ...]] = {
        "model": dict, "license": (str, type(None)), "step": (int, type(None)),
    }  # fmt: skip
    for name, kind in wanted.items():
        if not isinstance(config.get(name), kind):
            raise CheckpointError(
                f"{path} has an invalid value {name} = {config.get(name)!r}: the file is damaged, so restore it from a "
                "copy."
            )
    if is_changed(config):
        raise CheckpointError(
            f"{path} is damaged or was changed after the model was saved (its {SEAL} does not match): restore it from "
            f"a copy, or delete the entry {SEAL!r} if you changed the file on purpose."
        )
    return config


def verify(folder: Path, config: Mapping[str, Any], shared: bool = False) -> None:
    """Compare the files of a model folder with the hashes in its `config.json`.

    Parameters
    ----------
    folder, config
        The model folder, and its configuration from `read_config`.
    shared
        Whether all processes load the model. If True, each process checks only its share of the files.

    Raises
    ------
    CheckpointError
        A file is missing, was changed, or was added after the model was saved.

    Warns
    -----
    UserWarning
        `config.json` has no hashes.
    """
    recorded = config.get(FILES)
    if recorded is None or SEAL not in config:
        messages.warn(
            f"{folder / CONFIG} has no hashes of {'itself' if recorded else 'the files'}, so changes cannot be "
            "detected: save the model again with save_pretrained to record the hashes.",
        )
    if recorded is None:
        return
    if not isinstance(recorded, dict) or not all(
        isinstance(name, str) and _OURS.fullmatch(name) for name in recorded
    ):
        raise CheckpointError(
            f"{folder / CONFIG} has an invalid entry {FILES!r}: the file is damaged, so restore it from a copy."
        )
    present = {file.name for file in folder.iterdir() if _OURS.fullmatch(file.name)} - {CONFIG, CARD}
    for name in sorted(set(recorded) - present):
        raise CheckpointError(f"{folder} has no {name}: the folder is incomplete, so copy or save it again.")
    for name in sorted(present - set(recorded)):
        raise CheckpointError(
            f"{folder / name} is not listed in {CONFIG}: move the file to another folder, or, if you added this file "
            f"on purpose, delete the entries {FILES!r} and {SEAL!r} from {CONFIG}."
        )
    try:
        changed = first_changed(folder, recorded, shared)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or folder} cannot be read ({error.strerror}): check its permissions."
        ) from error
    if changed is not None:
        raise CheckpointError(
            f"{folder / changed} is damaged or was changed after the model was saved (its sha256 differs from the one "
            f"in {CONFIG}): copy or save the model again, or, if you changed the file on purpose, delete the "
            f"entries {FILES!r} and {SEAL!r} from {CONFIG}."
        )


class FolderReader:
    """Read the arrays of a safetensors folder one at a time. On a mesh, each device reads only its own shard.

    Parameters
    ----------
    folder
        Folder with the weights.
    file
        Name of the weights file. The default is the name in a model folder. The weights may be split into several
        files.
    """

    def __init__(self, folder: Path, file: str = WEIGHTS):
        self.folder = folder
        self._files = [file]
        if file == WEIGHTS and (folder / INDEX).is_file():
            names = read_json(folder / INDEX).get("weight_map")
            files: list[Any] = list(names.values()) if isinstance(names, dict) else [None]
            if not files or not all(isinstance(name, str) and _PARTS.fullmatch(name) for name in files):
                raise CheckpointError(
                    f"{folder / INDEX} has no valid weight_map: the file is damaged, so restore it from a copy."
                )
            self._files = sorted(set(files))
        self._open: list[Any] = []
        self.shapes: dict[str, jax.ShapeDtypeStruct] = {}
        self._owner: dict[str, Any] = {}

    def __enter__(self) -> FolderReader:
        from safetensors import SafetensorError, safe_open

        for name in self._files:
            try:
                file = safe_open(self.folder / name, framework="numpy")
                file.__enter__()
                self._open.append(file)
                for key in file.keys():  # noqa: SIM118 (not a mapping)
                    if key in self._owner:
                        raise CheckpointError(
                            f"{self.folder} has {key} in two files: delete the file that does not belong to the model."
                        )
                    part = file.get_slice(key)
                    kind = part.get_dtype()
                    if kind not in _FILE_DTYPES:
                        raise CheckpointError(
                            f"{self.folder / name} has {key} with dtype {kind}, but the supported dtypes are "
                            f"{', '.join(_FILE_DTYPES)}: convert the file first."
                        )
                    dtype = jnp.dtype(_FILE_DTYPES[kind])
                    self.shapes[key] = jax.ShapeDtypeStruct(tuple(part.get_shape()), dtype)
                    self._owner[key] = file
            except FileNotFoundError:
                raise CheckpointError(
                    f"{self.folder} has no {name}: the folder is incomplete, so copy or save it again."
                ) from None
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{self.folder / name} is damaged ({error}): restore it from a copy."
                ) from error
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._open:
            file.__exit__(*error)

    def part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Read a slice of one array, without reading the rest of the file."""
        part = self._owner[name].get_slice(name)
        value = np.asarray(part[index] if index else part[...])
        check_finite_array(value, name, self.folder)
        return value

    def read(self, name: str, sharding: Any, dtype: str | None) -> jax.Array:
        """Read one array and place it on its devices.

        Parameters
        ----------
        name
            Path of the array.
        sharding
            Sharding over a mesh, or None for the default device.
        dtype
            dtype of a floating-point result. None keeps the dtype in the file.
        """

        def of(index: tuple[slice, ...] | None) -> np.ndarray:
            value = self.part(name, index or ())
            if not (dtype and is_float(value)):
                return value
            with np.errstate(over="ignore"):
                value = value.astype(jnp.dtype(dtype))
            check_range(value, name)
            return value

        shape = self.shapes[name].shape
        if sharding is None:
            return jnp.asarray(of((slice(None),) * len(shape)))
        return jax.make_array_from_callback(shape, sharding, of)
