"""Train a language model to answer questions about a cell, given as soft tokens (ZerOmics, section 3.2)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sct.checks import check_at_least, check_not_empty, check_share
from sct.data.bundled import study_texts
from sct.data.cell_options import CellOptions
from sct.data.cell_records import known_genes
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
# The paper trains on the first three. It uses the fourth, pathways, only for zero-shot and few-shot evaluation.
TRAINED_TASKS = ("cta", "rci", "tcd", "cpi")
_CORPUS_GENES = 2_000  # gene summaries in the training corpus of a tokenizer
# Copies of each instruction text in the training corpus of a tokenizer. With one copy, the vocabulary goes to the words
# of gene summaries: an instruction of the quickstart then takes 350 tokens and not 170.
_INSTRUCTION_COPIES = 30


@dataclasses.dataclass(frozen=True)
class InstructionData(StoreConfig):
    """Data options: the cells, the metadata of their studies, and the two pretrained models.

    Parameters
    ----------
    cell_encoder
        Run folder or model folder of the cell encoder, which a run of `configs/zeromics_sc.py` trains.
    llm
        Pretrained decoder: a Hugging Face LLaMA folder or a model folder. "" starts from a random decoder with the
        options `model.llm`.
    max_genes, genes, values
        See `sct.tasks.masked_bins.BinData`. They must match the options that the cell encoder was trained with.
    studies
        YAML file with the metadata of the studies. `sct.data.text.instructions` describes its format.
    length, cell_type, disease, pathways, normal, rare_share
        See `sct.data.text.instructions.InstructionOptions`.
    tokenizer
        Tokenizer file or folder. The default is the tokenizer of the decoder. Without a pretrained decoder, a tokenizer
        is trained on the templates, the study metadata and the gene summaries.
    vocab_size
        Largest vocabulary of a trained tokenizer.
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
        """Number of tokens in each row of training text."""
        return self.length


