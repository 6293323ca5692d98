"""Registry of model families, by name.

To add a family from another package, call `register` before you read its configurations or load its models.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from typing import Any

from sct.errors import ConfigError
from sct.families.manifest import ABILITIES, Converter, Family, FamilyModel
from sct.models import registry
from sct.tasks.finetuning import FineTuning
from sct.weights.pretrained import Pretrained

__all__ = [
    "Converter",
    "Family",
    "FamilyModel",
    "require",
    "all_families",
    "converters",
    "finetuning",
    "model",
    "models",
    "register",
]

_BUILT_IN = ("sct", "cell2sentence", "zeromics", "scgpt")
_ADDED: dict[str, Family] = {}


@functools.cache
def _built_in() -> dict[str, Family]:
    found = [importlib.import_module(f"sct.families.{name}").FAMILY for name in _BUILT_IN]
    return {family.name: family for family in found}


def all_families() -> dict[str, Family]:
    """Return all built-in and registered families, as a dict by name."""
    return {**_built_in(), **_ADDED}


def register(family: Family) -> None:
    """Add a family. The architectures of the family can then be trained, loaded and used like built-in architectures.

    Registering a second family with the same name replaces the first one. Registering a built-in family again has no
    effect.

    Raises
    ------
    ConfigError
        Another family already uses the name of this family, or the name of one of its architectures, tasks or
        converters.
    """
    others = [each for name, each in all_families().items() if name not in _ADDED or name != family.name]
    for what, name, part in _components(family):
        for other in others:
            if any(name == taken and part is not owned for _, taken, owned in _components(other)):
                raise ConfigError(
                    f"the {what} name {name!r} is already used by the family {other.name!r}: choose another name."
                )
    if family.name in _built_in():
        return
    unregister(family)
    _ADDED[family.name] = family
    for name, each in family.models.items():
        registry.MODELS[name] = each.architecture


def _components(family: Family) -> list[tuple[str, str, Any]]:
    """Return all named components of a family, each as a tuple (type of component, name, component)."""
    models = [("architecture", name, each.architecture) for name, each in family.models.items()]
    tasks = [("task", kind.name, kind) for each in family.models.values() for kind in each.tasks]
    converters = [("converter", name, each) for name, each in family.converters.items()]
    # An architecture may have the name of its own family.
    own = [] if family.name in family.models else [("family", family.name, family)]
    return [*own, *models, *tasks, *converters]


def unregister(family: Family) -> None:
    """Remove a registered family. Do nothing if the name is not registered."""
    if _ADDED.pop(family.name, None) is not None:
        for name in family.models:
            registry.MODELS.pop(name, None)


def models() -> dict[str, FamilyModel]:
    """Return the architectures of all families, as a dict by name."""
    return {name: each for family in all_families().values() for name, each in family.models.items()}


def model(name: str) -> FamilyModel:
    """Return the architecture with the given name.

    Raises
    ------
    ConfigError
        No architecture has this name.
    """
    registry.family(name)
    return models()[name]


def require(handle: Pretrained, name: str) -> Any:
    """Return the object that implements an ability of a loaded model, such as embedding cells.

    Parameters
    ----------
    handle
        Loaded model.
    name
        Ability: a key of `sct.families.manifest.ABILITIES`.

    Raises
    ------
    ConfigError
        The architecture does not offer this ability, or this model was not trained for it.
    """
    assert name in ABILITIES
    own = model(handle.family)
    make = getattr(own, name)
    if make is None:
        able = [each for each in models().values() if getattr(each, name) is not None and each.config]
        configs = " or ".join(dict.fromkeys(each.config for each in able))
        offered = [ABILITIES[each] for each in own.abilities]
        can = f"can {', '.join(offered)}, but not {ABILITIES[name]}" if offered else "does not read cells"
        trained_with = f" (train one with {configs})" if configs else ""
        raise ConfigError(
            f"the model has the architecture {handle.family!r}, which {can}: use a model that can "
            f"{ABILITIES[name]}{trained_with}."
        )
    return make(handle)


def finetuning(handle: Pretrained) -> FineTuning:
    """Return how the models of an architecture are fine-tuned for cell types.

    Raises
    ------
    ConfigError
        The architecture is not fine-tuned.
    """
    own = model(handle.family)
    if own.finetune is None:
        able = [name for name, each in models().items() if each.finetune is not None]
        raise ConfigError(
            f"models of the architecture {handle.family!r} cannot be fine-tuned for cell types: use a model of "
            f"{', '.join(able)}."
        )
    return own.finetune


def converters() -> Mapping[str, Converter]:
    """Return the converters for the weight formats of other projects, as a dict by format name."""
    return {name: each for family in all_families().values() for name, each in family.converters.items()}
