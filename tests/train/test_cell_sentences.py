"""Cell sentences from task to run folder: the loss of packed texts, runs that resume, models to start from."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

import sct
from sct.data.store import Store
from sct.data.text.prompts import Template
from sct.data.text.tokenizer import Tokenizer
from sct.errors import CheckpointError, ConfigError, SctError, StoreError
from sct.families.tasks import make_task, task_spec_of
from sct.generation.cell_sentence_model import CellSentenceModel
from sct.models import lora, registry
from sct.models.decoder import Decoder
from sct.nn.paths import flatten
from sct.tasks import cell_sentences, sentence_reports
from sct.tasks.cell_sentences import Adapters, CellSentences, CellSentencesConfig, SentenceData
from sct.train import experiment
from sct.train.experiment import run
from tests.cached import cached
from tests.data.text.toy_texts import SHORT, ToyStore, ToyStudy, study, tokenizer
from tests.random_models import random_model

from .conftest import merged, read_log, same, without_times

SIZES = {"embed_dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 24, "max_length": 96}
TASKS = (("unconditional", 1.0), ("cell_type_to_cell", 1.0), ("cell_to_cell_type", 2.0))
CONFIG: dict[str, Any] = {
    "family": "gpt2", "task": "cell_sentences", "model": {"vocab_size": 0, **SIZES},
    "data": {"top_k": 4, "length": 96, "vocab_size": 330},
    "objective": {"tasks": TASKS, "loss_on": "all", "balance": "texts", "report_cells": 16, "report_seeds": 1},
    "optimizer": {"peak_lr": 1e-2, "warmup_steps": 2},
    "train": {"steps": 6, "batch_size": 4, "log_every": 1, "eval_every": 3, "checkpoint_every": 2, "loader_threads": 1},
}  # fmt: skip
FOREIGN = {"gpt2": {}, "neox": {"rotary_fraction": 0.5}, "llama": {"num_kv_heads": 1}}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.json"
    SHORT.save(path)
    return path


def task_of(
    prompts: Path, *studies: ToyStudy, family: str = "gpt2", loss_on: str = "response", balance: str = "tokens",
    tasks: Any = TASKS, model: dict[str, Any] | None = None, report_cells: int = 8, **data: Any,
) -> CellSentences:  # fmt: skip
    """Task over cells in memory."""
    objective = CellSentencesConfig(
        tasks, loss_on, balance, str(prompts), report_cells=report_cells, report_seeds=1
    )
    size = tokenizer().vocab_size
    config = registry.model_config(family, {"vocab_size": size, **SIZES, **FOREIGN[family], **(model or {})})
    made = SentenceData(**{"top_k": 8, "length": 96, **data})
    return CellSentences(objective, made, config, tokenizer(), ToyStore(*studies), seed=0)


@cached
def parameters(family: str) -> Any:
    """Parameters so large that every part counts."""
    config = registry.model_config(family, {"vocab_size": tokenizer().vocab_size, **SIZES, **FOREIGN[family]})
    return random_model(family, config, scale=0.2).variables


def batch_of(task: CellSentences, split: str, number: int) -> dict[str, np.ndarray]:
    source = task.dataset(split)
    assert source is not None
    rows = [source.record(i % len(source), i // len(source)) for i in range(number)]
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return {**batch, "example_mask": np.ones(number, np.float32)}


def texts_of(batch: dict[str, np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens of each text, and which of them are predicted."""
    return [
        (ids[segments == number], predicted[segments == number])
        for ids, segments, predicted, weight in zip(
            *(batch[name] for name in ("input_ids", "segments", "predicted", "example_mask")), strict=True
        )
        if weight
        for number in range(1, segments.max() + 1)
    ]


def alone(task: CellSentences, texts: list[tuple[np.ndarray, np.ndarray]]) -> Any:
    """Loss of texts, each in a row of its own, and its gradients; computed without what is under test."""
    length = task.data.length
    ids = np.stack([np.pad(tokens, (0, length - len(tokens))) for tokens, _ in texts])
    counts = np.stack([np.pad(predicted, (0, length - len(predicted))) for _, predicted in texts])
    weights = counts.astype(np.float32)
    if task.config.balance == "texts":
        weights = weights / np.maximum(weights.sum(axis=1, keepdims=True), 1)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(variables: Any) -> Any:
        logs = jax.nn.log_softmax(Decoder(task.model_config).apply(variables, ids)["logits"], axis=-1)
        losses = -jnp.take_along_axis(logs[:, :-1], ids[:, 1:, None], axis=2)[..., 0]
        hits = (logs[:, :-1].argmax(axis=-1) == ids[:, 1:]) & counts[:, 1:]
        sums = {
            "loss": (losses * counts[:, 1:]).sum(),
            "weighted": (losses * weights[:, 1:]).sum(),
            "right": hits.sum(),
        }
        return sums["weighted"] / weights.sum(), sums | {"weight": weights.sum(), "predicted": counts.sum()}

    return run(parameters_of(task))


def parameters_of(task: CellSentences) -> Any:
    return parameters({0: "gpt2", 1: "neox", 2: "llama"}[["GPT2Config", "NeoXConfig", "LlamaConfig"].index(
        type(task.model_config).__name__)])  # fmt: skip


