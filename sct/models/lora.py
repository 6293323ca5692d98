"""Low-rank adapters (LoRA; Hu et al. 2022): made beside a model's parameters, counted, and merged into them.

An adapter lies in the collection "adapters" under the path of its dense layer; `sct.nn.adapters` says what it holds
and adds it up. Parameters are never touched before `merge`.
"""

from __future__ import annotations

import dataclasses
import math
import re
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sct.errors import CheckpointError, ConfigError
from sct.nn import axes
from sct.nn.adapters import COLLECTION
from sct.nn.paths import flatten, unflatten

# Dense layers that get an adapter where nothing else is said. For GPT-2 and GPT-NeoX it is what the PEFT library
# adapts, whose layers hold all three projections in one.
_TWO, _THREE = (r"attention/(query|value)$",), (r"attention/(query|key|value)$",)
TARGETS: Mapping[str, tuple[str, ...]] = {
    "sct": _TWO, "gpt2": _THREE, "neox": _THREE, "llama": _TWO, "bert": _TWO
}  # fmt: skip
# For a task that trains the adapters alone (`trainable`), on a model that has none yet (`new`).
TRAINABLE: tuple[tuple[str, bool], ...] = ((rf"^{COLLECTION}/.*lora_[ab]$", True), (".*", False))
NEW: tuple[str, ...] = (rf"^{COLLECTION}/",)
_SHOWN = 8


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which dense layers have a low-rank adapter, and of what size.

    Parameters
    ----------
    targets
        Regular expressions, searched for in the paths of the dense layers: "layers/attention/query", "head", ...
        Every layer in which one is found has an adapter, in all layers of a stack.
    rank
        Width between the two matrices of an adapter (r).
    alpha
        What the adapter gives is multiplied by alpha / rank.
    dropout
        Share of an adapter's inputs that is left out in training.
    """

    targets: tuple[str, ...] = _TWO
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.targets, str) or not self.targets:
            raise ConfigError(
                f"targets are {self.targets!r}, but a tuple of one or more regular expressions is needed."
            )
        for target in self.targets:
            try:
                re.compile(target)
            except (re.error, TypeError) as error:
                raise ConfigError(f"the target {target!r} is no regular expression ({error}).") from None
        if self.rank < 1:
            raise ConfigError(f"rank is {self.rank}, but it must be at least 1.")
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"alpha is {self.alpha}, but it must be positive.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout}, but it must lie in [0, 1).")

    @classmethod
    def of(cls, family: str, **options: Any) -> LoraConfig:
        """Make a configuration with the targets that a family has by default."""
        if family not in TARGETS:
            raise ConfigError(
                f"the family {family!r} has no default targets: give LoraConfig some, or choose from "
                f"{', '.join(sorted(TARGETS))}."
            )
        return cls(**{"targets": TARGETS[family], **options})


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Several adapters of every layer that are all summed, of which a sample trains its own (ZerOmics, section 3.2).

    The members lie side by side in one adapter of as many times the rank: whatever reads, merges or exports adapters
    has their sum, and a forward pass costs no more than that of one.

    Parameters
    ----------
    members
        Names, such as "universal" and those of tasks.
    each
        Options of one of them; `alpha / rank` is the factor of each.
    """

    members: tuple[str, ...]
    each: LoraConfig

    def __post_init__(self) -> None:
        if not self.members or len(set(self.members)) < len(self.members):
            raise ConfigError(f"members are {self.members!r}, but one or more different names are needed.")

    @property
    def config(self) -> LoraConfig:
        """Options of the one adapter that holds all members."""
        number = len(self.members)
        return dataclasses.replace(self.each, rank=self.each.rank * number, alpha=self.each.alpha * number)

    def place(self, member: str) -> slice:
        """Columns of `lora_a`, and rows of `lora_b`, of a member."""
        first = self.members.index(member) * self.each.rank
        return slice(first, first + self.each.rank)

    def gate(self, trains: jax.Array) -> jax.Array:
        """Which columns each sample trains (B, members x rank), of which members it does, (B, members)."""
        return jnp.repeat(trains.astype(jnp.float32), self.each.rank, axis=1)


