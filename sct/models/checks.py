"""Checks of a model's inputs that families share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sct.errors import ConfigError, DataError


def check_fields(config: Any, choices: Mapping[str, tuple[str, ...]], least: Mapping[str, int]) -> None:
    """Raise `ConfigError` where a field of a configuration is not one of its choices, or too small."""
    for field, known in choices.items():
        if getattr(config, field) not in known:
            listed = ", ".join(repr(choice) for choice in known)
            raise ConfigError(f"{field} is {getattr(config, field)!r}, but it must be one of {listed}.")
    for field, smallest in least.items():
        if getattr(config, field) < smallest:
            raise ConfigError(f"{field} is {getattr(config, field)}, but it must be at least {smallest}.")


def check_range(name: str, values: Any, most: int) -> None:
    """Raise `DataError` for integers outside of 0 .. `most`, which an index would silently clip."""
    if not jnp.issubdtype(values.dtype, jnp.integer):
        raise DataError(f"{name} are {values.dtype}, but integers are needed.")
    if isinstance(values, jax.core.Tracer) or not getattr(values, "is_fully_addressable", True):
        return
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    if low < 0 or high > most:
        raise DataError(f"{name} reach from {low} to {high}, but 0 to {most} is what the model knows.")


def check_text(inputs: Any, vocab_size: int, max_length: int | None) -> None:
    """Raise `DataError` unless `input_ids` (B, T) are tokens of the vocabulary and what goes with them fits.

    With `max_length`, positions beyond it do not exist.
    """
    ids = inputs["input_ids"]
    if ids.ndim != 2 or not ids.size:
        raise DataError(
            f"input_ids have the shape {ids.shape}, but (texts, tokens), none of them zero, is needed."
        )
    check_range("input_ids", ids, vocab_size - 1)
    if max_length is not None and ids.shape[1] > max_length:
        raise DataError(
            f"the texts have {ids.shape[1]} tokens, but the model has {max_length} positions: shorten them."
        )
    for name in ("attention_mask", "segments", "positions", "token_type_ids"):
        value = inputs.get(name)
        if value is not None and value.shape != ids.shape:
            raise DataError(
                f"{name} has the shape {value.shape}, but that of input_ids, {ids.shape}, is needed."
            )
    if inputs.get("attention_mask") is not None:
        check_range("attention_mask", inputs["attention_mask"].astype(jnp.int32), 1)
