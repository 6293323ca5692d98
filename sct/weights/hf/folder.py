"""Read and write Hugging Face folders of text models: GPT-2, GPT-NeoX (Pythia), LLaMA and BERT.

Weights are copied from the files to the devices one parameter at a time. At any time, the memory of the host therefore
holds at most one parameter (stacked over layers) that is not yet on the devices, and never a second copy of the model.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sct.checks import check_choice
from sct.data.genes.vocabulary import GeneVocabulary
from sct.data.text.tokenizer import Tokenizer
from sct.errors import CheckpointError
from sct.nn import axes
from sct.nn.paths import flatten, unflatten
from sct.version import __version__
from sct.weights import model_folder
from sct.weights.hf import config as hf_config
from sct.weights.hf import maps as hf_maps
from sct.weights.hf.files import TorchReader, open_weights
from sct.weights.hf.maps import FAMILIES, Entry
from sct.weights.model_folder import CARD, CONFIG, GENES, SHARD_BYTES, FolderReader
from sct.weights.pretrained import (
    LOADED_DTYPES,
    Pretrained,
    boxed_shapes,
    default_card,
    expected_shapes,
    fitting_rules,
    match,
)

NOTICE = "Converted weights keep the license of the original weights. See the page of the original weights."
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
_COMPARED = 1 << 24  # numbers per step when two copies of an array are compared; bounds the memory


@dataclasses.dataclass(frozen=True)
class Lazy:
    """An array that is computed only when it is converted to NumPy."""

    shape: tuple[int, ...]
    dtype: Any
    make: Callable[[], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.make(), dtype)


@dataclasses.dataclass(frozen=True)
class _Opened:
    """An open Hugging Face folder.

    The names and shapes of its arrays were checked, but the arrays were not read yet.
    """

    family: str
    config: Any
    reader: FolderReader | TorchReader
    entries: dict[str, Entry]
    keys: dict[str, str]
    shapes: dict[str, Any]

    def dtype(self, path: str) -> Any:
        """Return the dtype of a parameter in the files."""
        kinds = [self.reader.shapes[self.keys[name]].dtype for name in self.entries[path].names]
        return jnp.result_type(*kinds)

    def read(self, path: str, index: tuple[slice, ...] | None, dtype: Any) -> np.ndarray:
        """Read the slice `index` of a parameter, or the whole parameter if `index` is None."""
        entry, shape = self.entries[path], self.shapes[path].shape
        index = index or (slice(None),) * len(shape)
        index = tuple(slice(*part.indices(size)) for part, size in zip(index, shape, strict=True))

        def one(name: str, index: tuple[slice, ...]) -> np.ndarray:
            return entry.take(lambda part: self.reader.part(self.keys[name], part), index)

        made = _aligned([part.stop - part.start for part in index], dtype)
        with np.errstate(over="ignore"):
            if entry.stacked:
                for row, layer in enumerate(range(index[0].start, index[0].stop)):
                    made[row] = one(entry.names[layer], index[1:])
            else:
                made[...] = one(entry.names[0], index)
        model_folder.check_range(made, path)
        return made


def _aligned(shape: list[int], dtype: Any) -> np.ndarray:
    """Allocate an array that starts at a multiple of 64 bytes, so that XLA on CPU uses it without a copy (jax 0.10)."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    begin = -memory.ctypes.data % 64
    return memory[begin : begin + size].view(dtype).reshape(shape)


@contextmanager
def _opened(folder: Path) -> Iterator[_Opened]:
    """Open a folder and check the names and shapes of its arrays against its `config.json`."""
    source = str(folder / CONFIG)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder} {what}: give a Hugging Face folder.")
    content = model_folder.read_json(folder / CONFIG)
    if "model_type" not in content and {"format_version", "family"} & set(content):
        raise CheckpointError(
            f"{folder} is already a model folder of sct: load it with sct.load, or convert it to Hugging Face with "
            "--from=sct --to=hf."
        )
    family, config = hf_config.read(content, source)
    with open_weights(folder) as reader:
        files = list(reader.shapes)
        if family == "bert":
            pooler = any(re.fullmatch(r"(bert\.)?pooler\.dense\.\w+", key) for key in files)
            scores = any(key.startswith("cls.predictions.") for key in files)
            config = dataclasses.replace(config, pooler=pooler, mlm_head=scores)
        shapes = expected_shapes(family, config)
        entries = hf_maps.entries(family, config, shapes)
        expected = {
            name: jax.ShapeDtypeStruct(entry.shape(shapes[path].shape), jnp.float32)
            for path, entry in entries.items()
            for name in entry.names
        }
        keys = hf_maps.resolve(family, files, set(expected), str(folder))
        _settle_copies(family, config, reader, keys, str(folder))
        head = FAMILIES[family].head
        if head in expected and head not in keys:
            raise CheckpointError(
                f"{folder} has no {head}, which holds the weights of the language-model head, but {CONFIG} says that "
                "the head does not share the weights of the token embeddings: give a folder of a model with a "
                "language-model head."
            )
        ignored = re.compile(FAMILIES[family].ignored)
        found = {
            name: reader.shapes[key]
            for name, key in keys.items()
            if name in expected or not ignored.fullmatch(name)
        }
        match(found, expected, str(folder))
        yield _Opened(family, config, reader, entries, keys, shapes)


