"""Kinds of adapters: which layers have one, of what size and shape, and what it starts from.

`sct.nn.adapters` says what each kind computes, `sct.models.adapters` makes collections of them.
"""

from __future__ import annotations

import abc
import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sct.checks import check_at_least, check_choice, check_positive, check_share
from sct.errors import ConfigError
from sct.models import registry
from sct.nn import axes
from sct.nn.adapters import BOTTLENECK, LOW_RANK, PREFIX, Kind
from sct.nn.paths import flatten

Box = nn.LogicallyPartitioned
# Shape and axis names of an array of one layer's adapter.
Shapes = dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]]

_PREFIX_DEVIATION = 0.02


def is_stacked(box: Box) -> bool:
    """Whether the first axis of a boxed array is that of the layers of a stack."""
    return bool(box.names) and box.names[0] == axes.LAYERS


def _matrices(params: Any, name: str) -> dict[str, Box]:
    """Boxed matrices of a name, by the path of their layer."""
    found = {}
    for path, box in flatten(params).items():
        layer, _, leaf = path.rpartition("/")
        if leaf != name:
            continue
        if not isinstance(box, Box):
            raise ConfigError(
                f"the {name} of {layer!r} has no axis names: give parameters as `module.init` makes them, or their "
                "shapes from sct.weights.pretrained.boxed_shapes."
            )
        # A convolution has a third axis, that of its taps.
        if len(box.names) - is_stacked(box) == 2:
            found[layer] = box
    return found


def kernels(params: Any) -> dict[str, Box]:
    """Boxed kernels of the dense layers among boxed parameters, by the path of the layer.

    Raises
    ------
    ConfigError
        A kernel has no axis names.
    """
    return _matrices(params, "kernel")


class AdapterConfig(abc.ABC):
    """Which layers have an adapter of a kind, and of what size; a frozen dataclass for each kind.

    Attributes
    ----------
    arrays
        Names of the arrays.
    place
        What messages call a layer that can have one.
    targets
        Regular expressions, searched for in the paths of these layers.
    layers
        Numbers of the blocks whose layers have one; none: all.
    """

    arrays: ClassVar[Kind]
    place: ClassVar[str]
    targets: tuple[str, ...]
    layers: tuple[int, ...]

    def check_places(self) -> None:
        """Raise `ConfigError` unless targets and layers can be a choice."""
        if isinstance(self.targets, str) or not self.targets:
            raise ConfigError(
                f"targets are {self.targets!r}, but a tuple of one or more regular expressions is needed."
            )
        for target in self.targets:
            try:
                re.compile(target)
            except (re.error, TypeError) as error:
                raise ConfigError(f"the target {target!r} is no regular expression ({error}).") from None
        numbers = self.layers if isinstance(self.layers, tuple) else (None,)
        if len(set(numbers)) < len(numbers) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ConfigError(
                f"layers are {self.layers!r}, but a tuple of different numbers, counted from 0, is needed, or an empty "
                "one for all."
            )

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """Rank, width or length."""

    @staticmethod
    @abc.abstractmethod
    def places(params: Any) -> dict[str, Box]:
        """Boxed matrices of all layers that can have an adapter, by the path of the layer."""

    @staticmethod
    @abc.abstractmethod
    def size_of(shape: tuple[int, ...]) -> int:
        """Size of an adapter, by the shape of its first array."""

    @property
    @abc.abstractmethod
    def numbers(self) -> dict[str, float]:
        """Numbers of an adapter, which are not trained, by name of the array."""

    @staticmethod
    @abc.abstractmethod
    def shapes(box: Box, size: int, numbers: Collection[str]) -> Shapes:
        """Arrays of an adapter of one layer, of which `numbers` are there, beside a boxed matrix."""

    @abc.abstractmethod
    def draw(self, key: jax.Array, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, jax.Array]:
        """Initial values, float32, of what is trained."""

    @staticmethod
    @abc.abstractmethod
    def options(adapter: Mapping[str, Any]) -> dict[str, float]:
        """Options that are kept with an adapter, by name."""


