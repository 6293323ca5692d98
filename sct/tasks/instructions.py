"""Train a language model to answer questions about a cell, given as soft tokens (ZerOmics, section 3.2)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from sct.checks import check_at_least, check_share
from sct.data.bundled import study_texts
from sct.data.cell_options import CellOptions
from sct.data.cell_records import known_genes
from sct.data.genes.corpus import GeneCorpus
from sct.data.genes.vocabulary import GeneVocabulary
from sct.data.store import Store
from sct.data.text.instructions import InstructionOptions, InstructionSource, StudyQuestions, read_study_texts
from sct.data.text.prompts import INSTRUCTION_PROMPTS, load_prompts, task_name
from sct.data.text.tokenizer import Tokenizer, train_bpe
from sct.errors import ConfigError
from sct.generation.instruction_model import TASK, InstructionModel
from sct.models import lora, registry
from sct.models.adapter_kinds import AdapterConfig
from sct.models.decoder_config import LlamaConfig
from sct.models.registry import computing
from sct.models.zeromics import ZerOmicsConfig
from sct.models.zeromics_cells import ZerOmicsCellsConfig
from sct.nn.paths import flatten
from sct.tasks.base import (
    Evaluator,
    StoreConfig,
    Variables,
    check_study_names,
    file_option,
    held_out_split,
)
from sct.tasks.instruction_objective import InstructionObjective, InstructionsConfig
from sct.tasks.masked_bins import check_binned
from sct.tasks.task_spec import TaskInputs, TaskSpec
from sct.weights.load import load, load_tokenizer

NAME = TASK
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


class Instructions(InstructionObjective):
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
        super().__init__(config, model, data.length, data.max_genes)
        self.data, self.store, self.seed = data, store, seed
        self.tokenizer, self.vocabulary = tokenizer, store.vocabulary
        self.known, self.license = known, license
        self.given: Mapping[str, Any] = given
        self.options = options_of(config, data, model.num_soft, seed)
        self.prompts = load_prompts(config.prompts or None, INSTRUCTION_PROMPTS)
        self.cells = CellOptions.of(model.cells.num_bins, data)
        if data.studies:
            check_study_names(self.options.studies, store, data.studies)
        self.lora: AdapterConfig | None = self.mixture.config
        self.tokens_per_record = data.length

    def take_pretrained_params(self) -> Mapping[str, Any]:
        """Return the pretrained arrays of the cell encoder and the decoder, by parameter path."""
        given, self.given = self.given, {}
        return given

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
