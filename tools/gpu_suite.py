"""Check and measure sct on a GPU within a few minutes, then train a small sCT until the time is over.

    PYTHONPATH=. python tools/gpu_suite.py --output=results --budget=480 --cells=cells.npz

The program needs only jax, flax, optax, einops, numpy, scipy and safetensors. It writes each figure to
results/figures.json and results/figures.md as soon as it is known, and ends by itself after --budget seconds.
`--previous=figures.json` keeps the figures of an earlier run and measures only those that it lacks, and `--cache` is a
file with compiled programs, which is read at the start and written to results/cache.tgz at the end. `--cells` is a file
that tools/pack_cells.py wrote; the trained model is results/model, which `sct.load` reads. `--tiny` uses small sizes,
so that the program can be tried on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from sct.data.masking import Masking
from sct.data.packed_cells import PackedCells
from sct.errors import SctError, first_line
from sct.generation.decoding import DecodingOptions
from sct.generation.generate import generate
from sct.models import lora
from sct.models.decoder import Decoder
from sct.models.decoder_config import DecoderConfig, GPT2Config, LlamaConfig
from sct.models.sct import SCT
from sct.models.sct_config import SCTConfig, pad_to_multiple
from sct.models.zeromics import ZerOmics, ZerOmicsConfig
from sct.models.zeromics_cells import ZerOmicsCells, ZerOmicsCellsConfig
from sct.nn import target
from sct.nn.losses import next_token_losses
from sct.nn.paths import flatten, unflatten
from sct.speed import memory
from sct.speed.ceiling import matmul_ceiling
from sct.speed.compare import compare, gradient_difference
from sct.tasks.masked_objective import MaskedExpressionConfig, MaskedObjective
from sct.train import sharding
from sct.train.optim import OptimizerConfig, make_optimizer
from sct.train.state import State, init_state, make_eval_step, make_train_step
from sct.weights.pretrained import Pretrained

FIGURES, TABLE, MODEL, CACHE = "figures.json", "figures.md", "model", "cache.tgz"
# Files that come back from a rented machine are often limited in size and number.
_FILE_BYTES = 15 << 20
_LAST_SECONDS = 15.0  # to write the model and the cache before the time is over
# Share of the time that is kept for training, if there are cells to train on.
_TRAINING_SHARE = 0.3
_FIRST_GUESS = 75.0  # seconds of a figure about whose duration nothing is known


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
    batches: tuple[int, ...] = (4, 1, 8)
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
    """The figures so far, in a JSON file and a Markdown table that are rewritten with each new figure."""

    def __init__(self, folder: Path, previous: Path | None) -> None:
        self.folder, self.rows = folder, cast(list[dict[str, Any]], [])
        self.kept: dict[str, dict[str, Any]] = {}
        self.notes: list[str] = []
        self._lock = threading.RLock()
        if previous is not None and previous.is_file():
            found = json.loads(previous.read_text())["figures"]
            self.kept = {row["figure"]: row for row in found if row.get("value") is not None}
            self.rows = list(self.kept.values())
        folder.mkdir(parents=True, exist_ok=True)
        self.write()

    def add(self, figure: str, value: float | None, unit: str = "", **more: Any) -> None:
        """Add a figure, or a remark on why it is missing (value None), and write the files."""
        with self._lock:
            self.rows = [row for row in self.rows if row["figure"] != figure]
            self.rows.append({"figure": figure, "value": value, "unit": unit, **more})
            self.write()
        print(
            f"{figure}: {'-' if value is None else f'{value:.4g} {unit}'} {more.get('remark', '')}",
            flush=True,
        )

    def note(self, text: str) -> None:
        """Add a sentence below the table."""
        with self._lock:
            self.notes.append(text)
            self.write()
        print(text, flush=True)

    def write(self) -> None:
        """Write both files; each replaces the old one at once."""
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
        content = json.dumps({"figures": self.rows, "notes": self.notes}, indent=1, default=str)
        for name, made in ((FIGURES, content), (TABLE, text)):
            partial = self.folder / f".{name}"
            partial.write_text(made)
            partial.replace(self.folder / name)


class Clock:
    """The time that is left, and how long figures of a kind took so far."""

    def __init__(self, budget: float) -> None:
        self.start, self.budget = time.monotonic(), budget
        self.taken: dict[str, float] = {}

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.start + self.budget - time.monotonic()

    def expected(self, kind: str) -> float:
        """Return the expected seconds of a figure: those of the slowest of its kind, or of the slowest of all."""
        known = self.taken.get(kind) or max(self.taken.values(), default=0.0)
        return min(known, _FIRST_GUESS) if known else min(_FIRST_GUESS, 0.15 * self.budget)


def _end_at(clock: Clock, figures: Figures, now: dict[str, str]) -> threading.Timer:
    """End the process when the time is over, even if a program is being compiled."""

    def end() -> None:
        figures.note(f"The time of {clock.budget:.0f} s was over during: {now['figure']}.")
        os._exit(0)

    timer = threading.Timer(max(clock.left(), 0.0), end)
    timer.daemon = True
    timer.start()
    return timer


@contextlib.contextmanager
def _accelerated() -> Iterator[None]:
    """Trace the layers as for a GPU, also if there is none, so that a trial on a CPU runs the same code."""
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


def _tokens(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Return random tokens, of which a tenth is expressed."""
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