def packed(task: CellSentences, batch: dict[str, np.ndarray], train: bool = True) -> Any:
    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(variables: Any) -> Any:
        return task.loss(variables, batch, jax.random.key(0), train)

    return run(parameters_of(task))


def agree(task: CellSentences, batch: dict[str, np.ndarray], train: bool = True) -> None:
    (loss, sums), gradients = packed(task, batch, train)
    (expected, parts), slopes = alone(task, texts_of(batch))
    assert loss == pytest.approx(float(expected), rel=1e-5)
    for name, value in parts.items():
        assert float(sums[name]) == pytest.approx(float(value), rel=1e-5), name
    assert loss == pytest.approx(float(sums["weighted"]) / float(sums["weight"]), rel=1e-5)
    most = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(slopes))
    chex.assert_trees_all_close(gradients, slopes, rtol=1e-3, atol=2e-5 * most)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "loss_on", "balance"),
    [
        ("gpt2", "response", "tokens"), ("gpt2", "all", "texts"), ("neox", "response", "texts"),
        ("llama", "all", "tokens"), ("llama", "response", "texts"),
    ],
)  # fmt: skip
def test_texts_in_a_row_have_the_loss_of_the_same_texts_alone(prompts, family, loss_on, balance):
    task = task_of(prompts, study(40), family=family, loss_on=loss_on, balance=balance, length=80)
    batch = batch_of(task, "train", 3)
    assert batch["segments"].max() >= 2
    assert batch["cut"].sum() + (batch["segments"] == 0).sum() > 0
    batch["example_mask"][1] = 0  # a row that fills up a batch
    agree(task, batch)


@pytest.mark.slow
def test_held_out_rows_of_several_texts_where_those_of_training_have_one(prompts):
    long, short = study(12, low=14), study(12, "two", seed=1, split="validation", low=1, high=1)
    task = task_of(prompts, long, short, top_k=0, length=32, tasks=(("cell_to_cell_type", 1.0),))
    for split, several in (("train", False), ("validation", True)):
        batch = batch_of(task, split, 2)
        assert (batch["segments"].max() > 1) == several, "cells are not as this test needs them"
        agree(task, batch, train=split == "train")


def test_dropout_is_for_training(prompts):
    plain, drops = (task_of(prompts, study(20), model={"dropout": rate}) for rate in (0.0, 0.5))
    batch = batch_of(plain, "train", 2)

    @functools.partial(jax.jit, static_argnums=(0, 2))
    def loss(task, key, train):
        return task.loss(parameters("gpt2"), batch, jax.random.key(key), train)[0]

    assert loss(plain, 0, True) == loss(drops, 0, False)
    assert len({float(loss(drops, key, True)) for key in (0, 0, 1)} | {float(loss(plain, 0, True))}) == 3


def test_a_batch_without_a_predicted_token_has_no_loss(prompts):
    task = task_of(prompts, ToyStudy(np.zeros((4, 14)), "none", cell_type=["B cell"] * 4), study(9, "two"))
    batch = batch_of(task, "train", 1)
    batch["predicted"][:] = False
    (loss, sums), gradients = packed(task, batch)
    assert loss == sums["weight"] == 0
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradients))
    assert np.isfinite(list(task.compute_metrics(jax.device_get(sums)).values())).all()


def test_held_out_studies_of_which_nothing_can_be_told_are_no_validation(prompts):
    """A loss of zero over nothing would be the best that there is."""
    held_out = study(9, "two", seed=1, split="validation")
    del held_out.table["cell_type"]
    try:
        source = task_of(prompts, study(20), held_out, tasks=TASKS[1:]).dataset("validation")
    except ConfigError:
        return
    assert source is None


def test_held_out_studies_need_not_be_fit_for_every_task(prompts):
    held_out = study(9, "two", seed=1, split="validation")
    del held_out.table["cell_type"]
    source = task_of(prompts, study(20), held_out).dataset("validation")
    assert source is not None
    assert {each.task for each in source.texts[0].examples(0, 9, 0)} == {"unconditional"}


def test_numbers_that_are_logged(prompts):
    task = task_of(prompts, study(9))
    sums = {"loss": 6.0, "predicted": 3.0, "weighted": 5.0, "weight": 2.0, "right": 1.0, "cut": 1.0}
    assert task.compute_metrics(sums) == pytest.approx(
        {"loss": 2.5, "perplexity": np.exp(2), "accuracy": 1 / 3, "cut": 0.25}
    )
    assert "cut" not in task.compute_metrics({**sums, "cut": 0.0})
    assert task.tokens({"input_ids": np.zeros((3, 7))}) == 21
    assert task.tokens_per_record == 96


def test_values_of_labels_are_those_that_texts_tell(prompts, tmp_path):
    """What may be answered is what was told in training: the most frequent first, nothing that no text has."""
    first, second = study(40), study(25, "two", seed=1)
    for each, column, value in (
        (first, "cell_type", None), (first, "tissue", ""), (second, "cell_type", "  "), (second, "tissue", None),
    ):  # fmt: skip
        each.table.iloc[:3, each.table.columns.get_loc(column)] = value
    second.table.iloc[5, second.table.columns.get_loc("cell_type")] = " T cell "
    (tmp_path / "studies.yaml").write_text("two: {tissue: spleen}\n")
    task = task_of(
        prompts,
        first,
        second,
        tissue="tissue",
        tasks=(*TASKS, ("cell_to_labels", 1.0)),
        labels=("tissue", "cell_type"),
        studies=str(tmp_path / "studies.yaml"),
    )
    source = task.dataset("train")
    assert source is not None
    told: dict[str, Counter[str]] = {"cell_type": Counter(), "tissue": Counter(), "labels": Counter()}
    for texts in source.texts:
        for row in range(texts.study.n_cells):
            for field, value in texts.values(row).items():
                told[field][sentence_reports._text(value)] += 1
    for field, values in task.labels().items():
        expected = sorted(told[field], key=lambda value, field=field: (-told[field][value], value))
        assert values == expected, field
    assert set(task.labels()) == set(told)


