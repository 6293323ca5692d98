"""What the collection "adapters" adds to a layer; the layer's own parameters are never touched.

There are three kinds. The arrays of an adapter lie under the path of its layer:

- low-rank (LoRA; Hu et al. 2022), of a dense layer of shape (in, out): `lora_a` (in, r) and `lora_b` (r, out), which
  are trained; `scale`, a number: alpha / r; `dropout`, a number: the share of inputs left out, where the call has a key
  named "dropout"; `trained` (B, r), only in a call that is differentiated: 1 where a sample's gradient reaches a column
  of `lora_a` and the row of `lora_b` that belongs to it, 0 where it does not (`sct.models.lora.gated`);
- bottleneck (scPEFT, "gene encoder prompt" and "gene token prompt"), of a dense layer or a table with outputs y
  (..., D): `bottleneck_down` (D, s), `bottleneck_down_bias` (s), `bottleneck_up` (s, D), `bottleneck_up_bias` (D),
  which are trained; the numbers `bottleneck_scale` and `bottleneck_skip`. The layer gives
  `skip * y + scale * up(relu(down(y)))`;
- prefix (Li & Liang 2021), of an attention whose keys and values come from vectors of width D: `prefix` (n, D), which
  is trained. The vectors go through the attention's own maps of keys and values, and every query may attend to them.

In a stack of equal layers all arrays have a first axis of layers. Where only some layers have an adapter, that axis has
those alone, and one more array of the kind (`lora_layers`, `bottleneck_layers`, `prefix_layers`) has their numbers.

`sct.models.adapters` makes such collections, and says which layers have one.
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
        What messages call it.
    trained
        Arrays that are trained; every adapter of the kind has the first one.
    numbers
        The others.
    layers
        Numbers of the layers of a stack that have one, where not all do.
    """

    name: str
    trained: tuple[str, ...]
    numbers: tuple[str, ...]
    layers: str

    @property
    def on(self) -> str:
        """Whether a layer of a stack has an adapter; made by `for_all_layers`."""
        return f"{self.layers}_on"

    @property
    def arrays(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.trained, *self.numbers, self.layers)


LOW_RANK = Kind("low-rank", ("lora_a", "lora_b"), ("scale", "dropout", "trained"), "lora_layers")
BOTTLENECK = Kind(
    "bottleneck",
    ("bottleneck_down", "bottleneck_down_bias", "bottleneck_up", "bottleneck_up_bias"),
    ("bottleneck_scale", "bottleneck_skip"),
    "bottleneck_layers",
)
PREFIX = Kind("prefix", ("prefix",), (), "prefix_layers")
KINDS = (LOW_RANK, BOTTLENECK, PREFIX)


def kind_of(array: str) -> Kind | None:
    """Kind of adapter that an array belongs to, by its name; None of an unknown name."""
    return next((kind for kind in KINDS if array in kind.arrays), None)


def for_all_layers(adapters: dict[str, Any], number: int) -> dict[str, Any]:
    """Adapters of a stack of `number` layers with arrays of all of them, where some are of chosen layers alone.

    The arrays of a layer that has none are zero, which changes nothing in a low-rank adapter; the other kinds have one
    more array, `Kind.on`, bool (number,).
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
    """Set a share `rate` of x to zero and scale up the rest, where the call has a key named "dropout"."""
    if not module.has_rng("dropout"):
        return x
    keep = jax.random.bernoulli(module.make_rng("dropout"), 1.0 - rate, x.shape)
    # A rate of one leaves nothing to scale up.
    return jnp.where(keep, x / jnp.maximum(1.0 - rate, 1e-6), 0.0).astype(x.dtype)


def with_adapters(module: nn.Module, x: jax.Array, y: jax.Array) -> jax.Array:
    """Output y (..., out) of a dense layer for x (..., in), changed by the adapters that it has."""
    return with_bottleneck(module, with_low_rank(module, x, y))


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
        trained: jax.Array = module.get_variable(COLLECTION, "trained")
        # What all samples share, such as a prefix, has one row, of which each sample has its own gradient.
        x = jnp.broadcast_to(x, (trained.shape[0], *x.shape[1:]))
        return y + _gated(x.astype(y.dtype), *matrices, trained)
    return y + _product(x.astype(y.dtype), *matrices)[0]


def with_bottleneck(module: nn.Module, y: jax.Array) -> jax.Array:
    """Output y (..., D) of a layer behind its bottleneck, if it has one."""
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
    """Keys and values in front of those of an attention.

    Attributes
    ----------
    keys, values
        (1 or B, n, H', D), without a rotation.
    on
        Whether queries see them, bool (); None where they always do.
    """

    keys: jax.Array
    values: jax.Array
    on: jax.Array | None = None

    def map(self, change: Callable[[jax.Array], jax.Array]) -> Prefix:
        """Prefix with changed keys and values."""
        return Prefix(change(self.keys), change(self.values), self.on)


def prefix_of(
    module: nn.Module, keys: Callable[..., jax.Array], values: Callable[..., jax.Array]
) -> Prefix | None:
    """Prefix of an attention, made by its maps of vectors to keys and to values, (1, n, E) -> (1, n, H', D)."""
    if not module.has_variable(COLLECTION, "prefix"):
        return None
    vectors: jax.Array = module.get_variable(COLLECTION, "prefix")[None]
    on = module.get_variable(COLLECTION, PREFIX.on) if module.has_variable(COLLECTION, PREFIX.on) else None
    return Prefix(keys(vectors), values(vectors), on)


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
