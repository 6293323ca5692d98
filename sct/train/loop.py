"""Run the training loop, which all tasks share. This file is meant to be read from top to bottom."""

from __future__ import annotations

import dataclasses
import itertools
import math
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from sct.checks import check_at_least, check_multiple
from sct.data.loader import Batch, Loader
from sct.errors import ConfigError, DivergedError
from sct.progress import ProgressBar, progress
from sct.tasks.base import MetricSums, Objective, Origin, Task
from sct.train import sharding
from sct.train.checkpoint import Checkpoints, RunProgress
from sct.train.logging import MetricLog
from sct.train.optim import OptimizerConfig, make_optimizer, plateau_scale
from sct.train.state import State, init_state, load_into, make_eval_step, make_train_step

_INTERVALS = ("log_every", "eval_every", "checkpoint_every")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Options of the training loop.

    Parameters
    ----------
    steps
        Number of training steps (optimizer updates), which is also the length of the learning-rate schedule. If you
        raise `steps` after a run has finished, training continues up to the new number. With a constant schedule, the
        weights then equal those of a run that had the new number from the start.
    epochs
        Number of passes over the training records, from which the number of steps is computed if `steps` is 0; 0 to set
        `steps` instead. With `epochs`, 0 for `log_every`, `eval_every` and `checkpoint_every` means once per epoch.
    batch_size
        Number of training records (bags, cells or rows of text) in a batch, over all devices.
    grad_accum_steps
        Number of microbatches per batch (gradient accumulation). The update equals that of the whole batch. Memory
        holds only batch_size / grad_accum_steps records at a time. The random masks depend on this number, so it cannot
        change within a run.
    batch_ramp
        Stages with smaller batches at the start of training: pairs of (last step of the stage, records per batch), both
        increasing. All stages use microbatches of the same size; a batch that is smaller than a microbatch is processed
        as a whole.
    log_every, eval_every, checkpoint_every
        Number of steps between two log entries, between two validations, and between two checkpoints. Every validation
        and every checkpoint also adds a log entry.
    keep_last
        Number of latest checkpoints to keep, in addition to the best one.
    patience
        Number of validations without improvement after which training stops early; 0 never stops early.
    stop_at
        Step at which training saves a checkpoint and stops, so that it can resume later; 0 to train to the end.
    seed
        Seed of the initial parameters, the masks and the order of the data.
    loader_threads
        Number of threads that read and tokenize data.
    eval_records
        Number of records that each validation uses. The records are spaced evenly over the validation split. 0 means
        all records.
    mesh
        Number of devices along each mesh axis. Configurations also accept a string, see
        `sct.train.sharding.MeshConfig.parse`.
    """

    steps: int = 1000
    epochs: int = 0
    batch_size: int = 1
    grad_accum_steps: int = dataclasses.field(default=1, metadata={"formerly": "accumulate"})
    batch_ramp: tuple[tuple[int, int], ...] = ()
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
        for name in ("steps", "batch_size", "grad_accum_steps", "keep_last"):
            check_at_least(f"train.{name}", getattr(self, name), 1)
        for name in _INTERVALS:
            check_at_least(f"train.{name}", getattr(self, name), 0 if self.epochs else 1)
        for name in ("epochs", "patience", "stop_at", "seed", "loader_threads", "eval_records"):
            check_at_least(f"train.{name}", getattr(self, name), 0)
        check_multiple(
            "train.batch_size",
            self.batch_size,
            self.grad_accum_steps,
            "train.grad_accum_steps",
            advice="change one of the two options",
        )
        _check_ramp(self)

    @property
    def microbatch(self) -> int:
        """Number of records in a microbatch, which the model processes at once."""
        return self.batch_size // self.grad_accum_steps

    @property
    def stages(self) -> tuple[tuple[int, int], ...]:
        """Stages of the whole run: pairs of (last step of the stage, records per batch)."""
        return (*self.batch_ramp, (self.steps, self.batch_size))

    def for_records(self, records: int, steps: int = 0) -> TrainConfig:
        """Return the options with all numbers of steps, for `epochs` passes over a number of records.

        `steps` replaces the number of steps that `epochs` gives, if it is not 0.
        """
        epoch = max(1, -(-records // self.batch_size))
        intervals: dict[str, Any] = {name: getattr(self, name) or epoch for name in _INTERVALS}
        return dataclasses.replace(self, steps=steps or self.epochs * epoch, **intervals)


def _check_ramp(config: TrainConfig) -> None:
    """Raise `ConfigError` if the stages of the batch ramp do not increase or cannot be divided into microbatches."""
    before = (0, 0)
    for stage in config.batch_ramp:
        if not (
            isinstance(stage, Sequence) and len(stage) == 2 and all(type(number) is int for number in stage)
        ):
            raise ConfigError(
                f"train.batch_ramp contains {stage!r}, but it must contain pairs of whole numbers (step, records): "
                "write it like ((1000, 2), (5000, 4))."
            )
        if not (stage[0] > before[0] and before[1] < stage[1] < config.batch_size):
            raise ConfigError(
                f"train.batch_ramp has the stage {tuple(stage)}, but the step and the batch size must increase from "
                f"stage to stage, and the batch size must stay below train.batch_size ({config.batch_size}): change "
                "or remove this stage."
            )
        if stage[1] > config.microbatch and stage[1] % config.microbatch:
            raise ConfigError(
                f"train.batch_ramp has a stage with batches of {stage[1]} records, but a microbatch has "
                f"{config.microbatch} records (train.batch_size / train.grad_accum_steps): change the {stage[1]} to a "
                f"multiple of {config.microbatch}."
            )
        before = (stage[0], stage[1])


def steps_for(records: float, batch_size: int, batch_ramp: Sequence[Sequence[int]] = ()) -> int:
    """Return the number of steps in which training reads about `records` records.

    The batch ramp of `TrainConfig` is taken into account.
    """
    begun = 0
    for until, size in batch_ramp:
        stage = (until - begun) * size
        if records <= stage:
            return begun + round(records / size)
        begun, records = until, records - stage
    return begun + round(records / batch_size)


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """Result of a call of `train`.

    Attributes
    ----------
    state
        Final training state, on the mesh. `sct.train.experiment.best_variables` restores the best checkpoint.
    progress
        Number of steps so far, and the value and the step of the best validation.
    best_trained
        Trained parameters of the best validation, if no checkpoints are written; otherwise None.
    reason
        Why training ended: "finished", "early stop", "stop_at", "signal" (SIGTERM) or "interrupt" (Ctrl-C).
    """

    state: State
    progress: RunProgress
    reason: str
    best_trained: Mapping[str, jax.Array] | None = None


class Step(NamedTuple):
    """A training step whose results are still on the device.

    Attributes
    ----------
    number
        Number of the step.
    describe
        Function that returns the names of the records in the batch of this step.
    scalars, sums
        Results of the compiled step: the loss and the gradient norm, and the task's sums over the batch.
    """

    number: int
    describe: Callable[[], list[str]]
    scalars: dict[str, jax.Array]
    sums: MetricSums


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Append SIGTERM and the first Ctrl-C to a list, which the loop checks between steps."""
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
    keep: bool = True,
) -> TrainResult:
    """Train a task in a run folder, or resume from the latest checkpoint in it.

    Parameters
    ----------
    task
        Task to train, see `sct.tasks.base.Task`.
    config, optimizer_config
        Options of the loop and of the optimizer.
    workdir
        Run folder, in which `checkpoints/`, `metrics.jsonl` and `tensorboard/` are written.
    start
        Pretrained arrays by parameter path, which replace random initial values. Only paths that match the task's
        `may_be_missing` may be absent. The argument is ignored if the run resumes from a checkpoint. Arrays on a device
        may be donated: copy them first if you need them later.
    keep
        Whether to write checkpoints. Without checkpoints, the run cannot be resumed, and the result is only in memory,
        with the trained parameters of the best validation.

    Raises
    ------
    DivergedError
        The loss is not finite. Earlier checkpoints are kept.
    ConfigError, CheckpointError
        The configuration contradicts the data, the devices or the checkpoints in the folder.
    """
    mesh = sharding.make_mesh(config.mesh)
    _check_batches(config, mesh)
    optimizer_config = optimizer_config.for_evaluations(config.eval_every)
    source = task.dataset("train")
    if source is None:
        raise ConfigError(
            "the store has no study in the split 'train', but training needs one: ingest another study, or ingest "
            "again with fewer studies in --validation and --test."
        )
    shares = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    shares |= {"num_threads": config.loader_threads}
    held_out = task.dataset("validation")
    validation = None
    if held_out is not None:
        validation = Loader(held_out, config.microbatch, shuffle=False, limit=config.eval_records, **shares)

    abstract, make_state = init_state(
        task, lambda shapes: make_optimizer(optimizer_config, config.steps, shapes)[0], mesh, config.seed
    )
    optimizer, schedule = make_optimizer(optimizer_config, config.steps, abstract.trained)
    train_step = make_train_step(task, optimizer, mesh, abstract, config.microbatch)
    eval_step = make_eval_step(task, mesh)

    resources = ExitStack()  # on any exit, finishes the checkpoint that is being written
    checkpoints = Checkpoints(workdir / "checkpoints", config.keep_last)
    resources.callback(checkpoints.close)
    if checkpoints.latest is None:
        state, now = _initial_state(task, make_state(), start), RunProgress()
    else:
        state, now = checkpoints.restore(abstract)
    batches = _draw_batches(lambda size: Loader(source, size, seed=config.seed, **shares), config, now)
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
        pending: list[Step] = []
        best_trained: Mapping[str, jax.Array] | None = None
        started, tokens, size = time.monotonic(), 0, 0
        if now.step < last:
            bar.write("compiling the step")
        while now.step < last:
            loader, batch = next(batches)
            state, scalars, sums = train_step(state, sharding.put_batch(batch, mesh))
            now.step += 1
            pending.append(Step(now.step, partial(loader.describe, now.records_drawn), scalars, sums))
            now.records_drawn += loader.batch_size
            tokens += task.tokens(batch) * jax.process_count()
            # Queue only a few steps ahead. Exclude compilation time from the rate.
            compiled, size = loader.batch_size != size, loader.batch_size
            jax.block_until_ready(scalars if compiled else pending[max(len(pending) - 3, 0)].scalars)
            if compiled:
                started, tokens = time.monotonic(), 0
                bar.restart_clock()

            logs = now.step % config.log_every == 0 or now.step == 1
            stop = _any_stop_requested(bool(asked), logs)
            # Do not validate at an interruption: a resumed run must equal one that was never stopped.
            evaluates = now.step % config.eval_every == 0 or now.step == config.steps
            logs = logs or evaluates or now.step % config.checkpoint_every == 0
            saves = evaluates or stop or now.step % config.checkpoint_every == 0 or now.step == last
            if logs or saves:
                # Fetch results and check the losses here, before saving, so no checkpoint follows a non-finite loss.
                now.unlogged = now.unlogged + _fetch(pending)
            if logs:
                values, now.unlogged = _compute_metrics(task, now.unlogged), []
                rate = tokens / max(time.monotonic() - started, 1e-9)
                values |= {"learning_rate": float(schedule(now.step - 1)) * plateau_scale(state.optimizer)}
                if tokens:  # no rate is known directly after a compilation
                    values |= {"tokens_per_second": rate}
                log.write(now.step, values, "train")
                bar.update(0, _progress_text(values, rate))
            if logs or saves:
                checkpoints.check()
            bar.update(1)
            if evaluates and validation is not None:
                summary = _validate(task, eval_step, state, validation, mesh)
                log.write(now.step, summary, "validation")
                _update_best(task, summary[task.monitor], now)
                _print_validation(bar, now, summary)
                if not keep and now.stale == 0:
                    best_trained = jax.tree.map(jnp.copy, state.trained)  # the next step donates the state
            if saves and keep:
                log.flush()
                checkpoints.save(state, dataclasses.replace(now))
            if logs or saves:
                pending, started, tokens = [], time.monotonic(), 0
            if evaluates and config.patience and now.stale >= config.patience:
                reason = "early stop"
                break
            if stop:
                reason = "interrupt" if signal.SIGINT in asked else "signal"
                bar.write(
                    f"stop requested: saving step {now.step}; run the same command again to resume."
                    if keep
                    else "stop requested."
                )
                break
    return TrainResult(state, now, reason, best_trained)


