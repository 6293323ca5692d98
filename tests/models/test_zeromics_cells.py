"""Cell model of ZerOmics: a set of genes, each with bin and feature."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sct.errors import ConfigError, DataError
from sct.models import registry
from sct.models.zeromics_cells import FEATURES, ZerOmicsCells, ZerOmicsCellsConfig
from sct.nn.paths import flatten
from sct.weights.pretrained import Pretrained
from tests.cached import cached
from tests.random_models import random_model

CONFIG = ZerOmicsCellsConfig(
    num_genes=24, feature_dim=10, num_bins=4, embed_dim=16, num_layers=2, num_heads=4, ffn_dim=20
)


@cached
def model() -> Pretrained:
    return random_model("zeromics_cells", CONFIG, seed=0)


def variables() -> dict[str, Any]:
    return model().variables


def cells(number: int = 3) -> np.ndarray:
    return np.random.default_rng(1).integers(0, CONFIG.mask + 1, (number, CONFIG.num_genes)).astype(np.uint8)


def test_genes_in_any_order_are_the_same_cell():
    bins = cells()
    whole = model().apply(bins=bins)
    order = np.random.default_rng(2).permutation(CONFIG.num_genes)
    mixed = model().apply(bins=bins[:, order], genes=np.broadcast_to(order, bins.shape))
    np.testing.assert_allclose(mixed["hidden"], whole["hidden"][:, order], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(mixed["cell_embedding"], whole["cell_embedding"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(whole["cell_embedding"], whole["hidden"].mean(axis=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("absent", [1, 40])
def test_places_without_a_gene_change_nothing(absent):
    """Also where there are so many places that features are projected before genes are looked up."""
    bins, genes = cells()[:, :5], np.broadcast_to(np.array([3, 7, 8, 20, 23]), (3, 5))
    few = model().apply(bins=bins, genes=genes)
    filled = model().apply(
        bins=np.pad(bins, ((0, 0), (0, absent)), constant_values=2),
        genes=np.pad(genes, ((0, 0), (0, absent)), constant_values=-1),
    )
    np.testing.assert_allclose(filled["hidden"][:, :5], few["hidden"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(filled["cell_embedding"], few["cell_embedding"], rtol=1e-4, atol=1e-5)


def test_a_gene_is_what_its_feature_says():
    bins, changed = cells(), variables()
    features = np.array(changed["params"]["features"])
    features[[2, 9]] = features[[9, 2]]
    other = {"params": {**changed["params"], "features": jnp.asarray(features)}}
    swapped = bins.copy()
    swapped[:, [2, 9]] = swapped[:, [9, 2]]
    ours = ZerOmicsCells(CONFIG).apply(other, swapped)["cell_embedding"]
    np.testing.assert_allclose(ours, model().apply(bins=bins)["cell_embedding"], rtol=1e-4, atol=1e-5)
    assert np.abs(ours - ZerOmicsCells(CONFIG).apply(changed, swapped)["cell_embedding"]).max() > 1e-3


def test_the_ablation_is_the_weighted_mean_of_texts():
    config = dataclasses.replace(CONFIG, encoder="weighted")
    module = ZerOmicsCells(config)
    made = nn.unbox(module.init(jax.random.key(1), **ZerOmicsCells.example(config)))
    assert set(made["params"]) == {"features", "project", "bin_head", "gene_head"}
    rng = np.random.default_rng(2)
    features = jnp.asarray(rng.normal(size=(24, 10)), jnp.float32)
    made = {"params": {**made["params"], "features": features}}
    bins = cells().copy()
    bins[:, 5] = config.mask
    found = module.apply(made, bins)
    text = np.asarray(features @ made["params"]["project"]["kernel"] + made["params"]["project"]["bias"])
    weights = np.where(bins == config.mask, 0, bins).astype(float)
    expected = weights @ text / weights.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found["cell_embedding"], expected, rtol=1e-3, atol=1e-5)
    # Genes in any order, with places without one.
    order = rng.permutation(24)
    genes = np.concatenate([order, [-1, -1]])[None].repeat(len(bins), axis=0).astype(np.int32)
    padded = np.concatenate([bins[:, order], np.zeros((len(bins), 2), bins.dtype)], axis=1)
    again = module.apply(made, padded, genes)
    np.testing.assert_allclose(again["cell_embedding"], found["cell_embedding"], rtol=1e-3, atol=1e-5)
    with pytest.raises(ConfigError, match="encoder"):
        dataclasses.replace(CONFIG, encoder="mean")


def test_expression_and_text_are_added_before_the_first_layer():
    """Equation 4, from the parameters alone."""
    params = variables()["params"]
    bins = cells()
    config = dataclasses.replace(CONFIG, num_layers=1)
    text = params["features"] @ params["project"]["kernel"] + params["project"]["bias"]
    x = np.asarray(params["bin"]["embedding"])[bins] + np.asarray(text)
    layer = jax.tree.map(lambda leaf: leaf[0], params["layers"])

    def norm(x, weights):
        centred = x - x.mean(-1, keepdims=True)
        return (
            centred / np.sqrt(centred.var(-1, keepdims=True) + config.norm_eps) * weights["scale"]
            + weights["bias"]
        )

    def dense(x, weights):
        return x @ np.asarray(weights["kernel"]) + np.asarray(weights["bias"])

    attention = layer["attention"]
    heads = [
        dense(x, attention[name]).reshape(*bins.shape, config.num_heads, -1)
        for name in ("query", "key", "value")
    ]
    scores = np.einsum("bqhd,bkhd->bhqk", heads[0], heads[1]) / np.sqrt(heads[0].shape[-1])
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    mixed = np.einsum("bhqk,bkhd->bqhd", shares, heads[2]).reshape(x.shape)
    x = norm(x + dense(mixed, attention["out"]), layer["attention_norm"])
    inner = np.asarray(jax.nn.gelu(dense(x, layer["mlp"]["up"]), approximate=False))
    expected = norm(x + dense(inner, layer["mlp"]["down"]), layer["mlp_norm"])
    one = {"params": {**params, "layers": jax.tree.map(lambda leaf: leaf[:1], params["layers"])}}
    found = ZerOmicsCells(config).apply(one, bins)["hidden"]
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"bins": np.zeros(24, np.uint8)}, "the shape"),
        ({"bins": np.full((1, 24), 6, np.uint8)}, "0 to 5"),
        ({"bins": np.zeros((1, 23), np.uint8)}, "23 genes"),
        ({"bins": np.zeros((1, 3), np.uint8), "genes": np.zeros((1, 2), np.int32)}, "bins"),
        ({"bins": np.zeros((1, 1), np.uint8), "genes": np.full((1, 1), 24)}, "-1 to 23"),
    ],
)
def test_inputs_that_do_not_fit(inputs, words):
    with pytest.raises(DataError, match=words):
        model().apply(**inputs)


def test_configurations():
    assert registry.model_config("zeromics_cells", {"num_genes": 0}, 77).num_genes == 77
    with pytest.raises(ConfigError, match="feature_dim"):
        ZerOmicsCellsConfig(feature_dim=0)
    with pytest.raises(ConfigError, match="num_heads"):
        ZerOmicsCellsConfig(embed_dim=10, num_heads=3)


def test_the_full_size_without_values():
    """12 layers of 768: 85 million parameters, beside the features, their projection and the two predictors."""
    config = ZerOmicsCellsConfig()
    shapes = jax.eval_shape(
        ZerOmicsCells(config).init, jax.random.key(0), *ZerOmicsCells.example(config).values()
    )
    sizes = {path: int(np.prod(leaf.shape)) for path, leaf in flatten(nn.unbox(shapes)).items()}
    layers = sum(size for path, size in sizes.items() if path.startswith("params/layers/"))
    assert layers == 12 * (4 * (768 * 768 + 768) + 2 * 768 * 3072 + 3072 + 768 + 4 * 768)
    assert sizes[FEATURES] == 20_124 * 5120
    assert sizes["params/gene_head/kernel"] == 768 * 20_124
    assert sizes["params/bin/embedding"] == 12 * 768