def test_a_text_or_a_study_with_more_values_than_labels_have_is_no_label(prompts, monkeypatch):
    monkeypatch.setattr(cell_sentences, "MAX_LABELS", 2)
    assert "cell_type" not in task_of(prompts, study(40)).labels()


def test_what_a_model_folder_says_is_read_back_from_json(prompts):
    task = task_of(prompts, study(40), labels=("tissue", "cell_type"))
    exported = task.exports()
    read = json.loads(json.dumps(exported["data"]))
    sentence_model = CellSentenceModel.of(
        task.model_config, parameters("gpt2"), exported["tokenizer"], exported["genes"], read
    )
    assert sentence_model.prompts == task.prompts
    assert sentence_model.fits == task.fits
    assert (sentence_model.top_k, sentence_model.labels) == (8, task.labels())
    with pytest.raises(ConfigError, match="cell sentences"):
        CellSentenceModel.of(
            task.model_config, {}, exported["tokenizer"], exported["genes"], {"cells_per_bag": 3}
        )


def test_reports_hold_the_cells_with_their_own_labels(prompts):
    first, second = study(30), study(20, "two", seed=1)
    first.table.loc[first.table.index[::2], "cell_type"] = None
    second.table["cell_type"] = None
    first.counts = first.counts.tolil()
    first.counts[1] = 0
    first.counts = first.counts.tocsr()
    source = task_of(prompts, first, second).dataset("train")
    assert source is not None
    cells = sentence_reports.LabeledReferenceCells.read(source.texts, "cell_type", 50)
    rows = np.arange(3, 30, 2)
    np.testing.assert_array_equal(cells.counts.toarray(), first.counts[rows].toarray())
    assert cells.labels.tolist() == first.table["cell_type"].iloc[rows].tolist()
    np.testing.assert_array_equal(cells.keys, source.texts[0].keys[rows])
    few = sentence_reports.LabeledReferenceCells.read(source.texts, "cell_type", 10)
    assert 1 <= len(few.labels) == few.counts.shape[0] <= 11


def perturbed(prompts: Path, held_out: list[tuple[str, str, int]], **options: Any) -> CellSentences:
    """Task over cells of two types, with and without a drug; B cells with it are held out."""
    train = [("T cell", "none", 6), ("T cell", "drug", 5), ("B cell", "none", 4), ("B cell", "sham", 5)]
    train.append(("NK cell", "none", 1))
    made = []
    for name, split, groups in (("one", "train", train), ("two", "test", held_out)):
        cells = study(sum(number for *_, number in groups), name, len(made), split)
        for column, place in (("cell_type", 0), ("dose", 1)):
            cells.table[column] = [group[place] for group in groups for _ in range(group[2])]
        made.append(cells)
    task = task_of(
        prompts,
        *made,
        tasks=(("labels_to_cell", 1.0), ("cell_to_labels", 1.0)),
        labels=("cell_type", "dose"),
        report_cells=30,
    )
    task.config = dataclasses.replace(task.config, perturbation="dose", **options)
    return task


def test_unseen_perturbations_are_compared_with_cells_of_the_same_type(prompts):
    held_out = [("B cell", "drug", 6), ("T cell", "drug", 4), ("NK cell", "drug", 3), ("T cell", "sham", 1)]
    held_out.append(("B cell", "none", 3))
    opposites = {}
    for control in ("", "none"):
        made = perturbed(prompts, held_out, control=control).evaluators()
        assert [each.name for each in made] == ["predicted_labels", "generated_by_labels", "perturbed"]
        opposites[control] = made[-1].opposite
    # NK cells have one training cell without the drug, and T cells with the sham are held out once.
    assert opposites[""] == {"cell_type: B cell; dose: drug": "cell_type: B cell; dose: sham"}
    assert opposites["none"] == {"cell_type: B cell; dose: drug": "cell_type: B cell; dose: none"}
    assert [each.name for each in perturbed(prompts, held_out[:1]).evaluators()] == ["perturbed"]
    # No B cell of training had it: nothing else takes its place.
    assert "perturbed" not in [
        each.name for each in perturbed(prompts, held_out, control="drug").evaluators()
    ]
    with pytest.raises(ConfigError, match=r"objective\.control .*none"):
        perturbed(prompts, held_out, control="None").evaluators()
    assert not perturbed(prompts, held_out[1:2]).evaluators()  # training has these