class Suite:
    """All measurements. Each method adds figures; `run` decides which ones fit into the time."""

    def __init__(self, sizes: Sizes, figures: Figures, clock: Clock) -> None:
        self.sizes, self.figures, self.clock = sizes, figures, clock
        self.ceiling = 0.0
        self.bandwidth = 0.0
        for name in ("ceiling, bfloat16", "bandwidth"):
            if row := figures.kept.get(name):
                value = row["value"] * 1e12
                self.ceiling, self.bandwidth = (
                    (value, self.bandwidth) if "ceiling" in name else (self.ceiling, value)
                )

    def ceilings(self, dtype: str) -> None:
        """Measure the rate of a large matrix product."""
        rate, size = matmul_ceiling(dtype, self.sizes.ceiling_size)
        self.ceiling = rate if dtype == "bfloat16" else self.ceiling
        self.figures.add(f"ceiling, {dtype}", rate / 1e12, "TFLOP/s", matrix_size=size)

    def copy_bandwidth(self) -> None:
        """Measure the rate at which an array is read and written."""
        array = jnp.zeros(self.sizes.copied_bytes // 4, jnp.float32)
        double = jax.jit(lambda x: x + 1.0)
        _seconds(lambda: double(array), 1)
        self.bandwidth = 2 * array.nbytes / min(_seconds(lambda: double(array), 5))
        self.figures.add("bandwidth", self.bandwidth / 1e12, "TB/s", remark="bytes read and written")

    def correctness(self, dtype: str) -> None:
        """Compare loss and gradient with the reference kernels on the CPU."""
        base = SCTConfig(**self.sizes.checked, dtype=dtype)
        batch = _batch(base, 2, self.sizes.checked_cells)
        first = MaskedObjective(MaskedExpressionConfig(), base)
        with jax.default_device(jax.devices("cpu")[0]):
            variables = jax.jit(lambda key: nn.unbox(first.init(key)))(jax.random.key(0))
            moved = np.random.default_rng(1)
            flat = {
                path: np.asarray(value) + 0.1 * moved.standard_normal(value.shape, np.float32)
                if value.ndim < 2
                else np.asarray(value)
                for path, value in sorted(flatten(variables).items())
            }

        def run(model: Mapping[str, Any]) -> dict[str, Any]:
            task = MaskedObjective(MaskedExpressionConfig(), dataclasses.replace(base, **model))
            loss, gradient = jax.jit(
                jax.value_and_grad(lambda flat: task.loss(unflatten(flat), batch, jax.random.key(2), True)[0])
            )(flat)
            return {"loss": float(loss), "gradient": jax.device_get(gradient)}

        def fast(model: Mapping[str, Any]) -> dict[str, Any]:
            with _accelerated():
                return run({"remat": "products", **model})

        def plain(model: Mapping[str, Any]) -> dict[str, Any]:
            with jax.default_device(jax.devices("cpu")[0]), target.tracing_for("cpu"):
                return run(model)

        found = compare("the loss", dtype, fast, plain, 1.0)
        for name, value in found["differences"].items():
            self.figures.add(
                f"difference from the CPU, {dtype}, {name}", value, "relative",
                limit=float(found["limits"][name]), arithmetic=found["arithmetic"],
            )  # fmt: skip

    def _training(
        self, config: SCTConfig, batch: dict[str, np.ndarray], fraction: float
    ) -> tuple[MaskedObjective, Any, Callable[[], State], Any]:
        """Return the task, the compiled step, a function that makes the state, and the batch on the device."""
        mesh = _mesh()
        task = MaskedObjective(MaskedExpressionConfig(max_masked_fraction=fraction), config)
        abstract, make = init_state(
            task, lambda shapes: make_optimizer(OptimizerConfig(), 100, shapes)[0], mesh, 0
        )
        optimizer, _ = make_optimizer(OptimizerConfig(), 100, abstract.trained)
        placed = sharding.put_batch(batch, mesh)
        step = make_train_step(task, optimizer, mesh, abstract).lower(abstract, placed).compile()  # type: ignore[attr-defined]
        return task, step, make, placed

    def resume(self) -> None:
        """Compare four steps with two steps, a copy of the state on the host, and two more steps."""
        config = SCTConfig(**self.sizes.checked, dtype="bfloat16", remat="products")
        with _accelerated():
            _, step, make, batch = self._training(config, _batch(config, 2, self.sizes.checked_cells), 0.2)
        state, copied = make(), None
        for number in range(4):
            if number == 2:
                copied = jax.device_get(state)
            state = step(state, batch)[0]
        other = jax.device_put(copied, jax.tree.map(lambda leaf: leaf.sharding, make()))
        for _ in range(2):
            other = step(other, batch)[0]
        whole, worst, path = gradient_difference(*map(jax.device_get, (other.trained, state.trained)))
        self.figures.add(
            "difference of a resumed run", whole, "relative", worst_parameter=float(worst), of=path
        )

    def train(self, batch: int, remat: str) -> None:
        """Measure the training step of sCT."""
        config = SCTConfig(**self.sizes.model, dtype="bfloat16", remat=remat)
        started = time.perf_counter()
        with _accelerated():
            _, step, make, placed = self._training(config, _batch(config, batch, self.sizes.cells), 0.05)
        compiled = time.perf_counter() - started
        now: dict[str, Any] = {"state": make()}

        def call() -> Any:
            now["state"], scalars, _ = step(now["state"], placed)
            return scalars["loss"]

        _seconds(call, 1)
        times = _seconds(call, self.sizes.steps)
        positions = self.sizes.cells * config.num_genes
        flops = 3 * SCT.flops(config, batch, self.sizes.cells, max(1, round(0.05 * positions)))
        self._report(f"train, batch {batch}, remat {remat}", batch * positions, flops, times, compiled, step)

    def _report(
        self, name: str, tokens: int, flops: float, times: list[float], compiled: float, program: Any
    ) -> None:
        seconds = statistics.median(times)
        planned = memory.memory_of(program)
        peak = memory.device_peak()
        self.figures.add(
            name, tokens / seconds / 1e6, "million tokens/s", step_seconds=seconds, slowest_step=max(times),
            tflops=flops / seconds / 1e12,
            of_ceiling=flops / seconds / self.ceiling if self.ceiling else 0.0, compile_seconds=compiled,
            temporary_gib=(planned["temporaries_bytes"] or 0) / 2**30,
            arguments_gib=(planned["arguments_bytes"] or 0) / 2**30,
            **({"peak_gib_so_far": peak / 2**30} if peak else {}),
        )  # fmt: skip

    def forward(self, batch: int) -> None:
        """Measure the forward pass of sCT, with logits at all positions."""
        config = SCTConfig(**self.sizes.model, dtype="bfloat16")
        module = SCT(config)
        tokens = jnp.asarray(_batch(config, batch, self.sizes.cells)["tokens"])
        variables = jax.jit(lambda key: nn.unbox(module.init(key, **SCT.example(config))))(jax.random.key(0))
        started = time.perf_counter()
        with _accelerated():
            program = (
                jax.jit(lambda variables, tokens: module.apply(variables, tokens)["logits"])
                .lower(variables, tokens)
                .compile()
            )
        compiled = time.perf_counter() - started
        _seconds(lambda: program(variables, tokens), 1)
        times = _seconds(lambda: program(variables, tokens), self.sizes.steps)
        flops = SCT.flops(config, batch, self.sizes.cells)
        self._report(f"forward, batch {batch}", tokens.size, flops, times, compiled, program)

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
        read = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
        read -= 0 if config.tied else config.vocab_size * config.embed_dim * 2
        rate = read * sizes.new_tokens / seconds
        self.figures.add(
            f"generation, {name}", sizes.rows * sizes.new_tokens / seconds, "tokens/s", first_call_seconds=first,
            of_bandwidth=rate / self.bandwidth if self.bandwidth else 0.0, parameters=model.size,
            rows=sizes.rows,
        )  # fmt: skip

    def zeromics(self, rows: int) -> None:
        """Measure a step of instruction tuning: LLaMA frozen in bfloat16, adapters of rank 32."""
        sizes = self.sizes
        cells = ZerOmicsCellsConfig(**sizes.zeromics_cells, dtype="bfloat16")
        llm = LlamaConfig(**sizes.zeromics_llm, dtype="bfloat16", remat="level")
        config = ZerOmicsConfig(cells, llm, sizes.num_soft)
        task = _Instructions(config)
        rng = np.random.default_rng(0)
        ids = rng.integers(0, llm.vocab_size, (rows, sizes.text_length), dtype=np.int32)
        ids[:, : sizes.num_soft] = -1 - np.arange(sizes.num_soft)
        batch = {
            "bins": rng.integers(0, cells.num_bins, (rows, cells.num_genes), dtype=np.uint8),
            "input_ids": ids,
            "predicted": np.broadcast_to(np.arange(sizes.text_length) >= sizes.text_length - 8, ids.shape),
            "example_mask": np.ones(rows, np.float32),
        }
        mesh = _mesh()
        started = time.perf_counter()
        with _accelerated():
            abstract, make = init_state(
                task, lambda shapes: make_optimizer(OptimizerConfig(), 100, shapes)[0], mesh, 0
            )
            optimizer, _ = make_optimizer(OptimizerConfig(), 100, abstract.trained)
            placed = sharding.put_batch({name: np.array(value) for name, value in batch.items()}, mesh)
            step = make_train_step(task, optimizer, mesh, abstract).lower(abstract, placed).compile()  # type: ignore[attr-defined]
            now: dict[str, Any] = {"state": make()}
        compiled = time.perf_counter() - started

        def call() -> Any:
            now["state"], scalars, _ = step(now["state"], placed)
            return scalars["loss"]

        _seconds(call, 1)
        times = _seconds(call, sizes.steps)
        forward = ZerOmics.flops(config, rows, sizes.text_length, cells.num_genes)
        encoder = ZerOmicsCells.flops(cells, rows, cells.num_genes)
        flops = encoder + 3 * (forward - encoder)
        self._report(f"ZerOmics step, {rows} rows", rows * sizes.text_length, flops, times, compiled, step)


class _Instructions:
    """Loss of the second stage of ZerOmics with one adapter per layer; see `sct.tasks.instructions`."""

    trainable = lora.TRAINABLE
    loss_normalizer = "predicted"
    monitor, monitor_mode = "loss", "min"

    def __init__(self, config: ZerOmicsConfig) -> None:
        self.config, self.model = config, ZerOmics(config)

    def init(self, rng: jax.Array) -> dict[str, Any]:
        variables = dict(self.model.init(rng, *ZerOmics.example(self.config).values()))
        adapters = lora.init(jax.random.fold_in(rng, 1), variables["params"], lora.LoraConfig(rank=32))
        frozen = jax.tree.map(
            lambda leaf: leaf.astype(self.config.llm.dtype) if leaf.ndim > 1 else leaf,
            variables["params"]["llm"],
        )
        return {**variables, "params": {**variables["params"], "llm": frozen}, "adapters": adapters}

    def loss(self, variables: Any, batch: Any, rng: jax.Array, train: bool) -> tuple[jax.Array, Any]:
        def run(*inputs: Any, method: str) -> jax.Array:
            return cast(jax.Array, self.model.apply(variables, *inputs, method=method))

        encoded = jax.lax.stop_gradient(run(batch["bins"], None, method="encode"))
        hidden = run(batch["input_ids"], None, run(encoded, None, method="soft"), method="hidden_states")
        losses, _, counts = next_token_losses(
            lambda x: run(x, method="logits"), hidden, batch["input_ids"], batch["predicted"],
            batch["example_mask"], self.config.llm.vocab_size,
        )  # fmt: skip
        return (losses * counts).sum() / counts.sum(), {"predicted": counts.sum()}

    def compute_metrics(self, sums: Mapping[str, np.ndarray]) -> dict[str, float]:
        return {}

    def operations(self, records: int) -> float:
        return 0.0


# The masking of the small configurations (configs/sct_sc.py): each bag gets one of three kinds.
_MASKING = Masking(
    kind="mixture",
    mixture=(("drawn", 1.0), ("drawn_uniform", 1.0), ("drawn_genes", 1.0)),
    low=0.05,
    high=0.95,
)
_PEAK_RATE, _WARMUP = 1e-3, 0.03


def train_small(
    cells: PackedCells, sizes: Sizes, figures: Figures, clock: Clock, most_steps: int, seed: int = 0
) -> None:
    """Train a small sCT on packed cells for the remaining time, and write a model folder."""
    levels = sizes.small["num_downsamples"]
    values = {**sizes.small, "num_genes": pad_to_multiple(len(cells.vocabulary), levels)}
    config = SCTConfig(**values, dtype="bfloat16", remat="none" if sizes is FULL else "products")
    objective = MaskedExpressionConfig(masking=_MASKING, max_masked_fraction=0.5)
    task, mesh = MaskedObjective(objective, config), _mesh()
    tokens = jnp.asarray(cells.tokens(config.num_bins, config.num_genes))
    measured = np.zeros((len(cells.names), config.num_genes), bool)
    measured[:, : len(cells.vocabulary)] = cells.measured
    genes = jnp.asarray(measured)

    def optimizer_of(_: Any) -> optax.GradientTransformation:
        return optax.chain(
            optax.clip_by_global_norm(1.0), optax.inject_hyperparams(optax.adam)(learning_rate=_PEAK_RATE)
        )

    @jax.jit
    def batch_of(rows: jax.Array, study: jax.Array) -> dict[str, jax.Array]:
        return {"tokens": tokens[rows], "measured": genes[study], "example_mask": jnp.ones(len(rows))}

    rng = np.random.default_rng(seed)

    def drawn(studies: list[np.ndarray]) -> dict[str, jax.Array]:
        able = [rows for rows in studies if len(rows) >= sizes.small_cells]
        shares = np.asarray([len(rows) for rows in able], float)
        picked = rng.choice(len(able), sizes.small_batch, p=shares / shares.sum())
        rows = np.stack([rng.choice(able[i], sizes.small_cells, replace=False) for i in picked])
        return batch_of(jnp.asarray(rows), jnp.asarray(cells.study[rows[:, 0]]))

    training, held_out = cells.rows(held_out=False), cells.rows(held_out=True)
    if not any(len(rows) >= sizes.small_cells for rows in training):
        figures.note("No study has enough cells for a bag, so no model was trained.")
        return
    with _accelerated():
        abstract, make = init_state(task, optimizer_of, mesh, seed)
        step = make_train_step(task, optimizer_of(None), mesh, abstract)
        evaluate = make_eval_step(task, mesh)
        state, begun = make(), time.monotonic()
        checked = [drawn(held_out) for _ in range(4)] if any(
            len(rows) >= sizes.small_cells for rows in held_out
        ) else []  # fmt: skip
        whole = max(clock.left() - _LAST_SECONDS, 0.0)
        taken, shown, losses = 0, 0.0, []
        while taken < most_steps and (clock.left() > _LAST_SECONDS or not taken):
            done = max((time.monotonic() - begun) / max(whole, 1e-9), taken / most_steps)
            rate = _PEAK_RATE * min(done / _WARMUP, 0.5 * (1 + np.cos(np.pi * min(done, 1.0)))) + 1e-6
            clipping, adam = state.optimizer
            adam = adam._replace(
                hyperparams={**adam.hyperparams, "learning_rate": jnp.asarray(rate, jnp.float32)}
            )
            state, scalars, _ = step(state.replace(optimizer=(clipping, adam)), drawn(training))
            taken += 1
            if taken % 20 == 0 or taken == most_steps:
                losses.append(float(scalars["loss"]))  # waits, so that the host does not run ahead
                if time.monotonic() - shown > 20:
                    shown = time.monotonic()
                    figures.add(
                        "training of a small sCT, loss", losses[-1], "nats", steps=taken,
                        seconds=time.monotonic() - begun,
                    )  # fmt: skip
        seconds = time.monotonic() - begun
        loss = float(scalars["loss"])
        figures.add("training of a small sCT, loss", loss, "nats", steps=taken, seconds=seconds)
        if checked:
            sums = [jax.device_get(evaluate(state, batch, jnp.asarray(i))) for i, batch in enumerate(checked)]
            count = sum(float(each["masked"]) for each in sums)
            right = sum(float(np.trace(each["confusion"])) for each in sums)
            figures.add(
                "small sCT, loss in validation studies", sum(float(each["loss"]) for each in sums) / count,
                "nats", accuracy=right / count,
            )  # fmt: skip
    model = Pretrained(
        "sct", dataclasses.replace(config, dtype="float32", remat="none"), jax.device_get(state.variables),
        genes=cells.vocabulary, step=taken,
        data={
            "cells_per_bag": sizes.small_cells, "noise_fraction": 0.003,
            "masking": dataclasses.asdict(_MASKING), "logit_adjustment": objective.logit_adjustment,
        },
    )  # fmt: skip
    model.save_pretrained(figures.folder / MODEL, dtype="bfloat16", shard_bytes=_FILE_BYTES)
    figures.add("small sCT", model.size, "parameters", remark=f"in {MODEL}/", cells=len(cells))


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
        ("check", "difference from the CPU, bfloat16, loss", lambda: suite.correctness("bfloat16")),
        train(largest, "products"),
        forward(largest),
        ("check", "difference from the CPU, float32, loss", lambda: suite.correctness("float32")),
        train(largest, "level"),
        train(largest, "none"),
        decoder("GPT-2 small", "gpt2", gpt2),
        ("check", "difference of a resumed run", suite.resume),
        ("text", "ZerOmics step", lambda: suite.zeromics(sizes.rows)),
        decoder("LLaMA of a billion parameters", "llama", llama),
        *(train(batch, "products") for batch in others),
        *(forward(batch) for batch in others),
        *(train(batch, remat) for remat in ("level", "none") for batch in others),
        ("ceiling", "ceiling, float32", lambda: suite.ceilings("float32")),
    ]