def _initial_state(task: Origin, state: State, start: Mapping[str, Any] | None) -> State:
    """Return the initial state, in which pretrained arrays replace random arrays."""
    given = task.take_pretrained_params()
    if start is None and not given:
        return state
    # Without a model in `init_from`, any parameter may be missing and stays random.
    return load_into(state, {**given, **(start or {})}, (".*",) if start is None else task.may_be_missing)


def _check_batches(config: TrainConfig, mesh: Mesh) -> None:
    """Raise `ConfigError` if a batch or microbatch of the run cannot be split evenly over the mesh."""
    sharding.check_batch_size(config.batch_size, mesh)
    share = mesh.shape["data"] * mesh.shape["fsdp"]
    named = {f"a stage of train.batch_ramp has {size}": size for _, size in config.batch_ramp}
    named |= {
        f"a microbatch (train.batch_size / train.grad_accum_steps) has {config.microbatch}": config.microbatch
    }
    for what, size in named.items():
        if size % share:
            raise ConfigError(
                f"{what} records, but this number must be a multiple of {share}, because the mesh splits the records "
                f"over {share} devices: change the number of records."
            )


def _draw_batches(
    load: Callable[[int], Loader], config: TrainConfig, now: RunProgress
) -> Generator[tuple[Loader, Batch], None, None]:
    """Yield the remaining batches of a run, each together with its loader.

    Each stage of the batch ramp has its own loader.

    All stages read one sequence of records: each stage continues where the previous stage ended.
    """
    step, drawn = now.step, now.records_drawn
    for until, size in config.stages:
        if step < until:
            loader = load(size)
            with closing(loader.iterate(drawn)) as batches:
                for batch in itertools.islice(batches, until - step):
                    yield loader, batch
            step, drawn = until, drawn + (until - step) * size


