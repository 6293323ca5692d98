"""Every file of configs/ and every variant: it builds, it trains abstractly, and mistakes are explained."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest

from sct import families
from sct.data.bags import BagSource
from sct.data.bundled import prepare
from sct.data.datasets import simulate_atlas
from sct.data.genes.vocabulary import GeneVocabulary
from sct.data.ingest.build import IngestOptions, ingest
from sct.data.store import Store
from sct.errors import ConfigError
from sct.families.tasks import data_of, make_task, task_spec_of
from sct.models import registry
from sct.tasks.masked_expression import MaskedExpression, MaskedExpressionConfig
from sct.train import parents, sharding, sweep
from sct.train.loop import TrainConfig
from sct.train.optim import OptimizerConfig, make_optimizer
from sct.train.run_spec import RunSpec
from sct.train.state import State, init_state, make_eval_step, make_train_step

ROOT = Path(__file__).resolve().parents[1]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"configs_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FILES = sorted(path for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")
# Configurations of training; others have tests of their own beside what they configure.
CASES = [
    (path, variant)
    for path in FILES
    for variant in load(path).VARIANTS
    if "train" in load(path).get_config(variant)
]
every_config = pytest.mark.parametrize(
    ("path", "variant"), CASES, ids=[f"{path.stem}:{variant}" for path, variant in CASES]
)


def values(path: Path, variant: str) -> dict[str, Any]:
    return load(path).get_config(variant).to_dict()


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    """Simulated spots over 300 of the human genes: every config must train on any store."""
    spots = simulate_atlas(2, 60, 300, spatial=True)
    inputs = [(adata.uns["study"], adata) for adata in spots]
    folder = tmp_path_factory.mktemp("stores") / "spots"
    genes = GeneVocabulary.human().subset(spots[0].var_names)
    ingest(inputs, folder, vocabulary=genes, options=IngestOptions(validation=(inputs[1][0],)))
    return Store.open(folder)


def test_configs_are_found():
    names = {"sct_sc", "sct_spatial", "sct_ablations", "c2s_gpt2", "c2s_pythia", "scgpt_pretrain"}
    assert {path.stem for path, _ in CASES} >= names
    for path in FILES:
        assert "" in load(path).VARIANTS
        assert load(path).__doc__


# Of a sweep, the base stands for itself and each run for what it changes.
RUNS = [
    (path, variant, name)
    for path, variant in CASES
    if "sweep" in values(path, variant)
    for name in values(path, variant)["sweep"]
]


# What families of cells are sized by; those of text by their tokens.
SIZES = dict.fromkeys(("sct", "zeromics_cells", "zeromics"), "num_genes")


@every_config
def test_every_section_builds(path, variant):
    config = values(path, variant)
    kind, size = task_spec_of(config), SIZES.get(config["family"], "vocab_size")
    genes = {"zeromics_cells": 19_968, "zeromics": 19_968, "scgpt": 19_966}.get(config["family"])
    sized = {} if genes else {size: 19_968}  # further sizes follow from files, or from the number of genes
    if kind.finetunes:  # sizes come from the model that is fine-tuned
        assert set(config["model"]) == {"dtype", "remat"}
        for name, entry in families.models().items():
            if entry.finetune is not None:
                registry.model_config(name, config["model"])
    else:
        model = registry.model_config(config["family"], {**config["model"], **sized}, genes)
        assert getattr(model, size) == 19_968
    data = data_of(config)
    registry.build(kind.objective, config["objective"], "objective")
    registry.build(OptimizerConfig, config["optimizer"], "optimizer")
    train = registry.build(
        TrainConfig, {**config["train"], "steps": max(config["train"]["steps"], 1)}, "train"
    )
    assert train.epochs or train.checkpoint_every % train.log_every == 0
    # One of them says how long training is.
    assert [config["train"]["steps"] > 0, data.tokens > 0, train.epochs > 0].count(True) == 1


@every_config
def test_a_config_is_plain_and_made_anew(path, variant):
    first, second = load(path).get_config(variant), load(path).get_config(variant)
    assert first.to_dict() == second.to_dict()
    first.train.seed += 1
    assert second.train.seed == first.train.seed - 1


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_field_and_variant_of_the_docstring_exists(path):
    module = load(path)
    flags = re.findall(r"--config\.([\w.]+)=", module.__doc__)
    assert flags
    for flag in flags:
        node = module.get_config("").to_dict()
        for name in flag.split("."):
            assert name in node, flag
            node = node[name]
    commands = re.findall(r"--config=(\S+?\.py)(?::(\w+))?(?:\s|$)", module.__doc__)
    assert {variant for _, variant in commands} == set(module.VARIANTS)
    assert {file for file, _ in commands} == {path.relative_to(ROOT).as_posix()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "variant"), CASES, ids=[f"{path.stem}:{variant}" for path, variant in CASES]
)
def test_one_abstract_step(path, variant, store, tmp_path):
    one_abstract_step(values(path, variant), store, tmp_path)


def run_of_sweep(path: Path, variant: str, name: str) -> dict[str, Any]:
    return sweep.configurations(values(path, variant))[name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "name"),
    [pytest.param(path, name, id=name) for path, variant, name in RUNS if variant == "quickstart"],
)
def test_one_abstract_step_of_each_run_of_a_sweep(path, name, store):
    one_abstract_step(run_of_sweep(path, "quickstart", name), store)


@pytest.mark.parametrize(("path", "variant", "name"), RUNS)
def test_a_run_of_a_sweep_changes_what_is_computed_and_no_more_than_it_says(path, variant, name):
    base, run = (sweep.configurations(values(path, variant))[each] for each in (sweep.BASE, name))
    built = [
        registry.model_config(each["family"], {**each["model"], "num_genes": 19_968}) for each in (base, run)
    ]
    tasks = [registry.build(MaskedExpressionConfig, each["objective"], "objective") for each in (base, run)]
    cells = [each["data"]["cells_per_bag"] for each in (base, run)]
    objectives = [(task.masking, task.logit_adjustment) for task in tasks]
    differs = [a != b for a, b in (built, objectives, cells)]
    assert sum(differs) == 1, "one ablation at a time"
    assert {each["train"]["batch_size"] * cells[i] for i, each in enumerate((base, run))} == {
        base["train"]["batch_size"] * cells[0]
    }
    assert base["optimizer"] == run["optimizer"]
    assert base["train"]["steps"] == run["train"]["steps"]
    assert base["objective"]["masking"]["kind"] == "stratified", "the base is the paper's"
    # The positions at which the head is evaluated are enough for what is masked.
    tokens = jax.numpy.asarray(np.random.default_rng(0).random((8, 8, 512)) < 0.15, np.uint8)
    masks = tasks[1].masking(jax.random.key(0), tokens, built[1].num_bins)
    assert tasks[1].max_masked_fraction == 0 or masks.mean(axis=(1, 2)).max() <= tasks[1].max_masked_fraction


def test_runs_of_a_sweep_follow_the_command_line():
    config = load(ROOT / "configs" / "sct_ablations.py").get_config("quickstart")
    config.train.batch_size = 3
    config.train.seed = 5
    config.data.cells_per_bag = 8
    runs = sweep.configurations(config.to_dict())
    assert {run["train"]["seed"] for run in runs.values()} == {5}
    assert {run["train"]["batch_size"] * run["data"]["cells_per_bag"] for run in runs.values()} == {24}
    assert runs["norm_none"]["data"]["cells_per_bag"] == 8
    assert runs["cells_1"]["data"]["cells_per_bag"] == 1


@pytest.mark.parametrize("variant", load(ROOT / "configs" / "sct_spatial.py").VARIANTS)
def test_the_second_stage_takes_the_models_of_the_first(variant):
    first, second = (values(ROOT / "configs" / f"{name}.py", variant) for name in ("sct_sc", "sct_spatial"))
    assert second["model"] == {**first["model"], "use_spatial": True}
    assert second["data"]["cells_per_bag"] == first["data"]["cells_per_bag"]


def task_of(config: dict[str, Any], store: Store, folder: Path) -> Any:
    """Task of a configuration; instructions as of a run that has begun, without the models that it started from."""
    if config["task"] == "annotation":
        config = {**config, "data": {**config["data"], "label_key": "domain"}}
        fitted = registry.family(config["family"]).config.fit({}, len(store.vocabulary))
        config["model"] = {**fitted, **config["model"]}  # as of the model that is fine-tuned
        return make_task(config, store, None, {"max_genes": 0, "dropped": []})[0]
    if config["task"] != "instructions":
        return make_task(config, store)[0]
    path = folder / "studies.yaml"
    path.write_text("".join(f"{study.name}: {{abstract: Simulated spots.}}\n" for study in store.studies))
    data = {**config["data"], "studies": str(path), "disease": ""}
    objective = {**config["objective"], "tasks": (("cta", 1.0),)}
    kept = {"task": "instructions", "dropped": [], "members": ["universal", "cta"]}
    return make_task({**config, "data": data, "objective": objective}, store, None, kept)[0]


def one_abstract_step(config: dict[str, Any], store: Store, folder: Path | None = None) -> None:
    task = task_of(config, store, folder or Path())
    options = registry.build(TrainConfig, {**config["train"], "steps": 100}, "train")
    optimizer_config = registry.build(OptimizerConfig, config["optimizer"], "optimizer")
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    abstract, _ = init_state(task, lambda p: make_optimizer(optimizer_config, 100, p)[0], mesh, options.seed)
    optimizer, _ = make_optimizer(optimizer_config, 100, abstract.trained)
    batch = abstract_batch(task.dataset("train"), options.batch_size)
    state, scalars, sums = make_train_step(task, optimizer, mesh, abstract).eval_shape(abstract, batch)
    assert isinstance(state, State)
    assert jax.tree.map(shape_of, state) == jax.tree.map(shape_of, abstract)
    assert {name: shape_of(value)[0] for name, value in scalars.items()} == {"loss": (), "gradient_norm": ()}
    number = jax.ShapeDtypeStruct((), np.int32)
    evaluated = make_eval_step(task, mesh).eval_shape(state, batch, number)
    assert jax.tree.map(shape_of, evaluated) == jax.tree.map(shape_of, sums)


def test_a_wrong_column_of_donors_is_refused(store, tmp_path):
    config = values(ROOT / "configs" / "peft_annotation.py", "")
    config["data"]["donor_key"] = "patient"
    with pytest.raises(ConfigError, match=r"data\.donor_key"):
        task_of(config, store, tmp_path)


def shape_of(leaf: Any) -> tuple[tuple[int, ...], str]:
    return tuple(leaf.shape), str(leaf.dtype)


def abstract_batch(source: BagSource, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch of bags; the weight of a record is what a loader adds."""
    bag = {**source.record(0), "example_mask": np.float32(1)}
    return {key: jax.ShapeDtypeStruct((size, *np.shape(v)), np.asarray(v).dtype) for key, v in bag.items()}


