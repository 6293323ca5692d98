"""Check options and arrays. Each error message is one sentence: what was found, what is expected, what to do.

All checks have these arguments: `name` is the option as the user wrote it, or the name of the array. `advice` replaces
the default "what to do". `error` is the class of the error: `ConfigError` for options, `DataError` for arrays and
tables.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Sequence, Sized
from numbers import Integral, Real
from typing import Any

from sct.errors import ConfigError, DataError, SctError

_SHOWN = 20  # maximum number of choices in a message


def check_number(
    name: str, value: Any, *, whole: bool = False, error: type[SctError] = ConfigError, advice: str = ""
) -> None:
    """Require a finite number. With `whole`, the number must be an integer. A bool is not accepted.

    Raises
    ------
    ConfigError
        The check fails. If the argument `error` is given, this class is raised instead.
    """
    kind = "a whole number" if whole else "a finite number"
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()  # a scalar of NumPy or JAX
    known = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    if not known or not (isinstance(value, Integral) or math.isfinite(value)):
        raise _refusal(f"{name} is {_shown(value)}", f"must be {kind}", advice or f"set it to {kind}", error)


def check_at_least(
    name: str,
    value: Any,
    least: float,
    *,
    most: float | None = None,
    whole: bool = True,
    error: type[SctError] = ConfigError,
    advice: str = "",
) -> None:
    """Require an integer from `least` to `most`. With `whole=False`, fractions are also allowed.

    Raises
    ------
    ConfigError
        The check fails. If the argument `error` is given, this class is raised instead.
    """
    check_number(name, value, whole=whole, error=error, advice=advice)
    if value < least or (most is not None and value > most):
        between = most is not None and f"between {least} and {most}"
        expected = between or f"at least {least}"
        to_do = f"set it {between}" if between else f"set it to {least} or more"
        raise _refusal(f"{name} is {_shown(value)}", f"must be {expected}", advice or to_do, error)


def check_positive(
    name: str,
    value: Any,
    *,
    most: float | None = None,
    error: type[SctError] = ConfigError,
    advice: str = "",
) -> None:
    """Require a number that is above 0 and at most `most`. Fractions are allowed.

    Raises
    ------
    ConfigError
        The check fails. If the argument `error` is given, this class is raised instead.
    """
    check_number(name, value, error=error, advice=advice)
    if value <= 0 or (most is not None and value > most):
        limit = "" if most is None else f" and at most {most:g}"
        to_do = advice or f"set it above 0{limit}"
        raise _refusal(f"{name} is {_shown(value)}", f"must be positive{limit}", to_do, error)


def check_share(
    name: str,
    value: Any,
    *,
    zero: bool = True,
    one: bool = True,
    error: type[SctError] = ConfigError,
    advice: str = "",
) -> None:
    """Require a number between 0 and 1. `zero` and `one` say whether 0 and 1 are allowed.

    Raises
    ------
    ConfigError
        The check fails. If the argument `error` is given, this class is raised instead.
    """
    check_number(name, value, error=error, advice=advice)
    if not ((value >= 0 if zero else value > 0) and (value <= 1 if one else value < 1)):
        interval = f"{'[' if zero else '('}0, 1{']' if one else ')'}"
        ends = "between 0 and 1"
        if not (zero and one):
            ends = f"{'to 0 or more' if zero else 'above 0'}, and {'at most' if one else 'below'} 1"
        to_do = advice or f"set it {ends}"
        raise _refusal(f"{name} is {_shown(value)}", f"must be in {interval}", to_do, error)


def check_multiple(
    name: str, value: int, of: int, what: str = "", *, error: type[SctError] = ConfigError, advice: str = ""
) -> None:
    """Require a multiple of the number `of`. `what` is the name of this number in the error message.

    Raises
    ------
    ConfigError
        The check fails. If the argument `error` is given, this class is raised instead.
    """
    if value % of:
        below, above = value // of * of, -(-value // of) * of
        to_do = advice or f"use {f'{below} or {above}' if below > 0 else above}"
        raise _refusal(
            f"{name} is {value}", f"must be a multiple of {f'{what} ({of})' if what else of}", to_do, error
        )


def check_choice(
    name: str, value: Any, choices: Iterable[Any], *, error: type[SctError] = ConfigError, advice: str = ""
) -> None:
    """Require one of `choices`. The error message suggests the choice with the most similar spelling.

    Raises
    ------
    ConfigError
        The check fails. If the argument `error` is given, this class is raised instead.
    """
    known = list(choices)
    if isinstance(value, Hashable) and value in known:
        return
    if not known:
        raise _refusal(
            f"{name} is {_shown(value)}", "there is nothing to choose from", advice or "leave it out", error
        )
    listed = ", ".join(map(repr, known[:_SHOWN])) + ", ..." * (len(known) > _SHOWN)
    to_do = advice or "choose one of these"
    near = nearest(value, known)
    if near and not advice:
        to_do = f"did you mean {near[0]!r}"
    elif near:
        listed += f" (nearest: {near[0]!r})"
    one_of = "one of " * (len(known) > 1)
    raise _refusal(f"{name} is {_shown(value)}", f"must be {one_of}{listed}", to_do, error)


def check_type(
    name: str,
    value: Any,
    kind: type | tuple[type, ...],
    what: str = "",
    *,
    error: type[SctError] = ConfigError,
    advice: str = "",
) -> None:
    """Require an instance of `kind`. `what` describes this type in the error message. A bool is not a number.

    Raises
    ------
    ConfigError
        The check fails. If the argument `error` is given, this class is raised instead.
    """
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds):
        return
    expected = what or " or ".join(each.__name__ for each in kinds)
    to_do = advice or f"give {expected}"
    plain = value is None or isinstance(value, str | Real)
    found = f"{name} is {f'{_shown(value)}, ' * plain}of type {type(value).__name__}"
    raise _refusal(found, f"must be {expected}", to_do, error)


def check_text(name: str, value: Any, *, error: type[SctError] = ConfigError, advice: str = "") -> None:
    """Require a string with at least one character that is not white space.

    Raises
    ------
    ConfigError
        The check fails. If the argument `error` is given, this class is raised instead.
    """
    if not isinstance(value, str) or not value.strip():
        to_do = advice or "give a text"
        raise _refusal(f"{name} is {_shown(value)}", "must be a non-empty string", to_do, error)


def check_not_empty(
    name: str, values: Sized, *, least: int = 1, error: type[SctError] = ConfigError, advice: str = ""
) -> None:
    """Require a collection of at least `least` entries.

    Raises
    ------
    ConfigError
        The check fails. If the argument `error` is given, this class is raised instead.
    """
    if len(values) < least:
        found = (
            f"{name} has {len(values)} {'entry' if len(values) == 1 else 'entries'}"
            if len(values)
            else f"{name} is empty"
        )
        expected = "at least one entry" if least == 1 else f"at least {least} entries"
        to_do = advice or f"give {'at least one' if least == 1 else f'{least} or more'}"
        raise _refusal(found, f"must have {expected}", to_do, error)


def check_distinct(
    name: str, values: Iterable[Hashable], *, error: type[SctError] = ConfigError, advice: str = ""
) -> None:
    """Require a collection without repeated entries.

    Raises
    ------
    ConfigError
        The check fails. If the argument `error` is given, this class is raised instead.
    """
    repeated = [value for value, number in Counter(values).items() if number > 1]
    if repeated:
        others = f" (and {len(repeated) - 1:,} more)" * (len(repeated) > 1)
        to_do = advice or "remove the repeated entries"
        raise _refusal(
            f"{name} has {_shown(repeated[0])}{others} twice", "must have no repeated entries", to_do, error
        )


def check_one_each(
    what: str, found: int, of: str, expected: int, *, error: type[SctError] = DataError, advice: str = ""
) -> None:
    """Require that the number of items of one kind (`found`) equals the number of items of another kind (`expected`).

    `what` and `of` are the names of the two kinds in the message, both plural.

    Raises
    ------
    DataError
        The check fails. If the argument `error` is given, this class is raised instead.
    """
    if found != expected:
        to_do = advice or f"give {expected:,} {what}, in the order of the {of}"
        raise _refusal(
            f"there are {found:,} {what} for {expected:,} {of}", "there must be one for each", to_do, error
        )


def check_shape(
    name: str,
    array: Any,
    expected: Sequence[int | str | tuple[int, str]],
    *,
    empty: bool = False,
    error: type[SctError] = DataError,
    advice: str = "",
) -> None:
    """Require an array with the shape `expected`.

    Each axis of `expected` is a size (`5`), a size with a name (`(5, "cells")`), or a name for any size above 0
    (`"genes"`; with `empty`, 0 is also allowed).

    Raises
    ------
    DataError
        The check fails. If the argument `error` is given, this class is raised instead.
    """
    shape = tuple(map(int, array.shape))
    sizes = [
        axis if isinstance(axis, Integral) else axis[0] if isinstance(axis, tuple) else None
        for axis in expected
    ]
    if len(shape) == len(sizes) and all(
        (empty or found > 0) if size is None else found == size
        for found, size in zip(shape, sizes, strict=True)
    ):
        return
    words = [
        f"{axis:,}"
        if isinstance(axis, Integral)
        else f"{axis[0]:,} {axis[1]}"
        if isinstance(axis, tuple)
        else str(axis)
        for axis in expected
    ]
    form = f"({', '.join(words)}{',' * (len(words) == 1)})"
    none_zero = ", none of them 0" * (0 in shape and not empty and len(shape) == len(sizes) and None in sizes)
    to_do = advice or "give an array of this shape"
    raise _refusal(f"{name} has the shape {shape}", f"must have the shape {form}{none_zero}", to_do, error)


def check_finite(
    name: str, values: Any, of: str = "rows", *, error: type[SctError] = DataError, advice: str = ""
) -> None:
    """Require an array (N, ...) without NaN and infinity.

    The error message counts the affected rows; `of` is the plural noun for the rows.

    Raises
    ------
    DataError
        The check fails. If the argument `error` is given, this class is raised instead.
    """
    import numpy as np

    wrong = ~np.isfinite(values)
    if wrong.any():
        rows = wrong.reshape(len(wrong), -1).any(axis=1)
        share = f"{int(rows.sum()):,} of {len(rows):,} {of}"
        found = f"{name} has NaN or infinity in {share} (first: row {int(rows.argmax())})"
        raise _refusal(found, "must be finite", advice or f"give finite values, or remove these {of}", error)


def nearest(value: Any, choices: Collection[Any], n: int = 1, cutoff: float = 0.6) -> list[Any]:
    """Return up to `n` choices with a spelling similar to `value`, the most similar first, ignoring case."""
    by_text = {str(choice).lower(): choice for choice in choices}
    return [
        by_text[text] for text in difflib.get_close_matches(str(value).lower(), by_text, n=n, cutoff=cutoff)
    ]


def _shown(value: Any) -> str:
    """Return a value as text, shortened to 200 characters. A numpy number is shown as a plain number."""
    text = repr(
        value.item() if type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0 else value
    )
    return text if len(text) <= 200 else f"{text[:200]}..."


def _refusal(found: str, expected: str, to_do: str, error: type[SctError]) -> SctError:
    """Build the error from the three parts of the message."""
    end = "?" if to_do.startswith("did you mean") else "."
    return error(f"{found}, but {expected}: {to_do.rstrip('.')}{end}")
