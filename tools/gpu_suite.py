# ruff: noqa: E402 (the time of the imports is part of the budget)
"""Check and measure sct on one GPU within a time limit, then train a small sCT until the time limit is reached.

    python tools/gpu_suite.py --output=results --budget=480 --cells=cells.npz

Requirements: jax, flax, optax, chex, einops, numpy, scipy and safetensors; the test that resumes a training run also
needs orbax-checkpoint. Each result (figure) is written to results/figures.json and results/figures.md at once. The
script ends after --budget seconds. `sct.load` reads the trained model, results/model. Compiled programs are written to
results/cache.tar.

If the script crashes or the time is too short, a second run makes the missing measurements:

    python tools/gpu_suite.py --output=more --previous=results/figures.json --cache=results/cache.tar
"""

from __future__ import annotations

import time

_STARTED = time.monotonic()  # the imports below count as time of the run

import argparse
import contextlib
import dataclasses
import functools
import gc
import io
import json
import os
import shutil
import statistics
import sys
import tarfile
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# JAX takes 75% of the memory of a GPU by default, which is too little for some of the batches.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from sct.checks import check_at_least, check_positive, check_share
from sct.data.masking import Masking
from sct.data.packed_cells import PackedCells
from sct.data.tokenize import NOISE_FRACTION
from sct.errors import DataError, SctError, first_line
from sct.generation.decoding import DecodingOptions
from sct.generation.generate import generate
from sct.models.decoder import Decoder
from sct.models.decoder_config import DecoderConfig, GPT2Config, LlamaConfig
from sct.models.sct_config import SCTConfig, pad_to_multiple
from sct.models.zeromics import ZerOmicsConfig
from sct.models.zeromics_cells import ZerOmicsCellsConfig
from sct.nn import target
from sct.nn.paths import flatten, unflatten
from sct.speed import memory
from sct.speed.ceiling import arithmetic, matmul_ceiling
from sct.speed.compare import Outputs, compare, differences, gradient_difference
from sct.tasks.instruction_objective import InstructionObjective, InstructionsConfig
from sct.tasks.masked_objective import MaskedExpressionConfig, MaskedObjective
from sct.train import sharding
from sct.train.optim import OptimizerConfig, make_optimizer
from sct.train.state import State, init_state, make_eval_step, make_train_step
from sct.version import __version__
from sct.weights.pretrained import Pretrained