@dataclasses.dataclass(frozen=True)
class InstructionsConfig(ObjectiveConfig):
    """Options of the objective: tasks, adapters, and the reports after training.

    Parameters
    ----------
    tasks
        Pairs of (task, sampling weight). The tasks are "cell_type", "rare_cell", "tumor" and "pathway". The paper's
        codes ("cta", "rci", "tcd", "cpi") also work. The names are converted to codes, so this field holds only codes.
    prompts
        JSON file with further prompt templates.
    rank, alpha, dropout
        Options of each LoRA adapter. The paper uses rank 8 and alpha 8.
    targets
        Regular expressions over module paths of the decoder. The default is the query and value projections.
    universal, of_tasks
        Whether to train a universal adapter, which all tasks share, and whether to train one adapter per task. The
        ablations of Table 5 leave out one of the two.
    members
        Names of the adapters of the model in `init_from`. Set this option if that model was trained on other tasks. A
        task without an adapter of its own then trains the universal adapter, which all tasks share. By default, the
        names follow from `universal`, `of_tasks` and `tasks`.
    train_llm, train_cells
        `train_llm`: whether to train the parameters of the decoder as well. `train_cells`: whether to train those of
        the cell encoder as well.
    report_cells, report_seeds
        Number of held-out cells in the reports after training (0: no reports), and number of random seeds.
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
                    f"objective.tasks has the entry {entry!r}, but each entry must be a pair of a task and a positive "
                    f"weight, such as ({task_name(TRAINED_TASKS[0])!r}, 1.0): correct this entry with a task from "
                    f"{', '.join(map(task_name, TRAINED_TASKS))}."
                )
        # Store codes, so that a run started with codes can resume with names.
        object.__setattr__(self, "tasks", tuple((task_code(task), weight) for task, weight in self.tasks))
        object.__setattr__(self, "members", tuple(map(task_code, self.members)))
        check_at_least("report_cells", self.report_cells, 0)
        check_at_least("report_seeds", self.report_seeds, 1)
        check_not_empty("objective.tasks", self.tasks)
        if not (self.universal or self.of_tasks):
            raise ConfigError(
                "objective.universal and objective.of_tasks are both False, so no adapter would be trained: set one of "
                "the two options to True."
            )
        alone = [task for task, _ in self.tasks if task not in self.members]
        if self.members and UNIVERSAL not in self.members and alone:
            raise ConfigError(
                f"objective.members contains neither {task_name(alone[0])!r} nor {UNIVERSAL!r}, so no adapter would "
                f"learn the task {task_name(alone[0])!r}: remove this task from objective.tasks, start from a model "
                f"with an adapter named {task_name(alone[0])!r} or {UNIVERSAL!r}, or leave objective.members empty to "
                "train new adapters."
            )

    @property
    def mixture(self) -> Mixture:
        """LoRA adapters of the decoder (universal and per task), whose outputs are summed."""
        members = [UNIVERSAL] * self.universal + [task for task, _ in self.tasks] * self.of_tasks
        members = list(self.members) or members
        targets = tuple(f"llm/.*{target}" for target in self.targets)
        return Mixture(tuple(members), LoraConfig(targets, self.rank, self.alpha, self.dropout))


def options_of(
    config: InstructionsConfig, data: InstructionData, num_soft: int, seed: int
) -> InstructionOptions:
    """Combine a configuration's objective and data sections into the options that turn cells into instructions."""
    if not (data.studies or data.dataset):
        raise ConfigError(
            "data.studies is empty, but instructions need the abstract of each study: set --config.data.studies to a "
            "YAML file of the form `STUDY: {abstract: TEXT}`."
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
    """Load the decoder's tokenizer, or train a byte-level BPE on instructions, study metadata and gene summaries."""
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
    return train_bpe(
        [*texts * _INSTRUCTION_COPIES, *GeneCorpus.built_in().texts[:_CORPUS_GENES]], data.vocab_size
    )


def parts_of(
    data: InstructionData,
    vocabulary: GeneVocabulary,
    values: Mapping[str, Any],
    vocab_size: int,
    mesh: Mesh | None = None,
    frozen: bool = False,
) -> tuple[dict[str, Any], np.ndarray, dict[str, Any], str]:
    """Load the cell encoder and the decoder, and derive the architecture of the whole model from them.

    Parameters
    ----------
    data
        Data options, which name the two models.
    vocabulary
        Genes of the store.
    values
        Options of the architecture. The sizes of the two loaded models replace the sizes in `values`. Options that only
        affect how the model is computed (such as `dtype`) do not change.
    vocab_size
        Vocabulary size of the tokenizer, for a decoder with random parameters.
    mesh
        Devices over which to shard the arrays.
    frozen
        Whether the decoder stays frozen. A frozen decoder is loaded in the compute dtype, to save memory.

    Returns
    -------
    architecture : dict
        Options of the whole model.
    known : numpy.ndarray
        bool (G,), whether the cell encoder can read the gene.
    params : dict
        Pretrained arrays by parameter path.
    license : str
        License texts of the two models.

    Raises
    ------
    SctError
        A model is missing, damaged, of another family, or was trained on other genes.
    """
    if not data.cell_encoder:
        raise ConfigError(
            "data.cell_encoder is empty, but instruction tuning needs a cell encoder: train a cell encoder "
            "with configs/zeromics_sc.py and set --config.data.cell_encoder to its run folder."
        )
    made = dict(values)
    given: dict[str, Any] = {}
    cells = load(data.cell_encoder, genes=vocabulary, mesh=mesh)
    if not isinstance(cells.config, ZerOmicsCellsConfig):
        raise ConfigError(
            f"data.cell_encoder is {data.cell_encoder}, a model of the family {cells.family!r}, but it must "
            "be of the family zeromics_cells: train a cell encoder with configs/zeromics_sc.py."
        )
    learned = CellOptions.of(cells.config.num_bins, cells.data).record()
    for option, asked in CellOptions.of(cells.config.num_bins, data).record().items():
        if asked != learned[option]:
            raise ConfigError(
                f"data.{option} is {asked!r}, but the cell encoder was trained with {learned[option]!r}: set "
                f"data.{option} to {learned[option]!r}."
            )
    known = known_genes(len(vocabulary), cells.data["dropped"])
    models = {"cells": cells}
    if data.llm:
        kind = dict(made.get("llm", {})).get("dtype", "float32")
        models["llm"] = load(data.llm, mesh=mesh, dtype=kind if frozen else None)
        if not isinstance(models["llm"].config, LlamaConfig):
            raise ConfigError(
                f"data.llm is {data.llm}, a model of the family {models['llm'].family!r}, but it must be of "
                "the family llama: set data.llm to the folder of a LLaMA model."
            )
    for name, model in models.items():
        own = made.get(name, {})
        made[name] = computing(dataclasses.asdict(model.config), own)
        params = flatten(lora.merge(model.variables)["params"])
        if name == "cells" and own.get("encoder", "transformer") != "transformer":
            # The ablation without a transformer has no parameters for layers and bins.
            made[name]["encoder"] = own["encoder"]
            params = {path: leaf for path, leaf in params.items() if not path.startswith(("layers/", "bin/"))}
        given |= {f"params/{name}/{path}": leaf for path, leaf in params.items()}
    if not data.llm:
        own = dict(made.get("llm", {}))
        made["llm"] = {**own, "vocab_size": own.get("vocab_size") or vocab_size}
    licenses = {model.license for model in models.values()} - {"unknown"}
    return made, known, given, " and ".join(sorted(licenses)) or "unknown"


class Instructions:
    """Task of the second training stage of ZerOmics, instruction tuning; see `sct.tasks.base.Task`.

    Parameters
    ----------
    config, data
        Options of the objective and of the data.
    model
        Configuration of the architecture.
    tokenizer
        Tokenizer of the instructions.
    store
        Store with the cells.
    known
        bool (G,), whether the cell encoder can read the gene.
    given
        Pretrained arrays of the two models, by parameter path. Empty if they come from a checkpoint or from
        `init_from`.
    seed
        Seed that draws tasks, templates and the order of candidates.
    license
        License of the pretrained arrays.
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
                f"the cell encoder has {model.num_genes} genes, but the store's vocabulary has "
                f"{len(store.vocabulary)}: ingest the cells again with the genes of the cell encoder (--genes=FILE)."
            )
        if model.llm.vocab_size < tokenizer.vocab_size:
            raise ConfigError(
                f"the decoder has only {model.llm.vocab_size} tokens in its vocabulary, but the tokenizer has "
                f"{tokenizer.vocab_size}: leave data.tokenizer empty to use the tokenizer of the decoder."
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
        # With tokenizer "none", a random projection bridges different embedding sizes. It is not trained.
        fixed = model.tokenizer == "none"
        has_projection = not fixed or model.cells.embed_dim != model.llm.embed_dim
        self.trainable: Sequence[tuple[str, bool]] = (
            ("^params/cells/(features$|bin_head/|gene_head/)", False),
            ("^params/cells/", config.train_cells),
            ("^params/llm/", config.train_llm),
            *([("^params/tokenizer/", not fixed)] if has_projection else []),
            *lora.TRAINABLE,
        )

    def take_pretrained_params(self) -> Mapping[str, Any]:
        """Return the pretrained arrays of the cell encoder and the decoder, by parameter path."""
        given, self.given = self.given, {}
        return given

    def init(self, rng: jax.Array) -> Variables:
        """Return the initial variables, boxed with their logical axis names."""
        variables = cast(Variables, self.model.init(rng, *ZerOmics.example(self.model_config).values()))
        adapters = lora.init(jax.random.fold_in(rng, 1), variables["params"], self.mixture.config)
        params = dict(variables["params"])
        if not self.config.train_llm:
            # Frozen parameters need no more precision than the compute dtype.
            kind = jnp.dtype(self.model_config.llm.dtype)
            params["llm"] = jax.tree.map(
                lambda leaf: leaf.astype(kind) if leaf.ndim > 1 else leaf, params["llm"]
            )
        return {**variables, "params": params, "adapters": adapters}

    def gates(self, task: jax.Array) -> jax.Array:
        """Return a mask (B, members x rank): an entry is 1 if the cell trains the adapter column, otherwise 0.

        `task` (B,) is the index of each cell's task.
        """
        members = self.mixture.members
        own = jnp.asarray(
            [[member in (UNIVERSAL, name) for member in members] for name, _ in self.config.tasks]
        )
        return self.mixture.gate(own[task])

    def loss(
        self, variables: Variables, batch: DeviceBatch, rng: jax.Array, train: bool
    ) -> tuple[jax.Array, MetricSums]:
        """Return the mean cross-entropy of the answer tokens, including the end token.

        Also returns sums over the batch. `loss` is the summed loss. `predicted` is the number of predicted tokens, and
        `right` is the number of correct ones. `answers` and `exact` have one entry per task, (T,): the number of
        answers, and the number of answers in which every token is correct.
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
        # Padding comes last, so causal attention never reads it. Without a mask, GPUs can use a fast attention kernel.
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
        """Return the mean loss in nats, the token accuracy, and each task's fraction of exactly correct answers."""
        count = max(float(sums["predicted"]), 1.0)
        summary = {"loss": float(sums["loss"]) / count, "accuracy": float(sums["right"]) / count}
        for (task, _), answers, exact in zip(self.config.tasks, sums["answers"], sums["exact"], strict=True):
            if answers:
                summary[f"{task_name(task)}_exact"] = float(exact / answers)
        return summary

    @functools.cache  # noqa: B019 (a run has one task)
    def dataset(self, split: str) -> InstructionSource | None:
        """Return the cells of a split with one instruction each, or None if the split is empty."""
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
        """Return the evaluations of answers against baselines.

        The evaluations use the test studies, or the validation studies if there are no test studies.
        """
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
        """Return an `InstructionModel` that uses the given variables."""
        parts = self.exports()
        return InstructionModel.of(
            self.model_config, variables, parts["tokenizer"], parts["genes"], parts["data"]
        )

    def tokens(self, batch: Mapping[str, Any]) -> int:
        """Return the number of tokens in a batch, including padding."""
        return int(np.prod(batch["input_ids"].shape))

    def operations(self, records: int) -> float:
        """Return the FLOPs of the matrix products in one forward pass. A multiply-add counts as 2 FLOPs."""
        genes = self.data.max_genes or self.model_config.cells.num_genes
        return ZerOmics.flops(self.model_config, records, self.data.length, genes)

    def exports(self) -> dict[str, Any]:
        """Return the genes, the tokenizer, and the options with which cells become training instructions."""
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
        """Return a notice that says which components of the model are trained."""
        parts = [
            f"{len(self.mixture.members)} adapters ({', '.join(self.mixture.members)})",
            "the cell tokenizer",
        ]
        parts += ["the decoder"] * self.config.train_llm + ["the cell encoder"] * self.config.train_cells
        return (
            f"trained parts: {', '.join(parts)}; {self.model_config.num_soft} of {self.data.length} tokens in a row "
            "are soft tokens.",
        )


def make(inputs: TaskInputs) -> Instructions:
    """Build the task from `TaskInputs`, which hold the sections of a configuration."""
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
                f"the model has the adapters {has}, but the configuration asks for {asked}: list {has} in "
                "objective.members, in this order."
            )
        known = known_genes(len(vocabulary), parent["dropped"])
    else:
        if not inputs.data.llm and not inputs.objective.train_llm:
            raise ConfigError(
                "LoRA needs a pretrained decoder, but --config.data.llm is not set: set "
                "--config.data.llm=FOLDER, or train the decoder itself with --config.objective.train_llm=True."
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
