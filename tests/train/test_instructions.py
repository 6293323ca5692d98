"""Instruction tuning from task to run folder: loss, who trains what, models to start from, answers beside controls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sct
from configs.zeromics_llm import get_config
from sct.data.store import Store
from sct.data.text.instructions import StudyQuestions
from sct.errors import ConfigError
from sct.generation.instruction_model import InstructionModel
from sct.models import registry
from sct.models.decoder import Decoder
from sct.models.zeromics import ZerOmics
from sct.nn.paths import flatten, resolve
from sct.tasks.instruction_reports import MODEL, OTHERS, Answers
from sct.tasks.instructions import InstructionData, Instructions, InstructionsConfig
from sct.train import parents, resume
from sct.train.experiment import run
from sct.train.run_spec import RunSpec
from sct.weights.pretrained import Pretrained
from tests.cached import cached
from tests.data.test_cell_records import Study
from tests.data.text.test_instructions import ABSTRACT, study, tokenizer
from tests.data.text.toy_texts import GENES, ToyStore
from tests.random_models import noisy

CELLS = {"embed_dim": 8, "num_layers": 1, "num_heads": 2, "ffn_dim": 12, "feature_dim": 5, "num_bins": 4}
LLM = {"vocab_size": 0, "embed_dim": 16, "num_layers": 2, "num_heads": 2, "ffn_dim": 24, "max_length": 256}


@pytest.fixture(scope="module")
def studies(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "studies.yaml"
    path.write_text(f"one: {{abstract: {ABSTRACT}}}\n")
    return path


def task_of(studies: Path, *held_out: Study, **options: Any) -> Instructions:
    config = InstructionsConfig(**{"rank": 2, "alpha": 2.0, "report_cells": 40, "report_seeds": 1, **options})
    data = InstructionData(studies=str(studies), length=160, disease="disease", max_genes=GENES)
    values = {"cells": CELLS, "llm": {**LLM, "vocab_size": tokenizer().vocab_size}, "num_soft": 3}
    model = registry.model_config("zeromics", values, GENES)
    store = ToyStore(study(), *held_out)
    return Instructions(config, data, model, tokenizer(), store, np.ones(GENES, bool), {}, 0)


@cached
def parameters(path: Path) -> Any:
    """Parameters so large that every part counts, adapters included."""
    return noisy(nn.unbox(jax.jit(task_of(path).init)(jax.random.key(0))), scale=0.2, but="scale")


def batch_of(task: Instructions, number: int = 6) -> dict[str, np.ndarray]:
    source = task.dataset("train")
    assert source is not None
    records = [source.record(i) for i in range(number)]
    batch = {name: np.stack([record[name] for record in records]) for name in records[0]}
    return {**batch, "example_mask": np.ones(number, np.float32)}


@pytest.mark.slow
def test_the_loss_is_that_of_the_answers(studies):
    """From the logits of the whole model, one instruction at a time and without padding."""
    task, variables = task_of(studies), parameters(studies)
    batch = batch_of(task)
    batch["example_mask"][-1] = 0
    loss, sums = jax.jit(task.loss, static_argnums=3)(variables, batch, jax.random.key(0), True)
    total, count, right, exact = 0.0, 0, 0, np.zeros(3)
    for row in range(5):
        there = batch["attention_mask"][row]
        ids, predicted = batch["input_ids"][row][there], batch["predicted"][row][there]
        inputs = {name: batch[name][row][None] for name in ("bins", "genes")}
        logits = ZerOmics(task.model_config).apply(variables, **inputs, input_ids=ids[None])["logits"][0]
        logs = np.asarray(jax.nn.log_softmax(logits))[:-1][predicted[1:]]
        targets = ids[1:][predicted[1:]]
        total -= logs[np.arange(len(targets)), targets].sum()
        hits = logs.argmax(axis=1) == targets
        count, right = count + len(targets), right + hits.sum()
        exact[batch["task"][row]] += hits.all() if len(targets) else 0
    assert float(loss) == pytest.approx(total / count, rel=1e-3)
    assert float(sums["predicted"]) == count > 5
    assert float(sums["right"]) == right
    np.testing.assert_array_equal(sums["exact"], exact)
    assert float(sums["answers"].sum()) <= 5


@pytest.mark.slow
def test_a_mixed_batch_trains_what_batches_of_each_task_would(studies):
    """The universal adapter by all cells, that of a task by its own; tokenizer as without any of this."""
    task, variables = task_of(studies), parameters(studies)
    batch = batch_of(task, 9)
    count = batch["predicted"].sum(axis=1)
    assert len(set(batch["task"][count > 0])) == 3

    @jax.jit
    @jax.grad
    def gradient(variables: Any, part: dict[str, jax.Array]) -> Any:
        return task.loss(variables, part, jax.random.key(0), True)[1]["loss"]

    def gradients(rows: np.ndarray) -> dict[str, jax.Array]:
        return flatten(gradient(variables, {name: value[rows] for name, value in batch.items()}))

    whole = gradients(np.arange(9))
    parts = [gradients(np.flatnonzero(batch["task"] == number)) for number in range(3)]
    members = task.mixture.members
    assert members == ("universal", "cta", "rci", "tcd")
    for path in whole:
        if path.endswith(("lora_a", "lora_b")):
            axis = -1 if path.endswith("lora_a") else -2
            for number, name in enumerate(members):
                at = task.mixture.place(name)
                own = np.take(np.asarray(whole[path]), np.arange(at.start, at.stop), axis=axis)
                from_parts = [
                    np.take(np.asarray(part[path]), np.arange(at.start, at.stop), axis=axis) for part in parts
                ]
                expected = sum(from_parts) if number == 0 else from_parts[number - 1]
                np.testing.assert_allclose(own, expected, rtol=5e-3, atol=1e-4, err_msg=f"{path} {name}")
                assert np.abs(own).max() > 1e-5
                others = [part for i, part in enumerate(from_parts) if number and i != number - 1]
                assert not any(np.any(part) for part in others)
    name = "params/tokenizer/genes"
    np.testing.assert_allclose(whole[name], sum(part[name] for part in parts), rtol=5e-3, atol=1e-4)
    # The cell model is not trained here.
    assert not any(np.any(value) for path, value in whole.items() if path.startswith("params/cells/"))


@pytest.mark.parametrize(
    ("options", "members"),
    [
        ({"of_tasks": False}, ("universal",)),
        ({"universal": False}, ("cta", "rci", "tcd")),
        ({"tasks": (("tcd", 1.0),)}, ("universal", "tcd")),
        ({"tasks": (("tcd", 1.0),), "members": ("universal", "cta", "rci")}, ("universal", "cta", "rci")),
    ],
)
def test_ablations_leave_adapters_out(studies, options, members):
    task = task_of(studies, **options)
    assert task.mixture.members == members
    gates = np.asarray(task.gates(jnp.arange(len(task.config.tasks))))
    expected = [
        np.repeat([member in ("universal", name) for member in members], 2) for name, _ in task.config.tasks
    ]
    np.testing.assert_array_equal(gates, expected)


def test_names_and_codes_of_tasks_are_the_same(tmp_path):
    """A run that started with task codes resumes with task names."""
    names = InstructionsConfig(tasks=(("rare_cell", 1.0), ("pathway", 2.0)), members=("universal", "tumor"))
    codes = InstructionsConfig(tasks=(("rci", 1.0), ("cpi", 2.0)), members=("universal", "tcd"))
    assert names == codes
    assert names.mixture.members == ("universal", "tcd")
    before, after = (parents.split(get_config("quickstart").to_dict())[0] for _ in range(2))
    before["objective"]["tasks"] = [["cta", 1.0]]
    before = json.loads(json.dumps(before))  # as it is recorded
    after["objective"]["tasks"] = [["cell_type", 1.0]]
    resume.check_options(before, RunSpec.of(after), tmp_path)
    after["objective"]["tasks"] = [["rare_cell", 1.0]]
    with pytest.raises(ConfigError, match=r"objective\.tasks"):
        resume.check_options(before, RunSpec.of(after), tmp_path)


def test_options_that_cannot_be(studies):
    for options, words in (
        ({"tasks": (("csi", 1.0),)}, "cell_type, rare_cell, tumor, pathway"),
        ({"tasks": (("cpi", 1.0),), "members": ("cta",)}, "'pathway'"),
        ({"universal": False, "of_tasks": False}, "universal"),
        ({"report_seeds": 0}, "report_seeds"),
    ):
        with pytest.raises(ConfigError, match=words):
            InstructionsConfig(**options)
    with pytest.raises(ConfigError, match="rare_share"):
        InstructionData(rare_share=2.0)


def test_answers_beside_a_control_that_gives_other_cells(studies):
    """A model that reads the answer out of the cell is right, and with other cells' tokens no better than chance."""
    both = studies.with_name("both.yaml")
    both.write_text(f"one: {{abstract: {ABSTRACT}}}\ntest: {{abstract: {ABSTRACT}}}\n")
    held_out = study("test", 60, "test")
    task = task_of(both, held_out, tasks=(("cta", 1.0),))
    (measured,) = task.evaluators()
    assert isinstance(measured, Answers)
    cells = [each for _, each in measured.held_out]
    truth = np.concatenate([each.labels for each in cells])
    asked: list[Any] = []

    class Perfect:
        cells, known = task.cells, task.known

        def score(self, name, records, abstracts, candidates, *, keys, cells=None):
            order = range(len(abstracts)) if cells is None else cells
            asked.append((name, tuple(candidates), set(abstracts), len(records["bins"]), tuple(keys)))
            hits = np.array([[candidate == truth[i] for candidate in candidates] for i in order])
            return np.log(np.where(hits, 0.9, 0.05))

    measured.instruction_model = lambda variables: Perfect()
    numbers = dict(measured(None))
    assert numbers[f"{MODEL}/accuracy"] == 1
    chance = float(np.square(np.unique(truth, return_counts=True)[1] / len(truth)).sum())
    assert numbers[f"{OTHERS}/accuracy"] == pytest.approx(chance, abs=0.2)
    assert {"most common label/accuracy", "PCA + logistic regression/accuracy"} <= set(numbers)
    assert asked[0] == asked[1]
    assert asked[0][:4] == (
        "cta",
        StudyQuestions(held_out, task.options).candidates["cta"],
        {ABSTRACT},
        len(truth),
    )


