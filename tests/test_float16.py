"""A model that computes in float16, which CPUs do not: every way to run it says so before anything is compiled."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

import sct
from sct.data.datasets import simulate_atlas
from sct.data.genes.vocabulary import GeneVocabulary
from sct.errors import ConfigError
from sct.generation.generate import generate
from sct.generation.scoring import score
from sct.models import registry
from sct.nn.paths import unflatten
from sct.speed.job import SpeedOptions
from sct.speed.run import measure
from sct.train import sweep
from sct.train.experiment import run
from sct.weights.pretrained import Pretrained, expected_shapes
from tests.speed.conftest import CONFIG as SPEED
from tests.train.conftest import CONFIG, merged, store  # noqa: F401 (a fixture)

SMALL = {"embed_dim": 32, "num_layers": 1, "num_heads": 2, "ffn_dim": 32}


def made(family: str, genes: GeneVocabulary | None, **values: Any) -> Pretrained:
    """A model of zeros, for which nothing is compiled."""
    config = registry.model_config(family, {**SMALL, **values})
    shapes = expected_shapes(family, config)
    arrays = {path: np.zeros(leaf.shape, leaf.dtype) for path, leaf in shapes.items()}
    return Pretrained(family, config, unflatten(arrays), genes, data={"cells_per_bag": 4})


def test_every_way_to_run_it_is_refused(store, tmp_path):  # noqa: F811
    if jax.default_backend() != "cpu":
        pytest.skip("there is an accelerator, which computes in float16")
    adata = simulate_atlas(1, 12, 70, seed=3)[0]
    adata.obs["cell_type"] = "one"
    genes = GeneVocabulary.human().subset(list(adata.var_names)[:60])
    cells = made("sct", genes, num_genes=64, token_embed_dim=32, num_downsamples=2, dtype="float16")
    text = made("gpt2", None, vocab_size=20, dtype="float16")
    cells.save_pretrained(tmp_path / "cells")
    assert json.loads((tmp_path / "cells" / "config.json").read_text())["model"]["dtype"] == "float16"
    assert sct.load(tmp_path / "cells").config.dtype == "float16", "it can be read, and converted"

    plain = merged(CONFIG, data__store=str(store), model__dtype="float16", model__num_downsamples=1)
    benchmark = {"data": {"path": "cells"}, "output": str(tmp_path / "report")}
    speed = merged(SPEED, model__dtype="float16")
    decoder = {**SPEED, "family": "gpt2", "task": "cell_sentences", "model": {**SMALL, "dtype": "float16"}}
    once = SpeedOptions("train", 3, cells=60, ceiling_size=128)
    ways: dict[str, Callable[[], Any]] = {
        "apply": lambda: cells.apply(tokens=np.zeros((1, 2, 64), np.int32)),
        "embed": lambda: sct.tl.embed(adata.copy(), str(tmp_path / "cells")),
        "impute": lambda: sct.tl.impute(adata.copy(), cells, genes=[adata.var_names[0]]),
        "annotate": lambda: sct.tl.annotate(
            adata.copy(), cells, reference=adata.copy(), label_key="cell_type"
        ),
        "benchmark": lambda: sct.tl.benchmark(benchmark, adata.copy(), cells),
        "generate": lambda: generate(text, [np.zeros(3, int)]),
        "score": lambda: score(text, [np.zeros(3, int)], [np.zeros(2, int)] * 2),
        "generate_cells": lambda: sct.tl.generate_cells(text, n=2),
        "train": lambda: run(plain, tmp_path / "run"),
        "speed": lambda: measure(speed, once, apart=False),
        "speed forward": lambda: measure(speed, dataclasses.replace(once, mode="forward"), apart=False),
        "speed generate": lambda: measure(decoder, dataclasses.replace(once, mode="generate"), apart=False),
    }
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, duration, **_: compiled.append(name) if "backend_compile" in name else None
    )
    wrong = []
    for name, way in ways.items():
        before = len(compiled)
        try:
            way()
            wrong.append(f"{name}: not refused")
        except Exception as error:
            if (
                not isinstance(error, ConfigError)
                or "model.dtype is float16" not in str(error)
                or "\n" in str(error)
            ):
                wrong.append(f"{name}: {type(error).__name__}: {error}")
        if len(compiled) > before:
            wrong.append(f"{name}: something was compiled")
    assert not wrong, "\n".join(wrong)
    assert not (tmp_path / "run").exists()
    swept = sweep.run({**plain, "model": {**plain["model"], "dtype": "float32"},
                       "sweep": {"half": {"model": {"dtype": "float16"}}}}, tmp_path / "sweep", ["half"])  # fmt: skip
    assert "model.dtype is float16" in swept.states["half"]


def test_a_part_of_a_model_is_named_and_an_accelerator_computes_it(monkeypatch):
    config = registry.model_config(
        "zeromics",
        {"llm": {**SMALL, "vocab_size": 20, "dtype": "float16"}, "cells": {**SMALL, "num_genes": 8}},
    )
    with pytest.raises(ConfigError, match=r"llm\.dtype=float32.*model\.llm\.dtype.*'sha256'"):
        registry.check_device(config)
    llm = dataclasses.replace(config.llm, dtype="bfloat16")
    registry.check_device(dataclasses.replace(config, llm=llm))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    registry.check_device(config)
