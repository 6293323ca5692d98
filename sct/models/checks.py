"""Check model configurations, inputs and outputs; all model families use these functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sct.checks import check_at_least, check_choice, check_number, check_positive, check_shape
from sct.errors import CheckpointError, DataError

# Largest sizes for any family, well above those of published models. A larger size means that the configuration is
# damaged. Without this check, such a model would fill the memory, or take hours to trace, before another error appears.
MOST = {
    "vocab_size": 1 << 24, "num_genes": 1 << 20, "feature_dim": 1 << 20, "num_bins": 254, "num_types": 1 << 16,
    "embed_dim": 1 << 16, "token_embed_dim": 1 << 16, "ffn_dim": 1 << 20, "num_layers": 512, "num_heads": 1024,
    "num_kv_heads": 1024, "head_dim": 1 << 14, "max_length": 1 << 24, "rotary_length": 1 << 24, "num_downsamples": 20,
    "num_hidden_layers_head": 64, "stem_kernel_size": 1023, "conv_kernel_size": 1023, "num_scales": 1024,
    "num_soft": 1 << 16, "pad_id": 1 << 24, "cls_id": 1 << 24, "num_classes": 1 << 20, "classifier_layers": 64,
    "num_batches": 1 << 16, "code_dim": 1 << 16,
}  # fmt: skip
# Options that must be positive, because they are divisors, with their largest values.
POSITIVE = {
    "layer_norm_eps": 0.1, "norm_eps": 0.1, "rotary_base": 1e12, "rotary_factor": 1e6, "sigma_min": 1e9,
    "sigma_max": 1e9, "rotary_fraction": 1.0, "rotary_low": 1e6, "rotary_high": 1e6, "max_value": 1e9,
}  # fmt: skip
# Options that may be negative, with their largest distances from zero.
SIGNED = {"pad_value": 1e6, "mask_value": 1e6}


def check_fields(
    config: Any,
    choices: Mapping[str, tuple[str, ...]],
    least: Mapping[str, int],
    most: Mapping[str, int] | None = None,
) -> None:
    """Raise `ConfigError` if the value of a configuration field is not one of the allowed choices, or is out of range.

    Parameters
    ----------
    config
        Configuration dataclass of a model.
    choices
        Allowed values of fields, as a dict by field name.
    least
        Smallest allowed values of fields, as a dict by field name. `MOST`, `POSITIVE` and `SIGNED` hold the limits
        that all families share.
    most
        Largest allowed values of fields that differ from those in `MOST`, as a dict by field name.
    """
    limits = {**MOST, **(most or {})}
    for field in (each.name for each in dataclasses.fields(config)):
        value = getattr(config, field)
        if field in POSITIVE:
            check_positive(field, value, most=POSITIVE[field])
        elif field in SIGNED:
            check_at_least(field, value, -SIGNED[field], most=SIGNED[field], whole=False)
        elif field in limits or field in least:
            check_at_least(field, value, least.get(field, 0), most=limits.get(field))
        elif isinstance(value, float):
            check_number(field, value)
    for field, known in choices.items():
        check_choice(field, getattr(config, field), known)


def check_outputs(values: np.ndarray, what: str, of: str = "rows") -> None:
    """Raise `CheckpointError` if outputs (N, ...) of a model contain NaN or infinity.

    In the message, `what` names the outputs and `of` names the rows, such as "cells".
    """
    wrong = ~np.isfinite(values)
    if wrong.any():
        rows = wrong.reshape(len(wrong), -1).any(axis=1)
        raise CheckpointError(
            f"the {what} of the model have NaN or infinity in {int(rows.sum()):,} of {len(rows):,} {of}, probably "
            "because the weights are damaged or the numbers are too large for the model's dtype: set dtype to "
            "float32 in the configuration of the model, or use another model."
        )


def check_range(name: str, values: Any, most: int, least: int = 0) -> None:
    """Raise `DataError` unless an array holds integers from `least` to `most`.

    Without such a check, JAX would silently clip an index that is out of range.

    Values of traced arrays are not checked. `name` names the array in the message.
    """
    if not jnp.issubdtype(values.dtype, jnp.integer):
        raise DataError(
            f"{name} has the type {values.dtype}, but must have an integer type: convert it to an integer type, such "
            "as int32."
        )
    if isinstance(values, jax.core.Tracer) or not getattr(values, "is_fully_addressable", True):
        return
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    if low < least or high > most:
        raise DataError(
            f"{name} has values from {low} to {high}, but the model accepts only values from {least} to {most}: "
            "correct the values outside this range."
        )


def check_text(inputs: Any, vocab_size: int, max_length: int | None) -> None:
    """Raise `DataError` unless `input_ids` (B, T) holds tokens of the vocabulary.

    The error is also raised if another input has a different shape from `input_ids`.

    Parameters
    ----------
    inputs
        Inputs of a text model, as a dict by argument name.
    vocab_size
        Number of tokens in the vocabulary.
    max_length
        Largest number of tokens in a row. None means that there is no limit.
    """
    ids = inputs["input_ids"]
    check_shape("input_ids", ids, ("texts", "tokens"))
    check_range("input_ids", ids, vocab_size - 1)
    if max_length is not None and ids.shape[1] > max_length:
        raise DataError(
            f"each row of input_ids has {ids.shape[1]} tokens, but the model has only {max_length} positions: shorten "
            "the texts."
        )
    for name in ("attention_mask", "segments", "positions", "token_type_ids"):
        value = inputs.get(name)
        if value is not None:
            check_shape(name, value, ids.shape, advice=f"give {name} the same shape as input_ids")
    if inputs.get("attention_mask") is not None:
        check_range("attention_mask", inputs["attention_mask"].astype(jnp.int32), 1)
