"""Families by name: the one place that knows which there are.

A family that is not of this package is added by `register`, before its configurations and models are read.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from typing import Any

from sct.errors import ConfigError
from sct.families.manifest import ABILITIES, Converter, Family, Model
from sct.models import registry
from sct.weights.pretrained import Pretrained

__all__ = [
    "Converter",
    "Family",
    "Model",
    "ability",
    "all_families",
    "converters",
    "model",
    "models",
    "register",
]

_BUILT_IN = ("sct", "cell2sentence", "zeromics")
_ADDED: dict[str, Family] = {}


@functools.cache
def _built_in() -> dict[str, Family]:
    found = [importlib.import_module(f"sct.families.{name}").FAMILY for name in _BUILT_IN]
    return {family.name: family for family in found}


def all_families() -> dict[str, Family]:
    """Families by name."""
    return {**_built_in(), **_ADDED}


def register(family: Family) -> None:
    """Add a family, whose architectures can then be trained, loaded and used like those of this package.

    Raises
    ------
    ConfigError
        There is another family, or an architecture of another, of the same name.
    """
    for name in (family.name, *family.models):
        taken = all_families().get(name) if name == family.name else None
        owner = next((each for each in all_families().values() if name in each.models), taken)
        if owner is not None and owner is not family:
            raise ConfigError(
                f"there is already a family or architecture {name!r} ({owner.name}): rename yours."
            )
    _ADDED[family.name] = family
    for name, each in family.models.items():
        registry.MODELS[name] = each.architecture


def unregister(family: Family) -> None:
    """Take out a family that was added."""
    del _ADDED[family.name]
    for name in family.models:
        del registry.MODELS[name]


def models() -> dict[str, Model]:
    """Architectures of all families by name."""
    return {name: each for family in all_families().values() for name, each in family.models.items()}


def model(name: str) -> Model:
    """Architecture of a name; `ConfigError` where there is none."""
    registry.family(name)
    return models()[name]


def ability(handle: Pretrained, name: str) -> Any:
    """What does something by a model: see the attributes of `sct.families.manifest.Model`.

    Raises
    ------
    ConfigError
        A model of this architecture cannot do it, or did not learn it.
    """
    assert name in ABILITIES
    own = model(handle.family)
    make = getattr(own, name)
    if make is None:
        able = [each for each in models().values() if getattr(each, name) is not None and each.config]
        configs = " or ".join(dict.fromkeys(each.config for each in able))
        words = [ABILITIES[each] for each in own.abilities]
        can = f"can {' and '.join(words)}, but not {ABILITIES[name]}" if words else "reads no cells"
        raise ConfigError(
            f"the model is of the family {handle.family!r}, which {can}: give one that can {ABILITIES[name]}, such as "
            f"of {configs}."
        )
    return make(handle)


def converters() -> Mapping[str, Converter]:
    """Foreign formats of weights by name."""
    return {name: each for family in all_families().values() for name, each in family.converters.items()}
