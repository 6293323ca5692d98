"""The law of manifests: a family that lives in this folder alone does all that those of the package do."""

from __future__ import annotations

import copy
import dataclasses
import json
import re

import chex
import jax
import numpy as np
import pytest

import sct
from configs.benchmark import get_config
from sct import families
from sct.benchmarks.zero_shot import benchmark
from sct.data.cells import CellCounts
from sct.errors import ConfigError
from sct.families.tasks import task_spec_of
from sct.models import adapters, registry
from sct.models.adapter_kinds import LoraConfig
from sct.nn.paths import flatten
from sct.speed.job import SpeedOptions
from sct.speed.run import measure
from sct.tasks.adapted import Adapted
from sct.train.experiment import run
from sct.weights.pretrained import boxed_shapes
from tests.families import toy
from tests.train.conftest import merged, read_log


@pytest.fixture(scope="module", autouse=True)
def registered():
    families.register(toy.FAMILY)
    yield
    families.unregister(toy.FAMILY)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "run"
    return run(toy.CONFIG, folder), folder


@pytest.fixture(scope="module")
def cells():
    return sct.datasets.pbmc68k()[:60].copy()


def test_it_trains_resumes_bit_by_bit_and_exports(trained, tmp_path):
    whole, folder = trained
    losses = [entry["validation/loss"] for entry in read_log(folder) if "validation/loss" in entry]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    assert run(merged(toy.CONFIG, train__stop_at=20), tmp_path / "parts").reason == "stop_at"
    second = run(toy.CONFIG, tmp_path / "parts")
    assert second.reason == whole.reason == "finished"
    chex.assert_trees_all_equal(whole.state, second.state, strict=True)
    model = sct.load(folder)
    assert model.family == "toy"
    assert model.config == toy.ToyConfig(len(model.vocabulary), 24)
    chex.assert_trees_all_equal(flatten(model.variables), dict(flatten(sct.load(folder / "model").variables)))


def test_it_embeds_and_says_what_it_cannot(trained, cells):
    model = sct.load(trained[1])
    sct.tl.embed(cells, model, batch_size=7)
    seen = toy.ToyReader(model).records(CellCounts(cells, model.vocabulary), np.arange(60), 0)["seen"]
    expected = model.apply(seen=seen, outputs=["cell_embedding"])["cell_embedding"]
    np.testing.assert_allclose(cells.obsm["X_sct"], expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="'toy', which can embed cells, but not impute genes"):
        sct.tl.impute(cells, model, genes=["CD3E"])
    with pytest.raises(ConfigError, match="cells_per_bag is 5"):
        sct.tl.embed(cells, model, cells_per_bag=5)
    sct.tl.annotate(cells[:20].copy(), model, reference=cells, label_key="bulk_labels")


def test_it_takes_adapters(trained, cells, tmp_path):
    folder = trained[1]
    before = sct.load(folder)
    config = merged(
        toy.CONFIG, init_from=str(folder), adapters={"kind": "low_rank", "rank": 3}, train__steps=20
    )
    run(config, tmp_path / "tuned")
    tuned = sct.load(tmp_path / "tuned")
    chex.assert_trees_all_equal(tuned.variables["params"], before.variables["params"])
    assert {path for path, *_ in adapters.adapters_of(tuned.variables)} == {"down"}
    assert np.asarray(tuned.variables["adapters"]["down"]["lora_b"]).any()
    inputs = {"seen": np.random.default_rng(0).random((4, len(before.vocabulary)), np.float32)}
    adapted = tuned.apply(**inputs)
    assert not np.allclose(adapted["bins"], before.apply(**inputs)["bins"], atol=1e-6)
    one = dataclasses.replace(before, variables=adapters.merge(tuned.variables))
    chex.assert_trees_all_close(one.apply(**inputs), adapted, rtol=1e-5, atol=1e-5)
    for change, words in (
        ({"adapters": {"kind": "prefix"}}, "low_rank or bottleneck"),
        ({"adapters": {"kind": "low_rank", "width": 3}}, "adapters.width"),
        ({"adapters": {"rank": 3}}, "adapters.rank"),
        ({"adapters": {"kind": "rings"}}, "adapters.kind"),
        ({"init_from": ""}, "init_from"),
    ):
        with pytest.raises(ConfigError, match=words):
            run({**config, **change}, tmp_path / "refused")