FIGURES, TABLE, MODEL, CACHE = "figures.json", "figures.md", "model", "cache.tar"
_LAST_SECONDS = 15.0  # to validate and write the model before the time is over
_SAVE_SECONDS = 60.0  # between two saves of the model
_FIRST_GUESS = 0.1  # expected share of the time limit for the first figure of a kind
_WARM_STEPS = 3  # training steps that show whether a batch fits into the memory, before the training starts
_CHECKED_BATCHES = 4  # batches of each validation
# Lower bound of the memory per bag in a larger batch, relative to a smaller one (compiled programs: 0.84 for 8 bags).
_LEAST_GROWTH = 0.8
_LOOK_EVERY = 20  # steps after which the host waits for the device, so that it does not run ahead


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of all measurements: those of the full models, or tiny ones."""

    model: Mapping[str, Any]
    checked: Mapping[str, Any]
    small: Mapping[str, Any]
    cells: int = 50
    checked_cells: int = 4
    small_cells: int = 16
    small_batch: int = 32
    # The largest comes first: a device reports only the largest memory use since the program started.
    batches: tuple[int, ...] = (8, 1, 4)
    steps: int = 5
    gpt2: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    llama: Mapping[str, Any] = dataclasses.field(
        default_factory=lambda: {
            "embed_dim": 2048, "num_layers": 16, "num_heads": 32, "num_kv_heads": 8, "ffn_dim": 8192,
        }
    )  # fmt: skip
    zeromics_cells: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"feature_dim": 4096})
    zeromics_llm: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    num_soft: int = 500
    text_length: int = 1536
    answer_length: int = 8
    rows: int = 8
    prompt: int = 64
    new_tokens: int = 256
    ceiling_size: int = 0
    copied_bytes: int = 4 << 30


_CHECKED = {
    "num_genes": 4096,
    "embed_dim": 512,
    "num_heads": 8,
    "ffn_dim": 1024,
    "num_downsamples": 6,
    "num_layers": 2,
}
_SMALL = {
    "token_embed_dim": 32, "embed_dim": 320, "num_heads": 10, "ffn_dim": 640, "num_downsamples": 6, "num_layers": 4,
}  # fmt: skip
_TINY = {
    "num_genes": 64,
    "token_embed_dim": 32,
    "embed_dim": 32,
    "num_heads": 2,
    "ffn_dim": 32,
    "num_downsamples": 2,
}
_TINY_TEXT = {"vocab_size": 64, "embed_dim": 32, "num_layers": 1, "num_heads": 2, "ffn_dim": 64}
FULL = Sizes({}, _CHECKED, _SMALL)
TINY = Sizes(
    {**_TINY, "num_layers": 1}, {**_TINY, "num_layers": 1}, {**_TINY, "num_genes": 0, "num_layers": 1},
    cells=3, checked_cells=2, small_cells=2, small_batch=2, batches=(1,), steps=1,
    gpt2=_TINY_TEXT, llama=_TINY_TEXT,
    zeromics_cells={
        "num_genes": 24, "feature_dim": 8, "embed_dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 16,
    },
    zeromics_llm=_TINY_TEXT, num_soft=4, text_length=12, rows=2, prompt=8, new_tokens=4, ceiling_size=64,
    copied_bytes=1 << 16,
)  # fmt: skip


class Figures:
    """The results so far (figures), in a JSON file and a Markdown table that are rewritten with each new figure."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rows = folder, cast(list[dict[str, Any]], [])
        self.setting: dict[str, Any] = {}
        self.kept: dict[str, dict[str, Any]] = {}
        self.notes: list[str] = []
        self.current = ""
        self._lock = threading.RLock()
        folder.mkdir(parents=True, exist_ok=True)

    def keep(self, previous: Mapping[str, Any] | None, setting: Mapping[str, Any]) -> None:
        """Set what the figures depend on, and keep the figures of an earlier run with the same setting.

        Raises
        ------
        DataError
            The earlier run had another device, other versions or other sizes.
        """
        self.setting = dict(json.loads(json.dumps(setting)))
        if previous is not None:
            earlier = previous["setting"]
            other = [name for name, value in self.setting.items() if earlier.get(name) != value]
            if other:
                raise DataError(
                    f"the results of --previous were measured with {other[0]} = {earlier.get(other[0])!r}, but this "
                    f"run has {self.setting[other[0]]!r}: start without --previous."
                )
            self.kept = {row["figure"]: row for row in previous["figures"] if row["value"] is not None}
            crashed = previous.get("current")
            if crashed:
                self.kept[crashed] = {
                    "figure": crashed, "value": None, "unit": "", "remark": "the program crashed",
                }  # fmt: skip
            self.rows = list(self.kept.values())
        self.write()

    def begin(self, name: str) -> None:
        """Record which figure is measured now, so that a later run skips it after a crash; "" for none."""
        with self._lock:
            self.current = name
            self.write()

    def knows(self, name: str) -> bool:
        """Return whether an earlier run measured a figure, or the figures whose names begin with it."""
        return any(kept == name or kept.startswith(f"{name},") for kept in self.kept)

    def add(self, figure: str, value: float | None, unit: str = "", **more: Any) -> None:
        """Add a figure, or a remark on why it is missing (value None), and write the files.

        A value above `limit` (in `more`) gets a remark.
        """
        if value is not None and "limit" in more and not value <= more["limit"]:
            more["remark"] = "ABOVE THE LIMIT"
        with self._lock:
            self.rows = [row for row in self.rows if row["figure"] != figure]
            self.rows.append({"figure": figure, "value": value, "unit": unit, **more})
            self.write()
        shown = "-" if value is None else f"{value:.4g} {unit}"
        print(f"{figure}: {shown} {more.get('remark', '')}", flush=True)

    def note(self, text: str) -> None:
        """Add a sentence below the table."""
        with self._lock:
            self.notes.append(text)
            self.write()
        print(text, flush=True)

    def write(self) -> None:
        """Write both files. An old file is replaced only when the new file is complete."""
        lines = ["| figure | value | unit | remark |", "|---|---|---|---|"]
        for row in self.rows:
            value = "-" if row["value"] is None else f"{row['value']:.4g}"
            rest = {k: v for k, v in row.items() if k not in ("figure", "value", "unit", "remark")}
            shown = [
                f"{k.replace('_', ' ')} {v:.4g}" if isinstance(v, float) else f"{k.replace('_', ' ')} {v}"
                for k, v in rest.items()
            ]
            remark = ", ".join([*([row["remark"]] if row.get("remark") else []), *shown])
            lines.append(f"| {row['figure']} | {value} | {row['unit']} | {remark.replace('|', '/')} |")
        text = "\n".join([*lines, "", *self.notes, ""])
        content = {
            "setting": self.setting, "figures": self.rows, "notes": self.notes, "current": self.current,
        }  # fmt: skip
        for name, made in ((FIGURES, json.dumps(content, indent=1)), (TABLE, text)):
            partial = self.folder / f".{name}"
            partial.write_text(made)
            partial.replace(self.folder / name)


