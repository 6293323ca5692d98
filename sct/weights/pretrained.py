"""Model folders: `config.json`, `model.safetensors`, `genes.tsv`, `README.md`.

A folder is all that others need: any program that reads safetensors can read it without this project.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sct.data.genes import GeneVocabulary
from sct.errors import CheckpointError
from sct.models import registry
from sct.nn.paths import flatten
from sct.version import __version__

FORMAT_VERSION = 1
CONFIG, WEIGHTS, GENES, CARD = "config.json", "model.safetensors", "genes.tsv", "README.md"


def save(
    folder: Path,
    family: str,
    config: Mapping[str, Any],
    variables: dict[str, Any],
    genes: GeneVocabulary,
    card: str,
) -> None:
    """Write a model folder, whole or not at all; an existing one is replaced.

    Parameters
    ----------
    folder
        Where to write.
    family, config
        Name in `sct.models.registry`, and plain values of its configuration.
    variables
        Nested dict of arrays.
    genes
        Vocabulary; its hash is kept in the configuration and checked when loading.
    card
        Text of the model card.
    """
    from safetensors.numpy import save_file

    flat = {path: np.ascontiguousarray(jax.device_get(value)) for path, value in flatten(variables).items()}
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(flat, temporary / WEIGHTS, metadata={"format": "sct", "family": family})
    genes.save(temporary / GENES)
    text = {
        "format_version": FORMAT_VERSION,
        "sct_version": __version__,
        "family": family,
        "vocabulary_hash": genes.hash,
        "model": dict(config),
    }
    (temporary / CONFIG).write_text(json.dumps(text, indent=1) + "\n")
    (temporary / CARD).write_text(card, encoding="utf-8")
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
        os.replace(temporary, folder)
        shutil.rmtree(old)
    else:
        os.replace(temporary, folder)


def locate(path: str | os.PathLike[str]) -> Path:
    """Model folder of a path: the folder itself, or the `model` folder of a run folder.

    Raises
    ------
    CheckpointError
        Neither is there.
    """
    folder = Path(path).expanduser()
    for candidate in (folder, folder / "model"):
        if (candidate / CONFIG).is_file() and (candidate / WEIGHTS).is_file():
            return candidate
    if not folder.exists():
        raise CheckpointError(f"{folder} does not exist: give a model folder or a run folder.")
    raise CheckpointError(
        f"{folder} is neither a model folder ({CONFIG}, {WEIGHTS}) nor a run folder with an exported model: "
        "train to the end, or give another folder."
    )


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a model folder; `CheckpointError` where it is missing or unreadable."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a model folder: it has no {CONFIG}.") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): the folder is damaged.") from error
    if config.get("format_version") != FORMAT_VERSION or config.get("family") not in registry.MODELS:
        raise CheckpointError(
            f"{path} describes format {config.get('format_version')} of family {config.get('family')!r}, but "
            f"this version reads format {FORMAT_VERSION} of {', '.join(registry.MODELS)}: upgrade sct."
        )
    return config


def read_variables(folder: Path) -> dict[str, np.ndarray]:
    """All arrays of a model folder, by path."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(folder / WEIGHTS)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {WEIGHTS}: the folder is incomplete.") from None
    except SafetensorError as error:
        raise CheckpointError(f"{folder / WEIGHTS} is damaged ({error}).") from error


def match(
    loaded: Mapping[str, Any], expected: Mapping[str, Any], source: str, new: Sequence[str] = ()
) -> dict[str, Any]:
    """Check that loaded arrays are those that a model has, by path and shape.

    Parameters
    ----------
    loaded
        Arrays by path.
    expected
        Arrays or shapes by path.
    source
        Where they come from, for the message.
    new
        Regular expressions of paths that may be absent and keep their initial value.

    Returns
    -------
    The loaded arrays.

    Raises
    ------
    CheckpointError
        With a list of the differences: "-" missing, "+" not in the model, "~" another shape.
    """
    import re

    differences = [
        f"- {path} {tuple(expected[path].shape)}"
        for path in sorted(set(expected) - set(loaded))
        if not any(re.search(pattern, path) for pattern in new)
    ]
    differences += [f"+ {path} {tuple(loaded[path].shape)}" for path in sorted(set(loaded) - set(expected))]
    differences += [
        f"~ {path} {tuple(loaded[path].shape)} instead of {tuple(expected[path].shape)}"
        for path in sorted(set(loaded) & set(expected))
        if tuple(loaded[path].shape) != tuple(expected[path].shape)
    ]
    if differences:
        shown = "\n  ".join(differences[:40]) + ("\n  ..." if len(differences) > 40 else "")
        raise CheckpointError(
            f"{source} does not fit the model, {len(differences)} parameters differ (- missing, + not in the "
            f"model, ~ another shape):\n  {shown}"
        )
    return dict(loaded)
