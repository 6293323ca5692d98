"""The training loop, the same for every task: read it from top to bottom."""

from __future__ import annotations

import dataclasses
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from sct.data.loader import Loader
from sct.errors import ConfigError, DivergedError
from sct.progress import Bar, progress
from sct.tasks.base import Sums, Task
from sct.train import sharding
from sct.train.checkpoint import Checkpoints, Progress
from sct.train.logging import MetricLog
from sct.train.optim import OptimizerConfig, make_optimizer
from sct.train.state import State, init_state, load_into, make_eval_step, make_train_step


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Options of the loop.

    Parameters
    ----------
    steps
        Updates of the whole run (the schedule's length).
    batch_size
        Records in a batch over all devices.
    log_every, eval_every, checkpoint_every
        Steps between two log entries, validations, checkpoints.
    keep_last
        Latest checkpoints kept, beside the best.
    patience
        Validations without improvement after which the run stops early; 0 never.
    stop_at
        Step at which to stop and save, for a run to be continued; 0 none.
    seed
        Seed of initial parameters, masks and the order of data.
    loader_threads
        Threads that read and tokenise.
    eval_records
        Records of a validation, spread evenly over the split; 0 for all.
    mesh
        Devices along each axis.
    """

    steps: int = 1000
    batch_size: int = 1
    log_every: int = 50
    eval_every: int = 500
    checkpoint_every: int = 500
    keep_last: int = 2
    patience: int = 10
    stop_at: int = 0
    seed: int = 0
    loader_threads: int = 2
    eval_records: int = 0
    mesh: sharding.MeshConfig = dataclasses.field(default_factory=sharding.MeshConfig)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "eval_every", "checkpoint_every", "keep_last"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name} is {getattr(self, name)}, but it must be at least 1.")
        for name in ("patience", "stop_at", "seed", "loader_threads", "eval_records"):
            if getattr(self, name) < 0:
                raise ConfigError(f"train.{name} is {getattr(self, name)}, but it must not be negative.")


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes
    ----------
    state
        Final state on the mesh; `best_state` restores the best one.
    progress
        Steps made, best value and step.
    reason
        "finished", "early stop", "stop_at", "signal" (SIGTERM) or "interrupt" (Ctrl-C).
    """

    state: State
    progress: Progress
    reason: str


# Number of a step, its scalars, and the sums of its task.
Step = tuple[int, dict[str, jax.Array], Sums]


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGTERM and the first Ctrl-C, which the loop reads between two steps."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, frame: Any) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(
    task: Task,
    config: TrainConfig,
    optimizer_config: OptimizerConfig,
    workdir: Path,
    start: Mapping[str, Any] | None = None,
) -> Result:
    """Train a task in a run folder, or go on where the folder's last checkpoint stopped.

    Parameters
    ----------
    task
        What to learn, see `sct.tasks.base.Task`.
    config, optimizer_config
        Options.
    workdir
        Run folder: `checkpoints/`, `metrics.jsonl`, `tensorboard/` are written here.
    start
        Arrays by path to start from instead of random ones (a further stage of training); only paths that
        the task declares as `new` may be absent. Not used where the run goes on from a checkpoint.

    Raises
    ------
    DivergedError
        The loss is not finite; the last checkpoint from before stays.
    ConfigError, CheckpointError
        The configuration contradicts the data, the devices or the folder's checkpoints.
    """
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch_size(config.batch_size, mesh)
    source = task.dataset("train")
    if source is None:
        raise ConfigError("the store has no study in the split 'train': ingest one, or change the splits.")
    shares = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    loader = Loader(source, config.batch_size, seed=config.seed, num_threads=config.loader_threads, **shares)
    held_out = task.dataset("validation")
    validation = None
    if held_out is not None:
        threads, limit = config.loader_threads, config.eval_records
        validation = Loader(
            held_out, config.batch_size, shuffle=False, limit=limit, num_threads=threads, **shares
        )

    abstract, make_state = init_state(
        task, lambda shapes: make_optimizer(optimizer_config, config.steps, shapes)[0], mesh, config.seed
    )
    optimizer, schedule = make_optimizer(optimizer_config, config.steps, abstract.trained)
    train_step, eval_step = make_train_step(task, optimizer, mesh, abstract), make_eval_step(task, mesh)

    resources = ExitStack()  # closed however the run ends: what is being saved is finished first
    checkpoints = Checkpoints(workdir / "checkpoints", config.keep_last)
    resources.callback(checkpoints.close)
    if checkpoints.latest is None:
        state, now = make_state(), Progress()
        if start is not None:
            state = load_into(state, start, task.new)
    else:
        state, now = checkpoints.restore(abstract)
    batches = loader.iterate(now.records_drawn)
    resources.callback(batches.close)
    last = min(config.steps, config.stop_at or config.steps)
    reason = "finished" if last == config.steps else "stop_at"
    if now.stale and now.stale >= (config.patience or math.inf):
        last, reason = now.step, "early stop"

    with (
        resources,
        MetricLog(workdir, now.step, jax.process_index() == 0) as log,
        progress("training", last, done=now.step, active=jax.process_index() == 0) as bar,
        _signals() as asked,
    ):
        pending: list[Step] = []  # steps whose numbers have not been fetched from the device
        started, tokens, first = time.monotonic(), 0, now.step + 1
        while now.step < last:
            batch = next(batches)
            state, scalars, sums = train_step(state, sharding.put_batch(batch, mesh))
            now.step += 1
            now.records_drawn = batches.records_drawn
            pending.append((now.step, scalars, sums))
            tokens += task.tokens(batch) * jax.process_count()
            # Queue no more steps than keep the device busy; and leave compilation out of the rate.
            jax.block_until_ready(pending[max(len(pending) - 3, 0)][1] if now.step > first else scalars)
            if now.step == first:
                started, tokens = time.monotonic(), 0

            logs = now.step % config.log_every == 0 or now.step == 1
            stop = _agree(bool(asked), logs)
            # At the schedule's end, but not where a run is interrupted: that must not change what follows.
            evaluates = now.step % config.eval_every == 0 or now.step == config.steps
            saves = evaluates or stop or now.step % config.checkpoint_every == 0 or now.step == last
            if logs or saves:
                # The only place where numbers are fetched and the loss is checked: a checkpoint never holds
                # parameters made by a loss that is not finite.
                values = _collect(task, pending, loader)
                rate = tokens / max(time.monotonic() - started, 1e-9)
                values |= {"learning_rate": float(schedule(now.step - 1)), "tokens_per_second": rate}
                log.write(now.step, values, "train")
                bar.update(0, _note(values, rate))
            bar.update(1)
            if evaluates and validation is not None:
                summary = _validate(task, eval_step, state, validation, mesh)
                log.write(now.step, summary, "validation")
                _watch(task, summary[task.monitor], now)
                _report(bar, now, summary)
            if saves:
                checkpoints.save(state, dataclasses.replace(now))
            if logs or saves:
                pending, started, tokens = [], time.monotonic(), 0
            if evaluates and config.patience and now.stale >= config.patience:
                reason = "early stop"
                break
            if stop:
                reason = "interrupt" if signal.SIGINT in asked else "signal"
                bar.write(f"asked to stop: saving step {now.step}; run the same command again to go on.")
                break
    return Result(state, now, reason)


