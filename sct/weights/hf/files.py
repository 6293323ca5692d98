"""Read slices of the weights of a Hugging Face folder, from safetensors or PyTorch files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sct.checks import check_type
from sct.errors import CheckpointError, first_line
from sct.extras import load_extra
from sct.weights.model_folder import INDEX, TORCH, WEIGHTS, FolderReader, check_finite_array, read_json

_BIN = re.compile(r"[\w.-]+\.bin")
_SAFE_TORCH = (2, 6)
_DTYPES = ("float16", "bfloat16", "float32", "float64", "bool", "uint8", "int8", "int16", "int32", "int64")


def open_weights(folder: Path) -> FolderReader | TorchReader:
    """Return a reader for the weights in a folder. Use the reader in a `with` statement.

    Raises
    ------
    CheckpointError
        The folder has no weights.
    """
    if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file():
        return FolderReader(folder)
    if (folder / TORCH).is_file() or (folder / f"{TORCH}.index.json").is_file():
        return TorchReader(folder)
    raise CheckpointError(
        f"{folder} has neither {WEIGHTS} nor {TORCH} (whole or split into several files with an index): give a folder "
        "with weights."
    )


class TorchReader:
    """Read arrays from PyTorch files without running code from these files (`weights_only=True`).

    Parameters
    ----------
    folder
        Folder with the weights.
    file
        Name of the weights file. The default is the name in Hugging Face folders, whose weights may be split into
        several files.
    """

    def __init__(self, folder: Path, file: str = TORCH):
        self.folder = folder
        self._files = [file]
        index = folder / f"{TORCH}.index.json"
        if file == TORCH and index.is_file():
            names = read_json(index).get("weight_map")
            files: list[Any] = list(names.values()) if isinstance(names, dict) else [None]
            if not files or not all(isinstance(name, str) and _BIN.fullmatch(name) for name in files):
                raise CheckpointError(
                    f"{index} has no valid weight_map: the file is damaged, so download it again."
                )
            self._files = sorted(set(files))
        self.shapes: dict[str, jax.ShapeDtypeStruct] = {}
        self._tensors: dict[str, Any] = {}

    def __enter__(self) -> TorchReader:
        what = f"{self.folder} has PyTorch files instead of safetensors files; reading them"
        torch = load_extra("torch", "torch", what=what)
        # Earlier versions may run code of a file even with weights_only (CVE-2025-32434).
        version = re.match(r"(\d+)\.(\d+)", torch.__version__)
        if version is not None and tuple(map(int, version.groups())) < _SAFE_TORCH:
            raise CheckpointError(
                f"{self.folder} has PyTorch files, but torch {torch.__version__} is installed, which may run code that "
                f"such a file contains: install torch {'.'.join(map(str, _SAFE_TORCH))} or later."
            )
        for name in self._files:
            path = self.folder / name
            if not path.is_file():
                raise CheckpointError(
                    f"{self.folder} has no {name}: the folder is incomplete, so download it again."
                )
            for key, value in self._load(torch, path).items():
                if not isinstance(key, str) or not isinstance(value, torch.Tensor):
                    raise CheckpointError(
                        f"{path} has an entry {key!r} that is not an array: give a file that holds only weights."
                    )
                kind = str(value.dtype).removeprefix("torch.")
                if kind not in _DTYPES:
                    raise CheckpointError(
                        f"{path} has {key} with dtype {kind}, but the supported dtypes are {', '.join(_DTYPES)}: "
                        "convert the file first."
                    )
                if key in self._tensors:
                    raise CheckpointError(
                        f"{self.folder} has {key} in two files: delete the file that does not belong to the model."
                    )
                self.shapes[key] = jax.ShapeDtypeStruct(tuple(value.shape), jnp.dtype(kind))
                self._tensors[key] = value
        return self

    @staticmethod
    def _load(torch: Any, path: Path) -> dict[str, Any]:
        import pickle

        refused = (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, OSError)
        try:
            try:
                loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                # Files written before torch 1.6 cannot be memory-mapped.
                loaded = torch.load(path, map_location="cpu", weights_only=True)
        except refused as error:
            wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
            if isinstance(error, pickle.UnpicklingError) and wanted is not None:
                raise CheckpointError(
                    f"{path} would load {wanted[1]} when it is read, but a file of weights needs only "
                    "arrays: the file may be malicious, so download the published file again."
                ) from error
            raise CheckpointError(
                f"{path} cannot be read as PyTorch weights ({first_line(error)}): download it again."
            ) from error
        advice = "give a file that holds only weights"
        check_type(
            f"the content of {path}", loaded, dict, "a dict of arrays", error=CheckpointError, advice=advice
        )
        return loaded

    def __exit__(self, *error: object) -> None:
        self._tensors.clear()

    def part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Read a slice of one array."""
        import torch

        found = self._tensors[name].detach()[index].contiguous()
        if found.dtype == torch.bfloat16:
            value = np.asarray(found.view(torch.int16).numpy().view(jnp.bfloat16))
        else:
            value = np.asarray(found.numpy())
        check_finite_array(value, name, self.folder)
        return value
