"""Masked values from task to run folder: what is masked, the terms of the loss, what leaks, a run and its table."""

from __future__ import annotations

import dataclasses
from typing import Any

import anndata as ad
import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest

from sct.data.cells import CellCounts
from sct.data.gene_selection import hvg_of
from sct.data.store import Store
from sct.errors import ConfigError
from sct.eval.imputation.value_baselines import ALL as ALL_GENES
from sct.eval.imputation.value_baselines import COMPONENTS, EXPRESSED, GENE, SIZE, TrainingValues
from sct.eval.reports.report import CONTROL, MODEL
from sct.families.tasks import make_task
from sct.inference.token_cells import TokenReader
from sct.models.adapter_kinds import LoraConfig
from sct.models.cell_encoder import STATISTICS, CellEncoder
from sct.nn.cell_losses import elastic_similarity
from sct.nn.paths import flatten
from sct.tasks.adapted import Adapted
from sct.tasks.masked_values import SPEC, MaskedValues, MaskedValuesConfig, TokenData
from sct.tasks.task_spec import TaskInputs
from sct.train import sharding
from sct.train.state import init_state, make_eval_step, make_train_step
from sct.weights.pretrained import Pretrained
from tests.data.text.toy_texts import GENES, ToyStore, study
from tests.random_models import noisy
from tests.train.conftest import learn, merged, read_log, without_times

SIZES = {
    "embed_dim": 16, "num_layers": 2, "num_heads": 2, "ffn_dim": 24, "num_bins": 5, "dropout": 0.0,
    "mvc": "inner product",
}  # fmt: skip
GENERATIVE = {"mode": "generative", "second_pass_weight": 0.5, "mask_ratio": (0.3, 0.7)}
ZEROS = {"mask_zeros": True, "zero_weight": 0.7}
ALL, DONORS = {"genes": "all", "max_genes": 0}, {"batch_key": "tissue", "shared_batches": True}


def task_of(
    model: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    held_out: str = "",
    parent: dict[str, Any] | None = None,
    **options: Any,
) -> MaskedValues:
    """Task of three toy studies. `held_out` is the tissue of all validation cells."""
    studies = [_readable(study(n, name, seed, split)) for n, name, seed, split in (
        (30, "one", 0, "train"), (20, "two", 1, "train"), (12, "three", 2, "validation"),
    )]  # fmt: skip
    if held_out:
        studies[-1].table["tissue"] = held_out
    inputs = TaskInputs(
        "scgpt", {**SIZES, **(model or {})}, MaskedValuesConfig(**options),
        TokenData(**{"max_genes": 10, **(data or {})}), ToyStore(*studies), 0, None, parent,
    )  # fmt: skip
    return SPEC.make(inputs)


def measured_in_part(each: Any, number: int) -> None:
    """The first `number` genes alone were measured."""
    each.measured = np.arange(GENES) < number
    each.counts = each.counts.multiply(each.measured).tocsr()


def _readable(each: Any) -> Any:
    each.spatial = False
    each.measured = np.ones(GENES, bool)
    each.read_rows = lambda rows: each.counts[rows]
    return each


def batch_of(task: MaskedValues, number: int = 6, split: str = "train") -> dict[str, np.ndarray]:
    source = task.dataset(split)
    assert source is not None
    records = [source.record(i) for i in range(number)]
    made = {name: np.stack([r[name] for r in records]) for name in records[0]}
    return {**made, "example_mask": np.ones(number, np.float32)}


def variables_of(task: Any) -> Any:
    made = noisy(nn.unbox(jax.jit(task.init)(jax.random.key(0))), 0.2)
    if STATISTICS in made:
        made[STATISTICS] = jax.tree.map(lambda x: jnp.abs(x) + 0.5, made[STATISTICS])
    return made


CASES = [
    ({}, {}, {}),
    ({"mvc": ""}, {"genes": "top"}, {"mvc_weight": 0.0, "mask_ratio": (0.2, 0.9)}),
    ({"values": "category", "norm": "pre"}, {"genes": "expressed", "max_genes": 14}, {"value_weight": 0.0}),
    ({"flags": True}, {"values": "log1p"}, GENERATIVE),
    ({"flags": True, "cell_embedding": "w-pool"}, ALL, {**GENERATIVE, "mask_zeros": True}),
    ({"explicit_zero": True}, ALL, ZEROS),
    ({"explicit_zero": True, "flags": True}, ALL, {**GENERATIVE, **ZEROS}),
    ({"cell_embedding": "avg-pool"}, {}, {"ecs_weight": 2.0, "ecs_threshold": 0.6}),
    ({"dab": True, "domain_norm": "affine"}, DONORS, {"dab_weight": 0.4}),
]


