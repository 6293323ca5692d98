"""Ordered tables of regular expressions over parameter paths.

Which parameters are trained, decayed or slowed down is always such a table: the first pattern that matches a
path decides, and a path that matches none is an error, so that a renamed layer cannot silently change group.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from flax import traverse_util

from sct.errors import ConfigError

T = TypeVar("T")
PathRules = Sequence[tuple[str, T]]


def flatten(variables: dict[str, Any]) -> dict[str, Any]:
    """Nested dict of arrays as one dict with paths like "params/stem/conv/kernel"."""
    return traverse_util.flatten_dict(variables, sep="/")


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """Inverse of `flatten`."""
    return traverse_util.unflatten_dict(flat, sep="/")


def resolve(rules: PathRules[T], paths: Iterable[str], what: str) -> dict[str, T]:
    """Value of the first rule whose pattern matches each path (`re.search`).

    Raises
    ------
    ConfigError
        A path that no rule matches, or a rule that matches no path (a typing error, most likely), named.
    """
    compiled = [(re.compile(pattern), value) for pattern, value in rules]
    found: dict[str, T] = {}
    used = set()
    for path in paths:
        for index, (pattern, value) in enumerate(compiled):
            if pattern.search(path):
                found[path] = value
                used.add(index)
                break
        else:
            raise ConfigError(f"no {what} rule matches the parameter {path!r}: add one, ('.*', ...) last.")
    unused = [rules[i][0] for i in range(len(rules)) if i not in used and rules[i][0] != ".*"]
    if unused:
        raise ConfigError(f"the {what} rule {unused[0]!r} matches no parameter: correct or remove it.")
    return found