def test_the_full_model_has_the_published_number_of_parameters():
    config = values(ROOT / "configs" / "sct_sc.py", "")
    model_config, model, _ = registry.MODELS["sct"]
    made = model(registry.build(model_config, {**config["model"], "num_genes": 19_968}, "model"))
    shapes = jax.eval_shape(made.init, jax.random.key(0), np.zeros((1, 1, 19_968), np.uint8))
    assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes)) == 79_204_163


@pytest.mark.slow
@every_config
def test_unknown_fields_are_named(path, variant, store, tmp_path):
    for section in ("model", "data", "objective", "train"):
        config = values(path, variant)
        config[section]["no_such_field"] = 1
        with pytest.raises(ConfigError, match="no_such_field") as caught:  # noqa: PT012
            task_of(config, store, tmp_path)
            registry.build(TrainConfig, config["train"], "train")
        assert section in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_model_too_small_for_the_vocabulary_is_refused(store):
    config = values(ROOT / "configs" / "sct_sc.py", "quickstart")
    config["model"]["num_genes"] = 288
    with pytest.raises(ConfigError, match="num_genes"):
        make_task(config, store)
    config["model"]["num_genes"] = 320
    assert isinstance(make_task(config, store)[0], MaskedExpression)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_unknown_variant_is_refused(path):
    with pytest.raises(ValueError, match="no_such_variant"):
        load(path).get_config("no_such_variant")


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.train", *arguments],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config=configs/sct_sc.py"], ["data.store", "launch.ingest"]),
        (["--config=configs/sct_sc.py", "--config.data.store=no/such/store"], ["no/such/store"]),
        (["--config=configs/sct_sc.py:no_such_variant"], ["no_such_variant", "quickstart"]),
        (["--config=configs/sct_sc.py:quickstart", "--config.train.no_such_field=1"], ["no_such_field"]),
        (["--config=configs/sct_sc.py:quickstart", "--config.train.steps=many"], ["train.steps", "many"]),
        (["--config=configs/sct_ablations.py:quickstart", "--only=base,bin_15"], ["bin_15", "'bins_15'"]),
        (["--config=configs/sct_ablations.py"], ["data.store", "launch.ingest"]),
        (["--config=configs/sct_sc.py:quickstart", "--only=base"], ["--only", "sweep"]),
        (["--config=no_such_config"], ["no_such_config", "sct_sc"]),
        (["--config=configs/sct_sc.py:quickstart", "stray"], ["stray"]),
    ],
    ids=[
        "no store",
        "missing store",
        "variant",
        "field",
        "type",
        "run of a sweep",
        "sweep",
        "no sweep",
        "file",
        "stray word",
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(tmp_path, arguments, words):
    workdir = tmp_path / "run"
    done = launch(*arguments, f"--workdir={workdir}")
    assert done.returncode == (2 if "\nusage: " in done.stderr else 1)
    assert "Traceback" not in done.stdout + done.stderr
    message = done.stderr.strip()
    assert all(word in message for word in words), message
    assert len(message.splitlines()) <= 2, message
    assert not workdir.exists()


def test_instructions_of_the_quickstart_fit_into_its_rows(tmp_path):
    """The texts about the bundled cells, with a tokenizer trained on them, in every split."""
    config = values(ROOT / "configs" / "zeromics_llm.py", "quickstart")
    cells = prepare("pbmc68k", tmp_path / "store")
    kept = {"task": "instructions", "dropped": [], "members": ["universal", "cta", "rci"]}
    task, data = make_task(config, cells, None, kept)
    for split in ("train", "validation", "test"):
        source = task.dataset(split)
        assert {name for each in source.questions.values() for name in each.candidates} == {"cta", "rci"}
        longest = max(int(source.record(number)["attention_mask"].sum()) for number in range(len(source)))
        assert data.length - 64 < longest <= data.length


def test_runs_to_build_on_are_those_of_another_configuration():
    """Each is named by the option that uses it, and is what its own configuration makes."""
    known = {str(values(path, variant)): (path.stem, variant) for path, variant in CASES}
    found = {}
    for path in FILES:
        for variant in load(path).VARIANTS:
            config = values(path, variant)
            rest, builds_on = parents.split(config)
            assert len(builds_on) == len(config.get("builds_on", {})), f"{path.stem}:{variant}"
            for parent in builds_on:
                found[path.stem, variant, parent.option] = (*known[str(dict(parent.config))], parent.workdir)
            if rest.get("task") == "annotation":
                rest["init_from"] = "a/model"  # without a default, because users name their own model
            if "train" in rest and "sweep" not in rest:
                RunSpec.of(rest)
    assert found == {
        ("peft_annotation", "quickstart", "init_from"): ("scgpt_pretrain", "quickstart", "runs/scgpt"),
        ("zeromics_llm", "quickstart", "data.cell_encoder"): (
            "zeromics_sc",
            "quickstart",
            "runs/zeromics_sc",
        ),
        ("benchmark_zeromics", "quick", "model"): ("zeromics_llm", "quickstart", "runs/zeromics_llm"),
    }
