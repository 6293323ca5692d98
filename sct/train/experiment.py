"""From a configuration to a finished run folder: data, task, training, export, table of results."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from sct.atomic import atomic_folder, write_json
from sct.data.genes import GeneVocabulary
from sct.data.store import SPLITS, Store
from sct.data.text.tokenizer import Tokenizer
from sct.data.text.tokenizer_libraries import import_tokenizers
from sct.errors import AGAIN, CheckpointError, ConfigError, SctError, StoreError
from sct.families.tasks import data_of, kind_of, make_task, trained_by
from sct.hashes import sealed
from sct.models import lora, registry
from sct.models.registry import computing
from sct.nn.paths import flatten
from sct.tasks.base import StoreConfig, Task
from sct.train import processes, sharding
from sct.train.checkpoint import Checkpoints
from sct.train.loop import Result, TrainConfig, train
from sct.train.optim import OptimizerConfig
from sct.version import __version__
from sct.weights import pretrained, run_folder
from sct.weights.load import load, load_tokenizer
from sct.weights.vocabulary import resized

# Where a run folder keeps the tokenizer of texts; section of its config.json with the whole architecture.
TOKENIZER, MODEL = run_folder.TOKENIZER, run_folder.MODEL
_SECTIONS = ("family", "task", "init_from", "model", "data", "objective", "optimizer", "train")
# What an option meant before it existed, for runs that do not record it.
_BEFORE = {"logit_adjustment": False}
# What may change when a run goes on: it does not change what is computed.
_FREE = {
    "train": {
        "stop_at", "log_every", "eval_every", "checkpoint_every", "keep_last", "patience", "loader_threads",
        "eval_records", "mesh",
    },
    "data": {"store"},
}  # fmt: skip


def open_data(config: StoreConfig, workdir: Path) -> Store:
    """Open the configured store, or make one of the configured data set in the run folder."""
    if config.store and config.dataset:
        raise ConfigError(
            f"data.store is {config.store} and data.dataset {config.dataset}: choose one of them, as by "
            "--config.data.dataset= (nothing behind the sign) for the store."
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


def check_data(config: Mapping[str, Any], workdir: Path) -> None:
    """Raise what `run` would raise of missing or damaged data, before anything is written."""
    data = data_of(config)
    if data.store or not data.dataset:
        open_data(data, workdir)


def check_same_run(config: Mapping[str, Any], workdir: Path) -> None:
    """Raise ConfigError where a run folder holds a run with options that compute something else."""
    _check_same(_read_json(workdir / "config.json"), _checked(config), workdir)


def _check_same(old: Mapping[str, Any], new: Mapping[str, Any], workdir: Path) -> None:
    """Refuse to continue a run with options that change what it computes."""
    for section in _SECTIONS:
        before, after = old.get(section), new.get(section)
        if section == "objective":  # a run may have been made without the section
            before, after = before or {}, after or {}
        if not isinstance(before, Mapping) or not isinstance(after, Mapping):
            before, after = {section: before}, {section: after}
        if section == "objective":
            before, after = (_all_options(kind_of(new).objective, each) for each in (before, after))
        free = _FREE.get(section, set())
        for name in sorted(set(before) | set(after)):
            if name not in free and before.get(name) != after.get(name):
                option = section if name == section else f"{section}.{name}"
                raise ConfigError(
                    f"{workdir} holds a run with {option} = {before.get(name)!r}, but now it is "
                    f"{after.get(name)!r}: use the same options to resume, or another --workdir, which "
                    f"--config.init_from={workdir} starts from this run's model."
                )


def _all_options(kind: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """All options of an objective, so that one which a run does not record has the value that it stood for."""
    known = {field.name for field in dataclasses.fields(kind)}
    values = {**{name: value for name, value in _BEFORE.items() if name in known}, **values}
    try:
        return cast(
            dict[str, Any], json.loads(json.dumps(dataclasses.asdict(registry.build(kind, values, ""))))
        )
    except SctError:  # of another version: as it stands
        return values


def _tokenizer(
    plain: Mapping[str, Any], store: Store, parent: pretrained.Pretrained | None, workdir: Path, resumes: bool
) -> Tokenizer | None:
    """Tokenizer of a task of texts, the same however often a run is resumed.

    It is the one that the folder of a resumed run keeps, that the configuration names, that of the model that training
    starts from, or a new one, in this order.

    Raises
    ------
    ConfigError
        The model to start from has no tokenizer: with another one its tokens would mean something else.
    """
    kind, folder = kind_of(plain), workdir / TOKENIZER
    if kind.tokenizer is None:
        return None
    if resumes and not folder.exists():
        raise CheckpointError(
            f"{workdir} has no folder {TOKENIZER!r}, without which its tokens mean nothing: restore it, or choose "
            "another --workdir."
        )
    if jax.process_index() == 0 and not resumes:
        named = plain.get("data", {}).get("tokenizer")
        if named:
            tokenizer = load_tokenizer(named)
        elif parent is not None and parent.tokenizer is not None:
            tokenizer = parent.tokenizer
        elif parent is not None:
            raise ConfigError(
                f"{plain['init_from']} has no tokenizer.json or tokenizer.model, without which its tokens mean "
                "nothing: add the file, or name it by --config.data.tokenizer."
            )
        else:
            objective = registry.build(kind.objective, plain.get("objective", {}), "objective")
            tokenizer = kind.tokenizer(
                store, objective, data_of(plain), int(plain.get("train", {}).get("seed", 0))
            )
        with atomic_folder(folder) as unfinished:
            tokenizer.save(unfinished)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("the tokenizer is made")
    return Tokenizer.load(folder)


def _architecture(plain: Mapping[str, Any], parent: pretrained.Pretrained | None) -> dict[str, Any]:
    """Values of the model: of a kind that resolves those of the one that training starts from."""
    given = dict(plain.get("model", {}))
    if parent is None or not kind_of(plain).resolves:
        return given
    families = trained_by(kind_of(plain))
    if parent.family not in families:
        raise ConfigError(
            f"the model to start from is of the family {parent.family!r}, which the task {plain['task']!r} does not "
            f"train: give one of {', '.join(families)}."
        )
    if parent.family != plain["family"]:
        raise ConfigError(
            f"the model to start from is of the family {parent.family!r}, but the configuration's is "
            f"{plain['family']!r}: add --config.family={parent.family}."
        )
    values = computing(dataclasses.asdict(parent.config), given)
    if values.get("positions") == "rotary":  # reads any length, and is told the one that it is trained on
        values["max_length"] = max(values["max_length"], int(plain.get("data", {}).get("length", 0)))
    return values


def run(config: Mapping[str, Any], workdir: str | os.PathLike[str]) -> Result:
    """Train as a configuration says, in a run folder; running again on the folder resumes.

    The folder ends up with `config.json`, `data.json`, `genes.tsv`, `metrics.jsonl`, `tensorboard/`, `checkpoints/`,
    `model/` (the best checkpoint as a model folder) and `report.md`, `report.json`.

    Parameters
    ----------
    config
        Plain nested values, as `configs/` give them.
    workdir
        Run folder.

    Raises
    ------
    FolderInUseError
        Another process trains in the folder; one that was asked to stop is waited for.
    SctError
        Whatever a user can mend, in one sentence.
    """
    workdir = Path(workdir).expanduser().absolute()
    plain = _checked(config)
    if workdir.exists() and not workdir.is_dir():
        raise ConfigError(f"{workdir} is a file, but --workdir must be a folder: choose another.")
    with processes.held_by_first(workdir, "training", "--workdir"):
        return _run(plain, workdir)


def _run(plain: Mapping[str, Any], workdir: Path) -> Result:
    """Train as a checked configuration says, in a folder that no other process writes to."""
    from rich.console import Console

    first = jax.process_index() == 0
    console = Console(quiet=not first)
    settings = workdir / "config.json"
    resumes = bool(run_folder.steps(workdir))
    if resumes:
        _check_same(_read_json(settings), plain, workdir)
    store = open_data(data_of(plain), workdir)
    if resumes:
        described = _read_json(workdir / "data.json")
        _check_data(described, store, workdir)
        _check_files(described, plain, workdir)
        run_folder.verify_files(workdir, described)
        run_folder.check_genes(GeneVocabulary.load(workdir / run_folder.GENES), described, workdir)
    parent = None
    # Each device reads its own part of a large model.
    mesh = registry.build(TrainConfig, {**plain.get("train", {}), "steps": 1}, "train").mesh
    placed = sharding.make_mesh(mesh) if jax.device_count() > 1 else None
    if plain.get("init_from") and not resumes:
        parent = load(plain["init_from"], mesh=placed, genes=store.vocabulary)
    if resumes and kind_of(plain).resolves:
        architecture = _read_json(settings).get(MODEL)
    else:
        architecture = _architecture(plain, parent)
    tokenizer = _tokenizer(plain, store, parent, workdir, resumes)
    if tokenizer is not None and parent is not None and hasattr(parent.config, "vocab_size"):
        rows, parent = parent.config.vocab_size, resized(parent, tokenizer.vocab_size)
        if parent.config.vocab_size > rows:
            console.print(
                f"the tokenizer has {tokenizer.vocab_size:,} tokens, but the model {rows:,}: the rows of the others "
                "begin near the mean of the known ones.",
                soft_wrap=True,
            )
        architecture = _architecture(plain, parent)
    kept = parent.data if parent is not None else None
    kept = _read_json(workdir / "data.json").get("model") if resumes else kept
    task, data = make_task(
        {**plain, "model": architecture or plain.get("model", {})}, store, tokenizer, kept, placed
    )
    if parent is not None and task.lora is not None:
        lora.check_same(parent.variables, task.lora, str(plain["init_from"]))
    options = registry.build(TrainConfig, _with_steps(plain, task, data), "train")
    optimizer = registry.build(OptimizerConfig, plain.get("optimizer", {}), "optimizer")
    if first:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            write_json(settings, sealed({**plain, MODEL: dataclasses.asdict(task.model_config)}))
        except OSError as error:
            raise ConfigError(
                f"the run folder {workdir} cannot be written ({error.strerror}): choose another --workdir."
            ) from error
        if not resumes:
            # What is trained from licensed weights stays under their licence.
            licence = parent.license if parent is not None else task.license
            store.vocabulary.save(workdir / run_folder.GENES)
            described = {
                **_describe(store), "license": licence, "files": _files(plain), "model": task.exports()["data"],
                run_folder.HASHES: run_folder.hashed_files(workdir),
            }  # fmt: skip
            write_json(workdir / run_folder.DATA, sealed(described))
    processes.check_shared(settings)
    _announce(console, task, options, workdir)
    if resumes:
        console.print(f"going on from step {run_folder.steps(workdir)[-1]:,}")
    if not store.split("validation"):
        console.print(
            "no study is held out for validation, so there is no early stopping"
            + ("" if store.split("test") else " and no table of results")
            + ": name one with `launch.ingest --validation=NAME`.",
            soft_wrap=True,
        )

    for note in task.notes(fresh=parent is None and not resumes):
        console.print(note, soft_wrap=True)
    start = flatten(parent.variables) if parent is not None else None
    result = train(task, options, optimizer, workdir, start)
    if result.reason in ("signal", "interrupt", "stop_at"):
        console.print(
            f"stopped at step {result.progress.step:,} of {options.steps:,}; run folder: {workdir}",
            soft_wrap=True,
        )
        return result
    with _stoppable():
        _finish(task, options, plain, result, workdir, console)
    return result


def _finish(
    task: Task,
    options: TrainConfig,
    plain: Mapping[str, Any],
    result: Result,
    workdir: Path,
    console: Any,
) -> None:
    """Measure the best model, and write tables and model folder."""
    from sct.eval import report_folder

    variables = best_variables(result, workdir, options)
    if jax.process_count() > 1:
        variables = multihost_utils.process_allgather(variables, tiled=True)
    reports, failed = [], None
    for evaluator in task.evaluators():
        try:
            with processes.only_first_speaks():
                numbers = dict(evaluator(variables))
        except SctError as error:
            console.print(f"no table of {evaluator.name}: {error}", soft_wrap=True)
            continue
        except Exception as error:  # a defect, told when the model is safe
            failed = error
            break
        if evaluator.report is not None:
            console.print(evaluator.report.table())
            reports.append(evaluator.report)
        if jax.process_index() == 0:
            write_json(workdir / f"{evaluator.name}.json", numbers)
    if jax.process_index() == 0:
        report_folder.write(reports, workdir)
        model = pretrained.Pretrained(
            plain["family"],
            task.model_config,
            variables,
            license=_read_json(workdir / "data.json")["license"],
            step=result.progress.best_step or result.progress.step,
            **task.exports(),
        )
        card = pretrained.default_card(model, _history(plain, task.store, result, reports))
        dataclasses.replace(model, card=card).save_pretrained(workdir / "model")
    if failed is not None:
        raise failed
    console.print(f"run folder: {workdir}", soft_wrap=True)


@contextmanager
def _stoppable() -> Iterator[None]:
    """End with status `AGAIN` on SIGTERM: training is saved, and the same command measures and exports again."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        print("asked to stop: training is saved; run the same command again to measure it.", file=sys.stderr)
        raise SystemExit(AGAIN)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _checked(config: Mapping[str, Any]) -> dict[str, Any]:
    """Plain copy of a configuration whose errors are found before anything is read or written."""
    plain = json.loads(json.dumps(config))
    unknown = sorted(set(plain) - set(_SECTIONS))
    if unknown:
        raise ConfigError(
            f"the configuration has no section {unknown[0]!r}: choose from {', '.join(_SECTIONS)}."
        )
    for section in ("model", "data", "objective", "optimizer", "train"):
        if not isinstance(plain.get(section, {}), dict):
            raise ConfigError(f"{section} is {plain[section]!r}, but it must hold named options.")
    kind = kind_of(plain)
    registry.build(TrainConfig, {**plain.get("train", {}), "steps": 1}, "train")
    registry.build(OptimizerConfig, plain.get("optimizer", {}), "optimizer")
    objective = registry.build(kind.objective, plain.get("objective", {}), "objective")
    for name in _BEFORE:
        if hasattr(objective, name):  # recorded even where the configuration leaves it to its default
            plain.setdefault("objective", {})[name] = getattr(objective, name)
    if (
        kind.tokenizer is not None
        and not plain.get("data", {}).get("tokenizer")
        and not plain.get("init_from")
    ):
        import_tokenizers()  # before minutes of work that would come to nothing
    if getattr(getattr(objective, "lora", None), "rank", 0) and not plain.get("init_from"):
        raise ConfigError(
            "LoRA needs a pretrained model: set --config.init_from=MODEL, or objective.lora.rank to 0."
        )
    registry.build(kind.data, plain.get("data", {}), "data")
    registry.check_device(registry.model_config(plain["family"], plain.get("model", {}), 1))
    return plain


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return run_folder.read(path)
    except CheckpointError as error:
        raise CheckpointError(
            f"{str(error).removesuffix('.')} (the folder holds checkpoints; another --workdir begins anew)."
        ) from error