def test_the_loss_is_the_weighted_sum_of_its_terms():
    """From the outputs of the whole model, in float64; filled-up cells count nowhere."""
    failures = []
    for model, data, options in CASES:
        task = task_of(model, data, **options)
        variables, key, config = variables_of(task), jax.random.key(5), task.config
        batch = batch_of(task)
        batch["example_mask"][-1] = 0
        loss, sums = jax.jit(task.loss, static_argnums=3)(variables, batch, key, False)
        masked = np.asarray(task.mask_genes(jax.random.split(key, 3)[0], batch))
        generative = config.mode == "generative"
        seen = np.where(masked, 0 if generative else task.model_config.mask_value, batch["values"])
        if task.model_config.values == "category":
            seen = seen.astype(np.int32)
        given = {
            "gene_ids": batch["gene_ids"], "values": seen, "padding_mask": batch["padding_mask"],
            "batch_labels": batch.get("batch_labels"),
        }  # fmt: skip
        module = CellEncoder(task.model_config)
        if generative:
            given["generated"] = jnp.asarray(masked)
        made = module.apply(variables, **given)
        true, real = np.float64(batch["values"][masked]), batch["example_mask"] > 0

        def error(name, made=made, true=true, masked=masked):
            return ((np.float64(made[name])[masked] - true) ** 2).mean()

        def unlikely(method, *given, true=true, masked=masked, module=module, variables=variables):
            made = module.apply(variables, *given, method=method)[1]
            logits = np.float64(made)[masked]  # probabilities near 1 are not exact in float32
            return np.logaddexp(0, np.where(true > 0, -logits, logits)).mean()

        expected = config.value_weight * error("mlm_output")
        if config.mvc_weight:
            expected += config.mvc_weight * error("mvc_output")
        if config.zero_weight:
            expected += config.zero_weight * unlikely("value_predictions", made["encoder_output"])
            genes = batch["gene_ids"]
            expected += config.zero_weight * unlikely("mvc_predictions", made["cell_emb"], genes)
        if config.second_pass_weight:
            again = module.apply(variables, **given, cell=made["cell_emb"])
            expected += config.second_pass_weight * error("mlm_output", again)
            if config.zero_weight:
                expected += config.zero_weight * unlikely("value_predictions", again["encoder_output"])
        if config.ecs_weight:
            cells = jnp.asarray(made["cell_emb"])[real]
            similarity = elastic_similarity(cells, config.ecs_threshold, jnp.ones(5))
            expected += config.ecs_weight * float(similarity)
        if config.dab_weight:
            logits, labels = np.float64(made["dab_output"]), batch["batch_labels"]
            losses = np.logaddexp.reduce(logits, axis=1) - logits[np.arange(6), labels]
            expected += config.dab_weight * losses[real].mean()
        found = task.compute_metrics({name: np.asarray(value) for name, value in sums.items()})
        if config.value_weight:
            np.testing.assert_allclose(found["mse"], error("mlm_output"), rtol=1e-4)
            correlation = np.corrcoef(np.float64(made["mlm_output"])[masked], true)[0, 1]
            np.testing.assert_allclose(found["correlation"], correlation, atol=1e-3)
        assert ("correlation" in found, "mvc_correlation" in found) == (
            config.value_weight > 0, config.mvc_weight > 0
        )  # fmt: skip
        if config.mvc_weight:
            correlation = np.corrcoef(np.float64(made["mvc_output"])[masked], true)[0, 1]
            np.testing.assert_allclose(found["mvc_correlation"], correlation, atol=1e-3)
        if abs(float(loss) / expected - 1) > 1e-4 or abs(found["loss"] / expected - 1) > 1e-4:
            failures.append((model, data, options, float(loss), found["loss"], expected))
        assert float(sums["masked"]) == len(true) > 4
    assert not failures


