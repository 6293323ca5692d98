"""Sets of adapters on one base: each alone, several at once, without a second compilation."""

from __future__ import annotations

import dataclasses
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sct
from sct.errors import CheckpointError, ConfigError
from sct.models import classifier, lora, registry
from sct.models.adapter_kinds import BottleneckConfig, LoraConfig, PrefixConfig
from sct.models.combined_adapters import combine
from sct.nn.adapters import kind_of
from sct.nn.linear import Linear
from sct.nn.paths import flatten, unflatten
from sct.weights import adapter_folder
from sct.weights.adapter_set import AdapterSet
from sct.weights.pretrained import ANNOTATION, Pretrained, _compiled
from tests.cases import each
from tests.models.lora_models import boxed, call, config, inputs, trained_adapters
from tests.models.test_adapters import LAYER, adapted, near, plain
from tests.train import tuned_models

FAMILIES = ("scgpt", "llama", "sct")
# Members of different kinds, sizes and layers: what a set has to lay out in arrays of one shape.
MEMBERS: dict[str, tuple[Any, ...]] = {
    "low": (LoraConfig((r"attention/(query|value)$",), rank=3, alpha=6.0),),
    "low in one layer": (LoraConfig((r"attention/query$",), rank=2, alpha=1.0, layers=LAYER),),
    "wide": (BottleneckConfig(width=5, scale=0.7),),
    "narrow": (BottleneckConfig((r"mlp/down$",), width=2, layers=LAYER),),
    "paper": (BottleneckConfig((r"attention/out$",), width=3, skip=False, layers=LAYER),),
    "long": (PrefixConfig(length=4, layers=(0,)),),
    "short": (PrefixConfig(length=2, layers=LAYER),),
    "all": (
        LoraConfig((r"attention/key$",), rank=2), BottleneckConfig(width=3, layers=(0,)), PrefixConfig(length=3),
    ),
}  # fmt: skip


def members(family: str) -> dict[str, Any]:
    return {name: trained_adapters(family, options) for name, options in MEMBERS.items()}


def combined(family: str, weights: dict[str, float], own: dict[str, Any] | None = None) -> dict[str, Any]:
    made = combine(boxed(family)["params"], own or members(family), weights)
    return {**plain(family), "adapters": made}


def test_each_member_alone_is_as_it_was():
    def check(family):
        own = members(family)
        shapes = jax.tree.map(jnp.shape, combined(family, {}, own))
        problems = near(call(family, plain(family)), call(family, combined(family, {}, own)), "none")
        for name, options in MEMBERS.items():
            found = combined(family, {name: 1.0}, own)
            assert jax.tree.map(jnp.shape, found) == shapes
            alone = call(family, adapted(family, *options))
            problems += near(alone, call(family, found), name)
            assert near(alone, call(family, plain(family)), name), (
                f"{name} changes nothing, so nothing is tested"
            )
        assert not problems

    each(check, [(family,) for family in FAMILIES])


def test_low_rank_adapters_are_added_with_their_weights():
    def check(family):
        weights = {"low": 0.6, "low in one layer": -1.5}
        params = flatten(plain(family)["params"])
        changed = dict(params)
        for name, weight in weights.items():
            merged = flatten(lora.merge(adapted(family, *MEMBERS[name]))["params"])
            changed = {path: changed[path] + weight * (merged[path] - params[path]) for path in params}
        expected = call(family, {**plain(family), "params": unflatten(changed)})
        assert not near(expected, call(family, combined(family, weights)), "sum")

    each(check, [(family,) for family in FAMILIES])


def test_bottlenecks_are_added_with_their_weights():
    layer = Linear(6)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)), jnp.float32)
    made = layer.init(jax.random.key(0), x)
    rng, own = np.random.default_rng(1), {}
    for name, width, scale, skip in (("a", 3, 0.7, 1.0), ("b", 2, 2.0, 1.0), ("c", 4, 1.0, 0.0)):
        arrays = {
            "bottleneck_down": rng.normal(size=(6, width)), "bottleneck_down_bias": rng.normal(size=width),
            "bottleneck_up": rng.normal(size=(width, 6)), "bottleneck_up_bias": rng.normal(size=6),
            "bottleneck_scale": scale, "bottleneck_skip": skip,
        }  # fmt: skip
        own[name] = {path: jnp.asarray(value, jnp.float32) for path, value in arrays.items()}
    y = layer.apply(nn.unbox(made), x)

    def output(arrays):
        return layer.apply({**nn.unbox(made), "adapters": arrays}, x)

    def check(weights):
        expected = y + sum(weight * (output(own[name]) - y) for name, weight in weights.items())
        found = output(combine(made["params"], own, weights))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)

    each(check, [({"a": 1.0, "b": 1.0},), ({"a": 0.3, "b": -2.0, "c": 0.5},), ({"c": 1.0},), ({},)])


