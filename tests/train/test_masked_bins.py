"""Masked bins from task to run folder: what is hidden, the loss, what is trained, a run and its table."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sct.errors import ConfigError
from sct.models import registry
from sct.models.zeromics_cells import FEATURES, ZerOmicsCells
from sct.nn.paths import flatten
from sct.tasks.masked_bins import BinData, MaskedBins, MaskedBinsConfig
from sct.train import sharding
from sct.train.optim import OptimizerConfig, make_optimizer
from sct.train.state import init_state, load_into, make_train_step
from tests.cached import cached
from tests.data.test_cell_records import Study
from tests.data.text.toy_texts import GENES, ToyStore
from tests.random_models import noisy

SIZES = {"embed_dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 24, "feature_dim": 6, "num_bins": 4}


def task_of(max_genes: int = 0, dropped: tuple[int, ...] = (), **options: Any) -> MaskedBins:
    rng = np.random.default_rng(0)
    studies = [
        Study(rng.poisson(1.5, (n, GENES)), name, split)
        for n, name, split in ((30, "one", "train"), (12, "two", "validation"))
    ]
    known = np.ones(GENES, bool)
    known[list(dropped)] = False
    model = registry.model_config("zeromics_cells", SIZES, GENES)
    features = rng.normal(size=(GENES, 6)).astype(np.float32) * known[:, None]
    return MaskedBins(
        MaskedBinsConfig(**options), BinData(max_genes=max_genes), model, ToyStore(*studies), known, features,
        {"kind": "drawn"}, 0,
    )  # fmt: skip


def batch_of(task: MaskedBins, number: int = 5) -> dict[str, np.ndarray]:
    source = task.dataset("train")
    assert source is not None
    records = [source.record(i) for i in range(number)]
    return {
        **{name: np.stack([r[name] for r in records]) for name in records[0]},
        "example_mask": np.ones(number, np.float32),
    }


@cached
def parameters() -> Any:
    return noisy(nn.unbox(jax.jit(task_of().init)(jax.random.key(0))))


def test_what_is_hidden():
    """Non-zero bins alone, with the probabilities asked for; a replaced bin is never the same, and can be zero."""
    task = task_of(masked=0.3, substituted=0.5)
    bins = jnp.asarray(np.random.default_rng(0).integers(0, 5, (400, 50)), jnp.int32)
    there = jnp.arange(400)[:, None] < 390
    seen, masked = map(
        np.asarray, task.mask_bins(jax.random.key(3), bins, jnp.broadcast_to(there, bins.shape))
    )
    bins, expressed = np.asarray(bins), (np.asarray(bins) > 0) & np.asarray(there)
    assert not masked[~expressed].any()
    assert (seen[masked] == task.model_config.mask).all()
    assert (seen[~expressed] == bins[~expressed]).all()
    assert masked[expressed].mean() == pytest.approx(0.3, abs=0.02)
    changed = (seen != bins) & ~masked
    assert changed[expressed & ~masked].mean() == pytest.approx(0.5, abs=0.02)
    for level in range(1, 5):
        put = np.bincount(seen[changed & (bins == level)], minlength=5)
        assert put[level] == 0
        np.testing.assert_allclose(np.delete(put, level) / put.sum(), 0.25, atol=0.04)


@pytest.mark.slow
@pytest.mark.parametrize("max_genes", [0, GENES + 3])
def test_the_loss_is_the_mean_of_two_cross_entropies(max_genes):
    """At masked places of cells that are there, from the logits of all places."""
    task, variables, key = task_of(max_genes, max_masked_fraction=1.0), parameters(), jax.random.key(5)
    batch = batch_of(task)
    batch["example_mask"][-1] = 0
    loss, sums = task.loss(variables, batch, key, True)
    bins = batch["bins"].astype(int)
    there = np.broadcast_to(batch["example_mask"][:, None] > 0, bins.shape)
    seen, masked = task.mask_bins(jax.random.split(key, 3)[0], jnp.asarray(bins), jnp.asarray(there))
    module = ZerOmicsCells(task.model_config)
    hidden = module.apply(variables, seen, batch.get("genes"), method="hidden_states")
    items = batch["genes"] if max_genes else np.broadcast_to(np.arange(GENES), bins.shape)
    total, at = {}, np.nonzero(np.asarray(masked))
    for name, targets in (("bin", bins), ("gene", items)):
        logits = np.asarray(module.apply(variables, hidden, method=f"{name}_logits"), float)[at]
        logs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        total[name] = -logs[np.arange(len(logs)), targets[at]].sum()
        right = (logits.argmax(axis=1) == targets[at]).sum()
        assert float(sums[f"{name}_right"]) == right
        assert float(sums[f"{name}_loss"]) == pytest.approx(total[name], rel=1e-4)
    assert float(sums["masked"]) == len(at[0]) > 3
    assert float(loss) == pytest.approx((total["bin"] + total["gene"]) / 2 / len(at[0]), rel=1e-4)
    assert float(sums["dropped_targets"]) == 0
    found = task.compute_metrics({name: np.asarray(value) for name, value in sums.items()})
    assert found["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert "dropped_targets" not in found


@pytest.mark.slow
def test_a_budget_leaves_out_and_counts():
    task, key = task_of(max_masked_fraction=2 / GENES, masked=0.9), jax.random.key(1)
    _, sums = task.loss(parameters(), batch_of(task), key, True)
    assert float(sums["masked"]) == 2 * 5
    assert float(sums["dropped_targets"]) > 10
    assert task.compute_metrics({n: np.asarray(v) for n, v in sums.items()})["dropped_targets"] == float(
        sums["dropped_targets"]
    )


@pytest.mark.slow
def test_features_are_given_and_never_trained():
    task = task_of(dropped=(2, 5))
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1))
    options = OptimizerConfig(peak_lr=1e-2, init_lr=1e-2, warmup_steps=0)
    abstract, make = init_state(task, lambda shapes: make_optimizer(options, 5, shapes)[0], mesh, 0)
    assert set(abstract.frozen) == {FEATURES}
    given = task.take_pretrained_params()
    assert task.take_pretrained_params() == {}  # memory is not held twice
    state = load_into(make(), given, (".*",))
    before = jax.tree.map(np.asarray, state.trained)
    step = make_train_step(task, make_optimizer(options, 5, abstract.trained)[0], mesh, abstract)
    batch = batch_of(task)
    assert not batch["bins"][:, [2, 5]].any()
    assert batch["bins"].any()
    state, *_ = step(state, batch)
    np.testing.assert_array_equal(state.frozen[FEATURES], given[FEATURES])
    assert not np.asarray(state.frozen[FEATURES])[[2, 5]].any()
    for path in (
        "params/project/kernel",
        "params/bin_head/kernel",
        "params/gene_head/kernel",
        "params/bin/embedding",
    ):
        assert np.abs(state.trained[path] - before[path]).max() > 0, path


def test_sizes_that_do_not_fit():
    task = task_of()
    parts = (task.config, task.data, task.model_config, task.store, task.known)
    with pytest.raises(ConfigError, match=r"model\.feature_dim"):
        MaskedBins(*parts, np.zeros((GENES, 3), np.float32), {}, 0)
    model = dataclasses.replace(task.model_config, num_genes=GENES + 1)
    with pytest.raises(ConfigError, match="15 genes"):
        MaskedBins(task.config, task.data, model, task.store, task.known, None, {}, 0)
    for options in (
        {"masked": 0.0},
        {"max_masked_fraction": 1.5},
        {"substituted": -0.1},
        {"report_seeds": 0},
    ):
        with pytest.raises(ConfigError, match=next(iter(options))):
            MaskedBinsConfig(**options)


@pytest.mark.slow
@pytest.mark.parametrize("max_genes", [0, 9])
def test_the_table_of_predicted_bins(max_genes):
    task = task_of(max_genes, report_seeds=2, masked=0.5)
    (measured,) = task.evaluators()
    numbers = dict(measured(parameters()))
    assert measured.report is not None
    assert "12 validation cells" in measured.report.title
    names = [row[0] for row in measured.report.rows]
    assert names == ["cell model", "bins of the gene in training", "bins of all genes in training"]
    # A baseline by hand: the shares of bins over all training cells.
    cells = task.dataset("train")
    assert cells is not None
    counts = np.bincount(np.concatenate([cells.record(i)["bins"] for i in range(30)]), minlength=5)[1:]
    shares = (counts + 1) / (counts.sum() + 4)
    entropy = numbers["bins of all genes in training/cross-entropy"]
    assert entropy == pytest.approx(-(shares * np.log(shares)).sum(), rel=0.15)
    assert numbers["bins of the gene in training/cross-entropy"] != entropy
    # A model that knows the answers has them all right.
    measured.predict = lambda variables, batch, rng: (
        jax.nn.log_softmax(9.0 * jax.nn.one_hot(batch["bins"].astype(jnp.int32), 5)),
        batch["bins"] > 0,
    )
    perfect = dict(measured(parameters()))
    assert perfect["cell model/accuracy"] == 1
    assert 0 < perfect["bins of the gene in training/accuracy"] < 1
    assert set(flatten(perfect)) == set(numbers)