def _describe(store: Store) -> dict[str, Any]:
    """What of a store decides which bags a run draws."""
    studies = [[study.name, study.split, study.n_cells, study.nnz] for study in store.studies]
    return {"vocabulary_hash": store.vocabulary.hash, "studies": studies}


def _check_data(before: Mapping[str, Any], store: Store, workdir: Path) -> None:
    """Refuse to continue a run on other data."""
    after = _describe(store)
    if before.get("vocabulary_hash") != after["vocabulary_hash"]:
        raise StoreError(
            f"{workdir} holds a run on the vocabulary with hash {str(before.get('vocabulary_hash'))[:16]}, but the "
            f"store {store.path} has {after['vocabulary_hash'][:16]}: choose another --workdir or the same store."
        )
    if before.get("studies") != after["studies"]:
        changed = [s[0] for s in before.get("studies", []) if s not in after["studies"]]
        changed += [s[0] for s in after["studies"] if s not in before.get("studies", [])]
        raise StoreError(
            f"{workdir} holds a run on other data than the store {store.path} has now (different: "
            f"{', '.join(dict.fromkeys(changed)) or 'the order of studies'}): choose another --workdir, with "
            "--config.init_from to start from this run's model."
        )


def _files(plain: Mapping[str, Any]) -> dict[str, str]:
    """Hashes of the files that a configuration names beside its store."""
    named = {"data.studies": plain.get("data", {}), "objective.prompts": plain.get("objective", {})}
    paths = {option: values.get(option.rpartition(".")[2]) for option, values in named.items()}
    found = {}
    for option, path in paths.items():
        if path:
            try:
                found[option] = hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()
            except OSError as error:
                raise ConfigError(
                    f"the file of {option}, {path}, cannot be read ({error.strerror})."
                ) from error
    return found


