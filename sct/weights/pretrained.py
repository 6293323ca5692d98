"""Model folders: `config.json`, `model.safetensors`, `genes.tsv`, `README.md`.

A folder is all that others need: any program that reads safetensors can read it without this project.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sct.data.genes import GeneVocabulary
from sct.errors import CheckpointError, MissingExtraError
from sct.models import registry
from sct.nn import axes
from sct.nn.paths import flatten, unflatten
from sct.version import __version__

FORMAT_VERSION = 1
CONFIG, WEIGHTS, GENES, CARD = "config.json", "model.safetensors", "genes.tsv", "README.md"
INDEX = f"{WEIGHTS}.index.json"
SHARD_BYTES = 5_000_000_000
_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model with its weights and genes, ready to be applied; every family's handle has this shape.

    Attributes
    ----------
    family, config
        Name in `sct.models.registry`, and the architecture.
    variables
        Nested dict of arrays.
    genes
        Vocabulary of the gene positions.
    card
        Text of the model card.
    license
        Licence of the weights, as the card states it.
    """

    family: str
    config: Any
    variables: dict[str, Any]
    genes: GeneVocabulary
    card: str = ""
    license: str = "unknown"

    def apply(self, *, intermediates: Sequence[str] = (), **inputs: Any) -> dict[str, jax.Array]:
        """Run the model; compiled once per shape of the inputs.

        Parameters
        ----------
        intermediates
            Names of activations to return beside the outputs.
        inputs
            Arrays by name, as the family's module takes them. For sCT: `tokens` integers (B, K, G) and
            `coordinates` (B, K, 2) or None; the result has `logits` float32 (B, K, G, levels + 2) and
            `cell_embedding` float32 (B, K, D), and, where asked for, `conv_out`, `transformer_out` and
            `deconv_out`.

        Raises
        ------
        CheckpointError
            An intermediate that the family does not have.
        """
        module = registry.family(self.family)[1]
        unknown = sorted(set(intermediates) - set(module.intermediates))
        if unknown:
            raise CheckpointError(
                f"there is no intermediate {unknown[0]!r}: choose from {', '.join(module.intermediates)}."
            )
        wanted = (*module.outputs, *sorted(set(intermediates)))
        arrays = {name: jnp.asarray(value) for name, value in inputs.items() if value is not None}
        return _compiled(self.family, self.config, wanted)(self.variables, arrays)

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, dtype: str = "float32", shard_bytes: int = SHARD_BYTES
    ) -> None:
        """Write a model folder, whole or not at all; an existing model folder is replaced.

        Parameters
        ----------
        folder
            Where to write. A folder that holds anything else than a model is refused.
        dtype
            "float32" or "bfloat16": type of the floating-point arrays in the file.
        shard_bytes
            Size above which the weights are split over several files, as Hugging Face does.
        """
        save(Path(folder).expanduser(), self, dtype, shard_bytes)


