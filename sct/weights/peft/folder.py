"""Read and write LoRA adapters of text models in the format of the PEFT library.

A PEFT folder holds `adapter_config.json` and `adapter_model.safetensors`, with the matrices `lora_A` (r, in) and
`lora_B` (out, r) for each adapted module of each layer. GPT-2 and GPT-NeoX have a fused projection of query, key and
value. This fused projection has one adapter in PEFT, but up to three adapters in this project:

- Reading splits the adapter: the three adapters share `lora_A`, and each gets its own columns of `lora_B`.
- Writing joins the adapters of the fused projection. Adapters with the same `lora_A` become one adapter of the same
  rank. Otherwise the rank of the joint adapter is the sum of their ranks, and each projection has zeros for the ranks
  of the other projections. Reading a file with such a joint adapter returns the original adapters.

Both conversions are exact.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sct.checks import check_choice
from sct.errors import CheckpointError, ConfigError
from sct.models import lora
from sct.models.adapters import adapters_of
from sct.nn.adapters import COLLECTION, LOW_RANK, for_all_layers
from sct.nn.paths import flatten, unflatten
from sct.weights.hf import folder as hf
from sct.weights.hf import maps as hf_maps
from sct.weights.hf.maps import FAMILIES, Entry
from sct.weights.peft.files import CONFIG, WEIGHTS, read_arrays, read_config, write
from sct.weights.pretrained import Pretrained, boxed_shapes, with_changed_outputs

_PREFIX = "base_model.model."
_KEY = re.compile(rf"{re.escape(_PREFIX)}(?P<module>.+)\.lora_(?P<matrix>[AB])\.weight")
_BASE = re.compile(rf"{re.escape(_PREFIX)}(?P<module>.+?)(\.base_layer)?(?P<leaf>\.weight|\.bias)")


@dataclasses.dataclass(frozen=True)
class _Module:
    """A dense module of a Hugging Face model, and the dense layers of this project that the module combines."""

    layer: int | None
    width: int
    features: int
    parts: dict[int, tuple[str, Entry]]  # number of the part -> path of our dense layer, and its location


def _modules(model: Pretrained) -> dict[str, _Module]:
    """Return the dense modules of a model, as a dict by their names in `transformers`."""
    check_choice(
        "the family",
        model.family,
        FAMILIES,
        advice="PEFT has no format for this family, so use an adapter folder (sct.weights.adapter_folder)",
    )
    table = FAMILIES[model.family]
    dense = {
        f"params/{layer}/kernel": box.value
        for layer, box in lora.kernels(boxed_shapes(model.family, model.config)["params"]).items()
    }
    found: dict[str, _Module] = {}
    for path, entry in hf_maps.entries(model.family, model.config, dense).items():
        layer = path.removeprefix("params/").removesuffix("/kernel")
        width, features = dense[path].shape[-2:]
        for number, name in enumerate(entry.names):
            # The last name of the head is the one in `transformers` 5.
            name = table.head_names[-1] if name == table.head else name
            if model.family == "bert" and not model.config.mlm_head:
                name = name.removeprefix(table.prefix)
            module = found.setdefault(
                name.removesuffix(".weight"),
                _Module(number if entry.stacked else None, width, features * entry.pieces, {}),
            )
            module.parts[entry.piece] = (layer, dataclasses.replace(entry, transposed=True))
    return found


def load(model: Pretrained, folder: str | os.PathLike[str]) -> Pretrained:
    """Load the adapters of a PEFT folder into a text model.

    The parameters of the model do not change. Adapters of all layers are stacked: a layer without an adapter gets
    zeros, and a lower rank is padded with zeros. The zeros do not change the output of the model and cannot be trained.
    On a mesh, adapters get the sharding of the kernels that they adapt.

    Parameters
    ----------
    model
        The text model that the adapters were trained on.
    folder
        Folder with `adapter_config.json` and `adapter_model.safetensors`.

    Returns
    -------
    The model with the adapters added to its variables.

    Raises
    ------
    CheckpointError
        The folder is damaged, or its adapters do not fit the model or are not supported. Only LoRA on dense layers is
        supported: no DoRA, no trained biases, no other trained modules.
    ConfigError
        The model already has adapters, or is not a text model.
    """
    folder = Path(folder).expanduser()
    if model.variables.get(COLLECTION):
        raise ConfigError(f"{model!r} already has adapters: merge them first with sct.models.lora.merge.")
    modules = _modules(model)
    options = read_config(folder)
    made: dict[str, dict[int | None, dict[str, np.ndarray]]] = {}
    for name, (first, second) in _read_matrices(folder, model, modules).items():
        module, rank = modules[_known(name, model.family, modules)], len(first)
        expected = _by_pattern(options["rank_pattern"], name, options["r"])
        shapes = ((expected, module.width), (module.features, expected))
        if (first.shape, second.shape) != shapes:
            raise CheckpointError(
                f"{folder / WEIGHTS} has lora_A {first.shape} and lora_B {second.shape} for {name}, but the model and "
                f"{CONFIG} require {shapes[0]} and {shapes[1]}: use the model that the adapter was trained on."
            )
        alpha = _by_pattern(options["alpha_pattern"], name, options["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if options["use_rslora"] else rank)
        for piece, (a, b) in _apart(module, first, second).items():
            adapter = {"lora_a": a, "lora_b": b, "scale": np.asarray(scale, np.float32)}
            made.setdefault(module.parts[piece][0], {})[module.layer] = adapter
    kernels = flatten(model.variables["params"])
    arrays: dict[str, Any] = {}
    for layer, adapters in made.items():
        for leaf, value in _stack(adapters, model.config.num_layers).items():
            arrays[f"{layer}/{leaf}"] = _place(leaf, value, kernels[f"{layer}/kernel"])
        if options["lora_dropout"]:
            rate = np.full(arrays[f"{layer}/scale"].shape, options["lora_dropout"], np.float32)
            arrays[f"{layer}/dropout"] = _place("dropout", rate, kernels[f"{layer}/kernel"])
    return with_changed_outputs(model, variables={**model.variables, COLLECTION: unflatten(arrays)})


def _by_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the end of a module's name.

    If no pattern matches, return the default.
    """
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", name):
                return value
        except re.error as error:
            raise CheckpointError(
                f"{CONFIG} has the pattern {pattern!r}, which is not a valid regular expression ({error}): correct it."
            ) from None
    return default


