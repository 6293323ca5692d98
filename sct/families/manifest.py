"""Define the manifest of a family: its architectures, their tasks, the abilities of its models, and its converters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sct.data.genes.vocabulary import GeneVocabulary
from sct.generation.cell_sentence_model import CellSentenceModel
from sct.generation.instruction_model import InstructionModel
from sct.inference.answers import Annotator
from sct.inference.bags import BagReader
from sct.inference.gene_vectors import GeneVectors
from sct.inference.readers import CellReader
from sct.models.adapter_kinds import AdapterConfig, LoraConfig
from sct.models.registry import Architecture
from sct.tasks import annotation
from sct.tasks.finetuning import FineTuning
from sct.tasks.task_spec import TaskSpec
from sct.weights.pretrained import Pretrained


@dataclasses.dataclass(frozen=True)
class FamilyModel:
    """One architecture of a family, with its tasks and abilities.

    Each ability (`embed`, `impute`, ...) is a function from a loaded model to the object that implements the ability,
    or None if the architecture does not offer it.

    Attributes
    ----------
    architecture
        Configuration class and Flax module.
    tasks
        Tasks that train this architecture.
    config
        Configuration file that trains this architecture, shown in error messages; "" if there is none.
    adapters
        Adapter types that the architecture accepts (`sct.models.adapter_kinds`).
    embed
        Returns the object with which `sct.tl.embed` embeds cells.
    embed_genes
        Returns the object that computes a vector for each gene (`sct.tl.gene_embeddings`).
    impute
        Returns the object that predicts the expression levels of masked genes, for `sct.tl.impute` and the imputation
        benchmark.
    annotate
        Returns the object that predicts cell labels as text, for `sct.tl.annotate` without a reference.
    generate, describe
        Return the model that generates cells as sentences (`sct.tl.generate_cells`) or describes cells
        (`sct.tl.describe`).
    ask
        Returns the model that answers questions about cells (`sct.tl.ask`, `find_rare`, `find_tumor`,
        `infer_pathways`).
    finetune
        How the models are fine-tuned for cell types (`sct.tl.finetune`), with the reader of `embed`; None if they are
        not.
    """

    architecture: Architecture
    tasks: tuple[TaskSpec, ...] = ()
    config: str = ""
    adapters: tuple[type[AdapterConfig], ...] = (LoraConfig,)
    embed: Callable[[Pretrained], CellReader] | None = None
    embed_genes: Callable[[Pretrained], GeneVectors] | None = None
    impute: Callable[[Pretrained], BagReader] | None = None
    annotate: Callable[[Pretrained], Annotator] | None = None
    generate: Callable[[Pretrained], CellSentenceModel] | None = None
    describe: Callable[[Pretrained], CellSentenceModel] | None = None
    ask: Callable[[Pretrained], InstructionModel] | None = None
    finetune: FineTuning | None = None

    @property
    def trained_by(self) -> tuple[TaskSpec, ...]:
        """Tasks that train this architecture: `tasks`, and fine-tuning where the architecture supports it."""
        return self.tasks if self.finetune is None else (*self.tasks, annotation.SPEC)

    @property
    def abilities(self) -> tuple[str, ...]:
        """Names of the abilities that this architecture offers, which are keys of `ABILITIES`."""
        return tuple(name for name in ABILITIES if getattr(self, name) is not None)


# Ability -> verb phrase. Error messages and the family pages use it after "can".
ABILITIES: Mapping[str, str] = {
    "embed": "embed cells",
    "embed_genes": "embed genes",
    "impute": "impute genes",
    "annotate": "predict cell labels",
    "generate": "generate cells",
    "describe": "describe cells",
    "ask": "answer questions about cells",
}


@dataclasses.dataclass(frozen=True)
class Converter:
    """Functions that read and write weights in the format of another project.

    Attributes
    ----------
    read
        Function of (source, target, dtype, genes, numbered) that converts the folder `source` to a model folder
        `target`. If `numbered` is True, the names of the genes are numbers.
    write
        Function of (model, target, dtype) that writes `model` in the other format; None if the format can only be read.
    notice
        License notice shown to the user.
    takes_genes
        Whether the user may supply the gene order.
    title
        Display name of the format.
    weights
        Short text that says which published weights have this format.
    files
        Sentences that say which files an input folder DIR needs, and what is special about the conversion.
    """

    read: Callable[[Path, Path, str, GeneVocabulary | None, bool], None]
    write: Callable[[Any, Path, str], None] | None = None
    notice: str = ""
    takes_genes: bool = False
    title: str = ""
    weights: str = ""
    files: str = ""


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family, with its architectures, converters and documentation.

    Attributes
    ----------
    name, title
        Short name, and a one-line description.
    paper
        Title of the paper that describes the family.
    guide
        Path of the user guide in the documentation; "" if there is none.
    license
        License notice for the published weights.
    models
        Dict of architectures by name. The field `family` of configurations and model folders holds one of these names.
    converters
        Dict of weight converters. The keys are the format names that `launch.convert` uses.
    """

    name: str
    title: str
    paper: str
    models: Mapping[str, FamilyModel]
    guide: str = ""
    license: str = ""
    converters: Mapping[str, Converter] = dataclasses.field(default_factory=dict)
