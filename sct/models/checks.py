"""Checks of configurations, inputs and outputs of models that families share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sct.checks import check_at_least, check_choice, check_number, check_positive, check_shape
from sct.errors import CheckpointError, DataError

# Largest sizes of any family, well above those of published models: beyond, a configuration is damaged, and would take
# all memory, or hours to trace, before anything else is noticed.
MOST = {
    "vocab_size": 1 << 24, "num_genes": 1 << 20, "feature_dim": 1 << 20, "num_bins": 254, "num_types": 1 << 16,
    "embed_dim": 1 << 16, "token_embed_dim": 1 << 16, "ffn_dim": 1 << 20, "num_layers": 512, "num_heads": 1024,
    "num_kv_heads": 1024, "head_dim": 1 << 14, "max_length": 1 << 24, "rotary_length": 1 << 24, "num_downsamples": 20,
    "num_hidden_layers_head": 64, "stem_kernel_size": 1023, "conv_kernel_size": 1023, "num_scales": 1024,
    "num_soft": 1 << 16,
}  # fmt: skip
# Numbers that something is divided by: more than 0, and the second at most.
POSITIVE = {
    "layer_norm_eps": 0.1, "norm_eps": 0.1, "rotary_base": 1e12, "rotary_factor": 1e6, "sigma_min": 1e9,
    "sigma_max": 1e9, "rotary_fraction": 1.0, "rotary_low": 1e6, "rotary_high": 1e6,
}  # fmt: skip


def check_fields(config: Any, choices: Mapping[str, tuple[str, ...]], least: Mapping[str, int]) -> None:
    """Raise `ConfigError` where a field of a configuration is not one of its choices, or out of range.

    `least` has the smallest sizes of a family; the largest ones, and what must be positive, are those of all families.
    """
    for field in (each.name for each in dataclasses.fields(config)):
        value = getattr(config, field)
        if field in POSITIVE:
            check_positive(field, value, most=POSITIVE[field])
        elif field in MOST or field in least:
            check_at_least(field, value, least.get(field, 0), most=MOST.get(field))
        elif isinstance(value, float):
            check_number(field, value)
    for field, known in choices.items():
        check_choice(field, getattr(config, field), known)


def check_outputs(values: np.ndarray, what: str, of: str = "rows") -> None:
    """Raise `CheckpointError` where numbers (N, ...) that a model computed are NaN or infinite."""
    wrong = ~np.isfinite(values)
    if wrong.any():
        rows = wrong.reshape(len(wrong), -1).any(axis=1)
        raise CheckpointError(
            f"the {what} that the model computes are not finite for {int(rows.sum()):,} of {len(rows):,} {of}: its "
            "weights are damaged or too large for the type of its computation; give another model, or one whose "
            "configuration has dtype float32."
        )


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
    check_shape("input_ids", ids, ("texts", "tokens"))
    check_range("input_ids", ids, vocab_size - 1)
    if max_length is not None and ids.shape[1] > max_length:
        raise DataError(
            f"the texts have {ids.shape[1]} tokens, but the model has {max_length} positions: shorten them."
        )
    for name in ("attention_mask", "segments", "positions", "token_type_ids"):
        value = inputs.get(name)
        if value is not None:
            check_shape(name, value, ids.shape, advice="give the shape of input_ids")
    if inputs.get("attention_mask") is not None:
        check_range("attention_mask", inputs["attention_mask"].astype(jnp.int32), 1)
