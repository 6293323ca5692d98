"""Many cases in one test: none hides another."""

from __future__ import annotations

import pytest

from tests.cases import each


def check(number: int, limit: int) -> None:
    assert number < limit
    if number == 0:
        with pytest.raises(ValueError, match="never"):
            pass


def test_every_failure_is_listed():
    each(check, [(1, 2), (2, 3)])
    with pytest.raises(pytest.fail.Exception) as caught:
        each(check, [(1, 2), (5, 2), (0, 2), (7, 3)])
    message = str(caught.value)
    assert "3 of 4" in message
    assert all(case in message for case in ("(5, 2)", "(0, 2)", "(7, 3)"))
    assert "(1, 2)" not in message


def test_no_case_is_a_failure():
    with pytest.raises(AssertionError, match="no case"):
        each(check, [])