@pytest.fixture(scope="module")
def text_config(store, tmp_path_factory) -> Any:
    """Configuration over simulated cells, whose cell model is trained first."""
    folder = tmp_path_factory.mktemp("models")
    opened = Store.open(store)
    names = [each.name for split in ("train", "validation", "test") for each in opened.split(split)]
    (folder / "studies.yaml").write_text(
        "".join(f"{name}: {{abstract: Cells of {name}.}}\n" for name in names)
    )
    train = {"batch_size": 4, "log_every": 1, "checkpoint_every": 2, "loader_threads": 1, "eval_records": 8}
    first = {
        "family": "zeromics_cells", "task": "masked_bins", "model": {**CELLS, "feature_dim": 0},
        "data": {"store": str(store), "max_genes": 40, "features": "random", "feature_dim": 5},
        "objective": {"report_cells": 4, "report_seeds": 1}, "optimizer": {"peak_lr": 1e-3, "warmup_steps": 1},
        "train": {**train, "steps": 2, "eval_every": 2},
    }  # fmt: skip
    run(first, folder / "cells")
    second = {
        "family": "zeromics", "task": "instructions", "model": {"llm": LLM, "num_soft": 3, "tokenizer": "pooled"},
        "data": {
            "store": str(store), "cell_encoder": str(folder / "cells"), "studies": str(folder / "studies.yaml"),
            "max_genes": 40, "length": 200, "vocab_size": 600,
        },
        "objective": {
            "tasks": (("cta", 1.0),), "rank": 2, "alpha": 2.0, "train_llm": True, "report_cells": 8, "report_seeds": 1,
        },
        "optimizer": {"peak_lr": 1e-3, "warmup_steps": 1}, "train": {**train, "steps": 4, "eval_every": 2},
    }  # fmt: skip
    return first, second, folder


