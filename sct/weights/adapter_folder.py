"""Folders of adapters alone, of any kind and family, for the one model that they were trained on.

A folder holds `adapters.json` and `adapters.safetensors`. The first names the model by its family and the hash of its
weights, so that adapters are never put beside another one.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from sct.errors import CheckpointError, ConfigError
from sct.hashes import SEAL, first_changed, is_changed
from sct.models import adapters
from sct.nn import axes
from sct.nn.adapters import COLLECTION
from sct.nn.paths import flatten, unflatten
from sct.version import DISTRIBUTION, __version__
from sct.weights import model_folder
from sct.weights.peft.files import write
from sct.weights.pretrained import Pretrained, boxed_shapes, fitting_rules, match

CONFIG, WEIGHTS = "adapters.json", "adapters.safetensors"
FORMAT_VERSION = 1


def _base(model: Pretrained) -> Pretrained:
    """The model without its adapters."""
    rest = {name: tree for name, tree in model.variables.items() if name != COLLECTION}
    return dataclasses.replace(model, variables=rest)


def _types(base: Pretrained) -> list[str]:
    return sorted({str(value.dtype) for value in flatten(base.variables).values()})


def save(model: Pretrained, folder: str | os.PathLike[str]) -> None:
    """Write a model's adapters; a folder of adapters that is there is replaced when the new one is complete.

    Parameters
    ----------
    model
        A model with adapters; its own weights are not written.
    folder
        Where to write. A folder that holds anything else than the files of adapters is refused.

    Raises
    ------
    ConfigError
        The model has no adapters.
    CheckpointError
        The folder holds other files, or cannot be written, or numbers are not finite; nothing is left of the attempt.
    """
    kinds = {kind.name for _, kind, _ in adapters.adapters_of(model.variables)}
    if not kinds:
        raise ConfigError(f"{model!r} has no adapters to write: make some (sct.models.adapters.init).")
    arrays = {
        f"{COLLECTION}/{path}": np.ascontiguousarray(jax.device_get(value)).reshape(value.shape)
        for path, value in flatten(model.variables[COLLECTION]).items()
    }
    for path, value in arrays.items():
        if not model_folder.all_finite(value):
            raise CheckpointError(
                f"the model's {path} holds numbers that are not finite: save adapters whose training went well."
            )
    base = _base(model)
    config = {
        "format_version": FORMAT_VERSION,
        "sct_version": __version__,
        "family": model.family,
        "kinds": sorted(kinds),
        "base": base.fingerprint,
        "base_dtypes": _types(base),
    }
    write(Path(folder).expanduser(), arrays, config, (CONFIG, WEIGHTS))


def load(model: Pretrained, folder: str | os.PathLike[str]) -> Pretrained:
    """Model with the adapters of a folder beside its parameters, which stay as they are.

    Where the model lies on a mesh the adapters are placed as its layers are.

    Parameters
    ----------
    model
        The model that the adapters were trained on, with weights of the type they had then.
    folder
        Holds `adapters.json` and `adapters.safetensors`.

    Raises
    ------
    ConfigError
        The model has adapters already.
    CheckpointError
        The folder is damaged or was changed, or its adapters were trained on another model.
    """
    folder = Path(folder).expanduser()
    if model.variables.get(COLLECTION):
        raise ConfigError(f"{model!r} has adapters already: give the model without them.")
    config = _read_config(folder)
    if config["family"] != model.family or config["base"] != model.fingerprint:
        types = _types(model)
        advice = "give the model that they were trained on"
        if config["family"] == model.family and config["base_dtypes"] != types:
            theirs = " and ".join(config["base_dtypes"])
            advice += f", with weights of the type {theirs} (these are {' and '.join(types)})"
        raise CheckpointError(
            f"the adapters in {folder} were trained on another model (family {config['family']}, hash "
            f"{config['base']}) than {model!r} (hash {model.fingerprint}): {advice}."
        )
    boxed = boxed_shapes(model.family, model.config)
    with model_folder.FolderReader(folder, WEIGHTS) as reader:
        made = adapters.beside(boxed, reader.shapes).get(COLLECTION, {})
        expected = flatten(nn.unbox({COLLECTION: made}))
        match(reader.shapes, expected, str(folder / WEIGHTS))
        mesh = _mesh(model)
        where: Mapping[str, Any] = {}
        if mesh is not None:
            where = flatten(axes.shardings({COLLECTION: made}, mesh, fitting_rules(mesh, None)))
        arrays = {name: reader.read(name, where.get(name), None) for name in expected}
    return dataclasses.replace(model, variables={**model.variables, **unflatten(arrays)})


def _mesh(model: Pretrained) -> Mesh | None:
    """Mesh that a model's weights lie on."""
    for value in flatten(model.variables).values():
        sharding = getattr(value, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
            return sharding.mesh
    return None


def _read_config(folder: Path) -> dict[str, Any]:
    config, path = model_folder.read_json(folder / CONFIG), folder / CONFIG
    if config.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} describes adapters of format {config.get('format_version')!r}, but this version reads format "
            f"{FORMAT_VERSION}: pip install --upgrade {DISTRIBUTION}."
        )
    recorded = config.get(model_folder.FILES)
    texts = all(isinstance(config.get(name), str) for name in ("family", "base"))
    types = config.get("base_dtypes")
    types_are_texts = isinstance(types, list) and all(isinstance(name, str) for name in types)
    if (
        is_changed(config)
        or SEAL not in config
        or not texts
        or not types_are_texts
        or not isinstance(recorded, dict)
    ):
        raise CheckpointError(f"{path} is damaged or was changed after it was written: restore it.")
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder} has no {WEIGHTS}: the folder is incomplete.")
    if set(recorded) != {WEIGHTS} or first_changed(folder, recorded) is not None:
        raise CheckpointError(
            f"{folder / WEIGHTS} is damaged or was changed after it was written (its sha256 is not the one in "
            f"{CONFIG}): restore it."
        )
    return config
