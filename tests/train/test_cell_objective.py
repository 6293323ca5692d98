"""The terms of the masked-expression objective that train the embedding of a cell."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sct
from sct.data import masking
from sct.data.datasets import simulate_atlas
from sct.data.ingest.build import IngestOptions, ingest
from sct.data.masking import Masking
from sct.data.store import Store
from sct.errors import CheckpointError, ConfigError
from sct.families.tasks import make_task
from sct.models import registry
from sct.models.cell_code import CellCode, flat_cells
from sct.models.sct import SCT
from sct.models.sct_config import SCTConfig
from sct.nn.cell_losses import info_nce, supervised_contrast
from sct.nn.paths import flatten, unflatten
from sct.tasks import masked_objective
from sct.tasks.masked_objective import MaskedExpressionConfig, MaskedObjective, other_places
from sct.train import resume, sharding
from sct.train.experiment import run
from sct.train.run_spec import RunSpec
from sct.train.start import begin
from sct.train.state import init_state, make_train_step
from sct.weights.pretrained import Pretrained

from .conftest import learn, read_log, same

BAGS, CELLS, GENES = 3, 4, 32
PLAIN = SCTConfig(
    num_genes=GENES,
    token_embed_dim=32,
    embed_dim=32,
    num_downsamples=1,
    num_layers=1,
    num_heads=2,
    ffn_dim=32,
)
CODED = dataclasses.replace(PLAIN, code_dim=6)
HIDING = Masking("mixture", mixture=(("drawn", 1.0), ("cells", 1.0)))
KEY = jax.random.key(4)
ALL_TERMS = {
    "model__code_dim": 8,
    "objective__cell_decoding": 3.0,
    "objective__cell_decoding_genes": 40,
    "objective__skip_dropout": 0.4,
    "objective__contrast": 0.5,
    "objective__label_contrast": 0.3,
    "objective__monitor": "cell_decoding",
    "data__label_key": "cell_type",
    "data__thinning": (0.3, 1.0),
}


def batch(full: bool = False) -> dict[str, jax.Array]:
    """Three bags. The first two are from one study, and share a cell.

    The last two genes are not measured, nor are the first five in the third bag. The last cell of the second bag is
    padding. One cell has no label.
    """
    rng = np.random.default_rng(0)
    tokens = rng.choice(5, (BAGS, CELLS, GENES), p=[0.5, 0.2, 0.1, 0.1, 0.1]).astype(np.uint8)
    measured = np.ones((BAGS, GENES), bool)
    measured[:, -2:] = measured[2, :5] = False
    tokens[:, :, -2:] = tokens[1, 3] = PLAIN.pad
    rows = np.arange(BAGS * CELLS, dtype=np.int32).reshape(BAGS, CELLS)
    rows[1, 0] = rows[0, 2]  # a cell that is in two bags
    found = {
        "tokens": tokens,
        "measured": measured,
        "rows": rows,
        "study": np.array([0, 0, 1], np.int32),
        "random_cells": np.zeros(BAGS, bool),
        "labels": np.array([[0, 1, 1, -1], [1, 0, 0, 0], [2, 1, 2, 0]], np.int32),
        "example_mask": np.array([1, 1, 1], np.float32),
    }
    if full:
        more = rng.integers(0, 5, tokens.shape).astype(np.uint8)
        found["full_tokens"] = np.where(tokens == PLAIN.pad, tokens, np.maximum(tokens, more))
    return {name: jnp.asarray(value) for name, value in found.items()}


def objective(model: SCTConfig = CODED, **options: Any) -> MaskedObjective:
    return MaskedObjective(MaskedExpressionConfig(masking=HIDING, **options), model, CELLS)


@pytest.fixture(scope="module")
def variables() -> Any:
    """Random variables of the coded model, with a decoder that is not near its start."""
    made = nn.unbox(objective(cell_decoding=1.0).init(jax.random.key(1)))
    made["params"]["cell_code"]["table"] *= 30
    made["params"]["cell_code"]["bias"] += np.random.default_rng(1).normal(size=(GENES, 5))
    return made


def loss_of(task: MaskedObjective, variables: Any, given: Any, train: bool) -> Any:
    made = jax.jit(task.loss, static_argnums=3)(variables, given, KEY, train)
    return jax.device_get(made)


def visible(given: Any, mask: np.ndarray) -> np.ndarray:
    seen = np.asarray(given["measured"])[:, None] & (np.asarray(given["tokens"]) < 5)
    return (seen & ~mask).any(-1)


def mask_of(given: Any, tokens: Any = None, key: Any = KEY) -> np.ndarray:
    tokens = given["tokens"] if tokens is None else tokens
    return np.asarray(HIDING(key, jnp.where(given["measured"][:, None], tokens, jnp.uint8(5)), 5))


class Informed(MaskedObjective):
    """Knows the frequencies of levels."""

    def level_prior(self) -> np.ndarray:
        prior = np.random.default_rng(2).dirichlet(np.ones(5), GENES)
        return np.log(prior).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("train", [True, False])
def test_cell_decoding_is_the_cross_entropy_of_all_measured_genes_given_the_code_alone(variables, train):
    given = batch(full=True)
    options = MaskedExpressionConfig(masking=HIDING, cell_decoding=2.0)
    task = Informed(options, CODED, CELLS)
    loss, sums = loss_of(task, variables, given, train)
    mask = mask_of(given)
    cells = visible(given, mask)
    assert 0 < cells.sum() < 11, "some cells are hidden, and one is padding"
    code = task.model.apply(variables, masking.apply(given["tokens"], jnp.asarray(mask), 5))["code"]
    logits = task.model.apply(variables, code, method="decode_code")
    log_shares, prior = np.asarray(jax.nn.log_softmax(logits)), task.level_prior()
    losses, of_prior = [], []
    for bag, cell in zip(*np.nonzero(cells), strict=True):
        genes = np.flatnonzero(given["measured"][bag])
        levels = np.asarray(given["full_tokens"])[bag, cell, genes]
        losses.append(-log_shares[bag, cell, genes, levels].mean())
        of_prior.append(-prior[genes, levels].mean())
    assert sums["decoded_cells"] == len(losses)
    np.testing.assert_allclose(sums["cell_decoding"], np.sum(losses), rtol=1e-5)
    metrics = task.compute_metrics(sums)
    np.testing.assert_allclose(metrics["cell_decoding"], np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(metrics["cell_decoding_gain"], np.mean(of_prior) - np.mean(losses), rtol=1e-4)
    np.testing.assert_allclose(loss, metrics["loss"] + 2 * np.mean(losses), rtol=1e-5)
    # Without the term, the rest of the loss is the same.
    others = objective(PLAIN)
    params = {name: tree for name, tree in variables["params"].items() if name != "cell_code"}
    np.testing.assert_allclose(
        loss_of(others, {"params": params}, given, train)[0], metrics["loss"], rtol=1e-6
    )


@pytest.mark.slow
def test_a_budget_of_genes_draws_measured_genes(variables):
    given = {**batch(), "measured": batch()["measured"].at[2, :5].set(True)}
    _, whole = loss_of(objective(cell_decoding=1.0), variables, given, True)
    _, drawn = loss_of(objective(cell_decoding=1.0, cell_decoding_genes=30), variables, given, True)
    np.testing.assert_allclose(drawn["cell_decoding"], whole["cell_decoding"], rtol=1e-5)
    _, few = loss_of(objective(cell_decoding=1.0, cell_decoding_genes=10), variables, given, True)
    assert abs(few["cell_decoding"] / whole["cell_decoding"] - 1) > 1e-3
    _, evaluated = loss_of(objective(cell_decoding=1.0, cell_decoding_genes=10), variables, given, False)
    np.testing.assert_allclose(evaluated["cell_decoding"], whole["cell_decoding"], rtol=1e-5)


def test_the_code_of_a_cell_depends_on_its_own_transformer_output_alone(variables):
    inner = jax.random.normal(jax.random.key(0), (2, CELLS * GENES // 2, 32)) * 3 + 1
    module = CellCode(CODED)
    params = {"params": variables["params"]["cell_code"]}
    code = module.apply(params, inner, CELLS)
    changed = module.apply(params, inner.at[:, GENES // 2 : GENES, :16].add(1.0), CELLS)
    np.testing.assert_array_equal(np.delete(changed, 1, axis=1), np.delete(code, 1, axis=1))
    assert np.abs(changed[:, 1] - code[:, 1]).max() > 1e-3
    assert code.shape == (2, CELLS, 6)
    assert code.dtype == np.float32
    flat = flat_cells(inner, CELLS)
    np.testing.assert_allclose(flat.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(flat.std(-1), 1, rtol=1e-3)
    # The scale of the transformer's output has no effect.
    np.testing.assert_allclose(module.apply(params, inner * 10, CELLS), code, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_every_term_has_a_gradient_in_the_transformer(variables):
    given = batch()
    names = {"cell_decoding": "cell_decoding", "contrast": "contrast", "label_contrast": "label_contrast"}
    for option, name in names.items():
        task = objective(**{option: 1.0})
        gradient = jax.jit(jax.grad(lambda v, task=task, name=name: task.loss(v, given, KEY, True)[1][name]))(
            variables
        )
        norms = {path: float(np.linalg.norm(value)) for path, value in flatten(gradient).items()}
        for path, norm in norms.items():
            after = path.startswith(("params/up_", "params/head"))
            of_decoder = path.startswith(("params/cell_code/table", "params/cell_code/bias"))
            if after or (of_decoder and option != "cell_decoding"):
                assert norm == 0, path
            elif "transformer" in path and "key/bias" not in path:
                assert norm > 0, path


@pytest.mark.slow
def test_dropping_all_skips_is_a_model_without_skips(variables):
    given, plain = batch(), {"params": {k: v for k, v in variables["params"].items() if k != "cell_code"}}
    never = objective(dataclasses.replace(PLAIN, use_skip_connection=False))
    dropped, always = objective(PLAIN, skip_dropout=1.0), objective(PLAIN)
    expected = loss_of(never, plain, given, True)[0]
    np.testing.assert_allclose(loss_of(dropped, plain, given, True)[0], expected, rtol=1e-6)
    whole = loss_of(always, plain, given, False)[0]
    assert abs(whole - expected) > 1e-3
    np.testing.assert_array_equal(loss_of(dropped, plain, given, False)[0], whole)
    # Each bag as a whole.
    tokens = np.asarray(given["tokens"])
    keep = np.array([True, False, True])
    outputs = [
        np.asarray(SCT(model).apply(plain, tokens, None, None, each)["logits"])
        for model, each in ((PLAIN, keep), (PLAIN, None), (never.model_config, None))
    ]
    np.testing.assert_allclose(outputs[0][keep], outputs[1][keep], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(outputs[0][~keep], outputs[2][~keep], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("model", [CODED, PLAIN], ids=["code", "flat"])
def test_the_contrasts_compare_two_views_of_the_cells(variables, model):
    given = batch(full=True)
    if model is PLAIN:
        variables = {"params": {k: v for k, v in variables["params"].items() if k != "cell_code"}}
    task = objective(model, contrast=0.5, label_contrast=0.25, contrast_temperature=0.2)
    loss, sums = loss_of(task, variables, given, True)
    first = mask_of(given)
    second = mask_of(given, given["full_tokens"], jax.random.fold_in(KEY, masked_objective._OTHER_VIEW))
    views = []
    for tokens, mask in ((given["tokens"], first), (given["full_tokens"], second)):
        outputs = task.model.apply(variables, masking.apply(tokens, jnp.asarray(mask), 5))
        cells = outputs["code"] if model.code_dim else flat_cells(outputs["transformer_out"], CELLS)
        views.append(cells.reshape(BAGS * CELLS, -1))
    twice = np.zeros((12, 12), bool)
    twice[2, 4] = twice[4, 2] = True
    seen = [visible(given, mask).ravel() for mask in (first, second)]
    both = seen[0] & seen[1]
    labels = given["labels"].ravel()
    alike = (labels[:, None] == labels) & (labels >= 0)
    losses = info_nce(*views, 0.2, jnp.asarray(both), twice | alike)
    np.testing.assert_allclose(sums["contrast"], losses.sum(), rtol=1e-4)
    assert sums["contrast_cells"] == both.sum()
    alone = loss_of(objective(model, contrast=0.5, contrast_temperature=0.2), variables, given, True)[1]
    losses = info_nce(*views, 0.2, jnp.asarray(both), jnp.asarray(twice))
    np.testing.assert_allclose(alone["contrast"], losses.sum(), rtol=1e-4)
    losses, counted = supervised_contrast(views[0], labels, 0.2, jnp.asarray(seen[0]), jnp.asarray(twice))
    np.testing.assert_allclose(sums["label_contrast"], losses.sum(), rtol=1e-4)
    assert sums["label_contrast_cells"] == counted.sum()
    metrics = task.compute_metrics(sums)
    total = metrics["loss"] + 0.5 * metrics["contrast"] + 0.25 * metrics["label_contrast"]
    np.testing.assert_allclose(loss, total, rtol=1e-5)
    evaluated, without = loss_of(task, variables, given, False)
    assert without.keys() == sums.keys()
    assert not {"contrast", "label_contrast"} & set(task.compute_metrics(without))
    np.testing.assert_allclose(evaluated, task.compute_metrics(without)["loss"], rtol=1e-6)


@pytest.mark.slow
def test_the_second_view_has_no_coordinates():
    task = objective(dataclasses.replace(CODED, use_spatial=True, num_scales=2), contrast=1.0)
    made = nn.unbox(task.init(jax.random.key(1)))
    kernel = made["params"]["spatial"]["kernel"]
    made["params"]["spatial"]["kernel"] = kernel + jax.random.normal(KEY, kernel.shape)
    places = jax.random.uniform(jax.random.key(2), (BAGS, CELLS, 2)) * 30
    given = {**batch(), "coordinates": places}
    first = mask_of(given)
    second = mask_of(given, key=jax.random.fold_in(KEY, masked_objective._OTHER_VIEW))
    both = jnp.asarray((visible(given, first) & visible(given, second)).ravel())
    rows, study = given["rows"].ravel(), jnp.repeat(given["study"], CELLS)
    twice = (rows[:, None] == rows) & (study[:, None] == study) & ~jnp.eye(BAGS * CELLS, dtype=bool)
    expected = []
    for others in (None, places):
        views = [
            task.model.apply(
                made, masking.apply(given["tokens"], jnp.asarray(mask), 5), where, method="cell_vectors"
            ).reshape(BAGS * CELLS, -1)
            for mask, where in ((first, places), (second, others))
        ]
        expected.append(float(info_nce(*views, 0.1, both, twice).sum()))
    found = loss_of(task, made, given, True)[1]["contrast"]
    np.testing.assert_allclose(found, expected[0], rtol=1e-4)
    assert abs(expected[1] / found - 1) > 0.01, "with coordinates, the loss is another one"


@pytest.mark.slow
@pytest.mark.parametrize("padded", [False, True])
def test_microbatches_are_weighted_by_their_masked_genes(padded):
    """The kind "ratio" masks equally many genes in each cell, so that microbatches have equal weights."""
    terms = {"cell_decoding": 2.0, "skip_dropout": 0.5, "contrast": 1.0, "label_contrast": 0.5}
    options = MaskedExpressionConfig(masking=Masking("ratio", expressed=0.25), **terms)
    task = MaskedObjective(options, CODED, CELLS)
    bags = {name: jnp.concatenate([each, each])[:4] for name, each in batch().items()}
    bags |= {"measured": jnp.ones_like(bags["measured"]), "tokens": bags["tokens"] % 5}
    bags |= {"example_mask": jnp.array([1, 1, 1, 1.0 - padded])}
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1), jax.devices()[:1])
    abstract, make = init_state(task, lambda shapes: optax.sgd(1.0), mesh, seed=0)
    step, state = make_train_step(task, optax.sgd(1.0), mesh, abstract, microbatch=2), make()
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), 0)
    gradient_of = jax.jit(
        jax.grad(lambda trained, part, key: task.loss(unflatten(trained), part, key, True), has_aux=True)
    )
    found = [
        gradient_of(state.trained, {k: v[i::2] for k, v in bags.items()}, jax.random.fold_in(key, i))
        for i in range(2)
    ]
    weights = np.array([sums["masked"] for _, sums in found])
    assert weights[0] == weights[1] * (1 + padded) > 0
    shares = weights / weights.sum()
    before = jax.device_get(state.trained)
    after = jax.device_get(step(state, sharding.put_batch(jax.device_get(bags), mesh))[0].trained)
    for path, value in before.items():
        expected = sum(
            share * np.asarray(gradient[path]) for share, (gradient, _) in zip(shares, found, strict=True)
        )
        np.testing.assert_allclose(
            value - after[path], expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max() + 1e-6, err_msg=path
        )


def test_one_cell_cannot_be_compared(variables):
    one = {
        name: value[:1, :1] if value.ndim > 1 and name != "measured" else value[:1]
        for name, value in batch().items()
    }
    for name in ("contrast", "label_contrast"):
        with pytest.raises(ConfigError, match=r"data\.cells_per_bag.*train\.batch_size"):
            jax.eval_shape(lambda v, name=name: objective(**{name: 1.0}).loss(v, one, KEY, True), variables)
    jax.eval_shape(lambda v: objective(cell_decoding=1.0).loss(v, one, KEY, True), variables)


@pytest.mark.slow
def test_terms_do_not_depend_on_what_is_saved_for_the_backward_pass():
    model = dataclasses.replace(CODED, norm="layer", conv_boundary="cell", use_spatial=True, num_scales=2)
    terms = {"cell_decoding": 1.0, "skip_dropout": 0.5, "contrast": 1.0, "label_contrast": 1.0}
    places = np.random.default_rng(0).random((BAGS, CELLS, 2)) * 30
    places[0] = np.nan
    given = {**batch(full=True), "coordinates": jnp.asarray(places, jnp.float32)}
    given["random_cells"] = jnp.array([True, False, False])
    made, found = nn.unbox(objective(model, **terms).init(KEY)), []
    for remat in ("none", "products", "level"):
        task = objective(dataclasses.replace(model, remat=remat), **terms)
        step = jax.jit(jax.value_and_grad(lambda v, task=task: task.loss(v, given, KEY, True)[0]))
        found.append(jax.device_get(step(made)))
    for loss, gradient in found[1:]:
        np.testing.assert_allclose(loss, found[0][0], rtol=1e-6)
        for path, value in flatten(gradient).items():
            expected = flatten(found[0][1])[path]
            np.testing.assert_allclose(value, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max() + 1e-7)
    assert np.linalg.norm(found[0][1]["params"]["spatial"]["kernel"]) > 0


def test_cells_move_within_their_study_and_only_from_bags_of_random_cells():
    study, mixed = jnp.array([1, 0, 1, 0, 0]), jnp.array([True, True, True, False, True])
    own, of = np.arange(20), np.repeat(study, 4)
    moved = []
    for seed in range(4):
        taken = np.asarray(other_places(jax.random.key(seed), study, mixed, 4))
        np.testing.assert_array_equal(np.sort(taken), own)
        np.testing.assert_array_equal(of[taken], of)
        np.testing.assert_array_equal(taken[12:16], own[12:16])
        moved.append(taken // 4 != own // 4)
    assert (np.mean(moved, axis=0)[np.repeat(mixed, 4)] > 0).mean() > 0.8
    assert len({bytes(each) for each in moved}) == 4


@pytest.mark.slow
def test_a_code_that_does_not_depend_on_the_bag_is_found_in_other_bags(variables):
    """Codes of a model without attention and across no cell border are the same wherever the cell lies."""
    model = dataclasses.replace(CODED, num_layers=0, conv_boundary="cell")
    params = {k: v for k, v in variables["params"].items() if not k.startswith("transformer")}
    given = {**batch(), "random_cells": jnp.ones(BAGS, bool)}
    # Masks of so few genes that both views of a cell are almost the same.
    rule = Masking("uniform", expressed=0.001)
    losses = []
    for each in (given, {**given, "random_cells": jnp.zeros(BAGS, bool)}):
        task = MaskedObjective(MaskedExpressionConfig(masking=rule, contrast=1.0), model, CELLS)
        losses.append(loss_of(task, {"params": params}, each, True)[1]["contrast"])
    np.testing.assert_allclose(losses[0], losses[1], rtol=0.05)


def test_options_that_contradict_each_other_are_refused(config):
    cases = [
        ({"cell_decoding": 1.0}, PLAIN, r"model\.code_dim"),
        ({}, CODED, r"no term of the objective.*init_from"),
        ({"skip_dropout": 0.5}, dataclasses.replace(PLAIN, use_skip_connection=False), "skip_dropout"),
        ({"monitor": "cell_decoding"}, PLAIN, r"objective\.cell_decoding is 0"),
        ({"monitor": "accuracy"}, PLAIN, "monitor"),
        ({"skip_dropout": 1.5}, PLAIN, "skip_dropout"),
        ({"contrast": -1.0}, PLAIN, "contrast"),
        ({"contrast_temperature": 0.0}, PLAIN, "temperature"),
    ]
    for options, model, message in cases:
        with pytest.raises(ConfigError, match=message):
            objective(model, **options)
    store = Store.open(config()["data"]["store"])
    for changes in ({"data__label_key": "domain"}, {"objective__label_contrast": 1.0}):
        with pytest.raises(ConfigError, match=r"data\.label_key"):
            make_task(config(**changes), store)
    with pytest.raises(ConfigError, match="no_such_column"):
        make_task(config(objective__label_contrast=1.0, data__label_key="no_such_column"), store)
    for thinning in ((2.0, 3.0), ("0.2", 1.0), (0.2, None), (0.9, 0.2), (0.0, 1.0), (0.5,)):
        with pytest.raises(ConfigError, match=r"data\.thinning.*\(0\.2, 1\.0\)"):
            make_task(config(data__thinning=thinning), store)


def test_operations_include_the_further_terms():
    alone = objective(PLAIN).operations(3)
    assert objective(cell_decoding=1.0, cell_decoding_genes=10).operations(3) == alone + 3 * CELLS * 2 * (
        GENES // 2 * 32 * 6 + 4 * 6**2 + 10 * 5 * 6
    )
    assert objective(PLAIN, contrast=1.0).operations(3) == alone + SCT.cell_vector_flops(PLAIN, 3, CELLS)


def test_a_model_without_a_code_has_neither_its_parameters_nor_its_output():
    shapes = [
        flatten(
            jax.eval_shape(
                lambda each=each: nn.unbox(SCT(each).init(KEY, jnp.zeros((1, 1, GENES), jnp.uint8)))
            )
        )
        for each in (PLAIN, CODED)
    ]
    new = set(shapes[1]) - set(shapes[0])
    assert new
    assert all(path.startswith("params/cell_code/") for path in new)
    assert set(shapes[0]) < set(shapes[1])
    assert SCT.outputs_of(PLAIN) == ("logits", "cell_embedding")
    assert SCT.outputs_of(CODED) == ("logits", "cell_embedding", "code")


def test_a_run_from_before_the_options_goes_on(tmp_path):
    old = {"family": "sct", "task": "masked_expression", "model": {"num_layers": 1}, "train": {"steps": 3}}
    new = {
        **old,
        "model": {"num_layers": 1, "code_dim": 0},
        "data": {"thinning": ()},
        "objective": {"contrast": 0.0},
    }
    recorded = {**old, "objective": {"logit_adjustment": True}}
    resume.check_options(recorded, RunSpec.of(new), tmp_path)
    with pytest.raises(ConfigError, match=r"model\.code_dim"):
        resume.check_options(
            recorded, RunSpec.of({**new, "model": {"num_layers": 1, "code_dim": 8}}), tmp_path
        )


@pytest.mark.slow
def test_a_run_with_all_terms_resumes_exports_and_loads(config, tmp_path):
    terms = config(
        **ALL_TERMS, train__steps=6, train__eval_every=3, train__checkpoint_every=3, model__norm="layer"
    )
    whole = run(terms, tmp_path / "whole")
    part = {**terms, "train": {**terms["train"], "stop_at": 4, "loader_threads": 0}}
    assert run(part, tmp_path / "parts").reason == "stop_at"
    parts = run(terms, tmp_path / "parts")
    assert same(whole.state.trained, parts.state.trained)
    log = read_log(tmp_path / "whole")
    decoding = [line["validation/cell_decoding"] for line in log if "validation/loss" in line]
    assert len(decoding) == 2
    assert whole.progress.best == min(decoding)
    assert all("validation/cell_decoding_gain" in line for line in log if "validation/loss" in line)
    for name in ("contrast", "label_contrast", "cell_decoding"):
        assert all(np.isfinite(line[f"train/{name}"]) for line in log if "train/loss" in line)

    model = sct.load(tmp_path / "whole" / "model")
    tokens = np.random.default_rng(0).integers(0, 5, (2, 3, model.config.num_genes)).astype(np.uint8)
    outputs = model.apply(tokens=tokens)
    assert set(outputs) == {"logits", "cell_embedding", "code"}
    assert outputs["code"].shape == (2, 3, 8)
    expected = SCT(model.config).apply(model.variables, tokens)["code"]
    np.testing.assert_allclose(outputs["code"], expected, rtol=1e-4, atol=1e-5)
    assert model.config.code_dim == 8
    # A model without a code is a start, too; the decoder then begins at the frequencies of the levels.
    plain = run(config(train__steps=1), tmp_path / "plain")
    assert plain.progress.step == 1
    goes_on = run(config(**ALL_TERMS, train__steps=1, init_from=str(tmp_path / "plain")), tmp_path / "on")
    bias = np.asarray(goes_on.state.trained["params/cell_code/bias"])
    prior = make_task(terms, Store.open(terms["data"]["store"]))[0].level_prior()
    assert np.abs(bias - prior).max() < 2e-4
    assert np.exp(prior[:100]).sum() == pytest.approx(100, rel=1e-4)
    record = json.loads((tmp_path / "whole" / "model" / "config.json").read_text())
    assert record["data"]["thinning"] == [0.3, 1.0]
    assert "the column 'cell_type'" in model.card


@pytest.mark.slow
def test_a_model_with_a_code_is_a_start_with_and_without_the_code(config, tmp_path, capfd):
    few = {
        "train__steps": 1,
        "train__eval_every": 1,
        "train__checkpoint_every": 1,
        "objective__report_bags": 1,
    }
    terms = {"model__code_dim": 8, "objective__cell_decoding": 1.0, **few}
    coded = run(config(**terms), tmp_path / "coded").state.trained
    start = str(tmp_path / "coded")
    with pytest.raises(ConfigError, match=r"model\.code_dim to 0.*init_from"):
        run(config(model__code_dim=8, init_from=start, **few), tmp_path / "untrained")
    capfd.readouterr()
    slow = {"optimizer__peak_lr": 1e-8, "optimizer__init_lr": 1e-9}
    found = run(config(**terms, **slow, init_from=start), tmp_path / "with").state.trained
    assert found.keys() == coded.keys()
    for path, value in coded.items():
        np.testing.assert_allclose(found[path], value, atol=1e-5, err_msg=path)
    assert "code_dim" not in capfd.readouterr().out
    found = run(config(**few, **slow, init_from=start), tmp_path / "without").state.trained
    assert {path for path in coded if not path.startswith("params/cell_code/")} == set(found) < set(coded)
    for path, value in found.items():
        np.testing.assert_allclose(value, coded[path], atol=1e-5, err_msg=path)
    said = capfd.readouterr().out
    assert "params/cell_code/" in said
    assert "--config.model.code_dim=8" in said
    assert sct.load(tmp_path / "without" / "model").config.code_dim == 0


@pytest.mark.slow
def test_a_folder_with_a_part_of_a_code_is_refused(config, variables, tmp_path):
    store = Store.open(config()["data"]["store"])
    model = registry.model_config("sct", {**config()["model"], "code_dim": 8}, len(store.vocabulary))
    whole = nn.unbox(SCT(model).init(KEY, *SCT.example(model).values()))
    paths = flatten(whole)
    for option in (8, 0):
        for missing in ("table", "bias", "code/kernel"):
            part = unflatten({k: v for k, v in paths.items() if k != f"params/cell_code/{missing}"})
            given = dataclasses.replace(model, code_dim=option)
            Pretrained("sct", given, part, store.vocabulary).save_pretrained(tmp_path / "part")
            named = missing if option else "cell_code"
            with pytest.raises(CheckpointError, match=f"params/cell_code/{named}" if option else "cell_code"):
                sct.load(tmp_path / "part")
            spec = RunSpec.of(
                config(model__code_dim=8, objective__cell_decoding=1.0, init_from=str(tmp_path / "part"))
            )
            with pytest.raises(CheckpointError, match="cell_code"):
                begin(spec, tmp_path / "run")


@pytest.mark.slow
def test_all_terms_train_on_slides_in_microbatches(config, tmp_path):
    slides = [(f"slide{i}", each) for i, each in enumerate(simulate_atlas(2, 40, 100, spatial=True, seed=3))]
    genes = Store.open(config()["data"]["store"]).vocabulary
    ingest(slides, tmp_path / "slides", vocabulary=genes, options=IngestOptions(validation=("slide1",)))
    changes = {**ALL_TERMS, "data__label_key": "domain", "data__store": str(tmp_path / "slides")}
    sizes = {
        "train__steps": 2,
        "train__batch_size": 4,
        "train__grad_accum_steps": 2,
        "objective__report_bags": 1,
    }
    result = learn(config(**changes, **sizes, model__use_spatial=True), tmp_path / "run")
    assert result.progress.step == 2
    log = read_log(tmp_path / "run")
    assert all(
        np.isfinite(log[-1][f"validation/{name}"]) for name in ("loss", "cell_decoding", "cell_decoding_gain")
    )
    steps = [line for line in log if "train/loss" in line]
    assert len(steps) == 2
    for line in steps:
        terms = [line[f"train/{name}"] for name in ("cell_decoding", "contrast", "label_contrast")]
        assert all(np.isfinite(terms))
        assert min(terms) > 0
    trained = result.state.trained
    for path in ("params/spatial/kernel", "params/cell_code/code/kernel"):
        assert np.abs(trained[path]).max() > 0, path
    # The bags are those of neighbors with coordinates and labels.
    task, _ = make_task(config(**changes, model__use_spatial=True), Store.open(tmp_path / "slides"))
    bag = task.dataset("train").record(0)
    assert np.isfinite(bag["coordinates"]).all()
    assert not bag["random_cells"]
    assert (bag["labels"] >= 0).any()
    assert (bag["full_tokens"] != bag["tokens"]).any()