@pytest.mark.slow
def test_both_stages_from_configurations(text_config, tmp_path):
    _, config, folder = text_config
    result = run(config, tmp_path / "run")
    cells = sct.load(folder / "cells")
    final = flatten(result.state.variables)
    # The cell model came along and is as it was; the rest was trained.
    for path, value in flatten(cells.variables).items():
        np.testing.assert_array_equal(final[path.replace("params/", "params/cells/", 1)], value, err_msg=path)
    assert any(path.startswith("params/llm/") for path in result.state.trained)
    assert not any(path.startswith("params/cells/") for path in result.state.trained)
    numbers = json.loads((tmp_path / "run" / "answers_cell_type.json").read_text())
    assert {f"{MODEL}/accuracy", f"{OTHERS}/accuracy", "most common label/accuracy"} <= set(numbers)
    for place in (tmp_path / "run", tmp_path / "run" / "model"):
        model = sct.load(place)
        assert model.family == "zeromics"
        instruction_model = InstructionModel.of(
            model.config, model.variables, model.tokenizer, model.genes, model.data
        )
        assert instruction_model.cells.max_genes == 40
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert settings["resolved_model"]["cells"]["num_genes"] == len(model.genes)
    assert settings["resolved_model"]["llm"]["vocab_size"] == model.tokenizer.vocab_size


