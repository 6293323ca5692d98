"""Define the options, the array shapes and the initial values of the three kinds of adapters.

`sct.nn.adapters` defines what each kind computes. `sct.models.adapters` makes the adapters of a model.
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
from sct.nn.adapters import BOTTLENECK, LOW_RANK, PREFIX, PREFIX_SEEN, Kind
from sct.nn.paths import flatten

Box = nn.LogicallyPartitioned
# Shape and axis names of each array in the adapter of one layer.
Shapes = dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]]

_PREFIX_DEVIATION = 0.02


def is_stacked(box: Box) -> bool:
    """Return whether the first axis of a boxed array is the layer axis of a stack. The box holds the axis names too."""
    return bool(box.names) and box.names[0] == axes.LAYERS


def _matrices(params: Any, name: str) -> dict[str, Box]:
    """Find the boxed matrices called `name` in all layers, and return these matrices as a dict by layer path.

    `name` is "kernel" for dense layers and "embedding" for embedding tables. A box holds an array and its axis names.
    """
    found = {}
    for path, box in flatten(params).items():
        layer, _, leaf = path.rpartition("/")
        if leaf != name:
            continue
        if not isinstance(box, Box):
            raise ConfigError(
                f"the {name} of {layer!r} is an array without axis names, but adapters need the axis names: pass the "
                "parameters exactly as `module.init` returns them, or the shapes from "
                "`sct.weights.pretrained.boxed_shapes`."
            )
        # The kernel of a convolution has a third axis, its positions, and gets no adapter.
        if len(box.names) - is_stacked(box) == 2:
            found[layer] = box
    return found


def kernels(params: Any) -> dict[str, Box]:
    """Find the kernels of all dense layers in boxed parameters, and return the boxed kernels as a dict by layer path.

    Raises
    ------
    ConfigError
        A kernel has no axis names.
    """
    return _matrices(params, "kernel")


class AdapterConfig(abc.ABC):
    """Options of one kind of adapter: which layers get an adapter, and how large it is.

    Each kind is a frozen dataclass.

    Attributes
    ----------
    arrays
        The kind of adapter: a `Kind` object with the names of the adapter's arrays.
    place
        Term that error messages use for a layer that can have this kind of adapter, such as "dense layer".
    targets
        Regular expressions. A layer gets an adapter if one of the expressions matches the path of the layer
        (`re.search`).
    layers
        Indices of the blocks whose layers get an adapter, counted from 0. Empty means all blocks.
    """

    arrays: ClassVar[Kind]
    place: ClassVar[str]
    targets: tuple[str, ...]
    layers: tuple[int, ...]

    def check_places(self) -> None:
        """Raise `ConfigError` unless `targets` are regular expressions and `layers` are distinct block numbers."""
        if isinstance(self.targets, str) or not self.targets:
            raise ConfigError(
                f"`targets` is {self.targets!r}, but must be a tuple of one or more regular expressions: write "
                "('PATTERN',) for a single one."
            )
        for target in self.targets:
            try:
                re.compile(target)
            except (re.error, TypeError) as error:
                raise ConfigError(
                    f"`targets` contains {target!r}, but each entry must be a valid regular expression ({error}): "
                    "correct this entry."
                ) from None
        numbers = self.layers if isinstance(self.layers, tuple) else (None,)
        if len(set(numbers)) < len(numbers) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ConfigError(
                f"`layers` is {self.layers!r}, but must be a tuple of distinct block numbers, counted from 0: write "
                "for example (0, 1), or () for all blocks."
            )

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """Return the size of an adapter: its rank, width or length."""

    @staticmethod
    @abc.abstractmethod
    def places(params: Any) -> dict[str, Box]:
        """Return the boxed matrices of all layers that can have this kind of adapter, as a dict by layer path."""

    @staticmethod
    @abc.abstractmethod
    def size_of(shape: tuple[int, ...]) -> int:
        """Compute the rank, width or length of an adapter from the shape of its first array."""

    @property
    @abc.abstractmethod
    def numbers(self) -> dict[str, float]:
        """Return the constants of the adapter, as a dict by array name. Constants are not trained."""

    @staticmethod
    @abc.abstractmethod
    def shapes(box: Box, size: int, numbers: Collection[str]) -> Shapes:
        """Return the shapes and axis names of the arrays in the adapter of one layer.

        Parameters
        ----------
        box
            Boxed matrix of the layer.
        size
            Rank, width or length of the adapter.
        numbers
            Names of the adapter's constants, which are arrays that are not trained.
        """

    @abc.abstractmethod
    def draw(self, key: jax.Array, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, jax.Array]:
        """Draw the initial values (float32) of the trained arrays of an adapter."""

    @staticmethod
    @abc.abstractmethod
    def options(adapter: Mapping[str, Any]) -> dict[str, float]:
        """Recover the options of an adapter, such as alpha, from its arrays, as a dict by option name."""


def _uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draw matrices (..., in, out) uniformly from -1 / sqrt(in) to 1 / sqrt(in)."""
    bound = shape[-2] ** -0.5
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def _first(value: Any) -> float:
    return float(np.ravel(value)[0])


