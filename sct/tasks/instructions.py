"""Instruction tuning: a decoder answers questions about cells that it reads as soft tokens (ZerOmics, section 3.2)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sct.checks import check_at_least, check_share
from sct.data.bundled import study_texts
from sct.data.cell_records import CellOptions, known_genes
from sct.data.genes.corpus import GeneCorpus
from sct.data.genes.vocabulary import GeneVocabulary
from sct.data.store import Store
from sct.data.text.instructions import InstructionOptions, InstructionSource, StudyQuestions, read_study_texts
from sct.data.text.prompts import INSTRUCTION_PROMPTS, load_prompts, task_code, task_name
from sct.data.text.tokenizer import Tokenizer, train_bpe
from sct.errors import ConfigError
from sct.generation.instruction_model import TASK, InstructionModel
from sct.models import lora, registry
from sct.models.adapter_kinds import AdapterConfig
from sct.models.decoder_config import LlamaConfig
from sct.models.lora import LoraConfig, Mixture
from sct.models.registry import computing
from sct.models.zeromics import ZerOmics, ZerOmicsConfig
from sct.models.zeromics_cells import ZerOmicsCellsConfig
from sct.nn.losses import next_token_losses
from sct.nn.paths import flatten
from sct.tasks.base import (
    DeviceBatch,
    Evaluator,
    MetricSums,
    ObjectiveConfig,
    StoreConfig,
    Variables,
    check_study_names,
    file_option,
    held_out_split,
)
from sct.tasks.masked_bins import check_binned
from sct.tasks.task_spec import TaskInputs, TaskSpec
from sct.weights.load import load, load_tokenizer

NAME = TASK
UNIVERSAL = "universal"
# The paper trains on the first three and keeps the fourth, pathways, for evaluation and few shots.
TRAINED_TASKS = ("cta", "rci", "tcd", "cpi")
_CORPUS_GENES = 2_000  # texts of genes that a tokenizer is trained on, beside templates and texts of studies
# How often a tokenizer's training counts the texts of instructions, each of which is read for thousands of cells: the
# words of genes' texts would take its tokens else (350 tokens an instruction of the quickstart, not 170).
_READ = 30


@dataclasses.dataclass(frozen=True)
class InstructionData(StoreConfig):
    """Where cells, what is said of their studies, and the two models come from.

    Parameters
    ----------
    cell_encoder
        Cell model: a run of `configs/zeromics_sc.py` or its model folder.
    llm
        Decoder: a Hugging Face folder of LLaMA or a model folder; "" trains the one that `model.llm` describes.
    max_genes, genes, values
        See `sct.tasks.masked_bins.BinData`; as the cell model was trained.
    studies
        YAML file; the head of `sct.data.text.instructions` says what it holds.
    length, cell_type, disease, pathways, normal, rare_share
        See `sct.data.text.instructions.InstructionOptions`.
    tokenizer, vocab_size
        File or folder, by default the decoder's; without a decoder one of at most so many tokens is trained on
        templates, texts of studies and texts of genes.
    """

    cell_encoder: str = dataclasses.field(default="", metadata={"formerly": "cells"})
    llm: str = ""
    max_genes: int = 0
    genes: str = ""
    values: str = "quantiles"
    studies: str = file_option()
    length: int = 1024
    cell_type: str = "cell_type"
    disease: str = ""
    pathways: str = ""
    normal: tuple[str, ...] = ("normal", "healthy")
    rare_share: float = 0.05
    tokenizer: str = ""
    vocab_size: int = 4_096

    def __post_init__(self) -> None:
        check_at_least("data.max_genes", self.max_genes, 0)
        check_at_least("data.length", self.length, 8)
        check_share("data.rare_share", self.rare_share)
        check_binned(self)

    @property
    def text_length(self) -> int:
        """Tokens in a row of text."""
        return self.length


@dataclasses.dataclass(frozen=True)
class InstructionsConfig(ObjectiveConfig):
    """Options of the task.

    Parameters
    ----------
    tasks
        Pairs of a task ("cell_type", "rare_cell", "tumor", "pathway") and how often it is drawn. The paper's codes
        ("cta", "rci", "tcd", "cpi") also work, and are what is kept here.
    prompts
        JSON file with further templates.
    rank, alpha, dropout
        Of each adapter of the mixture (8 and 8 in the paper).
    targets
        Regular expressions over paths of the decoder's layers; by default queries and values.
    universal, of_tasks
        Whether there is a universal adapter, and one for each task; the ablations of Table 5 leave one out.
    members
        Adapters of the model to start from, where it was trained on other tasks: a task that has none of its own trains
        the universal one. By default they follow from `universal` and `tasks`.
    train_llm, train_cells
        Train the decoder's and the cell model's own parameters, too.
    report_cells, report_seeds
        Held-out cells that the tables after training are made of (0: no tables), and seeds of what is drawn.
    """

    tasks: tuple[tuple[str, float], ...] = (("cta", 1.0), ("rci", 1.0), ("tcd", 1.0))
    prompts: str = file_option()
    rank: int = 8
    alpha: float = 8.0
    dropout: float = 0.0
    targets: tuple[str, ...] = (r"layers/attention/(query|value)$",)
    universal: bool = True
    of_tasks: bool = True
    members: tuple[str, ...] = ()
    train_llm: bool = False
    train_cells: bool = False
    report_cells: int = 500
    report_seeds: int = 3

    def __post_init__(self) -> None:
        for entry in self.tasks:
            if len(entry) != 2 or task_code(entry[0]) not in TRAINED_TASKS or not float(entry[1]) > 0:
                raise ConfigError(
                    f"objective.tasks has {entry!r}, but pairs of a task and a positive weight are needed; tasks are "
                    f"{', '.join(map(task_name, TRAINED_TASKS))}."
                )
        # Runs are compared by these values: a run begun with codes goes on with names.
        object.__setattr__(self, "tasks", tuple((task_code(task), weight) for task, weight in self.tasks))
        object.__setattr__(self, "members", tuple(map(task_code, self.members)))
        check_at_least("report_cells", self.report_cells, 0)
        check_at_least("report_seeds", self.report_seeds, 1)
        if not self.tasks or not (self.universal or self.of_tasks):
            raise ConfigError(
                "objective needs a task, and an adapter: the universal one, those of tasks, or both."
            )
        alone = [task for task, _ in self.tasks if task not in self.members]
        if self.members and UNIVERSAL not in self.members and alone:
            raise ConfigError(
                f"objective.members has neither {task_name(alone[0])!r} nor {UNIVERSAL!r}, so this task would train no "
                "adapter: train it anew, or from a model with a universal adapter."
            )

    @property
    def mixture(self) -> Mixture:
        """Adapters that are summed."""
        members = [UNIVERSAL] * self.universal + [task for task, _ in self.tasks] * self.of_tasks
        members = list(self.members) or members
        targets = tuple(f"llm/.*{target}" for target in self.targets)
        return Mixture(tuple(members), LoraConfig(targets, self.rank, self.alpha, self.dropout))


def options_of(
    config: InstructionsConfig, data: InstructionData, num_soft: int, seed: int
) -> InstructionOptions:
    """What is asked of cells, as a configuration says."""
    if not (data.studies or data.dataset):
        raise ConfigError(
            "the abstracts of studies are missing: name a YAML file of the form `STUDY: {abstract: TEXT}` by "
            "--config.data.studies."
        )
    return InstructionOptions(
        tasks=tuple((task, float(weight)) for task, weight in config.tasks),
        num_soft=num_soft,
        length=data.length,
        cell_type=data.cell_type,
        disease=data.disease,
        pathways=data.pathways,
        normal=tuple(data.normal),
        rare_share=data.rare_share,
        studies=read_study_texts(data.studies) if data.studies else study_texts(data.dataset),
        seed=seed,
    )


def make_tokenizer(store: Store, config: InstructionsConfig, data: InstructionData, seed: int) -> Tokenizer:
    """Tokenizer of the decoder, or a byte-level BPE trained on all that instructions and corpus say."""
    if data.llm:
        return load_tokenizer(data.llm)
    study_metadata = options_of(config, data, 1, seed).studies
    prompts = load_prompts(config.prompts or None, INSTRUCTION_PROMPTS)
    texts = [template.prompt for many in prompts.templates.values() for template in many]
    texts += [
        text for entry in study_metadata.values() for value in entry.values() for text in np.atleast_1d(value)
    ]
    for study in store.split("train"):
        table = study.obs({name for name in (data.cell_type, data.disease) if name})
        texts += [str(value) for column in table for value in table[column].dropna().unique()]
    return train_bpe([*texts * _READ, *GeneCorpus.built_in().texts[:_CORPUS_GENES]], data.vocab_size)


def parts_of(
    data: InstructionData,
    vocabulary: GeneVocabulary,
    values: Mapping[str, Any],
    vocab_size: int,
    mesh: Mesh | None = None,
    frozen: bool = False,
) -> tuple[dict[str, Any], np.ndarray, dict[str, Any], str]:
    """Architecture, genes that the cell model knows, bool (G,), arrays by path, and licence of the two models.

    Parameters
    ----------
    data
        Names the models.
    vocabulary
        Genes of the store.
    values
        Of the architecture; what the two models bring goes before them, but for how they compute.
    vocab_size
        Of the tokenizer, for a decoder that is trained from random parameters.
    mesh
        Devices that share the arrays.
    frozen
        Whether the decoder is not trained: it is then loaded in the type of the computation.

    Raises
    ------
    SctError
        A model is missing, damaged, of another kind or of other genes.
    """
    if not data.cell_encoder:
        raise ConfigError(
            "data.cell_encoder is empty, but instruction tuning needs a cell encoder: train one with "
            "configs/zeromics_sc.py and set --config.data.cell_encoder to its run."
        )
    made = dict(values)
    given: dict[str, Any] = {}
    cells = load(data.cell_encoder, genes=vocabulary, mesh=mesh)
    if not isinstance(cells.config, ZerOmicsCellsConfig):
        raise ConfigError(
            f"{data.cell_encoder} is a model of the family {cells.family!r}, but one of zeromics_cells is needed."
        )
    learned = CellOptions.of(cells.config.num_bins, cells.data).record()
    for option, asked in CellOptions.of(cells.config.num_bins, data).record().items():
        if asked != learned[option]:
            raise ConfigError(
                f"data.{option} is {asked!r}, but the cell model was trained with {learned[option]!r}: set it to that, "
                "for the model has seen no other cells."
            )
    known = known_genes(len(vocabulary), cells.data["dropped"])
    models = {"cells": cells}
    if data.llm:
        kind = dict(made.get("llm", {})).get("dtype", "float32")
        models["llm"] = load(data.llm, mesh=mesh, dtype=kind if frozen else None)
        if not isinstance(models["llm"].config, LlamaConfig):
            raise ConfigError(
                f"{data.llm} is a model of the family {models['llm'].family!r}, but one of llama is needed."
            )
    for name, model in models.items():
        own = made.get(name, {})
        made[name] = computing(dataclasses.asdict(model.config), own)
        params = flatten(lora.merge(model.variables)["params"])
        if name == "cells" and own.get("encoder", "transformer") != "transformer":
            # The ablation has neither layers nor bins of its own.
            made[name]["encoder"] = own["encoder"]
            params = {path: leaf for path, leaf in params.items() if not path.startswith(("layers/", "bin/"))}
        given |= {f"params/{name}/{path}": leaf for path, leaf in params.items()}
    if not data.llm:
        own = dict(made.get("llm", {}))
        made["llm"] = {**own, "vocab_size": own.get("vocab_size") or vocab_size}
    licenses = {model.license for model in models.values()} - {"unknown"}
    return made, known, given, " and ".join(sorted(licenses)) or "unknown"


class Instructions:
    """Task of ZerOmics' second stage; see `sct.tasks.base.Task`.

    Parameters
    ----------
    config, data
        Options.
    model
        Architecture.
    tokenizer
        Of instructions.
    store
        Cells.
    known
        Genes that the cell model knows, bool (G,).
    given
        Arrays by path of the two models to start from; empty where a checkpoint or another model has them.
    seed
        Of tasks, templates and the order of candidates.
    license
        Of what is given.
    """

    may_be_missing: Sequence[str] = lora.NEW
    loss_normalizer = "predicted"
    monitor, monitor_mode = "loss", "min"

    def __init__(
        self,
        config: InstructionsConfig,
        data: InstructionData,
        model: ZerOmicsConfig,
        tokenizer: Tokenizer,
        store: Store,
        known: np.ndarray,
        given: Mapping[str, Any],
        seed: int,
        license: str = "unknown",
    ):
        if model.num_genes != len(store.vocabulary):
            raise ConfigError(
                f"the cell model has {model.num_genes} genes, but the store's vocabulary {len(store.vocabulary)}: "
                "ingest the cells with the genes of the model."
            )
        if model.llm.vocab_size < tokenizer.vocab_size:
            raise ConfigError(
                f"the decoder has {model.llm.vocab_size} tokens, but the tokenizer {tokenizer.vocab_size}: give the "
                "decoder's own."
            )
        self.config, self.data, self.model_config, self.store, self.seed = config, data, model, store, seed
        self.model, self.tokenizer, self.vocabulary = ZerOmics(model), tokenizer, store.vocabulary
        self.known, self.license = known, license
        self.given: Mapping[str, Any] = given
        self.options = options_of(config, data, model.num_soft, seed)
        self.prompts = load_prompts(config.prompts or None, INSTRUCTION_PROMPTS)
        self.cells = CellOptions.of(model.cells.num_bins, data)
        if data.studies:
            check_study_names(self.options.studies, store, data.studies)
        self.mixture = config.mixture
        self.lora: AdapterConfig | None = self.mixture.config
        self.tokens_per_record = data.length
        # The map of a model without tokenizer, where one is needed, is random and stays so.
        fixed = model.tokenizer == "none"
        has = not fixed or model.cells.embed_dim != model.llm.embed_dim
        self.trainable: Sequence[tuple[str, bool]] = (
            ("^params/cells/(features$|bin_head/|gene_head/)", False),
            ("^params/cells/", config.train_cells),
            ("^params/llm/", config.train_llm),
            *([("^params/tokenizer/", not fixed)] if has else []),
            *lora.TRAINABLE,
        )

    def take_pretrained_params(self) -> Mapping[str, Any]:
        """Arrays of the two models."""
        given, self.given = self.given, {}
        return given

    def init(self, rng: jax.Array) -> Variables:
        """Initial variables, boxed."""
        variables = cast(Variables, self.model.init(rng, *ZerOmics.example(self.model_config).values()))
        adapters = lora.init(jax.random.fold_in(rng, 1), variables["params"], self.mixture.config)
        params = dict(variables["params"])
        if not self.config.train_llm:
            # What no training changes needs no more digits than are computed with.
            kind = jnp.dtype(self.model_config.llm.dtype)
            params["llm"] = jax.tree.map(
                lambda leaf: leaf.astype(kind) if leaf.ndim > 1 else leaf, params["llm"]
            )
        return {**variables, "params": params, "adapters": adapters}

    def gates(self, task: jax.Array) -> jax.Array:
        """Which columns of the adapters each cell trains (B, members x rank), by the number of its task (B,)."""
        members = self.mixture.members
        own = jnp.asarray(
            [[member in (UNIVERSAL, name) for member in members] for name, _ in self.config.tasks]
        )
        return self.mixture.gate(own[task])

    def loss(
        self, variables: Variables, batch: DeviceBatch, rng: jax.Array, train: bool
    ) -> tuple[jax.Array, MetricSums]:
        """Mean cross-entropy of the tokens of answers and of their ends.

        Returns the loss and sums: `loss` over `predicted` tokens (count), `right` tokens, and for each task `answers`
        and those that are `exact`, every token the best one (T,).
        """
        ids, genes = batch["input_ids"], batch.get("genes")
        if train:
            variables = lora.gated(variables, self.gates(batch["task"]))
        rates = (self.model_config.cells.dropout, self.model_config.llm.dropout + self.config.dropout)
        encoding, reading = (
            {"dropout": key} if train and rate else {}
            for key, rate in zip(jax.random.split(rng), rates, strict=True)
        )
        encoded = self.model.apply(variables, batch["bins"], genes, rngs=encoding, method="encode")
        if not self.config.train_cells:
            encoded = jax.lax.stop_gradient(encoded)
        soft = self.model.apply(variables, encoded, genes, method="soft")
        # Padding stands behind what is read, where no token of a causal decoder sees it: without a mask attention can
        # be the fast kernel of a GPU.
        hidden = self.model.apply(variables, ids, None, soft, rngs=reading, method="hidden_states")

        def scores(x: jax.Array) -> jax.Array:
            return cast(jax.Array, self.model.apply(variables, x, method="logits"))

        losses, right, counts = next_token_losses(
            scores,
            cast(jax.Array, hidden),
            ids,
            batch["predicted"],
            batch["example_mask"],
            self.model_config.llm.vocab_size,
        )
        total, count = (losses * counts).sum(), counts.sum()
        answered = counts.sum(axis=1) > 0
        exact = answered & ((right * counts).sum(axis=1) == counts.sum(axis=1))
        of_task = jax.nn.one_hot(batch["task"], len(self.config.tasks)) * answered[:, None]
        sums = {
            "loss": total,
            "predicted": count,
            "right": (right * counts).sum(),
            "answers": of_task.sum(axis=0),
            "exact": (of_task * exact[:, None]).sum(axis=0),
        }
        return total / jnp.maximum(count, 1.0), sums

    def compute_metrics(self, sums: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Mean loss in nats, share of right tokens, and for each task that of answers that are right as a whole."""
        count = max(float(sums["predicted"]), 1.0)
        summary = {"loss": float(sums["loss"]) / count, "accuracy": float(sums["right"]) / count}
        for (task, _), answers, exact in zip(self.config.tasks, sums["answers"], sums["exact"], strict=True):
            if answers:
                summary[f"{task_name(task)}_exact"] = float(exact / answers)
        return summary

    @functools.cache  # noqa: B019 (a run has one task)
    def dataset(self, split: str) -> InstructionSource | None:
        """Cells of a split with an instruction each."""
        studies = self.store.split(split)
        if not studies:
            return None
        return InstructionSource(
            studies,
            self.cells,
            self.options,
            self.prompts,
            self.tokenizer,
            self.known,
            exhaustive=split != "train",
        )

    def evaluators(self) -> Sequence[Evaluator]:
        """Answers about held-out cells beside baselines, on the test studies, else the validation ones."""
        held_out, note = held_out_split(self.store)
        if held_out is None or not self.config.report_cells:
            return ()
        from sct.tasks.instruction_reports import reports

        train, after = (
            [StudyQuestions(study, self.options) for study in self.store.split(split)]
            for split in ("train", held_out)
        )
        tasks = [task for task, _ in self.config.tasks]
        options = (tasks, self.config.report_cells, self.config.report_seeds, note)
        return list(reports(self._instruction_model, train, after, *options))

    def _instruction_model(self, variables: Variables) -> InstructionModel:
        """Model with these variables, ready to be asked."""
        parts = self.exports()
        return InstructionModel.of(
            self.model_config, variables, parts["tokenizer"], parts["genes"], parts["data"]
        )

    def tokens(self, batch: Mapping[str, Any]) -> int:
        """Tokens in a batch, padding included."""
        return int(np.prod(batch["input_ids"].shape))

    def operations(self, records: int) -> float:
        """Operations of the matrix products of a forward pass; a multiply-add counts as two."""
        genes = self.data.max_genes or self.model_config.cells.num_genes
        return ZerOmics.flops(self.model_config, records, self.data.length, genes)

    def exports(self) -> dict[str, Any]:
        """Genes, tokenizer, and how instructions were made in training."""
        described = {
            "task": NAME,
            "tasks": [task for task, _ in self.config.tasks],
            "members": list(self.mixture.members),
            "normal": list(self.options.normal),
            **self.cells.record(),
            "length": self.data.length,
            "dropped": np.flatnonzero(~self.known).tolist(),
            "prompts": self.prompts.plain(),
        }
        return {"genes": self.vocabulary, "tokenizer": self.tokenizer, "data": described}

    def notes(self, fresh: bool) -> Sequence[str]:
        """Tell what is trained."""
        parts = [
            f"{len(self.mixture.members)} adapters ({', '.join(self.mixture.members)})",
            "the cell tokenizer",
        ]
        parts += ["the decoder"] * self.config.train_llm + ["the cell model"] * self.config.train_cells
        return (
            f"{', '.join(parts)} are trained; {self.model_config.num_soft} soft tokens of {self.data.length}.",
        )