def gated(variables: Mapping[str, Any], trained: jax.Array) -> dict[str, Any]:
    """Variables for a call in which the gradient of each sample reaches a part of the adapters alone.

    Nothing else changes: the outputs, and the gradient that passes through the adapters to the layers below, are
    those without it.

    Parameters
    ----------
    variables
        Nested arrays with the collection "adapters".
    trained
        (B, r), see `Mixture.gate`.
    """
    adapters = flatten(variables[COLLECTION])
    gates = {
        _under(layer, "trained"): jnp.broadcast_to(trained, (*jnp.shape(adapter["scale"]), *trained.shape))
        for layer, adapter in adapted(variables)
    }
    return {**variables, COLLECTION: unflatten({**adapters, **gates})}


def _under(layer: str, leaf: str) -> str:
    return f"{layer}/{leaf}" if layer else leaf


def _split(path: str) -> tuple[str, str]:
    layer, _, leaf = path.rpartition("/")
    return layer, leaf


def kernels(params: Any) -> dict[str, nn.LogicallyPartitioned]:
    """Boxed kernels of the dense layers among boxed parameters, by the path of the layer.

    Raises
    ------
    ConfigError
        A kernel has no axis names.
    """
    found = {}
    for path, box in flatten(params).items():
        layer, leaf = _split(path)
        if leaf != "kernel":
            continue
        if not isinstance(box, nn.LogicallyPartitioned):
            raise ConfigError(
                f"the kernel of {layer!r} has no axis names: give parameters as `module.init` makes them, or their "
                "shapes from sct.weights.pretrained.boxed_shapes."
            )
        # A convolution has a third axis, that of its taps.
        if len(box.names) - _stacked(box) == 2:
            found[layer] = box
    return found


def _stacked(box: nn.LogicallyPartitioned) -> bool:
    return bool(box.names) and box.names[0] == axes.LAYERS


def chosen(params: Any, config: LoraConfig) -> dict[str, nn.LogicallyPartitioned]:
    """Boxed kernels that a configuration's targets find, by the path of the layer.

    Raises
    ------
    ConfigError
        A target that finds none.
    """
    dense = kernels(params)
    for target in config.targets:
        if not any(re.search(target, layer) for layer in dense):
            more = ", ..." if len(dense) > _SHOWN else ""
            raise ConfigError(
                f"the target {target!r} matches no dense layer of the model: choose from "
                f"{', '.join(sorted(dense)[:_SHOWN])}{more}."
            )
    return {
        layer: box
        for layer, box in dense.items()
        if any(re.search(target, layer) for target in config.targets)
    }


def _adapter(box: nn.LogicallyPartitioned, rank: int, dropout: bool) -> dict[str, nn.LogicallyPartitioned]:
    """Shapes and axis names of a kernel's adapter."""
    shape, stacked = box.value.shape, _stacked(box)
    lead, (width, features) = shape[:-2], shape[-2:]
    layers, (into, out) = box.names[:-2], box.names[-2:]

    def boxed(shape: tuple[int, ...], names: tuple[str | None, ...]) -> nn.LogicallyPartitioned:
        return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)

    made = {
        "lora_a": boxed((*lead, width, rank), (*layers, into, None)),
        "lora_b": boxed((*lead, rank, features), (*layers, None, out)),
        "scale": boxed(lead, layers if stacked else ()),
    }
    return {**made, "dropout": boxed(lead, layers if stacked else ())} if dropout else made


def init(rng: jax.Array, params: Any, config: LoraConfig) -> dict[str, Any]:
    """Make the adapters of a model, which change nothing before they are trained.

    The first matrix of each is drawn uniformly from +- 1 / sqrt(in), the second is zero.

    Parameters
    ----------
    rng
        PRNG key; a layer's own key depends on its path alone.
    params
        The collection "params", or its shapes, boxed with axis names; under `jax.eval_shape` nothing is allocated.

    Returns
    -------
    The collection "adapters", float32, boxed with the axis names of the kernels:
    `{**variables, "adapters": lora.init(rng, variables["params"], config)}` are the variables of an adapted model.

    Raises
    ------
    ConfigError
        A target that matches no dense layer.
    """
    made: dict[str, Any] = {}
    for layer, box in chosen(params, config).items():
        adapter = _adapter(box, config.rank, bool(config.dropout))
        first = adapter["lora_a"].value
        bound = first.shape[-2] ** -0.5
        key = jax.random.fold_in(rng, zlib.crc32(layer.encode()))
        values = {
            "lora_a": jax.random.uniform(key, first.shape, jnp.float32, -bound, bound),
            "lora_b": jnp.zeros(adapter["lora_b"].value.shape, jnp.float32),
            "scale": jnp.full(adapter["scale"].value.shape, config.alpha / config.rank, jnp.float32),
            "dropout": jnp.full(adapter["scale"].value.shape, config.dropout, jnp.float32),
        }
        made |= {_under(layer, leaf): box.replace_boxed(values[leaf]) for leaf, box in adapter.items()}
    return unflatten(made)


