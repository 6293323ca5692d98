"""Many cases of one law in one test: all are tried, and all that fail are listed."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
from typing import Any

import pytest


def each(check: Callable[..., Any], cases: Iterable[tuple[Any, ...]]) -> None:
    """Call a check with the arguments of every case; fail with the case, place and reason of each failure.

    A parametrized test costs milliseconds of pytest's own work per case and a line of its report, so this is for
    cases by the dozen that need no fixture of their own.
    """
    failed, number = [], 0
    for number, case in enumerate(cases, 1):  # noqa: B007
        try:
            check(*case)
        except Exception as error:
            ours = [
                f
                for f in traceback.extract_tb(error.__traceback__)
                if f.filename == check.__code__.co_filename
            ]
            failed.append(
                f"{case!r}, line {ours[-1].lineno if ours else '?'}: {type(error).__name__}: {error}"
            )
        except pytest.fail.Exception as error:
            failed.append(f"{case!r}: {error}")
    assert number, "no case was given"
    if failed:
        pytest.fail(f"{len(failed)} of {number} cases failed:\n" + "\n".join(failed), pytrace=False)