def _check_files(before: Mapping[str, Any], plain: Mapping[str, Any], workdir: Path) -> None:
    """Refuse to continue a run with other texts."""
    for option, digest in _files(plain).items():
        if before.get("files", {}).get(option) != digest:
            raise ConfigError(
                f"the file of {option} has changed since {workdir} began: restore it, or choose another --workdir."
            )


def _with_steps(plain: Mapping[str, Any], task: Task, data: StoreConfig) -> dict[str, Any]:
    values = dict(plain.get("train", {}))
    if not values.get("steps"):
        if data.tokens <= 0:
            raise ConfigError("the configuration gives neither train.steps nor data.tokens: set one of them.")
        values["steps"] = round(
            data.tokens / (values.get("batch_size", TrainConfig.batch_size) * task.tokens_per_record)
        )
    return values


def best_variables(result: Result, workdir: Path, options: TrainConfig) -> dict[str, Any]:
    """Variables of the best checkpoint, or of the last step where nothing was validated."""
    best = result.progress.best_step
    if best is None or best == result.progress.step:
        return result.state.variables
    checkpoints = Checkpoints(workdir / "checkpoints", options.keep_last)
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), result.state
    )
    state, _ = checkpoints.restore(abstract, best)
    checkpoints.close()
    return state.variables