def _known(name: str, family: str, modules: Mapping[str, _Module]) -> str:
    """Return the key in `modules` that corresponds to `name` in an adapter file, or '' if no key corresponds to it.

    `name` may lack the family's prefix, or may be another name of the head.
    """
    table = FAMILIES[family]
    spelled = [name, table.prefix + name, name.removeprefix(table.prefix)]
    if f"{name}.weight" in table.head_names:
        spelled.append(table.head_names[-1].removesuffix(".weight"))
    return next((other for other in spelled if other in modules), "")


def _read_matrices(
    folder: Path, model: Pretrained, modules: Mapping[str, _Module]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the two float32 matrices of each adapted module, as a dict by the name of the module in the file."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for key, value in read_arrays(folder):
        match = _KEY.fullmatch(key)
        if match is None and _is_ours(key, value, model, folder):
            continue
        if match is None or not _known(match["module"], model.family, modules):
            raise CheckpointError(
                f"{folder / WEIGHTS} has {key}, but the {model.family} model has no such dense layer: use the model "
                "that the adapter was trained on."
            )
        if value.ndim != 2:
            raise CheckpointError(
                f"{folder / WEIGHTS} has {key} with shape {value.shape}, but it must have 2 axes: the file is "
                "damaged, so "
                "restore it from a copy."
            )
        found.setdefault(match["module"], {})[match["matrix"]] = value.astype(np.float32)
    for name, matrices in found.items():
        if len(matrices) < 2:
            raise CheckpointError(
                f"{folder / WEIGHTS} has only one of the two matrices of {name}: the file is damaged, so restore it "
                "from a copy."
            )
    if not found:
        raise CheckpointError(
            f"{folder / WEIGHTS} holds no adapter: the file is damaged, so restore it from a copy."
        )
    return {name: (matrices["A"], matrices["B"]) for name, matrices in found.items()}


def _is_ours(key: str, value: np.ndarray, model: Pretrained, folder: Path) -> bool:
    """Return whether an array in an adapter file is a weight of the base model.

    PEFT also saves the weights of an adapted head.

    Raises
    ------
    CheckpointError
        The array is a weight of the base model, but its values differ from those of this model.
    """
    match, table = _BASE.fullmatch(key), FAMILIES[model.family]
    if match is None:
        return False
    name, tensors = match["module"] + match["leaf"], hf.tensors(model)
    spelled = [name, table.prefix + name, *[table.head, table.table] * (name in table.head_names)]
    base = next((tensors[other] for other in spelled if other in tensors), None)
    if base is None:
        return False
    ours = np.asarray(base)
    # One of the two may be stored in a narrower dtype.
    if np.array_equal(ours, value.astype(ours.dtype)) or np.array_equal(ours.astype(value.dtype), value):
        return True
    raise CheckpointError(
        f"the array {key} in {folder / WEIGHTS} differs from the array in the model: use the model that the adapter "
        "was trained on, with the same token vocabulary."
    )


def _apart(
    module: _Module, first: np.ndarray, second: np.ndarray
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Split the adapter of a fused module, such as query + key + value, into one adapter for each part of the module.

    If each row of `lora_A` is used by exactly one part, each part gets its own rows. This undoes `_together`. Otherwise
    all parts get the whole `lora_A`.

    Parameters
    ----------
    first, second
        `lora_A` (r, in) and `lora_B` (out, r).

    Returns
    -------
    Dict from the number of each part to its two matrices, (in, r) and (r, out).
    """
    columns = {}
    for piece, (_, entry) in module.parts.items():
        whole = (slice(0, len(first)), slice(0, module.features // entry.pieces))
        columns[piece] = entry.take(lambda index: second[index], whole)
    uses = np.stack([b.any(axis=1) for b in columns.values()])
    if len(columns) == 1 or not (uses.sum(axis=0) == 1).all():
        return {piece: (first.T, b) for piece, b in columns.items()}
    return {
        piece: (first.T[:, used], b[used])
        for (piece, b), used in zip(columns.items(), uses, strict=True)
        if used.any()
    }


def _stack(adapters: Mapping[int | None, Mapping[str, np.ndarray]], layers: int) -> dict[str, np.ndarray]:
    """Stack the adapters of single layers into one adapter for all layers.

    Layers without an adapter become zeros. An adapter with a lower rank is padded with zeros.
    """
    if None in adapters:
        return dict(adapters[None])
    rank = max(adapter["lora_a"].shape[1] for adapter in adapters.values())
    some = next(iter(adapters.values()))
    made = {
        "lora_a": np.zeros((layers, some["lora_a"].shape[0], rank), np.float32),
        "lora_b": np.zeros((layers, rank, some["lora_b"].shape[1]), np.float32),
        "scale": np.zeros(layers, np.float32),
    }
    for layer, adapter in adapters.items():
        made["lora_a"][layer, :, : adapter["lora_a"].shape[1]] = adapter["lora_a"]
        made["lora_b"][layer, : adapter["lora_b"].shape[0]] = adapter["lora_b"]
        made["scale"][layer] = adapter["scale"]
    return made


def _place(leaf: str, value: np.ndarray, kernel: Any) -> jax.Array:
    """Place an adapter array on the devices of the kernel that it adapts. Shard the axes that both arrays have."""
    sharding = getattr(kernel, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return jnp.asarray(value)
    spec = (*sharding.spec, *[None] * (kernel.ndim - len(sharding.spec)))
    axes = {"lora_a": (*spec[:-1], None), "lora_b": (*spec[:-2], None, spec[-1])}.get(leaf, spec[:-2])
    return jax.device_put(value, NamedSharding(sharding.mesh, PartitionSpec(*axes)))


def export(model: Pretrained, folder: str | os.PathLike[str], *, base: str | None = None) -> None:
    """Write the adapters of a text model as a PEFT folder.

    `PeftModel.from_pretrained(base_model, folder)` then gives the same outputs as this model. `base_model` is the model
    without adapters; save it with `sct.weights.hf.folder.save`. The write is atomic: an existing adapter folder is
    replaced only after the new one is complete.

    Parameters
    ----------
    model
        A text model with LoRA adapters.
    folder
        Output folder. It must be new, empty, or an adapter folder.
    base
        Name or folder of the base model, recorded in `adapter_config.json`.

    Raises
    ------
    ConfigError
        The model has no adapters, has adapters other than LoRA, or is not a text model.
    CheckpointError
        The adapters do not fit the model or the format, or the folder holds other files or cannot be written. No
        partial output remains.
    """
    modules = _modules(model)
    other = next((kind.name for _, kind, _ in adapters_of(model.variables) if kind is not LOW_RANK), None)
    if other is not None:
        raise ConfigError(
            f"{model!r} has adapters of kind {other!r}, but only LoRA can be written in the PEFT format: save them "
            "with sct.weights.adapter_folder.save instead."
        )
    adapters = {
        layer: {leaf: np.asarray(jax.device_get(value)) for leaf, value in adapter.items()}
        for layer, adapter in lora.adapted(model.variables)
    }
    if not adapters:
        raise ConfigError(
            f"{model!r} has no adapters to write: add adapters first with sct.models.lora.init."
        )
    placed = {layer for module in modules.values() for layer, _ in module.parts.values()}
    rates = {
        float(str(rate))
        for adapter in adapters.values()
        for rate in np.ravel(adapter.get("dropout", np.float32(0)))
    }
    # In a stack, a layer without an adapter has scale 0; it is not written.
    adapters = {
        layer: {
            leaf: np.asarray(value)
            for leaf, value in for_all_layers(adapter, model.config.num_layers).items()
        }
        for layer, adapter in adapters.items()
    }
    if not set(adapters) <= placed:
        unknown = sorted(set(adapters) - placed)[0]
        raise CheckpointError(
            f"there is an adapter for the layer {unknown!r}, but the {model.family} model has no such layer: use the "
            "model that the adapter was made for."
        )
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, module in modules.items():
        joined = _together(module, adapters)
        if joined is not None:
            first, second, scale = joined
            tensors[f"{_PREFIX}{name}.lora_A.weight"] = first
            tensors[f"{_PREFIX}{name}.lora_B.weight"] = second
            ranks[name], alphas[name] = len(first), _alpha(scale, len(first))
    if not tensors:
        raise ConfigError(
            f"the adapters of {model!r} have scale 0 (alpha / rank) in all layers, so they have no effect: write "
            "adapters with a scale above 0."
        )
    if len(rates) > 1:
        raise CheckpointError(
            f"the adapters have the dropout rates {', '.join(f'{rate:g}' for rate in sorted(rates))}, but the PEFT "
            "format has one dropout rate for all adapters in a folder: use the same rate for all, or write the "
            "adapters to separate folders."
        )
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if model.family != "bert" else None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": rates.pop(),
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "modules_to_save": None,
        "init_lora_weights": True,
        "fan_in_fan_out": model.family == "gpt2",
        "target_modules": _targets(set(ranks), set(modules)),
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
    }
    write(Path(folder).expanduser(), tensors, config)


def _together(
    module: _Module, adapters: Mapping[str, Mapping[str, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray, float] | None:
    """Join the adapters of the parts of a fused module, such as query, key and value, into one adapter of the module.

    Returns
    -------
    Three values: `lora_A` (r, in), `lora_B` (out, r) and the scale. None if no part has an adapter.
    """
    parts: dict[int, tuple[np.ndarray, np.ndarray, np.float32]] = {}
    for piece, (layer, _) in module.parts.items():
        adapter = adapters.get(layer, {})
        row = {
            leaf: value[module.layer] if module.layer is not None else value
            for leaf, value in adapter.items()
        }
        if row and float(row["scale"]):
            a, b = (row[leaf].astype(np.float32) for leaf in ("lora_a", "lora_b"))
            parts[piece] = (a, b, np.float32(row["scale"]))
    if not parts:
        return None
    first, _, scale = next(iter(parts.values()))
    shared = all(np.array_equal(a, first) for a, _, _ in parts.values())
    total = first.shape[1] if shared else sum(a.shape[1] for a, _, _ in parts.values())
    rows, columns, start = [], [], 0
    for piece, (_, entry) in sorted(module.parts.items()):
        column = np.zeros((total, module.features // entry.pieces), np.float32)
        if piece in parts:
            a, b, own = parts[piece]
            column[start : start + len(b)] = b if own == scale else b * (own / scale)
            start += 0 if shared else len(b)
            rows.append(a.T)
        columns.append(column)
    whole = rows[0] if shared else np.concatenate(rows)
    return np.ascontiguousarray(whole), module.parts[0][1].join(columns), float(scale)


def _alpha(scale: float, rank: int) -> float:
    """Return the value of alpha such that alpha / rank equals the given float32 scale.

    Alpha is rounded to 7 digits if the scale stays exactly the same.
    """
    alpha = float(f"{scale * rank:.7g}")
    if np.float32(alpha / rank) != np.float32(scale):
        alpha = scale * rank
    return int(alpha) if alpha.is_integer() else alpha


def _commonest(values: Any) -> Any:
    """Return the most frequent value. If several values are equally frequent, return the first of them."""
    found = list(values)
    return max(dict.fromkeys(found), key=found.count)


def _targets(adapted: set[str], modules: set[str]) -> list[str]:
    """Return the shortest name endings that match all adapted modules and no other module."""
    found = set()
    for name in sorted(adapted):
        words = name.split(".")
        ends = (".".join(words[-length:]) for length in range(1, len(words) + 1))
        found.add(
            next(
                end
                for end in ends
                if all(other in adapted for other in modules if other == end or other.endswith(f".{end}"))
            )
        )
    return sorted(found)