def run(suite: Suite, now: dict[str, str], reserve: float) -> None:
    """Measure the figures that fit into the time, without the `reserve` seconds at its end."""
    figures, clock = suite.figures, suite.clock
    skipped = []
    for kind, name, call in _plan(suite):
        if any(done.startswith(name) for done in figures.kept):
            continue
        if clock.left() - reserve < clock.expected(kind):
            skipped.append(name)
            continue
        now["figure"] = name
        started = time.monotonic()
        try:
            call()
        except SctError as error:
            figures.add(name, None, remark=f"failed: {error}")
        except RuntimeError as error:
            full = "RESOURCE_EXHAUSTED" in str(error)
            figures.add(name, None, remark="out of memory" if full else f"failed: {first_line(error)}")
        clock.taken[kind] = max(clock.taken.get(kind, 0.0), time.monotonic() - started)
        jax.clear_caches()  # frees what a figure left on the device
    if skipped:
        figures.note(f"Not measured, because the time was too short: {', '.join(skipped)}.")


def _unpack(archive: Path | None, folder: Path) -> None:
    """Use a folder for compiled programs, and put those of an archive into it."""
    if archive is not None and archive.is_file():
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _pack(folder: Path, archive: Path) -> None:
    """Write the compiled programs to an archive, as many as fit, small ones first."""
    files = sorted(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    with tarfile.open(archive, "w:gz", compresslevel=6) as file:
        for path in files:
            if archive.stat().st_size + path.stat().st_size / 2 < _FILE_BYTES:
                file.add(path, str(path.relative_to(folder)))


def main(words: list[str] | None = None) -> int:
    """Run the suite."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="Folder for the results.")
    parser.add_argument("--budget", type=float, default=480.0, help="Seconds after which the program ends.")
    parser.add_argument("--cells", type=Path, help="File of tools/pack_cells.py to train on.")
    parser.add_argument("--previous", type=Path, help="figures.json of an earlier run, to continue it.")
    parser.add_argument("--cache", type=Path, help="cache.tgz of an earlier run.")
    parser.add_argument("--most_steps", type=int, default=1_000_000, help="Largest number of training steps.")
    parser.add_argument("--tiny", action="store_true", help="Small sizes, to try the program on a CPU.")
    given = parser.parse_args(words)
    clock, now = Clock(given.budget), {"figure": "start"}
    figures = Figures(given.output, given.previous)
    timer = _end_at(clock, figures, now)
    with tempfile.TemporaryDirectory() as folder:
        if not given.tiny:  # a trial leaves the settings of JAX as they are
            _unpack(given.cache, Path(folder))
        device = jax.devices()[0]
        figures.note(f"Device: {device.device_kind}, jax {jax.__version__}, {time.strftime('%Y-%m-%d')}.")
        try:
            cells = PackedCells.load(given.cells) if given.cells else None
        except SctError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        suite = Suite(TINY if given.tiny else FULL, figures, clock)
        run(suite, now, _TRAINING_SHARE * given.budget if cells is not None else _LAST_SECONDS)
        if cells is not None:
            now["figure"] = "training of a small sCT"
            train_small(cells, suite.sizes, figures, clock, given.most_steps)
        now["figure"] = "writing the compiled programs"
        _pack(Path(folder), given.output / CACHE)
    timer.cancel()
    figures.note(f"Finished after {time.monotonic() - clock.start:.0f} s.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