def test_it_is_fine_tuned(trained, cells):
    model, methods = sct.load(trained[1]), toy.FAMILY.models["toy"].finetune.methods
    assert methods == ("full", "classifier", "lora", "gene_encoder")
    made = sct.tl.finetune(
        cells, model, label_key="bulk_labels", method="gene_encoder", method_options={"width": 4}, epochs=2,
        test_fraction=0, baselines=False,
    )  # fmt: skip
    assert {path for path, *_ in adapters.adapters_of(made.variables)} == {"down"}
    sct.tl.annotate(cells, made)
    assert set(cells.obs["sct_label"]) <= set(cells.obs["bulk_labels"].astype(str))
    with pytest.raises(ConfigError, match="prefix"):
        sct.tl.finetune(cells, model, label_key="bulk_labels", method="prefix")


def test_targets_that_are_named_need_no_defaults():
    options = {"targets": ("down",), "rank": 3}
    assert LoraConfig.of("zeromics", **options) == LoraConfig(**options)
    with pytest.raises(ConfigError, match=r"'zeromics'.*adapters\.targets"):
        LoraConfig.of("zeromics", rank=3)


def test_an_adapted_task_is_copied():
    adapted = copy.copy(Adapted(toy.ToyTask.__new__(toy.ToyTask), LoraConfig()))
    assert (adapted.monitor, adapted.take_pretrained_params()) == ("loss", {})
    with pytest.raises(AttributeError, match="rings"):
        _ = adapted.rings


def test_it_is_timed():
    found = measure(merged(toy.CONFIG, data={}), SpeedOptions("train", steps=3, cells=1_000), apart=False)
    assert found["tokens_per_s"] > 0
    assert 0 < found["utilisation"] < 1
    assert max(found["check"]["differences"].values()) < 1e-4
    with pytest.raises(ConfigError, match="--mode=forward cannot measure the task 'toy_bins'"):
        measure(merged(toy.CONFIG, data={}), SpeedOptions("forward", steps=3), apart=False)


def test_it_is_measured(trained, cells, tmp_path):
    config = json.loads(json.dumps(get_config("quick").to_dict()))
    config["data"].update(label_key="bulk_labels")
    config.update(output=str(tmp_path / "report"), model=str(trained[1]), seeds=1)
    for name in ("natural_imputation", "gene_imputation", "cell_imputation"):
        config[name]["run"] = False
    tables = benchmark(config, cells)
    rows = tables[0].as_dict()["rows"]
    assert "model" in [row[0] for row in rows]


def test_names_are_taken_once():
    taken = dataclasses.replace(toy.FAMILY, models={"gpt2": toy.FAMILY.models["toy"]})
    with pytest.raises(ConfigError, match="gpt2"):
        families.register(dataclasses.replace(taken, name="other"))
    model = toy.FAMILY.models["toy"]
    kind = dataclasses.replace(toy.SPEC, name="masked_bins")
    converter = families.Converter(lambda *given: None)
    for changes, words in (
        (
            {"models": {"other": dataclasses.replace(model, tasks=(kind,))}},
            "the task name 'masked_bins' is already used",
        ),
        (
            {"models": {"other": model}, "converters": {"hf": converter}},
            "the converter name 'hf' is already used",
        ),
        ({"models": {"other": dataclasses.replace(model, tasks=())}, "name": "bert"}, "bert"),
    ):
        with pytest.raises(ConfigError, match=words):
            families.register(dataclasses.replace(toy.FAMILY, **{"name": "other", **changes}))
    families.register(dataclasses.replace(toy.FAMILY))  # as when a cell of a notebook runs again
    families.register(families.all_families()["sct"])
    families.unregister(families.all_families()["sct"])
    assert {"sct", "toy"} <= set(registry.MODELS)
    with pytest.raises(ConfigError, match=r"cannot train .*'sct': set family to one of toy"):
        task_spec_of({"family": "sct", "task": "toy_bins"})
    assert registry.family("toy").config is toy.ToyConfig
    shapes = boxed_shapes("toy", toy.ToyConfig(30))
    assert jax.tree.leaves(shapes)


def test_pages_of_families_say_what_the_manifests_say():
    from tools.make_family_pages import ROOT, page

    built_in = {name: each for name, each in families.all_families().items() if name != toy.FAMILY.name}
    assert {path.stem for path in (ROOT / "docs/families").glob("*.md")} == set(built_in)
    for name, family in built_in.items():
        said = (ROOT / f"docs/families/{name}.md").read_text()
        assert said == page(family), "run: python tools/make_family_pages.py docs/families"
        links = re.findall(r"\]\((../../[^)]+)\)", said)
        assert links
        assert not [link for link in links if not (ROOT / "docs/families" / link).exists()]