def test_adapters_of_different_kinds_act_together():
    """As the same adapters in one collection, which holds one of each kind in a layer."""

    def check(family):
        names = ("low", "wide", "long", "short")
        own = members(family)
        together = {path: value for name in names[:2] for path, value in flatten(own[name]).items()}
        # Two prefixes in different layers are one prefix whose vectors of the first are not all seen in the second.
        found = call(family, combined(family, dict.fromkeys(names, 1.0), own))
        several = combine(boxed(family)["params"], {n: own[n] for n in names[2:]}, dict.fromkeys(names, 1.0))
        together |= flatten(several)
        expected = call(family, {**plain(family), "adapters": unflatten(together)})
        assert not near(expected, found, "together")
        for name in names:
            fewer = call(family, combined(family, {other: 1.0 for other in names if other != name}, own))
            assert near(found, fewer, name), f"{name} has no effect"

    each(check, [(family,) for family in FAMILIES])


def test_recomputed_activations_change_no_gradient():
    names = {"low": 0.5, "low in one layer": 1.0, "wide": 1.0, "long": 1.0, "short": 1.0}
    variables = combined("scgpt", names, {name: members("scgpt")[name] for name in names})
    given = inputs("scgpt")

    def gradient(remat):
        module = registry.family("scgpt").module(config("scgpt", remat=remat))

        def loss(own):
            made = module.apply({**variables, "adapters": own}, **given)["encoder_output"]
            return (made * jnp.cos(jnp.arange(made.size)).reshape(made.shape)).sum()

        return jax.jit(jax.grad(loss))(variables["adapters"])

    single, again = flatten(gradient("none")), flatten(gradient("level"))
    trained = [path for path in single if path.split("/")[-1] in kind_of(path.split("/")[-1]).trained]
    assert all(np.abs(single[path]).max() > 0 for path in trained)
    chex.assert_trees_all_close(
        {p: again[p] for p in trained}, {p: single[p] for p in trained}, rtol=1e-4, atol=1e-5
    )


def test_what_has_no_meaning_is_refused():
    def check(weights, word):
        with pytest.raises(ConfigError, match=word) as refused:
            combined("scgpt", weights)
        assert str(refused.value).count(". ") == 0

    each(
        check,
        [
            ({"short": 1.0, "all": 1.0}, "both have a prefix"),
            ({"long": 0.5}, "0 or 1"),
            ({"paper": 1.5}, "without a skip.*1.5"),
            ({"low": float("nan")}, "weight of 'low'"),
            ({"low": "much"}, "weight of 'low'"),
        ],
    )


def tuned(base: Pretrained, name: str, labels: tuple[str, ...], seed: int) -> Pretrained:
    """Model as fine-tuning returns it, with random numbers in place of trained ones."""
    options = MEMBERS[name]
    made = nn.unbox(sct.models.adapters.init(jax.random.key(seed), shapes(base)["params"], *options))
    made = jax.tree.map(lambda x: x if x.dtype == jnp.int32 or x.ndim < 2 else x + 0.1 * (1 + seed), made)
    head = nn.unbox(classifier.init(jax.random.key(seed), base.config.embed_dim, len(labels)))
    record = {"labels": list(labels), "label_key": "cell_type", "temperature": 1.0, "method": "lora"}
    return dataclasses.replace(
        base,
        variables={**base.variables, "adapters": made, "classifier": head},
        data={**base.data, ANNOTATION: record},
    )


def shapes(base: Pretrained) -> Any:
    return sct.weights.pretrained.boxed_shapes(base.family, base.config)


@pytest.fixture(scope="module")
def some() -> tuple[Pretrained, dict[str, Pretrained]]:
    base = tuned_models.scgpt()
    return base, {
        "low": tuned(base, "low", ("B", "T"), 0),
        "wide": tuned(base, "wide", ("B", "NK", "T"), 1),
        "long": tuned(base, "long", ("x", "y", "z", "w"), 2),
        "short": tuned(base, "short", ("x", "y"), 3),
    }


