"""Match ordered tables of regular expressions to parameter paths.

These tables choose which parameters of a model are trained, and set the weight decay and learning rate of each
parameter. The first pattern that matches a path applies. A path that matches no pattern is an error. Otherwise, a layer
could silently get another value after it was renamed.
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
    """Flatten a nested dict of arrays to one dict with paths such as "params/stem/conv/kernel" as keys."""
    return traverse_util.flatten_dict(variables, sep="/")


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """Turn a dict with paths as keys into a nested dict: the inverse of `flatten`."""
    return traverse_util.unflatten_dict(flat, sep="/")


def resolve(rules: PathRules[T], paths: Iterable[str], what: str) -> dict[str, T]:
    """Return one value per path: the value of the first rule whose pattern matches the path (`re.search`).

    Parameters
    ----------
    rules
        Pairs of a regular expression and a value, in order.
    paths
        Paths of parameters.
    what
        Name that messages use for the rules, such as "learning rate".

    Raises
    ------
    ConfigError
        A path matches none of the rules, or a rule other than ".*" matches none of the paths (most likely a typing
        error).
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
            raise ConfigError(
                f"no {what} rule matches the parameter {path!r}: add a rule for this parameter, or a last rule with "
                "the pattern '.*' for all other parameters."
            )
    unused = [rules[i][0] for i in range(len(rules)) if i not in used and rules[i][0] != ".*"]
    if unused:
        raise ConfigError(f"the {what} rule {unused[0]!r} matches no parameter: correct or remove the rule.")
    return found