@pytest.mark.slow
def test_both_stages_without_the_cell_model_of_the_paper(text_config, tmp_path):
    """The ablation that weights texts of genes; and a model that is tuned on a task it has no adapter for."""
    first, second, _ = text_config
    with pytest.raises(ConfigError, match=r"model\.encoder is 'weighted'"):
        run({**first, "model": {**first["model"], "encoder": "weighted"}}, tmp_path / "cells")
    config = {**second, "model": {**second["model"], "cells": {"encoder": "weighted"}}}
    run(config, tmp_path / "run")
    model = sct.load(tmp_path / "run")
    assert model.config.cells.encoder == "weighted"
    assert not any("cells/layers" in path for path in flatten(model.variables))
    objective = {**second["objective"], "tasks": (("rci", 1.0),), "members": ("universal", "cta")}
    more = {
        **config, "init_from": str(tmp_path / "run"), "objective": objective,
        "data": {**config["data"], "rare_share": 0.3}, "train": {**config["train"], "steps": 2},
    }  # fmt: skip
    run(more, tmp_path / "more")
    before, after = flatten(model.variables), flatten(sct.load(tmp_path / "more").variables)
    changed = [path for path in before if not np.array_equal(before[path], after[path])]
    assert any(path.endswith("lora_b") for path in changed)
    for path in (path for path in changed if path.endswith("lora_b")):
        # That of cell types stays as it is.
        np.testing.assert_array_equal(
            np.asarray(after[path])[..., 2:, :], np.asarray(before[path])[..., 2:, :]
        )


@pytest.mark.slow
def test_stopping_and_resuming_does_not_read_the_models_again(text_config, tmp_path, monkeypatch):
    _, config, _ = text_config
    whole = run(config, tmp_path / "whole")
    stopped = {**config, "train": {**config["train"], "stop_at": 2}}
    assert run(stopped, tmp_path / "parts").reason == "stop_at"
    monkeypatch.setattr("sct.tasks.instructions.load", None)
    chex.assert_trees_all_equal(run(config, tmp_path / "parts").state, whole.state, strict=True)


@pytest.mark.slow
def test_a_cell_model_that_is_resumed_has_the_size_of_its_features(text_config, tmp_path):
    first, *_ = text_config
    config = {**first, "train": {**first["train"], "steps": 4}}
    whole = run(config, tmp_path / "whole")
    stopped = {**config, "train": {**config["train"], "stop_at": 2}}
    assert run(stopped, tmp_path / "parts").reason == "stop_at"
    chex.assert_trees_all_equal(run(config, tmp_path / "parts").state, whole.state, strict=True)
    # And one that starts from it.
    again = run({**config, "init_from": str(tmp_path / "whole")}, tmp_path / "again")
    assert again.progress.step == 4


@pytest.mark.slow
def test_training_goes_on_from_a_model_that_answers(text_config, tmp_path):
    _, config, _ = text_config
    run(config, tmp_path / "first")
    more = {**config, "init_from": str(tmp_path / "first"), "train": {**config["train"], "steps": 2}}
    result = run(more, tmp_path / "second")
    assert result.progress.step == 2
    before = flatten(sct.load(tmp_path / "first").variables)
    path = "params/cells/layers/mlp/up/kernel"
    np.testing.assert_array_equal(flatten(result.state.variables)[path], before[path])
    for changes, words in (
        (
            {"tasks": (("rci", 1.0),)},
            r"universal, cell_type.*universal, rare_cell",
        ),
        ({"alpha": 4.0}, r"alpha .*4.*8"),
    ):
        with pytest.raises(ConfigError, match=words):
            run({**more, "objective": {**more["objective"], **changes}}, tmp_path / "third")


