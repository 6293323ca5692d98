"""sCT: size, symmetries, equality of its forms, and that every part has an effect."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sct.errors import ConfigError
from sct.models.sct import SCT
from sct.models.sct_config import SCTConfig, pad_to_multiple
from sct.nn import execution
from sct.nn.reference import reference_kernels, smaller_chunks
from sct.nn.spatial import spatial_features
from tests.cached import cached

GENES, CELLS = 32, 3
SMALL = SCTConfig(
    num_genes=GENES,
    token_embed_dim=32,
    embed_dim=64,
    num_downsamples=2,
    num_layers=1,
    num_heads=4,
    ffn_dim=48,
)
# One level compiles in half of the time, and most time here is compilation.
ONE = dataclasses.replace(SMALL, num_downsamples=1)
SPATIAL = dataclasses.replace(ONE, use_spatial=True, num_scales=3)
BLIND = dataclasses.replace(ONE, conv_boundary="cell", rotary=False)


def tokens(seed: int = 0, cells: int = CELLS) -> np.ndarray:
    """Tokens (2, K, G) with MASK among them and two positions of PAD in each cell."""
    ids = np.random.default_rng(seed).integers(0, 5, (2, cells, GENES)).astype(np.uint8)
    ids[:, :, ::7] = SMALL.mask
    ids[:, :, -2:] = SMALL.pad
    return ids


def places(seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random((2, CELLS, 2)) * 30).astype(np.float32)


@cached
def variables(config: SCTConfig) -> Any:
    """Random variables of the scale of initial ones, none of them zero or one, so that every one counts."""
    shapes = jax.eval_shape(lambda: nn.meta.unbox(SCT(config).init(jax.random.key(0), tokens())))
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        name, noise = path[-1].key, rng.normal(size=leaf.shape).astype(np.float32)
        if name == "kernel":
            return noise / np.sqrt(np.prod(leaf.shape[:-1]), dtype=np.float32)
        return noise if name == "embedding" else (name == "scale") + 0.1 * noise

    return jax.tree_util.tree_map_with_path(draw, shapes)


quick = partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})


@quick
def _run(config: SCTConfig, values: Any, *inputs: Any) -> dict[str, jax.Array]:
    with jax.default_matmul_precision("highest"):
        return SCT(config).apply(values, *inputs)


def run(config: SCTConfig, *inputs: Any, values: Any = None) -> dict[str, np.ndarray]:
    values = variables(config) if values is None else values
    return {key: np.asarray(value) for key, value in _run(config, values, *inputs).items()}


@quick
def _loss(config: SCTConfig, values: Any, *inputs: Any) -> tuple[jax.Array, Any]:
    def loss(values):
        out = SCT(config).apply(values, *inputs)
        return jnp.square(out["logits"]).mean() + out["cell_embedding"][..., 0].mean()

    return jax.value_and_grad(loss)(values)


def close(got, expected, tolerance=2e-5):
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


def differs(one, other, by=1e-3):
    assert np.abs(np.asarray(one) - np.asarray(other)).max() > by


# Size


def test_the_published_model_has_79_204_163_parameters():
    shapes = jax.eval_shape(SCT(SCTConfig()).init, jax.random.key(0), jnp.zeros((1, 1, 19_968), jnp.uint8))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 79_204_163
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    assert SCTConfig().filters == (64, 192, 320, 448, 544, 672, 800, 928, 1024)


@pytest.mark.slow
def test_shapes_of_all_outputs():
    out = run(SMALL, tokens())
    assert {key: value.shape for key, value in out.items()} == {
        "logits": (2, CELLS, GENES, 7),
        "cell_embedding": (2, CELLS, 64),
        "conv_out": (2, CELLS * GENES // 4, 64),
        "transformer_out": (2, CELLS * GENES // 4, 64),
        "deconv_out": (2, CELLS * GENES, 32),
    }
    assert all(np.isfinite(value).all() for value in out.values())


def test_the_cell_embedding_is_the_mean_over_the_cells_positions():
    out = run(SMALL, tokens())
    for cell in range(CELLS):
        rows = slice(cell * GENES // 4, (cell + 1) * GENES // 4)
        close(out["cell_embedding"][:, cell], out["transformer_out"][:, rows].mean(axis=1))


def test_every_dimension_of_every_parameter_has_a_name():
    boxed = jax.eval_shape(SCT(SPATIAL).init, jax.random.key(0), tokens())
    boxes = jax.tree.leaves(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))
    for box in boxes:
        assert isinstance(box, nn.LogicallyPartitioned)
        assert len(box.names) == box.value.ndim
    assert len(boxes) == len(jax.tree.leaves(boxed))


# Symmetries


@pytest.mark.parametrize(
    "config", [BLIND, dataclasses.replace(BLIND, norm="layer", pool="max", num_downsamples=2)]
)
def test_permuting_cells_permutes_embeddings_and_logits(config):
    order = [2, 0, 1]
    plain, permuted = run(config, tokens()), run(config, tokens()[:, order])
    for key in ("cell_embedding", "logits"):
        close(permuted[key], plain[key][:, order])
    differs(plain["cell_embedding"][:, 0], plain["cell_embedding"][:, 1])


@pytest.mark.parametrize(
    "config",
    [ONE, dataclasses.replace(BLIND, conv_boundary="flat"), dataclasses.replace(BLIND, rotary=True)],
    ids=["default", "flat", "rotary"],
)
def test_flat_convolutions_and_rotary_embedding_see_the_order_of_cells(config):
    order = [2, 0, 1]
    plain, permuted = run(config, tokens()), run(config, tokens()[:, order])
    differs(permuted["cell_embedding"], plain["cell_embedding"][:, order])


def test_cells_of_a_bag_inform_each_other_and_bags_do_not():
    changed = tokens()
    changed[0, 0, 3:9] = (changed[0, 0, 3:9] + 1) % 5
    for config in (ONE, BLIND):
        before, after = run(config, tokens()), run(config, changed)
        differs(before["logits"][0, 2], after["logits"][0, 2], 1e-5)
        np.testing.assert_array_equal(before["logits"][1], after["logits"][1])


def test_without_attention_cells_kept_apart_are_independent():
    config = dataclasses.replace(BLIND, num_layers=0)
    changed = tokens()
    changed[:, 0] = tokens(1)[:, 0]
    before, after = run(config, tokens()), run(config, changed)
    close(before["logits"][:, 1:], after["logits"][:, 1:], 1e-6)
    flat = dataclasses.replace(config, conv_boundary="flat")
    differs(run(flat, tokens())["logits"][:, 1], run(flat, changed)["logits"][:, 1])


# Forms that must agree


def test_the_head_at_chosen_positions_gives_the_dense_logits():
    dense = run(SMALL, tokens())["logits"].reshape(2, CELLS * GENES, 7)
    positions = np.random.default_rng(0).integers(0, CELLS * GENES, (2, 11))
    got = run(SMALL, tokens(), None, positions)["logits"]
    assert got.shape == (2, 11, 7)
    close(got, np.take_along_axis(dense, positions[..., None], axis=1))


CHUNKS = [("level", 8), ("products", 8)]
FORMS = [("none", 4096), ("level", 4096), *CHUNKS]


@pytest.fixture
def compiled_anew():
    """Function that forgets programs: jax.jit does not see that constants or forms of layers have changed."""
    _loss.clear_cache()
    yield _loss.clear_cache
    _loss.clear_cache()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "forms"),
    [
        ({}, FORMS),
        ({"norm": "layer", "conv_kernel_size": 4, "use_skip_connection": False}, CHUNKS),
        ({"norm": "none", "pool": "max", "conv_boundary": "cell"}, CHUNKS),
        ({"norm": "shared_fixed", "pool": "max"}, FORMS),
        ({"conv_boundary": "cell"}, FORMS),
    ],
    ids=["default", "layer, 4 taps, no skip", "none, max, cell", "shared_fixed, max", "cell"],
)
def test_what_is_kept_and_in_how_many_chunks_changes_neither_loss_nor_gradient(
    options, forms, monkeypatch, compiled_anew
):
    config = dataclasses.replace(SMALL, **options)
    with reference_kernels():
        loss, gradient = _loss(config, variables(config), tokens())
    for remat, positions in forms:
        compiled_anew()
        monkeypatch.setattr(execution, "LEVEL_CHUNK_CPU", positions)
        monkeypatch.setattr(execution, "POINTWISE_CHUNK_CPU", 3 * positions // 2)
        other_loss, other = _loss(dataclasses.replace(config, remat=remat), variables(config), tokens())
        close(other_loss, loss, 1e-6)
        chex.assert_trees_all_close(other, gradient, rtol=1e-5, atol=1e-5)


def test_chunks_are_whole_cells_and_divide_a_bag(monkeypatch):
    monkeypatch.setattr(execution, "LEVEL_CHUNK_CPU", 64)
    counts = (1, 2, 3, 4, 9, 50)
    assert [execution.cells_per_chunk(cells, 32) for cells in counts] == [1, 2, 3, 2, 3, 2]
    with smaller_chunks(0.5):
        assert [execution.cells_per_chunk(cells, 32) for cells in counts] == [1, 1, 1, 1, 1, 1]
    with reference_kernels():
        assert execution.cells_per_chunk(50, 32) == 50


def test_bfloat16_is_near_float32():
    config = dataclasses.replace(SMALL, dtype="bfloat16")
    exact, rough = run(SMALL, tokens()), run(config, tokens(), values=variables(SMALL))
    assert rough["logits"].dtype == rough["cell_embedding"].dtype == np.float32
    assert rough["conv_out"].dtype == jnp.bfloat16
    for key in ("logits", "cell_embedding"):
        error = np.linalg.norm(rough[key] - exact[key]) / np.linalg.norm(exact[key])
        assert 1e-5 < error < 0.03


def test_integer_types_of_tokens_do_not_matter():
    np.testing.assert_array_equal(
        run(SMALL, tokens())["logits"], run(SMALL, tokens().astype(np.int32))["logits"]
    )


# Coordinates


def test_a_new_map_of_coordinates_changes_nothing():
    def initial():
        return nn.meta.unbox(SCT(SPATIAL).init(jax.random.key(0), tokens()))["params"]

    added = jax.jit(lambda: initial()["spatial"])()
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(added))
    merged = {"params": {**variables(ONE)["params"], "spatial": added}}
    assert jax.tree.structure(jax.eval_shape(initial)) == jax.tree.structure(merged["params"])
    expected = run(ONE, tokens())["logits"]
    np.testing.assert_array_equal(run(SPATIAL, tokens(), places(), values=merged)["logits"], expected)


def test_the_map_of_coordinates_is_added_to_all_genes_of_a_cell():
    values = variables(SPATIAL)

    def embed(coordinates):
        return np.asarray(SCT(SPATIAL).apply(values, tokens(), coordinates, method="embed"))

    added = (embed(places()) - embed(None)).reshape(2, CELLS, GENES, 32)
    layer = values["params"]["spatial"]
    features = spatial_features(places(), 3, SPATIAL.sigma_min, SPATIAL.sigma_max, "paper")
    expected = features @ layer["kernel"] + layer["bias"]
    close(added, np.broadcast_to(expected[:, :, None], added.shape))


def test_a_cell_without_a_position_has_no_spatial_term():
    some = places()
    some[:, 1] = np.nan
    some[0, 2, 0] = np.nan  # one coordinate missing is no position
    out = run(SPATIAL, tokens(), some)
    assert np.isfinite(out["logits"]).all()
    nowhere = run(SPATIAL, tokens(), np.full_like(some, np.nan))["logits"]
    np.testing.assert_array_equal(nowhere, run(SPATIAL, tokens())["logits"])
    differs(nowhere, run(SPATIAL, tokens(), places())["logits"])
    differs(out["logits"], nowhere)
    gradient = _loss(SPATIAL, variables(SPATIAL), tokens(), some)[1]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_the_published_encoding_is_another_map():
    config = dataclasses.replace(SPATIAL, spatial_encoding="reference")
    assert variables(config)["params"]["spatial"]["kernel"].shape == (6, 32)
    assert variables(SPATIAL)["params"]["spatial"]["kernel"].shape == (12, 32)
    differs(run(config, tokens(), places())["logits"], run(config, tokens())["logits"])


def test_coordinates_for_a_model_without_them_are_refused():
    with pytest.raises(ConfigError, match="use_spatial=False"):
        run(ONE, tokens(), places())


# Every part has an effect


@pytest.mark.slow
@pytest.mark.parametrize("config", [SMALL, SPATIAL, dataclasses.replace(BLIND, pool="max", norm="layer")])
def test_gradient_reaches_every_parameter(config):
    inputs = (tokens(), places()) if config.use_spatial else (tokens(),)
    gradient = _loss(config, variables(config), *inputs)[1]
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(leaf).all(), name
        if "key" in name and "bias" in name and not config.rotary:
            assert np.abs(leaf).max() < 1e-6, "the softmax takes no notice of a constant"
        else:
            assert np.abs(leaf).max() > 1e-9, name


def test_without_coordinates_only_their_map_gets_no_gradient():
    gradient = _loss(SPATIAL, variables(SPATIAL), tokens())[1]
    dead = {
        jax.tree_util.keystr(path[1:2])
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradient)
        if not np.any(leaf)
    }
    assert dead == {"['spatial']"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"pool": "max"},
        {"conv_boundary": "cell"},
        {"rotary": False},
        {"use_skip_connection": False},
        {"norm": "shared_fixed"},
        {"norm": "none"},
        {"layer_norm_eps": 1e-1},
        {"num_layers": 0},
        {"num_hidden_layers_head": 0},
    ],
    ids=str,
)
def test_each_flag_changes_the_output_of_the_same_parameters(change):
    config = dataclasses.replace(ONE, **change)
    values = variables(ONE)
    if change == {"num_hidden_layers_head": 0}:  # another shape of the last layer
        values = {"params": {**values["params"], "head": variables(config)["params"]["head"]}}
    differs(run(config, tokens(), values=values)["logits"], run(ONE, tokens())["logits"])


@pytest.mark.slow
def test_norms_hold_the_parameters_that_their_name_says():
    def norms(kind):
        flat = jax.tree_util.tree_leaves_with_path(variables(dataclasses.replace(ONE, norm=kind)))
        return [
            leaf.shape
            for path, leaf in flat
            if "down_0" in jax.tree_util.keystr(path) and "norm" in str(path)
        ]

    assert norms("shared") == [(GENES,)] * 4
    assert norms("layer") == [(32,), (32,), (64,), (64,)]
    assert norms("shared_fixed") == norms("none") == []


def test_the_number_of_bins_sets_the_alphabet():
    config = dataclasses.replace(ONE, num_bins=9)
    assert (config.pad, config.mask) == (9, 10)
    assert variables(config)["params"]["token_embed"]["embedding"].shape == (11, 32)
    logits = jax.eval_shape(SCT(config).apply, variables(config), tokens())["logits"]
    assert logits.shape == (2, CELLS, GENES, 11)


# Configuration


def test_a_vocabulary_is_padded_to_what_the_tower_divides():
    assert pad_to_multiple(19_900, 8) == 19_968
    assert pad_to_multiple(19_968, 8) == 19_968
    assert pad_to_multiple(1, 3) == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "batch"}, "norm is 'batch'"),
        ({"pool": "sum"}, "pool is 'sum'"),
        ({"dtype": "float64"}, "dtype is 'float64'"),
        ({"num_genes": 33}, r"num_genes .*36"),
        ({"num_genes": 0}, "num_genes"),
        ({"num_bins": 1}, "num_bins"),
        ({"num_bins": 255}, r"num_bins .*254"),
        ({"num_layers": -1}, "num_layers"),
        ({"ffn_dim": 0}, "ffn_dim"),
        ({"conv_kernel_size": 0}, "conv_kernel_size"),
        ({"token_embed_dim": 40}, "token_embed_dim"),
        ({"embed_dim": 96, "num_heads": 5}, r"num_heads \(10\)"),
        ({"embed_dim": 80}, "embed_dim"),
        ({"sigma_min": 0.0}, "sigma_min"),
        ({"sigma_min": 11.0}, "sigma_min"),
    ],
)
def test_a_wrong_configuration_is_refused_in_one_sentence(change, message):
    with pytest.raises(ConfigError, match=message) as error:
        dataclasses.replace(SMALL, **change)
    assert str(error.value).endswith((".", "?"))


def test_tokens_of_another_vocabulary_are_refused():
    with pytest.raises(ConfigError, match=r"\b16\b.*\b32\b"):
        run(SMALL, tokens()[..., :16])