def test_the_table_of_unseen_perturbations(prompts):
    pytest.importorskip("scanpy")
    task = perturbed(prompts, [("B cell", "drug", 8), ("T cell", "drug", 4)], control="none")
    measured = task.evaluators()[-1]
    numbers = dict(measured(nn.unbox(task.init(jax.random.key(0)))))
    assert measured.report is not None
    assert measured.report.title.startswith("1 unseen conditions, 4 generated cells")
    assert "cell_type: B cell; dose: drug with cell_type: B cell; dose: none." in " ".join(
        measured.report.notes
    )
    real, unchanged = (
        [value for name, value in numbers.items() if name.startswith(row)]
        for row in ("other real cells/", "training cells of the opposite condition/")
    )
    assert len(real) == 8
    assert all(-1 <= value <= 1 for value in real)
    assert np.isnan(unchanged[4:]).all()  # without an effect nothing correlates with it
    assert np.isfinite(unchanged[:4]).all()


def test_texts_of_studies_that_the_store_lacks_are_refused(prompts, tmp_path):
    file = tmp_path / "texts.yaml"
    file.write_text("one: {abstract: Cells.}\nthree: {abstract: Others.}\n")
    with pytest.raises(ConfigError, match=r"'three'.*one"):
        task_of(prompts, study(9), studies=str(file))


def test_held_out_cells_of_labels_that_no_training_cell_has(prompts):
    """A label that the model cannot have learned is left out of the tables, or wrong in them, and no end of a run."""
    held_out = study(20, "two", seed=1, split="test", low=2)
    held_out.table["cell_type"] = np.where(np.arange(20) % 2, "astrocyte", "neuron")
    task = task_of(prompts, study(40), held_out, top_k=2, length=64)
    for evaluator in task.evaluators():
        for name, value in evaluator(parameters("gpt2")):
            assert np.isfinite(value) or "AU" in name, (evaluator.name, name)


@pytest.mark.parametrize(
    ("section", "values", "words"),
    [
        ("objective", {"loss_on": "prompt"}, "loss_on"),
        ("objective", {"balance": "cells"}, "balance"),
        ("objective", {"tasks": ()}, "task"),
        ("objective", {"tasks": (("cell_to_age", 1.0),)}, "weight"),
        ("objective", {"tasks": (("unconditional", 0),)}, "weight"),
        ("objective", {"report_cells": -1}, "report_cells"),
        ("data", {"length": 4}, "length"),
        ("data", {"top_k": -1}, "top_k"),
    ],
)
def test_options_that_cannot_be(section, values, words):
    with pytest.raises(ConfigError, match=words):
        (CellSentencesConfig if section == "objective" else SentenceData)(**values)


def test_models_that_do_not_fit_the_texts(prompts):
    with pytest.raises(ConfigError, match=r"data\.length .*96"):
        task_of(prompts, study(9), length=97)
    assert task_of(prompts, study(9), length=97, family="llama").data.length == 97
    with pytest.raises(ConfigError, match="vocab_size is 300"):
        task_of(prompts, study(9), model={"vocab_size": 300})
    with pytest.raises(ConfigError, match=r"'sct'.*gpt2, neox, llama"):
        task_spec_of({"family": "sct", "task": "cell_sentences"})
    with pytest.raises(ConfigError, match="'sentences'"):
        task_spec_of({"family": "gpt2", "task": "sentences"})


# Runs.


@pytest.fixture(scope="module")
def text_config(store, prompts):
    """Function that gives the small configuration with changes."""
    changed = {"data__store": str(store), "objective__prompts": str(prompts)}
    return lambda **changes: merged(CONFIG, **{**changed, **changes})