@dataclasses.dataclass(frozen=True)
class LoraConfig(AdapterConfig):
    """Options of low-rank adapters (LoRA; Hu et al. 2022): which dense layers get an adapter, and its rank.

    Parameters
    ----------
    targets
        Regular expressions, such as "layers/attention/query" or "head". A dense layer gets an adapter if one of the
        expressions matches the path of the layer (`re.search`). If the expression matches a stack, every layer of the
        stack gets an adapter, unless `layers` selects some of them.
    rank
        Rank r of the adapter, whose two matrices have the shapes (in, r) and (r, out).
    alpha
        The output of the adapter is multiplied by alpha / rank.
    dropout
        Fraction of the adapter's inputs that is set to zero during training.
    layers
        Indices of the blocks whose dense layers get an adapter, counted from 0. Empty means all blocks. If `layers` is
        set, dense layers outside blocks get no adapter.
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
        """Make the configuration of this kind of adapter from a dict of options.

        If `targets` is not among the options, use the default targets of the model family.
        """
        if options.get("targets"):
            return cls(**options)
        targets = {name: each.targets for name, each in registry.MODELS.items() if each.targets}
        check_choice(
            "the model family",
            family,
            sorted(targets),
            advice="set adapters.targets, because only these families have default targets",
        )
        return cls(**{**options, "targets": targets[family]})

    @property
    def size(self) -> int:
        """Return the rank of the adapter."""
        return self.rank

    @staticmethod
    def size_of(shape: tuple[int, ...]) -> int:
        """Return the rank of a low-rank adapter whose array `lora_a` has the given shape."""
        return shape[-1]

    @property
    def numbers(self) -> dict[str, float]:
        """Return the constants of the adapter, its scale and its dropout rate, as a dict by array name."""
        # Without dropout there is no "dropout" array, so that the layer draws no random numbers.
        dropout = {"dropout": self.dropout} if self.dropout else {}
        return {"scale": self.alpha / self.rank, **dropout}

    @staticmethod
    def shapes(box: Box, size: int, numbers: Collection[str]) -> Shapes:
        """Return the shapes and axis names of the arrays in the low-rank adapter of one layer."""
        (width, features), (into, out) = box.value.shape[-2:], box.names[-2:]
        dropout: Shapes = {"dropout": ((), ())} if "dropout" in numbers else {}
        return {
            "lora_a": ((width, size), (into, None)),
            "lora_b": ((size, features), (None, out)),
            "scale": ((), ()),
            **dropout,
        }

    def draw(self, key: jax.Array, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, jax.Array]:
        """Draw the initial `lora_a` at random, and make an initial `lora_b` of zeros (both float32)."""
        return {"lora_a": _uniform(key, shapes["lora_a"]), "lora_b": jnp.zeros(shapes["lora_b"], jnp.float32)}

    @staticmethod
    def options(adapter: Mapping[str, Any]) -> dict[str, float]:
        """Recover alpha and dropout from the arrays of a low-rank adapter, as a dict by option name."""
        rank = np.shape(adapter["lora_a"])[-1]
        return {"alpha": _first(adapter["scale"]) * rank, "dropout": _first(adapter.get("dropout", 0.0))}


@dataclasses.dataclass(frozen=True)
class BottleneckConfig(AdapterConfig):
    """Options of bottleneck adapters (scPEFT): which layers get an adapter, and the width of the adapter.

    The output y (..., D) of the layer becomes `y + scale * up(relu(down(y)))`, where `down` and `up` are dense layers
    with biases. A bottleneck of width s has 2 D s + s + D trained parameters.

    By default, the bottlenecks are the "gene encoder prompt" of the scPEFT paper. Each block then has two bottlenecks:
    one after the attention and one after the feed-forward layer, both before the residual connection. A bottleneck
    after the embedding of genes or bins is the "gene token prompt" of that paper.

    Parameters
    ----------
    targets
        Regular expressions, matched against the paths of dense layers and embedding tables (`re.search`), for example
        "layers/mlp/down" or "token".
    width
        Width of the bottleneck (s).
    scale
        Factor by which the output of `up` is multiplied.
    skip
        Whether y is added to the output of the bottleneck. If True, `up` is initialized with zeros, so a new bottleneck
        does not change the output of its layer. The scPEFT paper does not add y: its output is `scale *
        up(relu(down(y)))`, and both dense layers are initialized with random values.
    layers
        See `LoraConfig`.
    """

    targets: tuple[str, ...] = (r"attention/out$", r"mlp/down$")
    width: int = 128
    scale: float = 1.0
    skip: bool = True
    layers: tuple[int, ...] = ()

    arrays: ClassVar[Kind] = BOTTLENECK
    place: ClassVar[str] = "dense layer or embedding table"

    def __post_init__(self) -> None:
        self.check_places()
        check_at_least("width", self.width, 1)
        check_positive("scale", self.scale)

    @property
    def size(self) -> int:
        """Return the width of the bottleneck."""
        return self.width

    @staticmethod
    def places(params: Any) -> dict[str, Box]:
        """Return the boxed matrices of all dense layers and embedding tables, as a dict by layer path."""
        return {**kernels(params), **_matrices(params, "embedding")}

    @staticmethod
    def size_of(shape: tuple[int, ...]) -> int:
        """Return the width of a bottleneck whose array `bottleneck_down` has the given shape."""
        return shape[-1]

    @property
    def numbers(self) -> dict[str, float]:
        """Return the constants of a bottleneck, its scale and whether it has a skip, as a dict by array name."""
        return {"bottleneck_scale": self.scale, "bottleneck_skip": float(self.skip)}

    @staticmethod
    def shapes(box: Box, size: int, numbers: Collection[str]) -> Shapes:
        """Return the shapes and axis names of the arrays in the bottleneck of one layer."""
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
        """Make the initial arrays of a bottleneck (float32).

        The biases are zeros. With a skip, the array `bottleneck_up` is zeros too.
        """
        down, up = jax.random.split(key)
        zeros = {name: jnp.zeros(shapes[name], jnp.float32) for name in BOTTLENECK.trained}
        drawn = {"bottleneck_down": _uniform(down, shapes["bottleneck_down"])}
        if not self.skip:
            drawn["bottleneck_up"] = _uniform(up, shapes["bottleneck_up"])
        return {**zeros, **drawn}

    @staticmethod
    def options(adapter: Mapping[str, Any]) -> dict[str, float]:
        """Recover the scale and the skip from the arrays of a bottleneck, as a dict by option name."""
        return {name: _first(adapter[f"bottleneck_{name}"]) for name in ("scale", "skip")}


@dataclasses.dataclass(frozen=True)
class PrefixConfig(AdapterConfig):
    """Options of prefix adapters (Li & Liang 2021): which attention layers get a prefix, and the length of the prefix.

    A prefix consists of `length` trained vectors, as wide as the inputs of the attention layer. The layer's key and
    value projections, which are not trained, turn these vectors into keys and values. The layer puts them before the
    keys and values of the tokens. Every query may attend to the prefix, whatever the mask. The prefix has no position
    in the sequence: rotary position embedding does not rotate its keys, and the positions of the other keys do not
    change. A new prefix changes the model's outputs.

    Parameters
    ----------
    targets
        Regular expressions, matched against the paths of attention layers (`re.search`), for example
        "layers/attention".
    length
        Number of vectors in the prefix of one attention layer (n).
    layers
        See `LoraConfig`.
    """

    targets: tuple[str, ...] = (r"attention$",)
    length: int = 64
    layers: tuple[int, ...] = ()

    arrays: ClassVar[Kind] = PREFIX
    place: ClassVar[str] = "attention layer"

    def __post_init__(self) -> None:
        self.check_places()
        check_at_least("length", self.length, 1)

    @property
    def size(self) -> int:
        """Return the number of vectors in the prefix."""
        return self.length

    @staticmethod
    def places(params: Any) -> dict[str, Box]:
        """Return the boxed key kernels of all attention layers, as a dict by the path of the attention layer."""
        dense = kernels(params)
        keys = {
            layer.rpartition("/")[0]: box for layer, box in dense.items() if layer.rpartition("/")[2] == "key"
        }
        return {
            place: box for place, box in keys.items() if (f"{place}/value" if place else "value") in dense
        }

    @staticmethod
    def size_of(shape: tuple[int, ...]) -> int:
        """Return the number of vectors in a prefix whose array `prefix` has the given shape."""
        return shape[-2]

    @property
    def numbers(self) -> dict[str, float]:
        """Return an empty dict, because a prefix has no constants."""
        return {}

    @staticmethod
    def shapes(box: Box, size: int, numbers: Collection[str]) -> Shapes:
        """Return the shapes and axis names of the arrays in the prefix of one attention layer."""
        seen: Shapes = {PREFIX_SEEN: ((size,), (None,))} if PREFIX_SEEN in numbers else {}
        return {"prefix": ((size, box.value.shape[-2]), (None, box.names[-2])), **seen}

    def draw(self, key: jax.Array, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, jax.Array]:
        """Draw the initial vectors of a prefix at random (float32)."""
        return {"prefix": _PREFIX_DEVIATION * jax.random.normal(key, shapes["prefix"], jnp.float32)}

    @staticmethod
    def options(adapter: Mapping[str, Any]) -> dict[str, float]:
        """Return an empty dict, because the array of a prefix records none of its options."""
        return {}


CONFIGS: tuple[type[AdapterConfig], ...] = (LoraConfig, BottleneckConfig, PrefixConfig)