@functools.lru_cache(maxsize=32)
def _compiled(family: str, config: Any, wanted: tuple[str, ...]) -> Callable[..., dict[str, jax.Array]]:
    module = registry.family(family)[1](config)

    def run(variables: dict[str, Any], inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        outputs = cast(dict[str, jax.Array], module.apply(variables, **inputs))
        return {name: outputs[name] for name in wanted}

    return jax.jit(run)


def save(folder: Path, model: Pretrained, dtype: str = "float32", shard_bytes: int = SHARD_BYTES) -> None:
    """Write a model folder; see `Pretrained.save_pretrained`."""
    if dtype not in _DTYPES:
        raise CheckpointError(f"dtype {dtype!r} is not one of {', '.join(_DTYPES)}.")
    if folder.exists() and not (folder / CONFIG).is_file() and any(folder.iterdir()):
        raise CheckpointError(f"{folder} holds other files and no model: choose an empty or new folder.")
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write(temporary, model, dtype, shard_bytes)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
        os.replace(temporary, folder)
        shutil.rmtree(old)
    else:
        os.replace(temporary, folder)


def _write(temporary: Path, model: Pretrained, dtype: str, shard_bytes: int) -> None:
    from safetensors.numpy import save_file

    flat = flatten(model.variables)
    shards = list(_shards(flat, dtype, shard_bytes))
    index: dict[str, str] = {}
    for number, paths in enumerate(shards, 1):
        name = WEIGHTS
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # One shard at a time is on the host.
        arrays = {path: _host(flat[path], dtype) for path in paths}
        save_file(arrays, temporary / name, metadata={"format": "sct", "family": model.family})
        index |= dict.fromkeys(paths, name)
    if len(shards) > 1:
        total = sum(_bytes(value, dtype) for value in flat.values())
        text = {"metadata": {"total_size": total}, "weight_map": index}
        (temporary / INDEX).write_text(json.dumps(text, indent=1) + "\n")
    model.genes.save(temporary / GENES)
    config = {
        "format_version": FORMAT_VERSION,
        "sct_version": __version__,
        "family": model.family,
        "dtype": dtype,
        "license": model.license,
        "vocabulary_hash": model.genes.hash,
        "model": dataclasses.asdict(model.config),
    }
    (temporary / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    (temporary / CARD).write_text(model.card or default_card(model), encoding="utf-8")


def _is_float(value: Any) -> bool:
    return bool(jnp.issubdtype(value.dtype, jnp.floating))


def _host(value: Any, dtype: str) -> np.ndarray:
    array = np.asarray(jax.device_get(value))
    return np.ascontiguousarray(array.astype(jnp.dtype(dtype)) if _is_float(array) else array)


def _bytes(value: Any, dtype: str) -> int:
    width = jnp.dtype(dtype).itemsize if _is_float(value) else value.dtype.itemsize
    return int(np.prod(value.shape)) * width


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


def default_card(model: Pretrained, text: str = "") -> str:
    """Model card: what it is, how to load it, its licence, and `text` about how it was made."""
    return "\n".join(
        [
            "---", "library_name: sct", f"license: {model.license}", "tags: [single-cell]", "---", "",
            f"# {model.family} model", "",
            f"{len(model.genes):,} genes ({model.genes.name}, hash `{model.genes.hash[:16]}`), "
            f"{sum(int(np.prod(v.shape)) for v in flatten(model.variables).values()):,} parameters, "
            f"written by sct {__version__}.", "",
            "```python", "import sct", 'model = sct.load("THIS_FOLDER")', "```", "",
            text, "", "## Licence", "", model.license, "",
        ]
    )  # fmt: skip


def load(
    path: str | os.PathLike[str],
    *,
    mesh: Mesh | None = None,
    rules: axes.Rules | None = None,
    dtype: str | None = None,
    genes: GeneVocabulary | None = None,
) -> Pretrained:
    """Load a model (public as `sct.load`).

    Parameters
    ----------
    path
        A model folder, a run folder (its best checkpoint), or the id of a model on the Hugging Face hub.
    mesh, rules
        Place the arrays on a mesh by their logical axes (`sct.train.sharding.RULES`), each device reading its
        own part; by default they go whole to the default device.
    dtype
        Type of the floating-point arrays; by default that of the file.
    genes
        Vocabulary that the caller's data has; refused where its hash is another.

    Raises
    ------
    CheckpointError
        The folder is missing, damaged, or its arrays are not those of its architecture; all are listed.
    StoreError
        The vocabularies differ.
    """
    from sct.weights import run_folder

    folder = locate(path)
    if run_folder.is_run(folder):
        return run_folder.load(folder, mesh=mesh, rules=rules, dtype=dtype, genes=genes)
    config = read_config(folder)
    model = registry.model_config(config["family"], config["model"])
    vocabulary = GeneVocabulary.load(folder / GENES)
    if vocabulary.hash != config.get("vocabulary_hash"):
        raise CheckpointError(
            f"{folder / GENES} is not the vocabulary that {CONFIG} names (hash {vocabulary.hash[:16]}, not "
            f"{str(config.get('vocabulary_hash'))[:16]}): the folder was changed."
        )
    if genes is not None:
        vocabulary.check_same(genes, what=f"the model {folder}", other_what="the data")
    boxed = boxed_shapes(config["family"], model)
    expected = flatten(nn.unbox(boxed))
    with _Reader(folder) as reader:
        match(reader.shapes, expected, str(folder))
        where = flatten(axes.shardings(boxed, mesh, rules or {})) if mesh is not None else {}
        arrays = {name: reader.read(name, where.get(name), dtype) for name in expected}
    card = (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else ""
    return Pretrained(
        config["family"], model, unflatten(arrays), vocabulary, card, config.get("license", "unknown")
    )


def boxed_shapes(family: str, config: Any) -> Any:
    """Variables of a family as shapes with logical axis names; nothing is allocated."""
    module = registry.family(family)[1]
    return jax.eval_shape(lambda key: module(config).init(key, **module.example(config)), jax.random.key(0))


def expected_shapes(family: str, config: Any) -> dict[str, Any]:
    """Shapes of a family's variables by path."""
    return flatten(nn.unbox(boxed_shapes(family, config)))


class _Reader:
    """Arrays of a model folder, read one by one, each device's part alone where they are placed on a mesh."""

    def __init__(self, folder: Path):
        self.folder = folder
        index = folder / INDEX
        try:
            names = [WEIGHTS]
            if index.is_file():
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index} is damaged ({error}).") from error
        self._files = names
        self._open: list[Any] = []
        self.shapes: dict[str, jax.ShapeDtypeStruct] = {}
        self._owner: dict[str, Any] = {}

    def __enter__(self) -> _Reader:
        from safetensors import SafetensorError, safe_open

        for name in self._files:
            try:
                file = safe_open(self.folder / name, framework="numpy")
                file.__enter__()
                self._open.append(file)
                for key in file.keys():  # noqa: SIM118 (not a mapping)
                    part = file.get_slice(key)
                    self.shapes[key] = jax.ShapeDtypeStruct(tuple(part.get_shape()), np.float32)
                    self._owner[key] = file
            except FileNotFoundError:
                raise CheckpointError(f"{self.folder} has no {name}: the folder is incomplete.") from None
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{self.folder / name} is damaged ({error}).") from error
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._open:
            file.__exit__(*error)

    def read(self, name: str, sharding: Any, dtype: str | None) -> jax.Array:
        """Read one array onto its devices."""
        part = self._owner[name].get_slice(name)

        def of(index: tuple[slice, ...] | None) -> np.ndarray:
            value = part[index] if index else part[...]
            return value.astype(jnp.dtype(dtype)) if dtype and _is_float(value) else value

        shape = self.shapes[name].shape
        if sharding is None:
            return jnp.asarray(of((slice(None),) * len(shape)))
        return jax.make_array_from_callback(shape, sharding, of)


def locate(path: str | os.PathLike[str]) -> Path:
    """Model folder of a path: the folder itself, the `model` folder of a run, the run folder, or a hub id.

    Raises
    ------
    CheckpointError
        Neither is there.
    MissingExtraError
        It looks like a hub id and huggingface_hub is not installed.
    """
    from sct.weights import run_folder

    folder = Path(path).expanduser()
    for candidate in (folder, folder / "model"):
        weights = (candidate / WEIGHTS).is_file() or (candidate / INDEX).is_file()
        if (candidate / CONFIG).is_file() and weights:
            return candidate
    if run_folder.is_run(folder):
        return folder
    if not folder.exists():
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
            return _download(str(path))
        raise CheckpointError(f"{folder} does not exist: give a model folder, a run folder or a hub id.")
    raise CheckpointError(
        f"{folder} is neither a model folder ({CONFIG}, {WEIGHTS}) nor a run folder with a checkpoint: train "
        "first, or give another folder."
    )


def _download(name: str) -> Path:
    """Fetch a model of the Hugging Face hub."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingExtraError(
            f"there is no folder {name!r}, and to look for it on the Hugging Face hub a package is missing: "
            'pip install "sct[hub]".'
        ) from None
    try:
        return Path(snapshot_download(name))
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"there is no folder {name!r}, and it could not be fetched from the Hugging Face hub ({reason}): "
            "check the id and the connection, or give a local folder."
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a model folder; `CheckpointError` where it is missing or unreadable."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a model folder: it has no {CONFIG}.") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): the folder is damaged.") from error
    if config.get("format_version") != FORMAT_VERSION or config.get("family") not in registry.MODELS:
        raise CheckpointError(
            f"{path} describes format {config.get('format_version')} of family {config.get('family')!r}, but "
            f"this version reads format {FORMAT_VERSION} of {', '.join(registry.MODELS)}: upgrade sct."
        )
    return config


def match(
    loaded: Mapping[str, Any], expected: Mapping[str, Any], source: str, new: Sequence[str] = ()
) -> None:
    """Check that loaded arrays are those that a model has, by path and shape.

    Parameters
    ----------
    loaded, expected
        Arrays or shapes by path.
    source
        Where they come from, for the message.
    new
        Regular expressions of paths that may be absent and keep their initial value.

    Raises
    ------
    CheckpointError
        With a list of the differences: "-" missing, "+" not in the model, "~" another shape.
    """
    differences = [
        f"- {path} {tuple(expected[path].shape)}"
        for path in sorted(set(expected) - set(loaded))
        if not any(re.search(pattern, path) for pattern in new)
    ]
    differences += [f"+ {path} {tuple(loaded[path].shape)}" for path in sorted(set(loaded) - set(expected))]
    differences += [
        f"~ {path} {tuple(loaded[path].shape)} instead of {tuple(expected[path].shape)}"
        for path in sorted(set(loaded) & set(expected))
        if tuple(loaded[path].shape) != tuple(expected[path].shape)
    ]
    if differences:
        shown = "\n  ".join(differences[:40]) + ("\n  ..." if len(differences) > 40 else "")
        raise CheckpointError(
            f"{source} does not fit the model, {len(differences)} parameters differ (- missing, + not in the "
            f"model, ~ another shape):\n  {shown}"
        )