@pytest.fixture(scope="module")
def finished(text_config, tmp_path_factory):
    """A whole run, its folder and how it ended."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, run(text_config(), folder)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.slow
def test_the_run_folder_holds_what_was_promised(finished, store):
    folder, result = finished
    assert result.reason == "finished"
    for name in ("tokenizer/tokenizer.json", "model/tokenizer.json", "model/genes.tsv", "model/config.json",
                 "model/model.safetensors", "report.md", "report.json", "genes.tsv", "data.json"):  # fmt: skip
        assert (folder / name).stat().st_size > 0, name
    report = (folder / "report.md").read_text()
    assert "Labels of" in report
    assert "generated cells" in report
    for name in ("predicted_cell_type", "generated_by_cell_type"):
        numbers = json.loads((folder / f"{name}.json").read_text())
        assert numbers
        assert np.isfinite(list(numbers.values())).any()
    settings = json.loads((folder / "config.json").read_text())
    assert settings["model"]["vocab_size"] == 0
    assert settings["resolved_model"]["vocab_size"] == Tokenizer.load(folder / "tokenizer").vocab_size
    assert settings["data"]["store"] == str(store)
    losses = [line["train/loss"] for line in read_log(folder) if "train/loss" in line]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_stopping_and_resuming_equals_never_stopping(finished, text_config, tmp_path, monkeypatch):
    folder, whole = finished
    monkeypatch.setattr(CellSentences, "evaluators", lambda self: ())
    first = run(text_config(train__stop_at=4), tmp_path / "parts")
    assert (first.reason, first.progress.step) == ("stop_at", 4)
    kept = files(tmp_path / "parts" / "tokenizer")
    half = sct.load(tmp_path / "parts")
    assert half.tokenizer.fingerprint == Tokenizer.load(folder / "tokenizer").fingerprint

    def refused(*given):
        raise AssertionError("a tokenizer is trained once")

    monkeypatch.setattr("sct.tasks.cell_sentences.train_bpe", refused)
    second = run(text_config(), tmp_path / "parts")
    assert second.reason == "finished"
    assert files(tmp_path / "parts" / "tokenizer") == kept == files(folder / "tokenizer")
    chex.assert_trees_all_equal(whole.state, second.state, strict=True)
    assert not same(first.state, whole.state)
    assert without_times(read_log(folder)) == without_times(read_log(tmp_path / "parts"))
    # Of an unfinished run too, what goes with the weights is known.
    exported = sct.load(folder)
    assert half.data == json.loads(json.dumps(exported.data)) == exported.data
    assert half.step == 3, "the best checkpoint is the validated one"
    assert half.config == exported.config


@pytest.mark.slow
def test_other_options_are_refused(finished, text_config, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder)
    before = files(folder / "tokenizer"), (folder / "config.json").read_bytes()
    for name, value in (
        ("data__top_k", 5), ("data__vocab_size", 340), ("objective__balance", "tokens"),
        ("objective__tasks", TASKS[:1]),
        ("model__embed_dim", 32), ("data__cell_type", "study"), ("family", "llama"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"the run in .*{name.rpartition('__')[2]}"):
            run(text_config(**{name: value}), folder)
    assert (files(folder / "tokenizer"), (folder / "config.json").read_bytes()) == before


@pytest.mark.slow
def test_run_folder_and_model_folder_are_the_same_model(finished, tmp_path):
    folder = finished[0]
    loaded = [sct.load(folder), sct.load(folder / "model")]
    shutil.copytree(folder, tmp_path / "unexported", ignore=shutil.ignore_patterns("model"))
    loaded.append(sct.load(tmp_path / "unexported"))
    for each in loaded[1:]:
        chex.assert_trees_all_equal(each.variables, loaded[0].variables, strict=True)
        assert each.tokenizer.fingerprint == loaded[0].tokenizer.fingerprint
        assert (each.data, each.config, each.step) == (loaded[0].data, loaded[0].config, loaded[0].step)
        assert each.vocabulary.hash == loaded[0].vocabulary.hash
    assert loaded[0].data["task"] == "cell_sentences"
    made = [sct.tl.generate_cells(each, n=2, max_new_tokens=8) for each in loaded]
    assert (
        made[0].obs["sentence"].tolist()
        == made[1].obs["sentence"].tolist()
        == made[2].obs["sentence"].tolist()
    )


class BegunError(Exception):
    """Says what a run was about to train."""

    def __init__(self, task, start):
        self.task, self.start = task, start


@pytest.fixture
def begun(monkeypatch):
    """Function that gives the task and the first parameters of a run instead of training it."""

    def caught(task, options, optimizer, workdir, start):
        raise BegunError(task, start)

    monkeypatch.setattr(experiment, "train", caught)

    def begin(config, folder):
        with pytest.raises(BegunError) as found:
            run(config, folder)
        return found.value.task, found.value.start

    return begin


@pytest.mark.slow
def test_a_model_to_start_from_brings_architecture_and_tokenizer(finished, text_config, begun, tmp_path):
    parent = sct.load(finished[0])
    config = text_config(
        init_from=str(finished[0] / "model"), model__embed_dim=64, model__num_layers=3, model__dropout=0.25,
        model__remat="level", data__vocab_size=500,
    )  # fmt: skip
    task, start = begun(config, tmp_path / "tuned")
    assert task.model_config == dataclasses.replace(parent.config, dropout=0.25, remat="level")
    assert task.tokenizer.fingerprint == parent.tokenizer.fingerprint
    chex.assert_trees_all_equal(start, flatten(parent.variables), strict=True)
    settings = json.loads((tmp_path / "tuned" / "config.json").read_text())
    assert settings["resolved_model"] == dataclasses.asdict(task.model_config)
    assert settings["model"]["embed_dim"] == 64, "what the person wrote stays"


def test_a_tokenizer_with_more_tokens_lets_the_model_grow(finished, text_config, begun, tmp_path):
    parent = sct.load(finished[0])
    parent.tokenizer.add_special(["<cell>", "</cell>"]).save(tmp_path / "more")
    config = text_config(init_from=str(finished[0]), data__tokenizer=str(tmp_path / "more"))
    task, start = begun(config, tmp_path / "grown")
    size = parent.tokenizer.vocab_size
    assert task.tokenizer.vocab_size == task.model_config.vocab_size == size + 2
    table, old = start["params/token/embedding"], flatten(parent.variables)["params/token/embedding"]
    np.testing.assert_array_equal(table[:size], old)
    np.testing.assert_allclose(
        table[size:], np.repeat(np.asarray(old).mean(axis=0)[None], 2, axis=0), atol=1e-6
    )
    assert (
        json.loads((tmp_path / "grown" / "config.json").read_text())["resolved_model"]["vocab_size"]
        == size + 2
    )


def test_a_model_of_another_family_or_of_other_genes_is_refused(finished, text_config, begun, tmp_path):
    with pytest.raises(ConfigError, match=r"'gpt2'.*'llama'"):
        run(text_config(init_from=str(finished[0]), family="llama"), tmp_path / "a")
    genes = tmp_path / "model"
    shutil.copytree(finished[0] / "model", genes)
    model = sct.load(genes)
    other = model.vocabulary.subset(list(model.vocabulary.ensembl_ids[:50]))
    dataclasses.replace(model, genes=other).save_pretrained(genes)
    with pytest.raises(StoreError, match="vocabular"):
        run(text_config(init_from=str(genes)), tmp_path / "b")
    with pytest.raises(SctError):
        run(text_config(init_from=str(tmp_path / "nothing")), tmp_path / "c")


def test_a_run_that_began_with_nothing_kept_has_the_tokenizer_of_its_own_options(
    finished, text_config, begun, tmp_path
):
    """A run that ended before its first checkpoint leaves a tokenizer of other options behind."""
    begun(text_config(data__vocab_size=290), tmp_path / "run")
    task, _ = begun(text_config(), tmp_path / "run")
    assert task.tokenizer.vocab_size == Tokenizer.load(finished[0] / "tokenizer").vocab_size > 290
    begun(text_config(data__vocab_size=290), tmp_path / "tuned")
    task, _ = begun(text_config(init_from=str(finished[0])), tmp_path / "tuned")
    assert task.tokenizer.fingerprint == sct.load(finished[0]).tokenizer.fingerprint


def test_a_run_without_its_tokenizer_does_not_make_another(finished, text_config, begun, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder)
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(CheckpointError, match="tokenizer"):
        run(text_config(), folder)


def test_files_that_a_run_reads_must_stay_as_they_are(finished, text_config, prompts, begun, tmp_path):
    changed = tmp_path / "prompts.json"
    changed.write_bytes(prompts.read_bytes())
    begun(text_config(objective__prompts=str(changed)), tmp_path / "run")
    shutil.copytree(finished[0] / "checkpoints", tmp_path / "run" / "checkpoints")
    begun(text_config(objective__prompts=str(changed)), tmp_path / "run")
    changed.write_text(prompts.read_text().replace("Write a cell", "Make a cell"))
    with pytest.raises(ConfigError, match=r"objective\.prompts"):
        run(text_config(objective__prompts=str(changed)), tmp_path / "run")
    changed.unlink()
    with pytest.raises(ConfigError, match="prompts"):
        run(text_config(objective__prompts=str(changed)), tmp_path / "run")


def test_a_tokenizer_is_trained_on_texts_of_training_studies_alone(store, prompts, monkeypatch):
    opened, seen = Store.open(store), []
    original = cell_sentences.Texts.examples

    def recording(self, start, stop, epoch):
        seen.append((self.study.name, stop - start))
        return original(self, start, stop, epoch)

    monkeypatch.setattr(cell_sentences.Texts, "examples", recording)
    objective = CellSentencesConfig(tasks=TASKS, prompts=str(prompts))
    made = cell_sentences.make_tokenizer(opened, objective, SentenceData(vocab_size=300, corpus_cells=40), 0)
    assert seen == [("study0", 20), ("study1", 20)]
    assert made.vocab_size <= 300
    again = cell_sentences.make_tokenizer(opened, objective, SentenceData(vocab_size=300, corpus_cells=40), 0)
    assert again.fingerprint == made.fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("family", ["neox", "llama"])
def test_every_family_learns_cell_sentences(text_config, tmp_path, family):
    config = text_config(
        family=family, train__steps=2, train__eval_every=2, objective__report_cells=0,
        **{f"model__{name}": value for name, value in FOREIGN[family].items()},
    )  # fmt: skip
    result = run(config, tmp_path / "run")
    assert (result.reason, result.progress.step) == ("finished", 2)
    model = sct.load(tmp_path / "run")
    assert (model.family, type(model.config).__name__.removesuffix("Config").lower()) == (family, family)
    chex.assert_trees_all_equal(model.variables, result.state.variables, strict=True)
    assert not (tmp_path / "run" / "predicted_cell_type.json").exists()


def test_labels_learned_together(text_config, tmp_path):
    """A table of combined labels, and cells generated by them, from a store."""
    config = text_config(
        data__labels=("cell_type",), objective__tasks=(("cell_to_labels", 1.0), ("labels_to_cell", 1.0)),
        train__steps=1, train__eval_every=1, objective__report_cells=10,
    )  # fmt: skip
    task, _ = make_task(config, Store.open(config["data"]["store"]))
    (predicted, *others) = task.evaluators()
    assert predicted.name == "predicted_labels"
    assert [each.name for each in others] == ["generated_by_labels"]
    variables = nn.unbox(task.init(jax.random.key(0)))
    numbers = dict(predicted(variables))
    assert {"cell sentences/accuracy", "most common label/accuracy"} <= set(numbers)
    assert predicted.report is not None
    assert "cell_type (" in predicted.report.title
    assert all(value.startswith("cell_type: type ") for value in task.labels()["labels"])


# Texts about cells.


@pytest.fixture(scope="module")
def describing(tmp_path_factory) -> Path:
    """Prompts of which those that ask for a text are short, too."""
    path = tmp_path_factory.mktemp("describing") / "prompts.json"
    asks = (Template("Tell of {cell} !", "Summary: {abstract}"),)
    dataclasses.replace(SHORT, templates={**SHORT.templates, "cell_to_abstract": asks}).save(path)
    return path


def test_texts_about_cells_beside_those_of_their_studies(describing, tmp_path, monkeypatch):
    """A model that tells the text of a cell's own study is as near to it as can be, its controls are not."""
    texts = {
        "one": "neurons of the human cortex", "two": "lymph nodes after vaccination",
        "three": "kidney cells in culture", "four": "blood of healthy donors",
    }  # fmt: skip
    held_out = [study(20, name, seed=i, split="test") for i, name in enumerate(("two", "three", "four"))]

    def made(*studies):
        lines = [f"{each.name}: {{abstract: {texts[each.name]}}}" for each in studies]
        (tmp_path / "studies.yaml").write_text("\n".join(lines))
        return task_of(
            describing, *studies, tasks=(("cell_to_abstract", 1.0),), report_cells=24,
            studies=str(tmp_path / "studies.yaml"),
        )  # fmt: skip

    assert not made(study(30), held_out[0]).evaluators(), "with one text there is none to tell it from"
    (described,) = made(study(30), *held_out).evaluators()
    own = dict(zip(described.held_out.keys.tolist(), described.held_out.labels, strict=True))
    assert Counter(own.values()) == dict.fromkeys(list(texts.values())[1:], 8)
    asked = {}

    def answer(self, task, fields, *, keys, **options):
        assert task == "cell_to_abstract"
        asked.update(zip(keys, (each["cell"] for each in fields), strict=True))
        # What is not of the template's form is a text still.
        table = pd.DataFrame({"text": [own[key] for key in keys], "answer": [own[key] for key in keys]})
        table.loc[::2, "answer"] = None
        return table

    monkeypatch.setattr(CellSentenceModel, "answer", answer)
    described.note = "Said below."
    numbers = dict(described(parameters("gpt2")))
    sources = made(study(30), *held_out).dataset("test").texts
    sentences = {
        int(key): text for each in sources for key, text in zip(each.keys, each.sentences(0, 20), strict=True)
    }
    assert asked == {key: sentences[key] for key in own}
    assert numbers["cell sentences/cosine (own)"] == pytest.approx(1)
    assert numbers["cell sentences/BLEU"] == pytest.approx(100)
    assert numbers["cell sentences/MMD"] == pytest.approx(0, abs=1e-6)
    for name in ("cell sentences, pairs shuffled", "random training texts"):
        assert numbers[f"{name}/cosine (own)"] < 0.7, name
    assert described.report.notes[-1] == "Said below."


