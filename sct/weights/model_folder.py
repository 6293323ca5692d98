"""Files of a model folder: `config.json`, `model.safetensors`, `README.md`, and `genes.tsv` or a tokenizer, or both.

A folder is all that others need: any program that reads safetensors can read it without this project.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
TORCH = "pytorch_model.bin"  # weights of older foreign folders
SHARD_BYTES = 5_000_000_000
SAVED_DTYPES = ("float32", "bfloat16")
FILES = "files"  # entry of config.json with the hashes of the other files

_CHECKED = 1 << 20  # numbers looked at together
_OURS = re.compile(
    r"config\.json|genes\.tsv|README\.md|model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
    r"|tokenizer\.json|tokenizer\.model|tokenizer_config\.json"
)
_PARTS = re.compile(r"[\w.-]+\.safetensors")
_UNFINISHED = re.compile(rf"{_OURS.pattern}|\.genes\.tsv\..*")
# Names that safetensors gives to types.
_FILE_DTYPES = {
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "BOOL": "bool",
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
}  # fmt: skip


def _holds_only(folder: Path, names: re.Pattern[str]) -> bool:
    return all(names.fullmatch(file.name) and file.is_file() for file in folder.iterdir())


def _is_model(folder: Path) -> bool:
    """Whether a folder is a model folder and holds nothing else, so that it may be replaced."""
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "sct_version" in config and _holds_only(folder, _OURS)


def is_leftover(folder: Path) -> bool:
    """Whether a folder holds nothing but files of a model, as a save that was killed leaves them."""
    return _holds_only(folder, _UNFINISHED)


def check_target(folder: Path) -> Path:
    """Folder to write a model to, resolved; `CheckpointError` unless it is new, empty, or a model folder."""
    try:
        folder = folder.resolve()
        if folder.exists() and not folder.is_dir():
            raise CheckpointError(f"{folder} is a file, but a model is a folder: choose another path.")
        if folder.exists() and any(folder.iterdir()) and not _is_model(folder):
            raise CheckpointError(
                f"{folder} holds other files than those of a model folder, which would be lost: choose an "
                "empty or new folder."
            )
        beside = replaced(folder)
        if beside.exists() and not (beside.is_dir() and _holds_only(beside, _UNFINISHED)):
            raise CheckpointError(
                f"{beside} is needed while the model is written, but it holds other files: move it away."
            )
    except OSError as error:
        raise _unwritable(folder, error) from error
    return folder


def _unwritable(folder: Path, error: Exception) -> CheckpointError:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return CheckpointError(
        f"the model could not be written to {folder} ({reason}): choose a place that is writable and has "
        "room for it."
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
) -> None:
    """Write a model folder; see `sct.weights.pretrained.Pretrained.save_pretrained`.

    The new model is written beside the folder and takes its place by renaming. An old model is renamed away
    just before; where the process dies between these two, loading and saving find it there.
    """
    from safetensors import SafetensorError

    check_choice("dtype", dtype, SAVED_DTYPES, error=CheckpointError)
    folder = check_target(folder)
    try:
        with atomic_folder(folder, is_leftover) as new:
            _write(new, arrays, config, genes, tokenizer, card, dtype, shard_bytes, foreign)
            for file in new.iterdir():
                # safetensors writes files that their owner alone can read.
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
) -> None:
    from safetensors.numpy import save_file

    shards = list(_shards(arrays, dtype, shard_bytes))
    index: dict[str, str] = {}
    for number, paths in enumerate(shards, 1):
        name = WEIGHTS
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # One shard at a time is on the host. A single entry of metadata: several have no fixed order.
        on_host = {path: _host(arrays[path], dtype) for path in paths}
        for path, value in on_host.items():
            if not all_finite(value):
                raise CheckpointError(
                    f"the model's {path} holds numbers that are not finite in {value.dtype}: save a model whose "
                    "training went well."
                )
        save_file(on_host, folder / name, metadata={"format": "pt" if foreign else "sct"})
        index |= dict.fromkeys(paths, name)
    if len(shards) > 1:
        total = sum(_bytes(value, dtype) for value in arrays.values())
        text = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / INDEX).write_text(json.dumps(text, indent=1) + "\n")
    if genes is not None:
        genes.save(folder / GENES)
    if tokenizer is not None:
        tokenizer.save(folder)
    if not foreign:  # a foreign program would copy hashes to files that it changed
        names = sorted(file.name for file in folder.iterdir())
        config = sealed({**config, FILES: hash_files(folder, names)})
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    (folder / CARD).write_text(card, encoding="utf-8")


def is_float(value: Any) -> bool:
    """Whether an array's type is a floating-point one, bfloat16 included."""
    return bool(jnp.issubdtype(value.dtype, jnp.floating))


