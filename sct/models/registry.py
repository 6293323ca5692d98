"""Look up the configuration class, the Flax module and the default adapter targets of an architecture by its name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import jax

from sct import messages
from sct.checks import check_choice
from sct.errors import ConfigError
from sct.hashes import SEAL
from sct.models.bert import Bert
from sct.models.bert_config import BertConfig
from sct.models.cell_encoder import CellEncoder
from sct.models.cell_encoder_config import CellEncoderConfig
from sct.models.decoder import Decoder
from sct.models.decoder_config import GPT2Config, LlamaConfig, NeoXConfig
from sct.models.sct import SCT
from sct.models.sct_config import SCTConfig
from sct.models.zeromics import ZerOmics, ZerOmicsConfig
from sct.models.zeromics_cells import ZerOmicsCells, ZerOmicsCellsConfig

T = TypeVar("T")

# Dense layers that get a low-rank adapter by default. In the Hugging Face versions of GPT-2 and GPT-NeoX, one layer
# computes queries, keys and values, and the PEFT library adapts it. So their default here is all three projections.
QUERY_VALUE, QUERY_KEY_VALUE = (r"attention/(query|value)$",), (r"attention/(query|key|value)$",)


class Architecture(NamedTuple):
    """One architecture: an entry of the table `MODELS`.

    Attributes
    ----------
    config, module
        The configuration class and the Flax module class of the architecture.
    targets
        Dense layers that get a low-rank adapter by default; see `sct.models.adapter_kinds.LoraConfig`. Empty if the
        architecture has no default.
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
    "scgpt": Architecture(CellEncoderConfig, CellEncoder, QUERY_VALUE),
}


def with_current_names(
    cls: type[Any], values: Mapping[str, Any], where: str, recorded: bool = False
) -> dict[str, Any]:
    """Replace former option names in the values of a configuration by the current names.

    For one release, a renamed option is also accepted under its former name. The field of the option declares the
    former name: `dataclasses.field(default=15, metadata={"formerly": "stem_taps"})`.

    Parameters
    ----------
    cls
        Configuration dataclass.
    values
        Values by option name; may be nested.
    where
        Name that messages use for the configuration.
    recorded
        Whether the values come from a model folder or run folder. Users do not edit these values, so former names give
        no warning.

    Raises
    ------
    ConfigError
        An option is given under both names.

    Warns
    -----
    FutureWarning
        An option is given under its former name.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    former = {field.metadata.get("formerly"): name for name, field in fields.items()}
    made: dict[str, Any] = {}
    for given, value in values.items():
        name = former.get(given, given)
        if name != given:
            if name in values:
                raise ConfigError(
                    f"{where} has both {given} and {name}, but {given} is the former name of {name}: remove {given}."
                )
            if not recorded:
                messages.warn(
                    f"{where}.{given} was renamed to {name}: use the new name, because the next release refuses the "
                    "old one.",
                    FutureWarning,
                )
        kind = type(_default(fields[name])) if name in fields else object
        if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
            value = with_current_names(kind, value, f"{where}.{name}", recorded)
        made[name] = value
    return made


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if callable(field.default_factory) else field.default


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Make a configuration dataclass from a dict of plain values, which may be nested.

    Former option names also work; see `with_current_names`.

    Parameters
    ----------
    cls
        Configuration dataclass.
    values
        Values by option name.
    where
        Name that messages use for the configuration.

    Raises
    ------
    ConfigError
        An option does not exist in the class, an option is given under two names, or a value has the wrong type. The
        message names the option.
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
            value = parse(value)  # a structured option that may also be written as a string
        elif isinstance(default, tuple):
            if not isinstance(value, list | tuple):
                raise ConfigError(
                    f"{where}.{name} is {value!r}, but must be a list or a tuple: write ({value!r},)."
                )
            value = tuple(tuple(v) if isinstance(v, list) else v for v in value)
        elif isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        elif default is not dataclasses.MISSING and (
            not isinstance(value, type(default))
            or (isinstance(value, bool) and not isinstance(default, bool))
        ):
            raise ConfigError(
                f"{where}.{name} is {value!r}, but must be of type {type(default).__name__}: give a value of this "
                "type."
            )
        made[name] = value
    return cls(**made)


# Options that change how a model is computed, but not its architecture.
_COMPUTING = ("dtype", "remat", "dropout")


def computing(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return configuration values in which `given` replaces the options dtype, remat and dropout.

    `given` also replaces these options in the nested parts of a model.
    """
    changed = {name: given[name] for name in _COMPUTING if name in given and name in values}
    parts = {
        name: computing(part, given[name])
        for name, part in values.items()
        if isinstance(part, Mapping) and isinstance(given.get(name), Mapping)
    }
    return {**values, **changed, **parts}


def inherited(config: Any, given: Mapping[str, Any], length: int = 0) -> dict[str, Any]:
    """Return the configuration values for training that starts from an existing model.

    Parameters
    ----------
    config
        Configuration of the existing model. If its class defines `with_length(values, length)`, that method adapts the
        values to `length`; other models accept any length.
    given
        Values of the new configuration. Only dtype, remat and dropout are taken from these values.
    length
        Number of tokens in each row of text in the new training; 0 if the new training uses no text.
    """
    values = computing(dataclasses.asdict(config), given)
    fit = getattr(type(config), "with_length", None)
    return values if fit is None else dict(fit(values, length))


def check_device(config: Any) -> None:
    """Raise `ConfigError` if a model computes in float16 and the default backend is the CPU.

    XLA for CPU has no float16 matrix products with float32 sums, and takes several minutes to compile other float16
    operations. XLA for CPU does support bfloat16.
    """
    if jax.default_backend() != "cpu":
        return
    parts = [("", config)]
    while parts:
        path, part = parts.pop()
        if getattr(part, "dtype", None) == "float16":
            raise ConfigError(
                f"model.{path}dtype is float16, but CPUs support float32 and bfloat16 only: use a GPU, or set "
                f"--config.model.{path}dtype=float32 (for a saved model, change model.{path}dtype in its config.json, "
                f"and delete the checksum {SEAL!r} there, which does not fit the changed file)."
            )
        nested = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
        parts += [
            (f"{path}{name}.", value) for name, value in nested.items() if dataclasses.is_dataclass(value)
        ]


def family(name: str) -> Architecture:
    """Return the architecture of a family name. Raises `ConfigError` if no family has this name."""
    check_choice("the model family", name, sorted(MODELS))
    return MODELS[name]


def model_config(name: str, values: Mapping[str, Any], num_genes: int | None = None) -> Any:
    """Make the configuration of a model family from plain values.

    If the number of genes is 0 or missing in `values`, it is set from `num_genes`, the size of the vocabulary.
    """
    cls, where = family(name).config, f"model ({name})"
    if num_genes is not None:
        values = cls.fit(with_current_names(cls, values, where), num_genes)
    return build(cls, values, where)