def _any_stop_requested(asked: bool, now: bool) -> bool:
    """Return whether any process was asked to stop.

    All processes must stop at the same step. To limit the cost, they communicate only at steps where `now` is True.
    """
    if jax.process_count() == 1:
        return asked
    return now and bool(multihost_utils.process_allgather(np.asarray(asked)).any())


def _fetch(pending: list[Step]) -> list[dict[str, Any]]:
    """Copy the results of steps from the device, and check that losses and gradients are finite.

    The results are JSON values from which the arrays can be restored bit for bit.
    """
    fetched = jax.device_get([(step.scalars, step.sums) for step in pending])
    for step, (scalars, _) in zip(pending, fetched, strict=True):
        if not (np.isfinite(scalars["loss"]) and np.isfinite(scalars["gradient_norm"])):
            raise DivergedError(
                f"the loss of step {step.number} is {scalars['loss']} and the gradient norm is "
                f"{scalars['gradient_norm']}, but both must be finite (batch: {'; '.join(step.describe())}): start a "
                "new run from the best checkpoint of this run (--config.init_from=THIS_FOLDER and another "
                "--workdir), with a lower learning rate or with gradient clipping."
            )
    return [
        {
            "gradient_norm": float(scalars["gradient_norm"]),
            "sums": {name: [str(value.dtype), value.tolist()] for name, value in sums.items()},
        }
        for scalars, sums in fetched
    ]