def gradient_of_a_term(term: str, model: Any, data: Any, **options: Any) -> tuple[Any, Any, Any, Any]:
    """The gradient that a term of weight 0.5 adds, by path; the task, its variables and its batch."""
    tasks = [task_of(model, data, **{**options, term: weight}) for weight in (0.5, 0.0)]
    variables, batch = variables_of(tasks[0]), batch_of(tasks[0])

    def gradient(task: Any) -> Any:
        return jax.grad(lambda p: task.loss({**variables, "params": p}, batch, jax.random.key(3), False)[0])

    found, other = (flatten(gradient(task)(variables["params"])) for task in tasks)
    return {path: value - other[path] for path, value in found.items()}, tasks[0], variables, batch


def test_the_gradient_of_the_discriminator_is_reversed_in_the_encoder_alone():
    found, task, variables, batch = gradient_of_a_term("dab_weight", {"dab": True}, DONORS)
    masked = task.mask_genes(jax.random.split(jax.random.key(3), 3)[0], batch)

    def loss(params: Any) -> jax.Array:
        every = {**variables, "params": params}
        _, cells, _ = task._hidden(every, batch, masked, None)
        logits = task.model.apply(every, cells, method=lambda module, cells: module.discriminator(cells))
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["batch_labels"]).mean()

    straight, wrong = flatten(jax.grad(loss)(variables["params"])), []
    for path, value in straight.items():
        sign = 1 if path.startswith("discriminator") else -1
        wrong += [] if np.abs(found[path] - sign * 0.5 * value).max() <= 1e-5 else [path]
    assert not wrong
    for part in ("discriminator", "layers"):
        assert max(float(jnp.abs(v).max()) for path, v in straight.items() if path.startswith(part)) > 1e-3


def test_the_second_pass_has_no_gradient_through_the_cell_embedding():
    options = {"mode": "generative", "mask_ratio": (0.5,)}
    found, task, variables, batch = gradient_of_a_term("second_pass_weight", {"flags": True}, {}, **options)
    masked = task.mask_genes(jax.random.split(jax.random.key(3), 3)[0], batch)
    _, constant, _ = task._hidden(variables, batch, masked, None)

    def loss(params: Any, given: Any = constant) -> jax.Array:
        every = {**variables, "params": params}
        cells = task._hidden(every, batch, masked, None)[1] if given is None else given
        hidden, _, _ = task._hidden(every, batch, masked, None, cells)
        values, _ = task.model.apply(every, hidden, method="value_predictions")
        return (jnp.square(values - batch["values"]) * masked).sum() / masked.sum()

    expected, through = (flatten(jax.grad(loss)(variables["params"], g)) for g in (constant, None))
    wrong = [path for path in found if not np.abs(found[path] - 0.5 * expected[path]).max() <= 1e-4]
    assert not wrong
    assert max(float(jnp.abs(through[path] - expected[path]).max()) for path in found) > 1e-2


def test_adapters_have_dropout_where_the_model_has_none():
    """In the layers and in the heads, in training alone."""
    for target in ("attention/query", "value_head", "mvc_head", "discriminator"):
        task = Adapted(
            task_of({"dab": True}, DONORS, dab_weight=1.0, mask_ratio=(1.0,)),
            LoraConfig((target,), rank=2, dropout=0.5),
        )
        variables, batch = variables_of(task), batch_of(task)
        for train in (True, False):
            losses = [float(task.loss(variables, batch, jax.random.key(n), train)[0]) for n in range(2)]
            assert (abs(losses[0] - losses[1]) > 1e-5) == train, (target, losses)


def test_adapters_are_trained_with_the_running_statistics():
    """As the adapted model is evaluated: its statistics do not move."""
    task = Adapted(task_of({"domain_norm": "plain"}, DONORS), _lora())
    variables, batch = variables_of(task), batch_of(task)
    losses = [float(task.loss(variables, batch, jax.random.key(0), train)[0]) for train in (True, False)]
    assert losses[0] == losses[1]
    plain = {name: tree for name, tree in variables.items() if name != "adapters"}
    moving = float(task.task.loss(plain, batch, jax.random.key(0), True)[0])
    assert abs(moving - float(task.task.loss(plain, batch, jax.random.key(0), False)[0])) > 1e-3