@pytest.mark.slow
def test_a_run_that_learns_to_tell_of_cells_is_measured(text_config, describing, tmp_path):
    """Texts of the cells' own, from a column; the parameters are random, so nothing is told of quality."""
    config = text_config(
        data__abstract="cell_type", objective__tasks=(("cell_to_abstract", 1.0),), objective__report_cells=12,
        objective__prompts=str(describing), train__steps=1, train__eval_every=1,
    )  # fmt: skip
    run(config, tmp_path / "run")
    numbers = json.loads((tmp_path / "run" / "described.json").read_text())
    assert {name.partition("/")[0] for name in numbers} == {
        "cell sentences", "cell sentences, pairs shuffled", "random training texts",
        "most typical training text for all",
    }  # fmt: skip
    assert 0 <= numbers["cell sentences/cosine (own)"] <= 1
    assert "12 generated texts for" in (tmp_path / "run" / "report.md").read_text()


# Adapters.

TARGETS = ["attention/query$", "mlp/up$"]
LORA = {"rank": 3, "alpha": 6.0, "dropout": 0.2, "targets": TARGETS}
FEW = {"objective__lora": LORA, "objective__report_cells": 0, "train__steps": 3, "train__eval_every": 3}


def adapting(prompts, family="gpt2", **options) -> CellSentences:
    """Task that trains adapters."""
    plain = task_of(prompts, study(20), family=family)
    objective = dataclasses.replace(plain.config, lora=cell_sentences.Adapters(**options))
    return CellSentences(
        objective, plain.data, plain.model_config, plain.tokenizer, plain.store, seed=0, family=family
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "layers"),
    [("gpt2", "key query value"), ("neox", "key query value"), ("llama", "query value")],
)
def test_options_of_adapters_are_those_of_the_task(prompts, family, layers):
    task = adapting(prompts, family, rank=3, alpha=12.0)
    shapes = flatten(nn.unbox(jax.eval_shape(task.init, jax.random.key(0))["adapters"]))
    assert sorted({path.split("/")[2] for path in shapes}) == layers.split()
    assert {path.rpartition("/")[2] for path in shapes} == {"lora_a", "lora_b", "scale"}
    assert shapes["layers/attention/query/lora_a"].shape == (1, SIZES["embed_dim"], 3)
    assert shapes["layers/attention/value/lora_b"].shape[:2] == (1, 3)
    chosen = adapting(prompts, family, rank=3, alpha=12.0, dropout=0.25, targets=("attention/out$",))
    made = flatten(nn.unbox(jax.jit(chosen.init)(jax.random.key(0))["adapters"]))
    assert {path.rpartition("/")[0] for path in made} == {"layers/attention/out"}
    assert made["layers/attention/out/scale"] == 4.0
    assert made["layers/attention/out/dropout"] == 0.25
    with pytest.raises(ConfigError, match="'q_proj'"):
        jax.eval_shape(adapting(prompts, family, rank=3, targets=("q_proj",)).init, jax.random.key(0))
    assert "adapters" not in jax.eval_shape(adapting(prompts, family, rank=0).init, jax.random.key(0))


