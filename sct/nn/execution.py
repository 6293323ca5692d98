"""Run layers on several devices and in chunks, and choose which values are saved for the backward pass.

The model files define what a layer computes; this file defines how it runs. Measurements are in docs/performance.md.

`by_cells` runs a layer over a bag, which is one sequence (B, K * G, C) of K cells with G positions each. The layer has
two methods, because a norm needs all positions of a cell, and a convolution needs the ends of the neighboring cells:

- `normalize(x)` normalizes each cell separately.
- `convolve(x, borders, skip)` computes the rest of the layer. `borders` is a pair of arrays (B, halo, C): the `halo`
  positions before x, and the `halo` positions after x.

**Devices.** Each device runs the layer on its own cells, and receives the borders of the normalized sequence from its
neighbors. If layers did not exchange borders, XLA would gather the whole sequence for every norm and convolution.

**Chunks.** On CPU, a level of a convolution tower processes the bag in chunks of a few cells, for two reasons. First, a
chunk stays in the cache. Second, XLA for CPU fuses a sum with all elementwise operations around it into one loop, which
runs at a tenth of the memory bandwidth. XLA does not fuse operations across the loop over chunks. With chunks, the time
of a training step on 10 full-size cells fell from 38 s to 21 s, and the memory use of the step fell from 11.6 GiB to
4.6 GiB. Accelerators process the whole bag at once.

**Saved values.** `remat` sets which values the forward pass saves for the backward pass, which recomputes the rest:
"none" saves everything, "products" saves the outputs of convolutions and matrix products, and "level" saves nothing. A
tower level that runs in chunks also saves its normalized input, except with "level". With "none", such a level saves
the same values as with "products".
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

from sct.nn import axes, target
from sct.nn.chunked_map import SAVEABLE, chunked_map
from sct.nn.conv import Borders
from sct.nn.paths import flatten, unflatten
from sct.nn.reference import chunk_limit, use_reference

# Positions in a chunk of a tower level on CPU: enough for matrix products to run at full speed.
LEVEL_CHUNK_CPU = 4096
# Positions in a chunk of a pointwise layer. Small chunks stay in a CPU's cache; large ones keep an accelerator busy.
POINTWISE_CHUNK_CPU, POINTWISE_CHUNK = 4096, 65_536

_Layer = TypeVar("_Layer", bound=type[nn.Module])


def by_cells(
    layer: Any, x: jax.Array, skip: jax.Array | None = None, *, num_positions: int, halo: int, chunked: bool = True,
    remat: str = "none",
) -> jax.Array:  # fmt: skip
    """Compute `layer.convolve(layer.normalize(x), borders, skip)` on several devices and in chunks of cells.

    The docstring of this module explains devices, chunks and saved values.

    Parameters
    ----------
    layer
        Bound Flax module. The parameters of its method `normalize` lie under "block/norm".
    x, skip
        Sequence (B, K * G, C), and the skip connection (B, K * G', C') or None.
    num_positions
        Number of positions of a cell in x (G).
    halo
        Number of positions that `convolve` reads beyond each end of its input; 0 if convolutions do not read across
        cell borders.
    chunked
        Whether the layer processes a large bag in chunks on CPU.
    remat
        Which values are saved for the backward pass: "none", "products" or "level".

    Returns
    -------
    Sequence (B, K * G', C').
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
    """Apply a method of a layer to chunks of positions: (..., C) -> (..., C').

    The method must treat each position separately. Chunks of positions save memory in layers with hidden vectors much
    wider than their inputs. In the head of sCT, the hidden vectors of a million positions take 4 GiB, and their
    gradients another 4 GiB.

    Parameters
    ----------
    layer, method
        Bound Flax module, and the name of its method.
    x
        Input vectors (..., C).
    cells
        Number of cells (K) if x is a whole bag (B, K * G, C); each device then processes its own cells. None if x holds
        only some positions of a bag; on a mesh, these positions are processed all at once.
    """
    if layer.is_initializing() or use_reference() or (cells is None and axes.is_sharded()):
        return cast(jax.Array, getattr(layer, method)(x))
    run = functools.partial(_positions_in_chunks, _Method(layer.clone(parent=None, name=None), method))
    if cells is None:
        return run(layer.variables, x)
    return axes.on_each_device(run, layer.variables, x, cells=cells)


