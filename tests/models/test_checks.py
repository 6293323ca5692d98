"""Configurations that are damaged are refused before anything is made of them."""

from __future__ import annotations

import dataclasses
import math
import time

import jax
import numpy as np
import pytest

from sct.errors import CheckpointError, ConfigError
from sct.models import registry
from sct.models.checks import MOST, POSITIVE, SIGNED, check_outputs


def numbers(cls, values=None, path=()):
    """Every size and every number of a configuration, parts of a model included."""
    for field in dataclasses.fields(cls):
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        if dataclasses.is_dataclass(default):
            yield from numbers(type(default), path=(*path, field.name))
        elif type(default) in (int, float):
            yield (*path, field.name), type(default)


def nested(path, value):
    for name in reversed(path):
        value = {name: value}
    return value


@pytest.mark.parametrize("family", registry.MODELS)
def test_sizes_and_numbers_are_bounded_before_anything_is_allocated(family, monkeypatch):
    monkeypatch.setattr(jax, "eval_shape", lambda *_: pytest.fail("traced"))
    begun, wrong = time.monotonic(), []
    for path, kind in numbers(registry.MODELS[family].config):
        values = [10**9, 10**12, -1, True] if kind is int else [math.nan, math.inf, -1.0, True]
        if path[-1] in POSITIVE:
            values.append(0.0)
        if path[-1] in SIGNED:
            values[values.index(-1.0)] = -10 * SIGNED[path[-1]]
        for value in values:
            try:
                registry.model_config(family, nested(path, value), 1000)
                wrong.append(f"{'.'.join(path)} = {value!r}")
            except ConfigError as error:
                if path[-1] not in str(error) or "\n" in str(error):
                    wrong.append(f"{'.'.join(path)} = {value!r}: {error}")
    assert not wrong, "\n".join(wrong)
    assert time.monotonic() - begun < 20
    assert all(most < 10**9 for most in MOST.values())


def test_what_is_no_number_is_refused_where_a_number_is_bounded():
    wrong = []
    for family, (cls, *_) in registry.MODELS.items():
        config = registry.model_config(family, {}, 1000)
        for name in {field.name for field in dataclasses.fields(cls)} & {*MOST, *POSITIVE, *SIGNED}:
            for value in (None, "12"):
                try:
                    dataclasses.replace(config, **{name: value})
                    wrong.append((family, name, value))
                except ConfigError as error:
                    wrong += [] if name in str(error) else [(family, name, value, str(error))]
                except Exception as error:
                    wrong.append((family, name, value, repr(error)))
    assert not wrong


def test_heads_that_do_not_divide_the_width():
    for family, values in {
        "sct": {"embed_dim": 96, "num_heads": 7}, "bert": {"embed_dim": 96, "num_heads": 7},
        "gpt2": {"embed_dim": 96, "num_heads": 7}, "llama": {"num_heads": 8, "num_kv_heads": 3},
        "zeromics_cells": {"embed_dim": 96, "num_heads": 7},
        "scgpt": {"embed_dim": 96, "num_heads": 7}, "zeromics": {"llm": {"embed_dim": 96, "num_heads": 7}},
    }.items():  # fmt: skip
        with pytest.raises(ConfigError, match="num_heads"):
            registry.model_config(family, values, 1000)


def test_outputs_that_are_not_finite_are_refused():
    values = np.zeros((4, 3, 2), np.float32)
    check_outputs(values, "logits")
    for value in (np.nan, np.inf, -np.inf):
        values[2, 1] = value
        with pytest.raises(CheckpointError, match=r"logits .*NaN.* 1 of 4 rows"):
            check_outputs(values, "logits")
