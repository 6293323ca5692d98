"""Fine-tuning for cell types: methods over families, frozen weights, folders of adapters, and what annotate makes."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import chex
import flax.linen as nn
import jax
import numpy as np
import pytest

import sct
from sct import families
from sct.data.cells import CellCounts
from sct.errors import CheckpointError, ConfigError, DataError
from sct.inference import records, token_cells
from sct.models import adapters, classifier
from sct.models.registry import family
from sct.nn.adapters import COLLECTION
from sct.nn.paths import flatten, resolve
from sct.tasks import finetuning
from sct.tasks.annotation import AnnotationConfig
from sct.tasks.finetuning import METHODS, PeftConfig
from sct.train import finetuning as training
from sct.weights import adapter_folder
from sct.weights.pretrained import _compiled, boxed_shapes
from tests.cases import each
from tests.train import tuned_models

SMALL = {"rank": 2, "length": 3, "width": 4}
QUICK = {"label_key": "cell_type", "epochs": 2, "learning_rate": 1e-2, "batch_size": 16, "baselines": False}
GENES_AND_CLS = tuned_models.GENES + 1
# Trained parameters of the published whole-human model with 11 types (scPEFT paper, Table 3).
COUNTS = {
    "classifier": 533_003, "gene_token": 664_715, "prefix": 926_219, "lora": 1_270_283, "gene_encoder": 2_113_547,
}  # fmt: skip


def shapes(architecture, config, peft, number):
    """Boxed shapes of a model that is fine-tuned, and its entry in the manifest."""
    boxed, how = boxed_shapes(architecture, config), families.model(architecture).finetune
    made = peft.adapters(how, boxed["params"], architecture)
    width = config.embed_dim
    return jax.eval_shape(
        lambda key: finetuning.init(key, boxed, made, width, number), jax.random.key(0)
    ), how


def test_trained_parameters_are_those_of_the_paper():
    config = family("scgpt").config(vocab_size=60_697)
    total = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(boxed_shapes("scgpt", config)))

    def check(method, expected):
        peft = PeftConfig(method=method)
        boxed, how = shapes("scgpt", config, peft, 11)
        assert finetuning.count_trained(boxed, peft, how) == expected
        assert expected < 0.05 * total
        own = adapters.count(boxed.get(COLLECTION, {})) + classifier.count(boxed[classifier.COLLECTION])
        assert own == expected, "a folder of adapters holds what is trained"

    each(check, COUNTS.items())


def test_methods_attach_to_all_architectures_that_declare_them():
    small = {
        "sct": tuned_models.sct().config, "zeromics_cells": tuned_models.zeromics().config,
        "gpt2": family("gpt2").config(vocab_size=20, embed_dim=16, num_layers=2, num_heads=2),
        "neox": family("neox").config(vocab_size=20, embed_dim=16, num_layers=2, num_heads=2, ffn_dim=16),
        "llama": family("llama").config(vocab_size=20, embed_dim=16, num_layers=2, num_heads=2, ffn_dim=16),
        "scgpt": family("scgpt").config(
            vocab_size=20, pad_id=18, cls_id=19, embed_dim=16, num_layers=2, num_heads=2, ffn_dim=16
        ),
    }  # fmt: skip
    declared = {
        name: model.finetune for name, model in families.models().items() if model.finetune is not None
    }
    assert set(declared) == set(small)

    def check(name, method):
        peft = PeftConfig(method=method, **SMALL)
        if method not in declared[name].methods:
            assert method == "gene_token"
            with pytest.raises(ConfigError, match=r"peft\.method.*gene_token"):
                shapes(name, small[name], peft, 3)
            return
        boxed, how = shapes(name, small[name], peft, 3)
        flat = flatten(nn.unbox(boxed))
        trained = {path for path, on in resolve(peft.trainable(how, flat), flat, "trainable").items() if on}
        tops = {path.split("/")[0] for path in trained}
        kinds = {kind.name for _, kind, _ in adapters.adapters_of(nn.unbox(boxed))}
        expected = {
            "prefix": "prefix",
            "lora": "low-rank",
            "gene_token": "bottleneck",
            "gene_encoder": "bottleneck",
        }
        assert kinds == ({expected[method]} if method in expected else set())
        assert tops == {"classifier"} | ({"adapters"} if kinds else set()) | (
            {"params"} if method == "full" else set()
        )
        for pattern in how.frozen:
            assert not any(path in trained for path in flat if path.startswith(pattern.strip("^$")))

    each(check, [(name, method) for name in small for method in METHODS])


@pytest.fixture(scope="module")
def tuned():
    """Model that is fine-tuned in two ways, with equal shapes; and the cells."""
    base = tuned_models.zeromics()
    before = {path: np.array(value) for path, value in flatten(base.variables).items()}
    made = []
    for seed in (0, 1):
        adata = tuned_models.cells(144)
        options = {**QUICK, "epochs": 12, "method_options": {"width": 4}}
        made.append(
            sct.tl.finetune(adata, base, method="gene_token", donor_key="donor", seed=seed, **options)
        )
    after = {path: np.array(value) for path, value in flatten(base.variables).items()}
    chex.assert_trees_all_equal(before, after, strict=True)
    return base, made, adata


def assert_reads_cells(labels, true):
    """Labels are right, and not because of common labels: those of the neighboring cells, of other types, are wrong."""
    labels = np.asarray(labels)
    right, of_others = np.mean(labels == true), np.mean(np.roll(labels, 1) == true)
    assert right > 0.6
    assert right - of_others > 0.4


def test_a_classifier_learns_types_and_annotates(tuned, tmp_path):
    base, (first, second), adata = tuned
    assert first.data["annotation"]["labels"] == list(tuned_models.NAMES)
    found = adata.uns["sct_finetune"]
    assert found["validation_loss"] < 0.8 * np.log(3)
    assert "donor" in found["split"]
    splits = adata.obs["sct_finetune_split"]
    for name in ("train", "validation", "test"):
        others = set(adata.obs["donor"][~splits.isin(["", name])])
        assert not set(adata.obs["donor"][splits == name]) & others
    assert splits.iloc[-1] == "", "a cell without a label is not used"
    query = tuned_models.cells(30, seed=5)
    query.obs["cluster"] = (np.arange(30) % 3).astype(str)
    sct.tl.annotate(query, first, over_clustering="cluster")
    true = np.array(tuned_models.NAMES)[np.arange(30) % 3]
    labels = query.obs["sct_label"].astype(str)
    assert_reads_cells(labels, true)
    most = labels.groupby(query.obs["cluster"]).agg(lambda own: own.value_counts().max())
    voted = query.obs["sct_label_majority"].astype(str)
    assert voted.groupby(query.obs["cluster"]).nunique().max() == 1
    for cluster, number in most.items():
        here = query.obs["cluster"] == cluster
        assert (labels[here] == voted[here]).sum() == number
    np.testing.assert_allclose(query.obsm["sct_label_probabilities"].sum(axis=1), 1, rtol=1e-5)
    # The folder has the adapters and the classifier, and gives the same probabilities.
    adapter_folder.save(first, tmp_path / "adapters")
    again = adapter_folder.load(base, tmp_path / "adapters")
    chex.assert_trees_all_equal(dict(flatten(again.variables)), dict(flatten(first.variables)))
    assert again.data["annotation"] == first.data["annotation"]
    other = dataclasses.replace(base, variables=jax.tree.map(lambda x: x + 1, base.variables))
    with pytest.raises(CheckpointError, match="hash"):
        adapter_folder.load(other, tmp_path / "adapters")
    with pytest.raises(ConfigError, match="already has"):
        adapter_folder.load(first, tmp_path / "adapters")
    with pytest.raises(ConfigError, match="already has"):
        sct.tl.finetune(adata, first, **QUICK)
    # Two fine-tuned models of one base share its arrays and the compiled program.
    assert first.variables["params"] is second.variables["params"]
    program = _compiled(base.family, base.config, ("cell_embedding",))
    sct.tl.embed(query, first, batch_size=8)
    size = program._cache_size()
    sct.tl.embed(query, second, batch_size=8)
    assert program._cache_size() == size
    refused: tuple[tuple[dict[str, object], str], ...] = (
        ({"candidates": ["T", "B"]}, "candidates"),
        ({"label_key": "tissue"}, "label_key"),
        ({"templates": 2}, "templates"),
        ({"over_clustering": "nothing"}, "over_clustering"),
    )
    for options, word in refused:
        with pytest.raises((ConfigError, DataError), match=word):
            sct.tl.annotate(query, first, **options)


@pytest.mark.slow
def test_only_full_changes_the_weights(tmp_path):
    base = tuned_models.zeromics()

    def check(method):
        before = {path: np.array(value) for path, value in flatten(base.variables).items()}
        options = {} if method in ("full", "classifier") else {"method_options": SMALL}
        made = sct.tl.finetune(
            tuned_models.cells(), base, method=method, output=tmp_path / method, **QUICK, **options
        )
        same = {path: np.array(value) for path, value in flatten(base.variables).items()}
        chex.assert_trees_all_equal(before, same, strict=True)
        changed = [
            path for path, value in before.items() if not np.array_equal(value, flatten(made.variables)[path])
        ]
        assert bool(changed) == (method == "full")
        assert "params/features" not in changed
        assert (tmp_path / method / "report.html").is_file()
        if method == "full":
            loaded = sct.load(tmp_path / method / "model")
            with pytest.raises(ConfigError, match="full"):
                adapter_folder.save(made, tmp_path / "no")
        else:
            loaded = sct.load(saved, adapters=tmp_path / method / "adapters")
        query = tuned_models.cells(12, seed=3)
        found = [
            sct.tl.annotate(query, each, copy=True).obsm["sct_label_probabilities"] for each in (made, loaded)
        ]
        np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-6)

    saved = tmp_path / "base"
    base.save_pretrained(saved)
    each(check, [(method,) for method in (*METHODS, "lora+gene_token")])


@pytest.mark.slow
def test_models_of_bags_are_fine_tuned():
    base, adata = tuned_models.sct(), tuned_models.cells()
    made = sct.tl.finetune(
        adata, base, method="lora", method_options={"rank": 2}, class_weights="balanced",
        **{**QUICK, "epochs": 12, "batch_size": 10},
    )  # fmt: skip
    assert adata.uns["sct_finetune"]["validation_loss"] < np.log(3)
    query = tuned_models.cells(23, seed=4)
    sct.tl.annotate(query, made)
    assert "sct_label_agreement" in query.obs
    chex.assert_trees_all_equal(made.variables["params"], base.variables["params"])


@pytest.mark.slow
def test_models_of_sampled_genes_are_fine_tuned():
    base, adata = tuned_models.scgpt(), tuned_models.cells(90)
    options = {**QUICK, "epochs": 6, "method_options": {"width": 4}}
    made = sct.tl.finetune(adata, base, method="gene_token", **options)
    query = tuned_models.cells(30, seed=5)
    sct.tl.annotate(query, made)
    true = np.array(tuned_models.NAMES)[np.arange(30) % 3]
    assert_reads_cells(query.obs["sct_label"].astype(str), true)
    chex.assert_trees_all_equal(made.variables["params"], base.variables["params"])


@pytest.mark.slow
def test_the_output_is_checked_before_training_and_written_before_the_evaluation(tmp_path, monkeypatch):
    base, output = tuned_models.zeromics(), tmp_path / "out"
    options = {**QUICK, "method": "classifier", "output": output}
    real = training.train

    def stopped(*arguments, **more):
        return dataclasses.replace(real(*arguments, **more), reason="interrupt")

    monkeypatch.setattr(training, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        sct.tl.finetune(tuned_models.cells(), base, **options)
    assert adapter_folder.load(base, output / "adapters").data["annotation"]["temperature"] != 1
    assert {path.name for path in output.iterdir()} == {"adapters"}

    def never(*arguments, **more):
        raise AssertionError("trained before the output was checked")

    monkeypatch.setattr(training, "train", never)
    with pytest.raises(ConfigError, match="overwrite"):
        sct.tl.finetune(tuned_models.cells(), base, **options)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file"):
        sct.tl.finetune(tuned_models.cells(), base, **{**options, "output": tmp_path / "file"})
    # Results of another method do not stay.
    monkeypatch.setattr(training, "train", real)
    (output / "report.html").touch()
    options = {**options, "method": "full", "overwrite": True, "test_fraction": 0}
    sct.tl.finetune(tuned_models.cells(), base, **options)
    assert {path.name for path in output.iterdir()} == {"model"}


def test_models_that_read_batches_are_refused():
    config = dataclasses.replace(tuned_models.scgpt().config, num_batches=2, domain_norm="affine")
    base = dataclasses.replace(tuned_models.scgpt(), config=config)
    with pytest.raises(ConfigError, match="domain_norm"):
        sct.tl.finetune(tuned_models.cells(), base, **QUICK)


def test_records_that_are_not_kept_are_made_in_blocks(monkeypatch):
    monkeypatch.setattr(records, "CACHE_BYTES", 0)
    adata = tuned_models.cells()
    cells, rows = CellCounts(adata, tuned_models.vocabulary()), np.arange(3, adata.n_obs)

    def check(base):
        reader, calls = families.require(base, "embed"), []
        real = reader.records
        reader.records = lambda cells, rows, seed: (calls.append(len(rows)), real(cells, rows, seed))[1]
        source = reader.source(cells, rows, shuffle=False)
        found = [source.record(number) for number in range(len(rows))]
        assert sum(calls) <= len(rows) + 1, "each cell is converted once, and one to measure it"
        assert len(calls) <= 2
        single = reader.source(cells, rows, shuffle=True)
        for number, record in enumerate(found):
            chex.assert_trees_all_equal(record, single.record(number))

    each(check, [(tuned_models.zeromics(),), (tuned_models.scgpt(),)])


def test_records_for_training_are_as_long_as_the_longest_cell(monkeypatch):
    monkeypatch.setattr(token_cells, "_STEP", 3)
    base = tuned_models.scgpt()
    adata = tuned_models.cells()
    cells = CellCounts(adata, tuned_models.vocabulary())
    expressed = np.asarray((adata.X > 0).sum(axis=1)).ravel()

    def check(options, rows, expected):
        reader = families.require(dataclasses.replace(base, data={**base.data, **options}), "embed")
        full = reader.records(cells, rows, 0)
        source = reader.source(cells, rows, shuffle=False)
        found = [source.record(number) for number in range(len(rows))]
        assert {record["gene_ids"].shape for record in found} == {(expected,)}
        for name in ("gene_ids", "values", "padding_mask"):
            np.testing.assert_array_equal([record[name] for record in found], full[name][:, :expected])
        assert full["padding_mask"][:, expected:].all(), "no gene was cut"

    some, every = np.flatnonzero(expressed == 8), np.arange(adata.n_obs)
    assert len(some)
    assert expressed.max() == 11
    long = {"max_genes": 20, "genes": "sampled"}
    each(
        check,
        [
            (long, some, 9), (long, every, 12), ({"max_genes": 5, "genes": "top"}, every, 6),
            ({"max_genes": 0, "genes": "all"}, every, GENES_AND_CLS),
        ],
    )  # fmt: skip


def test_the_command_names_all_methods():
    source = Path(sct.__file__).with_name("commands").joinpath("finetune.py").read_text()
    assert ast.literal_eval(re.search(r"_METHODS = (\(.*?\))", source).group(1)) == METHODS


def test_mistakes_are_refused():
    base = tuned_models.zeromics()

    def check(options, word):
        with pytest.raises((ConfigError, DataError), match=word):
            sct.tl.finetune(tuned_models.cells(), base, **{**QUICK, **options})

    each(
        check,
        [
            ({"label_key": "kind"}, "label_key"),
            ({"method": "rings"}, "peft.method"),
            ({"method": "full+lora"}, "combined"),
            ({"method_options": {"size": 3}}, "method_options"),
            ({"method_options": {"rank": "many"}}, "rank"),
            ({"split_key": "donor"}, "train, validation and test"),
            ({"donor_key": "patient"}, "donor_key"),
            ({"class_weights": "some"}, "class_weights"),
            ({"epochs": 0}, "epochs"),
            ({"test_fraction": 1.0}, "test_fraction"),
        ],
    )
    with pytest.raises(ConfigError, match="init_from"):
        AnnotationConfig().check_start("")
