"""From a configuration to a finished run folder: data, task, training, export, table of results."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from sct.data.bags import BagOptions
from sct.data.store import SPLITS, Store
from sct.errors import ConfigError
from sct.models import registry
from sct.nn.paths import flatten
from sct.tasks.masked_expression import MaskedExpression, MaskedExpressionConfig
from sct.train.checkpoint import Checkpoints
from sct.train.loop import Result, TrainConfig, train
from sct.train.optim import OptimizerConfig
from sct.version import __version__
from sct.weights import pretrained

_SECTIONS = ("family", "task", "init_from", "model", "data", "objective", "optimizer", "train")
# What may change between two sessions of one run: it does not change what is computed.
_FREE = {
    "train": {
        "stop_at", "log_every", "eval_every", "checkpoint_every", "keep_last", "patience", "loader_threads",
        "mesh",
    },
    "data": {"store"},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where cells come from and how bags are made.

    Parameters
    ----------
    store
        Folder that `launch.ingest` made.
    dataset
        Instead of a store: "pbmc68k", real cells that come with scanpy; a store is made in the run folder.
    cells_per_bag, shuffle_cells, noise_fraction
        See `sct.data.bags.BagOptions`.
    tokens
        Gene-expression tokens to train on; with `train.steps` 0 the number of steps follows from it.
    """

    store: str = ""
    dataset: str = ""
    cells_per_bag: int = 50
    shuffle_cells: int = 0
    noise_fraction: float = BagOptions.noise_fraction
    tokens: float = 0.0


def open_data(config: DataConfig, workdir: Path) -> Store:
    """Open the configured store, or make one of the configured data set in the run folder."""
    if bool(config.store) == bool(config.dataset):
        raise ConfigError(
            "the configuration needs either data.store or data.dataset: make a store of your files with "
            "`python -m launch.ingest --input=FILES --output=STORE` and add --config.data.store=STORE, or "
            "try the :quickstart variant of the configuration."
        )
    if config.store:
        return Store.open(Path(config.store).expanduser())
    from sct.data.bundled import prepare

    return prepare(config.dataset, workdir / "store")


def _check_same(old: Mapping[str, Any], new: Mapping[str, Any], workdir: Path) -> None:
    """Refuse to continue a run with options that change what it computes."""
    for section in _SECTIONS:
        before, after = old.get(section), new.get(section)
        if not isinstance(before, Mapping) or not isinstance(after, Mapping):
            before, after = {section: before}, {section: after}
        free = _FREE.get(section, set())
        for name in sorted(set(before) | set(after)):
            if name not in free and before.get(name) != after.get(name):
                raise ConfigError(
                    f"{workdir} holds a run with {section}.{name} = {before.get(name)!r}, but now it is "
                    f"{after.get(name)!r}: choose another --workdir, or the same options to resume."
                )


def _write_json(path: Path, content: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


def make_task(config: Mapping[str, Any], store: Store) -> tuple[MaskedExpression, DataConfig]:
    """Task of a configuration over a store."""
    data = registry.build(DataConfig, config.get("data", {}), "data")
    model = registry.model_config(config["family"], config.get("model", {}), len(store.vocabulary))
    objective = registry.build(MaskedExpressionConfig, config.get("objective", {}), "objective")
    seed = int(config.get("train", {}).get("seed", 0))
    bags = BagOptions(
        cells_per_bag=data.cells_per_bag,
        shuffle_cells=data.shuffle_cells,
        noise_fraction=data.noise_fraction,
        seed=seed,
    )
    return MaskedExpression(objective, model, bags, store), data


def run(config: Mapping[str, Any], workdir: str | os.PathLike[str]) -> Result:
    """Train as a configuration says, in a run folder; running again on the folder resumes.

    The folder ends up with `config.json`, `genes.tsv`, `metrics.jsonl`, `tensorboard/`, `checkpoints/`,
    `model/` (the best checkpoint as a model folder) and `report.md`, `report.json`.

    Parameters
    ----------
    config
        Plain nested values, as `configs/` give them.
    workdir
        Run folder.

    Raises
    ------
    SctError
        Whatever a user can mend, in one sentence.
    """
    from rich.console import Console

    from sct.eval import report

    console = Console()
    unknown = sorted(set(config) - set(_SECTIONS))
    if unknown:
        raise ConfigError(
            f"the configuration has no section {unknown[0]!r}: choose from {', '.join(_SECTIONS)}."
        )
    workdir = Path(workdir).expanduser().absolute()
    plain = json.loads(json.dumps(config))
    registry.build(TrainConfig, {**plain.get("train", {}), "steps": 1}, "train")  # errors before any work
    settings = workdir / "config.json"
    if settings.exists() and any((workdir / "checkpoints").glob("[0-9]*")):
        _check_same(json.loads(settings.read_text()), plain, workdir)
    store = open_data(registry.build(DataConfig, plain.get("data", {}), "data"), workdir)
    task, data = make_task(plain, store)
    options = registry.build(TrainConfig, _with_steps(plain, task, data), "train")
    optimizer = registry.build(OptimizerConfig, plain.get("optimizer", {}), "optimizer")
    workdir.mkdir(parents=True, exist_ok=True)
    first = jax.process_index() == 0
    if first:
        _write_json(settings, plain)
        store.vocabulary.save(workdir / "genes.tsv")
        _announce(console, task, options, workdir)

    start = None
    if plain.get("init_from"):
        start = flatten(pretrained.load(plain["init_from"], genes=store.vocabulary).variables)
    result = train(task, options, optimizer, workdir, start)
    if result.reason in ("signal", "stop_at"):
        return result

    variables = best_variables(result, workdir, options, task)
    if jax.process_count() > 1:
        variables = multihost_utils.process_allgather(variables, tiled=True)
    reports = []
    for evaluator in task.evaluators():
        numbers = dict(evaluator(variables))
        if first and evaluator.report is not None:
            console.print(evaluator.report.table())
            reports.append(evaluator.report)
            _write_json(workdir / f"{evaluator.name}.json", numbers)
    if first:
        report.write(reports, workdir)
        model = pretrained.Pretrained(plain["family"], task.model_config, variables, store.vocabulary)
        card = pretrained.default_card(model, _history(plain, store, result, reports))
        dataclasses.replace(model, card=card).save_pretrained(workdir / "model")
        console.print(f"run folder: {workdir}", soft_wrap=True)
    return result


def _with_steps(plain: Mapping[str, Any], task: MaskedExpression, data: DataConfig) -> dict[str, Any]:
    values = dict(plain.get("train", {}))
    if not values.get("steps"):
        batch = values.get("batch_size", TrainConfig.batch_size)
        per_step = batch * data.cells_per_bag * task.model_config.num_genes
        if data.tokens <= 0:
            raise ConfigError("the configuration gives neither train.steps nor data.tokens: set one of them.")
        values["steps"] = round(data.tokens / per_step)
    return values


def best_variables(
    result: Result, workdir: Path, options: TrainConfig, task: MaskedExpression
) -> dict[str, Any]:
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


def _announce(console: Any, task: MaskedExpression, options: TrainConfig, workdir: Path) -> None:
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
