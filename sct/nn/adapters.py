"""What the collection "adapters" adds to a layer; the layer's own parameters are never touched.

A low-rank adapter (LoRA; Hu et al. 2022) of a dense layer of shape (in, out) lies under the layer's path and holds

- `lora_a` (in, r) and `lora_b` (r, out), which are trained;
- `scale`, a number: alpha / r;
- `dropout`, a number: the share of inputs left out, where the call has a key named "dropout".

`sct.models.lora` makes such collections, merges them, and says which layers have one.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

COLLECTION = "adapters"


def drop(module: nn.Module, x: jax.Array, rate: jax.Array | float) -> jax.Array:
    """Set a share `rate` of x to zero and scale up the rest, where the call has a key named "dropout"."""
    if not module.has_rng("dropout"):
        return x
    keep = jax.random.bernoulli(module.make_rng("dropout"), 1.0 - rate, x.shape)
    # A rate of one leaves nothing to scale up.
    return jnp.where(keep, x / jnp.maximum(1.0 - rate, 1e-6), 0.0).astype(x.dtype)


def with_low_rank(module: nn.Module, x: jax.Array, y: jax.Array) -> jax.Array:
    """Output y (..., out) of a dense layer for x (..., in), plus what its low-rank adapter gives, if it has one."""
    if not module.has_variable(COLLECTION, "lora_a"):
        return y
    first: jax.Array = module.get_variable(COLLECTION, "lora_a")
    second: jax.Array = module.get_variable(COLLECTION, "lora_b")
    scale: jax.Array = module.get_variable(COLLECTION, "scale")
    if module.has_variable(COLLECTION, "dropout"):
        x = drop(module, x, module.get_variable(COLLECTION, "dropout"))
    inner = jnp.einsum("...i,ir->...r", x.astype(y.dtype), first.astype(y.dtype))
    # The scale is applied while the numbers are still float32.
    return y + jnp.einsum("...r,ro->...o", inner, (second * scale).astype(y.dtype))
