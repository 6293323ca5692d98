"""Load a packaged model, or a model from a model folder, a run folder, a Hugging Face folder or a Hub id."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import flax.linen as nn
from jax.sharding import Mesh

from sct import messages
from sct.checks import check_choice, check_number, check_type
from sct.data.genes.vocabulary import GeneVocabulary
from sct.data.text import tokenizer as tokenizers
from sct.data.text.tokenizer import Tokenizer
from sct.errors import CheckpointError
from sct.extras import load_extra
from sct.models import classifier, lora, registry
from sct.nn import axes
from sct.nn.paths import flatten, unflatten
from sct.weights import adapter_folder, model_folder, packaged, run_folder
from sct.weights.fitted_readout import FittedReadout
from sct.weights.hf import folder as hf
from sct.weights.model_folder import (
    CARD,
    CONFIG,
    EMBEDDING,
    GENES,
    READOUT_RECORD,
    TRAINING_CELLS_RECORD,
    WEIGHTS,
)
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
from sct.weights.training_cells import TrainingCells

# The documentation uses these folders for runs and models. A missing `runs/x` is a missing folder, never a Hub id.
_LOCAL = ("runs", "models")


def load(
    path: str | os.PathLike[str],
    *,
    step: int | None = None,
    mesh: Mesh | None = None,
    rules: axes.AxisRules | None = None,
    dtype: str | None = None,
    genes: GeneVocabulary | None = None,
    adapters: str | os.PathLike[str] | None = None,
) -> Pretrained:
    """Load a model (public as `sct.load`).

    Parameters
    ----------
    path
        One of: the name of a packaged model (`sct.models` lists them), which loads without a network; a model folder; a
        run folder, whose best checkpoint is loaded; a Hugging Face folder of a text model (see
        `sct.weights.hf.folder`); the id of a model on the Hugging Face Hub. A string that is the name of a packaged
        model always means this model. To load a folder of the same name, write "./NAME".
    step
        Training step of the checkpoint to load from a run folder. A run keeps its latest checkpoints and the best one.
        Default: the best checkpoint.
    mesh, rules
        Mesh over which the arrays are sharded, and rules that map logical axes to mesh axes. Each device reads only its
        own shard. The default rules are those of training (`sct.nn.axes.RULES`), without axes that the mesh lacks.
        Without a mesh, all arrays are placed on the default device.
    dtype
        dtype of the floating-point arrays: "float32", "bfloat16" or "float16". By default, arrays keep the dtype that
        they have in the file, except that a model folder that was saved in float16 is loaded as float32: float16 only
        makes its files smaller, and training needs float32. The model computes in the dtype of its configuration
        (`config.dtype`), whatever the dtype of the arrays.
    genes
        Gene vocabulary of your data. Loading fails if the model has a different vocabulary.
    adapters
        Adapter folder to add to the model, such as `sct.tl.finetune` and `sct finetune` write; see
        `sct.weights.adapter_folder`.

    Returns
    -------
    The model with its weights, gene vocabulary, tokenizer and model card.

    Raises
    ------
    CheckpointError
        The folder is missing or damaged, or was changed (checked by file hashes). A weight is NaN or infinite, or the
        arrays do not fit the architecture; the message lists all differences. The run has no checkpoint of `step`; the
        message lists the steps that exist.
    ConfigError
        The rules name an axis that the mesh does not have.
    StoreError
        The gene vocabulary of the model differs from `genes`.

    Warns
    -----
    UserWarning
        The folder has no file hashes, so changes cannot be detected.
    """
    if adapters is not None:
        return adapter_folder.load(
            load(path, step=step, mesh=mesh, rules=rules, dtype=dtype, genes=genes), adapters
        )
    if dtype is not None:
        check_choice("dtype", dtype, LOADED_DTYPES, error=CheckpointError)
    rules = fitting_rules(mesh, rules)
    folder = locate(path) if step is None else _run_of(path, step)
    if run_folder.is_run(folder):
        return run_folder.load(folder, mesh=mesh, rules=rules, dtype=dtype, genes=genes, step=step)
    if model_folder.is_foreign(folder):
        return hf.load(folder, mesh=mesh, rules=rules, dtype=dtype, genes=genes)
    config = model_folder.read_config(folder)
    kind = registry.family(config["family"]).config
    values = registry.with_current_names(kind, config["model"], "model", recorded=True)
    model = registry.model_config(config["family"], values)
    if dtype is None and config.get("dtype") == "float16":
        dtype = "float32"
    model_folder.verify(folder, config, shared=spans_processes(mesh))
    vocabulary = _vocabulary(folder, config, model)
    if genes is not None and vocabulary is not None:
        vocabulary.check_same(genes, what=f"the model {folder}", other_what="the data")
    tokenizer = _tokenizer(folder, config)
    boxed = boxed_shapes(config["family"], model)
    with model_folder.FolderReader(folder) as reader:
        boxed = classifier.beside(lora.beside(boxed, reader.shapes), reader.shapes)
        expected = flatten(nn.unbox(boxed))
        match(reader.shapes, expected, str(folder))
        where = flatten(axes.shardings(boxed, mesh, rules)) if mesh is not None else {}
        arrays = {name: reader.read(name, where.get(name), dtype) for name in expected}
    data = config.get("data")
    if run_folder.is_run(folder.parent):  # model folders of earlier releases do not record the masking
        run = model_folder.read_json(folder.parent / "config.json")
        data = run_folder.with_masking(data_options(run.get("data")) if data is None else data, run)
    card = (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else ""
    license = config.get("license") or "unknown"
    recorded = {name: config.get(name) for name in (READOUT_RECORD, TRAINING_CELLS_RECORD, EMBEDDING)}
    for name, value in recorded.items():
        check_type(
            f"the entry {name!r} of {folder / CONFIG}", value, (dict, type(None)), "a JSON object",
            error=CheckpointError, advice="the file is damaged, so restore it from a copy",
        )  # fmt: skip
    readout, cells, embedding = recorded.values()
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
        None if readout is None else FittedReadout.load(folder, readout),
        embedding or {},
        None if cells is None else TrainingCells(cells, folder),
    )


def _run_of(path: str | os.PathLike[str], step: int) -> Path:
    """Check that a path is a run folder with checkpoints, and that `step` is an integer. Return the path."""
    check_number("step", step, whole=True, error=CheckpointError)
    folder = packaged.find(path) or Path(path).expanduser()
    if not run_folder.is_run(folder):
        raise CheckpointError(
            f"step is {step}, but {folder} is not a run folder with checkpoints: omit `step`, or give a run folder."
        )
    return folder


def _vocabulary(folder: Path, config: Mapping[str, Any], model: Any) -> GeneVocabulary | None:
    """Load the gene vocabulary of a model folder and check its hash. Return None if the model has no genes."""
    if config.get("vocabulary_hash") is None and not (folder / GENES).is_file():
        return None
    vocabulary = GeneVocabulary.load(folder / GENES)
    if vocabulary.hash != config.get("vocabulary_hash"):
        raise CheckpointError(
            f"{folder / GENES} has hash {vocabulary.hash[:16]}, but {CONFIG} expects "
            f"{str(config.get('vocabulary_hash'))[:16]}: restore {GENES} from a copy, or, to use other genes, save a "
            "new model with save_pretrained."
        )
    positions = getattr(model, "num_genes", len(vocabulary))
    if len(vocabulary) > positions:
        raise CheckpointError(
            f"{folder / GENES} has {len(vocabulary)} genes, but the model has only {positions} gene positions: restore "
            "the folder from a copy."
        )
    return vocabulary


def _tokenizer(folder: Path, config: Mapping[str, Any]) -> Tokenizer | None:
    """Load the tokenizer of a model folder and check its hash. Return None if the model has no tokenizer."""
    named = config.get("tokenizer_hash")
    if named is None:
        return None
    tokenizer = Tokenizer.load(folder)
    if tokenizer.fingerprint != named:
        raise CheckpointError(
            f"the tokenizer in {folder} has hash {tokenizer.fingerprint[:16]}, but {CONFIG} expects "
            f"{str(named)[:16]}: restore the tokenizer files from a copy, or, to use another tokenizer, save a new "
            "model with save_pretrained."
        )
    return tokenizer


def locate(path: str | os.PathLike[str]) -> Path:
    """Return the folder of a model: a packaged model, a path or a Hub id. A model on the Hub is downloaded.

    The name of a packaged model comes first, see `load`. A run folder may contain an exported model in the sub-folder
    `model`. This sub-folder is returned if the exported model is still the best checkpoint of the run. Every option
    that names a model uses this function: `sct.load`, `sct.tl`, `init_from`, `data.cell_encoder` and `data.llm`.

    Raises
    ------
    CheckpointError
        The path is neither a model folder nor a run folder, or the download failed.
    MissingExtraError
        The path looks like a Hub id, but huggingface_hub is not installed.
    """
    folder = packaged.find(path)
    if folder is not None:
        if Path(path).exists():
            messages.warn(
                f"{path!r} is the name of a packaged model and of a local folder: using the packaged model (for the "
                f"folder, write './{path}')."
            )
        return folder
    folder = Path(path).expanduser()
    found = model_folder.find(folder)
    if found is not None:
        return found
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
            f"the folder {folder} does not exist{packaged.not_found(path)}: give a model folder, a run folder, or a "
            "Hub id of the form USER/MODEL (if there is a local folder USER, then USER/MODEL is read as a path, not as "
            "a Hub id)."
        )
    raise CheckpointError(
        f"{folder} is neither a model folder ({CONFIG} and {WEIGHTS}) nor a run folder with a checkpoint: give another "
        "folder, or train a model first."
    )


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Load a tokenizer from a file, a folder, a run folder or a model on the Hugging Face Hub.

    Raises
    ------
    ConfigError
        The given file, folder or model has no tokenizer.
    CheckpointError
        The path looks like a Hub id, but the download failed.
    MissingExtraError
        The path looks like a Hub id, but huggingface_hub is not installed.
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
    """Return whether a path is a Hub id: USER/MODEL, where MODEL is not a file name and USER is not a local folder."""
    found = (
        re.fullmatch(r"([A-Za-z0-9][\w.-]*)/([A-Za-z0-9][\w.-]*)", path) if isinstance(path, str) else None
    )
    if found is None or found[1] in _LOCAL or found[2].endswith((".json", ".model", ".safetensors")):
        return False
    return not Path(found[1]).exists()


def _download(name: str, only: Sequence[str] | None = None) -> Path:
    """Download a model from the Hugging Face Hub. If `only` is given, download only these files."""
    what = f"there is no folder {name!r}, and downloading it from the Hugging Face Hub"
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
            f"there is no folder {name!r}, and the download from the Hugging Face Hub failed ({reason}): check the id "
            "and the network connection, or give a local folder."
        ) from error