@pytest.mark.slow
def test_a_model_of_another_kind_is_refused(text_config, tmp_path):
    _, config, _ = text_config
    for changes, words in (
        ({"cell_encoder": ""}, "cell"),
        ({"studies": ""}, "studies"),
        ({"max_genes": 30}, r"data\.max_genes"),
    ):
        with pytest.raises(sct.errors.SctError, match=words):
            run({**config, "data": {**config["data"], **changes}}, tmp_path / "run")


@pytest.mark.slow
def test_random_decoders_and_other_families_are_refused(text_config, tmp_path):
    _, config, folder = text_config
    frozen = {**config, "objective": {**config["objective"], "train_llm": False}}
    with pytest.raises(ConfigError, match=r"decoder.*data\.llm"):
        run(frozen, tmp_path / "run")
    other = registry.model_config("gpt2", {**LLM, "vocab_size": tokenizer().vocab_size})
    variables = nn.unbox(Decoder(other).init(jax.random.key(0), **Decoder.example(other)))
    Pretrained("gpt2", other, variables, tokenizer=tokenizer()).save_pretrained(folder / "gpt2")
    with pytest.raises(ConfigError, match=r"'gpt2'.*llama"):
        run({**config, "data": {**config["data"], "llm": str(folder / "gpt2")}}, tmp_path / "other")


@pytest.mark.slow
def test_a_llama_comes_along_with_its_tokenizer_and_licence(text_config, tmp_path):
    _, config, folder = text_config
    llama = registry.model_config("llama", {**LLM, "vocab_size": tokenizer().vocab_size})
    variables = nn.unbox(Decoder(llama).init(jax.random.key(0), **Decoder.example(llama)))
    Pretrained("llama", llama, variables, tokenizer=tokenizer(), license="llama2").save_pretrained(
        folder / "llama"
    )
    changed = {
        **config, "data": {**config["data"], "llm": str(folder / "llama"), "length": 250},
        "model": {"num_soft": 3, "llm": {"remat": "level"}}, "objective": {**config["objective"], "train_llm": False},
    }  # fmt: skip
    result = run(changed, tmp_path / "run")
    model = sct.load(tmp_path / "run")
    assert (model.license, model.config.llm.remat) == ("llama2", "level")
    assert model.tokenizer.fingerprint == tokenizer().fingerprint
    final = flatten(result.state.variables)
    for path, value in flatten(variables).items():
        np.testing.assert_array_equal(final[path.replace("params/", "params/llm/", 1)], value, err_msg=path)
    assert {path.split("/")[1] for path in result.state.trained} == {"tokenizer", "llm"}
    assert all(path.startswith(("adapters/llm/", "params/tokenizer/")) for path in result.state.trained)


@pytest.mark.parametrize("width", [16, 8])
def test_without_a_tokenizer_adapters_alone_are_trained(studies, width):
    values = {
        "cells": CELLS, "llm": {**LLM, "vocab_size": tokenizer().vocab_size, "embed_dim": width}, "num_soft": 1,
        "tokenizer": "none",
    }  # fmt: skip
    task = task_of(studies)
    model = registry.model_config("zeromics", values, GENES)
    made = Instructions(task.config, task.data, model, tokenizer(), task.store, task.known, {}, 0)
    shapes = flatten(nn.unbox(jax.eval_shape(made.init, jax.random.key(0))))
    trained = resolve(made.trainable, shapes, "trainable")
    assert {path.rsplit("/", 1)[1] for path, yes in trained.items() if yes} == {"lora_a", "lora_b"}
    assert ("params/tokenizer/fixed" in shapes) == (width == 16)


def test_the_frozen_decoder_has_the_type_of_the_computation(studies):
    task = task_of(studies)
    values = {"cells": CELLS, "llm": {**LLM, "vocab_size": tokenizer().vocab_size, "dtype": "bfloat16"}}
    model = registry.model_config("zeromics", values, GENES)
    for train_llm, kind in ((False, jnp.bfloat16), (True, jnp.float32)):
        config = InstructionsConfig(train_llm=train_llm)
        made = Instructions(config, task.data, model, tokenizer(), task.store, task.known, {}, 0)
        shapes = flatten(nn.unbox(jax.eval_shape(made.init, jax.random.key(0))))
        assert shapes["params/llm/layers/attention/query/kernel"].dtype == kind
        assert shapes["adapters/llm/layers/attention/query/lora_a"].dtype == jnp.float32
        assert shapes["params/tokenizer/genes"].dtype == jnp.float32
