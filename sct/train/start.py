"""Start a run in one of three ways: from random parameters, from a model (`init_from`), or from a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from sct.atomic import atomic_folder
from sct.data.store import Store
from sct.data.text.tokenizer import Tokenizer
from sct.errors import CheckpointError, ConfigError
from sct.families.tasks import trained_by
from sct.models import lora, registry
from sct.nn.adapters import COLLECTION
from sct.nn.paths import flatten
from sct.tasks.base import StoreConfig, Task
from sct.train import resume, sharding
from sct.train.run_spec import RunSpec
from sct.weights import adapter_folder, run_folder
from sct.weights.load import load, load_tokenizer
from sct.weights.pretrained import Pretrained
from sct.weights.vocabulary import resized


@dataclasses.dataclass(frozen=True)
class Start:
    """The inputs with which training starts.

    Attributes
    ----------
    store, task
        Store with the cells, and the task. The task holds the architecture and the tokenizer.
    license
        License of the trained model.
    variables
        Parameters of the model named in `init_from`, by path; None if the run starts from random parameters or resumes.
    step
        Step to resume from; None if the run does not resume.
    remarks
        Messages for the user.
    """

    store: Store
    task: Task
    license: str
    variables: Mapping[str, Any] | None = None
    step: int | None = None
    remarks: tuple[str, ...] = ()


def begin(spec: RunSpec, workdir: Path) -> Start:
    """Prepare the inputs of training: resume the run if its folder has checkpoints.

    If the folder has no checkpoints, start from the model in `init_from`, or from random parameters.
    """
    if run_folder.steps(workdir):
        return resumed(spec, workdir)
    return from_model(spec, workdir) if spec.init_from else new(spec, workdir)


def new(spec: RunSpec, workdir: Path) -> Start:
    """Start a run from random parameters."""
    store, mesh = open_data(spec.data, workdir), _mesh(spec)
    tokenizer = _save_tokenizer(
        spec, workdir, lambda: _configured_tokenizer(spec) or spec.make_tokenizer(store)
    )
    task = spec.make_task(store, spec.model, tokenizer, None, mesh)
    return Start(store, task, task.license)


def from_model(spec: RunSpec, workdir: Path) -> Start:
    """Start a run from the model in `spec.init_from`.

    The run uses the tokenizer of this model unless the configuration names another one.

    Tasks with `inherits_architecture` also keep the model's architecture. In other tasks, an optional part of the model
    is left out if the configuration does not ask for it.

    Raises
    ------
    ConfigError
        The task cannot train the model, the adapters differ, or neither the configuration nor the model has a
        tokenizer.
    """
    store, mesh = open_data(spec.data, workdir), _mesh(spec)
    parent = load(spec.init_from, mesh=mesh, genes=store.vocabulary)
    if spec.task_spec.inherits_architecture:
        _check_family(spec, parent)
    tokenizer = _save_tokenizer(
        spec,
        workdir,
        lambda: _configured_tokenizer(spec) or _parent_tokenizer(spec, parent),
        parent.tokenizer,
    )
    parent, remarks = _resize_embeddings(parent, tokenizer)
    model = spec.model
    if spec.task_spec.inherits_architecture:
        model = registry.inherited(parent.config, spec.model, spec.data.text_length)
    task = spec.make_task(store, model, tokenizer, parent.data, mesh)
    if spec.task_spec.finetunes:
        adapter_folder.check_native(parent, spec.init_from)
    elif task.lora is None and COLLECTION in parent.variables:
        raise ConfigError(
            f"{spec.init_from} has adapters, but the configuration trains no adapters: set adapters.kind (or "
            "objective.lora) to the same kind, or merge LoRA adapters into the model first (sct.models.lora.merge)."
        )
    if task.lora is not None:
        lora.check_same(parent.variables, task.lora, spec.init_from)
    variables, left_out = _without_optional_parts(parent, task.model_config, spec.init_from)
    # A model trained from licensed weights keeps their license.
    return Start(store, task, parent.license, variables, remarks=(*remarks, *left_out))


def resumed(spec: RunSpec, workdir: Path) -> Start:
    """Resume the run in a folder on the same data, with the architecture and the tokenizer that the folder records.

    The number of steps may differ from the recorded one (`sct.train.resume.check_length`).

    Raises
    ------
    ConfigError, StoreError, CheckpointError
        Options, cells or input files differ from those of the run, or the folder is damaged.
    """
    settings = resume.read(workdir / run_folder.CONFIG)
    resume.check_options(settings, spec, workdir)
    store = open_data(spec.data, workdir)
    described = resume.read(workdir / run_folder.DATA)
    resume.check_folder(described, store, spec, workdir)
    mesh = _mesh(spec)
    tokenizer = None
    inherited = spec.task_spec.finetunes and (workdir / run_folder.TOKENIZER).exists()
    if spec.task_spec.tokenizer is not None or inherited:
        tokenizer = _run_tokenizer(workdir)
    model = (settings.get(run_folder.MODEL) if spec.task_spec.inherits_architecture else None) or spec.model
    task = spec.make_task(store, model, tokenizer, described.get("model"), mesh)
    license = described.get("license") or "unknown"
    changed = resume.check_length(settings, spec, task.tokens_per_record, workdir, records_of(spec, task))
    remarks = (changed,) if changed else ()
    return Start(store, task, license, step=run_folder.steps(workdir)[-1], remarks=remarks)


def records_of(spec: RunSpec, task: Task) -> int:
    """Return the number of training records in an epoch; 0 if the length of the run does not depend on it."""
    source = task.dataset("train") if spec.loop.epochs else None
    return 0 if source is None else len(source)


def open_data(config: StoreConfig, workdir: Path) -> Store:
    """Open the configured store, or write the configured data set to a store in the run folder and open that."""
    if config.store and config.dataset:
        raise ConfigError(
            f"both data.store ({config.store}) and data.dataset ({config.dataset}) are set, but only one is allowed: "
            'to use the store, add --config.data.dataset="".'
        )
    if not (config.store or config.dataset):
        raise ConfigError(
            "data.store and data.dataset are both empty, but training needs one of them: ingest your files with "
            "`python -m launch.ingest --input=FILES --output=STORE` and add --config.data.store=STORE, or use the "
            ":quickstart variant of the configuration."
        )
    if config.store:
        return Store.open(Path(config.store).expanduser())
    from sct.data.bundled import prepare

    if jax.process_index() == 0:
        prepare(config.dataset, workdir / "store")
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("the store is made")
    return Store.open(workdir / "store")


def _mesh(spec: RunSpec) -> Mesh | None:
    """Return the device mesh over which to load models, or None for a single device."""
    return sharding.make_mesh(spec.loop.mesh) if jax.device_count() > 1 else None


def _check_family(spec: RunSpec, parent: Pretrained) -> None:
    families = trained_by(spec.task_spec)
    if parent.family not in families:
        raise ConfigError(
            f"init_from is a model of the family {parent.family!r}, but the task {spec.task!r} cannot train this "
            f"family: use a model of the family {' or '.join(families)}."
        )
    if parent.family != spec.family:
        raise ConfigError(
            f"init_from is a model of the family {parent.family!r}, but the configuration has the family "
            f"{spec.family!r}: add --config.family={parent.family}."
        )


def _without_optional_parts(
    parent: Pretrained, model: Any, init_from: str
) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """Return the variables of a model by path, without parts that `model` does not have; and messages about them.

    The Flax module declares these parts (`optional_parts`). They do not affect the other outputs of the model.
    """
    variables, remarks = flatten(parent.variables), []
    parts: Mapping[str, str] = getattr(registry.family(parent.family).module, "optional_parts", {})
    for option, paths in parts.items():
        if getattr(parent.config, option) and not getattr(model, option, True):
            variables = {path: value for path, value in variables.items() if not path.startswith(paths)}
            remarks.append(
                f"model.{option} is {getattr(model, option)}, so the new model does not have this part of {init_from} "
                f"({paths}): to keep it, set --config.model.{option}={getattr(parent.config, option)}."
            )
    return variables, tuple(remarks)


def _save_tokenizer(
    spec: RunSpec, workdir: Path, make: Callable[[], Tokenizer], inherited: Tokenizer | None = None
) -> Tokenizer | None:
    """Save the tokenizer to the run folder and load it from this folder. Return None for tasks without text.

    Process 0 calls `make` and saves the tokenizer; all processes load it. A task that fine-tunes a text model has the
    tokenizer of this model (`inherited`).
    """
    if spec.task_spec.tokenizer is None and not (spec.task_spec.finetunes and inherited is not None):
        return None
    folder = workdir / run_folder.TOKENIZER
    if jax.process_index() == 0:
        tokenizer = make()
        with atomic_folder(folder) as unfinished:
            tokenizer.save(unfinished)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("the tokenizer is made")
    return Tokenizer.load(folder)


def _configured_tokenizer(spec: RunSpec) -> Tokenizer | None:
    """Load the tokenizer that the configuration names. Return None if the configuration names no tokenizer."""
    return load_tokenizer(spec.tokenizer) if spec.tokenizer else None


def _parent_tokenizer(spec: RunSpec, parent: Pretrained) -> Tokenizer:
    if parent.tokenizer is None:
        raise ConfigError(
            f"{spec.init_from} has neither tokenizer.json nor tokenizer.model, but training on text needs a tokenizer: "
            "add one of these files, or set --config.data.tokenizer."
        )
    return parent.tokenizer


def _run_tokenizer(workdir: Path) -> Tokenizer:
    """Load the tokenizer that the run saved in its folder."""
    folder = workdir / run_folder.TOKENIZER
    if not folder.exists():
        raise CheckpointError(
            f"{workdir} has no folder {run_folder.TOKENIZER!r}, but the run cannot resume without its tokenizer: "
            "restore the folder, or choose another --workdir."
        )
    return Tokenizer.load(folder)


def _resize_embeddings(parent: Pretrained, tokenizer: Tokenizer | None) -> tuple[Pretrained, tuple[str, ...]]:
    """Resize the embeddings of a model to the number of tokens of a tokenizer.

    Return the model, and messages about new tokens.
    """
    if tokenizer is None:
        return parent, ()
    grown = resized(parent, tokenizer.vocab_size)
    if grown is parent:
        return parent, ()
    remark = (
        f"the tokenizer has {tokenizer.vocab_size:,} tokens, but the model has {parent.config.vocab_size:,}: the "
        "embeddings of the new tokens start near the mean embedding."
    )
    return grown, (remark,)
