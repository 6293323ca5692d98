"""The three ways to start a run: new, from the parameters of a model, or where the run folder stopped."""

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
from sct.weights import run_folder
from sct.weights.load import load, load_tokenizer
from sct.weights.pretrained import Pretrained
from sct.weights.vocabulary import resized


@dataclasses.dataclass(frozen=True)
class Start:
    """What a run starts with.

    Attributes
    ----------
    store, task
        Cells, and what is learned of them; the task has architecture and tokenizer.
    license
        Licence of the trained model.
    variables
        Arrays by path of the model that training starts from; None for a new run and for one that goes on.
    step
        Step to resume from; None for a new run.
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
    """Start a run in the way that its folder and its configuration ask for."""
    if run_folder.steps(workdir):
        return resumed(spec, workdir)
    return from_model(spec, workdir) if spec.init_from else new(spec, workdir)


def new(spec: RunSpec, workdir: Path) -> Start:
    """Start from random parameters."""
    store, mesh = open_data(spec.data, workdir), _mesh(spec)
    tokenizer = _saved(spec, workdir, lambda: _named(spec) or spec.make_tokenizer(store))
    task = spec.make_task(store, spec.model, tokenizer, None, mesh)
    return Start(store, task, task.license)


def from_model(spec: RunSpec, workdir: Path) -> Start:
    """Start from the parameters of `spec.init_from`; its tokenizer is the default.

    Tasks with `inherits_architecture` also keep the model's architecture.

    Raises
    ------
    ConfigError
        The task does not train the model, or neither the configuration nor the model has a tokenizer.
    """
    store, mesh = open_data(spec.data, workdir), _mesh(spec)
    parent = load(spec.init_from, mesh=mesh, genes=store.vocabulary)
    if spec.task_spec.inherits_architecture:
        _check_family(spec, parent)
    tokenizer = _saved(spec, workdir, lambda: _named(spec) or _of_parent(spec, parent))
    parent, remarks = _grown(parent, tokenizer)
    model = spec.model
    if spec.task_spec.inherits_architecture:
        model = registry.inherited(parent.config, spec.model, spec.data.text_length)
    task = spec.make_task(store, model, tokenizer, parent.data, mesh)
    if task.lora is None and COLLECTION in parent.variables:
        raise ConfigError(
            f"{spec.init_from} has adapters, but the configuration trains none: set adapters.kind (or objective.lora) "
            "to theirs, or merge low-rank ones first (sct.models.lora.merge)."
        )
    if task.lora is not None:
        lora.check_same(parent.variables, task.lora, spec.init_from)
    # What is trained from licensed weights stays under their licence.
    return Start(store, task, parent.license, flatten(parent.variables), remarks=remarks)


def resumed(spec: RunSpec, workdir: Path) -> Start:
    """Resume the run of a folder, with the same data and with the architecture and tokenizer of the folder.

    Raises
    ------
    ConfigError, StoreError, CheckpointError
        Options, cells or texts are not those that the run began with, or the folder is damaged.
    """
    settings = resume.read(workdir / run_folder.CONFIG)
    resume.check_options(settings, spec, workdir)
    store = open_data(spec.data, workdir)
    described = resume.read(workdir / run_folder.DATA)
    resume.check_folder(described, store, spec, workdir)
    mesh = _mesh(spec)
    tokenizer = None
    if spec.task_spec.tokenizer is not None:
        tokenizer = _of_folder(workdir)
    model = (settings.get(run_folder.MODEL) if spec.task_spec.inherits_architecture else None) or spec.model
    task = spec.make_task(store, model, tokenizer, described.get("model"), mesh)
    license = described.get("license") or "unknown"
    return Start(store, task, license, step=run_folder.steps(workdir)[-1])


def open_data(config: StoreConfig, workdir: Path) -> Store:
    """Open the configured store, or make one of the configured data set in the run folder."""
    if config.store and config.dataset:
        raise ConfigError(
            f"both data.store ({config.store}) and data.dataset ({config.dataset}) are set: choose one; for the store "
            'add --config.data.dataset="".'
        )
    if not (config.store or config.dataset):
        raise ConfigError(
            "the configuration needs either data.store or data.dataset: make a store of your files with "
            "`python -m launch.ingest --input=FILES --output=STORE` and add --config.data.store=STORE, or "
            "try the :quickstart variant of the configuration."
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
    """Devices that each load a part of the model; None for one device."""
    return sharding.make_mesh(spec.loop.mesh) if jax.device_count() > 1 else None


def _check_family(spec: RunSpec, parent: Pretrained) -> None:
    families = trained_by(spec.task_spec)
    if parent.family not in families:
        raise ConfigError(
            f"the model to start from is of the family {parent.family!r}, which the task {spec.task!r} does not "
            f"train: give one of {', '.join(families)}."
        )
    if parent.family != spec.family:
        raise ConfigError(
            f"the model to start from is of the family {parent.family!r}, but the configuration's is "
            f"{spec.family!r}: add --config.family={parent.family}."
        )


def _saved(spec: RunSpec, workdir: Path, make: Callable[[], Tokenizer]) -> Tokenizer | None:
    """Tokenizer of a task of texts, as the run folder keeps it from now on; process 0 makes it for all."""
    if spec.task_spec.tokenizer is None:
        return None
    folder = workdir / run_folder.TOKENIZER
    if jax.process_index() == 0:
        tokenizer = make()
        with atomic_folder(folder) as unfinished:
            tokenizer.save(unfinished)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("the tokenizer is made")
    return Tokenizer.load(folder)


def _named(spec: RunSpec) -> Tokenizer | None:
    """Tokenizer that the configuration names, if it does."""
    return load_tokenizer(spec.tokenizer) if spec.tokenizer else None


def _of_parent(spec: RunSpec, parent: Pretrained) -> Tokenizer:
    if parent.tokenizer is None:
        raise ConfigError(
            f"{spec.init_from} has no tokenizer.json or tokenizer.model: add the file, or set "
            "--config.data.tokenizer."
        )
    return parent.tokenizer


def _of_folder(workdir: Path) -> Tokenizer:
    """Tokenizer that a run folder keeps, the same however often the run is resumed."""
    folder = workdir / run_folder.TOKENIZER
    if not folder.exists():
        raise CheckpointError(
            f"{workdir} has no folder {run_folder.TOKENIZER!r}, without which its tokens mean nothing: restore it, or "
            "choose another --workdir."
        )
    return Tokenizer.load(folder)


def _grown(parent: Pretrained, tokenizer: Tokenizer | None) -> tuple[Pretrained, tuple[str, ...]]:
    """Model with a row for each token, and what to say of new ones."""
    if tokenizer is None:
        return parent, ()
    grown = resized(parent, tokenizer.vocab_size)
    if grown is parent:
        return parent, ()
    remark = (
        f"the tokenizer has {tokenizer.vocab_size:,} tokens, but the model {parent.config.vocab_size:,}: the new "
        "tokens start near the mean embedding."
    )
    return grown, (remark,)