def _kind(value: Any, dtype: str) -> np.dtype:
    """Type that an array is written in: a narrower one has no digits that a wider could keep."""
    wanted = jnp.dtype(dtype)
    own: np.dtype = value.dtype
    return wanted if is_float(value) and own.itemsize >= wanted.itemsize else own


def _host(value: Any, dtype: str) -> np.ndarray:
    array = np.asarray(jax.device_get(value))
    # `ascontiguousarray` would make a number an array of one.
    return np.asarray(array.astype(_kind(array, dtype)), order="C")


def all_finite(value: np.ndarray) -> bool:
    """Whether no number of an array is NaN or infinite; true of integers."""
    if not is_float(value):
        return True
    bits = np.ascontiguousarray(value).reshape(-1).view(f"uint{8 * value.dtype.itemsize}")
    # Exponents of ones are the largest; the sign in front is left out. NumPy knows no bfloat16.
    limit = np.asarray(np.inf, value.dtype).view(bits.dtype)[()]
    most = bits.dtype.type(np.iinfo(bits.dtype).max >> 1)
    return all((bits[at : at + _CHECKED] & most).max() < limit for at in range(0, len(bits), _CHECKED))


def check_range(value: np.ndarray, name: str) -> None:
    """Raise `CheckpointError` where finite weights were converted to float16 and are too large for it."""
    if value.dtype == np.float16 and not all_finite(value):
        raise CheckpointError(
            f"{name} holds numbers that are too large for float16: load the model as bfloat16 or float32."
        )


def check_finite_array(value: np.ndarray, name: str, path: Path) -> None:
    """Raise `CheckpointError` where weights of a file are NaN or infinite."""
    if not all_finite(value):
        raise CheckpointError(
            f"{path} holds numbers in {name} that are not finite: it is damaged, or its training went wrong; give "
            "another model."
        )


def _bytes(value: Any, dtype: str) -> int:
    return int(np.prod(value.shape)) * _kind(value, dtype).itemsize


def _shards(flat: Mapping[str, Any], dtype: str, limit: int) -> Iterator[list[str]]:
    """Paths of each file, in order, none above `limit` bytes unless a single array is."""
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
    """Where the model of a path lies: there, or beside it where replacing it was cut off; None without one."""
    candidates = [folder]
    if not folder.exists() and folder.name:
        candidates.append(replaced(folder))
    for candidate in candidates:
        weights = any((candidate / name).is_file() for name in (WEIGHTS, INDEX, TORCH, f"{TORCH}.index.json"))
        if (candidate / CONFIG).is_file() and weights:
            return candidate
    return None