@pytest.mark.slow
def test_adapters_drop_in_training_alone(prompts):
    task = adapting(prompts, rank=3, dropout=0.5)
    batch, base = batch_of(task, "train", 2), parameters("gpt2")
    fresh = nn.unbox(jax.jit(task.init)(jax.random.key(0)))["adapters"]
    trained = jax.tree.map(lambda leaf: leaf if leaf.ndim < 3 else leaf + 0.3, fresh)

    @functools.partial(jax.jit, static_argnums=(0, 3))
    def loss(task, adapters, key, train):
        return task.loss({**base, "adapters": adapters}, batch, jax.random.key(key), train)[0]

    plain, _ = alone(task, texts_of(batch))[0]
    assert loss(task, fresh, 0, False) == pytest.approx(float(plain), rel=1e-5)
    assert loss(task, fresh, 0, True) == pytest.approx(float(plain), rel=1e-5)
    assert loss(task, trained, 0, False) == loss(task, trained, 1, False) != loss(task, fresh, 0, False)
    assert len({float(loss(task, trained, key, True)) for key in (0, 0, 1)}) == 2


@pytest.mark.slow
def test_adapters_are_trained_alone_and_kept_beside_the_model(finished, text_config, tmp_path):
    parent = sct.load(finished[0])
    result = run(text_config(init_from=str(finished[0]), **FEW), tmp_path / "run")
    layers = ("adapters/layers/attention/query", "adapters/layers/mlp/up")
    assert set(result.state.trained) == {f"{layer}/lora_{matrix}" for layer in layers for matrix in "ab"}
    assert all(np.abs(value).max() > 0 for value in result.state.trained.values())
    frozen = dict(result.state.frozen)
    for layer in layers:
        assert frozen.pop(f"{layer}/scale") == 2.0
        assert frozen.pop(f"{layer}/dropout") == np.float32(0.2)
    base = flatten(parent.variables)
    assert frozen.keys() == base.keys()
    assert all(np.array_equal(frozen[path], value) for path, value in base.items())
    # The model of a run is the one that was trained, with its adapters beside it.
    for folder in (tmp_path / "run", tmp_path / "run" / "model"):
        model = sct.load(folder)
        chex.assert_trees_all_equal(model.variables, result.state.variables, strict=True)
        assert model.config == parent.config
    ids = {"input_ids": np.arange(20)[None]}
    merged = dataclasses.replace(model, variables=lora.merge(model.variables))
    ours, plain = model.apply(**ids)["logits"], parent.apply(**ids)["logits"]
    np.testing.assert_allclose(merged.apply(**ids)["logits"], ours, atol=1e-5)
    assert np.abs(ours - plain).max() > 1e-4