def test_operations_are_those_of_the_heads_that_the_loss_uses():
    whole = task_of({"flags": True, "explicit_zero": True, "dab": True}, {**ALL, **DONORS}, **{
        **GENERATIVE, **ZEROS, "dab_weight": 1.0,
    })  # fmt: skip
    model, tokens = whole.model_config, whole.tokens_per_record
    first = CellEncoder.flops(model, 3, tokens)
    assert first < whole.operations(3) < 2 * first
    values = task_of({"flags": True, "explicit_zero": True, "dab": True}, {**ALL, **DONORS}, mvc_weight=0.0)
    alone = dataclasses.replace(model, mvc="", explicit_zero=False, dab=False)
    assert values.operations(3) == CellEncoder.flops(alone, 3, tokens)


def test_what_is_masked():
    """Non-zero values alone or zeros too, with the ratios asked for, and never CLS, padding or filled-up cells."""
    for options, ratios in (({"mask_ratio": (0.4,)}, {0.4}), ({"mask_ratio": (0.2, 0.8)}, {0.2, 0.8})):
        for zeros in (False, True):
            task = task_of({}, ALL, mask_zeros=zeros, **options)
            rng, length = np.random.default_rng(0), 301
            batch = {
                "gene_ids": np.where(np.arange(length) == 0, task.model_config.cls_id, 0) + np.zeros((200, 1), int),
                "values": rng.integers(0, 3, (200, length)), "padding_mask": rng.random((200, length)) < 0.2,
                "example_mask": np.arange(200) < 190,
            }  # fmt: skip
            masked = np.asarray(task.mask_genes(jax.random.key(1), jax.tree.map(jnp.asarray, batch)))
            eligible = ~batch["padding_mask"] & (np.arange(length) > 0) & (np.arange(200) < 190)[:, None]
            eligible &= zeros | (batch["values"] > 0)
            assert not masked[~eligible].any()
            shares = masked[:190].sum(axis=1) / eligible[:190].sum(axis=1)
            nearest = np.array(sorted(ratios))[
                np.abs(shares[:, None] - np.array(sorted(ratios))).argmin(axis=1)
            ]
            assert set(nearest) == ratios
            assert np.abs(shares - nearest).max() < 0.2
            assert abs(masked.sum() / eligible.sum() - np.mean(list(ratios))) < 0.05


def test_masked_values_do_not_leak_into_predictions():
    """Other true values at masked genes change no prediction; generated genes change nothing that is known."""
    for model, data, options in (
        ({}, {}, {}),
        ({"cell_embedding": "w-pool"}, {}, {}),
        ({"flags": True}, {}, GENERATIVE),
        ({"flags": True, "cell_embedding": "w-pool"}, {}, GENERATIVE),
        ({"flags": True, "cell_embedding": "avg-pool", "values": "scaling"}, {}, GENERATIVE),
    ):
        task = task_of(model, data, **options)
        variables, key, batch = variables_of(task), jax.random.key(2), batch_of(task)
        made, masked = task.predict(variables, batch, key)
        other = {**batch, "values": np.where(masked, batch["values"] + 1, batch["values"])}
        again, _ = task.predict(variables, other, key)
        chex.assert_trees_all_equal(made, again)
        shown = {**batch, "values": np.where(masked, batch["values"], batch["values"] + 1)}
        assert np.abs(np.asarray(task.predict(variables, shown, key)[0]["mvc"] - made["mvc"])).max() > 1e-3
        if task.config.mode == "generative":
            rows = np.where(masked, (batch["gene_ids"] + 1) % GENES, batch["gene_ids"])
            _, cells, _ = task._hidden(variables, batch, jnp.asarray(masked), None)
            _, others, _ = task._hidden(variables, {**batch, "gene_ids": rows}, jnp.asarray(masked), None)
            np.testing.assert_allclose(others, cells, atol=1e-6)


