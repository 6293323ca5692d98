"""Loading a model: whatever names one, a model folder, a run folder, a Hugging Face folder or an id of the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import flax.linen as nn
from jax.sharding import Mesh

from sct.checks import check_choice
from sct.data.genes.vocabulary import GeneVocabulary
from sct.data.text import tokenizer as tokenizers
from sct.data.text.tokenizer import Tokenizer
from sct.errors import CheckpointError
from sct.extras import load_extra
from sct.models import lora, registry
from sct.nn import axes
from sct.nn.paths import flatten, unflatten
from sct.weights import model_folder, run_folder
from sct.weights.hf import folder as hf
from sct.weights.model_folder import CARD, CONFIG, GENES, WEIGHTS
from sct.weights.pretrained import (
    LOADED_DTYPES,
    Pretrained,
    boxed_shapes,
    data_options,
    data_record,
    fitting_rules,
    match,
    spans_processes,
)

# Folders that runs and models are kept in by this project's own examples: what is not there yet is no model of the hub.
_LOCAL = ("runs", "models")


def load(
    path: str | os.PathLike[str],
    *,
    mesh: Mesh | None = None,
    rules: axes.AxisRules | None = None,
    dtype: str | None = None,
    genes: GeneVocabulary | None = None,
) -> Pretrained:
    """Load a model (public as `sct.load`).

    Parameters
    ----------
    path
        A model folder, a run folder (its best checkpoint), a Hugging Face folder of a text model (see
        `sct.weights.hf.folder`), or the id of a model on the Hugging Face hub.
    mesh, rules
        Place the arrays on a mesh by their logical axes, each device reading its own part; without a mesh
        they go whole to the default device. By default the rules are those of training
        (`sct.nn.axes.RULES`), as far as the mesh has their axes.
    dtype
        Type of the floating-point arrays, "float32", "bfloat16" or "float16"; by default that of the file.
    genes
        Vocabulary that the caller's data has; refused where its hash is another.

    Raises
    ------
    CheckpointError
        The folder is missing, damaged or was changed (by the hashes of its files), weights are not finite, or its
        arrays are not those of its architecture; all are listed.
    ConfigError
        The rules name an axis that the mesh does not have.
    StoreError
        The vocabularies differ.

    Warns
    -----
    UserWarning
        The folder has no hashes.
    """
    if dtype is not None:
        check_choice("dtype", dtype, LOADED_DTYPES, error=CheckpointError)
    rules = fitting_rules(mesh, rules)
    folder = locate(path)
    if run_folder.is_run(folder):
        return run_folder.load(folder, mesh=mesh, rules=rules, dtype=dtype, genes=genes)
    if model_folder.is_foreign(folder):
        return hf.load(folder, mesh=mesh, rules=rules, dtype=dtype, genes=genes)
    config = model_folder.read_config(folder)
    model = registry.model_config(config["family"], config["model"])
    model_folder.verify(folder, config, shared=spans_processes(mesh))
    vocabulary = _vocabulary(folder, config, model)
    if genes is not None and vocabulary is not None:
        vocabulary.check_same(genes, what=f"the model {folder}", other_what="the data")
    tokenizer = _tokenizer(folder, config)
    boxed = boxed_shapes(config["family"], model)
    with model_folder.FolderReader(folder) as reader:
        boxed = lora.beside(boxed, reader.shapes)
        expected = flatten(nn.unbox(boxed))
        match(reader.shapes, expected, str(folder))
        where = flatten(axes.shardings(boxed, mesh, rules)) if mesh is not None else {}
        arrays = {name: reader.read(name, where.get(name), dtype) for name in expected}
    data = config.get("data")
    if run_folder.is_run(folder.parent):  # written before model folders knew it
        run = model_folder.read_json(folder.parent / "config.json")
        data = run_folder.with_masking(data_options(run.get("data")) if data is None else data, run)
    card = (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else ""
    license = config.get("license") or "unknown"
    return Pretrained(
        config["family"],
        model,
        unflatten(arrays),
        vocabulary,
        card,
        license,
        config.get("step"),
        data_record(data),
        tokenizer,
    )


def _vocabulary(folder: Path, config: Mapping[str, Any], model: Any) -> GeneVocabulary | None:
    """Genes of a model folder, as its configuration names them."""
    if config.get("vocabulary_hash") is None and not (folder / GENES).is_file():
        return None
    vocabulary = GeneVocabulary.load(folder / GENES)
    if vocabulary.hash != config.get("vocabulary_hash"):
        raise CheckpointError(
            f"{folder / GENES} is not the vocabulary that {CONFIG} names (hash {vocabulary.hash[:16]}, not "
            f"{str(config.get('vocabulary_hash'))[:16]}): restore the file; a model with other genes must be saved "
            "anew (save_pretrained)."
        )
    positions = getattr(model, "num_genes", len(vocabulary))
    if len(vocabulary) > positions:
        raise CheckpointError(
            f"{folder / GENES} has {len(vocabulary)} genes, but the model has {positions} positions: the folder "
            "was changed."
        )
    return vocabulary


def _tokenizer(folder: Path, config: Mapping[str, Any]) -> Tokenizer | None:
    """Tokenizer of a model folder, as its configuration names it."""
    named = config.get("tokenizer_hash")
    if named is None:
        return None
    tokenizer = Tokenizer.load(folder)
    if tokenizer.fingerprint != named:
        raise CheckpointError(
            f"the tokenizer in {folder} is not the one that {CONFIG} names (hash {tokenizer.fingerprint[:16]}, not "
            f"{str(named)[:16]}): restore its files; a model with another tokenizer must be saved anew "
            "(save_pretrained)."
        )
    return tokenizer


def locate(path: str | os.PathLike[str]) -> Path:
    """Folder to load for a path: a model folder, or a run folder; a hub id is fetched.

    Of a run folder it is `model`, where that is still the best of the run's checkpoints. Whatever names a model comes
    here: `sct.load`, the tools, `init_from`, `data.cell_encoder`, `data.llm`.

    Raises
    ------
    CheckpointError
        Neither is there.
    MissingExtraError
        It looks like a hub id and huggingface_hub is not installed.
    """
    folder = Path(path).expanduser()
    here = model_folder.find(folder)
    if here is not None:
        return here
    exported = model_folder.find(folder / "model")
    if run_folder.is_run(folder):
        current = exported is not None and run_folder.is_current(folder, exported)
        return cast(Path, exported) if current else folder
    if exported is not None:
        return exported
    if not folder.exists():
        if _is_hub_id(path):
            return _download(str(path))
        raise CheckpointError(
            f"the folder {folder} does not exist: give a model folder, a run folder, or a hub id whose first part is "
            "no folder here."
        )
    raise CheckpointError(
        f"{folder} is neither a model folder ({CONFIG}, {WEIGHTS}) nor a run folder with a checkpoint: train "
        "first, or give another folder."
    )


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Tokenizer of a file, of a folder that holds one, of a run folder, or of a model on the hub.

    Raises
    ------
    ConfigError
        There is no tokenizer.
    CheckpointError, MissingExtraError
        It looks like a hub id and cannot be fetched.
    """
    given = Path(path).expanduser()
    folder = given
    if not given.exists() and _is_hub_id(path):
        here = f"{run_folder.TOKENIZER}/"
        folder = _download(str(path), [place + name for place in ("", here) for name in tokenizers.FILES])
    folder = model_folder.find(folder) or folder
    own = folder / run_folder.TOKENIZER
    return Tokenizer.load(own if own.is_dir() else folder)


def _is_hub_id(path: str | os.PathLike[str]) -> bool:
    """Whether a text can only mean a model of the hub: two names, not of a file, and the first is no folder here."""
    found = (
        re.fullmatch(r"([A-Za-z0-9][\w.-]*)/([A-Za-z0-9][\w.-]*)", path) if isinstance(path, str) else None
    )
    if found is None or found[1] in _LOCAL or found[2].endswith((".json", ".model", ".safetensors")):
        return False
    return not Path(found[1]).exists()


def _download(name: str, only: Sequence[str] | None = None) -> Path:
    """Fetch a model of the Hugging Face hub, or some of its files."""
    what = f"there is no folder {name!r}, and fetching it from the Hugging Face hub"
    hub = load_extra("huggingface_hub", "hub", what=what)
    try:
        return Path(
            hub.snapshot_download(
                name,
                allow_patterns=only,
                ignore_patterns=["*.h5", "*.msgpack", "*.onnx*", "*.ot", "*.tflite"],
            )
        )
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"there is no folder {name!r}, and it could not be fetched from the Hugging Face hub ({reason}): "
            "check the id and the connection, or give a local folder."
        ) from error
