"""A small store and a small configuration with which a run takes seconds."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from sct.data.datasets import simulate_atlas
from sct.data.genes.vocabulary import GeneVocabulary
from sct.data.ingest.build import IngestOptions, ingest
from sct.data.store import Store
from sct.families.tasks import make_task
from sct.models import registry
from sct.train.loop import TrainConfig, TrainResult, train
from sct.train.optim import OptimizerConfig

CONFIG: dict[str, Any] = {
    "family": "sct",
    "task": "masked_expression",
    "model": {
        "num_genes": 0, "token_embed_dim": 32, "embed_dim": 32, "num_downsamples": 3, "num_layers": 1,
        "num_heads": 2, "ffn_dim": 32,
    },
    "data": {"cells_per_bag": 4, "shuffle_cells": 64},
    "objective": {"report_seeds": 1},
    "optimizer": {"peak_lr": 1e-3, "init_lr": 1e-4, "warmup_steps": 5},
    "train": {"steps": 20, "batch_size": 2, "log_every": 1, "eval_every": 10, "checkpoint_every": 5},
}  # fmt: skip


def merged(base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Configuration with changed fields, given as `section__field=value`."""
    config = copy.deepcopy(base)
    for name, value in changes.items():
        section, _, field = name.partition("__")
        if field:
            config.setdefault(section, {})[field] = value
        else:
            config[section] = value
    return config


def learn(config: dict[str, Any], folder: Path) -> TrainResult:
    """Train as a run does, without what comes after training."""
    folder.mkdir(exist_ok=True)
    task, _ = make_task(config, Store.open(config["data"]["store"]))
    options = registry.build(TrainConfig, config["train"], "train")
    return train(task, options, registry.build(OptimizerConfig, config["optimizer"], "optimizer"), folder)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Entries of a run's log."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries without what differs between two runs of the same."""
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines]


def same(first: Any, second: Any) -> bool:
    """Whether two trees of arrays are equal bit for bit."""
    leaves, others = jax.tree.leaves(first), jax.tree.leaves(second)
    return len(leaves) == len(others) and all(
        np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(leaves, others, strict=True)
    )


@pytest.fixture(scope="session")
def store(tmp_path_factory) -> Path:
    """Three studies of 60 cells x 100 genes: two to train on, one for validation; one more for testing."""
    folder = tmp_path_factory.mktemp("store") / "store"
    atlas = simulate_atlas(4, 60, 100, seed=3)
    genes = GeneVocabulary.human().subset(list(atlas[0].var_names))
    inputs = [(f"study{i}", adata) for i, adata in enumerate(atlas)]
    ingest(inputs, folder, vocabulary=genes, options=IngestOptions(validation=("study2",), test=("study3",)))
    return folder


@pytest.fixture
def full_config(store):
    """Function that gives the small configuration with changes."""
    return lambda **changes: merged(CONFIG, **{"data__store": str(store), **changes})


@pytest.fixture
def config(full_config):
    """As `full_config`, with one level: most time of a run here is compilation."""
    return lambda **changes: full_config(**{"model__num_downsamples": 1, **changes})


def board(folder: Path) -> list[tuple[int, str, float]]:
    """What TensorBoard shows of a run: (step, name, value), without what a restart makes it forget."""
    from tensorboardX.proto import event_pb2

    shown: list[tuple[int, str, float]] = []
    for path in sorted((folder / "tensorboard").iterdir()):
        content, place = path.read_bytes(), 0
        while place < len(content):
            size = int.from_bytes(content[place : place + 8], "little")
            if place + 12 + size + 4 > len(content):
                break  # what a killed run wrote a part of, which TensorBoard does not read
            event = event_pb2.Event.FromString(content[place + 12 : place + 12 + size])
            place += 12 + size + 4
            if event.session_log.status == event_pb2.SessionLog.START:
                shown = [each for each in shown if each[0] < event.step]
            shown += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return [each for each in shown if "second" not in each[1]]
