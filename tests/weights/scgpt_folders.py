"""Folders in the format of the published scGPT models."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

GOLDEN = Path(__file__).resolve().parents[1] / "goldens" / "scgpt"


def golden_arrays() -> dict[str, np.ndarray]:
    """Arrays of the golden `best_model.pt`, read without torch: a zip file of one pickle and one file per array."""
    with zipfile.ZipFile(GOLDEN / "best_model.pt") as file:
        root = file.namelist()[0].partition("/")[0]

        def rebuild(storage: np.ndarray, offset: int, size: Any, stride: Any, *_: Any) -> np.ndarray:
            steps = [4 * each for each in stride]
            return np.lib.stride_tricks.as_strided(storage[offset:], size, steps).copy()

        class Reader(pickle.Unpickler):
            def find_class(self, module: str, name: str) -> Any:
                known = {"_rebuild_tensor_v2": rebuild, "FloatStorage": "float32", "OrderedDict": dict}
                return known[name]

            def persistent_load(self, key: Any) -> np.ndarray:
                return np.frombuffer(file.read(f"{root}/data/{key[2]}"), key[1])

        return Reader(file.open(f"{root}/data.pkl")).load()


def write(
    folder: Path, arrays: dict[str, np.ndarray], args: dict[str, Any] | None = None, vocab: Any = None
) -> Path:
    """Folder with the given arrays; options and names are those of the golden folder where they are not given."""
    folder.mkdir(exist_ok=True)
    save_file(
        {name: np.ascontiguousarray(value) for name, value in arrays.items()}, folder / "model.safetensors"
    )
    for name, content in (("args.json", args), ("vocab.json", vocab)):
        text = (GOLDEN / name).read_text() if content is None else json.dumps(content)
        (folder / name).write_text(text)
    return folder


def respelt(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same arrays with the other spelling of attention."""
    return {name.replace("self_attn.Wqkv.", "self_attn.in_proj_"): value for name, value in arrays.items()}