def beside(variables: Any, found: Mapping[str, Any]) -> Any:
    """Boxed shapes of a model, with those of the adapters that a file has for it.

    Parameters
    ----------
    variables
        Boxed shapes of the model without adapters.
    found
        What the file holds: shapes by path. Of adapters the rank is taken, and whether there is dropout; the other
        sizes are those of the kernels, so that a comparison with `found` tells what does not fit.
    """
    dense = kernels(variables["params"])
    made: dict[str, Any] = {}
    for path, value in found.items():
        layer, leaf = _split(path.removeprefix(f"{COLLECTION}/"))
        if path.startswith(f"{COLLECTION}/") and leaf == "lora_a" and layer in dense and value.shape:
            dropout = _under(f"{COLLECTION}/{layer}" if layer else COLLECTION, "dropout") in found
            adapter = _adapter(dense[layer], value.shape[-1], dropout)
            made |= {_under(layer, name): box for name, box in adapter.items()}
    return {**variables, COLLECTION: unflatten(made)} if made else variables


def adapted(variables: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each layer's path and adapter, of the collection "adapters" of a model."""
    layers: dict[str, dict[str, Any]] = {}
    for path, value in flatten(variables.get(COLLECTION, {})).items():
        layer, leaf = _split(path)
        layers.setdefault(layer, {})[leaf] = value
    yield from layers.items()


def check_same(variables: Mapping[str, Any], config: LoraConfig, what: str) -> None:
    """Raise `ConfigError` where the adapters of a model have another scale or dropout than a configuration says.

    These are kept with the adapters, so what the configuration says would have no effect. `what` names the model.
    """
    for layer, adapter in adapted(variables):
        rank = np.shape(adapter["lora_a"])[-1]
        kept = {
            "alpha": float(np.ravel(adapter["scale"])[0]) * rank,
            "dropout": float(np.ravel(adapter.get("dropout", 0.0))[0]),
        }
        for name, value in kept.items():
            if not math.isclose(value, wanted := getattr(config, name), rel_tol=1e-5, abs_tol=1e-7):
                raise ConfigError(
                    f"the adapter of {layer!r} in {what} has {name} {value:g}, but {wanted:g} is asked for: ask for "
                    "its own, or merge the adapters first (sct.models.lora.merge)."
                )


def merge(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Variables without adapters that compute the same: what an adapter gives is added to its kernel.

    Kernels keep their types; the sums are made in float32. A key for dropout changes nothing any more.

    Raises
    ------
    CheckpointError
        An adapter of a layer that the model does not have.
    """
    params = flatten(variables["params"])
    for layer, adapter in adapted(variables):
        path = _under(layer, "kernel")
        if path not in params:
            raise CheckpointError(
                f"there is an adapter of {layer!r}, but the model has no such layer: give the model that the "
                "adapter was trained on."
            )
        kernel = jnp.asarray(params[path])
        change = jnp.matmul(adapter["lora_a"], adapter["lora_b"], precision=jax.lax.Precision.HIGHEST)
        change = change * jnp.asarray(adapter["scale"])[..., None, None]
        params[path] = (kernel.astype(jnp.float32) + change).astype(kernel.dtype)
    rest = {name: tree for name, tree in variables.items() if name != COLLECTION}
    return {**rest, "params": unflatten(params)}


def count(adapters: Mapping[str, Any]) -> int:
    """Number of trained parameters of the collection "adapters"."""
    sizes = (
        np.prod(value.shape, dtype=np.int64)
        for path, value in flatten(nn.unbox(adapters)).items()
        if _split(path)[1] in ("lora_a", "lora_b")
    )
    return int(sum(sizes))