def test_switching_and_combining_compile_nothing(some, tmp_path):
    base, models = some
    for name, model in models.items():
        adapter_folder.save(model, tmp_path / name)
    made = AdapterSet.load(base, {name: tmp_path / name for name in models})
    cells = tuned_models.cells(12, seed=7)
    program = _compiled(base.family, base.config, ("cell_emb",))
    before = program._cache_size()
    uses: list[Any] = [*models, {"low": 0.5, "wide": 2.0}, {"wide": 1.0, "long": 1.0, "short": 1.0}, {}]
    for use in uses:
        names = [use] if isinstance(use, str) else list(use)
        handle = made.use(use, classifier=names[-1] if names else None)
        assert handle.variables["params"] is base.variables["params"]
        sct.tl.embed(cells, handle, batch_size=4, key_added="X_one")
        if isinstance(use, str):
            sct.tl.annotate(cells, handle, batch_size=4)
            assert list(cells.uns["sct_label"]["labels"]) == models[use].data[ANNOTATION]["labels"]
    assert program._cache_size() == before + 1
    # Each alone gives what its own model gives, which has other shapes and compiles anew.
    for name, model in models.items():
        sct.tl.embed(cells, made.use(name), batch_size=4, key_added="X_one")
        sct.tl.embed(cells, model, batch_size=4, key_added="X_two")
        np.testing.assert_allclose(cells.obsm["X_one"], cells.obsm["X_two"], rtol=1e-4, atol=1e-5)
    assert program._cache_size() > before + 1
    # Without active adapters, the set is its base.
    sct.tl.embed(cells, made.use({}), batch_size=4, key_added="X_one")
    sct.tl.embed(cells, base, batch_size=4, key_added="X_two")
    np.testing.assert_allclose(cells.obsm["X_one"], cells.obsm["X_two"], rtol=1e-4, atol=1e-5)


def test_a_classifier_reads_the_output_it_was_trained_on(some):
    base, models = some
    cells = tuned_models.cells(12, seed=7)

    def answers(model: Pretrained) -> np.ndarray:
        return sct.tl.annotate(cells, model, batch_size=4, copy=True).obsm["sct_label_probabilities"]

    expected = answers(models["wide"])
    record = {"default": "mean"}  # what `sct.tl.record_benchmark` writes
    plain, mean = (
        sct.tl.embed(cells, base, copy=True, **options).obsm["X_sct"] for options in ({}, {"readout": "mean"})
    )
    assert np.abs(plain - mean).max() > 0.01
    np.testing.assert_array_equal(answers(dataclasses.replace(models["wide"], embedding=record)), expected)
    made = AdapterSet(models)
    made.base = dataclasses.replace(base, embedding=record)
    assert made.use({}).embedding == record
    active = made.use("wide")
    assert active.embedding == {}, "the comparison was of the base model"
    np.testing.assert_allclose(answers(active), expected, rtol=1e-4, atol=1e-5)


def test_a_combination_is_a_model_that_is_saved(some, tmp_path):
    base, models = some
    handle = AdapterSet(models).use({"low": 0.5, "wide": 1.0, "short": 1.0}, classifier="wide")
    adapter_folder.save(handle, tmp_path / "adapters")
    handle.save_pretrained(tmp_path / "model")
    again = (adapter_folder.load(base, tmp_path / "adapters"), sct.load(tmp_path / "model"))
    for found in again:
        chex.assert_trees_all_equal(dict(flatten(found.variables)), dict(flatten(handle.variables)))
        assert found.data[ANNOTATION]["labels"] == ["B", "NK", "T"]
    # A combination can be a member of another set.
    both = AdapterSet({"mixed": handle, "long": models["long"]})
    cells = tuned_models.cells(6, seed=7)
    sct.tl.embed(cells, handle, batch_size=6, key_added="X_one")
    sct.tl.embed(cells, both.use("mixed"), batch_size=6, key_added="X_two")
    np.testing.assert_allclose(cells.obsm["X_one"], cells.obsm["X_two"], rtol=1e-4, atol=1e-5)


def test_sets_that_do_not_fit_are_refused(some, tmp_path):
    base, models = some
    made = AdapterSet(models)
    other = dataclasses.replace(
        models["wide"],
        variables={
            **models["wide"].variables,
            "params": jax.tree.map(lambda x: x + 1, base.variables["params"]),
        },
    )
    low = {"low": tmp_path / "low"}
    adapter_folder.save(models["low"], low["low"])

    def check(run, word, error=ConfigError):
        with pytest.raises(error, match=word):
            run()

    each(
        check,
        [
            (lambda: AdapterSet({}), "empty"),
            (lambda: AdapterSet({"base": base}), "neither adapters nor a classifier"),
            (lambda: AdapterSet({**models, "other": other}), "hash"),
            (lambda: AdapterSet.load(adapter_folder.base_of(other), low), "hash", CheckpointError),
            (lambda: made.use("lowest"), "lowest"),
            (lambda: made.use({"low": 1.0, "wide": 1.0}), "classifier="),
            (lambda: made.use("low", classifier="wide"), "classifier"),
        ],
    )  # fmt: skip
    assert "classifier" not in made.use("low", classifier="").variables
    assert ANNOTATION not in made.use({"low": 0.0}).data
