"""Apply the adapter of a layer. Adapters are stored in a separate Flax collection, "adapters".

An adapter never changes the parameters of its layer. The arrays of an adapter are stored under the path of the layer.
There are three kinds of adapters:

- **Low-rank** (LoRA; Hu et al. 2022), for a dense layer of shape (in, out). Trained arrays: `lora_a` (in, r) and
  `lora_b` (r, out). The constant `scale` is alpha / r. The constant `dropout` is the fraction of inputs that is set to
  zero when the call has a PRNG key named "dropout". In training, the adapter may also have an array `trained` (B, r).
  If `trained[b, j]` is 1, sample b contributes to the gradients of column j of `lora_a` and row j of `lora_b`. If it is
  0, the sample does not contribute to them (see `sct.models.lora.gated`).
- **Bottleneck** (scPEFT, "gene encoder prompt" and "gene token prompt"), for a dense layer or an embedding table with
  outputs y (..., D). Trained arrays: `bottleneck_down` (D, s), `bottleneck_down_bias` (s), `bottleneck_up` (s, D) and
  `bottleneck_up_bias` (D). Constants: `bottleneck_scale` and `bottleneck_skip`. The layer then returns
  `skip * y + scale * up(relu(down(y)))`.
- **Prefix** (Li & Liang 2021), for an attention layer whose keys and values are computed from vectors of width D.
  Trained array: `prefix` (n, D). The attention layer projects these vectors to n additional keys and n additional
  values. Every query may attend to these keys. If there is a constant `prefix_seen` (n), queries attend only to the
  vectors for which it is 1 (see `sct.models.combined_adapters`).

In a stack of identical layers, the first axis of every array is the layer axis. If only some layers have an adapter,
this axis has one entry for each of these layers. One more array (`lora_layers`, `bottleneck_layers` or `prefix_layers`)
then holds the indices of these layers in the stack, counted from 0.

`sct.models.adapters` chooses the layers and makes the arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sct.nn.paths import flatten, unflatten

COLLECTION = "adapters"


class Kind(NamedTuple):
    """Names of the arrays of one kind of adapter.

    Attributes
    ----------
    name
        Name that messages use for this kind of adapter.
    trained
        Names of the trained arrays. Every adapter of this kind has the first array of this list.
    numbers
        Names of the constants: the arrays that training does not change.
    layers
        Name of the array that holds the indices of the layers with an adapter. Only stacks in which some layers have no
        adapter contain this array.
    """

    name: str
    trained: tuple[str, ...]
    numbers: tuple[str, ...]
    layers: str

    @property
    def on(self) -> str:
        """Return the name of the bool array that says, for each layer of a stack, whether it has an adapter.

        See `for_all_layers`.
        """
        return f"{self.layers}_on"

    @property
    def arrays(self) -> tuple[str, ...]:
        """Return the names of all arrays of this kind of adapter."""
        return (*self.trained, *self.numbers, self.layers)


LOW_RANK = Kind("low-rank", ("lora_a", "lora_b"), ("scale", "dropout", "trained"), "lora_layers")
BOTTLENECK = Kind(
    "bottleneck",
    ("bottleneck_down", "bottleneck_down_bias", "bottleneck_up", "bottleneck_up_bias"),
    ("bottleneck_scale", "bottleneck_skip"),
    "bottleneck_layers",
)
# 1 for the vectors of a prefix to which queries attend, 0 for the others. Only combined adapters have this array.
PREFIX_SEEN = "prefix_seen"
PREFIX = Kind("prefix", ("prefix",), (PREFIX_SEEN,), "prefix_layers")
KINDS = (LOW_RANK, BOTTLENECK, PREFIX)


def kind_of(array: str) -> Kind | None:
    """Return the kind of adapter that has an array with this name, or None if no kind has one."""
    return next((kind for kind in KINDS if array in kind.arrays), None)


def for_all_layers(adapters: dict[str, Any], number: int) -> dict[str, Any]:
    """Add an adapter to each layer of a stack that has none. All numbers of an added adapter are zero.

    A low-rank adapter of zeros adds nothing to the output of its layer. The result also contains a bool array
    (number,), whose name is `Kind.on`. This array is True for the layers that already had an adapter.

    Parameters
    ----------
    adapters
        Collection "adapters" of the stack, or of one module inside the layers of the stack.
    number
        Number of layers in the stack.
    """
    flat = flatten(adapters)
    chosen = {path: value for path, value in flat.items() if path.rpartition("/")[2] in _INDICES}
    for index, layers in chosen.items():
        place, _, name = index.rpartition("/")
        kind = _INDICES[name]
        del flat[index]
        for array in (*kind.trained, *kind.numbers):
            path = f"{place}/{array}" if place else array
            if path in flat:
                value = jnp.asarray(flat[path])
                flat[path] = jnp.zeros((number, *value.shape[1:]), value.dtype).at[layers].set(value)
        on = f"{place}/{kind.on}" if place else kind.on
        flat[on] = jnp.zeros(number, bool).at[layers].set(True)
    return unflatten(flat)


_INDICES = {kind.layers: kind for kind in KINDS}


def drop(module: nn.Module, x: jax.Array, rate: jax.Array | float) -> jax.Array:
    """Apply dropout to x: set a random fraction `rate` of its values to zero, and divide the others by 1 - rate.

    If the call has no PRNG key named "dropout", return x unchanged.
    """
    if not module.has_rng("dropout"):
        return x
    keep = jax.random.bernoulli(module.make_rng("dropout"), 1.0 - rate, x.shape)
    # The minimum avoids a division by zero at a rate of 1.
    return jnp.where(keep, x / jnp.maximum(1.0 - rate, 1e-6), 0.0).astype(x.dtype)


def with_adapters(module: nn.Module, x: jax.Array, y: jax.Array) -> jax.Array:
    """Apply the low-rank adapter and the bottleneck of a dense layer, if the layer has them.

    x (..., in) is the input of the layer, and y (..., out) its output without adapters. Returns (..., out).
    """
    return with_bottleneck(module, with_low_rank(module, x, y))


def with_low_rank(module: nn.Module, x: jax.Array, y: jax.Array) -> jax.Array:
    """Add the output of the low-rank adapter of a dense layer, if the layer has one, to the output of the layer.

    x (..., in) is the input of the layer, and y (..., out) its output without adapters. Returns (..., out).
    """
    if not module.has_variable(COLLECTION, "lora_a"):
        return y
    first: jax.Array = module.get_variable(COLLECTION, "lora_a")
    second: jax.Array = module.get_variable(COLLECTION, "lora_b")
    scale: jax.Array = module.get_variable(COLLECTION, "scale")
    if module.has_variable(COLLECTION, "dropout"):
        x = drop(module, x, module.get_variable(COLLECTION, "dropout"))
    # Multiply by the scale in float32, before the cast to the compute dtype.
    matrices = first.astype(y.dtype), (second * scale).astype(y.dtype)
    if module.has_variable(COLLECTION, "trained"):
        trained: jax.Array = module.get_variable(COLLECTION, "trained")
        # An input that all samples share, such as a prefix, has one row. Repeat it, so that each sample has a gradient.
        x = jnp.broadcast_to(x, (trained.shape[0], *x.shape[1:]))
        return y + _gated(x.astype(y.dtype), *matrices, trained)
    return y + _product(x.astype(y.dtype), *matrices)[0]


def with_bottleneck(module: nn.Module, y: jax.Array) -> jax.Array:
    """Pass the output y (..., D) of a layer through the layer's bottleneck, if the layer has one. Returns (..., D)."""
    if not module.has_variable(COLLECTION, "bottleneck_down"):
        return y
    arrays: list[jax.Array] = [
        module.get_variable(COLLECTION, name) for name in (*BOTTLENECK.trained, *BOTTLENECK.numbers)
    ]
    down, down_bias, up, up_bias, scale, skip = arrays
    inner = jax.nn.relu(jnp.einsum("...i,is->...s", y, down.astype(y.dtype)) + down_bias.astype(y.dtype))
    made = jnp.einsum("...s,so->...o", inner, (up * scale).astype(y.dtype)) + (up_bias * scale).astype(
        y.dtype
    )
    made = y * skip.astype(y.dtype) + made
    if module.has_variable(COLLECTION, BOTTLENECK.on):
        made = jnp.where(module.get_variable(COLLECTION, BOTTLENECK.on), made, y)
    return made