def test_batches_that_training_does_not_have():
    """They are left out of the discriminator's loss, and refused where the model reads them."""
    model = {"dab": True, "use_batch_labels": False}
    task = task_of(model, DONORS, "heart", dab_weight=1.0)
    assert task.batches == ("gut", "lung")
    assert task.model_config.num_batches == 2
    assert "12 validation cells" in " ".join(task.notes(True))
    assert not task_of(model, DONORS, dab_weight=1.0).unknown["validation"]
    batch = batch_of(task, split="validation")
    assert (batch["batch_labels"] == -1).all()
    loss, sums = task.loss(variables_of(task), batch, jax.random.key(0), False)
    assert float(sums["dab_cells"]) == float(sums["dab"]) == 0
    assert np.isfinite(float(loss))
    # Before training, not when the evaluation reads these cells.
    with pytest.raises(ConfigError, match=r"12 validation cells.*use_batch_labels"):
        task_of({}, DONORS, "heart")
    # The batches of the model to start from count only for the same column, and must have those of all training cells.
    known = {"batch_key": "tissue", "batches": ["gut", "heart", "lung"]}
    assert task_of(model, DONORS, parent=known, dab_weight=1.0).batches == ("gut", "heart", "lung")
    assert task_of(model, DONORS, parent={**known, "batch_key": "donor"}).batches == ("gut", "lung")
    with pytest.raises(ConfigError, match=r"train cells.*batch_key"):
        task_of(model, DONORS, parent={**known, "batches": ["gut", "heart"]})
    with pytest.raises(ConfigError, match=r"batch_key.*cell_type"):
        task_of({}, {"batch_key": "donor"})
    # Where the model reads them, the parameters of a batch cannot become those of another one.
    with pytest.raises(ConfigError, match=r"'donor'.*'tissue'.*init_from"):
        task_of({}, DONORS, parent={**known, "batch_key": "donor"})
    # Options that cannot be changed in a model to start from are not advised.
    with pytest.raises(ConfigError, match=r"2 batches.*init_from"):
        task_of({**model, "num_batches": 3}, DONORS, parent={})
    with pytest.raises(ConfigError, match=r"objective.dab_weight to 0.*init_from"):
        task_of({}, {}, parent={}, dab_weight=1.0)


def test_equal_names_of_batches_in_several_studies_are_refused():
    with pytest.raises(ConfigError, match=r"2 entries.*'gut' in one, two, three.*shared_batches"):
        task_of({"use_batch_labels": False}, {"batch_key": "tissue"})
    task = task_of({"use_batch_labels": False}, {"batch_key": "own"})
    assert len(task.batches) == 50
    assert task.unknown == {"train": 0, "validation": 12}


def test_the_best_model_is_chosen_without_the_adversarial_term():
    task = task_of({"dab": True}, DONORS, dab_weight=0.4)
    _, sums = task.loss(variables_of(task), batch_of(task), jax.random.key(0), False)
    found = task.compute_metrics({name: np.asarray(value) for name, value in sums.items()})
    assert found["dab_loss"] > 0.1
    assert found[task.monitor] == pytest.approx(found["loss"] - 0.4 * found["dab_loss"], rel=1e-4)
    assert task_of().monitor == "loss"


def test_genes_that_a_study_did_not_measure_are_left_out():
    """They are no zeros to learn from: neither read nor masked."""
    task = task_of({}, ALL, mask_zeros=True, mask_ratio=(1.0,))
    measured_in_part(task.store.studies[0], 9)
    source, seen = task.dataset("train"), {}
    for number in range(len(source)):
        record = source.record(number)
        ids = frozenset(record["gene_ids"][~record["padding_mask"]].tolist()) - {task.model_config.cls_id}
        seen.setdefault(source.describe(number).split("'")[1], set()).add(ids)
        assert record["gene_ids"].shape == (GENES + 1,)
    assert seen == {"one": {frozenset(range(9))}, "two": {frozenset(range(GENES))}}
    batch = batch_of(task, len(source))
    masked = np.asarray(task.mask_genes(jax.random.key(0), batch))
    assert sorted(set(masked.sum(axis=1).tolist())) == [9, GENES]


def test_training_and_embedding_read_the_same_tokens():
    """For every kind of values, also of a study that did not measure all genes."""
    differ = []
    for form, values in (
        ("continuous", "quantiles"), ("category", "quantiles"), ("continuous", "levels"), ("category", "levels"),
        ("scaling", "log1p"),
    ):  # fmt: skip
        task = task_of({"values": form}, {**ALL, "values": values})
        cells, config = task.store.studies[-1], task.model_config
        measured_in_part(cells, 11)
        var = pd.DataFrame(index=list(task.vocabulary.ensembl_ids))
        counts = CellCounts(ad.AnnData(cells.counts, var=var)[:, :11].copy(), task.vocabulary)
        made = TokenReader(Pretrained("scgpt", config, {}, **task.exports()))
        found = made.records(counts, np.arange(cells.n_cells), 0)
        highest = 0.0
        for number in range(cells.n_cells):
            record = task.dataset("validation").record(number)
            highest = max(highest, float(record["values"][~record["padding_mask"]].max()))
            differ += [
                f"{form} {values} {name}"
                for name in ("gene_ids", "values", "padding_mask")
                if not np.array_equal(found[name][record["row"]], record[name])
            ]
        assert values == "log1p" or highest == config.num_bins - 1, (form, values, highest)
    assert not differ


