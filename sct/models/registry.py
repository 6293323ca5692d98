"""Architectures by name: configuration, module, and what adapters adapt by default."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import jax

from sct.checks import check_choice
from sct.errors import ConfigError
from sct.hashes import SEAL
from sct.models.bert import Bert
from sct.models.bert_config import BertConfig
from sct.models.decoder import Decoder
from sct.models.decoder_config import GPT2Config, LlamaConfig, NeoXConfig
from sct.models.sct import SCT
from sct.models.sct_config import SCTConfig
from sct.models.zeromics import ZerOmics, ZerOmicsConfig
from sct.models.zeromics_cells import ZerOmicsCells, ZerOmicsCellsConfig

T = TypeVar("T")

# Dense layers that get a low-rank adapter by default. For GPT-2 and GPT-NeoX it is what the PEFT library adapts, whose
# layers hold all three projections in one.
QUERY_VALUE, QUERY_KEY_VALUE = (r"attention/(query|value)$",), (r"attention/(query|key|value)$",)


class Architecture(NamedTuple):
    """What a name of `MODELS` stands for.

    Attributes
    ----------
    config, module
        Types of the configuration and of the Flax module.
    targets
        Dense layers that get a low-rank adapter by default, see `sct.models.adapter_kinds.LoraConfig`; none where
        adapters must name theirs.
    """

    config: type[Any]
    module: type[Any]
    targets: tuple[str, ...] = ()


MODELS: dict[str, Architecture] = {
    "sct": Architecture(SCTConfig, SCT, QUERY_VALUE),
    "gpt2": Architecture(GPT2Config, Decoder, QUERY_KEY_VALUE),
    "neox": Architecture(NeoXConfig, Decoder, QUERY_KEY_VALUE),
    "llama": Architecture(LlamaConfig, Decoder, QUERY_VALUE),
    "bert": Architecture(BertConfig, Bert, QUERY_VALUE),
    "zeromics": Architecture(ZerOmicsConfig, ZerOmics),
    "zeromics_cells": Architecture(ZerOmicsCellsConfig, ZerOmicsCells, QUERY_VALUE),
}


def with_current_names(cls: type[Any], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Plain values of a configuration dataclass, in which options have their current names.

    A renamed option is also accepted by its former name for one release. Its field says so:
    `dataclasses.field(default=15, metadata={"formerly": "stem_taps"})`. Nested values are included.

    Raises
    ------
    ConfigError
        An option is given by both of its names.

    Warns
    -----
    FutureWarning
        An option is given by its former name.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    former = {field.metadata.get("formerly"): name for name, field in fields.items()}
    made: dict[str, Any] = {}
    for given, value in values.items():
        name = former.get(given, given)
        if name != given:
            if name in values:
                raise ConfigError(f"{where} has {given} and {name}, two names of one option: remove {given}.")
            warnings.warn(
                f"{where}.{given} was renamed to {name}; the next release refuses the old name.",
                FutureWarning,
                stacklevel=2,
            )
        kind = type(_default(fields[name])) if name in fields else object
        if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
            value = with_current_names(kind, value, f"{where}.{name}")
        made[name] = value
    return made


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if callable(field.default_factory) else field.default


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Make a configuration dataclass of plain values, nested ones included.

    Former names of options work too, see `with_current_names`.

    Raises
    ------
    ConfigError
        A name that the class does not have, an option given by two names, or a value of the wrong type, named with
        its place.
    """
    values = with_current_names(cls, values, where)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(fields))
    for name in unknown:
        check_choice(f"an option of {where}", name, sorted(fields))
    made = {}
    for name, value in values.items():
        default = _default(fields[name])
        if dataclasses.is_dataclass(default) and isinstance(value, Mapping):
            value = build(type(default), value, f"{where}.{name}")
        elif isinstance(value, str) and (parse := getattr(default, "parse", None)) is not None:
            value = parse(value)  # a structure that may also be written as a text
        elif isinstance(default, tuple):
            if not isinstance(value, list | tuple):
                raise ConfigError(f"{where}.{name} is {value!r}, but a list such as ({value!r},) is needed.")
            value = tuple(tuple(v) if isinstance(v, list) else v for v in value)
        elif isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        elif default is not dataclasses.MISSING and (
            not isinstance(value, type(default))
            or (isinstance(value, bool) and not isinstance(default, bool))
        ):
            raise ConfigError(
                f"{where}.{name} is {value!r}, but a value of type {type(default).__name__} is needed."
            )
        made[name] = value
    return cls(**made)


# What of a configuration says how it is computed and not what.
_COMPUTING = ("dtype", "remat", "dropout")


def computing(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Values of an architecture, in which what is given of the computation is replaced; parts of a model included."""
    changed = {name: given[name] for name in _COMPUTING if name in given and name in values}
    parts = {
        name: computing(part, given[name])
        for name, part in values.items()
        if isinstance(part, Mapping) and isinstance(given.get(name), Mapping)
    }
    return {**values, **changed, **parts}


def inherited(config: Any, given: Mapping[str, Any], length: int = 0) -> dict[str, Any]:
    """Values of a model's architecture for training that starts from it.

    Parameters
    ----------
    config
        Configuration of the model. Its class may define `with_length(values, length)`; others read any length.
    given
        Values of the new configuration, of which those count that say how the model is computed.
    length
        Tokens of the rows of text that it is trained on; 0 for none.
    """
    values = computing(dataclasses.asdict(config), given)
    fit = getattr(type(config), "with_length", None)
    return values if fit is None else dict(fit(values, length))


def check_device(config: Any) -> None:
    """Raise `ConfigError` where a model computes in float16 and there is only a CPU.

    There XLA has no float16 products with sums in float32, and compiles the rest for minutes; it does have bfloat16.
    """
    if jax.default_backend() != "cpu":
        return
    parts = [("", config)]
    while parts:
        path, part = parts.pop()
        if getattr(part, "dtype", None) == "float16":
            raise ConfigError(
                f"the model computes in float16 ({path}dtype), which CPUs do not: take a GPU, or float32 or bfloat16 "
                f"(--config.model.{path}dtype=float32; of a saved model change model.{path}dtype in its config.json "
                f"and delete the entry {SEAL!r} there)."
            )
        nested = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
        parts += [
            (f"{path}{name}.", value) for name, value in nested.items() if dataclasses.is_dataclass(value)
        ]


def family(name: str) -> Architecture:
    """Architecture of a name; `ConfigError` where there is none."""
    check_choice("the model family", name, sorted(MODELS))
    return MODELS[name]


def model_config(name: str, values: Mapping[str, Any], num_genes: int | None = None) -> Any:
    """Configuration of a family from plain values.

    With `num_genes`, the size of a vocabulary, the architecture is fitted to it where it leaves that open.
    """
    cls, where = family(name).config, f"model ({name})"
    if num_genes is not None:
        values = cls.fit(with_current_names(cls, values, where), num_genes)
    return build(cls, values, where)