class Prefix(NamedTuple):
    """Keys and values that an attention layer puts before its other keys and values.

    Attributes
    ----------
    keys, values
        Arrays (1 or B, n, H', D) for n prefix vectors and H' heads. Rotary position embedding is not applied to the
        keys of a prefix.
    on
        Bool scalar or bool (n,): whether queries attend to the prefix, or to each of its vectors. None means that
        queries always attend to the prefix.
    """

    keys: jax.Array
    values: jax.Array
    on: jax.Array | None = None

    def map(self, change: Callable[[jax.Array], jax.Array]) -> Prefix:
        """Apply the function `change` to the keys and to the values, and return the new prefix."""
        return Prefix(change(self.keys), change(self.values), self.on)


def prefix_of(
    module: nn.Module, keys: Callable[..., jax.Array], values: Callable[..., jax.Array]
) -> Prefix | None:
    """Return the prefix of an attention layer, or None if the layer has no prefix.

    `keys` and `values` are the projections of the layer; each maps vectors (1, n, E) to (1, n, H', D).
    """
    if not module.has_variable(COLLECTION, "prefix"):
        return None
    vectors: jax.Array = module.get_variable(COLLECTION, "prefix")[None]
    on: jax.Array | None = None
    if module.has_variable(COLLECTION, PREFIX.on):
        on = module.get_variable(COLLECTION, PREFIX.on)
    if module.has_variable(COLLECTION, PREFIX_SEEN):
        seen: jax.Array = module.get_variable(COLLECTION, PREFIX_SEEN)
        on = seen > 0 if on is None else (seen > 0) & on
    return Prefix(keys(vectors), values(vectors), on)


def _product(x: jax.Array, first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    inner = jnp.einsum("...i,ir->...r", x, first)
    return jnp.einsum("...r,ro->...o", inner, second), inner


@jax.custom_vjp
def _gated(x: jax.Array, first: jax.Array, second: jax.Array, trained: jax.Array) -> jax.Array:
    """Compute `x @ first @ second` for x (B, ..., in), with a custom gradient for the two matrices.

    Sample b contributes to the gradient of column j of `first` (in, r) and of row j of `second` (r, out) only if
    `trained[b, j]` is 1, where `trained` has the shape (B, r). The gradient with respect to x does not depend on
    `trained`.
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