def test_options_that_contradict_each_other():
    for model, data, options, words in (
        ({"mvc": ""}, {}, {}, "model.mvc"),
        ({}, {}, GENERATIVE, "model.flags"),
        ({}, {}, {"second_pass_weight": 1.0}, "second_pass_weight"),
        ({}, {}, {"mask_zeros": True}, "mask_zeros"),
        ({"explicit_zero": True}, ALL, {"zero_weight": 1.0}, "mask_zeros"),
        ({}, ALL, ZEROS, "explicit_zero"),
        ({}, {}, {"dab_weight": 1.0}, "model.dab"),
        ({}, {}, {"value_weight": 0.0, "mvc_weight": 0.0}, "value_weight"),
        ({}, {}, {"mask_ratio": ()}, "mask_ratio"),
        ({}, {}, {"mask_ratio": (1.2,)}, "mask_ratio"),
        ({}, {}, {"mode": "both"}, "mode"),
        ({}, {}, {"ecs_weight": -1.0}, "ecs_weight"),
        ({}, {"genes": "listed", "max_genes": 0}, {}, "listed"),
        ({"values": "category"}, {"values": "log1p"}, {}, "category"),
        ({"num_batches": 3}, {}, {}, "batch_key"),
        ({"num_batches": 3}, DONORS, {}, "2 batches"),
        ({"vocab_size": 9, "pad_id": 0, "cls_id": 1}, {}, {}, "vocab_size"),
        ({"vocab_size": 40, "pad_id": 0, "cls_id": 1}, {}, {}, "pad_id"),
    ):
        with pytest.raises(ConfigError, match=words) as error:
            task_of(model, data, **options)
        assert "\n" not in str(error.value)


def test_statistics_of_the_domain_norm_move_in_training_alone():
    """By the mean of the microbatches; not by validation, and not where adapters are trained."""
    task = task_of({"domain_norm": "plain", "num_layers": 1}, DONORS)
    mesh, batch = sharding.make_mesh(sharding.MeshConfig(data=1)), batch_of(task, 8)
    moved = []
    for microbatch in (0, 8, 4):
        optimizer = optax.sgd(0.0)
        abstract, make = init_state(task, lambda shapes, o=optimizer: o, mesh, 0)
        assert set(abstract.frozen) == {f"{STATISTICS}/domain_norm/{name}" for name in ("mean", "variance")}
        state = make()
        before = jax.tree.map(np.asarray, state.frozen)
        evaluated = make_eval_step(task, mesh)(state, batch, jnp.asarray(0))
        assert all(np.isfinite(value).all() for value in jax.tree.leaves(evaluated))
        jax.tree.map(np.testing.assert_array_equal, state.frozen, before)
        state, _, sums = make_train_step(task, optimizer, mesh, abstract, microbatch)(state, batch)
        assert "moving_statistics" not in sums
        moved.append({path: np.asarray(value) - before[path] for path, value in state.frozen.items()})
    means = [each[f"{STATISTICS}/domain_norm/mean"] for each in moved]
    assert np.abs(means[0]).max() > 1e-4
    np.testing.assert_allclose(means[1], means[0], rtol=1e-5, atol=1e-7)
    assert np.abs(means[2] - means[0]).max() < 0.5 * np.abs(means[0]).max()
    adapted = Adapted(task, _lora())
    _, sums = adapted.loss(variables_of(adapted), batch, jax.random.key(0), True)
    assert "moving_statistics" not in sums


def _lora() -> Any:
    return LoraConfig.of("scgpt", rank=2)


