"""Save and load the adapters of a model without the model itself. All kinds of adapters and all families are supported.

An adapter folder holds `adapters.json` and `adapters.safetensors`. `adapters.json` records the family and the weight
hash of the base model, so adapters cannot be loaded into a different model. The classifier of a fine-tuned model
(`sct.models.classifier`) and its labels are stored in the same folder.
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
from sct.models import adapters, classifier
from sct.nn import axes
from sct.nn.adapters import COLLECTION
from sct.nn.paths import flatten, unflatten
from sct.version import DISTRIBUTION, __version__
from sct.weights import model_folder
from sct.weights.peft.files import write
from sct.weights.pretrained import (
    ANNOTATION,
    FULL,
    Pretrained,
    boxed_shapes,
    fitting_rules,
    match,
    with_changed_outputs,
)

CONFIG, WEIGHTS = "adapters.json", "adapters.safetensors"
FORMAT_VERSION = 1
_SAVED = (COLLECTION, classifier.COLLECTION)


def base_of(model: Pretrained) -> Pretrained:
    """Return the model without its adapters and its classifier."""
    rest = {name: tree for name, tree in model.variables.items() if name not in _SAVED}
    return dataclasses.replace(model, variables=rest)


def check_native(model: Pretrained, what: str = "") -> None:
    """Raise `ConfigError` if a model already has adapters or a classifier. `what` names it in the message."""
    for name in _SAVED:
        if model.variables.get(name):
            raise ConfigError(
                f"{what or repr(model)} already has {'adapters' if name == COLLECTION else 'a classifier'}: use the "
                "pretrained model, without adapters and classifier."
            )


def _types(base: Pretrained) -> list[str]:
    """Return the names of the dtypes of a model's arrays, sorted and without repetition."""
    return sorted({str(value.dtype) for value in flatten(base.variables).values()})


def save(model: Pretrained, folder: str | os.PathLike[str]) -> None:
    """Write the adapters of a model to a folder, with its classifier if it has one.

    The write is atomic: an existing adapter folder is replaced only after the new one is complete.

    Parameters
    ----------
    model
        A model with adapters. The weights of the model itself are not written.
    folder
        Output folder. It must be new, empty, or an adapter folder.

    Raises
    ------
    ConfigError
        The model has neither adapters nor a classifier, or it was fine-tuned without a frozen base.
    CheckpointError
        The folder holds other files or cannot be written, or an adapter has NaN or infinity. No partial output remains.
    """
    kinds = {kind.name for _, kind, _ in adapters.adapters_of(model.variables)}
    own = {name: model.variables[name] for name in _SAVED if model.variables.get(name)}
    if not own:
        raise ConfigError(
            f"{model!r} has no adapters to write: add adapters first with sct.models.adapters.init."
        )
    record = model.data.get(ANNOTATION) if classifier.COLLECTION in own else None
    if record is not None and record.get("method") == FULL:
        raise ConfigError(
            f"{model!r} was fine-tuned with the method {FULL!r}, which changes the weights of the model, so a folder "
            "with adapters alone is not enough: save the whole model with model.save_pretrained."
        )
    arrays = {
        path: np.ascontiguousarray(jax.device_get(value)).reshape(value.shape)
        for path, value in flatten(own).items()
    }
    for path, value in arrays.items():
        if not model_folder.all_finite(value):
            raise CheckpointError(
                f"{path} has NaN or infinite values: the training has probably diverged, so save adapters from an "
                "earlier checkpoint."
            )
    base = base_of(model)
    config = {
        "format_version": FORMAT_VERSION,
        "sct_version": __version__,
        "family": model.family,
        "kinds": sorted(kinds),
        "base": base.fingerprint,
        "base_dtypes": _types(base),
        **({} if record is None else {ANNOTATION: dict(record), "data": _inputs_of(model)}),
    }
    write(Path(folder).expanduser(), arrays, config, (CONFIG, WEIGHTS))


def load(model: Pretrained, folder: str | os.PathLike[str]) -> Pretrained:
    """Load adapters, and a classifier if the folder has one, from a folder into a model.

    The parameters of the model do not change. On a mesh, adapters get the sharding of the layers that they adapt.

    Parameters
    ----------
    model
        The model on which the adapters were trained. Load it with the same dtype as in training.
    folder
        Adapter folder with `adapters.json` and `adapters.safetensors`.

    Returns
    -------
    The model with the adapters added to its variables.

    Raises
    ------
    ConfigError
        The model already has adapters or a classifier.
    CheckpointError
        The folder is damaged or was changed, or the adapters in the folder were trained on another model.
    """
    folder = Path(folder).expanduser()
    check_native(model)
    config = _read_config(folder)
    if config["family"] != model.family or config["base"] != model.fingerprint:
        types = _types(model)
        advice = "pass the model that the adapters were trained on"
        if config["family"] == model.family and config["base_dtypes"] != types:
            theirs = " and ".join(config["base_dtypes"])
            advice += f", loaded with dtype {theirs} instead of {' and '.join(types)}"
        raise CheckpointError(
            f"the adapters in {folder} were trained on a model of family {config['family']!r} with hash "
            f"{config['base']}, but {model!r} has hash {model.fingerprint}: {advice}."
        )
    boxed = boxed_shapes(model.family, model.config)
    with model_folder.FolderReader(folder, WEIGHTS) as reader:
        whole = classifier.beside(adapters.beside(boxed, reader.shapes), reader.shapes)
        made = {name: whole[name] for name in _SAVED if name in whole}
        expected = flatten(nn.unbox(made))
        match(reader.shapes, expected, str(folder / WEIGHTS))
        mesh = mesh_of(model)
        where: Mapping[str, Any] = {}
        if mesh is not None:
            where = flatten(axes.shardings(made, mesh, fitting_rules(mesh, None)))
        arrays = {name: reader.read(name, where.get(name), None) for name in expected}
    data = {**model.data, **config.get("data", {})}
    if ANNOTATION in config:
        data[ANNOTATION] = config[ANNOTATION]
    variables = {**model.variables, **unflatten(arrays)}
    return with_changed_outputs(model, variables=variables, data=data)


def _inputs_of(model: Pretrained) -> dict[str, Any]:
    """Return the data options that fine-tuning may set to another value than the training of the base model."""
    return {name: model.data[name] for name in ("cells_per_bag",) if name in model.data}


def mesh_of(model: Pretrained) -> Mesh | None:
    """Return the mesh of a model's weights, or None if the weights are not on a mesh."""
    for value in flatten(model.variables).values():
        sharding = getattr(value, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
            return sharding.mesh
    return None


def _read_config(folder: Path) -> dict[str, Any]:
    config, path = model_folder.read_json(folder / CONFIG), folder / CONFIG
    if config.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format_version {config.get('format_version')!r}, but this release reads only version "
            f"{FORMAT_VERSION}: upgrade with pip install --upgrade {DISTRIBUTION}."
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
        raise CheckpointError(
            f"{path} is damaged or was changed after it was written: restore it from a copy."
        )
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(
            f"{folder} has no {WEIGHTS}: the folder is incomplete, so copy or save it again."
        )
    if set(recorded) != {WEIGHTS} or first_changed(folder, recorded) is not None:
        raise CheckpointError(
            f"{folder / WEIGHTS} is damaged or was changed after it was written (its sha256 differs from the one in "
            f"{CONFIG}): restore it from a copy."
        )
    return config
