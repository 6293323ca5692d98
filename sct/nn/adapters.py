"""What the collection "adapters" adds to a layer; the layer's own parameters are never touched.

A low-rank adapter (LoRA; Hu et al. 2022) of a dense layer of shape (in, out) lies under the layer's path and holds

- `lora_a` (in, r) and `lora_b` (r, out), which are trained;
- `scale`, a number: alpha / r;
- `dropout`, a number: the share of inputs left out, where the call has a key named "dropout";
- `trained` (B, r), only in a call that is differentiated: 1 where a sample's gradient reaches a column of `lora_a` and
  the row of `lora_b` that belongs to it, 0 where it does not (`sct.models.lora.gated`).

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
    # The scale is applied while the numbers are still float32.
    matrices = first.astype(y.dtype), (second * scale).astype(y.dtype)
    if module.has_variable(COLLECTION, "trained"):
        return y + _gated(x.astype(y.dtype), *matrices, module.get_variable(COLLECTION, "trained"))
    return y + _product(x.astype(y.dtype), *matrices)[0]


def _product(x: jax.Array, first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    inner = jnp.einsum("...i,ir->...r", x, first)
    return jnp.einsum("...r,ro->...o", inner, second), inner


@jax.custom_vjp
def _gated(x: jax.Array, first: jax.Array, second: jax.Array, trained: jax.Array) -> jax.Array:
    """`x @ first @ second` of x (B, ..., in), all of which x's own gradient passes.

    The gradient of the two matrices has of each sample the columns and rows that `trained` (B, r) lets through.
    """
    return _product(x, first, second)[0]


def _gated_forward(
    x: jax.Array, first: jax.Array, second: jax.Array, trained: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    y, inner = _product(x, first, second)
    return y, (x, inner, first, second, trained)


def _gated_backward(kept: tuple[jax.Array, ...], change: jax.Array) -> tuple[jax.Array | None, ...]:
    x, inner, first, second, trained = kept
    through = jnp.einsum("...o,ro->...r", change, second)
    gate = trained.astype(x.dtype).reshape(trained.shape[0], *[1] * (x.ndim - 2), trained.shape[1])
    return (
        jnp.einsum("...r,ir->...i", through, first),
        jnp.einsum("...i,...r->ir", x, through * gate),
        jnp.einsum("...r,...o->ro", inner * gate, change),
        jnp.zeros_like(trained),
    )


_gated.defvjp(_gated_forward, _gated_backward)