def _read_previous(path: Path | None) -> dict[str, Any] | None:
    """Read the figures of an earlier run.

    Raises
    ------
    DataError
        The file is missing, or does not contain figures.
    """
    if path is None:
        return None
    try:
        found = json.loads(path.read_text())
        _ = found["setting"], [(row["figure"], row["value"]) for row in found["figures"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"--previous={path} cannot be read ({first_line(error)}): give the file {FIGURES} of an earlier run, or "
            "leave the option out."
        ) from error
    return cast(dict[str, Any], found)


class Clock:
    """The time that is left, and how long figures of a kind took so far."""

    def __init__(self, budget: float, started: float | None = None) -> None:
        self.start, self.budget = time.monotonic() if started is None else started, budget
        self.taken: dict[str, float] = {}

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.start + self.budget - time.monotonic()

    def expected(self, kind: str) -> float:
        """Return the expected seconds of a figure: those of the slowest figure of its kind, or a guess."""
        return self.taken.get(kind, _FIRST_GUESS * self.budget)


class ProgramCache:
    """A folder with compiled programs, and an archive of those that took longest to compile.

    Parameters
    ----------
    folder
        Folder for the programs.
    earlier
        Archive of an earlier run, or None.
    most_bytes
        Largest size of the archive.

    Raises
    ------
    DataError
        The earlier archive cannot be read.
    """

    _TIMES = "seconds.json"

    def __init__(self, folder: Path, earlier: Path | None, most_bytes: int) -> None:
        self.folder, self.most_bytes = folder, most_bytes
        self.seconds: dict[str, float] = {}
        self.compiled, self.found = 0, 0
        if earlier is not None:
            try:
                with tarfile.open(earlier) as file:
                    file.extractall(folder, filter="data")
                self.seconds = json.loads((folder / self._TIMES).read_text())
                (folder / self._TIMES).unlink()
            except (OSError, ValueError, tarfile.TarError) as error:
                raise DataError(
                    f"--cache={earlier} cannot be read ({first_line(error)}): give the file {CACHE} of an earlier run, "
                    "or leave the option out."
                ) from error

    def use(self) -> None:
        """Let JAX read programs from the folder and write them to it."""
        jax.config.update("jax_compilation_cache_dir", str(self.folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        # XLA's own caches would also be written into this folder. Its random name would then change the keys.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
        jax.monitoring.register_event_duration_secs_listener(self._record)
        jax.monitoring.register_event_listener(self._count)

    def _count(self, event: str, **_: Any) -> None:
        """Count the programs that are read from the folder."""
        self.found += event == "/jax/compilation_cache/cache_hits"

    def _programs(self) -> list[Path]:
        return [path for path in self.folder.glob("*") if path.is_file()]

    def _record(self, event: str, seconds: float, **_: Any) -> None:
        """Record the time that a new file took to compile. JAX writes the file before it reports the time."""
        if not event.endswith("backend_compile_duration"):
            return
        for path in self._programs():
            if path.name not in self.seconds:
                self.seconds[path.name] = seconds
                self.compiled += 1

    def pack(self, archive: Path) -> None:
        """Write the archive. Programs that took longest to compile come first."""
        found = [path for path in self._programs() if path.name in self.seconds]
        room, chosen = self.most_bytes - tarfile.RECORDSIZE - 2 * tarfile.BLOCKSIZE, cast(list[Path], [])
        room -= 200 * len(found)  # of the file with the times
        for path in sorted(found, key=lambda path: -self.seconds[path.name]):
            size = tarfile.BLOCKSIZE * (1 - (-path.stat().st_size // tarfile.BLOCKSIZE))
            size += 2 * tarfile.BLOCKSIZE * (len(path.name) > tarfile.LENGTH_NAME)
            if size <= room:
                chosen.append(path)
                room -= size
        times = json.dumps({path.name: self.seconds[path.name] for path in chosen}).encode()
        partial = archive.with_name(f".{archive.name}")
        with tarfile.open(partial, "w", format=tarfile.GNU_FORMAT) as file:
            entry = tarfile.TarInfo(self._TIMES)
            entry.size = len(times)
            file.addfile(entry, io.BytesIO(times))
            for path in chosen:
                file.add(path, path.name)
        partial.replace(archive)


def _end_at(clock: Clock, figures: Figures, now: dict[str, str]) -> threading.Timer:
    """End the process when the time limit is reached, even if a program is being compiled."""

    def end() -> None:
        try:
            figures.current = ""  # the figure ended because of the time limit, not because of a crash
            figures.note(f"The time limit of {clock.budget:g} s was reached during: {now['figure']}.")
            _remove_partial(figures.folder)
        finally:
            os._exit(0)

    timer = threading.Timer(max(clock.left(), 0.0), end)
    timer.daemon = True
    timer.start()
    return timer


def _remove_partial(folder: Path) -> None:
    """Remove the files and folders that were being written."""
    for path in folder.glob(".*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _accelerated() -> Iterator[None]:
    """Trace the layers for a GPU, even if there is none, so that a trial on a CPU runs the same code."""
    if jax.default_backend() != "cpu":
        yield
        return
    with target.tracing_for("gpu"):
        yield


def _seconds(call: Callable[[], Any], steps: int) -> list[float]:
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return times


def _memory_limit() -> int | None:
    """Return the bytes that JAX may use on the device; None if the device does not report it (CPU)."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    return int(limit) if limit else None


class TooLargeError(SctError):
    """A program needs more memory than the device has."""


def _check_fits(needed: float, what: str) -> None:
    """Raise `TooLargeError` if a program needs more memory than the device has."""
    limit = _memory_limit()
    if limit is not None and needed > limit:
        raise TooLargeError(f"{what} {needed / 2**30:.0f} GiB, but JAX may use {limit / 2**30:.0f} GiB")


def _is_out_of_memory(error: BaseException) -> bool:
    return "RESOURCE_EXHAUSTED" in str(error)


def _tokens(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Return random tokens, a tenth of which are of expressed genes."""
    levels = rng.integers(1, 5, shape, dtype=np.uint8)
    return np.where(rng.random(shape, np.float32) < 0.1, levels, 0).astype(np.uint8)


def _batch(config: SCTConfig, bags: int, cells: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {
        "tokens": _tokens(np.random.default_rng(seed), (bags, cells, config.num_genes)),
        "measured": np.ones((bags, config.num_genes), bool),
        "example_mask": np.ones(bags, np.float32),
    }


def _mesh() -> Any:
    return sharding.make_mesh(sharding.MeshConfig(data=1, devices=1))


@dataclasses.dataclass
class Compiled:
    """A compiled training step, its batch on the device, and the seconds of compilation."""

    step: Any
    batch: Any
    abstract: State
    make: Callable[[], State]
    seconds: float


def _compile_step(
    task: Any, batch: Mapping[str, np.ndarray], options: Mapping[str, Any] | None = None
) -> Compiled:
    """Compile the training step of a task with Adam."""
    mesh, started = _mesh(), time.perf_counter()
    with _accelerated():
        abstract, make = init_state(
            task, lambda shapes: make_optimizer(OptimizerConfig(), 100, shapes)[0], mesh, 0
        )
        optimizer, _ = make_optimizer(OptimizerConfig(), 100, abstract.trained)
        placed = sharding.put_batch(dict(batch), mesh)
        lowered = make_train_step(task, optimizer, mesh, abstract).lower(abstract, placed)  # type: ignore[attr-defined]
        step = lowered.compile(compiler_options=options)
    return Compiled(step, placed, abstract, make, time.perf_counter() - started)


class Suite:
    """All measurements. Each method adds figures; `run` skips those for which too little time is left."""

    def __init__(self, sizes: Sizes, figures: Figures, clock: Clock) -> None:
        self.sizes, self.figures, self.clock = sizes, figures, clock
        self.rates = {
            name: row["value"] * 1e12
            for name in ("ceiling, bfloat16", "bandwidth")
            if (row := figures.kept.get(name)) is not None
        }
        # For each kind of program: batch size of a compiled program, bytes of its arguments, bytes of its other memory.
        self.needs: dict[str, tuple[int, int, int]] = {}

    def _share(self, name: str, of: str, rate: float) -> dict[str, float]:
        """Return `rate` relative to the measured rate `of` as an entry `name`; {} if `of` was not measured."""
        return {name: rate / self.rates[of]} if of in self.rates else {}

    def ceilings(self, dtype: str) -> None:
        """Measure the rate of a large matrix product."""
        rate, size = matmul_ceiling(dtype, self.sizes.ceiling_size)
        self.rates[f"ceiling, {dtype}"] = rate
        self.figures.add(
            f"ceiling, {dtype}", rate / 1e12, "TFLOP/s", matrix_size=size, arithmetic=arithmetic(dtype)
        )

    def copy_bandwidth(self) -> None:
        """Measure the rate at which an array is read and written."""
        array = jax.jit(lambda key: jax.random.uniform(key, self.sizes.copied_bytes // 4))(jax.random.key(0))
        plus_one = jax.jit(lambda x: x + 1.0)
        _seconds(lambda: plus_one(array), 1)
        self.rates["bandwidth"] = 2 * array.nbytes / min(_seconds(lambda: plus_one(array), 5))
        self.figures.add("bandwidth", self.rates["bandwidth"] / 1e12, "TB/s", remark="bytes read and written")

    def correctness(self) -> None:
        """Compare loss and gradient with the reference kernels on the CPU, in float32 and in bfloat16."""
        base = SCTConfig(**self.sizes.checked, dtype="bfloat16")
        batch = _batch(base, 2, self.sizes.checked_cells)
        on_cpu = jax.devices("cpu")[0]
        with jax.default_device(on_cpu), target.tracing_for("cpu"):
            first = MaskedObjective(MaskedExpressionConfig(), base, self.sizes.checked_cells)
            variables = jax.jit(lambda key: nn.unbox(first.init(key)))(jax.random.key(0))
            rng = np.random.default_rng(1)
            # Scales and biases start at 0 or 1. Random offsets let the comparison see their effect.
            arrays = {
                path: np.asarray(value) + 0.1 * rng.standard_normal(value.shape, np.float32)
                if value.ndim < 2
                else np.asarray(value)
                for path, value in sorted(flatten(variables).items())
            }

        def run(model: Mapping[str, Any]) -> dict[str, Any]:
            config = dataclasses.replace(base, **model)
            task = MaskedObjective(MaskedExpressionConfig(), config, self.sizes.checked_cells)

            def loss(arrays: Mapping[str, Any]) -> jax.Array:
                return task.loss(unflatten(arrays), batch, jax.random.key(2), True)[0]

            value, gradient = jax.jit(jax.value_and_grad(loss))(arrays)
            return {"loss": float(value), "gradient": jax.device_get(gradient)}

        def fast(model: Mapping[str, Any]) -> dict[str, Any]:
            with _accelerated():
                return run({"remat": "products", **model})

        def plain(model: Mapping[str, Any]) -> dict[str, Any]:
            with jax.default_device(on_cpu), target.tracing_for("cpu"):
                return run(model)

        def record(
            what: str, made: Outputs, expected: Outputs, limits: Mapping[str, float]
        ) -> dict[str, float]:
            """Add a figure for each difference, even if it is above its limit."""
            found, dtype = differences(made, expected), what.split()[-1]
            for name, value in found.items():
                self.figures.add(
                    f"difference from the CPU, {dtype}, {name}", value, "relative", limit=float(limits[name]),
                    arithmetic=dtype,
                )  # fmt: skip
            return found

        _ = compare("the training step", base.dtype, fast, plain, 1.0, record)

    def resume(self) -> None:
        """Compare four training steps with two steps, saving and loading a checkpoint, and two more steps."""
        from sct.train.checkpoint import Checkpoints, RunProgress  # orbax, which only this figure needs

        config = SCTConfig(**self.sizes.checked, dtype="bfloat16", remat="products")
        cells = self.sizes.checked_cells
        task = MaskedObjective(MaskedExpressionConfig(max_masked_fraction=0.2), config, cells)
        # By default, GPUs add some terms in random order.
        options = {"xla_gpu_deterministic_ops": True} if jax.default_backend() == "gpu" else None
        made = _compile_step(task, _batch(config, 2, cells), options)
        with (
            tempfile.TemporaryDirectory() as folder,
            contextlib.closing(Checkpoints(Path(folder))) as checkpoints,
        ):
            state = made.make()
            for number in range(4):
                if number == 2:
                    checkpoints.save(state, RunProgress(step=2))
                    checkpoints.wait()
                state = made.step(state, made.batch)[0]
            other, _ = checkpoints.restore(made.abstract)
        for _ in range(2):
            other = made.step(other, made.batch)[0]
        whole, worst, path = gradient_difference(*map(jax.device_get, (other.trained, state.trained)))
        self.figures.add(
            "difference of a resumed run", whole, "relative", limit=0.0, worst_parameter=float(worst), of=path
        )

    def _expect_fit(self, kind: str, batch: int) -> None:
        """Raise `TooLargeError` before compilation if a program for `batch` bags cannot fit into the memory.

        The lower bound of its memory comes from a compiled program for fewer bags. Memory grows more slowly than the
        batch, so a program that seems slightly too large is still compiled.
        """
        if kind in self.needs:
            known, arguments, other = self.needs[kind]
            _check_fits(
                arguments + _LEAST_GROWTH * other * batch / known,
                f"estimated from batch {known}, the program needs at least",
            )

    def _checked(self, program: Any, kind: str = "", batch: int = 0) -> dict[str, float]:
        """Return the memory in GiB that XLA plans for a program.

        Raises
        ------
        TooLargeError
            The device has less memory.
        """
        needs = memory.memory_of(program)
        planned = memory.planned_bytes(needs)
        if planned is None:
            return {}
        arguments = needs["arguments_bytes"] or 0
        if kind and batch < self.needs.get(kind, (batch + 1,))[0]:
            self.needs[kind] = batch, arguments, planned - arguments
        _check_fits(planned, "the program needs")
        return {"planned_gib": planned / 2**30, "arguments_gib": arguments / 2**30}

    def train(self, batch: int, remat: str) -> None:
        """Measure the training step of sCT."""
        config = SCTConfig(**self.sizes.model, dtype="bfloat16", remat=remat)
        kind, before = f"train, {remat}", memory.device_peak()
        self._expect_fit(kind, batch)
        task = MaskedObjective(MaskedExpressionConfig(max_masked_fraction=0.05), config, self.sizes.cells)
        made = _compile_step(task, _batch(config, batch, self.sizes.cells))
        planned = self._checked(made.step, kind, batch)
        times = self._step_times(made)
        tokens, flops = batch * task.tokens_per_record, 3 * task.operations(batch)
        self._report(
            f"train, batch {batch}, remat {remat}", tokens, flops, times, made.seconds, before, planned
        )

    def _step_times(self, made: Compiled) -> list[float]:
        now: dict[str, Any] = {"state": made.make()}

        def call() -> Any:
            now["state"], scalars, _ = made.step(now["state"], made.batch)
            return scalars["loss"]

        _seconds(call, 1)
        return _seconds(call, self.sizes.steps)

    def _report(
        self, name: str, tokens: int, flops: float, times: list[float], compiled: float, before: int | None,
        planned: Mapping[str, float],
    ) -> None:  # fmt: skip
        seconds = statistics.median(times)
        peak = memory.device_peak()
        # The device reports the largest memory use so far. It belongs to this figure only if this figure increased it.
        own = {"peak_gib": peak / 2**30} if peak and peak > (before or 0) else {}
        self.figures.add(
            name, tokens / seconds / 1e6, "million tokens/s", step_seconds=seconds, slowest_step=max(times),
            tflops=flops / seconds / 1e12, **self._share("of_ceiling", "ceiling, bfloat16", flops / seconds),
            compile_seconds=compiled, **planned, **own,
        )  # fmt: skip

    def forward(self, batch: int) -> None:
        """Measure the forward pass of sCT, with logits at all positions."""
        config, before = SCTConfig(**self.sizes.model, dtype="bfloat16"), memory.device_peak()
        self._expect_fit("forward", batch)
        task = MaskedObjective(MaskedExpressionConfig(), config, self.sizes.cells)
        tokens = jnp.asarray(_batch(config, batch, self.sizes.cells)["tokens"])
        variables = jax.jit(lambda key: nn.unbox(task.init(key)))(jax.random.key(0))
        started = time.perf_counter()

        def logits(variables: Any, tokens: jax.Array) -> jax.Array:
            return cast(dict[str, jax.Array], task.model.apply(variables, tokens))["logits"]

        with _accelerated():
            program = jax.jit(logits).lower(variables, tokens).compile()
        compiled = time.perf_counter() - started
        planned = self._checked(program, "forward", batch)
        _seconds(lambda: program(variables, tokens), 1)
        times = _seconds(lambda: program(variables, tokens), self.sizes.steps)
        flops = task.operations(batch)
        self._report(f"forward, batch {batch}", tokens.size, flops, times, compiled, before, planned)

    def generation(self, name: str, family: str, config: DecoderConfig) -> None:
        """Measure greedy generation of a decoder with random weights."""
        module, sizes = Decoder(config), self.sizes
        variables = jax.jit(
            lambda key: jax.tree.map(
                lambda leaf: leaf.astype(config.dtype) if leaf.ndim > 1 else leaf,
                nn.unbox(module.init(key, *Decoder.example(config).values())),
            )
        )(jax.random.key(0))
        model = Pretrained(family, config, variables)
        rng = np.random.default_rng(0)
        prompts = [rng.integers(0, config.vocab_size, sizes.prompt) for _ in range(sizes.rows)]
        options = DecodingOptions(max_new_tokens=sizes.new_tokens, batch_size=sizes.rows)

        def call() -> None:
            generate(model, prompts, options, stop=(), progress_bar=False)

        first = _seconds(call, 1)[0]
        seconds = statistics.median(_seconds(call, 3))
        # Each step reads all weights, but only a few rows of an embedding table that is not also the output head.
        read = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
        read -= 0 if config.tied else config.vocab_size * config.embed_dim * jnp.dtype(config.dtype).itemsize
        self.figures.add(
            f"generation, {name}", sizes.rows * sizes.new_tokens / seconds, "tokens/s", first_call_seconds=first,
            **self._share("weights_read_of_bandwidth", "bandwidth", read * sizes.new_tokens / seconds),
            parameters=model.size, rows=sizes.rows,
        )  # fmt: skip

    def zeromics(self, rows: int) -> None:
        """Measure a step of instruction tuning with a frozen LLaMA in bfloat16."""
        sizes, before = self.sizes, memory.device_peak()
        cells = ZerOmicsCellsConfig(**sizes.zeromics_cells, dtype="bfloat16")
        llm = LlamaConfig(**sizes.zeromics_llm, dtype="bfloat16", remat="level")
        config, objective = ZerOmicsConfig(cells, llm, sizes.num_soft), InstructionsConfig()
        task = InstructionObjective(objective, config, sizes.text_length)
        rng = np.random.default_rng(0)
        ids = rng.integers(0, llm.vocab_size, (rows, sizes.text_length), dtype=np.int32)
        ids[:, : sizes.num_soft] = -1 - np.arange(sizes.num_soft)
        answer = np.arange(sizes.text_length) >= sizes.text_length - sizes.answer_length
        made = _compile_step(task, {
            "bins": rng.integers(0, cells.num_bins, (rows, cells.num_genes), dtype=np.uint8),
            "input_ids": ids,
            "predicted": np.tile(answer, (rows, 1)),
            "task": rng.integers(0, len(objective.tasks), rows, dtype=np.int32),
            "example_mask": np.ones(rows, np.float32),
        })  # fmt: skip
        planned = self._checked(made.step)
        times, tokens = self._step_times(made), rows * sizes.text_length
        flops = task.step_operations(rows)
        self._report(f"ZerOmics step, {rows} rows", tokens, flops, times, made.seconds, before, planned)


# The masking of the small configurations (configs/sct_sc.py): each bag gets one of three kinds of masks.
MASKING = Masking(
    kind="mixture",
    mixture=(("drawn", 1.0), ("drawn_uniform", 1.0), ("drawn_genes", 1.0)),
    low=0.05,
    high=0.95,
)
_UNITS = 10_000  # steps of the learning-rate schedule; the elapsed time sets the current step
OPTIMIZER = OptimizerConfig(
    peak_lr=1e-3, init_lr=2e-4, final_lr=2e-5, warmup_steps=round(0.03 * _UNITS), clip_norm=1.0
)


def _schedule_at(optimizer: Any, share: float) -> Any:
    """Set the position in the learning-rate schedule to a share of its length, and return the optimizer state."""

    def is_schedule(path: Any, _: Any) -> bool:
        return any(getattr(key, "tuple_name", "") == "ScaleByScheduleState" for key in path)

    return optax.tree.set(optimizer, is_schedule, count=jnp.asarray(int(_UNITS * min(share, 1.0)), jnp.int32))


class SmallTraining:
    """Training of a small sCT on packed cells until the time limit is reached.

    Parameters
    ----------
    cells
        Cells of training and validation studies.
    sizes
        Sizes of the model and its batches.
    figures, clock
        Where figures are written, and the time that is left.
    """

    def __init__(
        self, cells: PackedCells, sizes: Sizes, figures: Figures, clock: Clock, seed: int = 0
    ) -> None:
        self.cells, self.sizes, self.figures, self.clock, self.seed = cells, sizes, figures, clock, seed
        levels = sizes.small["num_downsamples"]
        values = {**sizes.small, "num_genes": pad_to_multiple(len(cells.vocabulary), levels)}
        self.config = SCTConfig(**values, dtype="bfloat16", remat="products")
        objective = MaskedExpressionConfig(masking=MASKING, max_masked_fraction=0.5)
        self.task = MaskedObjective(objective, self.config, sizes.small_cells)
        self.tokens = jnp.asarray(cells.tokens(self.config.num_bins, self.config.num_genes))
        measured = np.zeros((len(cells.names), self.config.num_genes), bool)
        measured[:, : len(cells.vocabulary)] = cells.measured
        self.measured = jnp.asarray(measured)
        self.rng = np.random.default_rng(seed)
        self.batch_of = jax.jit(
            lambda tokens, measured, rows, study: {
                "tokens": tokens[rows],
                "measured": measured[study],
                "example_mask": jnp.ones(len(rows)),
            }
        )

    def studies(self, held_out: bool) -> list[np.ndarray]:
        """Return the rows of each study that has enough cells for a bag."""
        return [rows for rows in self.cells.rows(held_out) if len(rows) >= self.sizes.small_cells]

    def draw(self, studies: list[np.ndarray], batch: int) -> dict[str, jax.Array]:
        """Return a batch of random bags. Each cell has the same chance to be drawn."""
        shares = np.asarray([len(rows) for rows in studies], float)
        picked = self.rng.choice(len(studies), batch, p=shares / shares.sum())
        rows = np.stack([self.rng.choice(studies[i], self.sizes.small_cells, replace=False) for i in picked])
        study = jnp.asarray(self.cells.study[rows[:, 0]])
        return cast(dict[str, jax.Array], self.batch_of(self.tokens, self.measured, jnp.asarray(rows), study))

    def run(self, most_steps: int) -> None:
        """Train, and write a model folder. Halve the batch until it fits into the memory."""
        if not self.studies(held_out=False):
            self.figures.note("No training study has enough cells for a bag, so no model was trained.")
            return
        batch = self.sizes.small_batch
        while True:
            try:
                prepared = self._prepare(batch)
                break
            except (RuntimeError, TooLargeError) as error:
                too_large = isinstance(error, TooLargeError) or _is_out_of_memory(error)
                if not too_large or batch == 1:
                    raise
            self.figures.note(
                f"Training with {batch} bags per step does not fit into the memory; the batch is halved."
            )
            _free()
            batch //= 2
        self._train(batch, *prepared, most_steps)

    def _prepare(self, batch: int) -> tuple[Any, Any, State]:
        """Compile and run the training step and the validation, so that nothing is compiled during the training."""
        mesh = _mesh()
        with _accelerated():
            optimizer_of = functools.partial(make_optimizer, OPTIMIZER, _UNITS)
            abstract, make = init_state(self.task, lambda shapes: optimizer_of(shapes)[0], mesh, self.seed)
            drawn = self.draw(self.studies(held_out=False), batch)
            update = make_train_step(self.task, optimizer_of(abstract.trained)[0], mesh, abstract)
            step = update.lower(abstract, drawn).compile()  # type: ignore[attr-defined]
            number = jnp.asarray(0)
            evaluate = make_eval_step(self.task, mesh).lower(abstract, drawn, number).compile()  # type: ignore[attr-defined]
        for program in (step, evaluate):
            _check_fits(memory.planned_bytes(memory.memory_of(program)) or 0, "the program needs")
        state = make()
        for _ in range(_WARM_STEPS):
            state, _, _ = step(state.replace(optimizer=_schedule_at(state.optimizer, 0.0)), drawn)
        jax.block_until_ready(evaluate(state, drawn, number))
        return step, evaluate, make()

    def _train(self, batch: int, step: Any, evaluate: Any, state: State, most_steps: int) -> None:
        training, held_out = self.studies(held_out=False), self.studies(held_out=True)
        checked = [self.draw(held_out, batch) for _ in range(_CHECKED_BATCHES)] if held_out else []
        begun = saved = time.monotonic()
        whole = max(self.clock.left() - _LAST_SECONDS, 0.0)
        taken, scalars = 0, {"loss": jnp.zeros(())}
        while taken < most_steps and (self.clock.left() > _LAST_SECONDS or not taken):
            share = max((time.monotonic() - begun) / max(whole, 1e-9), taken / most_steps)
            state = state.replace(optimizer=_schedule_at(state.optimizer, share))
            state, scalars, _ = step(state, self.draw(training, batch))
            taken += 1
            if taken % _LOOK_EVERY == 0:
                jax.block_until_ready(scalars)
                if time.monotonic() - saved > _SAVE_SECONDS:
                    saved = time.monotonic()
                    self._save(state, taken, float(scalars["loss"]), batch, saved - begun)
        loss = float(scalars["loss"])
        self._save(state, taken, loss, batch, time.monotonic() - begun)
        if checked:
            sums = [jax.device_get(evaluate(state, each, jnp.asarray(i))) for i, each in enumerate(checked)]
            found = self.task.compute_metrics(jax.tree.map(lambda *parts: sum(parts), *sums))
            self.figures.add(
                "small sCT, loss in validation studies", found["loss"], "nats", accuracy=found["accuracy"]
            )

    def _save(self, state: State, taken: int, loss: float, batch: int, seconds: float) -> None:
        config = dataclasses.replace(self.config, dtype="float32", remat="none")
        model = Pretrained(
            "sct", config, jax.device_get(state.variables), genes=self.cells.vocabulary, step=taken,
            data=self.task.data_record(NOISE_FRACTION),
        )  # fmt: skip
        model.save_pretrained(self.figures.folder / MODEL, dtype="bfloat16")
        self.figures.add(
            "training of a small sCT, loss", loss, "nats", steps=taken, seconds=seconds, bags_per_step=batch
        )
        self.figures.add(
            "small sCT", model.size, "parameters", remark=f"in {MODEL}/", steps=taken, cells=len(self.cells)
        )


def _plan(suite: Suite) -> list[tuple[str, str, Callable[[], None]]]:
    """Return the figures in the order in which they are measured: (kind, name, call)."""
    sizes = suite.sizes
    largest, *others = sizes.batches
    gpt2 = GPT2Config(**sizes.gpt2, dtype="bfloat16")
    llama = LlamaConfig(**sizes.llama, dtype="bfloat16")

    def train(batch: int, remat: str) -> tuple[str, str, Callable[[], None]]:
        return "train", f"train, batch {batch}, remat {remat}", lambda: suite.train(batch, remat)

    def forward(batch: int) -> tuple[str, str, Callable[[], None]]:
        return "forward", f"forward, batch {batch}", lambda: suite.forward(batch)

    def decoder(name: str, family: str, config: DecoderConfig) -> tuple[str, str, Callable[[], None]]:
        return "text", f"generation, {name}", lambda: suite.generation(name, family, config)

    return [
        ("ceiling", "ceiling, bfloat16", lambda: suite.ceilings("bfloat16")),
        ("ceiling", "bandwidth", suite.copy_bandwidth),
        train(largest, "products"),
        forward(largest),
        ("check", "difference from the CPU", suite.correctness),
        train(largest, "level"),
        decoder("GPT-2 small", "gpt2", gpt2),
        ("resume", "difference of a resumed run", suite.resume),
        ("zeromics", "ZerOmics step", lambda: suite.zeromics(sizes.rows)),
        decoder("LLaMA of a billion parameters", "llama", llama),
        *(train(batch, "none") for batch in sorted(sizes.batches)),
        *(train(batch, "products") for batch in others),
        *(forward(batch) for batch in others),
        *(train(batch, "level") for batch in others),
        ("ceiling", "ceiling, float32", lambda: suite.ceilings("float32")),
    ]


def run(
    suite: Suite, now: dict[str, str], reserve: float, after_each: Callable[[], None] = lambda: None
) -> None:
    """Measure the figures that fit into the time limit, and leave `reserve` seconds at the end.

    An error ends only the figure in which it occurs.
    """
    figures, clock = suite.figures, suite.clock
    skipped = []
    for kind, name, call in _plan(suite):
        if figures.knows(name):
            continue
        if clock.left() - reserve < clock.expected(kind):
            skipped.append(name)
            continue
        now["figure"] = name
        figures.begin(name)
        started = time.monotonic()
        try:
            call()
        except Exception as error:
            if not isinstance(error, SctError):
                traceback.print_exc()
            figures.add(name, None, remark=_reason(error))
        clock.taken[kind] = max(clock.taken.get(kind, 0.0), time.monotonic() - started)
        figures.begin("")
        _free()
        after_each()
    if skipped:
        figures.note(f"Not measured, because too little time was left: {', '.join(skipped)}.")


def _free() -> None:
    """Free the device memory of a figure, including arrays that an error keeps alive in a reference cycle."""
    gc.collect()
    jax.clear_caches()


def _reason(error: Exception) -> str:
    """Return the remark for a figure that could not be measured."""
    if _is_out_of_memory(error):
        return "out of memory"
    return f"not measured: {error if isinstance(error, SctError) else first_line(error)}"


def main(words: list[str] | None = None, started: float | None = None) -> int:
    """Run the suite. `started` is the time (`time.monotonic`) at which the budget began; default: now."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="Folder for the results.")
    add("--budget", type=float, default=480.0, help="Time limit in seconds.")
    add(
        "--cells",
        type=Path,
        help="File from tools/pack_cells.py to train a small sCT on. Default: no training.",
    )
    add(
        "--training_share",
        type=float,
        default=0.4,
        help="Share of the time limit that is reserved for training with --cells.",
    )
    add("--most_steps", type=int, default=1_000_000, help="Largest number of training steps.")
    add("--previous", type=Path, help=f"{FIGURES} of an earlier run. Only the missing results are measured.")
    add("--cache", type=Path, help=f"{CACHE} of an earlier run (compiled programs).")
    add("--cache_mib", type=float, default=15.0, help=f"Largest size of {CACHE} in MiB.")
    add("--tiny", action="store_true", help="Use small sizes, to try the script on a CPU.")
    given = parser.parse_args(words)
    sizes, now = TINY if given.tiny else FULL, {"figure": "start"}
    with contextlib.ExitStack() as stack:
        try:
            check_positive("--budget", given.budget)
            check_share("--training_share", given.training_share)
            check_at_least("--most_steps", given.most_steps, 1)
            check_positive("--cache_mib", given.cache_mib)
            if not given.tiny and jax.default_backend() != "gpu":
                raise DataError(
                    f"JAX found no GPU (it uses {jax.default_backend()}): install jax for your GPU, or add --tiny to "
                    "try the script on a CPU."
                )
            previous, clock = _read_previous(given.previous), Clock(given.budget, started)
            figures = Figures(given.output)
            stack.callback(_end_at(clock, figures, now).cancel)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            cells = PackedCells.load(given.cells) if given.cells else None
            cache = ProgramCache(folder, given.cache, int(given.cache_mib * 2**20))
            cache.use()
            device = jax.devices()[0].device_kind
            figures.keep(
                previous,
                {
                    "device": device,
                    "jax": jax.__version__,
                    "sct": __version__,
                    "sizes": dataclasses.asdict(sizes),
                },
            )
        except SctError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        figures.note(f"Device: {device}, jax {jax.__version__}, {time.strftime('%Y-%m-%d')}.")

        def pack() -> None:
            cache.pack(given.output / CACHE)

        stack.callback(pack)
        share = given.training_share * given.budget if cells is not None else 0.0
        run(Suite(sizes, figures, clock), now, max(share, _LAST_SECONDS), pack)
        if cells is not None:
            now["figure"] = "training of a small sCT"
            try:
                SmallTraining(cells, sizes, figures, clock).run(given.most_steps)
            except Exception as error:
                traceback.print_exc()
                figures.note(f"The training of a small sCT ended early: {_reason(error)}.")
        now["figure"] = "writing the compiled programs"
        figures.note(
            f"Finished after {time.monotonic() - clock.start:.0f} s. Newly compiled programs: {cache.compiled}, "
            f"programs from the cache: {cache.found}."
        )
    return 0


if __name__ == "__main__":
    code = main(started=_STARTED)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # does not wait for threads that are still running after an error