def _settle_copies(
    family: str, config: Any, reader: FolderReader | TorchReader, keys: dict[str, str], source: str
) -> None:
    """Remove from `keys` the second copies of arrays that the files hold twice, such as a tied output head.

    Raises
    ------
    CheckpointError
        The two copies of an array differ.
    """
    for copy, original, compared in hf_maps.copies(family, config.tied):
        if copy not in keys or (family == "bert" and not config.mlm_head):
            continue
        other = keys.pop(copy)
        if original not in keys:
            keys[original] = other
        elif compared and not _equal(reader, keys[original], other):
            raise CheckpointError(
                f"{CONFIG} in {source} says that {copy} and {original} are the same array (tie_word_embeddings), but "
                "the two arrays differ: set tie_word_embeddings to false to use both arrays, or delete the wrong "
                "array."
            )


def _equal(reader: FolderReader | TorchReader, one: str, other: str) -> bool:
    """Return whether two arrays in the files are equal.

    The arrays are compared slice by slice to limit the use of memory.
    """
    shape = reader.shapes[one].shape
    if reader.shapes[other].shape != shape:
        return False
    rows = max(1, _COMPARED // max(1, int(np.prod(shape[1:]))))
    parts = (slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows))
    return all(np.array_equal(reader.part(one, (part,)), reader.part(other, (part,))) for part in parts)


def load(
    folder: str | os.PathLike[str],
    *,
    mesh: Mesh | None = None,
    rules: axes.AxisRules | None = None,
    dtype: str | None = None,
    genes: GeneVocabulary | None = None,
) -> Pretrained:
    """Load a Hugging Face folder. `sct.load` calls this for a `config.json` in the Hugging Face format.

    Parameters
    ----------
    folder
        Folder with `config.json` and the weights: `model.safetensors`, or `pytorch_model.bin` (needs the extra
        `torch`). The weights may be split into several files with an index. A tokenizer (`tokenizer.json` or
        `tokenizer.model`) is loaded too.
    mesh, rules, dtype, genes
        As in `sct.load`.

    Returns
    -------
    The model. `apply(input_ids=..., attention_mask=...)` returns `logits` float32 (B, T, V). For BERT, the outputs
    depend on which heads have weights in the folder.

    Raises
    ------
    CheckpointError
        The architecture is not supported, or the weights do not fit the architecture. The message lists all
        differences.
    MissingExtraError
        torch, or the library that reads the tokenizer, is needed but not installed.
    """
    folder = Path(folder).expanduser()
    if dtype is not None:
        check_choice("dtype", dtype, LOADED_DTYPES, error=CheckpointError)
    rules = fitting_rules(mesh, rules)
    with _opened(folder) as opened:
        where: dict[str, Any] = {}
        if mesh is not None:
            where = flatten(axes.shardings(boxed_shapes(opened.family, opened.config), mesh, rules))
        arrays = {path: _place(opened, path, where.get(path), dtype) for path in opened.shapes}
        made = _handle(folder, opened, arrays)
    if genes is not None and made.genes is not None:
        made.genes.check_same(genes, what=f"the model {folder}", other_what="the data")
    return made


def _place(opened: _Opened, path: str, sharding: Any, dtype: str | None) -> jax.Array:
    """Read one parameter and place it on its devices. Each device gets its own shard."""
    kind = jnp.dtype(dtype) if dtype else opened.dtype(path)
    if sharding is None:
        placed = jax.device_put(opened.read(path, None, kind))
    else:
        shape = opened.shapes[path].shape
        placed = jax.make_array_from_callback(shape, sharding, lambda index: opened.read(path, index, kind))
    # The copy to the device is asynchronous. Without waiting, several parameters would be in memory twice.
    return jax.block_until_ready(placed)


