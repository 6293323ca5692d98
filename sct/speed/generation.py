"""Measure the mode `generate` in tokens per second.

Compare the result with the memory bandwidth and with Hugging Face transformers.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sct import messages
from sct.errors import ConfigError, MissingExtraError, SctError
from sct.generation.cache import empty, extend, scores_of
from sct.generation.decoding import DecodingOptions, ready
from sct.generation.generate import generate
from sct.models import registry
from sct.models.decoder import Decoder
from sct.models.decoder_config import DecoderConfig
from sct.speed import memory
from sct.speed.compare import Check
from sct.speed.job import SpeedJob
from sct.speed.timing import timed
from sct.weights.load import load
from sct.weights.pretrained import Pretrained

# Number of prompts, maximum tokens per prompt, and generated tokens per prompt.
ROWS, PROMPT, NEW = 8, 64, 256
LIMIT = 1e-4
_CEILING_BYTES = 1 << 28
_REPEATS = 5


def model_of(job: SpeedJob) -> Pretrained:
    """Return the model in `init_from` of a configuration. Without `init_from`, return a model with random parameters.

    Raises
    ------
    ConfigError
        The model cannot generate text.
    """
    given = dict(job.config.get("model", {}))
    family = registry.family(str(job.config.get("family"))).config
    if not issubclass(family, DecoderConfig):
        able = [name for name, (kind, *_) in registry.MODELS.items() if issubclass(kind, DecoderConfig)]
        raise ConfigError(
            f"--mode=generate needs a model that generates text, but the family is {job.config.get('family')!r}: use a "
            f"configuration of one of these families: {', '.join(able)}."
        )
    if job.config.get("init_from"):
        return load(job.config["init_from"])
    given["vocab_size"] = given.get("vocab_size") or family.vocab_size
    config = registry.model_config(job.config["family"], given)
    registry.check_device(config)
    module = Decoder(config)
    make = jax.jit(lambda key: nn.unbox(module.init(key, *Decoder.example(config).values())))
    return Pretrained(job.config["family"], config, make(jax.random.key(0)))


def prompts_of(config: DecoderConfig) -> list[np.ndarray]:
    """Return random prompts, each with `PROMPT` / 2 to `PROMPT` tokens."""
    rng = np.random.default_rng(0)
    lengths = np.linspace(PROMPT // 2, PROMPT, ROWS).astype(int)
    return [rng.integers(0, config.vocab_size, length) for length in lengths]


def check(model: Pretrained) -> Check:
    """Check that decoding token by token with a key-value cache gives the same logits as one pass over the text."""
    config, length = model.config, 24
    ids = jnp.asarray(np.random.default_rng(1).integers(0, config.vocab_size, (2, length)))
    attention_mask = jnp.arange(length) >= jnp.asarray([[0], [5]])
    whole = model.apply(input_ids=ids, attention_mask=attention_mask)["logits"]

    @jax.jit
    def with_cache(variables: dict[str, Any]) -> jax.Array:
        parts, found = ready(config, variables), []
        hidden, cache = extend(
            config, parts, empty(config, 2, length), ids[:, :12], attention_mask[:, :12], first=True
        )
        found.append(scores_of(config, parts, hidden))
        for at in range(12, length):
            hidden, cache = extend(config, parts, cache, ids[:, at : at + 1], attention_mask[:, at : at + 1])
            found.append(scores_of(config, parts, hidden))
        return jnp.concatenate(found, axis=1)

    mask = np.asarray(attention_mask)
    a, b = (np.asarray(x, np.float64)[mask] for x in (with_cache(model.variables), whole))
    limit = LIMIT if config.dtype == "float32" else 0.05
    difference = float(np.linalg.norm(a - b) / np.linalg.norm(b))
    if not difference <= limit:
        raise SctError(
            f"logits with and without a key-value cache differ by {difference:.1e} in relative norm, but at most "
            f"{limit:.1e} is allowed, so generation was not timed: report this as a bug in generation."
        )
    return {"differences": {"scores with a cache": difference}, "limits": {"scores with a cache": limit}}


def memory_ceiling(dtype: str) -> float:
    """Measure the memory bandwidth in bytes per second.

    The measured operation multiplies a few rows by a large matrix, and reads the matrix once.
    """
    side = 4096
    width = _CEILING_BYTES // side // jnp.dtype(dtype).itemsize
    matrix = jax.random.normal(jax.random.key(0), (side, width), jnp.float32).astype(dtype)
    rows = jnp.ones((ROWS, side), dtype)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(rows, matrix))
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(product(rows, matrix))
        times.append(time.perf_counter() - start)
    return matrix.nbytes / min(times)


def measure(job: SpeedJob) -> dict[str, Any]:
    """Time generation. A step reads 8 prompts and generates 256 tokens for each of them."""
    model = model_of(job)
    config: DecoderConfig = model.config
    if config.positions == "learned" and config.max_length < PROMPT + NEW:
        raise ConfigError(
            f"the model has {config.max_length} positions, but the measurement needs {PROMPT + NEW} ({PROMPT} for a "
            f"prompt and {NEW} for generated tokens): set --config.model.max_length to {PROMPT + NEW} or more."
        )
    compared = check(model)
    prompts, options = prompts_of(config), DecodingOptions(max_new_tokens=NEW, batch_size=ROWS)
    variants = {"greedy": options, "sampled": dataclasses.replace(options, temperature=0.7, top_p=0.9)}
    before = memory_ceiling(config.dtype)
    found: dict[str, Any] = {}
    for name, each in variants.items():

        def call(_: None, each: DecodingOptions = each) -> None:
            generate(model, prompts, each, stop=(), progress_bar=False)

        started = time.perf_counter()
        call(None)
        first = time.perf_counter() - started
        with memory.HostPeak() as peak:
            times = timed(lambda: None, call, job.options.steps, f"generating ({name})")
        rate = ROWS * NEW / times.median
        if name == "greedy":
            found |= {**times.report(), "first_call_seconds": first, "generated_tokens_per_s": rate}
            found |= {"peak_host_bytes": peak.bytes, "peak_host_from": peak.how}
        else:
            found["sampled_tokens_per_s"] = rate
    rates = f"{found['generated_tokens_per_s']:,.0f} tokens/s greedy, {found['sampled_tokens_per_s']:,.0f} sampled"
    messages.notice(f"{rates}; now timing transformers (if installed), which takes longer")
    ceiling = max(before, memory_ceiling(config.dtype))
    itemsize = jnp.dtype(config.dtype).itemsize
    read = sum(leaf.size for leaf in jax.tree.leaves(model.variables)) * itemsize
    if not config.tied:
        # Only a few rows of an untied token embedding are read.
        read -= config.vocab_size * config.embed_dim * itemsize
    achieved = read * NEW / found["step_seconds"]
    return {
        "check": compared,
        **found,
        "parameters": model.size,
        "batch_size": ROWS,
        "prompt_tokens": PROMPT,
        "new_tokens": NEW,
        "weights_bytes_per_s": achieved,
        "memory_ceiling_bytes_per_s": ceiling,
        "utilisation_of_memory": achieved / ceiling,
        "peak_device_bytes": memory.device_peak(),
        "dtype": config.dtype,
        **beside_transformers(model, prompts, job.options.steps),
    }


def beside_transformers(model: Pretrained, prompts: list[np.ndarray], steps: int) -> dict[str, Any]:
    """Measure the tokens per second of Hugging Face transformers with the same weights.

    If that library is not installed, the result says so.
    """
    try:
        rate = _transformers(model, prompts, steps)
    except MissingExtraError:
        return {"transformers": "not installed"}
    return {"transformers": "measured", **rate}


def _transformers(model: Pretrained, prompts: list[np.ndarray], steps: int) -> dict[str, float]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise MissingExtraError(
            "torch or transformers is not installed: run pip install torch transformers."
        ) from error
    from sct.weights.hf import folder as hf

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(_cores())
    with tempfile.TemporaryDirectory() as folder:
        hf.save(model, Path(folder, "model"))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            Path(folder, "model"), torch_dtype=getattr(torch, model.config.dtype)
        ).eval()
    length = max(map(len, prompts))
    ids, attention_mask = torch.zeros((2, len(prompts), length), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.as_tensor(prompt)
        attention_mask[row, length - len(prompt) :] = 1
    ways: dict[str, dict[str, Any]] = {
        "greedy": {"do_sample": False},
        "sampled": {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0},
    }
    rates = {}
    for name, options in ways.items():

        def call(_: None, options: dict[str, Any] = options) -> None:
            with torch.inference_mode():
                made = theirs.generate(
                    ids,
                    attention_mask=attention_mask,
                    max_new_tokens=NEW,
                    min_new_tokens=NEW,
                    pad_token_id=0,
                    **options,
                )
            assert made.shape[1] == length + NEW

        call(None)
        times = timed(lambda: None, call, steps, f"transformers ({name})")
        rates[f"transformers_{name}_tokens_per_s"] = len(prompts) * NEW / times.median
    return rates


def _cores() -> int:
    """Return the number of processor cores that this process can use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
