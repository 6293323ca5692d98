"""Checks of options and arrays: each refuses with one sentence of what was found, what is expected and what to do.

`name` is how the user wrote the option or what the sentence is about. `advice` replaces the general "what to do" where
there is better one. `error` is `ConfigError` for options, `DataError` for arrays and tables.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Sequence, Sized
from numbers import Integral, Real
from typing import Any

from sct.errors import ConfigError, DataError, SctError

_SHOWN = 20  # choices in a sentence


def check_number(
    name: str, value: Any, *, whole: bool = False, error: type[SctError] = ConfigError, advice: str = ""
) -> None:
    """Refuse all but finite numbers; a bool is none, and with `whole` neither is a fraction.

    Raises
    ------
    ConfigError
        Or `error`.
    """
    kind = "a whole number" if whole else "a finite number"
    if (
        isinstance(value, bool)
        or not isinstance(value, Integral if whole else Real)
        or not math.isfinite(value)
    ):
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
    """Refuse numbers below `least` or above `most`; `whole=False` allows fractions.

    Raises
    ------
    ConfigError
        Or `error`.
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
    """Refuse numbers of 0 or below, or above `most`; fractions are allowed.

    Raises
    ------
    ConfigError
        Or `error`.
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
    """Refuse numbers outside of 0 .. 1; `zero` and `one` say whether the ends are allowed.

    Raises
    ------
    ConfigError
        Or `error`.
    """
    check_number(name, value, error=error, advice=advice)
    if not ((value >= 0 if zero else value > 0) and (value <= 1 if one else value < 1)):
        interval = f"{'[' if zero else '('}0, 1{']' if one else ')'}"
        to_do = advice or "set it between 0 and 1"
        raise _refusal(f"{name} is {_shown(value)}", f"must be in {interval}", to_do, error)


def check_multiple(
    name: str, value: int, of: int, what: str = "", *, error: type[SctError] = ConfigError, advice: str = ""
) -> None:
    """Refuse a whole number that `of`, which the sentence calls `what`, does not divide.

    Raises
    ------
    ConfigError
        Or `error`.
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
    """Refuse what is none of `choices`, and name the nearest one in spelling.

    Raises
    ------
    ConfigError
        Or `error`.
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
    """Refuse a value that is not of a type, which the sentence calls `what`; a bool is no number.

    Raises
    ------
    ConfigError
        Or `error`.
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
    """Refuse what is not a string, or holds white space alone.

    Raises
    ------
    ConfigError
        Or `error`.
    """
    if not isinstance(value, str) or not value.strip():
        to_do = advice or "give a text"
        raise _refusal(f"{name} is {_shown(value)}", "must be a non-empty string", to_do, error)


def check_not_empty(
    name: str, values: Sized, *, least: int = 1, error: type[SctError] = ConfigError, advice: str = ""
) -> None:
    """Refuse a collection of fewer than `least` entries.

    Raises
    ------
    ConfigError
        Or `error`.
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
    """Refuse a collection that has an entry twice.

    Raises
    ------
    ConfigError
        Or `error`.
    """
    repeated = [value for value, number in Counter(values).items() if number > 1]
    if repeated:
        others = f" (and {len(repeated) - 1:,} more)" * (len(repeated) > 1)
        to_do = advice or "leave out the repetition"
        raise _refusal(f"{name} has {_shown(repeated[0])}{others} twice", "must have each once", to_do, error)


def check_one_each(
    what: str, found: int, of: str, expected: int, *, error: type[SctError] = DataError, advice: str = ""
) -> None:
    """Refuse `found` things (`what`, plural) that do not go with `expected` others (`of`, plural) one by one.

    Raises
    ------
    DataError
        Or `error`.
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
    """Refuse an array of another shape.

    An axis is expected to have a size, `5`, or with its word, `(5, "cells")`; or any size but 0 (`empty`: any size),
    with its word alone, `"genes"`.

    Raises
    ------
    DataError
        Or `error`.
    """
    shape = tuple(map(int, array.shape))
    sizes = [
        axis if isinstance(axis, int) else axis[0] if isinstance(axis, tuple) else None for axis in expected
    ]
    if len(shape) == len(sizes) and all(
        (empty or found > 0) if size is None else found == size
        for found, size in zip(shape, sizes, strict=True)
    ):
        return
    words = [
        f"{axis:,}"
        if isinstance(axis, int)
        else f"{axis[0]:,} {axis[1]}"
        if isinstance(axis, tuple)
        else axis
        for axis in expected
    ]
    form = f"({', '.join(words)}{',' * (len(words) == 1)})"
    none_zero = ", none of them 0" * (0 in shape and not empty and len(shape) == len(sizes) and None in sizes)
    to_do = advice or "give an array of this shape"
    raise _refusal(f"{name} has the shape {shape}", f"must have the shape {form}{none_zero}", to_do, error)


def check_finite(
    name: str, values: Any, of: str = "rows", *, error: type[SctError] = DataError, advice: str = ""
) -> None:
    """Refuse an array (N, ...) with NaN or infinity, and count the rows (`of`, plural) that have one.

    Raises
    ------
    DataError
        Or `error`.
    """
    import numpy as np

    wrong = ~np.isfinite(values)
    if wrong.any():
        rows = wrong.reshape(len(wrong), -1).any(axis=1)
        share = f"{int(rows.sum()):,} of {len(rows):,} {of}"
        found = f"{name} has NaN or infinity in {share} (first: row {int(rows.argmax())})"
        raise _refusal(found, "must be finite", advice or "give finite values, or leave these out", error)


def nearest(value: Any, choices: Collection[Any], n: int = 1, cutoff: float = 0.6) -> list[Any]:
    """Return up to `n` choices that are spelled almost like a value, the nearest first; upper case does not matter."""
    by_text = {str(choice).lower(): choice for choice in choices}
    return [
        by_text[text] for text in difflib.get_close_matches(str(value).lower(), by_text, n=n, cutoff=cutoff)
    ]


def _shown(value: Any) -> str:
    """Return a value as the user would write it, shortened; numpy's numbers as numbers."""
    text = repr(
        value.item() if type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0 else value
    )
    return text if len(text) <= 200 else f"{text[:200]}..."


def _refusal(found: str, expected: str, to_do: str, error: type[SctError]) -> SctError:
    """Make the error of the sentence, in the order that all have."""
    end = "?" if to_do.startswith("did you mean") else "."
    return error(f"{found}, but {expected}: {to_do.rstrip('.')}{end}")