def rematerialized(layer: _Layer, remat: str, prevent_cse: bool = True) -> _Layer:
    """Return the layer's class, changed so that the backward pass recomputes the values that `remat` does not save.

    `remat="none"` saves everything, "products" saves the outputs of matrix products (but not attention scores), and
    "level" saves nothing. `prevent_cse=False` is safe if a loop (`jax.lax.scan`) runs the layer; see `jax.checkpoint`.
    """
    if remat == "none":
        return layer
    policies = {"products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
    return cast(_Layer, nn.remat(layer, policy=policies.get(remat), prevent_cse=prevent_cse))


def cells_per_chunk(cells: int, num_positions: int) -> int:
    """Return the number of cells in each chunk of a bag. This number divides `cells`.

    On CPU, the number is the smallest one whose positions fill a chunk. On accelerators, the number is `cells`, so the
    bag is a single chunk. On a mesh, `cells` is the number of cells of a bag on one device.
    """
    if use_reference() or target.platform() != "cpu" or axes.is_sharded():
        return cells
    least = chunk_limit(LEVEL_CHUNK_CPU)
    return next((n for n in range(1, cells) if cells % n == 0 and n * num_positions >= least), cells)


@dataclasses.dataclass(frozen=True)
class _Method:
    """Wrap a method of an unbound module as a hashable function of variables and inputs, for `chunked_map`."""

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

    # Normalize all chunks first, because the convolution of a chunk reads the normalized borders of its neighbors.
    norm, rest = _split(params)
    y = chunked_map(_Method(layer, "normalize"), False, norm, (cut(x),))
    borders = _borders_of_chunks(join(y), halo, chunks) if halo else None
    skips = None if skip is None else cut(skip)
    return join(chunked_map(_Method(layer, "convolve"), save, rest, (y, borders, skips)))


def _split(params: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split the parameters of a layer into the variables that `normalize` uses and those that `convolve` uses.

    The loop of the backward pass carries one sum per parameter, so each loop gets only the parameters that it needs.
    """
    flat = flatten(params)
    norm = {path: value for path, value in flat.items() if path.startswith("block/norm/")}
    rest = {path: value for path, value in flat.items() if path not in norm}
    return {"params": unflatten(norm)}, {"params": unflatten(rest)}


def _borders_of_chunks(x: jax.Array, halo: int, chunks: int) -> Borders:
    """Return the `halo` positions before each of the n chunks of x (B, L, C), and the `halo` positions after each.

    Both results have the shape (B * n, 1, halo, C).
    """
    first, last = axes.neighbor_positions(x, halo)
    parts = rearrange(x, "b (n l) c -> b n l c", n=chunks)
    before = jnp.concatenate([first[:, None], parts[:, :-1, -halo:]], axis=1)
    after = jnp.concatenate([parts[:, 1:, :halo], last[:, None]], axis=1)
    return rearrange(before, "b n l c -> (b n) 1 l c"), rearrange(after, "b n l c -> (b n) 1 l c")


def _positions_in_chunks(function: _Method, variables: Any, x: jax.Array) -> jax.Array:
    limit = chunk_limit(POINTWISE_CHUNK_CPU if target.platform() == "cpu" else POINTWISE_CHUNK)
    positions = x.size // x.shape[-1]
    chunks = -(-positions // limit)
    if chunks == 1:
        return function(variables, (x,))
    size = -(-positions // chunks)  # equal chunks; the last one is padded
    filled = jnp.pad(rearrange(x, "... c -> (...) c"), ((0, chunks * size - positions), (0, 0)))
    y = chunked_map(function, False, variables, (rearrange(filled, "(n s) c -> n s c", n=chunks),))
    return rearrange(y, "n s c -> (n s) c")[:positions].reshape(*x.shape[:-1], -1)