def _uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Matrices (..., in, out) drawn from +- 1 / sqrt(in)."""
    bound = shape[-2] ** -0.5
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def _first(value: Any) -> float:
    return float(np.ravel(value)[0])


@dataclasses.dataclass(frozen=True)
class LoraConfig(AdapterConfig):
    """Which dense layers have a low-rank adapter (LoRA; Hu et al. 2022), and of what size.

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
    layers
        Numbers of the blocks, counted from 0, whose dense layers have one, and none elsewhere; empty: all.
    """

    targets: tuple[str, ...] = registry.QUERY_VALUE
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    layers: tuple[int, ...] = ()

    arrays: ClassVar[Kind] = LOW_RANK
    place: ClassVar[str] = "dense layer"
    places = staticmethod(kernels)

    def __post_init__(self) -> None:
        self.check_places()
        check_at_least("rank", self.rank, 1)
        check_positive("alpha", self.alpha)
        check_share("dropout", self.dropout, one=False)

    @classmethod
    def of(cls, family: str, **options: Any) -> LoraConfig:
        """Make a configuration with the targets that a family has by default."""
        if options.get("targets"):
            return cls(**options)
        targets = {name: each.targets for name, each in registry.MODELS.items() if each.targets}
        check_choice(
            "the family",
            family,
            sorted(targets),
            advice="give targets (adapters.targets), for only these families have some by default",
        )
        return cls(**{**options, "targets": targets[family]})

    @property
    def size(self) -> int:
        """See `AdapterConfig`."""
        return self.rank

    @staticmethod
    def size_of(shape: tuple[int, ...]) -> int:
        """See `AdapterConfig`."""
        return shape[-1]

    @property
    def numbers(self) -> dict[str, float]:
        """See `AdapterConfig`."""
        # Where nothing is dropped there is no share, so that no random numbers are drawn.
        dropout = {"dropout": self.dropout} if self.dropout else {}
        return {"scale": self.alpha / self.rank, **dropout}

    @staticmethod
    def shapes(box: Box, size: int, numbers: Collection[str]) -> Shapes:
        """See `AdapterConfig`."""
        (width, features), (into, out) = box.value.shape[-2:], box.names[-2:]
        dropout: Shapes = {"dropout": ((), ())} if "dropout" in numbers else {}
        return {
            "lora_a": ((width, size), (into, None)),
            "lora_b": ((size, features), (None, out)),
            "scale": ((), ()),
            **dropout,
        }

    def draw(self, key: jax.Array, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, jax.Array]:
        """See `AdapterConfig`."""
        return {"lora_a": _uniform(key, shapes["lora_a"]), "lora_b": jnp.zeros(shapes["lora_b"], jnp.float32)}

    @staticmethod
    def options(adapter: Mapping[str, Any]) -> dict[str, float]:
        """See `AdapterConfig`."""
        rank = np.shape(adapter["lora_a"])[-1]
        return {"alpha": _first(adapter["scale"]) * rank, "dropout": _first(adapter.get("dropout", 0.0))}


@dataclasses.dataclass(frozen=True)
class BottleneckConfig(AdapterConfig):
    """Which layers have a bottleneck behind them (scPEFT), and of what width.

    Outputs y of the layer become `y + scale * up(relu(down(y)))`, where `down` and `up` are dense layers with biases:
    2 D s + s + D trained parameters each. The default targets are those of the paper's "gene encoder prompt", attention
    and feed-forward of each block before they are added to the block's input; behind the embedding of genes or bins it
    is the "gene token prompt".

    Parameters
    ----------
    targets
        Regular expressions, searched for in the paths of dense layers and of tables: "layers/mlp/down", "token", ...
    width
        Width s between the two maps.
    scale
        Factor of what the bottleneck gives.
    skip
        Whether y is added. The up-projection begins with zeros then, so that a fresh bottleneck changes nothing. The
        paper's form is without: `scale * up(relu(down(y)))`, both maps random in the beginning.
    layers
        See `LoraConfig`.
    """

    targets: tuple[str, ...] = (r"attention/out$", r"mlp/down$")
    width: int = 128
    scale: float = 1.0
    skip: bool = True
    layers: tuple[int, ...] = ()

    arrays: ClassVar[Kind] = BOTTLENECK
    place: ClassVar[str] = "dense layer or table"

    def __post_init__(self) -> None:
        self.check_places()
        check_at_least("width", self.width, 1)
        check_positive("scale", self.scale)

    @property
    def size(self) -> int:
        """See `AdapterConfig`."""
        return self.width

    @staticmethod
    def places(params: Any) -> dict[str, Box]:
        """See `AdapterConfig`."""
        return {**kernels(params), **_matrices(params, "embedding")}

    @staticmethod
    def size_of(shape: tuple[int, ...]) -> int:
        """See `AdapterConfig`."""
        return shape[-1]

    @property
    def numbers(self) -> dict[str, float]:
        """See `AdapterConfig`."""
        return {"bottleneck_scale": self.scale, "bottleneck_skip": float(self.skip)}

    @staticmethod
    def shapes(box: Box, size: int, numbers: Collection[str]) -> Shapes:
        """See `AdapterConfig`."""
        features, out = box.value.shape[-1], box.names[-1]
        return {
            "bottleneck_down": ((features, size), (out, None)),
            "bottleneck_down_bias": ((size,), (None,)),
            "bottleneck_up": ((size, features), (None, out)),
            "bottleneck_up_bias": ((features,), (out,)),
            "bottleneck_scale": ((), ()),
            "bottleneck_skip": ((), ()),
        }

    def draw(self, key: jax.Array, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, jax.Array]:
        """See `AdapterConfig`."""
        down, up = jax.random.split(key)
        zeros = {name: jnp.zeros(shapes[name], jnp.float32) for name in BOTTLENECK.trained}
        drawn = {"bottleneck_down": _uniform(down, shapes["bottleneck_down"])}
        if not self.skip:
            drawn["bottleneck_up"] = _uniform(up, shapes["bottleneck_up"])
        return {**zeros, **drawn}

    @staticmethod
    def options(adapter: Mapping[str, Any]) -> dict[str, float]:
        """See `AdapterConfig`."""
        return {name: _first(adapter[f"bottleneck_{name}"]) for name in ("scale", "skip")}


@dataclasses.dataclass(frozen=True)
class PrefixConfig(AdapterConfig):
    """Which attentions have a prefix (Li & Liang 2021), and of what length.

    A prefix is `length` trained vectors of the width of what keys and values are made of. They go through the
    attention's own maps of keys and values, which stay as they are, and come before the other keys and values. Every
    query may attend to them, whatever a mask says of other keys. They have no place in the sequence: with rotary
    positions their keys are not rotated, and the positions of all else stay as they are. A fresh prefix changes the
    model's outputs.

    Parameters
    ----------
    targets
        Regular expressions, searched for in the paths of the attentions: "layers/attention", ...
    length
        Vectors of each (n).
    layers
        See `LoraConfig`.
    """

    targets: tuple[str, ...] = (r"attention$",)
    length: int = 64
    layers: tuple[int, ...] = ()

    arrays: ClassVar[Kind] = PREFIX
    place: ClassVar[str] = "attention"

    def __post_init__(self) -> None:
        self.check_places()
        check_at_least("length", self.length, 1)

    @property
    def size(self) -> int:
        """See `AdapterConfig`."""
        return self.length

    @staticmethod
    def places(params: Any) -> dict[str, Box]:
        """See `AdapterConfig`."""
        dense = kernels(params)
        keys = {
            layer.rpartition("/")[0]: box for layer, box in dense.items() if layer.rpartition("/")[2] == "key"
        }
        return {
            place: box for place, box in keys.items() if (f"{place}/value" if place else "value") in dense
        }

    @staticmethod
    def size_of(shape: tuple[int, ...]) -> int:
        """See `AdapterConfig`."""
        return shape[-2]

    @property
    def numbers(self) -> dict[str, float]:
        """See `AdapterConfig`."""
        return {}

    @staticmethod
    def shapes(box: Box, size: int, numbers: Collection[str]) -> Shapes:
        """See `AdapterConfig`."""
        return {"prefix": ((size, box.value.shape[-2]), (None, box.names[-2]))}

    def draw(self, key: jax.Array, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, jax.Array]:
        """See `AdapterConfig`."""
        return {"prefix": _PREFIX_DEVIATION * jax.random.normal(key, shapes["prefix"], jnp.float32)}

    @staticmethod
    def options(adapter: Mapping[str, Any]) -> dict[str, float]:
        """See `AdapterConfig`."""
        return {}


CONFIGS: tuple[type[AdapterConfig], ...] = (LoraConfig, BottleneckConfig, PrefixConfig)
