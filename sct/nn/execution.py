"""How layers are executed: on devices, in chunks, and what their backward pass finds saved.

What a layer computes stands in its model file, with nothing of this. Measurements: docs/performance.md.

`by_cells` executes a layer over a bag, one sequence (B, K * G, C) of K cells with G positions each. The layer has two
methods, because a norm needs all positions of a cell and a convolution needs the ends of the neighboring cells:

- `normalize(x)`: each cell by itself;
- `convolve(x, borders, skip)`: all that follows; `borders` are the `halo` positions (B, halo, C) before and after x.

**Devices.** Each device runs the layer on its own cells, and receives the borders of the normalized sequence from its
neighbors. XLA alone would gather the whole sequence for every norm and convolution.

**Chunks.** On CPU a level goes through the bag in chunks of some cells. XLA for the CPU fuses a sum with all the
elementwise work around it, in one loop at a tenth of the memory's speed, but never across a loop of the program; and a
chunk stays in the cache. A training step of 10 full-size cells went from 38 s and 11.6 GiB to 21 s and 4.6 GiB with
it. Accelerators run the bag at once.

**Saved values.** The backward pass finds saved: with `remat="products"` the outputs of convolutions and products, with
"level" nothing, with "none" everything. A level in chunks saves its normalized input too, unless for "level", and never
more than with "products".
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from sct.nn import axes
from sct.nn.chunked_map import SAVEABLE, chunked_map
from sct.nn.conv import Borders
from sct.nn.paths import flatten, unflatten
from sct.nn.reference import chunk_limit, use_reference

# Positions of a chunk of a level on CPU: enough for the products to run at full speed.
LEVEL_CHUNK_CPU = 4096
# Positions of a chunk of a pointwise layer: few stay in the cache of a CPU, many keep an accelerator busy.
POINTWISE_CHUNK_CPU, POINTWISE_CHUNK = 4096, 65_536

_Layer = TypeVar("_Layer", bound=type[nn.Module])


def by_cells(
    layer: Any, x: jax.Array, skip: jax.Array | None = None, *, num_positions: int, halo: int, chunked: bool = True,
    remat: str = "none",
) -> jax.Array:  # fmt: skip
    """Compute `layer.convolve(layer.normalize(x), borders, skip)`; see the top of this file.

    Parameters
    ----------
    layer
        Bound module. The parameters of its `normalize` lie under "block/norm".
    x, skip
        Sequences (B, K * G, C) and (B, K * G', C'), or no skip.
    num_positions
        Positions of a cell in x (G).
    halo
        Positions that `convolve` reads beyond each end; 0 where cells are apart.
    chunked
        Whether a large bag goes through the layer in chunks on CPU.
    remat
        What the backward pass finds saved: "none", "products" or "level".

    Returns
    -------
    (B, K * G', C').
    """
    if layer.is_initializing():
        return cast(jax.Array, layer.convolve(layer.normalize(x), None, skip))
    unbound = layer.clone(parent=None, name=None)

    def on_device(params: Any, x: jax.Array, skip: jax.Array | None) -> jax.Array:
        cells = x.shape[1] // num_positions
        chunk = cells_per_chunk(cells, num_positions) if chunked else cells
        run: Callable[..., jax.Array] = functools.partial(_at_once, unbound, halo)
        if chunk < cells:
            run = functools.partial(_in_chunks, unbound, halo, cells // chunk, remat != "level")
        if remat == "level":
            run = jax.checkpoint(run, policy=jax.checkpoint_policies.nothing_saveable)
        elif remat == "products" and chunk == cells:
            run = jax.checkpoint(run, policy=jax.checkpoint_policies.save_only_these_names(SAVEABLE))
        return run(params, x, skip)

    cells = x.shape[1] // num_positions
    return axes.on_each_device(on_device, layer.variables["params"], x, skip, cells=cells)


def by_positions(layer: nn.Module, method: str, x: jax.Array, cells: int | None = None) -> jax.Array:
    """Apply a method that maps each position by itself, (..., C) to (..., C'), in chunks of positions.

    For layers with hidden vectors much wider than their inputs: a million positions at once take 4 GiB in sCT's head,
    and again for the gradient. `cells` is the number of cells where x is a whole bag (B, K * G, C), of which each
    device takes its part; None for other positions, which a mesh takes at once.
    """
    if layer.is_initializing() or use_reference() or (cells is None and axes.is_sharded()):
        return cast(jax.Array, getattr(layer, method)(x))
    run = functools.partial(_positions_in_chunks, _Method(layer.clone(parent=None, name=None), method))
    if cells is None:
        return run(layer.variables, x)
    return axes.on_each_device(run, layer.variables, x, cells=cells)


def rematerialized(layer: _Layer, remat: str, prevent_cse: bool = True) -> _Layer:
    """Class of a layer whose backward pass computes again what `remat` does not save.

    "none" saves everything, "products" the outputs of matrix products (not the scores of attention), "level" nothing.
    `prevent_cse` is not needed inside of a loop.
    """
    if remat == "none":
        return layer
    policies = {"products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
    return cast(_Layer, nn.remat(layer, policy=policies.get(remat), prevent_cse=prevent_cse))


def cells_per_chunk(cells: int, num_positions: int) -> int:
    """Cells in a chunk of a bag of `cells`, a divisor of them: the fewest that fill a chunk on CPU, elsewhere all.

    On a mesh a bag is the device's part of it.
    """
    if use_reference() or jax.default_backend() != "cpu" or axes.is_sharded():
        return cells
    least = chunk_limit(LEVEL_CHUNK_CPU)
    return next((n for n in range(1, cells) if cells % n == 0 and n * num_positions >= least), cells)


@dataclasses.dataclass(frozen=True)
class _Method:
    """A method of an unbound module as a function of variables and inputs; hashable, as `chunked_map` needs it."""

    module: nn.Module
    name: str

    def __call__(self, variables: Any, inputs: tuple[Any, ...]) -> jax.Array:
        return cast(jax.Array, self.module.apply(variables, *inputs, method=self.name))


def _at_once(layer: nn.Module, halo: int, params: Any, x: jax.Array, skip: jax.Array | None) -> jax.Array:
    variables = {"params": params}
    y = _Method(layer, "normalize")(variables, (x,))
    borders = axes.neighbor_positions(y, halo) if halo and axes.is_sequence_cut() else None
    return _Method(layer, "convolve")(variables, (y, borders, skip))


def _in_chunks(
    layer: nn.Module, halo: int, chunks: int, save: bool, params: Any, x: jax.Array, skip: jax.Array | None
) -> jax.Array:
    def cut(x: jax.Array) -> jax.Array:
        return rearrange(x, "b (n l) c -> (b n) 1 l c", n=chunks)

    def join(x: jax.Array) -> jax.Array:
        return rearrange(x, "(b n) 1 l c -> b (n l) c", n=chunks)

    # All norms come first, so that a chunk can see the normalized borders of the next one.
    norm, rest = _split(params)
    y = chunked_map(_Method(layer, "normalize"), False, norm, (cut(x),))
    borders = _borders_of_chunks(join(y), halo, chunks) if halo else None
    skips = None if skip is None else cut(skip)
    return join(chunked_map(_Method(layer, "convolve"), save, rest, (y, borders, skips)))


def _split(params: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Variables of `normalize` and of `convolve`; the loop of a gradient carries a sum for each parameter it gets."""
    flat = flatten(params)
    norm = {path: value for path, value in flat.items() if path.startswith("block/norm/")}
    rest = {path: value for path, value in flat.items() if path not in norm}
    return {"params": unflatten(norm)}, {"params": unflatten(rest)}


def _borders_of_chunks(x: jax.Array, halo: int, chunks: int) -> Borders:
    """Positions (B * n, 1, halo, C) before and after each of n chunks of a sequence (B, L, C)."""
    first, last = axes.neighbor_positions(x, halo)
    parts = rearrange(x, "b (n l) c -> b n l c", n=chunks)
    before = jnp.concatenate([first[:, None], parts[:, :-1, -halo:]], axis=1)
    after = jnp.concatenate([parts[:, 1:, :halo], last[:, None]], axis=1)
    return rearrange(before, "b n l c -> (b n) 1 l c"), rearrange(after, "b n l c -> (b n) 1 l c")


def _positions_in_chunks(function: _Method, variables: Any, x: jax.Array) -> jax.Array:
    limit = chunk_limit(POINTWISE_CHUNK_CPU if jax.default_backend() == "cpu" else POINTWISE_CHUNK)
    positions = x.size // x.shape[-1]
    chunks = -(-positions // limit)
    if chunks == 1:
        return function(variables, (x,))
    size = -(-positions // chunks)  # the most even chunks, the last one filled up
    filled = jnp.pad(rearrange(x, "... c -> (...) c"), ((0, chunks * size - positions), (0, 0)))
    y = chunked_map(function, False, variables, (rearrange(filled, "(n s) c -> n s c", n=chunks),))
    return rearrange(y, "n s c -> (n s) c")[:positions].reshape(*x.shape[:-1], -1)