def test_the_table_of_predicted_values():
    task = task_of({"flags": True}, {"genes": "expressed", "max_genes": 14}, report_seeds=2, **GENERATIVE)
    (measured,) = task.evaluators()
    numbers = dict(measured(variables_of(task)))
    assert measured.report is not None
    assert "12 validation cells" in measured.report.title
    names = [row[0] for row in measured.report.rows]
    assert names == [
        "cell model", "cell embedding (MVC)", "components of the known genes", "mean by gene and library size",
        "mean by gene and expressed genes", "mean of the gene in training", "mean of all genes in training",
    ]  # fmt: skip
    assert measured.report.row_keys[:3] == [MODEL, CONTROL, ""], "the model's own heads are not baselines"
    # The mean of all genes by hand, and the same masks.
    train, held_out = task.dataset("train"), task.dataset("validation")
    assert train is not None
    values = np.concatenate([train.record(i)["values"] for i in range(50)])
    mean = values[values > 0].mean()
    true = []
    for start in (0, 8):
        records = [held_out.record(min(i, 11)) for i in range(start, start + 8)]
        batch = {name: jnp.stack([r[name] for r in records]) for name in records[0]}
        masked = np.array(task.mask_genes(jax.random.fold_in(jax.random.key(0), start), batch))
        masked[12 - start :] = False
        true.append(np.asarray(batch["values"])[masked])
    expected = np.square(np.concatenate(true) - mean).mean()
    found = measured.report.rows[6][1][0]
    assert found == pytest.approx(expected, rel=1e-4)
    assert numbers["mean of the gene in training/explained"] == 0
    # A model that knows the answers has them all right.
    measured.predict = lambda variables, batch, rng: ({"value": batch["values"]}, batch["values"] > 0)
    perfect = dict(measured({}))
    assert perfect["cell model/mse"] == 0
    assert perfect["cell model/explained"] == perfect["cell model/correlation"] == 1
    assert perfect["mean by gene and library size/mse"] > 0


def test_the_regression_on_known_genes_finds_what_genes_share():
    """It reads known genes alone, and finds factors of genes that the means do not know."""
    rng, cells, genes = np.random.default_rng(0), 300, 40
    loadings, scores = rng.normal(size=(3, genes)), rng.normal(size=(cells, 3))
    values = 10 + scores @ loadings + 0.1 * rng.normal(size=(cells, genes))
    records = [
        {
            "gene_ids": np.arange(genes), "values": row.astype(np.float32), "padding_mask": np.zeros(genes, bool),
            "library_size": np.float32(1), "expressed_genes": np.float32(genes),
        }
        for row in values
    ]  # fmt: skip

    class Source(list):
        cls_id, length = None, genes
        record = list.__getitem__

    made = TrainingValues(Source(records[:250]), genes, False)
    batch = {name: np.stack([record[name] for record in records[250:]]) for name in records[0]}
    masked = rng.random((50, genes)) < 0.4
    found = made.predictions(batch, masked)
    errors = {name: float(np.square(each - batch["values"][masked]).mean()) for name, each in found.items()}
    means = [errors[name] for name in (SIZE, EXPRESSED, GENE, ALL_GENES)]
    assert errors[COMPONENTS] < 0.1 < 2 < min(means)
    hidden = {**batch, "values": np.where(masked, 99, batch["values"])}
    chex.assert_trees_all_equal(made.predictions(hidden, masked), found)


CONFIG: dict[str, Any] = {
    "family": "scgpt", "task": "masked_values", "model": {**SIZES, "dropout": 0.1, "flags": True},
    "data": {"max_genes": 20}, "objective": {"mode": "generative", "second_pass_weight": 1.0},
    "optimizer": {"peak_lr": 1e-3, "init_lr": 1e-4, "warmup_steps": 5},
    "train": {"steps": 6, "batch_size": 8, "log_every": 1, "eval_every": 3, "checkpoint_every": 3},
}  # fmt: skip


# Everything that knows batches.
BATCHES: dict[str, Any] = {
    "data__batch_key": "cell_type", "data__shared_batches": True, "model__domain_norm": "affine", "model__dab": True,
    "objective__dab_weight": 0.5,
}  # fmt: skip