def _compute_metrics(task: Objective, steps: list[dict[str, Any]]) -> dict[str, float]:
    """Compute the metrics of one log entry from the results of the steps that the entry covers."""
    parts = [
        {name: np.asarray(value, kind) for name, (kind, value) in step["sums"].items()} for step in steps
    ]
    total = jax.tree.map(lambda *values: np.sum(values, axis=0), *parts)
    norms = np.asarray([step["gradient_norm"] for step in steps], np.float32)
    return task.compute_metrics(total) | {"gradient_norm": float(np.mean(norms))}


def _validate(task: Objective, eval_step: Any, state: State, loader: Loader, mesh: Any) -> dict[str, float]:
    total: Any = None
    batches = loader.iterate()
    for number, batch in enumerate(batches):
        sums = eval_step(state, sharding.put_batch(batch, mesh), np.int32(number))
        total = sums if total is None else jax.tree.map(lambda a, b: a + b, total, sums)
    batches.close()
    return task.compute_metrics(jax.device_get(total))


def _update_best(task: Objective, value: float, now: RunProgress) -> None:
    """Update the best value of the monitored metric, and the number of validations without improvement."""
    sign = 1 if task.monitor_mode == "max" else -1
    if math.isfinite(value) and (now.best is None or sign * value > sign * now.best):
        now.best, now.best_step, now.stale = value, now.step, 0
    else:
        now.stale += 1


def _progress_text(values: dict[str, float], rate: float) -> str:
    speed = f", {rate / 1e6:.2f} M tokens/s" if rate >= 1e5 else f", {rate:,.0f} tokens/s" if rate else ""
    left_out = (
        f", {values['dropped_targets']:.0f} masked positions dropped (max_masked_fraction)"
        if values.get("dropped_targets")
        else ""
    )
    return f"loss {values.get('loss', math.nan):.4f}{speed}{left_out}"


def _print_validation(bar: ProgressBar, now: RunProgress, summary: dict[str, float]) -> None:
    numbers = "  ".join(f"{name} {value:.4f}" for name, value in summary.items())
    bar.write(f"step {now.step}: validation {numbers}{'  (best so far)' if now.stale == 0 else ''}")
