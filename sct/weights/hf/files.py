"""Arrays of a Hugging Face folder, part by part: safetensors, or torch's own format."""

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
_DTYPES = ("float16", "bfloat16", "float32", "float64", "bool", "uint8", "int8", "int16", "int32", "int64")


def open_weights(folder: Path) -> FolderReader | TorchReader:
    """Reader of the weights of a folder, to be used in a `with` statement.

    Raises
    ------
    CheckpointError
        There are none.
    """
    if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file():
        return FolderReader(folder)
    if (folder / TORCH).is_file() or (folder / f"{TORCH}.index.json").is_file():
        return TorchReader(folder)
    raise CheckpointError(
        f"{folder} has neither {WEIGHTS} nor {TORCH}, nor an index of several: give a folder with weights."
    )


class TorchReader:
    """Arrays of torch's own format; nothing that the files ask for is executed."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._files = [TORCH]
        index = folder / f"{TORCH}.index.json"
        if index.is_file():
            names = read_json(index).get("weight_map")
            files: list[Any] = list(names.values()) if isinstance(names, dict) else [None]
            if not files or not all(isinstance(name, str) and _BIN.fullmatch(name) for name in files):
                raise CheckpointError(f"{index} does not name the files: the folder is damaged.")
            self._files = sorted(set(files))
        self.shapes: dict[str, jax.ShapeDtypeStruct] = {}
        self._tensors: dict[str, Any] = {}

    def __enter__(self) -> TorchReader:
        what = f"{self.folder} has no safetensors but files in torch's own format; reading them"
        torch = load_extra("torch", "torch", what=what)
        for name in self._files:
            path = self.folder / name
            if not path.is_file():
                raise CheckpointError(f"{self.folder} has no {name}: the folder is incomplete.")
            for key, value in self._load(torch, path).items():
                if not isinstance(key, str) or not isinstance(value, torch.Tensor):
                    raise CheckpointError(
                        f"{path} holds {key!r}, which is no array: it is not a file of weights."
                    )
                kind = str(value.dtype).removeprefix("torch.")
                if kind not in _DTYPES:
                    raise CheckpointError(f"{path} holds {key} as {kind}: no model has that.")
                if key in self._tensors:
                    raise CheckpointError(f"{self.folder} has {key} in two files: it is damaged.")
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
                # Before torch 1.6, files could not be mapped.
                loaded = torch.load(path, map_location="cpu", weights_only=True)
        except refused as error:
            raise CheckpointError(
                f"{path} cannot be read as weights of torch ({first_line(error)})."
            ) from error
        check_type(f"the content of {path}", loaded, dict, "names with arrays", error=CheckpointError)
        return loaded

    def __exit__(self, *error: object) -> None:
        self._tensors.clear()

    def part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Read a part of one array."""
        import torch

        found = self._tensors[name].detach()[index].contiguous()
        if found.dtype == torch.bfloat16:
            value = np.asarray(found.view(torch.int16).numpy().view(jnp.bfloat16))
        else:
            value = np.asarray(found.numpy())
        check_finite_array(value, name, self.folder)
        return value