@pytest.mark.slow
def test_stopping_and_resuming_changes_nothing(store, tmp_path):
    """Also with sampled genes and accumulated gradients: the epoch draws the genes, the step the masks."""
    config = merged(CONFIG, data__store=str(store), train__grad_accum_steps=2, **BATCHES)
    whole = learn(config, tmp_path / "whole")
    assert learn(merged(config, train__stop_at=4), tmp_path / "parts").progress.step == 4
    parts = learn(config, tmp_path / "parts")
    chex.assert_trees_all_equal(whole.state, parts.state, strict=True)
    log = read_log(tmp_path / "parts")
    assert without_times(read_log(tmp_path / "whole")) == without_times(log)
    losses = [line["validation/loss"] for line in log if "validation/loss" in line]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_an_update_of_microbatches_is_that_of_the_whole_batch(store):
    """With the same masks: all eligible genes are masked, and no term depends on pairs of cells."""
    changes = {"mode": "masked", "second_pass_weight": 0.0, "mask_ratio": (1.0,)}
    config = merged(
        CONFIG,
        data__store=str(store),
        model__dropout=0.0,
        **{f"objective__{n}": v for n, v in changes.items()},
    )
    task, _ = make_task(config, Store.open(store))
    mesh, batch = sharding.make_mesh(sharding.MeshConfig(data=1), jax.devices()[:1]), batch_of(task, 8)
    made = []
    for microbatch in (0, 2):
        abstract, make = init_state(task, lambda shapes: optax.sgd(1e-3), mesh, 0)
        state, scalars, _ = make_train_step(task, optax.sgd(1e-3), mesh, abstract, microbatch)(make(), batch)
        made.append((scalars, state.trained))
    chex.assert_trees_all_close(*made, rtol=2e-4, atol=1e-6)


def test_the_model_folder_says_what_it_reads():
    task = task_of({}, {**DONORS, "genes": "top"})
    data = task.exports()["data"]
    assert (data["genes"], data["max_genes"], data["values"]) == ("top", 10, "quantiles")
    assert data["gene_rows"] == list(range(GENES))
    assert data["batches"] == ["gut", "lung"]
    # A run that goes on, or starts from the model, keeps rows and batches.
    rows = [*range(3, GENES + 1), -1, 0]
    inputs = TaskInputs(
        "scgpt", {**SIZES, "vocab_size": 40, "pad_id": 30, "cls_id": 31}, MaskedValuesConfig(),
        TokenData(max_genes=10, **DONORS), task.store, 0, None, {**data, "gene_rows": rows, "batches": ["gut", "lung"]},
    )  # fmt: skip
    again = SPEC.make(inputs)
    assert again.rows_of_genes.tolist() == rows
    for number in range(10):
        ids = again.dataset("train").record(number)["gene_ids"]
        assert set(ids) <= {30, 31, *rows} - {-1}
    with pytest.raises(ConfigError, match="14"):
        SPEC.make(dataclasses.replace(inputs, parent_data_spec={**data, "gene_rows": rows[:-1]}))


def test_a_model_of_variable_genes_knows_no_other_genes():
    data = {"genes": "expressed", "max_genes": 14, "variable_genes": 4}
    task = task_of(data=data)
    rows = task.rows_of_genes
    known = np.flatnonzero(rows >= 0)
    train = task.store.split("train")
    assert known.tolist() == hvg_of(train, 4, np.ones(GENES, bool), everywhere=False).tolist()
    number = len(known)
    assert number == 4
    assert rows[known].tolist() == list(range(number))
    assert task.model_config.vocab_size == number + 2  # with CLS and padding
    for each in ("train", "validation"):
        counts = {s.name: s.counts.toarray() for s in task.store.split(each)}
        source = task.dataset(each)
        for cell in range(len(source)):
            ids, (study, cells) = source.record(cell)["gene_ids"], source.cells.rows(cell, 0)
            expressed = np.flatnonzero(counts[study.name][cells[0]][known])
            assert ids[ids < number].tolist() == expressed.tolist()
    # A run that goes on keeps its genes. A model with other genes is refused.
    spec = {**task.exports()["data"], "gene_rows": rows[::-1].tolist()}
    model = {"vocab_size": number + 2, "pad_id": number + 1, "cls_id": number}
    assert task_of(model, data, parent=spec).rows_of_genes.tolist() == rows[::-1].tolist()
    assert (
        task_of(model, {**data, "variable_genes": 0}, parent=spec).rows_of_genes.tolist()
        == rows[::-1].tolist()
    )
    with pytest.raises(ConfigError, match="variable_genes"):
        task_of(model, {**data, "variable_genes": 5}, parent=spec)