def read_json(path: Path) -> dict[str, Any]:
    """Object in a JSON file; `CheckpointError` where it is missing, unreadable, or anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}: the folder is incomplete.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): the folder is damaged.") from error
    check_type(
        f"the content of {path}",
        content,
        dict,
        "an object",
        error=CheckpointError,
        advice="fetch or save the folder again, which is damaged",
    )
    return content


def is_foreign(folder: Path) -> bool:
    """Whether the `config.json` of a folder is one of Hugging Face."""
    config = read_json(folder / CONFIG)
    return "model_type" in config and "format_version" not in config


def read_config(folder: Path) -> dict[str, Any]:
    """Read `config.json` of a model folder; `CheckpointError` where it is no description of a model."""
    path = folder / CONFIG
    config = read_json(path)
    version, family = config.get("format_version"), config.get("family")
    if version != FORMAT_VERSION or not isinstance(family, str) or family not in registry.MODELS:
        raise CheckpointError(
            f"{path} describes format {version} of family {family!r}, but this version reads format "
            f"{FORMAT_VERSION} of {', '.join(registry.MODELS)}: pip install --upgrade {DISTRIBUTION}."
        )
    wanted: dict[str, type | tuple[type, ...]] = {
        "model": dict, "license": (str, type(None)), "step": (int, type(None)),
    }  # fmt: skip
    for name, kind in wanted.items():
        if not isinstance(config.get(name), kind):
            raise CheckpointError(
                f"{path} has {name} = {config.get(name)!r}, which does not describe a model: the folder is "
                "damaged."
            )
    if is_changed(config):
        raise CheckpointError(
            f"{path} is damaged or was changed after the model was saved (its {SEAL} does not match): restore it, "
            f"or delete its entry {SEAL!r} if you changed it on purpose."
        )
    return config


def verify(folder: Path, config: Mapping[str, Any], shared: bool = False) -> None:
    """Check that the files of a model folder are those that were saved, by the hashes in its configuration.

    Parameters
    ----------
    folder, config
        Model folder, and what `read_config` gave of it.
    shared
        All processes load the model: each reads its share of the files.

    Raises
    ------
    CheckpointError
        A file is missing, of other bytes, or was added.

    Warns
    -----
    UserWarning
        There are no hashes.
    """
    recorded = config.get(FILES)
    if recorded is None or SEAL not in config:
        warnings.warn(
            f"{folder / CONFIG} has no hashes of {'itself' if recorded else 'the files'}, so that changes of "
            f"{'it' if recorded else 'them'} are not noticed: save the model again (save_pretrained) to record them.",
            UserWarning,
            stacklevel=4,
        )
    if recorded is None:
        return
    if not isinstance(recorded, dict) or not all(
        isinstance(name, str) and _OURS.fullmatch(name) for name in recorded
    ):
        raise CheckpointError(f"{folder / CONFIG} has no hashes by file as {FILES!r}: the folder is damaged.")
    there = {file.name for file in folder.iterdir() if _OURS.fullmatch(file.name)} - {CONFIG, CARD}
    for name in sorted(set(recorded) - there):
        raise CheckpointError(f"{folder} has no {name}: the folder is incomplete.")
    for name in sorted(there - set(recorded)):
        raise CheckpointError(
            f"{folder / name} is not among the files that {CONFIG} names: move it away, or delete the entries "
            f"{FILES!r} and {SEAL!r} from {CONFIG} if you added it on purpose."
        )
    try:
        changed = first_changed(folder, recorded, shared)
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder} cannot be read ({error.strerror}).") from error
    if changed is not None:
        raise CheckpointError(
            f"{folder / changed} is damaged or was changed after the model was saved (its sha256 is not the one in "
            f"{CONFIG}): fetch or save the model again, or delete the entries {FILES!r} and {SEAL!r} from {CONFIG} if "
            "you changed it on purpose."
        )


class FolderReader:
    """Arrays of a folder, read one by one, each device's part alone where they are placed on a mesh.

    It is a model folder, unless the file of another one is named.
    """

    def __init__(self, folder: Path, file: str = WEIGHTS):
        self.folder = folder
        self._files = [file]
        if file == WEIGHTS and (folder / INDEX).is_file():
            names = read_json(folder / INDEX).get("weight_map")
            files: list[Any] = list(names.values()) if isinstance(names, dict) else [None]
            if not files or not all(isinstance(name, str) and _PARTS.fullmatch(name) for name in files):
                raise CheckpointError(f"{folder / INDEX} does not name the files: the folder is damaged.")
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
                        raise CheckpointError(f"{self.folder} has {key} in two files: it is damaged.")
                    part = file.get_slice(key)
                    kind = part.get_dtype()
                    if kind not in _FILE_DTYPES:
                        raise CheckpointError(
                            f"{self.folder / name} holds {key} as {kind}: no model has that."
                        )
                    dtype = jnp.dtype(_FILE_DTYPES[kind])
                    self.shapes[key] = jax.ShapeDtypeStruct(tuple(part.get_shape()), dtype)
                    self._owner[key] = file
            except FileNotFoundError:
                raise CheckpointError(f"{self.folder} has no {name}: the folder is incomplete.") from None
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{self.folder / name} is damaged ({error}).") from error
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._open:
            file.__exit__(*error)

    def part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Read a part of one array into memory; nothing else of the file is."""
        part = self._owner[name].get_slice(name)
        value = np.asarray(part[index] if index else part[...])
        check_finite_array(value, name, self.folder)
        return value

    def read(self, name: str, sharding: Any, dtype: str | None) -> jax.Array:
        """Read one array onto its devices."""

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
