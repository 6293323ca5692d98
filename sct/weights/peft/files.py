"""Read and write the files of a PEFT adapter folder: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sct.atomic import atomic_folder, replaced
from sct.checks import check_share
from sct.errors import CheckpointError
from sct.hashes import hash_files, sealed
from sct.weights import model_folder

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
# Options that do not change the output of a trained adapter, or that follow from the arrays in the files.
_FREE = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "layers_to_transform", "lora_ga_config", "loftq_config",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
_READ = {
    "peft_type", "bias", "init_lora_weights", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern",
    "alpha_pattern",
}  # fmt: skip
# Initializations that do not change the base weights. The others (such as "pissa") subtract the adapter from them.
_INITIALIZATIONS = (None, True, False, "gaussian", "eva", "orthogonal")
_ADVICE = (
    "merge the adapter into the model with the PEFT library (merge_and_unload) and convert the merged model"
)


def read_config(folder: Path) -> dict[str, Any]:
    """Read the options of an adapter folder. Raise `CheckpointError` for an option that is not supported."""
    given, path = model_folder.read_json(folder / CONFIG), folder / CONFIG
    if given.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{path} has peft_type = {given.get('peft_type')!r}, but only LORA is supported: {_ADVICE}."
        )
    if given.get("bias", "none") != "none":
        raise CheckpointError(
            f"{path} has bias = {given['bias']!r}, but adapters with trained biases are not supported: {_ADVICE}."
        )
    if given.get("init_lora_weights") not in _INITIALIZATIONS:
        raise CheckpointError(
            f"{path} has init_lora_weights = {given['init_lora_weights']!r}, which changes the base weights and is not "
            f"supported: {_ADVICE}."
        )
    # Unknown options, including those of later PEFT releases, are accepted only if they are switched off.
    unknown = sorted(name for name in set(given) - _FREE - _READ if given[name])
    if unknown:
        raise CheckpointError(
            f"{path} has {unknown[0]} = {given[unknown[0]]!r}, which is not supported: {_ADVICE}."
        )
    defaults: dict[str, Any] = {
        "r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}
    }  # fmt: skip
    options = {
        name: default if given.get(name) is None else given[name] for name, default in defaults.items()
    }
    for name, value in options.items():
        patterns = name.endswith("_pattern")
        values = list(value.values()) if patterns and isinstance(value, dict) else [value]
        numbers = all(isinstance(v, (int, float)) and math.isfinite(v) and v >= 0 for v in values)
        if not numbers or patterns != isinstance(value, dict):
            raise CheckpointError(
                f"{path} has an invalid value {name} = {value!r}: the file is damaged, so restore it from a copy."
            )
    check_share(f"lora_dropout in {path}", options["lora_dropout"], one=False, error=CheckpointError)
    return options


def read_arrays(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name and the values of each array of an adapter folder."""
    from safetensors import SafetensorError, safe_open

    path = folder / WEIGHTS
    if not path.is_file() and (folder / "adapter_model.bin").is_file():
        raise CheckpointError(
            f"{folder} has adapter_model.bin, but only {WEIGHTS} is supported: load the adapter with the PEFT library "
            "and save it again."
        )
    try:
        with safe_open(path, framework="flax") as file:  # the NumPy reader does not support bfloat16
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                value = np.asarray(file.get_tensor(key))
                model_folder.check_finite_array(value, key, path)
                yield key, value
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} has no {path.name}: the folder is incomplete, so copy or save it again."
        ) from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): restore it from a copy.") from error


def write(
    folder: Path,
    tensors: dict[str, np.ndarray],
    config: Mapping[str, Any],
    names: tuple[str, str] = (CONFIG, WEIGHTS),
) -> None:
    """Write an adapter folder atomically.

    Parameters
    ----------
    folder
        Output folder. It must be new, empty, or an adapter folder.
    tensors
        Arrays by name.
    config
        Options of the adapter.
    names
        Names of two files: the file with the options, and the file with the arrays. The default names are those of the
        PEFT library. With other names, the hash of the arrays is added to the options.

    Raises
    ------
    CheckpointError
        The folder holds other files or cannot be written. No partial output remains.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    options, arrays = names

    def is_ours(place: Path) -> bool:
        return {file.name for file in place.iterdir()} <= {options, arrays, CARD}

    try:
        folder = folder.resolve()
        if folder.exists() and not folder.is_dir():
            raise CheckpointError(
                f"{folder} is a file, but the output must be a folder: choose another path."
            )
        for place in (folder, replaced(folder)):
            if place.exists() and not (place.is_dir() and is_ours(place)):
                raise CheckpointError(
                    f"{place} has files that do not belong to an adapter, but saving would delete all files in this "
                    "folder: choose a new or an empty folder."
                )
        with atomic_folder(folder, is_ours) as new:
            save_file(tensors, new / arrays, metadata={"format": "pt"})
            if names != (CONFIG, WEIGHTS):
                config = sealed({**config, model_folder.FILES: hash_files(new, [arrays])})
            (new / options).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
            # safetensors creates files that only their owner can read.
            shutil.copymode(new / options, new / arrays)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise CheckpointError(
            f"the adapter could not be written to {folder} ({reason}): choose a writable folder with enough disk space."
        ) from error