def _announce(console: Any, task: Task, options: TrainConfig, workdir: Path) -> None:
    shapes = jax.tree.leaves(jax.eval_shape(task.init, jax.random.key(0)))
    parameters = sum(int(np.prod(leaf.shape)) for leaf in shapes)
    cells = {split: sum(study.n_cells for study in task.store.split(split)) for split in SPLITS}
    console.print(
        f"sct {__version__}: {parameters:,} parameters, {len(task.vocabulary):,} genes, "
        + ", ".join(f"{count:,} {split} cells" for split, count in cells.items() if count)
        + f", {options.steps:,} steps on {jax.device_count()} {jax.default_backend()} device(s); {workdir}",
        soft_wrap=True,
    )


def _history(plain: Mapping[str, Any], store: Store, result: Result, reports: list[Any]) -> str:
    """How a model came about, for its card."""
    studies = [f"{study.name} ({study.n_cells:,} cells)" for study in store.split("train")]
    listed = ", ".join(studies[:20]) + (f" and {len(studies) - 20:,} more" if len(studies) > 20 else "")
    return "\n".join(
        [
            "## Training", "",
            f"{result.progress.step:,} steps ({result.reason}); best validation at step "
            f"{result.progress.best_step}. Studies: {listed}.", "",
            *[report.markdown() for report in reports],
            "Configuration:", "", "```json", json.dumps(plain, indent=1), "```",
        ]
    )  # fmt: skip
