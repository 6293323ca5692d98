"""Probabilities of expression of models trained with and without logit adjustment."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from sct.data.class_prior import ClassPrior
from sct.errors import CheckpointError


def test_the_offset_follows_from_the_record():
    rates = {"kind": "stratified", "expressed": 0.3, "unexpressed": 0.05}
    cases = {
        "recorded": ({"masking": rates}, np.log(6), False),
        "adjusted": ({"masking": rates, "logit_adjustment": True}, 0.0, False),
        "as saved in JSON": (
            {
                "masking": {"kind": "mixture", "mixture": [["drawn", 1.0], ["cells", 1.0]]},
                "logit_adjustment": False,
            },
            np.log(15) / 2,
            False,
        ),
        "of an early version": ({"cells_per_bag": 50}, np.log(15), True),
        "without a logarithm": ({"masking": {"unexpressed": 0.0}}, 0.0, False),
    }
    wrong = {}
    for name, (data, offset, assumed) in cases.items():
        prior = ClassPrior.of(data)
        if not np.isclose(prior.offset, offset) or prior.assumed != assumed:
            wrong[name] = prior
    assert not wrong
    adjusted = ClassPrior.of(cases["adjusted"][0])
    np.testing.assert_allclose(adjusted.odds, 15)  # as if trained by the paper's loss
    np.testing.assert_allclose(ClassPrior.of({"masking": rates}).odds, 6)


def test_a_record_that_cannot_be_read_is_not_taken_for_another():
    for record in ({"newer_field": 1}, {"expressed": 2.0}, {"kind": "newer"}):
        with pytest.raises(CheckpointError, match="masking rates"):
            ClassPrior.of({"masking": record})


def test_the_warning_says_what_is_assumed():
    with pytest.warns(UserWarning, match="15% of expressed and 1% of unexpressed"):
        ClassPrior.of({}).warn()
    with pytest.warns(UserWarning, match="masked only expressed"):
        ClassPrior.of({"masking": {"unexpressed": 0.0}}).warn()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ClassPrior.of({"masking": {}}).warn()
