"""The masked-expression objective and stages of training."""

from __future__ import annotations

import dataclasses
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sct
from sct.data import masking
from sct.data.datasets import simulate_atlas
from sct.data.ingest.build import IngestOptions, ingest
from sct.data.masking import Masking
from sct.data.store import Store
from sct.errors import CheckpointError, ConfigError
from sct.families.tasks import make_task
from sct.models.sct_config import SCTConfig
from sct.nn.paths import flatten
from sct.tasks.masked_expression import MaskedExpression, MaskedExpressionConfig
from sct.train.experiment import run

from .conftest import merged


@pytest.fixture
def task(config):
    plain = config()
    return make_task(plain, Store.open(plain["data"]["store"]))[0]


@pytest.fixture
def batch(task):
    bags = [task.dataset("train").record(i) for i in range(2)]
    stacked = {key: jnp.stack([bag[key] for bag in bags]) for key in bags[0]}
    return {**stacked, "example_mask": jnp.ones(2)}


@pytest.fixture
def variables(task):
    return nn.unbox(task.init(jax.random.key(1)))


@pytest.mark.slow
def test_a_budget_for_the_head_that_holds_all_changes_nothing(task, batch, variables):
    rng = jax.random.key(0)
    dense, sums = task.loss(variables, batch, rng, True)
    task.config = dataclasses.replace(task.config, max_masked_fraction=0.5)
    sparse, others = task.loss(variables, batch, rng, True)
    np.testing.assert_allclose(dense, sparse, rtol=1e-5)
    np.testing.assert_array_equal(sums["confusion"], others["confusion"])
    assert others["dropped_targets"] == 0
    assert 0 < sums["masked"] < 0.5 * batch["tokens"].size


@pytest.mark.slow
def test_a_budget_that_is_too_small_is_counted(task, batch, variables):
    rng = jax.random.key(0)
    _, dense = task.loss(variables, batch, rng, True)
    task.config = dataclasses.replace(task.config, max_masked_fraction=0.01)
    _, sums = task.loss(variables, batch, rng, True)
    assert sums["dropped_targets"] > 0
    assert sums["dropped_targets"] + sums["masked"] == dense["masked"]
    assert task.compute_metrics(jax.device_get(sums))["dropped_targets"] == sums["dropped_targets"]


@pytest.mark.slow
@pytest.mark.parametrize("adjusted", [True, False])
def test_the_loss_is_cross_entropy_at_masked_positions_only(task, batch, variables, adjusted):
    task.config = dataclasses.replace(task.config, logit_adjustment=adjusted)
    rng = jax.random.key(0)
    loss, sums = task.loss(variables, batch, rng, False)
    tokens = np.asarray(batch["tokens"])
    mask = np.asarray(task.config.masking(rng, tokens, 5))
    logits = np.array(task.model.apply(variables, np.where(mask, 6, tokens))["logits"])
    if adjusted:
        logits[..., 0] += np.log(0.01 / 0.15)  # masking rate of unexpressed genes, relative to expressed ones
    chosen = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), tokens[..., None].astype(int), -1)
    np.testing.assert_allclose(loss, -chosen[..., 0][mask].mean(), rtol=1e-5)
    assert sums["confusion"].sum() == mask.sum()
    np.testing.assert_array_equal(sums["confusion"].sum(1), np.bincount(tokens[mask], minlength=5))


RULES = {
    "stratified": Masking(),
    "uniform": Masking("uniform", expressed=0.2),
    "drawn": Masking("drawn"),
    "drawn_uniform": Masking("drawn_uniform"),
    "drawn_genes": Masking("drawn_genes"),
    "cells": Masking("cells"),
    "genes": Masking("genes", genes=tuple(range(0, 1000, 3))),
    "ratio": Masking("ratio", expressed=0.3),
    "mixture": Masking("mixture", mixture=(("stratified", 1.0), ("drawn_uniform", 1.0), ("cells", 1.0))),
}


class Constant(MaskedExpression):
    """Says the same of every gene: its variables are the logits."""

    def __init__(self, rule: Masking):
        self.config, self.model_config = MaskedExpressionConfig(masking=rule), SCTConfig(num_genes=1024)

    def _outputs(self, variables, tokens, *rest):
        return {"logits": jnp.broadcast_to(variables, (*tokens.shape, 7))}


@pytest.mark.slow
def test_the_best_logits_are_those_of_an_ordinary_gene_for_every_kind_of_masking():
    assert set(RULES) == {*masking.KINDS, masking.MIXTURE}
    share = np.asarray([0.62, 0.2, 0.1, 0.05, 0.03])
    tokens = np.random.default_rng(0).choice(5, (32, 4, 1000), p=share).astype(np.uint8)
    batch = {
        "tokens": jnp.asarray(tokens),
        "measured": jnp.ones((32, 1000), bool),
        "example_mask": jnp.ones(32),
    }
    wrong = []
    for name, rule in RULES.items():
        task = Constant(rule)
        gradient = jax.grad(lambda x, task=task: task.loss(x, batch, jax.random.key(1), True)[0])
        # At the frequencies of all genes the adjusted loss is stationary, and elsewhere it is not.
        logits = jnp.asarray([*np.log(share), -30, -30])
        if np.abs(gradient(logits)).max() > 0.02 or np.abs(gradient(logits.at[0].add(1.0))).max() < 0.1:
            wrong.append(name)
    assert not wrong


