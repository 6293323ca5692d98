"""Small models with random weights, so large that every part of a model counts."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sct.models import registry
from sct.weights.pretrained import Pretrained


def noisy(variables: Any, scale: float = 0.3, seed: int = 1, but: str = "") -> Any:
    """Variables with normal noise of a standard deviation, except for those of one name."""
    rng = np.random.default_rng(seed)

    def add(path: Any, value: jax.Array) -> jax.Array:
        if path[-1].key == but:
            return value
        return value + jnp.asarray(scale * rng.normal(size=value.shape), value.dtype)

    return jax.tree_util.tree_map_with_path(add, variables)


def random_model(
    family: str, config: Any, scale: float = 0.3, seed: int = 1, key: int = 0, **parts: Any
) -> Pretrained:
    """Model of a configuration, initialized by `key` and `noisy` by `seed`; `parts` are fields of `Pretrained`."""
    module = registry.family(family).module
    variables = nn.unbox(jax.jit(module(config).init)(jax.random.key(key), **module.example(config)))
    return Pretrained(family, config, noisy(variables, scale, seed), **parts)