def make(inputs: TaskInputs) -> Instructions:
    """Make the task of the parts of a configuration."""
    assert inputs.tokenizer is not None
    vocabulary, parent, values = inputs.store.vocabulary, inputs.parent_data_spec, dict(inputs.model)
    if parent is not None and parent.get("task") == NAME:
        given: dict[str, Any] = {}
        license = "unknown"
        if parent["members"] != list(inputs.objective.mixture.members):
            has, asked = (
                ", ".join(map(task_name, each))
                for each in (parent["members"], inputs.objective.mixture.members)
            )
            raise ConfigError(
                f"the model has adapters for {has}, but the configuration asks for {asked}: name the same tasks in the "
                "same order."
            )
        known = known_genes(len(vocabulary), parent["dropped"])
    else:
        if not inputs.data.llm and not inputs.objective.train_llm:
            raise ConfigError(
                "LoRA needs a pretrained decoder: set --config.data.llm=FOLDER, or train one with "
                "--config.objective.train_llm=True."
            )
        size = inputs.tokenizer.vocab_size
        values, known, given, license = parts_of(
            inputs.data, vocabulary, values, size, inputs.mesh, not inputs.objective.train_llm
        )
    model = registry.model_config(inputs.architecture, values, len(vocabulary))
    return Instructions(
        inputs.objective,
        inputs.data,
        model,
        inputs.tokenizer,
        inputs.store,
        known,
        given,
        inputs.seed,
        license,
    )


SPEC = TaskSpec(
    NAME, InstructionsConfig, InstructionData, make, make_tokenizer, inherits_architecture=True, speed=()
)
