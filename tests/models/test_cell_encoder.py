"""The scGPT-compatible cell encoder: what its masks, heads and norms must do."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sct.errors import ConfigError, DataError
from sct.models import registry
from sct.models.cell_encoder import STATISTICS, CellEncoder, reverse_gradient
from sct.models.cell_encoder_config import CellEncoderConfig
from sct.nn.paths import flatten
from sct.weights.pretrained import expected_shapes
from tests.random_models import random_model

SIZES: dict[str, Any] = {
    "vocab_size": 20, "pad_id": 18, "cls_id": 19, "embed_dim": 16, "num_layers": 2, "num_heads": 4, "ffn_dim": 24,
    "num_bins": 5,
}  # fmt: skip
FULL = CellEncoderConfig(
    **SIZES, mvc="inner product", num_classes=3, num_batches=2, dab=True, domain_norm="affine", flags=True,
    explicit_zero=True,
)  # fmt: skip
FORMS = (
    FULL,
    CellEncoderConfig(**SIZES, norm="pre", mvc="sum query", cell_embedding="w-pool", flags=True),
    CellEncoderConfig(
        **SIZES, values="category", pad_value=5.0, mask_value=6.0, mvc="concat query", flags=True
    ),
    CellEncoderConfig(**SIZES, values="scaling", cell_embedding="avg-pool", flags=True, num_batches=2),
)
PAD = np.array([[False] * 6, [False] * 4 + [True] * 2])
GENERATED = np.array([[False, False, False, True, True, False], [False, False, True, False, False, False]])


def inputs(config: CellEncoderConfig) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    ids = rng.permuted(np.tile(np.arange(17), (2, 1)), axis=1)[:, :6].astype(np.int32)
    values = rng.integers(1, 5, (2, 6)).astype(np.int32 if config.values == "category" else np.float32)
    ids[:, 0], values[:, 0] = config.cls_id, 0
    ids[PAD], values[PAD] = config.pad_id, config.pad_value
    made = {"gene_ids": ids, "values": values, "padding_mask": PAD}
    return {**made, "batch_labels": np.array([0, 1], np.int32)} if config.num_batches else made


@functools.cache
def handle(config: CellEncoderConfig) -> Any:
    model = random_model("scgpt", config, seed=3)
    statistics = model.variables.get(STATISTICS)
    if statistics is not None:
        positive = jax.tree.map(lambda x: jnp.abs(x) + 0.2, statistics)
        model = dataclasses.replace(model, variables={**model.variables, STATISTICS: positive})
    return model


def call(model: Any, **given: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in model.apply(**given).items()}


def near(one: np.ndarray, other: np.ndarray, what: str) -> list[str]:
    difference = float(np.abs(one - other).max())
    return [f"{what}: {difference:.1e}"] if not difference <= 2e-5 else []


def test_outputs_are_those_that_the_configuration_names():
    wrong = []
    for config in FORMS:
        found = handle(config).apply(**inputs(config), intermediates=CellEncoder.intermediates)
        wrong += (
            []
            if set(found) == {*CellEncoder.outputs_of(config), *CellEncoder.intermediates}
            else [str(config)]
        )
        kinds = {kind: np.abs(found["cell_emb"] - found[kind]).max() for kind in CellEncoder.intermediates}
        wrong += [f"{config.cell_embedding} {kind}" for kind, difference in kinds.items()
                  if (difference == 0) != (kind == config.cell_embedding)]  # fmt: skip
        np.testing.assert_array_equal(found["cls"], found["encoder_output"][:, 0])
    assert not wrong


@pytest.mark.slow
def test_padding_changes_nothing():
    """Neither what padding holds, nor how much of it there is."""
    wrong = []
    for config in FORMS:
        model, given = handle(config), inputs(config)
        for generated in ({}, {"generated": GENERATED}):
            found = call(model, **given, **generated)
            other = {**given, "gene_ids": np.where(PAD, 3, given["gene_ids"])}
            other["values"] = np.where(PAD, 2, given["values"]).astype(given["values"].dtype)
            shorter = {
                name: value[1:, :4] if np.ndim(value) > 1 else value[1:] for name, value in given.items()
            }
            short = {name: value[1:, :4] for name, value in generated.items()}
            for name, value in call(model, **other, **generated).items():
                kept = ~PAD if value.shape[:2] == PAD.shape else slice(None)
                wrong += near(value[kept], found[name][kept], f"{name} {config.values}")
            for name, value in call(model, **shorter, **short).items():
                whole = found[name][1:, :4] if found[name].shape[:2] == PAD.shape else found[name][1:]
                wrong += near(value, whole, f"{name} {config.values} shorter")
    assert not wrong


@pytest.mark.slow
def test_genes_in_another_order_give_the_same_cell():
    wrong = []
    for config in FORMS:
        model, given = handle(config), inputs(config)
        order = [0, 3, 1, 2, 4, 5]
        turned = {name: value[:, order] if np.ndim(value) > 1 else value for name, value in given.items()}
        found, other = call(model, **given), call(model, **turned)
        for name, value in found.items():
            moved = value[:, order] if value.shape[:2] == PAD.shape else value
            wrong += near(other[name], moved, f"{name} {config.values}")
    assert not wrong


@pytest.mark.slow
def test_generated_genes_see_the_known_ones_and_themselves():
    """By gradients: which inputs reach which outputs."""
    wrong = []
    for config in FORMS[:2]:
        config = dataclasses.replace(config, num_layers=1, dropout=0.0)
        model, given = handle(config), inputs(config)
        module = CellEncoder(config)

        def out(change: jax.Array, m: Any = model, g: Any = given, module: Any = module) -> jax.Array:
            table = m.variables["params"]["gene"]["embedding"]
            # A change of the embedding of each position by itself: every gene of a cell has a row of its own.
            params = {**m.variables["params"], "gene": {"embedding": table + change}}
            return module.apply(
                {**m.variables, "params": params},
                **g,
                generated=jnp.asarray(GENERATED),
                method="hidden_states",
            )[0].sum(axis=-1)

        reach = np.asarray(jax.jacobian(out)(jnp.zeros((config.vocab_size, config.embed_dim))))
        seen = np.abs(reach[:, given["gene_ids"][0]]).max(axis=-1) > 0
        known = ~GENERATED[0]
        expected = known[None, :] | np.eye(6, dtype=bool)
        wrong += [] if np.array_equal(seen, expected) else [f"{config.norm}: {seen.astype(int)}"]
    assert not wrong


def test_values_of_generated_genes_reach_no_output():
    wrong = []
    for config in FORMS:
        model, given = handle(config), inputs(config)
        other = {**given, "values": np.where(GENERATED, given["values"] % 4 + 1, given["values"])}
        assert (other["values"] != given["values"])[GENERATED].all()
        other["values"] = other["values"].astype(given["values"].dtype)
        found, again = (
            model.apply(**each, generated=GENERATED, intermediates=CellEncoder.intermediates)
            for each in (given, other)
        )
        assert {"cls", "avg-pool", "w-pool", "cell_emb"} <= set(found)
        for name, value in found.items():
            wrong += near(np.asarray(again[name]), np.asarray(value), f"{name} {config.values}")
    assert not wrong


def test_pooled_cells_leave_out_padding_masked_and_generated_genes():
    """Against plain numpy; the norm of a sum of zeros has a finite gradient."""
    for config in FORMS:
        model, given = handle(config), inputs(config)
        given["values"][0, 2] = given["values"][1, 3] = config.mask_value
        for generated in (None, GENERATED):
            kinds = {} if generated is None else {"generated": generated}
            found = model.apply(**given, **kinds, intermediates=CellEncoder.intermediates)
            hidden = np.float64(found["encoder_output"])
            known = ~PAD & (given["values"] != config.mask_value)
            known &= True if generated is None else ~generated
            mean = [hidden[cell][known[cell]].mean(axis=0) for cell in range(2)]
            np.testing.assert_allclose(found["avg-pool"], mean, rtol=1e-4, atol=1e-5)
            total = np.einsum("bld,bl->bd", hidden, np.where(known, given["values"], 0))
            unit = total / np.linalg.norm(total, axis=1, keepdims=True)
            np.testing.assert_allclose(found["w-pool"], unit, rtol=1e-4, atol=1e-5)

        def pooled(hidden: jax.Array, config: Any = config, model: Any = model) -> jax.Array:
            given = (model.variables, hidden, jnp.zeros((1, 3)))
            return CellEncoder(config).apply(*given, kind="w-pool", method="cell_embedding").sum()

        assert np.isfinite(jax.grad(pooled)(jnp.ones((1, 3, config.embed_dim)))).all()


def test_a_cell_embedding_takes_the_place_of_cls():
    config = FORMS[1]
    model, given = handle(config), inputs(config)
    vectors = np.asarray(model.apply(**given)["cell_emb"])
    found, other = call(model, **given, cell=vectors), call(model, **given, cell=-vectors)
    assert np.abs(found["encoder_output"] - other["encoder_output"]).max() > 1e-3
    changed = {**given, "gene_ids": np.where(np.arange(6) == 0, 2, given["gene_ids"]).astype(np.int32)}
    assert not near(call(model, **changed, cell=vectors)["encoder_output"], found["encoder_output"], "cls")


@pytest.mark.slow
def test_batch_labels_change_the_heads_alone_unless_they_choose_the_norm():
    for config, same in ((dataclasses.replace(FULL, domain_norm=""), True), (FULL, False)):
        model, given = handle(config), inputs(config)
        one, other = (call(model, **{**given, "batch_labels": np.full(2, n, np.int32)}) for n in (0, 1))
        assert np.abs(one["mlm_output"] - other["mlm_output"]).max() > 1e-4
        assert np.abs(one["mvc_output"] - other["mvc_output"]).max() > 1e-4
        assert bool(np.array_equal(one["cell_emb"], other["cell_emb"])) is same


def test_domain_norm_uses_and_keeps_the_statistics_of_each_batch():
    config = FULL
    model, given = handle(config), inputs(config)
    module = CellEncoder(config)
    before = model.variables[STATISTICS]["domain_norm"]
    given["batch_labels"] = np.array([1, 1], np.int32)
    found, changed = module.apply(model.variables, **given, mutable=[STATISTICS], method="hidden_states")
    after = changed[STATISTICS]["domain_norm"]
    # By hand: the sums of embeddings before the norm.
    genes = module.apply(model.variables, given["gene_ids"], method="gene_embeddings")
    x = np.asarray(genes + module.apply(model.variables, given["values"], method="value_embeddings"))[~PAD]
    np.testing.assert_allclose(
        after["mean"][1], 0.9 * before["mean"][1] + 0.1 * x.mean(0), rtol=1e-4, atol=1e-5
    )
    unbiased = x.var(0, ddof=1)
    np.testing.assert_allclose(
        after["variance"][1], 0.9 * before["variance"][1] + 0.1 * unbiased, rtol=1e-4, atol=1e-5
    )
    for name in ("mean", "variance"):  # no cell had this label
        np.testing.assert_array_equal(after[name][0], before[name][0])
    # With the statistics of the batch as running ones, evaluation gives what training gave.
    exact = jax.tree.map(lambda v: v, before)
    exact = {
        "mean": exact["mean"].at[1].set(x.mean(0)), "variance": exact["variance"].at[1].set(x.var(0))
    }  # fmt: skip
    frozen = module.apply(
        {**model.variables, STATISTICS: {"domain_norm": exact}}, **given, method="hidden_states"
    )
    np.testing.assert_allclose(np.asarray(frozen)[~PAD], np.asarray(found)[~PAD], rtol=1e-4, atol=1e-4)


def test_the_gradient_behind_the_discriminator_is_reversed():
    model, given = handle(FULL), inputs(FULL)
    cells = jnp.asarray(model.apply(**given)["cell_emb"])
    module = CellEncoder(FULL)

    def loss(cells: jax.Array, method: Any) -> jax.Array:
        return jnp.square(module.apply(model.variables, cells, method=method)).sum()

    reversed_ = jax.grad(loss)(cells, "discriminate")
    straight = jax.grad(loss)(cells, lambda module, cells: module.discriminator(cells))
    np.testing.assert_allclose(reversed_, -straight, rtol=1e-6)
    assert float(jnp.abs(straight).max()) > 0
    assert jax.grad(reverse_gradient)(2.0) == -1.0


def test_detached_queries_do_not_train_the_gene_table():
    gradients = {}
    for mvc in ("inner product", "inner product, detach"):
        config = CellEncoderConfig(**SIZES, mvc=mvc)
        model, given, module = handle(config), inputs(config), CellEncoder(config)

        def loss(params: Any, module: Any = module, given: Any = given) -> jax.Array:
            cells = jnp.ones((2, 16))
            made, _ = module.apply({"params": params}, cells, given["gene_ids"], method="mvc_predictions")
            return jnp.square(made).sum()

        found = jax.grad(loss)(model.variables["params"])
        gradients[mvc] = float(jnp.abs(found["gene"]["embedding"]).max())
        assert float(jnp.abs(found["mvc_head"]["query"]["kernel"]).max()) > 0
    assert gradients["inner product"] > 0 == gradients["inner product, detach"]


def test_dropout_acts_in_training_alone():
    for norm in ("post", "pre"):
        config = CellEncoderConfig(**SIZES, norm=norm)
        model, given, module = handle(config), inputs(config), CellEncoder(config)
        dropped = module.apply(model.variables, **given, rngs={"dropout": jax.random.key(0)})[
            "encoder_output"
        ]
        assert float(jnp.abs(dropped - model.apply(**given)["encoder_output"]).max()) > 1e-3


@pytest.mark.slow
def test_computing_options_change_nothing():
    wrong = []
    for config in FORMS:
        model, given = handle(config), inputs(config)
        for remat in ("products", "level"):
            other = dataclasses.replace(model, config=dataclasses.replace(config, remat=remat))
            wrong += near(
                call(other, **given)["encoder_output"], call(model, **given)["encoder_output"], remat
            )
        half = dataclasses.replace(model, config=dataclasses.replace(config, dtype="bfloat16"))
        found = call(half, **given)
        assert found["cell_emb"].dtype == found["mlm_output"].dtype == np.float32
        assert np.abs(found["cell_emb"] - call(model, **given)["cell_emb"]).max() < 0.3
    assert not wrong


def test_sizes_of_the_whole_human_model():
    def count(**options: Any) -> int:
        shapes = expected_shapes("scgpt", CellEncoderConfig(**options))
        return sum(int(np.prod(shape.shape)) for shape in shapes.values())

    base = count()
    assert base == 50_804_225
    assert count(num_classes=11) - base == 533_003
    # By hand: query 512 x 512 + 512, and W without bias.
    assert count(mvc="inner product") - base == 512 * 512 + 512 + 512 * 512
    assert count(value_head=False) - base == -(2 * (512 * 512 + 512) + 513)


@pytest.mark.slow
def test_operations_are_those_of_the_compiled_model():
    """Counted by XLA; other operations than matrix products are a small part of them."""
    for config in FORMS:
        config = dataclasses.replace(config, embed_dim=64, ffn_dim=128, num_layers=1, flags=False)
        module = CellEncoder(config)
        given = {name: jnp.asarray(np.tile(value, (4, 20) if np.ndim(value) > 1 else 4)) for name, value in
                 inputs(config).items()}  # fmt: skip
        shapes = jax.eval_shape(
            lambda key, c=config, m=module: nn.unbox(m.init(key, **m.example(c))), jax.random.key(0)
        )
        compiled = jax.jit(lambda v, x, m=module: m.apply(v, **x)).lower(shapes, given).compile()
        cost = compiled.cost_analysis()
        counted = (cost[0] if isinstance(cost, list) else cost)["flops"]
        expected = CellEncoder.flops(config, 8, 120)
        assert expected <= counted <= 1.25 * expected, (config.mvc, expected, counted)


def test_inputs_and_options_that_do_not_fit_are_refused():
    config = FULL
    model, given = handle(config), inputs(config)
    plain = handle(CellEncoderConfig(**SIZES))
    without = {name: value for name, value in given.items() if name != "batch_labels"}
    for each, inputs_, named in (
        (model, without, "batch_labels"),
        (model, {**given, "batch_labels": np.array([0, 2], np.int32)}, "batch_labels"),
        (model, {**given, "gene_ids": given["gene_ids"] + 1}, "gene_ids"),
        (model, {**given, "values": given["values"][:, :3]}, "values"),
        (model, {**given, "padding_mask": PAD.astype(np.int32)}, "padding_mask"),
        (model, {**given, "cell": np.zeros((2, 3), np.float32)}, "cell"),
        (plain, {**without, "generated": GENERATED}, "flags"),
        (handle(FORMS[2]), {**inputs(FORMS[2]), "values": np.full((2, 6), 7, np.int32)}, "values"),
    ):
        with pytest.raises(DataError, match=named):
            each.apply(**inputs_)
    for options, named in (
        ({"cls_id": 18}, "cls_id"), ({"pad_id": 20}, "pad_id"), ({"dab": True}, "num_batches"),
        ({"domain_norm": "plain"}, "num_batches"), ({"values": "category"}, "pad_value"),
        ({"explicit_zero": True, "mvc": "sum query"}, "explicit_zero"), ({"mvc": "outer"}, "mvc"),
        ({"dropout": 1.0}, "dropout"), ({"num_bins": 65_535}, "num_bins"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=named):
            CellEncoderConfig(**{**SIZES, **options})
    assert CellEncoderConfig(**{**SIZES, "num_bins": 1000}).num_bins == 1000


def test_sizes_of_zero_come_from_the_vocabulary():
    made = registry.model_config("scgpt", {"vocab_size": 0, "embed_dim": 16, "num_heads": 2}, 77)
    assert (made.vocab_size, made.pad_id, made.cls_id) == (79, 77, 78)
    bins = registry.model_config("scgpt", {"values": "category", "num_bins": 9}, 77)
    assert (bins.pad_value, bins.mask_value) == (9.0, 10.0)
    assert {path.split("/")[0] for path in flatten(handle(FULL).variables)} == {"params", STATISTICS}