def _handle(folder: Path, opened: _Opened, arrays: Mapping[str, Any]) -> Pretrained:
    """Make a model from the arrays of a folder, and add the folder's tokenizer, genes and license."""
    tokenizer = Tokenizer.load(folder) if any((folder / name).is_file() for name in _TOKENIZERS) else None
    genes = GeneVocabulary.load(folder / GENES) if (folder / GENES).is_file() else None
    card = (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else ""
    found = {
        name: named[1].strip("\"'")
        for name in ("license", "license_name")
        if (named := re.search(rf"\A---\n(?:.*\n)*?{name}:[ \t]*(\S.*?)[ \t]*\n(?:.*\n)*?---\n", card))
    }
    license = found.get("license", "unknown")
    license = found.get("license_name", license) if license == "other" else license
    made = Pretrained(
        opened.family, opened.config, unflatten(dict(arrays)), genes, license=license, tokenizer=tokenizer
    )
    return dataclasses.replace(
        made, card=default_card(made, "## Origin\n\nConverted from a Hugging Face folder. " + NOTICE)
    )


def convert(
    folder: str | os.PathLike[str], output: str | os.PathLike[str], *, dtype: str = "float32"
) -> None:
    """Convert a Hugging Face folder to a model folder. At any time, memory holds at most one file of the new folder.

    Raises
    ------
    CheckpointError
        The input cannot be loaded (see `load`), or the output cannot be written.
    """
    folder = Path(folder).expanduser()
    with _opened(folder) as opened:

        def lazy(path: str) -> Lazy:
            kind = opened.dtype(path)
            return Lazy(opened.shapes[path].shape, kind, lambda: opened.read(path, None, kind))

        _handle(folder, opened, {path: lazy(path) for path in opened.shapes}).save_pretrained(
            output, dtype=dtype
        )


def tensors(model: Pretrained) -> dict[str, Lazy]:
    """Return the arrays of a model as a dict by Hugging Face name. Each array is computed only when it is used.

    Raises
    ------
    ConfigError
        The family has no Hugging Face format.
    CheckpointError
        The model has parameters that the format does not support, such as adapters.
    """
    check_choice(
        "the family",
        model.family,
        FAMILIES,
        advice="Hugging Face has no format for this family, so save a model folder with save_pretrained",
    )
    params = flatten(model.variables)
    entries = hf_maps.entries(model.family, model.config, params)
    pieces: dict[str, dict[int, str]] = {}
    for path, entry in entries.items():
        for name in entry.names:
            pieces.setdefault(name, {})[entry.piece] = path

    def lazy(name: str) -> Lazy:
        paths = [path for _, path in sorted(pieces[name].items())]
        entry = entries[paths[0]]
        layer = entry.names.index(name)

        def make() -> np.ndarray:
            values = [params[path][layer] if entry.stacked else params[path] for path in paths]
            return entry.join([np.asarray(jax.device_get(value)) for value in values])

        return Lazy(entry.shape(params[paths[0]].shape), params[paths[0]].dtype, make)

    return {name: lazy(name) for name in pieces}


def save(
    model: Pretrained,
    folder: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Save a model and its tokenizer as a Hugging Face folder, which `transformers` can load.

    The folder is written atomically and split into files like a model folder; see `Pretrained.save_pretrained` for the
    parameters. Weights and architecture are preserved exactly. Options that only affect training (initialization,
    rematerialization, compute dtype) are not saved, because the format has no fields for them.

    Raises
    ------
    ConfigError
        The family has no Hugging Face format, or the format does not support an option. The message names the option.
    CheckpointError
        The model has parameters that the format does not support, or the folder holds other files or cannot be written.
    """
    arrays = tensors(model)
    match(flatten(model.variables), expected_shapes(model.family, model.config), repr(model))
    config = {**hf_config.write(model.family, model.config, dtype), "sct_version": __version__}
    for role in ("bos", "eos", "pad"):
        number = getattr(model.tokenizer, role, None)
        if number is not None:
            config[f"{role}_token_id"] = number
    target = Path(folder).expanduser()
    card = model.card or default_card(model)
    model_folder.save(
        target, arrays, config, model.genes, model.tokenizer, card, dtype, shard_bytes, foreign=True
    )