def _agree(asked: bool, now: bool) -> bool:
    """Whether any process was asked to stop; they must all stop at the same step, so they talk at some only."""
    if jax.process_count() == 1:
        return asked
    return now and bool(multihost_utils.process_allgather(np.asarray(asked)).any())


def _collect(task: Task, pending: list[Step], loader: Loader) -> dict[str, float]:
    """Wait for the steps since the last call; check their losses, add up their sums."""
    fetched = jax.device_get(pending)
    for step, scalars, _ in fetched:
        if not (np.isfinite(scalars["loss"]) and np.isfinite(scalars["gradient_norm"])):
            records = loader.describe((step - 1) * loader.batch_size)
            raise DivergedError(
                f"the loss of step {step} is {scalars['loss']} and its gradient's norm "
                f"{scalars['gradient_norm']} (batch: {'; '.join(records)}): lower the learning rate or clip "
                "the gradient in another --workdir, which --config.init_from=THIS_FOLDER starts from the best "
                "checkpoint of this one."
            )
    total = jax.tree.map(lambda *parts: np.sum(parts, axis=0), *[sums for _, _, sums in fetched])
    values = task.summarise(total)
    return values | {"gradient_norm": float(np.mean([s["gradient_norm"] for _, s, _ in fetched]))}


def _validate(task: Task, eval_step: Any, state: State, loader: Loader, mesh: Any) -> dict[str, float]:
    total: Any = None
    batches = loader.iterate()
    for number, batch in enumerate(batches):
        sums = eval_step(state, sharding.put_batch(batch, mesh), np.int32(number))
        total = sums if total is None else jax.tree.map(lambda a, b: a + b, total, sums)
    batches.close()
    return task.summarise(jax.device_get(total))


def _watch(task: Task, value: float, now: Progress) -> None:
    """Update best value and patience with a validation's result."""
    sign = 1 if task.monitor_mode == "max" else -1
    if math.isfinite(value) and (now.best is None or sign * value > sign * now.best):
        now.best, now.best_step, now.stale = value, now.step, 0
    else:
        now.stale += 1


def _note(values: dict[str, float], rate: float) -> str:
    speed = f", {rate / 1e6:.2f} M tokens/s" if rate else ""
    left_out = (
        f", {values['overflow']:.0f} masked positions beyond head_budget" if values.get("overflow") else ""
    )
    return f"loss {values.get('loss', math.nan):.4f}{speed}{left_out}"


def _report(bar: Bar, now: Progress, summary: dict[str, float]) -> None:
    numbers = "  ".join(f"{name} {value:.4f}" for name, value in summary.items())
    bar.write(f"step {now.step}: validation {numbers}{'  (best so far)' if now.stale == 0 else ''}")
