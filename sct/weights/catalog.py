"""List the models that are ready to load: the packaged models, and those in the cache of the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sct import messages
from sct.errors import CheckpointError, MissingExtraError, SctError
from sct.extras import load_extra
from sct.weights import model_folder, packaged
from sct.weights.model_folder import CONFIG, EMBEDDING, FILES, GENES, TRAINING_CELLS_RECORD

if TYPE_CHECKING:  # models load without the libraries of tables
    import pandas as pd

PACKAGE, CACHE = "package", "cache"
# Columns of the table and their types in pandas; missing values are NA.
_COLUMNS = {
    "name": "string", "where": "string", "family": "string", "parameters": "Int64", "genes": "Int64",
    "species": "string", "license": "string", "training_cells": "Int64", "readout": "string", "bytes": "Int64",
    "default": "bool", "folder": "string", "trouble": "string",
}  # fmt: skip


def models() -> pd.DataFrame:
    """List the models that are ready to load (public as `sct.models`): packaged models, then models in the Hub's cache.

    Of each model, only `config.json` is read, never the weights. Models in the cache of the Hugging Face Hub are listed
    if huggingface_hub is installed and if they are model folders of sct. Models in other folders are not listed; see
    `sct models --input=FOLDER`.

    Returns
    -------
    Table with one row per model. Values that a model folder does not record are NA.

    - `name`: name or Hub id for `sct.load`
    - `where`: "package" or "cache"
    - `family`: model family, as in `Pretrained.family`
    - `parameters`, `genes`, `training_cells`: number of parameters, genes and training cells
    - `species`: species of the genes, such as "human"
    - `license`: license of the weights
    - `readout`: default readout of `sct.tl.embed`, if one is recorded
    - `bytes`: size on disk
    - `default`: whether `sct embed` uses this model without `--model`
    - `folder`: the model folder
    - `trouble`: why the model cannot be loaded, or NA. Such a model has no other values.
    """
    import pandas as pd

    found = pd.DataFrame([*_packaged(), *_cached()], columns=list(_COLUMNS))
    return found.astype(_COLUMNS)


def _packaged() -> Iterator[dict[str, Any]]:
    for name in packaged.names():
        yield _row(name, PACKAGE, packaged.FOLDER / name, name == packaged.DEFAULT)


def _cached() -> Iterator[dict[str, Any]]:
    """Yield the model folders of sct in the cache of the Hugging Face Hub: the version that a Hub id loads."""
    try:
        constants = load_extra("huggingface_hub.constants", "hub")
        hub = load_extra("huggingface_hub", "hub")
    except MissingExtraError:
        return
    cache = Path(constants.HF_HUB_CACHE)
    if not cache.is_dir():
        return
    try:
        repos = hub.scan_cache_dir(cache).repos
    except OSError as error:  # for example, a part of the cache belongs to another user
        messages.warn(f"the cache {cache} cannot be read ({error}): its models are not listed.")
        return
    for repo in sorted(repos, key=lambda each: str(each.repo_id)):
        if repo.repo_type != "model" or not repo.revisions:
            continue
        newest = max(repo.revisions, key=lambda each: float(each.last_modified))
        folder = Path(repo.refs.get("main", newest).snapshot_path)
        if _is_ours(folder):
            yield _row(str(repo.repo_id), CACHE, folder)


def _is_ours(folder: Path) -> bool:
    """Return whether a folder is a model folder of sct, even if its `config.json` is damaged."""
    if not (folder / CONFIG).is_file():
        return False
    try:
        return "sct_version" in model_folder.read_json(folder / CONFIG)
    except CheckpointError:
        return (folder / GENES).is_file()  # no other format has this file


def _row(name: str, where: str, folder: Path, default: bool = False) -> dict[str, Any]:
    """Describe a model folder as a row of the table."""
    row = {"name": name, "where": where, "default": default, "folder": str(folder)}
    try:
        return row | _described(folder)
    except SctError as error:
        return row | {"trouble": str(error)}
    except OSError as error:
        return row | {"trouble": f"{folder} cannot be read ({error.strerror}): check its permissions."}


def _described(folder: Path) -> dict[str, Any]:
    """Return what `config.json` of a model folder records.

    Raises
    ------
    CheckpointError
        `config.json` is missing or damaged, or a file that it lists is missing.
    """
    config = model_folder.read_config(folder)
    genes, cells, embedding = (
        _mapping(config.get(name)) for name in ("genes", TRAINING_CELLS_RECORD, EMBEDDING)
    )
    for name in _mapping(config.get(FILES)):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder} has no {name}: the folder is incomplete, so copy or save it again."
            )
    return {
        "family": config["family"],
        "parameters": _of(config.get("parameters"), int),
        "genes": _of(genes.get("number"), int),
        "species": _of(genes.get("species"), str) or None,
        "license": config.get("license"),
        "training_cells": _of(cells.get("cells"), int),
        "readout": _of(embedding.get("default"), str),
        "bytes": sum(file.stat().st_size for file in folder.iterdir() if file.is_file()),
    }


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _of(value: Any, kind: type) -> Any:
    """Return a value that has the right type, otherwise None."""
    return value if type(value) is kind else None