def test_genes_that_were_not_measured_are_never_targets(task, batch, variables):
    rng = jax.random.key(0)
    measured = np.asarray(batch["measured"]).copy()
    assert measured[:, :100].all()
    assert not measured[:, 100:].any(), "padding is not measured"
    measured[0, ::2] = False
    fewer = {**batch, "measured": jnp.asarray(measured)}
    tokens = np.asarray(batch["tokens"])
    for rule in (
        Masking(),
        Masking("uniform", expressed=0.5),
        Masking("ratio", expressed=0.5),
        Masking("cells"),
    ):
        task.config = dataclasses.replace(task.config, masking=rule)
        _, sums = task.loss(variables, fewer, rng, False)
        eligible = np.where(measured[:, None], tokens, 5)
        mask = np.asarray(rule(rng, jnp.asarray(eligible), 5))
        assert not mask[0][:, ::2].any()
        assert sums["masked"] == mask.sum() > 0


def test_padding_takes_no_part(task, batch, variables):
    rng = jax.random.key(0)
    filled = {**batch, "example_mask": jnp.array([1.0, 0.0])}
    _, sums = task.loss(variables, filled, rng, False)
    mask = np.asarray(task.config.masking(rng, batch["tokens"], 5))
    assert sums["masked"] == mask[0].sum()
    assert not mask[np.asarray(batch["tokens"]) == 5].any()


@pytest.mark.slow
def test_spatial_training_goes_on_where_training_on_cells_stopped(config, tmp_path):
    first = config(train__steps=4)
    run(first, tmp_path / "cells")
    parent = dataclasses.replace(sct.load(tmp_path / "cells"), license="cc-by-nc-sa-4.0", card="")
    parent.save_pretrained(tmp_path / "parent")
    slides = [
        (f"slide{i}", slide) for i, slide in enumerate(simulate_atlas(2, 40, 100, spatial=True, seed=3))
    ]
    genes = Store.open(first["data"]["store"]).vocabulary
    options = IngestOptions(validation=("slide1",))
    ingest(slides, tmp_path / "slides", vocabulary=genes, options=options)
    second = merged(
        first,
        init_from=str(tmp_path / "parent"),
        data__store=str(tmp_path / "slides"),
        model__use_spatial=True,
        train__steps=1,
    )
    result = run(second, tmp_path / "spatial")
    before = flatten(sct.load(tmp_path / "cells").variables)
    after = flatten(sct.load(tmp_path / "spatial").variables)
    assert set(after) - set(before) == {"params/spatial/kernel", "params/spatial/bias"}
    assert result.progress.step == 1
    assert sct.load(tmp_path / "spatial").license == "cc-by-nc-sa-4.0"
    shutil.rmtree(tmp_path / "parent")
    assert run(second, tmp_path / "spatial").reason == "finished"  # the parent is not needed any more
    # One step at the initial rate moves parameters by at most about that rate.
    assert max(np.abs(after[path] - before[path]).max() for path in before) < 2e-4


@pytest.mark.slow
def test_starting_from_another_model_lists_the_differences(config, tmp_path):
    run(config(train__steps=1), tmp_path / "a")
    other = config(train__steps=1, init_from=str(tmp_path / "a"), model__num_layers=2, model__ffn_dim=64)
    with pytest.raises(CheckpointError) as error:
        run(other, tmp_path / "b")
    message = str(error.value)
    assert "- params/transformer_1/mlp/up/kernel (32, 64)" in message
    assert "~ params/transformer_0/mlp/up/kernel (32, 32) instead of (32, 64)" in message
    with pytest.raises(CheckpointError, match="does not exist"):
        run(config(init_from=str(tmp_path / "nowhere")), tmp_path / "c")


def test_configuration_errors_say_what_to_do(config, tmp_path):
    cases = [
        (config(data__store=""), "data.store and data.dataset"),
        (config(data__store="", data__dataset="pbmc"), "pbmc68k.*give a store"),
        (config(model__widht=3), "option of model .* is 'widht'"),
        (config(model__num_layers="two"), "must be of type int"),
        (config(model__num_genes=64), "vocabulary has 100 genes"),
        (config(modle={}), "section .* is 'modle'"),
        (config(model__use_spatial=True), "no training study of .* has coordinates"),
        (config(data__cells_per_bag=61), "largest training study has only 60 cells"),
        (config(optimizer__peak_lr=float("nan")), "peak_lr is nan"),
        (config(model=3), "model is 3, .*named options"),
        (config(model__num_downsamples="3"), "num_downsamples is '3'"),
        (config(task="other"), "task is 'other', but must be one of .masked_expression"),
        (config(family=None), "family is None"),
        (config(optimizer__clip_norm=-1.0), "clip_norm is -1.0"),
        (config(optimizer__b1=2.0), "b1 is 2.0"),
        (config(objective__max_masked_fraction=-1.0), "max_masked_fraction is -1.0"),
        (config(objective__report_seeds=0), "report_seeds is 0"),
        (
            config(objective__masking={"kind": "uniform"}, objective__max_masked_fraction=0.05),
            "max_masked_fraction above",
        ),
        (config(objective__masking={"unexpressed": 0.0}), "logit_adjustment=False"),
        (config(train__patience=-1), "train.patience is -1"),
        (config(train__stop_at=-5), "train.stop_at is -5"),
        (config(train__loader_threads=-1), "train.loader_threads is -1"),
        (config(train__steps=0), "train.steps, train.epochs and data.tokens are all 0"),
        (config(train__mesh={"data": 3}), "does not fit"),
        (config(family="sct2"), "family is 'sct2', but must be one of .sct"),
    ]
    for number, (plain, expected) in enumerate(cases):
        with pytest.raises(ConfigError, match=expected):
            run(plain, tmp_path / str(number))
        left = [path.name for path in (tmp_path / str(number)).rglob("*") if path.is_file()]
        assert not {"genes.tsv", "manifest.json"} & set(left) or "does not fit" in expected, left


def test_a_run_folder_must_be_a_folder(config, tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(ConfigError, match="is a file"):
        run(config(), tmp_path / "file")
