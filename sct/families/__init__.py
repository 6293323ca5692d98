"""Families by name: the one place that knows which there are.

A family that is not of this package is added by `register`, before its configurations and models are read.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from typing import Any

from sct.errors import ConfigError
from sct.families.manifest import ABILITIES, Converter, Family, FamilyModel
from sct.models import registry
from sct.weights.pretrained import Pretrained

__all__ = [
    "Converter",
    "Family",
    "FamilyModel",
    "require",
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

    Registering the same name again replaces the earlier family.

    Raises
    ------
    ConfigError
        A name is taken: of the family, an architecture, a task or a converter.
    """
    others = [each for name, each in all_families().items() if name not in _ADDED or name != family.name]
    for what, name, part in _named(family):
        for other in others:
            if any(name == taken and part is not owned for _, taken, owned in _named(other)):
                raise ConfigError(
                    f"the {what} name {name!r} is taken by the family {other.name!r}: choose another name."
                )
    if family.name in _built_in():
        return
    unregister(family)
    _ADDED[family.name] = family
    for name, each in family.models.items():
        registry.MODELS[name] = each.architecture


def _named(family: Family) -> list[tuple[str, str, Any]]:
    """What a family brings under a name: (what it is, name, the thing itself)."""
    models = [("architecture", name, each.architecture) for name, each in family.models.items()]
    tasks = [("task", kind.name, kind) for each in family.models.values() for kind in each.tasks]
    converters = [("converter", name, each) for name, each in family.converters.items()]
    # An architecture may have the name of its own family.
    own = [] if family.name in family.models else [("family", family.name, family)]
    return [*own, *models, *tasks, *converters]


def unregister(family: Family) -> None:
    """Take out a family that was added."""
    if _ADDED.pop(family.name, None) is not None:
        for name in family.models:
            registry.MODELS.pop(name, None)


def models() -> dict[str, FamilyModel]:
    """Architectures of all families by name."""
    return {name: each for family in all_families().values() for name, each in family.models.items()}


def model(name: str) -> FamilyModel:
    """Architecture of a name; `ConfigError` where there is none."""
    registry.family(name)
    return models()[name]


def require(handle: Pretrained, name: str) -> Any:
    """Object that gives a model an ability; names: `sct.families.manifest.ABILITIES`.

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
        can = f"can {', '.join(words)}, but not {ABILITIES[name]}" if words else "reads no cells"
        such = f" (trained by {configs})" if configs else ""
        raise ConfigError(
            f"the model has the architecture {handle.family!r}, which {can}: give one that can {ABILITIES[name]}{such}."
        )
    return make(handle)


def converters() -> Mapping[str, Converter]:
    """Foreign formats of weights by name."""
    return {name: each for family in all_families().values() for name, each in family.converters.items()}