def test_adapters_that_are_there_have_their_own_options(finished, text_config, tmp_path):
    parent = sct.load(finished[0])
    options = Adapters(**LORA).config("gpt2")
    boxed = (
        registry.family("gpt2")
        .module(parent.config)
        .init(jax.random.key(0), **Decoder.example(parent.config))
    )
    adapters = nn.unbox(lora.init(jax.random.key(0), boxed["params"], options))
    adapted = dataclasses.replace(parent, variables={**parent.variables, "adapters": adapters})
    adapted.save_pretrained(tmp_path / "adapted")
    for changed, words in (({"alpha": 12.0}, r"alpha .*6.*12"), ({"dropout": 0.5}, r"dropout .*0\.2.*0\.5")):
        config = text_config(
            init_from=str(tmp_path / "adapted"), **{**FEW, "objective__lora": {**LORA, **changed}}
        )
        with pytest.raises(ConfigError, match=words):
            run(config, tmp_path / "run")
    for without in ({"alpha": 8.0}, {"dropout": 0.1}, {"targets": ("mlp",)}):
        with pytest.raises(ConfigError, match="rank"):
            Adapters(**without)


def test_adapters_need_a_model_that_they_change(text_config, tmp_path):
    with pytest.raises(ConfigError, match=r"--config\.init_from.*objective\.lora"):
        run(text_config(objective__lora=LORA), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_resumed_run_of_adapters_is_one_that_never_stopped(finished, text_config, tmp_path):
    config = functools.partial(text_config, init_from=str(finished[0]), **FEW)
    whole = run(config(), tmp_path / "whole")
    assert run(config(train__stop_at=2), tmp_path / "parts").reason == "stop_at"
    chex.assert_trees_all_equal(run(config(), tmp_path / "parts").state, whole.state, strict=True)
    with pytest.raises(ConfigError, match=r"objective\.lora"):
        run(config(objective__lora={**LORA, "alpha": 3.0}), tmp_path / "parts")
    # Their training goes on, or they are merged before the model itself is trained.
    again = run(
        config(init_from=str(tmp_path / "whole"), train__steps=1, train__eval_every=1), tmp_path / "again"
    )
    assert not same(again.state.trained, whole.state.trained)
    chex.assert_trees_all_equal(again.state.frozen, whole.state.frozen, strict=True)
    other = functools.partial(config, init_from=str(tmp_path / "whole"))
    with pytest.raises(ConfigError, match=r"has adapters.*objective\.lora"):
        run(other(objective__lora={"rank": 0}), tmp_path / "none")
    with pytest.raises(CheckpointError, match="adapters/layers/mlp/up/lora_a"):
        run(other(objective__lora={**LORA, "rank": 2}), tmp_path / "smaller")
