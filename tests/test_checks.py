"""The checks of options and arrays: what each refuses, and how its sentence is built."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from sct import checks
from sct.errors import ConfigError, DataError, SctError, StoreError

# found, expected, to do: in this order, in one sentence.
FORM = re.compile(r"^(?P<found>.+?), but (?P<expected>(must|there) .+?): (?P<to_do>[^:].*)[.?]$", re.DOTALL)
NO_NUMBERS = (
    None,
    True,
    False,
    np.True_,
    "1",
    "",
    [],
    (1,),
    {},
    1j,
    math.nan,
    math.inf,
    -math.inf,
    np.nan,
    np.ones(1),
)
KINDS = (int, float, Fraction, np.float32, np.float64, np.int64, np.array)
NUMBERS = (
    *(kind(value) for value in (-2, -1, 0, 1, 2, 7, 255) for kind in KINDS),
    *(0.5, 1e-9, -1e-9, 1 - 1e-9, 1 + 1e-9, np.float32(0.25), np.uint8(3), 1e300),
)


def _says(call: Callable[[], Any]) -> str | None:
    """The sentence with which a check refuses, None where it does not."""
    try:
        call()
    except SctError as error:
        return str(error)
    return None


def _whole(value: Any) -> bool:
    value = value.item() if isinstance(value, np.ndarray) and not value.ndim else value
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


# check of a number -> whether it allows a finite one.
OF_NUMBERS: dict[str, tuple[Callable[[Any], None], Callable[[Any], bool]]] = {
    "number": (lambda v: checks.check_number("n", v), lambda v: True),
    "whole": (lambda v: checks.check_number("n", v, whole=True), _whole),
    "at least 1": (lambda v: checks.check_at_least("n", v, 1), lambda v: _whole(v) and v >= 1),
    "at least 0, any": (lambda v: checks.check_at_least("n", v, 0, whole=False), lambda v: v >= 0),
    "2 to 7": (lambda v: checks.check_at_least("n", v, 2, most=7), lambda v: _whole(v) and 2 <= v <= 7),
    "positive": (lambda v: checks.check_positive("n", v), lambda v: v > 0),
    "positive, at most 2": (lambda v: checks.check_positive("n", v, most=2), lambda v: 0 < v <= 2),
    "[0, 1]": (lambda v: checks.check_share("n", v), lambda v: 0 <= v <= 1),
    "(0, 1]": (lambda v: checks.check_share("n", v, zero=False), lambda v: 0 < v <= 1),
    "[0, 1)": (lambda v: checks.check_share("n", v, one=False), lambda v: 0 <= v < 1),
    "(0, 1)": (lambda v: checks.check_share("n", v, zero=False, one=False), lambda v: 0 < v < 1),
}


def test_checks_of_numbers_allow_what_they_say_and_nothing_else() -> None:
    wrong = []
    for what, (check, allows) in OF_NUMBERS.items():
        for value in (*NUMBERS, *NO_NUMBERS):
            finite = not any(value is each for each in NO_NUMBERS)
            said = _says(lambda check=check, value=value: check(value))
            if (said is None) != (finite and allows(value)):
                wrong.append(f"{what}: {value!r} gives {said}")
            elif said is not None and not (FORM.match(said) and said.startswith("n is ")):
                wrong.append(f"{what}: {value!r} is refused by {said}")
    assert not wrong, "\n".join(wrong)


# Refused calls with words that the sentence must have; each takes advice and another class of error as well.
REFUSED: list[tuple[Callable[..., None], type[SctError], str]] = [
    (lambda **o: checks.check_share("top_p", 1.5, zero=False, **o), ConfigError, "top_p is 1.5, but must be in (0, 1]"),
    (lambda **o: checks.check_at_least("n", np.int64(0), 1, **o), ConfigError, "n is 0, but must be at least 1"),
    (lambda **o: checks.check_at_least("n", 9, 1, most=8, **o), ConfigError, "between 1 and 8"),
    (lambda **o: checks.check_positive("rate", 0.0, **o), ConfigError, "rate is 0.0, but must be positive"),
    (lambda **o: checks.check_number("rate", True, **o), ConfigError, "rate is True, but must be a finite number"),
    (lambda **o: checks.check_multiple("width", 6, 4, "heads", **o), ConfigError, "a multiple of heads (4)"),
    (lambda **o: checks.check_multiple("width", 6, 4, **o), ConfigError, "a multiple of 4:"),
    (lambda **o: checks.check_choice("mode", "gene", ("cell", "genes"), **o), ConfigError, "'genes'"),
    (lambda **o: checks.check_choice("mode", "x", (), **o), ConfigError, "nothing to choose"),
    (lambda **o: checks.check_choice("mode", ["x"], ("y",), **o), ConfigError, "must be 'y'"),
    (lambda **o: checks.check_type("cells", "text", list, "a list", **o), ConfigError, "'text', of type str, but"),
    (lambda **o: checks.check_type("cells", True, int, **o), ConfigError, "is True, of type bool, but must be int"),
    (lambda **o: checks.check_text("question", " ", **o), ConfigError, "question is ' '"),
    (lambda **o: checks.check_text("question", None, **o), ConfigError, "question is None"),
    (lambda **o: checks.check_not_empty("tasks", (), **o), ConfigError, "tasks is empty"),
    (lambda **o: checks.check_not_empty("answers", ["a"], least=2, **o), ConfigError, "answers has 1 entry, but"),
    (lambda **o: checks.check_distinct("shots", [1, 2, 1], **o), ConfigError, "shots has 1 twice"),
    (lambda **o: checks.check_distinct("keys", "abab", **o), ConfigError, "keys has 'a' (and 1 more) twice"),
    (lambda **o: checks.check_one_each("labels", 3, "cells", 1200, **o), DataError, "3 labels for 1,200 cells"),
    (lambda **o: checks.check_shape("x", np.ones((2, 3)), ((4, "cells"), "genes"), **o), DataError, "(4 cells, genes)"),
    (lambda **o: checks.check_shape("x", np.ones((2, 0)), (2, "genes"), **o), DataError, "none of them 0"),
    (lambda **o: checks.check_shape("x", np.ones((2, 3)), (6,), **o), DataError, "(2, 3), but must have the shape"),
    (lambda **o: checks.check_finite("x", np.array([[1.0], [np.nan]]), "cells", **o), DataError, "1 of 2 cells (first"),
]  # fmt: skip


def test_each_refusal_is_one_sentence_of_found_expected_and_to_do() -> None:
    wrong = []
    for number, (call, kind, words) in enumerate(REFUSED):
        with pytest.raises(SctError) as refusal:
            call()
        said = str(refusal.value)
        if type(refusal.value) is not kind or words not in said or not FORM.match(said):
            wrong.append(f"{number}: {kind.__name__} with {words!r} was expected, not {said}")
        with pytest.raises(StoreError) as refusal:
            call(error=StoreError, advice="mend it by hand.")
        said = str(refusal.value)
        if words not in said or not said.endswith(": mend it by hand."):
            wrong.append(f"{number}: advice is lost in {said}")
    assert not wrong, "\n".join(wrong)


def test_what_fits_passes() -> None:
    checks.check_multiple("width", 8, 4, "heads")
    checks.check_choice("mode", "cell", ("cell", "gene"))
    checks.check_choice("layer", None, (None, "X"))
    checks.check_type("cells", [], list)
    checks.check_type("flag", True, bool)
    checks.check_text("question", "Why?")
    checks.check_not_empty("answers", ("a", "b"), least=2)
    checks.check_distinct("shots", [1, 2])
    checks.check_one_each("labels", 3, "cells", 3)
    checks.check_shape("x", np.ones((2, 3)), ((2, "cells"), "genes"))
    checks.check_shape("x", np.ones((0, 3)), (0, 3))
    checks.check_shape("x", np.ones((0, 3)), ("cells", 3), empty=True)
    checks.check_finite("x", np.zeros((0, 3)))
    checks.check_finite("x", np.arange(3))


def test_the_nearest_choice_is_suggested() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'spatial'\?$"):
        checks.check_choice("context", "Spatail", ("sequential", "spatial"))
    with pytest.raises(ConfigError, match=r"\(nearest: 'spatial'\): name it in obs\.$"):
        checks.check_choice("context", "spatail", ("sequential", "spatial"), advice="name it in obs.")
    with pytest.raises(ConfigError, match="choose one of these"):
        checks.check_choice("context", "zzz", ("sequential", "spatial"))
    with pytest.raises(ConfigError, match=r"'c19', \.\.\.: did you mean 'c250'"):
        checks.check_choice("cluster", "c2500", [f"c{i}" for i in range(300)])
