"""Small models of every family with adapters, for tests of adapters."""

from __future__ import annotations

from functools import cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sct.models import adapters, lora, registry
from sct.models.adapter_kinds import AdapterConfig
from sct.models.lora import LoraConfig
from sct.nn.adapters import kind_of
from sct.nn.paths import flatten, unflatten
from tests.cached import cached

_TEXT = {
    "vocab_size": 40, "embed_dim": 24, "num_layers": 2, "num_heads": 4, "ffn_dim": 40, "max_length": 32
}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {**_TEXT, "tied": False},
    "neox": {**_TEXT, "rotary_fraction": 0.34},
    "llama": {**_TEXT, "num_kv_heads": 2},
    "bert": {**_TEXT, "tied": False},
    "sct": {
        "num_genes": 16, "token_embed_dim": 32, "embed_dim": 32, "num_downsamples": 1, "num_layers": 2,
        "num_heads": 2, "ffn_dim": 24, "use_spatial": True, "num_scales": 3,
    },
}  # fmt: skip
# Further ones, which have no default targets of their own.
MODELS: dict[str, dict[str, Any]] = {
    **SIZES,
    "zeromics_cells": {
        "num_genes": 12, "feature_dim": 6, "num_bins": 4, "embed_dim": 24, "num_layers": 2, "num_heads": 4,
        "ffn_dim": 40,
    },
    "scgpt": {
        "vocab_size": 20, "pad_id": 18, "cls_id": 19, "embed_dim": 24, "num_layers": 2, "num_heads": 4, "ffn_dim": 40,
        "num_bins": 5, "mvc": "inner product", "num_classes": 3,
    },
}  # fmt: skip
ALL = LoraConfig(targets=(".",), rank=3, alpha=6.0)


def config(family: str, **options: Any) -> Any:
    """Configuration of a small model."""
    return registry.model_config(family, {**MODELS[family], **options})


@cached
def boxed(family: str) -> Any:
    """Its variables, boxed with axis names."""
    module = registry.family(family).module
    return jax.jit(module(config(family)).init)(jax.random.key(0), **module.example(config(family)))


def inputs(family: str) -> dict[str, jax.Array]:
    """Inputs of a call, without padding."""
    rng = np.random.default_rng(0)
    if family == "sct":
        tokens = jnp.asarray(rng.integers(0, 5, (2, 3, 16)), jnp.uint8)
        return {"tokens": tokens, "coordinates": jnp.asarray(rng.random((2, 3, 2)), jnp.float32)}
    if family == "zeromics_cells":
        return {"bins": jnp.asarray(rng.integers(0, 5, (2, 12)), jnp.uint8)}
    if family == "scgpt":
        gene_ids = rng.integers(0, 18, (2, 7))
        gene_ids[:, 0] = 19
        values = jnp.asarray(rng.integers(0, 5, (2, 7)), jnp.float32)
        return {"gene_ids": jnp.asarray(gene_ids, jnp.int32), "values": values}
    return {"input_ids": jnp.asarray(rng.integers(0, 40, (2, 7)), jnp.int32)}


@cached
def fresh(family: str, options: LoraConfig, seed: int = 1) -> Any:
    """Boxed adapters that are not trained."""
    params = boxed(family)["params"]  # made outside of the function that is traced
    return jax.jit(lambda key: lora.init(key, params, options))(jax.random.key(seed))


def adapted(family: str, options: LoraConfig = ALL, trained: bool = True) -> dict[str, Any]:
    """Variables with adapters, whose second matrices are not zero any more where they are `trained`."""
    made = nn.unbox(fresh(family, options))
    if trained:
        rng, flat = np.random.default_rng(1), flatten(made)
        for path, value in flat.items():
            if path.endswith("lora_b"):
                flat[path] = jnp.asarray(0.3 * rng.normal(size=value.shape), jnp.float32)
        made = unflatten(flat)
    return {**nn.unbox(boxed(family)), "adapters": made}


@cached
def trained_adapters(family: str, options: tuple[AdapterConfig, ...]) -> dict[str, Any]:
    """Adapters of several kinds, none of whose trained arrays is zero."""
    made = nn.unbox(adapters.init(jax.random.key(1), boxed(family)["params"], *options))
    rng, flat = np.random.default_rng(1), flatten(made)
    for path, value in flat.items():
        name = path.rpartition("/")[2]
        kind = kind_of(name)
        if kind is not None and name in kind.trained:
            change = 0.3 * rng.normal(size=value.shape)
            # Whatever the inputs are, some of a bottleneck's ReLUs are open.
            change = np.abs(change) if name == "bottleneck_down_bias" else change
            flat[path] = value + jnp.asarray(change, jnp.float32)
    return unflatten(flat)


@cache
def forward(family: str, **options: Any) -> Any:
    """Compiled call of a model: (variables, inputs, keys) -> outputs."""
    module = registry.family(family).module(config(family, **options))
    return jax.jit(lambda variables, x, rngs: module.apply(variables, **x, rngs=rngs))


def call(family: str, variables: Any, key: jax.Array | None = None, **options: Any) -> dict[str, jax.Array]:
    """Outputs of a model."""
    return forward(family, **options)(variables, inputs(family), None if key is None else {"dropout": key})
